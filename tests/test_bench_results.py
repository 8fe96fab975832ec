"""What the benchmark suite writes: documents, the table, the page, comparisons, the README."""

import copy
import html.parser
import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from tilemask import __main__ as command_line
from tilemask.bench import compare, plots, readme, record, report

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"


def cell(milliseconds, **more):
    """A timed cell whose samples lie closely around a median."""
    samples = [milliseconds * (1 + 0.001 * n) for n in range(-5, 6)]
    return {
        "status": "ok",
        **record.figure(samples, "ms"),
        "spread_ms": 0.003 * milliseconds,
        "tflops": 100 / milliseconds,
        "roofline_share": 0.5,
        "first_call_ms": 900.0,
        "peak_extra_bytes": 3 << 20,
        "errors": {"out": [1e-3, 4e-3]},
        **more,
    }


def row(mask="causal", length=1024, direction="forward", cells=None):
    work = {"mask": mask, "B": 2, "Hq": 4, "Hkv": 2, "Lq": length, "Lk": length, "D": 64}
    return {
        "kind": "attention",
        "suite": "masks",
        "name": f"{mask} {length}",
        "direction": direction,
        "workload": work | {"Dv": 64, "dtype": "bfloat16", "bias": None},
        "shape": f"B 2, heads 4:2, L {length}, D 64, bfloat16",
        "area": {},
        "cost": {},
        "cells": cells or {"tilemask triton": cell(2.0, visited=0.5, mask_tax=1.1)},
    }


@pytest.fixture
def document():
    """As of a GPU run: rows of every status, and of every kind."""
    wrong = {"status": "wrong", "reason": "out off by 0.5", "errors": {"out": [0.5, 1e-3]}}
    cannot = {"status": "cannot", "reason": "takes <no> mask & bias"}
    peers = {"sdpa flash": cell(3.0), "flex": cell(5.0, prepare_ms=12.0, note="compiled")}
    found = record.new_document("cpu", "CUDA events", ["masks"], ["sdpa flash", "flex"])
    found |= {
        "device": "cuda",
        "commit": "0123456789ab",
        "machine": {
            "cpu": "some",
            "gpu": "NVIDIA H200",
            "capability": "9.0",
            "driver": "580.1",
            "clocks": {"clocks.sm": "1980 MHz"},
        },
        "ceilings": {"flops_per_second": {"bfloat16": 7e14}, "bytes_per_second": 4e12},
        "seconds": 12.5,
        "rows": [
            row("full", cells={"tilemask triton": cell(3.5, visited=1.0), **peers}),
            row(cells={"tilemask triton": cell(2.0, visited=0.5, mask_tax=1.14), **peers}),
            row("tree", cells={"tilemask triton": wrong, "sdpa flash": cannot, "flex": cell(9.0)}),
            row(length=2048, cells={"tilemask triton": cell(4.0, visited=0.5), **peers}),
            {"kind": "overhead", "suite": "overhead", "name": "no mask"}
            | record.figure([7.0, 7.5, 8.0], "us"),
            {"kind": "prepare", "suite": "prepare", "name": "tree", "noise_ms": 0.1}
            | record.figure([1.0, 1.2, 1.4], "ms"),
        ],
    }
    return json.loads(json.dumps(found))  # as it is read: nothing shared between rows


# -- documents ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.name)
def test_results_have_their_provenance(path):
    assert record.problems(json.loads(path.read_text(encoding="utf-8"))) == []


def test_results_hold_json_and_a_line_on_each():
    names = {path.name for path in RESULTS.iterdir() if path.is_file()}
    assert {name for name in names if not name.endswith(".json")} == {"README.md"}
    text = (RESULTS / "README.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `(\S+\.json)`", text, re.MULTILINE))
    assert listed == names - {"README.md"}


def test_a_whole_document_is_valid(document):
    assert record.problems(document) == []


@pytest.mark.parametrize("name", record.PROVENANCE)
def test_a_document_without_a_field_is_refused(document, name, tmp_path):
    del document[name]
    assert any(name in text for text in record.problems(document))
    path = tmp_path / "x.json"
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=rf"x\.json: .*{name}"):
        record.load(path)


