"""The emulator's shared library: built from src/ on first use, kept in the cache folder."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parent / "src"
CACHE = Path(__file__).resolve().parents[2] / ".cache" / "ptx_emulator"  # `make clean` removes it
# no contraction: an operation of the PTX is one operation here
FLAGS = ["-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-pthread"]
NAME = "libptx_emulator.so"
VECTOR_FLAGS = {"avx2": "-mavx2", "fma": "-mfma"}


def library() -> Path:
    """The path of libptx_emulator.so. What is new, sources or compiler, is compiled first.

    RuntimeError: the machine has no C++ compiler, or the sources do not compile.
    """
    compiler, flags = cxx(), [*FLAGS, *vector_flags()]
    headers = [path.read_bytes() for path in sorted(SOURCES.glob("*.h"))]

    def compiled(unit: Path) -> Path:
        key = digest(version(compiler), *flags, *headers, unit.read_bytes())
        command = [compiler, *flags, "-c", unit, "-o"]
        made = cached(f"{unit.stem}-{key}", lambda folder: call([*command, folder / "unit.o"]))
        return made / "unit.o"

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sorted(SOURCES.glob("*.cpp"))))

    def link(folder: Path) -> None:
        call([compiler, "-shared", "-pthread", *objects, "-o", folder / NAME])

    return cached(f"library-{digest(*map(str, objects))}", link) / NAME


def cached(name: str, build) -> Path:
    """The folder ``name`` of the cache. Where it is missing, build(folder) fills a new one; of
    several processes that need it at once, one builds and the others wait."""
    wanted = CACHE / name
    if wanted.exists():
        return wanted
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not wanted.exists():
            unfinished = CACHE / f"{name}.unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            build(unfinished)
            unfinished.rename(wanted)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(lock.name)
    return wanted


def digest(*parts: str | bytes) -> str:
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update(part.encode() if isinstance(part, str) else part)
        hashed.update(b"\0")
    return hashed.hexdigest()[:16]


def cxx() -> str:
    """The C++ compiler: $CXX, or the first of g++, c++ and clang++."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    for name in names:
        if found := shutil.which(name):
            return found
    raise RuntimeError(
        f"the PTX emulator needs a C++20 compiler, and there is none of {', '.join(names)}: "
        "install one (Debian, Ubuntu: apt install g++), or name it in CXX"
    )


@functools.cache
def version(program: str) -> str:
    return call([program, "--version"])


def vector_flags() -> list[str]:
    """-mavx2 -mfma where the processor has both; software for fused multiply-add elsewhere."""
    if platform.machine() != "x86_64":
        return []
    with open("/proc/cpuinfo") as file:
        words = set(file.read().split())
    return list(VECTOR_FLAGS.values()) if words.issuperset(VECTOR_FLAGS) else []


def call(command: list) -> str:
    """Run a program; RuntimeError with what it said if it fails."""
    command = [str(word) for word in command]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout
