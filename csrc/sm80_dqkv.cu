// dQ, dK and dV in one pass over the visited tiles of a column block: five products where dq_kernel
// and dkv_kernel have seven. Three launches:
//
//   rows_kernel: delta, lse as the loop takes it, zeros where dq is summed up
//   dqkv_kernel: where am I -> my columns: k and v, and which rows see them
//     -> for every query head that shares their key head, for every visited row block, upwards:
//         dp = v @ do.T - delta, scores = k @ q.T -> p = exp(scores - lse), masked
//         ds = p * dp -> dv += p @ do -> my turn at these rows -> dk += ds @ q -> dq += ds.T @ k
//     -> scale -> store
//   round_kernel: dq scaled and rounded
//
// As in dkv_kernel everything inside is transposed, and beyond a width of 64 two warps share 32
// keys (16 at width 256): each computes p and ds of half the rows, hands them to the other and
// holds half the columns of dk and dv. ds also goes to shared memory for dq, of which a warp
// computes 32 rows and a share of the columns.
//
// dq is summed up in float32 in global memory, by the column blocks of a row block one after the
// other, the last first: so gradients are the same in every run, which atomic additions would not
// give. Each row block has a turn, the number of the column block that has added to it last, and
// each column block knows whose turn is before its own: under an affine mask that of the block
// beside it, else the lists say so. Column blocks take their numbers when they start and wait for
// larger ones only, which have started before them: nobody waits for a block that has no
// multiprocessor. Under a causal mask nobody waits at all: of two blocks that start at their
// diagonals, the one with larger numbers is ahead at every row. (Ordered additions:
// FlashAttention-3 in its deterministic mode, Shah et al., arXiv:2407.08608, and its source; the
// pass itself: FlashAttention-2, Dao, arXiv:2307.08691.)
//
// Aim, instructions per score in the full loop: five products, and 4 for p and ds (a fused
// multiply-add, exp2, a multiplication, two halves of conversions):
//   width 64 (128 keys x 32 rows):  5 mma, 2.3 ldmatrix, 4, 0.5 stores of ds, 0.6 lse and delta,
//     0.3 dq, 0.2 copies = 12.9; at most 18.5 with the loop
//   width 128 (128 x 64):  10 mma, 4.1 ldmatrix, 4, 0.8 stores and exchange, 0.6 lse and delta, 0.5
//     dq, 0.3 copies = 20.3; at most 28
//   width 256 (64 x 64):  20 mma, 11.6 ldmatrix, 4, 1.8 stores and exchange, 0.9 lse and delta, 2
//     dq, 1 copies = 41.3; at most 58
// Partial tiles: at most 3 more (4 at width 256), of which the select is 1. Where lists say what is
// visited: 1.5 more in full tiles (2.5 at width 256), most of it done by one warp for all, and 9
// (12) in partial ones, the words of all kinds of masks included.
#include "backward.cuh"
#include "columns.cuh"
#include "mask.cuh"
#include "ptx/barrier.cuh"
#include "ptx/order.cuh"
#include "scores.cuh"
#include "softmax.cuh"
#include "tile/fragments.cuh"
#include "tile/shared.cuh"
#include "tiles.h"

