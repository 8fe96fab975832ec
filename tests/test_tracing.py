"""Everything that watches a call: torch.compile, export, fake tensors, functorch, autocast,
subclasses.

On the CPU these run the reference through the ops; tests/test_triton.py does the same with kernels.
"""

import cases
import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode

import tilemask
from tilemask import autograd, backends, masks
from tilemask.attention import checked

LENGTHS = torch.tensor([50, 61])
CU_Q, CU_K = torch.tensor([0, 20, 50]), torch.tensor([0, 31, 61])

MASKS = {
    "none": lambda: None,
    "causal": lambda: masks.causal(align="lower_right"),
    "padding": lambda: masks.causal() & masks.padding(LENGTHS, query_lengths=[40, 50]),
    "varlen": lambda: masks.varlen(CU_Q, CU_K, within=masks.causal(align="lower_right")),
    "documents": lambda: masks.documents(
        torch.arange(50) // 20, torch.arange(61) // 20, contiguous=True
    ),
    "prefix_lm": lambda: masks.prefix_lm(LENGTHS) & masks.window(30, -1),
    "keep": lambda: masks.padding(keep=torch.arange(61).expand(2, -1) % 3 > 0),
    "dense": lambda: masks.dense((torch.arange(50 * 61).view(50, 61) % 7) > 2),
}


def tensors(batch=2, requires_grad=True):
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, 4, 50, 16), (batch, 2, 61, 16), (batch, 2, 61, 8))
    return [
        torch.randn(shape, generator=generator).requires_grad_(requires_grad) for shape in shapes
    ]


def results(function, inputs):
    out, lse = function(*inputs)
    finite = torch.where(lse == -torch.inf, 0, lse)
    grads = torch.autograd.grad(out.square().sum() + finite.sum(), inputs)
    return [out.detach(), lse.detach(), *grads]


def assert_close(got, wanted):
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dynamic", [None, True, False])
@pytest.mark.parametrize("kind", MASKS)
def test_compile(kind, dynamic):
    def call(q, k, v):
        return tilemask.attention(q, k, v, mask=MASKS[kind](), return_lse=True)

    wanted = results(call, tensors())
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    assert_close(results(compiled, tensors()), wanted)


def test_compile_with_a_mask_made_outside():
    mask = masks.causal() & masks.padding(LENGTHS)

    def call(q, k, v):
        return tilemask.attention(q, k, v, mask=mask, return_lse=True)

    wanted = results(call, tensors())
    torch._dynamo.reset()
    assert_close(
        results(torch.compile(call, fullgraph=True, backend="aot_eager"), tensors()), wanted
    )
    mask.parts[1].end.fill_(3)  # the graph reads the tensor, not a copy made at trace time
    changed = results(torch.compile(call, fullgraph=True, backend="aot_eager"), tensors())
    assert_close(changed, results(call, tensors()))
    LENGTHS.copy_(torch.tensor([50, 61]))


def test_compile_sees_new_lengths():
    """Lengths are data: other values neither recompile nor go stale."""

    def call(q, k, v, lengths):
        return tilemask.attention(q, k, v, mask=masks.padding(lengths))

    graphs = []

    def record(graph, _):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend=aot_autograd(fw_compiler=record))
    q, k, v = tensors(requires_grad=False)
    for lengths in ([3, 61], [61, 1], [0, 5]):
        lengths = torch.tensor(lengths)
        torch.testing.assert_close(compiled(q, k, v, lengths), call(q, k, v, lengths))
    assert len(graphs) == 1


def test_compile_dynamic_shapes_do_not_recompile():
    graphs = []

    def record(graph, _):
        graphs.append(graph)
        return graph

    def call(q, k, v):
        return tilemask.attention(q, k, v, mask=masks.causal() & masks.prefix_lm(4))

    torch._dynamo.reset()
    compiled = torch.compile(
        call, fullgraph=True, dynamic=True, backend=aot_autograd(fw_compiler=record)
    )
    for length in (30, 47, 64):
        x = torch.randn(2, 2, length, 16)
        torch.testing.assert_close(compiled(x, x, x), call(x, x, x))
    assert len(graphs) == 1


def test_compile_with_every_option():
    bias = torch.randn(2, 1, 50, 61)
    sinks = torch.randn(4)

    def call(q, k, v, bias, sinks):
        return tilemask.attention(
            q, k, v, mask=masks.causal(), bias=bias, sinks=sinks, softcap=5.0, scale=0.3,
            alibi_slopes=torch.full((4,), 0.1), dropout_p=0.25, dropout_seed=7, return_lse=True,
        )  # fmt: skip

    def inputs():
        return [*tensors(), bias.clone().requires_grad_(), sinks.clone().requires_grad_()]

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_close(results(compiled, inputs()), results(call, inputs()))


