"""tilemask.integrations.flash_attn against formulas written out in float64."""

import gc
import inspect
import itertools
import weakref

import pytest
import torch
import ways
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import tilemask
from tilemask import masks
from tilemask.backends import triton
from tilemask.integrations import flash_attn
from tilemask.integrations.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)

# -- signatures -----------------------------------------------------------------------------------

# the parameters that flash-attn 2.8 documents, in its order
OPTIONS = {
    "dropout_p": 0.0,
    "softmax_scale": None,
    "causal": False,
    "window_size": (-1, -1),
    "softcap": 0.0,
    "alibi_slopes": None,
    "deterministic": False,
    "return_attn_probs": False,
}
CACHE_OPTIONS = {
    "k": None,
    "v": None,
    "rotary_cos": None,
    "rotary_sin": None,
    "cache_seqlens": None,
    "cache_batch_idx": None,
    "cache_leftpad": None,
    "block_table": None,
    "softmax_scale": None,
    "causal": False,
    "window_size": (-1, -1),
    "softcap": 0.0,
    "rotary_interleaved": True,
    "alibi_slopes": None,
    "num_splits": 0,
    "return_softmax_lse": False,
}
CU = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
SIGNATURES = {
    "flash_attn_func": (("q", "k", "v"), OPTIONS),
    "flash_attn_qkvpacked_func": (("qkv",), OPTIONS),
    "flash_attn_kvpacked_func": (("q", "kv"), OPTIONS),
    "flash_attn_varlen_func": (("q", "k", "v", *CU), OPTIONS | {"block_table": None}),
    "flash_attn_varlen_qkvpacked_func": (("qkv", "cu_seqlens", "max_seqlen"), OPTIONS),
    "flash_attn_varlen_kvpacked_func": (("q", "kv", *CU), OPTIONS),
    "flash_attn_with_kvcache": (("q", "k_cache", "v_cache"), CACHE_OPTIONS),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_those_of_flash_attn(name):
    required, optional = SIGNATURES[name]
    parameters = inspect.signature(getattr(flash_attn, name)).parameters
    expected = [(n, inspect.Parameter.empty) for n in required] + list(optional.items())
    assert [(n, p.default) for n, p in parameters.items()] == expected
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters.values())


def test_every_function_is_here():
    assert set(flash_attn.__all__) == set(SIGNATURES)


# -- the formulas ---------------------------------------------------------------------------------


def formula(q, k, v, left=-1, right=-1, softcap=0.0, slopes=None, scale=None, first=0):
    """One sequence: q [Lq, Hq, D], k [Lk, Hkv, D], v [Lk, Hkv, Dv] -> out [Lq, Hq, Dv], lse [Hq,
    Lq] (+inf where a row sees nothing) and probabilities, in float64. Keys before ``first`` are
    hidden."""
    q, k, v = (t.double() for t in (q, k, v))
    len_q, heads, width = q.shape
    group = heads // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("ihd,jhd->hij", q, k) * (width**-0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    i = torch.arange(len_q)[:, None] + len(k) - len_q
    j = torch.arange(len(k))
    if slopes is not None:
        scores = scores - slopes.double()[:, None, None] * (i - j).abs()
    seen = (j >= first).expand(len_q, -1)
    if left >= 0:
        seen = seen & (j >= i - left)
    if right >= 0:
        seen = seen & (j <= i + right)
    scores = scores.masked_fill(~seen, -torch.inf)
    lse = scores.logsumexp(-1) if len(k) else scores.new_full(scores.shape[:2], -torch.inf)
    p = (scores - lse.masked_fill(lse.isinf(), 0)[..., None]).exp()
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    return torch.einsum("hij,jhd->ihd", p, v), lse, p


def batch_formula(q, k, v, slopes=None, **options):
    given = [slopes] * len(q) if slopes is None or slopes.dim() == 1 else slopes
    rows = [formula(*t, slopes=s, **options) for *t, s in zip(q, k, v, given, strict=True)]
    return [torch.stack(part) for part in zip(*rows, strict=True)]


def packed_formula(q, k, v, lens_q, lens_k, slopes=None, **options):
    """(out [T, Hq, Dv], lse [Hq, T])"""
    given = [slopes] * len(lens_q) if slopes is None or slopes.dim() == 1 else slopes
    split = zip(q.split(lens_q), k.split(lens_k), v.split(lens_k), given, strict=True)
    rows = [formula(*t, slopes=s, **options) for *t, s in split]
    return torch.cat([r[0] for r in rows]), torch.cat([r[1] for r in rows], 1)


def tensors(*shapes, dtype=torch.float64, **options):
    return [torch.randn(shape, dtype=dtype, **options) for shape in shapes]


def cumulated(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


BANDS = {  # causal, window_size -> left, right of the formula
    "all": (False, (-1, -1), -1, -1),
    "causal": (True, (-1, -1), -1, 0),
    "window": (False, (3, 2), 3, 2),
    "left window": (False, (4, -1), 4, -1),
    "right window": (False, (-1, 1), -1, 1),
    "narrow": (False, (0, 0), 0, 0),
    "causal window": (True, (2, 5), 2, 0),
    "wide": (False, (100, 100), 100, 100),
}
EXTRAS = {
    "plain": {},
    "softcap": {"softcap": 1.5},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 1.0])},
    "all": {
        "softcap": 2.0,
        "softmax_scale": 0.7,
        "alibi_slopes": torch.tensor([[0.5, 0.25, 0.125, 1.0], [0.1, 0.7, 0.0, -0.3]]),
    },
}


def for_formula(options):
    names = {"alibi_slopes": "slopes", "softmax_scale": "scale"}
    return {names.get(name, name): value for name, value in options.items()}


bands = pytest.mark.parametrize("band", BANDS)
extras = pytest.mark.parametrize("extra", EXTRAS)


# -- flash_attn_func ------------------------------------------------------------------------------


