// From a mask to what the loops read: packed words, rows that see anything, and tile lists.
//
//   bool [.., Lq, Lk] --pack--> words --transpose--> the words of dK and dV
//   bounds or lo and hi, words, key words --live--> live
//   all of these --classify--> a class per tile --compact--> lists, by row block or by column block
//
// A bool mask is read once; everything after it reads the words. Arrays have their largest size and
// counts stay on the device, so nothing waits for a value. Warps work alone, and lanes are rows.
//
// Counts, per word (32 pairs), on sm_80. An H100 gives a multiprocessor 15 bytes and 4 instructions
// of a warp per cycle, so 36 bytes leave room for 9 of them.
//
//   pack        32 bytes in, 4 out; 2.3 instructions where rows are aligned to 16 bytes, 3.6 to 4,
//               7.2 byte by byte along columns, 8.6 along rows; 1.4 of them make the words
//   transpose   4 in, 4 out; 0.9
//   classify    4 in; 0.4
#include <stdint.h>

#include "launch.cuh"
#include "mask.cuh"
#include "ptx/copy.cuh"
#include "tile/fragments.cuh"
#include "tilemask.h"
#include "tiles.h"

namespace {

constexpr int WARPS = 4;  // of a block
constexpr int THREADS = WARPS * WARP;

__device__ __forceinline__ uint32_t warp_of_grid() {
  return blockIdx.x * WARPS + threadIdx.x / WARP;
}

// -- packing --------------------------------------------------------------------------------------

constexpr int PACK_ROWS = 64;  // of a warp: 8 KiB of bool
constexpr int PITCH =
    WORD_COLUMNS + 16;  // bytes of a row in shared memory: eight lie in different banks

// How a warp reads its rows x 128 columns.
enum class Read {
  CHUNKS,  // 16 bytes, aligned
  WORDS,   // 4 bytes, aligned
  BYTES,   // a byte, lanes along columns
  ROWS,    // a byte, lanes along rows
};

// Starts the copy of 128 columns of up to `rows` rows into a tile of bytes. Unless WHOLE, only
// `cols` columns are there, and zeros follow.
template <int SIZE, bool WHOLE>
__device__ __forceinline__ void load_pieces(uint32_t tile, const uint8_t* bits, int64_t row_stride,
                                            int rows, int cols) {
  constexpr int PIECES = WORD_COLUMNS / SIZE, STEP = WARP / PIECES;  // of a row; rows at a time
  const int row = lane_id() / PIECES, col = lane_id() % PIECES * SIZE;
  const int there = min(max(cols - col, 0), SIZE);
  bits += row * row_stride + col;
#pragma unroll
  for (int i = 0; i < PACK_ROWS; i += STEP, bits += STEP * row_stride)
    if (row + i < rows)
      cp_async_ca<SIZE>(tile + (row + i) * PITCH + col, bits, WHOLE ? SIZE : there);
}

// The same a byte at a time.
__device__ __forceinline__ void load_bytes(uint8_t* tile, const uint8_t* bits, int64_t row_stride,
                                           int64_t col_stride, int rows, int cols) {
  const int lane = lane_id();
  bits += lane * col_stride;
#pragma unroll 8
  for (int row = 0; row < min(rows, PACK_ROWS); ++row, bits += row_stride)
#pragma unroll
    for (int i = 0; i < WORD_COLUMNS; i += WARP)
      tile[row * PITCH + i + lane] = i + lane < cols ? bits[i * col_stride] : 0;
}

// 16 columns of this lane's row.
__device__ __forceinline__ uint4 gather(const uint8_t* bits, int64_t col_stride, int cols) {
  uint32_t packed[4] = {};
#pragma unroll
  for (int i = 0; i < 16; ++i, bits += col_stride)
    if (i < cols) packed[i / 4] |= static_cast<uint32_t>(*bits) << (i % 4 * 8);
  return make_uint4(packed[0], packed[1], packed[2], packed[3]);
}

// The top bit of every byte that is not 0.
__device__ __forceinline__ uint32_t top_bits(uint32_t bytes) {
  return (((bytes & 0x7F7F7F7Fu) + 0x7F7F7F7Fu) | bytes) & 0x80808080u;
}

// From the bytes of columns 8a + 2l to 8a + 2l + 3, a = 0 to 3: bits 2a + t of word l in byte 0,
// those of word l + 1 in byte 2.
__device__ __forceinline__ uint32_t eight_bits(uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3) {
  const uint32_t odd = top_bits(a0) >> 6 | top_bits(a1) >> 4 | top_bits(a2) >> 2 | top_bits(a3);
  return odd >> 1 | odd >> 8;  // t = 0 | t = 1
}

// Bytes 0 of four, and bytes 2 of four.
__device__ __forceinline__ void join(const uint32_t (&parts)[4], uint32_t& word, uint32_t& next) {
  const uint32_t low = __byte_perm(parts[0], parts[1], 0x6240);
  const uint32_t high = __byte_perm(parts[2], parts[3], 0x6240);
  word = __byte_perm(low, high, 0x5410);
  next = __byte_perm(low, high, 0x7632);
}

// The words of a row; chunk(i): its columns 16i to 16i + 15.
template <typename Chunk>
__device__ __forceinline__ uint4 packed(Chunk chunk) {
  uint32_t low[4], high[4];  // words 0 and 1, words 2 and 3; columns 32i to 32i + 31
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint4 x = chunk(2 * i), y = chunk(2 * i + 1);
    low[i] = eight_bits(x.x, x.z, y.x, y.z);
    high[i] = eight_bits(x.y, x.w, y.y, y.w);
  }
  uint4 word;
  join(low, word.x, word.y);
  join(high, word.z, word.w);
  return word;
}

