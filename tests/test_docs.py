"""README.md and docs/: every Python block runs, and what they print and promise is true.

A ```text block that follows a ```python block is its output; `python tests/test_docs.py` writes
these blocks anew.
"""

import contextlib
import inspect
import io
import re
import sys
import types
from pathlib import Path

import pytest
import torch

import tilemask
from tilemask import masks
from tilemask.attention import checked
from tilemask.backends import cuda, triton

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)


def with_real_output(text: str, name: str) -> str:
    """The page with every output block as the code before it prints it. Runs all Python blocks."""
    # a module that can be imported: torch.compile looks names up in it
    module = sys.modules["tilemask_page"] = types.ModuleType("tilemask_page")
    namespace = vars(module)

    def run(block: re.Match) -> str:
        code, shown = block.groups()
        line = text[: block.start()].count("\n") + 1
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * line + code, name, "exec"), namespace)
        if shown is None:
            assert not printed.getvalue(), f"{name}:{line} prints, but no ```text block follows"
            return block[0]
        return f"```python\n{code}```\n\n```text\n{printed.getvalue()}```\n"

    torch.manual_seed(0)
    return BLOCK.sub(run, text)


@pytest.mark.skipif(triton.INTERPRETED, reason="the pages show what ordinary calls print")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run_and_print_what_is_shown(page):
    text = page.read_text(encoding="utf-8")
    assert with_real_output(text, page.name) == text


def test_every_page_is_there_and_masks_has_pictures():
    names = {page.name for page in PAGES}
    assert names >= {"README.md", "masks.md", "semantics.md", "adding_a_kernel.md", "backends.md"}
    text = (ROOT / "docs/masks.md").read_text(encoding="utf-8")
    outputs = [shown for _, shown in BLOCK.findall(text) if shown]
    assert sum("% visited" in shown for shown in outputs) >= 10


CONSTRUCTORS = (
    "causal",
    "window",
    "chunked",
    "padding",
    "padding_from_tokens",
    "varlen",
    "documents",
    "prefix_lm",
    "intervals",
    "dense",
)


def test_every_constructor_has_its_section():
    text = (ROOT / "docs/masks.md").read_text(encoding="utf-8")
    made = {
        name
        for name, value in vars(masks).items()
        if inspect.isfunction(value) and value.__annotations__.get("return") == "Mask"
    }
    assert made <= set(CONSTRUCTORS)
    assert [name for name in CONSTRUCTORS if f"\n## {name}\n\n`{name}(" not in text] == []
    for name in CONSTRUCTORS:
        (shown,) = re.findall(rf"^## {name}\n\n`{name}\((.*?)\)`", text, re.MULTILINE)
        parameters = inspect.signature(getattr(masks, name)).parameters.values()
        plain = inspect.Signature([p.replace(annotation=p.empty) for p in parameters])
        assert f"({shown})" == str(plain)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize(
    "function", ["attention", "attention_weights", "scaled_dot_product_attention"]
)
def test_readme_shows_the_signature(function):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (shown,) = re.findall(rf"^tilemask\.{function}\((.*?)\)$", readme, re.MULTILINE | re.DOTALL)
    plain = inspect.signature(getattr(tilemask, function))
    parameters = [p.replace(annotation=p.empty) for p in plain.parameters.values()]
    real = str(inspect.Signature(parameters))
    assert f"({' '.join(shown.split())})" == real


# -- the table of what is supported ---------------------------------------------------------------

B, H, L, D = 2, 4, 40, 16


def call(mask=None, dtype=torch.float16, width=D, width_v=D, Hkv=H, **options):
    q = torch.zeros(B, H, L, width, dtype=dtype)
    k, v = (torch.zeros(B, Hkv, L, w, dtype=dtype) for w in (width, width_v))
    return checked(q, k, v, mask, **options)


def rows_of_the_table():
    """{first cell: whether the columns of CUDA and of Triton say yes}"""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+?) \| (yes|no) \| (yes|no) \| yes \|$", readme, re.MULTILINE)
    return {name: [said == "yes" for said in row] for name, *row in rows}


