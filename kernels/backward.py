"""Backward: two kernels and no atomics, so gradients are the same in every run.

``dq_kernel`` walks the column blocks of a row block, as the forward does; ``dkv_kernel`` walks the
row blocks of a column block, for every query head that shares its key head. Both recompute

    p  = exp(scale * q k^T - lse), masked          ds = p * (do v^T - delta)
    dv = p^T do      dk = scale * ds^T q      dq = scale * ds k      delta = rowsum(do * out) - dlse

from the saved lse (FlashAttention-2, Dao, arXiv:2307.08691). The price of determinism is that
scores and do v^T are computed twice, seven products instead of five.
"""

import torch
import triton
import triton.language as tl

from .masks import (
    ListArgs,
    MaskArgs,
    columns_to_visit,
    count_visit,
    live_columns,
    live_rows,
    load_bounds,
    masked,
    masked_transposed,
    row_intervals,
    rows_to_visit,
    tile_words,
    tile_words_transposed,
    visited_block,
    words_of,
)
from .scores import LOG2_E, ScoreArgs, bias_of, is_natural, kept, scored
from .softmax import load_lse, weights
from .tiles import head_of, load_tile, store_tile, tensor_arg
from .tuning import TileConfig, padded


@triton.jit
def dq_step(
    q,  # [M, BLOCK_D]
    do,  # [M, BLOCK_DV]
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
    lse,  # [M] as load_lse gives them
    rest,
    delta,  # [M]
    dq,  # [M, BLOCK_D]
    scale,
    len_q,
    len_k,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NATURAL: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
    PORTABLE: tl.constexpr,
    PARTIAL: tl.constexpr,
):
    BLOCK_M: tl.constexpr = q.shape[0]
    BLOCK_D: tl.constexpr = q.shape[1]
    BLOCK_DV: tl.constexpr = do.shape[1]
    cols = first_col + tl.arange(0, BLOCK_N)
    inside = None
    if PARTIAL:
        inside = live_columns(cols, mask, b, bounds)  # [N]

    # p = exp(scores - lse), masked
    k_tile = load_tile(k, first_col, inside, BLOCK_N, D, BLOCK_D)  # [N, D]
    scores = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION)  # [M, N]
    bent = scores
    if NATURAL:
        rows = (first_row + tl.arange(0, BLOCK_M))[:, None]
        scores, bent = scored(
            scores, score, bias, b, h, rows, cols[None, :], scale, len_q, len_k, PARTIAL
        )
    p = weights(scores, lse[:, None], rest[:, None], scale * LOG2_E, NATURAL, EXACT)
    if PARTIAL:
        word = tile_words(mask, words, b, lo, hi, first_row, first_col, len_q, BLOCK_M, BLOCK_N)
        p = masked(p, word, 0.0, PORTABLE)

    # ds = p * (do @ v.T - delta)
    v_tile = load_tile(v, first_col, inside, BLOCK_N, DV, BLOCK_DV)  # [N, DV]
    dp = tl.dot(do, tl.trans(v_tile), input_precision=PRECISION)  # [M, N]
    if score.seed is not None:
        keep = kept(score, bh, first_row, first_col, BLOCK_M, BLOCK_N)
        dp = tl.where(keep, dp * score.factor, 0.0)
    ds = p * (dp - delta[:, None])
    if score.softcap is not None:
        ds *= 1 - bent * bent

    # dq += ds @ k
    return tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision=PRECISION)


