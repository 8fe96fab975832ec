"""libtilemask.so, the CUDA kernels behind a C interface: where it is, and why it may be missing.

Importing this module loads nothing, and loading the library starts no CUDA: the first question
about a device does.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

PATH = Path(__file__).with_name("libtilemask.so")
ABI = 3  # TILEMASK_ABI in csrc/tilemask.h
NO_KERNEL = 6  # TILEMASK_NO_KERNEL
INSUFFICIENT_DRIVER = -35  # cudaErrorInsufficientDriver: also what no driver at all looks like


class LibraryError(RuntimeError):
    """The library cannot be used: one sentence that says why."""


@functools.cache
def load() -> ctypes.CDLL:
    """The library of this installation. LibraryError: there is none, or not the right one."""
    if not PATH.is_file():
        raise LibraryError(f"tilemask has no CUDA library: {built()[2]}")
    return opened(PATH)


def opened(path: Path) -> ctypes.CDLL:
    """A library of this version, loaded from a file."""
    try:
        library = ctypes.CDLL(str(path))
        version = library.tilemask_abi()
    except (OSError, AttributeError) as error:
        raise LibraryError(f"the CUDA library cannot be loaded: {error}") from error
    if version != ABI:
        raise LibraryError(
            f"{path} has ABI {version}, this tilemask calls ABI {ABI}: build it anew"
        )
    library.tilemask_error_text.restype = ctypes.c_char_p
    library.tilemask_error_text.argtypes = [ctypes.c_int]
    library.tilemask_check_device.argtypes = [ctypes.c_int]
    for name in ("forward", "backward", "sums"):
        function = getattr(library, f"tilemask_{name}_workspace")
        function.restype = ctypes.c_int64
    return library


def unavailable() -> str | None:
    """Why there is no library to call, in one sentence; None if there is. Does not start CUDA."""
    try:
        load()
    except LibraryError as error:
        return str(error)
    return None


@functools.cache
def built() -> tuple[list[str], str | None, str | None]:
    """(architectures, version of nvcc, why there is no library), as setup.py left them."""
    try:
        from . import _build_info
    except ImportError:
        return [], None, "this copy of the sources was never installed or built"
    return _build_info.ARCHITECTURES, _build_info.NVCC, _build_info.REASON


def architectures() -> str:
    """What the library has code for, in words: "sm_80, sm_90a, PTX of compute_80"."""
    names = built()[0]
    return ", ".join(f"PTX of {n}" if n.startswith("compute_") else f"sm_{n}" for n in names)


def error_text(code: int) -> str:
    """What a code of the library means."""
    return load().tilemask_error_text(code).decode()


def unfit(device: int) -> str | None:
    """Why the library, which must be there, cannot run on a GPU; None if it can. Starts CUDA."""
    code = load().tilemask_check_device(device)
    if code == 0:
        return None
    text = error_text(code)
    if code == INSUFFICIENT_DRIVER:
        return (
            f"no NVIDIA driver, or one too old for the CUDA {built()[1]} it was built with: {text}"
        )
    if code == NO_KERNEL:
        return f"{text}: it was built for {architectures()} (TILEMASK_ARCHS)"
    return text
