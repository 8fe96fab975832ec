"""The reference backend against the float64 oracle and torch, its derivatives, and its memory."""

import itertools
import os
import resource
import subprocess
import sys

import cases
import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import is_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tilemask
from tilemask import lowering, masks, philox
from tilemask.attention import checked
from tilemask.backends import reference, triton


def tensors(*shapes, dtype=torch.float64, grad=True):
    """Normal random leaves."""
    return [torch.randn(shape, dtype=dtype).requires_grad_(grad) for shape in shapes]


# -- every case -----------------------------------------------------------------------------------


@pytest.mark.parametrize("case, dtype", cases.parameters())
def test_case(case, dtype):
    cases.check(case, dtype, cases.run(case, dtype, backend="reference"))


def plain(case):
    """Whether torch's SDPA computes the case: no option of its own, nothing to be left unread."""
    own = case.softcap or case.alibi or case.sinks or case.dropout_p
    return not own and not case.poison and not case.lse_grad


@pytest.mark.parametrize(
    "case", [c for c in cases.CASES if plain(c)], ids=[c.name for c in cases.CASES if plain(c)]
)
def test_case_against_torch(case):
    """Output and gradients of F.scaled_dot_product_attention with a dense mask, in float64."""
    given = cases.inputs(case, torch.float64)
    seen = case.seen()
    attn_mask = seen
    if case.bias:
        attn_mask = cases.one_batch(case, given["bias"]).double().masked_fill(~seen, -torch.inf)
    expected = F.scaled_dot_product_attention(
        given["q"], given["k"], given["v"], attn_mask, scale=case.scale, enable_gqa=True
    )
    leaves = {cases.GRADIENTS[n]: given[n] for n in ("q", "k", "v", "bias") if n in given}
    gradients = torch.autograd.grad(expected, list(leaves.values()), given["dout"])
    got = cases.run(case, torch.float64, backend="reference")
    torch.testing.assert_close(got["out"], expected, rtol=1e-9, atol=1e-11)
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        tight = {"rtol": 1e-9, "atol": 1e-11} if leaf.dtype == torch.float64 else {}
        torch.testing.assert_close(got[name], gradient, msg=lambda m, n=name: f"{n}: {m}", **tight)


def test_cases_cover_what_they_must():
    """Sizes, masks and layouts that a change of the list must not lose."""
    kernel = cases.interval_cases()
    assert {1, 8, 16, 40, 64, 72, 128, 256} <= {c.D for c in kernel}
    for tile in (16, 32, 64):
        assert {1, tile - 1, tile, tile + 1} <= {c.Lq for c in kernel}
    assert any(c.Lk == 0 for c in kernel) and any(c.Lq == 0 for c in kernel)
    assert any(c.B == 0 for c in kernel) and any(c.Lq == 1 and c.Lk > 1 for c in kernel)
    assert any(c.Lq < c.Lk for c in kernel) and any(c.Lq > c.Lk > 0 for c in kernel)
    assert any(not cases.rows_seen(c, torch.float32).any(-1).all() for c in kernel if c.Lk)
    for case in kernel:  # a tensor of a sliced case shares no stride with another
        if case.layout == "sliced":
            given = cases.inputs(case, torch.float32)
            strides = [given[n].stride()[:3] for n in ("q", "k", "v")]
            assert len(set(strides)) == 3, case


@pytest.mark.parametrize("case", cases.CASES, ids=repr)
def test_the_kernels_take_every_case(case, monkeypatch):
    monkeypatch.setattr(triton, "unfit", lambda device: None)
    given = cases.inputs(case, torch.float32)
    call = checked(given["q"], given["k"], given["v"], **cases.options(case, given, "cpu"))
    assert triton.why_not(call) is None


# what a case has, by its attributes and by what its mask lowers to, never by its name
OPTIONS = {
    "bias": lambda case: case.bias is not None,
    "dropout": lambda case: case.dropout_p > 0,
    "softcap": lambda case: case.softcap > 0,
    "alibi": lambda case: case.alibi is not None,
    "sinks": lambda case: case.sinks,
    "gqa": lambda case: case.Hq != case.Hkv,
    "value width": lambda case: case.Dv != case.D,
    "lse gradient": lambda case: case.lse_grad,
}


