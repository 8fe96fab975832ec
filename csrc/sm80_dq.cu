// dQ and delta, one pass over the visited tiles of a row block.
//
//   where am I -> my rows' intervals, do, delta = rowsum(do * out) - dlse, q and lse
//   -> for every visited column block:
//       dp = do @ v.T - delta -> scores = q @ k.T, biased -> ds = exp(scores - lse) * dp, masked
//       dq += ds @ k
//   -> scale -> store
//
// Two loops, as in the forward. k is in shared memory twice, so the next one arrives during a whole
// step; v, which a step needs first, arrives during all but its first product. Two barriers a step.
//
// Aim, instructions per score in the full loop: three products, and 3.5 for ds (a fused
// multiply-add, exp2, a multiplication, half a conversion):
//   width 64 (128 x 32 tiles):  3 mma, 1.25 ldmatrix, 3.5, 0.5 copies = 8.3; at most 13 with the
//     loop
//   width 128 (128 x 32):  6 mma, 2.5 ldmatrix, 3.5, 0.5 copies = 12.5; at most 19
//   width 256 (64 x 16):  12 mma, 10 ldmatrix, 3.5, 3.2 copies = 28.7; at most 53
// Partial tiles: at most 8 more, of which the words of rows and the select are 4; 23 at width 256,
// where a thread has 8 scores to share them.
#include "backward.cuh"
#include "mask.cuh"
#include "rows.cuh"
#include "scores.cuh"
#include "softmax.cuh"
#include "tile/fragments.cuh"
#include "tile/shared.cuh"
#include "tiles.h"

