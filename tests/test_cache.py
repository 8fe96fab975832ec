"""What is kept of masks between calls, for whom, and when it goes."""

import gc
import os
import subprocess
import sys
import threading
import weakref
from collections import OrderedDict

import pytest
import torch
import ways
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

import tilemask
from tilemask import backends, lowering, masks
from tilemask.backends import reference, triton

CPU = torch.device("cpu")
B, H, LQ, LK = 2, 3, 20, 24
Q, K, V = torch.randn(B, H, LQ, 8), torch.randn(B, H, LK, 8), torch.randn(B, H, LK, 8)


class Packing:
    """A backend that prepares masks, and counts: its words are the bits."""

    NAME = "packing"

    def __init__(self):
        self.packed = 0
        self.seen = []  # the lowered masks of all calls

    def why_not(self, call):
        return None

    def unavailable(self):
        return None

    def words(self, mask):
        def pack():
            self.packed += 1
            return self.plane(mask).clone()

        return mask.prepared.make("words", pack)

    def plane(self, mask):
        plane = mask.key_bits if mask.bits is None else mask.bits.tensor(mask.len_q)
        return mask.lo if plane is None else plane

    def prepare(self, call, backward):
        self.words(call.mask)
        if backward:
            call.mask.prepared.make("transposed", lambda: self.words(call.mask).clone())

    def forward(self, call):
        self.seen.append(call.mask)
        assert torch.equal(self.words(call.mask), self.plane(call.mask))
        with torch.no_grad():
            return *reference.forward(call), None

    def backward(self, call, out, lse, rest, dout, dlse, bias_gradient):
        self.prepare(call, True)
        return backends.recompute(call, dout, dlse)


@pytest.fixture
def packing(monkeypatch):
    backend = Packing()
    monkeypatch.setattr(backends, "BACKENDS", [backend, reference])
    return backend


@pytest.fixture(autouse=True)
def nothing_kept():
    lowering.forget_all()
    yield
    lowering.forget_all()


