"""The JSON document of a run: where it was made, its rows, and what a valid one must have.

Schema 2. A document has the fields of PROVENANCE and a list of rows. A row of kind "attention" is a
workload in one direction, with a cell per contender; "overhead" and "prepare" rows are one figure
each, with its samples. A cell is

* "ok": compared (errors: the largest of each result, None for NaN and Inf, and what is allowed) and
  timed; "wrong": compared, wrong, and not timed;
* "cannot": a contender that does not do the case, and its sentence;
* "failed": tilemask raised; "cut": the run ended before it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import tilemask

SCHEMA = 2
STATUSES = ("ok", "wrong", "cannot", "failed", "cut")
PROVENANCE = {
    "schema": int,
    "command": str,
    "commit": str,
    "sources_sha256": str,
    "date": str,
    "device": str,
    "clock": str,
    "machine": dict,
    "versions": dict,
    "suites": list,
    "rows": list,
    "seconds": float,
}
MACHINE = {"cpu": ("cpu", "threads"), "cuda": ("gpu", "capability", "driver", "clocks")}
VERSIONS = ("python", "tilemask", "torch", "triton", "nvcc", "cuda")
CUDA_SOURCES = (".cu", ".cuh", ".h")
UNIT = {"attention": "ms", "overhead": "us", "prepare": "ms"}


# -- where it was made ----------------------------------------------------------------------------


def say(*command: str) -> str | None:
    """What a program prints, None if it is not there or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def commit() -> str:
    """The commit of the sources, "-dirty" if they differ from it, "unknown" outside a checkout.

    TILEMASK_COMMIT in the environment says it where the sources came without their history.
    """
    home = str(Path(__file__).resolve().parent)
    described = say("git", "-C", home, "describe", "--always", "--dirty", "--abbrev=12")
    return os.environ.get("TILEMASK_COMMIT") or described or "unknown"


def sources_sha256() -> str:
    """One hash over the files that compute: the Triton kernels, the backends, and the CUDA library
    or what it is built from, where it is there."""
    package = Path(tilemask.__file__).resolve().parent
    spec = importlib.util.find_spec("tilemask.kernels")
    kernels = Path(spec.submodule_search_locations[0]).resolve()
    files = [*kernels.glob("*.py"), *(package / "backends").glob("*.py"), *package.glob("*.so")]
    files += [p for p in (kernels.parent / "csrc").rglob("*") if p.suffix in CUDA_SOURCES]
    total = hashlib.sha256()
    for path in sorted(files, key=lambda path: (path.parent.name, path.name)):
        total.update(f"{path.parent.name}/{path.name}\n".encode())
        total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    found = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return found[0] if found else platform.processor() or "unknown"


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def nvcc_release() -> str | None:
    text = say("nvcc", "--version") or ""
    return next(
        (w.strip(",") for w in text.split() if w.startswith("V") and w[1:2].isdigit()), None
    )


CLOCKS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "temperature.gpu", "power.draw")


def clocks_now() -> dict[str, str] | None:
    """What nvidia-smi says of the GPU at this moment."""
    query = f"--query-gpu={','.join(CLOCKS)}"
    text = say("nvidia-smi", query, "--format=csv,noheader", "--id=0")
    if text is None:
        return None
    return dict(
        zip(CLOCKS, (word.strip() for word in text.splitlines()[0].split(",")), strict=False)
    )