def test_compile_follows_use_backend():
    def call(x):
        return tilemask.attention(x, x, x)

    torch._dynamo.reset()
    compiled = torch.compile(call, backend="eager", fullgraph=True)
    x = torch.randn(1, 1, 4, 8)
    compiled(x)
    with tilemask.use_backend("triton"), pytest.raises(Exception, match=r"needs? an NVIDIA GPU"):
        compiled(x)
    compiled(x)


def test_compile_inductor():
    def call(q, k, v):
        return tilemask.attention(q, k, v, mask=MASKS["varlen"](), return_lse=True)

    wanted = results(call, tensors())
    torch._dynamo.reset()
    assert_close(results(torch.compile(call, fullgraph=True), tensors()), wanted)


def test_scaled_dot_product_attention_compiles():
    def call(q, k, v):
        return tilemask.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    torch._dynamo.reset()
    q, k, v = tensors(requires_grad=False)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), call(q, k, v))


def test_export():
    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return tilemask.attention(q, k, v, mask=MASKS["padding"]())

    inputs = tuple(tensors(requires_grad=False))
    program = torch.export.export(Model(), inputs)
    assert any("tilemask.forward" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(*inputs), Model()(*inputs))


# -- the ops --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MASKS)
def test_opcheck(kind):
    q, k, v = tensors(requires_grad=False)
    bias, sinks = torch.randn(1, 4, 1, 61), torch.randn(4)
    call = checked(q, k, v, MASKS[kind](), bias=bias, sinks=sinks, dropout_p=0.5, dropout_seed=1)
    packed = autograd.packed(call, backends.reference, "forward")
    arguments = (q, k, v, *packed, "reference")
    torch.library.opcheck(torch.ops.tilemask.forward.default, arguments)
    out, lse, rest = torch.ops.tilemask.forward(*arguments)
    given = (torch.randn_like(out), torch.zeros_like(lse), out, lse, rest, *arguments)
    for bias_gradient in (True, False):
        torch.library.opcheck(torch.ops.tilemask.backward.default, (*given, bias_gradient))


@pytest.mark.parametrize("order", ["bhld", "blhd"])
def test_fake_and_real_strides_agree(order):
    q, k, v = tensors(requires_grad=False)
    if order == "blhd":
        q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    real = tilemask.attention(q, k, v)
    with FakeTensorMode() as mode:
        fake = tilemask.attention(*(mode.from_tensor(t) for t in (q, k, v)))
    packed = autograd.packed(checked(q, k, v), backends.reference, "forward")
    op, *_ = torch.ops.tilemask.forward(q, k, v, *packed, "reference")
    assert fake.shape == real.shape and fake.dtype == real.dtype
    assert fake.stride() == op.stride()


def test_meta_tensors_give_shapes():
    q, k, v = (t.to("meta") for t in tensors(requires_grad=False))
    out, lse = tilemask.attention(q, k, v, mask=masks.causal(), return_lse=True)
    assert out.is_meta and out.shape == (2, 4, 50, 8) and lse.shape == (2, 4, 50)


# -- transforms, autocast, subclasses -------------------------------------------------------------


def test_functorch_grad_and_vmap():
    q, k, v = tensors(requires_grad=False)
    mask = MASKS["padding"]()

    def loss(q):
        return tilemask.attention(q, k, v, mask=mask).square().sum()

    leaf = q.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(q), wanted)

    many = torch.stack([q, 2 * q, 3 * q])
    mapped = torch.vmap(lambda q: tilemask.attention(q, k, v, mask=mask))(many)
    single = torch.stack([tilemask.attention(q, k, v, mask=mask) for q in many])
    torch.testing.assert_close(mapped, single)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_q_k_v_and_not_the_bias(dtype):
    q, k, v = tensors(requires_grad=False)
    bias = torch.randn(50, 61) * 1e-3 + 1  # bfloat16 would round it away
    with torch.autocast("cpu", dtype=dtype):
        out = tilemask.attention(q, k.to(dtype), v, bias=bias)
    wanted = tilemask.attention(q.to(dtype), k.to(dtype), v.to(dtype), bias=bias)
    assert out.dtype == dtype
    torch.testing.assert_close(out, wanted, rtol=0, atol=0)
    with torch.autocast("cpu", dtype=dtype):
        assert tilemask.attention(q.double(), k.double(), v.double()).dtype == torch.float64


