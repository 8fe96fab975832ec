"""The CUDA library's build: what is compiled and when, modes, reasons, and the wheel that it is in.

Most tests build a copy of the project whose csrc/ holds two kernels of a few lines.
"""

import ctypes
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import nvcc
import pytest
import torch
from nvcc import toolchain

from tilemask import doctor, library

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.install

HEADER = (ROOT / "csrc/tilemask.h").read_text()
FUNCTION = re.compile(r"^TILEMASK_API (.*?(tilemask_\w+)\(.*\));$", re.MULTILINE)
DECLARED = {name: text for text, name in FUNCTION.findall(HEADER)}


def with_the_rest(code):
    """Code and, for every function of the header that it lacks, one that returns 0."""
    lacking = [text for name, text in DECLARED.items() if f"{name}(" not in code]
    return "\n".join(['#include "tilemask.h"', code, *(f"{t} {{ return 0; }}" for t in lacking)])


STORE = """
#include <cuda_runtime.h>
#include "seven.cuh"
#include "tilemask.h"
__global__ void store(int* x) { *x = seven(); }
int tilemask_abi(void) { return TILEMASK_ABI; }
int tilemask_forward(const TilemaskForward* call) {
  store<<<1, 1>>>((int*)call->lse);
  return -cudaGetLastError();
}
const char* tilemask_error_text(int code) { return cudaGetErrorString((cudaError_t)-code); }
int tilemask_check_device(int device) { return -cudaSetDevice(device); }
"""
SOURCES = {
    "seven.cuh": "__device__ inline int seven() { return 7; }\n",
    "one.cu": with_the_rest(STORE),
    "two.cu": "__global__ void nothing() {}\nvoid hidden() { nothing<<<1, 1>>>(); }\n",
}


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """The files that a build reads, with SOURCES in place of the kernels, and a first build in
    place. Tests copy it again, with what was compiled."""
    tree = tmp_path_factory.mktemp("copied") / "tree"
    ignored = shutil.ignore_patterns("__pycache__", "*.cu", "*.so", "_build_info.py", "results")
    for folder in ("bench", "csrc", "kernels", "python"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, tree / name)
    for name, text in SOURCES.items():
        (tree / "csrc" / name).write_text(text)
    printed = in_place(tree)
    assert "nvcc csrc/one.cu" in printed and "nvcc csrc/two.cu" in printed
    return tree


@pytest.fixture
def tree(copied, tmp_path):
    """A copy of its own for a test."""
    return Path(shutil.copytree(copied, tmp_path / "tree"))


@pytest.fixture(scope="module")
def built(copied, tmp_path_factory):
    """(tree, its wheel) with the library for sm_80, sm_90a and with PTX."""
    tree = Path(shutil.copytree(copied, tmp_path_factory.mktemp("built") / "tree"))
    make_wheel(tree, TILEMASK_CUDA="required", TILEMASK_ARCHS="80,90a compute_80")
    (wheel,) = (tree / "dist").iterdir()
    return tree, wheel


@pytest.fixture
def without_nvcc(tree, tmp_path):
    """A copy and the environment of a machine that has no nvcc anywhere."""
    module = tree / "csrc/toolchain.py"
    text = module.read_text()
    assert toolchain.USUAL_HOME in text
    module.write_text(text.replace(toolchain.USUAL_HOME, str(tmp_path / "nowhere")))
    return tree, {"CUDA_HOME": "", "PATH": str(tmp_path / "nowhere")}


def python(tree, *words, **environment):
    """Run Python in ``tree`` with these of the variables that matter, and nvcc's home."""
    matters = ("TILEMASK_", "PYTHON", "CUDA_", "PIP_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(matters)}
    kept |= {"CUDA_HOME": str(nvcc.find_nvcc().parents[1]), "PIP_NO_INDEX": "1"}
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=tree,
        env=kept | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )


def in_place(tree, **environment):
    """Build the library in place and return what was printed."""
    environment = {"TILEMASK_CUDA": "required", "TILEMASK_ARCHS": "80"} | environment
    done = python(tree, "setup.py", "-q", "build_library", "--inplace", **environment)
    assert done.returncode == 0, done.stdout
    return done.stdout


