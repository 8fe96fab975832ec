// Products of tiles by tensor cores: fragments in registers, read from shared memory by ldmatrix.
//
// An accumulator of 16 * MT rows and 8 * NT columns is float[MT][NT][4]: element e of block (m, n)
// is row 16m + 8 * (e / 2) + lane / 4, column 8n + 2 * (lane % 4) + e % 2.
#pragma once

#include <stdint.h>

#include "../ptx/mma.cuh"
#include "shared.cuh"

__device__ __forceinline__ int lane_id() { return threadIdx.x % 32; }

// The address that this lane gives ldmatrix for the block of 16 rows and 16 columns at (row, 0) of
// a tile: as operand a, or as operand b with its 16 rows along k (then with .trans).
__device__ __forceinline__ uint32_t lanes_along_rows(uint32_t tile, int row, int lane = lane_id()) {
  return chunk_address(tile, row + lane % 16, lane / 16);
}

// The same for operand b with its 16 rows along n.
__device__ __forceinline__ uint32_t lanes_across_rows(uint32_t tile, int row) {
  return chunk_address(tile, row + lane_id() % 8 + lane_id() / 16 * 8, lane_id() / 8 % 2);
}

// The block 16 * down rows below and 16 * right columns beside it, in a tile of ROWS rows: four
// addresses for a row of blocks, from which the others differ by constants.
template <int ROWS>
__device__ __forceinline__ uint32_t block_address(uint32_t lanes, int down, uint32_t right) {
  return (lanes ^ right % 4 << 5) + right / 4 * (ROWS * ROW_BYTES) + down * (16 * ROW_BYTES);
}

template <int MT, int NT>
__device__ __forceinline__ void clear(float (&acc)[MT][NT][4]) {
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[m][n][e] = 0;
}

// Every row starts at a value of its own; so a term that a product needs per row costs nothing.
// shared: of this thread's first row.
template <int MT, int NT>
__device__ __forceinline__ void fill_rows(float (&acc)[MT][NT][4], const float* shared) {
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float value = shared[16 * m + 8 * i];
#pragma unroll
      for (int n = 0; n < NT; ++n) acc[m][n][2 * i] = acc[m][n][2 * i + 1] = value;
    }
}

// The same per column. shared: of a pair of columns (low, high, low, high), for columns
// 2 * (lane % 4) and the next. Read again for every block of rows: that is one instruction, copying
// four registers is four.
template <int MT, int NT>
__device__ __forceinline__ void fill_columns(float (&acc)[MT][NT][4], const float4* shared) {
  const uint32_t at = shared_address(shared);
#pragma unroll
  for (int n = 0; n < NT; ++n)
#pragma unroll
    for (int m = 0; m < MT; ++m) ld_shared_v4(acc[m][n], at + 4 * n * sizeof(float4));
}

template <int MT, int NT>
__device__ __forceinline__ void add_to_rows(float (&acc)[MT][NT][4], float factor,
                                            const float* shared) {
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float value = shared[16 * m + 8 * i];
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        acc[m][n][2 * i] = fmaf(acc[m][n][2 * i], factor, value);
        acc[m][n][2 * i + 1] = fmaf(acc[m][n][2 * i + 1], factor, value);
      }
    }
}

template <int MT, int NT>
__device__ __forceinline__ void add_to_columns(float (&acc)[MT][NT][4], float factor,
                                               const float4* shared) {
#pragma unroll
  for (int n = 0; n < NT; ++n) {
    const float4 value = shared[4 * n];
#pragma unroll
    for (int m = 0; m < MT; ++m) {
      acc[m][n][0] = fmaf(acc[m][n][0], factor, value.x);
      acc[m][n][1] = fmaf(acc[m][n][1], factor, value.y);
      acc[m][n][2] = fmaf(acc[m][n][2], factor, value.z);
      acc[m][n][3] = fmaf(acc[m][n][3], factor, value.w);
    }
  }
}

// Rows of a tile as operand a: 16 * MT of its ROWS rows, all of WIDTH.
template <int ROWS, int WIDTH, int MT>
__device__ __forceinline__ void load_operand(uint32_t (&a)[MT][WIDTH / 16][4], uint32_t a_lanes) {
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int k = 0; k < WIDTH / 16; ++k) ldmatrix_x4(a[m][k], block_address<ROWS>(a_lanes, m, k));
}

