"""Bad arguments: the right exception, and a message that names the argument and says what came."""

import contextlib
import math
import os
import re
import subprocess
import sys
import warnings

import pytest
import torch

import tilemask
from tilemask import backends, masks
from tilemask.backends import triton

SHAPE_Q, SHAPE_K, SHAPE_V = (2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 6)


def good(**changes):
    """Arguments of a call that works, with some changed."""
    arguments = {"q": torch.randn(SHAPE_Q), "k": torch.randn(SHAPE_K), "v": torch.randn(SHAPE_V)}
    return arguments | changes


def zeros(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


ENTRIES = {
    "attention": tilemask.attention,
    "reference_attention": tilemask.reference_attention,
    "explain": tilemask.explain,
}
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # nested tensors are a prototype
    nested = torch.nested.nested_tensor([torch.zeros(4, 5, 8), torch.zeros(4, 3, 8)])
jagged = torch.nested.nested_tensor([torch.zeros(5, 8), torch.zeros(3, 8)], layout=torch.jagged)
half, meta = torch.float16, "meta"

# name: (exception, words of the message in this order, what is changed)
BAD = {
    # q, k, v
    "q list": (TypeError, "q must be a tensor, got list", {"q": [[1.0]]}),
    "k None": (TypeError, "k must be a tensor, got NoneType", {"k": None}),
    "v float": (TypeError, "v must be a tensor, got float", {"v": 1.0}),
    "q nested": (TypeError, "q must be a dense tensor.*varlen", {"q": nested}),
    "k jagged": (TypeError, "k must be a dense tensor.*varlen", {"k": jagged}),
    "v sparse": (TypeError, "v must be a dense tensor", {"v": zeros(SHAPE_V[0]).to_sparse()}),
    "q 3-D": (ValueError, r"4 dimensions.*q \(4, 5, 8\)", {"q": zeros(4, 5, 8)}),
    "k 5-D": (ValueError, r"4 dimensions.*k \(1, 2, 2, 7, 8\)", {"k": zeros(1, *SHAPE_K)}),
    "v 2-D": (ValueError, r"4 dimensions.*v \(7, 6\)", {"v": zeros(7, 6)}),
    "q half": (TypeError, "q, k and v.*float16, torch.float32", {"q": zeros(*SHAPE_Q, dtype=half)}),
    "k double": (TypeError, "q, k and v.*float64", {"k": zeros(*SHAPE_K, dtype=torch.float64)}),
    "v bfloat16": (TypeError, "q, k and v.*bfloat16", {"v": zeros(*SHAPE_V, dtype=torch.bfloat16)}),
    "all int": (
        TypeError, "q, k and v.*int64", {n: zeros(2, 2, 3, 4, dtype=torch.int64) for n in "qkv"}
    ),
    "all complex": (
        TypeError, "complex64", {n: zeros(2, 2, 3, 4, dtype=torch.complex64) for n in "qkv"}
    ),
    "all float8": (
        TypeError, "float8", {n: zeros(2, 2, 3, 4).to(torch.float8_e4m3fn) for n in "qkv"}
    ),
    "k meta": (ValueError, "q, k and v.*cpu, meta, cpu", {"k": zeros(*SHAPE_K, device=meta)}),
    "v meta": (ValueError, "q, k and v.*cpu, cpu, meta", {"v": zeros(*SHAPE_V, device=meta)}),
    "widths": (ValueError, r"width D.*k \(2, 2, 7, 9\)", {"k": zeros(2, 2, 7, 9)}),
    "width 0": (
        ValueError, r"width D.*q \(2, 4, 5, 0\)", {"q": zeros(2, 4, 5, 0), "k": zeros(2, 2, 7, 0)}
    ),
    "v width 0": (ValueError, r"v must.*v \(2, 2, 7, 0\)", {"v": zeros(2, 2, 7, 0)}),
    "v length": (ValueError, r"v must.*v \(2, 2, 6, 6\)", {"v": zeros(2, 2, 6, 6)}),
    "v heads": (ValueError, r"v must.*v \(2, 4, 7, 6\)", {"v": zeros(2, 4, 7, 6)}),
    "v batch": (ValueError, r"v must.*v \(1, 2, 7, 6\)", {"v": zeros(1, 2, 7, 6)}),
    "batch": (
        ValueError, r"batch size.*q \(2, .*k \(1, ",
        {"k": zeros(1, 2, 7, 8), "v": zeros(1, 2, 7, 6)},
    ),
    "heads": (
        ValueError, "k has 3 heads, q has 4", {"k": zeros(2, 3, 7, 8), "v": zeros(2, 3, 7, 6)}
    ),
    "more k heads": (
        ValueError, "k has 8 heads, q has 4", {"k": zeros(2, 8, 7, 8), "v": zeros(2, 8, 7, 6)}
    ),
    "no k heads": (
        ValueError, "k has 0 heads, q has 4", {"k": zeros(2, 0, 7, 8), "v": zeros(2, 0, 7, 6)}
    ),
    # mask
    "mask tensor": (
        TypeError, r"mask must be.*torch.bool \(5, 7\).*masks.dense",
        {"mask": zeros(5, 7, dtype=torch.bool)},
    ),
    "mask float": (TypeError, r"mask must be.*torch.float32", {"mask": zeros(5, 7)}),
    "mask text": (TypeError, "mask must be.*str 'causal'", {"mask": "causal"}),
    "mask constructor": (TypeError, "mask must be.*function", {"mask": masks.causal}),
    # bias
    "bias list": (TypeError, "bias must be.*list", {"bias": [[0.0]]}),
    "bias bool": (
        TypeError, "bias must be.*torch.bool.*masks.dense", {"bias": zeros(5, 7, dtype=torch.bool)}
    ),
    "bias int": (TypeError, "bias must be.*int64", {"bias": zeros(5, 7, dtype=torch.int64)}),
    "bias half": (TypeError, "bias must be.*float16", {"bias": zeros(5, 7, dtype=half)}),
    "bias double": (TypeError, "bias must be.*float64", {"bias": zeros(5, 7, dtype=torch.float64)}),
    "bias meta": (ValueError, "bias is on meta, q on cpu", {"bias": zeros(5, 7, device=meta)}),
    "bias 1-D": (ValueError, r"bias has shape \(7,\)", {"bias": zeros(7)}),
    "bias 0-D": (ValueError, r"bias has shape \(\)", {"bias": zeros()}),
    "bias 5-D": (
        ValueError, r"bias has shape \(3, 1, 1, 5, 7\).*B = B1 \* B2",
        {"bias": zeros(3, 1, 1, 5, 7)},
    ),
    "bias both": (ValueError, r"bias has shape \(2, 2, 1, 5, 7\)", {"bias": zeros(2, 2, 1, 5, 7)}),
    "bias 5-D heads": (ValueError, "bias has shape", {"bias": zeros(2, 1, 3, 5, 7)}),
    "bias 6-D": (ValueError, "bias has shape", {"bias": zeros(1, 1, 1, 1, 5, 7)}),
    "bias rows": (ValueError, r"bias has shape \(4, 7\).*\(2, 4, 5, 7\)", {"bias": zeros(4, 7)}),
    "bias padding": (ValueError, r"bias has shape \(2, 7\)", {"bias": zeros(2, 7)}),
    "bias heads": (ValueError, r"bias has shape \(2, 5, 7\)", {"bias": zeros(2, 5, 7)}),
    "bias batch": (ValueError, r"bias has shape \(3, 1, 5, 7\)", {"bias": zeros(3, 1, 5, 7)}),
    # numbers
    "scale text": (TypeError, "scale must be.*str '1'", {"scale": "1"}),
    "scale bool": (TypeError, "scale must be.*bool True", {"scale": True}),
    "scale inf": (TypeError, "scale must be.*inf", {"scale": math.inf}),
    "scale nan": (TypeError, "scale must be.*nan", {"scale": math.nan}),
    "scale tensor": (TypeError, "scale must be.*torch.float32", {"scale": torch.ones(())}),
    "scale complex": (TypeError, "scale must be.*complex", {"scale": 1j}),
    "softcap negative": (TypeError, "softcap must be.*-1", {"softcap": -1.0}),
    "softcap inf": (TypeError, "softcap must be.*inf", {"softcap": math.inf}),
    "softcap nan": (TypeError, "softcap must be.*nan", {"softcap": math.nan}),
    "softcap None": (TypeError, "softcap must be.*None", {"softcap": None}),
    "softcap bool": (TypeError, "softcap must be.*bool", {"softcap": True}),
    # per head
    "alibi list": (TypeError, "alibi_slopes must be.*list", {"alibi_slopes": [0.5] * 4}),
    "alibi int": (TypeError, "alibi_slopes must be.*int64", {"alibi_slopes": torch.arange(4)}),
    "alibi heads": (ValueError, r"alibi_slopes must be \(4,\).*\(2,\)", {"alibi_slopes": zeros(2)}),
    "alibi batch": (ValueError, r"alibi_slopes.*\(3, 4\)", {"alibi_slopes": zeros(3, 4)}),
    "alibi one": (ValueError, r"alibi_slopes.*\(1, 4\)", {"alibi_slopes": zeros(1, 4)}),
    "alibi meta": (ValueError, "alibi_slopes.*meta", {"alibi_slopes": zeros(4, device=meta)}),
    "sinks number": (TypeError, "sinks must be.*float", {"sinks": 1.0}),
    "sinks int": (TypeError, "sinks must be.*int64", {"sinks": torch.arange(4)}),
    "sinks heads": (ValueError, r"sinks must be \(4,\).*\(2,\)", {"sinks": zeros(2)}),
    "sinks matrix": (ValueError, r"sinks must be.*\(2, 4\)", {"sinks": zeros(2, 4)}),
    "sinks meta": (ValueError, "sinks.*meta", {"sinks": zeros(4, device=meta)}),
    # dropout
    "dropout negative": (ValueError, "dropout_p must be.*-0.1", {"dropout_p": -0.1}),
    "dropout above": (ValueError, "dropout_p must be.*1.5", {"dropout_p": 1.5}),
    "dropout nan": (ValueError, "dropout_p must be.*nan", {"dropout_p": math.nan}),
    "dropout text": (ValueError, "dropout_p must be.*str", {"dropout_p": "0.1"}),
    "dropout None": (ValueError, "dropout_p must be.*None", {"dropout_p": None}),
    "dropout bool": (ValueError, "dropout_p must be.*bool", {"dropout_p": True}),
    "seed float": (TypeError, "dropout_seed must be.*1.5", {"dropout_p": 0.1, "dropout_seed": 1.5}),
    "seed bool": (TypeError, "dropout_seed must.*True", {"dropout_p": 0.1, "dropout_seed": True}),
    "seed of 65 bits": (ValueError, "dropout_seed.*64", {"dropout_p": 0.1, "dropout_seed": 2**64}),
    "seed int32": (
        TypeError, "dropout_seed.*int32",
        {"dropout_p": 0.1, "dropout_seed": zeros(1, dtype=torch.int32)},
    ),
    "two seeds": (
        TypeError, r"dropout_seed.*\(2,\)",
        {"dropout_p": 0.1, "dropout_seed": zeros(2, dtype=torch.int64)},
    ),
    "seed meta": (
        ValueError, "dropout_seed is on meta",
        {"dropout_p": 0.1, "dropout_seed": zeros(1, dtype=torch.int64, device=meta)},
    ),
    "seed without dropout": (TypeError, "dropout_seed must be.*str", {"dropout_seed": "x"}),
}  # fmt: skip


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("name", BAD)
def test_bad_argument(entry, name):
    kind, message, changes = BAD[name]
    with pytest.raises(kind, match=message):
        ENTRIES[entry](**good(**changes))


@pytest.mark.parametrize("entry", ENTRIES)
def test_good_arguments(entry):
    """The call that the bad ones are changed from works, with every option at once."""
    result = ENTRIES[entry](
        **good(), mask=masks.causal(), bias=zeros(4, 5, 7), scale=0, softcap=2, sinks=zeros(4),
        alibi_slopes=zeros(2, 4), dropout_p=0.5, dropout_seed=-1,
    )  # fmt: skip
    assert str(result) if entry == "explain" else result.shape == (2, 4, 5, 6)


def test_numbers_of_other_kinds():
    """NumPy's and Python's; ints where a float is meant; a seed in a tensor."""
    import numpy as np

    given = good()
    truth = tilemask.attention(**given, scale=2.0, softcap=3.0, dropout_p=0.5, dropout_seed=9)
    for scale, softcap, p, seed in (
        (2, 3, np.float64(0.5), torch.tensor(9)),
        (np.float32(2), np.float64(3), np.float32(0.5), torch.tensor([9])),
    ):
        got = tilemask.attention(
            **given, scale=scale, softcap=softcap, dropout_p=p, dropout_seed=seed
        )
        torch.testing.assert_close(got, truth, rtol=0, atol=0)


def test_unknown_arguments():
    for entry in ENTRIES.values():
        with pytest.raises(TypeError, match="is_causal"):
            entry(**good(), is_causal=True)
        with pytest.raises(TypeError, match="attn_mask"):
            entry(**good(), attn_mask=None)
    with pytest.raises(TypeError):
        tilemask.attention(*good().values(), masks.causal())  # options are for keywords
    with pytest.raises(TypeError, match="backend"):
        tilemask.reference_attention(**good(), backend="triton")


# -- scaled_dot_product_attention -----------------------------------------------------------------

BAD_SDPA = {
    "query list": (TypeError, "query must be.*list", {"query": [[1.0]]}),
    "key None": (TypeError, "key must be.*None", {"key": None}),
    "value 1-D": (ValueError, r"value must.*2 dimensions.*\(6,\)", {"value": zeros(6)}),
    "nested": (TypeError, "nested", {"query": nested, "key": nested, "value": nested}),
    "jagged": (TypeError, "nested", {"query": jagged, "key": jagged, "value": jagged}),
    "one nested": (TypeError, "nested", {"key": nested}),
    "sparse": (TypeError, "sparse", {"query": zeros(2, 4, 5, 8).to_sparse()}),
    "dtypes": (TypeError, "dtype.*float16", {"query": zeros(2, 4, 5, 8, dtype=half)}),
    "batches": (ValueError, r"batch dimensions.*\(3, 4, 7, 8\)", {"key": zeros(3, 4, 7, 8)}),
    "heads": (ValueError, "query has 4 heads and key 2.*enable_gqa", {"key": zeros(2, 2, 7, 8)}),
    "value heads": (ValueError, "and value 2.*enable_gqa", {"value": zeros(2, 2, 7, 6)}),
    "gqa heads": (
        ValueError, "4 heads.*multiple of key's 3", {"key": zeros(2, 3, 7, 8), "enable_gqa": True}
    ),
    "lengths": (ValueError, r"v \(2, 4, 6, 6\)", {"value": zeros(2, 4, 6, 6)}),
    "mask list": (TypeError, "attn_mask must be.*list", {"attn_mask": [[True]]}),
    "mask text": (TypeError, "attn_mask must be.*str", {"attn_mask": "causal"}),
    "mask double": (
        TypeError, "attn_mask must be.*float64", {"attn_mask": zeros(5, 7, dtype=torch.float64)}
    ),
    "mask half": (TypeError, "attn_mask must be.*float16", {"attn_mask": zeros(5, 7, dtype=half)}),
    "mask int": (TypeError, "attn_mask.*int64", {"attn_mask": zeros(5, 7, dtype=torch.int64)}),
    "mask uint8": (TypeError, "attn_mask.*uint8", {"attn_mask": zeros(5, 7, dtype=torch.uint8)}),
    "mask 1-D": (
        ValueError, r"attn_mask has shape \(7,\).*padding\(keep=mask\)", {"attn_mask": zeros(7)}
    ),
    "mask batch": (ValueError, r"attn_mask.*\(3, 1, 5, 7\)", {"attn_mask": zeros(3, 1, 5, 7)}),
    "mask 5-D": (ValueError, "attn_mask has shape", {"attn_mask": zeros(1, 1, 1, 5, 7)}),
    "scale": (TypeError, "scale must be.*str", {"scale": "x"}),
    "dropout": (ValueError, "dropout_p must be.*2", {"dropout_p": 2}),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_SDPA)
def test_bad_argument_of_sdpa(name):
    kind, message, changes = BAD_SDPA[name]
    arguments = {"query": zeros(2, 4, 5, 8), "key": zeros(2, 4, 7, 8), "value": zeros(2, 4, 7, 6)}
    with pytest.raises(kind, match=message):
        tilemask.scaled_dot_product_attention(**arguments | changes)


# -- backends -------------------------------------------------------------------------------------


def test_unknown_backend():
    message = "unknown backend 'flash'; known: .*triton.*reference"
    with pytest.raises(ValueError, match=message):
        tilemask.attention(**good(), backend="flash")
    with pytest.raises(ValueError, match=message):
        tilemask.explain(**good(), backend="flash")
    with pytest.raises(ValueError, match=message), tilemask.use_backend("flash"):
        pytest.fail("use_backend() has let it through")


def test_available_backends():
    available = tilemask.available_backends()
    known = [backend.NAME for backend in backends.BACKENDS]
    assert available[-1] == known[-1] == "reference"
    assert available == [name for name in known if name in available]
    for backend in backends.BACKENDS:
        assert (backend.unavailable() is None) == (backend.NAME in available)


@pytest.fixture
def without_interpreter():
    if triton.INTERPRETED:
        pytest.skip("TRITON_INTERPRET=1: the Triton kernels run on the CPU")


def test_forced_backend_that_cannot_run(without_interpreter):
    """On CPU tensors, with or without a GPU in the machine."""
    message = "backend 'triton' cannot run this call: q is on cpu"
    with pytest.raises(RuntimeError, match=message):
        tilemask.attention(**good(), backend="triton")
    with tilemask.use_backend("triton"), pytest.raises(RuntimeError, match=message):
        tilemask.attention(**good())
    assert tilemask.attention(**good()).shape == (2, 4, 5, 6)  # and nothing is forced any more


def test_use_backend_nests_and_ends(without_interpreter):
    given = good()
    with tilemask.use_backend("triton"):
        with tilemask.use_backend("reference"):
            tilemask.attention(**given)
        assert tilemask.attention(**given, backend="reference").shape == (2, 4, 5, 6)
        with pytest.raises(RuntimeError):
            tilemask.attention(**given)
    with contextlib.suppress(KeyError), tilemask.use_backend("triton"):
        raise KeyError
    tilemask.attention(**given)


PROCESS = """
import torch, tilemask
q = torch.zeros(1, 1, 2, 4)
print(tilemask.explain(q, q, q))
"""


@pytest.mark.parametrize(
    "value, said",
    [
        ("reference", "backend: reference"),
        ("triton", "RuntimeError: backend 'triton' cannot run this call: q is on cpu"),
        ("typo", "ValueError: unknown backend 'typo'"),
    ],
)
def test_forced_by_the_environment(value, said):
    env = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", PROCESS], env=env | {"TILEMASK_BACKEND": value},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert said in done.stdout + done.stderr
    assert (done.returncode == 0) == (value == "reference")


# -- explain --------------------------------------------------------------------------------------


def test_explain(without_interpreter):
    q, k = torch.zeros(1, 2, 256, 16), torch.zeros(1, 1, 256, 16)
    told = tilemask.explain(q, k, k, mask=masks.causal())
    assert told.backend == "reference" and told.mask == "affine bounds"
    assert told.tile == (64, 64) and told.visited == pytest.approx(10 / 16)
    assert "q is on cpu" in told.reasons["triton"] and "reference" not in told.reasons
    text = str(told)
    for part in (
        "backend: reference",
        "not triton: q is on cpu",
        "affine bounds",
        "62.5 % visited",
    ):
        assert part in text, text


FORMS = {
    "affine bounds": None,
    "affine bounds, per batch": masks.padding([20]),
    "explicit row intervals": masks.chunked(9),
    "affine bounds, key bits": masks.padding(keep=torch.ones(1, 20, dtype=torch.bool)),
    "affine bounds, bits per pair": masks.dense(torch.ones(20, 20, dtype=torch.bool)),
}


@pytest.mark.parametrize("form", FORMS)
def test_explain_names_the_form(form):
    q = torch.zeros(1, 2, 20, 16)
    assert tilemask.explain(q, q, q, mask=FORMS[form]).mask == form


def test_explain_says_what_is_forced():
    told = tilemask.explain(**good(), backend="reference")
    assert told.backend == "reference"
    assert re.search("q is on cpu|reference is forced", told.reasons["triton"])


def test_explain_of_nothing():
    q = torch.zeros(0, 2, 0, 16)
    assert tilemask.explain(q, q, q).visited == 0.0


def test_slopes_that_want_a_gradient_are_refused():
    """No backend computes it: eager autograd would, compiled code would silently give None."""
    q = torch.randn(1, 2, 3, 8)
    slopes = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match="alibi_slopes requires a gradient"):
        tilemask.attention(q, q, q, alibi_slopes=slopes)
    with torch.no_grad():
        tilemask.attention(q, q, q, alibi_slopes=slopes)


def test_an_old_triton_is_named(monkeypatch):
    monkeypatch.setattr(triton.importlib.metadata, "version", lambda name: "3.5.1")
    reason = triton.unavailable.__wrapped__()
    assert reason == "Triton 3.5.1 is older than 3.6 (pip install --upgrade triton)"
