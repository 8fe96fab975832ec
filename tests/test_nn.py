"""tilemask.nn against torch.nn: MultiheadAttention over its options, and replaced models."""

import copy
import functools
import gc
import io
import itertools
import pickle
import sys
import warnings
import weakref

import published
import pytest
import torch

import tilemask
from tilemask import masks, nn
from tilemask.nn import MultiheadAttention, replace_attention

B, H, L, S, E = 2, 4, 5, 7, 16
close = torch.testing.assert_close


@pytest.fixture
def calls(monkeypatch):
    """The calls that reach tilemask's attention()."""
    module, seen = sys.modules["tilemask.attention"], []
    attend = module.attend
    monkeypatch.setattr(
        module, "attend", lambda call, name: (seen.append(call), attend(call, name))[1]
    )
    return seen


def pair(*args, **options):
    """torch's module and ours, with the same random parameters, float64."""
    stock = torch.nn.MultiheadAttention(*args, **options).double()
    ours = MultiheadAttention(*args, **options).double()
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.normal_()
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def tensors(*shapes):
    return [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]


def outcome(module, args, options):
    """Output, weights and the gradients of inputs, masks and parameters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # masks of two types
        out, weights = module(*args, **options)
    given = [out] if weights is None else [out, weights]
    leaves = list({id(t): t for t in (*args, *options.values()) if wants(t)}.values())
    torch.manual_seed(1)
    upstream = [torch.randn(t.shape, dtype=t.dtype) for t in given]
    leaves += module.parameters()
    return out, weights, torch.autograd.grad(given, leaves, upstream, allow_unused=True)


def wants(t):
    return torch.is_tensor(t) and t.requires_grad


def same(stock, ours, *args, **options):
    close(outcome(ours, args, options), outcome(stock, args, options), rtol=1e-9, atol=1e-11)


# -- the module -----------------------------------------------------------------------------------

BUILDS = {
    "plain": {},
    "no bias": {"bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
    "both, no bias": {"add_bias_kv": True, "add_zero_attn": True, "bias": False},
    "widths": {"kdim": 12, "vdim": 10},
    "widths, no bias": {"kdim": 12, "bias": False},
    "widths, bias_kv": {"vdim": 10, "add_bias_kv": True},
    "one head": {"num_heads": 1},
}

PADDING = torch.arange(S) >= torch.tensor([S, 4])[:, None]  # True = padded
HOLES = torch.tensor([[0, 1, 0, 0, 1, 0, 0], [1, 0, 0, 0, 0, 0, 1]]).bool()
BLOCKED = torch.rand(B * H, L, S, generator=torch.Generator().manual_seed(7)) < 0.3
BLOCKED[..., 2] = False  # every row sees something: torch gives NaN where one does not


def floats(blocked, finite=True):
    zeros = torch.randn(blocked.shape) if finite else torch.zeros(blocked.shape)
    return zeros.double().masked_fill(blocked, -torch.inf)


MASKS = {
    "none": {},
    "padding": {"key_padding_mask": PADDING},
    "holes": {"key_padding_mask": HOLES},
    "float padding": {"key_padding_mask": floats(HOLES)},
    "(L, S)": {"attn_mask": BLOCKED[0]},
    "float (L, S)": {"attn_mask": floats(BLOCKED[0])},
    "(N * H, L, S)": {"attn_mask": BLOCKED},
    "float (N * H, L, S)": {"attn_mask": floats(BLOCKED)},
    "expanded": {"attn_mask": BLOCKED[0].expand(B * H, L, S)},
    "expanded rows": {"attn_mask": HOLES[0].expand(B * H, L, S)},
    "both": {"key_padding_mask": PADDING, "attn_mask": BLOCKED},
    "both float": {"key_padding_mask": floats(PADDING), "attn_mask": floats(BLOCKED)},
    "float and bool": {"key_padding_mask": PADDING, "attn_mask": floats(BLOCKED[0], False)},
    "bool and float": {"key_padding_mask": floats(PADDING), "attn_mask": BLOCKED[0]},
}


@pytest.mark.parametrize("masked", MASKS)
@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "length first"])
def test_options(build, masked, batch_first):
    """Output, weights averaged and by heads, and every gradient."""
    options = {"num_heads": H} | BUILDS[build] | {"batch_first": batch_first}
    heads = options["num_heads"]
    stock, ours = pair(E, **options)
    given = tensors((B, L, E), (B, S, stock.kdim), (B, S, stock.vdim))
    if not batch_first:
        given = [t.detach().transpose(0, 1).requires_grad_() for t in given]
    said = dict(MASKS[masked])
    if "attn_mask" in said and said["attn_mask"].dim() == 3:
        said["attn_mask"] = said["attn_mask"][: B * heads]
    for name, mask in said.items():
        if mask.is_floating_point():
            said[name] = mask.detach().clone().requires_grad_()
    for need in ({"need_weights": False}, {}, {"average_attn_weights": False}):
        same(stock, ours, *given, **said, **need)


@pytest.mark.parametrize("build", BUILDS)
def test_without_batch(build):
    options = {"num_heads": H} | BUILDS[build]
    stock, ours = pair(E, **options, batch_first=True)
    given = tensors((L, E), (S, stock.kdim), (S, stock.vdim))
    heads = options["num_heads"]
    for said in (
        {},
        {"key_padding_mask": PADDING[1]},
        {"attn_mask": BLOCKED[0]},
        {"attn_mask": BLOCKED[:heads], "key_padding_mask": PADDING[1]},
        {"attn_mask": floats(BLOCKED[0]), "key_padding_mask": floats(PADDING[1])},
    ):
        for need in ({"need_weights": False}, {}, {"average_attn_weights": False}):
            same(stock, ours, *given, **said, **need)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_self_attention_and_memory(batch_first, bias):
    """One tensor given three times, or twice: projected in one go."""
    stock, ours = pair(E, H, bias=bias, batch_first=batch_first)
    x, memory = tensors((B, S, E), (B, S, E))
    same(stock, ours, x, x, x)
    same(stock, ours, x, memory, memory)
    same(stock, ours, x, x, memory)
    same(stock, ours, x, memory, x)


def test_empty_batch_and_one_token():
    stock, ours = pair(E, H, batch_first=True)
    for shape in ((0, S, E), (B, 1, E)):
        (x,) = tensors(shape)
        same(stock, ours, x, x, x, need_weights=False)


def test_heads_are_views(calls):
    """Projections are read where they are, [B, L, H, D] inside one matrix."""
    for batch_first in (True, False):
        module = MultiheadAttention(E, H, batch_first=batch_first)
        x = torch.randn(B, S, E)
        module(x, x, x, need_weights=False)
        call = calls.pop()
        storages = {t.untyped_storage().data_ptr() for t in (call.q, call.k, call.v)}
        assert len(storages) == 1 and call.q.stride(-1) == 1


def test_masks_stay_separate(calls):
    """A padding mask is one bit per key, whatever comes with it; nothing is [N * H, L, S]."""
    module = MultiheadAttention(E, H, batch_first=True)
    x, memory = torch.randn(B, L, E), torch.randn(B, S, E)
    attend = functools.partial(module, x, memory, memory, need_weights=False)
    attend(key_padding_mask=PADDING, attn_mask=BLOCKED[0])
    attend(key_padding_mask=PADDING, attn_mask=BLOCKED)
    attend(key_padding_mask=PADDING, attn_mask=floats(BLOCKED[0], False).float())
    attend(key_padding_mask=floats(PADDING).float())
    for call in calls:
        assert call.mask.key_bits.shape == (B, 1, 1, S)
    assert calls[0].mask.bits.shape == (1, 1, L, S) and calls[0].bias is None
    assert calls[1].mask.bits.shape == (B, H, L, S) and calls[1].bias is None
    assert calls[2].mask.bits is None and calls[2].bias.shape == (1, 1, 1, L, S)
    assert calls[3].mask.bits is None and calls[3].bias.shape == (B, 1, 1, 1, S)


def test_layers_share_masks(calls):
    """One lowered form for all layers that get the same tensors; a written mask is read again."""
    module = MultiheadAttention(E, H, batch_first=True)
    x = torch.randn(B, S, E)
    padding, blocked = PADDING.clone(), torch.rand(S, S) < 0.3
    run = functools.partial(
        module, x, x, x, key_padding_mask=padding, attn_mask=blocked, need_weights=False
    )
    run(), run()
    assert calls[0].mask is calls[1].mask
    blocked[:] = False
    blocked[0, 1:] = True
    out = run()[0]
    assert calls[2].mask is not calls[0].mask
    with masks.caching(False):
        close(run()[0], out)
    kept = weakref.ref(blocked)
    del blocked, run
    calls.clear()
    gc.collect()
    assert kept() is None


def test_state_dict():
    for options in BUILDS.values():
        stock, ours = pair(E, **{"num_heads": H} | options)
        assert list(stock.state_dict()) == list(ours.state_dict())
        stock.load_state_dict(ours.state_dict())
        assert isinstance(ours, torch.nn.MultiheadAttention)
        ours._reset_parameters()
    torch.manual_seed(3)
    stock = torch.nn.MultiheadAttention(E, H, add_bias_kv=True)
    torch.manual_seed(3)
    close(MultiheadAttention(E, H, add_bias_kv=True).state_dict(), stock.state_dict())


def test_copies():
    stock, ours = pair(E, H, batch_first=True)
    (x,) = tensors((B, S, E))
    saved = io.BytesIO()
    torch.save(ours, saved)
    saved.seek(0)
    for other in (
        copy.deepcopy(ours),
        pickle.loads(pickle.dumps(ours)),
        torch.load(saved, weights_only=False),
    ):
        assert type(other) is MultiheadAttention
        same(stock, other, x, x, x)


def test_double_backward():
    _, ours = pair(E, H, batch_first=True)
    x, memory = tensors((1, 2, E), (1, 3, E))

    def attend(x, memory):
        return ours(x, memory, memory, key_padding_mask=torch.tensor([[False, True, False]]))

    assert torch.autograd.gradgradcheck(attend, (x, memory))


def test_weights_gradient_on_demand():
    """Weights of a backend without their gradient: the reference gives it when it is asked for."""
    q, k = (torch.randn(B, H, n, 8, dtype=torch.float64, requires_grad=True) for n in (L, S))
    bias = torch.randn(L, S, dtype=torch.float64, requires_grad=True)
    options = {
        "mask": masks.padding(keep=~PADDING),
        "dropout_p": 0.3,
        "dropout_seed": torch.tensor([5]),
    }
    for reduce in (None, "mean_heads"):
        truth = tilemask.attention_weights(q, k, bias=bias, reduce=reduce, **options)
        got = nn.Weights.apply(q, k, bias, reduce, options)
        close(got, truth)
        upstream = torch.randn_like(truth)
        for leaves in ((q, k, bias), (k,)):
            right, mine = (
                torch.autograd.grad(o, leaves, upstream, retain_graph=True) for o in (truth, got)
            )
            close(mine, right)
    assert torch.autograd.gradgradcheck(
        lambda q, k, bias: nn.Weights.apply(q, k, bias, "mean_heads", options), (q, k, bias)
    )


# -- rows that see nothing ------------------------------------------------------------------------


@pytest.mark.parametrize("need_weights", [False, True])
def test_sequence_that_is_all_padding(need_weights):
    """The output of a zero vector, weights 0 and finite gradients; the others are torch's."""
    stock, ours = pair(E, H, batch_first=True)
    x, memory = tensors((B, L, E), (B, S, E))
    padding = torch.stack([PADDING[1], torch.ones(S, dtype=torch.bool)])
    for mask in (padding, floats(padding)):
        out, weights, gradients = outcome(
            ours, (x, memory, memory), {"key_padding_mask": mask, "need_weights": need_weights}
        )
        close(out[1], ours.out_proj.bias.expand(L, E))
        truth = stock(x[:1], memory[:1], memory[:1], key_padding_mask=mask[:1])
        close(out[:1], truth[0])
        if need_weights:
            close(weights[:1], truth[1])
            assert not weights[1].any()
        assert all(g.isfinite().all() for g in gradients)
        assert not gradients[0][1].any() and not gradients[1][1].any()


