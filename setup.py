"""Build script of tilemask: pure Python, and torch is not needed to build it.

Two directories make one package: python/tilemask is `tilemask`, kernels is `tilemask.kernels`.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
OUTSIDE_PYTHON = {"tilemask.kernels": "kernels"}  # packages that do not live under python/
TEST = ["numpy", "packaging", "pytest>=8", "pytest-xdist", "transformers>=4.57"]
DEV = [*TEST, "build", "clang-format", "ruff", "setuptools>=77"]


def read_version():
    """`__version__` of the package, read from its text: importing it would need torch."""
    init = ROOT / "python" / "tilemask" / "__init__.py"
    found = re.search(r'^__version__ = "([^"]+)"', init.read_text(encoding="utf-8"), re.MULTILINE)
    if found is None:
        raise RuntimeError(f'{init} has no line of the form __version__ = "1.2.3"')
    return found.group(1)


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
    python_requires=">=3.10",
    install_requires=["torch>=2.10", 'triton>=3.6; sys_platform == "linux"'],
    extras_require={"test": TEST, "dev": DEV},
)
