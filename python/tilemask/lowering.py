"""From what a user says (a Mask) to what a kernel reads (a LoweredMask).

A mask lowers to the bounds of its affine part, to explicit row intervals where the bounds do not
say it all, and to key bits and pair bits where it is no interval. Everything is computed on the
device without a host synchronisation, in sizes that depend on shapes alone, so that CUDA graphs
capture it. What a backend makes of that (packed words, tile lists for the tile shape of the kernel
that runs) is kept here too: see Prepared and Cache.
"""

from __future__ import annotations

import ctypes
import functools
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import masks
from .masks import UNBOUNDED, Bounds, HeldBits, Mask, PairBits, PreparedMask, Rows, visible

TILE_SYMBOLS = "./#"  # empty, partial, full
EMPTY, PARTIAL, FULL = range(3)
MOST_KEPT = 16  # lowered forms kept per mask object: shapes and devices it is used with
MOST_SHARED = 64  # Prepared objects kept for views of bool tensors, the latest used


class Prepared:
    """What a backend made of a lowered mask: tensors, or tuples of tensors, by key.

    ``make`` is how a backend asks. One object may serve several lowered masks, of several calls,
    threads and streams. ``prepared[key]``, ``get`` and ``in`` are plain: no stream waits.
    """

    __slots__ = ("kept",)

    def __init__(self):
        self.kept: dict[Hashable, tuple] = {}  # value and Origin

    def make(self, key: Hashable, function: Callable[[], Tensor | tuple[Tensor, ...]]):
        """The value kept under ``key``, else ``function()``, which is kept from now on.

        If the value was made on another CUDA stream, the current one waits for it. What is made
        while a CUDA graph is captured is there for that capture alone. ``function`` may call
        ``make``; it runs outside inference mode, so that its tensors may be saved by autograd.
        """
        kept = self.kept.get(key)
        if kept is not None and (kept[1] is None or kept[1].reaches_here(kept[0])):
            return kept[0]
        if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
            with torch.inference_mode(False), torch.no_grad():
                value = function()
        else:
            value = function()
        self.kept[key] = value, origin_of(value)
        return value

    def get(self, key: Hashable, default=None):
        kept = self.kept.get(key)
        return default if kept is None else kept[0]

    def __getitem__(self, key):
        return self.kept[key][0]

    def __setitem__(self, key, value):
        self.kept[key] = value, None

    def __contains__(self, key):
        return key in self.kept

    def copy(self) -> Prepared:
        """The same values in an object of their own."""
        other = Prepared()
        other.kept = {key: (kept[0], None) for key, kept in self.kept.items()}
        return other


