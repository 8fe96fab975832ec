"""A driver that Triton takes as its active one: launches run in the emulator, on CPU tensors.

    with triton_driver.running(arch=90):
        kernel[grid](x, y, n, BLOCK=128)     # compiled for sm_90a, emulated

Nothing of Triton is replaced but what a driver is there for: to load a binary and to launch it. The
binary is the PTX itself, so ptxas does not run. Not for a process that runs Triton's interpreter.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import struct
from collections.abc import Callable

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget

from . import Config, Module, build, encoded_map

SHARED_LIMIT = {80: 163, 90: 227}  # KiB a block may use
REGISTERS = 32  # stands for what ptxas would tell
MOST_THREADS = 1024
INTEGERS = {"i1": 1, "i8": 1, "u1": 1, "u8": 1, "i16": 2, "u16": 2, "i32": 4, "u32": 4}
INTEGERS |= {"i64": 8, "u64": 8}
FLOATS = {"fp32": "f", "f32": "f", "fp64": "d", "fp16": "e"}
# Triton numbers three types as the instruction set does, cuda.h in another order
MAP_TYPES = {8: 10, 9: 8, 10: 9}
MAP_TF32 = 11
MAP_L2_128B = 2
more_devices = itertools.count(1000)


class Driver:
    """Triton's view of a GPU of compute capability ``arch`` / 10 whose memory is the host's.

    launches: (kernel, what was counted) of each launch so far. rewrite(name, ptx) gives the PTX
    that is loaded in place of what Triton made.
    """

    def __init__(self, arch: int, config: Config, rewrite: Callable[[str, str], str] | None = None):
        if arch not in SHARED_LIMIT:
            raise ValueError(f"arch must be one of {', '.join(map(str, SHARED_LIMIT))}, got {arch}")
        self.arch, self.config, self.rewrite = arch, config, rewrite
        # Triton keeps what it loaded per device: what is rewritten is on one of its own
        self.device = arch if rewrite is None else next(more_devices)
        self.launches: list[tuple[str, dict[str, int]]] = []
        self.utils, self.launcher_cls = self, Launcher

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_device_capability(self, device: int) -> tuple[int, int]:
        return divmod(self.arch, 10)

    def get_current_device(self) -> int:
        return self.device

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": SHARED_LIMIT[self.arch] * 1024,
            "max_num_regs": 65536,
            "multiprocessor_count": self.config.multiprocessors,
            "warpSize": 32,
        }

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple:
        """(module, function, registers, spills, most threads of a block)"""
        ptx = kernel.decode()
        module = Module(ptx if self.rewrite is None else self.rewrite(name, ptx))
        return module, (module, name), REGISTERS, 0, MOST_THREADS

    def unload_module(self, module) -> None:
        pass


class Launcher:
    """Launches one compiled kernel; made by Triton from its source and metadata."""

    def __init__(self, source, metadata):
        self.signature = tuple(source.signature.values())
        self.metadata = metadata
        if getattr(metadata, "num_ctas", 1) != 1:
            raise NotImplementedError(
                f"clusters: num_ctas = {metadata.num_ctas}, only 1 is emulated"
            )

    def __call__(
        self, grid_x, grid_y, grid_z, stream, function, packed_metadata, launch_metadata,
        enter_hook, exit_hook, *arguments,
    ):  # fmt: skip
        driver, metadata = triton.runtime.driver.active, self.metadata
        programs = grid_x * grid_y * grid_z
        if programs == 0:
            return
        scratch = [
            allocated(metadata.global_scratch_size * programs, metadata.global_scratch_align),
            allocated(metadata.profile_scratch_size * programs, metadata.profile_scratch_align),
        ]
        descriptors = iter(getattr(metadata, "tensordesc_meta", None) or [])
        tensors: list[torch.Tensor] = [s for s in scratch if s is not None]
        values = list(flattened(self.signature, arguments, descriptors, tensors)) + scratch
        config = driver.config
        if metadata.launch_cooperative_grid:
            config = dataclasses.replace(config, resident_blocks=programs)
        module, name = function
        if enter_hook is not None:
            enter_hook(launch_metadata)
        counts = module.launch(
            name, (grid_x, grid_y, grid_z), (32 * metadata.num_warps,), *values,
            shared=metadata.shared, buffers=tensors, config=config,
        )  # fmt: skip
        driver.launches.append((name, counts))
        if exit_hook is not None:
            exit_hook(launch_metadata)


def allocated(size: int, align: int) -> torch.Tensor | None:
    """Scratch memory, filled with what nobody has written."""
    if size == 0:
        return None
    room = torch.full((size + align,), 0xFF, dtype=torch.uint8)
    return room[-room.data_ptr() % align :][:size]


def flattened(types, values, descriptors, tensors):
    """The parameters of a kernel from its arguments: constants go, tuples come apart.

    Tensors met on the way are appended to ``tensors``: what the kernel may touch.
    """
    for kind, value in zip(types, values, strict=True):
        if isinstance(kind, tuple):
            yield from flattened(kind, value, descriptors, tensors)
        elif kind == "constexpr":
            continue
        elif kind.startswith("tensordesc"):
            tensors.append(value.base)
            yield from descriptor(value, next(descriptors, None))
        else:
            if isinstance(value, torch.Tensor):
                tensors.append(value)
            yield parameter(kind, value)


def parameter(kind: str, value):
    """A value of one of Triton's types, as Module.launch takes it."""
    if kind.startswith("*"):
        return pointer(value)
    if kind in INTEGERS:
        size = INTEGERS[kind]
        return (int(value) % (1 << 8 * size)).to_bytes(size, "little")
    if kind in FLOATS:
        return struct.pack(FLOATS[kind], value)
    if kind == "bf16":
        return struct.pack("f", torch.tensor(value, dtype=torch.bfloat16).item())[2:]
    raise TypeError(f"an argument of type {kind}, which the emulator's driver does not know")