def options_of(case) -> frozenset[str]:
    return frozenset(name for name, has in OPTIONS.items() if has(case))


def parts_of(case) -> frozenset[str]:
    """The parts of a case's lowered mask."""
    form = lowering.lower(case.mask("cpu"), case.B, case.Hq, case.Lq, case.Lk, torch.device("cpu"))
    columns = [form.column(index) for index in range(6)]
    start, end, left, right, q_start, q_end = (
        column.unique().tolist() if torch.is_tensor(column) else [column] for column in columns
    )
    parts = {
        "diagonal": (left, right) != ([-masks.UNBOUNDED], [masks.UNBOUNDED]),
        "lengths": (start, end, q_start, q_end) != ([0], [case.Lk], [0], [case.Lq]),
        "explicit": form.lo is not None,
        "key bits": form.key_bits is not None,
        "bits": form.bits is not None,
    }
    return frozenset(name for name, has in parts.items() if has)


MASKS = {
    "none": set(),
    "causal": {"diagonal"},
    "lengths": {"lengths"},
    "key bits": {"key bits"},
    "explicit": {"explicit"},
    "dense": {"bits"},
    "dense, causal and lengths": {"bits", "diagonal", "lengths"},
}


def test_every_pair_of_options_is_among_the_cases():
    """Each option alone under each kind of mask, and each with every other."""
    every = [
        (parts_of(case), options_of(case))
        for case in cases.CASES
        if case.B > 1 and case.Lq > 32 and case.dtypes == cases.ALL_DTYPES
    ]
    for kind, parts in MASKS.items():
        found = {options for own, options in every if own == parts}
        missing = [name for name in OPTIONS if {name} not in found]
        assert not missing, (
            f"no case has a mask of the kind {kind} and of the options only {missing}"
        )
    for pair in itertools.combinations(OPTIONS, 2):
        grounds = [own for own, options in every if options == set(pair)]
        assert any(own for own in grounds), f"no masked case has the options {pair} and no other"


# -- derivatives ----------------------------------------------------------------------------------

