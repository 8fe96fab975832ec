"""nvcc for the tests, and what they compile with it: the project's CUDA sources."""

from __future__ import annotations

import functools
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ptx_emulator import build as emulator

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "csrc"))
import toolchain  # noqa: E402


@functools.cache
def find_nvcc() -> Path:
    """The nvcc of this machine, or that of the PyPI wheels, which are kept in the cache folder.

    RuntimeError: there is none, and pip cannot bring one.
    """
    try:
        return toolchain.find_nvcc()
    except toolchain.Missing:
        return nvcc_from_pypi()


def nvcc_from_pypi() -> Path:
    """The nvcc of csrc/nvcc.txt; the first time, pip fetches about 100 MB."""
    wheels = toolchain.nvcc_wheels()

    def install(folder: Path) -> None:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        emulator.call([*pip, "--no-deps", "--target", folder, *wheels])

    folder = emulator.cached(f"nvcc-{emulator.digest(*wheels)}", install)
    return folder / "nvidia/cu13/bin/nvcc"


def build_for_emulator(arch: int = 80) -> Path:
    """libtilemask.so with PTX for compute capability ``arch`` / 10 in place of machine code, linked
    against the emulator in place of the CUDA runtime. Only objects whose sources are new are
    compiled; several processes may ask at once.
    """
    target = {90: "compute_90a"}.get(arch, f"compute_{arch}")
    headers = [path.read_bytes() for path in sorted(toolchain.CSRC.rglob("*.*h"))]
    toolkit = toolchain.toolkit_of(find_nvcc())
    to_ptx, to_host = toolchain.to_ptx(target), toolchain.to_host(target)
    fatbinary = [toolkit.root / "bin/fatbinary", "-64", "--compress=false"]

    def compiled(source: Path) -> Path:
        def build(folder: Path) -> None:
            ptx, host, fatbin = folder / "x.ptx", folder / "x.host.o", folder / "x.fatbin"
            emulator.call([toolkit.nvcc, *to_ptx, source, "-o", ptx])
            emulator.call([toolkit.nvcc, *to_host, source, "-o", host])
            emulator.call([*fatbinary, f"--create={fatbin}", toolchain.image(target, ptx)])
            emulator.call(toolchain.embed(fatbin, host, folder / f"{source.stem}.o"))

        flags = [toolkit.version, *to_ptx, *to_host]
        key = emulator.digest(*flags, *headers, source.read_bytes())
        return emulator.cached(f"{source.stem}-{target}-{key}", build) / f"{source.stem}.o"

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, toolchain.sources()))
    runtime = emulator.library()

    def link(folder: Path) -> None:
        script = folder / "exported.map"
        script.write_text(toolchain.EXPORTED)
        options = [f"-Wl,--version-script={script}", "-Wl,-z,defs"]
        out = folder / toolchain.LIBRARY
        emulator.call(["gcc", "-shared", *options, *objects, runtime, "-o", out])

    key = emulator.digest(*map(str, [*objects, runtime]))
    return emulator.cached(f"tilemask-{target}-{key}", link) / toolchain.LIBRARY
