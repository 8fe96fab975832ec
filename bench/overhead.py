"""What a call costs in Python: microseconds of attention() around a backend that computes nothing.

    python bench/overhead.py [--out FILE]

A backend that returns ready tensors stands first in the list, so that what is timed is the argument
checks, the mask's lowering (kept with the mask object) and the choice of backend. Torch's own call
on the same tiny tensors stands beside it. Prints a table, and writes JSON with its provenance.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import tilemask
from tilemask import backends, masks

ROUNDS, CALLS = 30, 2000


class Trivial:
    """A backend that takes every call and returns the same tensors."""

    NAME = "trivial"

    def __init__(self, q):
        self.result = torch.empty_like(q), q.new_empty(q.shape[:3])

    def why_not(self, call):
        return None

    def forward(self, call):
        return self.result


def microseconds(function) -> tuple[float, float]:
    """Median and best of ROUNDS rounds of CALLS calls each, per call."""
    for _ in range(CALLS):
        function()
    samples = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(CALLS):
            function()
        samples.append((time.perf_counter() - start) / CALLS * 1e6)
    return statistics.median(samples), min(samples)


def measure() -> dict[str, tuple[float, float]]:
    q, k, v = (torch.randn(2, 2, 8, 8) for _ in range(3))
    causal, padding = masks.causal(), masks.padding(torch.tensor([5, 8]))
    both, packed = causal & padding, masks.varlen(torch.tensor([0, 3, 8]))
    dense = both.to_dense(2, 2, 8, 8).contiguous()
    calls = {
        "attention, no mask": lambda: tilemask.attention(q, k, v),
        "attention, causal": lambda: tilemask.attention(q, k, v, mask=causal),
        "attention, causal & padding": lambda: tilemask.attention(q, k, v, mask=both),
        "attention, varlen": lambda: tilemask.attention(q, k, v, mask=packed),
        "scaled_dot_product_attention, is_causal": lambda: tilemask.scaled_dot_product_attention(
            q, k, v, is_causal=True
        ),
        "scaled_dot_product_attention, bool mask": lambda: tilemask.scaled_dot_product_attention(
            q, k, v, attn_mask=dense
        ),
    }
    backends.BACKENDS.insert(0, Trivial(q))
    try:
        results = {name: microseconds(call) for name, call in calls.items()}
    finally:
        backends.BACKENDS.pop(0)
    results["torch's, is_causal, computed"] = microseconds(
        lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)
    )
    results["torch's, bool mask, computed"] = microseconds(
        lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=dense)
    )
    return results


def provenance() -> dict[str, str]:
    root = Path(__file__).parent.parent
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=root,
        capture_output=True,
        text=True,
    ).stdout.strip()
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {
        "command": "python bench/overhead.py " + " ".join(sys.argv[1:]),
        "commit": commit or "unknown",
        "cpu": cpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with torch.no_grad():
        results = measure()
    print(f"{'call':42} {'median':>9} {'best':>9}   microseconds")
    for name, (median, best) in results.items():
        print(f"{name:42} {median:9.2f} {best:9.2f}")
    if arguments.out:
        rows = {
            name: {"median_us": round(median, 3), "best_us": round(best, 3)}
            for name, (median, best) in results.items()
        }
        document = {"schema": 1, **provenance(), "rounds": ROUNDS, "calls": CALLS, "results": rows}
        arguments.out.write_text(json.dumps(document, indent=2) + "\n")
        print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
