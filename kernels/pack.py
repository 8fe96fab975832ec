"""From a mask to what the loops read: packed words, rows that see anything, and tile lists.

    bool [.., Lq, Lk] --pack_bits--> words --transpose_words--> the words of dK and dV
    bounds or lo and hi, words, key words --live_rows--> live
    all of these --classify--> a class per tile --compact--> lists, by row block and by column block

A bool mask is read once: Lq * Lk bytes in, an eighth of that out. Everything after it reads the
words. No host synchronisation: arrays have their largest size and counts stay on the device.
"""

import torch
import triton
import triton.language as tl

from .masks import (
    WORD_COLUMNS,
    MaskArgs,
    interval_bits,
    load_bounds,
    row_intervals,
    words_of,
)

PACK_ROWS = 64  # rows that a program packs: 8 KiB of bool
CHUNK = 8  # tiles, or groups of 128 columns, that a program looks at together
LIVE_ROWS = 32
COMPACT = 512  # classes that a program compacts at a time


# -- packing --------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["first_row", "rows", "inner", "heads", "groups"])
def pack_bits_kernel(
    bits,  # uint8 [B1, B2, H, L, Lk], with the strides that follow
    stride_outer,
    stride_inner,
    stride_head,
    stride_row,
    stride_col,
    words,  # int32 [B1, B2, H, groups, all rows, 4]
    first_row,
    rows,
    all_rows,
    len_k,
    inner,
    heads,
    groups,
    ROWS: tl.constexpr,
):
    # neighbouring programs read neighbouring columns
    pid = tl.program_id(0).to(tl.int64)
    group, block = pid % groups, pid // groups % tl.cdiv(rows, ROWS)
    plane = pid // groups // tl.cdiv(rows, ROWS)
    b, h = plane // heads, plane % heads
    bits += b // inner * stride_outer + b % inner * stride_inner + h * stride_head
    row = block * ROWS + tl.arange(0, ROWS)[:, None]  # [R, 1]
    col = group * 128 + tl.arange(0, 128)[None, :]  # [1, 128]
    inside = (row < rows) & (col < len_k)
    seen = tl.load(bits + row * stride_row + col * stride_col, mask=inside, other=0) != 0

    # bit t + 2a of word l is column 8a + 2l + t
    place = 2 * tl.arange(0, 16)[None, :, None, None] + tl.arange(0, 2)[None, None, None, :]
    spread = tl.reshape(seen.to(tl.int32), [ROWS, 16, 4, 2]) << place
    word = tl.sum(tl.sum(spread, 3), 1)  # [R, 4]
    words += ((plane * groups + group) * all_rows + first_row) * 4
    where = words + row * 4 + tl.arange(0, 4)[None, :]
    tl.store(where, word, mask=row < rows)


def pack_bits(
    bits: torch.Tensor, out: torch.Tensor | None = None, first_row: int = 0
) -> torch.Tensor:
    """bool [B1, B2, H, L, Lk], any strides -> words int32 [B1, B2, H, ceil(Lk / 128), L, 4].

    With out, the rows of ``bits`` are rows first_row.. of what ``out`` packs.
    """
    outer, inner, heads, rows, len_k = bits.shape
    groups = triton.cdiv(len_k, WORD_COLUMNS.value)
    if out is None:
        out = torch.empty(
            outer, inner, heads, groups, rows, 4, dtype=torch.int32, device=bits.device
        )
    grid = (outer * inner * heads * groups * triton.cdiv(rows, PACK_ROWS),)
    if grid[0]:
        pack_bits_kernel[grid](
            bits.view(torch.uint8),
            *bits.stride(),
            out,
            first_row,
            rows,
            out.shape[4],
            len_k,
            inner,
            heads,
            groups,
            ROWS=PACK_ROWS,
        )
    return out


@triton.jit(do_not_specialize=["lines", "groups", "lines_out", "groups_out"])
def transpose_words_kernel(
    words,  # int32 [planes, groups, lines, 4]
    transposed,  # int32 [planes, groups_out, lines_out, 4]
    lines,
    groups,
    lines_out,
    groups_out,
):
    pid = tl.program_id(0).to(tl.int64)
    group, group_out = pid % groups, pid // groups % groups_out
    plane = pid // groups // groups_out
    # 128 rows x 128 columns of bits
    row = group_out * 128 + tl.arange(0, 128)
    row = tl.where(lines == 1, 0, row)  # one line stands for all rows
    start = words + (plane * groups + group) * lines * 4
    lane = tl.arange(0, 4)
    word = tl.load(
        start + row[:, None] * 4 + lane[None, :], mask=row[:, None] < lines, other=0
    )  # [128, 4]
    place = 2 * tl.arange(0, 16)[None, :, None, None] + tl.arange(0, 2)[None, None, None, :]
    seen = (word[:, None, :, None] >> place) & 1  # [128, 16, 4, 2]

    # bit t + 2a of word l is row 8a + 2l + t
    spread = tl.reshape(seen, [16, 4, 2, 128])
    place = 2 * tl.arange(0, 16)[:, None, None, None] + tl.arange(0, 2)[None, None, :, None]
    word = tl.sum(tl.sum(spread << place, 2), 0)  # [4, 128]
    col = group * 128 + tl.arange(0, 128)
    start = transposed + (plane * groups_out + group_out) * lines_out * 4
    tl.store(start + col[None, :] * 4 + lane[:, None], word, mask=col[None, :] < lines_out)