@dataclass
class LoweredMask:
    """A mask for given B, H, Lq and Lk.

    bounds: six ints (start, end, left, right, q_start, q_end), with every value inside the
    lengths; the truth where ``batch_bounds`` is None.
    batch_bounds: int32 [B, 6], the same per batch, or None.
    lo, hi: int32 [B|1, H|1, Lq], both 0 for a row that sees nothing; None where bounds say it all.
    key_bits: bool [B|1, 1, 1, Lk] or None. bits: PairBits or None.
    prepared: what a backend made of it: packed words, tile lists.
    """

    len_q: int
    len_k: int
    bounds: tuple[int, int, int, int, int, int]
    batch_bounds: Tensor | None = None
    lo: Tensor | None = None
    hi: Tensor | None = None
    key_bits: Tensor | None = None
    bits: PairBits | None = None
    prepared: Prepared = field(default_factory=lambda: Prepared())  # Dynamo refuses the bare class

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
    on the stream it was made on. What backends prepare for bool tensors is kept by storage.
    """
    if mask is None:
        return LoweredMask(Lq, Lk, everything(Lq, Lk))
    if type(mask) is PreparedMask:
        return lowered_already(mask, B, H, Lq, Lk, device)
    tensors = mask.tensors()
    cache = cache_for(tensors, device)
    if cache is None:
        return lower_anew(mask, B, H, Lq, Lk, device)
    kept = cache.by_mask.get(mask)
    if kept is None:
        if type(mask) in PLANES:  # a new object of an old tensor, as in every call of SDPA
            lowered = cache.form_of(type(mask), tensors[0], B, H, Lq, Lk, device)
            if lowered is not None:
                return lowered
        kept = cache.forms(mask)
    key = (B, H, Lq, Lk, device, stream_id(device), torch.is_inference_mode_enabled())
    versions = tuple([t._version for t in tensors])
    seen, lowered = kept.get(key, (None, None))
    if seen == versions:
        return lowered
    lowered = lower_anew(mask, B, H, Lq, Lk, device)
    planes = planes_of(mask, lowered)
    if planes:
        lowered.prepared = cache.prepared_for(planes, B, H, lowered, device)
    if len(kept) >= MOST_KEPT:
        kept.clear()
    kept[key] = versions, lowered
    return lowered


def lowered_already(mask: PreparedMask, B: int, H: int, Lq: int, Lk: int, device) -> LoweredMask:
    """The form that masks.prepare() made, for a call of these sizes."""
    if (B, H, Lq, Lk) != mask.sizes or device != mask.device:
        names = "B = {}, Hq = {}, Lq = {}, Lk = {} on {}"
        raise ValueError(
            f"the mask was prepared for {names.format(*mask.sizes, mask.device)}, the call has "
            f"{names.format(B, H, Lq, Lk, device)}: prepare it again from the mask it was made of"
        )
    own = mask.lowered
    if not is_watched():
        return own
    parts = (own.batch_bounds, own.lo, own.hi, own.key_bits, own.bits)
    return LoweredMask(own.len_q, own.len_k, own.bounds, *parts, own.prepared.copy())


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
    if not any(isinstance(value, Tensor) for value in bounds):
        start, end, left, right, q_start, q_end = bounds
        left, right = max(left, -UNBOUNDED), min(right, UNBOUNDED)
        return (max(start, 0), min(end, Lk), left, right, max(q_start, 0), min(q_end, Lq)), None
    inside = bounds & Bounds(*everything(Lq, Lk))
    device = next(value.device for value in inside if isinstance(value, Tensor))
    columns = [
        value.reshape(-1).expand(B)
        if isinstance(value, Tensor)
        else torch.full((B,), value, device=device)
        for value in inside
    ]
    return everything(Lq, Lk), torch.stack(columns, 1).to(torch.int32)


# -- keeping --------------------------------------------------------------------------------------


class Cache:
    """Lowered forms by mask object, and Prepared objects by the storages of bool tensors.

    Of tensors that share a storage only views share a version counter too, and with it what is
    kept; ``.data`` has a counter of its own. Nobody else's mask or tensor is kept alive.
    """

    def __init__(self):
        self.by_mask: weakref.WeakKeyDictionary[Mask, dict] = weakref.WeakKeyDictionary()
        self.by_storage: OrderedDict[tuple, tuple] = OrderedDict()
        self.lock = threading.RLock()  # a collection inside may run anything

    def forms(self, mask: Mask) -> dict:
        return self.by_mask.setdefault(mask, {})

    def form_of(self, kind: type, tensor: Tensor, B, H, Lq, Lk, device) -> LoweredMask | None:
        """The lowered form of a bool tensor alone, by what is kept of it; None if nothing is.

        It is made anew, of views of the tensor: a form that is kept would keep the tensor alive.
        """
        bounds = everything(Lq, Lk)
        key, sources, versions = described([(kind, tensor)], (B, H, Lq, Lk, device, bounds))
        with self.lock:
            prepared, layout = self.find(key, sources, versions)
        if layout is None:
            return None
        pairs, size, stride, offset = layout
        view = tensor.as_strided(size, stride, offset)
        key_bits, bits = (None, HeldBits(view, B)) if pairs else (view, None)
        return LoweredMask(Lq, Lk, bounds, None, None, None, key_bits, bits, prepared)

    def prepared_for(self, planes, B: int, H: int, lowered: LoweredMask, device) -> Prepared:
        """The Prepared of ``lowered``, whose bits are those of ``planes`` alone."""
        first = B, H, lowered.len_q, lowered.len_k, device, lowered.bounds
        key, sources, versions = described(planes, first)
        with self.lock:
            prepared, _ = self.find(key, sources, versions)
            if prepared is None:
                forget = functools.partial(drop, weakref.ref(self), key)
                owners, prepared = [weakref.ref(s, forget) for s in sources], Prepared()
                self.by_storage[key] = versions, owners, prepared, layout_of(planes, lowered)
                self.by_storage.move_to_end(key)
                if len(self.by_storage) > MOST_SHARED:
                    self.by_storage.popitem(last=False)
        return prepared

    def find(self, key: tuple, sources: list, versions: list) -> tuple:
        """The Prepared under ``key`` and its layout_of(), if it was made of these very sources and
        they are unchanged; else None and None. The caller has the lock."""
        seen, owners, prepared, layout = self.by_storage.get(key) or (None, (), None, None)
        if seen != versions:
            return None, None
        for owner, source in zip(owners, sources, strict=True):
            if owner() is not source:
                return None, None
        self.by_storage.move_to_end(key)
        return prepared, layout


def described(planes, key: tuple) -> tuple[tuple, list, list]:
    """What is kept of planes is kept under this key, which begins with ``key``, for these objects
    and these versions of them."""
    sources, versions = [], []
    for kind, t in planes:
        storage, base = t.untyped_storage(), t._base
        sources += storage, t if base is None else base  # which has the counter of all views
        versions.append(t._version)
        key += kind, id(storage), t.storage_offset(), t.dtype, t.shape, t.stride()
    return key, sources, versions


def drop(cache: weakref.ref[Cache], key: tuple, _owner) -> None:
    """A source has died: forget what was made of it. Takes no lock: it may run anywhere."""
    alive = cache()
    if alive is not None:
        alive.by_storage.pop(key, None)


_cache = Cache()
_captured: tuple[Hashable, Cache] | None = None  # the graph capture under way, and what it keeps


def cache_for(tensors: tuple[Tensor, ...], device) -> Cache | None:
    """Where to keep what is made of a mask of these tensors; None where nothing may be kept.

    Nothing is kept while tracing or transforming (tensors live in the graph), nor for inference
    tensors, whose changes cannot be seen. A graph that is captured keeps for itself: its tensors
    have values in its replays alone, and each replay must read the mask anew.
    """
    global _captured
    if is_watched() or not masks.is_caching():
        return None
    for tensor in tensors:
        if type(tensor) is not Tensor or tensor.is_inference():
            return None
    capture = capture_id(device)
    if capture is None:
        _captured = None
        return _cache
    current = _captured
    if current is None or current[0] != capture:
        current = _captured = capture, Cache()
    return current[1]


def is_watched() -> bool:
    """Whether tensors live in somebody's graph."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.maybe_current_level() is not None
    )


