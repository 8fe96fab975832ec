// Sums over pairs: attention weights, and the gradient of a bias.
//
// Both are a matrix of pairs, p or ds, summed over the batches, heads, rows and columns in which
// the result does not differ. A block owns one tile of the result and walks everything that adds to
// it in a fixed order, so that results are the same in every run and nothing larger than the result
// is ever stored:
//
//   where am I -> for every (batch, head, row block, column block) that adds to my tile:
//       words = visible of the tile; nothing visible: next
//       p = exp(scores - lse)   (ds = p * (do @ v.T - delta))
//       sum += p or ds, masked
//   -> sum over rows, over columns where they are not kept -> store
//
// do and v arrive during q @ k.T, the next q and k during what follows it. Few results, such as a
// bias [1, 1, 1, 1], are split over `parts` blocks with a sum of their own in the workspace each.
//
// Instructions per score of the loop, on sm_80, for WIDTH = 64 (128): 32 (41) for ds, 22 (28) for
// p. Of these 2 (4), or half, are mma, 1 (2) ldmatrix, 7 (4 for p) make the score, mask and add it;
// the others find rows and words and start copies, once for the 32 scores of a thread.
#include <math.h>
#include <stdint.h>

#include "launch.cuh"
#include "mask.cuh"
#include "scores.cuh"
#include "softmax.cuh"
#include "tile/fragments.cuh"
#include "tile/shared.cuh"
#include "tilemask.h"
#include "tiles.h"

