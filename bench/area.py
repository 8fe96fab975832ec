"""What a mask leaves: visible pairs, and the tiles that hold them, counted exactly.

Counted from the definition of a mask, `tilemask.masks.visible`, a few row blocks at a time; where
intervals say it all, from the ends of the intervals, which costs O(L) and not O(L²).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from tilemask import masks

CHUNK = 1 << 25  # pairs looked at in one go


@dataclass(frozen=True)
class Area:
    """Counts over all batches and query heads.

    rows: rows that see something. keys: keys that some row sees, over batches alone. bits: pairs
    that a kernel must be told of one by one: those of partial tiles, each plane that heads or
    batches share counted once; 0 where intervals and key bits say it all.
    """

    pairs: int
    total: int
    rows: int
    keys: int
    tile: tuple[int, int]
    empty: int
    partial: int
    full: int
    bits: int

    @property
    def visited(self) -> float:
        """Share of the tiles that is visited."""
        return (self.partial + self.full) / max(1, self.empty + self.partial + self.full)


def count(mask: masks.Mask | None, B: int, H: int, Lq: int, Lk: int, tile, device="cpu") -> Area:
    """The area of ``mask`` (None = everything visible) in tiles of (rows, columns).

    Full: every column of the tile exists, and each of its rows that sees anything at all sees all
    of them. Empty: nothing is visible. Partial: the rest.
    """
    mask = masks.padding(Lk) if mask is None else mask
    if mask.bits(B, H, Lq, Lk, device) is None and mask.key_bits(B, Lk, device) is None:
        return of_intervals(mask, B, H, Lq, Lk, tile, device)
    return of_pairs(mask, B, H, Lq, Lk, tile, device)


def seen_rows(mask: masks.Mask, B, H, Lq, Lk, step: int, device) -> Iterator[tuple[int, Tensor]]:
    """(first, bool [B|1, H|1, <= step, Lk]) for all rows: what ``Mask.to_dense`` holds, in
    pieces."""
    lo, hi = mask.interval(masks.Rows(Lq, Lk, B, device, H))
    key_bits, bits = mask.key_bits(B, Lk, device), mask.bits(B, H, Lq, Lk, device)
    cols = torch.arange(Lk, device=device)
    for first in range(0, Lq, step):
        rows = slice(first, first + step)
        part = None if bits is None else bits.rows(first, step)
        yield first, masks.visible(lo[..., rows], hi[..., rows], key_bits, part, cols)


def of_pairs(mask, B: int, H: int, Lq: int, Lk: int, tile, device) -> Area:
    block_m, block_n = tile
    columns = -(-Lk // block_n)
    step = max(1, CHUNK // max(1, B * H * Lk * block_m)) * block_m
    pairs = rows = partial = full = bits = 0
    has_bits = mask.bits(B, H, Lq, Lk, device) is not None
    keys = torch.zeros(1, Lk, dtype=torch.bool, device=device)
    for _, seen in seen_rows(mask, B, H, Lq, Lk, step, device):
        repeats = (B // seen.shape[0]) * (H // seen.shape[1]) if seen.numel() else 0
        alive = seen.any(-1, keepdim=True)
        pairs += int(seen.sum()) * repeats
        rows += int(alive.sum()) * repeats
        keys = keys | seen.any(2).any(1)
        short = (0, columns * block_n - Lk, 0, -seen.shape[2] % block_m)
        some = pad(seen, short).unflatten(3, (columns, block_n)).unflatten(2, (-1, block_m))
        # rows past the end see nothing, and count as full like all rows that see nothing
        whole = pad(seen | ~alive, short[:2])
        whole = pad(whole, (0, 0, *short[2:]), value=True)
        whole = whole.unflatten(3, (columns, block_n)).unflatten(2, (-1, block_m))
        visited = some.any(-1).any(3)
        complete = visited & whole.all(-1).all(3)
        mixed = int((visited & ~complete).sum())
        full += int(complete.sum()) * repeats
        partial += mixed * repeats
        bits += mixed * block_m * block_n if has_bits else 0
    tiles = B * H * -(-Lq // block_m) * columns
    return Area(
        pairs,
        B * H * Lq * Lk,
        rows,
        int(keys.sum()) * (B // max(1, keys.shape[0])),
        (block_m, block_n),
        tiles - partial - full,
        partial,
        full,
        bits,
    )


def of_intervals(mask, B: int, H: int, Lq: int, Lk: int, tile, device) -> Area:
    block_m, block_n = tile
    blocks, columns = -(-Lq // block_m), -(-Lk // block_n)
    lo, hi = mask.interval(masks.Rows(Lq, Lk, B, device, H))
    repeats = (B // max(1, lo.shape[0])) * (H // max(1, lo.shape[1]))
    alive = hi > lo
    lo, hi = (pad(t, (0, blocks * block_m - Lq)).unflatten(2, (blocks, block_m)) for t in (lo, hi))
    some = covered(lo // block_n, (hi + block_n - 1) // block_n, columns) > 0
    rows_alive = (hi > lo).sum(-1, keepdim=True)
    whole = covered((lo + block_n - 1) // block_n, hi // block_n, columns) == rows_alive
    full = int((some & whole).sum()) * repeats
    partial = int((some & ~whole).sum()) * repeats
    by_batch = (t.flatten(1)[:, None] for t in (lo, hi))
    keys = (covered(*by_batch, Lk) > 0).sum()
    return Area(
        int((hi - lo).sum()) * repeats,
        B * H * Lq * Lk,
        int(alive.sum()) * repeats,
        int(keys) * (B // max(1, lo.shape[0])),
        (block_m, block_n),
        B * H * blocks * columns - partial - full,
        partial,
        full,
        0,
    )


def covered(first: Tensor, end: Tensor, size: int) -> Tensor:
    """How many of the ranges [first, end) along the last dimension hold each place < size."""
    weight = (end > first).to(torch.int32)
    changes = torch.zeros(*first.shape[:-1], size + 1, dtype=torch.int32, device=first.device)
    changes.scatter_add_(-1, first.clamp(0, size), weight)
    changes.scatter_add_(-1, end.clamp(0, size), -weight)
    return changes.cumsum(-1)[..., :-1]
