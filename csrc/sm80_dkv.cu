// dK and dV, one pass over the visited tiles of a column block, for every query head that shares
// its key head.
//
//   where am I -> my columns: k and v -> for every query head, for every visited row block:
//       dp = v @ do.T - delta -> scores = k @ q.T, biased -> p = exp(scores - lse), masked
//       ds = p * dp -> dv += p @ do -> dk += ds @ q
//   -> scale -> store
//
// Everything inside is transposed: keys are the rows of the accumulators, so p and ds are operands
// of the next products where they are. Two loops, as in the forward. lse, rest and delta of the
// next rows are read at the start of a step and tell which of these rows see anything; the others
// are never read. q is in shared memory twice and so is do where there is room: what arrives does
// so during all of a step but its first product, and there is one barrier a step. do alone: it
// arrives during the last product, and there are two.
//
// Up to a width of 64 a warp holds 32 keys of dk and dv. Beyond, registers have no room for that:
// two warps share 32 keys (16 at width 256), each computes half the rows of p and ds and hands
// that half to the other, and each holds half the columns of dk and dv. So what a warp reads from
// shared memory serves as many products.
//
// Aim, instructions per score in the full loop: four products, and 4 for p and ds (a fused
// multiply-add, exp2, a multiplication, two halves of conversions):
//   width 64 (128 keys x 32 rows):  4 mma, 1.5 ldmatrix, 4, 0.4 lse and delta, 0.4 copies = 10.3;
//     at most 17 with the loop
//   width 128 (64 x 32):  8 mma, 4 ldmatrix, 0.5 exchange, 4, 0.8 lse and delta, 1 copies = 18.3;
//     at most 34: a thread has 16 scores a step, over which it spreads 240 instructions that are
//     not per score; shared memory is busy for 75 cycles a score, tensor cores for 64
//   width 256 (32 x 32):  16 mma, 12 ldmatrix, 1 exchange, 4, 1.6 lse and delta, 4 copies = 38.6;
//     at most 86, with 8 scores a step
// Partial tiles: at most 11 more at width 64, of which the words of columns and the select are a
// third; 18 at width 128, where a thread has words for twice as many columns as it has rows; 20 at
// width 256.
#include "backward.cuh"
#include "columns.cuh"
#include "mask.cuh"
#include "ptx/barrier.cuh"
#include "scores.cuh"
#include "softmax.cuh"
#include "tile/fragments.cuh"
#include "tile/shared.cuh"
#include "tiles.h"