def bits(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.6


def sdpa(mask, **options):
    return tilemask.scaled_dot_product_attention(Q, K, V, attn_mask=mask, **options)


def expected(mask, **options):
    return torch.nn.functional.scaled_dot_product_attention(
        Q, K, V, attn_mask=mask, **options
    ).masked_fill(~mask.any(-1, keepdim=True), 0)


def lower(mask, B=B, H=H, Lq=LQ, Lk=LK):
    return lowering.lower(mask, B, H, Lq, Lk, CPU)


def prepared(mask, **sizes):
    return lower(mask, **sizes).prepared


# -- by mask object -------------------------------------------------------------------------------


def test_not_too_many_forms_are_kept_of_a_mask():
    mask = masks.causal()
    for length in range(100):
        lower(mask, Lq=length)
    assert len(lowering._cache.forms(mask)) <= lowering.MOST_KEPT


def test_a_changed_mask_keeps_one_form():
    lengths = torch.tensor([3, 20])
    mask = masks.padding(lengths)
    old = weakref.ref(lower(mask))
    for _ in range(3):
        lengths += 1
        lower(mask)
    assert len(lowering._cache.forms(mask)) == 1
    assert old() is None


# -- by storage -----------------------------------------------------------------------------------


def test_layers_that_share_a_tensor_pack_it_once(packing):
    mask = bits(B, 1, LQ, LK)
    for _ in range(4):
        torch.testing.assert_close(sdpa(mask), expected(mask))
    assert packing.packed == 1
    assert len({id(lowered.prepared) for lowered in packing.seen}) == 1
    assert len({id(lowered) for lowered in packing.seen}) == 4


@pytest.mark.parametrize("shape", [(LQ, LK), (H, LQ, LK), (B, 1, 1, LK), (1, H, LQ, LK)], ids=str)
def test_every_shape_of_dense_mask_is_shared(shape):
    mask = bits(*shape)
    assert prepared(masks.dense(mask)) is prepared(masks.dense(mask))


def test_masks_of_bool_tensors_and_integers_are_shared():
    mask, keep = bits(LQ, LK), bits(B, LK)

    def make():
        return masks.dense(mask) & masks.causal(1) & masks.padding(keep=keep) & masks.padding(20)

    assert prepared(make()) is prepared(make())
    others = [
        masks.dense(mask),
        masks.dense(mask) & masks.causal(1),
        masks.dense(mask) & masks.causal(2),
        masks.dense(mask) & masks.padding(keep=keep),
        masks.padding(keep=keep),
        masks.dense(keep[:, None, None]),
    ]
    made = [make(), *others]
    assert len({id(prepared(m)) for m in made}) == len(made)


def test_masks_with_other_tensors_are_not_shared():
    mask = bits(LQ, LK)
    lengths, ids = torch.tensor([20, 24]), torch.zeros(LQ, dtype=torch.int64)
    for other in (masks.padding(lengths), masks.prefix_lm(3), masks.chunked(4)):
        assert prepared(masks.dense(mask) & other) is not prepared(masks.dense(mask) & other)
    documents = masks.documents(ids, torch.zeros(LK, dtype=torch.int64))
    assert prepared(masks.dense(mask) & documents) is not prepared(masks.dense(mask) & documents)
    rows = masks.dense(mask[:, :1])
    assert lower(rows).lo is not None
    assert prepared(rows) is not prepared(masks.dense(mask[:, :1]))
    assert not any(len(key) != 6 + 6 for key in lowering._cache.by_storage)


@pytest.fixture
def lowered_anew(monkeypatch):
    """The masks that were not found to be lowered already."""
    seen, lower_anew = [], lowering.lower_anew

    def watched(mask, *sizes):
        seen.append(mask)
        return lower_anew(mask, *sizes)

    monkeypatch.setattr(lowering, "lower_anew", watched)
    return seen


VIEWS = {
    "pairs": lambda: bits(LQ, LK),
    "pairs of a part": lambda: bits(LQ + 1, LK + 2)[1:, 2:],
    "pairs, transposed": lambda: bits(LK, LQ).t(),
    "pairs per head": lambda: bits(H, LQ, LK),
    "pairs, expanded": lambda: bits(1, 1, LQ, LK).expand(B, H, -1, -1),
    "pairs of two batches": lambda: bits(B, 1, 1, LQ, LK),
    "keys": lambda: bits(B, 1, 1, LK),
    "keys, expanded": lambda: bits(1, LK).expand(LQ, -1),
    "keys of two batches": lambda: bits(1, B, 1, 1, LK),
}


@pytest.mark.parametrize("kind", VIEWS)
def test_a_tensor_is_lowered_once(kind, lowered_anew):
    """Every layer makes a mask object of its own of it; what they get is alike."""
    mask = VIEWS[kind]()
    first, *others = (lower(masks.dense(mask)) for _ in range(3))
    assert len(lowered_anew) == 1
    assert (first.bits is None) == kind.startswith("keys")
    for form in others:
        assert form.prepared is first.prepared and form.bounds == first.bounds
        assert form.batch_bounds is form.lo is form.hi is None
        if first.bits is None:
            found, wanted = form.key_bits, first.key_bits
            assert form.bits is None
        else:
            found, wanted = form.bits.view, first.bits.view
            assert form.key_bits is None
        assert found.data_ptr() == wanted.data_ptr()
        assert found.shape == wanted.shape and found.stride() == wanted.stride()


def test_key_bits_of_padding_are_lowered_once(lowered_anew):
    keep = bits(B, LK)
    first, second = (lower(masks.padding(keep=keep)) for _ in range(2))
    assert len(lowered_anew) == 1
    assert torch.equal(second.key_bits, first.key_bits) and second.bits is None


def test_key_bits_that_are_no_view_are_lowered_anew(lowered_anew):
    """Those of two batch dimensions, of which the keys repeat over one, are copied to B."""
    mask = bits(2, 1, 1, 1, LK)
    q, k = torch.randn(6, H, LQ, 8), torch.randn(6, H, LK, 8)
    for _ in range(2):
        out = tilemask.attention(q, k, k, mask=masks.dense(mask))
        wanted = mask.expand(2, 3, -1, -1, -1).flatten(0, 1)
        torch.testing.assert_close(
            out, torch.nn.functional.scaled_dot_product_attention(q, k, k, attn_mask=wanted)
        )
        mask.logical_not_()
        mask[..., 0] = True
    assert len(lowered_anew) == 2


CHANGES = {
    "written": lambda mask, other: mask.copy_(other),
    "written through a view": lambda mask, other: mask[:].copy_(other),
    "set": lambda mask, other: mask.set_(other),
    "given data": lambda mask, other: setattr(mask, "data", other),
    "moved in its storage": lambda mask, other: mask.set_(
        mask.untyped_storage(), 1, (LQ, LK), (LK, 1)
    ),
    "turned": lambda mask, other: mask.as_strided_((LQ, LK), (1, LQ)),
    "resized": lambda mask, other: mask.resize_(LQ + 1, LK).resize_(LQ, LK).copy_(other),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_tensor_is_lowered_anew(change, packing, lowered_anew):
    mask = bits(LQ * LK + 1)[:-1].view(LQ, LK)
    if change == "resized":  # which views refuse
        mask = mask.clone()
    for _ in range(3):
        torch.testing.assert_close(sdpa(mask), expected(mask))
    assert len(lowered_anew) == packing.packed == 1
    before = mask.clone()
    CHANGES[change](mask, bits(LQ, LK, seed=1))
    assert not torch.equal(mask, before)
    for _ in range(3):
        torch.testing.assert_close(sdpa(mask), expected(mask))
    assert len(lowered_anew) == packing.packed == 2


def test_a_change_in_place_is_packed_anew(packing):
    mask = bits(LQ, LK)
    for _ in range(3):
        torch.testing.assert_close(sdpa(mask), expected(mask))
        mask[3:5] ^= True
    assert packing.packed == 3
    assert len(lowering._cache.by_storage) == 1  # the old ones are gone


def test_a_change_between_forward_and_backward(packing):
    """The backward belongs to the mask that the forward saw."""
    mask = bits(LQ, LK)
    q = Q.clone().requires_grad_()
    out = tilemask.scaled_dot_product_attention(q, K, V, attn_mask=mask)
    first = packing.seen[0].prepared
    words = first["words"]
    mask.fill_(True)
    out.sum().backward()
    torch.testing.assert_close(first["transposed"], words)
    assert packing.packed == 1


def test_sizes_and_devices_have_packs_of_their_own():
    mask = bits(1, LK)  # broadcasts to any B, H and Lq
    first = prepared(masks.dense(mask))
    assert prepared(masks.dense(mask)) is first
    assert prepared(masks.dense(mask), B=4) is not first
    assert prepared(masks.dense(mask), H=4) is not first
    assert prepared(masks.dense(mask), Lq=4) is not first
    short = masks.dense(mask) & masks.padding(query_lengths=4)
    assert lower(short, Lq=8).bounds == lower(short, Lq=9).bounds
    assert prepared(short, Lq=8) is not prepared(short, Lq=9)
    keep = bits(B, LK)  # per batch, or per row where there are B rows
    assert prepared(masks.padding(keep=keep), Lq=B) is not prepared(masks.dense(keep), Lq=B)


def test_views_of_one_storage_are_not_confused(packing):
    storage = bits(4 * LQ * LK)
    square = bits(LQ, LQ)

    def views():
        yield storage[: LQ * LK].view(LQ, LK)  # offset
        yield storage[1 : 1 + LQ * LK].view(LQ, LK)
        yield storage[: 2 * LQ * LK].view(LQ, 2 * LK)[:, :LK]  # stride
        yield storage[: 2 * LQ * LK : 2].view(LQ, LK)
        yield storage[: LQ * LK].view(1, 1, LQ, LK).expand(B, H, -1, -1)
        yield storage[: LQ * LK].view(LK, LQ).t()
        yield storage[:LK].view(1, LK)  # shape
        yield storage[:LK].view(1, LK).expand(LQ, LK)
        yield storage[: B * LK].view(B, 1, 1, LK)

    for _ in range(2):
        for number, view in enumerate(views()):
            torch.testing.assert_close(sdpa(view), expected(view), msg=str(number))
    assert packing.packed == 9
    assert prepared(masks.dense(square), Lk=LQ) is prepared(masks.dense(square), Lk=LQ)
    assert prepared(masks.dense(square), Lk=LQ) is not prepared(masks.dense(square.t()), Lk=LQ)


def test_a_new_storage_at_the_same_address_is_new(packing):
    memory = bytearray(bits(LQ * LK).numpy().tobytes())
    for fill in (0, 1, 0):
        memory[:] = bytes([fill]) * (LQ * LK)
        mask = torch.frombuffer(memory, dtype=torch.bool).view(LQ, LK)
        torch.testing.assert_close(sdpa(mask), expected(mask))
        del mask
    assert packing.packed == 3


def test_an_entry_of_another_storage_with_the_same_id_is_not_used():
    """Ids of dead objects come back; the entry knows its storage itself."""
    mask, other = bits(LQ, LK), bits(LQ, LK, seed=1)
    first = prepared(masks.dense(mask))
    ((key, (versions, _owners, kept, layout)),) = lowering._cache.by_storage.items()
    assert kept is first
    for stranger in ((other.untyped_storage(), mask), (mask.untyped_storage(), other)):
        owners = [weakref.ref(source) for source in stranger]
        lowering._cache.by_storage[key] = versions, owners, kept, layout
        assert prepared(masks.dense(mask)) is not first


def test_aliases_with_a_counter_of_their_own_are_other_masks(packing):
    """Views count writes together; what .data gives starts to count at 0 each time."""
    mask = bits(LQ, LK)
    for _ in range(2):
        torch.testing.assert_close(sdpa(mask.data), expected(mask))
        mask.logical_not_()  # which mask.data does not count
    alias, mask = mask, mask.data
    for tensor in (alias, mask, alias, mask):
        while mask._version != alias._version:  # the same count says nothing
            min(mask, alias, key=lambda t: t._version).logical_not_()
        tensor.logical_not_()
        torch.testing.assert_close(sdpa(tensor), expected(tensor))
    del alias, tensor
    packing.seen.clear()
    mask.data = bits(LQ, LK, seed=5)  # another storage, uncounted
    assert not lowering._cache.by_storage
    torch.testing.assert_close(sdpa(mask), expected(mask))
    packed = packing.packed
    for view in (mask[:], mask[None], mask.view(-1).view(LQ, LK)):
        torch.testing.assert_close(sdpa(view), expected(mask))
    assert packing.packed == packed + 1  # (1, LQ, LK) is another shape


def test_what_is_shared_goes_with_the_storage():
    gc.collect()
    gc.disable()  # so nothing below hangs on a cycle
    try:
        mask = bits(LQ, LK)
        other_view = mask[:, :]
        kept = prepared(masks.dense(mask) & masks.causal())
        words = weakref.ref(kept.make("words", lambda: torch.zeros(5)))
        storage = weakref.ref(mask.untyped_storage())
        del kept, mask
        assert words() is not None and storage() is not None
        del other_view
        assert storage() is None
        assert words() is None
        assert not lowering._cache.by_storage
    finally:
        gc.enable()


def test_a_call_leaves_no_cycle(packing):
    gc.collect()
    gc.disable()
    try:
        mask = bits(LQ, LK)
        q = Q.clone().requires_grad_()
        tilemask.scaled_dot_product_attention(q, K, V, attn_mask=mask).sum().backward()
        words = weakref.ref(packing.seen[0].prepared["words"])
        held = weakref.ref(packing.seen[0])
        packing.seen.clear()
        assert held() is None and words() is not None
        storage = weakref.ref(mask.untyped_storage())
        del mask
        assert storage() is None and words() is None
    finally:
        gc.enable()


def test_the_number_of_entries_is_bounded():
    storage = bits(lowering.MOST_SHARED + LQ * LK + 9)
    views = [storage[n : n + LQ * LK].view(LQ, LK) for n in range(lowering.MOST_SHARED + 1)]
    first, second = (prepared(masks.dense(view)) for view in views[:2])
    for view in views[2:-1]:
        prepared(masks.dense(view))
    assert prepared(masks.dense(views[0])) is first  # used again: now the youngest
    prepared(masks.dense(views[-1]))
    assert len(lowering._cache.by_storage) == lowering.MOST_SHARED
    assert prepared(masks.dense(views[0])) is first
    assert prepared(masks.dense(views[1])) is not second


def test_inference_tensors_and_subclasses_are_not_kept():
    with torch.inference_mode():
        mask = bits(LQ, LK)
    assert prepared(masks.dense(mask)) is not prepared(masks.dense(mask))
    mask = bits(LQ, LK).as_subclass(type("Own", (torch.Tensor,), {}))
    assert prepared(masks.dense(mask)) is not prepared(masks.dense(mask))
    assert not lowering._cache.by_storage


def test_inference_mode_and_autograd_share_a_pack():
    mask = bits(LQ, LK)
    with torch.inference_mode():
        inside = prepared(masks.dense(mask))
        words = inside.make("words", lambda: torch.ones(3))
        nested = inside.make("more", lambda: inside.make("words", None) * 2)
    assert prepared(masks.dense(mask)) is inside
    weight = torch.ones(3, requires_grad=True)
    (weight * words * nested).sum().backward()  # saves both: inference tensors would be refused
    assert weight.grad.tolist() == [2, 2, 2]


def test_nothing_is_kept_under_transforms_and_modes():
    mask = bits(LQ, LK)
    seen = []

    def look(x):
        seen.append(prepared(masks.dense(mask)))
        return x

    torch.vmap(look)(torch.zeros(2))
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        look(0)
    assert not lowering._cache.by_storage
    assert seen[0] is not seen[1]


# -- switching off --------------------------------------------------------------------------------


def test_caching_off(packing):
    mask = bits(LQ, LK)
    written = mask.data  # its writes are not counted
    sdpa(mask)
    with masks.caching(False):
        assert not masks.is_caching()
        for _ in range(2):
            written.logical_not_()
            torch.testing.assert_close(sdpa(mask), expected(mask))
        assert packing.packed == 3
        causal = masks.causal()
        assert lower(causal) is not lower(causal)
        written.logical_not_()
    sdpa(mask)
    sdpa(mask)
    assert packing.packed == 4  # once more: what was kept before the block is gone
    torch.testing.assert_close(packing.seen[-1].prepared["words"].view(LQ, LK), mask)


def test_caching_is_restored():
    with masks.caching(False):
        with masks.caching(True):
            assert masks.is_caching()
        assert not masks.is_caching()
    assert masks.is_caching()
    with pytest.raises(KeyError), masks.caching(False):
        raise KeyError
    assert masks.is_caching()
    before = masks.caching(False)
    assert not masks.is_caching()
    before.__exit__()
    assert masks.is_caching()


@pytest.mark.parametrize("value, kept", [("0", False), ("1", True), (None, True)])
def test_caching_by_environment(value, kept):
    environment = {k: v for k, v in os.environ.items() if k != "TILEMASK_MASK_CACHE"}
    if value is not None:
        environment["TILEMASK_MASK_CACHE"] = value
    code = """
import torch
from tilemask import lowering, masks
causal, mask = masks.causal(), torch.ones(4, 4, dtype=torch.bool)
def lower(mask):
    return lowering.lower(mask, 1, 1, 4, 4, torch.device("cpu"))
print(lower(causal) is lower(causal),
      lower(masks.dense(mask)).prepared is lower(masks.dense(mask)).prepared)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(kept)] * 2


# -- graph captures -------------------------------------------------------------------------------


@pytest.fixture
def capture(monkeypatch):
    """capture(number) is as if the capture of a graph of that number went on; None ends it."""

    def set_to(number):
        monkeypatch.setattr(lowering, "capture_id", lambda device: number)

    return set_to


def test_a_capture_keeps_for_itself(capture, packing):
    mask, causal = bits(LQ, LK), masks.causal()
    sdpa(mask)
    outside, affine = prepared(masks.dense(mask)), lower(causal)
    capture(7)
    for _ in range(3):
        sdpa(mask)
    assert packing.packed == 2  # once for all calls in the graph
    inside = prepared(masks.dense(mask))
    assert inside is not outside and "words" in inside
    assert lower(causal) is lower(causal) is not affine
    capture(8)
    sdpa(mask)
    assert packing.packed == 3
    assert prepared(masks.dense(mask)) is not inside
    capture(7)
    assert prepared(masks.dense(mask)) is not inside  # one capture's memo only
    capture(None)
    sdpa(mask)
    assert packing.packed == 3
    assert prepared(masks.dense(mask)) is outside and lower(causal) is affine


def test_a_capture_publishes_nothing_and_is_forgotten(capture):
    mask = bits(LQ, LK)
    capture(7)
    words = weakref.ref(prepared(masks.dense(mask)).make("words", lambda: torch.zeros(4)))
    assert words() is not None
    assert not lowering._cache.by_storage
    capture(None)
    lower(masks.causal())
    assert words() is None


def test_captures_that_cannot_be_told_apart_share_nothing(monkeypatch):
    """No driver to ask: every question gets an answer like no other."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(lowering, "stream_id", lambda device: 5)

    def no_driver():
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(lowering, "capture_info", no_driver)
    device = torch.device("cuda", 0)
    ids = [lowering.capture_id(device) for _ in range(2)]
    assert None not in ids and ids[0] != ids[1]


@pytest.mark.parametrize(
    "status, error, expected", [(1, 0, 77), (0, 0, None), (2, 0, "unique"), (1, 900, "unique")]
)
def test_the_driver_tells_the_capture(monkeypatch, status, error, expected):
    asked = []

    def info(stream, status_out, id_out, graph, dependencies, number):
        asked.append((stream, graph, dependencies, number))
        status_out.value, id_out.value = status, 77
        return error

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(lowering, "stream_id", lambda device: 5)
    monkeypatch.setattr(lowering, "capture_info", lambda: info)
    found = lowering.capture_id(torch.device("cuda", 0))
    assert asked == [(5, None, None, None)]
    assert found == expected or (expected == "unique" and type(found) is object)


def test_the_driver_is_asked_only_while_capturing(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(lowering, "stream_id", lambda device: 5)
    monkeypatch.setattr(lowering, "capture_info", lambda: lambda *_: asked.append(1) or 0)
    assert lowering.capture_id(CPU) is None
    assert lowering.capture_id(torch.device("cuda", 0)) is None
    assert not asked
    # torch speaks of the current device alone
    assert lowering.capture_id(torch.device("cuda", 1)) is None
    assert asked


# -- streams --------------------------------------------------------------------------------------


class Gpu:
    """Streams, events and captures of a pretended GPU; ``log`` is what was asked of it."""

    def __init__(self):
        self.stream, self.capture, self.log = 1, None, []

    def current(self, device):
        return Stream(self, self.stream)


class Stream:
    def __init__(self, gpu, number):
        self.gpu, self.number = gpu, number

    def record_event(self):
        self.gpu.log.append(("record", self.number))
        return f"event of {self.number}"

    def wait_event(self, event):
        self.gpu.log.append(("wait", self.number, event))


@pytest.fixture
def gpu(monkeypatch):
    gpu = Gpu()
    monkeypatch.setattr(lowering, "has_streams", lambda device: True)
    monkeypatch.setattr(lowering, "stream_id", lambda device: gpu.stream)
    monkeypatch.setattr(lowering, "current_stream", gpu.current)
    monkeypatch.setattr(lowering, "capture_id", lambda device: gpu.capture)
    monkeypatch.setattr(
        torch.Tensor,
        "record_stream",
        lambda tensor, stream: gpu.log.append(("used on", stream.number, tensor.numel())),
        raising=False,
    )
    return gpu


def counting(*sizes):
    """A function that makes tensors of these sizes, and how often it was called."""
    calls = []

    def make():
        calls.append(1)
        made = tuple(torch.zeros(n) for n in sizes)
        return made if len(sizes) > 1 else made[0]

    return make, calls


def test_another_stream_waits_once(gpu):
    prepared, (make, calls) = lowering.Prepared(), counting(2, 5)
    value = prepared.make("lists", make)
    assert gpu.log == [("record", 1)]
    assert prepared.make("lists", make) is value
    gpu.stream = 2
    assert prepared.make("lists", make) is value
    assert prepared.make("lists", make) is value
    gpu.stream = 1
    assert prepared.make("lists", make) is value
    assert gpu.log == [
        ("record", 1),
        ("wait", 2, "event of 1"),
        ("used on", 2, 2),
        ("used on", 2, 5),
    ]
    assert len(calls) == 1


def test_every_fill_has_its_own_event(gpu):
    prepared, (make, _) = lowering.Prepared(), counting(3)
    prepared.make("words", make)
    gpu.stream = 2
    prepared.make("transposed", make)
    prepared.make("words", make)
    gpu.stream = 1
    prepared.make("transposed", make)
    assert gpu.log == [
        ("record", 1),
        ("record", 2),
        ("wait", 2, "event of 1"),
        ("used on", 2, 3),
        ("wait", 1, "event of 2"),
        ("used on", 1, 3),
    ]


def test_streams_share_packs_but_not_lowered_forms(gpu):
    mask = bits(LQ, LK)
    dense, documents = masks.dense(mask), masks.prefix_lm(torch.tensor([3]))
    first = [lower(dense), lower(documents)]
    assert [lower(dense), lower(documents)] == first
    gpu.stream = 2
    second = [lower(dense), lower(documents)]
    assert second[0] is not first[0] and second[1] is not first[1]
    assert second[0].prepared is first[0].prepared
    assert second[1].prepared is not first[1].prepared


def test_a_value_of_a_capture_is_there_for_that_capture(gpu):
    prepared, (make, calls) = lowering.Prepared(), counting(3)
    gpu.capture = 7
    value = prepared.make("words", make)
    assert prepared.make("words", make) is value
    gpu.stream = 2  # a stream that takes part in the capture
    assert prepared.make("words", make) is value
    assert ("wait", 2, "event of 1") in gpu.log
    gpu.stream, gpu.capture = 1, 8
    assert prepared.make("words", make) is not value
    gpu.capture = None
    outside = prepared.make("words", make)
    assert prepared.make("words", make) is outside
    assert len(calls) == 3


def test_a_capture_reads_what_was_made_before_it(gpu):
    prepared, (make, calls) = lowering.Prepared(), counting(3)
    value = prepared.make("words", make)
    gpu.stream, gpu.capture = 2, 7
    assert prepared.make("words", make) is value
    assert gpu.log == [("record", 1)]  # no wait: the capture could not contain it
    gpu.capture = None
    assert prepared.make("words", make) is value
    assert ("wait", 2, "event of 1") in gpu.log
    assert len(calls) == 1


def test_prepared_is_a_mapping_without_streams(gpu):
    prepared = lowering.Prepared()
    prepared["words"] = value = torch.zeros(2)
    assert "words" in prepared and "lists" not in prepared
    assert prepared["words"] is prepared.get("words") is value
    assert prepared.get("lists") is None and prepared.get("lists", 5) == 5
    with pytest.raises(KeyError):
        prepared["lists"]
    assert prepared.make("words", None) is value
    copy = prepared.copy()
    copy["lists"] = value
    assert copy["words"] is value and "lists" not in prepared
    assert gpu.log == []


def test_a_failing_function_keeps_nothing():
    prepared, (make, _) = lowering.Prepared(), counting(3)
    with pytest.raises(ZeroDivisionError):
        prepared.make("words", lambda: 1 // 0)
    assert "words" not in prepared
    assert prepared.make("words", make).numel() == 3


# -- threads --------------------------------------------------------------------------------------


def test_threads(monkeypatch):
    """Lookups, evictions, changes and deaths at once: no error, and no pack of another mask."""
    monkeypatch.setattr(lowering, "MOST_SHARED", 4)
    constant = [bits(LQ, LK, seed=n) for n in range(6)]
    errors = []

    def work(seed):
        try:
            for n in range(300):
                mask = constant[(n * (seed + 1)) % 6] if n % 3 else bits(LQ, LK, seed=n)
                if n % 3 == 0 and n % 2:
                    prepared(masks.dense(mask)).make("words", mask.clone)
                    mask.logical_not_()
                words = prepared(masks.dense(mask)).make("words", mask.clone)
                assert torch.equal(words, mask)
                del mask, words
        except BaseException as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert errors == []
    assert len(lowering._cache.by_storage) <= 4


def test_nothing_is_evicted_while_it_is_looked_up(monkeypatch):
    monkeypatch.setattr(lowering, "MOST_SHARED", 1)
    mask, other = masks.dense(bits(LQ, LK)), masks.dense(bits(LQ, LK))
    threads = [threading.Thread(target=prepared, args=(other,))]

    class Slow(OrderedDict):
        def get(self, key):
            entry = super().get(key)
            if entry is not None and threads:
                thread = threads.pop()
                thread.start()
                thread.join(0.3)  # would evict the entry; waits until the lookup is over
            return entry

    lowering._cache.by_storage = Slow()
    first = prepared(mask)
    assert prepared(masks.dense(mask.mask)) is first
    assert threads == []


# -- prepare() ------------------------------------------------------------------------------------

IDS = torch.arange(LQ) // 7
CU = torch.tensor([0, 9, LQ])
KINDS = {
    "dense": lambda: masks.dense(bits(B, 1, LQ, LQ)),
    "expanded": lambda: masks.dense(bits(1, 1, LQ, LQ).expand(B, H, -1, -1)),
    "rows": lambda: masks.dense(bits(LQ, 1)),
    "keys": lambda: masks.padding(keep=bits(B, LQ)),
    "padding": lambda: masks.causal() & masks.padding(torch.tensor([LQ, 9])),
    "varlen": lambda: masks.varlen(CU.clone(), within=masks.causal()),
    "documents": lambda: masks.documents(IDS.clone(), within=masks.window(3, 3)),
    "contiguous": lambda: masks.documents(IDS.clone(), contiguous=True),
    "prefix_lm": lambda: masks.prefix_lm(torch.tensor([3, 9])),
    "intervals": lambda: masks.intervals(IDS.clone(), IDS + 5),
    "everything": lambda: (
        masks.dense(bits(LQ, LQ)) & masks.padding(keep=bits(B, LQ)) & masks.causal()
    ),
}
X = torch.randn(B, H, LQ, 8)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prepared_mask_is_a_snapshot(kind):
    mask = KINDS[kind]()
    made = masks.prepare(mask, X, X)
    out, dense = tilemask.attention(X, X, X, mask=mask), mask.to_dense(B, H, LQ, LQ).clone()
    picture = mask.picture(LQ, LQ, B=B, H=H, tile=(4, 4))
    for tensor in mask.tensors():
        changed = tensor.numel() and tensor.stride()[0] == 0
        tensor = tensor[:1, :1] if changed else tensor
        tensor.copy_(~tensor if tensor.dtype == torch.bool else tensor.flip(0) * 0)
    assert not torch.equal(mask.to_dense(B, H, LQ, LQ), dense)
    torch.testing.assert_close(tilemask.attention(X, X, X, mask=made), out)
    assert torch.equal(made.to_dense(B, H, LQ, LQ), dense)
    assert made.picture(LQ, LQ, B=B, H=H, tile=(4, 4)) == picture


def test_a_prepared_mask_is_lowered_no_more(monkeypatch, packing):
    made = masks.prepare(KINDS["varlen"](), X, X)
    forms = lower(made, Lq=LQ, Lk=LQ)
    monkeypatch.setattr(lowering, "lower_anew", None)
    with masks.caching(False):
        assert lower(made, Lq=LQ, Lk=LQ) is forms
        tilemask.attention(X, X, X, mask=made)
        tilemask.scaled_dot_product_attention(X, X, X, attn_mask=made)
    assert packing.packed == 1


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("backward", [None, True, False])
def test_the_backend_prepares(packing, backward, grad):
    with torch.set_grad_enabled(grad):
        made = masks.prepare(bits(LQ, LQ), X, X, backward=backward)
    assert packing.packed == 1
    wanted = grad if backward is None else backward
    assert ("transposed" in made.lowered.prepared) == wanted
    x = X.clone().requires_grad_()
    tilemask.attention(x, X, X, mask=made).sum().backward()
    assert packing.packed == 1
    assert "transposed" in made.lowered.prepared


def test_prepare_sees_what_the_call_will_be(monkeypatch, packing):
    calls = []
    monkeypatch.setattr(Packing, "prepare", lambda self, call, backward: calls.append(call))
    wide = torch.randn(B, 1, LQ, 16)
    masks.prepare(bits(LQ, LQ), X, X[:, :1])
    masks.prepare(bits(LQ, LQ), X.half(), X[:, :1].half(), wide.half())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        masks.prepare(bits(LQ, LQ), X, X)
    assert [(c.q.dtype, c.v.shape[3]) for c in calls] == [
        (torch.float32, 8), (torch.float16, 16), (torch.bfloat16, 8)
    ]  # fmt: skip


def test_prepared_in_inference_mode_used_in_training():
    with torch.inference_mode():
        made = masks.prepare(
            masks.prefix_lm(torch.tensor([3, 9])) & masks.dense(bits(LQ, LQ)), X, X
        )
    x = X.clone().requires_grad_()
    tilemask.attention(x, X, X, mask=made).sum().backward()
    assert not made.lowered.lo.is_inference()
    assert not any(t.is_inference() for t in made.tensors())


OTHER = {
    "batch": (X[:1], X[:1]),
    "heads": (X[:, :1], X[:, :1]),
    "Lq": (X[:, :, :5], X),
    "Lk": (X, X[:, :, :5]),
    "device": (X.to("meta"), X.to("meta")),
}


@pytest.mark.parametrize("what", OTHER)
def test_other_sizes_are_refused(what):
    made = masks.prepare(masks.causal(), X, X)
    q, k = OTHER[what]
    came = (
        f"B = {q.shape[0]}, Hq = {q.shape[1]}, Lq = {q.shape[2]}, Lk = {k.shape[2]} on {q.device}"
    )
    with pytest.raises(ValueError) as error:
        tilemask.attention(q, k, k, mask=made)
    assert f"prepared for B = {B}, Hq = {H}, Lq = {LQ}, Lk = {LQ} on cpu" in str(error.value)
    assert f"the call has {came}" in str(error.value)
    assert tilemask.attention(X, X[:, :1], X[:, :1], mask=made).shape == X.shape  # heads of K: any


@pytest.mark.parametrize(
    "bad", [None, X, 3, bits(7, 7), bits(5)], ids=["None", "float", "int", "size", "1-D"]
)
def test_what_cannot_be_prepared(bad):
    with pytest.raises((TypeError, ValueError), match="mask"):
        masks.prepare(bad, X, X)


def test_a_prepared_mask_joins_others():
    mask = masks.dense(bits(LQ, LQ))
    made = masks.prepare(mask, X, X)
    for joined in (made & masks.causal(), masks.causal() & made, made & made & masks.causal()):
        assert type(joined) is masks.All and masks.PreparedMask not in map(type, joined.parts)
        torch.testing.assert_close(
            tilemask.attention(X, X, X, mask=joined),
            tilemask.attention(X, X, X, mask=mask & masks.causal()),
        )
    torch.testing.assert_close(
        tilemask.scaled_dot_product_attention(X, X, X, attn_mask=made, is_causal=True),
        tilemask.attention(X, X, X, mask=mask & masks.causal()),
    )
    again = masks.prepare(made, X[:1], X[:1])
    assert again.source is made.source  # copied once
    torch.testing.assert_close(
        tilemask.attention(X[:1], X[:1], X[:1], mask=again),
        tilemask.attention(X[:1], X[:1], X[:1], mask=mask),
    )
    assert tilemask.explain(X, X, X, mask=made).mask == "affine bounds, bits per pair"
    assert masks.prepare(masks.causal(), X, X).picture(8, 8) == masks.causal().picture(8, 8)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_graph_does_not_lower_a_prepared_mask(kind, dynamic):
    """Its tensors are inputs of the graph, and attention is the only op."""
    made = masks.prepare(KINDS[kind](), X, X)
    ops, inputs = [], []

    def record(graph, _):
        ops.extend(str(n.target) for n in graph.graph.nodes if n.op != "placeholder")

        def run(*arguments):
            inputs.extend(arguments)
            return graph(*arguments)

        return make_boxed_func(run)

    def call(x):
        return tilemask.attention(x, x, x, mask=made)

    torch._dynamo.reset()
    compiled = torch.compile(
        call, fullgraph=True, dynamic=dynamic, backend=aot_autograd(fw_compiler=record)
    )
    before = list(made.lowered.prepared.kept)
    torch.testing.assert_close(compiled(X), call(X))
    assert list(made.lowered.prepared.kept) == before
    if kind != "documents":  # whose bits the reference computes in every call
        assert set(ops) == {"tilemask.forward.default", "<built-in function getitem>", "output"}
    form = made.lowered
    parts = (form.batch_bounds, form.lo, form.hi, form.key_bits)
    assert {t.data_ptr() for t in parts if t is not None} <= {
        t.data_ptr() for t in inputs if isinstance(t, torch.Tensor)
    }


def test_compiled_training_with_a_prepared_mask():
    made = masks.prepare(KINDS["varlen"](), X, X)

    def call(x):
        return tilemask.attention(x, x, x, mask=made).square().sum()

    torch._dynamo.reset()
    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    torch.compile(call, fullgraph=True, backend="aot_eager")(x).backward()
    call(y).backward()
    torch.testing.assert_close(x.grad, y.grad)


# -- on the Triton kernels, in the interpreter or on a GPU ----------------------------------------

TRITON_KINDS = ("dense", "everything", "documents", "varlen")


def on_triton(kind: str, training: bool, device: str) -> tuple[float, list[str]]:
    """A compiled call with a prepared mask: its largest error, and the ops of its graphs."""
    x = X.to(device).requires_grad_(training)
    mask = KINDS[kind]()
    ops = []

    def record(graph, _):
        ops.extend(str(n.target) for n in graph.graph.nodes)
        return make_boxed_func(graph)

    def results(function):
        out = function()
        return (out, *torch.autograd.grad(out.square().sum(), x)) if training else (out,)

    def call():
        return tilemask.attention(x, x, x, mask=made, backend="triton")

    with torch.set_grad_enabled(training), ways.forced_tile(ways.TILE):
        made = masks.prepare(mask, x, x)
        torch._dynamo.reset()
        backend = aot_autograd(fw_compiler=record, bw_compiler=record)
        got = results(torch.compile(call, fullgraph=True, backend=backend))
        wanted = results(lambda: tilemask.attention(x, x, x, mask=mask, backend="reference"))
    return max((a - b).abs().max().item() for a, b in zip(got, wanted, strict=True)), ops


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", TRITON_KINDS)
@pytest.mark.parametrize("way", ways.WAYS, ids=lambda way: way.name)
def test_a_prepared_mask_in_a_graph_of_kernels(way, kind, training):
    error, ops = way.call(on_triton, kind, training, way.device)
    assert error < 1e-4
    own = [op for op in ops if "tilemask" in op]
    assert own == [f"tilemask.{d}.default" for d in ("forward", "backward")[: 1 + training]]


def packs_on_triton(device: str) -> list[int]:
    """How often four layers pack a bool mask and transpose its words: forward, then backward; then
    after a change of the mask."""
    from tilemask.kernels import pack

    x, mask = X.to(device).requires_grad_(), bits(B, 1, LQ, LQ).to(device)
    calls = {"pack_bits": 0, "transpose_words": 0}

    def counted(name, function):
        def count(*arguments):
            calls[name] += 1
            return function(*arguments)

        return count

    functions = {name: getattr(pack, name) for name in calls}
    numbers = []
    triton.launched.cache_clear()
    try:
        for name, function in functions.items():
            setattr(pack, name, counted(name, function))
        with tilemask.use_backend("triton"), ways.forced_tile(ways.TILE):
            for _ in range(2):
                y = x
                for _ in range(4):
                    y = tilemask.scaled_dot_product_attention(y, y, y, mask, is_causal=True)
                numbers += calls.values()
                y.sum().backward()
                numbers += calls.values()
                mask.logical_not_()
    finally:
        for name, function in functions.items():
            setattr(pack, name, function)
        triton.launched.cache_clear()
    return numbers


@pytest.mark.parametrize("way", ways.WAYS, ids=lambda way: way.name)
def test_layers_pack_once_on_the_kernels(way):
    assert way.call(packs_on_triton, way.device) == [1, 0, 1, 1, 2, 1, 2, 2]


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@needs_gpu
def test_capture_ids_of_the_driver():
    device, found = torch.device("cuda", torch.cuda.current_device()), []
    assert lowering.capture_id(device) is None
    for _ in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            torch.zeros(1, device=device)
            found += [lowering.capture_id(device), lowering.capture_id(device)]
    assert lowering.capture_id(device) is None
    assert found[0] == found[1] and found[2] == found[3] and found[1] != found[2]
    assert all(type(number) is int for number in found)


@needs_gpu
def test_a_graph_packs_once_and_reads_the_mask_anew_in_every_replay():
    x, mask = X.cuda().half(), bits(B, 1, LQ, LQ).cuda()

    def layers():
        y = x
        for _ in range(3):
            y = tilemask.scaled_dot_product_attention(y, y, y, mask)
        return y

    def wanted():
        with tilemask.use_backend("reference"):
            return layers()

    with tilemask.use_backend("triton"), torch.no_grad():
        layers()  # compiles, and keeps a pack of the mask as it is now
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layers()
            kept = lowering._captured[1].by_storage
            assert len(kept) == 1
    for _ in range(2):
        graph.replay()
        torch.testing.assert_close(out, wanted(), rtol=1e-2, atol=1e-2)
        mask.logical_not_()
    assert lowering._captured is None


@needs_gpu
def test_streams_of_a_gpu():
    mask, side = bits(B, 1, LQ, LQ).cuda(), torch.cuda.Stream()
    prepared = lower(masks.dense(mask), Lk=LQ).prepared

    def slow():
        torch.cuda._sleep(100_000_000)
        return torch.ones(1 << 20, device="cuda")

    value = prepared.make("words", slow)
    with torch.cuda.stream(side):
        assert prepared.make("words", None) is value
        total = value.sum()
    side.synchronize()
    assert total.item() == 1 << 20