namespace {

// What a step needs of the rows that it walks, as rows_kernel leaves it. Fours: see fill_columns.
template <int BLOCK_M>
struct WalkedRows {
  float4 minus_delta[BLOCK_M / 2];
  float4 minus_rest[BLOCK_M / 2];  // in units of products
  float2 lse[BLOCK_M / 2];         // in log2 units
  Interval seen[BLOCK_M];          // columns
  uint32_t alive[2];               // a bit for each row that sees anything
  uint32_t next_alive[2];          // in the next row block: to load q and do ahead
};

// A row block that a list names.
struct ListedRows {
  int block, before;  // as the list has them: the column block whose turn is before mine, -1: none
  uint32_t alive[2];  // as above
};
constexpr int AHEAD = 8;  // so many of them are kept: the last one, this, and those to come

// A call, and its workspace.
struct DqkvCall : BackwardCall {
  void* rows;        // WalkedRows [B * H, row blocks]
  float* sums;       // of dq [B * H, row blocks, fours, threads, 4], as threads hold it
  int32_t* turns;    // [B * H, row blocks]: the column block that has added to dq last
  int32_t* started;  // how many column blocks have
};

// q or do of one query head.
struct Walked {
  const uint16_t* data;
  int row;  // stride
  uint32_t width;
};

// What all threads of a block share. In shared memory: registers are for accumulators.
template <int BLOCK_M, int BLOCK_N>
struct ColBlock {
  WalkedRows<BLOCK_M> rows[2];
  LaneIntervals seen_by[BLOCK_N];  // rows, by column; all of them where intervals are explicit
  uint4 words[2][BLOCK_N];         // by column, of the group of 128 rows that a tile is in
  ListedRows listed[AHEAD];        // by step
  Ranges visit;                    // affine: steps are row blocks; else they count from 0
  const uint32_t* keys;
  const int32_t* list;  // from here to visits: of one query head
  const uint32_t* words_by_column;
  Walked q, dout;
  const WalkedRows<BLOCK_M>* walked;
  float* sums;
  int32_t* turns;
  int32_t* visits;
  int64_t visits_step;  // from a row block to the next
  Bounds bounds;
  int h, first_head, last_head, b, kv_head, col_block, first_col;
};

template <typename T, int WIDTH>
struct DqkvKernel {
  static constexpr TileShape SHAPE = dqkv_tile(WIDTH);
  static constexpr int BLOCK_M = SHAPE.block_m, BLOCK_N = SHAPE.block_n, ACROSS = SHAPE.across;
  static constexpr int MT = SHAPE.row_tiles;
  static constexpr int WARPS = SHAPE.warps, THREADS = WARPS * WARP;
  static constexpr int ROWS = BLOCK_M / ACROSS, NT = ROWS / 8;  // of a warp's scores
  static constexpr int WIDTH_TILES = WIDTH / 8 / ACROSS;        // of a warp's dk and dv
  static constexpr int DQ_ROWS = 32, DQ_MT = DQ_ROWS / 16;      // of a warp's dq
  static constexpr int DQ_WIDTH = BLOCK_M * WIDTH / WARPS / DQ_ROWS, DQ_NT = DQ_WIDTH / 8;
  static constexpr int ROW_BLOCKS = BLOCK_M / 8;  // blocks of 8 x 8 across ds
  static constexpr int K_BYTES = TILE_BYTES<BLOCK_N, WIDTH>;
  static constexpr int Q_BYTES = TILE_BYTES<BLOCK_M, WIDTH>;
  static constexpr int Q_STAGES = WIDTH <= 128 ? 2 : 1;  // two where there is room
  static constexpr int DS_BYTES = BLOCK_M * BLOCK_N * 2;
  static constexpr int OPERAND_BYTES = MT * NT / 2 * WARP * 16;  // of a warp's p
  static constexpr int EXCHANGE_BYTES = ACROSS > 1 ? WARPS * OPERAND_BYTES : 0;
  static constexpr int STATE_BYTES = (sizeof(ColBlock<BLOCK_M, BLOCK_N>) + 1023) / 1024 * 1024;
  static constexpr int SHARED =
      STATE_BYTES + 2 * K_BYTES + (Q_STAGES + 1) * Q_BYTES + DS_BYTES + EXCHANGE_BYTES;
  static constexpr int SUMS_BYTES = BLOCK_M * WIDTH * sizeof(float);  // of a row block's dq
  static constexpr int BLOCKS = WIDTH <= 64 ? 2 : 1;                  // planned on a multiprocessor
  static constexpr int ROWS_CHUNKS = sizeof(WalkedRows<BLOCK_M>) / 16;
  static_assert(WARPS * 16 * MT == BLOCK_N * ACROSS, "every column has a warp");
  static_assert(ACROSS <= 2, "warps exchange p and ds in pairs");
  static_assert(ROWS_CHUNKS <= THREADS, "a thread copies one chunk of a row block's values");
  static_assert(DQ_NT % 2 == 0, "products go by 16 columns");
};

// LISTED: tiles are those of lists, and the mask has words, key words or explicit intervals.
template <typename T, int WIDTH, bool LISTED>
__global__ void __launch_bounds__(DqkvKernel<T, WIDTH>::THREADS, 1)
    dqkv_kernel(const __grid_constant__ DqkvCall call) {
  using Kernel = DqkvKernel<T, WIDTH>;
  constexpr int BLOCK_M = Kernel::BLOCK_M, BLOCK_N = Kernel::BLOCK_N, THREADS = Kernel::THREADS;
  constexpr int MT = Kernel::MT, NT = Kernel::NT, ROWS = Kernel::ROWS, ACROSS = Kernel::ACROSS;
  const TilemaskMask& mask = call.mask_transposed;
  const int len_q = call.sizes.len_q, len_k = call.sizes.len_k;

  extern __shared__ __align__(1024) uint8_t shared[];
  ColBlock<BLOCK_M, BLOCK_N>& mine = *reinterpret_cast<ColBlock<BLOCK_M, BLOCK_N>*>(shared);
  const uint32_t k_tile = shared_address(shared) + Kernel::STATE_BYTES;
  const uint32_t v_tile = k_tile + Kernel::K_BYTES, q_tile = v_tile + Kernel::K_BYTES;
  const uint32_t do_tile = q_tile + Kernel::Q_STAGES * Kernel::Q_BYTES,
                 ds_tile = do_tile + Kernel::Q_BYTES;
  const uint32_t exchange = ds_tile + Kernel::DS_BYTES;

  // where am I: blocks count as they start, the last column block first
  const int col_blocks = cdiv(len_k, BLOCK_N);
  if (threadIdx.x == 0) {
    const int group = call.sizes.heads / call.sizes.kv_heads;
    const int number = atomicAdd(call.started, 1), b_kv = number / col_blocks;
    mine.b = b_kv / call.sizes.kv_heads, mine.kv_head = b_kv % call.sizes.kv_heads;
    mine.col_block = col_blocks - 1 - number % col_blocks;
    mine.first_head = mine.kv_head * group, mine.last_head = mine.first_head + group;
    mine.h = mine.first_head - 1;
    mine.bounds = load_bounds(mask, mine.b, len_q, len_k);
    mine.keys = LISTED ? keys_of(mask, mine.b) : nullptr;
    mine.first_col = mine.col_block * BLOCK_N;
    if (!LISTED) mine.visit = row_ranges<BLOCK_M, BLOCK_N>(mine.bounds, mine.first_col);
  }
  __syncthreads();

  // my columns: k and v, never read where padding excludes them, and which rows see them
  {
    const Interval live{mine.bounds.start, mine.bounds.end};
    const int first_col = mine.first_col;
    const auto load_mine = [&](uint32_t tile, const Head& head) {
      load_tile<BLOCK_N, WIDTH, THREADS, false, true>(
          tile, head, first_col, [&](int col) { return is_live_column(live, mine.keys, col); });
    };
    load_mine(k_tile, head_of(call.k, mine.b, mine.kv_head, call.sizes.width, true));
    load_mine(v_tile, head_of(call.v, mine.b, mine.kv_head, call.sizes.width_v, true));
    cp_async_commit_group();
    for (int col = threadIdx.x; col < BLOCK_N; col += THREADS)
      mine.seen_by[col] = by_lane(
          LISTED && mask.lo ? Interval{-FAR, FAR} : column_interval(mine.bounds, first_col + col));
  }

  // starts a copy of q or do: rows that see nothing are never read
  const auto load = [&](uint32_t tile, Walked from, int block, const uint32_t (&alive)[2]) {
    constexpr uint32_t CHUNKS = WIDTH / 8, STEP = THREADS / CHUNKS;
    static_assert(32 % STEP == 0, "a thread copies the same rows of every 32");
    const uint32_t thread = thread_index(), row = thread / CHUNKS, chunk = thread % CHUNKS;
    const uint16_t* source =
        from.data + static_cast<int64_t>(block * BLOCK_M + static_cast<int>(row)) * from.row;
    source += chunk * 8;
    const bool there = chunk * 8 < from.width;
    const uint32_t own[2] = {(there ? alive[0] : 0) >> row,
                             (there ? alive[BLOCK_M / 32 - 1] : 0) >> row};
#pragma unroll
    for (uint32_t i = 0; i < BLOCK_M; i += STEP)
      cp_async_16(chunk_address<BLOCK_M>(tile, row, chunk) + i * ROW_BYTES,
                  source + static_cast<int64_t>(from.row) * static_cast<int>(i),
                  own[i / 32] & 1u << i % 32);
  };
  // the same of the rows' values, and of a partial tile's words
  const auto load_rows = [&](int stage, int block, bool words) {
    const uint32_t chunk = thread_index();
    if (chunk < Kernel::ROWS_CHUNKS)
      cp_async_16(shared_address(&mine.rows[stage]) + chunk * 16,
                  reinterpret_cast<const uint4*>(mine.walked + block) + chunk, true);
    if (LISTED && words && mine.words_by_column && chunk < BLOCK_N) {
      const int group = static_cast<uint32_t>(block * BLOCK_M) / WORD_COLUMNS;
      const int col = mine.first_col + chunk;
      cp_async_16(shared_address(&mine.words[stage][chunk]),
                  mine.words_by_column + group * mask.words_group + col * mask.words_line,
                  col < opaque(len_k));
    }
  };
  // the row block of a step, counted without a sign: its remainders are single instructions
  const auto listed = [&](uint32_t t) -> ListedRows& { return mine.listed[t % AHEAD]; };
  const auto block_of = [&](int t) { return LISTED ? listed(t).block : t; };

  // where this lane reads k and v, and q and do, in tiles at 0
  const int warp = threadIdx.x / WARP;
  const uint32_t k_lanes = lanes_along_rows(0, warp / ACROSS * 16 * MT);
  const uint32_t q_lanes = lanes_across_rows(0, warp % ACROSS * ROWS);
  float dk[MT][Kernel::WIDTH_TILES][4], dv[MT][Kernel::WIDTH_TILES][4];
  clear(dk);
  clear(dv);

  // where a thread is, worked out anew where it is needed: registers hold nothing for it meanwhile
  struct Place {
    uint32_t thread, lane, warp;
    uint32_t col, row;  // of its warp's scores in the tile
  };
  const auto place = [] {
    const uint32_t thread = thread_index(), warp = thread / WARP;
    return Place{thread, thread % WARP, warp, warp / ACROSS * 16 * MT, warp % ACROSS * ROWS};
  };

  const auto dqkv_step = [&](auto partial, int t) {
    constexpr bool PARTIAL = decltype(partial)::value;
    const int stage = static_cast<uint32_t>(t) % 2;
    const uint32_t q_at = Kernel::Q_STAGES == 2 ? stage * Kernel::Q_BYTES : 0;
    const WalkedRows<BLOCK_M>& rows = mine.rows[stage];
    const auto load_next = [&](uint32_t tile, const Walked& from) {
      const int next = opaque(t) + 1;  // anew, as place()
      load(tile, from, block_of(next),
           LISTED ? listed(next).alive : mine.rows[1 - static_cast<uint32_t>(next) % 2].next_alive);
    };
    cp_async_wait_group<0>();
    __syncthreads();  // q, do and their rows are here, and nobody reads the last ones any more
    if (t + 1 < mine.visit.last) {
      if (Kernel::Q_STAGES == 2) load_next(q_tile + Kernel::Q_BYTES - q_at, mine.q);
      load_rows(1 - stage, block_of(t + 1), PARTIAL && t + 1 < mine.visit.first_full);
    }
    if (LISTED && thread_index() == WARP) {  // what the steps after the next need of their rows
      if (t + 3 < mine.visit.last)
        cp_async_ca<8>(shared_address(&listed(t + 3)), mine.list + 2 * (t + 3), 8);
      if (t + 2 < mine.visit.last) {
        ListedRows& second = listed(t + 2);
        cp_async_ca<8>(shared_address(second.alive), mine.walked[second.block].alive, 8);
      }
    }
    cp_async_commit_group();

    // dp = v @ do.T - delta, scores = k @ q.T
    float p[MT][NT][4], ds[MT][NT][4];
    const auto first_pair = [](Place at) { return at.row / 2 + at.lane % 4; };  // of its rows
    const uint32_t start = first_pair(place());
    fill_columns(p, rows.minus_rest + start);
    fill_columns(ds, rows.minus_delta + start);
    multiply_two_transposed<T, BLOCK_N, BLOCK_M, WIDTH>(p, ds, opaque(k_lanes), {k_tile, v_tile},
                                                        opaque(q_lanes), {q_tile + q_at, do_tile});

    // p = exp(scores - lse), masked; ds = p * dp
    const Place at = place();
    const uint32_t pair = first_pair(at);
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const float2 lse = rows.lse[4 * n + pair];
#pragma unroll
      for (int m = 0; m < MT; ++m)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          p[m][n][e] =
              weight<false, false>(p[m][n][e], {e % 2 ? lse.y : lse.x, 0}, call.scale_log2);
    }
    if constexpr (PARTIAL) {
      uint32_t words[MT][2];
      const uint32_t first_row = block_of(t) * BLOCK_M + at.row;
      const int col = at.col + at.lane / 4;
#pragma unroll
      for (int m = 0; m < MT; ++m)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int own = col + 16 * m + 8 * i;
          words[m][i] = interval_word(mine.seen_by[own].of[at.lane % 4], first_row);
          if (LISTED && mine.words_by_column)
            words[m][i] &=
                reinterpret_cast<const uint32_t*>(&mine.words[stage][own])[at.lane % 4] >>
                (first_row % WORD_COLUMNS / 4);
        }
      masked(p, 0, words);
      if (LISTED && mask.lo)
        masked_transposed(p, rows.seen + at.row + 2 * (at.lane % 4), mine.first_col + col);
    }
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) ds[m][n][e] *= p[m][n][e];

    // dv += p @ do
    uint32_t p_rounded[MT][NT / 2][4], ds_rounded[MT][NT / 2][4];
    round_operand<T>(p_rounded, p);
    round_operand<T>(ds_rounded, ds);
    const Place now = place();
    [[maybe_unused]] const uint32_t other_row = now.row ^ ROWS;  // of the other warp
    const uint32_t q_along = block_address<BLOCK_M>(lanes_along_rows(q_tile, now.row, now.lane), 0,
                                                    now.warp % ACROSS * (WIDTH / ACROSS / 16));
    [[maybe_unused]] const uint32_t other_along = q_along + (other_row - now.row) * ROW_BYTES;
    store_blocks<Kernel::ROW_BLOCKS>(
        block_at<Kernel::ROW_BLOCKS>(ds_tile, now.col / 8, now.row / 8), ds_rounded, now.lane);
    if constexpr (ACROSS > 1)
      hand_over(exchange + now.warp * Kernel::OPERAND_BYTES, p_rounded, now.lane);
    multiply<T, BLOCK_M>(dv, p_rounded, opaque(q_along) + (do_tile - q_tile));
    if constexpr (ACROSS > 1) {
      bar_sync(1 + now.warp / 2, 2 * WARP);  // of the two warps: both halves are here
      take_over(p_rounded, exchange + (now.warp ^ 1) * Kernel::OPERAND_BYTES, now.lane);
      multiply<T, BLOCK_M>(dv, p_rounded, opaque(other_along) + (do_tile - q_tile));
    }

    // my turn at these rows; I am done with the last ones
    if (now.thread == 0) {
      const int block = block_of(t);
      if (t > mine.visit.first) st_release(mine.turns + block_of(t - 1), mine.col_block);
      const int before = LISTED ? listed(t).before : mine.col_block + 1;
      const int32_t* turn = mine.turns + block;
      while (ld_acquire(turn) != before) {
      }
      if (mine.visits) atomicAdd(mine.visits + block * mine.visits_step + (PARTIAL ? 0 : 1), 1);
    }
    __syncthreads();  // ds is here, and nobody reads this do any more
    float dq[Kernel::DQ_MT][Kernel::DQ_NT][4];
    float* sums = mine.sums + static_cast<int64_t>(block_of(t)) * (BLOCK_M * WIDTH);
    sums += now.thread * 4;
    const auto each_four = [&](auto body) {
#pragma unroll
      for (int m = 0; m < Kernel::DQ_MT; ++m)
#pragma unroll
        for (int n = 0; n < Kernel::DQ_NT; ++n)
          body(dq[m][n], sums + (m * Kernel::DQ_NT + n) * THREADS * 4);
    };
    each_four([](float (&four)[4], float* at) { ld_global_cg(four, at); });
    if (t + 1 < mine.visit.last) load_next(do_tile, mine.dout);
    cp_async_commit_group();

    // dk += ds @ q, dq += ds.T @ k
    multiply<T, BLOCK_M>(dk, ds_rounded, opaque(q_along) + q_at);
    if constexpr (ACROSS > 1) {
      load_blocks<Kernel::ROW_BLOCKS>(
          ds_rounded, block_at<Kernel::ROW_BLOCKS>(ds_tile, now.col / 8, other_row / 8), now.lane);
      multiply<T, BLOCK_M>(dk, ds_rounded, opaque(other_along) + q_at);
    }
    if constexpr (Kernel::Q_STAGES == 1) {
      __syncthreads();  // nobody reads this q any more
      if (t + 1 < mine.visit.last) load_next(q_tile, mine.q);
      cp_async_commit_group();
    }
    constexpr int DQ_WARPS = WIDTH / Kernel::DQ_WIDTH;  // that share rows of dq
    const uint32_t dq_row = now.warp / DQ_WARPS * Kernel::DQ_ROWS;
    const uint32_t k_along = block_address<BLOCK_N>(lanes_along_rows(k_tile, 0, now.lane), 0,
                                                    now.warp % DQ_WARPS * (Kernel::DQ_WIDTH / 16));
    multiply_blocks<T, BLOCK_N, Kernel::ROW_BLOCKS, BLOCK_N / 16>(
        dq, block_at<Kernel::ROW_BLOCKS>(ds_tile, 0, dq_row / 8), k_along, now.lane);
    each_four([](float (&four)[4], float* at) { st_global_cg(at, four); });
  };

  // the query heads that share my key head, in a fixed order
