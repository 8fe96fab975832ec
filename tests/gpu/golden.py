"""Golden vectors: the one-instruction kernels of the PTX emulator on a real GPU.

The same PTX text is loaded by the CUDA driver, launched on the GPU, and its outputs are compared
with the emulator's on the same inputs: bit for bit, but for sums of products (1e-6 of the largest)
and approximations (what the PTX documentation allows). Nothing is stored: both sides are computed
where the test runs.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from ctypes import byref, c_char_p, c_int, c_uint32, c_uint64, c_void_p

import torch
from ptx_emulator import (
    MAP_TYPES,
    SWIZZLES,
    micro,
    micro_alu,
    micro_matrix,
    micro_memory,
    micro_warp,
)

MOST_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


def cases() -> list[micro.Micro]:
    """Every one-instruction kernel."""
    made = [micro_alu.case(index) for index in range(len(micro_alu.OPS))]
    return [*made, *micro_matrix.cases(), *micro_memory.cases(), *micro_warp.cases()]


def compared(case: micro.Micro, launch: Callable) -> list[str]:
    """What differs between launch(case) and the emulator; empty if nothing does."""
    differences = []
    for index, (got, emulated) in enumerate(zip(launch(case), micro.emulated(case), strict=True)):
        if not micro.agree(case, got, emulated):
            differences.append(f"output {index} of {case}: {micro.difference(case, got, emulated)}")
    return differences


def runs_on(case: micro.Micro, capability: tuple[int, int]) -> bool:
    """Whether a GPU can run a case: code for sm_90a runs on compute capability 9.0 alone."""
    return capability == (9, 0) if case.arch == 90 else capability >= (8, 0)


@functools.cache
def driver() -> ctypes.CDLL:
    """libcuda, in the context that torch made current."""
    torch.cuda.init()
    torch.zeros(1, device="cuda")
    return ctypes.CDLL("libcuda.so.1")


def call(name: str, *arguments) -> None:
    code = getattr(driver(), name)(*arguments)
    if code:
        text = c_char_p()
        driver().cuGetErrorString(code, byref(text))
        raise RuntimeError(f"{name}: {text.value.decode() if text.value else code}")


def on_gpu(case: micro.Micro) -> tuple[torch.Tensor, ...]:
    """The outputs of a case on the current GPU. RuntimeError: the driver refuses something."""
    inputs = [tensor.cuda() for tensor in case.inputs]
    outputs = [tensor.cuda() for tensor in case.outputs]
    tensors = inputs + outputs
    blobs = [ctypes.c_uint64(tensor.data_ptr()) for tensor in tensors]
    blobs += [tensor_map(tensors[m.tensor], m) for m in case.maps]
    pointers = (c_void_p * len(blobs))(*map(ctypes.addressof, blobs))
    module, function = c_void_p(), c_void_p()
    call("cuModuleLoadData", byref(module), c_char_p(case.ptx.encode()))
    try:
        call("cuModuleGetFunction", byref(function), module, c_char_p(b"micro"))
        call("cuFuncSetAttribute", function, MOST_DYNAMIC_SHARED, case.shared)
        grid, block, stream = (case.grid, 1, 1), (case.block, 1, 1), c_void_p(0)
        call(
            "cuLaunchKernel", function, *map(c_uint32, grid + block), c_uint32(case.shared),
            stream, pointers, None,
        )  # fmt: skip
        torch.cuda.synchronize()
    finally:
        call("cuModuleUnload", module)
    return tuple(tensor.cpu() for tensor in outputs)


class TensorMap(ctypes.Structure):
    _fields_ = [("words", c_uint64 * 16)]


def tensor_map(tensor: torch.Tensor, wanted: micro.Map):
    """A tensor map that the driver encodes, at an address that is a multiple of 64."""
    rank = tensor.dim()
    room = ctypes.create_string_buffer(128 + 64)
    start = -ctypes.addressof(room) % 64
    made = TensorMap.from_buffer(room, start)
    strides = [stride * tensor.element_size() for stride in tensor.stride()]
    call(
        "cuTensorMapEncodeTiled", byref(made), c_int(MAP_TYPES[tensor.dtype]), c_uint32(rank),
        c_void_p(tensor.data_ptr()), (c_uint64 * rank)(*reversed(tensor.shape)),
        (c_uint64 * rank)(*reversed(strides[:-1])), (c_uint32 * rank)(*reversed(wanted.box)),
        (c_uint32 * rank)(*[1] * rank), c_int(0), c_int(SWIZZLES[wanted.swizzle]), c_int(0),
        c_int(0),
    )  # fmt: skip
    return made
