// The mask in the kernels: which columns a row sees, which tiles to visit, and the select itself.
//
// A row sees the columns of an interval, lo <= j < hi, that its words and key words let through
// (tilemask.h). `visible` is the definition; what follows applies it to a tile of scores.
//
// Tiles of BLOCK_M rows x BLOCK_N columns fall into three classes:
//
//   columns ->                      .  empty: never visited, its K and V are never loaded
//   # # / . . .                     /  partial: the mask is applied in registers
//   # # # / . .    causal           #  full: every row that sees anything sees all columns;
//   # # # # / .                        a loop without mask code
//
// Words. Bit 2a + t of word l (l < 4) is column 8a + 2l + t of 128: what the lanes with
// lane % 4 == l hold of an accumulator row of mma.m16n8k16, in order. A thread needs one word per
// row, and of it only bits that are constants to it.
#pragma once

#include <stdint.h>

#include "ptx/bits.cuh"
#include "tilemask.h"

constexpr int FAR = 1 << 30;  // beyond every length; sums of two still fit
constexpr int WORD_COLUMNS = 128;

struct Bounds {
  int start, end, left, right, q_start, q_end;
};

struct Interval {
  int lo, hi;
};

// Whether a row sees anything.
__device__ __forceinline__ bool is_alive(Interval row) { return row.lo < row.hi; }

// The definition: a row with this interval, and `bit` for the column, sees column col.
__device__ __forceinline__ bool visible(Interval row, bool bit, int col) {
  return (row.lo <= col) & (col < row.hi) & bit;
}

// -- what a row sees ------------------------------------------------------------------------------

// The bounds of batch b, start to q_end inside the lengths.
__device__ __forceinline__ Bounds load_bounds(const TilemaskMask& mask, int b, int len_q,
                                              int len_k) {
  const int32_t* row = mask.batch_bounds ? mask.batch_bounds + 6ll * b : mask.bounds;
  return {max(row[0], 0), min(row[1], len_k), row[2], row[3], max(row[4], 0), min(row[5], len_q)};
}

// Bounds under which each of `rows` rows sees what row 0 does.
__device__ __forceinline__ Bounds same_rows(Bounds own, int rows) {
  int last = own.q_start == 0 && own.q_end > 0 ? rows : 0;
  return {max(own.start, own.left), min(own.end, own.right), -FAR, FAR, 0, last};
}

// The interval of a row; {0, 0} if it sees nothing.
__device__ __forceinline__ Interval row_interval(const TilemaskMask& mask, const Bounds& bounds,
                                                 int b, int h, int row, int len_q) {
  if (row >= len_q) return {0, 0};
  Interval seen;
  bool alive;
  if (mask.lo) {
    int64_t at = b * mask.interval_batch + h * mask.interval_head + row;
    seen = {mask.lo[at], mask.hi[at]};
    alive = seen.lo < seen.hi;
  } else {
    seen = {max(row + bounds.left, bounds.start), min(row + bounds.right, bounds.end)};
    alive = row >= bounds.q_start && row < bounds.q_end && seen.lo < seen.hi;
  }
  if (mask.live) alive = alive && mask.live[b * mask.live_batch + h * mask.live_head + row];
  return alive ? seen : Interval{0, 0};
}

// The rows that see column col under affine bounds; {0, 0} where none does.
__device__ __forceinline__ Interval column_interval(const Bounds& bounds, int col) {
  Interval rows{max(col - bounds.right + 1, bounds.q_start),
                min(col - bounds.left + 1, bounds.q_end)};
  bool seen = col >= bounds.start && col < bounds.end && rows.lo < rows.hi;
  return seen ? rows : Interval{0, 0};
}

// Where the key words of batch b start; null if the mask has none.
__device__ __forceinline__ const uint32_t* keys_of(const TilemaskMask& mask, int b) {
  return mask.keys ? mask.keys + b * mask.keys_batch : nullptr;
}

// Whether padding leaves column col in; the others are never read. live: [start, end); keys:
// keys_of its batch.
__device__ __forceinline__ bool is_live_column(Interval live, const uint32_t* keys, int col) {
  bool bit = true;
  if (keys && visible(live, true, col))
    bit = keys[col / 128 * 4 + col % 8 / 2] >> (col % 128 / 8 * 2 + col % 2) & 1;
  return visible(live, bit, col);
}