def pointer(value):
    """A tensor, an address, None, or an object that has data_ptr()."""
    return value if isinstance(value, (torch.Tensor, int, type(None))) else value.data_ptr()


def descriptor(value, meta):
    """The parameters that a TensorDescriptor stands for: a tensor map (compute capability 9.0) or
    the parts of the tensor, and after that shape and strides."""
    sizes = [parameter("i32", n) for n in value.shape]
    strides = [parameter("i64", n) for n in value.strides]
    if meta is not None:
        return [tensor_map(value, meta), *sizes, *strides]
    wide = [parameter("i64", n) for n in value.shape]
    flags = [parameter("i1", value.padding == "nan")]
    if hasattr(value, "round_f32_to_tf32"):  # since Triton 3.7
        flags.append(parameter("i1", value.round_f32_to_tf32))
    return [value.base, *wide, *strides, *flags, *sizes, *strides]


def tensor_map(value, meta: dict) -> bytes:
    kind = MAP_TYPES.get(meta["elem_type"], meta["elem_type"])
    if getattr(value, "round_f32_to_tf32", False):
        kind = MAP_TF32
    shape = list(value.shape)
    if meta["fp4_padded"]:
        shape[-1] *= 2
    strides = [stride * meta["elem_size"] for stride in value.strides]
    return encoded_map(
        value.base.data_ptr(), kind, shape, strides, meta["block_size"],
        swizzle=meta["swizzle"], l2=MAP_L2_128B, oob=int(value.padding == "nan"),
    )  # fmt: skip


def without_ptxas(*arguments):
    """Triton's hook into its stages: the binary is the PTX. Without arguments: (key, hash) of what
    the hook does, for Triton's cache."""
    if not arguments:
        return "ptx_emulator", "ptx_emulator"
    stages = arguments[1]
    stages["cubin"] = lambda ptx, metadata: ptx.encode()


@contextlib.contextmanager
def running(arch: int, config: Config | None = None, rewrite=None):
    """Inside the block Triton compiles for sm_<arch> (80 or 90) and launches in the emulator.

    Yields the Driver; its ``config`` may be replaced at any time. rewrite: see there.
    """
    driver, active = Driver(arch, config or Config(), rewrite), triton.runtime.driver
    before = active._active
    with knobs.runtime.scope(), knobs.cache.scope():
        # a cache of its own: Triton 3.6 does not ask the hook for a key
        knobs.cache.dir = str(build.CACHE / "triton")
        knobs.runtime.add_stages_inspection_hook = without_ptxas
        active.set_active(driver)
        try:
            yield driver
        finally:
            active._active = before
