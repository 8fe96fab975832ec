"""What it takes to build the CUDA library: seconds and memory of the whole default build, and of
each of its commands when it runs alone.

    python tests/build_report.py            prints it, in about 15 minutes on two CPUs
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
from pathlib import Path

import library_code
from nvcc import toolchain

WHOLE = """
import sys
sys.path.insert(0, "csrc")
import toolchain
toolchain.build(toolchain.find_toolkit(), toolchain.ARCHITECTURES)
"""
# runs a command in a process of few megabytes: its children begin with as many
WATCH = """
import os, subprocess, sys, time
began = time.monotonic()
process = subprocess.Popen(sys.argv[1:])
_, status, usage = os.wait4(process.pid, 0)
if status:
    sys.exit(f"failed: {sys.argv[1:]}")
print([time.monotonic() - began, usage.ru_maxrss])
"""


def timed(words: list[str], folder: Path) -> dict:
    """Wall seconds of a command, and the memory of its largest process in MiB."""
    command = [sys.executable, "-c", WATCH, *words]
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, check=True)
    seconds, kib = json.loads(done.stdout.splitlines()[-1])
    return {"seconds": round(seconds, 1), "mib": kib >> 10}


def commands(folder: Path) -> dict[str, dict[str, str]]:
    """Those of a build: source -> what they make of it, such as sm_80.cubin -> the command."""
    (ninja_file,) = folder.rglob("build.ninja")
    ninja = [toolchain.find_ninja(), "-C", str(folder), "-f", str(ninja_file)]
    library = ninja_file.parent.relative_to(folder) / toolchain.LIBRARY
    found: dict[str, dict[str, str]] = {}
    for line in toolchain.run([*ninja, "-t", "commands", library]).splitlines():
        source, _, made = Path(line.split()[-1]).name.partition(".")
        if (toolchain.CSRC / f"{source}.cu").is_file():
            found.setdefault(source, {})[made] = line
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
        "commands": {},
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(toolchain.CSRC, folder / "csrc")
        found["whole"] = timed([sys.executable, "-c", WHOLE], folder)
        found["whole"]["library_bytes"] = next(folder.rglob(toolchain.LIBRARY)).stat().st_size
        print(f"whole build: {found['whole']}", flush=True)
        for source, lines in commands(folder).items():
            found["commands"][source] = {
                made: timed(["sh", "-c", line], folder) for made, line in lines.items()
            }
            print(f"{source}: {found['commands'][source]}", flush=True)
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
