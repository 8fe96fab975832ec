"""Makes libtilemask.so of csrc/*.cu: finds nvcc, writes a ninja file and runs it.

Needs Python and nothing else. setup.py builds the library with it, tests build with the same flags.
A command works on one source for one architecture, so none is long and all CPUs are busy. The code
of all of them becomes one object per source:

    x.cu  -> x.compute_80.ptx, ...  -> x.sm_80.cubin, x.sm_86.cubin, ...
    x.cu  -> x.host.o
    x.host.o with all cubins and the PTX for newer GPUs  -> x.o  -> libtilemask.so

nvcc puts into an object only code that the same command compiled. So x.host.o has device code too,
compiled as fast as can be, and objcopy puts what fatbinary made of the cubins in its place, the
section .nv_fatbin. Kernels are found by their names, which are the same for all architectures.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

CSRC = Path(__file__).resolve().parent
ROOT = CSRC.parent
LIBRARY = "libtilemask.so"
USUAL_HOME = "/usr/local/cuda"
# machine code for each, and the PTX of which newer GPUs make their own
ARCHITECTURES = ["80", "86", "89", "90a", "100", "120", "compute_80"]
HOST_FLAGS = [
    "-std=c++17",
    "-O3",
    "-Xcompiler",
    "-fPIC,-fvisibility=hidden,-fno-exceptions,-fno-rtti,-fno-threadsafe-statics",
]
FLAGS = [*HOST_FLAGS, "-lineinfo"]
MODES = ("auto", "off", "required", "pypi")
OLDEST_GLIBC = (2, 17)  # of manylinux2014
MEMORY_PER_JOB = 2 << 30

# Functions that moved into libc.so with glibc 2.34, where the linker would take them from and ask
# for 2.34: it gets stand-ins for the libraries that had them before, which every glibc still has.
MOVED = {
    "libdl.so.2": "dlclose dlerror dlmopen@GLIBC_2.3.4 dlopen dlsym dlvsym",
    "librt.so.1": "shm_open shm_unlink",
    "libpthread.so.0": """
        pthread_condattr_setpshared pthread_create pthread_detach pthread_getspecific pthread_join
        pthread_key_create pthread_key_delete pthread_kill pthread_mutex_trylock
        pthread_mutexattr_destroy pthread_mutexattr_init pthread_mutexattr_setpshared
        pthread_mutexattr_settype pthread_once pthread_rwlock_destroy pthread_rwlock_init
        pthread_rwlock_rdlock pthread_rwlock_timedrdlock pthread_rwlock_timedwrlock
        pthread_rwlock_tryrdlock pthread_rwlock_trywrlock pthread_rwlock_unlock
        pthread_rwlock_wrlock pthread_rwlockattr_destroy pthread_rwlockattr_init
        pthread_rwlockattr_setpshared pthread_setspecific pthread_spin_destroy pthread_spin_init
        pthread_spin_lock pthread_spin_trylock pthread_spin_unlock sem_destroy sem_init sem_post
        sem_timedwait sem_trywait sem_wait
    """,
}

EXPORTED = "{ global: tilemask_*; local: *; };\n"
PROBE = """\
#include <cuda_runtime.h>
__global__ void probe(int* x) { *x = 1; }
extern "C" __attribute__((visibility("default"))) int tilemask_probe(int* x) {
  probe<<<1, 1>>>(x);
  return cudaGetLastError();
}
"""


class Missing(Exception):
    """What this machine lacks to build the library: one clause, without a full stop."""


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit that answers."""

    nvcc: Path
    root: Path
    version: str

    @property
    def cudart(self) -> Path:
        """The folder of libcudart_static.a."""
        for folder in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
            if (self.root / folder / "libcudart_static.a").is_file():
                return self.root / folder
        raise Missing(f"the CUDA toolkit in {self.root} has no libcudart_static.a")


# -- what there is --------------------------------------------------------------------------------