namespace {

constexpr int BLOCKS = 512;  // few results are split until there are about so many
constexpr int MOST_PARTS = 16;
constexpr int ROW_WARPS = 2, COL_WARPS = 2;
constexpr int THREADS = ROW_WARPS * COL_WARPS * WARP;
constexpr int BLOCK_N = 64;
constexpr int COLUMNS = BLOCK_N / COL_WARPS;  // of a warp
constexpr int NT = COLUMNS / 8;
constexpr int PITCH = BLOCK_N + 8;  // of a sum in shared memory: eight rows in different banks

// Rows of a tile: four tiles of 16-bit elements fit beside each other.
constexpr int tile_rows(int width) { return width <= 128 ? 64 : 32; }

// What adds to a tile of the result is numbered by five digits, the first one fastest.
enum Digit { COL_BLOCK, ROW_BLOCK, HEAD, INNER, OUTER, DIGITS };

// A call, and what is worked out from it before the launch.
struct SumsCall : TilemaskSums {
  bool q_chunked, k_chunked, v_chunked, dout_chunked;
  bool has_rows, has_cols;  // in the result
  int radix[DIGITS];        // how many values a digit has
  int step[DIGITS];         // `parts` as digits
  int parts;
  int group;         // heads that share a key head
  int64_t elements;  // of the result
  void* stored;      // the result, or the parts of it
  int stored_dtype;
};

// A tile of pairs of one batch and head: what all threads share of it. In shared memory: registers
// are for accumulators.
template <int BLOCK_M>
struct Term {
  int first_row, first_col;
  Head q, k, v, dout;
  const float* lse;  // of its head
  const float* rest;
  const float* delta;
  const uint32_t* words;
  const uint32_t* keys;
  Options options;
  Interval live;  // outside are no live columns
  Interval rows[BLOCK_M];
  LaneIntervals lanes[BLOCK_M];  // the same
};

template <typename T, int WIDTH, bool GENERAL>
struct SumsKernel {
  static constexpr int BLOCK_M = tile_rows(WIDTH);
  static constexpr int MT = BLOCK_M / ROW_WARPS / 16;
  static constexpr int Q_BYTES = TILE_BYTES<BLOCK_M, WIDTH>;
  static constexpr int K_BYTES = TILE_BYTES<BLOCK_N, WIDTH>;
  static constexpr int TERM_BYTES = (2 * sizeof(Term<BLOCK_M>) + 1023) / 1024 * 1024;
  static constexpr int SUM_BYTES = BLOCK_M * PITCH * static_cast<int>(sizeof(float));
  static constexpr int shared_bytes(bool gradient) {
    const int tiles = (Q_BYTES + K_BYTES) * (gradient ? 2 : 1);
    return TERM_BYTES + (tiles > SUM_BYTES ? tiles : SUM_BYTES);
  }
};

__device__ __forceinline__ void store_sum(const SumsCall& call, int64_t at, float value) {
  if (call.stored_dtype == TILEMASK_FLOAT32)
    static_cast<float*>(call.stored)[at] = value;
  else if (call.stored_dtype == TILEMASK_FLOAT16)
    static_cast<uint16_t*>(call.stored)[at] = Float16::pack(value, 0);
  else
    static_cast<uint16_t*>(call.stored)[at] = BFloat16::pack(value, 0);
}

// Sums a tile over what the result has not, and stores it.
template <int BLOCK_M>
__device__ __forceinline__ void store_tile(const SumsCall& call, float* sum, int part, int matrix,
                                           int first_row, int first_col) {
  const int thread = threadIdx.x;
  if (!call.has_cols) {
    if (thread < BLOCK_M)
      for (int c = 1; c < BLOCK_N; ++c) sum[thread * PITCH] += sum[thread * PITCH + c];
    __syncthreads();
  }
  if (!call.has_rows) {
    if (thread < (call.has_cols ? BLOCK_N : 1))
      for (int r = 1; r < BLOCK_M; ++r) sum[thread] += sum[r * PITCH + thread];
    __syncthreads();
  }
  const int rows = min(call.has_rows ? BLOCK_M : 1, call.rows_kept - first_row);
  const int cols = min(call.has_cols ? BLOCK_N : 1, call.cols_kept - first_col);
  for (int r = thread / WARP; r < rows; r += THREADS / WARP) {
    const int64_t row = static_cast<int64_t>(matrix) * call.rows_kept + first_row + r;
    const int64_t start = part * call.elements + row * call.cols_kept + first_col;
    for (int c = lane_id(); c < cols; c += WARP) store_sum(call, start + c, sum[r * PITCH + c]);
  }
}

template <typename T, int WIDTH, bool GENERAL>
__global__ void __launch_bounds__(THREADS, WIDTH <= 128 ? 2 : 1)
    sums_kernel(const __grid_constant__ SumsCall call) {
  using Kernel = SumsKernel<T, WIDTH, GENERAL>;
  constexpr int BLOCK_M = Kernel::BLOCK_M, MT = Kernel::MT;
  constexpr bool NATURAL = GENERAL;
  const TilemaskMask& mask = call.mask;
  const TilemaskScore& score = call.score;
  const int len_q = call.sizes.len_q, len_k = call.sizes.len_k, heads = call.sizes.heads;
  const bool gradient = call.dout.data;

  // where am I: my tile of the result, and which part of what adds to it
  const int row_tiles = call.has_rows ? cdiv(len_q, BLOCK_M) : 1;
  const int col_tiles = call.has_cols ? cdiv(len_k, BLOCK_N) : 1;
  uint32_t index = blockIdx.x;
  const int col_tile = index % col_tiles, row_tile = index / col_tiles % row_tiles;
  index /= col_tiles * row_tiles;
  const int part = index % call.parts, matrix = index / call.parts;
  const int h_kept = matrix % call.heads_kept;
  const int inner_at = matrix / call.heads_kept % call.inner_kept;
  const int outer_at = matrix / call.heads_kept / call.inner_kept;

  const int warp = threadIdx.x / WARP, lane = lane_id() % 4;
  const int warp_row = warp % ROW_WARPS * 16 * MT, warp_col = warp / ROW_WARPS * COLUMNS;
  const int own_row = warp_row + lane_id() / 4;  // this thread's first row of the tile
  extern __shared__ __align__(1024) uint8_t shared[];
  Term<BLOCK_M>* terms = reinterpret_cast<Term<BLOCK_M>*>(shared);  // this one and the next
  const uint32_t q_tile = shared_address(shared) + Kernel::TERM_BYTES;
  const uint32_t k_tile = q_tile + Kernel::Q_BYTES;
  const uint32_t do_tile = k_tile + Kernel::K_BYTES, v_tile = do_tile + Kernel::Q_BYTES;

  int at[DIGITS], digits = part;
#pragma unroll
  for (int d = 0; d < OUTER; ++d) {
    at[d] = digits % call.radix[d];
    digits /= call.radix[d];
  }
  at[OUTER] = digits;
  const auto advance = [&] {
    int carry = 0;
#pragma unroll
    for (int d = 0; d < DIGITS; ++d) {
      at[d] += call.step[d] + carry;
      carry = d < OUTER && at[d] >= call.radix[d];
      if (carry) at[d] -= call.radix[d];
    }
  };

  // from `at` on, the first term in which anything is visible, and its words; false: none is left
  uint32_t next_words[MT][2];
  const auto seek = [&](Term<BLOCK_M>& term) {
    for (; at[OUTER] < call.radix[OUTER]; advance()) {
      const int h = h_kept + at[HEAD];
      const int b = (outer_at + at[OUTER]) * call.inner + inner_at + at[INNER];
      const int first_row = (row_tile + at[ROW_BLOCK]) * BLOCK_M;
      const int first_col = (col_tile + at[COL_BLOCK]) * BLOCK_N;
      bool any = false;
      if (threadIdx.x < BLOCK_M) {
        const Bounds bounds = load_bounds(mask, b, len_q, len_k);
        const Interval seen = row_interval(mask, bounds, b, h, first_row + threadIdx.x, len_q);
        term.rows[threadIdx.x] = seen;
        term.lanes[threadIdx.x] = by_lane(seen);
        any = seen.lo < first_col + BLOCK_N && seen.hi > first_col;
      } else if (threadIdx.x == THREADS - 1) {
        const Bounds bounds = load_bounds(mask, b, len_q, len_k);
        const int kv_head = h / call.group, bh = b * heads + h;
        const int64_t head = static_cast<int64_t>(bh) * len_q;
        term.first_row = first_row, term.first_col = first_col;
        term.q = head_of(call.q, b, h, call.sizes.width, call.q_chunked);
        term.k = head_of(call.k, b, kv_head, call.sizes.width, call.k_chunked);
        term.v = head_of(call.v, b, kv_head, call.sizes.width_v, call.v_chunked);
        term.dout = head_of(call.dout, b, h, call.sizes.width_v, call.dout_chunked);
        term.lse = call.lse + head;
        term.rest = call.rest ? call.rest + head : nullptr;
        term.delta = call.delta + head;
        term.words = words_of(mask, b, h);
        term.keys = keys_of(mask, b);
        term.options = options_of<GENERAL>(score, b, h, bh);
        term.live = {bounds.start, bounds.end};
      }
      if (!__syncthreads_or(any)) continue;
      tile_words(next_words, mask, term.words, term.keys, term.lanes + own_row, first_row + own_row,
                 first_col + warp_col, len_q, lane);
      uint32_t found = 0;
#pragma unroll
      for (int m = 0; m < MT; ++m) found |= next_words[m][0] | next_words[m][1];
      if (__syncthreads_or(found != 0)) return true;
    }
    return false;
  };

  // starts a copy of rows and one of columns: what padding excludes, and rows that see nothing,
  // are never read
  const auto load = [&](const Term<BLOCK_M>& term, uint32_t rows_smem, const Head& row_head,
                        uint32_t cols_smem, const Head& col_head) {
    const int first_row = term.first_row, first_col = term.first_col;
    load_tile<BLOCK_M, WIDTH, THREADS, GENERAL>(rows_smem, row_head, first_row, [&](int row) {
      return is_alive(term.rows[row - first_row]);
    });
    load_tile<BLOCK_N, WIDTH, THREADS, GENERAL, true>(cols_smem, col_head, first_col, [&](int col) {
      return is_live_column(term.live, term.keys, col);
    });
  };

  float total[MT][NT][4];
  clear(total);
  const auto each = [&](auto step) {
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) step(m, n, e);
  };
  bool more = seek(terms[0]);
  if (more) load(terms[0], q_tile, terms[0].q, k_tile, terms[0].k);
  cp_async_commit_group();
#pragma unroll 1
  for (int slot = 0; more; slot ^= 1) {
    const Term<BLOCK_M>& term = terms[slot];
    Term<BLOCK_M>& next = terms[slot ^ 1];
    if (gradient) load(term, do_tile, term.dout, v_tile, term.v);
    cp_async_commit_group();
    uint32_t words[MT][2];
    RowLse row_lse[MT][2];
    float row_delta[MT][2];
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = term.first_row + own_row + 16 * m + 8 * i;
        words[m][i] = next_words[m][i];
        row_lse[m][i] = load_lse<NATURAL>(term.lse, term.rest, row, len_q);
        row_delta[m][i] = gradient && row < len_q ? term.delta[row] : 0;
      }
    cp_async_wait_group<1>();
    __syncthreads();  // q and k are here

