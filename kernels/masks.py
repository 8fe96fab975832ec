"""The mask in the kernels: which columns a row sees, which tiles to visit, and the select itself.

A row sees the columns of an interval, ``lo <= j < hi``, that its bits let through. Affine masks
compute the interval from six integers per batch (start, end, left, right, q_start, q_end: see
tilemask.masks.Bounds), explicit masks load it. Bits are packed: one plane for (row, key) pairs, one
for keys alone (kernels/pack.py). ``visible`` is the definition; the selects below it apply it to a
tile of scores.

Tiles of BLOCK_M rows x BLOCK_N columns fall into three classes:

    columns ->                      .  empty: never visited, its K and V are never loaded
    # # / . . .                     /  partial: the mask is applied in registers
    # # # / . .    causal           #  full: every row that sees anything sees all columns;
    # # # # / .                        a loop without mask code

A row that sees nothing counts neither against full nor towards any bound; the kernels zero it at
the end. Affine masks give the visited blocks of a row block (or of a column block, for dK and dV)
in closed form; all others read lists that kernels/pack.py built.

Words. 32 bits say for one row, or one column, which positions of 128 it meets: bit t + 2a of word l
(0 <= l < 4) is position 8a + 2l + t. That is the order in which mma.m16n8k16 and wgmma keep
accumulators, so a thread needs one word per row, and of it only bits that are constants to it. A
tile of fewer than 128 columns uses part of each word.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

WORD_COLUMNS: tl.constexpr = tl.constexpr(128)  # positions that four words hold


FAR: tl.constexpr = tl.constexpr(1 << 30)  # beyond every length; sums of two still fit in int32


class MaskArgs(NamedTuple):
    """What a kernel is given of a mask, as one argument. What does not apply is None.

    Steps are in elements, 0 where a dimension repeats; those of lo, hi and live count rows of
    length Lq. ``split`` is B2 where B = B1 * B2 are two batch dimensions.
    """

    bounds: torch.Tensor | None = None  # int32 [B, 6], bounds that differ by batch
    lo: torch.Tensor | None = None  # int32 [B|1, H|1, Lq], with hi: explicit intervals
    hi: torch.Tensor | None = None
    lo_batch: int | None = None
    lo_head: int | None = None
    live: torch.Tensor | None = (
        None  # int32 [B|1, H|1, Lq], 1 for rows that see anything: with bits
    )
    live_batch: int | None = None
    live_head: int | None = None
    words: torch.Tensor | None = None  # int32 [B1|1, B2|1, H|1, groups, L|1, 4]: bits per pair
    words_outer: int | None = None
    words_inner: int | None = None
    words_split: int | None = None
    words_head: int | None = None
    words_group: int | None = None
    words_line: int | None = None
    keys: torch.Tensor | None = None  # int32 [B|1, groups, 4]: key bits
    keys_batch: int | None = None


class ListArgs(NamedTuple):
    """Lists of visited blocks (kernels/pack.py), as one argument; all None for affine masks."""

    counts: torch.Tensor | None = None  # int32 [B|1, H|1, blocks, 2]: how many partial and full
    blocks: torch.Tensor | None = None  # int32 [B|1, H|1, blocks, 2, blocks across]
    batch: int | None = None  # heads from one batch to the next, 0 where they repeat
    head: int | None = None


@triton.jit
def load_bounds(mask, b, start, end, left, right, q_start, q_end, len_q, len_k):
    """The six bounds of batch b as a tuple, start to q_end inside the lengths."""
    if mask.bounds is not None:
        row = mask.bounds + b * 6
        start, end = tl.load(row), tl.load(row + 1)
        left, right = tl.load(row + 2), tl.load(row + 3)
        q_start, q_end = tl.load(row + 4), tl.load(row + 5)
    start, end = tl.maximum(start, 0), tl.minimum(end, len_k)
    q_start, q_end = tl.maximum(q_start, 0), tl.minimum(q_end, len_q)
    return start, end, left, right, q_start, q_end


@triton.jit
def same_rows(bounds, rows):
    """Bounds under which each of ``rows`` rows sees what row 0 does."""
    start, end, left, right, q_start, q_end = bounds
    start, end = tl.maximum(start, left), tl.minimum(end, right)
    last = tl.where((q_start == 0) & (q_end > 0), rows, 0)
    return start, end, -FAR, FAR, 0, last


@triton.jit
def row_intervals(rows, mask, b, h, bounds, len_q):
    """(lo, hi) of rows [M]; both 0 for a row that sees nothing."""
    start, end, left, right, q_start, q_end = bounds
    inside = rows < len_q
    if mask.lo is not None:
        offset = (b.to(tl.int64) * mask.lo_batch + h * mask.lo_head) * len_q
        lo = tl.load(mask.lo + offset + rows, mask=inside, other=0)  # [M]
        hi = tl.load(mask.hi + offset + rows, mask=inside, other=0)
        alive = lo < hi
    else:
        lo = tl.maximum(rows + left, start)
        hi = tl.minimum(rows + right, end)
        alive = (rows >= q_start) & (rows < q_end) & (lo < hi)
    if mask.live is not None:
        offset = (b.to(tl.int64) * mask.live_batch + h * mask.live_head) * len_q
        alive = alive & (tl.load(mask.live + offset + rows, mask=inside, other=0) != 0)
    return tl.where(alive, lo, 0), tl.where(alive, hi, 0)


@triton.jit
def column_intervals(cols, bounds):
    """(first, last) rows that see cols [N] under affine bounds; both 0 where none does."""
    start, end, left, right, q_start, q_end = bounds
    first = tl.maximum(cols - right + 1, q_start)
    last = tl.minimum(cols - left + 1, q_end)
    seen = (cols >= start) & (cols < end) & (first < last)
    return tl.where(seen, first, 0), tl.where(seen, last, 0)


@triton.jit
def live_columns(cols, mask, b, bounds):
    """Which cols [N] padding leaves in; the others are never read."""
    start, end, _, _, _, _ = bounds
    alive = (cols >= start) & (cols < end)
    if mask.keys is not None:
        head = mask.keys + b.to(tl.int64) * mask.keys_batch
        word = tl.load(head + cols // 128 * 4 + cols % 8 // 2, mask=alive, other=0)
        alive = alive & ((word >> (cols % 128 // 8 * 2 + cols % 2)) & 1 != 0)
    return alive


@triton.jit
def live_rows(rows, bounds):
    """Which rows [M] lie in the query range; the others are never read."""
    _, _, _, _, q_start, q_end = bounds
    return (rows >= q_start) & (rows < q_end)


# -- applying the mask to a tile ------------------------------------------------------------------


@triton.jit
def visible(lo, hi, bits, cols):
    """The definition: a row with the interval [lo, hi) and ``bits`` for its columns sees column
    cols. The rest derives from it."""
    return (lo <= cols) & (cols < hi) & bits


@triton.jit
def bits_below(column, lane):
    """How many of the tile's columns 8a + 2*lane + t (t = 0, 1) lie below ``column``."""
    return 2 * (column >> 3) + tl.minimum(tl.maximum((column & 7) - 2 * lane, 0), 2)


