"""What only a GPU can show: CUDA graphs, no host synchronisation, streams, determinism, devices. On
each GPU backend that the machine can run."""

import pytest
import torch

import tilemask
from tilemask import backends, masks
from tilemask.attention import checked

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

LENGTH = 300
BACKENDS = [name for name in ("cuda", "triton") if name in tilemask.available_backends()]


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request):
    """The backend that runs every call of a test."""
    with tilemask.use_backend(request.param):
        yield request.param


on_triton = pytest.mark.parametrize("backend", ["triton"], indirect=True)


def tensors(requires_grad=True, dtype=torch.bfloat16, batch=2):
    generator = torch.Generator(device="cuda").manual_seed(0)
    return [
        torch.randn(
            batch, heads, LENGTH, 64, generator=generator, device="cuda", dtype=dtype
        ).requires_grad_(requires_grad)
        for heads in (4, 2, 2)
    ]


@pytest.fixture(scope="module")
def data():
    """What masks are made from, on the GPU before anything is captured or watched."""
    rows = torch.arange(LENGTH, device="cuda")
    return {
        "lengths": torch.tensor([200, LENGTH], device="cuda"),
        "cu_seqlens": torch.tensor([0, 100, 100, 290], device="cuda"),
        "ids": rows // 70,
        "lo": rows // 3,
        "hi": rows // 2,
        "keep": torch.rand(2, LENGTH, device="cuda") < 0.7,
        "bits": torch.rand(4, LENGTH, LENGTH, device="cuda") < 0.3,
    }


MASKS = {
    "causal": lambda data: masks.causal(),
    "padding": lambda data: masks.causal() & masks.padding(data["lengths"]),
    "varlen": lambda data: masks.varlen(
        data["cu_seqlens"], within=masks.causal(align="lower_right")
    ),
    "documents": lambda data: masks.documents(data["ids"], contiguous=True, within=masks.causal()),
    "prefix_lm": lambda data: masks.prefix_lm(data["lengths"]),
    "intervals": lambda data: masks.intervals(data["lo"], data["hi"]),
    "keys": lambda data: masks.padding(keep=data["keep"]) & masks.causal(),
    "dense": lambda data: masks.dense(data["bits"]),
    "all": lambda data: (
        masks.dense(data["bits"]) & masks.padding(data["lengths"], keep=data["keep"])
    ),
    "mixed documents": lambda data: masks.documents(data["ids"] % 3, within=masks.causal()),
}


def attend(q, k, v, mask, **options):
    return tilemask.attention(q, k, v, mask=mask, return_lse=True, **options)


def step(inputs, mask):
    """out, lse and all gradients; inputs after q, k, v: a bias and sinks."""
    q, k, v, *more = inputs
    options = dict(zip(("bias", "sinks"), more, strict=False))
    if more:
        options |= {"softcap": 20.0, "dropout_p": 0.1, "dropout_seed": 7}
    out, lse = attend(q, k, v, mask, **options)
    grads = torch.autograd.grad(
        out.float().square().sum() + torch.where(lse == -torch.inf, 0, lse).sum(), inputs
    )
    return out, lse, *grads


def with_options(inputs):
    bias = torch.randn(1, 4, LENGTH, LENGTH, device="cuda", dtype=torch.bfloat16)
    sinks = torch.randn(4, device="cuda")
    return [*inputs, bias.requires_grad_(), sinks.requires_grad_()]


@pytest.mark.parametrize("kind", MASKS)
def test_nothing_synchronises_with_the_host(kind, data):
    """Neither lowering nor the kernels, on a mask that was never seen before."""
    step(tensors(), MASKS[kind](data))  # compiles
    inputs = tensors()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(inputs, MASKS[kind](data))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_options_do_not_synchronise_and_are_deterministic(data):
    inputs = with_options(tensors())
    first = step(inputs, MASKS["all"](data))
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = step(inputs, MASKS["all"](data))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("direction, most", [("forward", 1.2), ("backward", 2.3)])
def test_memory_of_a_large_mask(direction, most):
    """A 32k x 32k bool mask: at most 1.2 times its packed size beside what a call without mask
    takes, 2.3 times with a backward, which keeps a transposed copy."""
    length, training = 32768, direction == "backward"
    q = torch.randn(1, 1, length, 64, device="cuda", dtype=torch.bfloat16)
    q.requires_grad_(training)
    mask = torch.rand(length, length, device="cuda") < 0.5

    def peak(attn_mask):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = tilemask.scaled_dot_product_attention(q, q, q, attn_mask)
        if training:
            torch.autograd.grad(out.sum(), q)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    peak(None)
    plain = peak(None)
    assert peak(mask) - plain <= most * length * length / 8


