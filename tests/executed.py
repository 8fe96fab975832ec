"""Instructions that the GPU backends execute per score, counted in the PTX emulator: what the table
of backends/cuda.py rests on until a GPU has measured it.

    python tests/executed.py          prints the tables of docs/backends.md, in a few minutes

One head of 512 rows and keys in float16: instructions of PTX by all lanes of the kernels that
compute attention, over 512 * 512. All are compiled for sm_80; on sm_86 the library has no room for
the backward in one pass, and Triton has tile shapes of its own.
"""

from __future__ import annotations

import sys
from unittest import mock

import torch
import ways
from ptx_emulator import Config
from ptx_emulator import cuda as posed

import tilemask
from tilemask import masks
from tilemask.backends import triton

LENGTH = 512
WIDTHS = (64, 128, 256)
FORWARD = ("forward_kernel",)
BACKWARD = ("dq_kernel", "dkv_kernel", "dqkv_kernel", "rows_kernel", "round_kernel")


def calls() -> dict[str, dict]:
    """Options of attention() by name."""
    half = torch.float16
    return {
        "everything": {},
        "causal": {"mask": masks.causal()},
        "random bits": {"mask": masks.dense(torch.rand(LENGTH, LENGTH) < 0.5)},
        "sinks": {"sinks": torch.zeros(1)},
        "bias": {"bias": torch.randn(LENGTH, LENGTH, dtype=half)},
        "softcap": {"softcap": 20.0},
        "ALiBi": {"alibi_slopes": torch.ones(1)},
        "dropout": {"dropout_p": 0.1, "dropout_seed": 1},
    }


def per_score(launches: list, kernels: tuple[str, ...]) -> float:
    """Instructions per score of some kernels."""
    made = [counts["instructions"] for name, counts in launches if any(k in name for k in kernels)]
    return 32 * sum(made) / LENGTH**2


def executed(backend: str, width: int, options: dict, arch: int) -> tuple[float, float]:
    """Per score, in the forward and in the backward; arch: of the GPU."""
    q = torch.randn(1, 1, LENGTH, width, dtype=torch.float16, requires_grad=True)
    config = Config(checks=False)
    way = ways.EmulatedLibrary(config, arch) if backend == "cuda" else ways.Emulator(80)
    with way.running() as driver, mock.patch.object(triton, "architecture", lambda device: arch):
        if driver is not None:
            driver.config = config
        out = tilemask.attention(q, q, q, backend=backend, **options)
        torch.autograd.grad(out, q, torch.randn_like(out))
        launches = posed.launches() if driver is None else driver.launches
    return per_score(launches, FORWARD), per_score(launches, BACKWARD)


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    columns = [(backend, arch) for backend in ("cuda", "triton") for arch in (80, 86)]
    names = [f"{backend}, sm_{arch}" for backend, arch in columns]
    print(f"| | D | {' | '.join(names)} |\n|---|---|{'---|' * len(names)}")
    for width in WIDTHS:
        for name, options in calls().items():
            counted = [executed(backend, width, options, arch) for backend, arch in columns]
            cells = " | ".join(f"{forward:.0f} + {backward:.0f}" for forward, backward in counted)
            print(f"| {name} | {width} | {cells} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