#pragma unroll 1
  while (true) {
    __syncthreads();  // nobody reads what is of the last head any more, and its dq is written
    if (thread_index() == 0) {
      const int col_blocks = cdiv(opaque(len_k), BLOCK_N);
      const int row_blocks = cdiv(opaque(len_q), BLOCK_M);
      if (mine.h >= mine.first_head && mine.visit.first < mine.visit.last)
        st_release(mine.turns + block_of(mine.visit.last - 1), mine.col_block);
      if (++mine.h < mine.last_head) {
        const int b = mine.b, h = mine.h, bh = b * call.sizes.heads + h;
        const int64_t first = static_cast<int64_t>(bh) * row_blocks;
        mine.walked = static_cast<const WalkedRows<BLOCK_M>*>(call.rows) + first;
        mine.sums = call.sums + first * (BLOCK_M * WIDTH);
        mine.turns = call.turns + first;
        if (LISTED) {
          const Visit visit =
              ::listed(call.lists_transposed, b, h, col_blocks, mine.col_block, row_blocks);
          mine.list = visit.partial_list;
          mine.visit = {0, visit.partial, visit.partial + visit.full, visit.partial + visit.full};
          mine.words_by_column = words_of(mask, b, h);
        }
        mine.visits = visits_of(call.visits_dqkv, bh, 0, row_blocks, col_blocks);
        if (mine.visits) mine.visits += 2 * mine.col_block;
        mine.visits_step = 2 * col_blocks;
        const auto walked = [&](const TilemaskTensor& tensor, int width) {
          const Head head = head_of(tensor, b, h, width, true);
          return Walked{head.data, static_cast<int>(head.row), static_cast<uint32_t>(width)};
        };
        mine.q = walked(call.q, call.sizes.width);
        mine.dout = walked(call.dout, call.sizes.width_v);
      }
    }
    __syncthreads();
    if (mine.h == mine.last_head) break;
    int t = mine.visit.first;
    if (t == mine.visit.last) continue;
    if (LISTED) {
      if (const int own = thread_index(); own < min(3, mine.visit.last)) {
        ListedRows& to = mine.listed[own];
        to.block = mine.list[2 * own], to.before = mine.list[2 * own + 1];
        to.alive[0] = mine.walked[to.block].alive[0], to.alive[1] = mine.walked[to.block].alive[1];
      }
      __syncthreads();
    }
    {
      const int block = block_of(t);
      const uint32_t (&alive)[2] = mine.walked[block].alive;
      load(q_tile + t % Kernel::Q_STAGES * Kernel::Q_BYTES, mine.q, block, alive);
      load(do_tile, mine.dout, block, alive);
      load_rows(t % 2, block, mine.visit.first_full > 0);
      cp_async_commit_group();
    }

    // two loops, the one over full tiles has no mask code at all: partial tiles first, of affine
    // masks those above and those below
    const auto is_partial = [&](int t) {
      const Ranges visit = mine.visit;
      return t < visit.first_full || (!LISTED && t >= visit.last_full && t < visit.last);
    };
#pragma unroll 1
    while (t < mine.visit.last) {
#pragma unroll 1
      for (; is_partial(t); ++t) dqkv_step(Flag<true>(), t);
#pragma unroll 1
      for (; t < mine.visit.last_full; ++t) dqkv_step(Flag<false>(), t);
    }
  }

  cp_async_wait_group<0>();
  __syncthreads();  // nobody reads k or v or writes to their place any more
  store_columns<T, BLOCK_N, WIDTH, ACROSS, false>(
      call, {mine.b, mine.kv_head, mine.first_col, {mine.bounds.start, mine.bounds.end}, mine.keys},
      dk, dv, 1, k_tile, v_tile);
}

