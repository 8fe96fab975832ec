// What the kernels of the backward have in common.
//
//   p  = exp(scale * q k^T - lse), masked          ds = p * (do v^T - delta)
//   dv = p^T do      dk = scale * ds^T q      dq = scale * ds k
//   delta = rowsum(do * out) - dlse
//
// FlashAttention-2 (Dao, arXiv:2307.08691) without atomic additions, so gradients are the same in
// every run. dqkv_kernel does it in five products; see there for its order. Calls with options, and
// GPUs without the room, take seven in two kernels: dq_kernel walks the column blocks of a row
// block, dkv_kernel the row blocks of a column block, and both compute scores and do v^T.
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

// Bytes that dqkv_kernel needs for a call, 0 where dq_kernel and dkv_kernel run it.
int64_t dqkv_workspace(const BackwardCall& call, bool general);
int launch_dqkv(const BackwardCall& call);

int launch_dq(const BackwardCall& call, bool general);
int launch_dkv(const BackwardCall& call, bool general);