def test_row_that_is_all_blocked():
    _, ours = pair(E, H, batch_first=True)
    (x,) = tensors((B, S, E))
    blocked = torch.eye(S).bool()
    blocked[3] = True
    for mask in (blocked, floats(blocked)):
        out, weights, gradients = outcome(ours, (x, x, x), {"attn_mask": mask})
        close(out[:, 3], ours.out_proj.bias.expand(B, E))
        assert not weights[:, 3].any() and all(g.isfinite().all() for g in gradients)


def test_nan_in_padding_does_not_leak():
    """Nothing of what padding leaves out reaches attention's result."""
    _, ours = pair(E, H, batch_first=True)
    x, memory = tensors((B, L, E), (B, S, E))
    dirty = memory.detach().clone()
    dirty[1, 4:] = torch.nan
    out, weights = ours(x, dirty, dirty, key_padding_mask=PADDING)
    close((out, weights), ours(x, memory, memory, key_padding_mask=PADDING))


# -- causal ---------------------------------------------------------------------------------------


def subsequent(length, dtype=torch.float64):
    return torch.nn.Transformer.generate_square_subsequent_mask(length, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bool])
@pytest.mark.parametrize("padding", [None, PADDING], ids=["", "padding"])
def test_causal_hint(dtype, padding, calls):
    """The mask need not be read."""
    stock, ours = pair(E, H, batch_first=True)
    (x,) = tensors((B, S, E))
    mask = subsequent(S) if dtype != torch.bool else torch.ones(S, S).triu(1).bool()
    for need in (False, True):
        options = {"key_padding_mask": padding, "need_weights": need, "is_causal": True}
        same(stock, ours, x, x, x, attn_mask=mask, **options)
        close(ours(x, x, x, **options), ours(x, x, x, attn_mask=mask, **options))  # needs no mask
    for call in calls:
        assert call.mask.bits is None and call.bias is None


