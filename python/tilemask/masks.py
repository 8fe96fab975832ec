"""Masks: what a query may see, said in a few words and never stored as a matrix.

A mask answers one question: may query row ``i`` see key column ``j``, in batch ``b`` and head
``h``? Every mask gives up to four parts, and a pair is visible where all of them say so:

* bounds, a few integers per batch: ``start <= j < end``, ``i + left <= j < i + right`` and
  ``q_start <= i < q_end`` (causal, window, padding);
* explicit intervals, ``lo <= j < hi`` per row (documents, varlen, prefix-LM);
* key bits, one per key (padding with holes);
* pair bits, one per (row, key) pair (dense masks).

The first two make one interval per row, and intervals are closed under ``&``; that is what the
kernels live on. ``Mask.to_dense`` is the definition; nothing else in the Python package says what
visible means. Positions are global: row ``i`` and column ``j`` count from 0 in the tensors given to
``attention``. The constructors are at the end of this module.
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .lowering import LoweredMask

UNBOUNDED = 1 << 30  # beyond every length; sums of two still fit in int32


def check_values_of(tensor: Tensor) -> bool:
    """Whether checks that read a mask's values run: free on the CPU, a host sync on a GPU."""
    if torch.compiler.is_compiling() or type(tensor) is not Tensor:
        return False
    if torch._C._functorch.maybe_current_level() is not None:
        return False
    return tensor.device.type == "cpu" or os.environ.get("TILEMASK_DEBUG", "0") not in ("", "0")


class Bounds(NamedTuple):
    """The part of a mask that a few integers say.

    Each field is an int or an int tensor that broadcasts against the rows it is asked for.
    """

    start: int | Tensor = 0
    end: int | Tensor = UNBOUNDED
    left: int | Tensor = -UNBOUNDED
    right: int | Tensor = UNBOUNDED
    q_start: int | Tensor = 0
    q_end: int | Tensor = UNBOUNDED

    def __and__(self, other: Bounds) -> Bounds:
        return Bounds(
            start=larger(self.start, other.start),
            end=smaller(self.end, other.end),
            left=larger(self.left, other.left),
            right=smaller(self.right, other.right),
            q_start=larger(self.q_start, other.q_start),
            q_end=smaller(self.q_end, other.q_end),
        )


def larger(a, b):
    """max of two values, each an int or a tensor."""
    if isinstance(a, Tensor):
        return torch.maximum(a, b) if isinstance(b, Tensor) else a.clamp(min=b)
    return b.clamp(min=a) if isinstance(b, Tensor) else max(a, b)


def smaller(a, b):
    """min of two values, each an int or a tensor."""
    if isinstance(a, Tensor):
        return torch.minimum(a, b) if isinstance(b, Tensor) else a.clamp(max=b)
    return b.clamp(max=a) if isinstance(b, Tensor) else min(a, b)


class Rows:
    """The query rows a mask is asked about, and the lengths they live in.

    ``index`` holds positions, int64. For a whole batch it is [1, 1, Lq] and parameters with one
    value per batch broadcast along the first dimension. Inside sequences (``within``) it holds each
    row's position in its own sequence, ``sequence`` the number of that sequence, and the lengths
    are tensors of the same shape.
    """

    def __init__(self, len_q, len_k, batch, device, heads=None, index=None, sequence=None):
        self.len_q: int | Tensor = len_q
        self.len_k: int | Tensor = len_k
        self.batch = batch  # number of batches, or of sequences
        self.heads = heads  # None inside sequences
        self.device = device
        self.sequence: Tensor | None = sequence
        self._index: Tensor | None = index

    @property
    def index(self) -> Tensor:
        if self._index is None:  # affine masks never ask, so a causal call launches nothing for it
            self._index = torch.arange(self.len_q, device=self.device).view(1, 1, -1)
        return self._index

    def per_batch(self, value, name: str):
        """``value`` (an int, or an int tensor with one entry per batch) shaped to meet
        ``index``."""
        if not isinstance(value, Tensor):
            return value
        value = value.to(self.device, torch.int64)
        if value.numel() == 1:
            return value.reshape(1, 1, 1)
        if not repeats(value.numel(), self.batch):
            kind = "batch" if self.sequence is None else "sequence"
            raise ValueError(
                f"{name} has {value.numel()} entries, expected 1 or one per {kind} ({self.batch})"
            )
        return value.reshape(-1, 1, 1) if self.sequence is None else value[self.sequence]

    def outermost(self, name: str) -> Rows:
        """These rows, refused where a mask makes no sense inside another's sequences."""
        if self.sequence is not None:
            raise ValueError(f"{name} cannot be used as a `within` mask: sequences do not nest")
        return self