def make_wheel(tree, **environment):
    options = ["--no-build-isolation", "--no-deps", "-v", "-w", "dist"]
    done = python(tree, "-m", "pip", "wheel", *options, ".", **environment)
    assert done.returncode == 0, done.stdout
    return done.stdout


def build_info(folder):
    values = {}
    exec((folder / "_build_info.py").read_text(), values)
    return values


def machine_code(path):
    """[(kind, architecture)] of the code in a library; kinds: 1 PTX, 2 machine code."""
    data, found, start = path.read_bytes(), [], 0
    while (start := data.find(struct.pack("<I", 0xBA55ED50), start)) >= 0:
        header, size = struct.unpack_from("<HQ", data, start + 6)
        entry, start = start + header, start + header + size
        while entry < start:
            kind, _, header, size = struct.unpack_from("<HHIQ", data, entry)
            found.append((kind, struct.unpack_from("<I", data, entry + 28)[0]))
            entry += header + size
    return found


def needed(path):
    """The libraries that a library asks for."""
    listing = toolchain.run(["readelf", "-d", path])
    return set(re.findall(r"NEEDED.*\[(.*)\]", listing))


def exported(path):
    return set(toolchain.run(["nm", "-D", "--defined-only", path]).split()[2::3])


# -- what is compiled, and when -------------------------------------------------------------------


def test_a_second_build_does_only_what_is_new(tree):
    made = tree / "python/tilemask/libtilemask.so"
    before = made.stat().st_mtime_ns
    assert in_place(tree).splitlines() == ["ninja: no work to do."]
    assert made.stat().st_mtime_ns == before

    (tree / "csrc/seven.cuh").write_text(SOURCES["seven.cuh"].replace("7", "8"))
    again = in_place(tree)
    assert "nvcc csrc/one.cu" in again and "two.cu" not in again
    assert "link" in again

    (tree / "csrc/three.cu").write_text('extern "C" int tilemask_three() { return 3; }\n')
    assert "nvcc csrc/three.cu" in in_place(tree)
    assert exported(made) == set(DECLARED)  # -fvisibility=hidden, and it is not in the header


def test_a_command_is_for_one_source_and_one_architecture(copied, tmp_path):
    """And the code of all of them is found by the names that the host's object registers."""
    tree = Path(shutil.copytree(copied, tmp_path / "tree"))
    for source in (tree / "csrc").glob("*.cu"):  # names of a file's own have a hash of its name
        kernel = "namespace { template <int N> __global__ void own(int* x) { *x = N; } }\n"
        launch = f"void {source.stem}_own() {{ own<7><<<1, 1>>>(nullptr); }}\n"
        source.write_text(source.read_text() + kernel + launch)
    printed = in_place(tree, TILEMASK_ARCHS="80 86 90a compute_80")
    made = ["host", "compute_80", "compute_90a", "sm_80", "sm_86", "sm_90a"]
    wanted = {f"nvcc csrc/{source}: {what}" for source in ("one.cu", "two.cu") for what in made}
    assert set(re.findall(r"nvcc csrc/\S+ \S+", printed)) == wanted

    (folder,) = (tree / "build/cuda").glob("80-86-*")
    for source in ("one", "two"):
        ptx = (folder / f"{source}.compute_90a.ptx").read_text()
        kernels = re.findall(r"\.entry (\w+)", ptx)
        assert len(kernels) == 2 and any("GLOBAL__N" in name for name in kernels)
        for made in ("host.o", "sm_80.cubin", "sm_86.cubin", "sm_90a.cubin", "compute_80.ptx"):
            text = (folder / f"{source}.{made}").read_bytes()
            assert all(re.search(rb"\b%s\b" % name.encode(), text) for name in kernels), made
        found = machine_code(folder / f"{source}.o")
        assert sorted(found) == [(1, 80), (2, 80), (2, 86), (2, 90)]


def test_a_kernel_that_does_not_compile_is_an_error(tree):
    """Also in mode auto: only a first kernel decides whether the library is left out."""
    (tree / "python/tilemask/libtilemask.so").unlink()
    (tree / "csrc/two.cu").write_text("int wrong = ;\n")
    done = python(tree, "setup.py", "-q", "build_library", "--inplace", TILEMASK_ARCHS="80")
    assert done.returncode == 1
    assert "two.cu(1): error: expected an expression" in done.stdout
    assert "TILEMASK_CUDA=off installs without it" in done.stdout
    assert not (tree / "python/tilemask/libtilemask.so").exists()