namespace {

// The same, and where products of a row start, so that nothing need be subtracted from them.
template <int BLOCK_M>
struct DqRows : RowBlock<BLOCK_M> {
  float minus_delta[BLOCK_M];
  float minus_rest[BLOCK_M];  // in units of products
};

template <typename T, int WIDTH, bool GENERAL>
struct DqKernel {
  static constexpr TileShape SHAPE = dq_tile(WIDTH, GENERAL);
  static constexpr int BLOCK_M = SHAPE.block_m, BLOCK_N = SHAPE.block_n;
  static constexpr int THREADS = SHAPE.warps * WARP;
  static constexpr int MT = SHAPE.row_tiles, NT = BLOCK_N / 8;
  static constexpr bool NATURAL = GENERAL;
  static constexpr int Q_BYTES = TILE_BYTES<BLOCK_M, WIDTH>;
  static constexpr int K_BYTES = TILE_BYTES<BLOCK_N, WIDTH>;
  static constexpr int STATE_BYTES = (sizeof(DqRows<BLOCK_M>) + 1023) / 1024 * 1024;
  static constexpr int SHARED = STATE_BYTES + 2 * Q_BYTES + 3 * K_BYTES;
  static_assert(SHAPE.warps * MT * 16 == BLOCK_M, "every row has a warp");
  static_assert(SHARED <= MOST_SHARED, "a block fits on every GPU");
};

template <typename T, int WIDTH, bool GENERAL>
__global__ void __launch_bounds__(DqKernel<T, WIDTH, GENERAL>::THREADS, 1)
    dq_kernel(const __grid_constant__ BackwardCall call) {
  using Kernel = DqKernel<T, WIDTH, GENERAL>;
  constexpr int BLOCK_M = Kernel::BLOCK_M, BLOCK_N = Kernel::BLOCK_N, THREADS = Kernel::THREADS;
  constexpr int MT = Kernel::MT, NT = Kernel::NT;
  constexpr bool NATURAL = Kernel::NATURAL;
  const TilemaskMask& mask = call.mask;
  const TilemaskScore& score = call.score;
  const int len_q = call.sizes.len_q, len_k = call.sizes.len_k;

  // where am I: the last row block first, under a causal mask it is the longest
  const int row_blocks = cdiv(len_q, BLOCK_M);
  const int bh = blockIdx.x / row_blocks, row_block = row_blocks - 1 - blockIdx.x % row_blocks;
  const int b = bh / call.sizes.heads, h = bh % call.sizes.heads;
  const int first_row = row_block * BLOCK_M;
  const int lane = lane_id() % 4;
  const int warp_row = threadIdx.x / WARP * 16 * MT;  // of the tile
  const int own_row = warp_row + lane_id() / 4;       // this thread's first row of the tile

  extern __shared__ __align__(1024) uint8_t shared[];
  DqRows<BLOCK_M>& mine = *reinterpret_cast<DqRows<BLOCK_M>*>(shared);
  const uint32_t q_tile = shared_address(shared) + Kernel::STATE_BYTES;
  const uint32_t do_tile = q_tile + Kernel::Q_BYTES, k_tile = do_tile + Kernel::Q_BYTES;
  const uint32_t v_tile = k_tile + 2 * Kernel::K_BYTES;

  // my rows: do, out in the place of q, their intervals, and the tiles to visit
  const auto load_mine = [&](uint32_t tile, const Head& head) {
    load_tile<BLOCK_M, WIDTH, THREADS, GENERAL>(tile, head, first_row,
                                                [&](int row) { return row < len_q; });
  };
  load_mine(do_tile, head_of(call.dout, b, h, call.sizes.width_v, call.dout_chunked));
  load_mine(q_tile, head_of(call.out, b, h, call.sizes.width_v, call.out_chunked));
  cp_async_commit_group();
  find_rows<BLOCK_N, GENERAL>(mine, call, load_bounds(mask, b, len_q, len_k), bh, row_block,
                              call.visits_dq);
  __syncthreads();

  const auto load = [&](auto masked, uint32_t tile, const Head& head, int block, uint32_t own) {
    load_columns<BLOCK_N, WIDTH, THREADS, GENERAL, masked.value>(tile, head, block, own);
  };
  const auto copies = [&](int block) { return live_copies<BLOCK_N, WIDTH, THREADS>(mine, block); };
  const bool any = mine.visit.partial + mine.visit.full > 0;
  int block = any ? visited_block(mine.visit, 0) : 0;
  if (any) {
    const uint32_t own = copies(block);
    load(Flag<true>(), k_tile, mine.k, block, own);
    load(Flag<true>(), v_tile, mine.v, block, own);
    cp_async_wait_group<2>();
  } else {
    cp_async_wait_group<0>();
  }
  __syncthreads();

  // delta, then q in the place of out
  const uint32_t q_lanes = lanes_along_rows(q_tile, warp_row);
  const uint32_t do_lanes = lanes_along_rows(do_tile, warp_row);
  float own_delta[MT][2];
  RowLse lse[MT][2];
  sum_products<T, BLOCK_M, WIDTH>(own_delta, do_lanes, q_lanes);
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int local = own_row + 16 * m + 8 * i, row = first_row + local;
      const int64_t head = static_cast<int64_t>(bh) * len_q;
      float delta = sum_of_row(own_delta[m][i]);
      if (!is_alive(mine.rows[local])) delta = 0;  // do and out may hold anything
      if (call.dlse && row < len_q) delta -= call.dlse[head + row];
      lse[m][i] =
          load_lse<NATURAL>(call.lse + head, call.rest ? call.rest + head : nullptr, row, len_q);
      if (lane > 0) continue;
      if (row < len_q) call.delta[head + row] = delta;
      mine.minus_delta[local] = -delta;
      mine.minus_rest[local] = -lse[m][i].rest * call.unscale_log2;
    }
  __syncthreads();
  load_mine(q_tile, head_of(call.q, b, h, call.sizes.width, call.q_chunked));
  cp_async_commit_group();

  const uint32_t k_across = lanes_across_rows(k_tile, 0);
  const uint32_t k_along = lanes_along_rows(k_tile, 0);
  const uint32_t v_lanes = lanes_across_rows(v_tile, 0);
  float dq[MT][WIDTH / 8][4];
  clear(dq);