// The same of columns col, col + STEP, ...: bit i is the i-th of them. By the interval alone.
template <int STEP>
__device__ __forceinline__ uint32_t live_columns(Interval live, int col) {
  static_assert((STEP & (STEP - 1)) == 0, "divisions are shifts");
  const int first = (live.lo - col + STEP - 1) >> log2_of(STEP);
  const int last = (live.hi - col + STEP - 1) >> log2_of(STEP);
  return shl(~0u, max(first, 0)) & ~shl(~0u, max(last, 0));
}

// Of COUNT columns, by the keys too.
template <int STEP, int COUNT>
__device__ __forceinline__ uint32_t live_columns(Interval live, const uint32_t* keys, int col) {
  uint32_t bits = 0;
#pragma unroll 1
  for (int i = 0; i < COUNT; ++i)
    bits |= static_cast<uint32_t>(is_live_column(live, keys, col + i * STEP)) << i;
  return bits;
}

// -- words ----------------------------------------------------------------------------------------

// How many columns 8a + 2 * lane + t (t = 0, 1) lie below `column`.
__device__ __forceinline__ int bits_below(int column, int lane) {
  return 2 * (column >> 3) + min(max((column & 7) - 2 * lane, 0), 2);
}

// An interval of columns as words of the lanes 0 to 3 have it: how many of their bits lie below lo
// and below hi, from column 0 on. Worked out once for a row, so that a tile's word is few steps.
struct LaneIntervals {
  Interval of[4];
};

__device__ __forceinline__ LaneIntervals by_lane(Interval row) {
  LaneIntervals bits;
#pragma unroll
  for (int lane = 0; lane < 4; ++lane)
    bits.of[lane] = {bits_below(row.lo, lane), bits_below(row.hi, lane)};
  return bits;
}

// The word of a lane's interval, from column `first` on, a multiple of 8. lo <= hi.
__device__ __forceinline__ uint32_t interval_word(Interval bits, uint32_t first) {
  const int before = first / 4;
  return shl(~0u, max(bits.lo - before, 0)) & ~shl(~0u, max(bits.hi - before, 0));
}

// Where the words of batch b and head h start; null if the mask has none.
__device__ __forceinline__ const uint32_t* words_of(const TilemaskMask& mask, int b, int h) {
  if (!mask.words) return nullptr;
  int outer = b / mask.words_split, inner = b % mask.words_split;
  return mask.words + outer * mask.words_outer + inner * mask.words_inner + h * mask.words_head;
}

// Packed bits of a line against the columns from `first`; rows and columns exchanged where the
// words are by column.
__device__ __forceinline__ uint32_t line_word(const TilemaskMask& mask, const uint32_t* words,
                                              int line, uint32_t first, int lane) {
  uint32_t word = words[first / 128 * mask.words_group + line * mask.words_line + lane];
  return word >> (first % 128 / 4);
}

__device__ __forceinline__ uint32_t key_word(const uint32_t* keys, uint32_t first, int lane) {
  return keys[first / 128 * 4 + lane] >> (first % 128 / 4);
}

// `visible` of the columns from first_col on, packed for lane = 0 to 3, for the accumulator rows
// of a thread: 16m + 8i below `row`, rows[0] being the intervals of that one. words, keys: words_of
// its head and keys_of its batch.
template <int MT>
__device__ __forceinline__ void tile_words(uint32_t (&word)[MT][2], const TilemaskMask& mask,
                                           const uint32_t* words, const uint32_t* keys,
                                           const LaneIntervals* rows, int row, uint32_t first_col,
                                           int len_q, int lane) {
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int i = 0; i < 2; ++i)
      word[m][i] = interval_word(rows[16 * m + 8 * i].of[lane], first_col);
  if (!words && !keys) return;
  const uint32_t key = keys ? key_word(keys, first_col, lane) : ~0u;
  if (words) words += first_col / 128 * mask.words_group + lane;
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int line = row + 16 * m + 8 * i;
      word[m][i] &= key;
      if (words && line < len_q)
        word[m][i] &= words[line * mask.words_line] >> (first_col % 128 / 4);
    }
}

// `visible` of the rows from first_row on, packed, for the columns that are a thread's accumulator
// rows: 16m + 8i from `col`, cols[0] being the rows that see that one. Less explicit intervals, see
// masked_transposed, and the key bits: dK and dV of a dead key are zeroed at the end.
template <int MT>
__device__ __forceinline__ void tile_words_transposed(uint32_t (&word)[MT][2],
                                                      const TilemaskMask& mask,
                                                      const uint32_t* words,
                                                      const LaneIntervals* cols, int col,
                                                      uint32_t first_row, int len_k, int lane) {
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int own = col + 16 * m + 8 * i;
      word[m][i] = interval_word(cols[16 * m + 8 * i].of[lane], first_row);
      if (words && own < len_k) word[m][i] &= line_word(mask, words, own, first_row, lane);
    }
}