@bands
@extras
@pytest.mark.parametrize("len_q, len_k", [(6, 6), (4, 11), (9, 5), (1, 7)])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_dense(band, extra, len_q, len_k, kv_heads):
    causal, window, left, right = BANDS[band]
    q, k, v = tensors((2, len_q, 4, 8), (2, len_k, kv_heads, 8), (2, len_k, kv_heads, 6))
    options = {"causal": causal, "window_size": window, **EXTRAS[extra]}
    out, lse, dropped = flash_attn_func(q, k, v, return_attn_probs=True, **options)
    expected = batch_formula(q, k, v, left=left, right=right, **for_formula(EXTRAS[extra]))
    torch.testing.assert_close(out, expected[0])
    torch.testing.assert_close(lse, expected[1])
    assert lse.shape == (2, 4, len_q) and dropped.numel() == 0
    assert out.is_contiguous()  # .view(B, L, H * D) works, as with flash-attn
    assert torch.equal(flash_attn_func(q, k, v, **options), out)


def test_lower_right_as_documented():
    """The two pictures of flash-attn's docstring."""
    for len_q, len_k, picture in (
        (2, 5, ["11110", "11111"]),
        (5, 2, ["00", "00", "00", "10", "11"]),
    ):
        q, k = torch.zeros(1, len_q, 1, 4), torch.zeros(1, len_k, 1, 4)
        v = torch.eye(len_k)[None, :, None]
        seen = flash_attn_func(q, k, v, causal=True)[0, :, 0] > 0
        assert ["".join(str(int(x)) for x in row) for row in seen] == picture


def test_rows_that_see_nothing():
    q, k, v = tensors((1, 5, 2, 4), (1, 2, 2, 4), (1, 2, 2, 4))
    given = [t.requires_grad_() for t in (q, k, v)]
    out, lse, _ = flash_attn_func(*given, causal=True, return_attn_probs=True)
    assert (out[:, :3] == 0).all() and (lse[..., :3] == torch.inf).all()
    assert lse[..., 3:].isfinite().all()
    (dq, *_) = torch.autograd.grad(out.sum() + lse[..., 3:].sum(), given)
    assert (dq[:, :3] == 0).all() and dq.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(dtype):
    q, k, v = tensors((2, 5, 4, 16), (2, 9, 2, 16), (2, 9, 2, 16), dtype=dtype)
    out, lse, _ = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    expected = batch_formula(q, k, v, right=0)
    assert out.dtype == dtype and lse.dtype == torch.float32
    torch.testing.assert_close(out, expected[0].to(dtype))
    torch.testing.assert_close(lse, expected[1].float())


@extras
def test_dense_gradients(extra):
    shapes = (2, 4, 4, 8), (2, 7, 2, 8), (2, 7, 2, 8)
    given = tensors(*shapes, requires_grad=True)
    (dout,) = tensors(shapes[0])
    found = flash_attn_func(*given, causal=True, window_size=(3, 0), **EXTRAS[extra])
    expected, _, _ = batch_formula(*given, left=3, right=0, **for_formula(EXTRAS[extra]))
    torch.testing.assert_close(
        torch.autograd.grad(found, given, dout), torch.autograd.grad(expected, given, dout)
    )


def test_packed_arguments_are_views():
    """Packed qkv and kv give the same numbers and gradients."""
    (qkv,) = tensors((2, 6, 3, 4, 8), requires_grad=True)
    q, k, v = (t.detach().clone().requires_grad_() for t in qkv.unbind(2))
    options = {"causal": True, "softcap": 2.0, "return_attn_probs": True}
    expected = flash_attn_func(q, k, v, **options)
    found = flash_attn_qkvpacked_func(qkv, **options)
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found[0].sum(), qkv)
    apart = torch.autograd.grad(expected[0].sum(), (q, k, v))
    torch.testing.assert_close(gradient, torch.stack(apart, 2))

    q, kv = tensors((2, 3, 4, 8), (2, 7, 2, 2, 8))
    found = flash_attn_kvpacked_func(q, kv, **options)
    torch.testing.assert_close(found, flash_attn_func(q, kv[:, :, 0], kv[:, :, 1], **options))


# -- dropout --------------------------------------------------------------------------------------


def test_dropout_is_reproducible_and_shown():
    q, k, v = tensors((2, 6, 4, 8), (2, 9, 2, 8), (2, 9, 2, 8))

    def run(seed):
        torch.manual_seed(seed)
        return flash_attn_func(q, k, v, 0.4, causal=True, return_attn_probs=True)

    out, lse, dropped = run(3)
    again = run(3)
    for a, b in zip((out, lse, dropped), again, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(run(4)[0], out)
    _, expected_lse, p = batch_formula(q, k, v, right=0)
    torch.testing.assert_close(lse, expected_lse)
    torch.testing.assert_close(dropped.abs(), p)
    kept = dropped.clamp(min=0) * (65536 / (65536 - round(0.4 * 65536)))
    values = v.repeat_interleave(2, 2)
    torch.testing.assert_close(out, torch.einsum("bhij,bjhd->bihd", kept, values))
    assert 0.2 < (dropped < 0).sum() / (p > 0).sum() < 0.6


def test_dropout_of_merged_halves_is_that_of_one_call():
    """ALiBi that is merged from both sides of the diagonal drops what one call drops."""
    q, k, v = tensors((12, 4, 8), (12, 4, 8), (12, 4, 8))
    slopes = EXTRAS["alibi"]["alibi_slopes"]
    cu = cumulated([5, 7])
    results = []
    for other in (cu, cu.clone()):
        torch.manual_seed(5)
        results.append(flash_attn_varlen_func(q, k, v, cu, other, 7, 7, 0.5, alibi_slopes=slopes))
    torch.testing.assert_close(*results)


# -- packed sequences -----------------------------------------------------------------------------

LENGTHS = {
    "same": ([4, 1, 6], None),
    "cross": ([4, 2, 6], [7, 5, 3]),
    "empty": ([0, 4, 0, 3, 2, 0], [2, 0, 0, 5, 3, 0]),
    "one": ([7], [9]),
    "nothing": ([0, 0], [0, 0]),
}


@bands
@extras
@pytest.mark.parametrize("lengths", LENGTHS)
def test_varlen(band, extra, lengths):
    causal, window, left, right = BANDS[band]
    lens_q, lens_k = LENGTHS[lengths]
    own = EXTRAS[extra]
    if own.get("alibi_slopes", torch.zeros(0)).dim() == 2:  # one row per sequence
        own = own | {"alibi_slopes": torch.rand(len(lens_q), 4)}
    cu_q = cumulated(lens_q)
    cu_k = cu_q if lens_k is None else cumulated(lens_k)
    lens_k = lens_k or lens_q
    q, k, v = tensors((sum(lens_q), 4, 8), (sum(lens_k), 2, 8), (sum(lens_k), 2, 6))
    options = {"causal": causal, "window_size": window, "return_attn_probs": True, **own}
    found = flash_attn_varlen_func(q, k, v, cu_q, cu_k, max(lens_q), max(lens_k), **options)
    expected = packed_formula(q, k, v, lens_q, lens_k, left=left, right=right, **for_formula(own))
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])
    assert found[1].shape == (4, sum(lens_q)) and found[2].numel() == 0
    assert found[0].is_contiguous()