// delta, and all else that dqkv_kernel finds in the workspace. A block for every row block.
template <typename T, int WIDTH>
__global__ void __launch_bounds__(DqkvKernel<T, WIDTH>::THREADS)
    rows_kernel(const __grid_constant__ DqkvCall call) {
  using Kernel = DqkvKernel<T, WIDTH>;
  constexpr int BLOCK_M = Kernel::BLOCK_M, THREADS = Kernel::THREADS;
  constexpr int CHUNKS = WIDTH / 8, STEP = THREADS / CHUNKS;
  const int len_q = call.sizes.len_q, thread = threadIdx.x;
  const int row_blocks = cdiv(len_q, BLOCK_M);
  const int bh = blockIdx.x / row_blocks, block = blockIdx.x % row_blocks;
  const int b = bh / call.sizes.heads, h = bh % call.sizes.heads;
  const int first_row = block * BLOCK_M;
  const int64_t head = static_cast<int64_t>(bh) * len_q;
  const Bounds bounds = load_bounds(call.mask, b, len_q, call.sizes.len_k);
  WalkedRows<BLOCK_M>* rows = static_cast<WalkedRows<BLOCK_M>*>(call.rows) + blockIdx.x;

  __shared__ float delta[BLOCK_M];
  const Head out = head_of(call.out, b, h, call.sizes.width_v, true);
  const Head dout = head_of(call.dout, b, h, call.sizes.width_v, true);
  const int chunk = thread % CHUNKS;
#pragma unroll
  for (int i = thread / CHUNKS; i < BLOCK_M; i += STEP) {
    const int row = first_row + i;
    // do and out of other rows may hold anything
    const Interval seen = row_interval(call.mask, bounds, b, h, row, len_q);
    const bool alive = is_alive(seen);
    float sum = 0;
    if (alive && chunk * 8 < out.width) {
      const uint4 o = *reinterpret_cast<const uint4*>(out.data + row * out.row + chunk * 8);
      const uint4 d = *reinterpret_cast<const uint4*>(dout.data + row * dout.row + chunk * 8);
      const uint32_t left[4] = {o.x, o.y, o.z, o.w}, right[4] = {d.x, d.y, d.z, d.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        sum = fmaf(T::widen(left[j]), T::widen(right[j]), sum);
        sum = fmaf(T::widen(left[j] >> 16), T::widen(right[j] >> 16), sum);
      }
    }
#pragma unroll
    for (int apart = CHUNKS / 2; apart > 0; apart /= 2)
      sum += __shfl_xor_sync(ALL_LANES, sum, apart);
    if (chunk > 0) continue;
    if (call.dlse && row < len_q) sum -= call.dlse[head + row];
    if (row < len_q) call.delta[head + row] = sum;
    delta[i] = sum;
    rows->seen[i] = seen;
  }
  __syncthreads();
  if (thread < BLOCK_M) {
    const RowLse lse = load_lse<false>(call.lse + head, call.rest ? call.rest + head : nullptr,
                                       first_row + thread, len_q);
    const bool alive = is_alive(lse);
    const float minus_delta = alive ? -delta[thread] : 0;
    const float minus_rest = -lse.rest * call.unscale_log2;
    const int pair = thread / 2, side = thread % 2;
    reinterpret_cast<float*>(rows->minus_delta + pair)[side] = minus_delta;
    reinterpret_cast<float*>(rows->minus_delta + pair)[side + 2] = minus_delta;
    reinterpret_cast<float*>(rows->minus_rest + pair)[side] = minus_rest;
    reinterpret_cast<float*>(rows->minus_rest + pair)[side + 2] = minus_rest;
    reinterpret_cast<float*>(rows->lse + pair)[side] = lse.lse;
    const uint32_t word = __ballot_sync(ALL_LANES, alive);
    if (lane_id() == 0) {
      rows->alive[thread / WARP] = word;
      if (block > 0) rows[-1].next_alive[thread / WARP] = word;
    }
  }

  float4* sums = reinterpret_cast<float4*>(call.sums) +
                 static_cast<int64_t>(blockIdx.x) * (BLOCK_M * WIDTH / 4);
#pragma unroll
  for (int i = thread; i < BLOCK_M * WIDTH / 4; i += THREADS) sums[i] = {0, 0, 0, 0};
  if (thread == 0) {
    call.turns[blockIdx.x] = call.lists_transposed.counts
                                 ? -1
                                 : column_ranges<BLOCK_M, Kernel::BLOCK_N>(bounds, first_row).last;
    if (blockIdx.x == 0) *call.started = 0;
  }
}

