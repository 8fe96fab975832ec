"""attention_weights against the float64 oracle: every option, the reductions, gradients, memory.

``run`` and ``check`` serve every way to run; the cases are names out of tests/cases.py.
"""

import functools

import cases
import oracle
import pytest
import torch
from test_reference import Largest
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

import tilemask
from tilemask import attention_weights, masks
from tilemask.backends import reference

REDUCE = (None, "mean_heads", "sum_queries")
NAMES = (
    "everything_7x97", "causal_65", "heads_6_2", "layout_blhd", "layout_transposed",
    "layout_sliced", "causal_offset_-5", "window_lower_right_dead_rows", "padding_batch_empty",
    "padding_all", "varlen_causal_lower_right", "documents_batches", "prefix_lm", "chunked_16",
    "intervals_all", "keep", "keep_causal", "keep_varlen", "dense_BHQK", "dense_dead_rows",
    "dense_causal_padding", "documents_mixed_lower_right", "bias_1HQK", "bias_B11K",
    "bias_minus_inf_causal", "bias_min", "bias_min_causal", "bias_1e9", "bias_float32", "softcap",
    "softcap_bias", "alibi", "alibi_batches", "sinks", "sinks_dead_rows", "sinks_bias_minus_inf",
    "dropout", "dropout_half", "dropout_all", "dropout_dead_rows", "scale_0", "scale_negative",
    "all_at_once", "no_keys", "sinks_no_keys", "no_rows", "no_batch",
)  # fmt: skip
CASES = {name: cases.named(name) for name in NAMES}
TOLERANCE = {torch.float64: (1e-10, 1e-13), torch.float32: (1e-5, 1e-6)}  # relative, absolute


def parameters():
    return [
        pytest.param(name, dtype, id=f"{name}-{str(dtype).removeprefix('torch.')}")
        for name, case in CASES.items()
        for dtype in case.dtypes
    ]


def weights_case(name: str, dtype: torch.dtype, device="cpu"):
    """q, k and the options of attention_weights() for a case; nothing requires a gradient."""
    case = CASES[name]
    given = {n: t.detach() for n, t in cases.inputs(case, dtype, device).items()}
    return given["q"], given["k"], cases.options(case, given, device)


@functools.cache
def expected_weights(name: str, dtype: torch.dtype) -> torch.Tensor:
    """The oracle's probabilities in float64 [B, Hq, Lq, Lk]: its output where v is the identity."""
    case = CASES[name]
    given = {n: t.double() for n, t in cases.canonical_inputs(case, dtype).items()}
    swallowing = case.bias_values in ("min", "-1e9") and dtype != torch.float64
    identity = torch.eye(case.Lk, dtype=torch.float64).expand(case.B, case.Hkv, -1, -1)
    p, _ = oracle.attention_oracle(
        given["q"], given["k"], identity, case.seen(), scale=case.scale, bias=given.get("bias"),
        softcap=case.softcap, alibi_slopes=given.get("alibi_slopes"), sinks=given.get("sinks"),
        keep=cases.dropout_keep(case), live_keys=case.live_keys(), live_rows=case.live_rows(),
        held_in=torch.float32 if swallowing else None,
    )  # fmt: skip
    return p


def reduced(weights: torch.Tensor, reduce: str | None) -> torch.Tensor:
    if reduce == "mean_heads":
        return weights.mean(1)
    return weights.sum(2) if reduce == "sum_queries" else weights


def run(name: str, dtype: torch.dtype, reduce: str | None, device="cpu", backend=None):
    """attention_weights() of a case, on the CPU."""
    q, k, options = weights_case(name, dtype, device)
    return attention_weights(q, k, **options, reduce=reduce, backend=backend).cpu()


def check(name: str, dtype: torch.dtype, reduce: str | None, got: torch.Tensor) -> None:
    """Assert that a result of ``run`` is right, and exactly 0 where the truth is."""
    truth = reduced(expected_weights(name, dtype), reduce)
    assert got.dtype == dtype and not got.isnan().any()
    rtol, atol = TOLERANCE.get(dtype, (torch.finfo(dtype).eps, 1e-6))
    torch.testing.assert_close(got.double(), truth, rtol=rtol, atol=atol)
    assert (got[truth == 0] == 0).all()


# -- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduce", REDUCE)
@pytest.mark.parametrize("name, dtype", parameters())
def test_case(name, dtype, reduce):
    check(name, dtype, reduce, run(name, dtype, reduce, backend="reference"))


