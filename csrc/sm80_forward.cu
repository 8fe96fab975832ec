// Forward: out = softmax(scale * q k^T, masked) v and lse, one pass over the visited tiles.
//
//   where am I -> my rows' intervals and q -> for every visited column block:
//       scores = q @ k.T, biased and masked -> softmax_step -> acc = acc * rescale + p @ v
//   -> divide by the row sums -> store
//
// FlashAttention-2 (Dao, arXiv:2307.08691), with the mask inside the loop and two loops: one over
// partial tiles, one over full tiles that has no mask code at all. Copies run ahead over the
// visited tiles: v arrives during q @ k.T, the next k during the softmax and p @ v. From sm_90 on
// one thread has full tiles copied in boxes; in partial ones threads leave out what padding
// excludes.
//
// Aim, instructions per score in the full loop: what the products and the softmax need, which is
//   width 64, 128 x 64 tiles: 2 mma, 0.5 ldmatrix, 4.5 softmax (maximum, multiply-add, exp2, sum,
//       half a conversion), 0.4 copies with their addresses = 7.4; at most 10 with the loop
//   width 128, 128 x 32: 4 mma, 1.5 ldmatrix, 4.5 softmax, 0.8 copies = 10.8; at most 16
//   width 256, 128 x 64 or 64 x 64 (see forward_rows): 8 mma, 4.5 ldmatrix, 4.5 softmax, 0.8 or
//       1.6 copies = 18.6; at most 25
// and for acc * rescale, which softmax_step seldom does, 1.2, 4.5 and 4.5 more. Copies in boxes:
// 0.3 for their barriers, at any width. Partial tiles: at most 5, 8 and 8 more, the words of all
// kinds of masks included, of which a call uses some.
#include "boxes.cuh"
#include "forward.cuh"
#include "launch.cuh"
#include "mask.cuh"
#include "rows.cuh"
#include "scores.cuh"
#include "softmax.cuh"
#include "tile/fragments.cuh"
#include "tile/shared.cuh"
#include "tiles.h"