template <Read READ>
__global__ void __launch_bounds__(THREADS) pack_kernel(const __grid_constant__ TilemaskPack call) {
  // neighbouring warps read neighbouring columns
  const uint32_t groups = cdiv(call.len_k, WORD_COLUMNS), blocks = cdiv(call.rows, PACK_ROWS);
  const uint32_t warp = warp_of_grid(), group = warp % groups, block = warp / groups % blocks;
  const uint32_t plane = warp / groups / blocks, b = plane / call.heads, h = plane % call.heads;
  if (b >= static_cast<uint32_t>(call.outer) * call.inner) return;
  const int first_row = block * PACK_ROWS, first_col = group * WORD_COLUMNS;
  const int rows = call.rows - first_row, cols = call.len_k - first_col;
  const uint8_t* bits = call.bits + b / call.inner * call.bits_outer +
                        b % call.inner * call.bits_inner + h * call.bits_head +
                        first_row * call.bits_row + first_col * call.bits_col;

  constexpr int BYTES = READ == Read::ROWS ? 16 : PACK_ROWS * PITCH;
  __shared__ alignas(16) uint8_t tiles[WARPS][BYTES];
  uint8_t* tile = tiles[threadIdx.x / WARP];
  if (READ == Read::CHUNKS || READ == Read::WORDS) {
    constexpr int SIZE = READ == Read::CHUNKS ? 16 : 4;
    if (cols >= WORD_COLUMNS)
      load_pieces<SIZE, true>(shared_address(tile), bits, call.bits_row, rows, cols);
    else
      load_pieces<SIZE, false>(shared_address(tile), bits, call.bits_row, rows, cols);
    cp_async_commit_group();
    cp_async_wait_group<0>();
  } else if (READ == Read::BYTES) {
    load_bytes(tile, bits, call.bits_row, call.bits_col, rows, cols);
  }
  __syncwarp();  // lanes read what others copied

  const int64_t matrix = static_cast<int64_t>(plane) * groups + group;
  uint4* words = reinterpret_cast<uint4*>(call.words) + matrix * call.all_rows + call.first_row;
#pragma unroll
  for (int i = 0; i < PACK_ROWS; i += WARP) {
    const int row = i + lane_id();
    if (row >= rows) return;
    words[first_row + row] = packed([&](int chunk) {
      if (READ == Read::ROWS)
        return gather(bits + row * call.bits_row + chunk * 16 * call.bits_col, call.bits_col,
                      cols - chunk * 16);
      return ld_shared_v4(shared_address(tile) + row * PITCH + chunk * 16);
    });
  }
}