def transpose_words(words: torch.Tensor, len_q: int, len_k: int) -> torch.Tensor:
    """words [.., ceil(Lk / 128), Lq|1, 4] -> [.., ceil(Lq / 128)|1, Lk, 4]: rows packed by
    column."""
    planes, groups, lines = words.shape[:3], words.shape[3], words.shape[4]
    groups_out = 1 if lines == 1 else triton.cdiv(len_q, WORD_COLUMNS.value)
    out = torch.empty(*planes, groups_out, len_k, 4, dtype=torch.int32, device=words.device)
    grid = (planes.numel() * groups * groups_out,)
    if grid[0]:
        transpose_words_kernel[grid](words, out, lines, groups, len_k, groups_out, num_warps=8)
    return out


# -- rows that see anything -----------------------------------------------------------------------


@triton.jit
def packed_tiles(
    mask,
    words,
    b,
    rows,
    lo,
    hi,
    first_cols,
    len_q,
    len_k,
    BLOCK_N: tl.constexpr,
):
    """``visible`` of several tiles, packed: int32 [C, M, 4] for rows [M] and first columns [C]."""
    lane = tl.arange(0, 4)[None, None, :]
    first = first_cols[:, None, None]
    word = interval_bits(lo[None, :, None] - first, hi[None, :, None] - first, lane, BLOCK_N)
    inside = first < len_k
    shift = first % 128 // 4
    if mask.words is not None:
        where = words + (first // 128).to(tl.int64) * mask.words_group
        where += rows[None, :, None].to(tl.int64) * mask.words_line + lane
        word &= tl.load(where, mask=inside & (rows[None, :, None] < len_q), other=0) >> shift
    if mask.keys is not None:
        where = mask.keys + b.to(tl.int64) * mask.keys_batch + first // 128 * 4 + lane
        word &= tl.load(where, mask=inside, other=0) >> shift
    return word


@triton.jit(
    do_not_specialize=["start", "end", "left", "right", "q_start", "q_end", "len_q", "len_k"]
)
def live_rows_kernel(
    mask,  # MaskArgs
    live,  # int32 [B|1, heads, Lq], written
    start,
    end,
    left,
    right,
    q_start,
    q_end,
    heads,
    len_q,
    len_k,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    blocks = tl.cdiv(len_q, ROWS)
    bh, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    b, h = bh // heads, bh % heads
    rows = block * ROWS + tl.arange(0, ROWS)
    bounds = load_bounds(mask, b, start, end, left, right, q_start, q_end, len_q, len_k)
    lo, hi = row_intervals(rows, mask, b, h, bounds, len_q)
    words = words_of(mask, b, h)
    seen = tl.zeros([CHUNK, ROWS, 4], tl.int32)
    for first in range(0, len_k, CHUNK * 128):
        cols = first + 128 * tl.arange(0, CHUNK)
        seen |= packed_tiles(mask, words, b, rows, lo, hi, cols, len_q, len_k, 128)
    alive = tl.max(tl.max((seen != 0).to(tl.int32), 2), 0)  # [M]
    where = live + bh.to(tl.int64) * len_q + rows
    tl.store(where, alive, mask=rows < len_q)


def live_rows(
    mask: MaskArgs, bounds: list[int], planes: tuple[int, int], len_q: int, len_k: int
) -> torch.Tensor:
    """Which rows see anything: int32 [B|1, H|1, Lq], for masks with words or key words.

    (Not one byte each: Triton takes the narrowest load behind a product for its operands' width.)

    mask: without live. planes: (B|1, H|1), over which batches and heads it differs.
    """
    words = mask.keys if mask.words is None else mask.words
    live = torch.empty(*planes, len_q, dtype=torch.int32, device=words.device)
    grid = (planes[0] * planes[1] * triton.cdiv(len_q, LIVE_ROWS),)
    if grid[0]:
        live_rows_kernel[grid](
            mask,
            live,
            *bounds,
            planes[1],
            len_q,
            len_k,
            ROWS=LIVE_ROWS,
            CHUNK=CHUNK,
        )
    return live


# -- tile lists -----------------------------------------------------------------------------------


@triton.jit(
    do_not_specialize=["start", "end", "left", "right", "q_start", "q_end", "len_q", "len_k"]
)
def classify_kernel(
    mask,  # MaskArgs
    classes,  # uint8 [B|1, heads, row blocks, column blocks], written
    start,
    end,
    left,
    right,
    q_start,
    q_end,
    heads,
    len_q,
    len_k,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row_blocks, col_blocks = tl.cdiv(len_q, BLOCK_M), tl.cdiv(len_k, BLOCK_N)
    chunks = tl.cdiv(col_blocks, CHUNK)
    chunk, row_block = tl.program_id(0) % chunks, tl.program_id(0) // chunks % row_blocks
    bh = tl.program_id(0) // chunks // row_blocks
    b, h = bh // heads, bh % heads
    rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    blocks = chunk * CHUNK + tl.arange(0, CHUNK)
    first = blocks * BLOCK_N  # [C]
    bounds = load_bounds(mask, b, start, end, left, right, q_start, q_end, len_q, len_k)
    lo, hi = row_intervals(rows, mask, b, h, bounds, len_q)  # [M]

    # (some pair visible, every row that sees anything sees the whole tile)
    if mask.words is not None or mask.keys is not None:
        words = words_of(mask, b, h)
        word = packed_tiles(mask, words, b, rows, lo, hi, first, len_q, len_k, BLOCK_N)
        every = tl.full([], -1, tl.int32) if BLOCK_N == 128 else (1 << (BLOCK_N // 4)) - 1
        some = tl.max((word != 0).to(tl.int32), 2)  # [C, M]
        whole = tl.min((word == every).to(tl.int32), 2)
    else:
        left_of, right_of = first[:, None], first[:, None] + BLOCK_N
        alive = lo < hi
        some = (alive & (lo < right_of) & (hi > left_of)).to(tl.int32)
        whole = ((lo <= left_of) & (hi >= right_of)).to(tl.int32)
    whole |= (lo >= hi).to(tl.int32)[None, :]
    found = tl.max(some, 1)  # [C]
    found += found * tl.min(whole, 1)
    where = classes + (bh.to(tl.int64) * row_blocks + row_block) * col_blocks + blocks
    tl.store(where, found.to(tl.uint8), mask=blocks < col_blocks)


@triton.jit(do_not_specialize=["blocks", "across", "step", "step_across"])
def compact_kernel(
    classes,  # uint8 [heads, row blocks, column blocks]
    counts,  # int32 [heads, blocks, 2]
    lists,  # int32 [heads, blocks, 2, across]
    blocks,
    across,
    step,  # elements from one block to the next in classes, and to the next block across
    step_across,
    CHUNK: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    classes += pid // blocks * blocks * across + pid % blocks * step
    partial_list = lists + pid * 2 * across
    full_list = partial_list + across
    partial_count = tl.full([], 0, tl.int32)
    full_count = tl.full([], 0, tl.int32)
    for first in range(0, across, CHUNK):
        others = first + tl.arange(0, CHUNK)
        found = tl.load(classes + others.to(tl.int64) * step_across, mask=others < across, other=0)
        partial, full = (found == 1).to(tl.int32), (found == 2).to(tl.int32)
        place = partial_count + tl.cumsum(partial, 0) - 1
        tl.store(partial_list + place, others, mask=partial != 0)
        place = full_count + tl.cumsum(full, 0) - 1
        tl.store(full_list + place, others, mask=full != 0)
        partial_count += tl.sum(partial, 0)
        full_count += tl.sum(full, 0)
    tl.store(counts + pid * 2, partial_count)
    tl.store(counts + pid * 2 + 1, full_count)


def build_lists(
    mask: MaskArgs,
    bounds: list[int],
    planes: tuple[int, int],
    len_q: int,
    len_k: int,
    block_m: int,
    block_n: int,
    transposed: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lists for tiles of block_m x block_n of any mask.

    planes: (B|1, H|1), over which batches and heads the mask differs. -> counts int32 [B|1, H|1,
    blocks, 2] (partial, full) and blocks int32 [B|1, H|1, blocks, 2, most], ascending. blocks runs
    over row blocks, or over column blocks where transposed. Entries past a count are not written.
    """
    assert block_n <= WORD_COLUMNS.value and block_m <= WORD_COLUMNS.value
    row_blocks, col_blocks = triton.cdiv(len_q, block_m), triton.cdiv(len_k, block_n)
    blocks, across = (col_blocks, row_blocks) if transposed else (row_blocks, col_blocks)
    device = next(t.device for t in mask if isinstance(t, torch.Tensor))
    classes = torch.empty(*planes, row_blocks, col_blocks, dtype=torch.uint8, device=device)
    counts = torch.empty(*planes, blocks, 2, dtype=torch.int32, device=device)
    lists = torch.empty(*planes, blocks, 2, across, dtype=torch.int32, device=device)
    heads = planes[0] * planes[1]
    grid = (heads * row_blocks * triton.cdiv(col_blocks, CHUNK),)
    if grid[0]:
        classify_kernel[grid](
            mask,
            classes,
            *bounds,
            planes[1],
            len_q,
            len_k,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            CHUNK=CHUNK,
        )
    if heads * blocks:
        steps = (1, col_blocks) if transposed else (col_blocks, 1)
        compact_kernel[(heads * blocks,)](
            classes, counts, lists, blocks, across, *steps, CHUNK=COMPACT
        )
    return counts, lists
