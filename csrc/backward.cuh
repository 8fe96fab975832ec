// What the two kernels of the backward have in common.
//
//   p  = exp(scale * q k^T - lse), masked          ds = p * (do v^T - delta)
//   dv = p^T do      dk = scale * ds^T q      dq = scale * ds k
//   delta = rowsum(do * out) - dlse
//
// FlashAttention-2 (Dao, arXiv:2307.08691) without atomics, so gradients are the same in every run:
// dq_kernel walks the column blocks of a row block, dkv_kernel the row blocks of a column block.
// The price is that scores and do v^T are computed twice, seven products instead of five: 1.7 to
// 1.9 times the instructions per score of FlashAttention-2's kernel (bench/results/README.md).
//
// Where scores are only scaled products, what is subtracted from a product is where its accumulator
// starts: -delta in do v^T, and -rest / scale in q k^T, whose scaling is part of the exp2.
#pragma once

#include "launch.cuh"
#include "softmax.cuh"

// A call, and what is worked out from it before the launch.
struct BackwardCall : TilemaskBackward {
  bool q_chunked, k_chunked, v_chunked, out_chunked, dout_chunked;
  bool dq_chunked, dk_chunked, dv_chunked;
  float scale_log2;  // of products, to scores in log2 units
  float unscale_log2;
};

// Below it, dividing by the scale could overflow: such calls take the general kernels.
constexpr float LEAST_SCALE = 1e-30f;

int launch_dq(const BackwardCall& call, bool general);
int launch_dkv(const BackwardCall& call, bool general);