// -- transposition --------------------------------------------------------------------------------

// 32 x 32 bits, a row per lane, to a column per lane: of the bits whose number and lane differ in
// one place, halves change hands, place by place.
struct Transposition {
  uint32_t keep[5], turn[5];
  __device__ __forceinline__ explicit Transposition(int lane) {
    constexpr uint32_t LOW[5] = {0x0000FFFF, 0x00FF00FF, 0x0F0F0F0F, 0x33333333, 0x55555555};
#pragma unroll
    for (int i = 0; i < 5; ++i) {
      const int step = 16 >> i, upper = lane & step;
      keep[i] = LOW[i] << upper;
      turn[i] = step - 2 * upper;  // to the left, modulo 32
    }
  }
  __device__ __forceinline__ uint32_t operator()(uint32_t x) const {
#pragma unroll
    for (int i = 0; i < 5; ++i) {
      const uint32_t other = __shfl_xor_sync(ALL_LANES, x, 16 >> i);
      x = (x & keep[i]) | (__funnelshift_l(other, other, turn[i]) & ~keep[i]);
    }
    return x;
  }
};

// 128 lines x 128 positions per warp. Lane 2a + t owns lines, and then positions, 8a + 2l + t.
__global__ void __launch_bounds__(THREADS)
    transpose_kernel(const __grid_constant__ TilemaskTranspose call) {
  const uint32_t warp = warp_of_grid(), group = warp % call.groups;
  const uint32_t group_out = warp / call.groups % call.groups_out;
  const uint32_t plane = warp / call.groups / call.groups_out;
  if (plane >= call.planes) return;
  const int lane = lane_id(), own = lane / 2 * 8 + lane % 2;

  const uint4* words = reinterpret_cast<const uint4*>(call.words) +
                       (static_cast<int64_t>(plane) * call.groups + group) * call.lines;
  uint4 lines[4];
#pragma unroll
  for (int l = 0; l < 4; ++l) {
    // one line stands for all
    const int line = call.lines == 1 ? 0 : group_out * 128 + own + 2 * l;
    lines[l] = line < call.lines ? words[line] : make_uint4(0, 0, 0, 0);
  }

  uint4* transposed = reinterpret_cast<uint4*>(call.transposed) +
                      (static_cast<int64_t>(plane) * call.groups_out + group_out) * call.len_k;
  const Transposition transpose(lane);
  const auto store = [&](int l, uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
    const uint4 word = make_uint4(transpose(x), transpose(y), transpose(z), transpose(w));
    const int position = group * 128 + own + 2 * l;
    if (position < call.len_k) transposed[position] = word;
  };
  store(0, lines[0].x, lines[1].x, lines[2].x, lines[3].x);
  store(1, lines[0].y, lines[1].y, lines[2].y, lines[3].y);
  store(2, lines[0].z, lines[1].z, lines[2].z, lines[3].z);
  store(3, lines[0].w, lines[1].w, lines[2].w, lines[3].w);
}

// -- rows that see anything -----------------------------------------------------------------------

__device__ __forceinline__ uint4 operator&(uint4 x, uint4 y) {
  return make_uint4(x.x & y.x, x.y & y.y, x.z & y.z, x.w & y.w);
}

// The interval of a row, counted from column first_col.
__device__ __forceinline__ Interval counted_from(Interval seen, int first_col) {
  return {seen.lo - first_col, seen.hi - first_col};
}

// Whether it meets the 128 columns there.
__device__ __forceinline__ bool meets(Interval own) {
  return own.lo < WORD_COLUMNS && own.hi > 0 && own.lo < own.hi;
}

// Four words from memory; all bits where a mask has none.
__device__ __forceinline__ uint4 load_words(const uint32_t* words, int64_t at) {
  if (!words) return make_uint4(~0u, ~0u, ~0u, ~0u);
  return *reinterpret_cast<const uint4*>(words + at);
}

// `visible` of 128 columns for a row that meets them, from its words.
__device__ __forceinline__ uint4 within(Interval own, uint4 word) {
  if (own.lo <= 0 && own.hi >= WORD_COLUMNS) return word;
  const LaneIntervals bits = by_lane(own);
  return word & make_uint4(interval_word(bits.of[0], 0), interval_word(bits.of[1], 0),
                           interval_word(bits.of[2], 0), interval_word(bits.of[3], 0));
}

