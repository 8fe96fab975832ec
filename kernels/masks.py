"""The mask in the kernels: which columns a row sees, which tiles to visit, and the select itself.

A row's mask is an interval of columns, ``lo <= j < hi``. Affine masks compute it from six integers
per batch (start, end, left, right, q_start, q_end: see tilemask.masks.Bounds), explicit masks load
it. ``visible`` is the definition; the two selects below it apply it to a tile of scores.

Tiles of BLOCK_M rows x BLOCK_N columns fall into three classes:

    columns ->                      .  empty: never visited, its K and V are never loaded
    # # / . . .                     /  partial: the interval is applied in registers
    # # # / . .    causal           #  full: every row that sees anything sees all columns;
    # # # # / .                        a loop without mask code

A row that sees nothing counts neither against full nor towards any bound; the kernels zero it at
the end. Affine masks give the visited blocks of a row block (or of a column block, for dK and dV)
in closed form; explicit ones read lists that kernels/pack.py built.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl


class MaskArgs(NamedTuple):
    """What a kernel is given of a mask, as one argument. Pointers that do not apply are None."""

    bounds: torch.Tensor | None  # int32 [B, 6], bounds that differ by batch
    lo: torch.Tensor | None  # int32 [B|1, H|1, Lq], with hi: explicit intervals
    hi: torch.Tensor | None
    batch_step: int  # heads of lo and hi from one batch to the next, 0 where they repeat
    head_step: int  # 1, or 0 where they repeat over heads


class ListArgs(NamedTuple):
    """Lists of visited blocks (kernels/pack.py), as one argument; all None for affine masks.

    Batches and heads as in lo and hi. ``most`` is the number of blocks across.
    """

    counts: torch.Tensor | None  # int32 [B|1, H|1, blocks, 2]: how many partial, how many full
    blocks: torch.Tensor | None  # int32 [B|1, H|1, blocks, 2, most]


@triton.jit
def mask_head(mask, b, h):
    """Which of the mask's heads belongs to batch b and head h. 64 bits wide."""
    return b.to(tl.int64) * mask.batch_step + h * mask.head_step


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
def row_intervals(rows, mask, b, h, bounds, len_q):
    """(lo, hi) of rows [M]; both 0 for a row that sees nothing."""
    start, end, left, right, q_start, q_end = bounds
    if mask.lo is not None:
        offset = mask_head(mask, b, h) * len_q
        inside = rows < len_q
        lo = tl.load(mask.lo + offset + rows, mask=inside, other=0)  # [M]
        hi = tl.load(mask.hi + offset + rows, mask=inside, other=0)
    else:
        lo = tl.maximum(rows + left, start)
        hi = tl.minimum(rows + right, end)
        alive = (rows >= q_start) & (rows < q_end) & (lo < hi)
        lo = tl.where(alive, lo, 0)
        hi = tl.where(alive, hi, 0)
    return lo, hi


@triton.jit
def column_intervals(cols, bounds):
    """(first, last) rows that see cols [N] under affine bounds; both 0 where none does."""
    start, end, left, right, q_start, q_end = bounds
    first = tl.maximum(cols - right + 1, q_start)
    last = tl.minimum(cols - left + 1, q_end)
    seen = (cols >= start) & (cols < end) & (first < last)
    return tl.where(seen, first, 0), tl.where(seen, last, 0)


@triton.jit
def live_columns(cols, bounds):
    """Which cols [N] padding leaves in; the others are never read."""
    start, end, _, _, _, _ = bounds
    return (cols >= start) & (cols < end)


@triton.jit
def live_rows(rows, bounds):
    """Which rows [M] lie in the query range; the others are never read."""
    _, _, _, _, q_start, q_end = bounds
    return (rows >= q_start) & (rows < q_end)


# -- applying the mask to a tile ------------------------------------------------------------------


@triton.jit
def visible(lo, hi, cols):
    """The definition: a row with the interval [lo, hi) sees column cols. The rest derives from
    it."""
    return (lo <= cols) & (cols < hi)


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
def interval_words(lo, hi, first_col, BLOCK_N: tl.constexpr):
    """``visible`` of a tile, packed: int32 [M, 1, 4, 1] from lo, hi [M].

    Bit t + 2a of word l is column 8a + 2l + t, the order in which mma.m16n8k16 and wgmma keep
    accumulators: a thread needs one word per row, and only bits that are constants to it.
    """
    lane = tl.arange(0, 4)[None, None, :, None]
    lo = tl.minimum(tl.maximum(lo - first_col, 0), BLOCK_N)[:, None, None, None]
    hi = tl.minimum(tl.maximum(hi - first_col, 0), BLOCK_N)[:, None, None, None]
    return low_bits(bits_below(hi, lane)) & ~low_bits(bits_below(lo, lane))  # [M, 1, 4, 1]


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
def masked(tile, lo, hi, first_col, otherwise: tl.constexpr, PORTABLE: tl.constexpr):
    """tile [M, N] where visible, else ``otherwise``. lo, hi [M] are its rows' intervals.

    Under affine bounds columns see intervals of rows too, so dK and dV use it with both exchanged.
    PORTABLE is for Triton's interpreter, which refuses inline assembly.
    """
    BLOCK_M: tl.constexpr = tile.shape[0]
    BLOCK_N: tl.constexpr = tile.shape[1]
    A8: tl.constexpr = BLOCK_N // 8
    word = interval_words(lo, hi, first_col, BLOCK_N)
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
        return tl.where(visible(lo[None, :], hi[None, :], cols[:, None]), tile, 0.0)
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
    mask,
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
        return listed(lists, mask_head(mask, b, h) * row_blocks + row_block, col_blocks)
    else:
        return counted(column_ranges(row_block * BLOCK_M, bounds, BLOCK_M, BLOCK_N))


@triton.jit
def rows_to_visit(
    col_block,
    row_blocks,
    col_blocks,
    mask,
    lists,
    b,
    h,
    bounds,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """As columns_to_visit, for the row blocks of a column block."""
    if lists.counts is not None:
        return listed(lists, mask_head(mask, b, h) * col_blocks + col_block, row_blocks)
    else:
        return counted(row_ranges(col_block * BLOCK_N, bounds, BLOCK_M, BLOCK_N))


@triton.jit
def listed(lists, entry, most):
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
