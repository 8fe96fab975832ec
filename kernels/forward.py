"""Forward: out = softmax(scale * q k^T, masked) v and lse, one pass over the visited tiles.

    where am I -> load my rows of q -> for every visited column block:
        scores = q @ k.T, masked -> softmax_step -> acc = acc * rescale + p @ v
    -> divide by the row sums -> store

FlashAttention-2 (Dao, arXiv:2307.08691), with the mask inside the loop and two loops: one over
partial tiles, one over full tiles that has no mask code at all.
"""

import torch
import triton
import triton.language as tl

from .masks import (
    MaskArgs,
    columns_to_visit,
    count_visit,
    live_columns,
    load_bounds,
    masked,
    row_intervals,
    visited_block,
)
from .pack import list_args
from .softmax import LOG2_E, softmax_end, softmax_step
from .tiles import head_of, load_tile, store_tile, tensor_arg
from .tuning import TileConfig, padded


@triton.jit
def forward_step(
    q,  # [M, BLOCK_D]
    k,  # heads: (pointer to [Lk, D], row stride)
    v,
    first_col,
    lo,  # [M] the rows' intervals
    hi,
    bounds,
    acc,  # [M, BLOCK_DV]
    m,  # [M]
    l,  # [M]
    scale_log2,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    PORTABLE: tl.constexpr,
    PARTIAL: tl.constexpr,
):
    BLOCK_D: tl.constexpr = q.shape[1]
    BLOCK_DV: tl.constexpr = acc.shape[1]
    inside = None
    if PARTIAL:  # what padding excludes is never read: 0 * NaN would be NaN
        cols = first_col + tl.arange(0, BLOCK_N)
        inside = live_columns(cols, bounds)  # [N]

    # scores = q @ k.T, masked
    k_tile = load_tile(k, first_col, inside, BLOCK_N, D, BLOCK_D)  # [N, D]
    scores = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION)  # [M, N]
    if PARTIAL:
        scores = masked(scores, lo, hi, first_col, float("-inf"), PORTABLE)

    p, rescale, m, l = softmax_step(scores, m, l, scale_log2, PARTIAL)

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
    mask,  # MaskArgs
    lists,  # ListArgs, by row block
    visits,  # [B * Hq, row blocks, column blocks, 2] or None
    start,  # the six bounds, where mask.bounds is None
    end,
    left,
    right,
    q_start,
    q_end,
    scale_log2,
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
    lo, hi = row_intervals(rows, mask, b, h, bounds, len_q)
    alive = lo < hi
    q_tile = load_tile(head_of(q, b, h), first_row, alive, BLOCK_M, D, BLOCK_D)
    if SIGN != 1:
        q_tile = (q_tile.to(tl.float32) * SIGN).to(q_tile.dtype)

    partial, full, partial_at, full_at = columns_to_visit(
        row_block, row_blocks, col_blocks, mask, lists, b, h, bounds, BLOCK_M, BLOCK_N
    )

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)

    # two loops, partial tiles first: the one over full tiles has no mask code at all
    for kind in tl.static_range(2):
        for t in range(partial if kind == 0 else full):
            col_block = visited_block(t, lists, partial_at, full, full_at, kind == 0)
            count_visit(visits, row_block, col_block, row_blocks, col_blocks, bh, kind == 0)
            acc, m, l = forward_step(
                q_tile,
                k_head,
                v_head,
                col_block * BLOCK_N,
                lo,
                hi,
                bounds,
                acc,
                m,
                l,
                scale_log2,
                D,
                DV,
                BLOCK_N,
                PRECISION,
                PORTABLE,
                kind == 0,
            )

    # divide by the row sums and store; a row that saw nothing gets 0 and -inf
    inverse, row_lse = softmax_end(m, l, alive)
    acc = tl.where(alive[:, None], acc * inverse[:, None], 0.0)
    inside = rows < len_q
    store_tile(head_of(out, b, h), first_row, acc, inside, DV)
    tl.store(lse + bh.to(tl.int64) * len_q + rows, row_lse, mask=inside)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    bounds: tuple[int, ...],
    mask: MaskArgs,
    lists: tuple[torch.Tensor, torch.Tensor] | None,
    scale: float,
    precision: str,
    config: TileConfig,
    portable: bool,
    visits: torch.Tensor | None = None,
) -> None:
    """Launch the kernel: fills out [B, Hq, Lq, DV] and lse float32 [B, Hq, Lq], contiguous.

    q [B, Hq, Lq, D], k [B, Hkv, Lk, D], v [B, Hkv, Lk, DV]: unit last stride. bounds: six ints,
    used where mask.bounds is None. lists: from build_lists for config's tile, where mask.lo is
    given. visits: int32 zeros [B * Hq, row blocks, column blocks, 2], counted up by tile and class.
    """
    batch, heads, len_q, width = q.shape
    group, len_k, width_v = heads // max(1, k.shape[1]), k.shape[2], v.shape[3]
    # a negative scale moves into q and a zero scale too: the loop may then take the row maximum
    # before scaling
    sign = (scale > 0) - (scale < 0)
    grid = (triton.cdiv(len_q, config.block_m) * batch * heads,)
    if grid[0] == 0:
        return
    forward_kernel[grid](
        tensor_arg(q),
        tensor_arg(k),
        tensor_arg(v),
        tensor_arg(out),
        lse,
        mask,
        list_args(lists),
        visits,
        *bounds,
        (abs(scale) if sign else 1.0) * LOG2_E.value,
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
        PRECISION=precision,
        PORTABLE=portable,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
