"""Times: CUDA events on a GPU, the wall clock on a CPU; medians, and the ceilings of the machine.

A step is a function of a number: it runs on input set ``number``. The sets are walked in turn, and
hold more bytes together than the L2 cache, so that no call finds its inputs there.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

import torch

LEAST, MOST = 5, 100  # samples
WARM_UP = 3


class WallClock:
    """Calls one after the other, each timed by the host."""

    name = "wall clock"

    def run(self, step: Callable[[int], object], count: int, first: int = 0) -> list[float]:
        """Milliseconds of ``count`` calls, step(first), step(first + 1), ..."""
        samples = []
        for number in range(first, first + count):
            start = time.perf_counter()
            step(number)
            samples.append(1e3 * (time.perf_counter() - start))
        return samples

    def wait(self) -> None:
        """Until all work that was started is done."""


class CudaEvents:
    """Calls queued without waiting, an event before and behind each: the time that the GPU takes,
    gaps included where the host is slower."""

    name = "CUDA events"

    def run(self, step: Callable[[int], object], count: int, first: int = 0) -> list[float]:
        events = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            for _ in range(count)
        ]
        for number, (start, end) in enumerate(events, first):
            start.record()
            step(number)
            end.record()
        self.wait()
        return [start.elapsed_time(end) for start, end in events]

    def wait(self) -> None:
        torch.cuda.synchronize()


def clock_for(device: str):
    return CudaEvents() if device == "cuda" else WallClock()


def measure(clock, step, seconds: float, sets: int = 1) -> list[float]:
    """Milliseconds per call: LEAST to MOST samples within about ``seconds``, after a warm-up.

    The warm-up goes over every input set at least once, and its fastest call says how many samples
    there is time for.
    """
    warm = max(WARM_UP, sets)
    fastest = min(clock.run(step, warm))
    count = int(1e3 * seconds / max(fastest, 1e-6))
    return clock.run(step, max(LEAST, min(MOST, count)), warm)


def spread(samples: list[float]) -> float:
    """Half the distance between the quartiles."""
    if len(samples) < 2:
        return 0.0
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return (high - low) / 2


def sets_for(bytes_of_one: int, device: str) -> int:
    """How many input sets it takes to hold three times the L2 cache; 1 on a CPU."""
    if device != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, min(256, math.ceil(3 * cache / max(1, bytes_of_one))))


def first_call(clock, step) -> float:
    """Milliseconds of the first call, waiting included: compilation, and whatever is lazy."""
    start = time.perf_counter()
    step(0)
    clock.wait()
    return 1e3 * (time.perf_counter() - start)


# -- what the machine can do at most --------------------------------------------------------------


def ceilings(clock, device: str, dtypes) -> dict:
    """Measured FLOP/s of a large matrix product per dtype, and bytes/s of a large copy.

    The best of the samples: a ceiling is not an average. Random numbers: zeros are faster.
    """
    side = 8192 if device == "cuda" else 1024
    found: dict = {"matmul_side": side, "flops_per_second": {}, "samples_ms": {}}
    for dtype in sorted(dtypes):
        a, b = (torch.randn(side, side, device=device).to(getattr(torch, dtype)) for _ in range(2))
        samples = measure(clock, lambda _, a=a, b=b: a @ b, 0.3)
        found["samples_ms"][f"matmul {dtype}"] = samples
        found["flops_per_second"][dtype] = 2 * side**3 / (min(samples) * 1e-3)
    source = torch.randn((1 << 28) if device == "cuda" else (1 << 24), device=device)
    target = torch.empty_like(source)
    samples = measure(clock, lambda _: target.copy_(source), 0.2)
    found["copy_bytes"] = 2 * source.numel() * source.element_size()
    found["samples_ms"]["copy"] = samples
    found["bytes_per_second"] = found["copy_bytes"] / (min(samples) * 1e-3)
    return found


def better(a: dict, b: dict) -> dict:
    """The higher ceilings of two measurements, and the samples of both."""
    if not a:
        return b
    rates = {
        dtype: max(rate, b["flops_per_second"][dtype])
        for dtype, rate in a["flops_per_second"].items()
    }
    samples = {name: own + b["samples_ms"][name] for name, own in a["samples_ms"].items()}
    memory = max(a["bytes_per_second"], b["bytes_per_second"])
    new = {"flops_per_second": rates, "samples_ms": samples, "bytes_per_second": memory}
    return a | new
