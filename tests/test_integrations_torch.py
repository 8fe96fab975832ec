"""patch(): torch's scaled_dot_product_attention and attention modules, routed through tilemask."""

import functools
import subprocess
import sys
import threading

import published
import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.nn.attention.bias import causal_lower_right

from tilemask.integrations import torch as integration
from tilemask.integrations.torch import patch

STOCK = F.scaled_dot_product_attention


@pytest.fixture
def calls(monkeypatch):
    """The calls that reach tilemask's attention()."""
    module, seen = sys.modules["tilemask.attention"], []
    attend = module.attend
    monkeypatch.setattr(
        module, "attend", lambda call, name: (seen.append(call), attend(call, name))[1]
    )
    return seen


@pytest.fixture(autouse=True)
def stock_afterwards():
    yield
    assert F.scaled_dot_product_attention is STOCK
    assert torch.backends.mha.get_fastpath_enabled()


def given(*shape, count=3, dtype=torch.float64):
    return [torch.randn(shape, dtype=dtype).requires_grad_() for _ in range(count)]


# -- putting in and taking out --------------------------------------------------------------------


def test_with_block(calls):
    q, k, v = given(2, 4, 5, 8)
    with patch():
        assert F.scaled_dot_product_attention is not STOCK
        F.scaled_dot_product_attention(q, k, v)
    assert len(calls) == 1
    F.scaled_dot_product_attention(q, k, v)
    assert len(calls) == 1


def test_for_the_process(calls):
    handle = patch()
    F.scaled_dot_product_attention(*given(2, 4, 5, 8))
    handle.undo()
    handle.undo()
    assert len(calls) == 1 and F.scaled_dot_product_attention is STOCK


def test_undone_after_an_error():
    with pytest.raises(ZeroDivisionError), patch():
        raise ZeroDivisionError
    assert F.scaled_dot_product_attention is STOCK


def test_nested_and_overlapping():
    with patch():
        with patch():
            pass
        assert F.scaled_dot_product_attention is not STOCK
    first, second = patch(), patch()
    first.undo()
    first.undo()
    assert F.scaled_dot_product_attention is not STOCK
    second.undo()
    assert F.scaled_dot_product_attention is STOCK


def test_somebody_elses_function_stays(calls):
    """Who wraps the function after us and outlives us is not thrown out, and reaches torch."""
    handle = patch()
    ours = F.scaled_dot_product_attention
    theirs = functools.wraps(ours)(lambda *args, **options: ours(*args, **options))
    F.scaled_dot_product_attention = theirs
    handle.undo()
    assert F.scaled_dot_product_attention is theirs
    F.scaled_dot_product_attention(*given(2, 4, 5, 8))
    assert not calls
    F.scaled_dot_product_attention = ours  # they take themselves out
    with patch():
        F.scaled_dot_product_attention(*given(2, 4, 5, 8))
    assert len(calls) == 1


def test_fast_path_setting_is_restored():
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with patch():
            assert not torch.backends.mha.get_fastpath_enabled()
        assert not torch.backends.mha.get_fastpath_enabled()
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    with patch():
        assert not torch.backends.mha.get_fastpath_enabled()


def test_threads():
    def work():
        for _ in range(200):
            with patch():
                pass

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_importing_tilemask_imports_no_integration():
    code = "import sys, tilemask; print([m for m in sys.modules if m.startswith('tilemask.')])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "tilemask.masks" in out.stdout
    assert "integrations" not in out.stdout and "tilemask.nn" not in out.stdout


# -- what torch gives -----------------------------------------------------------------------------


def test_published_samples(calls):
    count = 0
    for tensors, options in published.sdpa_samples(torch.float64):
        truth = published.results(STOCK, tensors, options)
        with patch():
            got = published.results(F.scaled_dot_product_attention, tensors, options)
        torch.testing.assert_close(got, truth)
        count += 1
    assert len(calls) == count >= 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_published_samples_in_lower_precision(dtype):
    """No further from the truth than twice torch."""
    for tensors, options in published.sdpa_samples(dtype):
        with patch():
            got = published.results(F.scaled_dot_product_attention, tensors, options)
        published.check(got, tensors, options, dtype)


