"""Triton's real launch path without a GPU: specialisation, compilation, argument passing.

The interpreter and the ahead-of-time gates go around it. Here a stand-in for the CUDA driver loads
and launches nothing; the process pretends to have an sm_90 GPU whose memory is the host's.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

STUB = Path(__file__).parent / "libcuda_stub.cpp"
SCRIPT = """
import ctypes, json, sys
import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver

import tilemask
from tilemask import masks
from tilemask.backends import triton as backend

stub = ctypes.CDLL("libcuda.so.1")
stub.stub_first_argument.restype = ctypes.c_void_p


class Driver(nvidia.CudaDriver):
    def __init__(self):
        self.utils, self.launcher_cls = nvidia.CudaUtils(), nvidia.CudaLauncher

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_device_capability(self, device):
        return 9, 0


driver.set_active(Driver())
backend.unfit = lambda device: None
backend.architecture = lambda device: 90


def tensors(Lq, Lk, order="bhld"):
    q, k = torch.randn(2, 4, Lq, 64), torch.randn(2, 2, Lk, 64)
    if order == "blhd":
        q, k = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k))
    return [t.to(torch.bfloat16).requires_grad_() for t in (q, k, k)]


def step(mask, Lq=70, Lk=90, order="bhld", **options):
    "Kernels loaded and launched by a forward and backward, and what the last launch was given."
    loads, launches = stub.stub_loads(), stub.stub_launches()
    q, k, v = tensors(Lq, Lk, order)
    out = tilemask.attention(q, k, v, mask=mask, backend="triton", **options)
    forward = [stub.stub_grid(), stub.stub_block(), stub.stub_first_argument() == q.data_ptr()]
    out.backward(torch.randn_like(out))
    backward = [stub.stub_grid(), stub.stub_block(), stub.stub_first_argument() == q.data_ptr()]
    return {
        "loads": stub.stub_loads() - loads,
        "launches": stub.stub_launches() - launches,
        "forward": forward,
        "backward": backward,
    }


def bits(Lq, Lk):
    return masks.dense(torch.ones(Lq, Lk, dtype=torch.bool))


def options(Lq, Lk, seed):
    bias = torch.zeros(1, 4, Lq, Lk, dtype=torch.bfloat16).requires_grad_()
    sinks = torch.zeros(4).requires_grad_()
    slopes = torch.ones(4)
    given = {"softcap": 30.0, "dropout_p": 0.1, "dropout_seed": seed}
    return {"bias": bias, "sinks": sinks, "alibi_slopes": slopes, **given}


def decode(Lq, Lk):
    launches, loads = stub.stub_launches(), stub.stub_loads()
    with torch.no_grad():
        q, k, v = tensors(Lq, Lk)
        mask = masks.causal(align="lower_right")
        tilemask.attention(q, k, v, mask=mask, backend="triton")
    return {"loads": stub.stub_loads() - loads, "launches": stub.stub_launches() - launches}


backend.multiprocessors = lambda device: 132


def weights(Lq, Lk):
    loads = stub.stub_loads()
    q, k, _ = (t.detach() for t in tensors(Lq, Lk))
    tilemask.attention_weights(q, k, mask=masks.causal(), reduce="mean_heads", backend="triton")
    return {"loads": stub.stub_loads() - loads}


keep = torch.ones(2, 90, dtype=torch.bool)
cu = torch.tensor([0, 30, 70])
cu_k = torch.tensor([0, 50, 90])
print(json.dumps({
    "causal": step(masks.causal()),
    "other offset": step(masks.causal(7)),
    "other lengths": step(masks.causal(), 333, 517),
    "window": step(masks.window(16, 0), 131, 131),
    "padding": step(masks.padding([50, 90])),
    "other padding": step(masks.causal(3) & masks.padding([50, 64], query_lengths=[5, 64]), 64, 64),
    "varlen": step(masks.varlen(cu, cu_k)),
    "other varlen": step(masks.varlen(cu + cu, cu_k + cu_k), 140, 180),
    "blhd": step(masks.causal(), order="blhd"),
    "dense": step(bits(270, 290), 270, 290),
    "other dense": step(bits(333, 517), 333, 517),
    "keys": step(masks.padding(keep=keep)),
    "all": step(bits(70, 90) & masks.padding(keep=keep), **options(70, 90, 1)),
    "other all": step(
        bits(70, 90) & masks.padding(keep=keep) & masks.causal(9), **options(70, 90, 2)
    ),
    "decode": decode(1, 3330),
    "other decode": decode(1, 3517),
    "decode 3": decode(3, 3330),
    "weights": weights(70, 90),
    "other weights": weights(333, 517),
}))
"""


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """What SCRIPT prints, in a process that finds the stub as its libcuda.so.1."""
    folder = tmp_path_factory.mktemp("stub")
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    assert compiler, "Triton's launcher needs a C compiler (apt install g++)"
    library = folder / "libcuda.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, STUB], check=True)
    (folder / "libcuda.so").symlink_to(library)
    paths = str(folder), os.environ.get("LD_LIBRARY_PATH", "")
    environment = {
        **os.environ,
        "TRITON_LIBCUDA_PATH": str(folder),
        "LD_LIBRARY_PATH": os.pathsep.join(path for path in paths if path),
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_launches(steps):
    assert steps["causal"]["launches"] == 3  # forward, dq, dkv
    # classes and lists of both directions: the tiles of forward and dq agree
    assert steps["varlen"]["launches"] == 3 + 4
    assert steps["dense"]["launches"] == 3 + 4 + 3  # words, transposed words, live rows
    assert steps["keys"]["launches"] == 3 + 4 + 2
    assert steps["all"]["launches"] == 3 + 4 + 4 + 1  # both kinds of words; the bias gradient
    assert steps["causal"]["loads"] == 3
    assert steps["decode"]["launches"] == steps["decode 3"]["launches"] == 2  # and the merge


def test_grids(steps):
    """Programs: row blocks x batches x heads, column blocks x batches x key heads."""
    from tilemask.kernels import tuning

    forward = tuning.pick("forward", "half", 90, 64)
    dkv = tuning.pick("dkv", "half", 90, 64)
    for name, Lq, Lk in (("causal", 70, 90), ("other lengths", 333, 517)):
        rows, cols = -(-Lq // forward.block_m), -(-Lk // dkv.block_n)
        assert steps[name]["forward"] == [rows * 2 * 4, 32 * forward.num_warps, True]
        assert steps[name]["backward"] == [cols * 2 * 2, 32 * dkv.num_warps, True]


@pytest.mark.parametrize(
    "name",
    [
        "other offset",
        "other lengths",
        "window",
        "other padding",
        "other varlen",
        "other dense",
        "other all",
        "other weights",
        "other decode",
    ],
)
def test_other_numbers_compile_nothing(steps, name):
    """Lengths, offsets and the values of bounds are no part of what a kernel is compiled for."""
    assert steps[name]["loads"] == 0


@pytest.mark.parametrize("name", ["causal", "padding", "varlen", "blhd", "dense", "keys"])
def test_pointers_arrive(steps, name):
    assert steps[name]["forward"][2] and steps[name]["backward"][2]