// acc += a b^T: a [16 MT, WIDTH] in registers, b [8 NT, WIDTH] in shared memory (across rows), of a
// tile of B_ROWS rows.
template <typename T, int B_ROWS, int WIDTH, int MT, int NT>
__device__ __forceinline__ void multiply_transposed(float (&acc)[MT][NT][4],
                                                    const uint32_t (&a)[MT][WIDTH / 16][4],
                                                    uint32_t b_lanes) {
#pragma unroll
  for (int k = 0; k < WIDTH / 16; ++k)
#pragma unroll
    for (int n = 0; n < NT; n += 2) {
      uint32_t b[4];
      ldmatrix_x4(b, block_address<B_ROWS>(b_lanes, n / 2, k));
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        T::mma(acc[m][n], a[m][k], b[0], b[1]);
        T::mma(acc[m][n + 1], a[m][k], b[2], b[3]);
      }
    }
}

// The same with a in shared memory too (along rows), of a tile of A_ROWS rows.
template <typename T, int A_ROWS, int B_ROWS, int WIDTH, int MT, int NT>
__device__ __forceinline__ void multiply_transposed(float (&acc)[MT][NT][4], uint32_t a_lanes,
                                                    uint32_t b_lanes) {
#pragma unroll
  for (int k = 0; k < WIDTH / 16; ++k) {
    uint32_t a[MT][4];
#pragma unroll
    for (int m = 0; m < MT; ++m) ldmatrix_x4(a[m], block_address<A_ROWS>(a_lanes, m, k));
#pragma unroll
    for (int n = 0; n < NT; n += 2) {
      uint32_t b[4];
      ldmatrix_x4(b, block_address<B_ROWS>(b_lanes, n / 2, k));
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        T::mma(acc[m][n], a[m], b[0], b[1]);
        T::mma(acc[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// Two such products at once, acc += a b^T and other += a' b'^T, of tiles that lie alike: a_lanes
// and b_lanes are those of a tile at 0, a_at and b_at where the two are. So swizzled addresses are
// computed once.
template <typename T, int A_ROWS, int B_ROWS, int WIDTH, int MT, int NT>
__device__ __forceinline__ void multiply_two_transposed(float (&acc)[MT][NT][4],
                                                        float (&other)[MT][NT][4], uint32_t a_lanes,
                                                        const uint32_t (&a_at)[2], uint32_t b_lanes,
                                                        const uint32_t (&b_at)[2]) {
  const auto add = [](float (&sum)[MT][NT][4], uint32_t a_block, uint32_t b_block) {
    uint32_t a[MT][4];
#pragma unroll
    for (int m = 0; m < MT; ++m) ldmatrix_x4(a[m], a_block + m * (16 * ROW_BYTES));
#pragma unroll
    for (int n = 0; n < NT; n += 2) {
      uint32_t b[4];
      ldmatrix_x4(b, b_block + n / 2 * (16 * ROW_BYTES));
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        T::mma(sum[m][n], a[m], b[0], b[1]);
        T::mma(sum[m][n + 1], a[m], b[2], b[3]);
      }
    }
  };
#pragma unroll
  for (int k = 0; k < WIDTH / 16; ++k) {
    const uint32_t a = block_address<A_ROWS>(a_lanes, 0, k);
    const uint32_t b = block_address<B_ROWS>(b_lanes, 0, k);
    add(acc, a + a_at[0], b + b_at[0]);
    add(other, a + a_at[1], b + b_at[1]);
  }
}

// An accumulator, rounded, as operand a of the next product.
template <typename T, int MT, int NT>
__device__ __forceinline__ void round_operand(uint32_t (&a)[MT][NT / 2][4],
                                              const float (&acc)[MT][NT][4]) {
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      a[m][n / 2][n % 2 * 2] = T::pack(acc[m][n][0], acc[m][n][1]);
      a[m][n / 2][n % 2 * 2 + 1] = T::pack(acc[m][n][2], acc[m][n][3]);
    }
}

// acc += a b: a [16 MT, 16 KT] in registers, b [16 KT, 8 NT] in shared memory (along rows), of a
// tile of B_ROWS rows.
template <typename T, int B_ROWS, int MT, int NT, int KT>
__device__ __forceinline__ void multiply(float (&acc)[MT][NT][4], const uint32_t (&a)[MT][KT][4],
                                         uint32_t b_lanes) {
#pragma unroll
  for (int k = 0; k < KT; ++k)
#pragma unroll
    for (int n = 0; n < NT; n += 2) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, block_address<B_ROWS>(b_lanes, k, n / 2));
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        T::mma(acc[m][n], a[m][k], b[0], b[1]);
        T::mma(acc[m][n + 1], a[m][k], b[2], b[3]);
      }
    }
}

// An operand a of this warp into shared memory, 512 bytes for 16 x 16 elements, and out of it into
// another warp.
template <int MT, int KT>
__device__ __forceinline__ void hand_over(uint32_t shared, const uint32_t (&a)[MT][KT][4],
                                          int lane = lane_id()) {
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int k = 0; k < KT; ++k)
      st_shared_v4(shared + ((m * KT + k) * 32 + lane) * 16,
                   make_uint4(a[m][k][0], a[m][k][1], a[m][k][2], a[m][k][3]));
}

