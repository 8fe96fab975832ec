"""Compile the Triton kernels ahead of time, without a GPU, and read what the compiler made.

Not for a process that runs Triton's interpreter: interpreted functions cannot be compiled.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tilemask.kernels import backward, forward, pack
from tilemask.kernels.masks import ListArgs, MaskArgs
from tilemask.kernels.softmax import LOG2_E  # noqa: F401  (a constexpr the kernels close over)
from tilemask.kernels.tiles import TensorArg
from tilemask.kernels.tuning import TileConfig, padded

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
KERNELS = {
    "forward": forward.forward_kernel,
    "dq": backward.dq_kernel,
    "dkv": backward.dkv_kernel,
}
TENSORS = ("q", "k", "v", "out", "do", "dq", "dk", "dv")
FORMS = ("affine", "lists")
SHARED_LIMIT = {80: 163, 86: 99, 90: 227, 100: 227, 120: 99}  # KiB a block may use


@dataclass(frozen=True)
class Compiled:
    registers: int
    spills: int  # load and store instructions to local memory
    stack: int  # bytes
    shared: int  # bytes
    sass: str
    ptx: str

    def count(self, mnemonic: str) -> int:
        return len(re.findall(rf"\b{mnemonic}\b", self.sass))


def arguments(kernel: str, dtype: str, form: str, per_batch: bool) -> dict:
    """The kernel's run-time arguments by type, as ordinary calls specialise them."""
    tensor = TensorArg(f"*{dtype}", "i64", "i64", "i32")
    mask = MaskArgs(
        "*i32" if per_batch else None,
        "*i32" if form == "lists" else None,
        "*i32" if form == "lists" else None,
        "i32",
        "i32",
    )
    lists = ListArgs("*i32", "*i32") if form == "lists" else ListArgs(None, None)
    known = {name: tensor for name in TENSORS}
    known |= dict.fromkeys(("lse", "delta", "dlse"), "*fp32")
    known |= dict.fromkeys(("scale", "scale_log2"), "fp32")
    known |= {"mask": mask, "lists": lists, "visits": None}
    return {name: known.get(name, "i32") for name in KERNELS[kernel].arg_names if name.islower()}


def compile_kernel(
    kernel: str,
    arch: int,
    config: TileConfig,
    dtype: str = "bf16",
    width: int = 64,
    width_v: int | None = None,
    form: str = "affine",
    per_batch: bool = False,
    precision: str = "ieee",
) -> Compiled:
    """Compile one kernel of KERNELS for sm_<arch>."""
    width_v = width if width_v is None else width_v
    constants = {
        "D": width,
        "DV": width_v,
        "BLOCK_D": padded(width),
        "BLOCK_DV": padded(width_v),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "SIGN": 1,
        "PRECISION": precision,
        "PORTABLE": False,
    }
    function = KERNELS[kernel]
    signature, values, hints = {}, {}, {}
    for index, name in enumerate(function.arg_names):
        if name in constants:
            signature[name], values[(index,)] = "constexpr", constants[name]
            continue
        given = arguments(kernel, dtype, form, per_batch)[name]
        if isinstance(given, tuple):
            fields = enumerate(given)
            signature[name] = type(given)(*("constexpr" if f is None else f for f in given))
        else:
            fields = [(None, given)]
            signature[name] = "constexpr" if given is None else given
        for place, kind in fields:
            path = (index,) if place is None else (index, place)
            if kind is None:
                values[path] = None
            elif kind.startswith("*") or name in TENSORS:  # aligned pointers and strides
                hints[path] = [["tt.divisibility", 16]]
    return finish(function, signature, values, hints, arch, config)


def compile_list_builder(arch: int, block_m: int, block_n: int, transposed: bool) -> Compiled:
    """Compile the kernel that builds tile lists."""
    function = pack.build_lists_kernel
    constants = {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "CHUNK": pack.CHUNK,
        "TRANSPOSED": transposed,
    }
    signature = {
        name: "constexpr" if name in constants else "*i32" if name.endswith("_ptr") else "i32"
        for name in function.arg_names
    }
    names = function.arg_names
    values = {(names.index(name),): value for name, value in constants.items()}
    hints = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n.endswith("_ptr")}
    return finish(function, signature, values, hints, arch, TileConfig(block_m, block_n, 4, 1))


def finish(function, signature, values, hints, arch: int, config: TileConfig) -> Compiled:
    built = triton.compile(
        ASTSource(function, signature, values, hints),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": config.num_warps, "num_stages": config.num_stages},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = run_tool("cuobjdump", "-res-usage", file.name)
        sass = run_tool("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    return Compiled(
        registers=int(found[1]),
        spills=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        stack=int(found[2]),
        shared=built.metadata.shared,
        sass=sass,
        ptx=built.asm["ptx"],
    )


def loops(sass: str) -> list[list[str]]:
    """The bodies of the innermost loops in nvdisasm output, as lists of mnemonics."""
    labels, instructions, branches = {}, [], []
    for line in sass.splitlines():
        label = re.match(r"\s*(\.L_x_\d+):", line)
        if label:
            labels[label[1]] = len(instructions)
        found = re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)([^;]*)", line)
        if found:
            target = re.search(r"`\((\.L_x_\d+)\)", found[2])
            if found[1] == "BRA" and target:
                branches.append((len(instructions), target[1]))
            instructions.append(found[1])
    spans = [(labels[t], i) for i, t in branches if labels.get(t, i + 1) <= i]
    inner = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return [instructions[first : last + 1] for first, last in inner]


def run_tool(name: str, *arguments: str) -> str:
    return subprocess.run(
        [str(TOOLS / name), *arguments], check=True, capture_output=True, text=True
    ).stdout