def forget_all() -> None:
    """Drop everything that is kept."""
    global _cache, _captured
    _cache, _captured = Cache(), None


PLANES = (masks.Dense, masks.KeyBits)  # of one bool tensor each
BOUNDS_ONLY = (masks.Band, masks.Padding, AffineMask)  # of ints: the lowered bounds say it all


def planes_of(mask: Mask, lowered: LoweredMask) -> list[tuple[type, Tensor]]:
    """The bool tensors of a mask that is nothing but them and integers; else none."""
    if lowered.lo is not None or lowered.batch_bounds is not None:
        return []
    planes = []
    for part in masks.parts_of(mask):
        if type(part) in PLANES:
            planes.append((type(part), *part.tensors()))
        elif type(part) not in BOUNDS_ONLY:
            return []
    return planes


def layout_of(planes, lowered: LoweredMask) -> tuple | None:
    """Of a mask whose bits are a view of one bool tensor: whether they are bits per pair (or else
    key bits), and size, stride and offset of the view. None of others."""
    if len(planes) > 1:
        return None
    view = lowered.key_bits if lowered.bits is None else lowered.bits.view
    if view.untyped_storage() is not planes[0][1].untyped_storage():
        return None
    return lowered.bits is not None, view.shape, view.stride(), view.storage_offset()


# -- streams and graph captures -------------------------------------------------------------------


class Origin:
    """Where on a GPU a value was made: the stream, an event behind the work, the graph capture."""

    __slots__ = ("capture", "device", "event", "streams")

    def __init__(self, device: torch.device):
        self.device = device
        self.capture = capture_id(device)
        self.streams = {stream_id(device)}  # those that are behind the event
        self.event = current_stream(device).record_event()

    def reaches_here(self, value) -> bool:
        """Let the current stream wait for the value where it must; False if it has none here."""
        stream = stream_id(self.device)
        if self.capture is None and stream in self.streams:
            return True
        capture = capture_id(self.device)
        if self.capture is None and capture is not None:
            return True  # torch.cuda.graph() synchronises first; a captured wait would be an error
        if self.capture != capture:
            return False
        if stream not in self.streams:
            current = current_stream(self.device)
            current.wait_event(self.event)
            for tensor in value if isinstance(value, tuple) else (value,):
                tensor.record_stream(current)
            self.streams.add(stream)
        return True


def origin_of(value) -> Origin | None:
    """Where a value was made; None where there are no streams, or no values."""
    tensor = value[0] if isinstance(value, tuple) else value
    if is_watched() or type(tensor) is not Tensor or not has_streams(tensor.device):
        return None
    return Origin(tensor.device)


def has_streams(device: torch.device) -> bool:
    return device.type == "cuda"


def current_stream(device: torch.device):
    return torch.cuda.current_stream(device)


def stream_id(device: torch.device) -> int:
    """The handle of the device's current stream; 0 where there are no streams."""
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0


def capture_id(device: torch.device) -> Hashable | None:
    """The id of the graph capture that the device's current stream takes part in; None if none."""
    if device.type != "cuda":
        return None
    current = torch.cuda.current_device() == device.index  # torch can only tell about this one
    if current and not torch.cuda.is_current_stream_capturing():
        return None
    status, number = ctypes.c_int(), ctypes.c_uint64()
    try:
        failed = capture_info()(stream_id(device), status, number, None, None, None)
    except (OSError, AttributeError):  # no such driver
        failed = True
    if failed or status.value == 2:  # invalidated
        return object()  # like no other
    return number.value if status.value == 1 else None


@functools.cache
def capture_info():
    """cuStreamGetCaptureInfo_v2 of the CUDA driver."""
    function = ctypes.CDLL("libcuda.so.1").cuStreamGetCaptureInfo_v2
    function.argtypes = [
        ctypes.c_void_p,  # stream
        ctypes.POINTER(ctypes.c_int),  # status: 0 none, 1 active, 2 invalidated
        ctypes.POINTER(ctypes.c_uint64),  # id
        ctypes.c_void_p,  # graph, dependencies and their number: not asked for
        ctypes.c_void_p,
        ctypes.c_void_p,
    ]
    function.restype = ctypes.c_int
    return function


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
        bits = None if lowered.bits is None else lowered.bits.rows(first, block_m)
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