// A block's warps share 32 rows: each looks at every fourth group of columns within their reach,
// until all its rows have seen something.
__global__ void __launch_bounds__(THREADS) live_kernel(const __grid_constant__ TilemaskLower call) {
  const int blocks = cdiv(call.len_q, WARP), block = blockIdx.x % blocks;
  const int bh = blockIdx.x / blocks, b = bh / call.heads, h = bh % call.heads;
  const int warp = threadIdx.x / WARP, lane = lane_id(), row = block * WARP + lane;
  const TilemaskMask& mask = call.mask;
  const Bounds bounds = load_bounds(mask, b, call.len_q, call.len_k);
  const Interval seen = row_interval(mask, bounds, b, h, row, call.len_q);
  const uint32_t* words = words_of(mask, b, h);
  const bool dead = seen.lo >= seen.hi;
  const int first = __reduce_min_sync(ALL_LANES, dead ? FAR : seen.lo) / WORD_COLUMNS;
  const int last = cdiv(__reduce_max_sync(ALL_LANES, seen.hi), WORD_COLUMNS);
  bool alive = false;
  for (int group = first + warp; group < last; group += WARPS) {
    const Interval own = counted_from(seen, group * WORD_COLUMNS);
    if (meets(own)) {
      const uint4 keys = load_words(keys_of(mask, b), group * 4);
      const uint4 word =
          within(own, keys & load_words(words, group * mask.words_group + row * mask.words_line));
      alive |= (word.x | word.y | word.z | word.w) != 0;
    }
    if (__all_sync(ALL_LANES, dead || alive)) break;
  }

  __shared__ uint32_t found[WARPS];
  const uint32_t own = __ballot_sync(ALL_LANES, alive);
  if (lane == 0) found[warp] = own;
  __syncthreads();
  if (warp > 0 || row >= call.len_q) return;
  uint32_t all = 0;
#pragma unroll
  for (int i = 0; i < WARPS; ++i) all |= found[i];
  call.live[static_cast<int64_t>(bh) * call.len_q + row] = all >> lane & 1;
}

// -- tile lists -----------------------------------------------------------------------------------

constexpr int GROUPS = 4;       // of 128 columns that a warp classifies
constexpr int MOST_ROWS = 128;  // of a tile
constexpr int ROW_TILES = MOST_ROWS / WARP;
enum TileClass : uint8_t { EMPTY = 0, PARTIAL = 1, FULL = 2 };

__global__ void __launch_bounds__(THREADS)
    classify_kernel(const __grid_constant__ TilemaskLower call) {
  const int row_blocks = cdiv(call.len_q, call.block_m),
            col_blocks = cdiv(call.len_k, call.block_n);
  const uint32_t chunks = cdiv(call.len_k, GROUPS * WORD_COLUMNS), warp = warp_of_grid();
  const int chunk = warp % chunks, row_block = warp / chunks % row_blocks;
  const int bh = warp / chunks / row_blocks, b = bh / call.heads, h = bh % call.heads;
  if (b >= call.batch) return;
  const TilemaskMask& mask = call.mask;
  const Bounds bounds = load_bounds(mask, b, call.len_q, call.len_k);
  const int lane = lane_id(), first_row = row_block * call.block_m;
  Interval seen[ROW_TILES];
#pragma unroll
  for (int i = 0; i < ROW_TILES; ++i) {
    const int row = i * WARP + lane;
    seen[i] = {0, 0};
    if (row < call.block_m) seen[i] = row_interval(mask, bounds, b, h, first_row + row, call.len_q);
  }

  const uint32_t* words = words_of(mask, b, h);
  uint8_t* classes =
      call.classes + (static_cast<int64_t>(bh) * row_blocks + row_block) * col_blocks;
  for (int g = 0; g < GROUPS; ++g) {
    const int group = chunk * GROUPS + g, first_col = group * WORD_COLUMNS;
    if (first_col >= call.len_k) break;
    const uint4 keys = load_words(keys_of(mask, b), group * 4);
    uint4 word[ROW_TILES];
#pragma unroll
    for (int i = 0; i < ROW_TILES; ++i) {
      const int row = first_row + i * WARP + lane;
      word[i] = make_uint4(0, 0, 0, 0);
      if (meets(counted_from(seen[i], first_col)))
        word[i] = load_words(words, group * mask.words_group + row * mask.words_line);
    }
    uint32_t some = 0, every = ~0u;  // rows that see nothing count towards neither
#pragma unroll
    for (int i = 0; i < ROW_TILES; ++i) {
      if (seen[i].lo >= seen[i].hi) continue;
      const uint4 own = within(counted_from(seen[i], first_col), keys & word[i]);
      some |= own.x | own.y | own.z | own.w;
      every &= own.x & own.y & own.z & own.w;
    }
    some = __reduce_or_sync(ALL_LANES, some);
    every = __reduce_and_sync(ALL_LANES, every);

    // a tile has block_n / 4 bits of each word; a lane per tile
    const int bits = call.block_n / 4, col_block = first_col / call.block_n + lane;
    if (lane >= 32 / bits || col_block >= col_blocks) continue;
    const uint32_t tile = ~0u >> (32 - bits) << (lane * bits);
    const bool empty = (some & tile) == 0, full = (every & tile) == tile;
    classes[col_block] = empty ? EMPTY : full ? FULL : PARTIAL;
  }
}

