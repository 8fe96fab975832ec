"""Memory that nobody has written is NaN under test, so that an output which is not written is seen.

install() replaces torch's makers of uninitialised tensors; calls from the files of tilemask get NaN
(integers: a large number, bool: True), all other callers what they always got.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys

import torch

GARBAGE = 0x5EADBEEF  # beyond every length; bytes of it for the small dtypes
MAKERS = [
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"),
]
_originals: dict[tuple[object, str], object] = {}


@functools.cache
def package_folders() -> tuple[str, ...]:
    """The folders of tilemask and tilemask.kernels: two places where the install is editable."""
    folders = []
    for name in ("tilemask", "tilemask.kernels"):
        spec = importlib.util.find_spec(name)
        folders += [os.path.realpath(place) + os.sep for place in spec.submodule_search_locations]
    return tuple(folders)


@functools.cache
def in_package(filename: str) -> bool:
    return os.path.realpath(filename).startswith(package_folders())


def fill(tensor: torch.Tensor) -> torch.Tensor:
    dtype = tensor.dtype
    with torch.no_grad():
        if dtype.is_floating_point or dtype.is_complex:
            return tensor.fill_(float("nan"))
        if dtype == torch.bool:
            return tensor.fill_(True)
        return tensor.fill_(GARBAGE % (1 << (8 * dtype.itemsize - 1)))


def install() -> None:
    """Poison uninitialised tensors from now on, in this process."""
    if _originals:
        return
    package_folders()
    for owner, name in MAKERS:
        original = getattr(owner, name)
        _originals[owner, name] = original
        setattr(owner, name, poisoning(original))


def uninstall() -> None:
    """Undo install()."""
    for (owner, name), original in _originals.items():
        setattr(owner, name, original)
    _originals.clear()


def poisoning(original):
    @functools.wraps(original)
    def maker(*arguments, **options):
        tensor = original(*arguments, **options)
        if torch.compiler.is_compiling():  # a graph must not hold what only a test does
            return tensor
        return fill(tensor) if in_package(sys._getframe(1).f_code.co_filename) else tensor

    return maker
