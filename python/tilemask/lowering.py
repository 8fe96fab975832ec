"""From what a user says (a Mask) to what a kernel reads (a LoweredMask).

A mask lowers to the bounds of its affine part, to explicit row intervals where the bounds do not
say it all, and to key bits and pair bits where it is no interval. Everything is computed on the
device without a host synchronisation, in sizes that depend on shapes alone, so that CUDA graphs
capture it. Tile lists are built from the intervals for the tile shape of the kernel that runs, by
the backend, and kept here.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .masks import UNBOUNDED, Bounds, Mask, Rows, visible

TILE_SYMBOLS = "./#"  # empty, partial, full
EMPTY, PARTIAL, FULL = range(3)
MOST_KEPT = 16  # lowered forms kept per mask object: shapes, devices and versions it is used with


@dataclass
class LoweredMask:
    """A mask for given B, H, Lq and Lk.

    bounds: six ints (start, end, left, right, q_start, q_end), with every value inside the
    lengths; the truth where ``batch_bounds`` is None.
    batch_bounds: int32 [B, 6], the same per batch, or None.
    lo, hi: int32 [B|1, H|1, Lq], both 0 for a row that sees nothing; None where bounds say it all.
    key_bits: bool [B|1, 1, 1, Lk] or None. bits: bool [B|1, H|1, Lq|1, Lk|1] or None.
    """

    len_q: int
    len_k: int
    bounds: tuple[int, int, int, int, int, int]
    batch_bounds: Tensor | None = None
    lo: Tensor | None = None
    hi: Tensor | None = None
    key_bits: Tensor | None = None
    bits: Tensor | None = None
    lists: dict = field(default_factory=dict)  # of tile lists, filled by the backend

    @property
    def is_everything(self) -> bool:
        """Whether every row sees every key."""
        extra = (self.batch_bounds, self.lo, self.key_bits, self.bits)
        if any(part is not None for part in extra):
            return False
        return self.bounds == everything(self.len_q, self.len_k)

    @property
    def form(self) -> str:
        """How the mask was lowered, in words."""
        words = [
            "explicit row intervals" if self.lo is not None else "affine bounds",
            "per batch" if self.batch_bounds is not None else "",
            "key bits" if self.key_bits is not None else "",
            "bits per pair" if self.bits is not None else "",
        ]
        return ", ".join(word for word in words if word)

    def column(self, index: int) -> int | Tensor:
        """Bound number ``index``: an int, or int64 [B, 1, 1]."""
        if self.batch_bounds is None:
            return self.bounds[index]
        return self.batch_bounds[:, index].to(torch.int64).view(-1, 1, 1)

    def intervals(self, device) -> tuple[Tensor, Tensor]:
        """(lo, hi) [B|1, H|1, Lq] whatever the form."""
        if self.lo is not None:
            return self.lo, self.hi
        bounds = Bounds(*(self.column(i) for i in range(6)))
        return AffineMask(bounds).interval(Rows(self.len_q, self.len_k, 1, device))

    def live_keys(self, device) -> Tensor | None:
        """Bool [B|1, 1, Lk]: keys that padding leaves in; None if it leaves all."""
        cols = torch.arange(self.len_k, device=device).view(1, 1, -1)
        live = None
        if self.batch_bounds is not None or self.bounds[:2] != (0, self.len_k):
            live = (self.column(0) <= cols) & (cols < self.column(1))
        if self.key_bits is not None:
            live = self.key_bits[:, 0] if live is None else live & self.key_bits[:, 0]
        return live

    def live_rows(self, device) -> Tensor | None:
        """Bool [B|1, 1, Lq]: rows inside the query range; None if all are."""
        if self.batch_bounds is None and self.bounds[4:] == (0, self.len_q):
            return None
        rows = torch.arange(self.len_q, device=device).view(1, 1, -1)
        return (self.column(4) <= rows) & (rows < self.column(5))


@dataclass(frozen=True, eq=False)
class AffineMask(Mask):
    """The mask that bounds alone describe."""

    own: Bounds

    def bounds(self, rows):
        return self.own


def lower(mask: Mask | None, B: int, H: int, Lq: int, Lk: int, device) -> LoweredMask:
    """Lower ``mask`` (None = everything visible), or return what was kept from an earlier call.

    The lowered form is kept with the mask object while the tensors it was made from are unchanged,
    on the stream it was made on.
    """
    if mask is None:
        return LoweredMask(Lq, Lk, everything(Lq, Lk))
    kept = kept_forms(mask, device)
    key = None if kept is None else (B, H, Lq, Lk, device, *state_of(mask, device))
    if kept is not None and key in kept:
        return kept[key]
    lowered = lower_anew(mask, B, H, Lq, Lk, device)
    if kept is not None:
        if len(kept) >= MOST_KEPT:
            kept.clear()
        kept[key] = lowered
    return lowered


def everything(len_q: int, len_k: int) -> tuple[int, int, int, int, int, int]:
    """The bounds under which every row sees every key."""
    return 0, len_k, -UNBOUNDED, UNBOUNDED, 0, len_q


def lower_anew(mask: Mask, B: int, H: int, Lq: int, Lk: int, device) -> LoweredMask:
    rows = Rows(Lq, Lk, B, device, H)
    bounds, batch_bounds = clamped(mask.bounds(rows), B, Lq, Lk)
    lo = hi = None
    explicit = mask.explicit(rows)
    if explicit is not None:
        lo, hi = (t.to(torch.int32).contiguous() for t in mask.interval(rows, explicit))
    return LoweredMask(
        Lq,
        Lk,
        bounds,
        batch_bounds,
        lo,
        hi,
        mask.key_bits(B, Lk, device),
        mask.bits(B, H, Lq, Lk, device),
    )


def clamped(bounds: Bounds, B: int, Lq: int, Lk: int):
    """Bounds inside the lengths: (six ints, None), or (six ints that hold for all, int32 [B,
    6])."""
    inside = bounds & Bounds(*everything(Lq, Lk))
    if not any(isinstance(value, Tensor) for value in inside):
        return tuple(inside), None
    device = next(value.device for value in inside if isinstance(value, Tensor))
    columns = [
        value.reshape(-1).expand(B)
        if isinstance(value, Tensor)
        else torch.full((B,), value, device=device)
        for value in inside
    ]
    return everything(Lq, Lk), torch.stack(columns, 1).to(torch.int32)


# -- keeping lowered forms ------------------------------------------------------------------------

_kept: weakref.WeakKeyDictionary[Mask, dict] = weakref.WeakKeyDictionary()


def kept_forms(mask: Mask, device) -> dict | None:
    """Where lowered forms of ``mask`` are kept; None where nothing may be kept.

    Nothing is kept while tracing, transforming or capturing a graph (tensors live in the graph),
    nor for inference tensors, whose changes cannot be seen.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return None
    if torch._C._functorch.maybe_current_level() is not None:
        return None
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return None
    if any(type(t) is not Tensor or t.is_inference() for t in mask.tensors()):
        return None
    return _kept.setdefault(mask, {})


