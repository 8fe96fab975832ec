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

from tilemask.kernels import backward, forward, pack, split, sums
from tilemask.kernels.masks import ListArgs, MaskArgs
from tilemask.kernels.scores import ScoreArgs
from tilemask.kernels.tiles import TensorArg
from tilemask.kernels.tuning import TileConfig, padded

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
KERNELS = {
    "forward": forward.forward_kernel,
    "decode": forward.forward_kernel,
    "dq": backward.dq_kernel,
    "dkv": backward.dkv_kernel,
    "sums": sums.pair_sums_kernel,
}
TENSORS = ("q", "k", "v", "out", "do", "dq", "dk", "dv")
FORMS = ("affine", "lists", "words", "keys", "lists and words")
OPTIONS = {
    "bias": {
        "bias": "*bf16",
        "bias_outer": "i64",
        "bias_inner": "i64",
        "bias_split": "i32",
        "bias_head": "i64",
        "bias_row": "i64",
        "bias_col": 1,
    },
    "softcap": {"softcap": "fp32"},
    "alibi": {"slopes": "*fp32", "slopes_batch": "i32"},
    "sinks": {"sinks": "*fp32"},
    "dropout": {"seed": "*i64", "threshold": "i32", "factor": "fp32"},
}
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


def mask_types(form: str, per_batch: bool) -> MaskArgs:
    """The types of MaskArgs; its steps are ints."""
    given = {"bounds": "*i32"} if per_batch else {}
    if "lists" in form:
        given |= {"lo": "*i32", "hi": "*i32", "lo_batch": "i32", "lo_head": "i32"}
    if "words" in form:
        given |= {"words": "*i32", "words_split": "i32", "words_line": "i32"}
        steps = ("words_outer", "words_inner", "words_head", "words_group")
        given |= dict.fromkeys(steps, "i64")
    if form == "keys":
        given |= {"keys": "*i32", "keys_batch": "i32"}
    if "words" in form or form == "keys":
        given |= {"live": "*i32", "live_batch": "i32", "live_head": "i32"}
    return MaskArgs(**given)


def arguments(
    kernel: str, dtype: str, form: str, per_batch: bool, option: str | None = None
) -> dict:
    """The kernel's run-time arguments by type, as ordinary calls specialise them."""
    tensor = TensorArg(f"*{dtype}", "i64", "i64", "i32")
    lists = ListArgs() if form == "affine" else ListArgs("*i32", "*i32", "i32", "i32")
    known = {name: tensor for name in TENSORS}
    known |= dict.fromkeys(("lse", "delta", "dlse"), "*fp32")
    known |= dict.fromkeys(("scale", "weight"), "fp32")
    known |= {"mask": mask_types(form, per_batch), "lists": lists, "visits": None}
    known["score"] = ScoreArgs(**(OPTIONS[option] if option else {}))
    known["rest"] = "*fp32" if option in ("bias", "sinks") or dtype == "fp32" else None
    known["sums"] = f"*{dtype}"
    if kernel in ("forward", "decode"):
        known["parts"] = forward.PartArgs(*["*fp32"] * 3 if kernel == "decode" else [None] * 3)
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
    option: str | None = None,
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
        "FOLDED": kernel == "decode" and form == "affine" and option is None,
        "NATURAL": option in ("bias", "softcap", "alibi"),
        "ROWS_KEPT": True,
        "COLS_KEPT": True,
        "PRECISION": precision,
        "PORTABLE": False,
    }
    function = KERNELS[kernel]
    signature, values, hints = {}, {}, {}
    for index, name in enumerate(function.arg_names):
        if name in constants:
            signature[name], values[(index,)] = "constexpr", constants[name]
            continue
        given = arguments(kernel, dtype, form, per_batch, option)[name]
        if isinstance(given, tuple):
            fields = enumerate(given)
            signature[name] = type(given)(*("constexpr" if f in (None, 1) else f for f in given))
        else:
            fields = [(None, given)]
            signature[name] = "constexpr" if given is None else given
        for place, kind in fields:
            path = (index,) if place is None else (index, place)
            if kind in (None, 1):
                values[path] = kind
            elif kind.startswith("*") or name in TENSORS or (name == "score" and kind == "i64"):
                # aligned pointers and strides
                hints[path] = [["tt.divisibility", 16]]
    return finish(function, signature, values, hints, arch, config)


def compile_packing(kernel: str, arch: int, **constants) -> Compiled:
    """Compile one of the kernels that make words and lists of a mask with words and key words."""
    function = getattr(pack, kernel)
    mask = mask_types("words", True)._replace(keys="*i32", keys_batch="i32")
    if kernel == "live_rows_kernel":
        mask = mask._replace(live=None, live_batch=None, live_head=None)
    pointers = {"bits": "*u8", "words": "*i32", "transposed": "*i32", "live": "*i32"}
    pointers |= {"classes": "*u8", "counts": "*i32", "lists": "*i32"}
    signature, values, hints = {}, {}, {}
    for index, name in enumerate(function.arg_names):
        if name in constants:
            signature[name], values[(index,)] = "constexpr", constants[name]
        elif name == "mask":
            signature[name] = type(mask)(*("constexpr" if f is None else f for f in mask))
            values |= {(index, place): None for place, f in enumerate(mask) if f is None}
        elif name == "stride_col":
            signature[name], values[(index,)] = "constexpr", 1
        else:
            signature[name] = pointers.get(name, "i64" if name.startswith("stride") else "i32")
            if name in pointers or name == "len_k" or name.startswith("stride"):
                hints[(index,)] = [["tt.divisibility", 16]]
    return finish(function, signature, values, hints, arch, TileConfig(0, 0, 4, 1))


def compile_merge(arch: int, dtype: str, width: int, splits: int) -> Compiled:
    """Compile the kernel that merges the shares of a row."""
    function = split.merge_kernel
    constants = {"DV": width, "BLOCK_DV": padded(width), "SPLITS": splits, "NATURAL": False}
    given = {
        "parts": forward.PartArgs("*fp32", "*fp32", "*fp32"),
        "out": TensorArg(f"*{dtype}", "i64", "i64", "i32"),
        "lse": "*fp32",
        "rest": None,
        "score": ScoreArgs(),
    }
    signature, values = {}, {}
    for index, name in enumerate(function.arg_names):
        if name in constants:
            signature[name], values[(index,)] = "constexpr", constants[name]
            continue
        kind = given.get(name, "i32")
        if isinstance(kind, tuple):
            signature[name] = type(kind)(*("constexpr" if f is None else f for f in kind))
            values |= {(index, place): None for place, f in enumerate(kind) if f is None}
        elif kind is None:
            signature[name], values[(index,)] = "constexpr", None
        else:
            signature[name] = kind
    return finish(function, signature, values, {}, arch, TileConfig(0, 0, 4, 1))


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