// An accumulator row's pair a (columns 8a + 2 * lane and the next) where its word has a bit, else
// `otherwise`.
__device__ __forceinline__ void masked(float& low, float& high, uint32_t word, int a,
                                       float otherwise) {
  low = word & (1u << (2 * a)) ? low : otherwise;
  high = word & (2u << (2 * a)) ? high : otherwise;
}

// The same for an accumulator; word[m][i] is that of its row 16m + 8i + lane / 4.
template <int MT, int NT>
__device__ __forceinline__ void masked(float (&tile)[MT][NT][4], float otherwise,
                                       const uint32_t (&word)[MT][2]) {
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int n = 0; n < NT; ++n)
        masked(tile[m][n][2 * i], tile[m][n][2 * i + 1], word[m][i], n, otherwise);
}

// An accumulator whose rows are columns, 16m + 8i from `col`, where the intervals of rows let it:
// rows[8n + t] is that of its column 8n + 2 * lane + t. Else 0.
template <int MT, int NT>
__device__ __forceinline__ void masked_transposed(float (&tile)[MT][NT][4], const Interval* rows,
                                                  int col) {
#pragma unroll
  for (int n = 0; n < NT; ++n)
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      const Interval seen = rows[8 * n + t];
#pragma unroll
      for (int m = 0; m < MT; ++m)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& x = tile[m][n][2 * i + t];
          x = visible(seen, true, col + 16 * m + 8 * i) ? x : 0;
        }
    }
}

// -- which tiles to visit -------------------------------------------------------------------------

struct Range {
  int first, last;
};

struct Ranges {
  int first, first_full, last_full, last;
};

__host__ __device__ constexpr int cdiv(int a, int b) { return (a + b - 1) / b; }

// The rows that see anything, last <= first if none does.
__host__ __device__ __forceinline__ Range live_range(int start, int end, int left, int right,
                                                     int q_start, int q_end) {
  int first = max(q_start, start - right + 1), last = min(q_end, end - left);
  bool nothing = start >= end || left >= right;
  return {first, nothing ? first : last};
}

// first <= first_full <= last_full <= last, all 0 if there is nothing to visit.
__host__ __device__ __forceinline__ Ranges ordered_ranges(bool nothing, Ranges found) {
  int first = nothing ? 0 : found.first, last = nothing ? 0 : found.last;
  int first_full = min(max(found.first_full, first), last);
  return {first, first_full, min(max(found.last_full, first_full), last), last};
}

// Column blocks of a row block under affine bounds: those in [first, last) are visited, those in
// [first_full, last_full) are full. The union of the rows' intervals is contiguous because lo and
// hi grow by at most one per row.
template <int BLOCK_M, int BLOCK_N>
__host__ __device__ __forceinline__ Ranges column_ranges(const Bounds& own, int first_row) {
  Range live = live_range(own.start, own.end, own.left, own.right, own.q_start, own.q_end);
  int row = max(first_row, live.first), last_row = min(first_row + BLOCK_M, live.last) - 1;
  return ordered_ranges(
      row > last_row,
      {max(own.start, row + own.left) / BLOCK_N, cdiv(max(own.start, last_row + own.left), BLOCK_N),
       min(own.end, row + own.right) / BLOCK_N, cdiv(min(own.end, last_row + own.right), BLOCK_N)});
}

// Row blocks of a column block under affine bounds. Column j is seen by the rows
// max(q_start, j - right + 1) <= i < min(q_end, j - left + 1): the same form with rows and columns
// exchanged. Rows that see nothing do not count against full, columns do.
template <int BLOCK_M, int BLOCK_N>
__host__ __device__ __forceinline__ Ranges row_ranges(const Bounds& own, int first_col) {
  Range live = live_range(own.start, own.end, own.left, own.right, own.q_start, own.q_end);
  Range seen = live_range(own.q_start, own.q_end, 1 - own.right, 1 - own.left, own.start, own.end);
  int col = max(first_col, seen.first), last_col = min(first_col + BLOCK_N, seen.last) - 1;
  int first = max(own.q_start, col - own.right + 1) / BLOCK_M;
  int last = cdiv(min(own.q_end, last_col - own.left + 1), BLOCK_M);
  // rows that see all BLOCK_N columns, widened over the dead rows on both sides
  int row_first = first_col + BLOCK_N - own.right, row_last = first_col - own.left + 1;
  int first_full = row_first <= live.first ? first : cdiv(row_first, BLOCK_M);
  int last_full = row_last >= live.last ? last : row_last / BLOCK_M;
  if (first_col < own.start || first_col + BLOCK_N > own.end) last_full = first;
  return ordered_ranges(col > last_col, {first, first_full, last_full, last});
}

