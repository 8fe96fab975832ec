// From products q . k to scores, and dropout: the options of a call inside a tile.
//
//   scores = scale * products -> softcap -> + bias, + ALiBi
//
// In natural units: a bias of finfo.min times log2(e) would be -inf, so the maximum is subtracted
// before the change to log2 units. Kernels without GENERAL have none of it.
#pragma once

#include <stdint.h>

#include "mask.cuh"
#include "ptx/math.cuh"
#include "ptx/mma.cuh"
#include "tilemask.h"

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;

// Whether a call has scores that are more than scaled products, or dropout.
inline bool has_options(const TilemaskScore& score) {
  return score.bias || score.slopes || score.softcap != 0 || score.seed;
}

// What a call's options are for one batch and head.
struct Options {
  const char* bias;
  float slope;
  uint64_t seed;
  uint32_t bh;
};

template <bool GENERAL>
__device__ __forceinline__ Options options_of(const TilemaskScore& score, int b, int h, int bh) {
  Options options{nullptr, 0, 0, static_cast<uint32_t>(bh)};
  if (!GENERAL) return options;
  if (score.bias) {
    int outer = b / score.bias_split, inner = b % score.bias_split;
    int64_t offset = outer * score.bias_outer + inner * score.bias_inner + h * score.bias_head;
    int size = score.bias_dtype == TILEMASK_FLOAT32 ? 4 : 2;
    options.bias = static_cast<const char*>(score.bias) + offset * size;
  }
  if (score.slopes) options.slope = score.slopes[b * score.slopes_batch + h];
  if (score.seed) options.seed = *score.seed;
  return options;
}

__device__ __forceinline__ float load_bias(const TilemaskScore& score, const char* bias, int row,
                                           int col) {
  int64_t offset = row * score.bias_row + col * score.bias_col;
  if (score.bias_dtype == TILEMASK_FLOAT32) return reinterpret_cast<const float*>(bias)[offset];
  uint16_t half = reinterpret_cast<const uint16_t*>(bias)[offset];
  return score.bias_dtype == TILEMASK_FLOAT16 ? cvt_f32_f16(half) : cvt_f32_bf16(half);
}

// By exp2; absolute error of a few 1e-7.
__device__ __forceinline__ float tanh_of(float x) {
  float t = ex2(fabsf(x) * (-2 * LOG2_E));
  t = __fdividef(1 - t, 1 + t);
  return x < 0 ? -t : t;
}

// Where the elements of an accumulator lie in the matrix of scores. TRANSPOSED: its rows are
// columns of the matrix.
template <bool TRANSPOSED>
struct Place {
  int first_row, first_col;  // of this thread's element (0, 0, 0)
  __device__ __forceinline__ int row(int m, int n, int e) const {
    return first_row + (TRANSPOSED ? 8 * n + e % 2 : 16 * m + 8 * (e / 2));
  }
  __device__ __forceinline__ int col(int m, int n, int e) const {
    return first_col + (TRANSPOSED ? 16 * m + 8 * (e / 2) : 8 * n + e % 2);
  }
};

// Scores in natural units from products, in place. bend(m, n, e, x) is called with the
// derivative of the softcap, where there is one.
template <bool TRANSPOSED, int MT, int NT, typename Bend>
__device__ __forceinline__ void scored(float (&scores)[MT][NT][4], Bend bend,
                                       const TilemaskScore& score, const Options& options,
                                       Place<TRANSPOSED> place, float scale, int len_q, int len_k) {
  const auto each = [&](auto step) {
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) step(scores[m][n][e], m, n, e);
  };
  each([&](float& x, int, int, int) { x *= scale; });
  if (score.softcap != 0)
    each([&](float& x, int m, int n, int e) {
      float bent = tanh_of(__fdividef(x, score.softcap));
      bend(m, n, e, 1 - bent * bent);
      x = bent * score.softcap;
    });
  if (score.bias)
    each([&](float& x, int m, int n, int e) {
      int row = place.row(m, n, e), col = place.col(m, n, e);
      if (row < len_q && col < len_k) x += load_bias(score, options.bias, row, col);
    });
  if (score.slopes)
    each([&](float& x, int m, int n, int e) {
      x -= options.slope * fabsf(static_cast<float>(place.row(m, n, e) + len_k - len_q) -
                                 static_cast<float>(place.col(m, n, e)));
    });
}

struct NoBend {
  __device__ __forceinline__ void operator()(int, int, int, float) const {}
};

// -- dropout --------------------------------------------------------------------------------------

// Philox4x32-7 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3",
// SC 2011). Key: the seed. Counter: (row, column group, b * Hq + h, 0).
__device__ __forceinline__ uint4 philox(uint64_t seed, uint32_t row, uint32_t group, uint32_t bh) {
  uint4 c = make_uint4(row, group, bh, 0);
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 7; ++round) {
    uint32_t low0 = c.x * 0xD2511F53u, high0 = __umulhi(c.x, 0xD2511F53u);
    uint32_t low1 = c.z * 0xCD9E8D57u, high1 = __umulhi(c.z, 0xCD9E8D57u);
    c = make_uint4(high1 ^ c.y ^ key0, low1, high0 ^ c.w ^ key1, low0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return c;
}

// Which of 32 columns from first_col / 32 * 32 dropout keeps in a row, for lane = 0 to 3: bit
// 2i + t is column 8i + 2 * lane + t. One call gives 16 random bits to each of these eight.
__device__ __forceinline__ uint32_t kept_group(const TilemaskScore& score, const Options& options,
                                               int row, int first_col, int lane) {
  uint4 random = philox(options.seed, row, 4 * (first_col / 32) + lane, options.bh);
  const uint32_t words[4] = {random.x, random.y, random.z, random.w};
  uint32_t kept = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    kept |= static_cast<uint32_t>((words[i] & 0xFFFF) >= score.threshold) << (2 * i);
    kept |= static_cast<uint32_t>((words[i] >> 16) >= score.threshold) << (2 * i + 1);
  }
  return kept;
}

// Which of COLUMNS columns from first_col dropout keeps: words as those of the mask (tile_words).
template <int COLUMNS, int MT>
__device__ __forceinline__ void kept(uint32_t (&word)[MT][2], const TilemaskScore& score,
                                     const Options& options, int row, int first_col, int lane) {
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t found = 0;
#pragma unroll
      for (int g = 0; g < cdiv(COLUMNS, 32); ++g)
        found |= kept_group(score, options, row + 16 * m + 8 * i, first_col + 32 * g, lane)
                 << (8 * g);
      word[m][i] = COLUMNS < 32 ? found >> (first_col % 32 / 4) : found;
    }
}

// The same with rows and columns exchanged, for accumulator rows that are columns: 16m + 8i from
// `col`, which is this thread's first one. row: that of its element (0, 0, 0).
template <int NT, int MT>
__device__ __forceinline__ void kept_transposed(uint32_t (&word)[MT][2], const TilemaskScore& score,
                                                const Options& options, int row, int col) {
  static_assert(MT <= 2, "the columns of a warp lie in one group of 32");
#pragma unroll
  for (int m = 0; m < MT; ++m) word[m][0] = word[m][1] = 0;
#pragma unroll 1
  for (int bit = 0; bit < 2 * NT; ++bit) {
    uint32_t found = kept_group(score, options, row + 8 * (bit / 2) + bit % 2, col, col % 8 / 2) >>
                     (col % 32 / 8 * 2 + col % 2);
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int i = 0; i < 2; ++i) word[m][i] |= (found >> (4 * m + 2 * i) & 1) << bit;
  }
}
