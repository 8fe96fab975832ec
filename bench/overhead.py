"""Rows that are one figure each: what a call costs in Python, and what preparing a mask costs.

Overhead: microseconds of host time per call of attention() on tiny tensors, around a backend that
computes nothing: argument checks, the mask's lowering (kept with the mask object) and the choice of
a backend. Torch's own call on the same tensors stands beside it, computed; on a GPU each backend's
too, not waited for.

Preparing: milliseconds that a call takes longer when nothing is kept of its mask, with one narrow
head, so that there is little else; and the microseconds of finding it again.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

import tilemask
from tilemask import backends, masks

from . import record, timing
from .cells import case_of, cell_of, stepper, waited
from .peers import Tilemask
from .workloads import FORWARD, Workload, named

ROUNDS, CALLS = 30, 2000
PREPARED = (
    "causal & padding",
    "causal documents",
    "prefix-LM",
    "key holes",
    "random bits 50 %",
    "block-sparse",
)


class Trivial:
    """A backend that takes every call and returns the same tensors."""

    NAME = "trivial"

    def __init__(self, q):
        self.result = torch.empty_like(q), q.new_empty(q.shape[:3])

    def why_not(self, call):
        return None

    def forward(self, call):
        return self.result


@contextlib.contextmanager
def trivial_backend(q):
    """The trivial backend stands first in the list, on one thread and without gradients."""
    threads = torch.get_num_threads()
    backends.BACKENDS.insert(0, Trivial(q))
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_num_threads(threads)
        backends.BACKENDS.pop(0)


def microseconds(function: Callable[[], object], clock) -> list[float]:
    """Host time per call in ROUNDS rounds of CALLS calls each; a round ends waiting for nothing."""
    for _ in range(CALLS):
        function()
    samples = []
    for _ in range(ROUNDS):
        clock.wait()
        start = time.perf_counter()
        for _ in range(CALLS):
            function()
        samples.append((time.perf_counter() - start) / CALLS * 1e6)
    return samples


def rows(suite: str, device: str, names: list[str]) -> Iterator[dict]:
    """The rows of "overhead" or "prepare"; names: of the backends."""
    return overhead(device, names) if suite == "overhead" else prepare(device, names)


def overhead(device: str, names: list[str]) -> Iterator[dict]:
    clock = timing.clock_for(device)
    q, k, v = (torch.randn(2, 2, 8, 8, device=device) for _ in range(3))
    causal, padding = masks.causal(), masks.padding(torch.tensor([5, 8], device=device))
    both = causal & padding
    packed = masks.varlen(torch.tensor([0, 3, 8], device=device))
    dense = both.to_dense(2, 2, 8, 8, device).contiguous()
    attention, sdpa = tilemask.attention, tilemask.scaled_dot_product_attention
    calls = {
        "attention, no mask": lambda: attention(q, k, v),
        "attention, causal": lambda: attention(q, k, v, mask=causal),
        "attention, causal & padding": lambda: attention(q, k, v, mask=both),
        "attention, varlen": lambda: attention(q, k, v, mask=packed),
        "scaled_dot_product_attention, is_causal": lambda: sdpa(q, k, v, is_causal=True),
        "scaled_dot_product_attention, bool mask": lambda: sdpa(q, k, v, attn_mask=dense),
    }
    for name, call in calls.items():
        with trivial_backend(q):
            yield figure("overhead", name, microseconds(call, clock), "us")
    torchs = {
        "torch's, is_causal, computed": lambda: F.scaled_dot_product_attention(
            q, k, v, is_causal=True
        ),
        "torch's, bool mask, computed": lambda: F.scaled_dot_product_attention(
            q, k, v, attn_mask=dense
        ),
    }
    if device == "cuda":
        for name in names:
            torchs[f"attention, causal, launched by {name}"] = lambda name=name: attention(
                q, k, v, mask=causal, backend=name
            )
    with torch.no_grad():
        for name, call in torchs.items():
            yield figure("overhead", name, microseconds(call, clock), "us")


def prepare(device: str, names: list[str]) -> Iterator[dict]:
    for length in (8192, 32768) if device == "cuda" else (512,):
        for mask in PREPARED:
            dtype = "bfloat16" if device == "cuda" else "float32"
            work = Workload("", mask, 1, 1, 1, length, length, 16, 16, dtype, (FORWARD,))
            work = named(f"{mask} {length}", work)
            case = case_of(work, device)
            for name in names:
                yield prepare_one(Tilemask(name), case)


def prepare_one(contender: Tilemask, case) -> dict:
    """Cold: calls with nothing kept, less the median of calls with everything kept. Cached: a call
    with the mask around the trivial backend, less one without a mask."""
    name = f"{case.work.name}, {contender.backend}"
    cell = cell_of(contender, case, FORWARD, 0.0)
    if cell["status"] != "ok":
        reason = cell["reason"]
        return {"kind": "prepare", "suite": "prepare", "name": name} | {
            "status": cell["status"],
            "reason": reason,
        }
    clock, mask = timing.clock_for(case.device), case.pattern.mask
    step, _ = stepper(contender.ready(case).attend, case, FORWARD)
    kept, anew = [], []
    for _ in range(timing.LEAST):
        with masks.caching(False):
            anew.append(waited(clock, lambda: step(0)))
        step(0)
        kept.append(waited(clock, lambda: step(0)))
    usual = statistics.median(kept)
    row = figure("prepare", name, [sample - usual for sample in anew], "ms")
    q = case.sets[0].q
    with trivial_backend(q):
        found = [
            statistics.median(microseconds(lambda m=m: tilemask.attention(q, q, q, mask=m), clock))
            for m in (mask, None)
        ]
    return row | {"noise_ms": timing.spread(kept), "cached_us": found[0] - found[1]}


def figure(kind: str, name: str, samples: list[float], unit: str) -> dict:
    return {"kind": kind, "suite": kind, "name": name, **record.figure(samples, unit)}