def test_wrong_causal_hint(calls):
    """Where torch reads the mask, so do we."""
    stock, ours = pair(E, H, batch_first=True)
    (x,) = tensors((B, S, E))
    blocked = torch.eye(S).bool()
    for mask in (blocked, floats(blocked), blocked.expand(B * H, S, S)):
        same(stock, ours, x, x, x, attn_mask=mask, is_causal=True)
        same(stock, ours, x, x, x, PADDING, attn_mask=mask, is_causal=True, need_weights=False)


def test_causal_with_extra_keys():
    """bias_k and the zero key are seen by every row."""
    for options in ({"add_bias_kv": True}, {"add_zero_attn": True}):
        stock, ours = pair(E, H, batch_first=True, **options)
        (x,) = tensors((B, S, E))
        mask = torch.ones(S, S).triu(1).bool()
        same(stock, ours, x, x, x, attn_mask=mask, is_causal=True)
        weights = ours(x, x, x, is_causal=True)[1]
        close(weights, stock(x, x, x, attn_mask=mask)[1])


def test_trained_mask_is_read_in_spite_of_the_hint():
    _, ours = pair(E, H, batch_first=True)
    (x,) = tensors((B, S, E))
    mask = subsequent(S).requires_grad_()
    out, _ = ours(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)
    assert torch.autograd.grad(out.sum(), mask)[0].any()


