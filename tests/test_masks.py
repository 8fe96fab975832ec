"""Masks: what they mean, how they lower, what is kept of them, and what they refuse."""

import gc
import re
import weakref

import cases
import oracle
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import tilemask
from tilemask import lowering, masks

CPU = torch.device("cpu")
MASKED = [case for case in cases.CASES if case.mask("cpu") is not None]


def ints(*values, dtype=torch.int64):
    return torch.tensor(values, dtype=dtype)


# -- the definition -------------------------------------------------------------------------------


@pytest.mark.parametrize("case", MASKED, ids=repr)
def test_to_dense(case):
    dense = case.mask("cpu").to_dense(case.B, case.Hq, case.Lq, case.Lk)
    assert dense.dtype == torch.bool and dense.shape == (case.B, case.Hq, case.Lq, case.Lk)
    assert torch.equal(dense, case.seen())


@pytest.mark.parametrize("case", cases.CASES, ids=repr)
def test_lowered_form_is_the_mask(case):
    """Bounds, intervals and bits, put together again, and what padding takes out."""
    form = lowering.lower(case.mask("cpu"), case.B, case.Hq, case.Lq, case.Lk, CPU)
    rows, cols = torch.arange(case.Lq).view(1, 1, -1, 1), torch.arange(case.Lk)
    start, end, left, right, q_start, q_end = (
        form.column(i) if isinstance(form.column(i), int) else form.column(i)[..., None]
        for i in range(6)
    )
    affine = (start <= cols) & (cols < end) & (rows + left <= cols) & (cols < rows + right)
    affine = affine & (q_start <= rows) & (rows < q_end)
    seen = affine
    if form.lo is not None:
        assert form.lo.dtype == form.hi.dtype == torch.int32
        assert form.lo.is_contiguous() and form.lo.shape == form.hi.shape
        seen = (form.lo[..., None] <= cols) & (cols < form.hi[..., None])
        assert not (seen & ~affine).any()  # kernels bound their loops by the affine part
        dead = form.lo >= form.hi
        assert (form.lo[dead] == 0).all() and (form.hi[dead] == 0).all()
        assert (form.lo >= 0).all() and (form.hi <= case.Lk).all()
    if form.key_bits is not None:
        assert form.key_bits.dtype == torch.bool
        assert form.key_bits.shape in ((1, 1, 1, case.Lk), (case.B, 1, 1, case.Lk))
        seen = seen & form.key_bits
    if form.bits is not None:
        pairs = form.bits.rows(0, case.Lq)
        assert pairs.dtype == torch.bool and pairs.shape == form.bits.shape
        assert pairs.shape[3] == case.Lk
        seen = seen & pairs
    full = (case.B, case.Hq, case.Lq, case.Lk)
    assert torch.equal(seen.expand(full), case.seen())

    keys, live_rows = form.live_keys(CPU), form.live_rows(CPU)
    keys = torch.ones(1, 1, case.Lk, dtype=torch.bool) if keys is None else keys
    live_rows = torch.ones(1, 1, case.Lq, dtype=torch.bool) if live_rows is None else live_rows
    assert torch.equal(keys[:, 0].expand(case.B, -1), case.live_keys())
    assert torch.equal(live_rows[:, 0].expand(case.B, -1), case.live_rows())


EXAMPLES = {
    "causal": masks.causal(),
    "window": masks.window(5, 2, offset=ints(0, 7)),
    "chunked": masks.chunked(7),
    "padding": masks.padding([20, 9], start=[0, 3], query_lengths=[17, 20]),
    "keep": masks.padding(keep=cases.random_bits("example", (2, 20))),
    "prefix": masks.prefix_lm([4, 11]),
    "varlen": masks.varlen(ints(0, 5, 20), within=masks.causal()),
    "documents": masks.documents(ints(*([3] * 8 + [1] * 12)), contiguous=True),
    "mixed": masks.documents(ints(*range(5)).repeat(4)),
    "intervals": masks.intervals(*cases.random_intervals("example", (2, 3, 20), 20)),
    "dense": masks.dense(cases.random_bits("dense example", (3, 20, 20))),
}
SIZE = (2, 3, 20, 20)


@pytest.mark.parametrize("first", EXAMPLES)
def test_laws_of_and(first):
    a = EXAMPLES[first]
    dense = a.to_dense(*SIZE)
    assert torch.equal((a & a).to_dense(*SIZE), dense)
    for b in EXAMPLES.values():
        both = dense & b.to_dense(*SIZE)
        assert torch.equal((a & b).to_dense(*SIZE), both)
        assert torch.equal((b & a).to_dense(*SIZE), both)
        for c in (EXAMPLES["padding"], EXAMPLES["keep"], EXAMPLES["prefix"]):
            three = both & c.to_dense(*SIZE)
            assert torch.equal(((a & b) & c).to_dense(*SIZE), three)
            assert torch.equal((a & (b & c)).to_dense(*SIZE), three)