def test_the_library_needs_nothing_but_the_system(tree):
    """An object that uses the C++ library does not link."""
    (tree / "csrc/two.cu").write_text("#include <string>\nstd::string *text = new std::string;\n")
    done = python(tree, "setup.py", "-q", "build_library", "--inplace", TILEMASK_ARCHS="80")
    assert done.returncode == 1 and "undefined reference to" in done.stdout


def test_compilers_with_a_launcher(tree, tmp_path):
    """CC and CXX as other build systems take them."""
    launcher = tmp_path / "ccache"
    launcher.write_text(f'#!/bin/sh\necho "$1" >> {tmp_path}/launched\nexec "$@"\n')
    launcher.chmod(0o755)
    paths = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    in_place(tree, CC="ccache gcc", CXX="ccache g++ -pipe", PATH=paths)
    assert set((tmp_path / "launched").read_text().split()) == {"gcc"}
    assert "-ccbin g++ -Xcompiler -pipe" in next(tree.rglob("build.ninja")).read_text()


@pytest.mark.parametrize(
    "capability, architecture",
    [
        ((7, 5), None),
        ((8, 0), "80"),
        ((8, 6), "86"),
        ((8, 7), "86"),
        ((8, 9), "89"),
        ((9, 0), "90a"),
        ((10, 0), "100"),
        ((10, 3), "100"),
        ((11, 0), "compute_80"),
        ((12, 1), "120"),
    ],
)
def test_architecture_of_a_gpu(capability, architecture):
    assert toolchain.best_for(*capability) == architecture


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """A function that makes an nvidia-smi that gives an answer."""

    def make(answer, code=0):
        tool = tmp_path / "tools/nvidia-smi"
        tool.parent.mkdir(exist_ok=True)
        tool.write_text(f"#!/bin/sh\nprintf '{answer}'\nexit {code}\n")
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", str(tool.parent), prepend=os.pathsep)

    return make


def test_native_means_the_gpus_of_this_machine(nvidia_smi):
    nvidia_smi("9.0\\n8.6\\n9.0\\n7.0\\n")
    assert toolchain.parse_architectures("native") == ["86", "90a"]
    nvidia_smi("No devices were found", code=6)
    with pytest.raises(SystemExit, match="nvidia-smi names no GPU"):
        toolchain.parse_architectures("native")


def test_architectures_are_names():
    assert toolchain.parse_architectures(" 80;90a, compute_80 80") == ["80", "90a", "compute_80"]
    assert toolchain.by_ptx(["80", "89", "90a", "compute_80"]) == {
        "compute_80": ["sm_80", "sm_89", "compute_80"],
        "compute_90a": ["sm_90a"],
    }
    assert toolchain.by_ptx(["89"]) == {"compute_89": ["sm_89"]}
    with pytest.raises(SystemExit, match=r"TILEMASK_ARCHS has '8\.0'; expected names such as"):
        toolchain.parse_architectures("8.0")


