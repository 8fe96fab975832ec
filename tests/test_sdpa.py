"""scaled_dot_product_attention against torch's: shapes, masks, causality, dropout, and old bugs."""

import itertools
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import tilemask
from tilemask import masks
from tilemask import scaled_dot_product_attention as sdpa


def given(q, k, v, dtype=torch.float64):
    """Random query, key and value of these shapes, leaves that require gradients."""
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in (q, k, v)]


def bits(*shape):
    """A random bool mask with a row that sees nothing, where there are rows."""
    mask = torch.rand(shape) < 0.6
    if shape[-2] > 1:
        mask[..., 1, :] = False
    return mask


def torch_math(*arguments, **options):
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*arguments, **options)


def same(tensors, attn_mask=None, torch_mask=None, **options):
    """Assert that output and gradients are torch's; ``torch_mask`` where it is told otherwise."""
    torch_options = dict(options)
    if torch_mask is not None:
        torch_options.pop("is_causal", None)
    else:
        torch_mask = attn_mask
    got = sdpa(*tensors, attn_mask, **options)
    truth = torch_math(*tensors, attn_mask=torch_mask, **torch_options)
    assert got.shape == truth.shape and got.dtype == truth.dtype
    torch.testing.assert_close(got, truth, rtol=1e-9, atol=1e-11)
    leaves = [*tensors]
    if isinstance(attn_mask, torch.Tensor) and attn_mask.requires_grad:
        leaves.append(attn_mask)
    upstream = torch.randn_like(truth)
    gradients = [torch.autograd.grad(out, leaves, upstream) for out in (got, truth)]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10)


# -- shapes ---------------------------------------------------------------------------------------