IDS = torch.arange(L) // 7
CALLS = {
    "`causal`, `window`, `padding` by lengths, and their `&`": [
        lambda: call(masks.causal()),
        lambda: call(masks.window(5, 3)),
        lambda: call(masks.padding([9, L], start=[1, 0], query_lengths=[L, 3])),
        lambda: call(masks.causal() & masks.window(9, -1) & masks.padding([9, L])),
    ],
    "`chunked`, `prefix_lm`, `varlen`, `intervals`, `documents(contiguous=True)`": [
        lambda: call(masks.chunked(8)),
        lambda: call(masks.prefix_lm([3, 4])),
        lambda: call(masks.varlen(torch.tensor([0, 9, L]), within=masks.causal())),
        lambda: call(masks.intervals(torch.zeros_like(IDS), IDS)),
        lambda: call(masks.documents(IDS, contiguous=True)),
    ],
    "`padding(keep=...)`, `padding_from_tokens`: one bit per key": [
        lambda: call(masks.padding(keep=torch.ones(B, L, dtype=torch.bool))),
        lambda: call(masks.padding_from_tokens(torch.ones(B, L, dtype=torch.int64), 0)),
    ],
    "`dense`, `documents`: one bit per pair": [
        lambda: call(masks.dense(torch.ones(L, L, dtype=torch.bool))),
        lambda: call(masks.documents(IDS)),
    ],
    "`bias=`, `alibi_slopes=`, `sinks=`": [
        lambda: call(bias=torch.zeros(L, L)),
        lambda: call(alibi_slopes=torch.ones(H)),
        lambda: call(sinks=torch.ones(H)),
    ],
    "`softcap=`": [lambda: call(softcap=30.0)],
    "`dropout_p=`": [lambda: call(dropout_p=0.1)],
    "grouped heads, `Lq != Lk`, any strides, any finite `scale`": [
        lambda: call(Hkv=2),
        lambda: call(scale=-1.0),
        lambda: call(scale=0.0),
    ],
    "float16, bfloat16": [lambda: call(), lambda: call(dtype=torch.bfloat16)],
    "float32": [lambda: call(dtype=torch.float32)],
    "float64": [lambda: call(dtype=torch.float64)],
    "D and Dv from 1 to 256": [
        lambda: call(width=1, width_v=256),
        lambda: call(width=256, width_v=1),
    ],
    "wider heads": [lambda: call(width=257), lambda: call(width_v=257)],
}


@pytest.mark.parametrize("row", CALLS, ids=lambda row: row.replace("`", ""))
def test_table_says_what_why_not_says(row, monkeypatch):
    for backend, expected in zip((cuda, triton), rows_of_the_table()[row], strict=True):
        monkeypatch.setattr(backend, "unfit", lambda device: None)  # as on a GPU
        for make in CALLS[row]:
            reason = backend.why_not(make())
            assert (reason is None) == expected, reason


def test_table_is_right_about_transforms(monkeypatch):
    reasons = []
    for backend in (cuda, triton):
        monkeypatch.setattr(backend, "unfit", lambda device: None)

    def inside(x):
        reasons.extend(backend.why_not(call()) for backend in (cuda, triton))
        return x

    torch.vmap(inside)(torch.zeros(3))
    (row,) = (name for name in rows_of_the_table() if "torch.func" in name)
    assert [reason is None for reason in reasons] == rows_of_the_table()[row]


def test_the_table_of_who_runs_is_the_one_that_decides():
    """docs/backends.md names the backends of cuda.PREFERRED."""
    text = (ROOT / "docs/backends.md").read_text(encoding="utf-8")
    (columns,) = re.findall(r"^\| calls \| D, Dv up to \|(.*)\|$", text, re.MULTILINE)
    rows = [int(re.search(r"sm_(\d+)", gpus)[1]) for gpus in columns.split("|")]
    names = {"decode": "up to 16 rows", "plain": "plain", "options": "with options"}
    for calls, said in names.items():
        for place, width in enumerate((64, 128, 256)):
            cells = " | ".join(f"`{cuda.PREFERRED[calls, row][place]}`" for row in rows)
            assert f"\n| {said} | {width} | {cells} |\n" in text
    assert {(calls, row) for calls in names for row in rows} == set(cuda.PREFERRED)


if __name__ == "__main__":
    for page in PAGES:
        old = page.read_text(encoding="utf-8")
        new = with_real_output(old, page.name)
        if new != old:
            page.write_text(new, encoding="utf-8")
            print(f"output blocks of {page.name} written anew")