def test_compilers_at_once(monkeypatch):
    monkeypatch.delenv("TILEMASK_JOBS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64))
    monkeypatch.setattr(toolchain, "free_memory", lambda: 9 << 30)
    assert toolchain.slots() == 4
    monkeypatch.setattr(toolchain, "free_memory", lambda: 1 << 30)
    assert toolchain.slots() == 1
    monkeypatch.setenv("TILEMASK_JOBS", "3")
    assert toolchain.slots() == 3
    monkeypatch.setenv("TILEMASK_JOBS", "many")
    with pytest.raises(SystemExit, match="TILEMASK_JOBS must be a number"):
        toolchain.slots()


def test_in_place_it_is_for_the_visible_gpus(tree, nvidia_smi):
    nvidia_smi("8.0\\n")
    done = python(tree, "setup.py", "-q", "build_library", "--inplace")
    assert done.returncode == 0, done.stdout
    assert build_info(tree / "python/tilemask")["ARCHITECTURES"] == ["80"]
    assert set(machine_code(tree / "python/tilemask/libtilemask.so")) == {(2, 80)}


def test_in_place_without_a_gpu_nothing_is_compiled(tree, nvidia_smi):
    nvidia_smi("No devices were found", code=6)
    done = python(tree, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--target",
                  tree / "site", "-e", ".")  # fmt: skip
    assert done.returncode == 0, done.stdout
    info = build_info(tree / "python/tilemask")
    assert info["REASON"].startswith("it was installed in place where no GPU was visible; `make ")
    assert not (tree / "python/tilemask/libtilemask.so").exists()


# -- without a library ----------------------------------------------------------------------------


def wheel_without_library(tree, **environment):
    """The reason of a wheel that must be pure."""
    printed = make_wheel(tree, **environment)
    (wheel,) = (tree / "dist").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]
        values = {}
        exec(archive.read("tilemask/_build_info.py"), values)
    assert f"tilemask is built without its CUDA library: {values['REASON']}" in printed
    assert (values["ARCHITECTURES"], values["NVCC"]) == ([], None)
    return values["REASON"]


def test_without_nvcc_the_wheel_is_pure(without_nvcc):
    tree, environment = without_nvcc
    reason = wheel_without_library(tree, **environment)
    assert reason.startswith("there was no nvcc, neither on PATH nor in CUDA_HOME or ")


def test_switched_off_the_wheel_is_pure(tree):
    """Also where an earlier build left a library in the build folder and among the sources."""
    assert (tree / "python/tilemask/libtilemask.so").exists()
    stale = tree / "build/lib/tilemask/libtilemask.so"
    stale.parent.mkdir(parents=True)
    stale.write_text("stale")
    reason = wheel_without_library(tree, TILEMASK_CUDA="off")
    assert reason == "it was installed with TILEMASK_CUDA=off"


FAKES = {
    "fails": ("echo 'Killed by a licence' >&2; exit 1", "does not run (Killed by a licence)"),
    "is another": ("echo hello", "does not answer like nvcc: 'hello'"),
    "is old": (
        "case $1 in --version) echo 'release 12.4, V12.4.131';; --dryrun) echo '#$ TOP=HOME';;"
        " *) echo \"nvcc fatal   : Unsupported gpu architecture 'compute_120'\"; exit 1;; esac",
        "could not build a first kernel for 80 86 89 90a 100 120 compute_80 "
        "(nvcc fatal   : Unsupported gpu architecture 'compute_120')",
    ),
}


@pytest.mark.parametrize("fault", FAKES)
def test_an_nvcc_that_does_not_work_is_the_reason(fault, tree, tmp_path):
    script, told = FAKES[fault]
    fake = tmp_path / "home/bin/nvcc"
    (tmp_path / "home/lib").mkdir(parents=True)
    (tmp_path / "home/lib/libcudart_static.a").touch()
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\n" + script.replace("HOME", str(tmp_path / "home")))
    fake.chmod(0o755)
    assert told in wheel_without_library(tree, CUDA_HOME=str(tmp_path / "home"))


@pytest.mark.parametrize("mode", ["required", "pypi"])
def test_required_without_nvcc_says_what_to_do(mode, without_nvcc):
    tree, environment = without_nvcc
    done = python(tree, "setup.py", "build_library", TILEMASK_CUDA=mode, **environment)
    assert done.returncode == 1
    assert f"TILEMASK_CUDA={mode}, but the CUDA library cannot be built: " in done.stdout
    assert "TILEMASK_CUDA=off" in done.stdout and "set CUDA_HOME" in done.stdout
    if mode == "pypi":
        assert "(pip install nvidia-cuda-nvcc==" in done.stdout
    assert "Traceback" not in done.stdout


def test_an_unknown_mode_is_an_error(tree):
    done = python(tree, "setup.py", "--version", TILEMASK_CUDA="perhaps")
    assert done.returncode == 1
    assert "must be one of auto, off, required, pypi, got 'perhaps'" in done.stdout