@extras
@pytest.mark.parametrize("causal", [False, True])
def test_varlen_gradients(extra, causal):
    lens_q, lens_k = LENGTHS["cross"]
    own = EXTRAS[extra]
    if own.get("alibi_slopes", torch.zeros(0)).dim() == 2:
        own = own | {"alibi_slopes": torch.rand(len(lens_q), 4)}
    given = tensors((12, 4, 8), (15, 2, 8), (15, 2, 8), requires_grad=True)
    dout, dlse = tensors((12, 4, 8), (4, 12))
    out, lse, _ = flash_attn_varlen_func(
        *given,
        cumulated(lens_q),
        cumulated(lens_k),
        None,
        None,
        causal=causal,
        return_attn_probs=True,
        **own,
    )
    right = 0 if causal else -1
    expected = packed_formula(*given, lens_q, lens_k, right=right, **for_formula(own))
    grads = []
    for o, s in ((out, lse), expected):
        loss = (o * dout).sum() + (s.masked_fill(s.isinf(), 0) * dlse).sum()
        grads.append(torch.autograd.grad(loss, given))
    torch.testing.assert_close(*grads)


def test_varlen_packed_arguments():
    lengths = [3, 0, 5]
    cu = cumulated(lengths)
    (qkv,) = tensors((8, 3, 4, 8))
    q, k, v = qkv.unbind(1)
    options = {"causal": True, "return_attn_probs": True}
    expected = flash_attn_varlen_func(q, k, v, cu, cu, 5, 5, **options)
    torch.testing.assert_close(flash_attn_varlen_qkvpacked_func(qkv, cu, 5, **options), expected)
    found = flash_attn_varlen_kvpacked_func(q, qkv[:, 1:], cu, cu, 5, 5, **options)
    torch.testing.assert_close(found, expected)


def test_rows_after_the_last_sequence():
    """Buffers may be longer than their sequences: what is there is neither read nor left over."""
    q, k, v = tensors((12, 4, 8), (12, 4, 8), (12, 4, 8))
    for t in (q, k, v):
        t[8:] = torch.nan
    cu = cumulated([3, 5])
    for slopes in (None, torch.rand(4), torch.rand(2, 4)):
        out, lse, _ = flash_attn_varlen_func(
            q, k, v, cu, cu, 5, 5, alibi_slopes=slopes, return_attn_probs=True
        )
        expected = packed_formula(q[:8], k[:8], v[:8], [3, 5], [3, 5], slopes=slopes)
        torch.testing.assert_close(out[:8], expected[0])
        assert (out[8:] == 0).all() and (lse[:, 8:] == torch.inf).all()


def test_max_seqlen_is_not_needed():
    (q,) = tensors((8, 4, 8))
    cu = cumulated([3, 5])
    expected = flash_attn_varlen_func(q, q, q, cu, cu, 5, 5)
    for most in (None, 1, 1 << 20, torch.tensor(5)):
        assert torch.equal(flash_attn_varlen_func(q, q, q, cu, cu, most, most), expected)
    with pytest.raises(TypeError, match="max_seqlen_k"):
        flash_attn_varlen_func(q, q, q, cu, cu, 5, 5.0)


@pytest.mark.parametrize("causal", [False, True])
def test_a_padded_batch_needs_no_unpadding(causal):
    """padding(lengths) on [B, L, H, D] as it is gives what packing, attending and padding gives,
    with garbage in the padding and its gradients 0."""
    lengths = torch.tensor([5, 0, 9, 2])
    real = torch.arange(9) < lengths[:, None]
    padded = tensors((4, 9, 4, 8), (4, 9, 2, 8), (4, 9, 2, 8))
    (dout,) = tensors((4, 9, 4, 8))
    packed = [t[real].requires_grad_() for t in padded]
    for t in padded:
        t[~real] = torch.nan
        t.requires_grad_()
    cu = cumulated(lengths.tolist())
    expected = flash_attn_varlen_func(*packed, cu, cu, 9, 9, causal=causal)
    mask = masks.padding(lengths, query_lengths=lengths)
    out = tilemask.attention(
        *(t.transpose(1, 2) for t in padded), mask=mask & masks.causal() if causal else mask
    ).transpose(1, 2)
    torch.testing.assert_close(out[real], expected)
    assert (out[~real] == 0).all()
    grads = torch.autograd.grad(out, padded, dout)
    for found, apart in zip(grads, torch.autograd.grad(expected, packed, dout[real]), strict=True):
        torch.testing.assert_close(found[real], apart)
        assert (found[~real] == 0).all()


# -- the cache ------------------------------------------------------------------------------------


def caches(batch, size, heads, width, layout="plain", dtype=torch.float64):
    """k_cache and v_cache [B, S, Hkv, D], full of NaN as torch.empty may be."""
    if layout == "plain":
        both = [torch.full((batch, size, heads, width), torch.nan, dtype=dtype) for _ in "kv"]
    elif layout == "heads first":
        shape = (batch, heads, size, width)
        both = [torch.full(shape, torch.nan, dtype=dtype).transpose(1, 2) for _ in "kv"]
    else:  # part of a larger, interleaved buffer
        whole = torch.full((batch + 1, size + 3, 2, heads, width), torch.nan, dtype=dtype)
        both = [whole[1:, 2:-1, n] for n in (0, 1)]
    return both