@pytest.mark.parametrize("name", EXAMPLES)
def test_and_with_something_else(name):
    for other in (torch.ones(20, 20, dtype=torch.bool), True, None):
        with pytest.raises(TypeError):
            EXAMPLES[name] & other
        with pytest.raises(TypeError):
            other & EXAMPLES[name]


def test_parameters_in_other_integer_types():
    for dtype in (torch.int16, torch.int32, torch.int64):
        lengths, cu = ints(20, 3, dtype=dtype), ints(0, 5, 20, dtype=dtype)
        lo, hi = ints(*range(20), dtype=dtype), ints(*[20] * 20, dtype=dtype)
        for mask, rule in (
            (masks.padding(lengths), oracle.padding([20, 3])),
            (masks.causal(lengths), oracle.causal([20, 3])),
            (masks.prefix_lm(lengths), oracle.prefix_lm([20, 3])),
            (masks.varlen(cu), oracle.varlen([0, 5, 20])),
            (masks.documents(lo // 7), oracle.documents([(lo // 7).tolist()])),
            (masks.intervals(lo, hi), oracle.intervals(lo, hi)),
        ):
            assert torch.equal(mask.to_dense(2, 1, 20, 20), rule.seen(2, 1, 20, 20)), (dtype, mask)


def test_huge_offsets_do_not_wrap():
    for offset in (2**31 - 1, 2**40, ints(2**62)):
        assert masks.causal(offset).to_dense(1, 1, 5, 5).all()
    for offset in (-(2**31), -(2**40), ints(-(2**62))):
        assert not masks.causal(offset).to_dense(1, 1, 5, 5).any()
    wide = masks.window(2**40, 2**40, offset=2**35)
    assert wide.to_dense(1, 1, 5, 5).all()


WITH_BITS = [
    case
    for case in MASKED
    if lowering.lower(case.mask("cpu"), case.B, case.Hq, case.Lq, case.Lk, CPU).bits is not None
]


@pytest.mark.parametrize("case", WITH_BITS, ids=repr)
def test_bits_of_some_rows(case):
    """A few rows at a time are what all rows are, and the 5-D tensor says the same."""
    bits = lowering.lower(case.mask("cpu"), case.B, case.Hq, case.Lq, case.Lk, CPU).bits
    whole = bits.rows(0, case.Lq)
    for first in range(0, case.Lq, 7):
        count = min(7, case.Lq - first)
        part = whole[:, :, first : first + count] if whole.shape[2] > 1 else whole
        assert torch.equal(bits.rows(first, count), part)
    tensor = bits.tensor(case.Lq)
    outer, inner = masks.split_batch(case.B, *tensor.shape[:2])
    assert outer * inner == case.B and tensor.dim() == 5
    flat = tensor.expand(outer, inner, case.Hq, case.Lq, case.Lk).flatten(0, 1)
    assert torch.equal(flat, whole.expand(case.B, case.Hq, case.Lq, case.Lk))


def test_broadcast_bits_stay_views():
    """Broadcast dimensions are never expanded, neither in a dense mask nor where holes meet it."""
    holes = masks.padding(keep=torch.ones(2, 30, dtype=torch.bool))
    square = torch.ones(20, 30, dtype=torch.bool)
    form = lowering.lower(holes & masks.dense(square) & masks.causal(), 2, 8, 20, 30, CPU)
    assert form.key_bits.shape == (2, 1, 1, 30) and form.bits.shape == (1, 1, 20, 30)
    assert form.bits.view.data_ptr() == square.data_ptr()
    assert form.lo is None and form.batch_bounds is None
    explicit = masks.intervals(*torch.zeros(2, 1, 8, 20, dtype=torch.int64))
    per_batch = torch.ones(2, 1, 20, 30, dtype=torch.bool)
    form = lowering.lower(masks.dense(per_batch) & explicit & holes, 2, 8, 20, 30, CPU)
    assert form.lo.shape == (1, 8, 20) and form.bits.shape == (2, 1, 20, 30)
    assert form.key_bits.shape == (2, 1, 1, 30)


def bools(*shape):
    return torch.ones(shape, dtype=torch.bool)


def strides(tensor):
    """Of the dimensions in which it does not repeat."""
    return [n for size, n in zip(tensor.shape, tensor.stride(), strict=True) if n and size > 1]


# for B = 6, H = 4, Lq = 20, Lk = 30: the mask, its form, and the shape of the bits' 5-D view
DENSE_FORMS = {
    "[Lq, Lk]": (bools(20, 30), "bits per pair", (1, 1, 1, 20, 30)),
    "[H, Lq, Lk]": (bools(4, 20, 30), "bits per pair", (1, 1, 4, 20, 30)),
    "[B, 1, Lq, Lk]": (bools(6, 1, 20, 30), "bits per pair", (6, 1, 1, 20, 30)),
    "[B, H, Lq, Lk]": (bools(6, 4, 20, 30), "bits per pair", (6, 1, 4, 20, 30)),
    "[B, H, 1, Lk]": (bools(6, 4, 1, 30), "bits per pair", (6, 1, 4, 1, 30)),
    "[H, 1, Lk]": (bools(4, 1, 30), "bits per pair", (1, 1, 4, 1, 30)),
    "transposed": (bools(30, 20).T, "bits per pair", (1, 1, 1, 20, 30)),
    "heads last": (bools(20, 30, 4).permute(2, 0, 1), "bits per pair", (1, 1, 4, 20, 30)),
    "sliced": (bools(6, 1, 23, 37)[..., 2:22, 3:33], "bits per pair", (6, 1, 1, 20, 30)),
    "[B, 1, 1, Lk]": (bools(6, 1, 1, 30), "key bits", (6, 1, 1, 30)),
    "[1, Lk]": (bools(1, 30), "key bits", (1, 1, 1, 30)),
    "sliced keys": (bools(6, 1, 1, 37)[..., 3:33], "key bits", (6, 1, 1, 30)),
    "[Lq, 1]": (bools(20, 1), "explicit", (1, 1, 20)),
    "[B, 1, Lq, 1]": (bools(6, 1, 20, 1), "explicit", (6, 1, 20)),
    "[H, 1, 1]": (bools(4, 1, 1), "explicit", (1, 4, 20)),
    "[1, 1]": (bools(1, 1), "explicit", (1, 1, 20)),
    # stride 0 counts as broadcast
    "[B, H, Lq, Lk], one matrix": (
        bools(20, 30).expand(6, 4, 20, 30), "bits per pair", (1, 1, 1, 20, 30)
    ),
    "[B, H, Lq, Lk], keys": (bools(6, 1, 1, 30).expand(6, 4, 20, 30), "key bits", (6, 1, 1, 30)),
    "[B, H, Lq, Lk], rows": (bools(4, 20, 1).expand(6, 4, 20, 30), "explicit", (1, 4, 20)),
    "[B, H, Lq, Lk], one bool": (bools(1, 1).expand(6, 4, 20, 30), "explicit", (1, 1, 20)),
    # two batch dimensions, 2 x 3
    "[B1, 1, ...]": (bools(2, 1, 4, 20, 30), "bits per pair", (2, 1, 4, 20, 30)),
    "[1, B2, ...]": (bools(1, 3, 1, 20, 30), "bits per pair", (1, 3, 1, 20, 30)),
    "[B1, B2, ...]": (bools(2, 3, 1, 20, 30), "bits per pair", (2, 3, 1, 20, 30)),
    "[1, 1, ...]": (bools(1, 1, 4, 20, 30), "bits per pair", (1, 1, 4, 20, 30)),
    "[B1, B2, ...], one outer": (
        bools(1, 3, 1, 20, 30).expand(2, 3, 4, 20, 30), "bits per pair", (1, 3, 1, 20, 30)
    ),
    "[B1, 1, ..., Lk]": (bools(2, 1, 1, 1, 30), "key bits", (6, 1, 1, 30)),
    "[1, B2, ..., Lk]": (bools(1, 3, 1, 1, 30), "key bits", (6, 1, 1, 30)),
    "[1, B2, ..., Lq, 1]": (bools(1, 3, 1, 20, 1), "explicit", (6, 1, 20)),
}  # fmt: skip


@pytest.mark.parametrize("name", DENSE_FORMS)
def test_form_of_a_dense_mask(name):
    """Keys alone are key bits, rows alone are intervals, the rest a view of what was given."""
    mask, kind, shape = DENSE_FORMS[name]
    form = lowering.lower(masks.dense(mask), 6, 4, 20, 30, CPU)
    assert (
        form.form
        == {
            "bits per pair": "affine bounds, bits per pair",
            "key bits": "affine bounds, key bits",
            "explicit": "explicit row intervals",
        }[kind]
    )
    if kind == "explicit":
        assert form.lo.shape == form.hi.shape == shape
    elif kind == "key bits":
        assert form.key_bits.shape == shape
        if mask.dim() < 5:
            assert form.key_bits.data_ptr() == mask.data_ptr()
    else:
        view = form.bits.view
        assert view.shape == shape and view.data_ptr() == mask.data_ptr()
        assert strides(view) == strides(mask)
        assert form.bits.shape[2:] == shape[3:]


@pytest.mark.parametrize("shape", [(1, 1), (4, 20, 1)], ids=str)
def test_bits_are_never_made_of_a_mask_of_rows(shape):
    form = lowering.lower(masks.dense(bools(*shape)) & masks.causal(), 6, 4, 20, 30, CPU)
    assert form.bits is None and form.key_bits is None and form.lo is not None


def test_affine_masks_build_nothing_of_length_L():
    """A few integers per batch, whatever the lengths: 2**29 rows lower at once."""
    long = 2**29
    mask = masks.causal() & masks.window(4096, 0) & masks.padding([long, 5])
    form = lowering.lower(mask, 2, 1, long, long, CPU)
    assert form.lo is None and form.batch_bounds.shape == (2, 6)
    assert lowering.lower(masks.causal(), 2, 1, long, long, CPU).batch_bounds is None


# -- tile classes and pictures --------------------------------------------------------------------


def classes_of(seen, block_m, block_n):
    """Tile classes of bool [Lq, Lk], by looking at every pair of every tile."""
    Lq, Lk = seen.shape
    classes = []
    for top in range(0, Lq, block_m):
        alive = [i for i in range(top, min(top + block_m, Lq)) if seen[i].any()]
        line = []
        for first in range(0, Lk, block_n):
            tile = seen[alive, first : first + block_n]
            whole = tile.shape[1] == block_n and bool(tile.all())
            line.append(0 if not tile.any() else 2 if whole else 1)
        classes.append(line)
    return classes


@pytest.mark.parametrize("tile", [(16, 16), (32, 64)], ids=str)
@pytest.mark.parametrize("case", cases.CASES, ids=repr)
def test_tile_classes(case, tile):
    classes = lowering.tile_classes(case.mask("cpu"), case.B, case.Hq, case.Lq, case.Lk, tile)
    shape = classes.shape[2:]
    classes = classes.expand(case.B, case.Hq, *shape)
    seen = case.seen()
    for b in range(case.B):
        for h in range(case.Hq):
            truth = torch.tensor(classes_of(seen[b, h], *tile), dtype=torch.uint8)
            assert torch.equal(classes[b, h], truth.view(shape))


def test_picture():
    assert masks.causal().picture(256, 256) == (
        "/...\n#/..\n##/.\n###/\n64 x 64 tiles: 6 empty, 4 partial, 6 full; 62 % visited"
    )


def test_picture_of_one_batch_and_head():
    mask = masks.padding([64, 32]) & masks.dense(torch.tensor([True, False]).view(2, 1, 1))
    options = {"B": 2, "H": 2, "tile": (32, 32)}
    last = "32 x 32 tiles: {} empty, 0 partial, {} full; {} % visited"
    assert mask.picture(32, 64, **options) == "##\n" + last.format(0, 2, 100)
    assert mask.picture(32, 64, **options, batch=1) == "#.\n" + last.format(1, 1, 50)
    assert mask.picture(32, 64, **options, batch=1, head=1) == "..\n" + last.format(2, 0, 0)


def test_picture_of_nothing():
    assert masks.causal().picture(0, 64).splitlines()[-1].startswith("64 x 64 tiles: 0 empty, 0 p")
    assert masks.causal().picture(64, 0).endswith("0 % visited")


# -- what is kept ---------------------------------------------------------------------------------


def lower(mask, B=2, H=1, Lq=20, Lk=20):
    return lowering.lower(mask, B, H, Lq, Lk, CPU)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_same_mask_is_lowered_once(name):
    mask = EXAMPLES[name]
    assert lower(mask, H=3) is lower(mask, H=3)
    if name not in ("varlen", "documents", "mixed", "intervals", "dense", "keep"):
        assert lower(mask, Lq=21, Lk=22, H=3) is not lower(mask, H=3)


def test_a_change_in_place_is_seen():
    lengths = ints(20, 5)
    mask = masks.causal() & masks.padding(lengths)
    before = lower(mask)
    lengths[1] = 7
    after = lower(mask)
    assert after is not before and after.batch_bounds[:, 1].tolist() == [20, 7]
    assert before.batch_bounds[:, 1].tolist() == [20, 5]
    assert lower(mask) is after


def test_a_change_of_a_dense_mask_is_seen_by_attention():
    bits = torch.ones(8, 8, dtype=torch.bool)
    mask = masks.dense(bits)
    q, k, v = torch.randn(3, 1, 1, 8, 4)
    everything = tilemask.attention(q, k, v, mask=mask)
    torch.testing.assert_close(everything, tilemask.attention(q, k, v))
    bits.tril_()
    torch.testing.assert_close(
        tilemask.attention(q, k, v, mask=mask), tilemask.attention(q, k, v, mask=masks.causal())
    )


def test_every_tensor_of_a_mask_counts():
    """In-place changes of parts, of `within` masks and of both bounds."""
    lo, hi, cu = torch.zeros(20, dtype=torch.int64), torch.full((20,), 20), ints(0, 10, 20)
    offset, query_ids, key_ids = ints(0, 0), torch.zeros(20).long(), torch.zeros(20).long()
    keep = torch.ones(2, 20, dtype=torch.bool)
    mask = (
        masks.intervals(lo, hi)
        & masks.varlen(cu, within=masks.causal(offset))
        & masks.documents(query_ids, key_ids)
        & masks.padding(keep=keep)
    )
    for tensor in (lo, hi, cu, offset, query_ids, key_ids, keep):
        before = lower(mask)
        tensor.copy_(tensor.clone())
        assert lower(mask) is not before


def test_inference_tensors_are_not_kept():
    with torch.inference_mode():
        lengths = ints(20, 5)
    mask = masks.padding(lengths)
    assert lower(mask) is not lower(mask)
    with torch.inference_mode():
        lengths[1] = 9
    assert lower(mask).batch_bounds[:, 1].tolist() == [20, 9]


def test_what_is_kept_dies_with_the_mask():
    keep = torch.ones(2, 20, dtype=torch.bool)
    mask = masks.padding(keep=keep)
    form = weakref.ref(lower(mask).key_bits.untyped_storage())
    held = weakref.ref(lower(mask))
    gone = weakref.ref(mask)
    del mask
    gc.collect()
    assert gone() is None and held() is None
    del keep
    gc.collect()
    assert form() is None


def test_not_too_many_forms_are_kept():
    mask = masks.causal()
    forms = [weakref.ref(lower(mask, Lq=length)) for length in range(100)]
    gc.collect()
    assert 0 < sum(form() is not None for form in forms) <= lowering.MOST_KEPT


# -- no reading of data ---------------------------------------------------------------------------

MAKERS = {
    "causal": lambda: masks.causal(),
    "causal offset": lambda: masks.causal(ints(0, 3)),
    "causal lower right": lambda: masks.causal(align="lower_right"),
    "window": lambda: masks.window(3, -1, offset=ints(0, 3)),
    "chunked": lambda: masks.chunked(5),
    "padding": lambda: masks.padding(ints(20, 3), start=ints(1, 2), query_lengths=ints(9, 20)),
    "padding list": lambda: masks.padding([20, 3]),
    "keep": lambda: masks.padding(keep=torch.ones(2, 20, dtype=torch.bool)),
    "tokens": lambda: masks.padding_from_tokens(torch.ones(2, 20, dtype=torch.int64), 0),
    "prefix_lm": lambda: masks.prefix_lm(ints(20, 3)),
    "varlen": lambda: masks.varlen(ints(0, 7, 20)),
    "varlen within": lambda: masks.varlen(
        ints(0, 7, 20), ints(0, 0, 20), within=masks.causal(align="lower_right") & masks.chunked(3)
    ),
    "documents": lambda: masks.documents(torch.zeros(20, dtype=torch.int64)),
    "documents within": lambda: masks.documents(
        torch.zeros(2, 20, dtype=torch.int64), within=masks.causal()
    ),
    "documents contiguous": lambda: masks.documents(
        torch.zeros(2, 20, dtype=torch.int64), contiguous=True, within=masks.causal()
    ),
    "intervals": lambda: masks.intervals(*torch.zeros(2, 2, 1, 20, dtype=torch.int64)),
    "dense": lambda: masks.dense(torch.ones(1, 3, 20, 20, dtype=torch.bool)),
    "dense 5-D": lambda: masks.dense(torch.ones(2, 1, 3, 20, 20, dtype=torch.bool)),
    "dense keys": lambda: masks.dense(torch.ones(2, 1, 1, 20, dtype=torch.bool)),
    "dense rows": lambda: masks.dense(torch.ones(2, 1, 20, 1, dtype=torch.bool)),
    "all": lambda: (
        masks.causal(ints(0, 3))
        & masks.padding(ints(20, 3), keep=torch.ones(1, 20, dtype=torch.bool))
        & masks.prefix_lm(ints(4, 5))
        & masks.dense(torch.ones(20, 1, dtype=torch.bool))
    ),
}


def parts(form):
    bits = None if form.bits is None else form.bits.tensor(form.len_q)
    return (form.batch_bounds, form.lo, form.hi, form.key_bits, bits)


@pytest.mark.parametrize("name", MAKERS)
def test_lowering_reads_no_data(name):
    """Fake tensors hold none: what lowers with them has no host synchronisation and no size that
    depends on values."""
    real = lowering.lower(MAKERS[name](), 2, 3, 20, 20, CPU)
    with FakeTensorMode():
        mask = MAKERS[name]()
        fake = lowering.lower(mask, 2, 3, 20, 20, CPU)
        assert all(isinstance(t, FakeTensor) for t in mask.tensors())
    assert fake.bounds == real.bounds and fake.form == real.form
    for made, truth in zip(parts(fake), parts(real), strict=True):
        assert (made is None) == (truth is None)
        if made is not None:
            assert isinstance(made, FakeTensor)
            assert (made.shape, made.dtype) == (truth.shape, truth.dtype)


@pytest.mark.parametrize("name", MAKERS)
def test_lowering_on_meta(name):
    with torch.device("meta"):
        form = lowering.lower(MAKERS[name](), 2, 3, 20, 20, torch.device("meta"))
    for part in parts(form):
        assert part is None or part.device.type == "meta"


# -- what is refused ------------------------------------------------------------------------------

BOOLS, FLOATS = torch.ones(2, 20, dtype=torch.bool), torch.ones(2, 20)
CONSTRUCTION = {
    "causal float": (TypeError, "offset", lambda: masks.causal(1.5)),
    "causal bool": (TypeError, "offset", lambda: masks.causal(True)),
    "causal None": (TypeError, "offset", lambda: masks.causal(None)),
    "causal list": (TypeError, "offset", lambda: masks.causal([1, 2])),
    "causal float tensor": (TypeError, "offset", lambda: masks.causal(torch.ones(2))),
    "causal bool tensor": (TypeError, "offset", lambda: masks.causal(torch.ones(2) > 0)),
    "causal matrix": (TypeError, "offset", lambda: masks.causal(ints(1, 2).view(1, 2))),
    "causal align": (ValueError, "align", lambda: masks.causal(align="bottom_right")),
    "causal both": (ValueError, "align", lambda: masks.causal(3, align="lower_right")),
    "causal both tensors": (
        ValueError,
        "align",
        lambda: masks.causal(ints(0), align="lower_right"),
    ),
    "window left": (ValueError, "left", lambda: masks.window(-2, 0)),
    "window right": (ValueError, "right", lambda: masks.window(0, -5)),
    "window float": (ValueError, "left", lambda: masks.window(1.0, 0)),
    "window bool": (ValueError, "right", lambda: masks.window(1, True)),
    "window None": (ValueError, "left", lambda: masks.window(None, 0)),
    "window offset": (TypeError, "offset", lambda: masks.window(1, 0, offset="1")),
    "window align": (ValueError, "align", lambda: masks.window(1, 0, align="left")),
    "chunked 0": (ValueError, "size", lambda: masks.chunked(0)),
    "chunked float": (ValueError, "size", lambda: masks.chunked(2.0)),
    "chunked bool": (ValueError, "size", lambda: masks.chunked(True)),
    "padding nothing": (ValueError, "lengths", lambda: masks.padding()),
    "padding twice": (ValueError, "lengths or end", lambda: masks.padding([1], end=[1])),
    "padding negative": (ValueError, "lengths", lambda: masks.padding(-1)),
    "padding float": (TypeError, "lengths", lambda: masks.padding(torch.ones(2))),
    "padding bools": (TypeError, "lengths", lambda: masks.padding(BOOLS)),
    "padding float list": (TypeError, "lengths", lambda: masks.padding([1.0, 2.0])),
    "padding matrix": (TypeError, "lengths", lambda: masks.padding(ints(1, 2).view(1, 2))),
    "padding start": (TypeError, "start", lambda: masks.padding(start="1")),
    "padding rows": (TypeError, "query_lengths", lambda: masks.padding(query_lengths=1.5)),
    "padding keep float": (TypeError, "keep", lambda: masks.padding(keep=FLOATS)),
    "padding keep list": (TypeError, "keep", lambda: masks.padding(keep=[[True]])),
    "padding keep 1-D": (TypeError, "keep", lambda: masks.padding(keep=BOOLS[0])),
    "tokens float": (TypeError, "tokens", lambda: masks.padding_from_tokens(FLOATS, 0)),
    "tokens 1-D": (TypeError, "tokens", lambda: masks.padding_from_tokens(ints(1, 2), 0)),
    "prefix None": (TypeError, "lengths", lambda: masks.prefix_lm(None)),
    "prefix float": (TypeError, "lengths", lambda: masks.prefix_lm(1.5)),
    "prefix negative": (ValueError, "lengths", lambda: masks.prefix_lm(-3)),
    "varlen list": (TypeError, "cu_seqlens_q", lambda: masks.varlen([0, 3])),
    "varlen short": (TypeError, "cu_seqlens_q", lambda: masks.varlen(ints(0))),
    "varlen float": (TypeError, "cu_seqlens_q", lambda: masks.varlen(torch.ones(3))),
    "varlen matrix": (TypeError, "cu_seqlens_k", lambda: masks.varlen(ints(0, 1), BOOLS.long())),
    "varlen counts": (ValueError, "cu_seqlens_k", lambda: masks.varlen(ints(0, 1), ints(0, 1, 2))),
    "varlen within": (TypeError, "within", lambda: masks.varlen(ints(0, 1), within=BOOLS)),
    "documents list": (TypeError, "query_ids", lambda: masks.documents([1, 2])),
    "documents float": (TypeError, "query_ids", lambda: masks.documents(FLOATS)),
    "documents 3-D": (
        TypeError,
        "key_ids",
        lambda: masks.documents(ints(1), ints(1).view(1, 1, 1)),
    ),
    "documents within": (TypeError, "within", lambda: masks.documents(ints(1), within="causal")),
    "intervals float": (TypeError, "lo", lambda: masks.intervals(FLOATS[0], ints(1))),
    "intervals 2-D": (TypeError, "hi", lambda: masks.intervals(ints(1, 2), BOOLS.long())),
    "intervals shapes": (ValueError, "lo", lambda: masks.intervals(ints(1, 2), ints(1, 2, 3))),
    "dense float": (TypeError, "mask", lambda: masks.dense(FLOATS)),
    "dense int": (TypeError, "mask", lambda: masks.dense(BOOLS.long())),
    "dense list": (TypeError, "mask", lambda: masks.dense([[True]])),
    "dense 1-D": (ValueError, "mask", lambda: masks.dense(BOOLS[0])),
    "dense 6-D": (ValueError, "mask", lambda: masks.dense(BOOLS.view(1, 1, 1, 1, 2, 20))),
}


@pytest.mark.parametrize("name", CONSTRUCTION)
def test_constructors_refuse(name):
    kind, word, make = CONSTRUCTION[name]
    with pytest.raises(kind, match=word):
        make()


def test_refusals_say_what_came():
    with pytest.raises(TypeError, match=re.escape("torch.float32 (2, 20) on cpu")):
        masks.dense(FLOATS)
    with pytest.raises(TypeError, match=re.escape("str '3'")):
        masks.padding("3")
    with pytest.raises(ValueError, match=re.escape("masks.padding(keep=mask)")):
        masks.dense(BOOLS[0])


THREE = ints(1, 1, 1)
INNER = {"dense": masks.dense(BOOLS[:1]), "keep": masks.padding(keep=BOOLS)}
USE = {  # with B = 2, H = 3, Lq = Lk = 20
    "causal entries": ("offset", masks.causal(THREE)),
    "window entries": ("offset", masks.window(1, 1, offset=THREE)),
    "padding entries": ("lengths", masks.padding(THREE)),
    "padding long": ("lengths", masks.padding([20, 21])),
    "padding one long": ("lengths", masks.padding(21)),
    "padding end": ("end|lengths", masks.padding(end=[20, -1])),
    "padding start": ("start", masks.padding(start=[0, 21])),
    "padding start negative": ("start", masks.padding(start=ints(-1))),
    "padding rows": ("query_lengths", masks.padding(query_lengths=[0, 21])),
    "keep length": ("keep", masks.padding(keep=BOOLS[:, :19])),
    "keep batch": ("keep", masks.padding(keep=torch.ones(3, 20, dtype=torch.bool))),
    "prefix": ("lengths", masks.prefix_lm([20, 21])),
    "prefix negative": ("lengths", masks.prefix_lm([20, -1])),
    "prefix entries": ("lengths", masks.prefix_lm(THREE)),
    "varlen long": ("cu_seqlens_q", masks.varlen(ints(0, 21))),
    "varlen keys long": ("cu_seqlens_k", masks.varlen(ints(0, 20), ints(0, 30))),
    "varlen from 1": ("cu_seqlens_q", masks.varlen(ints(1, 20))),
    "varlen falls": ("cu_seqlens_k", masks.varlen(ints(0, 9, 20), ints(0, 9, 5))),
    "varlen within entries": ("offset", masks.varlen(ints(0, 9, 20), within=masks.causal(THREE))),
    "documents length": ("query_ids", masks.documents(ints(*range(19)))),
    "documents batch": ("query_ids", masks.documents(torch.zeros(3, 20, dtype=torch.int64))),
    "documents keys": ("key_ids", masks.documents(ints(*range(20)), ints(*range(21)))),
    "documents runs": ("contiguous", masks.documents(ints(1, 2).repeat(10), contiguous=True)),
    "documents key runs": (
        "key_ids", masks.documents(ints(*[1] * 20), ints(1, 2).repeat(10), contiguous=True)
    ),
    "intervals length": ("lo", masks.intervals(ints(*[0] * 19), ints(*[1] * 19))),
    "intervals batch": ("lo", masks.intervals(*torch.zeros(2, 3, 1, 20, dtype=torch.int64))),
    "intervals heads": ("lo", masks.intervals(*torch.zeros(2, 2, 2, 20, dtype=torch.int64))),
    "intervals low": ("lo", masks.intervals(ints(*[-1] * 20), ints(*[1] * 20))),
    "intervals high": ("hi", masks.intervals(ints(*[0] * 20), ints(*[21] * 20))),
    "dense shape": ("mask", masks.dense(torch.ones(20, 19, dtype=torch.bool))),
    "dense heads": ("mask", masks.dense(torch.ones(2, 20, 20, dtype=torch.bool))),
    "dense batch": ("mask", masks.dense(torch.ones(3, 1, 20, 20, dtype=torch.bool))),
    "dense keys": ("mask", masks.dense(torch.ones(2, 1, 1, 19, dtype=torch.bool))),
    "dense rows": ("mask", masks.dense(torch.ones(2, 1, 19, 1, dtype=torch.bool))),
    "dense 5-D heads": ("mask", masks.dense(torch.ones(2, 1, 2, 20, 20, dtype=torch.bool))),
    "dense 5-D keys": ("mask", masks.dense(torch.ones(2, 1, 1, 1, 19, dtype=torch.bool))),
    "varlen nests": ("varlen", masks.varlen(ints(0, 20), within=masks.varlen(ints(0, 20)))),
    "documents nest": ("documents", masks.varlen(ints(0, 20), within=masks.documents(ints(1)))),
    "dense nests": ("dense", masks.varlen(ints(0, 20), within=INNER["dense"])),
    "keep nests": ("keep", masks.documents(ints(*[1] * 20), within=INNER["keep"])),
    "intervals nest": (
        "intervals", masks.varlen(ints(0, 20), within=masks.intervals(ints(0), ints(1)))
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", USE)
def test_use_refuses(name):
    """What only the sizes of a call, or the values of the mask, can tell."""
    word, mask = USE[name]
    q = torch.zeros(2, 3, 20, 4)
    with pytest.raises(ValueError, match=word):
        tilemask.attention(q, q, q, mask=mask)


@pytest.mark.parametrize("inner", [(1, 20, 20), (1, 1, 20), (3, 20, 1)], ids=str)
@pytest.mark.parametrize("split", [(4, 1), (1, 4), (2, 2), (3, 3), (6, 2), (2, 6), (0, 1), (1, 0)])
def test_two_batch_dimensions_that_do_not_make_the_batch(split, inner):
    """6 batches are 2 x 3, 3 x 2, 6 x 1 or 1 x 6."""
    mask = masks.dense(torch.ones(*split, *inner, dtype=torch.bool))
    shape = re.escape(str((*split, *inner)))
    with pytest.raises(ValueError, match=f"the mask has shape {shape}, which does not broadcast"):
        lowering.lower(mask, 6, 3, 20, 20, CPU)


@pytest.mark.parametrize("split", [(2, 3), (3, 2), (2, 1), (1, 2), (6, 1), (1, 6), (1, 1)])
def test_two_batch_dimensions(split):
    """Batch b is (b // B2, b % B2)."""
    mask = cases.random_bits(f"split {split}", (*split, 1, 5, 7))
    outer = split[0] if split[0] > 1 else 6 // split[1]
    dense = masks.dense(mask).to_dense(6, 2, 5, 7)
    inner = 6 // outer
    for b in range(6):
        own = mask[b // inner % split[0], b % inner % split[1], 0]
        assert torch.equal(dense[b, 0], own) and torch.equal(dense[b, 1], own)


def test_padding_mask_of_the_wrong_kind_is_advised():
    mask = masks.dense(torch.ones(2, 20, dtype=torch.bool))
    with pytest.raises(ValueError, match=re.escape("masks.padding(keep=mask)")):
        mask.to_dense(2, 3, 20, 20)


def test_values_on_other_devices_are_read_on_request_only(monkeypatch):
    """A check that reads a tensor of a GPU would wait for it: TILEMASK_DEBUG=1 asks for that."""
    tensor = torch.zeros(3, device="meta")
    assert not masks.check_values_of(tensor)
    monkeypatch.setenv("TILEMASK_DEBUG", "0")
    assert not masks.check_values_of(tensor)
    monkeypatch.setenv("TILEMASK_DEBUG", "1")
    assert masks.check_values_of(tensor)


def test_every_constructor_is_tested():
    """A new constructor needs a maker above, and cases."""
    names = {
        n
        for n, f in vars(masks).items()
        if getattr(f, "__annotations__", {}).get("return") == "Mask"
    }
    assert names | {"varlen"} == {
        "causal", "window", "chunked", "padding", "padding_from_tokens", "documents", "prefix_lm",
        "intervals", "dense", "varlen",
    }  # fmt: skip


def test_forms_kept_in_inference_mode_stay_there():
    """Autograd cannot save inference tensors: a call that differentiates lowers the mask anew."""
    mask = masks.prefix_lm(torch.tensor([2]))
    arguments = (mask, 1, 1, 6, 6, torch.device("cpu"))
    with torch.inference_mode():
        inside = lowering.lower(*arguments)
        assert lowering.lower(*arguments) is inside
    outside = lowering.lower(*arguments)
    assert inside.lo.is_inference() and not outside.lo.is_inference()