  const auto dq_step = [&](auto partial, int t) {
    constexpr bool PARTIAL = decltype(partial)::value;
    const int first_col = block * BLOCK_N;
    const uint32_t stage = t % 2 * Kernel::K_BYTES;
    count_visit(mine.visits, block, PARTIAL);
    const bool more = t + 1 < mine.visit.partial + mine.visit.full;
    if (more) block = visited_block(mine.visit, t + 1);
    cp_async_wait_group<0>();
    __syncthreads();  // k and v are here, and nobody reads the last k any more
    const uint32_t own = PARTIAL && more ? copies(block) : 0;
    if (more) load(partial, k_tile + Kernel::K_BYTES - stage, mine.k, block, own);

    // dp = do @ v.T - delta
    float ds[MT][NT][4];
    if constexpr (GENERAL)
      clear(ds);
    else
      fill_rows(ds, mine.minus_delta + own_row);
    multiply_transposed<T, BLOCK_M, BLOCK_N, WIDTH>(ds, opaque(do_lanes), opaque(v_lanes));
    __syncthreads();  // nobody reads this v any more
    if (more) load(partial, v_tile, mine.v, block, own);
    if constexpr (GENERAL) {
      if (score.seed) {
        uint32_t words[MT][2];
        kept<BLOCK_N>(words, score, mine.options, mine.first_row + own_row, first_col, lane);
        masked(ds, 0, words);
      }
      add_to_rows(ds, score.seed ? score.keep_factor : 1, mine.minus_delta + own_row);
    }

    // ds = exp(q @ k.T - lse) * dp, masked
    float scores[MT][NT][4];
    if constexpr (GENERAL)
      clear(scores);
    else
      fill_rows(scores, mine.minus_rest + own_row);
    multiply_transposed<T, BLOCK_M, BLOCK_N, WIDTH>(scores, opaque(q_lanes),
                                                    opaque(k_across + stage));
    if constexpr (GENERAL)
      scored(
          scores, [&](int m, int n, int e, float bend) { ds[m][n][e] *= bend; }, score,
          mine.options, Place<false>{mine.first_row + own_row, first_col + 2 * lane},
          call.sizes.scale, len_q, len_k);
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          ds[m][n][e] *= weight<NATURAL, false>(scores[m][n][e], lse[m][e / 2], call.scale_log2);
    if constexpr (PARTIAL) {
      uint32_t words[MT][2];
      tile_words(words, mask, mine.words, mine.keys, mine.lanes + own_row, mine.first_row + own_row,
                 first_col, len_q, lane);
      masked(ds, 0, words);
    }

    // dq += ds @ k
    uint32_t ds_rounded[MT][NT / 2][4];
    round_operand<T>(ds_rounded, ds);
    multiply<T, BLOCK_N>(dq, ds_rounded, opaque(k_along + stage));
  };

  // two loops, partial tiles first: the one over full tiles has no mask code at all
  int t = 0;
#pragma unroll 1
  for (; t < mine.visit.partial; ++t) dq_step(Flag<true>(), t);
#pragma unroll 1
  for (; t < mine.visit.partial + mine.visit.full; ++t) dq_step(Flag<false>(), t);

  // scale and store; a row that saw nothing has gradient 0
  cp_async_wait_group<0>();
  __syncthreads();  // nobody reads q or writes to its place any more
  float factor[MT][2];
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int i = 0; i < 2; ++i)
      factor[m][i] = is_alive(mine.rows[own_row + 16 * m + 8 * i]) ? call.sizes.scale : 0;
  finish_rows(dq, factor);
  store_accumulator<T, BLOCK_M>(q_tile, warp_row, dq);
  __syncwarp();
  store_rows<16 * MT, BLOCK_M, WIDTH, GENERAL>(
      q_tile, warp_row, head_of(call.dq, mine.b, mine.h, call.sizes.width, call.dq_chunked),
      mine.first_row + warp_row, [&](int row) { return row < len_q; });
}

}  // namespace

int launch_dq(const BackwardCall& call, bool general) {
  const TilemaskSizes& sizes = call.sizes;
  return dispatch(
      call.head.dtype, max_width(sizes), general, [&](auto type, auto width, auto any) -> int {
        using T = decltype(type);
        using Kernel = DqKernel<T, width.value, any.value>;
        TILEMASK_TRY(check_lists(call.mask, call.lists, Kernel::BLOCK_M, Kernel::BLOCK_N));
        const dim3 grid(cdiv(sizes.len_q, Kernel::BLOCK_M) * sizes.batch * sizes.heads);
        return launch(dq_kernel<T, width.value, any.value>, grid, Kernel::THREADS, Kernel::SHARED,
                      call);
      });
}
