"""From a mask to what the kernels read: words, memory, and no look at a value from the host."""

import cases
import numpy as np
import pytest
import torch
import ways
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from ways import WAYS

from tilemask import autograd, library, masks
from tilemask.attention import checked
from tilemask.backends import triton

LIBRARY = [] if library.unavailable() else [ways.Gpu("cuda")]
LIBRARY = LIBRARY if torch.cuda.is_available() else [ways.EmulatedLibrary()]


@pytest.fixture(params=[*WAYS, *LIBRARY], ids=lambda way: way.name)
def way(request):
    return request.param


# -- words ----------------------------------------------------------------------------------------


def unpacked(words: np.ndarray, length: int) -> np.ndarray:
    """Words [.., groups, L, 4] -> bool [.., L, length], bit by bit as the format says."""
    *planes, groups, lines, _ = words.shape
    seen = np.zeros((*planes, lines, 128 * groups), dtype=bool)
    for c in range(128 * groups):
        group, within = divmod(c, 128)
        a, lane, t = within // 8, within % 8 // 2, within % 2
        seen[..., c] = (words[..., group, :, lane] >> (2 * a + t)) & 1
    assert not seen[..., length:].any()
    return seen[..., :length]


PACKED = [c for c in cases.CASES if c.name.startswith(("dense_", "documents_mixed", "bits_"))]
PACKED = [c for c in PACKED if "keep" not in c.name and c.B * c.Hq * c.Lq * c.Lk]


@pytest.mark.parametrize("case", PACKED, ids=lambda case: case.name)
def test_words_hold_the_bits(way, case):
    made = way.call(ways.packed, case.name, way.device, way.backend)
    bits = case.mask("cpu")
    bits = bits.bits(case.B, case.Hq, case.Lq, case.Lk, torch.device("cpu"))
    if bits is None:  # the mask is an interval per row after all
        assert made["words"] is None
        return
    shape = (case.B, case.Hq, case.Lq, case.Lk)
    truth = np.broadcast_to(bits.rows(0, case.Lq).numpy(), shape)
    split = masks.split_batch(case.B, *made["words"].shape[:2])

    def same(got, expected):
        """[B1|1, B2|1, H|1, ...] against [B, H, ...]."""
        got = np.broadcast_to(got, (*split, *got.shape[2:]))
        got = got.reshape(case.B, *got.shape[2:])
        np.testing.assert_array_equal(np.broadcast_to(got, expected.shape), expected)

    same(unpacked(made["words"], case.Lk), truth)
    transposed = made["transposed"]
    if made["words"].shape[4] == 1:  # rows repeat: a column has all its bits or none
        same(transposed[..., 0, :, :], np.where(truth[:, :, 0], -1, 0)[..., None].repeat(4, -1))
    else:
        same(unpacked(transposed, case.Lq), truth.swapaxes(2, 3))
    alive = case.seen().any(-1)
    np.testing.assert_array_equal(np.broadcast_to(made["live"] != 0, alive.shape), alive)


# -- memory and synchronisation -------------------------------------------------------------------


def made_of(mask, length, backward, dtype=torch.bfloat16, width=64, monkeypatch=None):
    """What a call keeps of a mask, on tensors without memory: reading a value of one raises."""
    q = torch.empty(1, 1, length, width, dtype=dtype)
    call = checked(q, q, q, mask(length))
    triton.prepare(call, backward, autograd.traced_steps("triton"))
    tensors = []
    for _, (value, _) in call.mask.prepared.kept.items():
        tensors += value if isinstance(value, tuple) else [value]
    return tensors


@pytest.fixture
def on_hopper(monkeypatch):
    monkeypatch.setattr(triton, "unfit", lambda device: None)
    monkeypatch.setattr(triton, "architecture", lambda device: 90)


