"""Build script of tilemask. torch is not needed to build it, and nvcc only for its CUDA library.

Several directories make one package: python/tilemask is `tilemask`, kernels is `tilemask.kernels`.
csrc becomes tilemask/libtilemask.so, which knows neither Python nor torch: with it a wheel is for a
platform, without it for every one.

TILEMASK_CUDA   auto: the library is built if a first kernel compiles, else left out (the default)
                off: left out    required: built, or an error    pypi: the same, nvcc from PyPI
TILEMASK_ARCHS  what for; TILEMASK_JOBS: how many compilers at once (docs/install.md)
"""

import os
import re
import shutil
import sys
from pathlib import Path

from setuptools import Command, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))
import toolchain  # noqa: E402

OUTSIDE_PYTHON = {  # packages that do not live under python/
    "tilemask.kernels": "kernels",
    "tilemask.bench": "bench",
}
TEST = ["numpy", "packaging", "pytest>=8", "pytest-xdist", "transformers>=4.57"]
DEV = [
    *TEST,
    'auditwheel; sys_platform == "linux"',
    "build",
    "clang-format",
    "ninja",
    "ruff",
    "setuptools>=77",
]
MODE = toolchain.mode()


def read_version():
    """`__version__` of the package, read from its text: importing it would need torch."""
    init = ROOT / "python" / "tilemask" / "__init__.py"
    found = re.search(r'^__version__ = "([^"]+)"', init.read_text(encoding="utf-8"), re.MULTILINE)
    if found is None:
        raise RuntimeError(f'{init} has no line of the form __version__ = "1.2.3"')
    return found.group(1)


class BuildLibrary(Command):
    """Makes libtilemask.so, and _build_info.py, which tells what it is or why there is none."""

    description = "compile csrc/ into libtilemask.so"
    user_options = [("inplace", "i", "leave it beside the Python sources")]  # noqa: RUF012
    boolean_options = ["inplace"]  # noqa: RUF012
    editable_mode = False  # set by setuptools

    def initialize_options(self):
        self.inplace = False
        self.build_lib = None
        self.made = ["_build_info.py"]

    def finalize_options(self):
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self):
        in_place = self.inplace or self.editable_mode
        folder = ROOT / "python/tilemask" if in_place else Path(self.build_lib) / "tilemask"
        target = folder / toolchain.LIBRARY
        folder.mkdir(parents=True, exist_ok=True)
        info = {"ARCHITECTURES": [], "NVCC": None, "REASON": None}
        try:
            architectures = wanted_architectures(in_place)
            toolkit = toolchain.find_toolkit(only_wheels=MODE == "pypi")
            library = toolchain.build(toolkit, architectures)
        except toolchain.Missing as missing:
            if MODE in ("required", "pypi"):
                raise SystemExit(
                    f"TILEMASK_CUDA={MODE}, but the CUDA library cannot be built: {missing}.\n"
                    "Install the CUDA toolkit (12.8 or newer) and g++ and set CUDA_HOME, or take "
                    "nvcc from PyPI (TILEMASK_CUDA=pypi), or go without (TILEMASK_CUDA=off)."
                ) from None
            print(f"tilemask is built without its CUDA library: {missing}")
            info["REASON"] = str(missing)
            target.unlink(missing_ok=True)
        else:
            info |= {"ARCHITECTURES": architectures, "NVCC": toolkit.version}
            shutil.copy2(library, target.with_suffix(".new"))
            os.replace(target.with_suffix(".new"), target)  # a process may have the old one loaded
            self.made.append(toolchain.LIBRARY)
        lines = [f"{name} = {value!r}\n" for name, value in info.items()]
        text = '"""How this tilemask was built; written by setup.py."""\n\n' + "".join(lines)
        toolchain.replace(folder / "_build_info.py", text)

    def get_source_files(self):
        return []  # MANIFEST.in has them

    def get_outputs(self):
        folder = Path(self.build_lib) / "tilemask"
        return [str(folder / name) for name in self.made]

    def get_output_mapping(self):
        sources = (str(ROOT / "python/tilemask" / name) for name in self.made)
        return dict(zip(self.get_outputs(), sources)) if self.editable_mode else {}


def wanted_architectures(in_place):
    """TILEMASK_ARCHS; by default all of them, and in place those of the visible GPUs."""
    later = "; `make library` builds it" if in_place else ""
    if MODE == "off":
        raise toolchain.Missing(f"it was installed with TILEMASK_CUDA=off{later}")
    if text := os.environ.get("TILEMASK_ARCHS"):
        return toolchain.parse_architectures(text)
    visible = toolchain.visible_architectures() if in_place else []
    if in_place and MODE == "auto" and not visible:
        raise toolchain.Missing(f"it was installed in place where no GPU was visible{later}")
    return visible or toolchain.ARCHITECTURES


class Build(build):
    sub_commands = [*build.sub_commands, ("build_library", None)]  # noqa: RUF012


class Wheel(bdist_wheel):
    """One wheel for every Python: of this platform with the library, of any without it."""

    def get_tag(self):
        folder = Path(self.get_finalized_command("build").build_lib)
        library = folder / "tilemask" / toolchain.LIBRARY
        # setuptools took it for pure, as there is no extension module, and asks again after this
        self.root_is_pure = not library.is_file()
        if self.root_is_pure:
            return "py3", "none", "any"
        return "py3", "none", toolchain.platform_tag(library) or super().get_tag()[2]


setup(
    name="tilemask",
    version=read_version(),
    description="Fused attention for any mask, paying only for the tiles that the mask leaves",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["attention", "cuda", "mask", "pytorch", "triton"],
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    package_dir={"": "python", **OUTSIDE_PYTHON},
    packages=[*find_packages("python"), *OUTSIDE_PYTHON],
    cmdclass={"bdist_wheel": Wheel, "build": Build, "build_library": BuildLibrary},
    python_requires=">=3.10",
    install_requires=["torch>=2.10", 'triton>=3.6; sys_platform == "linux"'],
    extras_require={"test": TEST, "dev": DEV},
)
