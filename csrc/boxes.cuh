// Whole tiles copied by the tensor memory accelerator (TMA): a box for each panel, which its
// swizzle of 128 bytes lays out as tile/shared.cuh has it. One thread starts the copy, an mbarrier
// counts what has come.
#pragma once

#include <cuda.h>
#include <stdint.h>

#include "launch.cuh"
#include "ptx/tma.cuh"
#include "tile/shared.cuh"
#include "tilemask.h"

// Of which batch and head a block's tiles are, as coordinates of a tensor map.
struct BoxPlace {
  int head, batch;
};

// A dimension along which a tensor is repeated is one of the map with one element.
__device__ __forceinline__ BoxPlace box_place(const TilemaskTensor& tensor, int b, int h) {
  return {tensor.head ? h : 0, tensor.batch ? b : 0};
}

// Starts the copy of ROWS rows from first_row on. One thread calls this.
template <int ROWS, int WIDTH>
__device__ __forceinline__ void load_boxes(uint32_t tile, const CUtensorMap& map, uint32_t barrier,
                                           const BoxPlace& place, int first_row) {
  mbarrier_arrive_expect(barrier, TILE_BYTES<ROWS, WIDTH>);
#pragma unroll
  for (int panel = 0; panel < WIDTH / PANEL; ++panel)
    copy_box(tile + panel * (ROWS * ROW_BYTES), map, barrier, panel * PANEL, first_row, place.head,
             place.batch);
}

// Whether kernels for a device copy boxes.
inline bool has_boxes(int device) {
  int major = 0;
  return !cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) && major >= 9;
}

// Whether a chunked tensor has a tensor map: its rows must not overlap.
inline bool is_mappable(const TilemaskTensor& tensor, int length, int width) {
  return tensor.row >= width || length <= 1;
}

// The tensor map of [batch, heads, length, width], with boxes of `rows` rows of a panel.
inline int encode_boxes(CUtensorMap& map, const TilemaskTensor& tensor, int dtype, int batch,
                        int heads, int length, int width, int rows) {
  using Encode =
      CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                   const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                   CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  const auto encode = driver_function<Encode>("cuTensorMapEncodeTiled");
  if (!encode) return code_of(cudaErrorNotSupported);
  struct Dimension {
    cuuint64_t size, bytes;
  };
  const auto dimension = [](int size, int64_t stride) -> Dimension {
    return stride ? Dimension{static_cast<cuuint64_t>(size), static_cast<cuuint64_t>(2 * stride)}
                  : Dimension{1, 16};
  };
  const Dimension row = dimension(length, length > 1 ? tensor.row : width);
  const Dimension head = dimension(heads, tensor.head), in_batch = dimension(batch, tensor.batch);
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(width), row.size, head.size, in_batch.size};
  const cuuint64_t strides[] = {row.bytes, head.bytes, in_batch.bytes};
  const cuuint32_t box[] = {PANEL, static_cast<cuuint32_t>(rows), 1, 1}, steps[] = {1, 1, 1, 1};
  const auto type = dtype == TILEMASK_FLOAT16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                              : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  return -static_cast<int>(encode(&map, type, 4, tensor.data, sizes, strides, box, steps,
                                  CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                  CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                                  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE));
}
