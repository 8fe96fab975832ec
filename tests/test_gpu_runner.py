"""tests/gpu/run.py itself, without a GPU: layout, sharding, the summary, exit codes."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture
def runner():
    spec = importlib.util.spec_from_file_location("gpu_run", ROOT / "tests" / "gpu" / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    command = [sys.executable, str(ROOT / "tests" / "gpu" / "run.py"), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "needs an NVIDIA GPU" in done.stdout


def test_the_package_is_laid_out_as_installed(runner, tmp_path):
    runner.lay_out(tmp_path)
    code = "import tilemask.kernels.tuning as t, tilemask; print(tilemask.__file__, t.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.count(str(tmp_path)) == 2, done.stderr


@pytest.mark.parametrize("failing", [False, True])
def test_summary_counts_every_test_once(runner, tmp_path, monkeypatch, failing):
    """Two processes share the tests of a folder; a failure is named and makes the exit code 1."""
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tests / "poison.py").write_text((ROOT / "tests" / "poison.py").read_text())
    (tests / "test_few.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('n', range(7))\n"
        f"def test_number(n): assert n != {5 if failing else -1}\n"
        "def test_skipped(): pytest.skip('no')\n"
    )
    for folder in ("python/tilemask", "kernels"):
        (tmp_path / folder).parent.mkdir(exist_ok=True)
        (tmp_path / folder).symlink_to(ROOT / folder)
    out = tmp_path / "out"
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    monkeypatch.setattr(runner, "TESTS", ["test_few.py"])
    monkeypatch.setattr(
        runner, "provenance", lambda: dict.fromkeys(("gpu", "torch", "triton"), "x")
    )
    monkeypatch.setattr(runner, "build_library", lambda: "none")
    monkeypatch.setattr(sys, "argv", ["run.py", "--out", str(out), "--shards", "2"])
    assert runner.main() == int(failing)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["counts"] == {"passed": 7 - failing, "failed": int(failing), "skipped": 1}
    assert [name.split("::")[1] for name in summary["failures"]] == ["test_number[5]"] * failing
    assert "test_few" in (out / "log.txt").read_text() or not failing


def test_a_process_that_dies_is_a_failure(runner, tmp_path):
    counts, failures = runner.counts_of(tmp_path / "shard3.xml")
    assert counts == {"unfinished shards": 1} and failures == ["shard3"]


def test_what_it_runs_is_there_golden_vectors_included(runner):
    assert all((ROOT / "tests" / name).exists() for name in runner.TESTS)
    assert "test_golden.py" in runner.TESTS


def test_the_library_is_built_first_or_its_reason_kept(runner, tmp_path, monkeypatch):
    """By setup.py, in the tree that is laid out."""
    folder = tmp_path / "python" / "tilemask"
    folder.mkdir(parents=True)
    info = "ARCHITECTURES, NVCC, REASON = {}"
    script = """
import os, pathlib, sys
assert sys.argv[1:] == ["-q", "build_library", "--inplace"]
assert os.environ["TILEMASK_CUDA"] == "auto"
if pathlib.Path("broken").exists():
    sys.exit("kernel.cu(3): error")
pathlib.Path("python/tilemask/_build_info.py").write_text(pathlib.Path("info").read_text())
"""
    (tmp_path / "setup.py").write_text(script)
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    monkeypatch.delenv("TILEMASK_CUDA", raising=False)
    for values, said in (
        ("['90a'], '13.0.88', None", "90a, nvcc 13.0.88"),
        ("[], None, 'there was no nvcc'", "there was no nvcc"),
    ):
        (tmp_path / "info").write_text(info.format(values))
        assert runner.build_library() == said
    (tmp_path / "broken").touch()
    with pytest.raises(SystemExit, match=r"kernel.cu\(3\): error\n+the CUDA library was not built"):
        runner.build_library()