def test_what_else_is_refused(document):
    def said(change):
        changed = copy.deepcopy(document)
        change(changed)
        return "; ".join(record.problems(changed))

    first = ("rows", 0, "cells", "tilemask triton")

    def put(value, *keys):
        def change(target):
            for key in keys[:-1]:
                target = target[key]
            target[keys[-1]] = value

        return change

    assert "schema must be 2" in said(put(1, "schema"))
    assert "commit is unknown" in said(put("unknown", "commit"))
    assert "commit must be" in said(put("", "commit"))
    assert "rows must be" in said(put([], "rows"))
    assert "device must be cpu or cuda" in said(put("tpu", "device"))
    assert "machine.driver is missing" in said(put({"gpu": "x"}, "machine"))
    assert "versions.nvcc is missing" in said(lambda d: d["versions"].pop("nvcc"))
    assert "not the median" in said(put(1.0, *first, "ms"))
    assert "must be a list of numbers" in said(put([], *first, "samples_ms"))
    assert "timed, but not compared" in said(put({}, *first, "errors"))
    assert "status must be one of" in said(put("fast", *first, "status"))
    assert "wrong, but timed" in said(put("wrong", *first, "status"))
    assert "but no reason" in said(put({"status": "cannot"}, *first))
    assert "the same kind, name" in said(lambda d: d["rows"].append(d["rows"][0]))
    assert record.problems([]) == ["not an object"]