SHAPES = {
    "2-D": ((5, 8), (7, 8), (7, 6)),
    "3-D": ((4, 5, 8), (4, 7, 8), (4, 7, 6)),
    "3-D, one key head": ((4, 5, 8), (1, 7, 8), (1, 7, 6)),
    "3-D query, 2-D key": ((4, 5, 8), (7, 8), (7, 6)),
    "4-D": ((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 6)),
    "one key head": ((2, 4, 5, 8), (2, 1, 7, 8), (2, 1, 7, 6)),
    "one key head, more value heads": ((2, 4, 5, 8), (2, 1, 7, 8), (2, 4, 7, 6)),
    "key batch 1": ((2, 4, 5, 8), (1, 4, 7, 8), (1, 4, 7, 6)),
    "value batch 1": ((2, 4, 5, 8), (2, 4, 7, 8), (1, 4, 7, 6)),
    "query batch 1": ((1, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 6)),
    "4-D query, 3-D key": ((2, 4, 5, 8), (4, 7, 8), (4, 7, 6)),
    "4-D query, 2-D key": ((2, 4, 5, 8), (7, 8), (7, 6)),
    "5-D": ((2, 3, 4, 5, 8), (2, 3, 4, 7, 8), (2, 3, 4, 7, 6)),
    "5-D, batches broadcast": ((2, 3, 4, 5, 8), (2, 1, 4, 7, 8), (1, 3, 4, 7, 6)),
    "5-D query, 4-D key": ((2, 3, 4, 5, 8), (3, 4, 7, 8), (3, 4, 7, 6)),
    "4-D query, 5-D key": ((3, 4, 5, 8), (2, 3, 4, 7, 8), (2, 3, 4, 7, 6)),
    "3-D query, 4-D key": ((4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 6)),
    "2-D query, 3-D key": ((5, 8), (4, 7, 8), (4, 7, 6)),
    "one query head": ((2, 1, 5, 8), (2, 4, 7, 8), (2, 4, 7, 6)),
    "6-D": ((2, 1, 2, 4, 5, 8), (1, 3, 2, 4, 7, 8), (2, 3, 1, 4, 7, 6)),
    "one row": ((2, 4, 1, 8), (2, 4, 7, 8), (2, 4, 7, 6)),
    "one key": ((2, 4, 5, 8), (2, 4, 1, 8), (2, 4, 1, 6)),
    "no keys": ((2, 4, 5, 8), (2, 4, 0, 8), (2, 4, 0, 6)),
    "no rows": ((2, 4, 0, 8), (2, 4, 7, 8), (2, 4, 7, 6)),
    "no batch": ((0, 4, 5, 8), (0, 4, 7, 8), (0, 4, 7, 6)),
    "no batch of 5-D": ((2, 0, 4, 5, 8), (2, 0, 4, 7, 8), (2, 0, 4, 7, 6)),
    "no heads": ((2, 0, 5, 8), (2, 0, 7, 8), (2, 0, 7, 6)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name):
    same(given(*SHAPES[name]))
    same(given(*SHAPES[name]), is_causal=True)
    Lq, Lk = SHAPES[name][0][-2], SHAPES[name][1][-2]
    same(given(*SHAPES[name]), bits(Lq, Lk))


GROUPED = {
    "4 and 2": ((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 6)),
    "4 and 1": ((2, 4, 5, 8), (2, 1, 7, 8), (2, 1, 7, 6)),
    "4 and 4": ((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 6)),
    "8, 2 and 4": ((2, 8, 5, 8), (2, 2, 7, 8), (2, 4, 7, 6)),
    "8, 4 and 2": ((2, 8, 5, 8), (2, 4, 7, 8), (2, 2, 7, 6)),
    "8, 1 and 4": ((2, 8, 5, 8), (2, 1, 7, 8), (2, 4, 7, 6)),
    "3-D": ((4, 5, 8), (2, 7, 8), (2, 7, 6)),
    "5-D": ((2, 3, 4, 5, 8), (2, 3, 2, 7, 8), (2, 3, 2, 7, 6)),
}


@pytest.mark.parametrize("name", GROUPED)
def test_grouped_heads(name):
    same(given(*GROUPED[name]), enable_gqa=True)
    same(given(*GROUPED[name]), bits(5, 7), enable_gqa=True, is_causal=False)


REFUSED = {
    "heads without enable_gqa": (((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 6)), {}),
    "value heads without enable_gqa": (((2, 4, 5, 8), (2, 4, 7, 8), (2, 2, 7, 6)), {}),
    "heads that do not divide": (
        ((2, 4, 5, 8), (2, 3, 7, 8), (2, 3, 7, 6)), {"enable_gqa": True}
    ),
    "widths": (((2, 4, 5, 8), (2, 4, 7, 9), (2, 4, 7, 6)), {}),
    "batches": (((2, 4, 5, 8), (3, 4, 7, 8), (3, 4, 7, 6)), {}),
    "1-D": (((8,), (7, 8), (7, 6)), {}),
    "1-D mask": (((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 6)), {"attn_mask": torch.ones(7) > 0}),
    "mask with more batches": (
        ((1, 4, 5, 8), (1, 4, 7, 8), (1, 4, 7, 6)), {"attn_mask": torch.ones(2, 1, 5, 7) > 0}
    ),
    "mask with other rows": (
        ((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 6)), {"attn_mask": torch.ones(4, 7) > 0}
    ),
    "padding mask": (
        ((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 6)), {"attn_mask": torch.ones(2, 7) > 0}
    ),
    "int mask": (
        ((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 6)), {"attn_mask": torch.ones(5, 7).long()}
    ),
    "half mask": (
        ((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 6)), {"attn_mask": torch.ones(5, 7).half()}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_torch_refuses(name):
    shapes, options = REFUSED[name]
    tensors = given(*shapes)
    with pytest.raises((RuntimeError, IndexError, ValueError)):
        F.scaled_dot_product_attention(*tensors, **options)
    with pytest.raises((ValueError, TypeError)):
        sdpa(*tensors, **options)


def test_padding_mask_is_advised():
    tensors = given((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 6))
    with pytest.raises(ValueError, match=r"\(2, 7\).*padding mask.*masks.padding\(keep=mask\)"):
        sdpa(*tensors, torch.ones(2, 7, dtype=torch.bool))


# -- masks ----------------------------------------------------------------------------------------

FULL = (2, 4, 5, 7)
BROADCAST = [
    shape
    for rank in (2, 3, 4)
    for shape in itertools.product(*((1, size) for size in FULL[4 - rank :]))
]


@pytest.mark.parametrize("shape", BROADCAST, ids=str)
def test_mask_shapes(shape):
    """Bool, float64 and float32 masks of every shape that broadcasts; with gradients."""
    tensors = given((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 6))
    keep = bits(*shape)
    same(tensors, keep)
    same(tensors, keep.double().log())  # 0 and -inf
    same(tensors, torch.randn(shape, dtype=torch.float64).requires_grad_())
    same(tensors, torch.randn(shape, dtype=torch.float64).masked_fill(~keep, -1e9))
    single = torch.randn(shape)
    same(tensors, single, torch_mask=single.double())  # torch takes float64 only with float64


@pytest.mark.parametrize(
    "shape",
    [
        (5, 7), (4, 1, 7), (3, 1, 5, 7), (3, 4, 5, 7), (2, 1, 1, 5, 7), (1, 3, 1, 1, 7),
        (2, 3, 4, 5, 7), (2, 3, 1, 1, 1), (1, 1, 1, 5, 7),
    ],
    ids=str,
)  # fmt: skip
def test_masks_of_more_batch_dimensions(shape):
    """[B, 1, H, ...] and [1, W, ...] against [B, W, H, L, E]."""
    tensors = given((2, 3, 4, 5, 8), (2, 3, 4, 7, 8), (2, 3, 4, 7, 6))
    same(tensors, bits(*shape))
    same(tensors, torch.randn(shape, dtype=torch.float64).requires_grad_())


@pytest.mark.parametrize("shape", [*itertools.product((1, 2), (1, 3), (1, 2), (1, 4))], ids=str)
def test_masks_of_three_batch_dimensions(shape):
    tensors = given((2, 3, 2, 4, 5, 8), (2, 3, 2, 4, 7, 8), (2, 3, 2, 4, 7, 6))
    same(tensors, bits(*shape, 5, 7))
    bias = torch.randn(*shape, 5, 7, dtype=torch.float64)
    same(tensors, bias.expand(2, 3, 2, 4, 5, 7))
    same(tensors, bias.requires_grad_())
    same(tensors, bias.detach().expand(2, 3, 2, 4, 5, 7).requires_grad_())


def test_strides_of_more_batch_dimensions():
    """Neighbours whose strides do not merge."""
    five = given((2, 3, 4, 5, 8), (2, 3, 4, 7, 8), (2, 3, 4, 7, 6))
    six = given((2, 3, 2, 4, 5, 8), (2, 3, 2, 4, 7, 8), (2, 3, 2, 4, 7, 6))
    same(five, bits(3, 2, 1, 5, 7).transpose(0, 1))
    same(five, torch.randn(3, 2, 4, 5, 7, dtype=torch.float64).transpose(0, 1).requires_grad_())
    same(six, bits(2, 3, 2, 1, 5, 7).transpose(0, 2))
    same(six, bits(2, 2, 3, 4, 5, 7).transpose(1, 2))
    same(six, bits(3, 2, 1, 1, 5, 7).transpose(0, 1))


@pytest.mark.parametrize("batch", [(2, 0), (0, 3), (0, 0), (2, 0, 3)], ids=str)
def test_masks_of_no_batch(batch):
    tensors = given((*batch, 4, 5, 8), (*batch, 4, 7, 8), (*batch, 4, 7, 6))
    for shape in itertools.product(*((1, size) for size in batch)):
        same(tensors, bits(*shape, 1, 5, 7))
        same(tensors, torch.randn(*shape, 4, 5, 7, dtype=torch.float64))


@pytest.fixture
def calls(monkeypatch):
    """The calls that attention() hands on."""
    module, seen = sys.modules["tilemask.attention"], []
    attend = module.attend
    monkeypatch.setattr(
        module, "attend", lambda call, name: (seen.append(call), attend(call, name))[1]
    )
    return seen


# batch, shape of the mask, what it is expanded to, shape of the view that a backend gets
VIEWS = {
    "full": ((2, 3), (2, 3, 1, 5, 7), None, (6, 1, 1, 5, 7)),
    "pairs of an Evoformer": ((2, 3), (2, 1, 4, 5, 7), None, (2, 1, 4, 5, 7)),
    "windows of a Swin block": ((2, 3), (1, 3, 1, 5, 7), None, (1, 3, 1, 5, 7)),
    "one for all": ((2, 3), (4, 5, 7), None, (1, 1, 4, 5, 7)),
    "batch of 1": ((1, 3), (1, 3, 4, 5, 7), None, (3, 1, 4, 5, 7)),
    "4-D": ((2, 3), (3, 1, 5, 7), None, (1, 3, 1, 5, 7)),
    "expanded": ((2, 3), (2, 1, 4, 5, 7), (2, 3, 4, 5, 7), (2, 1, 4, 5, 7)),
    "expanded all over": ((2, 3), (1, 1, 4, 5, 7), (2, 3, 4, 5, 7), (1, 1, 4, 5, 7)),
    "two of three": ((2, 3, 2), (2, 3, 1, 1, 5, 7), None, (6, 1, 1, 5, 7)),
    "last of three": ((2, 3, 2), (1, 1, 2, 1, 5, 7), None, (1, 2, 1, 5, 7)),
    "first of three": ((2, 3, 2), (2, 1, 1, 1, 5, 7), None, (2, 1, 1, 5, 7)),
    "batch of 1 between": ((2, 1, 3), (2, 1, 1, 1, 5, 7), None, (2, 1, 1, 5, 7)),
}


@pytest.mark.parametrize("name", VIEWS)
def test_masks_stay_views(name, calls):
    """A mask or bias of some of the batch dimensions is neither expanded nor copied."""
    batch, shape, expanded, expected = VIEWS[name]
    tensors = given((*batch, 4, 5, 8), (*batch, 4, 7, 8), (*batch, 4, 7, 6))
    keep, bias = bits(*shape), torch.randn(shape)
    if expanded:
        keep, bias = keep.expand(expanded), bias.expand(expanded)
    sdpa(*tensors, keep)
    sdpa(*tensors, bias)
    trained = bias.detach().requires_grad_()
    sdpa(*tensors, trained)
    views = [calls[0].mask.bits.view, calls[1].bias, calls[2].bias]
    for view, source in zip(views, (keep, bias, trained), strict=True):
        assert view.data_ptr() == source.data_ptr()
        assert view.untyped_storage().data_ptr() == source.untyped_storage().data_ptr()
    assert views[0].shape == views[1].shape == expected
    if not expanded:
        assert views[2].shape == expected


def test_padding_of_an_alignment_is_one_bit_per_key(calls):
    """[B, N, 1, 1, L]: an Evoformer's mask, together with its bias."""
    tensors = given((2, 3, 4, 7, 8), (2, 3, 4, 7, 8), (2, 3, 4, 7, 6))
    keep = torch.rand(2, 3, 1, 1, 7) < 0.6
    same(tensors, keep)
    lowered = calls[0].mask
    assert lowered.bits is None and lowered.key_bits.shape == (6, 1, 1, 7)
    assert lowered.key_bits.data_ptr() == keep.data_ptr()


def test_three_apart_keep_one_broadcast(calls):
    """What cannot be a view is written out, but not over the first."""
    tensors = given((2, 3, 2, 4, 5, 8), (2, 3, 2, 4, 7, 8), (2, 3, 2, 4, 7, 6))
    sdpa(*tensors, bits(1, 3, 1, 1, 5, 7))
    sdpa(*tensors, torch.randn(2, 1, 2, 1, 5, 7))
    assert calls[0].mask.bits.view.shape == (1, 6, 1, 5, 7)
    assert calls[1].bias.shape == (2, 6, 1, 5, 7)


@pytest.mark.parametrize(
    "name", ["4-D", "key batch 1", "query batch 1", "4-D query, 2-D key", "5-D", "one key head"]
)
def test_tensors_stay_views(name, calls):
    """query, key and value are not copied where a view has the shape."""
    tensors = given(*SHAPES[name])
    sdpa(*tensors)
    for view, source in zip((calls[0].q, calls[0].k, calls[0].v), tensors, strict=True):
        assert view.data_ptr() == source.data_ptr()


def test_keys_shared_by_all_batches_stay_views(calls):
    tensors = given((2, 3, 4, 5, 8), (1, 1, 4, 7, 8), (4, 7, 6))
    same(tensors)
    assert calls[0].k.data_ptr() == tensors[1].data_ptr()
    assert calls[0].k.stride(0) == calls[0].v.stride(0) == 0


def test_bias_of_two_batch_dimensions(calls):
    """attention() takes what was flattened, with a gradient of its own shape."""
    q, k, v = given((6, 4, 5, 8), (6, 2, 7, 8), (6, 2, 7, 6))
    for shape in ((2, 1, 4, 5, 7), (1, 3, 1, 5, 7), (2, 3, 1, 1, 7), (1, 1, 4, 5, 1)):
        bias = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        out = tilemask.attention(q, k, v, bias=bias)
        assert calls.pop().bias.data_ptr() == bias.data_ptr()
        flat = bias.expand(2, 3, 4, 5, 7).flatten(0, 1)
        truth = torch_math(q, k, v, attn_mask=flat, enable_gqa=True)
        torch.testing.assert_close(out, truth)
        upstream = torch.randn_like(out)
        got, right = (
            torch.autograd.grad(o, (q, k, v, bias), upstream, retain_graph=True)
            for o in (out, truth)
        )
        for mine, theirs in zip(got, right, strict=True):
            torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("shape", [(5, 7), (1, 7), (4, 5, 7), (4, 1, 1)], ids=str)
def test_masks_of_fewer_dimensions(shape):
    same(given((4, 5, 8), (4, 7, 8), (4, 7, 6)), bits(*shape))
    if len(shape) == 2:
        same(given((5, 8), (7, 8), (7, 6)), bits(*shape))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_mask_dtypes(dtype):
    """float32 masks go with every query; in half precision torch keeps float32 inside as well."""
    tensors = given((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 6), dtype=dtype)
    for mask in (bits(2, 1, 5, 7), torch.randn(4, 5, 7), torch.randn(4, 5, 7).to(dtype)):
        got, truth = sdpa(*tensors, mask), torch_math(*tensors, attn_mask=mask)
        assert got.dtype == truth.dtype == dtype
        torch.testing.assert_close(got, truth)


def test_mask_strides():
    """Stride 0 and transposed masks, and rows that start at any address."""
    tensors = given((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 6))
    same(tensors, bits(2, 1, 1, 7).expand(2, 4, 5, 7))
    same(tensors, bits(7, 5).mT)
    same(tensors, bits(6, 9)[1:, 1:8])
    same(tensors, torch.randn(6, 9, dtype=torch.float64)[1:, 2:])


# -- causality ------------------------------------------------------------------------------------


@pytest.mark.parametrize("Lq, Lk", [(5, 5), (2, 5), (5, 2), (1, 5), (5, 1)])
def test_causal_is_upper_left(Lq, Lk):
    tensors = given((2, 4, Lq, 8), (2, 4, Lk, 8), (2, 4, Lk, 6))
    triangle = torch.ones(Lq, Lk, dtype=torch.bool).tril()
    same(tensors, is_causal=True)
    same(tensors, torch_mask=triangle, is_causal=True)


def test_causal_together_with_a_mask():
    """torch refuses it, or drops the mask; here it is the intersection."""
    tensors = given((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 6))
    triangle = torch.ones(5, 7, dtype=torch.bool).tril()
    keep = bits(2, 1, 5, 7)
    same(tensors, keep, torch_mask=keep & triangle, is_causal=True)
    bias = torch.randn(4, 5, 7, dtype=torch.float64)
    same(tensors, bias, torch_mask=bias.masked_fill(~triangle, -torch.inf), is_causal=True)
    padding = torch.arange(7) < torch.tensor([7, 3]).view(2, 1, 1, 1)
    same(tensors, masks.padding([7, 3]), torch_mask=padding & triangle, is_causal=True)


@pytest.mark.filterwarnings("ignore:Lower right causal bias will produce NaNs")  # not here
@pytest.mark.parametrize("Lq, Lk", [(5, 5), (2, 5), (5, 2)])
def test_causal_bias(Lq, Lk):
    """torch.nn.attention.bias, also where the lower-right one leaves rows without a key."""
    tensors = given((2, 4, Lq, 8), (2, 4, Lk, 8), (2, 4, Lk, 6))
    ones = torch.ones(Lq, Lk, dtype=torch.bool)
    same(tensors, causal_upper_left(Lq, Lk), torch_mask=ones.tril())
    same(tensors, causal_lower_right(Lq, Lk), torch_mask=ones.tril(Lk - Lq))


def test_tilemask_masks():
    tensors = given((2, 4, 9, 8), (2, 4, 9, 8), (2, 4, 9, 6))
    mask = masks.window(3, 1) & masks.padding([9, 4])
    same(tensors, mask, torch_mask=mask.to_dense(2, 4, 9, 9))
    five = given((1, 2, 4, 9, 8), (1, 2, 4, 9, 8), (1, 2, 4, 9, 6))
    same(five, mask, torch_mask=mask.to_dense(2, 4, 9, 9)[None])


# -- scale and dropout ----------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [None, 1.0, 0.0, -0.5, 7])
def test_scale(scale):
    same(given((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 6)), bits(5, 7), scale=scale)


def test_dropout_is_reproducible():
    tensors = given((2, 4, 5, 8), (2, 4, 70, 8), (2, 4, 70, 6))
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(sdpa(*tensors, dropout_p=0.5))
    torch.testing.assert_close(outs[0], outs[1], rtol=0, atol=0)
    assert not torch.equal(outs[0], outs[2])
    torch.manual_seed(1)
    assert torch.equal(sdpa(*tensors, dropout_p=0.5), outs[0])
    assert not torch.equal(sdpa(*tensors, dropout_p=0.5), outs[0])  # the generator moved on
    by_seed = [tilemask.attention(*tensors, dropout_p=0.5, dropout_seed=s) for s in (3, 3, 4)]
    assert torch.equal(by_seed[0], by_seed[1]) and not torch.equal(by_seed[0], by_seed[2])


def test_dropout_leaves_the_generator_alone_where_it_is_off():
    tensors = given((1, 1, 2, 4), (1, 1, 2, 4), (1, 1, 2, 4))
    state = torch.get_rng_state()
    sdpa(*tensors)
    tilemask.attention(*tensors, dropout_p=0.5, dropout_seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    sdpa(*tensors, dropout_p=0.5)
    assert not torch.equal(torch.get_rng_state(), state)


def test_dropout_statistics():
    """The identity as values shows the weights: each is 0 or itself / (1 - p), p of them 0."""
    p, L = 0.25, 256
    q, k, _ = given((2, 4, L, 8), (2, 4, L, 8), (1,))
    identity = torch.eye(L, dtype=torch.float64).expand(2, 4, L, L)
    weights = sdpa(q, k, identity)
    dropped = sdpa(q, k, identity, dropout_p=p)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], (weights / (1 - p))[kept])
    pairs = kept.numel()
    assert abs(kept.double().mean().item() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / pairs)


def test_dropout_of_everything():
    q, k, v = given((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 6))
    out = sdpa(q, k, v, dropout_p=1.0)
    assert (out == 0).all()
    for gradient in torch.autograd.grad(out.sum(), (q, k, v)):
        assert (gradient == 0).all()


def test_dropout_averages_to_the_output():
    """Over 2000 seeds the mean comes within five standard errors of the output without dropout."""
    q, k, v = (t.detach() for t in given((1, 1, 3, 4), (1, 1, 5, 4), (1, 1, 5, 4)))
    outs = torch.stack(
        [tilemask.attention(q, k, v, dropout_p=0.3, dropout_seed=s) for s in range(2000)]
    )
    deviation = (outs.mean(0) - sdpa(q, k, v)).abs() / (outs.std(0) / math.sqrt(2000))
    assert deviation.max() < 5


# -- what went wrong in torch ---------------------------------------------------------------------


@pytest.mark.parametrize("fill", ["min", -1e9, -1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_finite_masks_kill_no_row(fill, dtype):
    """finfo.min and -1e9 are numbers: a row full of them attends evenly, as in torch."""
    if fill == -1e9 and dtype == torch.float16:
        pytest.skip("-1e9 is -inf in float16")
    q, k, v = given((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 6), dtype=dtype)
    low = torch.finfo(dtype).min if fill == "min" else fill
    mask = torch.zeros(5, 7, dtype=dtype).masked_fill(~bits(5, 7), low)
    got, truth = sdpa(q, k, v, mask), torch_math(q, k, v, attn_mask=mask)
    torch.testing.assert_close(got, truth)
    upstream = torch.randn_like(truth)
    mine, theirs = (torch.autograd.grad(out, (q, k, v), upstream) for out in (got, truth))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)
    if dtype != torch.float16 and fill != -1e4:  # these swallow the scores
        torch.testing.assert_close(got[:, :, 1], v.mean(2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_rows_of_minus_inf_are_zero(dtype):
    """By a bool mask and by -inf: output 0, gradients 0, no NaN."""
    for mask in (bits(5, 7), bits(5, 7).to(dtype).log()):
        q, k, v = given((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 6), dtype=dtype)
        out = sdpa(q, k, v, mask)
        assert (out[:, :, 1] == 0).all() and (out[:, :, 0] != 0).any()
        dq, dk, dv = torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
        assert (dq[:, :, 1] == 0).all()
        assert all(t.isfinite().all() for t in (dq, dk, dv))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_padded_keys_are_never_read(value):
    """NaN in masked values leaks out of torch, since 0 * NaN is NaN (pytorch#101967)."""
    q, k, v = given((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 6))
    lengths = torch.tensor([7, 3])
    keep = torch.arange(7) < lengths[:, None]
    expected = torch_math(q, k, v, attn_mask=keep[:, None, None])
    upstream = torch.randn_like(expected)
    truth = torch.autograd.grad(expected, (q, k, v), upstream)
    holes = ~keep[:, None, :, None]
    k2, v2 = (t.detach().masked_fill(holes, value).requires_grad_() for t in (k, v))
    for mask in (masks.padding(lengths), masks.padding(keep=keep)):
        out = sdpa(q, k2, v2, mask)
        torch.testing.assert_close(out, expected)
        for got, right in zip(torch.autograd.grad(out, (q, k2, v2), upstream), truth, strict=True):
            torch.testing.assert_close(got, right)


def test_gradient_of_the_mask_alone():
    """An illegal memory access on CUDA for years (pytorch#148476)."""
    q, k, v = (t.detach() for t in given((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 6)))
    mask = torch.randn(1, 4, 5, 7, dtype=torch.float64, requires_grad=True)
    out, truth = sdpa(q, k, v, mask), torch_math(q, k, v, attn_mask=mask)
    upstream = torch.randn_like(truth)
    (got,), (right,) = (torch.autograd.grad(o, mask, upstream) for o in (out, truth))
    torch.testing.assert_close(got, right)


@pytest.mark.parametrize("Lq, Lk", [(1, 1), (3, 9), (7, 15), (9, 17), (13, 31), (31, 33), (8, 129)])
def test_unaligned_lengths(Lq, Lk):
    """Masks whose rows start at odd addresses were refused, or copied, by fused kernels."""
    same(given((2, 2, Lq, 8), (2, 2, Lk, 8), (2, 2, Lk, 8)), bits(2, 1, Lq, Lk))


def test_masks_as_multihead_attention_makes_them():
    """(B, H, 1, S) from a key padding mask, (B, H, L, S) merged with -inf (pytorch#41508)."""
    tensors = given((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 8))
    padded = torch.arange(7) >= torch.tensor([7, 3])[:, None]  # True = padded
    merged = torch.zeros(2, 7, dtype=torch.float64).masked_fill(padded, -torch.inf)
    same(tensors, merged.view(2, 1, 1, 7).expand(-1, 4, -1, -1))
    causal = torch.full((5, 7), -torch.inf, dtype=torch.float64).triu(1)
    same(tensors, causal + merged.view(2, 1, 1, 7).expand(-1, 4, -1, -1))
    padded[1] = True  # a batch without a key
    merged = torch.zeros(2, 7, dtype=torch.float64).masked_fill(padded, -torch.inf)
    same(tensors, merged.view(2, 1, 1, 7).expand(-1, 4, -1, -1))


@pytest.mark.parametrize("length", [64, 192, 320])
def test_small_sums_far_below(length):
    """S % 128 == 64 with lse < -88 gave NaN gradients in cuDNN (pytorch#196678)."""
    q, k, v = given((1, 2, 5, 8), (1, 2, length, 8), (1, 2, length, 8), dtype=torch.float32)
    mask = bits(5, length)
    q, k = (3 + q).detach().requires_grad_(), (-9 - k.abs()).detach().requires_grad_()
    _, lse = tilemask.attention(q, k, v, mask=masks.dense(mask), scale=1.0, return_lse=True)
    assert lse[lse > -torch.inf].max() < -88
    outs = [f(q, k, v, attn_mask=mask, scale=1.0) for f in (sdpa, torch_math)]
    upstream = torch.randn_like(outs[0])
    torch.testing.assert_close(*outs)
    for got, right in zip(
        *(torch.autograd.grad(o, (q, k, v), upstream) for o in outs), strict=True
    ):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [33, 65])
def test_broadcast_keys_and_values(length):
    """Sk % 32 == 1 with stride-0 key and value gave wrong outputs (pytorch#191937)."""
    q, k, v = given((2, 3, 8, 16), (1, 3, length, 16), (1, 3, length, 16), dtype=torch.bfloat16)
    mask = bits(2, 1, 8, length)
    k, v = (t.detach().expand(2, -1, -1, -1) for t in (k, v))
    torch.testing.assert_close(sdpa(q, k, v, mask), torch_math(q, k, v, attn_mask=mask))


@pytest.mark.parametrize("mask", [None, "bool", "float", "half"])
def test_autocast(mask):
    """As in torch: query, key, value and a half-precision mask become bfloat16."""
    q = torch.randn(2, 4, 5, 8, dtype=torch.bfloat16)
    k, v = torch.randn(2, 4, 7, 8), torch.randn(2, 4, 7, 6)
    masks_by_name = {
        "bool": bits(5, 7),
        "float": torch.randn(5, 7),
        "half": torch.randn(5, 7).half(),
    }
    attn_mask = masks_by_name.get(mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, truth = sdpa(q, k, v, attn_mask), torch_math(q, k, v, attn_mask=attn_mask)
        assert tilemask.attention(k, k, v).dtype == torch.bfloat16
        assert sdpa(k.double(), k.double(), v.double()).dtype == torch.float64
    assert got.dtype == truth.dtype == torch.bfloat16
    torch.testing.assert_close(got, truth, rtol=0.02, atol=0.02)  # torch rounds every step


def test_second_derivatives():
    """Through the mask too: torch has them on its math path alone."""
    tensors = given((1, 2, 3, 2), (1, 2, 4, 2), (1, 2, 4, 2))
    bias = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)

    def function(q, k, v, bias):
        return sdpa(q, k, v, bias, is_causal=True)

    assert torch.autograd.gradgradcheck(function, (*tensors, bias))


def test_inputs_stay_as_they_are():
    tensors = given((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 6))
    mask = torch.randn(5, 7, dtype=torch.float64)
    before = [t.detach().clone() for t in (*tensors, mask)]
    sdpa(*tensors, mask, is_causal=True, dropout_p=0.1).sum().backward()
    for now, then in zip((*tensors, mask), before, strict=True):
        assert torch.equal(now, then)
