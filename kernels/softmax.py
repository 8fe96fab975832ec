"""The online softmax, in log2 units: exp2 is one instruction, exp two.

Milakov and Gimelshein, "Online normalizer calculation for softmax" (arXiv:1805.02867), applied to
tiles as in FlashAttention (arXiv:2205.14135).
"""

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def softmax_step(scores, m, l, scale_log2, PARTIAL: tl.constexpr):
    """One update with scores [M, N], unscaled: (p [M, N], rescale [M], new m [M], new l [M]).

    m is the running row maximum in log2 units, l the running row sum; scale_log2 >= 0 scales the
    scores. Scaling by fused multiply-add inside exp2 saves one instruction per element.
    """
    m_new = tl.maximum(m, tl.max(scores, 1) * scale_log2)
    # a row that has seen no key yet has m_new = -inf; a finite pivot avoids -inf - -inf
    pivot = tl.where(m_new == float("-inf"), 0.0, m_new) if PARTIAL else m_new
    p = tl.exp2(scores * scale_log2 - pivot[:, None])
    rescale = tl.exp2(m - pivot)
    return p, rescale, m_new, l * rescale + tl.sum(p, 1)


@triton.jit
def softmax_end(m, l, alive):
    """(1 / l, lse) of rows [M]: 0 and -inf for rows that are not alive, natural-log lse."""
    inverse = tl.where(alive, 1.0 / l, 0.0)
    lse = tl.where(alive, (m + tl.log2(l)) * LN_2, float("-inf"))
    return inverse, lse