def test_autocast_under_compile():
    q, k, v = tensors(requires_grad=False)

    def call(q, k, v):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return tilemask.attention(q, k, v, mask=masks.causal())

    torch._dynamo.reset()
    out = torch.compile(call, fullgraph=True, backend="aot_eager")(q, k, v)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, call(q, k, v))


def test_torch_function_is_honoured():
    seen = []

    class Watched(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, arguments=(), options=None):
            seen.append(function)
            return super().__torch_function__(function, types, arguments, options or {})

    q, k, v = tensors(requires_grad=False)
    for function in (tilemask.attention, tilemask.scaled_dot_product_attention):
        seen.clear()
        options = {"enable_gqa": True} if function is not tilemask.attention else {}
        out = function(q.as_subclass(Watched), k, v, **options)
        assert seen[0] is function
        assert isinstance(out, Watched)
        torch.testing.assert_close(out.as_subclass(torch.Tensor), function(q, k, v, **options))


def test_parameters_take_the_direct_path():
    assert not autograd.is_traced(torch.nn.Parameter(torch.randn(2)))
    assert not autograd.is_traced(torch.randn(2))
    with FakeTensorMode():
        assert autograd.is_traced(torch.randn(2))


def test_negated_views():
    """A lazily negated view has its sign in a flag, not in memory."""
    q, k, v = tensors(requires_grad=False)
    negated = torch.complex(torch.zeros_like(q), -q).conj().imag
    assert negated.is_neg()
    torch.testing.assert_close(tilemask.attention(negated, k, v), tilemask.attention(q, k, v))


# -- gradients of the direct path -----------------------------------------------------------------


class FakeKernel:
    """A backend with a backward of its own: the reference's results without their graph."""

    NAME = "kernel"

    @staticmethod
    def why_not(call):
        return None

    @staticmethod
    def forward(call):
        with torch.no_grad():
            return *tilemask.backends.reference.forward(call), None

    @staticmethod
    def backward(call, out, lse, rest, dout, dlse, bias_gradient):
        return tilemask.backends.recompute(call, dout, dlse)


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(tilemask.backends, "BACKENDS", [FakeKernel, *tilemask.backends.BACKENDS])


def test_autograd_function(kernel):
    mask = MASKS["padding"]()
    got = results(lambda *x: tilemask.attention(*x, mask=mask, return_lse=True), tensors())
    wanted = results(
        lambda *x: tilemask.attention(*x, mask=mask, return_lse=True, backend="reference"),
        tensors(),
    )
    assert_close(got, wanted)


def test_gradient_through_lse_alone(kernel):
    q, k, v = tensors()
    _, lse = tilemask.attention(q, k, v, return_lse=True)
    dq, dv = torch.autograd.grad(lse.sum(), [q, v])
    assert (dv == 0).all()
    _, lse = tilemask.attention(q, k, v, return_lse=True, backend="reference")
    torch.testing.assert_close(dq, torch.autograd.grad(lse.sum(), q)[0])


def test_differentiating_a_kernel_twice_is_a_clear_error(kernel):
    q, k, v = tensors()
    (dq,) = torch.autograd.grad(tilemask.attention(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(
        RuntimeError, match=r'only the reference is differentiable twice.*backend="reference"'
    ):
        dq.square().sum().backward()


def test_no_function_without_gradients(kernel, monkeypatch):
    """Inference takes the direct path: the autograd.Function is never entered."""

    def forbidden(*arguments):
        raise AssertionError("entered autograd.Function")

    monkeypatch.setattr(autograd.Attention, "apply", forbidden)
    tilemask.attention(*tensors(requires_grad=False))
    with torch.no_grad():
        tilemask.attention(*tensors())
    with pytest.raises(AssertionError, match="entered"):
        tilemask.attention(*tensors())


def test_an_exception_in_a_kernel_propagates(monkeypatch):
    """A failing kernel is never a reason to fall back."""

    class Failing(FakeKernel):
        @staticmethod
        def forward(call):
            raise RuntimeError("kernel failed")

    monkeypatch.setattr(tilemask.backends, "BACKENDS", [Failing, *tilemask.backends.BACKENDS])
    with pytest.raises(RuntimeError, match="kernel failed"):
        tilemask.attention(*tensors())


def test_traced_case_list():
    """A few of the common cases through the ops, gradients included."""
    for name in ("large_window", "large_varlen"):
        case = cases.named(name)
        torch._dynamo.reset()
        result = cases.run(
            case, torch.float32, "cpu", "reference",
            wrap=lambda f: torch.compile(f, fullgraph=True, backend="aot_eager"),
        )  # fmt: skip
        cases.check(case, torch.float32, result)
