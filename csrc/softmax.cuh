// The online softmax of accumulator rows. In log2 units where scores are only scaled, since exp2 is
// one instruction and exp two; in natural units where they are more than that (scores.cuh).
//
// Milakov and Gimelshein, "Online normalizer calculation for softmax" (arXiv:1805.02867), applied
// to tiles as in FlashAttention (arXiv:2205.14135).
//
// A thread holds rows (m, i): 16m + 8i + lane / 4, i < 2, of its warp's rows.
#pragma once

#include <math.h>
#include <stdint.h>

#include "ptx/math.cuh"
#include "scores.cuh"
#include "tiles.h"

// What p may exceed 1 by, in powers of two, before m moves. Results do not depend on it: acc and l
// carry the same factor. It saves most of the multiplications of acc, and is far from what a
// half-precision p can hold.
constexpr float SLACK = 8;

__device__ __forceinline__ float max_of_row(float x) {
  x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 1));
  return fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 2));
}

__device__ __forceinline__ float sum_of_row(float x) {
  x += __shfl_xor_sync(ALL_LANES, x, 1);
  return x + __shfl_xor_sync(ALL_LANES, x, 2);
}

template <int MT, int NT>
__device__ __forceinline__ void scale_rows(float (&acc)[MT][NT][4], const float (&factor)[MT][2]) {
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[m][n][e] *= factor[m][e / 2];
}

// acc * factor, 0 where the factor is 0: a row that is not alive may hold NaN.
template <int MT, int NT>
__device__ __forceinline__ void finish_rows(float (&acc)[MT][NT][4], const float (&factor)[MT][2]) {
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        acc[m][n][e] = factor[m][e / 2] == 0 ? 0 : acc[m][n][e] * factor[m][e / 2];
}

// One update: scores become p. m: the row maximum so far, or up to SLACK less; l: this thread's
// share of the row sum; acc: multiplied by what m moves.
// NATURAL: scores and m are in natural units. Else scores are products, scale_log2 > 0 scales them,
// and m is in log2 units: scaling inside exp2 costs nothing.
template <bool MAY_BE_EMPTY, bool NATURAL, int MT, int NT, int DT>
__device__ __forceinline__ void softmax_step(float (&scores)[MT][NT][4], float (&m)[MT][2],
                                             float (&l)[MT][2], float (&acc)[MT][DT][4],
                                             float scale_log2) {
  constexpr float UNIT = NATURAL ? LOG2_E : 1;
  float top[MT][2];
  bool grows = false;
#pragma unroll
  for (int a = 0; a < MT; ++a)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float x = scores[a][0][2 * i];
#pragma unroll
      for (int n = 0; n < NT; ++n)
        x = fmaxf(x, fmaxf(scores[a][n][2 * i], scores[a][n][2 * i + 1]));
      x = max_of_row(x);
      top[a][i] = NATURAL ? x : x * scale_log2;
      grows |= top[a][i] > m[a][i] + SLACK / UNIT;
    }

  if (__any_sync(ALL_LANES, grows)) {
    float rescale[MT][2];
#pragma unroll
    for (int a = 0; a < MT; ++a)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        // of a row that does not grow m stays, so that no row depends on those beside it
        float m_new = top[a][i] > m[a][i] + SLACK / UNIT ? top[a][i] : m[a][i];
        // a row that has seen no key yet has m = -inf; a finite pivot avoids -inf - -inf
        float pivot = m_new == -INFINITY ? 0 : m_new;
        rescale[a][i] = ex2((m[a][i] - pivot) * UNIT);
        l[a][i] *= rescale[a][i];
        m[a][i] = m_new;
      }
    scale_rows(acc, rescale);
  }

#pragma unroll
  for (int a = 0; a < MT; ++a)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float pivot = MAY_BE_EMPTY && m[a][i] == -INFINITY ? 0 : m[a][i];
      float sum = 0;
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int t = 0; t < 2; ++t) {
          float& x = scores[a][n][2 * i + t];
          x = NATURAL ? ex2((x - pivot) * LOG2_E) : ex2(fmaf(x, scale_log2, -pivot));
          sum += x;
        }
      l[a][i] += sum;
    }
}

// What the sums of p @ v are multiplied by, the natural-log lse, and what float32 lse could not
// hold of it, in log2 units, for the backward to add.
struct RowEnd {
  float factor, lse, rest;
};

// The end of a row with the sum l. A row that is not alive, or saw -inf only, gets 0, -inf (with
// sinks: the sink) and rest = inf.
template <bool NATURAL>
__device__ __forceinline__ RowEnd softmax_end(float m, float l, bool alive,
                                              const TilemaskScore& score, int h) {
  constexpr float UNIT = NATURAL ? LOG2_E : 1;
  alive = alive && l != 0;
  m = alive ? m : -INFINITY;
  float sink = -INFINITY;
  if (score.sinks) sink = NATURAL ? score.sinks[h] : score.sinks[h] * LOG2_E;
  float top = fmaxf(m, sink);
  top = top == -INFINITY ? 0 : top;
  float share = alive ? ex2((m - top) * UNIT) : 0;
  float total = (alive ? l * share : 0) + ex2((sink - top) * UNIT);
  bool empty = total == 0;
  total = empty ? 1 : total;
  RowEnd end;
  end.factor = __fdividef(share, total);
  float log = lg2(total);
  if (NATURAL) {
    log *= LN_2;
    end.lse = top + log;
    float held = end.lse - top;  // rest = top + log - lse, without rounding
    end.rest = ((top - (end.lse - held)) + (log - held)) * LOG2_E;
  } else {
    end.lse = (top + log) * LN_2;
    end.rest = fmaf(-end.lse, LOG2_E, top) + log;
  }
  end.lse = empty ? -INFINITY : end.lse;
  end.rest = alive ? end.rest : INFINITY;
  return end;
}

// lse of a row as `weight` takes it, in the units of its scores. Rows that see nothing get an
// infinity that makes their p 0.
struct RowLse {
  float lse, rest;
};

// Whether the row sees anything.
__device__ __forceinline__ bool is_alive(RowLse row) {
  return fmaxf(row.lse, row.rest) != INFINITY;
}

template <bool NATURAL>
__device__ __forceinline__ RowLse load_lse(const float* lse, const float* rest, int row,
                                           int len_q) {
  float value = row < len_q ? lse[row] : -INFINITY;
  float left = value == -INFINITY ? INFINITY : 0;
  if (rest) left = row < len_q ? rest[row] : INFINITY;
  value = left == INFINITY ? 0 : value;
  if (NATURAL) return {value, left};
  float rounded = value * LOG2_E;
  if (rest) return {rounded, left + fmaf(value, LOG2_E, -rounded)};
  return {rounded + left, 0};
}

// p = exp(score - lse). EXACT: with the rest of lse, which float32 cannot hold beside scores of
// 1000, or around finfo.min.
template <bool NATURAL, bool EXACT>
__device__ __forceinline__ float weight(float score, RowLse row, float scale_log2) {
  if (NATURAL) return ex2((score - row.lse) * LOG2_E - row.rest);
  float power = fmaf(score, scale_log2, -row.lse);
  return ex2(EXACT ? power - row.rest : power);
}