@bands
@extras
@pytest.mark.parametrize("seqlens", ["int", "tensor"])
@pytest.mark.parametrize("layout", ["plain", "heads first", "strided"])
def test_decoding_token_by_token(band, extra, seqlens, layout):
    """A prompt, then steps of several lengths: every step equals a computation from scratch."""
    causal, window, left, right = BANDS[band]
    batch, size = 2, 14
    k_cache, v_cache = caches(batch, size, 2, 8, layout)
    pointers = k_cache.data_ptr(), v_cache.data_ptr()
    held = [0, 0] if seqlens == "int" else [0, 3]
    history = [(torch.zeros(0, 2, 8).double(), torch.zeros(0, 2, 8).double()) for _ in held]
    for b, n in enumerate(held):
        own = tensors((n, 2, 8), (n, 2, 8))
        k_cache[b, :n], v_cache[b, :n] = own
        history[b] = tuple(own)
    for step in (5, 1, 1, 2, 1):
        q, k, v = tensors((batch, step, 4, 8), (batch, step, 2, 8), (batch, step, 2, 8))
        lengths = held[0] if seqlens == "int" else torch.tensor(held, dtype=torch.int32)
        options = {"causal": causal, "window_size": window, **EXTRAS[extra]}
        out, lse = flash_attn_with_kvcache(
            q, k_cache, v_cache, k, v, cache_seqlens=lengths, return_softmax_lse=True, **options
        )
        slopes = EXTRAS[extra].get("alibi_slopes")
        for b in range(batch):
            past = [torch.cat((h, t[b])) for h, t in zip(history[b], (k, v), strict=True)]
            history[b] = tuple(past)
            own = for_formula(EXTRAS[extra])
            if slopes is not None and slopes.dim() == 2:
                own["slopes"] = slopes[b]
            expected = formula(q[b], *past, left=left, right=right, **own)
            torch.testing.assert_close(out[b], expected[0])
            torch.testing.assert_close(lse[b], expected[1])
        held = [n + step for n in held]
        for cache, which in ((k_cache, 0), (v_cache, 1)):
            for b, n in enumerate(held):
                assert torch.equal(cache[b, :n], history[b][which])
                assert cache[b, n:].isnan().all()  # nothing else was written
    assert (k_cache.data_ptr(), v_cache.data_ptr()) == pointers
    assert lse.shape == (batch, 4, 1) and out.is_contiguous()


@pytest.mark.parametrize("seqlens", ["none", "int", "tensor"])
@pytest.mark.parametrize("len_q", [1, 3, 12])
def test_reading_without_appending(seqlens, len_q):
    k_cache, v_cache = tensors((3, 9, 2, 8), (3, 9, 2, 6))
    (q,) = tensors((3, len_q, 4, 8))
    lengths = {"none": None, "int": 6, "tensor": torch.tensor([0, 9, 4], dtype=torch.int32)}
    given = lengths[seqlens]
    out = flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=given, causal=True)
    held = {"none": [9] * 3, "int": [6] * 3, "tensor": [0, 9, 4]}[seqlens]
    for b, n in enumerate(held):
        expected, _, _ = formula(q[b], k_cache[b, :n], v_cache[b, :n], right=0)
        torch.testing.assert_close(out[b], expected)


@bands
@pytest.mark.parametrize("seqlens", ["int", "tensor"])
def test_leftpad(band, seqlens):
    causal, window, left, right = BANDS[band]
    k_cache, v_cache = caches(3, 12, 2, 8)
    first, held = [2, 0, 5], [6, 6, 6] if seqlens == "int" else [6, 2, 8]
    for b in range(3):
        part = slice(first[b], held[b])
        k_cache[b, part], v_cache[b, part] = torch.randn(2, held[b] - first[b], 2, 8)
    q, k, v = tensors((3, 2, 4, 8), (3, 2, 2, 8), (3, 2, 2, 8))
    out = flash_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        k,
        v,
        cache_seqlens=6 if seqlens == "int" else torch.tensor(held),
        cache_leftpad=torch.tensor(first, dtype=torch.int32),
        causal=causal,
        window_size=window,
    )
    for b, n in enumerate(held):
        keys, values = (c[b, : n + 2].clone() for c in (k_cache, v_cache))
        keys[: first[b]] = values[: first[b]] = 0
        expected, _, _ = formula(q[b], keys, values, left=left, right=right, first=first[b])
        torch.testing.assert_close(out[b], expected)


@pytest.mark.parametrize("seqlens", ["int", "tensor"])
def test_cache_batch_idx(seqlens):
    k_cache, v_cache = tensors((5, 9, 2, 8), (5, 9, 2, 8))
    q, k, v = tensors((3, 2, 4, 8), (3, 2, 2, 8), (3, 2, 2, 8))
    index, held = [4, 0, 2], [5, 5, 5] if seqlens == "int" else [3, 7, 0]
    before = k_cache.clone()
    out = flash_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        k,
        v,
        cache_seqlens=5 if seqlens == "int" else torch.tensor(held),
        cache_batch_idx=torch.tensor(index, dtype=torch.int32),
        causal=True,
    )
    for b, (entry, n) in enumerate(zip(index, held, strict=True)):
        before[entry, n : n + 2] = k[b]
        keys, values = k_cache[entry, : n + 2], v_cache[entry, : n + 2]
        torch.testing.assert_close(out[b], formula(q[b], keys, values, right=0)[0])
        assert torch.equal(v_cache[entry, n : n + 2], v[b])
    assert torch.equal(k_cache, before)
    same = torch.tensor([1, 1, 1])  # shared entries are fine where nothing is written
    out = flash_attn_with_kvcache(q, k_cache, v_cache, cache_batch_idx=same)
    for b in range(3):
        torch.testing.assert_close(out[b], formula(q[b], k_cache[1], v_cache[1])[0])


