"""The performance section of README.md, made from the files of bench/results.

python -m tilemask.bench.readme            (make readme) writes it
python -m tilemask.bench.readme --check    says whether it is up to date
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import record
from .report import SHORT, number, ratio

ROOT = Path(__file__).resolve().parents[1]
BEGIN = "<!-- performance: written by `make readme` from bench/results, not by hand -->"
END = "<!-- end of performance -->"
MOST = 24  # rows per GPU


def documents(folder: Path) -> dict[str, dict]:
    """Every results file by name; ValueError for one that is not valid."""
    return {path.name: record.load(path) for path in sorted(folder.glob("*.json"))}


def section(found: dict[str, dict]) -> str:
    """The text between the markers."""
    on_gpu = {name: doc for name, doc in found.items() if doc["device"] == "cuda"}
    on_cpu = {name: doc for name, doc in found.items() if doc["device"] == "cpu"}
    parts = [text for name, doc in on_gpu.items() for text in gpu_part(name, doc)]
    if not on_gpu:
        parts.append(
            "No GPU measurement yet: nothing here claims a speed. The tile shapes in "
            "`kernels/tuning.py`\nwere chosen by what the compiler makes of them, not by time."
        )
    parts += [text for name, doc in on_cpu.items() for text in cpu_part(name, doc)]
    return "\n\n".join(parts)


def gpu_part(name: str, document: dict) -> list[str]:
    """A table of the rows that tilemask was right in, best backend first named, against the fastest
    peer that was right."""
    lines = [
        "| workload | ms | TFLOP/s | mask tax | fastest peer | its time over ours |",
        "|---|---|---|---|---|---|",
    ]
    rows = [row for row in document["rows"] if row["kind"] == "attention"]
    for row in rows:
        ours = [(c["ms"], n) for n, c in cells(row) if n.startswith("tilemask ")]
        peers = [(c["ms"], n) for n, c in cells(row) if not n.startswith("tilemask ")]
        if not ours or len(lines) >= MOST + 2:
            continue
        _, best = min(ours)
        cell = row["cells"][best]
        tax = cell.get("mask_tax")
        peer = min(peers)[1] if peers else None
        times = "-" if peer is None else f"{ratio(row, cell, peer):.2f}x"
        words = [
            f"{row['name']}, {SHORT[row['direction']]} ({best.removeprefix('tilemask ')})",
            number(cell["ms"]),
            number(cell["tflops"]),
            "-" if tax is None else f"{tax:.2f}",
            peer or "-",
            times,
        ]
        lines.append(f"| {' | '.join(words)} |")
    machine, versions = document["machine"], document["versions"]
    head = (
        f"{machine['gpu']}, driver {machine['driver']}, torch {versions['torch']}, Triton "
        f"{versions['triton']}, {document['date']},\nby `{document['command']}`:\n"
        f"[{name}](bench/results/{name}) has every row, sample and peer."
    )
    return [head, "\n".join(lines)]


def cells(row: dict):
    return [(name, cell) for name, cell in row["cells"].items() if cell["status"] == "ok"]


def cpu_part(name: str, document: dict) -> list[str]:
    """What a call costs in Python. Other CPU rows say nothing of use here."""
    rows = [row for row in document["rows"] if row["kind"] == "overhead"]
    if not rows:
        return []
    lines = ["| what a call costs in Python | microseconds |", "|---|---|"]
    lines += [f"| {row['name']} | {row['us']:.1f} |" for row in rows]
    head = (
        f"On a CPU ({document['machine']['cpu']}, one thread, torch "
        f"{document['versions']['torch']}), by\n`{document['command']}`\n([{name}]"
        f"(bench/results/{name})). tilemask's rows end at a backend that computes nothing."
    )
    return [head, "\n".join(lines)]


def rewritten(text: str, found: dict[str, dict]) -> str:
    """The README with the section anew; ValueError without its two markers."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md needs the two lines {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n{section(found)}\n{END}{after}"


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tilemask.bench.readme", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if it is not so")
    options = parser.parse_args(arguments)
    page = root / "README.md"
    try:
        old = page.read_text(encoding="utf-8")
        new = rewritten(old, documents(root / "bench" / "results"))
    except (OSError, ValueError) as error:
        print(f"readme: {error}", file=sys.stderr)
        return 2
    if options.check:
        print("README.md is up to date" if new == old else "README.md is not: make readme")
        return int(new != old)
    if new != old:
        record.write(page, new)
        print("README.md: performance section written anew")
    return 0


if __name__ == "__main__":
    sys.exit(main())