// How many blocks of each class to visit, and where visited_block finds them: in lists, or by
// number. Affine partial blocks count up from partial_at and leave out the full ones.
struct Visit {
  int partial, full;
  const int32_t* partial_list;  // null: affine
  const int32_t* full_list;
  int partial_at, full_at;
  int full_first, full_count;  // all full ones of an affine mask
};

__device__ __forceinline__ Visit listed(const TilemaskLists& lists, int b, int h, int blocks,
                                        int block, int across) {
  int64_t entry = (b * lists.batch + h * lists.head) * blocks + block;
  const int32_t* first = lists.blocks + entry * 2 * across;
  return {lists.counts[entry * 2], lists.counts[entry * 2 + 1], first, first + across};
}

__device__ __forceinline__ Visit counted(Ranges ranges) {
  int full = ranges.last_full - ranges.first_full;
  int partial = ranges.last - ranges.first - full;
  return {partial,           full, nullptr, nullptr, ranges.first, ranges.first_full,
          ranges.first_full, full};
}

// The t-th block of a class to visit.
template <bool PARTIAL>
__device__ __forceinline__ int visited_block(const Visit& visit, int t) {
  if (visit.partial_list) return (PARTIAL ? visit.partial_list : visit.full_list)[t];
  if (!PARTIAL) return visit.full_at + t;
  int block = visit.partial_at + t;
  return block < visit.full_first ? block : block + visit.full_count;
}

template <int BLOCK_M, int BLOCK_N>
__device__ __forceinline__ Visit columns_to_visit(const TilemaskLists& lists, const Bounds& bounds,
                                                  int b, int h, int row_block, int row_blocks,
                                                  int col_blocks) {
  if (lists.counts) return listed(lists, b, h, row_blocks, row_block, col_blocks);
  return counted(column_ranges<BLOCK_M, BLOCK_N>(bounds, row_block * BLOCK_M));
}

template <int BLOCK_M, int BLOCK_N>
__device__ __forceinline__ Visit rows_to_visit(const TilemaskLists& lists, const Bounds& bounds,
                                               int b, int h, int col_block, int row_blocks,
                                               int col_blocks) {
  if (lists.counts) return listed(lists, b, h, col_blocks, col_block, row_blocks);
  return counted(row_ranges<BLOCK_M, BLOCK_N>(bounds, col_block * BLOCK_N));
}

// The same over both classes, partial blocks first.
__device__ __forceinline__ int visited_block(const Visit& visit, int t) {
  return t < visit.partial ? visited_block<true>(visit, t)
                           : visited_block<false>(visit, t - visit.partial);
}

// One of `parts` equal shares of the tiles of both classes, partial tiles first.
__device__ __forceinline__ Visit share_of(Visit all, int part, int parts) {
  int64_t total = all.partial + all.full;
  int first = total * part / parts, last = total * (part + 1) / parts;
  int first_partial = min(first, all.partial), last_partial = min(last, all.partial);
  int first_full = max(first - all.partial, 0), last_full = max(last - all.partial, 0);
  Visit own = all;
  own.partial = last_partial - first_partial;
  own.full = last_full - first_full;
  if (all.partial_list) {
    own.partial_list += first_partial;
    own.full_list += first_full;
  }
  own.partial_at += first_partial;
  own.full_at += first_full;
  return own;
}

// Counter mode, for tests: where visits [B * H, row blocks, column blocks, 2] of a row block start.
__device__ __forceinline__ int32_t* visits_of(int32_t* visits, int bh, int row_block,
                                              int row_blocks, int col_blocks) {
  int64_t first = (static_cast<int64_t>(bh) * row_blocks + row_block) * col_blocks;
  return visits ? visits + 2 * first : nullptr;
}

// Adds 1 at the class of a visited block.
__device__ __forceinline__ void count_visit(int32_t* visits, int64_t block, bool partial) {
  if (visits && threadIdx.x == 0) atomicAdd(visits + 2 * block + (partial ? 0 : 1), 1);
}
