"""The machine code of the CUDA library: what nvcc makes of csrc/, read without a GPU.

    python tests/library_code.py            prints the reports
    python tests/library_code.py --write    writes them: bench/results/static/sm_80.json, ...

For each kernel that multiplies matrices a report has its registers and, of its loop over tiles,
instructions per score and, on sm_80, the cycles for which one tile keeps each part of a
multiprocessor busy. On sm_90a it is that of the kernels that differ, which copy tiles in boxes.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import functools
import hashlib
import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
import aot  # noqa: E402
import nvcc  # noqa: E402
from nvcc import toolchain  # noqa: E402
from ptx_emulator import build  # noqa: E402

STATIC = ROOT / "bench" / "results" / "static"
LOOPS = ("sm80_forward", "sm80_dqkv", "sm80_dq", "sm80_dkv")  # sources of loops over tiles
REPORTED = {"80": LOOPS, "90a": ("sm80_forward",)}
KERNELS = ("forward", "wide_forward", "decode", "dq", "dkv", "dqkv")  # with tiles of their own
WARP = 32

# Cycles for which a warp's instruction occupies a part of sm_80 that one scheduler uses, or its
# quarter of what all four share. Tensor: 1024 half-precision multiply-adds a cycle and
# multiprocessor (NVIDIA A100 architecture whitepaper); the others: "Throughput of native arithmetic
# instructions" in the CUDA C++ programming guide, and 128 bytes of shared memory a cycle.
PIPES = {
    "tensor": {"HMMA": 8},
    "exp2": {"MUFU": 8},
    "float": {"FADD": 2, "FMUL": 2, "FFMA": 2, "IMAD": 2},
    "integer": {
        **dict.fromkeys(("LOP3", "IADD3", "ISETP", "IMNMX", "SHF", "LEA", "SEL", "PRMT"), 2),
        **dict.fromkeys(("PLOP3", "R2P", "P2R", "FSEL", "FSETP", "FMNMX", "F2FP"), 2),
    },
    "shared memory": {"LDSM": 16, "LDS": 4, "STS": 4, "SHFL": 4},
}


@dataclass(frozen=True)
class Kernel:
    """One kernel of a cubin."""

    name: str  # forward_kernel<BFloat16, 64, false, 128>
    registers: int
    stack: int  # bytes
    instructions: list[str]  # mnemonics
    loops: list[list[str]]  # those over tiles: the innermost ones with products, shortest first
    least: list[int]  # instructions of a loop that no branch leaves out

    @property
    def spills(self) -> int:
        return sum(name in ("LDL", "STL") for name in self.instructions)


@functools.cache
def kernels(source: str, arch: str) -> list[Kernel]:
    """The kernels of csrc/``source``.cu, compiled for ``arch`` ("80", "90a", ...)."""
    compiler = nvcc.find_nvcc()
    headers = [path.read_bytes() for path in sorted(toolchain.CSRC.rglob("*.*h"))]
    text = (toolchain.CSRC / f"{source}.cu").read_bytes()
    flags = [*toolchain.FLAGS, "-cubin", f"-arch=sm_{arch}"]

    def compile_cubin(folder: Path) -> None:
        build.call([compiler, *flags, toolchain.CSRC / f"{source}.cu", "-o", folder / "code.cubin"])

    key = build.digest(build.version(compiler), *flags, *headers, text)
    cubin = build.cached(f"{source}-sm_{arch}-{key}", compile_cubin) / "code.cubin"
    usage = aot.run_tool("cuobjdump", "-res-usage", str(cubin))
    resources = dict(re.findall(r"Function (\S+):\s+(REG:\d+ STACK:\d+)", usage))
    found = []
    sections = re.split(r"\.section\s+\.text\.", aot.run_tool("nvdisasm", "-c", str(cubin)))
    for section in sections[1:]:
        symbol = section.split(",")[0]
        registers, stack = map(int, re.findall(r"\d+", resources[symbol]))
        instructions, spans, ways = parsed(section)
        with_products = [s for s in spans if "HMMA" in instructions[s[0] : s[1]]]
        inner = [a for a in with_products if not any(contains(a, b) for b in with_products)]
        inner.sort(key=lambda span: span[1] - span[0])
        bodies = [instructions[first:last] for first, last in inner]
        least = [shortest(instructions, ways, *span) for span in inner]
        found.append(Kernel(readable(symbol), registers, stack, instructions, bodies, least))
    return found


def contains(a: tuple[int, int], b: tuple[int, int]) -> bool:
    return a != b and a[0] <= b[0] and b[1] <= a[1]


def parsed(section: str) -> tuple[list[str], list[tuple[int, int]], list[list[int]]]:
    """The mnemonics of a function; its loops: first instruction, and past the last; and which
    instructions may follow each."""
    labels, instructions, branches, ends = {}, [], [], []
    for line in section.splitlines():
        label = re.match(r"\s*(\.L_x_\d+):", line)
        if label:
            labels[label[1]] = len(instructions)
        found = re.search(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z0-9_]+)([^;]*)", line)
        if found and found[2] != "NOP":
            target = re.search(r"`\((\.L_x_\d+)\)", found[3])
            if found[2] == "BRA" and target:
                other = found[3].split("`")[0]  # .DIV, or a second predicate
                always = not found[1] and not re.search(r"DIV|U?P\d", other)
                branches.append((len(instructions), target[1], always))
            if found[2] in ("EXIT", "RET") and not found[1]:
                ends.append(len(instructions))
            instructions.append(found[2])
    ways = [[i + 1] for i in range(len(instructions))]
    for i, target, always in branches:
        if target in labels:
            ways[i] = [labels[target]] if always else [i + 1, labels[target]]
    for i in ends:
        ways[i] = []
    back = [(labels[t], i) for i, t, _ in branches if labels.get(t, i + 1) <= i]
    spans = [(first, last + 1) for first, last in back if every_way_passes(ways, first, last)]
    return instructions, spans, ways


def every_way_passes(ways: list[list[int]], first: int, last: int) -> bool:
    """Whether ``last`` is reached by way of ``first`` alone: else a branch between them is no loop,
    but the way back from code that was put at the end because it seldom runs."""
    seen, left = {first}, [0]
    while left:
        i = left.pop()
        if i == last and first != last:
            return False
        if i not in seen and i < len(ways):
            seen.add(i)
            left += ways[i]
    return True


def shortest(instructions: list[str], ways: list[list[int]], first: int, last: int) -> int:
    """The fewest instructions from ``first`` to ``last`` without going back, of the ways with all
    products."""
    reached = {first: (0, 0)}  # by instruction: minus the products before it, and all
    for i in range(first, last):
        if i in reached:
            products, length = reached[i]
            after = products - (instructions[i] == "HMMA"), length + 1
            for way in [last] if i == last - 1 else ways[i]:
                if i < way <= last:
                    reached[way] = min(reached.get(way, after), after)
    return reached[last][1]


def readable(symbol: str) -> str:
    """kernel<BFloat16, 64, false, 16> from a mangled name."""
    name, arguments = re.search(r"\d([a-z_]+_kernel)(?:I(.*?)EE)?", symbol).groups()
    if not arguments:
        return name
    values = re.findall(r"\d(B?Float16)|Li(\d+)|Lb([01])", arguments + "E")
    words = [t or n or ("false", "true")[int(b)] for t, n, b in values]
    return f"{name}<{', '.join(words)}>"


def width_of(kernel: Kernel) -> int:
    return int(re.search(r", (\d+)", kernel.name)[1])


def shape_of(kernel: Kernel) -> dict[str, int]:
    """Its TileShape."""
    name = kernel.name.split("_")[0]
    if name == "forward":
        rows = int(re.search(r"(\d+)>", kernel.name)[1])
        kinds = ("decode", "forward", "wide_forward")
        return next(
            shape
            for shape in (tile_shapes()[kind, width_of(kernel)] for kind in kinds)
            if shape["block_m"] == rows
        )
    if name in ("dq", "dkv") and kernel.name.endswith("true>"):
        name = f"general {name}"
    return tile_shapes()[name, width_of(kernel)]


def scores_per_thread(kernel: Kernel) -> int:
    """How many scores of a tile one thread has: products are counted by what they share."""
    shape = shape_of(kernel)
    return shape["block_m"] * shape["block_n"] // (WARP * shape["warps"])


def in_boxes(kernel: Kernel, arch: str) -> bool:
    """Whether it has full tiles copied by the tensor memory accelerator."""
    plain = re.match(r"forward_kernel<\w+, \d+, false", kernel.name)
    return plain is not None and int(arch.rstrip("a")) >= 90


def expected(kernel: Kernel) -> dict[str, int]:
    """What a warp must execute for a tile: products, loads of their operands from shared memory by
    blocks of 16 x 16, and copies of 16 bytes into it."""
    shape, name, width = shape_of(kernel), kernel.name.split("_")[0], width_of(kernel)
    blocks = width // 16  # across an operand
    own = shape["row_tiles"]  # blocks of rows (dkv, dqkv: of columns) that the warp holds
    columns = name in ("dkv", "dqkv")
    walked = shape["block_m" if columns else "block_n"] // 16  # by the block of threads
    share = walked // shape["across"]  # of scores that the warp computes
    more = 0  # copies
    if name == "forward":
        products, loads = 2, 2 * share * blocks + (own * blocks if width > 64 else 0)
    elif name == "dq":
        products, loads = 3, 2 * own * blocks + 3 * share * blocks
    elif name == "dqkv":
        kept = walked * blocks // shape["across"]  # of do and q
        other = own * share * (shape["across"] - 1)  # of ds, that another warp computed
        rows = 2  # of dq, by 16
        dq = shape["block_n"] // 16 * (rows + walked * blocks // (shape["warps"] * rows))
        products, loads = 5, 2 * (own + share) * blocks + 2 * kept + other + dq
        # of what rows_kernel left; and two of what the steps after the next need of their lists
        more = 3 if kernel.name.endswith("true>") else 1
    else:
        kept = walked * blocks // shape["across"]  # dk's and dv's columns are shared out
        products, loads = 4, 2 * (own + share) * blocks + 2 * kept
    return {
        "HMMA": products * 2 * own * share * blocks,  # 16 x 8 each
        "LDSM": loads,
        "LDGSTS": 2 * walked * 16 * (width // 8) // (WARP * shape["warps"]) + more,
    }


@functools.cache
def tile_shapes() -> dict[tuple[str, int], dict[str, int]]:
    """What csrc/tiles.h says, by kernel and width."""
    calls = {name: f"{name}_tile(%d)" for name in KERNELS}
    calls |= {f"general {name}": f"{name}_tile(%d, true)" for name in ("dq", "dkv")}
    lines = "".join(
        f'show("{name}", {width}, {call % width});'
        for name, call in calls.items()
        for width in (64, 128, 256)
    )
    fields = ("block_m", "block_n", "warps", "row_tiles", "across")
    program = (
        '#include <cstdio>\n#include "tiles.h"\n'
        "void show(const char* name, int width, TileShape s) {"
        f'std::printf("%s,%d{",%d" * len(fields)}\\n", name, width'
        f"{''.join(f', s.{field}' for field in fields)});}}\n"
        f"int main() {{ {lines} }}\n"
    )

    def compile_program(folder: Path) -> None:
        (folder / "shapes.cpp").write_text(program)
        include, source = f"-I{toolchain.CSRC}", folder / "shapes.cpp"
        build.call([build.cxx(), "-std=c++17", include, source, "-o", folder / "shapes"])

    header = (toolchain.CSRC / "tiles.h").read_bytes()
    made = build.cached(f"shapes-{build.digest(program, header)}", compile_program) / "shapes"
    shapes = {}
    for line in subprocess.run(
        [made], check=True, capture_output=True, text=True
    ).stdout.splitlines():
        name, width, *values = line.split(",")
        shapes[name, int(width)] = dict(zip(fields, map(int, values), strict=True))
    return shapes


def loop_report(body: list[str], scores: int, least: int) -> dict:
    """What a loop over tiles executes at most, its rarely taken branches included, and at least:
    the last tile, of a mask that needs nothing in particular."""
    counts = collections.Counter(body)
    cycles = {
        pipe: sum(counts[name] * cost for name, cost in costs.items())
        for pipe, costs in PIPES.items()
    }
    cycles["issue"] = len(body)
    return {
        "instructions": len(body),
        "per_score": round(len(body) / scores, 2),
        "least_per_score": round(least / scores, 2),
        "cycles": cycles,
        "bound_by": max(cycles, key=cycles.get),
        "counts": dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))),
    }


def report(arch: str) -> dict:
    """Of the bfloat16 kernels; those of float16 are the same but for the type of the products."""
    found = {}
    for source in REPORTED[arch]:
        for kernel in kernels(source, arch):
            if "<BFloat16" not in kernel.name or not kernel.loops:
                continue
            if arch != "80" and not in_boxes(kernel, arch):
                continue
            scores = scores_per_thread(kernel)
            full, partial = zip(kernel.loops, kernel.least, strict=True)
            loops = {
                "full": loop_report(full[0], scores, full[1]),
                "partial": loop_report(partial[0], scores, partial[1]),
            }
            for loop in loops.values():
                if arch != "80":  # PIPES are those of sm_80
                    del loop["cycles"], loop["bound_by"]
            found[kernel.name] = {
                "registers": kernel.registers,
                "scores_per_thread": scores,
                "loops": loops,
            }
    return dict(sorted(found.items()))


def show(found: dict) -> None:
    """Prints a report, a loop in a line."""
    widest = max(map(len, found))
    for name, kernel in found.items():
        for kind, loop in kernel["loops"].items():
            busiest = ", ".join(f"{pipe} {n}" for pipe, n in loop.get("cycles", {}).items())
            spills = f" {kernel['spills']:3} spills," if "spills" in kernel else ""
            print(
                f"{name:{widest}} {kernel['registers']:3} registers,{spills} {kind:7}"
                f" {loop['least_per_score']:5.1f} to {loop['per_score']:5.1f} instructions per"
                f" score{'; cycles: ' if busiest else ''}{busiest}"
            )


def sources_sha256() -> str:
    """Of what the library is compiled from."""
    digest = hashlib.sha256()
    for path in sorted(toolchain.CSRC.rglob("*.*")):
        if path.suffix in (".cu", ".cuh", ".h"):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def provenance(arch: str) -> dict:
    return {
        "command": "python tests/library_code.py --write",
        "made": datetime.date.today().isoformat(),
        "nvcc": nvcc_release(),
        "architecture": f"sm_{arch}",
        "sources_sha256": sources_sha256(),
    }


def nvcc_release() -> str:
    text = build.version(nvcc.find_nvcc())
    return re.search(r"release \d+\.\d+, V([\d.]+)", text)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="to bench/results/static/")
    options = parser.parse_args()
    with ThreadPoolExecutor(2) as pool:
        pairs = [(source, arch) for arch, sources in REPORTED.items() for source in sources]
        list(pool.map(lambda pair: kernels(*pair), pairs))
    for arch in REPORTED:
        kept = {**provenance(arch), "kernels": report(arch)}
        print(f"sm_{arch}")
        show(kept["kernels"])
        if options.write:
            STATIC.mkdir(exist_ok=True)
            (STATIC / f"sm_{arch}.json").write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