class PairBits:
    """One bool per (row, key) pair, for masks that are no interval; made for some rows at a time.

    shape: (B|1, H|1, Lq|1, Lk). rows(first, count): bool [B|1, H|1, count|1, Lk] of the rows from
    ``first``. view: the tensor that holds them as they are (HeldBits); None where they are
    computed.
    """

    view: Tensor | None = None

    def __init__(self, shape: tuple, rows: Callable[[int, int], Tensor]):
        self.shape = shape
        self.rows = rows

    def tensor(self, len_q: int) -> Tensor:
        """All of it, 5-D: the view, or computed."""
        return self.rows(0, len_q)[:, None] if self.view is None else self.view

    def __and__(self, other: PairBits) -> PairBits:
        return PairBits(
            torch.broadcast_shapes(self.shape, other.shape),
            lambda first, count: self.rows(first, count) & other.rows(first, count),
        )


class HeldBits(PairBits):
    """The pairs that a view holds, bool [B1|1, B2|1, H|1, Lq|1, Lk] with any strides and B1 * B2 =
    ``batch`` = B."""

    def __init__(self, view: Tensor, batch: int):
        self.view = view
        self.batch = batch

    @property
    def shape(self) -> tuple:
        outer, inner, *shape = self.view.shape
        return (1 if outer == 1 and inner == 1 else self.batch, *shape)

    def rows(self, first: int, count: int) -> Tensor:
        outer, inner, _, rows, _ = self.view.shape
        part = self.view if rows == 1 else self.view[:, :, :, first : first + count]
        if outer == 1 and inner == 1:
            return part[0]
        return part.expand(*split_batch(self.batch, outer, inner), -1, -1, -1).flatten(0, 1)


def split_batch(batch: int, outer: int, inner: int) -> tuple[int, int]:
    """(B1, B2) of two batch dimensions that are flattened to ``batch``, from what a tensor has of
    each: its size or 1. (0, 0) if there is no such split.
    """
    if outer == 1 and inner == 1:
        return batch, 1
    if outer == 1:
        first, second = batch // inner if inner else 1, inner
    else:
        first, second = outer, batch // outer if outer else inner
    fits = first * second == batch and repeats(outer, first) and repeats(inner, second)
    return (first, second) if fits else (0, 0)


def visible(lo, hi, key_bits, bits, cols: Tensor) -> Tensor:
    """The definition, for all backends: which pairs are visible.

    lo, hi [B|1, H|1, L] int, key_bits [B|1, 1, 1, Lk] bool or None, bits [B|1, H|1, L|1, Lk|1] bool
    or None, cols [Lk] int -> bool [B|1, H|1, L, Lk].
    """
    seen = (lo[..., None] <= cols) & (cols < hi[..., None])
    if key_bits is not None:
        seen = seen & key_bits
    if bits is not None:
        seen = seen & bits
    return seen


class Mask:
    """Base of all masks; make one with the constructors below, combine with ``&``.

    A subclass overrides what it has of ``bounds``, ``explicit``, ``key_bits`` and ``bits``.
    """

    def bounds(self, rows: Rows) -> Bounds:
        """The affine part."""
        return Bounds()

    def explicit(self, rows: Rows) -> tuple[Tensor, Tensor] | None:
        """The explicit part, (lo, hi) broadcastable to ``rows.index``; None if there is none."""
        return None

    def key_bits(self, batch: int, len_k: int, device) -> Tensor | None:
        """Bool [B|1, 1, 1, Lk], True = may be seen; None if every key may."""
        return None

    def bits(self, batch: int, heads: int, len_q: int, len_k: int, device) -> PairBits | None:
        """Bits per pair; None if intervals and key bits say it all."""
        return None

    def tensors(self) -> tuple[Tensor, ...]:
        """Every tensor this mask was made from."""
        return ()

    def __and__(self, other: Mask) -> Mask:
        if not isinstance(other, Mask):
            return NotImplemented
        return All((*parts_of(self), *parts_of(other)))

    def interval(self, rows: Rows, explicit=None) -> tuple[Tensor, Tensor]:
        """(lo, hi) int64, broadcast against ``rows.index``; (0, 0) for a row that sees nothing.

        explicit: what ``self.explicit(rows)`` gave, where the caller has it already.
        """
        index = rows.index
        bounds = self.bounds(rows)
        lo = larger(bounds.start, index + bounds.left)
        hi = smaller(bounds.end, index + bounds.right)
        explicit = self.explicit(rows) if explicit is None else explicit
        if explicit is not None:
            lo, hi = larger(lo, explicit[0]), smaller(hi, explicit[1])
        lo, hi = lo.clamp(min=0), smaller(hi, rows.len_k)
        alive = (lo < hi) & (index >= bounds.q_start) & (index < bounds.q_end)
        return torch.where(alive, lo, 0), torch.where(alive, hi, 0)

    def to_dense(self, B: int, H: int, Lq: int, Lk: int, device=None) -> Tensor:
        """The mask as bool [B, H, Lq, Lk], True = may attend. A view with stride 0 where it
        repeats."""
        rows = Rows(Lq, Lk, B, device, H)
        lo, hi = self.interval(rows)
        cols = torch.arange(Lk, device=device)
        key_bits = self.key_bits(B, Lk, device)
        bits = self.bits(B, H, Lq, Lk, device)
        bits = None if bits is None else bits.rows(0, Lq)
        return visible(lo, hi, key_bits, bits, cols).expand(B, H, Lq, Lk)

    def picture(self, Lq: int, Lk: int, *, B: int = 1, H: int = 1, tile=(64, 64), batch=0, head=0):
        """A map of the tiles as text: ``.`` never visited, ``/`` partial, ``#`` full.

        Lq, Lk and the number of batches B and heads H say what the mask is for; the picture shows
        one batch and head. Its last line gives the fraction of tiles that is visited.
        """
        from . import lowering  # lowering reads masks, so not at import time

        return lowering.picture(self, B, H, Lq, Lk, tile, batch, head)