@pytest.mark.parametrize("backward, most", [(False, 1.2), (True, 2.3)])
@pytest.mark.parametrize(
    "dtype, width",
    [(torch.bfloat16, 64), (torch.bfloat16, 128), (torch.bfloat16, 256), (torch.float32, 64)],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_memory_of_a_large_mask(on_hopper, dtype, width, backward, most):
    """A 32k x 32k bool mask costs at most 1.2 times its packed size, 2.3 times with a backward."""
    length = 32768
    with FakeTensorMode():
        made = made_of(
            lambda n: masks.dense(torch.empty(n, n, dtype=torch.bool)),
            length,
            backward,
            dtype,
            width,
        )
    total = sum(t.numel() * t.element_size() for t in made)
    lists = max(t.numel() for t in made if t.dtype == torch.int32 and t.dim() == 5)
    total += lists // 2  # one byte per tile while its list is made
    assert total <= most * length * length / 8


@pytest.mark.parametrize("length", [8192, 32768])
def test_holes_cost_a_bit_per_key(on_hopper, length):
    """A key mask with holes stays O(Lk) bits, also together with a causal mask."""
    with FakeTensorMode():
        keep = torch.empty(1, length, dtype=torch.bool)
        call = checked(*[torch.empty(1, 1, length, 64)] * 3, masks.padding(keep=keep))
        both = checked(
            *[torch.empty(1, 1, length, 64)] * 3, masks.padding(keep=keep) & masks.causal()
        )
        for made in (call, both):
            triton.prepare(made, True, autograd.traced_steps("triton"))
            assert made.mask.prepared.get("words") is None
            assert made.mask.prepared["keys"].numel() * 32 == length


EVERY = {
    "causal": lambda n: masks.causal(),
    "window": lambda n: masks.window(30, 0, offset=torch.zeros(1, dtype=torch.int64)),
    "padding": lambda n: masks.padding(torch.zeros(1, dtype=torch.int64)),
    "keep": lambda n: masks.padding(keep=torch.ones(1, n, dtype=torch.bool)) & masks.causal(),
    "tokens": lambda n: masks.padding_from_tokens(torch.ones(1, n, dtype=torch.int64), 0),
    "varlen": lambda n: masks.varlen(torch.zeros(9, dtype=torch.int64), within=masks.causal()),
    "documents": lambda n: masks.documents(torch.zeros(n, dtype=torch.int64)),
    "contiguous": lambda n: masks.documents(torch.zeros(n, dtype=torch.int64), contiguous=True),
    "within": lambda n: masks.documents(torch.zeros(n, dtype=torch.int64), within=masks.causal()),
    "prefix_lm": lambda n: masks.prefix_lm(torch.zeros(1, dtype=torch.int64)),
    "intervals": lambda n: masks.intervals(*(torch.zeros(n, dtype=torch.int64) for _ in "ab")),
    "dense": lambda n: masks.dense(torch.ones(1, 1, n, n, dtype=torch.bool)),
    "dense by key": lambda n: masks.dense(torch.ones(1, 1, 1, n, dtype=torch.bool)),
    "dense by row": lambda n: masks.dense(torch.ones(1, 1, n, 1, dtype=torch.bool)),
    "dense & dense": lambda n: (
        masks.dense(torch.ones(n, n, dtype=torch.bool))
        & masks.dense(torch.ones(1, 1, n, n, dtype=torch.bool))
        & masks.padding(torch.zeros(1, dtype=torch.int64))
    ),
}


@pytest.mark.parametrize("kind", EVERY)
def test_nothing_looks_at_a_value_from_the_host(on_hopper, kind):
    """Fake tensors have no values: .item(), nonzero() and `if tensor` raise."""
    with FakeTensorMode():
        made_of(EVERY[kind], 200, True)


def test_looking_at_a_value_would_raise(on_hopper, monkeypatch):
    """The test above can fail."""
    monkeypatch.setattr(masks.Varlen, "explicit", lambda self, rows: int(self.cu_seqlens_q[-1]))
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        made_of(EVERY["varlen"], 200, True)


def test_documents_are_packed_in_strips(way):
    """Bits that are computed are never all there at once."""
    assert way.call(ways.packed_in_strips, way.device, way.backend)