namespace {

constexpr TileShape shape_of(int width, int rows) {
  if (rows == DECODE_ROWS) return decode_tile(width);
  return rows == forward_tile(width).block_m ? forward_tile(width) : wide_forward_tile(width);
}

// What the threads of a block share of its rows, and of the copies in boxes.
template <int BLOCK_M>
struct ForwardRows : RowBlock<BLOCK_M> {
  BoxPlace k_place, v_place;
  uint64_t k_here, v_here;  // mbarriers
};

template <typename T, int WIDTH, bool GENERAL, int ROWS>
struct ForwardKernel {
  static constexpr TileShape SHAPE = shape_of(WIDTH, ROWS);
  static constexpr bool DECODE = ROWS == DECODE_ROWS;
  static constexpr int BLOCK_M = SHAPE.block_m, BLOCK_N = SHAPE.block_n;
  static constexpr int THREADS = SHAPE.warps * WARP;
  static constexpr int MT = SHAPE.row_tiles;
  static constexpr int COLUMNS = BLOCK_N / SHAPE.across;  // of a warp
  static constexpr int NT = COLUMNS / 8;
  static constexpr bool NATURAL = GENERAL;
  static constexpr bool Q_IN_REGISTERS = WIDTH == 64;
  static constexpr int Q_BYTES = TILE_BYTES<BLOCK_M, WIDTH>;
  static constexpr int K_BYTES = TILE_BYTES<BLOCK_N, WIDTH>;
  static constexpr int TILES_BYTES = Q_BYTES + 2 * K_BYTES;
  static constexpr int STATE_BYTES = (sizeof(ForwardRows<BLOCK_M>) + 1023) / 1024 * 1024;
  static constexpr int MERGE_BYTES = DECODE ? merge_bytes(WIDTH, SHAPE.across) : 0;
  static constexpr int SHARED =
      STATE_BYTES + (TILES_BYTES > MERGE_BYTES ? TILES_BYTES : MERGE_BYTES);
  static constexpr bool WIDE = !DECODE && ROWS != forward_tile(WIDTH).block_m;
  static_assert(BLOCK_M == ROWS, "a tile for these rows");
  static_assert(WIDE || SHARED <= MOST_SHARED, "a block fits on every GPU");
};

template <typename T, int WIDTH, bool GENERAL, int ROWS>
__global__ void __launch_bounds__(ForwardKernel<T, WIDTH, GENERAL, ROWS>::THREADS, 1)
    forward_kernel(const __grid_constant__ ForwardCall call) {
  using Kernel = ForwardKernel<T, WIDTH, GENERAL, ROWS>;
  constexpr bool DECODE = Kernel::DECODE;
  constexpr int BLOCK_M = Kernel::BLOCK_M, BLOCK_N = Kernel::BLOCK_N, THREADS = Kernel::THREADS;
  constexpr int MT = Kernel::MT, NT = Kernel::NT, COLUMNS = Kernel::COLUMNS;
  constexpr bool NATURAL = Kernel::NATURAL, BOXES = HAS_TMA && !GENERAL;
  const TilemaskMask& mask = call.mask;
  const TilemaskScore& score = call.score;
  const int len_q = call.sizes.len_q, len_k = call.sizes.len_k;

  // where am I: the last row block first, under a causal mask it is the longest
  const int row_blocks = cdiv(len_q, BLOCK_M);
  const int bh = blockIdx.x / row_blocks, row_block = row_blocks - 1 - blockIdx.x % row_blocks;
  const int b = bh / call.sizes.heads, h = bh % call.sizes.heads;
  const int first_row = row_block * BLOCK_M;
  const int warp = threadIdx.x / WARP, lane = lane_id() % 4;
  const int warp_row = DECODE ? 0 : warp * 16 * MT;  // of the tile
  const int warp_col = DECODE ? warp * COLUMNS : 0;
  const int own_row = warp_row + lane_id() / 4;  // this thread's first row of the tile

  extern __shared__ __align__(1024) uint8_t shared[];
  ForwardRows<BLOCK_M>& mine = *reinterpret_cast<ForwardRows<BLOCK_M>*>(shared);
  const uint32_t q_tile = shared_address(shared) + Kernel::STATE_BYTES;
  const uint32_t k_tile = q_tile + Kernel::Q_BYTES, v_tile = k_tile + Kernel::K_BYTES;

  // my rows: q, their intervals, and the tiles to visit
  load_tile<BLOCK_M, WIDTH, THREADS, GENERAL>(
      q_tile, head_of(call.q, b, h, call.sizes.width, call.q_chunked), first_row,
      [&](int row) { return row < len_q; });
  cp_async_commit_group();
  Bounds bounds = load_bounds(mask, b, len_q, len_k);
  if (call.folded) bounds = same_rows(bounds, len_q);
  find_rows<BLOCK_N, GENERAL>(mine, call, bounds, bh, row_block, call.visits);
  if (DECODE && threadIdx.x == 0) mine.visit = share_of(mine.visit, blockIdx.y, gridDim.y);
  if (BOXES && threadIdx.x == 0) {
    const int kv_head = h / (call.sizes.heads / call.sizes.kv_heads);
    mine.k_place = box_place(call.k, b, kv_head);
    mine.v_place = box_place(call.v, b, kv_head);
    mbarrier_init(shared_address(&mine.k_here), 1);
    mbarrier_init(shared_address(&mine.v_here), 1);
  }
  __syncthreads();

  // starts the copy of a column block: threads do it in the loop over partial tiles, and where
  // there are no boxes
  struct Side {
    uint32_t tile;
    const Head& head;
    const CUtensorMap& map;
    const BoxPlace& place;
    uint32_t here;
  };
  const Side k{k_tile, mine.k, call.k_map, mine.k_place, shared_address(&mine.k_here)};
  const Side v{v_tile, mine.v, call.v_map, mine.v_place, shared_address(&mine.v_here)};
  const auto load = [&](auto partial, const Side& side, int block, uint32_t own) {
    if constexpr (!BOXES || partial.value)
      load_columns<BLOCK_N, WIDTH, THREADS, GENERAL, partial.value>(side.tile, side.head, block,
                                                                    own);
    else if (threadIdx.x == 0)
      load_boxes<BLOCK_N, WIDTH>(side.tile, side.map, side.here, side.place, block * BLOCK_N);
  };
  // until it is here; phase: of the boxes
  const auto wait = [&](auto partial, const Side& side, uint32_t phase) {
    if constexpr (!BOXES || partial.value)
      cp_async_wait_group<0>();
    else
      mbarrier_wait(side.here, phase);
    __syncthreads();
  };
  const bool any = mine.visit.partial + mine.visit.full > 0;
  int block = any ? visited_block(mine.visit, 0) : 0;
  uint32_t own = live_copies<BLOCK_N, WIDTH, THREADS>(mine, block);  // of partial tiles
  if (any) load(Flag<true>(), k, block, own);

  const uint32_t q_lanes = opaque(lanes_along_rows(q_tile, warp_row));
  const uint32_t k_lanes = opaque(lanes_across_rows(k_tile, warp_col));
  const uint32_t v_lanes = opaque(lanes_along_rows(v_tile, warp_col));
  uint32_t q_reg[MT][WIDTH / 16][4];
  if constexpr (Kernel::Q_IN_REGISTERS) {
    cp_async_wait_group<0>();
    __syncthreads();
    load_operand<BLOCK_M, WIDTH>(q_reg, q_lanes);
  }

  float acc[MT][WIDTH / 8][4], m[MT][2], l[MT][2];
  clear(acc);
#pragma unroll
  for (int a = 0; a < MT; ++a) {
    m[a][0] = m[a][1] = -INFINITY;
    l[a][0] = l[a][1] = 0;
  }

  uint32_t phase = 0;
  const auto forward_step = [&](auto partial, int t) {
    constexpr bool PARTIAL = decltype(partial)::value;
    const int first_col = block * BLOCK_N + warp_col;
    count_visit(mine.visits, block, PARTIAL);
    const bool more = t + 1 < mine.visit.partial + mine.visit.full;
    if (more) block = visited_block(mine.visit, t + 1);
    wait(partial, k, phase);  // k is here, and nobody reads the last v any more
    load(partial, v, first_col / BLOCK_N, own);
    if (PARTIAL) own = live_copies<BLOCK_N, WIDTH, THREADS>(mine, block);

    // scores = q @ k.T, biased and masked
    float scores[MT][NT][4];
    clear(scores);
    if constexpr (Kernel::Q_IN_REGISTERS)
      multiply_transposed<T, BLOCK_N, WIDTH>(scores, q_reg, k_lanes);
    else
      multiply_transposed<T, BLOCK_M, BLOCK_N, WIDTH>(scores, opaque(q_lanes), opaque(k_lanes));
    wait(partial, v, phase);  // v is here, and nobody reads this k any more
    if (more) load(partial, k, block, own);
    phase ^= 1;
    if constexpr (GENERAL)
      scored(scores, NoBend(), score, mine.options,
             Place<false>{mine.first_row + own_row, first_col + 2 * lane}, call.sizes.scale, len_q,
             len_k);
    if constexpr (PARTIAL) {
      uint32_t words[MT][2];
      tile_words(words, mask, mine.words, mine.keys, mine.lanes + own_row, mine.first_row + own_row,
                 first_col, len_q, lane);
      masked(scores, -INFINITY, words);
    }

    softmax_step<PARTIAL || NATURAL, NATURAL>(scores, m, l, acc, call.sizes.scale * LOG2_E);
    if (GENERAL && score.seed) {
      uint32_t words[MT][2];
      kept<COLUMNS>(words, score, mine.options, mine.first_row + own_row, first_col, lane);
      masked(scores, 0, words);
    }

    // acc += p @ v, rescaled in softmax_step
    uint32_t p[MT][NT / 2][4];
    round_operand<T>(p, scores);
    multiply<T, BLOCK_N>(acc, p, opaque(v_lanes));
  };

  // two loops, partial tiles first: the one over full tiles has no mask code at all
  int t = 0;
#pragma unroll 1
  for (; t < mine.visit.partial; ++t) forward_step(Flag<true>(), t);
  if (BOXES && any) {  // the next k is here: threads copied it, which boxes may overwrite
    cp_async_wait_group<0>();
    fence_proxy_async();
    if (threadIdx.x == 0) mbarrier_arrive(k.here);
    phase = 0;
  }
#pragma unroll 1
  for (; t < mine.visit.partial + mine.visit.full; ++t) forward_step(Flag<false>(), t);

  cp_async_wait_group<0>();
  __syncthreads();  // nobody reads q, k or v any more
#pragma unroll
  for (int a = 0; a < MT; ++a)
#pragma unroll
    for (int i = 0; i < 2; ++i) l[a][i] = sum_of_row(l[a][i]);
  if constexpr (DECODE) {
    merge_warps<NATURAL>(acc, m, l, reinterpret_cast<float*>(shared + Kernel::STATE_BYTES),
                         Kernel::SHAPE.across);
    if (warp > 0) return;
    if (gridDim.y > 1) {  // one share of several: merge.cu puts them together
      store_part(call, static_cast<int64_t>(blockIdx.y) * (gridDim.x / row_blocks) + mine.bh,
                 mine.first_row, own_row, acc, m, l, mine.rows);
      return;
    }
  }

  // divide by the row sums and store; a row that saw nothing gets 0 and -inf
  float factor[MT][2];
#pragma unroll
  for (int a = 0; a < MT; ++a)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = own_row + 16 * a + 8 * i;
      const RowEnd end =
          softmax_end<NATURAL>(m[a][i], l[a][i], is_alive(mine.rows[row]), score, mine.h);
      factor[a][i] = GENERAL && score.seed ? end.factor * score.keep_factor : end.factor;
      if (lane == 0 && mine.first_row + row < len_q)
        store_end(call, static_cast<int64_t>(mine.bh) * len_q + mine.first_row + row, end);
    }
  finish_rows(acc, factor);
  store_accumulator<T, BLOCK_M>(q_tile, warp_row, acc);
  __syncwarp();
  store_rows<16 * MT, BLOCK_M, WIDTH, GENERAL>(
      q_tile, warp_row, head_of(call.out, mine.b, mine.h, call.sizes.width_v, call.out_chunked),
      mine.first_row + warp_row, [&](int row) { return row < len_q; });
}