def machine(device: str) -> dict:
    if device != "cuda":
        return {"cpu": cpu_name(), "threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(0)
    return {
        "cpu": cpu_name(),
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "multiprocessors": properties.multi_processor_count,
        "driver": say("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
        or "unknown",
        "clocks": clocks_now() or {},
    }


def new_document(device: str, clock: str, suites: list[str], peers: list[str]) -> dict:
    """A document without rows."""
    return {
        "schema": SCHEMA,
        "command": " ".join(["python -m tilemask", *sys.argv[1:]]),
        "commit": commit(),
        "sources_sha256": sources_sha256(),
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "device": device,
        "clock": clock,
        "machine": machine(device),
        "versions": {
            "python": platform.python_version(),
            "tilemask": tilemask.__version__,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version() if device == "cuda" else None,
            "triton": version("triton"),
            "nvcc": nvcc_release(),
            **{name: version(name) for name in ("flash-attn", "xformers", "flashinfer-python")},
        },
        "suites": suites,
        "peers": peers,
        "absent": {},
        "ceilings": {},
        "rows": [],
        "stopped": None,
        "seconds": 0.0,
    }


# -- what a valid one has -------------------------------------------------------------------------


def problems(document) -> list[str]:
    """What is missing or wrong in a document, in words; empty if nothing is."""
    if not isinstance(document, dict):
        return ["not an object"]
    found = []
    for name, kind in PROVENANCE.items():
        value = document.get(name)
        if not isinstance(value, kind) or (isinstance(value, (str, list)) and not value):
            found.append(f"{name} must be a {kind.__name__} that says something, got {value!r:.80}")
    if document.get("schema") != SCHEMA:
        found.append(f"schema must be {SCHEMA}, got {document.get('schema')!r}")
    if document.get("commit") == "unknown":
        found.append("commit is unknown: set TILEMASK_COMMIT where there is no checkout")
    if document.get("device") not in MACHINE:
        found.append(f"device must be cpu or cuda, got {document.get('device')!r}")
    if found:
        return found
    for name in MACHINE[document["device"]]:
        if not document["machine"].get(name):
            found.append(f"machine.{name} is missing")
    found += [
        f"versions.{name} is missing" for name in VERSIONS if name not in document["versions"]
    ]
    names = set()
    for number, row in enumerate(document["rows"]):
        where = f"row {number} ({row.get('name')!r} {row.get('direction', '')})"
        found += [f"{where}: {text}" for text in problems_of_row(row)]
        names.add(key_of(row))
    if len(names) != len(document["rows"]):
        found.append("two rows have the same kind, name and direction")
    return found


def problems_of_row(row: dict) -> list[str]:
    if row.get("kind") not in UNIT or not isinstance(row.get("name"), str):
        return ["needs a kind and a name"]
    if row["kind"] != "attention":
        if row.get("status", "ok") == "ok":
            return problems_of_figure(row, UNIT[row["kind"]])
        return [] if row.get("reason") else [f"{row['status']}, but no reason"]
    found = [f"{key} is missing" for key in ("direction", "workload", "area") if key not in row]
    for name, cell in row.get("cells", {}).items():
        if cell.get("status") not in STATUSES:
            found.append(f"{name}: status must be one of {STATUSES}, got {cell.get('status')!r}")
        elif cell["status"] == "ok":
            found += [f"{name}: {text}" for text in problems_of_figure(cell, "ms")]
            if not cell.get("errors"):
                found.append(f"{name}: timed, but not compared")
        elif "ms" in cell:
            found.append(f"{name}: {cell['status']}, but timed")
        elif not cell.get("reason"):
            found.append(f"{name}: {cell['status']}, but no reason")
    return found


def problems_of_figure(figure: dict, unit: str) -> list[str]:
    samples, median = figure.get(f"samples_{unit}"), figure.get(unit)
    if not samples or not all(isinstance(s, (int, float)) for s in samples):
        return [f"samples_{unit} must be a list of numbers"]
    if median != round(statistics.median(samples), 6):
        return [f"{unit} is {median}, not the median of its samples"]
    return []


def figure(samples: list[float], unit: str) -> dict:
    """Median and samples, as they stand in a document."""
    samples = [round(s, 6) for s in samples]
    return {unit: round(statistics.median(samples), 6), f"samples_{unit}": samples}


def key_of(row: dict) -> tuple[str, str, str]:
    return row.get("kind", ""), row.get("name", ""), row.get("direction", "")


# -- reading and writing --------------------------------------------------------------------------


def write(path: Path, text: str) -> None:
    """The whole file or none of it: a reader never sees half of one."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def save(path: Path, document: dict) -> None:
    write(path, json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def load(path: Path) -> dict:
    """A document; ValueError, with what is wrong, if it is none or not a valid one."""
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    wrong = problems(document)
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise ValueError(f"{path}: {'; '.join(wrong[:3])}{more}")
    return document
