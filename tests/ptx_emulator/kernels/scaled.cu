// A library with a C entry as ordinary host code writes it: launches with <<<>>>, dynamic shared
// memory past 48 KiB, a tensor map from the driver, an error code for the caller.
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

__constant__ float offset = 0.5f;

struct Scaling {
  float* x;
  int n;
  float factor;
};

__global__ void scale(const Scaling call) {
  extern __shared__ float tile[];
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  tile[threadIdx.x] = i < call.n ? call.x[i] : 0.0f;
  __syncthreads();
  if (i < call.n) call.x[i] = tile[threadIdx.x] * call.factor + offset;
}

extern "C" int scaled(float* x, int n, float factor, int shared, void* stream) {
  cudaError_t error =
      cudaFuncSetAttribute(scale, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error != cudaSuccess) return error;
  scale<<<(n + 127) / 128, 128, shared, static_cast<cudaStream_t>(stream)>>>({x, n, factor});
  return cudaGetLastError();
}

__global__ void reverse(float* x) {
  __shared__ float all[128];
  all[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  x[threadIdx.x] = all[127 - threadIdx.x];
}

extern "C" int reversed(float* x) {
  reverse<<<1, 128>>>(x);
  return cudaGetLastError();
}

__global__ void outside(float* x) { x[threadIdx.x] = 1; }

extern "C" int out_of_bounds(float* x) {
  outside<<<1, 256>>>(x);
  return cudaGetLastError();
}

extern "C" const char* error_name(int code) { return cudaGetErrorName(cudaError_t(code)); }

extern "C" int capability() {
  int device = 0, major = 0, minor = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  return 10 * major + minor;
}

extern "C" int shared_memory_of_a_block() {
  int bytes = 0;
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0);
  return bytes;
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define HAS_TMA 1
#endif

// y = the [rows, 32] tile of x at (row, 0), by TMA
__global__ void load_tile(const __grid_constant__ CUtensorMap map, float* y, int row, int rows) {
#ifdef HAS_TMA
  extern __shared__ __align__(128) float tile[];
  __shared__ uint64_t full;
  uint32_t barrier = uint32_t(__cvta_generic_to_shared(&full));
  uint32_t target = uint32_t(__cvta_generic_to_shared(tile));
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
                 "r"(rows * 128)
                 : "memory");
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
        "[%1, {%2, %3}], [%4];" ::"r"(target),
        "l"(&map), "r"(0), "r"(row), "r"(barrier)
        : "memory");
  }
  __syncthreads();
  uint32_t done = 0;
  while (!done)
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], 0; selp.u32 %0, 1, 0, "
        "p; }"
        : "=r"(done)
        : "r"(barrier)
        : "memory");
  for (int i = threadIdx.x; i < 32 * rows; i += blockDim.x) y[i] = tile[i];
#endif
}

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                            const cuuint64_t*, const cuuint32_t*, const cuuint32_t*,
                            CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                            CUtensorMapFloatOOBfill);

// pitch: bytes from row to row of x [len, 32]. CUDA_ERROR_* of the driver as a negative number.
extern "C" int tile_of(float* x, float* y, int len, int pitch, int row, int rows) {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
  cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000,
                                                       cudaEnableDefault, &found);
#else
  cudaError_t error =
      cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault, &found);
#endif
  if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) return 1;
  CUtensorMap map;
  cuuint64_t shape[] = {32, cuuint64_t(len)}, strides[] = {cuuint64_t(pitch)};
  cuuint32_t box[] = {32, cuuint32_t(rows)}, steps[] = {1, 1};
  CUresult result = reinterpret_cast<Encode>(entry)(
      &map, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 2, x, shape, strides, box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_NONE,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) return -int(result);
  load_tile<<<1, 128, rows * 128>>>(map, y, row, rows);
  return cudaGetLastError();
}