// The first block after `col` that visits a row block, -1 if none does. classes: of the row block.
__device__ int next_visitor(const uint8_t* classes, int col, int col_blocks) {
  do ++col;
  while (col < col_blocks && classes[col] == EMPTY);
  return col < col_blocks ? col : -1;
}

// A warp makes the lists of one block, in ascending order. For one pass: one list of pairs, partial
// tiles first.
__global__ void __launch_bounds__(THREADS)
    compact_kernel(const __grid_constant__ TilemaskLower call) {
  const int row_blocks = cdiv(call.len_q, call.block_m),
            col_blocks = cdiv(call.len_k, call.block_n);
  const int blocks = call.transposed ? col_blocks : row_blocks;
  const int across = call.transposed ? row_blocks : col_blocks;
  const bool pairs = call.transposed == 2;
  const uint32_t list = warp_of_grid(), bh = list / blocks;
  if (bh >= static_cast<uint32_t>(call.batch) * call.heads) return;
  const int64_t step = call.transposed ? 1 : col_blocks,
                step_across = call.transposed ? col_blocks : 1;
  const uint8_t* all = call.classes + static_cast<int64_t>(bh) * row_blocks * col_blocks;
  const uint8_t* classes = all + list % blocks * step;
  int32_t* partial = call.blocks + static_cast<int64_t>(list) * 2 * across;

  const int lane = lane_id();
  const uint32_t below = (1u << lane) - 1;
  // found(block, class, ballot of the lanes with that class), 32 blocks at once
  const auto each = [&](auto found) {
#pragma unroll 4
    for (int first = 0; first < across; first += WARP) {
      const int other = first + lane;
      const int own = other < across ? classes[other * step_across] : EMPTY;
      found(other, own, __ballot_sync(ALL_LANES, own == PARTIAL),
            __ballot_sync(ALL_LANES, own == FULL));
    }
  };
  int partial_count = 0, full_count = 0, full_at = across;
  if (pairs) {
    full_at = 0;
    each([&](int, int, uint32_t partials, uint32_t) { full_at += __popc(partials); });
  }
  each([&](int other, int own, uint32_t partials, uint32_t fulls) {
    const int at = own == PARTIAL ? partial_count + __popc(partials & below)
                                  : full_at + full_count + __popc(fulls & below);
    if (own != EMPTY && !pairs) partial[at] = other;
    if (own != EMPTY && pairs) {
      const uint8_t* row = all + static_cast<int64_t>(other) * col_blocks;
      partial[2 * at] = other;
      partial[2 * at + 1] = next_visitor(row, list % blocks, col_blocks);
    }
    partial_count += __popc(partials);
    full_count += __popc(fulls);
  });
  if (lane > 0) return;
  call.counts[2ll * list] = partial_count;
  call.counts[2ll * list + 1] = full_count;
}

