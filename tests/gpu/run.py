"""The GPU suite: the tests on the GPU of this machine, with the torch and Triton that are there.

    make gpu-test OUT=dir        (or: python tests/gpu/run.py --out dir [pytest arguments])

Installs nothing and needs no network. Where nvcc and ninja are, the CUDA library is built for this
GPU first, as by `make library`: objects of an earlier build are kept. The package is laid out as it
is installed in a folder of its own and imported from there. Compiling kernels takes most of the
time, so the tests run in several processes. Writes into OUT: summary.json (GPU, driver, versions,
library, commit, counts, failures), log.txt. Exit code 0 if every test passed, 1 otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 440  # seconds; the whole command stays under 8 minutes
# what a GPU can change; the rest (packaging, docs, ahead-of-time code) is the same everywhere
TESTS = [
    "test_triton.py",
    "test_cuda.py",
    "test_gpu.py",
    "test_golden.py",
    "test_packing.py",
    "test_cache.py",
    "test_integrations_flash_attn.py",
    "test_merge.py",
    "test_nn.py",
    "test_integrations_torch.py",
    "test_reference.py",
    "test_sdpa.py",
    "test_masks.py",
]


def build_library() -> str:
    """Leave the CUDA library beside the Python sources; what it is, or why there is none.

    SystemExit: nvcc is there, and the library does not compile.
    """
    command = [sys.executable, "setup.py", "-q", "build_library", "--inplace"]
    environment = {**os.environ, "TILEMASK_CUDA": os.environ.get("TILEMASK_CUDA") or "auto"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{done.stdout}{done.stderr}\nthe CUDA library was not built")
    info: dict = {}
    exec((ROOT / "python" / "tilemask" / "_build_info.py").read_text(), info)
    return info["REASON"] or f"{', '.join(info['ARCHITECTURES'])}, nvcc {info['NVCC']}"


def lay_out(folder: Path) -> None:
    """The package as setup.py installs it: python/tilemask, and kernels/ as tilemask/kernels."""
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "python" / "tilemask", folder / "tilemask", ignore=ignore)
    shutil.copytree(ROOT / "kernels", folder / "tilemask" / "kernels", ignore=ignore)


def start(shard: int, shards: int, site: Path, out: Path, arguments: list[str]):
    """One pytest process: every shards-th test from number ``shard`` on."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(site),
        "TILEMASK_SHARD": f"{shard}/{shards}",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    paths = [str(ROOT / "tests" / name) for name in TESTS if (ROOT / "tests" / name).exists()]
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "--tb=short", "-p"]
    command += ["no:cacheprovider", f"--junitxml={out / f'shard{shard}.xml'}", *paths, *arguments]
    log = open(out / f"shard{shard}.txt", "w")  # noqa: SIM115  (the process owns it)
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
    )


def provenance() -> dict:
    """What the results were made with."""
    import torch
    import triton

    def say(*command):
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() or None

    gpu = torch.cuda.is_available()
    return {
        "schema": 1,
        "command": "make gpu-test",
        "commit": os.environ.get("TILEMASK_COMMIT")
        or say("git", "describe", "--always", "--dirty", "--abbrev=12"),
        "gpu": torch.cuda.get_device_name(0) if gpu else None,
        "capability": list(torch.cuda.get_device_capability(0)) if gpu else None,
        "driver": say("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }


def counts_of(report: Path) -> tuple[dict[str, int], list[str]]:
    """Counts of one shard, and the names of what failed. A shard without a report failed."""
    if not report.exists():
        return {"unfinished shards": 1}, [report.stem]
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failures = []
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        if case.find("failure") is not None or case.find("error") is not None:
            counts["failed"] += 1
            failures.append(name)
        elif case.find("skipped") is not None:
            counts["skipped"] += 1
        else:
            counts["passed"] += 1
    return counts, failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--shards", type=int, default=min(8, os.cpu_count() or 1))
    options, arguments = parser.parse_known_args()
    facts = provenance()
    if facts["gpu"] is None:
        print("gpu-test needs an NVIDIA GPU that torch can use; `make test` needs none")
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    facts["library"] = build_library()
    print(f"CUDA library: {facts['library']}")
    with tempfile.TemporaryDirectory() as site:
        lay_out(Path(site))
        shards = [
            start(shard, options.shards, Path(site), options.out, arguments)
            for shard in range(options.shards)
        ]
        while any(shard.poll() is None for shard in shards):
            spent = time.monotonic() - began
            running = sum(shard.poll() is None for shard in shards)
            print(f"\r{spent:4.0f} s, {running} of {len(shards)} processes", end="", flush=True)
            if spent > LIMIT:
                for shard in shards:
                    shard.kill()
            time.sleep(1)
    print()

    counts: dict[str, int] = {}
    failures: list[str] = []
    with open(options.out / "log.txt", "w") as log:
        for shard in range(options.shards):
            found, names = counts_of(options.out / f"shard{shard}.xml")
            for key, count in found.items():
                counts[key] = counts.get(key, 0) + count
            failures += names
            part = options.out / f"shard{shard}.txt"
            log.write(f"==== process {shard}\n{part.read_text()}\n")
            part.unlink()
            (options.out / f"shard{shard}.xml").unlink(missing_ok=True)
    seconds = round(time.monotonic() - began, 1)
    summary = {**facts, "seconds": seconds, "counts": counts, "failures": sorted(failures)}
    (options.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(f"{summary['gpu']}, torch {facts['torch']}, triton {facts['triton']}: {counts}")
    for name in failures:
        print(f"  FAILED {name}")
    return 0 if counts.get("passed") and not failures else 1


if __name__ == "__main__":
    sys.exit(main())
