"""The online softmax. In log2 units where scores are only scaled, since exp2 is one instruction and
exp two; in natural units where they are more than that (kernels/scores.py).

Milakov and Gimelshein, "Online normalizer calculation for softmax" (arXiv:1805.02867), applied to
tiles as in FlashAttention (arXiv:2205.14135).
"""

import triton
import triton.language as tl

from .scores import LN_2, LOG2_E


@triton.jit
def softmax_step(scores, m, l, scale_log2, MAY_BE_EMPTY: tl.constexpr, NATURAL: tl.constexpr):
    """One update with scores [M, N]: (p [M, N], rescale [M], new m [M], new l [M]).

    m is the running row maximum, l the running row sum. NATURAL: scores and m are in natural units.
    Else scores are products, scale_log2 >= 0 scales them, and m is in log2 units: scaling by fused
    multiply-add inside exp2 saves one instruction per element.
    """
    if NATURAL:
        m_new = tl.maximum(m, tl.max(scores, 1))
    else:
        m_new = tl.maximum(m, tl.max(scores, 1) * scale_log2)
    # a row that has seen no key yet has m_new = -inf; a finite pivot avoids -inf - -inf
    pivot = tl.where(m_new == float("-inf"), 0.0, m_new) if MAY_BE_EMPTY else m_new
    if NATURAL:
        p = tl.exp2((scores - pivot[:, None]) * LOG2_E)
        rescale = tl.exp2((m - pivot) * LOG2_E)
    else:
        p = tl.exp2(scores * scale_log2 - pivot[:, None])
        rescale = tl.exp2(m - pivot)
    return p, rescale, m_new, l * rescale + tl.sum(p, 1)


@triton.jit
def softmax_end(m, l, alive, score, h, NATURAL: tl.constexpr):
    """(factor, lse, rest) of rows [M]: what the sums of p @ v are multiplied by, the natural-log
    lse, and what float32 lse could not hold of it, in the units of m, for the backward to add.

    A row that is not alive, or saw -inf only, gets 0, -inf (with sinks: the sink) and rest = inf.
    """
    alive = alive & (l != 0)
    m = tl.where(alive, m, float("-inf"))
    top = m
    if score.sinks is not None:
        sink = tl.load(score.sinks + h)
        top = tl.maximum(m, sink if NATURAL else sink * LOG2_E)
    top = tl.where(top == float("-inf"), 0.0, top)
    UNIT: tl.constexpr = LOG2_E if NATURAL else 1.0
    share = tl.where(alive, tl.exp2((m - top) * UNIT), 0.0)
    total = tl.where(alive, l * share, 0.0)
    if score.sinks is not None:
        total += tl.exp2((sink if NATURAL else sink * LOG2_E) * UNIT - top * UNIT)
    empty = total == 0
    total = tl.where(empty, 1.0, total)
    factor = share / total
    log = tl.log2(total)
    if NATURAL:
        log *= LN_2
        lse = top + log
        held = lse - top  # rest = top + log - lse, without rounding
        rest = (top - (lse - held)) + (log - held)
    else:
        lse = (top + log) * LN_2
        rest = tl.fma(-lse, LOG2_E, top) + log
    lse = tl.where(empty, float("-inf"), lse)
    return factor, lse, tl.where(alive, rest, float("inf"))


@triton.jit
def load_lse(lse, rest, rows, len_q, NATURAL: tl.constexpr):
    """(lse, rest) of a head's rows [M] as ``weights`` takes them. Rows that see nothing get an
    infinity that makes their p 0."""
    value = tl.load(lse + rows, mask=rows < len_q, other=float("-inf"))
    if rest is None:
        left = tl.where(value == float("-inf"), float("inf"), 0.0)
    else:
        left = tl.load(rest + rows, mask=rows < len_q, other=float("inf"))
    value = tl.where(left == float("inf"), 0.0, value)
    if NATURAL:
        return value, left * LOG2_E
    else:
        rounded = value * LOG2_E
        if rest is None:
            rounded += left
        else:
            left += tl.fma(value, LOG2_E, -rounded)
        return rounded, left


@triton.jit
def weights(scores, lse, rest, scale_log2, NATURAL: tl.constexpr, EXACT: tl.constexpr):
    """p = exp(scores - lse), scores as in softmax_step, lse and rest [M] shaped to broadcast.

    EXACT: with the rest of lse. Of scores around 1000 float32 lse is off by 3e-5, and so would be
    every p; around finfo.min it cannot hold the logarithm of a sum at all.
    """
    if NATURAL:
        return tl.exp2((scores - lse) * LOG2_E - rest)
    elif EXACT:
        return tl.exp2(scores * scale_log2 - lse - rest)
    else:
        return tl.exp2(scores * scale_log2 - lse)