// -- entries --------------------------------------------------------------------------------------

// The product of sizes; -1 where one is negative, or there is more than a grid holds.
template <typename... Size>
int64_t product(Size... sizes) {
  int64_t all = 1;
  const bool fits = ((sizes >= 0 && !__builtin_mul_overflow(all, sizes, &all)) && ...);
  return fits && all <= INT32_MAX ? all : -1;
}

// Launches kernel(call) on so many blocks (on so many warps).
template <typename Call>
int launch_blocks(void (*kernel)(Call), int64_t blocks, const Call& call) {
  if (blocks < 0) return TILEMASK_WRONG_SIZE;
  const DeviceScope scope(call.head.device);
  TILEMASK_TRY(scope.code());
  return launch(kernel, dim3(blocks), THREADS, 0, call);
}

template <typename Call>
int launch_warps(void (*kernel)(Call), int64_t warps, const Call& call) {
  return launch_blocks(kernel, warps < 0 ? -1 : (warps + WARPS - 1) / WARPS, call);
}

// The kernel for the strides and the alignment of a call's bits.
auto pack_kernel_for(const TilemaskPack& call) -> void (*)(TilemaskPack) {
  if (call.bits_col != 1)
    return call.bits_row < call.bits_col ? pack_kernel<Read::ROWS> : pack_kernel<Read::BYTES>;
  int64_t starts = reinterpret_cast<int64_t>(call.bits);
  if (call.outer > 1) starts |= call.bits_outer;
  if (call.inner > 1) starts |= call.bits_inner;
  if (call.heads > 1) starts |= call.bits_head;
  if (call.rows > 1) starts |= call.bits_row;
  return starts % 16 == 0  ? pack_kernel<Read::CHUNKS>
         : starts % 4 == 0 ? pack_kernel<Read::WORDS>
                           : pack_kernel<Read::BYTES>;
}

int check_lower(const TilemaskLower& call) {
  TILEMASK_TRY(check_head(call));
  const bool right = call.len_q >= 0 && call.len_k >= 0 && call.len_q < LONGEST &&
                     call.len_k < LONGEST && call.mask.words_split > 0;
  return right ? TILEMASK_OK : TILEMASK_WRONG_SIZE;
}

}  // namespace

extern "C" int tilemask_pack(const TilemaskPack* call) {
  TILEMASK_TRY(check_head(*call));
  if (call->rows >= LONGEST || call->len_k >= LONGEST) return TILEMASK_WRONG_SIZE;
  const int64_t warps = product(call->outer, call->inner, call->heads, cdiv(call->rows, PACK_ROWS),
                                cdiv(call->len_k, WORD_COLUMNS));
  return launch_warps(pack_kernel_for(*call), warps, *call);
}

extern "C" int tilemask_transpose(const TilemaskTranspose* call) {
  TILEMASK_TRY(check_head(*call));
  const int64_t warps = product(call->planes, call->groups, call->groups_out);
  return launch_warps(transpose_kernel, warps, *call);
}

extern "C" int tilemask_live(const TilemaskLower* call) {
  TILEMASK_TRY(check_lower(*call));
  const int64_t blocks = product(call->batch, call->heads, cdiv(call->len_q, WARP));
  return launch_blocks(live_kernel, blocks, *call);
}

extern "C" int tilemask_lists(const TilemaskLower* call) {
  TILEMASK_TRY(check_lower(*call));
  const int m = call->block_m, n = call->block_n;
  const bool fits = m >= 16 && m <= MOST_ROWS && n >= 16 && WORD_COLUMNS % n == 0;
  if (!fits) return TILEMASK_WRONG_SIZE;
  const int row_blocks = cdiv(call->len_q, m), col_blocks = cdiv(call->len_k, n);
  const int64_t tiles =
      product(call->batch, call->heads, row_blocks, cdiv(call->len_k, GROUPS * WORD_COLUMNS));
  TILEMASK_TRY(launch_warps(classify_kernel, tiles, *call));
  const int64_t lists =
      product(call->batch, call->heads, call->transposed ? col_blocks : row_blocks);
  return launch_warps(compact_kernel, lists, *call);
}