def parts_of(mask: Mask) -> tuple[Mask, ...]:
    if isinstance(mask, PreparedMask):
        mask = mask.source
    return mask.parts if isinstance(mask, All) else (mask,)


@dataclass(frozen=True, eq=False)
class All(Mask):
    """The intersection of several masks; ``a & b`` makes it."""

    parts: tuple[Mask, ...]

    def bounds(self, rows):
        return functools.reduce(Bounds.__and__, [part.bounds(rows) for part in self.parts])

    def explicit(self, rows):
        result = None
        for part in self.parts:
            own = part.explicit(rows)
            if own is not None and result is not None:
                own = larger(own[0], result[0]), smaller(own[1], result[1])
            result = result if own is None else own
        return result

    def key_bits(self, batch, len_k, device):
        return intersection(part.key_bits(batch, len_k, device) for part in self.parts)

    def bits(self, batch, heads, len_q, len_k, device):
        return intersection(part.bits(batch, heads, len_q, len_k, device) for part in self.parts)

    def tensors(self):
        return tuple(t for part in self.parts for t in part.tensors())


def intersection(planes):
    """``&`` of what is not None; None if all are."""
    result = None
    for plane in planes:
        if plane is not None:
            result = plane if result is None else result & plane
    return result


@dataclass(frozen=True, eq=False)
class Band(Mask):
    """``i + offset - left <= j <= i + offset + right``; None = unbounded on that side."""

    left: int | None
    right: int | None
    offset: int | Tensor | str  # "lower_right" stands for Lk - Lq

    def bounds(self, rows):
        if isinstance(self.offset, str):
            offset = rows.len_k - rows.len_q
        else:
            offset = rows.per_batch(self.offset, "offset")
        return Bounds(
            left=-UNBOUNDED if self.left is None else bounded(offset - self.left),
            right=UNBOUNDED if self.right is None else bounded(offset + self.right + 1),
        )

    def tensors(self):
        return tensors_in(self.offset)


def bounded(value):
    """An offset that is safe to add to a position in int32."""
    return smaller(larger(value, -UNBOUNDED), UNBOUNDED)


def repeats(size, wanted) -> bool:
    """Whether a dimension broadcasts; sizes may be symbolic."""
    return bool(size == 1) or bool(size == wanted)


def tensors_in(*values) -> tuple[Tensor, ...]:
    return tuple(v for v in values if isinstance(v, Tensor))


@dataclass(frozen=True, eq=False)
class Padding(Mask):
    """Keys in [start, end) and rows below query_lengths, per batch."""

    start: int | Tensor | None
    end: int | Tensor | None
    query_lengths: int | Tensor | None

    def bounds(self, rows):
        given = {"start": self.start, "end": self.end, "q_end": self.query_lengths}
        names = {"start": "start", "end": "lengths", "q_end": "query_lengths"}
        limits = {"start": rows.len_k, "end": rows.len_k, "q_end": rows.len_q}
        said = {}
        for key, value in given.items():
            if value is None:
                continue
            if rows.sequence is None:
                check_range(value, names[key], 0, limits[key])
            said[key] = rows.per_batch(value, names[key])
        return Bounds(**said)

    def tensors(self):
        return tensors_in(self.start, self.end, self.query_lengths)


def check_range(value: int | Tensor, name: str, low: int, high: int):
    """Refuse values outside [low, high], where looking at them is free (or asked for)."""
    if isinstance(value, Tensor):
        if not check_values_of(value) or value.numel() == 0:
            return
        least, most = int(value.min()), int(value.max())
    else:
        least = most = value
    if least < low or most > high:
        raise ValueError(f"{name} must lie in [{low}, {high}], got {least} to {most}")


@dataclass(frozen=True, eq=False)
class KeyBits(Mask):
    """Keys by a bool [B|1, Lk]: padding with holes."""

    keep: Tensor

    def key_bits(self, batch, len_k, device):
        if self.keep.shape[1] != len_k or not repeats(self.keep.shape[0], batch):
            raise ValueError(
                f"keep has shape {tuple(self.keep.shape)}, expected ({batch} or 1, {len_k})"
            )
        return self.keep.to(device)[:, None, None, :]

    def bounds(self, rows):
        rows.outermost("padding(keep=...)")
        return Bounds()

    def tensors(self):
        return (self.keep,)