template <typename T, int WIDTH, bool GENERAL, int ROWS>
int launch_forward(ForwardCall& call, int splits) {
  using Kernel = ForwardKernel<T, WIDTH, GENERAL, ROWS>;
  const TilemaskSizes& sizes = call.sizes;
  TILEMASK_TRY(check_lists(call.mask, call.lists, Kernel::BLOCK_M, Kernel::BLOCK_N));
  if (call.boxes && !GENERAL) {
    const auto encode = [&](CUtensorMap& map, const TilemaskTensor& tensor, int width) {
      return encode_boxes(map, tensor, call.head.dtype, sizes.batch, sizes.kv_heads, sizes.len_k,
                          width, Kernel::BLOCK_N);
    };
    TILEMASK_TRY(encode(call.k_map, call.k, sizes.width));
    TILEMASK_TRY(encode(call.v_map, call.v, sizes.width_v));
  }
  dim3 grid(cdiv(sizes.len_q, Kernel::BLOCK_M) * sizes.batch * sizes.heads, splits);
  return launch(forward_kernel<T, WIDTH, GENERAL, ROWS>, grid, Kernel::THREADS, Kernel::SHARED,
                call);
}

}  // namespace

int forward_rows(int width, int device) {
  if (width <= 128) return forward_tile(width).block_m;
  constexpr int ROWS = forward_tile(256).block_m, WIDE_ROWS = wide_forward_tile(256).block_m;
  const SharedMemory bytes = shared_memory(device);
  const bool two = holds(bytes, 2, ForwardKernel<Float16, 256, false, ROWS>::SHARED);
  const bool wide = holds(bytes, 1, ForwardKernel<Float16, 256, false, WIDE_ROWS>::SHARED);
  return wide && !two ? WIDE_ROWS : ROWS;
}