namespace {

// What a step needs of the rows that it walks. Fours: see fill_columns.
template <int BLOCK_M>
struct WalkedRows {
  float4 minus_delta[BLOCK_M / 2];
  float4 minus_rest[BLOCK_M / 2];  // in units of products, or as load_lse gives it
  float2 lse[BLOCK_M / 2];
  Interval seen[BLOCK_M];  // where intervals are explicit
  int block;
  uint32_t alive;  // a bit for each row that sees anything
};

// What all threads of a block share. In shared memory: registers are for accumulators.
template <int BLOCK_M, int BLOCK_N>
struct ColBlock {
  WalkedRows<BLOCK_M> rows[2];
  LaneIntervals seen_by[BLOCK_N];  // rows, by column; all of them where intervals are explicit
  Visit visit;                     // from here to h: of one query head
  int32_t* visits;
  Head q, dout;
  const float *lse, *rest, *delta;
  const uint32_t* words;
  Options options;
  int h;
  int b, kv_head, last_head, col_block, first_col;
  Bounds bounds;
};

// A row of the next tile, read before it is needed.
struct RowAhead {
  RowLse lse;
  float delta;
};

template <typename T, int WIDTH, bool GENERAL>
struct DkvKernel {
  static constexpr TileShape SHAPE = dkv_tile(WIDTH, GENERAL);
  static constexpr int BLOCK_M = SHAPE.block_m, BLOCK_N = SHAPE.block_n, ACROSS = SHAPE.across;
  static constexpr int MT = SHAPE.row_tiles;
  static constexpr int WARPS = BLOCK_N / (16 * MT) * ACROSS, THREADS = WARPS * WARP;
  static constexpr int ROWS = BLOCK_M / ACROSS, NT = ROWS / 8;  // of a warp's scores
  static constexpr int WIDTH_TILES = WIDTH / 8 / ACROSS;        // of a warp's dk and dv
  static constexpr bool NATURAL = GENERAL;
  static constexpr int K_BYTES = TILE_BYTES<BLOCK_N, WIDTH>;
  static constexpr int Q_BYTES = TILE_BYTES<BLOCK_M, WIDTH>;
  // two of do where that leaves as many blocks to a multiprocessor
  static constexpr int DO_STAGES = WIDTH == 128 ? 2 : 1;
  static constexpr int OPERAND_BYTES = MT * NT / 2 * WARP * 16;  // of a warp's p or ds
  static constexpr int EXCHANGE_BYTES = ACROSS > 1 ? 2 * WARPS * OPERAND_BYTES : 0;
  static constexpr int STATE_BYTES = (sizeof(ColBlock<BLOCK_M, BLOCK_N>) + 1023) / 1024 * 1024;
  static constexpr int SHARED =
      STATE_BYTES + 2 * K_BYTES + (2 + DO_STAGES) * Q_BYTES + EXCHANGE_BYTES;
  static_assert(BLOCK_M == WARP, "a lane reads lse and delta of a row");
  static_assert(WARPS * MT == SHAPE.warps * SHAPE.row_tiles, "the shape is the kernel's");
  static_assert(ACROSS <= 2, "warps exchange p and ds in pairs");
  static_assert(SHARED <= MOST_SHARED, "a block fits on every GPU");
};

template <typename T, int WIDTH, bool GENERAL>
__global__ void __launch_bounds__(DkvKernel<T, WIDTH, GENERAL>::THREADS, 1)
    dkv_kernel(const __grid_constant__ BackwardCall call) {
  using Kernel = DkvKernel<T, WIDTH, GENERAL>;
  constexpr int BLOCK_M = Kernel::BLOCK_M, BLOCK_N = Kernel::BLOCK_N, THREADS = Kernel::THREADS;
  constexpr int MT = Kernel::MT, NT = Kernel::NT, ROWS = Kernel::ROWS, ACROSS = Kernel::ACROSS;
  constexpr bool NATURAL = Kernel::NATURAL;
  const TilemaskMask& mask = call.mask_transposed;
  const TilemaskScore& score = call.score;
  const int len_q = call.sizes.len_q, len_k = call.sizes.len_k;

  // where am I: the first column block first, under a causal mask it is the longest
  const int col_blocks = cdiv(len_k, BLOCK_N);
  const int col_block = blockIdx.x % col_blocks, b_kv = blockIdx.x / col_blocks;
  const int b = b_kv / call.sizes.kv_heads, kv_head = b_kv % call.sizes.kv_heads;
  const int group = call.sizes.heads / call.sizes.kv_heads, first_head = kv_head * group;
  const int first_col = col_block * BLOCK_N;
  const int warp = threadIdx.x / WARP, lane = lane_id() % 4;
  const int warp_col = warp / ACROSS * 16 * MT;           // of the tile
  const int warp_row = warp % ACROSS * ROWS;              // of a walked tile
  const int own_col = warp_col + lane_id() / 4;           // this thread's first column of the tile
  const int width_at = warp % ACROSS * (WIDTH / ACROSS);  // my share of dk's and dv's columns

  extern __shared__ __align__(1024) uint8_t shared[];
  ColBlock<BLOCK_M, BLOCK_N>& mine = *reinterpret_cast<ColBlock<BLOCK_M, BLOCK_N>*>(shared);
  const uint32_t k_tile = shared_address(shared) + Kernel::STATE_BYTES;
  const uint32_t v_tile = k_tile + Kernel::K_BYTES, q_tile = v_tile + Kernel::K_BYTES;
  const uint32_t do_tile = q_tile + 2 * Kernel::Q_BYTES;
  const uint32_t exchange = do_tile + Kernel::DO_STAGES * Kernel::Q_BYTES;

  // my columns: k and v, never read where padding excludes them
  {
    const Bounds bounds = load_bounds(mask, b, len_q, len_k);
    const Interval live{bounds.start, bounds.end};
    const uint32_t* keys = keys_of(mask, b);
    const auto load_mine = [&](uint32_t tile, const Head& head) {
      load_tile<BLOCK_N, WIDTH, THREADS, GENERAL, true>(
          tile, head, first_col, [&](int col) { return is_live_column(live, keys, col); });
    };
    load_mine(k_tile, head_of(call.k, b, kv_head, call.sizes.width, call.k_chunked));
    load_mine(v_tile, head_of(call.v, b, kv_head, call.sizes.width_v, call.v_chunked));
    cp_async_commit_group();
    for (int col = threadIdx.x; col < BLOCK_N; col += THREADS)
      mine.seen_by[col] =
          by_lane(mask.lo ? Interval{-FAR, FAR} : column_interval(bounds, first_col + col));
    if (threadIdx.x == 0) {
      mine.b = b, mine.kv_head = kv_head;
      mine.h = first_head - 1, mine.last_head = first_head + group;
      mine.col_block = col_block, mine.first_col = first_col;
      mine.bounds = bounds;
    }
  }

  // reads ahead what a step needs of row `lane_id()` of a block
  const auto read_row = [&](int block) {
    const int row = block * BLOCK_M + lane_id();
    RowAhead ahead{load_lse<NATURAL>(mine.lse, mine.rest, row, len_q), 0};
    if (warp == 0 && row < len_q) ahead.delta = mine.delta[row];
    return ahead;
  };
  // leaves it for all threads, and returns which rows of the block see anything
  const auto share_row = [&](auto partial, const RowAhead& ahead, int block, int stage) {
    const bool is_row_alive = is_alive(ahead.lse);
    const uint32_t alive = __ballot_sync(ALL_LANES, is_row_alive);
    const int own = opaque(threadIdx.x);  // anew, see below
    if (own < WARP) {
      WalkedRows<BLOCK_M>& rows = mine.rows[stage];
      const int pair = own / 2, side = own % 2;
      const float delta = is_row_alive ? -ahead.delta : 0;
      rows.block = block;
      rows.alive = alive;
      const float rest = NATURAL ? -ahead.lse.rest : -ahead.lse.rest * call.unscale_log2;
      reinterpret_cast<float*>(rows.minus_delta + pair)[side] = delta;
      reinterpret_cast<float*>(rows.minus_delta + pair)[side + 2] = delta;
      reinterpret_cast<float*>(rows.minus_rest + pair)[side] = rest;
      reinterpret_cast<float*>(rows.minus_rest + pair)[side + 2] = rest;
      reinterpret_cast<float*>(rows.lse + pair)[side] = ahead.lse.lse;
      if (partial.value && mask.lo)
        rows.seen[own] =
            row_interval(mask, mine.bounds, mine.b, mine.h, block * BLOCK_M + own, len_q);
    }
    return alive;
  };
  // starts a copy of q or do
  const auto load = [&](uint32_t tile, const Head& head, int block, uint32_t alive) {
    load_tile<BLOCK_M, WIDTH, THREADS, GENERAL>(
        tile, head, block * BLOCK_M, [&](int row) { return alive >> (row % BLOCK_M) & 1; });
  };

  // where this lane reads k and q; v and do lie at the same places of tiles V_AT and DO_AT after
  constexpr int V_AT = Kernel::K_BYTES, DO_AT = 2 * Kernel::Q_BYTES;
  const uint32_t k_lanes = lanes_along_rows(k_tile, warp_col);
  const uint32_t q_across = lanes_across_rows(q_tile, warp_row);
  const uint32_t q_along =
      block_address<BLOCK_M>(lanes_along_rows(q_tile, warp_row), 0, width_at / 16);
  float dk[MT][Kernel::WIDTH_TILES][4], dv[MT][Kernel::WIDTH_TILES][4];
  clear(dk);
  clear(dv);

  const auto dkv_step = [&](auto partial, int t) {
    constexpr bool PARTIAL = decltype(partial)::value;
    const int stage = t % 2;
    const uint32_t q_at = stage * Kernel::Q_BYTES;
    const uint32_t do_at = DO_AT + (Kernel::DO_STAGES == 2 ? q_at : 0);
    const WalkedRows<BLOCK_M>& rows = mine.rows[stage];
    const int pair = warp_row / 2 + lane;  // this thread's first pair of rows of the tile
    cp_async_wait_group<0>();
    __syncthreads();  // q, do and their rows are here, and nobody reads the last ones any more
    count_visit(mine.visits, static_cast<int64_t>(rows.block) * col_blocks, PARTIAL);
    const int first_row = rows.block * BLOCK_M + warp_row;
    const bool more = t + 1 < mine.visit.partial + mine.visit.full;
    const int next = more ? visited_block(mine.visit, t + 1) : 0;
    RowAhead ahead{};
    if (more) ahead = read_row(next);

    // dp = v @ do.T - delta
    float ds[MT][NT][4];
    if constexpr (GENERAL)
      clear(ds);
    else
      fill_columns(ds, rows.minus_delta + pair);
    multiply_transposed<T, BLOCK_N, BLOCK_M, WIDTH>(ds, opaque(k_lanes) + V_AT,
                                                    opaque(q_across) + do_at);
    if (more) {
      const uint32_t alive = share_row(partial, ahead, next, 1 - stage);
      load(q_tile + Kernel::Q_BYTES - q_at, mine.q, next, alive);
      if (Kernel::DO_STAGES == 2) load(do_tile + Kernel::Q_BYTES - q_at, mine.dout, next, alive);
      cp_async_commit_group();
    }
    [[maybe_unused]] uint32_t keep[MT][2];
    if constexpr (GENERAL) {
      if (score.seed) {
        kept_transposed<NT>(keep, score, mine.options, first_row + 2 * lane,
                            mine.first_col + own_col);
        masked(ds, 0, keep);
      }
      add_to_columns(ds, score.seed ? score.keep_factor : 1, rows.minus_delta + pair);
    }

    // p = exp(k @ q.T - lse), masked
    float p[MT][NT][4];
    if constexpr (GENERAL)
      clear(p);
    else
      fill_columns(p, rows.minus_rest + pair);
    multiply_transposed<T, BLOCK_N, BLOCK_M, WIDTH>(p, opaque(k_lanes), opaque(q_across) + q_at);
    if constexpr (GENERAL)
      scored(
          p, [&](int m, int n, int e, float bend) { ds[m][n][e] *= bend; }, score, mine.options,
          Place<true>{first_row + 2 * lane, mine.first_col + own_col}, call.sizes.scale, len_q,
          len_k);
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const float2 lse = rows.lse[4 * n + pair];
      const float4 rest = NATURAL ? rows.minus_rest[4 * n + pair] : float4{0, 0, 0, 0};
      const RowLse row[2] = {{lse.x, -rest.x}, {lse.y, -rest.y}};
#pragma unroll
      for (int m = 0; m < MT; ++m)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          p[m][n][e] = weight<NATURAL, false>(p[m][n][e], row[e % 2], call.scale_log2);
    }
    if constexpr (PARTIAL) {
      uint32_t words[MT][2];
      tile_words_transposed(words, mask, mine.words, mine.seen_by + own_col,
                            mine.first_col + own_col, first_row, len_k, lane);
      masked(p, 0, words);
      if (mask.lo) masked_transposed(p, rows.seen + 2 * pair, mine.first_col + own_col);
    }

    // ds = p * dp
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) ds[m][n][e] *= p[m][n][e];
    if (GENERAL && score.seed) masked(p, 0, keep);