@pytest.mark.parametrize(
    "mode, nvcc_there, asked",
    [
        ("auto", True, ["ninja"]),
        ("auto", False, []),
        ("off", True, []),
        ("required", False, ["ninja"]),
        ("pypi", False, ["ninja", *toolchain.nvcc_wheels()]),
    ],
)
def test_an_isolated_build_asks_for(mode, nvcc_there, asked, without_nvcc, tmp_path):
    tree, environment = without_nvcc
    if nvcc_there:
        environment.pop("CUDA_HOME")
    code = (
        "import backend as b; wheel = b.get_requires_for_build_wheel();"
        "assert wheel == b.get_requires_for_build_editable(); print(wheel)"
    )
    environment |= {"PYTHONPATH": str(tree / "csrc"), "PATH": str(tmp_path / "nowhere")}
    done = python(tree, "-c", code, TILEMASK_CUDA=mode, **environment)
    assert done.stdout.splitlines()[-1] == str(asked)


# -- the wheel ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """The folder that the wheel is installed into."""
    site = tmp_path_factory.mktemp("installed")
    done = python(site, "-m", "pip", "install", "--no-deps", "--target", site, built[1])
    assert done.returncode == 0, done.stdout
    return site


def test_one_wheel_for_every_python_of_the_platform(built):
    _, wheel = built
    if not toolchain.has_glibc():
        pytest.skip("manylinux is about glibc on x86-64")
    assert wheel.name.endswith("-py3-none-manylinux2014_x86_64.whl")
    with zipfile.ZipFile(wheel) as archive:
        (info,) = (name for name in archive.namelist() if name.endswith(".dist-info/WHEEL"))
        text = archive.read(info).decode()
        names = archive.namelist()
    assert "Tag: py3-none-manylinux2014_x86_64\n" in text
    assert "Root-Is-Purelib: false\n" in text
    assert {name for name in names if not name.endswith(".py") and "dist-info" not in name} == {
        "tilemask/libtilemask.so"
    }


def test_auditwheel_accepts_the_wheel(built):
    pytest.importorskip("auditwheel")
    done = python(built[0], "-m", "auditwheel", "show", built[1])
    said = " ".join(done.stdout.split())
    assert 'is consistent with the following platform tag: "manylinux_2_17_x86_64"' in said


def test_the_library_is_alone(installed):
    path = installed / "tilemask/libtilemask.so"
    system = {"libc.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1", "ld-linux-x86-64.so.2"}
    assert needed(path) <= system
    assert exported(path) == set(DECLARED)


