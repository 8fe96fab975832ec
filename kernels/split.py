"""Few rows against many keys: the visited tiles split over programs, and their results merged.

A decoding step has one row per head, so a program per row block would leave most of a GPU idle.
``forward_kernel`` with ``parts`` walks one share of its tiles and stores acc, m and l as they are
in the loop; ``merge_kernel`` adds the shares of a row as one more step of the online softmax would
(the split-K scheme of Flash-Decoding: Dao, Haziza, Massa and Sizov, 2023).
"""

import torch
import triton
import triton.language as tl

from .forward import PartArgs, forward
from .scores import LOG2_E, ScoreArgs, is_natural
from .softmax import softmax_end
from .tiles import head_of, tensor_arg
from .tuning import padded

MOST = 64  # shares of a row, all of them in the registers of the program that merges them
LEAST_TILES = 4  # a share has at least so many tiles, where none is skipped


@triton.jit
def merge_kernel(
    parts,  # PartArgs
    out,  # TensorArg [B, Hq, Lq, DV]
    lse,  # [B, Hq, Lq]
    rest,  # [B, Hq, Lq] or None
    score,  # ScoreArgs
    heads,
    len_q,
    splits,
    rows,  # B * Hq * Lq
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    SPLITS: tl.constexpr,
    NATURAL: tl.constexpr,
):
    index = tl.program_id(0)  # of my row among all rows
    bh, row = index // len_q, index % len_q
    b, h = bh // heads, bh % heads
    split = tl.arange(0, SPLITS)
    there = split < splits
    where = split.to(tl.int64) * rows + index  # [S]
    m_part = tl.load(parts.m + where, mask=there, other=float("-inf"))
    l_part = tl.load(parts.l + where, mask=there, other=0.0)

    # weigh the shares by exp(m_part - m)
    UNIT: tl.constexpr = LOG2_E if NATURAL else 1.0
    m = tl.max(m_part, 0)
    pivot = tl.where(m == float("-inf"), 0.0, m)
    share = tl.where(there, tl.exp2((m_part - pivot) * UNIT), 0.0)  # [S]
    # fma: a product that is contracted with an addition of the sum would be rounded otherwise in
    # lanes that stand for the same element
    l = tl.sum(tl.fma(l_part, share, 0.0), 0)
    dims = tl.arange(0, BLOCK_DV)[None, :]
    acc_part = tl.load(
        parts.acc + where[:, None] * DV + dims, mask=there[:, None] & (dims < DV), other=0.0
    )  # [S, DV]
    acc = tl.sum(tl.fma(acc_part, share[:, None], 0.0), 0)  # [DV]

    factor, row_lse, row_rest = softmax_end(m, l, l != 0, score, h, NATURAL)
    if score.seed is not None:
        factor *= score.factor
    acc = tl.where(factor == 0, 0.0, acc * factor)
    start, stride = head_of(out, b, h)
    dims = tl.arange(0, BLOCK_DV)
    where = start + row.to(tl.int64) * stride + dims
    tl.store(where, acc.to(start.dtype.element_ty), mask=dims < DV)
    tl.store(lse + index, row_lse)
    if rest is not None:
        tl.store(rest + index, row_rest)


def count(programs: int, tiles: int, multiprocessors: int) -> int:
    """Into how many shares to split: enough programs for two per multiprocessor, and no share of
    fewer than LEAST_TILES tiles."""
    if programs == 0:
        return 1
    wanted = triton.cdiv(2 * multiprocessors, programs)
    return max(1, min(wanted, triton.cdiv(tiles, LEAST_TILES), MOST))


def forward_split(
    q,
    k,
    v,
    out,
    lse,
    rest,
    bounds,
    mask,
    lists,
    score: ScoreArgs,
    *arguments,
    splits: int,
    **options,
) -> None:
    """forward() in ``splits`` shares per row; the same arguments."""
    batch, heads, len_q, _ = q.shape
    width_v = v.shape[3]
    shape = (splits, batch, heads, len_q)
    acc = torch.empty(*shape, width_v, dtype=torch.float32, device=q.device)
    m, l = (torch.empty(shape, dtype=torch.float32, device=q.device) for _ in range(2))
    parts = PartArgs(acc, m, l)
    forward(
        q,
        k,
        v,
        out,
        lse,
        rest,
        bounds,
        mask,
        lists,
        score,
        *arguments,
        parts=parts,
        splits=splits,
        **options,
    )
    rows = batch * heads * len_q
    if rows:
        merge_kernel[(rows,)](
            parts,
            tensor_arg(out),
            lse,
            rest,
            score,
            heads,
            len_q,
            splits,
            rows,
            DV=width_v,
            BLOCK_DV=padded(width_v),
            SPLITS=triton.next_power_of_2(splits),
            NATURAL=is_natural(score),
        )
