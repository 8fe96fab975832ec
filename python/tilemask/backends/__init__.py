"""The ways to compute attention, in the order in which they are tried.

A backend is a module with a ``NAME`` and four functions:

* ``why_not(call) -> str | None``: None if it can run the call, else one sentence;
* ``forward(call) -> (out, lse, rest)``, ``rest`` for its own backward (the reference: (out, lse));
* ``backward(call, out, lse, rest, dout, dlse, bias_gradient) -> Gradients``;
* ``weights(call, reduce)``: the probabilities, or sums of them.

A GPU backend has more, for masks.prepare() and for the ops that stand for it while tracing:
``prepare(call, backward, steps)``, ``launched()``, ``list_key(call, kernel)``, ``list_keys(call,
backward)``, ``has_rest(call)``.

The first backend that answers None runs, but what both GPU backends can is up to cuda.PREFERRED. An
exception in a kernel is never a reason to try the next.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..lowering import LoweredMask
from . import cuda, reference, triton


@dataclass(slots=True)
class Call:
    """One checked call of attention().

    q [B, Hq, Lq, D], k [B, Hkv, Lk, D], v [B, Hkv, Lk, Dv]; bias [B1|1, B2|1, Hq|1, Lq|1, Lk|1]
    with B1 * B2 = B; alibi_slopes [B|1, Hq]; sinks [Hq]; dropout_seed int64 [1].
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: LoweredMask
    scale: float
    bias: Tensor | None = None
    softcap: float = 0.0
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    dropout_p: float = 0.0
    dropout_seed: Tensor | None = None


class Gradients(NamedTuple):
    """What a backward gives; None for what the call did not have."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None = None
    sinks: Tensor | None = None


BACKENDS = [cuda, triton, reference]

_forced: str | None = None


def named(name: str):
    """The backend of that name."""
    for backend in BACKENDS:
        if name == backend.NAME:
            return backend
    known = ", ".join(backend.NAME for backend in BACKENDS)
    raise ValueError(f"unknown backend {name!r}; known: {known}")


def forced_name(name: str | None = None) -> str | None:
    """The backend that must run: by argument, by use_backend(), by TILEMASK_BACKEND, in this
    order."""
    return name or _forced or _FROM_ENVIRONMENT


_FROM_ENVIRONMENT = os.environ.get("TILEMASK_BACKEND") or None


def choose(call: Call, name: str | None = None):
    """The backend that runs ``call``."""
    name = forced_name(name)
    if name is not None:
        backend = named(name)
        reason = backend.why_not(call)
        if reason is not None:
            raise RuntimeError(f"backend {name!r} cannot run this call: {reason}")
        return backend
    for backend in BACKENDS:
        if backend.why_not(call) is None and not yields(backend, call):
            return backend
    raise AssertionError("the reference runs every call")


def yields(backend, call: Call) -> bool:
    """Whether a backend that can run a call leaves it to the other GPU backend."""
    return backend is cuda and cuda.preferred(call)[0] != "cuda" and triton.why_not(call) is None


def reason_against(backend, chosen, call: Call, forced: str | None = None) -> str:
    """One sentence: why ``backend`` does not run a call that ``chosen`` runs."""
    reason = backend.why_not(call)
    if reason is not None:
        return reason
    if forced is not None:
        return f"{forced} is forced"
    if {backend.NAME, chosen.NAME} == {"cuda", "triton"}:
        return f"{chosen.NAME} comes first: {cuda.preferred(call)[1]}"
    return f"{chosen.NAME} comes first"


@contextlib.contextmanager
def use_backend(name: str):
    """Force a backend inside a with block, for the whole process: "cuda", "triton", "reference".

    A call it cannot run raises RuntimeError with its reason. TILEMASK_BACKEND=name in the
    environment does the same without code.
    """
    global _forced
    named(name)
    before = _forced
    _forced = name
    try:
        yield
    finally:
        _forced = before


def available_backends() -> list[str]:
    """Names of the backends that this machine can run, best first. Does not start CUDA."""
    return [backend.NAME for backend in BACKENDS if backend.unavailable() is None]


def heads_inside_rows(q: Tensor) -> bool:
    """Whether q [B, H, L, D] lies in memory as [B, L, H, D]."""
    return bool(q.shape[1] > 1 and q.shape[2] > 1 and q.stride(1) < q.stride(2))


def empty_like_query(q: Tensor, width: int) -> Tensor:
    """Uninitialised [B, H, L, width] with q's order of heads and rows in memory, so that the output
    of a [B, L, H, D] model can be merged back without a copy."""
    batch, heads, length, _ = q.shape
    if heads_inside_rows(q):
        return q.new_empty((batch, length, heads, width)).transpose(1, 2)
    return q.new_empty((batch, heads, length, width))


def recompute(call: Call, dout: Tensor | None, dlse: Tensor | None) -> Gradients:
    """Gradients of the reference by running it again: its backward where autograd cannot reach
    it."""
    names = [n for n in ("q", "k", "v", "bias", "sinks") if getattr(call, n) is not None]
    with torch.enable_grad(), autograd_recording():
        leaves = {n: getattr(call, n).detach().requires_grad_() for n in names}
        given = zip(reference.forward(replaced(call, **leaves)), (dout, dlse), strict=True)
        outputs, cotangents = zip(*((o, g) for o, g in given if g is not None), strict=True)
        grads = torch.autograd.grad(
            outputs, list(leaves.values()), cotangents, materialize_grads=True
        )
    return Gradients(**dict(zip(names, grads, strict=True)))


def autograd_recording():
    """Let autograd record inside an op: under a dispatch mode its keys are switched off by then."""
    off = torch._C._dispatch_tls_local_exclude_set()
    for key in (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView):
        off = off - torch._C.DispatchKeySet(key)
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), off)


def replaced(call: Call, **changes) -> Call:
    """A copy of ``call`` with some fields changed."""
    fields = {name: getattr(call, name) for name in Call.__slots__}
    return Call(**(fields | changes))