@pytest.mark.parametrize("name", published.MODULES)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_published_module_samples(name, training):
    for module, args, kwargs in published.module_samples(name, training, True):
        run = functools.partial(published.results, module, args, kwargs, list(module.parameters()))
        truth = run()
        with patch():
            got = run()
        torch.testing.assert_close(got, truth)


MASKS = {
    "(L, S)": (5, 7),
    "(1, S)": (1, 7),
    "(L, 1)": (5, 1),
    "(H, L, S)": (4, 5, 7),
    "(B, 1, 1, S)": (2, 1, 1, 7),
    "(B, H, L, S)": (2, 4, 5, 7),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks(name, calls):
    q, _, _ = given(2, 4, 5, 8)
    k, v = given(2, 4, 7, 8, count=2)
    keep = torch.rand(MASKS[name]) < 0.6
    for mask in (keep, keep.double().log(), torch.randn(MASKS[name], dtype=torch.float64)):
        truth = F.scaled_dot_product_attention(q, k, v, mask)
        with patch():
            torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v, mask), truth)
    assert len(calls) == 3


def test_positional_arguments():
    q, k, v = given(2, 4, 5, 8)
    mask = torch.rand(5, 5) < 0.6
    truth = STOCK(q, k, v, mask, 0.0, False, scale=0.3)
    with patch():
        sdpa = F.scaled_dot_product_attention
        torch.testing.assert_close(sdpa(q, k, v, mask, 0.0, False, scale=0.3), truth)
        torch.testing.assert_close(sdpa(query=q, key=k, value=v, attn_mask=mask, scale=0.3), truth)


def test_bias_classes(calls):
    q, k, v = given(2, 4, 5, 8)
    bias = causal_lower_right(3, 5)
    truth = F.scaled_dot_product_attention(q[:, :, :3], k, v, bias)
    with patch():
        torch.testing.assert_close(F.scaled_dot_product_attention(q[:, :, :3], k, v, bias), truth)
    assert len(calls) == 1


def test_default_device_and_autocast(calls):
    """A mode that is on (set_default_device pushes one) sends nothing back to torch."""
    q, k, v = given(2, 4, 5, 8, dtype=torch.float32)
    with patch(), torch.device("cpu"), torch.autocast("cpu", torch.bfloat16):
        assert F.scaled_dot_product_attention(q, k.bfloat16(), v).dtype == torch.bfloat16
    assert calls


# -- left to torch --------------------------------------------------------------------------------


class Foreign(torch.Tensor):
    pass


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_go_to_torch(calls):
    parts = [torch.randn(3, 4, 8), torch.randn(5, 4, 8)]
    for layout in (torch.strided, torch.jagged):
        x = torch.nested.nested_tensor(parts, layout=layout).transpose(1, 2)
        x = x if layout == torch.jagged else x.contiguous()
        truth = F.scaled_dot_product_attention(x, x, x)
        with patch():
            got = F.scaled_dot_product_attention(x, x, x)
        assert got.is_nested
        for mine, theirs in zip(got.unbind(), truth.unbind(), strict=True):
            torch.testing.assert_close(mine, theirs)
    assert not calls


def test_foreign_subclasses_go_to_torch(calls):
    x = torch.randn(2, 4, 5, 8).as_subclass(Foreign)
    with patch():
        assert type(F.scaled_dot_product_attention(x, x, x)) is Foreign
        plain = x.as_subclass(torch.Tensor)
        mask = torch.ones(5, 5, dtype=torch.bool).as_subclass(Foreign)
        assert F.scaled_dot_product_attention(plain, plain, plain, mask).shape == x.shape
    assert not calls


def test_width_0_goes_to_torch(calls):
    q, v = torch.randn(2, 5, 0), torch.randn(2, 5, 3)
    for tensors in ((q, q, v), (v, v, q)):
        truth = STOCK(*tensors)
        with patch():
            torch.testing.assert_close(
                F.scaled_dot_product_attention(*tensors), truth, equal_nan=True
            )
    assert not calls