    // p = exp(scores - lse)
    float p[MT][NT][4];
    clear(p);
    multiply_transposed<T, BLOCK_M, BLOCK_N, WIDTH>(p, opaque(lanes_along_rows(q_tile, warp_row)),
                                                    opaque(lanes_across_rows(k_tile, warp_col)));
    advance();
    more = seek(next);
    // seek() waited: nobody reads this q and k any more
    if (more) load(next, q_tile, next.q, k_tile, next.k);
    cp_async_commit_group();
    const int row = term.first_row + own_row, col = term.first_col + warp_col;
    if constexpr (GENERAL)
      scored(p, NoBend(), score, term.options, Place<false>{row, col + 2 * lane}, call.sizes.scale,
             len_q, len_k);
    each([&](int m, int n, int e) {
      p[m][n][e] = weight<NATURAL, true>(p[m][n][e], row_lse[m][e / 2], call.sizes.scale * LOG2_E);
    });

    const auto drop = [&](float (&tile)[MT][NT][4]) {
      if (!GENERAL || !score.seed) return;
      uint32_t kept_words[MT][2];
      kept<COLUMNS>(kept_words, score, term.options, row, col, lane);
      each([&](int m, int n, int e) { tile[m][n][e] *= score.keep_factor; });
      masked(tile, 0, kept_words);
    };
    if (gradient) {  // ds = p * (do @ v.T - delta)
      cp_async_wait_group<1>();
      __syncthreads();  // do and v are here
      float dp[MT][NT][4];
      clear(dp);
      multiply_transposed<T, BLOCK_M, BLOCK_N, WIDTH>(dp,
                                                      opaque(lanes_along_rows(do_tile, warp_row)),
                                                      opaque(lanes_across_rows(v_tile, warp_col)));
      drop(dp);
      each([&](int m, int n, int e) { p[m][n][e] *= dp[m][n][e] - row_delta[m][e / 2]; });
      __syncthreads();  // nobody reads do and v any more
    } else {
      drop(p);
    }
    masked(p, 0, words);
    each([&](int m, int n, int e) { total[m][n][e] += p[m][n][e]; });
  }

  __syncthreads();  // nobody reads q and k any more
  float* sum = reinterpret_cast<float*>(shared + Kernel::TERM_BYTES);
  each([&](int m, int n, int e) {
    sum[(own_row + 16 * m + 8 * (e / 2)) * PITCH + warp_col + 8 * n + 2 * lane + e % 2] =
        total[m][n][e] * call.weight;
  });
  __syncthreads();
  store_tile<BLOCK_M>(call, sum, part, matrix, row_tile * BLOCK_M, col_tile * BLOCK_N);
}