@triton.jit
def low_bits(count):
    """The ``count`` lowest bits set, 0 <= count <= 32."""
    # shifting by the whole width is undefined, so it goes in two steps
    half = count >> 1
    return ~((tl.full(count.shape, -1, tl.int32) << half) << (count - half))


@triton.jit
def interval_bits(lo, hi, lane, BLOCK: tl.constexpr):
    """The words of intervals of a tile's BLOCK columns, elementwise; lo, hi count from its
    first."""
    lo = tl.minimum(tl.maximum(lo, 0), BLOCK)
    hi = tl.minimum(tl.maximum(hi, 0), BLOCK)
    return low_bits(bits_below(hi, lane)) & ~low_bits(bits_below(lo, lane))


@triton.jit
def words_of(mask, b, h):
    """Where the words of batch b and head h start; 0 if the mask has none."""
    if mask.words is not None:
        outer, inner = b // mask.words_split, b % mask.words_split
        start = outer.to(tl.int64) * mask.words_outer + inner.to(tl.int64) * mask.words_inner
        return mask.words + start + h.to(tl.int64) * mask.words_head
    else:
        return 0


@triton.jit
def line_words(mask, words, first_line, lines, first, BLOCK: tl.constexpr, LINES: tl.constexpr):
    """Packed bits of LINES rows from first_line against BLOCK columns from ``first``: int32
    [LINES, 1, 4, 1]; rows and columns exchanged where the words are the transposed ones.
    """
    lane = tl.arange(0, 4)[None, None, :, None]
    line = tl.arange(0, LINES)[:, None, None, None]
    start = words + (first // 128).to(tl.int64) * mask.words_group
    start += first_line.to(tl.int64) * mask.words_line
    word = tl.load(start + line * mask.words_line + lane, mask=line < lines - first_line, other=0)
    return word >> (first % 128 // 4) if BLOCK < 128 else word


@triton.jit
def key_words(mask, b, first_col, BLOCK_N: tl.constexpr):
    """Packed key bits of BLOCK_N columns: int32 [1, 1, 4, 1]."""
    lane = tl.arange(0, 4)[None, None, :, None]
    word = tl.load(mask.keys + b.to(tl.int64) * mask.keys_batch + first_col // 128 * 4 + lane)
    return word >> (first_col % 128 // 4) if BLOCK_N < 128 else word


@triton.jit
def tile_words(
    mask,
    words,
    b,
    lo,
    hi,
    first_row,
    first_col,
    len_q,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``visible`` of a tile, packed: int32 [M, 1, 4, 1]. lo, hi [M]: its rows' intervals; words:
    words_of its head."""
    lane = tl.arange(0, 4)[None, None, :, None]
    lo = (lo - first_col)[:, None, None, None]
    hi = (hi - first_col)[:, None, None, None]
    word = interval_bits(lo, hi, lane, BLOCK_N)
    if mask.words is not None:
        word &= line_words(mask, words, first_row, len_q, first_col, BLOCK_N, BLOCK_M)
    if mask.keys is not None:
        word &= key_words(mask, b, first_col, BLOCK_N)
    return word


@triton.jit
def tile_words_transposed(
    mask,
    words,
    cols,
    first_row,
    first_col,
    len_k,
    bounds,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``visible`` of a tile by column, packed: int32 [N, 1, 4, 1], less the key bits (dK and dV of
    a dead key are zeroed at the end) and explicit intervals (masked_transposed).
    """
    lane = tl.arange(0, 4)[None, None, :, None]
    if mask.lo is not None:
        word = line_words(mask, words, first_col, len_k, first_row, BLOCK_M, BLOCK_N)
    else:
        first, last = column_intervals(cols, bounds)  # [N]
        first = (first - first_row)[:, None, None, None]
        last = (last - first_row)[:, None, None, None]
        word = interval_bits(first, last, lane, BLOCK_M)
        if mask.words is not None:
            word &= line_words(mask, words, first_col, len_k, first_row, BLOCK_M, BLOCK_N)
    return word


@triton.jit
def select_bits(word, bit, value, otherwise: tl.constexpr):
    """value where word & bit, elementwise, opaque to the compiler.

    As plain code Triton 3.6 and 3.7 pack the predicates into vectors and unpack them again, two to
    three more instructions per element. otherwise is 0.0 or -inf.
    """
    if otherwise == 0.0:
        return tl.inline_asm_elementwise(
            "{ .reg .pred p; .reg .b32 t; and.b32 t, $1, $2; setp.ne.b32 p, t, 0;"
            " selp.f32 $0, $3, 0f00000000, p; }",
            "=f,r,r,f",
            [word, bit, value],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .pred p; .reg .b32 t; and.b32 t, $1, $2; setp.ne.b32 p, t, 0;"
            " selp.f32 $0, $3, 0fFF800000, p; }",
            "=f,r,r,f",
            [word, bit, value],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )


@triton.jit
def masked(tile, word, otherwise: tl.constexpr, PORTABLE: tl.constexpr):
    """tile [M, N] where the words [M, 1, 4, 1] of its rows have a bit, else ``otherwise``.

    PORTABLE is for Triton's interpreter, which refuses inline assembly.
    """
    BLOCK_M: tl.constexpr = tile.shape[0]
    BLOCK_N: tl.constexpr = tile.shape[1]
    A8: tl.constexpr = BLOCK_N // 8
    place = 2 * tl.arange(0, A8)[None, :, None, None] + tl.arange(0, 2)[None, None, None, :]
    word = tl.reshape(tl.broadcast_to(word, [BLOCK_M, A8, 4, 2]), [BLOCK_M, BLOCK_N])
    bit = tl.reshape(tl.broadcast_to(1 << place, [1, A8, 4, 2]), [1, BLOCK_N])
    if PORTABLE:
        return tl.where((word & bit) != 0, tile, otherwise)
    else:
        return select_bits(word, bit, tile, otherwise)


@triton.jit
def masked_transposed(tile, lo, hi, cols, PORTABLE: tl.constexpr):
    """tile [N, M] where visible, else 0; lo, hi [M] belong to its columns.

    Here every element of a thread has another interval, so a packed word would serve too few of
    them: one unsigned comparison, col - lo < hi - lo, costs less. ``visible`` for lo <= hi.
    """
    if PORTABLE:
        return tl.where(visible(lo[None, :], hi[None, :], True, cols[:, None]), tile, 0.0)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .pred p; .reg .b32 t; sub.u32 t, $1, $2; setp.lt.u32 p, t, $3;"
            " selp.f32 $0, $4, 0f00000000, p; }",
            "=f,r,r,r,f",
            [cols[:, None], lo[None, :], (hi - lo)[None, :], tile],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )


# -- which tiles to visit -------------------------------------------------------------------------


@triton.jit
def live_range(start, end, left, right, q_start, q_end):
    """The rows that see anything, [first, last), last <= first if none does."""
    first = tl.maximum(q_start, start - right + 1)
    last = tl.minimum(q_end, end - left)
    nothing = (start >= end) | (left >= right)
    return first, tl.where(nothing, first, last)


@triton.jit
def column_ranges(first_row, bounds, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Column blocks of a row block under affine bounds: (first, first_full, last_full, last).

    Blocks in [first, last) are visited, those in [first_full, last_full) are full. The union of the
    rows' intervals is contiguous because lo and hi grow by at most one per row.
    """
    start, end, left, right, q_start, q_end = bounds
    live_first, live_last = live_range(start, end, left, right, q_start, q_end)
    row = tl.maximum(first_row, live_first)
    last_row = tl.minimum(first_row + BLOCK_M, live_last) - 1
    first = tl.maximum(start, row + left) // BLOCK_N
    last = tl.cdiv(tl.minimum(end, last_row + right), BLOCK_N)
    first_full = tl.cdiv(tl.maximum(start, last_row + left), BLOCK_N)
    last_full = tl.minimum(end, row + right) // BLOCK_N
    return ordered_ranges(row > last_row, first, first_full, last_full, last)


@triton.jit
def row_ranges(first_col, bounds, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Row blocks of a column block under affine bounds, as column_ranges.

    Column j is seen by the rows max(q_start, j - right + 1) <= i < min(q_end, j - left + 1): the
    same form with rows and columns exchanged. Rows that see nothing do not count against full,
    columns do.
    """
    start, end, left, right, q_start, q_end = bounds
    live_first, live_last = live_range(start, end, left, right, q_start, q_end)
    col_first, col_last = live_range(q_start, q_end, 1 - right, 1 - left, start, end)
    col = tl.maximum(first_col, col_first)
    last_col = tl.minimum(first_col + BLOCK_N, col_last) - 1
    first = tl.maximum(q_start, col - right + 1) // BLOCK_M
    last = tl.cdiv(tl.minimum(q_end, last_col - left + 1), BLOCK_M)
    # rows that see all BLOCK_N columns, widened over the dead rows on both sides
    row_first = first_col + BLOCK_N - right
    row_last = first_col - left + 1
    first_full = tl.where(row_first <= live_first, first, tl.cdiv(row_first, BLOCK_M))
    last_full = tl.where(row_last >= live_last, last, row_last // BLOCK_M)
    outside = (first_col < start) | (first_col + BLOCK_N > end)
    last_full = tl.where(outside, first, last_full)
    return ordered_ranges(col > last_col, first, first_full, last_full, last)


@triton.jit
def ordered_ranges(nothing, first, first_full, last_full, last):
    """first <= first_full <= last_full <= last, all 0 if there is nothing to visit."""
    first = tl.where(nothing, 0, first)
    last = tl.where(nothing, 0, last)
    first_full = tl.minimum(tl.maximum(first_full, first), last)
    last_full = tl.minimum(tl.maximum(last_full, first_full), last)
    return first, first_full, last_full, last


@triton.jit
def columns_to_visit(
    row_block,
    row_blocks,
    col_blocks,
    lists,
    b,
    h,
    bounds,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(partial, full, partial_at, full_at) of a row block: how many blocks of each class to visit,
    and what visited_block needs to find them: block numbers, or pointers into lists.
    """
    if lists.counts is not None:
        return listed(lists, b, h, row_blocks, row_block, col_blocks)
    else:
        return counted(column_ranges(row_block * BLOCK_M, bounds, BLOCK_M, BLOCK_N))


@triton.jit
def rows_to_visit(
    col_block,
    row_blocks,
    col_blocks,
    lists,
    b,
    h,
    bounds,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """As columns_to_visit, for the row blocks of a column block."""
    if lists.counts is not None:
        return listed(lists, b, h, col_blocks, col_block, row_blocks)
    else:
        return counted(row_ranges(col_block * BLOCK_N, bounds, BLOCK_M, BLOCK_N))


@triton.jit
def listed(lists, b, h, blocks, block, most):
    entry = (b.to(tl.int64) * lists.batch + h * lists.head) * blocks + block
    partial = tl.load(lists.counts + entry * 2)
    full = tl.load(lists.counts + entry * 2 + 1)
    first = lists.blocks + entry * 2 * most
    return partial, full, first, first + most


@triton.jit
def counted(ranges):
    first, first_full, last_full, last = ranges
    full = last_full - first_full
    return last - first - full, full, first, first_full


@triton.jit
def share_of(partial, full, part, parts):
    """(first, last, first_full, last_full): the tiles of one of ``parts`` equal shares, in both
    classes, partial tiles first."""
    total = partial + full
    first, last = total * part // parts, total * (part + 1) // parts
    return (
        tl.minimum(first, partial),
        tl.minimum(last, partial),
        tl.maximum(first - partial, 0),
        tl.maximum(last - partial, 0),
    )


@triton.jit
def visited_block(t, lists, partial_at, full, full_at, PARTIAL: tl.constexpr):
    """The t-th block of a class to visit."""
    if lists.counts is not None:
        block = tl.load((partial_at if PARTIAL else full_at) + t)
    elif PARTIAL:  # partial blocks stand on both sides of the full ones
        block = partial_at + t
        block = tl.where(block < full_at, block, block + full)
    else:
        block = full_at + t
    return block


@triton.jit
def count_visit(visits, row_block, col_block, row_blocks, col_blocks, bh, PARTIAL: tl.constexpr):
    """Counter mode, for tests: add 1 to visits [B * H, rows of tiles, columns, 2] at the class."""
    if visits is not None:
        tile = (bh * row_blocks + row_block) * col_blocks + col_block
        tl.atomic_add(visits + tile * 2 + (0 if PARTIAL else 1), 1)