def state_of(mask: Mask, device) -> tuple:
    """What must be unchanged for a kept form to be valid: the versions of the mask's tensors, the
    stream, and inference mode, whose tensors autograd cannot save."""
    stream = torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0
    return (stream, torch.is_inference_mode_enabled(), *(t._version for t in mask.tensors()))


# -- tile classes ---------------------------------------------------------------------------------


def tile_classes(mask: Mask | None, B: int, H: int, Lq: int, Lk: int, tile, device=None) -> Tensor:
    """The class of every tile, by the definition: uint8 [B|1, H|1, rows of tiles, columns].

    Empty: no pair is visible. Full: all columns of the tile exist, and every row of it that sees
    anything at all (in any tile) sees all of them. Partial: the rest. Works through row blocks, so
    memory stays at one row block of the dense mask.
    """
    block_m, block_n = tile
    lowered = lower(mask, B, H, Lq, Lk, torch.device(device or "cpu"))
    lo, hi = lowered.intervals(device)
    cols = torch.arange(Lk, device=device)
    columns = -(-Lk // block_n)
    strips = []
    for first in range(0, Lq, block_m):
        rows = slice(first, first + block_m)
        bits = lowered.bits
        bits = bits[:, :, rows] if bits is not None and bits.shape[2] > 1 else bits
        seen = visible(lo[..., rows], hi[..., rows], lowered.key_bits, bits, cols)
        alive = seen.any(-1, keepdim=True)
        filled = torch.nn.functional.pad(seen | ~alive, (0, columns * block_n - Lk))
        some = torch.nn.functional.pad(seen, (0, columns * block_n - Lk))
        shape = (*seen.shape[:3], columns, block_n)
        any_seen = some.view(shape).any(-1).any(2)
        all_seen = filled.view(shape).all(-1).all(2)
        strips.append(torch.where(any_seen, 1 + all_seen.to(torch.uint8), 0).to(torch.uint8))
    if not strips:
        return torch.zeros(1, 1, 0, columns, dtype=torch.uint8, device=device)
    return torch.stack(strips, 2)


def picture(mask: Mask | None, B, H, Lq, Lk, tile, batch, head) -> str:
    """The text of Mask.picture."""
    classes = tile_classes(mask, B, H, Lq, Lk, tile)
    shown = classes[batch if classes.shape[0] > 1 else 0, head if classes.shape[1] > 1 else 0]
    lines = ["".join(TILE_SYMBOLS[c] for c in row) for row in shown.tolist()]
    counts = [int((shown == c).sum()) for c in (EMPTY, PARTIAL, FULL)]
    total = max(1, sum(counts))
    lines.append(
        f"{tile[0]} x {tile[1]} tiles: {counts[EMPTY]} empty, {counts[PARTIAL]} partial, "
        f"{counts[FULL]} full; {100 * (counts[PARTIAL] + counts[FULL]) / total:.0f} % visited"
    )
    return "\n".join(lines)
