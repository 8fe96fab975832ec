"""From products q . k to scores, and dropout: the options of a call inside a tile.

    scores = scale * products -> softcap -> + bias, + ALiBi

In natural units: a bias of finfo.min times log2(e) would be -inf, so the maximum is subtracted
before the change to log2 units. Calls without these options skip all of it.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)


class ScoreArgs(NamedTuple):
    """The options of a call, as one argument; what it has not is None."""

    softcap: float | None = None
    bias: torch.Tensor | None = None  # [B1|1, B2|1, H|1, Lq|1, Lk|1], with its steps
    bias_outer: int | None = None
    bias_inner: int | None = None
    bias_split: int | None = None  # B2
    bias_head: int | None = None
    bias_row: int | None = None  # None where it repeats over rows
    bias_col: int | None = None  # None where it repeats over columns
    slopes: torch.Tensor | None = None  # ALiBi, float32 [B|1, H]
    slopes_batch: int | None = None
    sinks: torch.Tensor | None = None  # float32 [H]
    seed: torch.Tensor | None = None  # of dropout, int64 [1]
    threshold: int | None = None  # 16 bits below it are dropped
    factor: float | None = None  # of what is kept


def is_natural(score: ScoreArgs) -> bool:
    """Whether scores are in natural units and need ``scored``."""
    return any(o is not None for o in (score.softcap, score.bias, score.slopes))


@triton.jit
def bias_of(score, b, h):
    """Where the bias of batch b and head h starts; 0 if there is none."""
    if score.bias is not None:
        outer, inner = b // score.bias_split, b % score.bias_split
        start = outer.to(tl.int64) * score.bias_outer + inner.to(tl.int64) * score.bias_inner
        return score.bias + start + h.to(tl.int64) * score.bias_head
    else:
        return 0


@triton.jit
def load_bias(bias, score, rows, cols, len_q, len_k, PARTIAL: tl.constexpr):
    """The bias at rows and cols, [X, 1] and [1, Y] in either order; float32, of size 1 where it
    repeats. In a full tile all columns exist: without a test of each, loads are wide."""
    row = rows.to(tl.int64) * (0 if score.bias_row is None else score.bias_row)
    col = cols.to(tl.int64) * (0 if score.bias_col is None else score.bias_col)
    if score.bias_row is None and score.bias_col is None:
        value = tl.load(bias)
    elif score.bias_row is None:
        if PARTIAL:
            value = tl.load(bias + col, mask=cols < len_k, other=0.0)
        else:
            value = tl.load(bias + col)
    elif score.bias_col is None:
        value = tl.load(bias + row, mask=rows < len_q, other=0.0)
    elif PARTIAL:
        value = tl.load(bias + row + col, mask=(rows < len_q) & (cols < len_k), other=0.0)
    else:
        value = tl.load(bias + row + col, mask=rows < len_q, other=0.0)
    return value.to(tl.float32)


@triton.jit
def tanh(x):
    """By exp2; absolute error of a few 1e-7."""
    t = tl.exp2(tl.abs(x) * (-2 * LOG2_E))
    t = (1 - t) / (1 + t)
    return tl.where(x < 0, -t, t)


@triton.jit
def scored(products, score, bias, b, h, rows, cols, scale, len_q, len_k, PARTIAL: tl.constexpr):
    """(scores, tanh): scores in natural units from products, and the tanh of the softcap for its
    derivative (without softcap: anything). rows and cols are [X, 1] and [1, Y] in either order.
    """
    scores = products * scale
    bent = scores
    if score.softcap is not None:
        bent = tanh(scores / score.softcap)
        scores = bent * score.softcap
    if score.bias is not None:
        scores += load_bias(bias, score, rows, cols, len_q, len_k, PARTIAL)
    if score.slopes is not None:
        slope = tl.load(score.slopes + b * score.slopes_batch + h)
        scores -= slope * tl.abs((rows + (len_k - len_q)).to(tl.float32) - cols.to(tl.float32))
    return scores, bent


@triton.jit
def kept(score, bh, first_row, first_col, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which pairs of a tile dropout keeps: int1 [M, N]. See tilemask/philox.py.

    One call gives 8 columns, 32g + 8i + 2l + t (i < 4, t < 2), to row, group 4g + l.
    """
    rows = first_row + tl.arange(0, BLOCK_M)
    seed = tl.load(score.seed)
    GROUPS: tl.constexpr = BLOCK_N // 32 if BLOCK_N >= 32 else 1
    KINDS: tl.constexpr = BLOCK_N // GROUPS // 8
    lane = tl.arange(0, 4)[None, None, None, :, None]
    group = 4 * (first_col // 32 + tl.arange(0, GROUPS)[None, :, None, None, None]) + lane
    row = rows[:, None, None, None, None]
    w0, w1, w2, w3 = tl.philox(seed, row, group, bh, bh * 0, n_rounds=7)  # [M, g, 1, l, 1]
    kind = first_col % 32 // 8 + tl.arange(0, KINDS)[None, None, :, None, None]
    word = tl.where(kind == 0, w0, tl.where(kind == 1, w1, tl.where(kind == 2, w2, w3)))
    half = 16 * tl.arange(0, 2)[None, None, None, None, :]
    bits = (word >> half) & 0xFFFF  # [M, g, i, l, t]
    return tl.reshape(bits.to(tl.int32) >= score.threshold, [BLOCK_M, BLOCK_N])