@triton.jit(
    do_not_specialize=["start", "end", "left", "right", "q_start", "q_end", "len_q", "len_k"]
)
def dq_kernel(
    q,  # TensorArg [B, Hq, Lq, D]
    k,  # TensorArg [B, Hkv, Lk, D]
    v,  # TensorArg [B, Hkv, Lk, DV]
    out,  # TensorArg [B, Hq, Lq, DV]
    do,  # TensorArg [B, Hq, Lq, DV]
    dq,  # TensorArg [B, Hq, Lq, D]
    lse,  # [B, Hq, Lq]
    rest,  # [B, Hq, Lq] or None
    dlse,  # [B, Hq, Lq] or None
    delta,  # [B, Hq, Lq], written
    mask,  # MaskArgs
    lists,  # ListArgs, by row block
    score,  # ScoreArgs
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
    NATURAL: tl.constexpr,
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

    # my rows: their intervals, q, do, lse and delta = rowsum(do * out) - dlse
    bounds = load_bounds(mask, b, start, end, left, right, q_start, q_end, len_q, len_k)
    lo, hi = row_intervals(rows, mask, b, h, bounds, len_q)
    alive = lo < hi
    offset = bh.to(tl.int64) * len_q
    q_tile = load_tile(head_of(q, b, h), first_row, alive, BLOCK_M, D, BLOCK_D)
    do_tile = load_tile(head_of(do, b, h), first_row, alive, BLOCK_M, DV, BLOCK_DV)
    out_tile = load_tile(head_of(out, b, h), first_row, alive, BLOCK_M, DV, BLOCK_DV)
    # not a plain product: contracted with the first addition of the sum it would round differently
    # in lanes that stand for the same row
    products = tl.fma(out_tile.to(tl.float32), do_tile.to(tl.float32), 0.0)  # [M, BLOCK_DV]
    row_delta = tl.sum(products, 1)  # [M]
    if dlse is not None:
        row_delta -= tl.load(dlse + offset + rows, mask=rows < len_q, other=0.0)
    tl.store(delta + offset + rows, row_delta, mask=rows < len_q)
    row_lse, row_rest = load_lse(
        lse + offset, None if rest is None else rest + offset, rows, len_q, NATURAL
    )
    words, bias = words_of(mask, b, h), bias_of(score, b, h)

    partial, full, partial_at, full_at = columns_to_visit(
        row_block, row_blocks, col_blocks, lists, b, h, bounds, BLOCK_M, BLOCK_N
    )

    dq_tile = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    # two loops, partial tiles first: the one over full tiles has no mask code at all
    for kind in tl.static_range(2):
        for t in range(partial if kind == 0 else full):
            col_block = visited_block(t, lists, partial_at, full, full_at, kind == 0)
            count_visit(visits, row_block, col_block, row_blocks, col_blocks, bh, kind == 0)
            dq_tile = dq_step(
                q_tile,
                do_tile,
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
                row_lse,
                row_rest,
                row_delta,
                dq_tile,
                scale,
                len_q,
                len_k,
                D,
                DV,
                BLOCK_N,
                NATURAL,
                rest is not None,
                PRECISION,
                PORTABLE,
                kind == 0,
            )

    # a row that saw nothing has gradient 0
    dq_tile = tl.where(alive[:, None], dq_tile * scale, 0.0)
    store_tile(head_of(dq, b, h), first_row, dq_tile, rows < len_q, D)


@triton.jit
def dkv_step(
    k,  # [N, BLOCK_D]
    v,  # [N, BLOCK_DV]
    cols,  # [N]
    q,  # heads: (pointer to [Lq, D], row stride)
    do,
    b,
    h,
    bh,
    first_row,
    first_col,
    mask,
    words,
    bounds,
    score,
    bias,
    lse,  # pointers to the head's [Lq]
    rest,
    delta,
    dk,  # [N, BLOCK_D]
    dv,  # [N, BLOCK_DV]
    scale,
    len_q,
    len_k,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    NATURAL: tl.constexpr,
    PRECISION: tl.constexpr,
    PORTABLE: tl.constexpr,
    PARTIAL: tl.constexpr,
):
    BLOCK_N: tl.constexpr = k.shape[0]
    BLOCK_D: tl.constexpr = k.shape[1]
    BLOCK_DV: tl.constexpr = v.shape[1]
    rows = first_row + tl.arange(0, BLOCK_M)
    inside = live_rows(rows, bounds)  # [M]
    q_tile = load_tile(q, first_row, inside, BLOCK_M, D, BLOCK_D)  # [M, D]
    row_lse, row_rest = load_lse(lse, rest, rows, len_q, NATURAL)  # [M]

    # p = exp(scores - lse), masked, transposed
    scores = tl.dot(k, tl.trans(q_tile), input_precision=PRECISION)  # [N, M]
    bent = scores
    if NATURAL:
        scores, bent = scored(
            scores, score, bias, b, h, rows[None, :], cols[:, None], scale, len_q, len_k, PARTIAL
        )
    EXACT: tl.constexpr = rest is not None
    p = weights(scores, row_lse[None, :], row_rest[None, :], scale * LOG2_E, NATURAL, EXACT)
    if PARTIAL:
        if mask.lo is not None:
            lo, hi = row_intervals(rows, mask, b, h, bounds, len_q)  # [M]
            p = masked_transposed(p, lo, hi, cols, PORTABLE)
        if mask.lo is None or mask.words is not None:
            word = tile_words_transposed(
                mask, words, cols, first_row, first_col, len_k, bounds, BLOCK_M, BLOCK_N
            )
            p = masked(p, word, 0.0, PORTABLE)

    # dv += p.T @ do
    do_tile = load_tile(do, first_row, inside, BLOCK_M, DV, BLOCK_DV)  # [M, DV]
    dropped = p
    if score.seed is not None:
        keep = tl.trans(kept(score, bh, first_row, first_col, BLOCK_M, BLOCK_N).to(tl.int8)) != 0
        dropped = tl.where(keep, p * score.factor, 0.0)
    dv = tl.dot(dropped.to(do_tile.dtype), do_tile, dv, input_precision=PRECISION)

    # ds = p * (do @ v.T - delta), transposed
    row_delta = tl.load(delta + rows, mask=rows < len_q, other=0.0)  # [M]
    dp = tl.dot(v, tl.trans(do_tile), input_precision=PRECISION)  # [N, M]
    if score.seed is not None:
        dp = tl.where(keep, dp * score.factor, 0.0)
    ds = p * (dp - row_delta[None, :])
    if score.softcap is not None:
        ds *= 1 - bent * bent

    # dk += ds.T @ q
    dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(
    do_not_specialize=["start", "end", "left", "right", "q_start", "q_end", "len_q", "len_k"]
)
def dkv_kernel(
    q,  # TensorArg [B, Hq, Lq, D]
    k,  # TensorArg [B, Hkv, Lk, D]
    v,  # TensorArg [B, Hkv, Lk, DV]
    do,  # TensorArg [B, Hq, Lq, DV]
    dk,  # TensorArg [B, Hkv, Lk, D]
    dv,  # TensorArg [B, Hkv, Lk, DV]
    lse,  # [B, Hq, Lq]
    rest,  # [B, Hq, Lq] or None
    delta,  # [B, Hq, Lq]
    mask,  # MaskArgs, with transposed words
    lists,  # ListArgs, by column block
    score,  # ScoreArgs
    visits,  # [B * Hq, row blocks, column blocks, 2] or None
    start,  # the six bounds, where mask.bounds is None
    end,
    left,
    right,
    q_start,
    q_end,
    scale,
    kv_heads,
    group,
    len_q,
    len_k,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NATURAL: tl.constexpr,
    PRECISION: tl.constexpr,
    PORTABLE: tl.constexpr,
):
    # where am I: the first column block first, under a causal mask it is the longest
    row_blocks = tl.cdiv(len_q, BLOCK_M)
    col_blocks = tl.cdiv(len_k, BLOCK_N)
    col_block = tl.program_id(0) % col_blocks
    b = tl.program_id(0) // col_blocks // kv_heads
    kv_head = tl.program_id(0) // col_blocks % kv_heads
    first_col = col_block * BLOCK_N
    cols = first_col + tl.arange(0, BLOCK_N)

    # my columns: k and v, never read where padding excludes them
    bounds = load_bounds(mask, b, start, end, left, right, q_start, q_end, len_q, len_k)
    inside = live_columns(cols, mask, b, bounds)  # [N]
    k_tile = load_tile(head_of(k, b, kv_head), first_col, inside, BLOCK_N, D, BLOCK_D)
    v_tile = load_tile(head_of(v, b, kv_head), first_col, inside, BLOCK_N, DV, BLOCK_DV)
    dk_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_tile = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)

    for member in range(group):  # the query heads that share this key head, in a fixed order
        h = kv_head * group + member
        q_head, do_head = head_of(q, b, h), head_of(do, b, h)
        bh = b * kv_heads * group + h
        offset = bh.to(tl.int64) * len_q

        words, bias = words_of(mask, b, h), bias_of(score, b, h)

        partial, full, partial_at, full_at = rows_to_visit(
            col_block, row_blocks, col_blocks, lists, b, h, bounds, BLOCK_M, BLOCK_N
        )

        # two loops, partial tiles first: the one over full tiles has no mask code at all
        for kind in tl.static_range(2):
            for t in range(partial if kind == 0 else full):
                row_block = visited_block(t, lists, partial_at, full, full_at, kind == 0)
                count_visit(visits, row_block, col_block, row_blocks, col_blocks, bh, kind == 0)
                dk_tile, dv_tile = dkv_step(
                    k_tile,
                    v_tile,
                    cols,
                    q_head,
                    do_head,
                    b,
                    h,
                    bh,
                    row_block * BLOCK_M,
                    first_col,
                    mask,
                    words,
                    bounds,
                    score,
                    bias,
                    lse + offset,
                    None if rest is None else rest + offset,
                    delta + offset,
                    dk_tile,
                    dv_tile,
                    scale,
                    len_q,
                    len_k,
                    D,
                    DV,
                    BLOCK_M,
                    NATURAL,
                    PRECISION,
                    PORTABLE,
                    kind == 0,
                )

    if mask.keys is not None:  # the loops do not mask dead keys: their k and v were 0
        dk_tile = tl.where(inside[:, None], dk_tile, 0.0)
        dv_tile = tl.where(inside[:, None], dv_tile, 0.0)
    in_tensor = cols < len_k
    store_tile(head_of(dk, b, kv_head), first_col, dk_tile * scale, in_tensor, D)
    store_tile(head_of(dv, b, kv_head), first_col, dv_tile, in_tensor, DV)


