"""Kernels of one instruction each, with inputs and what must come out.

The tests compare the emulator with the formulas here, and a run on a GPU compares the GPU with the
emulator (tests/gpu/golden.py): both launch the same PTX text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from . import Config, Module, tensor_map

VERSION = "8.1"  # of PTX: old enough for the drivers of sm_90, new enough for red.v4
BLOCK = 128


@dataclasses.dataclass(frozen=True)
class Map:
    """A tensor map among the arguments of a kernel: of which tensor, and how."""

    tensor: int  # index into inputs + outputs
    box: tuple[int, ...]
    swizzle: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Micro:
    """Parameters of the kernel "micro": pointers to the inputs, to the outputs, then the maps.

    outputs: what is in them before the launch. expected(*inputs): the outputs after it.
    tolerance: 0 where bits must agree; else relative to the largest element of an output, or to
    each one (elementwise).
    """

    name: str
    ptx: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    expected: Callable
    arch: int = 80
    grid: int = 1
    block: int = 32
    shared: int = 0
    tolerance: float = 0.0
    elementwise: bool = False
    maps: tuple[Map, ...] = ()

    def __repr__(self):
        return self.name


def emulated(case: Micro, config: Config | None = None) -> tuple[Tensor, ...]:
    """The outputs of a case in the emulator."""
    outputs = tuple(tensor.clone() for tensor in case.outputs)
    tensors = (*case.inputs, *outputs)
    maps = [tensor_map(tensors[m.tensor], m.box, m.swizzle) for m in case.maps]
    Module(case.ptx).launch(
        "micro", (case.grid,), (case.block,), *tensors, *maps, shared=case.shared, config=config
    )
    return outputs


def agree(case: Micro, got: Tensor, wanted: Tensor) -> bool:
    """Whether an output is right: NaN (of any kind), infinities and zeros where they are expected,
    and the rest equal or within the tolerance."""
    if not wanted.is_floating_point():
        return torch.equal(got, wanted)
    got, wanted = got.double(), wanted.double()
    if not torch.equal(got.isnan(), wanted.isnan()):
        return False
    finite = wanted.isfinite()
    inexact = finite if case.tolerance else torch.zeros_like(finite)
    exact = ~inexact & ~wanted.isnan()
    if not torch.equal(got[exact], wanted[exact]):
        return False
    if not torch.equal(got[exact].signbit(), wanted[exact].signbit()):
        return False
    got, wanted = got[inexact], wanted[inexact]
    size = wanted.abs() if case.elementwise else wanted.abs().max() if len(wanted) else 0.0
    return bool(((got - wanted).abs() <= case.tolerance * size).all())


def difference(case: Micro, got: Tensor, wanted: Tensor) -> str:
    """The first few elements that differ, and what they were made from."""
    got, wanted = got.flatten(), wanted.flatten()
    alike = (got == wanted) | (got != got) & (wanted != wanted)
    places = (~alike).nonzero().flatten().tolist()
    lines = [f"{len(places)} of {len(got)} elements differ"]
    for place in places[:5]:
        lines.append(f"  [{place}] is {got[place].item()}, expected {wanted[place].item()}")
        if case.elementwise:
            index = place * len(case.inputs[0]) // len(got)  # of a pair where the result is one
            operands = ", ".join(hex(tensor[index].item()) for tensor in case.inputs)
            lines[-1] += f", operands {operands}"
    return "\n".join(lines)


def kernel(body: str, pointers: int, arch: int = 80, maps: int = 0, registers: str = "") -> str:
    """PTX of the kernel "micro". In ``body`` %ptr0, %ptr1 ... are the pointers, %thread is %tid.x,
    and ``smem`` is the dynamic shared memory, which starts at a multiple of 1024."""
    names = [f"    .param .u64 p{i}" for i in range(pointers)]
    names += [f"    .param .align 64 .b8 map{i}[128]" for i in range(maps)]
    lines = [
        f".version {VERSION}",
        f".target {'sm_90a' if arch == 90 else f'sm_{arch}'}",
        ".address_size 64",
        ".extern .shared .align 1024 .b8 smem[];",
        ".visible .entry micro(",
        ",\n".join(names),
        ")",
        "{",
        f"    .reg .b64 %ptr<{max(1, pointers)}>;",
        "    .reg .b32 %thread;",
        *(f"    {line.strip()}" for line in registers.splitlines() if line.strip()),
        "    mov.u32 %thread, %tid.x;",
    ]
    for i in range(pointers):
        lines += [f"    ld.param.u64 %ptr{i}, [p{i}];", f"    cvta.to.global.u64 %ptr{i}, %ptr{i};"]
    lines += [f"    {line.strip()}" for line in body.splitlines() if line.strip()]
    lines += ["    ret;", "}", ""]
    return "\n".join(line for line in lines if line)


def generator(name: str) -> torch.Generator:
    """Random numbers that depend on the name alone."""
    return torch.Generator().manual_seed(sum(ord(c) * 31**i for i, c in enumerate(name)) % 2**31)