    // dv += p @ do, dk += ds @ q
    uint32_t p_rounded[MT][NT / 2][4], ds_rounded[MT][NT / 2][4];
    round_operand<T>(p_rounded, p);
    round_operand<T>(ds_rounded, ds);
    const uint32_t do_lanes = opaque(q_along) + do_at;
    uint32_t q_lanes = opaque(q_along) + q_at;
    multiply<T, BLOCK_M>(dv, p_rounded, do_lanes);
    if constexpr (ACROSS > 1) {
      // for the other half of the rows, p and ds of the warp that shares my columns
      const int other = warp_row == 0 ? ROWS * ROW_BYTES : -ROWS * ROW_BYTES;
      const uint32_t from = exchange + (warp ^ 1) * 2 * Kernel::OPERAND_BYTES;
      const uint32_t to = exchange + warp * 2 * Kernel::OPERAND_BYTES;
      hand_over(to, p_rounded);
      hand_over(to + Kernel::OPERAND_BYTES, ds_rounded);
      multiply<T, BLOCK_M>(dk, ds_rounded, q_lanes);
      bar_sync(1 + warp / 2, 2 * WARP);  // of the two warps: both halves are here
      take_over(p_rounded, from);
      take_over(ds_rounded, from + Kernel::OPERAND_BYTES);
      multiply<T, BLOCK_M>(dv, p_rounded, do_lanes + other);
      q_lanes += other;
    }
    if constexpr (Kernel::DO_STAGES == 1) {
      __syncthreads();  // nobody reads this do any more
      const WalkedRows<BLOCK_M>& after = mine.rows[1 - stage];
      if (more) load(do_tile, mine.dout, after.block, after.alive);
      cp_async_commit_group();
    }
    multiply<T, BLOCK_M>(dk, ds_rounded, q_lanes);
  };

  // the query heads that share my key head, in a fixed order