template <int MT, int KT>
__device__ __forceinline__ void take_over(uint32_t (&a)[MT][KT][4], uint32_t shared,
                                          int lane = lane_id()) {
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int k = 0; k < KT; ++k) {
      const uint4 value = ld_shared_v4(shared + ((m * KT + k) * 32 + lane) * 16);
      a[m][k][0] = value.x, a[m][k][1] = value.y, a[m][k][2] = value.z, a[m][k][3] = value.w;
    }
}

// A tile of 8 x 8 blocks, each 128 bytes in one piece, BLOCKS of them across: an operand that one
// warp computes and others read, as it is or transposed.
template <int BLOCKS>
__device__ __forceinline__ uint32_t block_at(uint32_t tile, int down, int right) {
  return tile + (down * BLOCKS + right) * 128;
}

// An operand a into it from the block at `tile` on.
template <int BLOCKS, int MT, int KT>
__device__ __forceinline__ void store_blocks(uint32_t tile, const uint32_t (&a)[MT][KT][4],
                                             int lane) {
  const uint32_t lanes = tile + lane * 4;
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int k = 0; k < KT; ++k)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        st_shared(block_at<BLOCKS>(lanes, 2 * m + j % 2, 2 * k + j / 2), a[m][k][j]);
}

// And out of it.
template <int BLOCKS, int MT, int KT>
__device__ __forceinline__ void load_blocks(uint32_t (&a)[MT][KT][4], uint32_t tile, int lane) {
  const int matrix = lane / 8;
  const uint32_t lanes = block_at<BLOCKS>(tile, matrix % 2, matrix / 2) + lane % 8 * 16;
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int k = 0; k < KT; ++k) ldmatrix_x4(a[m][k], block_at<BLOCKS>(lanes, 2 * m, 2 * k));
}

// acc += a^T b: a [16 KT, 16 MT] in such a tile, b [16 KT, 8 NT] in shared memory (along rows).
template <typename T, int B_ROWS, int BLOCKS, int KT, int MT, int NT>
__device__ __forceinline__ void multiply_blocks(float (&acc)[MT][NT][4], uint32_t a_tile,
                                                uint32_t b_lanes, int lane) {
  const int matrix = lane / 8;
  const uint32_t a_lanes = block_at<BLOCKS>(a_tile, matrix / 2, matrix % 2) + lane % 8 * 16;
#pragma unroll
  for (int k = 0; k < KT; ++k) {
    uint32_t a[MT][4];
#pragma unroll
    for (int m = 0; m < MT; ++m) ldmatrix_x4_trans(a[m], block_at<BLOCKS>(a_lanes, 2 * k, 2 * m));
#pragma unroll
    for (int n = 0; n < NT; n += 2) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, block_address<B_ROWS>(b_lanes, k, n / 2));
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        T::mma(acc[m][n], a[m], b[0], b[1]);
        T::mma(acc[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// Sums of a * b, element by element, along the rows of two tiles (both along rows) of ROWS rows:
// this thread's share of rows 16m + 8i + lane / 4.
template <typename T, int ROWS, int WIDTH, int MT>
__device__ __forceinline__ void sum_products(float (&sum)[MT][2], uint32_t a_lanes,
                                             uint32_t b_lanes) {
#pragma unroll
  for (int m = 0; m < MT; ++m) {
    sum[m][0] = sum[m][1] = 0;
#pragma unroll
    for (int k = 0; k < WIDTH / 16; ++k) {
      uint32_t a[4], b[4];
      ldmatrix_x4(a, block_address<ROWS>(a_lanes, m, k));
      ldmatrix_x4(b, block_address<ROWS>(b_lanes, m, k));
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float& own = sum[m][j % 2];
        own = fmaf(T::widen(a[j]), T::widen(b[j]), own);
        own = fmaf(T::widen(a[j] >> 16), T::widen(b[j] >> 16), own);
      }
    }
  }
}

// An accumulator, rounded, into rows of a tile of ROWS from one of its chunks on: operand a's
// place.
template <typename T, int ROWS, int MT, int NT>
__device__ __forceinline__ void store_accumulator(uint32_t tile, int tile_row,
                                                  const float (&acc)[MT][NT][4],
                                                  int first_chunk = 0) {
  int row = tile_row + lane_id() / 4, byte = lane_id() % 4 * 4;
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      uint32_t upper = chunk_address<ROWS>(tile, row + 16 * m, first_chunk + n) + byte;
      st_shared(upper, T::pack(acc[m][n][0], acc[m][n][1]));
      st_shared(upper + 8 * ROW_BYTES, T::pack(acc[m][n][2], acc[m][n][3]));
    }
}