@dataclass(frozen=True, eq=False)
class Chunked(Mask):
    """Rows and columns of the same chunk of ``size`` positions."""

    size: int

    def explicit(self, rows):
        first = rows.index // self.size * self.size
        return first, first + self.size


@dataclass(frozen=True, eq=False)
class PrefixLM(Mask):
    """A prefix that everybody sees, then causal."""

    lengths: int | Tensor

    def explicit(self, rows):
        if rows.sequence is None:
            check_range(self.lengths, "lengths", 0, rows.len_k)
        prefix = rows.per_batch(self.lengths, "lengths")
        return torch.zeros_like(rows.index), larger(rows.index + 1, prefix)

    def tensors(self):
        return tensors_in(self.lengths)


@dataclass(frozen=True, eq=False)
class Intervals(Mask):
    """Intervals given outright, [B|1, H|1, Lq]."""

    lo: Tensor
    hi: Tensor

    def explicit(self, rows):
        rows.outermost("intervals()")
        batch, heads, length = self.lo.shape
        right = repeats(batch, rows.batch) and repeats(heads, rows.heads) and length == rows.len_q
        if not right:
            raise ValueError(
                f"lo and hi have shape {tuple(self.lo.shape)}, expected "
                f"({rows.batch} or 1, {rows.heads} or 1, {rows.len_q}) for [B, H, Lq]"
            )
        check_range(self.lo, "lo", 0, rows.len_k)
        check_range(self.hi, "hi", 0, rows.len_k)
        device = rows.device
        return self.lo.to(device, torch.int64), self.hi.to(device, torch.int64)

    def tensors(self):
        return self.lo, self.hi