def test_load_says_what_is_wrong_with_a_file(tmp_path):
    path = tmp_path / "x.json"
    with pytest.raises(ValueError, match="No such file"):
        record.load(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        record.load(path)


def test_save_leaves_the_old_file_if_it_fails(document, tmp_path):
    path = tmp_path / "x.json"
    record.save(path, document)
    old = path.read_text()
    document["seconds"] = float("nan")
    with pytest.raises(ValueError):
        record.save(path, document)
    assert path.read_text() == old and json.loads(old)["seconds"] == 12.5


def test_the_hash_is_of_the_sources(monkeypatch):
    first = record.sources_sha256()
    assert re.fullmatch("[0-9a-f]{64}", first) and record.sources_sha256() == first
    read = Path.read_bytes
    monkeypatch.setattr(
        Path, "read_bytes", lambda path: read(path) + b"#" * (path.name == "forward.py")
    )
    assert record.sources_sha256() != first


def test_the_commit_can_be_said(monkeypatch):
    monkeypatch.setenv("TILEMASK_COMMIT", "abc")
    assert record.commit() == "abc"


def test_clocks_of_nvidia_smi(monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho '1980 MHz, 3201 MHz, 1980 MHz, 41, 512.10 W'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    clocks = record.clocks_now()
    assert clocks["clocks.sm"] == "1980 MHz" and clocks["power.draw"] == "512.10 W"
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert record.clocks_now() is None


# -- the table and the page -----------------------------------------------------------------------


def test_table(document):
    text = report.table(document)
    lines = text.splitlines()
    assert lines[0].startswith("NVIDIA H200, compute capability 9.0, driver 580.1; timed with CUDA")
    (causal,) = (line for line in lines if line.startswith("causal 1024, fwd") and "MiB" in line)
    assert causal.split()[3:] == [
        "triton",
        "2.00",
        "0.0060",
        "50.0",
        "50.0",
        "%",
        "1.14",
        "50",
        "%",
        "3.00",
        "MiB",
        "-",
        "0.25",
    ]
    (ratios,) = (line for line in lines if line.startswith("causal 1024") and "1.50x" in line)
    assert ratios.split()[-2:] == ["1.50x", "2.50x"]
    (wrong,) = (line for line in lines if line.startswith("tree 1024, fwd") and "WRONG" in line)
    assert wrong.split()[-1] == "500" and " ms" not in wrong
    assert "tree 1024, fwd, tilemask triton: wrong, out off by 0.5" in text
    assert "sdpa flash: takes <no> mask & bias" in text
    assert re.search(r"^no mask +7\.50 +7\.00 +-$", text, re.MULTILINE)
    assert re.search(r"^tree +1\.20 ± 0\.10 +1\.00 +-$", text, re.MULTILINE)


def test_a_cpu_run_says_so(document):
    document |= {"device": "cpu", "machine": {"cpu": "some CPU", "threads": 1}}
    first = "A CPU run: some CPU, 1 threads, wall clock. It says nothing about a GPU."
    assert report.table(document).startswith(first)
    assert first in report.page(document)


class Page(html.parser.HTMLParser):
    """Collects tags, and checks that they close in order."""

    VOID = ("meta", "br", "link", "img")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page(document):
    text = report.page(document)
    page = Page(text)
    assert not [a for _, a in page.tags if {"src", "href"} & set(a)]
    assert not re.search(r"https?://|@import|url\(", text)
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in page.tags}
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text
    assert "takes &lt;no&gt; mask &amp; bias" in text
    assert '<td class="bad">WRONG</td>' in text and "out off by 0.5" in text
    assert "580.1" in text and document["sources_sha256"] in text
    for title in ("Speed by mask", "Speed over length", "Mask tax", "Where this was made"):
        assert f"<h2>{title}</h2>" in text
    drawn = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(drawn) == 3
    for svg in drawn:
        ElementTree.fromstring(svg)


def test_an_empty_run_has_a_page_and_a_table(document):
    document["rows"], document["stopped"] = [], "interrupted"
    Page(report.page(document))
    assert "cut short: interrupted" in report.table(document)


def test_bars_are_as_long_as_their_values():
    svg = plots.bars([("a", {"x": 1.0, "y": 2.0}), ("b", {"y": 4.0})], ["x", "y"], "ms", line=2.0)
    tree = ElementTree.fromstring(svg)
    widths = [float(r.get("width")) for r in tree.iter("rect")]
    assert widths[1] == pytest.approx(2 * widths[0], abs=0.2)
    assert widths[2] == pytest.approx(4 * widths[0], abs=0.2)
    assert max(widths) < plots.WIDTH
    assert [r.get("class") for r in tree.iter("rect")] == ["c0", "c1", "c1"]
    (rule,) = tree.iter("line")
    assert float(rule.get("x1")) == pytest.approx(8 + widths[1], abs=0.2)


def test_lines_rise_with_their_values():
    svg = plots.lines({"x": [(1024, 1.0), (4096, 3.0), (2048, 2.0)]}, ["x"], "TFLOP/s")
    (line,) = ElementTree.fromstring(svg).iter("polyline")
    points = [tuple(map(float, p.split(","))) for p in line.get("points").split()]
    assert points[0][0] < points[1][0] < points[2][0]
    assert points[1][0] - points[0][0] == pytest.approx(points[2][0] - points[1][0], abs=0.2)
    assert points[0][1] > points[1][1] > points[2][1]


@pytest.mark.parametrize("value, top", [(0.9, 1), (1.0, 1), (1.01, 1.5), (61, 80), (730, 800)])
def test_ceilings_of_axes(value, top):
    assert plots.ceiling(value) == pytest.approx(top)


@pytest.mark.parametrize(
    "value, words",
    [
        (0, "0"),
        (None, "-"),
        (1234.5, "1234"),
        (12.34, "12.3"),
        (0.01234, "0.0123"),
        (1.234e-5, "1.23e-05"),
    ],
)
def test_numbers(value, words):
    assert report.number(value) == words


# -- comparing ------------------------------------------------------------------------------------


def changed(document, factor, name="tilemask triton"):
    """The document with one row's samples scaled."""
    other = copy.deepcopy(document)
    found = other["rows"][1]["cells"][name]
    found |= record.figure([factor * s for s in found["samples_ms"]], "ms")
    return other


def test_compare_tells_what_is_beyond_the_noise(document):
    lines, broken = compare.compare(document, changed(document, 1.2))
    (line,) = (line for line in lines if "slower" in line)
    assert line.startswith("causal 1024, forward, tilemask triton") and "+20.0 %" in line
    assert not broken
    lines, _ = compare.compare(document, changed(document, 0.9, "flex"))
    assert sum("faster" in line for line in lines) == 1 and "flex" in "".join(lines)


def test_compare_keeps_quiet_about_noise(document):
    same, _ = compare.compare(document, changed(document, 1.01))
    assert "14 figures did not change" in same[-1] and not any("slower" in line for line in same)
    noisy = copy.deepcopy(document)
    found = noisy["rows"][1]["cells"]["tilemask triton"]
    found |= record.figure([1.9, 2.0, 2.6, 2.6, 2.7, 2.8, 2.9], "ms")  # disturbed: its best is not
    lines, _ = compare.compare(document, noisy)
    assert not any("slower" in line for line in lines)


def test_compare_fails_on_what_became_wrong(document):
    worse = copy.deepcopy(document)
    worse["rows"][1]["cells"]["tilemask triton"] = {"status": "wrong", "reason": "x"}
    lines, broken = compare.compare(document, worse)
    assert broken and any("ok -> wrong" in line for line in lines)
    _, repaired = compare.compare(worse, document)
    assert not repaired
    peer = copy.deepcopy(document)
    peer["rows"][1]["cells"]["flex"] = {"status": "wrong", "reason": "x"}
    assert not compare.compare(document, peer)[1]


def test_compare_names_machines_and_missing_rows(document):
    other = copy.deepcopy(document)
    other["machine"]["gpu"] = "NVIDIA A100"
    del other["rows"][4]
    text = "\n".join(compare.compare(document, other)[0])
    assert "not the same machine: NVIDIA H200 and NVIDIA A100" in text
    assert "only in A: no mask" in text


def test_the_command_compares_files(document, tmp_path, capsys):
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    record.save(paths[0], document)
    record.save(paths[1], changed(document, 2.0))
    assert command_line.main(["bench", "--compare", *map(str, paths)]) == 0
    assert "+100.0 %" in capsys.readouterr().out
    paths[1].write_text("{}")
    assert command_line.main(["bench", "--compare", *map(str, paths)]) == 2
    assert "b.json: schema must be" in capsys.readouterr().out


# -- the README -----------------------------------------------------------------------------------


def test_the_readme_is_what_the_command_makes(capsys):
    assert readme.main(["--check"]) == 0, "run make readme"


@pytest.fixture
def tree(tmp_path):
    """A README with an empty section, and a folder of results."""
    (tmp_path / "bench/results").mkdir(parents=True)
    (tmp_path / "README.md").write_text(f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n")
    return tmp_path


def test_readme_without_a_gpu_measurement(tree, capsys):
    for path in RESULTS.glob("*.json"):
        if json.loads(path.read_text())["device"] == "cpu":
            shutil.copy(path, tree / "bench/results")
    assert readme.main(["--check"], tree) == 1
    assert readme.main([], tree) == 0
    assert readme.main(["--check"], tree) == 0
    text = (tree / "README.md").read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "No GPU measurement yet" in text
    assert "| attention, causal |" in text


def test_readme_of_a_gpu_measurement(tree, document):
    record.save(tree / "bench/results/h200.json", document)
    assert readme.main([], tree) == 0
    text = (tree / "README.md").read_text()
    assert "No GPU measurement" not in text and "NVIDIA H200, driver 580.1" in text
    assert "| causal 1024, fwd (triton) | 2.00 | 50.0 | 1.14 | sdpa flash | 1.50x |" in text
    assert "tree" not in text  # wrong there


def test_readme_refuses_a_file_without_provenance(tree, document, capsys):
    del document["sources_sha256"]
    (tree / "bench/results/h200.json").write_text(json.dumps(document))
    old = (tree / "README.md").read_text()
    assert readme.main([], tree) == 2
    assert "sources_sha256" in capsys.readouterr().err
    assert (tree / "README.md").read_text() == old
    (tree / "README.md").write_text("no markers")
    (tree / "bench/results/h200.json").unlink()
    assert readme.main([], tree) == 2