@pytest.mark.parametrize("kind", MASKS)
def test_cuda_graphs(kind, data):
    """Captured once, replayed with other numbers: lowering, lists, forward and backward."""
    inputs = tensors()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(inputs, MASKS[kind](data))
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(inputs, MASKS[kind](data))
    with torch.no_grad():
        for tensor in inputs:
            tensor.mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    for got, wanted in zip(captured, step(inputs, MASKS[kind](data)), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("kind", MASKS)
def test_gradients_are_deterministic(kind, data):
    first = step(tensors(), MASKS[kind](data))
    for _ in range(3):
        for a, b in zip(first, step(tensors(), MASKS[kind](data)), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("kind", ["everything", "causal", "window", "bits", "documents"])
def test_many_column_blocks_are_deterministic(kind, width):
    """More than run at once: those of the CUDA library take turns at dq."""
    rows = torch.arange(4096, device="cuda")
    mask = {
        "everything": None,
        "causal": masks.causal(),
        "window": masks.window(700, 100),
        "bits": masks.dense(torch.rand(2, 1, 4096, 4096, device="cuda") < 0.5),
        "documents": masks.documents(rows // 900, contiguous=True),
    }[kind]
    q, k, v, dout = torch.randn(
        4, 2, 16, 4096, width, device="cuda", dtype=torch.bfloat16, requires_grad=True
    ).unbind()

    def gradients():
        return torch.autograd.grad(tilemask.attention(q, k, v, mask=mask), (q, k, v), dout)

    first = gradients()
    for _ in range(10):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(), strict=True))


def test_a_mask_used_on_two_streams(data):
    """What one stream made is not read by the other before it is there."""
    inputs = tensors(requires_grad=False)
    mask = MASKS["documents"](data)
    wanted = attend(*inputs, mask)[0]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        got = attend(*inputs, mask)[0]
    torch.cuda.synchronize()
    assert torch.equal(got, wanted)


def test_output_keeps_the_memory_order_of_q():
    q = torch.randn(2, 50, 4, 64, device="cuda", dtype=torch.float16).transpose(1, 2)
    out = tilemask.attention(q, q, q)
    assert out.transpose(1, 2).is_contiguous()


def test_who_is_chosen_on_a_gpu(monkeypatch):
    monkeypatch.setattr(backends, "_forced", None)
    q, k, v = tensors(requires_grad=False)
    wanted = BACKENDS[0]
    if len(BACKENDS) == 2:
        wanted = backends.cuda.preferred(checked(q, k, v))[0]
    assert tilemask.explain(q, k, v, mask=masks.causal()).backend == wanted
    explained = tilemask.explain(q.double(), k.double(), v.double())
    assert explained.backend == "reference"
    assert all("float64" in explained.reasons[name] for name in BACKENDS)


@on_triton
@pytest.mark.parametrize("setting", ["ieee", "tf32"])
def test_float32_precision_is_torchs(setting):
    q, k, v = tensors(requires_grad=False, dtype=torch.float32)
    doubled = (t.double() for t in (q, k, v))
    truth = tilemask.attention(*doubled, mask=masks.causal(), backend="reference")
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = setting
    try:
        error = (attend(q, k, v, masks.causal())[0] - truth).abs().max().item()
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert error < 1e-5 if setting == "ieee" else 1e-5 < error < 1e-2


def test_more_than_2_to_the_31_elements():
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GiB")
    length = 2**31 // (8 * 64) + 128
    q = torch.randn(1, 8, 128, 64, device="cuda", dtype=torch.float16)
    k = torch.randn(1, 8, length, 64, device="cuda", dtype=torch.float16)
    mask = masks.padding(start=torch.tensor([length - 200]))
    out = tilemask.attention(q, k, k, mask=mask)
    wanted = tilemask.attention(q, k[:, :, -200:], k[:, :, -200:])
    torch.testing.assert_close(out, wanted, rtol=1e-3, atol=1e-3)


def test_more_than_2_to_the_32_pairs():
    """Lq * Lk past 32 bits gave wrong numbers elsewhere; the last rows say whether it does here."""
    length = 66_000
    q, k, v = (torch.randn(1, 1, length, 32, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    out = tilemask.attention(q, k, v, mask=masks.causal())
    last = masks.causal(align="lower_right")
    wanted = tilemask.attention(q[:, :, -70:], k, v, mask=last, backend="reference")
    torch.testing.assert_close(out[:, :, -70:], wanted, rtol=2e-2, atol=2e-2)
