"""Forward: out = softmax(scale * q k^T, masked) v and lse, one pass over the visited tiles.

    where am I -> load my rows of q -> for every visited column block:
        scores = q @ k.T, biased and masked -> softmax_step -> acc = acc * rescale + p @ v
    -> divide by the row sums -> store

FlashAttention-2 (Dao, arXiv:2307.08691), with the mask inside the loop and two loops: one over
partial tiles, one over full tiles that has no mask code at all.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .masks import (
    ListArgs,
    MaskArgs,
    columns_to_visit,
    count_visit,
    live_columns,
    load_bounds,
    masked,
    row_intervals,
    same_rows,
    share_of,
    tile_words,
    visited_block,
    words_of,
)
from .scores import LOG2_E, ScoreArgs, bias_of, is_natural, kept, scored
from .softmax import softmax_end, softmax_step
from .tiles import head_of, load_tile, store_tile, tensor_arg
from .tuning import TileConfig, padded


class PartArgs(NamedTuple):
    """Where one share of several goes (kernels/split.py), as one argument; None for all at once.

    S shares: acc float32 [S, B, Hq, Lq, DV], m and l float32 [S, B, Hq, Lq].
    """

    acc: torch.Tensor | None = None
    m: torch.Tensor | None = None
    l: torch.Tensor | None = None


@triton.jit
def forward_step(
    q,  # [M, BLOCK_D]
    k,  # heads: (pointer to [Lk, D], row stride)
    v,
    b,
    h,
    bh,
    first_row,
    first_col,
    lo,  # [M] the rows' intervals
    hi,
    mask,
    words,
    bounds,
    score,
    bias,
    acc,  # [M, BLOCK_DV]
    m,  # [M]
    l,  # [M]
    scale,
    len_q,
    len_k,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NATURAL: tl.constexpr,
    PRECISION: tl.constexpr,
    PORTABLE: tl.constexpr,
    PARTIAL: tl.constexpr,
):
    BLOCK_M: tl.constexpr = q.shape[0]
    BLOCK_D: tl.constexpr = q.shape[1]
    BLOCK_DV: tl.constexpr = acc.shape[1]
    cols = first_col + tl.arange(0, BLOCK_N)
    inside = None
    if PARTIAL:  # what padding excludes is never read: 0 * NaN would be NaN
        inside = live_columns(cols, mask, b, bounds)  # [N]

    # scores = q @ k.T, biased and masked
    k_tile = load_tile(k, first_col, inside, BLOCK_N, D, BLOCK_D)  # [N, D]
    scores = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION)  # [M, N]
    if NATURAL:
        rows = (first_row + tl.arange(0, BLOCK_M))[:, None]
        scores, _ = scored(
            scores, score, bias, b, h, rows, cols[None, :], scale, len_q, len_k, PARTIAL
        )
    if PARTIAL:
        word = tile_words(mask, words, b, lo, hi, first_row, first_col, len_q, BLOCK_M, BLOCK_N)
        scores = masked(scores, word, float("-inf"), PORTABLE)

    p, rescale, m, l = softmax_step(scores, m, l, scale * LOG2_E, PARTIAL or NATURAL, NATURAL)
    if score.seed is not None:
        p = tl.where(kept(score, bh, first_row, first_col, BLOCK_M, BLOCK_N), p, 0.0)

    # acc = acc * rescale + p @ v
    v_tile = load_tile(v, first_col, inside, BLOCK_N, DV, BLOCK_DV)  # [N, DV]
    acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * rescale[:, None], input_precision=PRECISION)
    return acc, m, l


@triton.jit(
    do_not_specialize=["start", "end", "left", "right", "q_start", "q_end", "len_q", "len_k"]
)
def forward_kernel(
    q,  # TensorArg [B, Hq, Lq, D]
    k,  # TensorArg [B, Hkv, Lk, D]
    v,  # TensorArg [B, Hkv, Lk, DV]
    out,  # TensorArg [B, Hq, Lq, DV]
    lse,  # [B, Hq, Lq]
    rest,  # [B, Hq, Lq] or None: what float32 lse could not hold
    mask,  # MaskArgs
    lists,  # ListArgs, by row block
    score,  # ScoreArgs
    parts,  # PartArgs
    splits,  # into how many shares each row block is split, with parts
    visits,  # [B * Hq, row blocks, column blocks, 2] or None
    start,  # the six bounds, where mask.bounds is None
    end,
    left,
    right,
    q_start,
    q_end,
    scale,
    heads,
    group,
    len_q,
    len_k,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SIGN: tl.constexpr,
    NATURAL: tl.constexpr,
    FOLDED: tl.constexpr,
    PRECISION: tl.constexpr,
    PORTABLE: tl.constexpr,
):
    # where am I: the last row block first, under a causal mask it is the longest
    row_blocks = tl.cdiv(len_q, BLOCK_M)
    col_blocks = tl.cdiv(len_k, BLOCK_N)
    bh = tl.program_id(0) // row_blocks
    row_block = row_blocks - 1 - tl.program_id(0) % row_blocks
    b, h = bh // heads, bh % heads
    first_row = row_block * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    k_head, v_head = head_of(k, b, h // group), head_of(v, b, h // group)

    # my rows: their intervals, and q
    bounds = load_bounds(mask, b, start, end, left, right, q_start, q_end, len_q, len_k)
    if FOLDED:  # rows are heads: all of them are row 0
        bounds = same_rows(bounds, len_q)
    lo, hi = row_intervals(rows, mask, b, h, bounds, len_q)
    alive = lo < hi
    q_tile = load_tile(head_of(q, b, h), first_row, alive, BLOCK_M, D, BLOCK_D)
    if SIGN != 1:
        q_tile = (q_tile.to(tl.float32) * SIGN).to(q_tile.dtype)

    words, bias = words_of(mask, b, h), bias_of(score, b, h)

    partial, full, partial_at, full_at = columns_to_visit(
        row_block, row_blocks, col_blocks, lists, b, h, bounds, BLOCK_M, BLOCK_N
    )

    first, last, first_full, last_full = 0, partial, 0, full
    if parts.acc is not None:
        first, last, first_full, last_full = share_of(partial, full, tl.program_id(1), splits)

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)

    # two loops, partial tiles first: the one over full tiles has no mask code at all
    for kind in tl.static_range(2):
        for t in range(first if kind == 0 else first_full, last if kind == 0 else last_full):
            col_block = visited_block(t, lists, partial_at, full, full_at, kind == 0)
            count_visit(visits, row_block, col_block, row_blocks, col_blocks, bh, kind == 0)
            acc, m, l = forward_step(
                q_tile,
                k_head,
                v_head,
                b,
                h,
                bh,
                first_row,
                col_block * BLOCK_N,
                lo,
                hi,
                mask,
                words,
                bounds,
                score,
                bias,
                acc,
                m,
                l,
                scale,
                len_q,
                len_k,
                D,
                DV,
                BLOCK_N,
                NATURAL,
                PRECISION,
                PORTABLE,
                kind == 0,
            )

    inside = rows < len_q
    offset = bh.to(tl.int64) * len_q + rows
    if parts.acc is not None:  # one share of several: kernels/split.py puts them together
        part = (tl.program_id(1) * (tl.num_programs(0) // row_blocks)).to(tl.int64) * len_q + offset
        tl.store(parts.m + part, tl.where(alive, m, float("-inf")), mask=inside)
        tl.store(parts.l + part, tl.where(alive, l, 0.0), mask=inside)
        dims = tl.arange(0, BLOCK_DV)[None, :]
        acc = tl.where(alive[:, None], acc, 0.0)
        tl.store(parts.acc + part[:, None] * DV + dims, acc, mask=inside[:, None] & (dims < DV))
    else:
        # divide by the row sums and store; a row that saw nothing gets 0 and -inf
        factor, row_lse, row_rest = softmax_end(m, l, alive, score, h, NATURAL)
        if score.seed is not None:
            factor *= score.factor
        acc = tl.where(factor[:, None] == 0, 0.0, acc * factor[:, None])
        store_tile(head_of(out, b, h), first_row, acc, inside, DV)
        tl.store(lse + offset, row_lse, mask=inside)
        if rest is not None:
            tl.store(rest + offset, row_rest, mask=inside)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    rest: torch.Tensor | None,
    bounds: tuple[int, ...],
    mask: MaskArgs,
    lists: ListArgs,
    score: ScoreArgs,
    scale: float,
    precision: str,
    config: TileConfig,
    portable: bool,
    visits: torch.Tensor | None = None,
    folded: bool = False,
    parts: PartArgs | None = None,
    splits: int = 1,
) -> None:
    """Launch the kernel: fills out [B, Hq, Lq, DV] and lse (and rest) float32 [B, Hq, Lq], or
    parts, one share of ``splits`` each.

    q [B, Hq, Lq, D], k [B, Hkv, Lk, D], v [B, Hkv, Lk, DV]: unit last stride. bounds: six ints,
    used where mask.bounds is None. lists: from build_lists for config's tile, for all but affine
    masks. visits: int32 zeros [B * Hq, row blocks, column blocks, 2], counted up by tile and class.
    folded: rows are query heads that share a key head, all at row 0 of an affine mask.
    """
    batch, heads, len_q, width = q.shape
    group, len_k, width_v = heads // max(1, k.shape[1]), k.shape[2], v.shape[3]
    natural = is_natural(score)
    # a negative scale moves into q and a zero scale too: the loop may then take the row maximum
    # before scaling
    sign = 1 if natural else (scale > 0) - (scale < 0)
    grid = (triton.cdiv(len_q, config.block_m) * batch * heads, splits)
    if grid[0] == 0:
        return
    forward_kernel[grid](
        tensor_arg(q),
        tensor_arg(k),
        tensor_arg(v),
        tensor_arg(out),
        lse,
        rest,
        mask,
        lists,
        score,
        parts or PartArgs(),
        splits,
        visits,
        *bounds,
        scale if natural else abs(scale) if sign else 1.0,
        heads,
        group,
        len_q,
        len_k,
        D=width,
        DV=width_v,
        BLOCK_D=padded(width),
        BLOCK_DV=padded(width_v),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        SIGN=sign,
        NATURAL=natural,
        FOLDED=folded,
        PRECISION=precision,
        PORTABLE=portable,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
