"""A document as a table for the terminal and as one HTML page that loads nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator
from html import escape

from . import plots
from .workloads import FORWARD, TRAINING

HEADINGS = (
    ("ms", "median milliseconds of a call"),
    ("±", "half the distance between the quartiles"),
    ("TFLOP/s", "operations on the visible pairs alone, over the time"),
    ("visited", "share of the kernel's tiles that it visits"),
    ("tax", "mask tax: time over (visited share x time of the same call without a mask)"),
    ("roof", "share of the least time that the measured ceilings allow"),
    ("extra", "most memory that a call takes beside its inputs"),
    ("prepare", "milliseconds more where nothing is kept of the mask yet"),
    ("error", "the largest error over what is allowed: above 1 is WRONG"),
)

SHORT = {FORWARD: "fwd", TRAINING: "fwd + bwd"}


# -- figures in words -----------------------------------------------------------------------------


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits, plain; "-" for nothing."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    if abs(value) < 1e-3:
        return f"{value:.{digits - 1}e}"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(places, 5)}f}"


def in_bytes(value: int | None) -> str:
    if value is None:
        return "-"
    return f"{number(value / 2**20)} MiB" if value < 2**30 else f"{number(value / 2**30)} GiB"


def worst_error(cell: dict) -> str:
    """The largest error as a share of what is allowed."""
    errors = list(cell.get("errors", {}).values())
    if any(error is None for error, _ in errors):
        return "NaN"
    shares = [error / allowed for error, allowed in errors if allowed]
    return number(max(shares), 2) if shares else "-"


def in_short(cell: dict) -> str:
    """A cell in a few words, as progress shows it."""
    if cell["status"] != "ok":
        return f"{'WRONG' if cell['status'] == 'wrong' else cell['status']}: {cell['reason']}"
    took = f"{number(cell['ms'])} ms ± {number(cell['spread_ms'], 2)}"
    return f"{took}, {number(cell['tflops'])} TFLOP/s"


def figures_of(cell: dict) -> list[str]:
    """What stands under HEADINGS for a cell."""
    if cell["status"] != "ok":
        mark = {"wrong": "WRONG", "failed": "FAILED"}.get(cell["status"], "-")
        return [mark] + ["-"] * (len(HEADINGS) - 2) + [worst_error(cell)]
    visited = cell.get("visited")
    tax = cell.get("mask_tax")
    return [
        number(cell["ms"]),
        number(cell["spread_ms"], 2),
        number(cell["tflops"]),
        "-" if visited is None else f"{100 * visited:.1f} %",
        "-" if tax is None else f"{tax:.2f}",
        f"{100 * cell['roofline_share']:.0f} %",
        in_bytes(cell.get("peak_extra_bytes")),
        number(cell.get("prepare_ms")),
        worst_error(cell),
    ]


def is_ours(name: str) -> bool:
    return name.startswith("tilemask ")


def attention_rows(document: dict) -> list[dict]:
    return [row for row in document["rows"] if row["kind"] == "attention"]


def peers_in(document: dict) -> list[str]:
    """Peers that have a cell, in the order they were asked for."""
    seen = {n for row in attention_rows(document) for n in row["cells"] if not is_ours(n)}
    return [name for name in document["peers"] if name in seen]


def ratio(row: dict, ours: dict, name: str) -> float | None:
    """The peer's time over tilemask's."""
    peer = row["cells"].get(name, {})
    if peer.get("status") != "ok" or ours["status"] != "ok":
        return None
    return peer["ms"] / ours["ms"]


def about(document: dict) -> list[str]:
    """What was measured where, in sentences."""
    machine, versions = document["machine"], document["versions"]
    if document["device"] == "cpu":
        lines = [
            f"A CPU run: {machine['cpu']}, {machine['threads']} threads, wall clock. "
            "It says nothing about a GPU.",
        ]
    else:
        lines = [
            f"{machine['gpu']}, compute capability {machine['capability']}, driver "
            f"{machine['driver']}; timed with CUDA events."
        ]
    known = [f"{name} {value}" for name, value in versions.items() if value is not None]
    lines.append(f"{', '.join(known)}; commit {document['commit']}; {document['date']}.")
    ceilings = document["ceilings"]
    if ceilings:
        rates = [
            f"{number(rate / 1e12)} TFLOP/s in {dtype}"
            for dtype, rate in ceilings["flops_per_second"].items()
        ]
        lines.append(
            f"Ceilings, measured in this run: a matrix product {', '.join(rates)}; a copy "
            f"{number(ceilings['bytes_per_second'] / 1e9)} GB/s."
        )
    if document["stopped"]:
        lines.append(f"The run was cut short: {document['stopped']}. What follows was finished.")
    if document["device"] == "cpu" and "tilemask triton" in names_in(attention_rows(document)):
        lines.append("Triton ran in its interpreter: its times say nothing about anything.")
    if any("tilemask reference" in row["cells"] for row in attention_rows(document)):
        lines.append(
            "The reference is plain PyTorch and skips no tile: its mask tax is what a dense "
            "computation pays."
        )
    return lines


# -- the table ------------------------------------------------------------------------------------


def aligned(rows: list[list[str]]) -> list[str]:
    """Columns lined up: the first two to the left, the rest to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            word.ljust(width) if place < 2 else word.rjust(width)
            for place, (word, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def table(document: dict) -> str:
    """The whole document for a terminal."""
    lines = about(document)
    notes: dict[str, int] = {}
    ours = [["workload", "backend", *(name for name, _ in HEADINGS)]]
    theirs = [["times tilemask's time", "", *peers_in(document)]]
    for row in attention_rows(document):
        label = f"{row['name']}, {SHORT[row['direction']]}"
        for name, cell in row["cells"].items():
            if not is_ours(name):
                continue
            ours.append([label, name.removeprefix("tilemask "), *figures_of(cell)])
            if cell["status"] != "ok":
                note(notes, f"{label}, {name}: {cell['status']}, {cell['reason']}")
            theirs.append([label, name.removeprefix("tilemask ")])
            for peer in peers_in(document):
                theirs[-1].append(peer_word(row, cell, peer, notes))
    if len(ours) > 1:
        lines += ["", *aligned(ours)]
    if len(theirs) > 1 and len(theirs[0]) > 2:
        lines += ["", *aligned(theirs)]
    for kind, unit, heading in (
        ("overhead", "us", "host time of a call, microseconds"),
        ("prepare", "ms", "preparing a mask: milliseconds with nothing kept"),
    ):
        figures = [row for row in document["rows"] if row["kind"] == kind]
        if figures:
            lines += [
                "",
                *aligned(
                    [[heading, "", "median", "best", "kept, us"]]
                    + [figure_row(row, unit) for row in figures]
                ),
            ]
    lines += [f"({n}) {words}" for words, n in notes.items()]
    if attention_rows(document):
        lines += [f"left out: {name}: {why}" for name, why in document["absent"].items()]
    return "\n".join(lines)


def note(notes: dict[str, int], words: str) -> int:
    return notes.setdefault(words, len(notes) + 1)


def peer_word(row: dict, ours: dict, peer: str, notes: dict[str, int]) -> str:
    """A peer's ratio, or the number of the note that says why there is none."""
    cell = row["cells"].get(peer)
    if cell is None:
        return ""
    if cell["status"] != "ok":
        mark = "WRONG " if cell["status"] == "wrong" else ""
        words = f"{peer}: {cell['reason']}"
        return f"{mark}({note(notes, words)})"
    times = ratio(row, ours, peer)
    return f"{number(cell['ms'])} ms" if times is None else f"{times:.2f}x"


def figure_row(row: dict, unit: str) -> list[str]:
    if unit not in row:
        return [row["name"], f"{row['status']}: {row['reason']}", "-", "-", "-"]
    noise = f" ± {number(row['noise_ms'], 2)}" if "noise_ms" in row else ""
    figures = number(row[unit]) + noise, number(min(row[f"samples_{unit}"]))
    return [row["name"], "", *figures, number(row.get("cached_us"))]


# -- the page -------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; --back: #fff; --fore: #1c2024; --soft: #60656c; --edge: #d9dde2;
  --bad: #b3261e; --c0: #1f6feb; --c1: #e07b00; --c2: #2b9348; --c3: #8250df; --c4: #c2255c;
  --c5: #0b8f9c; --c6: #7a6a00; --c7: #6e7781; --c8: #9c4221; --c9: #4c51bf; --c10: #5c940d;
  --c11: #a61e9b; }
@media (prefers-color-scheme: dark) { :root { --back: #14171a; --fore: #e6e8ea; --soft: #9aa1a9;
  --edge: #343a41; --bad: #ff8a80; --c0: #6cb0ff; --c1: #ffa94d; --c2: #69db7c; --c3: #c4a7ff;
  --c4: #ff8fb8; --c5: #5fd3df; --c6: #d9c65a; --c7: #aab2bb; --c8: #f0a080; --c9: #a3a8ff;
  --c10: #b5e06a; --c11: #f090ea; } }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; background: var(--back);
  color: var(--fore); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p { max-width: 60rem; } .soft, caption, .small { color: var(--soft); }
.notice { border-left: 4px solid var(--c1); padding: .3rem .8rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; }
th, td { border-bottom: 1px solid var(--edge); padding: .25rem .5rem; text-align: right;
  white-space: nowrap; vertical-align: top; }
th:first-child, td:first-child, .left { text-align: left; }
td:first-child { white-space: normal; min-width: 8rem; max-width: 16rem; }
.why { white-space: normal; min-width: 9rem; max-width: 16rem; font-size: 12px;
  color: var(--soft); text-align: left; }
.bad { color: var(--bad); font-weight: 600; }
svg { display: block; width: 100%; min-width: 34rem; max-width: 52rem; }
svg text { fill: var(--fore); font: 12px system-ui, sans-serif; }
svg text.small { fill: var(--soft); font-size: 11px; } svg text.strong { font-weight: 600; }
svg .grid { stroke: var(--edge); } svg .rule { stroke: var(--soft); stroke-dasharray: 4 3; }
svg .line { fill: none; stroke-width: 2; } .legend { margin: .3rem 0; }
.key { display: inline-block; margin-right: 1rem; white-space: nowrap; }
.key i { display: inline-block; width: .8em; height: .8em; margin-right: .35em; }
code { overflow-wrap: anywhere; }
""" + "".join(
    f".c{n} {{ fill: var(--c{n}); }} i.c{n} {{ background: var(--c{n}); }} "
    f"svg .line.c{n} {{ fill: none; stroke: var(--c{n}); }}\n"
    for n in range(plots.COLOURS)
)


def page(document: dict) -> str:
    """The whole document as HTML."""
    body = [f"<h1>tilemask: benchmarks on {escape(machine_name(document))}</h1>"]
    first, *rest = about(document)
    body.append(f'<p class="notice">{escape(first)}</p>')
    body += [f"<p>{escape(line)}</p>" for line in rest]
    body += [*mask_plots(document), *length_plots(document), *tax_plots(document)]
    body += [*tables(document), *figure_tables(document), *provenance(document)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>tilemask: benchmarks on {escape(machine_name(document))}</title>"
        f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def machine_name(document: dict) -> str:
    return document["machine"].get("gpu") or "a CPU"


def size_of(row: dict) -> str:
    """What rows of one plot have in common: everything but the mask and the batch size."""
    work = row["workload"]
    heads = f"{work['Hq']}" if work["Hq"] == work["Hkv"] else f"{work['Hq']}:{work['Hkv']}"
    return f"D {work['D']}, {heads} heads, {work['dtype']}"


def plotted(cell: dict, key: str) -> float | None:
    return cell.get(key) if cell["status"] == "ok" else None


def values_of(row: dict, names: list[str], key: str) -> dict[str, float]:
    found = {n: plotted(row["cells"][n], key) for n in names if n in row["cells"]}
    return {name: value for name, value in found.items() if value is not None}


def names_in(rows: list[dict]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row["cells"]))


def gathered(rows: list[dict], key) -> Iterator[tuple[tuple, list[dict]]]:
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    yield from groups.items()


def figure_html(title: str, names: list[str], shown: set[str], drawn: str) -> str:
    key = plots.legend(names, shown)
    return f'<h3>{escape(title)}</h3>{key}<div class="scroll">{drawn}</div>'


def bars_html(title: str, names: list[str], groups, unit: str, line: float | None = None) -> str:
    shown = {name for _, own in groups for name in own}
    return figure_html(title, names, shown, plots.bars(groups, names, unit, line))


def mask_plots(document: dict) -> list[str]:
    """Bars per mask against peers, for each size with several masks."""
    rows = [row for row in attention_rows(document) if row["workload"]["bias"] is None]
    names = names_in(rows)

    def key(row):
        return row["workload"]["Lk"], size_of(row), row["direction"]

    found = []
    for (length, size, direction), own in gathered(rows, key):
        groups = [(row["workload"]["mask"], values_of(row, names, "tflops")) for row in own]
        groups = [group for group in groups if group[1]]
        if len(groups) > 2:
            title = f"{direction}, length {length}, {size}"
            factor, unit = rate_unit([v for _, own in groups for v in own.values()])
            groups = [(m, {n: v * factor for n, v in own.items()}) for m, own in groups]
            found.append(bars_html(title, names, groups, unit))
    head = '<h2>Speed by mask</h2><p class="soft">Operations on the visible pairs alone: what '
    head += "a contender computes beside them counts as time, not as work. Longer is better.</p>"
    return [head, *found] if found else []


def length_plots(document: dict) -> list[str]:
    """TFLOP/s over length, for each mask with several lengths."""
    rows = [row for row in attention_rows(document) if row["workload"]["bias"] is None]
    names = names_in(rows)

    def key(row):
        return row["workload"]["mask"], size_of(row), row["direction"]

    found = []
    for (mask, size, direction), own in gathered(rows, key):
        if len({row["workload"]["Lk"] for row in own}) < 2 or own[0]["workload"]["Lq"] == 1:
            continue
        series = {
            name: [
                (row["workload"]["Lk"], v[name])
                for row in own
                if name in (v := values_of(row, [name], "tflops"))
            ]
            for name in names
        }
        if any(len(points) > 1 for points in series.values()):
            title = f"{mask}, {direction}, {size}"
            factor, unit = rate_unit([y for points in series.values() for _, y in points])
            series = {n: [(x, y * factor) for x, y in own] for n, own in series.items()}
            shown = {name for name, own in series.items() if own}
            drawn = plots.lines(series, names, unit)
            found.append(figure_html(title, names, shown, drawn))
    return ["<h2>Speed over length</h2>", *found] if found else []


def rate_unit(tflops: list[float]) -> tuple[float, str]:
    """What to multiply TFLOP/s by for readable numbers, and the unit then."""
    return (1e3, "GFLOP/s") if max(tflops) < 1 else (1.0, "TFLOP/s")


def tax_plots(document: dict) -> list[str]:
    """The mask tax of every masked row."""
    found = []
    for (direction,), own in gathered(attention_rows(document), lambda row: (row["direction"],)):
        names = [name for name in names_in(own) if is_ours(name)]
        groups = [(row["name"], values_of(row, names, "mask_tax")) for row in own]
        groups = [group for group in groups if group[1]]
        if groups:
            found.append(bars_html(direction, names, groups, "x", line=1.0))
    head = '<h2>Mask tax</h2><p class="soft">Time over (visited share of the tiles x time of the '
    head += "same call without a mask). At 1, dashed, a mask costs exactly the tiles it leaves. "
    head += "Shorter is better.</p>"
    return [head, *found] if found else []


def tables(document: dict) -> list[str]:
    peers = peers_in(document)
    found = []
    for (suite, direction), own in gathered(
        attention_rows(document), lambda row: (row["suite"], row["direction"])
    ):
        head = "".join(f'<th title="{escape(why)}">{name}</th>' for name, why in HEADINGS)
        head += "".join(f'<th class="left">{escape(peer)}</th>' for peer in peers)
        lines = [
            table_row(row, name, peers) for row in own for name in row["cells"] if is_ours(name)
        ]
        found.append(
            f'<h2>{escape(suite)}: {escape(direction)}</h2><div class="scroll"><table><thead>'
            f'<tr><th>workload</th><th class="left">backend</th>{head}</tr></thead><tbody>'
            + "".join(lines)
            + "</tbody></table></div>"
        )
    if not found:
        return []
    words = "; ".join(f"<b>{name}</b> {escape(why)}" for name, why in HEADINGS)
    found.append(
        f'<p class="soft">{words}. A peer has its time, and how many times tilemask\'s that is; '
        "what it prepares once per mask is apart.</p>"
    )
    return found


def table_row(row: dict, name: str, peers: list[str]) -> str:
    cell = row["cells"][name]
    label = f'{escape(row["name"])}<br><span class="small">{escape(row["shape"])}</span>'
    if cell["status"] != "ok":
        label += f'<br><span class="bad">{escape(cell["reason"])}</span>'
    figures = "".join(map(figure_cell, figures_of(cell)))
    others = "".join(peer_cell(row, cell, peer) for peer in peers)
    backend = escape(name.removeprefix("tilemask "))
    return f'<tr><td>{label}</td><td class="left">{backend}</td>{figures}{others}</tr>'


def figure_cell(word: str) -> str:
    return f'<td class="bad">{word}</td>' if word in ("WRONG", "FAILED") else f"<td>{word}</td>"


def peer_cell(row: dict, ours: dict, peer: str) -> str:
    cell = row["cells"].get(peer)
    if cell is None:
        return "<td></td>"
    if cell["status"] != "ok":
        wrong = '<span class="bad">WRONG</span> ' if cell["status"] == "wrong" else ""
        return f'<td class="why">{wrong}{escape(cell["reason"])}</td>'
    times = ratio(row, ours, peer)
    words = f"{number(cell['ms'])} ms" + ("" if times is None else f" <b>{times:.2f}x</b>")
    more = [f"prepare {number(cell['prepare_ms'])} ms"] if "prepare_ms" in cell else []
    more += [escape(cell["note"])] if "note" in cell else []
    words += f'<br><span class="small">{", ".join(more)}</span>' if more else ""
    return f'<td class="left">{words}</td>'


def figure_tables(document: dict) -> list[str]:
    found = []
    for kind, unit, title in (
        ("overhead", "us", "Overhead: microseconds of host time per call"),
        ("prepare", "ms", "Preparing a mask: milliseconds with nothing kept"),
    ):
        rows = [row for row in document["rows"] if row["kind"] == kind]
        if rows:
            lines = []
            for row in rows:
                name, why, *figures = figure_row(row, unit)
                cells = "".join(f"<td>{escape(word)}</td>" for word in figures)
                lines.append(f"<tr><td>{escape(f'{name} {why}')}</td>{cells}</tr>")
            found.append(
                f'<h2>{title}</h2><div class="scroll"><table><thead><tr><th>what</th><th>median'
                "</th><th>best</th><th>found again, us</th></tr></thead><tbody>"
                + "".join(lines)
                + "</tbody></table></div>"
            )
    return found


def provenance(document: dict) -> list[str]:
    shown = {
        "command": document["command"],
        "commit": document["commit"],
        "kernel sources, sha256": document["sources_sha256"],
        "date": document["date"],
        "seconds": document["seconds"],
        **{f"machine: {k}": v for k, v in document["machine"].items()},
        **{f"version: {k}": v for k, v in document["versions"].items()},
        **{f"left out: {k}": v for k, v in document["absent"].items()},
    }
    lines = "".join(
        f'<tr><td>{escape(name)}</td><td class="left" style="white-space: normal"><code>'
        f"{escape(str(value))}</code></td></tr>"
        for name, value in shown.items()
    )
    return [
        f'<h2>Where this was made</h2><div class="scroll"><table>{lines}</table></div>',
        '<p class="soft">Every sample is in results.json beside this page.</p>',
    ]