@pytest.mark.parametrize("seqlens", ["int", "tensor"])
def test_paged_cache(seqlens):
    """Pages in any order; entries of the table that nobody needs may be garbage."""
    k_pages, v_pages = tensors((7, 4, 2, 8), (7, 4, 2, 8))
    table = torch.tensor([[5, 0, 3], [2, 6, -99], [1, 4, 10**6]], dtype=torch.int32)
    held = [5, 5, 5] if seqlens == "int" else [9, 3, 6]
    q, k, v = tensors((3, 2, 4, 8), (3, 2, 2, 8), (3, 2, 2, 8))
    expected = []
    for b, n in enumerate(held):
        pages = table[b, : -(-(n + 2) // 4)].long()
        keys, values = (p[pages].flatten(0, 1)[: n + 2].clone() for p in (k_pages, v_pages))
        keys[n:], values[n:] = k[b], v[b]
        expected.append((formula(q[b], keys, values, right=0)[0], keys, values))
    out = flash_attn_with_kvcache(
        q,
        k_pages,
        v_pages,
        k,
        v,
        cache_seqlens=5 if seqlens == "int" else torch.tensor(held, dtype=torch.int32),
        block_table=table,
        causal=True,
    )
    for b, (row, keys, values) in enumerate(expected):
        torch.testing.assert_close(out[b], row)
        pages = table[b, : -(-len(keys) // 4)].long()
        for pool, truth in ((k_pages, keys), (v_pages, values)):
            assert torch.equal(pool[pages].flatten(0, 1)[: len(keys)], truth)


def turned(x, cos, sin, positions, interleaved):
    """x [L, H, D] rotated as complex numbers, row i by position ``positions[i]``."""
    half = cos.shape[1]
    angle = torch.complex(cos, sin).to(torch.complex128)[positions][:, None]
    part = x[..., : 2 * half]
    pairs = part.unflatten(-1, (half, 2)) if interleaved else part.unflatten(-1, (2, half)).mT
    both = torch.view_as_real(torch.view_as_complex(pairs.double().contiguous()) * angle)
    both = both.flatten(-2) if interleaved else both.mT.flatten(-2)
    return torch.cat((both.to(x.dtype), x[..., 2 * half :]), -1)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("causal, window", [(True, (-1, -1)), (False, (-1, -1)), (False, (3, 1))])
@pytest.mark.parametrize("seqlens", ["int", "tensor"])
def test_rotary(interleaved, causal, window, seqlens):
    k_cache, v_cache = tensors((2, 12, 2, 8), (2, 12, 2, 8), dtype=torch.float32)
    q, k, v = tensors((2, 3, 4, 8), (2, 3, 2, 8), (2, 3, 2, 8), dtype=torch.float32)
    angles = torch.arange(12)[:, None] * torch.tensor([1.0, 0.3, 0.1])
    cos, sin = angles.cos(), angles.sin()  # 6 of 8 dimensions
    held = [5, 5] if seqlens == "int" else [4, 9]
    out = flash_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        k,
        v,
        cos,
        sin,
        5 if seqlens == "int" else torch.tensor(held),
        causal=causal,
        window_size=window,
        rotary_interleaved=interleaved,
    )
    for b, n in enumerate(held):
        positions = torch.arange(n, n + 3)
        torch.testing.assert_close(
            k_cache[b, n : n + 3], turned(k[b], cos, sin, positions, interleaved)
        )
        if not causal and window == (-1, -1):
            positions = torch.full((3,), n)
        left, right = (-1, 0) if causal else window
        query = turned(q[b], cos, sin, positions, interleaved)
        keys, values = k_cache[b, : n + 3], v_cache[b, : n + 3]
        expected, _, _ = formula(query, keys, values, left=left, right=right)
        torch.testing.assert_close(out[b], expected.float())


def test_the_cache_has_no_gradients():
    k_cache, v_cache = tensors((2, 9, 2, 8), (2, 9, 2, 8))
    q, k, v = tensors((2, 1, 4, 8), (2, 1, 2, 8), (2, 1, 2, 8), requires_grad=True)
    for n in (4, torch.tensor([4, 5])):
        out = flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=n)
        assert not out.requires_grad and not k_cache.requires_grad


# -- no look at a value, no copy, one mask for all layers -----------------------------------------


@pytest.fixture(params=["reference", "triton"])
def backend(request, monkeypatch):
    if request.param == "triton":
        monkeypatch.setattr(triton, "unfit", lambda device: None)
        monkeypatch.setattr(triton, "architecture", lambda device: 90)


@pytest.mark.parametrize("slopes", [False, True])
@pytest.mark.parametrize("gradient", [False, True])
def test_varlen_looks_at_no_value_from_the_host(backend, slopes, gradient):
    """Fake tensors have no values: .item(), nonzero() and `if tensor` raise."""
    with FakeTensorMode():
        q, k, v = (
            torch.empty(200, h, 16, dtype=torch.bfloat16, requires_grad=gradient) for h in (4, 2, 2)
        )
        cu_q, cu_k = (torch.empty(9, dtype=torch.int32) for _ in "qk")
        most = torch.empty((), dtype=torch.int32)
        given = torch.empty(8, 4) if slopes else None
        for other, causal in itertools.product((cu_q, cu_k), (True, False)):
            out, lse, _ = flash_attn_varlen_func(
                q,
                k,
                v,
                cu_q,
                other,
                most,
                most,
                causal=causal,
                window_size=(20, 5),
                alibi_slopes=given,
                return_attn_probs=True,
            )
            assert out.shape == (200, 4, 16) and lse.shape == (4, 200)
            if gradient:
                torch.autograd.grad(out.float().sum() + lse.sum(), (q, k, v))


@pytest.mark.parametrize("options", [{}, {"leftpad"}, {"entries"}, {"pages"}, {"alibi"}, {"ro"}])
def test_the_cache_looks_at_no_value_from_the_host(backend, options):
    with FakeTensorMode():
        q, k, v = (torch.empty(3, 2, h, 16, dtype=torch.bfloat16) for h in (4, 2, 2))
        cache = torch.empty(5, 128, 2, 16, dtype=torch.bfloat16)
        per_batch = torch.empty(3, dtype=torch.int32)
        given = {
            "cache_seqlens": per_batch,
            "cache_leftpad": per_batch if "leftpad" in options else None,
            "cache_batch_idx": per_batch if "entries" in options else None,
            "block_table": torch.empty(3, 4, dtype=torch.int32) if "pages" in options else None,
            "alibi_slopes": torch.empty(4) if "alibi" in options else None,
            "rotary_cos": torch.empty(600, 4) if "ro" in options else None,
            "rotary_sin": torch.empty(600, 4) if "ro" in options else None,
        }
        for causal in (True, False):
            out, lse = flash_attn_with_kvcache(
                q, cache, cache, k, v, causal=causal, return_softmax_lse=True, **given
            )
            assert out.shape == (3, 2, 4, 16) and lse.shape == (3, 4, 2)


def test_looking_at_a_value_would_raise(monkeypatch):
    """The tests above can fail."""
    monkeypatch.setattr(flash_attn.Span, "bounds", lambda self, rows: int(self.lengths[0]))
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        q, cache = torch.empty(3, 2, 2, 16), torch.empty(3, 128, 2, 16)
        lengths = torch.empty(3, dtype=torch.int32)
        flash_attn_with_kvcache(q, cache, cache, cache_seqlens=lengths)


def seen_calls(monkeypatch):
    """What attention() was given, call by call."""
    calls = []

    def watched(*tensors, **options):
        calls.append((tensors, options))
        return tilemask.attention(*tensors, **options)

    monkeypatch.setattr(flash_attn, "attention", watched)
    return calls


@pytest.mark.parametrize("seqlens", ["int", "tensor"])
@pytest.mark.parametrize("layout", ["plain", "heads first", "strided"])
def test_attention_gets_views(monkeypatch, layout, seqlens):
    """Of the cache, of packed sequences and of packed qkv: the same memory, not a copy."""
    calls = seen_calls(monkeypatch)
    k_cache, v_cache = caches(2, 16, 2, 8, layout)
    k_cache.zero_(), v_cache.zero_()
    q, k, v = tensors((2, 1, 4, 8), (2, 1, 2, 8), (2, 1, 2, 8))
    lengths = 3 if seqlens == "int" else torch.tensor([3, 9])
    flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=lengths, causal=True)
    (qkv,) = tensors((9, 3, 4, 8))
    flash_attn_varlen_qkvpacked_func(qkv, cumulated([4, 5]), 5)
    ((_, keys, values), _), (packed, _) = calls
    assert keys.data_ptr() == k_cache.data_ptr() and values.data_ptr() == v_cache.data_ptr()
    for n, t in enumerate(packed):
        assert t.shape == (1, 4, 9, 8) and t.data_ptr() == qkv[:, n].data_ptr()


def test_layers_share_a_mask_while_its_tensors_live(monkeypatch):
    calls = seen_calls(monkeypatch)
    (q,) = tensors((9, 2, 8))
    cu_q, cu_k = cumulated([4, 5]), cumulated([4, 5])

    def mask_of(cu_q, cu_k, **options):
        flash_attn_varlen_func(q, q, q, cu_q, cu_k, 5, 5, **options)
        return calls[-1][1]["mask"]

    first = mask_of(cu_q, cu_k)
    assert mask_of(cu_q, cu_k) is first
    assert mask_of(cu_q, cu_k, causal=True) is not first
    assert mask_of(cu_q, cu_k.clone()) is not first
    with masks.caching(False):
        assert mask_of(cu_q, cu_k) is not mask_of(cu_q, cu_k)
    k_cache, v_cache = tensors((2, 16, 2, 8), (2, 16, 2, 8))
    (x,) = tensors((2, 1, 2, 8))
    lengths = torch.tensor([3, 9], dtype=torch.int32)
    made = []
    for _ in range(3):
        flash_attn_with_kvcache(x, k_cache, v_cache, x, x, cache_seqlens=lengths)
        made.append(weakref.ref(calls[-1][1]["mask"]))
    assert made[0]() is made[2]() is not None
    calls.clear()
    del lengths
    gc.collect()
    assert made[0]() is None


def test_lengths_that_are_written_in_place():
    """A decode loop that counts with ``lengths += 1``, as one in a CUDA graph does."""
    k_cache, v_cache = caches(2, 12, 2, 8)
    lengths = torch.zeros(2, dtype=torch.int32)
    for step in range(6):
        q, k, v = tensors((2, 1, 4, 8), (2, 1, 2, 8), (2, 1, 2, 8))
        out = flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=lengths)
        expected = batch_formula(q, k_cache[:, : step + 1], v_cache[:, : step + 1])
        torch.testing.assert_close(out, expected[0])
        lengths += 1
    cu = cumulated([3, 6])
    (q,) = tensors((9, 4, 8))
    flash_attn_varlen_func(q, q, q, cu, cu, 6, 6)
    cu[1] = 5
    out = flash_attn_varlen_func(q, q, q, cu, cu, 5, 5)
    torch.testing.assert_close(out, packed_formula(q, q, q, [5, 4], [5, 4])[0])


