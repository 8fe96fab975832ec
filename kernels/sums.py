"""Sums over pairs: attention weights, and the gradient of a bias.

Both are a matrix of pairs, p or ds, summed over the batches, heads, rows and columns in which the
result does not differ. A program owns one tile of the result and walks everything that adds to it
in a fixed order, so that results are the same in every run and nothing larger than the result is
ever stored:

    where am I -> for every (batch, head, row block, column block) that adds to my tile:
        words = visible of the tile; nothing visible: next
        p = exp(scores - lse), masked   (ds = p * (do @ v.T - delta))
        sum += p or ds
    -> sum over rows, over columns where they are not kept -> store

Few results, such as a bias [1, 1, 1, 1], are split over ``parts`` programs, each of which stores a
sum of its own; the host adds those.
"""

import torch
import triton
import triton.language as tl

from .masks import MaskArgs, live_columns, load_bounds, masked, row_intervals, tile_words, words_of
from .scores import LOG2_E, ScoreArgs, bias_of, is_natural, kept, scored
from .softmax import load_lse, weights
from .tiles import head_of, load_tile, tensor_arg
from .tuning import TileConfig, padded

PROGRAMS = 512  # few results are split until there are about so many
MOST_PARTS = 16


@triton.jit(
    do_not_specialize=["start", "end", "left", "right", "q_start", "q_end", "len_q", "len_k"]
)
def pair_sums_kernel(
    q,  # TensorArg [B, Hq, Lq, D]
    k,  # TensorArg [B, Hkv, Lk, D]
    v,  # TensorArg [B, Hkv, Lk, DV], do likewise; None for weights
    do,
    lse,  # [B, Hq, Lq]
    rest,  # [B, Hq, Lq] or None
    delta,  # [B, Hq, Lq] or None
    sums,  # [parts, B1|1, B2|1, H|1, Lq|1, Lk|1], contiguous, written
    mask,  # MaskArgs
    score,  # ScoreArgs
    start,  # the six bounds, where mask.bounds is None
    end,
    left,
    right,
    q_start,
    q_end,
    scale,
    weight,  # what a sum is multiplied by
    outer,  # B1, B2 and Hq: all there are, and of those how many the result has
    inner,
    heads,
    outer_kept,
    inner_kept,
    heads_kept,
    group,
    len_q,
    len_k,
    parts,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS_KEPT: tl.constexpr,
    COLS_KEPT: tl.constexpr,
    NATURAL: tl.constexpr,
    PRECISION: tl.constexpr,
    PORTABLE: tl.constexpr,
):
    # where am I: my tile of the result, and which part of what adds to it
    row_blocks, col_blocks = tl.cdiv(len_q, BLOCK_M), tl.cdiv(len_k, BLOCK_N)
    pid = tl.program_id(0).to(tl.int64)
    col_tile = pid % col_blocks if COLS_KEPT else 0
    pid = pid // (col_blocks if COLS_KEPT else 1)
    row_tile = pid % row_blocks if ROWS_KEPT else 0
    pid = pid // (row_blocks if ROWS_KEPT else 1)
    result = pid // parts % (outer_kept * inner_kept * heads_kept)  # which matrix of the result
    part = pid % parts
    h_kept = result % heads_kept
    inner_at = result // heads_kept % inner_kept
    outer_at = result // heads_kept // inner_kept

    across = 1 if COLS_KEPT else col_blocks
    down = 1 if ROWS_KEPT else row_blocks
    members = heads // heads_kept
    windows = inner // inner_kept
    terms = outer // outer_kept * windows * members * down * across
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for t in range(part, terms, parts):
        col_block = col_tile + t % across
        row_block = row_tile + t // across % down
        member = t // across // down
        h = (h_kept + member % members).to(tl.int32)
        window = member // members
        b = (outer_at + window // windows) * inner + inner_at + window % windows
        b = b.to(tl.int32)
        first_row = (row_block * BLOCK_M).to(tl.int32)
        first_col = (col_block * BLOCK_N).to(tl.int32)
        rows = first_row + tl.arange(0, BLOCK_M)
        cols = first_col + tl.arange(0, BLOCK_N)

        bounds = load_bounds(mask, b, start, end, left, right, q_start, q_end, len_q, len_k)
        lo, hi = row_intervals(rows, mask, b, h, bounds, len_q)
        words = words_of(mask, b, h)
        word = tile_words(mask, words, b, lo, hi, first_row, first_col, len_q, BLOCK_M, BLOCK_N)
        word = tl.broadcast_to(word, [BLOCK_M, 1, 4, 1])
        if tl.max(tl.reshape((word != 0).to(tl.int32), [BLOCK_M * 4]), 0) > 0:
            alive, inside = lo < hi, live_columns(cols, mask, b, bounds)
            offset = (b.to(tl.int64) * heads + h) * len_q
            q_tile = load_tile(head_of(q, b, h), first_row, alive, BLOCK_M, D, BLOCK_D)
            k_tile = load_tile(head_of(k, b, h // group), first_col, inside, BLOCK_N, D, BLOCK_D)

            # p = exp(scores - lse), masked
            row_lse, row_rest = load_lse(
                lse + offset, None if rest is None else rest + offset, rows, len_q, NATURAL
            )
            scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)  # [M, N]
            if NATURAL:
                scores, _ = scored(
                    scores,
                    score,
                    bias_of(score, b, h),
                    b,
                    h,
                    rows[:, None],
                    cols[None, :],
                    scale,
                    len_q,
                    len_k,
                    True,
                )
            EXACT: tl.constexpr = rest is not None
            p = weights(scores, row_lse[:, None], row_rest[:, None], scale * LOG2_E, NATURAL, EXACT)
            p = masked(p, word, 0.0, PORTABLE)
            if score.seed is not None:
                keep = kept(score, b * heads + h, first_row, first_col, BLOCK_M, BLOCK_N)

            if do is None:
                if score.seed is not None:
                    p = tl.where(keep, p * score.factor, 0.0)
                total += p
            else:  # ds = p * (do @ v.T - delta)
                do_tile = load_tile(head_of(do, b, h), first_row, alive, BLOCK_M, DV, BLOCK_DV)
                v_head = head_of(v, b, h // group)
                v_tile = load_tile(v_head, first_col, inside, BLOCK_N, DV, BLOCK_DV)
                dp = tl.dot(do_tile, tl.trans(v_tile), input_precision=PRECISION)
                if score.seed is not None:
                    dp = tl.where(keep, dp * score.factor, 0.0)
                row_delta = tl.load(delta + offset + rows, mask=rows < len_q, other=0.0)
                total += p * (dp - row_delta[:, None])

    # sum over what is not kept, and store
    total *= weight
    matrix = part * (outer_kept * inner_kept * heads_kept) + result
    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    col = col_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    dtype = sums.dtype.element_ty
    if ROWS_KEPT and COLS_KEPT:
        where = sums + (matrix * len_q + row)[:, None] * len_k + col[None, :]
        tl.store(where, total.to(dtype), mask=(row < len_q)[:, None] & (col < len_k)[None, :])
    elif ROWS_KEPT:
        tl.store(sums + matrix * len_q + row, tl.sum(total, 1).to(dtype), mask=row < len_q)
    elif COLS_KEPT:
        tl.store(sums + matrix * len_k + col, tl.sum(total, 0).to(dtype), mask=col < len_k)
    else:
        tl.store(sums + matrix, tl.sum(tl.sum(total, 1), 0).to(dtype))


def pair_sums(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    do: torch.Tensor | None,
    lse: torch.Tensor,
    rest: torch.Tensor | None,
    delta: torch.Tensor | None,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    bounds: tuple[int, ...],
    mask: MaskArgs,
    score: ScoreArgs,
    scale: float,
    weight: float,
    precision: str,
    config: TileConfig,
    portable: bool,
) -> torch.Tensor:
    """Sums of weight * p, or of weight * ds where do is given: [B1|1, B2|1, Hq|1, Lq|1, Lk|1].

    shape: that of the result, 1 where it sums; B1 * B2 = B. v, do, delta: for ds, the gradient of
    scores after softcap. dtype: of the result. The other arguments as in forward().
    """
    batch, heads, len_q, width = q.shape
    group, len_k = heads // max(1, k.shape[1]), k.shape[2]
    width_v = 1 if v is None else v.shape[3]
    # a batch dimension of 1 sums over all there is of it
    inner = shape[1] if shape[1] > 1 else batch // shape[0] if shape[0] > 1 else 1
    outer = batch // max(1, inner)
    rows_kept, cols_kept = shape[3] == len_q, shape[4] == len_k
    row_blocks, col_blocks = triton.cdiv(len_q, config.block_m), triton.cdiv(len_k, config.block_n)
    matrices = shape[0] * shape[1] * shape[2]
    tiles = matrices * (row_blocks if rows_kept else 1) * (col_blocks if cols_kept else 1)
    if tiles == 0 or batch == 0 or heads == 0 or len_q == 0 or len_k == 0:
        return torch.zeros(shape, dtype=dtype, device=q.device)
    terms = batch * heads * row_blocks * col_blocks // tiles
    parts = max(1, min(PROGRAMS // tiles, terms, MOST_PARTS))
    stored = dtype if parts == 1 else torch.float32
    sums = torch.empty(parts, *shape, dtype=stored, device=q.device)
    pair_sums_kernel[(tiles * parts,)](
        tensor_arg(q),
        tensor_arg(k),
        None if v is None else tensor_arg(v),
        None if do is None else tensor_arg(do),
        lse,
        rest,
        delta,
        sums,
        mask,
        score,
        *bounds,
        scale,
        weight,
        outer,
        inner,
        heads,
        *shape[:3],
        group,
        len_q,
        len_k,
        parts,
        D=width,
        DV=width_v,
        BLOCK_D=padded(width),
        BLOCK_DV=padded(width_v),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        ROWS_KEPT=rows_kept,
        COLS_KEPT=cols_kept,
        NATURAL=is_natural(score),
        PRECISION=precision,
        PORTABLE=portable,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return sums[0] if parts == 1 else sums.sum(0).to(dtype)