WITH_DERIVATIVES = {
    "nothing": {},
    "causal, dead rows": dict(mask=masks.causal(-1)),
    "keep": dict(mask=masks.padding(keep=torch.tensor([[True, False, True, True]]))),
    "padding": dict(mask=masks.padding([3], start=[1], query_lengths=[2])),
    "bias": dict(bias=(2, 3, 4)),
    "bias row": dict(bias=(1, 4), mask=masks.causal()),
    "softcap": dict(softcap=1.5),
    "sinks": dict(sinks=(2,), mask=masks.causal(-1)),
    "alibi": dict(alibi_slopes=torch.tensor([0.5, 0.1])),
    "dropout": dict(dropout_p=0.4, dropout_seed=7),
    "all": dict(
        mask=masks.window(2, 1), bias=(2, 3, 4), softcap=2.0, sinks=(2,), scale=-0.7,
        dropout_p=0.2, dropout_seed=1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("chunked", [False, True], ids=["whole", "chunked"])
@pytest.mark.parametrize("name", WITH_DERIVATIVES)
def test_first_and_second_derivatives(name, chunked, monkeypatch):
    """Of out and lse, with respect to every float input, by finite differences."""
    if chunked:
        monkeypatch.setattr(reference, "CHUNK", 8)
    options = dict(WITH_DERIVATIVES[name])
    leaves = dict(zip("qkv", tensors((1, 2, 3, 2), (1, 1, 4, 2), (1, 1, 4, 3)), strict=True))
    for option in ("bias", "sinks"):
        if option in options:
            (leaves[option],) = tensors(options.pop(option))

    def function(*values):
        given = dict(zip(leaves, values, strict=True))
        q, k, v = (given.pop(n) for n in "qkv")
        out, lse = tilemask.attention(
            q, k, v, **given, **options, return_lse=True, backend="reference"
        )
        return out, lse.masked_fill(lse == -torch.inf, 0)  # no difference of infinities

    assert torch.autograd.gradcheck(function, tuple(leaves.values()))
    assert torch.autograd.gradgradcheck(function, tuple(leaves.values()))


@pytest.mark.parametrize("wanted", ["q", "k", "v", "bias", "sinks"])
def test_gradient_of_one_input_alone(wanted):
    """torch's mask-only gradient once read memory that was not there."""
    q, k, v, bias, sinks = tensors((2, 4, 5, 3), (2, 2, 6, 3), (2, 2, 6, 2), (4, 5, 6), (4,))
    given = dict(q=q, k=k, v=v, bias=bias, sinks=sinks)
    full = torch.autograd.grad(tilemask.reference_attention(**given).square().sum(), given[wanted])
    alone = {n: t if n == wanted else t.detach() for n, t in given.items()}
    out = tilemask.reference_attention(**alone)
    (gradient,) = torch.autograd.grad(out.square().sum(), given[wanted])
    torch.testing.assert_close(gradient, full[0], rtol=0, atol=0)
    assert gradient.abs().max() > 0


def test_nothing_to_differentiate():
    q, k, v = tensors((1, 1, 3, 2), (1, 1, 3, 2), (1, 1, 3, 2), grad=False)
    assert not tilemask.reference_attention(q, k, v).requires_grad
    q.requires_grad_()
    with torch.no_grad():
        assert not tilemask.reference_attention(q, k, v).requires_grad


# -- chunks ---------------------------------------------------------------------------------------

CHUNKED = [
    "causal_65", "heads_4_2", "padding_all", "varlen_causal_lower_right", "intervals_all",
    "keep_causal", "dense_causal_padding", "bias_BHQK", "bias_11QK", "bias_B11K", "softcap_bias",
    "alibi_more_rows", "sinks_dead_rows", "sinks_no_keys", "dropout", "all_at_once", "no_rows",
]  # fmt: skip


@pytest.mark.parametrize("name", CHUNKED)
def test_chunks_give_the_same(name, monkeypatch):
    case = cases.named(name)
    whole = cases.run(case, torch.float64, backend="reference")
    count = []
    attend_rows = reference.attend_rows
    monkeypatch.setattr(
        reference, "attend_rows", lambda *a: (count.append(a[1].shape[2]), attend_rows(*a))[1]
    )
    rows = 7
    monkeypatch.setattr(reference, "CHUNK", rows * max(1, case.B * case.Hq * case.Lk))
    chunked = cases.run(case, torch.float64, backend="reference")
    if case.Lq > rows:
        assert max(count) <= rows and len(count) >= -(-case.Lq // rows)
    for key in whole:
        torch.testing.assert_close(chunked[key], whole[key], rtol=1e-10, atol=1e-12)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation makes (views of its inputs aside)."""

    def __init__(self):
        super().__init__()
        self.numel, self.op = 0, None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves(args) if is_tensor(t)}
        for tensor in filter(is_tensor, tree_leaves(result)):
            storage = tensor.untyped_storage()
            numel = storage.size() // tensor.element_size()
            if numel > self.numel and storage.data_ptr() not in given:
                self.numel, self.op = numel, func
        return result


@pytest.mark.parametrize("dropout", [0.0, 0.5], ids=["", "dropout"])
@pytest.mark.parametrize("mask", ["none", "causal", "prefix", "dense", "documents"])
def test_memory_is_bounded_by_the_chunk(mask, dropout, monkeypatch):
    """Forward and backward never hold an array of Lq x Lk, whatever the lengths."""
    B, H, L, D = 1, 4, 512, 4
    chunk = 1 << 15  # 16 rows of all heads
    monkeypatch.setattr(reference, "CHUNK", chunk)
    ids = torch.arange(L) // 100
    of = {
        "none": None,
        "causal": masks.causal(),
        "prefix": masks.prefix_lm(50),
        "dense": masks.dense(torch.rand(1, 1, L, L) < 0.5),
        "documents": masks.documents(ids, contiguous=True),
    }
    q, k, v = tensors((B, H, L, D), (B, H, L, D), (B, H, L, D), dtype=torch.float32)
    seed = 1 if dropout else None
    call = checked(q, k, v, of[mask], dropout_p=dropout, dropout_seed=seed)
    with Largest() as forward:
        out, _ = reference.forward(call)
    assert forward.numel <= chunk, f"{forward.op} made {forward.numel} elements"
    with Largest() as backward:
        torch.autograd.grad(out.sum(), (q, k, v))
    assert backward.numel <= chunk, f"{backward.op} made {backward.numel} elements"
    assert max(forward.numel, backward.numel) >= chunk // 2  # it did look


LONG = """
import resource, torch, tilemask
q, k, v = (torch.randn(1, 16, 16384, 64) for _ in range(3))
out, lse = tilemask.attention(q, k, v, mask=tilemask.masks.causal(), return_lse=True)
row = torch.softmax(q[0, 3, 9000] @ k[0, 3, :9001].T / 8, 0) @ v[0, 3, :9001]
torch.testing.assert_close(out[0, 3, 9000], row, rtol=1e-4, atol=1e-5)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_of_long_sequences():
    """16 heads of 16384 x 16384: the scores alone would be 16 GiB."""
    env = os.environ | {"TILEMASK_BACKEND": "reference"}
    done = subprocess.run(
        [sys.executable, "-c", LONG], capture_output=True, text=True, timeout=1800, env=env
    )
    assert done.returncode == 0, done.stderr
    kib = int(done.stdout) // (1024 if sys.platform == "darwin" else 1)
    assert kib < 4 * 2**20, f"{kib / 2**20:.1f} GiB"
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >= kib


# -- dropout --------------------------------------------------------------------------------------


def test_philox_of_the_oracle():
    """The known answers of Random123."""
    ones, pi = 0xFFFFFFFF, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    zeros = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert oracle.philox4x32((0,) * 4, (0,) * 2, rounds=10) == zeros
    known = (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    assert oracle.philox4x32((ones,) * 4, (ones,) * 2, rounds=10) == known
    known = (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)
    assert oracle.philox4x32(pi, (0xA4093822, 0x299F31D0), rounds=10) == known
    known = (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)
    assert oracle.philox4x32((0,) * 4, (0,) * 2, rounds=7) == known


def test_philox_on_tensors():
    """The same words from tensors, for counters and keys over the whole range."""
    words = torch.randint(0, 1 << 32, (6, 200))
    words[:, 0], words[:, 1] = 0, 0xFFFFFFFF
    got = torch.stack(philox.philox(list(words[:4]), list(words[4:])), 1)
    for column, answer in zip(words.T.tolist(), got.tolist(), strict=True):
        assert tuple(answer) == oracle.philox4x32(tuple(column[:4]), tuple(column[4:]))


@pytest.mark.parametrize("seed", [0, 1, -1, 2**32, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("p", [0.0, 1e-9, 0.1, 0.5, 0.999, 1.0])
def test_keep_mask(p, seed):
    B, H, Lq, Lk = 2, 3, 5, 45
    kept, factor = oracle.dropout_keep(p, seed, B, H, Lq, Lk)
    got, got_factor = philox.keep_mask(p, torch.tensor([seed]), B, H, 0, Lq, Lk)
    assert torch.equal(got, kept) and got_factor == factor
    part, _ = philox.keep_mask(p, torch.tensor([seed]), B, H, 2, 3, Lk)
    assert torch.equal(part, kept[:, :, 2:])


def test_dropout_keeps_the_stated_share():
    """Of 2 million pairs, within five standard deviations; heads, batches and seeds differ."""
    p, B, H, L = 0.3, 2, 4, 512
    kept, factor = philox.keep_mask(p, torch.tensor([5]), B, H, 0, L, L)
    share = round(p * 65536) / 65536
    deviation = (share * (1 - share) / kept.numel()) ** 0.5
    assert abs((~kept).double().mean().item() - share) < 5 * deviation
    assert factor * (1 - share) == pytest.approx(1, rel=1e-12)
    other, _ = philox.keep_mask(p, torch.tensor([6]), B, H, 0, L, L)
    planes = [*kept.flatten(0, 1), *other.flatten(0, 1)]
    agree = share**2 + (1 - share) ** 2  # of independent draws
    deviation = (agree * (1 - agree) / L**2) ** 0.5
    for i, plane in enumerate(planes):
        for another in planes[:i]:
            assert abs((plane == another).double().mean().item() - agree) < 6 * deviation
