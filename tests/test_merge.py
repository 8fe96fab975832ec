"""merge_states(): attention over parts of the keys, merged, is attention over all of them."""

import itertools

import pytest
import torch

import tilemask
from tilemask import masks, merge_states

B, H, LQ, LK, D, DV = 2, 3, 7, 24, 8, 5
CUTS = (0, 5, 6, 17, LK)  # the parts of the keys


def inputs(dtype=torch.float64, **options):
    shapes = (LQ, D), (LK, D), (LK, DV)
    return [torch.randn(B, H, *shape, dtype=dtype, **options) for shape in shapes]


def with_keys(mask, first, last):
    """The part of a mask's bits that belongs to the keys from ``first`` to ``last``."""
    return masks.dense(mask.to_dense(B, H, LQ, LK)[..., first:last])


def states(q, k, v, mask, cuts=CUTS, **options):
    for first, last in itertools.pairwise(cuts):
        yield tilemask.attention(
            q,
            k[:, :, first:last],
            v[:, :, first:last],
            mask=with_keys(mask, first, last),
            return_lse=True,
            **options,
        )


def left_fold(parts):
    out, lse = parts[0]
    for part in parts[1:]:
        out, lse = merge_states(out, lse, *part)
    return out, lse


def right_fold(parts):
    out, lse = parts[-1]
    for part in parts[-2::-1]:
        out, lse = merge_states(*part, out, lse)
    return out, lse


def tree(parts):
    if len(parts) == 1:
        return parts[0]
    half = len(parts) // 2
    return merge_states(*tree(parts[:half]), *tree(parts[half:]))


MASKS = {
    "everything": masks.padding([LK, LK]),
    "causal": masks.causal(),
    "lower right": masks.causal(align="lower_right"),
    "window": masks.window(3, 0, offset=9),
    "padding": masks.padding([13, 0], query_lengths=[LQ, 3]),
    "holes": masks.padding(keep=torch.rand(B, LK, generator=torch.manual_seed(1)) > 0.5),
    "random": masks.dense(torch.rand(B, H, LQ, LK, generator=torch.manual_seed(2)) > 0.7),
}


