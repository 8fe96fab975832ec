"""The machine code of FlashAttention-2, read as library_code.py reads that of the CUDA library.

    python tests/flash_attn_code.py DIR            prints the report of sm_80
    python tests/flash_attn_code.py DIR --write    writes bench/results/static/flash_attn_2.json

DIR is an unpacked source distribution of the package flash-attn, version 2, which brings CUTLASS.
Its bfloat16 kernels are compiled without dropout and other options, for lengths that fill tiles.
Of the backward pass only the kernel with the products is read, not the two that work on rows.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import aot
import library_code
import nvcc
from library_code import STATIC, WARP, Kernel, contains, loop_report, parsed, shortest
from ptx_emulator import build

ARCH = "sm_80"
PRODUCTS = {"forward": 2, "backward": 5}  # of matrices, per tile
FLAGS = ["-std=c++17", "-O3", "--use_fast_math", f"-arch={ARCH}", "-cubin"]
FLAGS += ["--expt-relaxed-constexpr", "--expt-extended-lambda"]

# What flash-attn includes of PyTorch: a random state that nothing reads without dropout, and checks
# of launches, of which there are none.
TORCH = {
    "ATen/cuda/CUDAGeneratorImpl.h": """\
#pragma once
#include <cstdint>
#include <tuple>
namespace at {
struct PhiloxCudaState { uint64_t seed, offset; };
}
""",
    "ATen/cuda/detail/UnpackRaw.cuh": """\
#include <ATen/cuda/CUDAGeneratorImpl.h>
namespace at::cuda::philox {
__device__ inline std::tuple<uint64_t, uint64_t> unpack(PhiloxCudaState state) {
  return {state.seed, state.offset};
}
}
""",
    "c10/cuda/CUDAException.h": """\
#define C10_CUDA_CHECK(call) call
#define C10_CUDA_KERNEL_LAUNCH_CHECK()
""",
}

# Of the booleans only causal is open; true are those that say that lengths and width fill tiles.
SOURCES = {
    "forward": """\
#include "flash_fwd_launch_template.h"
template __global__ void FLASH_NAMESPACE::flash_fwd_kernel<
    Flash_fwd_kernel_traits<%s, cutlass::bfloat16_t>,
    false, %s, false, false, true, true, false, false>(
    KERNEL_PARAM_MODIFIER const Flash_fwd_params);
""",
    "backward": """\
#include "flash_bwd_launch_template.h"
template __global__ void FLASH_NAMESPACE::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<
    Flash_bwd_kernel_traits<%s, cutlass::bfloat16_t>,
    false, %s, false, false, true, true, false>(
    KERNEL_PARAM_MODIFIER const Flash_bwd_params);
""",
}


@dataclass(frozen=True)
class Choice:
    """A tile that flash-attn's launch templates choose."""

    direction: str
    width: int
    block_m: int
    block_n: int
    warps: int
    gpus: tuple[str, ...]  # on which it is chosen; all run the machine code of sm_80
    causal: tuple[bool, ...] = (False, True)
    rest: str = "false, false"  # of the arguments that give the layout

    @property
    def scores_per_thread(self) -> int:
        return self.block_m * self.block_n // (WARP * self.warps)

    def name(self, causal: bool) -> str:
        return f"{self.direction} {self.width}{' causal' * causal}, {self.block_m}x{self.block_n}"

    def source(self, causal: bool) -> str:
        traits = f"{self.width}, {self.block_m}, {self.block_n}, {self.warps}, {self.rest}"
        return SOURCES[self.direction] % (traits, str(causal).lower())


CHOICES = [
    Choice("forward", 64, 128, 128, 4, ("sm_80", "sm_86")),
    Choice("forward", 128, 128, 64, 4, ("sm_80",)),
    Choice("forward", 128, 128, 32, 4, ("sm_86",), causal=(False,)),
    Choice("forward", 128, 64, 64, 4, ("sm_86",), causal=(True,)),
    Choice("forward", 256, 128, 64, 8, ("sm_80",)),
    Choice("forward", 256, 64, 64, 4, ("sm_86",)),
    Choice("backward", 64, 128, 128, 8, ("sm_80",), rest="4, 4, 4, false, false"),
    Choice("backward", 64, 64, 128, 8, ("sm_86",), rest="2, 4, 4, true, false"),
    Choice("backward", 128, 64, 128, 8, ("sm_80",), rest="2, 4, 2, false, false"),
    Choice("backward", 128, 64, 64, 8, ("sm_86",), rest="4, 2, 2, true, false"),
    Choice("backward", 256, 64, 64, 8, ("sm_80",), rest="4, 2, 2, false, true"),
    Choice("backward", 256, 64, 32, 8, ("sm_86",), rest="4, 1, 2, true, true"),
]