@pytest.mark.parametrize("name", NAMES)
def test_weights_times_values_is_attention(name):
    """With the same dropout, too."""
    case = CASES[name]
    q, k, options = weights_case(name, torch.float64)
    v = cases.clean_inputs(case, torch.float64)["v"].detach()
    expected = tilemask.reference_attention(q, k, v, **options)
    weights = attention_weights(q, k, **options)
    out = weights @ v.repeat_interleave(case.Hq // case.Hkv, 1)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", [n for n in NAMES if not CASES[n].dropout_p])
def test_rows_sum_to_one(name):
    """Those that see something; with sinks to less, all others to 0."""
    weights = run(name, torch.float32, None)
    seen = cases.rows_seen(CASES[name], torch.float32)
    sums = weights.sum(-1)
    if CASES[name].sinks:
        assert ((sums > 0) & (sums < 1))[seen].all()
    else:
        torch.testing.assert_close(sums[seen], torch.ones_like(sums[seen]))
    assert (weights[~seen] == 0).all()
    assert (weights[~cases.visible_pairs(CASES[name], torch.float32)] == 0).all()


@pytest.mark.parametrize("fill", [torch.finfo(torch.float32).min, -1e9])
def test_rows_of_a_large_negative_bias_attend_evenly(fill):
    q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 5, 8)
    weights = attention_weights(q, k, bias=torch.full((3, 5), fill))
    assert torch.equal(weights, torch.full((1, 2, 3, 5), 0.2))


def test_bias_of_two_batch_dimensions():
    q, k = torch.randn(6, 2, 5, 8), torch.randn(6, 2, 7, 8)
    for shape in ((2, 1, 2, 5, 7), (1, 3, 1, 5, 7), (2, 3, 1, 1, 7), (1, 1, 2, 5, 7)):
        bias = torch.randn(shape)
        expanded = bias.expand(2, 3, 2, 5, 7).flatten(0, 1)
        got, truth = (attention_weights(q, k, bias=b) for b in (bias, expanded))
        assert torch.equal(got, truth)


def test_multihead_attention_returns_the_mean_over_heads():
    module = torch.nn.MultiheadAttention(12, 3, bias=False, batch_first=True)
    x, padded = torch.randn(2, 6, 12), torch.arange(6) >= torch.tensor([[6], [4]])
    _, expected = module(x, x, x, key_padding_mask=padded)
    q, k, _ = (x @ module.in_proj_weight.T).unflatten(-1, (3, 3, 4)).movedim(-2, 1).unbind(3)
    with torch.no_grad():
        got = attention_weights(q, k, mask=masks.padding(keep=~padded), reduce="mean_heads")
    torch.testing.assert_close(got, expected)


def test_dropout_is_drawn_from_the_generator():
    q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 40, 8)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(attention_weights(q, k, dropout_p=0.5))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


# -- chunks and memory ----------------------------------------------------------------------------