def test_the_library_has_code_for_what_was_asked(installed):
    path = installed / "tilemask/libtilemask.so"
    assert set(machine_code(path)) == {(2, 80), (2, 90), (1, 80)}
    info = build_info(path.parent)
    assert info["ARCHITECTURES"] == ["80", "90a", "compute_80"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", info["NVCC"]) and info["REASON"] is None


def test_the_installed_library_answers(installed):
    code = (
        "from tilemask import library as l; print(l.__file__); print(l.unavailable());"
        "print(l.architectures()); print(l.load().tilemask_abi())"
    )
    done = python(installed, "-c", code, PYTHONPATH=str(installed))
    file, reason, names, abi = done.stdout.splitlines()
    assert Path(file).parent == installed / "tilemask"
    assert (reason, names) == ("None", "sm_80, sm_90a, PTX of compute_80")
    assert int(abi) == library.ABI


def test_doctor_tells_about_the_library(installed):
    done = python(
        installed, "-m", "tilemask", "doctor", PYTHONPATH=str(installed), CUDA_VISIBLE_DEVICES=""
    )
    assert done.returncode == 0, done.stdout
    (line,) = re.findall(r"^  library +(.*)$", done.stdout, re.MULTILINE)
    assert line.startswith(f"libtilemask.so, ABI {library.ABI}, CUDA ")
    assert ", for sm_80, sm_90a, PTX of compute_80; does not run here: " in line


PYTHONS = [f"python3.{minor}" for minor in range(10, 16)]


@pytest.mark.slow
@pytest.mark.parametrize("name", PYTHONS)
def test_every_python_takes_the_wheel(name, built, tmp_path):
    """Without torch: the package itself is not imported, its module `library` is."""
    found = shutil.which(name)
    if found is None or subprocess.run([found, "-c", ""], capture_output=True).returncode:
        pytest.skip(f"there is no {name}")
    options = ["--python", found, "install", "--no-deps", "--target", tmp_path / "site"]
    done = python(tmp_path, "-m", "pip", *options, built[1])
    assert done.returncode == 0, done.stdout
    code = (
        "import sys, types; package = sys.modules['tilemask'] = types.ModuleType('tilemask');"
        "package.__path__ = ['site/tilemask']; from tilemask import library as l;"
        "print(l.load().tilemask_abi(), l.architectures())"
    )
    printed = subprocess.check_output([found, "-c", code], cwd=tmp_path, text=True)
    assert printed == f"{library.ABI} sm_80, sm_90a, PTX of compute_80\n"


# -- the C program of docs/c_api.md ---------------------------------------------------------------


def compile_program(folder, *libraries):
    """The program, linked with libraries."""
    page = (ROOT / "docs/c_api.md").read_text()
    (program,) = re.findall(r"^```c\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (folder / "attention.c").write_text(program)
    toolkit = toolchain.toolkit_of(nvcc.find_nvcc())
    paths = [f"-I{toolkit.root / 'include'}", f"-I{ROOT / 'csrc'}"]
    paths += [f"-Wl,-rpath,{Path(library).parent}" for library in libraries]
    warnings = ["-std=gnu11", "-Wall", "-Wextra", "-Werror"]
    toolchain.run(["gcc", *warnings, *paths, folder / "attention.c", *libraries, "-o",
                   folder / "attention"])  # fmt: skip
    return folder / "attention"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_c_program_says_that_there_is_no_gpu(installed, tmp_path):
    cudart = toolchain.toolkit_of(nvcc.find_nvcc()).cudart
    (runtime,) = cudart.glob("libcudart.so.1?")
    program = compile_program(tmp_path, installed / "tilemask/libtilemask.so", runtime)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 1
    assert re.fullmatch(r"-(35|100): \S.*\n", done.stdout)


def test_c_program_computes(tmp_path):
    """In the emulator, whose kernels read the memory of the process."""
    shim = tmp_path / "libshim.so"
    (tmp_path / "shim.c").write_text(SHIM)
    toolchain.run(["gcc", "-shared", "-fPIC", tmp_path / "shim.c", "-o", shim])
    program = compile_program(tmp_path, nvcc.build_for_emulator(80), shim, nvcc.emulator.library())
    done = subprocess.run([program], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("row 99 is 49.5\n", 0)


SHIM = """
#include <stdlib.h>
int cudaMallocManaged(void** p, size_t n, unsigned flags) {
  return (*p = aligned_alloc(256, (n + 255) / 256 * 256)) == 0;
}
int cudaDeviceSynchronize(void) { return 0; }
"""


def test_doctor_advises_to_build_it(monkeypatch):
    """Where a GPU would run it; elsewhere it is not what is missing."""
    states = {"triton": "runs", "reference": "runs"}
    monkeypatch.delenv("TILEMASK_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(library, "unavailable", lambda: "there is no library")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    advice = doctor.advice(set(states), states)
    assert advice == "there is no library; docs/install.md says how to build it"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "there is no library" not in doctor.advice(set(states), states)


# -- tilemask.library -----------------------------------------------------------------------------


@pytest.fixture
def other(tmp_path, monkeypatch):
    """A function that compiles C into the library that tilemask finds; None for no library."""

    def make(code):
        path = tmp_path / "libtilemask.so"
        if code is not None:
            (tmp_path / "code.c").write_text(code)
            include = f"-I{ROOT / 'csrc'}"
            toolchain.run(["gcc", "-shared", "-fPIC", include, tmp_path / "code.c", "-o", path])
        monkeypatch.setattr(library, "PATH", path)
        return path

    library.load.cache_clear()
    yield make
    library.load.cache_clear()


def answering(abi, code=0):
    return with_the_rest(
        f"int tilemask_abi(void) {{ return {abi}; }}\n"
        f"int tilemask_check_device(int device) {{ return {code}; }}\n"
        'const char* tilemask_error_text(int code) { return "the text"; }\n'
    )


def test_no_library_has_a_reason(other, monkeypatch):
    other(None)
    monkeypatch.setattr(library, "built", lambda: ([], None, "it rained"))
    assert library.unavailable() == "tilemask has no CUDA library: it rained"
    with pytest.raises(library.LibraryError, match="it rained"):
        library.load()


@pytest.mark.parametrize(
    "code, told",
    [
        (answering(abi=99), "has ABI 99, this tilemask calls ABI"),
        ("int something_else;", "cannot be loaded: .*tilemask_abi"),
        ("int missing(void); int tilemask_abi(void) { return missing(); }", "missing"),
    ],
)
def test_a_library_of_another_kind(code, told, other):
    other(code)
    reason = library.unavailable()
    assert reason is not None and re.search(told, reason)


@pytest.mark.parametrize(
    "code, told",
    [
        (0, None),
        (-35, "no NVIDIA driver, or one too old for the CUDA 13.0.88 it was built with: the text"),
        (library.NO_KERNEL, "the text: it was built for sm_80, PTX of compute_80 (TILEMASK_ARCHS)"),
        (-100, "the text"),
    ],
)
def test_what_keeps_it_from_running(code, told, other, monkeypatch):
    other(answering(library.ABI, code))
    monkeypatch.setattr(library, "built", lambda: (["80", "compute_80"], "13.0.88", None))
    assert library.unavailable() is None
    assert library.unfit(0) == told


def test_the_abi_is_that_of_the_header():
    assert int(re.search(r"define TILEMASK_ABI (\d+)", HEADER)[1]) == library.ABI
    assert int(re.search(r"TILEMASK_NO_KERNEL = (\d+)", HEADER)[1]) == library.NO_KERNEL


def test_importing_loads_nothing():
    code = (
        "import tilemask.library, tilemask; maps = open('/proc/self/maps').read();"
        "print('libtilemask' in maps)"
    )
    assert python(ROOT, "-c", code).stdout == "False\n"


# -- the project itself ---------------------------------------------------------------------------


@pytest.mark.slow
def test_nvcc_comes_from_pypi():
    path = nvcc.nvcc_from_pypi()
    version = re.search(r"nvidia-cuda-nvcc==(\S+)", " ".join(toolchain.nvcc_wheels()))[1]
    assert f"V{version}" in toolchain.run([path, "--version"])


def test_it_exports_what_the_header_declares():
    path = nvcc.build_for_emulator(80)
    assert exported(path) == set(DECLARED)
    assert set(machine_code(path)) == {(1, 80)}


@pytest.mark.slow
def test_the_wheel_of_the_project(tmp_path):
    """Everything for every architecture: some minutes."""
    ignored = shutil.ignore_patterns(".git", ".venv*", ".*cache", "build", "dist", "*.so")
    tree = Path(shutil.copytree(ROOT, tmp_path / "tree", ignore=ignored))
    make_wheel(tree, TILEMASK_CUDA="required")
    (wheel,) = (tree / "dist").iterdir()
    assert wheel.name.endswith("-py3-none-manylinux2014_x86_64.whl")
    assert wheel.stat().st_size < 30 << 20
    with zipfile.ZipFile(wheel) as archive:
        path = Path(archive.extract("tilemask/libtilemask.so", tmp_path))
    assert exported(path) == exported(nvcc.build_for_emulator(80))
    kinds = {(2, 80), (2, 86), (2, 89), (2, 90), (2, 100), (2, 120), (1, 80)}
    assert set(machine_code(path)) == kinds
    assert ctypes.CDLL(str(path)).tilemask_abi() == library.ABI


def test_the_wheel_was_used_with_every_torch():
    """The last report of wheel_report.py: these installs take gigabytes."""
    kept = json.loads((ROOT / "bench/results/static/wheel.json").read_text())
    assert kept["wheel"].endswith("-py3-none-manylinux2014_x86_64.whl")
    assert '"manylinux_2_17_x86_64"' in kept["auditwheel"] and kept["bytes"] < 30 << 20
    used = kept["installed"]
    assert {one["torch"].rsplit(".", 1)[0] for one in used} == {f"2.{n}" for n in range(10, 16)}
    assert {one["python"].rsplit(".", 1)[0] for one in used} >= {f"3.{n}" for n in range(10, 14)}
    for one in used:
        assert one["abi"] == library.ABI
        names = re.findall(r"(?:sm_|PTX of )(\w+)", one["library"])
        assert names == toolchain.ARCHITECTURES