// Adds up the parts of every element, always in the same order.
__global__ void __launch_bounds__(THREADS) add_kernel(const __grid_constant__ SumsCall call) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (at >= call.elements) return;
  const float* parts = static_cast<const float*>(call.workspace) + at;
  float total = 0;
  for (int i = 0; i < call.parts; ++i) total += parts[i * call.elements];
  store_sum(call, at, total);
}

// The width that the tiles of a call must hold.
int width_of(const TilemaskSums& call) {
  return call.dout.data ? max_width(call.sizes) : call.sizes.width;
}

// What a result has of a dimension: all or one.
bool is_kept(int kept, int all) { return kept == all || kept == 1; }

int check_sums(const TilemaskSums& call) {
  const TilemaskSizes& sizes = call.sizes;
  TILEMASK_TRY(check_call(call, sizes));
  const bool right = call.outer >= 0 && call.inner >= 0 &&
                     static_cast<int64_t>(call.outer) * call.inner == sizes.batch &&
                     is_kept(call.outer_kept, call.outer) && is_kept(call.inner_kept, call.inner) &&
                     is_kept(call.heads_kept, sizes.heads) &&
                     is_kept(call.rows_kept, sizes.len_q) && is_kept(call.cols_kept, sizes.len_k);
  return right ? TILEMASK_OK : TILEMASK_WRONG_SIZE;
}

struct Split {
  int64_t elements, tiles;  // of the result
  int64_t terms;            // that add to a tile
  int parts;
};