def test_lengths_that_get_other_memory():
    cu = cumulated([3, 6])
    (q,) = tensors((9, 4, 8))
    flash_attn_varlen_func(q, q, q, cu, cu, 6, 6)
    cu.data = cumulated([5, 4])
    out = flash_attn_varlen_func(q, q, q, cu, cu, 5, 5)
    torch.testing.assert_close(out, packed_formula(q, q, q, [5, 4], [5, 4])[0])


def test_inference_mode():
    with torch.inference_mode():
        k_cache, v_cache = caches(2, 12, 2, 8)
        lengths = torch.zeros(2, dtype=torch.int32)
        for step in range(3):
            q, k, v = tensors((2, 1, 4, 8), (2, 1, 2, 8), (2, 1, 2, 8))
            out = flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=lengths)
            expected = batch_formula(q, k_cache[:, : step + 1], v_cache[:, : step + 1])
            torch.testing.assert_close(out, expected[0])
            lengths += 1


def test_compiled():
    def run(q, k, v, cu_q, cu_k, cache, lengths):
        packed = flash_attn_varlen_func(q, k, v, cu_q, cu_k, 6, 7, causal=True)
        x = packed[:2].unsqueeze(1)
        decoded = flash_attn_with_kvcache(x, cache, cache, x, x, cache_seqlens=lengths, causal=True)
        return packed, decoded, flash_attn_func(x, x, x, causal=True, window_size=(2, 0))

    q, k, v = tensors((12, 4, 8), (15, 4, 8), (15, 4, 8), dtype=torch.float32)
    cu_q, cu_k = (cumulated(n) for n in LENGTHS["cross"])
    (cache,) = tensors((2, 9, 4, 8), dtype=torch.float32)
    lengths = torch.tensor([3, 5])
    other = cache.clone()
    expected = run(q, k, v, cu_q, cu_k, cache, lengths)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v, cu_q, cu_k, other, lengths), expected)
    assert torch.equal(cache, other)