#pragma unroll 1
  while (true) {
    __syncthreads();  // nobody reads what is of the last head any more
    if (opaque(threadIdx.x) == 0 && ++mine.h < mine.last_head) {
      const int row_blocks = cdiv(opaque(len_q), BLOCK_M), b = mine.b, h = mine.h;
      const int bh = b * call.sizes.heads + h;
      const int64_t head = static_cast<int64_t>(bh) * len_q;
      mine.visit = rows_to_visit<BLOCK_M, BLOCK_N>(call.lists_transposed, mine.bounds, b, h,
                                                   mine.col_block, row_blocks, col_blocks);
      mine.visits = visits_of(call.visits_dkv, bh, 0, row_blocks, col_blocks);
      if (mine.visits) mine.visits += 2 * mine.col_block;
      mine.q = head_of(call.q, b, h, call.sizes.width, call.q_chunked);
      mine.dout = head_of(call.dout, b, h, call.sizes.width_v, call.dout_chunked);
      mine.lse = call.lse + head;
      mine.rest = call.rest ? call.rest + head : nullptr;
      mine.delta = call.delta + head;
      mine.words = words_of(mask, b, h);
      mine.options = options_of<GENERAL>(score, b, h, bh);
    }
    __syncthreads();
    if (mine.h == mine.last_head) break;
    if (mine.visit.partial + mine.visit.full == 0) continue;
    const int block = visited_block(mine.visit, 0);
    const uint32_t alive = share_row(Flag<true>(), read_row(block), block, 0);
    load(q_tile, mine.q, block, alive);
    load(do_tile, mine.dout, block, alive);
    cp_async_commit_group();

    // two loops, partial tiles first: the one over full tiles has no mask code at all
    int t = 0;
#pragma unroll 1
    for (; t < mine.visit.partial; ++t) dkv_step(Flag<true>(), t);
#pragma unroll 1
    for (; t < mine.visit.partial + mine.visit.full; ++t) dkv_step(Flag<false>(), t);
  }

  cp_async_wait_group<0>();
  __syncthreads();  // nobody reads k or v or writes to their place any more
  const float factor_v = GENERAL && score.seed ? score.keep_factor : 1;
  store_columns<T, BLOCK_N, WIDTH, ACROSS, GENERAL>(call,
                                                    {mine.b,
                                                     mine.kv_head,
                                                     mine.first_col,
                                                     {mine.bounds.start, mine.bounds.end},
                                                     keys_of(mask, mine.b)},
                                                    dk, dv, factor_v, k_tile, v_tile);
}

}  // namespace

int launch_dkv(const BackwardCall& call, bool general) {
  const TilemaskSizes& sizes = call.sizes;
  return dispatch(
      call.head.dtype, max_width(sizes), general, [&](auto type, auto width, auto any) -> int {
        using T = decltype(type);
        using Kernel = DkvKernel<T, width.value, any.value>;
        TILEMASK_TRY(check_lists(call.mask_transposed, call.lists_transposed, Kernel::BLOCK_M,
                                 Kernel::BLOCK_N));
        const dim3 grid(cdiv(sizes.len_k, Kernel::BLOCK_N) * sizes.batch * sizes.kv_heads);
        return launch(dkv_kernel<T, width.value, any.value>, grid, Kernel::THREADS, Kernel::SHARED,
                      call);
      });
}
