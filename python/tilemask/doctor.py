"""python -m tilemask doctor: what this machine has, and which backends run on it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import torch
import torch.nn.functional as F

import tilemask
from tilemask import backends, library, masks
from tilemask.attention import checked as checked_call

# what rounding stays far below, and a wrong mask far above
BOUNDS = {torch.float32: 1e-4, torch.float16: 2e-2}
VARIABLES = ("TILEMASK_BACKEND", "TILEMASK_DEBUG", "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES")


def main() -> int:
    """Print the report; 0 if the reference passes its check."""
    print("machine")
    lines = {
        "tilemask": f"{tilemask.__version__}, {Path(tilemask.__file__).parent}",
        "python": f"{platform.python_version()}, {sys.executable}",
        "torch": f"{torch.__version__}, {cuda_build()}",
        "triton": installed("triton") or "not installed",
        "library": cuda_library(),
        "driver": driver(),
        "GPUs": "none that torch can use",
    }
    for number, name in enumerate(gpus()):
        lines.pop("GPUs", None)
        lines[f"GPU {number}"] = name
    show(lines)

    print("\nbackends")
    states = {backend.NAME: state(backend) for backend in backends.BACKENDS}
    show({name: text for name, (_, text) in states.items()})

    print("\nenvironment")
    show({name: os.environ.get(name, "not set") for name in VARIABLES})

    works = {name for name, (good, _) in states.items() if good}
    sentence = advice(works, {name: text for name, (_, text) in states.items()})
    print("\n" + textwrap.fill(f"advice: {sentence}", 96, subsequent_indent=" " * 8))
    return 0 if "reference" in works else 1


def show(lines: dict[str, str]):
    width = max(map(len, lines)) + 2
    for name, text in lines.items():
        print(f"  {name:<{width}}{text}")


# -- the machine ----------------------------------------------------------------------------------


def cuda_build() -> str:
    return "built without CUDA" if torch.version.cuda is None else f"CUDA {torch.version.cuda}"


def installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cuda_library() -> str:
    """What libtilemask.so was built for, and what keeps it from running; or why it is missing."""
    reason = library.unavailable()
    if reason is not None:
        return reason
    names, nvcc = library.architectures(), library.built()[1]
    text = f"libtilemask.so, ABI {library.ABI}, CUDA {nvcc}, for {names}"
    reasons = (library.unfit(device) for device in range(max(1, torch.cuda.device_count())))
    return "; does not run here: ".join([text, *dict.fromkeys(filter(None, reasons))])


def gpus() -> list[str]:
    """Name and compute capability of every GPU that torch can use."""
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        found.append(f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}")
    return found


def driver() -> str:
    """The version of NVIDIA's driver, as nvidia-smi or the kernel tells it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "no nvidia-smi found"
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi does not answer ({type(error).__name__})"
    answer = (done.stdout or done.stderr).strip().splitlines() or ["no answer"]
    return answer[0] if done.returncode == 0 else f"nvidia-smi fails: {answer[0]}"


# -- the backends ---------------------------------------------------------------------------------


def state(backend) -> tuple[bool, str]:
    """Whether a backend gives right numbers here, and a sentence about it."""
    reason = backend.unavailable()
    if reason is not None:
        return False, f"does not run: {reason}"
    checked, dtype = [], torch.float16 if backend is backends.cuda else torch.float32
    for device in devices(backend):
        try:
            reason = backend.why_not(small_call(dtype, device))
            if reason is not None:
                return False, f"does not run: {reason}"
            difference = check(backend.NAME, device, dtype)
        except Exception as error:  # whatever it is, it is what the user wants to know
            return False, f"FAILED on {device}: {type(error).__name__}: {error}"
        if not difference <= BOUNDS[dtype]:
            return False, f"WRONG on {device}: differs from torch by {difference:.1e}"
        checked.append(f"{device} (largest difference from torch {difference:.1e})")
    note = " in Triton's interpreter, slowly" if backend.NAME == "triton" and interpreted() else ""
    return True, f"runs{note}; checked on {', '.join(checked)}"


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def devices(backend) -> list[str]:
    """Where to check a backend that can run."""
    cuda = ["cuda"] if torch.cuda.is_available() else []
    if backend.NAME == "reference" or interpreted():
        return ["cpu", *cuda]
    return cuda


def small_call(dtype: torch.dtype, device: str) -> backends.Call:
    """A call that a backend runs if it can run any of this dtype."""
    q = torch.zeros(1, 1, 1, 16, dtype=dtype, device=device)
    return checked_call(q, q, q)


def check(name: str, device: str, dtype: torch.dtype) -> float:
    """The largest difference from torch in float32, in a small masked call: output and
    gradients."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (
        torch.randn(2, 2, 33, 16, generator=generator).to(device, dtype) for _ in range(4)
    )
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    lengths = torch.tensor([20, 33])
    mask = masks.causal() & masks.padding(lengths)
    dense = (torch.arange(33) < lengths[:, None])[:, None, None, :]
    dense = (dense & torch.ones(33, 33, dtype=torch.bool).tril()).to(device)

    out = tilemask.attention(q, k, v, mask=mask, backend=name)
    expected = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=dense)
    found = (out, *torch.autograd.grad(out, (q, k, v), dout))
    wanted = (expected, *torch.autograd.grad(expected, (q, k, v), dout.float()))
    differences = [(a - b).abs().max() for a, b in zip(found, wanted)]
    return torch.stack(differences).max().item()


def advice(works: set[str], states: dict[str, str]) -> str:
    """One sentence: what stands between this machine and a GPU backend."""
    forced = os.environ.get("TILEMASK_BACKEND")
    if forced and forced not in states:
        return f"TILEMASK_BACKEND={forced} names no backend; unset it or use {' or '.join(states)}"
    if forced and forced not in works:
        return f"TILEMASK_BACKEND={forced} forces a backend that does not work here: unset it"
    if "reference" not in works:
        return "the reference fails its check: reinstall torch and tilemask"
    if interpreted():
        return "unset TRITON_INTERPRET, unless you debug kernels: the interpreter is very slow"
    if torch.cuda.is_available() and (reason := library.unavailable()):
        return f"{reason}; docs/install.md says how to build it"
    if works != {"reference"}:
        names = " or ".join(name for name in states if name in works and name != "reference")
        return f"none: on this GPU, calls that {names} can run, run there"
    if installed("triton") is None:
        return "install triton (pip install triton, on Linux) to run the GPU kernels"
    if torch.version.cuda is None:
        return (
            "for a GPU backend, use a machine with an NVIDIA GPU of compute capability 8.0 or newer"
            " and a CUDA build of torch (https://pytorch.org/get-started/locally)"
        )
    if not torch.cuda.is_available():
        return "torch sees no GPU: look at the driver (nvidia-smi) and at CUDA_VISIBLE_DEVICES"
    return f"triton {states['triton']}"