// dq, scaled and rounded. A block for every row block, whose threads hold what they do there.
template <typename T, int WIDTH>
__global__ void __launch_bounds__(DqkvKernel<T, WIDTH>::THREADS)
    round_kernel(const __grid_constant__ DqkvCall call) {
  using Kernel = DqkvKernel<T, WIDTH>;
  constexpr int BLOCK_M = Kernel::BLOCK_M, THREADS = Kernel::THREADS;
  constexpr int MT = Kernel::DQ_MT, NT = Kernel::DQ_NT;
  const int len_q = call.sizes.len_q, row_blocks = cdiv(len_q, BLOCK_M);
  const int bh = blockIdx.x / row_blocks, block = blockIdx.x % row_blocks;
  const int warp = threadIdx.x / WARP;
  constexpr int DQ_WARPS = WIDTH / Kernel::DQ_WIDTH;
  const int dq_row = warp / DQ_WARPS * Kernel::DQ_ROWS;
  const WalkedRows<BLOCK_M>& rows = static_cast<const WalkedRows<BLOCK_M>*>(call.rows)[blockIdx.x];
  const float* sums = call.sums + static_cast<int64_t>(blockIdx.x) * (BLOCK_M * WIDTH);

  extern __shared__ __align__(1024) uint8_t shared[];
  float dq[MT][NT][4];
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int n = 0; n < NT; ++n)
      ld_global_cg(dq[m][n], sums + ((m * NT + n) * THREADS + threadIdx.x) * 4);
  float factor[MT][2];
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = dq_row + 16 * m + 8 * i + lane_id() / 4;
      factor[m][i] = rows.alive[row / 32] >> (row % 32) & 1 ? call.sizes.scale : 0;
    }
  finish_rows(dq, factor);
  const uint32_t tile = shared_address(shared);
  store_accumulator<T, BLOCK_M>(tile, dq_row, dq, warp % DQ_WARPS * NT);
  __syncthreads();
  constexpr int ROWS = BLOCK_M / Kernel::WARPS;
  const int first = warp * ROWS;
  store_rows<ROWS, BLOCK_M, WIDTH, false>(
      tile, first,
      head_of(call.dq, bh / call.sizes.heads, bh % call.sizes.heads, call.sizes.width, true),
      block * BLOCK_M + first, [&](int row) { return row < len_q; });
}

