"""What changed between two documents, beyond the noise of their samples."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import NamedTuple

from . import record
from .report import aligned, number

FLOOR = 0.02  # below this share a change is not told: two runs of one program differ by as much
SIGMAS = 4.0


class Figure(NamedTuple):
    status: str
    unit: str
    samples: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def uncertainty(self) -> float:
        """Standard error of the median, from the distances to it."""
        distances = [abs(sample - self.median) for sample in self.samples]
        deviation = 1.4826 * statistics.median(distances)
        return 1.2533 * deviation / math.sqrt(len(self.samples))


def figures(document: dict) -> dict[tuple[str, ...], Figure]:
    """Every timed or failed figure, by row and contender."""
    found = {}
    for row in document["rows"]:
        key, unit = record.key_of(row), record.UNIT[row["kind"]]
        cells = row["cells"] if row["kind"] == "attention" else {"": row}
        for name, cell in cells.items():
            status = cell.get("status", "ok")
            found[(*key, name)] = Figure(status, unit, cell.get(f"samples_{unit}", []))
    return found


def beyond_noise(before: Figure, after: Figure) -> bool:
    """Whether two medians differ by more than their samples explain, and not even the fastest
    sample of the slower one is as fast as the other usually is: what disturbs a run slows it."""
    change = abs(after.median - before.median)
    noise = SIGMAS * math.hypot(before.uncertainty, after.uncertainty)
    slower, faster = sorted((before, after), key=lambda figure: figure.median, reverse=True)
    apart = min(slower.samples) > faster.median
    return apart and change > max(noise, FLOOR * abs(before.median))


def main(first: str, second: str) -> int:
    """Print what changed from the first file to the second; 1 if something became wrong."""
    try:
        a, b = record.load(Path(first)), record.load(Path(second))
    except ValueError as error:
        print(f"bench: {error}")
        return 2
    lines, broken = compare(a, b)
    print("\n".join(lines))
    return 1 if broken else 0


def compare(a: dict, b: dict) -> tuple[list[str], bool]:
    """The report, and whether something of tilemask's that was right is not any more."""
    lines = [f"A  {source(a)}", f"B  {source(b)}"]
    if hardware(a) != hardware(b):
        lines.append(f"not the same machine: {hardware(a)} and {hardware(b)}")
    old, new = figures(a), figures(b)
    changes, broken, quiet = [], False, 0
    for key in [key for key in old if key in new]:
        before, after = old[key], new[key]
        name = label(key)
        if before.status != after.status:
            changes.append([name, f"{before.status} -> {after.status}", "", "", ""])
            worse = before.status == "ok" and after.status in ("wrong", "failed")
            broken = broken or (worse and (key[3].startswith("tilemask") or not key[3]))
        elif before.status == "ok" and beyond_noise(before, after):
            share = after.median / before.median - 1 if before.median else math.inf
            times = f"{number(before.median)} -> {number(after.median)} {before.unit}"
            noise = SIGMAS * math.hypot(before.uncertainty, after.uncertainty)
            words = "slower" if share > 0 else "faster"
            changes.append(
                [name, times, f"{100 * share:+.1f} %", words, f"noise {number(noise, 2)}"]
            )
        else:
            quiet += 1
    if changes:
        lines += ["", *aligned([["changed", "A -> B", "", "", ""], *changes])]
    lines += ["", f"{quiet} figures did not change beyond the noise ({FLOOR:.0%} at least)"]
    for name, only in (("A", old.keys() - new.keys()), ("B", new.keys() - old.keys())):
        if only:
            lines.append(f"only in {name}: {', '.join(sorted(map(label, only)))}")
    return lines, broken


def label(key: tuple[str, ...]) -> str:
    return ", ".join(word for word in key[1:] if word)


def hardware(document: dict) -> str:
    return document["machine"].get("gpu") or document["machine"]["cpu"]


def source(document: dict) -> str:
    versions = document["versions"]
    return (
        f"{hardware(document)}, {document['date']}, commit {document['commit']}, torch "
        f"{versions['torch']}, triton {versions['triton']}"
    )
