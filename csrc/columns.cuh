// What the kernels that walk the row blocks of a column block have in common: how they end.
#pragma once

#include <stdint.h>

#include "backward.cuh"
#include "mask.cuh"
#include "tile/fragments.cuh"
#include "tile/shared.cuh"
#include "tiles.h"

// Where a column block is, and which of its keys are live.
struct Columns {
  int b, kv_head, first_col;
  Interval live;  // outside are no live columns
  const uint32_t* keys;
};

// Scales dk and dv, zeros for dead keys, whose k and v were 0, and stores them, by way of the tiles
// of k and v, which nobody may read any more. ACROSS warps share 16 * MT columns, each has 8 * NT
// of the width. factor_v: of dv. All threads call this.
template <typename T, int BLOCK_N, int WIDTH, int ACROSS, bool ANY, int MT, int NT>
__device__ __forceinline__ void store_columns(const BackwardCall& call, const Columns& mine,
                                              float (&dk)[MT][NT][4], float (&dv)[MT][NT][4],
                                              float factor_v, uint32_t k_tile, uint32_t v_tile) {
  const int thread = thread_index(), len_k = call.sizes.len_k;
  const int warp_col = thread / WARP / ACROSS * 16 * MT;
  const int first_chunk = thread / WARP % ACROSS * NT;
  float factors_k[MT][2], factors_v[MT][2];
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int col = mine.first_col + warp_col + 16 * m + 8 * i + thread % WARP / 4;
      const bool live = is_live_column(mine.live, mine.keys, col);
      factors_k[m][i] = live ? call.sizes.scale : 0;
      factors_v[m][i] = live ? factor_v : 0;
    }
  finish_rows(dk, factors_k);
  finish_rows(dv, factors_v);
  store_accumulator<T, BLOCK_N>(k_tile, warp_col, dk, first_chunk);
  store_accumulator<T, BLOCK_N>(v_tile, warp_col, dv, first_chunk);
  __syncthreads();
  const auto store = [&](uint32_t tile, const Head& head) {
    constexpr int COLUMNS = 16 * MT / ACROSS;
    const int first = thread / WARP * COLUMNS;
    store_rows<COLUMNS, BLOCK_N, WIDTH, ANY>(tile, first, head, mine.first_col + first,
                                             [&](int col) { return col < len_k; });
  };
  const TilemaskSizes& sizes = call.sizes;
  store(k_tile, head_of(call.dk, mine.b, mine.kv_head, sizes.width, call.dk_chunked));
  store(v_tile, head_of(call.dv, mine.b, mine.kv_head, sizes.width_v, call.dv_chunked));
}