constexpr int64_t LINE = 128;

constexpr int64_t whole_lines(int64_t bytes) { return (bytes + LINE - 1) / LINE * LINE; }

// Where the parts of a workspace end, in bytes, one after the other.
struct Workspace {
  int64_t started, turns, rows, sums;
};

template <typename Kernel>
Workspace workspace_of(const TilemaskSizes& sizes) {
  constexpr int BLOCK_M = Kernel::BLOCK_M;
  const int64_t heads = static_cast<int64_t>(sizes.batch) * sizes.heads;
  const int64_t blocks = heads * cdiv(sizes.len_q, BLOCK_M);
  Workspace ends;
  ends.started = LINE;
  ends.turns = ends.started + whole_lines(blocks * sizeof(int32_t));
  ends.rows = ends.turns + whole_lines(blocks * sizeof(WalkedRows<BLOCK_M>));
  ends.sums = ends.rows + blocks * Kernel::SUMS_BYTES;
  return ends;
}

// Whether the step from a row to the next is an int32, as dqkv_kernel takes it.
bool is_near(const TilemaskTensor& tensor) {
  return tensor.row == static_cast<int32_t>(tensor.row);
}

}  // namespace

int64_t dqkv_workspace(const BackwardCall& call, bool general) {
  const bool near = is_near(call.q) && is_near(call.dout);
  const bool any = call.sizes.len_q > 0 && call.sizes.heads > 0;  // else nobody counts from 0
  if (general || !near || !any) return 0;
  return dispatch(call.head.dtype, max_width(call.sizes), [&](auto type, auto width) -> int64_t {
    using Kernel = DqkvKernel<decltype(type), width.value>;
    const bool room = holds(shared_memory(call.head.device), Kernel::BLOCKS, Kernel::SHARED);
    return room ? workspace_of<Kernel>(call.sizes).sums : 0;
  });
}