def compiled(csrc: Path, choice: Choice, causal: bool) -> tuple[Kernel, int, list[list[int]]]:
    """The kernel, whose one loop is that over tiles, where in its instructions that begins, and
    which instruction may follow which."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for header, text in TORCH.items():
            (folder / header).parent.mkdir(parents=True, exist_ok=True)
            (folder / header).write_text(text)
        (folder / "kernel.cu").write_text(choice.source(causal))
        include = [folder, csrc / "flash_attn" / "src", csrc / "cutlass" / "include"]
        command = [nvcc.find_nvcc(), *FLAGS, *(f"-I{path}" for path in include)]
        build.call([*command, folder / "kernel.cu", "-o", folder / "kernel.cubin"])
        usage = aot.run_tool("cuobjdump", "-res-usage", str(folder / "kernel.cubin"))
        code = aot.run_tool("nvdisasm", "-c", str(folder / "kernel.cubin"))
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    instructions, spans, ways = parsed(re.split(r"\.section\s+\.text\.", code)[1])
    first, last = loop_over_tiles(instructions, spans)
    loop = instructions[first:last]
    expected = PRODUCTS[choice.direction] * choice.scores_per_thread * choice.width // 64
    if loop.count("HMMA") != expected:  # each multiplies 16x16 by 16x8
        raise RuntimeError(
            f"the loop of {choice.name(causal)} has {loop.count('HMMA')} products, not {expected}"
        )
    least = [shortest(instructions, ways, first, last)]
    return Kernel(choice.name(causal), registers, stack, instructions, [loop], least), first, ways


def loop_over_tiles(instructions: list[str], spans: list[tuple[int, int]]) -> tuple[int, int]:
    """Two of the spans may overlap: the loop's copies of the next keys can stand above its head,
    from where a branch leads back into its middle.
    """
    with_products = [s for s in spans if "HMMA" in instructions[s[0] : s[1]]]
    inner = [a for a in with_products if not any(contains(a, b) for b in with_products)]
    return min(first for first, _ in inner), max(last for _, last in inner)


def loop_reports(
    kernel: Kernel, begin: int, ways: list[list[int]], choice: Choice, causal: bool
) -> dict[str, dict]:
    """As in library_code.py. The causal backward kernel has one loop, which masks every tile. The
    causal forward kernel has the tiles on the diagonal unrolled ahead of its loop: from the barrier
    before their first product.
    """
    (loop,) = kernel.loops
    full = loop_report(loop, choice.scores_per_thread, kernel.least[0])
    if not causal:
        return {"full": full}
    if choice.direction == "backward":
        return {"full": full, "partial": full}
    product = kernel.instructions.index("HMMA")
    barrier = max(i for i in range(product) if kernel.instructions[i] == "BAR")
    ahead = kernel.instructions[barrier:begin]
    tiles = ahead.count("HMMA") // loop.count("HMMA")
    least = shortest(kernel.instructions, ways, barrier, begin)
    partial = loop_report(ahead, choice.scores_per_thread * tiles, least)
    return {"full": full, "partial": {"tiles": tiles, **partial}}


def report(csrc: Path) -> dict:
    found = {}
    for choice in CHOICES:
        for causal in choice.causal:
            kernel, begin, ways = compiled(csrc, choice, causal)
            found[kernel.name] = {
                "chosen_on": list(choice.gpus),
                "block_m": choice.block_m,
                "block_n": choice.block_n,
                "threads": WARP * choice.warps,
                "registers": kernel.registers,
                "spills": kernel.spills,
                "scores_per_thread": choice.scores_per_thread,
                "loops": loop_reports(kernel, begin, ways, choice, causal),
            }
    return found


def provenance(folder: Path) -> dict:
    package = (folder / "PKG-INFO").read_text()
    return {
        "what": "instructions per score in the loops of FlashAttention-2's bfloat16 kernels, read "
        "from the compiled code; nothing was timed",
        "command": "python tests/flash_attn_code.py DIR --write",
        "made": datetime.date.today().isoformat(),
        "flash-attn": re.search(r"^Version: (\S+)", package, re.MULTILINE)[1],
        "nvcc": library_code.nvcc_release(),
        "architecture": ARCH,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="unpacked source distribution of flash-attn")
    parser.add_argument("--write", action="store_true", help="to bench/results/static/")
    options = parser.parse_args()
    kept = {**provenance(options.folder), "kernels": report(options.folder / "csrc")}
    library_code.show(kept["kernels"])
    if options.write:
        (STATIC / "flash_attn_2.json").write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