def backward_dq(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    do: torch.Tensor,
    dq: torch.Tensor,
    lse: torch.Tensor,
    rest: torch.Tensor | None,
    dlse: torch.Tensor | None,
    delta: torch.Tensor,
    bounds: tuple[int, ...],
    mask: MaskArgs,
    lists: ListArgs,
    score: ScoreArgs,
    scale: float,
    precision: str,
    config: TileConfig,
    portable: bool,
    visits: torch.Tensor | None = None,
) -> None:
    """Fill dq [B, Hq, Lq, D] and delta float32 [B, Hq, Lq]; the other arguments as in forward().

    out, do [B, Hq, Lq, DV]: unit last stride. lse, rest, dlse, delta: float32, contiguous; rest
    and dlse may be None.
    """
    batch, heads, len_q, width = q.shape
    group, len_k, width_v = heads // max(1, k.shape[1]), k.shape[2], v.shape[3]
    grid = (triton.cdiv(len_q, config.block_m) * batch * heads,)
    if grid[0] == 0:
        return
    dq_kernel[grid](
        tensor_arg(q),
        tensor_arg(k),
        tensor_arg(v),
        tensor_arg(out),
        tensor_arg(do),
        tensor_arg(dq),
        lse,
        rest,
        dlse,
        delta,
        mask,
        lists,
        score,
        visits,
        *bounds,
        scale,
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
        NATURAL=is_natural(score),
        PRECISION=precision,
        PORTABLE=portable,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def backward_dkv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    do: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    lse: torch.Tensor,
    rest: torch.Tensor | None,
    delta: torch.Tensor,
    bounds: tuple[int, ...],
    mask: MaskArgs,
    lists: ListArgs,
    score: ScoreArgs,
    scale: float,
    precision: str,
    config: TileConfig,
    portable: bool,
    visits: torch.Tensor | None = None,
) -> None:
    """Fill dk [B, Hkv, Lk, D] and dv [B, Hkv, Lk, DV], from the delta that backward_dq wrote.

    lists: the transposed ones, for config's tile, for all but affine masks. mask.words: the
    transposed ones.
    """
    batch, heads, len_q, width = q.shape
    kv_heads, len_k, width_v = k.shape[1], k.shape[2], v.shape[3]
    grid = (triton.cdiv(len_k, config.block_n) * batch * kv_heads,)
    if grid[0] == 0:
        return
    dkv_kernel[grid](
        tensor_arg(q),
        tensor_arg(k),
        tensor_arg(v),
        tensor_arg(do),
        tensor_arg(dk),
        tensor_arg(dv),
        lse,
        rest,
        delta,
        mask,
        lists,
        score,
        visits,
        *bounds,
        scale,
        kv_heads,
        heads // max(1, kv_heads),
        len_q,
        len_k,
        D=width,
        DV=width_v,
        BLOCK_D=padded(width),
        BLOCK_DV=padded(width_v),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        NATURAL=is_natural(score),
        PRECISION=precision,
        PORTABLE=portable,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