# -- dropout, precision, tracing ------------------------------------------------------------------


def test_dropout():
    """In training only; the weights are those that made the output, and the seed is torch's."""
    module = MultiheadAttention(E, H, dropout=0.4, batch_first=True).double()
    with torch.no_grad():
        module.in_proj_weight[2 * E :] = torch.eye(E)
        module.in_proj_bias.zero_()
        module.out_proj.weight[:] = torch.eye(E)
        module.out_proj.bias.zero_()
    (x,) = tensors((B, S, E))
    torch.manual_seed(11)
    out, weights = module(x, x, x, key_padding_mask=PADDING, average_attn_weights=False)
    values = x.unflatten(-1, (H, -1)).transpose(1, 2)
    close(out, (weights @ values).transpose(1, 2).flatten(2))
    dropped = (weights == 0) & ~PADDING[:, None, None, :]
    assert 0.2 < dropped.double().sum() / (~PADDING).sum() / (H * S) < 0.6
    torch.manual_seed(11)
    close(module(x, x, x, key_padding_mask=PADDING)[1], weights.mean(1))
    assert not torch.equal(module(x, x, x)[0], module(x, x, x)[0])
    module.eval()
    close(module(x, x, x)[0], module(x, x, x)[0], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half(dtype):
    stock, ours = pair(E, H, batch_first=True)
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter *= 0.3
    ours.load_state_dict(stock.state_dict())
    stock, ours = stock.to(dtype), ours.to(dtype)
    x = torch.randn(B, S, E, dtype=dtype)
    for mask in (None, subsequent(S, dtype), subsequent(S, torch.float32)):
        out, weights = ours(x, x, x, attn_mask=mask)
        right = stock(x, x, x, attn_mask=None if mask is None else mask.to(dtype))
        assert out.dtype == weights.dtype == dtype
        close((out, weights), right, rtol=0.03, atol=0.03)


def test_autocast():
    stock, ours = pair(E, H, batch_first=True, add_bias_kv=True)
    stock, ours, x = stock.float(), ours.float(), torch.randn(B, S, E)
    with torch.autocast("cpu", torch.bfloat16):
        out, weights = ours(x, x, x, key_padding_mask=PADDING)
        right = stock(x, x, x, key_padding_mask=PADDING)
    assert out.dtype == torch.bfloat16
    close((out, weights), right, rtol=0.05, atol=0.5, check_dtype=False)
    out.sum().backward()


@pytest.mark.parametrize("need_weights", [False, True])
def test_compiled(need_weights):
    torch._dynamo.reset()
    _, ours = pair(E, H, batch_first=True)
    (x,) = tensors((B, S, E))

    def run(x, padding, mask):
        return ours(x, x, x, padding, need_weights, mask, is_causal=mask is None)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for mask in (None, torch.rand(S, S) < 0.3, subsequent(S)):
        got, truth = (f(x, PADDING, mask) for f in (compiled, run))
        close(got, truth)
        upstream = torch.randn_like(truth[0])
        close(*(torch.autograd.grad(o[0], x, upstream, retain_graph=True) for o in (got, truth)))


def test_inference_mode():
    _, ours = pair(E, H, batch_first=True)
    (x,) = tensors((B, S, E))
    truth = ours(x, x, x, key_padding_mask=PADDING)
    with torch.inference_mode():
        close(ours(x, x, x, key_padding_mask=PADDING.clone()), truth)
        close(ours(x, x, x, key_padding_mask=PADDING), truth)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested(layout):
    """As torch's fast path takes them."""
    stock, ours = pair(E, H, batch_first=True)
    parts = [torch.randn(n, E, dtype=torch.float64) for n in (S, 4)]
    nested = torch.nested.nested_tensor(parts, layout=layout)
    out, weights = ours.eval()(nested, nested, nested)
    assert out.is_nested and out.layout == layout and weights.shape == (B, S, S)
    for got, part in zip(out.unbind(), parts, strict=True):
        close(got, stock(part, part, part)[0])
    with pytest.raises(TypeError, match="key_padding_mask"):
        ours(nested, nested, nested, PADDING)


REFUSED = {
    "integers": ({"key_padding_mask": PADDING.long()}, TypeError, "key_padding_mask must be"),
    "padding (S, N)": ({"key_padding_mask": PADDING.T}, ValueError, r"\(N, S\) = \(2, 7\)"),
    "mask (S, L)": ({"attn_mask": BLOCKED[0].T}, ValueError, r"expected \(L, S\) = \(5, 7\)"),
    "mask per batch": ({"attn_mask": BLOCKED[:B]}, ValueError, r"num_heads, L, S\) = \(8, 5, 7\)"),
    "mask per head": ({"attn_mask": BLOCKED.unflatten(0, (B, H))}, ValueError, "attn_mask"),
    "half mask": ({"attn_mask": BLOCKED[0].half()}, TypeError, "float masks must be float32"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_errors(name):
    options, error, message = REFUSED[name]
    _, ours = pair(E, H, batch_first=True)
    x, memory = tensors((B, L, E), (B, S, E))
    with pytest.raises(error, match=message):
        ours(x, memory, memory, **options)


def test_errors_of_shapes():
    _, ours = pair(E, H, batch_first=True)
    x, memory = tensors((B, L, E), (B, S, E))
    with pytest.raises(ValueError, match="all be batched"):
        ours(x, memory[0], memory[0])
    with pytest.raises(ValueError, match="differ in length"):
        ours(x, memory, x)


# -- models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", published.MODULES)
@pytest.mark.parametrize(
    "training, grad", [(True, True), (False, True), (False, False)], ids=["train", "eval", "infer"]
)
def test_published_samples(name, training, grad):
    """PyTorch's own sample inputs, before and after replacing."""
    count = 0
    for module, args, kwargs in published.module_samples(name, training, grad):
        parameters = list(module.parameters())
        run = functools.partial(published.results, module, args, kwargs, parameters, grad)
        truth = run()
        with replace_attention(module) as replaced:
            got = run()
        assert replaced.modules
        close(got, truth)
        count += 1
    assert count


def transformer(**options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors would need batches first
        made = torch.nn.Transformer(E, H, 2, 2, 32, **{"dropout": 0.0} | options)
    return made.double()


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_transformer(batch_first, norm_first, training, calls):
    model = transformer(batch_first=batch_first, norm_first=norm_first).train(training)
    src, tgt = tensors((B, S, E), (B, L, E))
    if not batch_first:
        src, tgt = src.transpose(0, 1), tgt.transpose(0, 1)
    for grad, tgt_mask in itertools.product((True, False), (subsequent(L), None)):
        options = {
            "tgt_mask": tgt_mask,
            "src_key_padding_mask": PADDING,
            "memory_key_padding_mask": PADDING,
        }
        with torch.set_grad_enabled(grad):
            truth = model(src, tgt, **options)
            calls.clear()
            with replace_attention(model) as replaced:
                got = model(src, tgt, **options)
            assert len(replaced.modules) == len(calls) == 6
            close(got, truth)
    padded = [call.mask.key_bits is not None for call in calls]
    assert padded == [True, True, False, True, False, True]
    assert all(call.bias is None and call.mask.bits is None for call in calls)


def test_causal_encoder(calls):
    """A model that is an encoder with a causal mask and padding: both reach attention as said."""
    layer = torch.nn.TransformerEncoderLayer(E, H, 32, 0.0, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 2).double()
    (x,) = tensors((B, S, E))
    for mask in (subsequent(S), torch.ones(S, S).triu(1).bool()):
        padding = PADDING if mask.dtype == torch.bool else floats(PADDING, False)
        truth = model(x, mask, padding)
        calls.clear()
        with replace_attention(model):
            close(model(x, mask, padding), truth)
            close(model(x, mask, PADDING), truth)
        assert len(calls) == 4
        for call in calls:
            assert call.mask.key_bits is not None and call.mask.bits is None
            assert call.bias is None or call.bias.shape[-2] == 1


def test_fast_paths_are_not_taken(calls):
    """In inference, with layers and encoders of torch's around our module, too."""
    layer = torch.nn.TransformerEncoderLayer(E, H, 32, 0.0, batch_first=True).double().eval()
    (x,) = tensors((B, S, E))
    with torch.no_grad():
        truth = layer(x, src_key_padding_mask=PADDING)
        ours = MultiheadAttention(E, H, batch_first=True).double().eval()
        ours.load_state_dict(layer.self_attn.state_dict())
        layer.self_attn = ours
        close(layer(x, src_key_padding_mask=PADDING), truth)
        assert len(calls) == 1
        encoder = torch.nn.TransformerEncoder(layer, 2)  # makes nested tensors
        got = encoder(x, src_key_padding_mask=PADDING)
        assert len(calls) == 3
        with replace_attention(encoder) as replaced:
            close(encoder(x, src_key_padding_mask=PADDING), got)
        assert not replaced.modules


def test_inference_of_padded_sequences():
    model = torch.nn.TransformerEncoder(
        torch.nn.TransformerEncoderLayer(E, H, 32, 0.0, batch_first=True), 1
    ).eval()
    x = torch.randn(B, S, E)
    padding = torch.stack([PADDING[1], torch.ones(S, dtype=torch.bool)])
    with torch.no_grad(), replace_attention(model):
        out = model(x, src_key_padding_mask=padding)
        assert out.isfinite().all() and not out[padding].any()
        left = padding.flip(1)  # no nested tensors in torch: nothing is set to 0
        assert model(x, src_key_padding_mask=left)[0, 0].any()


def test_parameters_hooks_and_modes_stay():
    model = transformer(batch_first=True).eval()
    attention = model.encoder.layers[0].self_attn
    seen = []
    attention.register_forward_hook(lambda *_: seen.append("after"))
    attention.register_forward_pre_hook(lambda *_: seen.append("before"))
    before = {name: id(p) for name, p in model.named_parameters()}
    types = {name: type(m) for name, m in model.named_modules()}
    hooks = {name: list(m._forward_pre_hooks) for name, m in model.named_modules()}
    replaced = replace_attention(model)
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert model.encoder.layers[0].self_attn is attention and not attention.training
    assert type(attention) is MultiheadAttention and attention.batch_first
    src, tgt = tensors((B, S, E), (B, L, E))
    model(src, tgt)
    assert sorted(seen) == ["after", "before"]
    assert len(replaced.modules) == 6
    replaced.undo()
    replaced.undo()
    assert {name: type(m) for name, m in model.named_modules()} == types
    assert {name: list(m._forward_pre_hooks) for name, m in model.named_modules()} == hooks


def test_replacing_twice():
    model = transformer()
    with replace_attention(model):
        with replace_attention(model) as second:
            assert not second.modules
        assert type(model.encoder.layers[0].self_attn) is MultiheadAttention
    assert type(model.encoder.layers[0].self_attn) is torch.nn.MultiheadAttention


def test_the_model_itself_and_shared_modules():
    attention = torch.nn.MultiheadAttention(E, H)
    with replace_attention(attention) as replaced:
        assert replaced.modules == [attention] and type(attention) is MultiheadAttention
    assert type(attention) is torch.nn.MultiheadAttention
    model = torch.nn.ModuleList([attention, attention])
    with replace_attention(model) as replaced:
        assert len(replaced.modules) == 1 and model[0] is model[1]


class Named(torch.nn.MultiheadAttention):
    def forward(self, *args, **options):
        out, weights = super().forward(*args, **options)
        return 2 * out, weights


class Layer(torch.nn.TransformerEncoderLayer):
    def forward(self, *args, **options):
        return super().forward(*args, **options) + 1


def test_subclasses(calls):
    """They keep what they override; their super() is ours."""
    model = Layer(E, H, 32, 0.0, batch_first=True).double().eval()
    model.self_attn.__class__ = Named
    (x,) = tensors((B, S, E))
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            truth = model.train()(x, src_key_padding_mask=PADDING)
            replaced = replace_attention(model)
            for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
                calls.clear()
                close(other.eval()(x, src_key_padding_mask=PADDING), truth)
                assert len(calls) == 1
                assert isinstance(other, Layer) and isinstance(other.self_attn, Named)
            replaced.undo()
            assert type(model) is Layer and type(model.self_attn) is Named


def test_copies_of_replaced_models():
    model = transformer(batch_first=True)
    src, tgt = tensors((B, S, E), (B, L, E))
    truth = model(src, tgt)
    replaced = replace_attention(model)
    others = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    replaced.undo()
    for other in others:
        assert type(other.decoder.layers[1].multihead_attn) is MultiheadAttention
        close(other(src, tgt), truth)


def test_compiled_model():
    torch._dynamo.reset()
    model = transformer(batch_first=True)
    src, tgt = tensors((B, S, E), (B, L, E))
    mask = subsequent(L)

    def run(src, tgt):
        return model(
            src, tgt, tgt_mask=mask, src_key_padding_mask=PADDING, tgt_is_causal=True,
            memory_key_padding_mask=PADDING,
        )  # fmt: skip

    truth = run(src, tgt)
    with replace_attention(model):
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        got = compiled(src, tgt)
        close(got, truth)
        close(*(torch.autograd.grad(o.sum(), src, retain_graph=True) for o in (got, truth)))


def test_what_drop_in_says_of_added_keys():
    """torch: hidden with the hint and need_weights=False, seen without; ours: seen."""
    stock, ours = pair(E, H, batch_first=True, add_bias_kv=True)
    (x,) = tensors((B, S, E))
    mask = torch.ones(S, S).triu(1).bool()
    truth = stock(x, x, x, attn_mask=mask)[0]
    options = {"attn_mask": mask, "is_causal": True, "need_weights": False}
    assert (stock(x, x, x, **options)[0] - truth).abs().max() > 0.1
    close(ours(x, x, x, **options)[0], truth)
