// Few rows against many keys: how many shares their tiles are split into, and the merge of these
// (the split-K scheme of Flash-Decoding: Dao, Haziza, Massa and Sizov, 2023).
#include "forward.cuh"

namespace {

constexpr int MOST_SHARES = 64;
constexpr int LEAST_TILES = 4;  // a share has at least so many tiles, where none is skipped
constexpr int MERGE_THREADS = 128;

struct MergeCall : ForwardCall {
  int splits;
};

// One block a row: a step of the online softmax per share, always in the same order.
template <typename T, bool NATURAL>
__global__ void __launch_bounds__(MERGE_THREADS)
    merge_kernel(const __grid_constant__ MergeCall call) {
  constexpr float UNIT = NATURAL ? LOG2_E : 1;
  const TilemaskSizes& sizes = call.sizes;
  const int64_t index = blockIdx.x;  // of my row among all rows
  const int64_t rows = gridDim.x;
  const int bh = index / sizes.len_q, row = index % sizes.len_q;
  const int b = bh / sizes.heads, h = bh % sizes.heads;

  float m = -INFINITY;
  for (int s = 0; s < call.splits; ++s) m = fmaxf(m, call.part_m[s * rows + index]);
  const float pivot = m == -INFINITY ? 0 : m;
  float l = 0;
  for (int s = 0; s < call.splits; ++s)
    l += call.part_l[s * rows + index] * ex2((call.part_m[s * rows + index] - pivot) * UNIT);
  const RowEnd end = softmax_end<NATURAL>(m, l, l != 0, call.score, h);
  if (threadIdx.x == 0) store_end(call, index, end);
  const float factor = call.score.seed ? end.factor * call.score.keep_factor : end.factor;

  const Head out = head_of(call.out, b, h, sizes.width_v, call.out_chunked);
  for (int col = threadIdx.x; col < sizes.width_v; col += MERGE_THREADS) {
    float acc = 0;
    for (int s = 0; s < call.splits; ++s)
      acc += call.part_acc[(s * rows + index) * sizes.width_v + col] *
             ex2((call.part_m[s * rows + index] - pivot) * UNIT);
    out.data[row * out.row + col] = T::pack(factor == 0 ? 0 : acc * factor, 0);
  }
}

// Enough blocks for two per multiprocessor, and no share of fewer than LEAST_TILES tiles.
int count_shares(const TilemaskForward& call, int multiprocessors) {
  const TilemaskSizes& sizes = call.sizes;
  const int64_t row_blocks = cdiv(sizes.len_q, decode_tile(max_width(sizes)).block_m);
  const int64_t blocks = sizes.batch * sizes.heads * row_blocks;
  if (!is_decoding(call) || blocks == 0 || call.visits) return 1;
  const int tiles = cdiv(sizes.len_k, decode_tile(max_width(sizes)).block_n);
  const int64_t wanted = (2 * multiprocessors + blocks - 1) / blocks;
  int64_t shares = wanted < cdiv(tiles, LEAST_TILES) ? wanted : cdiv(tiles, LEAST_TILES);
  shares = shares < MOST_SHARES ? shares : MOST_SHARES;
  return shares > 1 ? static_cast<int>(shares) : 1;
}

int64_t rows_of(const TilemaskSizes& sizes) {
  return static_cast<int64_t>(sizes.batch) * sizes.heads * sizes.len_q;
}

int multiprocessors_of(int device) {
  int count = 0;
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

}  // namespace

int share_workspace(ForwardCall& call, int& splits) {
  splits = count_shares(call, multiprocessors_of(call.head.device));
  if (splits == 1) return TILEMASK_OK;
  const int64_t rows = splits * rows_of(call.sizes);
  if (!call.workspace || call.workspace_size < tilemask_forward_workspace(&call))
    return TILEMASK_NO_WORKSPACE;
  call.part_m = static_cast<float*>(call.workspace);
  call.part_l = call.part_m + rows;
  call.part_acc = call.part_l + rows;
  return TILEMASK_OK;
}

int merge_parts(const ForwardCall& call, int splits, bool natural) {
  const MergeCall merge{call, splits};
  const dim3 grid(static_cast<unsigned>(rows_of(call.sizes)));
  const auto launch_merge = [&](auto type) {
    using T = decltype(type);
    return launch(natural ? merge_kernel<T, true> : merge_kernel<T, false>, grid, MERGE_THREADS, 0,
                  merge);
  };
  return call.head.dtype == TILEMASK_FLOAT16 ? launch_merge(Float16()) : launch_merge(BFloat16());
}

extern "C" int64_t tilemask_forward_workspace(const TilemaskForward* call) {
  if (check_call(*call, call->sizes)) return 0;
  const int splits = count_shares(*call, multiprocessors_of(call->head.device));
  if (splits == 1) return 0;
  return splits * rows_of(call->sizes) * (call->sizes.width_v + 2) *
         static_cast<int64_t>(sizeof(float));
}
