"""The package as it is built and installed, and the rules that the files of the repository keep.

Tests marked `install` build from a copy of the sources, so that nothing is left in the repository,
never reach for the network, and leave the CUDA library out: that is in test_build.py.
"""

import ast
import email
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # comes with pytest

ROOT = Path(__file__).resolve().parents[1]
NOT_SOURCE = shutil.ignore_patterns(
    ".git",
    ".venv*",
    ".*cache",
    "__pycache__",
    "build",
    "dist",
    "*.egg-info",
    "*.so",
    "*.o",
    "_build_info.py",
    "PKG-INFO",
)


def run(*command, cwd, check=True):
    """Run a command with no package index, no foreign import path and no nvcc; its output is the
    error."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=env
        | {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "TILEMASK_CUDA": "off"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    if check and done.returncode:
        pytest.fail(f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


def git_files():
    """Every file that git tracks or would add, or None outside a git checkout of this project."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        return None
    listing = run("git", "ls-files", "-z", "-co", "--exclude-standard", cwd=ROOT).stdout
    return sorted(name for name in listing.split("\0") if name and (ROOT / name).is_file())


def read_toml():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def pins():
    """{name: {versions}} of constraints.txt; numpy has one version for each range of Pythons."""
    versions = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line := line.partition("#")[0].strip():
            requirement = Requirement(line)
            (pin,) = requirement.specifier
            assert pin.operator == "==", line
            versions.setdefault(requirement.name, set()).add(pin.version)
    return versions


def source_version():
    tree = ast.parse((ROOT / "python/tilemask/__init__.py").read_text(encoding="utf-8"))
    (value,) = (
        node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "__version__"
    )
    return value


# ---------------------------------------------------------------- what is built


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    """A copy of the sources, and nothing else, to build from."""
    copy = tmp_path_factory.mktemp("sources") / "tilemask"
    names = git_files()
    if names is None:
        shutil.copytree(ROOT, copy, ignore=NOT_SOURCE)
    else:
        for name in names:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    return copy


def files_in(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="session")
def wheel(sources, tmp_path_factory):
    """The wheel that `pip wheel` makes from the sources."""
    tree = tmp_path_factory.mktemp("wheel") / "tree"
    shutil.copytree(sources, tree)
    out = tree.parent / "out"
    run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        "-w",
        out,
        ".",
        cwd=tree,
    )
    (path,) = out.iterdir()
    return path


@pytest.fixture(scope="session")
def built(sources, tmp_path_factory):
    """(sdist, wheel made from that sdist), as `python -m build` makes them."""
    pytest.importorskip("build")
    tree = tmp_path_factory.mktemp("sdist") / "tree"
    shutil.copytree(sources, tree)
    out = tree.parent / "out"
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, cwd=tree)
    (sdist,) = out.glob("*.tar.gz")
    (from_sdist,) = out.glob("*.whl")
    return sdist, from_sdist


