// What the forward kernel and the merge of its shares have in common.
#pragma once

#include <stdint.h>

#include "launch.cuh"
#include "ptx/tma.cuh"
#include "softmax.cuh"
#include "tile/fragments.cuh"
#include "tile/shared.cuh"
#include "tiles.h"

// A call, and what is worked out from it before the launch.
struct ForwardCall : TilemaskForward {
  bool q_chunked, k_chunked, v_chunked, out_chunked;
  float* part_acc;  // shares of rows: [splits, B, H, Lq, Dv]
  float* part_m;    // [splits, B, H, Lq]
  float* part_l;
  CUtensorMap k_map, v_map;
  bool boxes;  // whether tiles of k and v may be copied by them
};

// Whether rows run in decode tiles: there are few, or they are heads of one token.
inline bool is_decoding(const TilemaskForward& call) {
  return call.sizes.len_q <= DECODE_ROWS || call.folded;
}

// The rows of a tile of the forward that does not decode.
int forward_rows(int width, int device);

// How many shares the rows of a call are split into, and where in its workspace they go.
int share_workspace(ForwardCall& call, int& splits);

// Puts `splits` shares of every row together: out, lse and rest.
int merge_parts(const ForwardCall& call, int splits, bool natural);

__device__ __forceinline__ void store_end(const ForwardCall& call, int64_t at, const RowEnd& end) {
  call.lse[at] = end.lse;
  if (call.rest) call.rest[at] = end.rest;
}

// One share of a tile of 16 rows as it is in the loop; part: which share of which head. Rows that
// see nothing give m = -inf and l = 0.
template <int NT>
__device__ __forceinline__ void store_part(const ForwardCall& call, int64_t part, int first_row,
                                           int own_row, float (&acc)[1][NT][4],
                                           const float (&m)[1][2], const float (&l)[1][2],
                                           const Interval* intervals) {
  const int width = call.sizes.width_v, lane = lane_id() % 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = first_row + own_row + 8 * i;
    if (row >= call.sizes.len_q) continue;
    const bool alive = is_alive(intervals[own_row + 8 * i]);
    const int64_t at = part * call.sizes.len_q + row;
    if (lane == 0) {
      call.part_m[at] = alive ? m[0][i] : -INFINITY;
      call.part_l[at] = alive ? l[0][i] : 0;
    }
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const int col = 8 * n + 2 * lane + t;
        if (col < width) call.part_acc[at * width + col] = alive ? acc[0][n][2 * i + t] : 0;
      }
  }
}

// Bytes in which the warps of a decoding block exchange their accumulators.
constexpr int merge_bytes(int width, int warps) {
  return (warps - 1) * (width / 2 + 4) * WARP * static_cast<int>(sizeof(float));
}

// Adds up the accumulators of warps that share 16 rows, into warp 0: more steps of the online
// softmax, always in the same order.
template <bool NATURAL, int NT>
__device__ __forceinline__ void merge_warps(float (&acc)[1][NT][4], float (&m)[1][2],
                                            float (&l)[1][2], float* shared, int warps) {
  constexpr float UNIT = NATURAL ? LOG2_E : 1;
  constexpr int PART = (4 * NT + 4) * WARP;  // element by element, lanes side by side
  const int warp = threadIdx.x / WARP;
  float* part = shared + (warp - 1) * PART + lane_id();
  if (warp > 0) {
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) part[(4 * n + e) * WARP] = acc[0][n][e];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      part[(4 * NT + i) * WARP] = m[0][i];
      part[(4 * NT + 2 + i) * WARP] = l[0][i];
    }
  }
  __syncthreads();
  if (warp > 0) return;
  for (int other = 1; other < warps; ++other) {
    part += PART;
    float own[2], theirs[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float m_part = part[(4 * NT + i) * WARP];
      const float m_new = fmaxf(m[0][i], m_part);
      const float pivot = m_new == -INFINITY ? 0 : m_new;
      own[i] = ex2((m[0][i] - pivot) * UNIT);
      theirs[i] = ex2((m_part - pivot) * UNIT);
      l[0][i] = l[0][i] * own[i] + part[(4 * NT + 2 + i) * WARP] * theirs[i];
      m[0][i] = m_new;
    }
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        acc[0][n][e] = acc[0][n][e] * own[e / 2] + part[(4 * n + e) * WARP] * theirs[e / 2];
  }
  __syncwarp();  // the caller may write there now
}
