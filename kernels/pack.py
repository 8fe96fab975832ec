"""Tile lists: which column blocks a row block visits, and the transposed lists for dK and dV.

One program per row block (or column block) compares the rows' intervals with every block across,
classifies the tile and compacts the visited blocks into two ascending lists, partial and full. No
host synchronisation: the lists have their largest size and the counts stay on the device. The work
is Lq times the number of column blocks, in comparisons; 4 bytes are read per row and block across.
"""

import torch
import triton
import triton.language as tl

from .masks import ListArgs

CHUNK = 16  # blocks across that a program classifies at a time: [CHUNK, M] stays in registers


@triton.jit
def classify(lo, hi, first_col, BLOCK_N: tl.constexpr):
    """(some pair visible, every live row sees the whole tile) for each row and tile,
    elementwise."""
    alive = lo < hi
    some = alive & (lo < first_col + BLOCK_N) & (hi > first_col)
    whole = (lo <= first_col) & (hi >= first_col + BLOCK_N)
    return some, whole | (lo >= hi)


@triton.jit(do_not_specialize=["len_q", "blocks", "across"])
def build_lists_kernel(
    lo_ptr,
    hi_ptr,
    counts_ptr,
    blocks_ptr,  # [BH, Lq] x 2, [BH, blocks, 2], [BH, blocks, 2, across]
    len_q,
    blocks,
    across,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    bh, block = pid // blocks, pid % blocks
    lo_ptr += bh * len_q
    hi_ptr += bh * len_q
    partial_ptr = blocks_ptr + pid * 2 * across
    full_ptr = partial_ptr + across
    partial_count = tl.full([], 0, tl.int32)
    full_count = tl.full([], 0, tl.int32)

    for first in range(0, across, CHUNK):
        others = first + tl.arange(0, CHUNK)  # [C] blocks across
        row_block = others[:, None] if TRANSPOSED else block
        col_block = block if TRANSPOSED else others[:, None]
        rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]  # [C, M] or [1, M]
        lo = tl.load(lo_ptr + rows, mask=rows < len_q, other=0)
        hi = tl.load(hi_ptr + rows, mask=rows < len_q, other=0)
        some, whole = classify(lo, hi, col_block * BLOCK_N, BLOCK_N)  # [C, M]
        visited = (tl.max(some.to(tl.int32), 1) > 0) & (others < across)  # [C]
        full = visited & (tl.min(whole.to(tl.int32), 1) > 0)
        partial = visited & (full == 0)

        place = partial_count + tl.cumsum(partial.to(tl.int32), 0) - 1
        tl.store(partial_ptr + place, others, mask=partial)
        place = full_count + tl.cumsum(full.to(tl.int32), 0) - 1
        tl.store(full_ptr + place, others, mask=full)
        partial_count += tl.sum(partial.to(tl.int32), 0)
        full_count += tl.sum(full.to(tl.int32), 0)

    tl.store(counts_ptr + pid * 2, partial_count)
    tl.store(counts_ptr + pid * 2 + 1, full_count)


def build_lists(
    lo: torch.Tensor, hi: torch.Tensor, len_k: int, block_m: int, block_n: int, transposed: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lists for tiles of block_m x block_n from lo, hi int32 [B|1, H|1, Lq].

    -> counts int32 [B|1, H|1, blocks, 2] (partial, full) and blocks int32 [B|1, H|1, blocks, 2,
    most]. blocks runs over row blocks, or over column blocks where transposed. Entries past a count
    are not written.
    """
    batch, heads, len_q = lo.shape
    row_blocks, col_blocks = triton.cdiv(len_q, block_m), triton.cdiv(len_k, block_n)
    blocks, across = (col_blocks, row_blocks) if transposed else (row_blocks, col_blocks)
    counts = torch.empty(batch, heads, blocks, 2, dtype=torch.int32, device=lo.device)
    lists = torch.empty(batch, heads, blocks, 2, across, dtype=torch.int32, device=lo.device)
    grid = (batch * heads * blocks,)
    if grid[0]:
        build_lists_kernel[grid](
            lo,
            hi,
            counts,
            lists,
            len_q,
            blocks,
            across,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            CHUNK=CHUNK,
            TRANSPOSED=transposed,
        )
    return counts, lists


def list_args(lists: tuple[torch.Tensor, torch.Tensor] | None) -> ListArgs:
    """Lists as the kernels take them."""
    return ListArgs(None, None) if lists is None else ListArgs(*lists)