// How the work on a result is split up.
Split split_of(const TilemaskSums& call) {
  const TilemaskSizes& sizes = call.sizes;
  const int64_t row_blocks = cdiv(sizes.len_q, tile_rows(width_of(call)));
  const int64_t col_blocks = cdiv(sizes.len_k, BLOCK_N);
  const int64_t matrices =
      static_cast<int64_t>(call.outer_kept) * call.inner_kept * call.heads_kept;
  Split split;
  split.elements = matrices * call.rows_kept * call.cols_kept;
  split.tiles = matrices * (call.rows_kept == sizes.len_q ? row_blocks : 1) *
                (call.cols_kept == sizes.len_k ? col_blocks : 1);
  const int64_t pairs = static_cast<int64_t>(sizes.batch) * sizes.heads * row_blocks * col_blocks;
  split.terms = split.tiles ? pairs / split.tiles : 0;
  int64_t parts = split.tiles ? BLOCKS / split.tiles : 0;
  parts = parts < split.terms ? parts : split.terms;
  parts = parts < MOST_PARTS ? parts : MOST_PARTS;
  split.parts = parts > 1 ? static_cast<int>(parts) : 1;
  return split;
}

template <typename T, int WIDTH, bool GENERAL>
int launch_sums(const SumsCall& call, int64_t tiles) {
  return launch(sums_kernel<T, WIDTH, GENERAL>, dim3(tiles * call.parts), THREADS,
                SumsKernel<T, WIDTH, GENERAL>::shared_bytes(call.dout.data), call);
}

}  // namespace

extern "C" int64_t tilemask_sums_workspace(const TilemaskSums* call) {
  if (check_sums(*call)) return 0;
  const Split split = split_of(*call);
  return split.parts > 1 ? split.parts * split.elements * static_cast<int64_t>(sizeof(float)) : 0;
}

extern "C" int tilemask_sums(const TilemaskSums* given) {
  TILEMASK_TRY(check_sums(*given));
  SumsCall call{*given};
  const TilemaskSizes& sizes = call.sizes;
  if (call.sums_dtype < TILEMASK_FLOAT16 || call.sums_dtype > TILEMASK_FLOAT32)
    return TILEMASK_WRONG_DTYPE;
  const Split split = split_of(call);
  if (split.tiles * split.parts > INT32_MAX) return TILEMASK_WRONG_SIZE;
  if (split.elements == 0) return TILEMASK_OK;
  call.parts = split.parts;
  call.elements = split.elements;
  call.group = sizes.heads > 0 ? sizes.heads / sizes.kv_heads : 1;
  call.has_rows = call.rows_kept == sizes.len_q;
  call.has_cols = call.cols_kept == sizes.len_k;
  const int radix[DIGITS] = {call.has_cols ? 1 : cdiv(sizes.len_k, BLOCK_N),
                             call.has_rows ? 1 : cdiv(sizes.len_q, tile_rows(width_of(call))),
                             sizes.heads / call.heads_kept, call.inner / call.inner_kept,
                             call.outer / call.outer_kept};
  int rest = call.parts;
  for (int d = 0; d < DIGITS; ++d) {
    const bool last = d == OUTER;
    call.radix[d] = split.terms > 0 ? radix[d] : !last;  // sums of nothing are 0
    call.step[d] = last ? rest : rest % call.radix[d];
    if (!last) rest /= call.radix[d];
  }

  const bool split_up = call.parts > 1;
  const int64_t needed = tilemask_sums_workspace(given);
  if (needed && (!call.workspace || call.workspace_size < needed)) return TILEMASK_NO_WORKSPACE;
  call.stored = split_up ? call.workspace : call.sums;
  call.stored_dtype = split_up ? TILEMASK_FLOAT32 : call.sums_dtype;
  call.q_chunked = is_chunked(call.q, sizes.width);
  call.k_chunked = is_chunked(call.k, sizes.width);
  const bool gradient = call.dout.data;
  call.v_chunked = !gradient || is_chunked(call.v, sizes.width_v);
  call.dout_chunked = !gradient || is_chunked(call.dout, sizes.width_v);
  const bool chunked = call.q_chunked && call.k_chunked && call.v_chunked && call.dout_chunked;

  const DeviceScope scope(call.head.device);
  TILEMASK_TRY(scope.code());
  TILEMASK_TRY(dispatch(call.head.dtype, width_of(call), has_options(call.score) || !chunked,
                        [&](auto type, auto padded, auto general) {
                          return launch_sums<decltype(type), padded.value, general.value>(
                              call, split.tiles);
                        }));
  if (!split_up) return TILEMASK_OK;
  call.stored = call.sums;
  call.stored_dtype = call.sums_dtype;
  return launch(add_kernel, dim3((call.elements + THREADS - 1) / THREADS), THREADS, 0, call);
}