def mode() -> str:
    """TILEMASK_CUDA."""
    name = os.environ.get("TILEMASK_CUDA") or "auto"
    if name not in MODES:
        raise SystemExit(f"TILEMASK_CUDA must be one of {', '.join(MODES)}, got {name!r}")
    return name


def requirements() -> list[str]:
    """Packages that building the library needs: ninja, and nvcc where it comes from PyPI. None
    where the library is left out.
    """
    if mode() == "off":
        return []
    try:
        find_nvcc()
    except Missing:
        if mode() == "auto":
            return []
    ninja = [] if shutil.which("ninja") else ["ninja"]
    return ninja + (nvcc_wheels() if mode() == "pypi" else [])


def sources() -> list[Path]:
    """The kernel files. Those named after an architecture hold the attention loops and take longest
    to compile: they come first, so that no CPU waits for them at the end.
    """
    return sorted(CSRC.glob("*.cu"), key=lambda path: (path.name[:2] != "sm", path.name))


def nvcc_wheels() -> list[str]:
    """Requirements that bring an nvcc from PyPI."""
    lines = (CSRC / "nvcc.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def nvcc_of_wheels() -> Path | None:
    """The nvcc that nvcc_wheels() installed where this Python finds packages."""
    for folder in map(Path, sys.path):
        if (found := folder / "nvidia/cu13/bin/nvcc").is_file():
            return found
    return None


def find_nvcc(only_wheels: bool = False) -> Path:
    """nvcc of CUDA_HOME, CUDA_PATH, PATH, USUAL_HOME, or of the wheels, in this order."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    places = [Path(home, "bin/nvcc") for home in homes if home]
    places += [Path(name) for name in [shutil.which("nvcc")] if name]
    places.append(Path(USUAL_HOME, "bin/nvcc"))
    for place in [] if only_wheels else places:
        if os.access(place, os.X_OK):
            return place
    if found := nvcc_of_wheels():
        return found
    if only_wheels:
        wheels = " ".join(nvcc_wheels())
        raise Missing(f"the packages of nvcc are not installed (pip install {wheels})")
    raise Missing(f"there was no nvcc, neither on PATH nor in CUDA_HOME or {USUAL_HOME}")


def find_toolkit(only_wheels: bool = False) -> Toolkit:
    return toolkit_of(find_nvcc(only_wheels))


def toolkit_of(nvcc: Path) -> Toolkit:
    """The toolkit of an nvcc, which is asked where that lies: a script may stand for it."""
    try:
        said = run([nvcc, "--version"])
        plan = run([nvcc, "--dryrun", "-x", "cu", os.devnull, "-o", os.devnull])
    except (OSError, subprocess.CalledProcessError) as error:
        raise Missing(f"{nvcc} does not run ({first_error(error)})") from error
    version = re.search(r"V(\d+\.\d+\.\d+)", said)
    top = re.search(r"^#\$ TOP=(.*)$", plan, re.MULTILINE)
    if version is None or top is None:
        raise Missing(f"{nvcc} does not answer like nvcc: {said.strip()[:100]!r}")
    return Toolkit(nvcc, Path(top[1].strip()).resolve(), version[1])


def find_ninja() -> str:
    if found := shutil.which("ninja"):
        return found
    try:
        import ninja
    except ImportError:
        raise Missing("there was no ninja (pip install ninja)") from None
    return str(Path(ninja.BIN_DIR) / "ninja")


def visible_architectures() -> list[str]:
    """Of ARCHITECTURES, those that the GPUs of this machine run; empty without a GPU."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        answer = run(query)
    except (OSError, subprocess.CalledProcessError, subprocess.TimeoutExpired):
        return []
    numbers = re.findall(r"^\s*(\d+)\.(\d+)\s*$", answer, re.MULTILINE)
    return sorted({best_for(int(major), int(minor)) for major, minor in numbers} - {None})


def best_for(major: int, minor: int) -> str | None:
    """The architecture for a compute capability: machine code runs on later minor versions."""
    if major < 8:
        return None
    known = {int(name.rstrip("a")): name for name in ARCHITECTURES if name[0].isdigit()}
    fit = [n for n in known if n // 10 == major and n % 10 <= minor]
    return known[max(fit)] if fit else "compute_80"


def parse_architectures(text: str) -> list[str]:
    """Of TILEMASK_ARCHS: names apart by spaces, commas or semicolons, or "native"."""
    names = re.split(r"[\s,;]+", text.strip())
    if names == ["native"]:
        names = visible_architectures()
        if not names:
            raise SystemExit("TILEMASK_ARCHS=native, but nvidia-smi names no GPU of 8.0 or newer")
    for name in names:
        if not re.fullmatch(r"(compute_)?([89]|1\d)\d[af]?", name):
            raise SystemExit(
                f"TILEMASK_ARCHS has {name!r}; expected names such as 80 or 90a for machine code, "
                f"compute_80 for PTX, or native; the default is {' '.join(ARCHITECTURES)}"
            )
    return list(dict.fromkeys(names))


# -- building -------------------------------------------------------------------------------------


def by_ptx(architectures: list[str]) -> dict[str, list[str]]:
    """The targets, such as sm_80 and compute_80, that are made of each PTX, such as compute_80.

    PTX takes long, and is made once for all of a major version: the machine code of 8.6 and 8.9
    comes from the PTX of 8.0, if that is wanted too.
    """
    numbers = [name.removeprefix("compute_") for name in architectures]
    targets: dict[str, list[str]] = {}
    for name, number in zip(architectures, numbers):
        alike = [n for n in numbers if n.isdigit() and n[:-1] == number[:-1]] or [number]
        ptx = min(alike, key=int) if number.isdigit() else number
        target = name if name != number else f"sm_{number}"
        targets.setdefault(f"compute_{ptx}", []).append(target)
    return targets


def to_ptx(virtual: str) -> list[str]:
    """nvcc's flags for the PTX of a source."""
    return [*FLAGS, "-ptx", f"-arch={virtual}"]


def to_host(virtual: str) -> list[str]:
    """nvcc's flags for the host's object of a source. Of its device code only the names stay: it is
    compiled as fast as can be, without optimizations (-G).
    """
    return [*HOST_FLAGS, "-G", f"-gencode=arch={virtual},code={virtual}", "-c"]


def image(target: str, path: Path) -> str:
    """fatbinary's argument for the code of sm_80, compute_80, ... in a file."""
    prefix, number = target.split("_")
    return f"--image3=kind={'elf' if prefix == 'sm' else 'ptx'},sm={number},file={path}"


def embed(fatbin: object, host: object, out: object) -> list:
    """The command that makes the object ``out`` of the host's and of what fatbinary made."""
    return ["objcopy", "--update-section", f".nv_fatbin={fatbin}", host, out]


def slots() -> int:
    """How many compilers may run at once: by CPUs, by free memory, or TILEMASK_JOBS."""
    if text := os.environ.get("TILEMASK_JOBS"):
        if not text.isdigit() or int(text) < 1:
            raise SystemExit(f"TILEMASK_JOBS must be a number from 1 on, got {text!r}")
        return int(text)
    cpus = len(os.sched_getaffinity(0))
    return max(1, min(cpus, free_memory() // MEMORY_PER_JOB))


def free_memory() -> int:
    """Bytes, by the kernel's account and the limit of the container."""
    meminfo = Path("/proc/meminfo").read_text()
    free = 1024 * int(re.search(r"^MemAvailable:\s*(\d+) kB", meminfo, re.MULTILINE)[1])
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return free if text == "max" else min(free, int(text))


def check_platform() -> None:
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        raise Missing(f"it is built for Linux, not for {sys.platform} on {platform.machine()}")


def build(toolkit: Toolkit, architectures: list[str]) -> Path:
    """The library for ``architectures``; what is up to date is not built again.

    Missing: the toolkit cannot compile and link a first kernel for them. SystemExit: it can, but
    not the library.
    """
    check_platform()
    folder = ROOT / "build" / "cuda" / "-".join(architectures)
    folder.mkdir(parents=True, exist_ok=True)
    stubs = [write_stub(folder, name) for name in MOVED] if has_glibc() else []
    replace(folder / "probe.cu", PROBE)
    replace(folder / "exported.map", EXPORTED)
    replace(folder / "build.ninja", ninja_file(toolkit, architectures, folder, stubs))
    ninja = [find_ninja(), "-f", str(relative(folder / "build.ninja"))]
    try:
        run([*ninja, str(relative(folder / "probe.so"))])
    except subprocess.CalledProcessError as error:
        raise Missing(
            f"nvcc {toolkit.version} ({toolkit.nvcc}) could not build a first kernel for "
            f"{' '.join(architectures)} ({first_error(error)})"
        ) from error
    done = subprocess.run([*ninja, "-j", str(slots()), str(relative(folder / LIBRARY))], cwd=ROOT)
    if done.returncode:
        raise SystemExit(
            f"{LIBRARY} was not built, see above; TILEMASK_CUDA=off installs without it"
        )
    return folder / LIBRARY


def ninja_file(toolkit: Toolkit, architectures: list[str], folder: Path, stubs: list[Path]) -> str:
    """Every path under the root is relative to it: objects do not depend on where it lies."""
    here = relative(folder)
    compilers = host_compiler(os.environ["CXX"]) if os.environ.get("CXX") else []
    compiler = shlex.split(os.environ.get("CC") or "gcc")
    link_words = [*compiler, "-shared"]
    options = [f"--version-script={here / 'exported.map'}", "-z,defs", "--as-needed", "-s"]
    link_words += [f"-Wl,{option}" for option in options]
    made = [relative(stub).with_suffix("") for stub in stubs]
    libraries = [f"-L{toolkit.cudart}", "-lcudart_static", *made, "-lpthread", "-ldl", "-lrt"]
    nvcc = toolkit.root / "bin/nvcc"  # what it compiled is new when it is
    fatbinary = [toolkit.root / "bin/fatbinary", "-64", "--compress-mode=size"]
    lines = [
        "ninja_required_version = 1.5",
        f"builddir = {escaped(here)}",
        "rule compile",
        f"  command = {quoted([toolkit.nvcc, *compilers])} $flags -MD -MF $out.d $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = nvcc $in: $what",
        "rule assemble",
        f"  command = {quoted([toolkit.nvcc, *FLAGS, '-cubin'])} -arch=$what $in -o $out",
        "  description = nvcc $source: $what",
        "rule embed",
        f"  command = {quoted(fatbinary)} --create=$out.fatbin $images && "
        + " ".join(embed("$out.fatbin", "$host", "$out")),
        "  description = embed $out",
        "rule stub",
        f"  command = {quoted(compiler)} -shared -nostdlib -Wl,-soname,$name "
        "-Wl,--version-script=${in}.map $in -o $out",
        "rule link",
        f"  command = {quoted(link_words)} $in {quoted(libraries)} -o $out",
        "  description = link $out",
    ]

    def add(rule: str, out: Path, inputs: list[Path], needs: list[Path], **values: object) -> Path:
        lines.append(
            f"build {escaped(out)}: {rule} {' '.join(map(escaped, inputs))}"
            + (f" | {' '.join(map(escaped, needs))}" if needs else "")
        )
        lines.extend(f"  {name} = {value}" for name, value in values.items())
        return out

    def add_object(source: Path) -> Path:
        """One source for every architecture."""
        targets = by_ptx(architectures)
        parts = {}
        for virtual in targets:
            ptx = here / f"{source.stem}.{virtual}.ptx"
            flags = quoted(to_ptx(virtual))
            add("compile", ptx, [relative(source)], [nvcc], flags=flags, what=virtual)
            for target in targets[virtual]:
                parts[target] = ptx
                if target.startswith("sm_"):
                    parts[target] = here / f"{source.stem}.{target}.cubin"
                    names = {"source": relative(source), "what": target}
                    add("assemble", parts[target], [ptx], [nvcc], **names)
        host, whole = here / f"{source.stem}.host.o", here / f"{source.stem}.o"
        flags = quoted(to_host(virtual))
        add("compile", host, [relative(source)], [nvcc], flags=flags, what="host")
        images = quoted([image(target, part) for target, part in parts.items()])
        return add("embed", whole, list(parts.values()), [host], host=host, images=images)

    def add_library(name: str, units: list[Path]) -> None:
        objects = [add_object(unit) for unit in units]
        add("link", here / name, objects, [here / "exported.map", *made])

    for stub, out in zip(stubs, made):
        add("stub", out, [relative(stub)], [], name=out.name)
    add_library("probe.so", [folder / "probe.cu"])
    add_library(LIBRARY, sources())
    return "\n".join(lines) + "\n"


def host_compiler(words: str) -> list[str]:
    """nvcc's options for CXX, which may have options of its own, and a launcher before it."""
    program, *options = shlex.split(words)
    if options and Path(program).name in ("ccache", "sccache", "distcc"):
        program, *options = options  # nvcc calls one program, without arguments
    return ["-ccbin", program, *(word for option in options for word in ("-Xcompiler", option))]


def has_glibc() -> bool:
    """Whether stand-ins are of use: their versions are those of x86-64."""
    return platform.machine() == "x86_64" and platform.libc_ver()[0] == "glibc"


def write_stub(folder: Path, name: str) -> Path:
    """The source of a stand-in for a library of MOVED, and its version script beside it."""
    versions: dict[str, list[str]] = {}
    for word in MOVED[name].split():
        function, _, version = word.partition("@")
        versions.setdefault(version or "GLIBC_2.2.5", []).append(function)
    source = folder / f"{name}.c"
    replace(source, "".join(f"void {f}(void) {{}}\n" for fs in versions.values() for f in fs))
    blocks = (f"{v} {{ global: {' '.join(f'{f};' for f in fs)} }};\n" for v, fs in versions.items())
    replace(folder / f"{name}.c.map", "".join(blocks))
    return source


def platform_tag(library: Path) -> str | None:
    """manylinux2014_... if a library needs no newer glibc; None if it does."""
    if platform.libc_ver()[0] != "glibc":
        return None
    needed = re.findall(r"GLIBC_(\d+)\.(\d+)", run(["objdump", "-T", library]))
    newest = max(((int(a), int(b)) for a, b in needed), default=OLDEST_GLIBC)
    return f"manylinux2014_{platform.machine()}" if newest <= OLDEST_GLIBC else None


# -- small things ---------------------------------------------------------------------------------


def run(words: list) -> str:
    """What a command prints; CalledProcessError if it fails."""
    done = subprocess.run(
        [str(word) for word in words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
        timeout=300,
    )
    return done.stdout


def first_error(error: Exception) -> str:
    """The line of a failed command that says why."""
    if not isinstance(error, subprocess.CalledProcessError):
        return str(error)
    lines = [line.strip() for line in error.stdout.splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"error|fatal|not found|cannot", line, re.I)]
    return (telling or lines or [f"exit code {error.returncode}"])[0][:200]


def replace(path: Path, text: str) -> None:
    """Write a file, unless it has this text: ninja looks at the time."""
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def relative(path: Path) -> Path:
    return path.relative_to(ROOT)


def escaped(path: Path) -> str:
    """For a path in a build line of ninja."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def quoted(words: list) -> str:
    """For a command of ninja, which the shell reads."""
    return shlex.join(map(str, words)).replace("$", "$$")