@pytest.mark.parametrize("reduce", REDUCE)
@pytest.mark.parametrize("name", NAMES)
def test_chunks_give_the_same(name, reduce, monkeypatch):
    case = CASES[name]
    whole = run(name, torch.float64, reduce)
    monkeypatch.setattr(reference, "CHUNK", 7 * max(1, case.B * case.Hq * case.Lk))
    chunked = run(name, torch.float64, reduce)
    torch.testing.assert_close(chunked, whole, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_round_once(dtype, monkeypatch):
    monkeypatch.setattr(reference, "CHUNK", 1)
    for name in ("causal_65", "padding_all"):
        check(name, dtype, "sum_queries", run(name, dtype, "sum_queries"))


@pytest.mark.parametrize("dropout", [0.0, 0.5], ids=["", "dropout"])
@pytest.mark.parametrize("reduce", REDUCE[1:])
def test_reductions_are_bounded_by_the_chunk(reduce, dropout, monkeypatch):
    """Forward and backward make no array of B x Hq x Lq x Lk, nor many of Lq x Lk."""
    B, H, L, D = 1, 16, 256, 4
    chunk = 16 * H * L  # scores of 16 rows
    monkeypatch.setattr(reference, "CHUNK", chunk)
    q, k = (torch.randn(B, H, L, D).requires_grad_() for _ in "qk")
    bias = torch.randn(1, 1, L, L, requires_grad=True)
    options = dict(mask=masks.causal(), dropout_p=dropout, dropout_seed=1, reduce=reduce)
    with Largest() as forward:
        weights = attention_weights(q, k, bias=bias, **options)
    with Largest() as backward:
        torch.autograd.grad(weights.square().sum(), (q, k, bias))
    for seen in (forward, backward):
        assert chunk // 2 <= seen.numel <= chunk, f"{seen.op} made {seen.numel} elements"


@pytest.mark.parametrize("reduce", REDUCE[1:])
def test_reductions_keep_no_scores_for_the_backward(reduce, monkeypatch):
    H, L = 16, 256
    monkeypatch.setattr(reference, "CHUNK", 16 * H * L)
    q, k = (torch.randn(1, H, L, 4).requires_grad_() for _ in "qk")
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        attention_weights(q, k, reduce=reduce)
    assert sum(kept.values()) <= 4 * H * L * L // 4


# -- gradients ------------------------------------------------------------------------------------

WITH_GRADIENTS = {
    "causal, dead rows": dict(mask=masks.causal(-1)),
    "keep": dict(mask=masks.padding(keep=torch.tensor([[True, False, True, True]]))),
    "dense": dict(mask=masks.dense(torch.rand(3, 4, generator=cases.generator("w")) < 0.6)),
    "bias": dict(bias=(2, 3, 4)),
    "bias of two batch dimensions": dict(bias=(1, 1, 2, 1, 4), mask=masks.causal()),
    "all": dict(
        mask=masks.window(2, 1), bias=(2, 3, 4), softcap=2.0, sinks=(2,), scale=-0.7,
        dropout_p=0.2, dropout_seed=1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("chunked", [False, True], ids=["whole", "chunked"])
@pytest.mark.parametrize("reduce", REDUCE)
@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_derivatives(name, reduce, chunked, monkeypatch):
    if chunked:
        monkeypatch.setattr(reference, "CHUNK", 8)
    options = dict(WITH_GRADIENTS[name])
    shapes = {"q": (1, 2, 3, 2), "k": (1, 1, 4, 2)}
    shapes |= {n: options.pop(n) for n in ("bias", "sinks") if n in options}
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes.values()]

    def function(*values):
        return attention_weights(**dict(zip(shapes, values)), **options, reduce=reduce)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_padding_has_no_gradient():
    """NaN in q and k where padding takes out: gradients are finite, and 0 there."""
    case = cases.named("padding_all")
    given = cases.inputs(case, torch.float64)
    q, k = given["q"], given["k"]
    assert q.isnan().any() and k.isnan().any()
    weights = attention_weights(q, k, mask=case.mask("cpu"))
    dq, dk = torch.autograd.grad(weights.square().sum(), (q, k))
    assert dq.isfinite().all() and dk.isfinite().all() and (dk != 0).any()
    assert (dq.masked_select(~case.live_rows()[:, None, :, None]) == 0).all()
    assert (dk.masked_select(~case.live_keys()[:, None, :, None]) == 0).all()


# -- arguments ------------------------------------------------------------------------------------


def given(**changes):
    return {"q": torch.randn(2, 4, 5, 8), "k": torch.randn(2, 2, 7, 8)} | changes


BAD = {
    "q list": (TypeError, "q must be a tensor, got list", {"q": [1.0]}),
    "k None": (TypeError, "k must be a tensor, got NoneType", {"k": None}),
    "k 0-D": (ValueError, r"^q and k must be.*4 dim.*, k \(\)$", {"k": torch.zeros(())}),
    "dtypes": (
        TypeError, "^q and k must have one dtype.*float32, torch.float64$",
        {"k": torch.zeros(2, 2, 7, 8, dtype=torch.float64)},
    ),
    "devices": (
        ValueError, "^q and k must.*cpu, meta$", {"k": torch.zeros(2, 2, 7, 8, device="meta")}
    ),
    "widths": (ValueError, r"width.*k \(2, 2, 7, 9\)$", {"k": torch.zeros(2, 2, 7, 9)}),
    "width 0": (
        ValueError, "width", {"q": torch.zeros(2, 4, 5, 0), "k": torch.zeros(2, 2, 7, 0)}
    ),
    "batch": (ValueError, r"^q and k must.*batch.*k \(1, 2", {"k": torch.zeros(1, 2, 7, 8)}),
    "heads": (ValueError, "k has 3 heads, q has 4", {"k": torch.zeros(2, 3, 7, 8)}),
    "mask": (TypeError, "mask must be", {"mask": torch.ones(5, 7) > 0}),
    "bias": (ValueError, r"bias has shape \(4, 7\)", {"bias": torch.zeros(4, 7)}),
    "reduce typo": (
        ValueError, "reduce must be None, \"mean_heads\" or \"sum_queries\", got str 'mean'",
        {"reduce": "mean"},
    ),
    "reduce True": (ValueError, "reduce must be.*bool True", {"reduce": True}),
    "backend": (ValueError, "unknown backend 'flash'", {"backend": "flash"}),
    "value": (TypeError, "v", {"v": torch.zeros(2, 2, 7, 8)}),
    "return_lse": (TypeError, "return_lse", {"return_lse": True}),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_argument(name):
    kind, message, changes = BAD[name]
    with pytest.raises(kind, match=message):
        attention_weights(**given(**changes))


def test_every_option_at_once():
    weights = attention_weights(
        **given(), mask=masks.causal(), bias=torch.zeros(4, 5, 7), scale=0, softcap=2,
        sinks=torch.zeros(4), alibi_slopes=torch.zeros(2, 4), dropout_p=0.5, dropout_seed=-1,
    )  # fmt: skip
    assert weights.shape == (2, 4, 5, 7)


@pytest.mark.parametrize("leaf", ["q", "k", "bias", "sinks"])
def test_gradients_of_a_forced_backend_without_them(leaf):
    arguments = given(bias=torch.zeros(5, 7), sinks=torch.zeros(4))
    arguments[leaf].requires_grad_()
    message = "backend 'triton' cannot run this call: attention_weights.*gradients"
    with pytest.raises(RuntimeError, match=message):
        attention_weights(**arguments, backend="triton")
    with tilemask.use_backend("triton"), pytest.raises(RuntimeError, match=message):
        attention_weights(**arguments)
    assert attention_weights(**arguments).requires_grad
    assert attention_weights(**arguments, backend="reference").requires_grad
    with torch.no_grad():
        assert not attention_weights(**arguments, backend="reference").requires_grad


# -- those who watch ------------------------------------------------------------------------------


@pytest.mark.parametrize("chunked", [False, True], ids=["whole", "chunked"])
@pytest.mark.parametrize("reduce", REDUCE)
def test_compile(reduce, chunked, monkeypatch):
    if chunked:
        monkeypatch.setattr(reference, "CHUNK", 64)

    def function(q, k, bias):
        mask = masks.causal() & masks.padding(keep=torch.arange(7).expand(2, -1) != 3)
        return attention_weights(q, k, mask=mask, bias=bias, softcap=3.0, reduce=reduce)

    def results(function):
        torch.manual_seed(0)
        inputs = [*given().values(), torch.randn(4, 5, 7)]
        inputs = [t.requires_grad_() for t in inputs]
        weights = function(*inputs)
        return weights, *torch.autograd.grad(weights.square().sum(), inputs)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for got, truth in zip(results(compiled), results(function), strict=True):
        torch.testing.assert_close(got, truth)


def test_traced_calls_run_on_the_reference():
    with FakeTensorMode():
        assert attention_weights(**given(), reduce="mean_heads").shape == (2, 5, 7)
        with pytest.raises(RuntimeError, match=r"cannot run this call: attention_weights.* traced"):
            attention_weights(**given(), backend="triton")


def test_transforms():
    q, k = torch.randn(3, 2, 4, 5, 8), torch.randn(3, 2, 2, 7, 8)
    bias = torch.randn(2, 4, 5, 7)

    def function(q, k):
        return attention_weights(q, k, mask=masks.causal(), bias=bias)

    truth = torch.stack([function(*pair) for pair in zip(q, k)])
    torch.testing.assert_close(torch.vmap(function)(q, k), truth)


def test_torch_function_is_honoured():
    seen = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), options=None):
            seen.append(function)
            return function(*arguments, **options or {})

    class Tagged(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, arguments=(), options=None):
            seen.append((cls, function))
            return super().__torch_function__(function, types, arguments, options or {})

    q, k = given().values()
    result = attention_weights(q.as_subclass(Tagged), k, mask=masks.causal(), reduce="mean_heads")
    assert type(result) is Tagged and (Tagged, attention_weights) in seen
    with Watch():
        attention_weights(q, k)
    assert attention_weights in seen


def test_autocast():
    q, k = given().values()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weights = attention_weights(q, k, bias=torch.full((5, 7), -1e9))
    assert weights.dtype == torch.bfloat16
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 7))