extern "C" int tilemask_forward(const TilemaskForward* given) {
  TILEMASK_TRY(check_call(*given, given->sizes));
  ForwardCall call{*given};
  const TilemaskSizes& sizes = call.sizes;
  if (sizes.batch == 0 || sizes.heads == 0 || sizes.len_q == 0) return TILEMASK_OK;
  call.q_chunked = is_chunked(call.q, sizes.width);
  call.k_chunked = is_chunked(call.k, sizes.width);
  call.v_chunked = is_chunked(call.v, sizes.width_v);
  call.out_chunked = is_chunked(call.out, sizes.width_v);
  const bool chunked = call.q_chunked && call.k_chunked && call.v_chunked && call.out_chunked;
  call.boxes = sizes.len_k > 0 && has_boxes(call.head.device);
  const bool mappable = is_mappable(call.k, sizes.len_k, sizes.width) &&
                        is_mappable(call.v, sizes.len_k, sizes.width_v);
  const bool general =
      has_options(call.score) || !chunked || (call.boxes && !mappable) || sizes.scale <= 0;

  DeviceScope scope(call.head.device);
  TILEMASK_TRY(scope.code());
  int splits = 1;
  TILEMASK_TRY(share_workspace(call, splits));
  const bool decode = is_decoding(call);
  const int rows = forward_rows(max_width(sizes), call.head.device);
  TILEMASK_TRY(
      dispatch(call.head.dtype, max_width(sizes), general, [&](auto type, auto width, auto any) {
        using T = decltype(type);
        constexpr int WIDTH = width.value, ROWS = forward_tile(WIDTH).block_m;
        constexpr int WIDE_ROWS = wide_forward_tile(WIDTH).block_m;
        if (decode) return launch_forward<T, WIDTH, any.value, DECODE_ROWS>(call, splits);
        return rows == ROWS ? launch_forward<T, WIDTH, any.value, ROWS>(call, 1)
                            : launch_forward<T, WIDTH, any.value, WIDE_ROWS>(call, 1);
      }));
  return splits > 1 ? merge_parts(call, splits, general) : TILEMASK_OK;
}