# -- on the kernels -------------------------------------------------------------------------------


def on_triton(kind: str, slopes: str, device: str) -> None:
    """A call on the Triton backend against the formulas; runs where the kernels do."""
    torch.manual_seed(0)
    given = {"none": None, "heads": torch.rand(4), "batch": torch.rand(2, 4)}[slopes]
    moved = None if given is None else given.to(device)
    dtype = {"dtype": torch.float32}
    with tilemask.use_backend("triton"):
        if kind == "dense":
            leaves = tensors((2, 40, 4, 16), (2, 70, 2, 16), (2, 70, 2, 16), **dtype)
            found = flash_attn_func(
                *(t.to(device) for t in leaves), causal=True, alibi_slopes=moved
            )
            expected = batch_formula(*leaves, slopes=given, right=0)[0]
            torch.testing.assert_close(found.cpu(), expected.float(), atol=3e-3, rtol=3e-3)
            return
        if kind == "cache":
            k_cache, v_cache = (c.to(device) for c in caches(2, 150, 2, 16, **dtype))
            held = [90, 3]
            for b, n in enumerate(held):
                k_cache[b, :n], v_cache[b, :n] = torch.randn(2, n, 2, 16).to(device)
            for step in (3, 1):
                q, k, v = tensors((2, step, 4, 16), (2, step, 2, 16), (2, step, 2, 16), **dtype)
                out, lse = flash_attn_with_kvcache(
                    q.to(device),
                    k_cache,
                    v_cache,
                    k.to(device),
                    v.to(device),
                    cache_seqlens=torch.tensor(held, dtype=torch.int32, device=device),
                    causal=step > 1,
                    window_size=(60, -1),
                    alibi_slopes=moved,
                    return_softmax_lse=True,
                )
                held = [n + step for n in held]
                for b, n in enumerate(held):
                    own = given[b] if slopes == "batch" else given
                    keys, values = k_cache[b, :n].cpu(), v_cache[b, :n].cpu()
                    right = 0 if step > 1 else -1
                    truth = formula(q[b], keys, values, left=60, right=right, slopes=own)
                    for got, true in zip((out[b], lse[b]), truth[:2], strict=True):
                        torch.testing.assert_close(got.cpu(), true.float(), atol=3e-3, rtol=3e-3)
            return
        lens_q, lens_k = [33, 57], [60, 40]
        leaves = tensors((90, 4, 16), (100, 2, 16), (100, 2, 16), **dtype)
        dout = torch.randn(90, 4, 16)
        here = [t.to(device).requires_grad_() for t in leaves]
        cu_q, cu_k = (cumulated(n).to(device) for n in (lens_q, lens_k))
        causal = kind == "varlen causal"
        found = flash_attn_varlen_func(*here, cu_q, cu_k, 57, 60, causal=causal, alibi_slopes=moved)
        grads = torch.autograd.grad(found, here, dout.to(device))
    leaves = [t.double().requires_grad_() for t in leaves]
    right = 0 if causal else -1
    expected = packed_formula(*leaves, lens_q, lens_k, slopes=given, right=right)[0]
    truth = (expected, *torch.autograd.grad(expected, leaves, dout.double()))
    for got, true in zip((found, *grads), truth, strict=True):
        torch.testing.assert_close(got.cpu(), true.float(), atol=3e-3, rtol=3e-3)


@pytest.mark.parametrize("slopes", ["none", "heads", "batch"])
@pytest.mark.parametrize("kind", ["dense", "varlen", "varlen causal", "cache"])
@pytest.mark.parametrize("way", ways.WAYS, ids=lambda way: way.name)
def test_on_the_kernels(way, kind, slopes):
    way.call(on_triton, kind, slopes, way.device)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_step_decodes():
    """One CUDA graph, replayed: nothing waits for the GPU, and lengths are read anew."""
    shape = {"dtype": torch.float16, "device": "cuda"}
    k_cache, v_cache = (torch.zeros(2, 256, 2, 64, **shape) for _ in "kv")
    q, k, v = (torch.randn(2, 1, h, 64, **shape) for h in (4, 2, 2))
    lengths = torch.zeros(2, dtype=torch.int32, device="cuda")

    def step():
        out = flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=lengths, causal=True)
        lengths.add_(1)
        return out

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    lengths.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    lengths.zero_()
    for n in range(1, 6):
        for t in (q, k, v):
            t.normal_()
        graph.replay()
        expected = batch_formula(*(t.cpu() for t in (q, k_cache[:, :n], v_cache[:, :n])))[0]
        torch.testing.assert_close(out.cpu(), expected.half(), atol=5e-3, rtol=5e-3)


# -- errors ---------------------------------------------------------------------------------------

Q, KV = torch.zeros(2, 3, 4, 8), torch.zeros(2, 5, 2, 8)
PQ, PK = torch.zeros(6, 4, 8), torch.zeros(10, 2, 8)
CU_Q, CU_K = torch.tensor([0, 3, 6]), torch.tensor([0, 5, 10])
NEW = torch.zeros(2, 1, 2, 8)


def varlen(**options):
    given = {"q": PQ, "k": PK, "v": PK, "cu_seqlens_q": CU_Q, "cu_seqlens_k": CU_K}
    given |= {"max_seqlen_q": 3, "max_seqlen_k": 5}
    return flash_attn_varlen_func(**given | options)