def attend(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_torchscript_gets_torchs_operator():
    q, k, v = given(2, 4, 5, 8)
    truth = attend(q, k, v)
    with patch():
        traced, scripted = torch.jit.trace(attend, (q, k, v)), torch.jit.script(attend)
        for made in (traced, scripted):
            assert "aten::scaled_dot_product_attention" in str(made.inlined_graph)
            torch.testing.assert_close(made(q, k, v), truth)


# -- tracing --------------------------------------------------------------------------------------


def masked(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, mask)


def test_compiled():
    torch._dynamo.reset()
    q, k, v = given(2, 4, 5, 8)
    mask = torch.rand(2, 1, 5, 5) < 0.6
    truth = masked(q, k, v, mask)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(masked, fullgraph=True, backend=backend)
    compiled(q, k, v, mask)
    with patch():  # what was compiled before is compiled anew
        torch.testing.assert_close(compiled(q, k, v, mask), truth)
    torch.testing.assert_close(compiled(q, k, v, mask), truth)
    used = ["scaled_dot_product_attention" in g.print_readable(False) for g in graphs]
    assert used == [True, False]
    with patch():
        aot = torch.compile(masked, fullgraph=True, backend="aot_eager")
        got = torch.autograd.grad(aot(q, k, v, mask).sum(), (q, k, v))
    torch.testing.assert_close(got, torch.autograd.grad(truth.sum(), (q, k, v)))


@pytest.mark.parametrize("need_weights", [False, True])
def test_compiled_module(need_weights):
    """Compiled while patched: tilemask's op is in the graph of torch's module."""
    torch._dynamo.reset()
    attention = torch.nn.MultiheadAttention(16, 4, batch_first=True, dtype=torch.float64)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])

    def run(x):
        return attention(x, x, x, key_padding_mask=padding, need_weights=need_weights)

    truth, graphs = run(x), []

    def keep(graph, _):
        graphs.append(graph.print_readable(print_output=False))
        return make_boxed_func(graph.forward)

    with patch():
        compiled = torch.compile(run, fullgraph=True, backend=aot_autograd(fw_compiler=keep))
        torch.testing.assert_close(compiled(x), truth)
    # torch computes weights without scaled_dot_product_attention
    assert any("tilemask.forward" in graph for graph in graphs) != need_weights


def test_transforms():
    q, k, v = given(3, 2, 4, 8)
    truth = masked(q, k, v, None)
    with patch():
        torch.testing.assert_close(torch.vmap(masked, (0, 0, 0, None))(q, k, v, None), truth)
        gradient = torch.func.grad(lambda q: masked(q, k, v, None).sum())(q)
    torch.testing.assert_close(gradient, torch.autograd.grad(truth.sum(), q)[0])


# -- what torch gets wrong ------------------------------------------------------------------------


def test_causal_with_a_mask():
    q, k, v = given(2, 4, 5, 8)
    keep = torch.rand(2, 1, 5, 5) < 0.7
    truth = F.scaled_dot_product_attention(q, k, v, keep & torch.ones(5, 5).tril().bool())
    with patch():
        got = F.scaled_dot_product_attention(q, k, v, keep, is_causal=True)
    torch.testing.assert_close(got, truth)


def test_nan_in_padding_does_not_leak():
    q, k, v = given(2, 4, 5, 8)
    keep = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])[:, None, None, :]
    dirty = v.detach().clone()
    dirty[1, :, 3:] = torch.nan
    truth = F.scaled_dot_product_attention(q, k, v, keep)
    assert F.scaled_dot_product_attention(q, k, dirty, keep).isnan().any()
    with patch():
        torch.testing.assert_close(F.scaled_dot_product_attention(q, k, dirty, keep), truth)


def test_padded_sequence_in_inference():
    """The fast path gives NaN for a sequence that is all padding; without it there is none."""
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    padding = torch.tensor([[False] * 5, [True] * 5])
    with torch.no_grad():
        assert layer(x, src_key_padding_mask=padding).isnan().any()
        with patch():
            assert not layer(x, src_key_padding_mask=padding).isnan().any()


def test_names():
    assert integration.patch is patch
    assert patch.__module__ == "tilemask.integrations.torch"
