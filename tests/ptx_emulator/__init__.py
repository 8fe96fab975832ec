"""Runs PTX on the CPU: what nvcc or Triton compiled for sm_80 or sm_90a, on torch CPU tensors.

    module = ptx_emulator.Module(ptx)                    # the text of a .ptx file
    module.launch("add", grid, block, a, b, c, 1000)     # tensors are pointers, numbers are values

Instructions do what the PTX documentation says, for all lanes of a warp that are at them. A kernel
that races, leaves its buffers, misuses a barrier or hangs raises EmulatorError with the line of its
source (nvcc -lineinfo). docs/emulator.md explains how to read the messages.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import struct
from ctypes import POINTER, c_char_p, c_int, c_int32, c_uint32, c_uint64, c_void_p

import torch

from . import build

ASYNC = {"early": 0, "late": 1, "random": 2}


class EmulatorError(RuntimeError):
    """A kernel did what it must not do, or uses an instruction that the emulator does not know."""


@dataclasses.dataclass(frozen=True)
class Config:
    """How a launch runs. The same numbers give the same run."""

    seed: int = 0  # the order of threads, and what is random
    asynchronous: str = "late"  # when copies and wgmma take effect: "early", "late" or "random"
    checks: bool = True  # False: no race detection and no bounds
    resident_blocks: int = 1  # how many blocks run interleaved; 1: one after another
    multiprocessors: int = 8

    def packed(self) -> EmuConfig:
        if self.asynchronous not in ASYNC:
            names = ", ".join(map(repr, ASYNC))
            raise ValueError(f"asynchronous must be one of {names}, got {self.asynchronous!r}")
        if self.resident_blocks < 1 or self.multiprocessors < 1:
            raise ValueError(f"resident_blocks and multiprocessors must be 1 or more, got {self}")
        mode = ASYNC[self.asynchronous]
        return EmuConfig(self.seed, mode, self.checks, self.resident_blocks, self.multiprocessors)


class EmuConfig(ctypes.Structure):
    _fields_ = [
        ("seed", c_uint64),
        ("asynchronous", c_int32),
        ("checks", c_int32),
        ("resident_blocks", c_int32),
        ("multiprocessors", c_int32),
    ]


class EmuBuffer(ctypes.Structure):
    _fields_ = [("address", c_uint64), ("bytes", c_uint64)]


@functools.cache
def library() -> ctypes.CDLL:
    """libptx_emulator.so, built on first use (RuntimeError without a C++ compiler)."""
    # RTLD_GLOBAL: libraries that are linked against it must find this one
    emulator = ctypes.CDLL(str(build.library()), mode=ctypes.RTLD_GLOBAL)
    three, bound = POINTER(c_uint32), [POINTER(EmuConfig), POINTER(EmuBuffer), c_int]
    signatures = {
        "emu_load": (c_void_p, [c_char_p]),
        "emu_unload": (None, [c_void_p]),
        "emu_kernels": (c_int, [c_void_p]),
        "emu_kernel_name": (c_char_p, [c_void_p, c_int]),
        "emu_params": (c_int, [c_void_p, c_char_p]),
        "emu_param_size": (c_int, [c_void_p, c_char_p, c_int]),
        "emu_launch": (
            c_int,
            [c_void_p, c_char_p, three, three, c_uint32, c_void_p, *bound, POINTER(c_uint64)],
        ),
        "emu_error": (c_char_p, []),
        "emu_stats_names": (c_char_p, []),
        "emu_tensor_map": (
            c_int,
            [c_void_p, c_int, c_void_p, c_int, *[c_void_p] * 4, c_int, c_int, c_int, c_int],
        ),
        "emu_set_arch": (None, [c_int]),
        "emu_configure": (None, bound),
        "emu_launches": (c_int, []),
        "emu_launch_kernel": (c_char_p, [c_int]),
        "emu_launch_stats": (POINTER(c_uint64), [c_int]),
        "emu_launch_device": (c_int, [c_int]),
        "emu_forget_launches": (None, []),
        "emu_set_devices": (None, [c_int]),
        "emu_contexts_made": (c_int, [c_int]),
        "emu_contexts_open": (c_int, []),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(emulator, name)
        function.restype, function.argtypes = result, arguments
    return emulator


def failure() -> EmulatorError:
    """The text of the library's last failed call, as an exception."""
    return EmulatorError(library().emu_error().decode())