def cached(**options):
    return flash_attn_with_kvcache(**{"q": Q, "k_cache": KV, "v_cache": KV} | options)


ERRORS = {
    "layout": (lambda: flash_attn_func(PQ, KV, KV), ValueError, "q must be"),
    "heads": (lambda: flash_attn_func(Q[:, :, :3], KV, KV), ValueError, "multiple"),
    "dtype": (lambda: flash_attn_func(Q.half(), KV, KV), TypeError, "dtype"),
    "qkv": (lambda: flash_attn_qkvpacked_func(Q), ValueError, "qkv must be"),
    "kv": (lambda: flash_attn_kvpacked_func(Q, Q[:, :, None]), ValueError, "kv must be"),
    "window": (lambda: flash_attn_func(Q, KV, KV, window_size=3), ValueError, "window_size"),
    "window -2": (lambda: flash_attn_func(Q, KV, KV, window_size=(-2, 0)), ValueError, "window"),
    "slopes": (lambda: flash_attn_func(Q, KV, KV, alibi_slopes=0.5), TypeError, "alibi_slopes"),
    "slopes [B]": (
        lambda: varlen(alibi_slopes=torch.rand(3, 4)),
        ValueError,
        r"alibi_slopes must be \(4,\) or \(2, 4\)",
    ),
    "slopes grad": (
        lambda: varlen(alibi_slopes=torch.rand(4, requires_grad=True)),
        ValueError,
        "alibi_slopes requires",
    ),
    "dropout": (lambda: flash_attn_func(Q, KV, KV, 1.5), ValueError, "dropout_p"),
    "scale": (lambda: flash_attn_func(Q, KV, KV, softmax_scale="1"), TypeError, "softmax_scale"),
    "softcap": (lambda: flash_attn_func(Q, KV, KV, softcap="no"), TypeError, "softcap"),
    "cu": (lambda: varlen(cu_seqlens_q=[0, 6]), TypeError, "cu_seqlens_q"),
    "cu sizes": (lambda: varlen(cu_seqlens_q=CU_Q[:2]), ValueError, "cu_seqlens"),
    "cu values": (lambda: varlen(cu_seqlens_k=CU_K + 1), ValueError, "cu_seqlens_k"),
    "varlen pages": (
        lambda: varlen(block_table=CU_Q[None]),
        NotImplementedError,
        "block_table",
    ),
    "varlen probs": (
        lambda: varlen(dropout_p=0.1, return_attn_probs=True),
        NotImplementedError,
        "return_attn_probs",
    ),
    "cache layout": (lambda: cached(k_cache=PK), ValueError, "k_cache must be"),
    "caches": (lambda: cached(v_cache=KV[:, :4]), ValueError, "k_cache and v_cache"),
    "few entries": (lambda: cached(k_cache=KV[:1], v_cache=KV[:1]), ValueError, "k_cache has 1"),
    "cache dtype": (lambda: cached(q=Q.half()), TypeError, "one dtype"),
    "cache heads": (lambda: cached(q=Q[:, :, :3]), ValueError, "multiple of the cache's heads"),
    "cache width": (lambda: cached(q=Q[..., :4]), ValueError, "one width"),
    "k alone": (lambda: cached(k=NEW, cache_seqlens=1), ValueError, "k and v"),
    "k shape": (lambda: cached(k=NEW[:1], v=NEW, cache_seqlens=1), ValueError, "k must be"),
    "k dtype": (lambda: cached(k=NEW.half(), v=NEW, cache_seqlens=1), ValueError, "k must be"),
    "where": (lambda: cached(k=NEW, v=NEW), ValueError, "cache_seqlens"),
    "full": (lambda: cached(k=NEW, v=NEW, cache_seqlens=5), ValueError, r"\[0, 4\]"),
    "full tensor": (
        lambda: cached(k=NEW, v=NEW, cache_seqlens=torch.tensor([0, 5])),
        ValueError,
        r"cache_seqlens must lie in \[0, 4\]",
    ),
    "lengths": (lambda: cached(cache_seqlens=torch.rand(2)), TypeError, "cache_seqlens"),
    "lengths [B]": (lambda: cached(cache_seqlens=CU_Q), ValueError, "cache_seqlens"),
    "leftpad": (lambda: cached(cache_leftpad=[0, 1]), TypeError, "cache_leftpad"),
    "entries": (
        lambda: cached(cache_batch_idx=torch.tensor([0, 2])),
        ValueError,
        "cache_batch_idx must lie",
    ),
    "both": (
        lambda: cached(
            cache_batch_idx=torch.tensor([0, 1]), block_table=torch.zeros(2, 1, dtype=torch.int32)
        ),
        ValueError,
        "cache_batch_idx or block_table",
    ),
    "table": (lambda: cached(block_table=CU_Q), ValueError, "block_table must be"),
    "rotary": (lambda: cached(rotary_cos=torch.rand(9, 2)), ValueError, "rotary"),
    "rotary sin": (
        lambda: cached(k=NEW, v=NEW, cache_seqlens=1, rotary_cos=torch.rand(9, 2)),
        TypeError,
        "rotary_sin",
    ),
    "rotary short": (
        lambda: cached(k=NEW, v=NEW, cache_seqlens=1, rotary_cos=Q[0, 0], rotary_sin=Q[0, 0]),
        ValueError,
        "rotary_cos",
    ),
    "splits": (lambda: cached(num_splits=-1), ValueError, "num_splits"),
}


def test_a_refused_call_writes_nothing():
    for options in (
        {"q": Q.half()},
        {"q": Q[:, :, :3]},
        {"window_size": (0,)},
        {"v": NEW[:, :0]},
        {"cache_seqlens": torch.tensor([3, 9])},
    ):
        cache = torch.full_like(KV, 7)
        given = {"k": NEW, "v": NEW, "cache_seqlens": torch.tensor([3, 1])} | options
        with pytest.raises((TypeError, ValueError)):
            cached(k_cache=cache, v_cache=cache, **given)
        assert (cache == 7).all()


@pytest.mark.parametrize("kind", ERRORS)
def test_errors_name_the_argument(kind):
    call, error, words = ERRORS[kind]
    with pytest.raises(error, match=words):
        call()
