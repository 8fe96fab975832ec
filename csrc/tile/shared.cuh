// Tiles of 16-bit elements in shared memory: where they lie, and how they get there.
//
// A tile is panels of 64 columns, one after the other. A row of a panel is eight chunks of 16
// bytes; chunk c of row r lies at place c ^ (r % 8). So the eight rows that one phase of ldmatrix
// reads, and the eight neighbouring chunks that one phase of a copy writes, lie in different banks.
#pragma once

#include <stdint.h>

#include "../ptx/bits.cuh"
#include "../ptx/copy.cuh"
#include "../tilemask.h"

template <int ROWS, int WIDTH>
constexpr int TILE_BYTES = ROWS * WIDTH * 2;

constexpr int PANEL = 64;             // columns
constexpr int ROW_BYTES = PANEL * 2;  // of a panel

// Of a chunk of the first panel.
__device__ __forceinline__ uint32_t chunk_address(uint32_t tile, uint32_t row, uint32_t chunk) {
  return tile + row * ROW_BYTES + ((chunk ^ row % 8) << 4);
}

// Of any chunk of a tile with ROWS rows.
template <int ROWS>
__device__ __forceinline__ uint32_t chunk_address(uint32_t tile, uint32_t row, uint32_t chunk) {
  return chunk_address(tile, row, chunk % 8) + (chunk & ~7u) * (ROWS * ROW_BYTES / 8);
}

// [length, width] of one batch and one head in global memory.
struct Head {
  uint16_t* data;
  int64_t row;  // stride
  int width;
  int chunked;  // whether rows start at multiples of 16 bytes and are whole chunks
};

__device__ __forceinline__ Head head_of(const TilemaskTensor& tensor, int b, int h, int width,
                                        bool chunked) {
  uint16_t* data = static_cast<uint16_t*>(tensor.data);
  return {data + b * tensor.batch + h * tensor.head, tensor.row, width, chunked};
}

// Whether every row of a tensor starts at a multiple of 16 bytes and is whole chunks.
inline bool is_chunked(const TilemaskTensor& tensor, int width) {
  int64_t steps = tensor.batch | tensor.head | tensor.row | width;
  return steps % 8 == 0 && reinterpret_cast<uintptr_t>(tensor.data) % 16 == 0;
}

// How threads share the copy of a tile: each copies one chunk of every STEP-th row.
template <int ROWS, int WIDTH, int THREADS>
struct TileCopy {
  static constexpr int CHUNKS = WIDTH / 8, STEP = THREADS / CHUNKS, COUNT = ROWS / STEP;
  static_assert(THREADS % CHUNKS == 0 && ROWS % STEP == 0, "every thread copies equally many");
  __device__ static int row() { return threadIdx.x / CHUNKS; }  // the first
  __device__ static int chunk() { return threadIdx.x % CHUNKS; }
  // the place of the i-th, where `first` is that of the first: row() is less than STEP
  __device__ static uint32_t place(uint32_t first, int i) {
    return (first ^ i * STEP % 8 << 4) + i * STEP * ROW_BYTES;
  }
};

// Starts the copy of ROWS rows from first_row into a tile, zeros where there(i) leaves a thread's
// i-th row out and for columns past the width. ANY: rows may be of any width and alignment; without
// it they are known to be chunked. ROLLED: where there() is long.
template <int ROWS, int WIDTH, int THREADS, bool ANY, bool ROLLED = false, typename There>
__device__ __forceinline__ void load_if(uint32_t tile, const Head& head, int first_row,
                                        There there) {
  using Copy = TileCopy<ROWS, WIDTH, THREADS>;
  const int row = Copy::row(), chunk = Copy::chunk();
  const uint32_t first = chunk_address<ROWS>(tile, row, chunk);
  const uint16_t* source = head.data + (first_row + row) * head.row + chunk * 8;
  if (!ANY || head.chunked) {
    const int64_t step = Copy::STEP * head.row;
#pragma unroll ROLLED ? 1 : Copy::COUNT
    for (int i = 0; i < Copy::COUNT; ++i) {
      cp_async_16(Copy::place(first, i), source, there(i));
      source += step;
    }
  } else if constexpr (ANY) {
#pragma unroll 1
    for (int i = 0; i < Copy::COUNT; ++i) {
      uint32_t pairs[4];
      const bool any = there(i);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const bool exists = any && chunk * 8 + j < head.width;
        const uint32_t element = exists ? source[i * Copy::STEP * head.row + j] : 0;
        pairs[j / 2] = j % 2 ? pairs[j / 2] | element << 16 : element;
      }
      st_shared_v4(Copy::place(first, i), make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]));
    }
  }
}

// The same where inside(row) says which rows are read.
template <int ROWS, int WIDTH, int THREADS, bool ANY, bool ROLLED = false, typename Inside>
__device__ __forceinline__ void load_tile(uint32_t tile, const Head& head, int first_row,
                                          Inside inside) {
  using Copy = TileCopy<ROWS, WIDTH, THREADS>;
  const bool wide = Copy::chunk() * 8 < head.width;
  load_if<ROWS, WIDTH, THREADS, ANY, ROLLED>(tile, head, first_row, [&](int i) {
    return wide && inside(first_row + Copy::row() + i * Copy::STEP);
  });
}

// The same where bit i of `own` says it of a thread's i-th row.
template <int ROWS, int WIDTH, int THREADS, bool ANY>
__device__ __forceinline__ void load_rows(uint32_t tile, const Head& head, int first_row,
                                          uint32_t own) {
  using Copy = TileCopy<ROWS, WIDTH, THREADS>;
  static_assert(Copy::COUNT <= 32, "a bit for each row of a thread");
  own = Copy::chunk() * 8 < head.width ? own : 0;
  load_if<ROWS, WIDTH, THREADS, ANY>(tile, head, first_row, [&](int i) { return own & 1u << i; });
}

// A warp stores COUNT rows of a tile that it wrote itself; inside(row) as above.
template <int COUNT, int ROWS, int WIDTH, bool ANY, typename Inside>
__device__ __forceinline__ void store_rows(uint32_t tile, int tile_row, const Head& head,
                                           int first_row, Inside inside) {
  constexpr int CHUNKS = WIDTH / 8, STEP = CHUNKS > 32 ? 1 : 32 / CHUNKS;
  int lane = opaque(threadIdx.x) % 32, row = lane / CHUNKS, chunk = lane % CHUNKS;
#pragma unroll
  for (int i = 0; i < COUNT; i += STEP) {
    int local = row + i;
    if (!inside(first_row + local)) continue;
    uint4 value = ld_shared_v4(chunk_address<ROWS>(tile, tile_row + local, chunk));
    uint16_t* target = head.data + (first_row + local) * head.row + chunk * 8;
    if (!ANY || head.chunked) {
      if (chunk * 8 < head.width) *reinterpret_cast<uint4*>(target) = value;
    } else if constexpr (ANY) {
      const uint32_t pairs[4] = {value.x, value.y, value.z, value.w};
#pragma unroll
      for (int j = 0; j < 8; ++j)
        if (chunk * 8 + j < head.width) target[j] = pairs[j / 2] >> (j % 2 * 16);
    }
  }
}