int launch_dqkv(const BackwardCall& given) {
  DqkvCall call{given};
  const TilemaskSizes& sizes = call.sizes;
  return dispatch(call.head.dtype, max_width(sizes), [&](auto type, auto width) -> int {
    using T = decltype(type);
    constexpr int WIDTH = width.value;
    using Kernel = DqkvKernel<T, WIDTH>;
    TILEMASK_TRY(
        check_lists(call.mask_transposed, call.lists_transposed, Kernel::BLOCK_M, Kernel::BLOCK_N));
    const Workspace ends = workspace_of<Kernel>(sizes);
    uint8_t* workspace = static_cast<uint8_t*>(call.workspace);
    call.started = reinterpret_cast<int32_t*>(workspace);
    call.turns = reinterpret_cast<int32_t*>(workspace + ends.started);
    call.rows = workspace + ends.turns;
    call.sums = reinterpret_cast<float*>(workspace + ends.rows);
    const dim3 rows(cdiv(sizes.len_q, Kernel::BLOCK_M) * sizes.batch * sizes.heads);
    const dim3 columns(cdiv(sizes.len_k, Kernel::BLOCK_N) * sizes.batch * sizes.kv_heads);
    TILEMASK_TRY(launch(rows_kernel<T, WIDTH>, rows, Kernel::THREADS, 0, call));
    const auto kernel =
        call.lists_transposed.counts ? dqkv_kernel<T, WIDTH, true> : dqkv_kernel<T, WIDTH, false>;
    TILEMASK_TRY(launch(kernel, columns, Kernel::THREADS, Kernel::SHARED, call));
    return launch(round_kernel<T, WIDTH>, rows, Kernel::THREADS, Kernel::Q_BYTES, call);
  });
}