class Module:
    """The kernels of one PTX text. EmulatorError: it cannot be read."""

    def __init__(self, ptx: str):
        self.handle = None
        self.handle = library().emu_load(ptx.encode())
        if not self.handle:
            raise failure()

    def __del__(self):
        if self.handle:
            library().emu_unload(self.handle)

    @functools.cached_property
    def kernels(self) -> list[str]:
        count = library().emu_kernels(self.handle)
        return [library().emu_kernel_name(self.handle, i).decode() for i in range(count)]

    def parameter_sizes(self, kernel: str) -> list[int]:
        """Bytes of each parameter."""
        if kernel not in self.kernels:
            raise ValueError(f"there is no kernel {kernel!r}, only {', '.join(self.kernels)}")
        name = kernel.encode()
        count = library().emu_params(self.handle, name)
        return [library().emu_param_size(self.handle, name, i) for i in range(count)]

    def launch(
        self,
        kernel: str,
        grid: tuple,
        block: tuple,
        *arguments,
        shared: int = 0,
        buffers=(),
        config: Config | None = None,
    ) -> dict[str, int]:
        """Run ``kernel`` to its end and return what was counted, {name: number}.

        grid, block: 1 to 3 numbers. arguments: one per parameter: a CPU tensor (its pointer; the
        kernel may touch the whole storage of it), None (a null pointer), an int, a float, or bytes
        as they are (a struct, a tensor map). shared: bytes of dynamic shared memory. buffers: more
        tensors that the kernel may touch, where pointers are inside bytes.

        EmulatorError: the kernel is at fault, or not understood. ValueError: the arguments are.
        """
        sizes = self.parameter_sizes(kernel)
        if len(arguments) != len(sizes):
            raise ValueError(f"{kernel} takes {len(sizes)} arguments, got {len(arguments)}")
        tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
        blobs = [packed(a, size, i) for i, (a, size) in enumerate(zip(arguments, sizes))]
        kept = [ctypes.create_string_buffer(blob, len(blob)) for blob in blobs]
        pointers = (c_void_p * len(kept))(*map(ctypes.addressof, kept))
        memory = emu_buffers([*tensors, *buffers])
        names = library().emu_stats_names().decode().split()
        counts = (c_uint64 * len(names))()
        settings = (config or Config()).packed()
        failed = library().emu_launch(
            self.handle,
            kernel.encode(),
            (c_uint32 * 3)(*sized("grid", grid)),
            (c_uint32 * 3)(*sized("block", block)),
            shared,
            pointers,
            settings,
            memory,
            len(memory),
            counts,
        )
        if failed:
            raise failure()
        return dict(zip(names, counts))


def sized(name: str, numbers: tuple) -> list[int]:
    """Three numbers of a grid or block of which the last ones may be left out."""
    if not 1 <= len(numbers) <= 3:
        raise ValueError(f"{name} is 1 to 3 numbers, got {numbers}")
    return [*numbers, 1, 1][:3]


def packed(value, size: int, index: int) -> bytes:
    """An argument as the ``size`` bytes of its parameter."""
    formats = {1: "b", 2: "h", 4: "i", 8: "q"}
    if isinstance(value, torch.Tensor):
        if value.device.type != "cpu":
            raise ValueError(f"argument {index} is on {value.device}; the emulator needs the CPU")
        value = value.data_ptr()
    if isinstance(value, bytes):
        if len(value) != size:
            raise ValueError(f"argument {index} has {len(value)} bytes, its parameter {size}")
        return value
    if isinstance(value, float) and size in (4, 8):
        return struct.pack("f" if size == 4 else "d", value)
    if isinstance(value, (int, type(None))) and size in formats:
        return (int(value or 0) % (1 << 8 * size)).to_bytes(size, "little")
    raise ValueError(f"argument {index}: {type(value).__name__} for a parameter of {size} bytes")


def emu_buffers(tensors):
    """The storages of tensors, each once."""
    found = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes():
            found[storage.data_ptr()] = max(storage.nbytes(), found.get(storage.data_ptr(), 0))
    found.setdefault(0, 0)  # a kernel without any may touch nothing, not everything
    return (EmuBuffer * len(found))(*(EmuBuffer(*pair) for pair in found.items()))


# the numbers of cuda.h
MAP_TYPES = {
    torch.uint8: 0,
    torch.uint16: 1,
    torch.uint32: 2,
    torch.int32: 3,
    torch.uint64: 4,
    torch.int64: 5,
    torch.float16: 6,
    torch.float32: 7,
    torch.float64: 8,
    torch.bfloat16: 9,
}
SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}


def tensor_map(tensor: torch.Tensor, box: tuple, swizzle: int = 0, **options) -> bytes:
    """A tensor map (CUtensorMap) of a tensor of 1 to 5 dimensions, the last one contiguous.

    box: elements per dimension, in the order of the tensor's. swizzle: 0, 32, 64 or 128 bytes.
    options: see encoded_map(). EmulatorError: cuTensorMapEncodeTiled would refuse it.
    """
    strides = [stride * tensor.element_size() for stride in tensor.stride()]
    return encoded_map(
        tensor.data_ptr(), MAP_TYPES[tensor.dtype], tensor.shape, strides, box,
        swizzle=SWIZZLES[swizzle], **options,
    )  # fmt: skip


def encoded_map(
    address: int, kind: int, shape, strides, box, *,
    steps=None, interleave: int = 0, swizzle: int = 0, l2: int = 0, oob: int = 0,
) -> bytes:  # fmt: skip
    """cuTensorMapEncodeTiled with its numbers for type, interleave, swizzle, L2 and out of bounds.

    shape, strides in bytes, box and steps (element strides; all 1 by default) in the order of
    torch: the last dimension is the innermost, and its stride is not read.
    """
    rank = len(shape)
    room = ctypes.create_string_buffer(128 + 64)
    aligned = (ctypes.addressof(room) + 63) & ~63
    dims = (c_uint64 * rank)(*reversed(shape))
    pitches = (c_uint64 * rank)(*reversed(strides[:-1]))
    boxes = (c_uint32 * rank)(*reversed(box))
    element_steps = (c_uint32 * rank)(*reversed(steps or [1] * rank))
    failed = library().emu_tensor_map(
        aligned, kind, address, rank, dims, pitches, boxes, element_steps,
        interleave, swizzle, l2, oob,
    )  # fmt: skip
    if failed:
        raise failure()
    return ctypes.string_at(aligned, 128)
