"""What the tests compile with nvcc: PTX of single files, and libraries that run in the emulator."""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path

from nvcc import find_nvcc

from . import Config, build, emu_buffers, library

KERNELS = Path(__file__).parent / "kernels"
ARCHES = {80: "80", 90: "90a"}


def ptx(source: Path, arch: int, *flags: str) -> str:
    """The PTX of a .cu file for sm_80 or sm_90a, with the lines of the source."""
    name = ARCHES[arch]
    nvcc = find_nvcc()
    options = ["-std=c++17", "-lineinfo", f"-gencode=arch=compute_{name},code=sm_{name}", *flags]
    key = build.digest(build.version(nvcc), source.read_bytes(), *options)

    def make(folder: Path) -> None:
        build.call([nvcc, *options, "-ptx", "-o", folder / "kernel.ptx", source])

    return (build.cached(f"ptx-{key}", make) / "kernel.ptx").read_text()


def posed(sources: list[Path], arch: int, *flags: str) -> Path:
    """A shared library of .cu files whose CUDA runtime is the emulator: their kernels are kept as
    PTX for sm_80 or sm_90a, and run on CPU memory. Load it with loaded()."""
    name = ARCHES[arch]
    nvcc, emulator = find_nvcc(), build.library()
    options = [
        "-std=c++17",
        "-O3",
        "-lineinfo",
        "-Xcompiler",
        "-fPIC",
        "-Xfatbin",
        "-compress=false",
    ]
    options += [f"-gencode=arch=compute_{name},code=compute_{name}", *flags]
    texts = [path.read_bytes() for path in sources]
    key = build.digest(build.version(nvcc), str(emulator), *options, *texts)

    def make(folder: Path) -> None:
        objects = [folder / f"{source.stem}.o" for source in sources]
        for source, made in zip(sources, objects):
            build.call([nvcc, *options, "-c", source, "-o", made])
        library = folder / "libposed.so"
        build.call([build.cxx(), "-shared", "-Wl,-z,defs", *objects, emulator, "-o", library])

    return build.cached(f"posed-{key}", make) / "libposed.so"


def loaded(path: Path) -> ctypes.CDLL:
    """A library that is linked against the emulator. It calls the emulator also where torch has put
    the functions of a CUDA runtime among the global symbols."""
    library()
    return ctypes.CDLL(str(path), mode=os.RTLD_NOW | os.RTLD_DEEPBIND)


@contextlib.contextmanager
def posing(arch: int, config: Config | None = None, buffers=()):
    """Inside the block the emulator is a GPU of compute capability ``arch`` / 10 for libraries made
    by posed(); their kernels may touch the storages of ``buffers``.

    A launch that fails returns cudaErrorLaunchFailure to the library; failure() has the message.
    """
    library().emu_set_arch(arch)
    memory = emu_buffers(buffers)
    library().emu_configure((config or Config()).packed(), memory, len(memory))
    library().emu_forget_launches()
    try:
        yield
    finally:
        nothing = emu_buffers([])
        library().emu_configure(Config().packed(), nothing, len(nothing))


def launches() -> list[tuple[str, dict[str, int]]]:
    """(kernel, what was counted) of each launch since posing() began."""
    names = library().emu_stats_names().decode().split()
    made = []
    for index in range(library().emu_launches()):
        counts = library().emu_launch_stats(index)
        kernel = library().emu_launch_kernel(index).decode()
        made.append((kernel, {name: counts[i] for i, name in enumerate(names)}))
    return made
