"""What it takes to build the CUDA library: seconds and memory of each source for each architecture,
and of the whole default build.

    python tests/build_report.py            prints it, in about ten minutes on two CPUs
    python tests/build_report.py --write    writes it to bench/results/static/build.json

Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import library_code
from nvcc import find_nvcc, toolchain

WHOLE = """
import sys
sys.path.insert(0, "csrc")
import toolchain
toolchain.build(toolchain.find_toolkit(), toolchain.ARCHITECTURES)
"""


def timed(command: list, folder: Path) -> dict:
    """Wall seconds of a command, and the memory of its largest process in MiB."""
    began = time.monotonic()
    process = subprocess.Popen(list(map(str, command)), cwd=folder, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(map(str, command))}")
    return {"seconds": round(time.monotonic() - began, 1), "mib": usage.ru_maxrss >> 10}


def whole_build(folder: Path) -> dict:
    """All of it, and the seconds of each object, which holds the code of every architecture."""
    shutil.copytree(toolchain.CSRC, folder / "csrc")
    found = timed([sys.executable, "-c", WHOLE], folder)
    (log,) = folder.rglob(".ninja_log")
    for line in log.read_text().splitlines()[1:]:
        began, ended, _, target, _ = line.split("\t")
        if target.endswith(".o") and "probe" not in target:
            seconds = round((int(ended) - int(began)) / 1000, 1)
            found.setdefault("objects", {})[Path(target).stem] = seconds
    found["library_bytes"] = next(folder.rglob(toolchain.LIBRARY)).stat().st_size
    return found


def report() -> dict:
    found = {
        "command": "python tests/build_report.py --write",
        "made": datetime.date.today().isoformat(),
        "nvcc": library_code.nvcc_release(),
        "sources_sha256": library_code.sources_sha256(),
        "cpus": len(os.sched_getaffinity(0)),
        "machine": platform.machine(),
        "architectures": toolchain.ARCHITECTURES,
        "files": {},
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found["whole"] = whole_build(folder)
        print(f"whole build: {found['whole']}", flush=True)
        for source in toolchain.sources():
            for arch in toolchain.ARCHITECTURES:
                flags = [*toolchain.FLAGS, *toolchain.gencode([arch])]
                command = [find_nvcc(), *flags, "-c", source, "-o", folder / "made.o"]
                found["files"].setdefault(source.stem, {})[arch] = timed(command, folder)
            print(f"{source.name}: {found['files'][source.stem]}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="keep it in bench/results/static")
    options = parser.parse_args()
    made = report()
    if options.write:
        path = library_code.STATIC / "build.json"
        path.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