@pytest.fixture
def fresh_python(tmp_path):
    """The python of a new environment: it sees torch, pip, ... of this one, but no tilemask."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "env", cwd=tmp_path)
    lent = tmp_path / "lent"
    lent.mkdir()
    # not find_spec: looking for pip makes setuptools give up its distutils in this process
    homes = {
        Path(importlib.metadata.distribution(name).locate_file(""))
        for name in ("pip", "setuptools", "torch")
    }
    for home in homes:
        for entry in home.iterdir():
            if "tilemask" not in entry.name and not (lent / entry.name).exists():
                (lent / entry.name).symlink_to(entry)
    python = tmp_path / "env/bin/python"
    (site,) = (tmp_path / "env").rglob("site-packages")
    (site / "lent.pth").write_text(f"{lent}\n")
    assert run(python, "-c", "import tilemask", cwd=tmp_path, check=False).returncode != 0
    return python


def imported_files(python, cwd):
    """Where a new process finds tilemask and tilemask.kernels, and the version it reports."""
    code = (
        "import tilemask as t, tilemask.kernels as k; print(t.__file__, k.__file__, t.__version__)"
    )
    package, kernels, version = run(python, "-c", code, cwd=cwd).stdout.split()
    return Path(package), Path(kernels), version


def python_files(folder):
    return {name for name in files_in(folder) if name.endswith(".py")}


class TestWheel:
    pytestmark = pytest.mark.install

    def test_holds_the_package_and_nothing_else(self, wheel, sources):
        names = set(zipfile.ZipFile(wheel).namelist())
        info = f"tilemask-{source_version()}.dist-info"
        assert {name.split("/")[0] for name in names} == {"tilemask", info}
        expected = python_files(sources / "python")
        for folder in ("kernels", "bench"):
            expected |= {f"tilemask/{folder}/{name}" for name in python_files(sources / folder)}
        assert {"tilemask/__init__.py", "tilemask/kernels/__init__.py"} <= expected
        expected.add("tilemask/_build_info.py")
        assert {name for name in names if name.endswith(".py")} == expected
        assert any(name.startswith(info) and name.endswith("/LICENSE") for name in names)

    def test_fits_every_python_and_platform(self, wheel):
        assert wheel.name == f"tilemask-{source_version()}-py3-none-any.whl"

    def test_metadata(self, wheel):
        info = f"tilemask-{source_version()}.dist-info/METADATA"
        metadata = email.message_from_bytes(zipfile.ZipFile(wheel).read(info))
        assert metadata["Name"] == "tilemask"
        assert metadata["Version"] == source_version()
        assert metadata["Requires-Python"] == ">=3.10"
        assert "Apache-2.0" in (metadata["License"], metadata["License-Expression"])
        needed = {Requirement(text) for text in metadata.get_all("Requires-Dist")}
        always = {need for need in needed if not (need.marker and "extra" in str(need.marker))}
        assert always == {
            Requirement("torch>=2.10"),
            Requirement('triton>=3.6; sys_platform == "linux"'),
        }
        assert set(metadata.get_all("Provides-Extra")) == {"test", "dev"}

    def test_constraints_pin_what_the_package_asks_for(self, wheel):
        info = f"tilemask-{source_version()}.dist-info/METADATA"
        metadata = email.message_from_bytes(zipfile.ZipFile(wheel).read(info))
        pinned = pins()
        for need in map(Requirement, metadata.get_all("Requires-Dist")):
            assert need.name in pinned, f"{need} has no version in constraints.txt"
            assert all(need.specifier.contains(version) for version in pinned[need.name]), need

    def test_installs_and_imports(self, wheel, fresh_python, tmp_path):
        run(fresh_python, "-m", "pip", "install", "--no-deps", wheel, cwd=tmp_path)
        package, kernels, version = imported_files(fresh_python, tmp_path)
        assert package.parent.parent.name == "site-packages"
        assert tmp_path in package.parents
        assert kernels == package.parent / "kernels" / "__init__.py"
        assert version == source_version()


class TestSdist:
    pytestmark = pytest.mark.install

    def test_is_the_whole_tree(self, built, sources):
        sdist, _ = built
        with tarfile.open(sdist) as archive:
            names = {member.name.partition("/")[2] for member in archive if member.isfile()}
        made = {"PKG-INFO", "setup.cfg"}
        egg_info = {name for name in names if ".egg-info/" in name}
        assert "tests/test_package.py" in names
        assert names - made - egg_info == files_in(sources) - made

    def test_gives_the_same_wheel(self, built, wheel):
        _, from_sdist = built
        assert from_sdist.name == wheel.name
        contents = [
            {entry.filename: entry.CRC for entry in zipfile.ZipFile(path).infolist()}
            for path in (wheel, from_sdist)
        ]
        for entries in contents:
            entries.pop(next(name for name in entries if name.endswith("/RECORD")))
        assert contents[0] == contents[1]


class TestEditable:
    pytestmark = pytest.mark.install

    def test_imports_from_the_sources(self, sources, fresh_python, tmp_path):
        tree = tmp_path / "tree"
        shutil.copytree(sources, tree)
        options = ["--no-build-isolation", "--no-deps"]
        run(fresh_python, "-m", "pip", "install", *options, "-e", ".", cwd=tree)
        package, kernels, version = imported_files(fresh_python, tmp_path)
        assert package == tree / "python/tilemask/__init__.py"
        assert kernels == tree / "kernels/__init__.py"
        assert version == source_version()
        # also from the root, where a folder of that name lies in the way
        assert imported_files(fresh_python, tree)[1] == kernels


# ---------------------------------------------------------------- rules of the repository


@pytest.mark.parametrize("name", ["kernels", "bench"])
def test_nothing_stands_in_the_way_of_folders_outside_python(name):
    """A folder of that name, even an empty one, would be imported in place of the one outside."""
    assert not (ROOT / "python/tilemask" / name).exists()


@pytest.mark.parametrize("module", ["kernels", "kernels.masks", "bench", "bench.area"])
def test_folders_outside_python_are_not_importable_from_the_root(module):
    done = run(sys.executable, "-c", f"import {module}", cwd=ROOT, check=False)
    top = module.split(".")[0]
    assert done.returncode == 1
    assert f"are imported as tilemask.{top}, not as {top}" in done.stderr


def test_triton_modules_name_the_language():
    """Triton's interpreter looks for triton.language among the globals of a kernel's module."""
    imports = {}
    for path in sorted((ROOT / "kernels").glob("*.py")):
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        imports[path.name] = [
            (alias.name, alias.asname)
            for node in nodes
            if isinstance(node, ast.Import)
            for alias in node.names
        ]
    triton = {name for name, found in imports.items() if ("triton", None) in found}
    assert triton
    assert {name for name in triton if ("triton.language", "tl") not in imports[name]} == set()


def test_building_does_not_need_torch():
    (requirement,) = read_toml()["build-system"]["requires"]
    assert Requirement(requirement).name == "setuptools"


def test_pre_commit_runs_the_pinned_versions():
    text = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    hooks = re.findall(r'additional_dependencies: \["([a-z-]+)==([0-9.]+)"\]', text)
    assert len(hooks) == text.count("- id:")
    assert {name for name, _ in hooks} == {"ruff", "clang-format"}
    for name, version in hooks:
        assert pins()[name] == {version}


def test_no_file_names_a_path_of_one_machine():
    names = git_files()
    if names is None:
        pytest.skip("not a git checkout")
    machine_path = re.compile(rb"(^|[^a-zA-Z0-9_.])/(work|root|opt|home)/[a-z]", re.MULTILINE)
    assert machine_path.search(b"see /" + b"root/x")
    assert "tests/test_package.py" in names
    assert [name for name in names if machine_path.search((ROOT / name).read_bytes())] == []


@pytest.mark.parametrize("check", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff_has_nothing_to_say(check):
    pytest.importorskip("ruff")
    done = run(sys.executable, "-m", "ruff", *check, "--no-cache", ".", cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