@pytest.mark.parametrize("order", [left_fold, right_fold, tree], ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", MASKS)
def test_parts_in_any_order_make_the_whole(kind, order):
    q, k, v = inputs()
    out, lse = order(list(states(q, k, v, MASKS[kind], softcap=3.0)))
    expected = tilemask.attention(q, k, v, mask=MASKS[kind], softcap=3.0, return_lse=True)
    torch.testing.assert_close(out, expected[0])
    torch.testing.assert_close(lse, expected[1])
    dead = ~MASKS[kind].to_dense(B, H, LQ, LK).any(-1)
    assert (out[dead] == 0).all() and (lse[dead] == -torch.inf).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rounds_once(dtype):
    """Computed in float32: the result is the rounding of the exact merge of what came in."""
    out1, out2 = torch.randn(2, B, H, LQ, DV).to(dtype)
    lse1, lse2 = torch.randn(2, B, H, LQ)
    out, lse = merge_states(out1, lse1, out2, lse2)
    exact, exact_lse = merge_states(out1.double(), lse1.double(), out2.double(), lse2.double())
    assert out.dtype == dtype and lse.dtype == torch.float32
    near = exact.float().to(dtype)
    tiny = {torch.float32: 4e-7}.get(dtype, 0)
    close = (out == near) | ((out - near).abs() <= tiny)
    assert close.float().mean() > 0.99  # ties apart
    torch.testing.assert_close(lse, exact_lse.float())


def test_dead_rows_take_the_other_part_bit_for_bit():
    out, lse = torch.randn(B, H, LQ, DV), torch.randn(B, H, LQ) * 50
    nothing, empty = torch.zeros_like(out), torch.full_like(lse, -torch.inf)
    for mark in (-torch.inf, torch.inf):  # ours, flash-attn's
        empty.fill_(mark)
        for got in (merge_states(out, lse, nothing, empty), merge_states(nothing, empty, out, lse)):
            assert torch.equal(got[0], out) and torch.equal(got[1], lse)
        both = merge_states(nothing, empty, nothing, empty)
        assert (both[0] == 0).all() and (both[1] == -torch.inf).all()


@pytest.mark.parametrize("far", [100.0, 1e4, 3e38])
def test_far_apart(far):
    out1, out2 = torch.randn(2, B, H, LQ, DV)
    lse = torch.zeros(B, H, LQ)
    for signs in ((1, -1), (-1, 1)):
        out, merged = merge_states(out1, lse + signs[0] * far, out2, lse + signs[1] * far)
        assert torch.equal(out, out1 if signs[0] > 0 else out2)
        assert torch.equal(merged, lse + far)


def test_gradients():
    def dead(lse):
        return lse.clone().index_fill_(2, torch.tensor([1]), -torch.inf)

    arguments = [
        torch.randn(1, 2, 3, *last, dtype=torch.float64, requires_grad=True)
        for last in ((DV,), (), (DV,), ())
    ]
    assert torch.autograd.gradcheck(merge_states, arguments)
    assert torch.autograd.gradgradcheck(merge_states, arguments)
    out1, lse1, out2, lse2 = arguments
    for first, second in ((dead(lse1), lse2), (lse1, dead(lse2)), (dead(lse1), dead(lse2))):
        merged = merge_states(out1, first, out2, second)
        loss = merged[0].square().sum() + merged[1].masked_fill(merged[1].isinf(), 0).sum()
        for grad in torch.autograd.grad(loss, arguments):
            assert grad.isfinite().all()


def test_gradients_of_split_attention():
    q, k, v = inputs(requires_grad=True)
    mask = MASKS["random"]
    dout, dlse = torch.randn(B, H, LQ, DV), torch.randn(B, H, LQ)
    found = []
    for out, lse in (
        tree(list(states(q, k, v, mask))),
        tilemask.attention(q, k, v, mask=mask, return_lse=True),
    ):
        alive = lse.masked_fill(lse == -torch.inf, 0)
        found.append(torch.autograd.grad((out * dout).sum() + (alive * dlse).sum(), (q, k, v)))
    torch.testing.assert_close(*found)


def test_a_sink_belongs_in_one_part():
    q, k, v = inputs()
    sinks = torch.randn(H, dtype=torch.float64)
    first, second = slice(0, 9), slice(9, LK)
    parts = [
        tilemask.attention(q, k[:, :, s], v[:, :, s], sinks=given, return_lse=True)
        for s, given in ((first, sinks), (second, None))
    ]
    expected = tilemask.attention(q, k, v, sinks=sinks, return_lse=True)
    torch.testing.assert_close(merge_states(*parts[0], *parts[1]), expected)
    twice = tilemask.attention(q, k[:, :, second], v[:, :, second], sinks=sinks, return_lse=True)
    assert not torch.allclose(merge_states(*parts[0], *twice)[1], expected[1])


def test_other_shapes_and_compilation():
    out, lse = torch.randn(6, 2, 4), torch.randn(6, 2)  # packed: [T, H, D]
    merged = merge_states(out, lse, out, lse)
    torch.testing.assert_close(merged, (out, lse + torch.log(torch.tensor(2.0))))
    compiled = torch.compile(merge_states, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(out, lse, out, lse), merged)
    empty = merge_states(out[:0], lse[:0], out[:0], lse[:0])
    assert empty[0].shape == (0, 2, 4) and empty[1].shape == (0, 2)


OUT, LSE = torch.zeros(B, H, LQ, DV), torch.zeros(B, H, LQ)


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ((None, LSE, OUT, LSE), TypeError, "out1"),
        ((OUT, LSE, OUT.long(), LSE), TypeError, "out2"),
        ((OUT, LSE.half(), OUT, LSE), TypeError, "lse1"),
        ((OUT, LSE, OUT, 1.0), TypeError, "lse2"),
        ((OUT, LSE[..., None], OUT, LSE), ValueError, "lse1"),
        ((OUT, LSE, OUT, LSE.transpose(1, 2)), ValueError, "lse2"),
        ((OUT, LSE, OUT.half(), LSE), ValueError, "out1 and out2"),
        ((OUT, LSE, OUT[:1], LSE[:1]), ValueError, "out1 and out2"),
        ((OUT, LSE.to("meta"), OUT, LSE), ValueError, "lse1"),
    ],
)
def test_errors_name_the_argument(arguments, error, words):
    with pytest.raises(error, match=words):
        merge_states(*arguments)
