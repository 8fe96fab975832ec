// What the kernels that walk the column blocks of a row block have in common: what its threads
// share, and the copies of k and v.
#pragma once

#include <stdint.h>

#include "launch.cuh"
#include "mask.cuh"
#include "scores.cuh"
#include "tile/shared.cuh"

// What all threads of a block share of their rows. In shared memory: registers are for
// accumulators.
template <int BLOCK_M>
struct RowBlock {
  Visit visit;
  int32_t* visits;
  Head k, v;
  const uint32_t* words;
  const uint32_t* keys;
  Options options;
  Interval live;  // outside are no live columns
  int b, h, bh, first_row;
  Interval rows[BLOCK_M];
  LaneIntervals lanes[BLOCK_M];  // the same
};

// Fills it in; all threads call this, and a barrier must follow. visits: of the call, or null.
template <int BLOCK_N, bool GENERAL, int BLOCK_M, typename Call>
__device__ __forceinline__ void find_rows(RowBlock<BLOCK_M>& mine, const Call& call,
                                          const Bounds& bounds, int bh, int row_block,
                                          int32_t* visits) {
  const TilemaskSizes& sizes = call.sizes;
  const int b = bh / sizes.heads, h = bh % sizes.heads, first_row = row_block * BLOCK_M;
  if (threadIdx.x < BLOCK_M) {
    const Interval row =
        row_interval(call.mask, bounds, b, h, first_row + threadIdx.x, sizes.len_q);
    mine.rows[threadIdx.x] = row;
    mine.lanes[threadIdx.x] = by_lane(row);
  }
  if (threadIdx.x > 0) return;
  const int kv_head = h / (sizes.heads / sizes.kv_heads);
  const int row_blocks = cdiv(sizes.len_q, BLOCK_M), col_blocks = cdiv(sizes.len_k, BLOCK_N);
  mine.visit = columns_to_visit<BLOCK_M, BLOCK_N>(call.lists, bounds, b, h, row_block, row_blocks,
                                                  col_blocks);
  mine.visits = visits_of(visits, bh, row_block, row_blocks, col_blocks);
  mine.k = head_of(call.k, b, kv_head, sizes.width, call.k_chunked);
  mine.v = head_of(call.v, b, kv_head, sizes.width_v, call.v_chunked);
  mine.b = b, mine.h = h, mine.bh = bh, mine.first_row = first_row;
  mine.live = {bounds.start, bounds.end};
  mine.keys = keys_of(call.mask, b);
  mine.words = words_of(call.mask, b, h);
  mine.options = options_of<GENERAL>(call.score, b, h, bh);
}

// Which rows of k and v a thread copies of a column block, a bit for each: what padding excludes is
// never read, 0 * NaN would be NaN.
template <int BLOCK_N, int WIDTH, int THREADS, int BLOCK_M>
__device__ __forceinline__ uint32_t live_copies(const RowBlock<BLOCK_M>& mine, int block) {
  using Copy = TileCopy<BLOCK_N, WIDTH, THREADS>;
  const int col = block * BLOCK_N + Copy::row();
  if (const uint32_t* keys = mine.keys)
    return live_columns<Copy::STEP, Copy::COUNT>(mine.live, keys, col);
  return live_columns<Copy::STEP>(mine.live, col);
}

// Starts the copy of a column block of k or v, as a group of its own. MASKED: of what `own` says,
// see live_copies; else all of it.
template <int BLOCK_N, int WIDTH, int THREADS, bool ANY, bool MASKED>
__device__ __forceinline__ void load_columns(uint32_t tile, const Head& head, int block,
                                             uint32_t own) {
  if constexpr (MASKED)
    load_rows<BLOCK_N, WIDTH, THREADS, ANY>(tile, head, block * BLOCK_N, own);
  else
    load_tile<BLOCK_N, WIDTH, THREADS, ANY>(tile, head, block * BLOCK_N, [](int) { return true; });
  cp_async_commit_group();
}