@dataclass(frozen=True, eq=False)
class Varlen(Mask):
    """Sequences packed one after another; rows see keys of their own sequence."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    within: Mask | None

    def bounds(self, rows):
        rows.outermost("varlen()")
        for name, cu, total in (
            ("cu_seqlens_q", self.cu_seqlens_q, rows.len_q),
            ("cu_seqlens_k", self.cu_seqlens_k, rows.len_k),
        ):
            check_range(cu, name, 0, total)
            if check_values_of(cu) and (int(cu[0]) != 0 or bool((cu[1:] < cu[:-1]).any())):
                raise ValueError(f"{name} must start at 0 and never decrease, got {cu.tolist()}")
        return Bounds(
            end=rows.per_batch(self.cu_seqlens_k[-1:], "cu_seqlens_k"),
            q_end=rows.per_batch(self.cu_seqlens_q[-1:], "cu_seqlens_q"),
        )

    def explicit(self, rows):
        device = rows.device
        cu_q = self.cu_seqlens_q.to(device, torch.int64)
        cu_k = self.cu_seqlens_k.to(device, torch.int64)
        number = torch.searchsorted(cu_q, rows.index, right=True) - 1
        number = number.clamp(0, cu_q.numel() - 2)  # rows past the last sequence are cut by q_end
        first_q, first_k = cu_q[number], cu_k[number]
        len_q, len_k = cu_q[number + 1] - first_q, cu_k[number + 1] - first_k
        local = Rows(
            len_q, len_k, cu_q.numel() - 1, device, index=rows.index - first_q, sequence=number
        )
        lo, hi = (self.within or Mask()).interval(local)
        return first_k + lo, first_k + hi

    def tensors(self):
        inner = self.within.tensors() if self.within is not None else ()
        return (self.cu_seqlens_q, self.cu_seqlens_k, *inner)


@dataclass(frozen=True, eq=False)
class Documents(Mask):
    """Rows see keys with the same id."""

    query_ids: Tensor  # [B|1, Lq]
    key_ids: Tensor | None  # [B|1, Lk]; None = query_ids
    contiguous: bool
    within: Mask | None

    def bounds(self, rows):
        rows.outermost("documents()")
        return Bounds()

    def ids(self, batch: int, len_q: int, len_k: int, device) -> tuple[Tensor, Tensor]:
        """query_ids [B|1, Lq] and key_ids [B|1, Lk], int64 on the device."""
        query_ids = self.query_ids
        key_ids = query_ids if self.key_ids is None else self.key_ids
        for name, ids, length in (("query_ids", query_ids, len_q), ("key_ids", key_ids, len_k)):
            if ids.shape[1] != length or not repeats(ids.shape[0], batch):
                hint = "" if self.key_ids is not None else "; give key_ids where Lq != Lk"
                raise ValueError(
                    f"{name} has shape {tuple(ids.shape)}, expected ({batch} or 1, {length}){hint}"
                )
        return query_ids.to(device, torch.int64), key_ids.to(device, torch.int64)

    def explicit(self, rows):
        if not self.contiguous:
            return None
        query_ids, key_ids = self.ids(rows.batch, rows.len_q, rows.len_k, rows.device)
        for name, ids in (("query_ids", query_ids), ("key_ids", key_ids)):
            if check_values_of(ids):
                check_contiguous(ids, name)
        first_k, len_k = run_of(query_ids, key_ids)  # [B|1, Lq] each
        first_q, len_q = run_of(query_ids, query_ids)
        len_k, len_q = len_k[:, None, :], len_q[:, None, :]
        position = rows.index - first_q[:, None, :]
        local = Rows(len_q, len_k, 1, rows.device, index=position, sequence=torch.zeros_like(len_q))
        lo, hi = (self.within or Mask()).interval(local)
        return first_k[:, None, :] + lo, first_k[:, None, :] + hi

    def bits(self, batch, heads, len_q, len_k, device):
        if self.contiguous:
            return None
        query_ids, key_ids = self.ids(batch, len_q, len_k, device)
        shape = (max(query_ids.shape[0], key_ids.shape[0]), 1, len_q, len_k)

        def same(first, count):
            some = query_ids[:, None, first : first + count, None]
            return some == key_ids[:, None, None, :]

        if self.within is None:
            return PairBits(shape, same)
        _, count_k = run_of(query_ids, key_ids)
        _, count_q = run_of(query_ids, query_ids)
        count_k, count_q = count_k[:, None, :], count_q[:, None, :]
        position = rank_in_run(query_ids)[:, None, :]
        local = Rows(
            count_q, count_k, 1, device, index=position, sequence=torch.zeros_like(count_q)
        )
        lo, hi = self.within.interval(local)
        place = rank_in_run(key_ids)[:, None, None, :]

        def same_within(first, count):
            some = slice(first, first + count)
            return visible(lo[..., some], hi[..., some], None, same(first, count), place)

        return PairBits(shape, same_within)

    def tensors(self):
        inner = self.within.tensors() if self.within is not None else ()
        return (*tensors_in(self.query_ids, self.key_ids), *inner)


def run_of(ids: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """For each id [B, L] the position of its first equal in keys [B, Lk] and how many there are."""
    if keys.shape[0] != ids.shape[0]:
        rows = max(keys.shape[0], ids.shape[0])
        keys, ids = keys.expand(rows, -1), ids.expand(rows, -1)
    ordered, order = keys.sort(dim=1, stable=True)
    left = torch.searchsorted(ordered, ids.contiguous())
    count = torch.searchsorted(ordered, ids.contiguous(), right=True) - left
    if keys.shape[1] == 0:
        return torch.zeros_like(left), count
    return order.gather(1, left.clamp(max=keys.shape[1] - 1)), count


def rank_in_run(ids: Tensor) -> Tensor:
    """How many equal ids stand before each one, [B, L] int64."""
    ordered, order = ids.sort(dim=1, stable=True)
    place = torch.arange(ids.shape[1], device=ids.device).expand_as(order)
    rank = place - torch.searchsorted(ordered, ordered)
    return torch.empty_like(rank).scatter_(1, order, rank)


def check_contiguous(ids: Tensor, name: str):
    changes = (ids[:, 1:] != ids[:, :-1]).sum(1) + (1 if ids.shape[1] else 0)
    for row, runs in zip(ids, changes.tolist(), strict=True):
        if row.unique().numel() != runs:
            raise ValueError(
                f"{name} holds an id in several separate runs; documents(..., contiguous=True) "
                "promises one run per id: drop contiguous=True"
            )


def without_repeats(tensor: Tensor) -> Tensor:
    """The tensor with size 1 where it repeats by stride 0."""
    stride = tensor.stride()
    if 0 in stride:
        for dim, size in enumerate(tensor.shape):
            if stride[dim] == 0 and size > 1:
                tensor = tensor.narrow(dim, 0, 1)
    return tensor


@dataclass(frozen=True, eq=False)
class Dense(Mask):
    """Any bool tensor that broadcasts to [B, H, Lq, Lk].

    Where it does not depend on the key it is an interval per row, where it depends on the key alone
    it is key bits, and only else bits per pair.
    """

    mask: Tensor = field(repr=False)

    def kind(self) -> str:
        """Which of explicit, key_bits and bits says it."""
        shape, stride = self.mask.shape, self.mask.stride()
        if shape[-1] == 1 or stride[-1] == 0:
            return "explicit"
        rows = shape[-2] != 1 and stride[-2] != 0
        heads = len(shape) > 2 and shape[-3] != 1 and stride[-3] != 0
        return "bits" if rows or heads else "key_bits"

    def fitted(self, batch, heads, len_q, len_k) -> Tensor:
        """The tensor as a view [B1|1, B2|1, H|1, Lq|1, Lk|1], 1 where it repeats by stride 0."""
        mask, shape = self.mask, tuple(self.mask.shape)
        full = (batch, heads, len_q, len_k)
        if len(shape) < 5:
            if len(shape) < 4:
                mask = mask.reshape((1,) * (4 - len(shape)) + shape)
            fits = all([repeats(have, want) for have, want in zip(mask.shape, full, strict=True)])
            mask = mask.unsqueeze(1)
        else:
            fits = split_batch(batch, *shape[:2]) != (0, 0) or batch == 0
            fits = fits and all(
                repeats(n, want) for n, want in zip(shape[2:], full[1:], strict=True)
            )
        if not fits:
            raise ValueError(
                f"the mask has shape {shape}, which does not broadcast to (B, H, Lq, Lk) = {full}"
                + (
                    "; for a padding mask use masks.padding(keep=mask) or mask[:, None, None]"
                    if shape in ((batch, len_k), (1, len_k), (batch, len_q))
                    else ""
                )
            )
        return without_repeats(mask)

    def explicit(self, rows):
        if self.kind() != "explicit":
            return None
        mask = self.fitted(rows.batch, rows.heads, rows.len_q, rows.len_k)
        alive = HeldBits(mask.to(rows.device), rows.batch).rows(0, rows.len_q)[..., 0]
        hi = torch.where(alive, rows.len_k, 0)
        return torch.zeros_like(hi), hi

    def key_bits(self, batch, len_k, device):
        if self.kind() != "key_bits":
            return None
        heads, len_q = self.mask.shape[-3:-1] if self.mask.dim() > 2 else (1, self.mask.shape[0])
        mask = self.fitted(batch, heads, len_q, len_k)
        return HeldBits(mask.to(device), batch).rows(0, 1)

    def bits(self, batch, heads, len_q, len_k, device):
        if self.kind() != "bits":
            return None
        mask = self.fitted(batch, heads, len_q, len_k)
        return HeldBits(mask.to(device), batch)

    def bounds(self, rows):
        rows.outermost("dense()")
        return Bounds()

    def tensors(self):
        return (self.mask,)


@dataclass(frozen=True, eq=False)
class PreparedMask(Mask):
    """A mask in the lowered form it had when ``prepare`` made it, for calls of one kind."""

    source: Mask = field(repr=False)  # with tensors of its own
    lowered: LoweredMask = field(repr=False)
    sizes: tuple[int, int, int, int]  # B, H, Lq, Lk
    device: torch.device

    def bounds(self, rows):
        return self.source.bounds(rows)

    def explicit(self, rows):
        return self.source.explicit(rows)

    def key_bits(self, batch, len_k, device):
        return self.source.key_bits(batch, len_k, device)

    def bits(self, batch, heads, len_q, len_k, device):
        return self.source.bits(batch, heads, len_q, len_k, device)

    def tensors(self):
        return self.source.tensors()

    def picture(self, Lq, Lk, **options):
        return self.source.picture(Lq, Lk, **options)


# -- constructors ---------------------------------------------------------------------------------


def causal(offset: int | Tensor = 0, *, align: str | None = None) -> Mask:
    """Row i sees columns ``j <= i + offset``.

    offset: an int, or an int tensor [B]. align="lower_right" sets it to Lk - Lq, so that the last
    row sees every key (flash-attn's rule, and right for a KV cache); align="upper_left" is offset 0
    (torch's rule).
    """
    return Band(None, 0, check_offset(offset, align))


def window(left: int, right: int, *, offset: int | Tensor = 0, align: str | None = None) -> Mask:
    """Row i sees ``i + offset - left <= j <= i + offset + right``; -1 = unbounded on that side."""
    for name, value in (("left", left), ("right", right)):
        if not is_int(value) or value < -1:
            raise ValueError(f"{name} must be an int >= -1 (-1 = unbounded), got {value!r}")
    return Band(
        None if left == -1 else left, None if right == -1 else right, check_offset(offset, align)
    )


def chunked(size: int) -> Mask:
    """Rows see the columns of their own chunk: ``i // size == j // size``."""
    if not is_int(size) or size < 1:
        raise ValueError(f"size must be an int >= 1, got {size!r}")
    return Chunked(size)


def padding(
    lengths=None, *, start=None, end=None, keep: Tensor | None = None, query_lengths=None
) -> Mask:
    """Which keys of each batch are real, and which query rows.

    lengths: int [B] (tensor or list), keys ``j < lengths[b]``; the same as ``end``.
    start, end: int [B], keys ``start[b] <= j < end[b]`` (left padding: start).
    keep: bool [B, Lk], True = real, holes allowed. query_lengths: int [B], rows
    ``i < query_lengths[b]``; the rest see nothing.

    What padding leaves out never reaches a result, not even as NaN (docs/semantics.md).
    """
    if lengths is not None and end is not None:
        raise ValueError("give lengths or end, not both: they mean the same")
    end = end if lengths is None else lengths
    if keep is None and start is None and end is None and query_lengths is None:
        raise ValueError("padding() needs one of lengths, start, end, keep, query_lengths")
    range_mask = Padding(
        check_lengths("start", start),
        check_lengths("lengths", end),
        check_lengths("query_lengths", query_lengths),
    )
    if keep is None:
        return range_mask
    if not isinstance(keep, Tensor) or keep.dtype != torch.bool or keep.dim() != 2:
        raise TypeError(f"keep must be a bool tensor [B, Lk], True = real; got {describe(keep)}")
    if start is None and end is None and query_lengths is None:
        return KeyBits(keep)
    return range_mask & KeyBits(keep)


def padding_from_tokens(tokens: Tensor, pad_id: int) -> Mask:
    """Keys that are not padding in tokens [B, Lk] (any integer dtype), wherever they stand."""
    if not is_int_tensor(tokens) or tokens.dim() != 2:
        raise TypeError(f"tokens must be an integer tensor [B, Lk], got {describe(tokens)}")
    return KeyBits(tokens != pad_id)


def varlen(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None = None, within: Mask | None = None
) -> Mask:
    """Sequences packed along L: rows [cu_q[s], cu_q[s+1]) see keys [cu_k[s], cu_k[s+1]).

    cu_seqlens_q, cu_seqlens_k: int [S + 1], from 0, never decreasing; key lengths default to query
    lengths. within: a mask applied inside every sequence in its own coordinates and lengths:
    ``varlen(cu_q, cu_k, within=causal(align="lower_right"))``. Its per-batch parameters have one
    entry per sequence.
    """
    cu_q = check_cu_seqlens("cu_seqlens_q", cu_seqlens_q)
    cu_k = cu_q if cu_seqlens_k is None else check_cu_seqlens("cu_seqlens_k", cu_seqlens_k)
    if cu_q.numel() != cu_k.numel():
        raise ValueError(
            f"cu_seqlens_q has {cu_q.numel()} entries and cu_seqlens_k {cu_k.numel()}: "
            "both need one more than there are sequences"
        )
    return Varlen(cu_q, cu_k, check_within(within))


def documents(
    query_ids: Tensor,
    key_ids: Tensor | None = None,
    *,
    contiguous: bool = False,
    within: Mask | None = None,
) -> Mask:
    """Row i sees column j where ``query_ids[i] == key_ids[j]``.

    query_ids: int [Lq] or [B, Lq]; key_ids: [Lk] or [B, Lk], by default query_ids.
    contiguous=True promises that the keys of an id, and its rows, stand side by side (in any order
    of ids): then every row sees an interval and the mask costs O(L) instead of one bit per pair.
    The promise is checked for tensors on the CPU, and elsewhere where TILEMASK_DEBUG=1 is set.
    within: a mask applied inside each document, positions counted among its own rows and keys.
    """
    query_ids = check_ids("query_ids", query_ids)
    key_ids = None if key_ids is None else check_ids("key_ids", key_ids)
    return Documents(query_ids, key_ids, bool(contiguous), check_within(within))


def prefix_lm(lengths) -> Mask:
    """Row i sees ``j < max(lengths[b], i + 1)``: a visible prefix, then causal.

    lengths: int [B].
    """
    lengths = check_lengths("lengths", lengths)
    if lengths is None:
        raise TypeError("lengths must be an int, a list of ints or an int tensor [B], got None")
    return PrefixLM(lengths)


def intervals(lo: Tensor, hi: Tensor) -> Mask:
    """Row i sees ``lo[i] <= j < hi[i]``. lo, hi: int [Lq] or [B|1, H|1, Lq]."""
    for name, value in (("lo", lo), ("hi", hi)):
        if not is_int_tensor(value) or value.dim() not in (1, 3):
            raise TypeError(
                f"{name} must be an integer tensor [Lq] or [B|1, H|1, Lq], got {describe(value)}"
            )
    lo, hi = (t.reshape(1, 1, -1) if t.dim() == 1 else t for t in (lo, hi))
    try:
        lo, hi = torch.broadcast_tensors(lo, hi)
    except RuntimeError:
        raise ValueError(f"lo {tuple(lo.shape)} and hi {tuple(hi.shape)} do not match") from None
    return Intervals(lo, hi)


def dense(mask: Tensor) -> Mask:
    """Any bool tensor that broadcasts to [B, H, Lq, Lk], 2-D to 4-D; True = may attend.

    A 5-D one is [B1|1, B2|1, H|1, Lq|1, Lk|1] with B1 * B2 = B: the two batch dimensions that were
    flattened to B (windows of a Swin block, rows of an alignment), where it repeats over one.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(
            f"a dense mask must be a bool tensor, True = may attend; got {describe(mask)}"
            " (a float mask is a bias: pass bias=)"
        )
    if not 2 <= mask.dim() <= 5:
        raise ValueError(
            "a dense mask must be (Lq, Lk), (H, Lq, Lk), (B, H, Lq, Lk) or (B1, B2, H, Lq, Lk), "
            f"got {describe(mask)}"
            "; for a padding mask use masks.padding(keep=mask)"
        )
    return Dense(mask)


# -- preparing, and what is kept ------------------------------------------------------------------


def prepare(
    mask: Mask | Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor | None = None,
    *,
    backward: bool | None = None,
) -> PreparedMask:
    """``mask`` with everything done that attention(q, k, v, mask=...) would do to it.

    mask: a mask, or a bool tensor for ``dense``. The result holds for calls with the same B, Hq,
    Lq, Lk and device, and shows the mask as it is now: its tensors are copied. Of q, k and v the
    shapes, dtype and strides are looked at; v is by default as wide as k. backward: whether to
    prepare for the backward too, by default where gradients are enabled; what was not prepared is
    made in the first call that needs it.
    """
    from . import backends, lowering  # they read masks, so not at import time
    from .attention import checked

    if isinstance(mask, Tensor):
        mask = dense(mask)
    if not isinstance(mask, Mask):
        raise TypeError(f"mask must be a tilemask mask or a bool tensor, got {describe(mask)}")
    backward = torch.is_grad_enabled() if backward is None else backward
    call = checked(q, k, k if v is None else v)
    sizes, device = (*call.q.shape[:3], call.k.shape[2]), call.q.device
    with torch.inference_mode(False), torch.no_grad():
        source = copied(mask)
        call.mask = lowering.lower_anew(source, *sizes, device)
        fill = getattr(backends.choose(call), "prepare", None)
        if fill is not None:
            fill(call, backward)
    return PreparedMask(source, call.mask, sizes, device)


def copied(value):
    """A copy of a mask and its tensors, the latter without what repeats by stride 0."""
    if isinstance(value, Tensor):
        return without_repeats(value).clone().expand(value.shape)
    if isinstance(value, PreparedMask):
        return value.source  # a copy already
    if isinstance(value, tuple):
        return tuple(copied(item) for item in value)
    if not isinstance(value, Mask):
        return value
    result = copy.copy(value)
    for name, item in vars(value).items():
        object.__setattr__(result, name, copied(item))
    return result


class caching:
    """``with caching(False):`` keeps nothing of any mask inside the block; for the whole process.

    For masks that are written where PyTorch counts no versions: through ``.data``, NumPy, DLPack or
    raw pointers. Takes effect when called, so ``caching(False)`` alone switches off for good.
    Whatever was kept is dropped. TILEMASK_MASK_CACHE=0 in the environment does the same.
    """

    def __init__(self, on: bool):
        self.before = _caching
        set_caching(on)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        set_caching(self.before)


_caching = os.environ.get("TILEMASK_MASK_CACHE", "1") != "0"


def is_caching() -> bool:
    """Whether anything is kept of masks between calls."""
    return _caching


def set_caching(on: bool) -> None:
    global _caching
    from . import lowering

    _caching = bool(on)
    lowering.forget_all()


# -- checks of the constructors' arguments --------------------------------------------------------


def describe(value) -> str:
    """What came, for error messages."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)} on {value.device}"
    return f"{type(value).__name__} {value!r}"


def is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_int_tensor(value) -> bool:
    return isinstance(value, Tensor) and not (
        value.dtype.is_floating_point or value.dtype.is_complex or value.dtype == torch.bool
    )


def check_offset(offset, align: str | None):
    if align is not None:
        if align not in ("upper_left", "lower_right"):
            raise ValueError(f'align must be "upper_left" or "lower_right", got {align!r}')
        if isinstance(offset, Tensor) or offset != 0:
            raise ValueError("give offset or align, not both")
        return 0 if align == "upper_left" else align
    if is_int(offset) or (is_int_tensor(offset) and offset.dim() <= 1):
        return offset
    raise TypeError(f"offset must be an int or an integer tensor [B], got {describe(offset)}")


def check_lengths(name: str, value):
    if value is None or is_int(value):
        if value is not None and value < 0:
            raise ValueError(f"{name} must not be negative, got {value}")
        return value
    if isinstance(value, (list, tuple)) and all(is_int(v) for v in value):
        value = torch.tensor(value, dtype=torch.int64)
    if is_int_tensor(value) and value.dim() <= 1:
        return value
    raise TypeError(
        f"{name} must be an int, a list of ints or an integer tensor [B], got {describe(value)}"
    )


def check_cu_seqlens(name: str, value) -> Tensor:
    if not is_int_tensor(value) or value.dim() != 1 or value.numel() < 2:
        raise TypeError(
            f"{name} must be an integer tensor [sequences + 1] with at least 2 entries, "
            f"got {describe(value)}"
        )
    return value


def check_ids(name: str, value) -> Tensor:
    if not is_int_tensor(value) or value.dim() not in (1, 2):
        raise TypeError(f"{name} must be an integer tensor [L] or [B, L], got {describe(value)}")
    return value.reshape(1, -1) if value.dim() == 1 else value


def check_within(within):
    if within is not None and not isinstance(within, Mask):
        raise TypeError(f"within must be a tilemask mask, got {describe(within)}")
    return within
