"""The cases that every way to run must pass: one list, one rule for passing.

A way to run is a backend on a device, an interpreter or an emulator: it makes ``inputs``, calls
``run`` (or does the same by its own means) and hands the result to ``check``.

The rule: for out, lse and every gradient the largest error against the float64 oracle is at most
twice that of plain torch in the same dtype, plus a little.
"""

from __future__ import annotations

import functools
import itertools
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import oracle
import torch
from torch import Tensor

import tilemask
from tilemask import masks

ALL_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


# -- masks, said twice: to tilemask and to the oracle ---------------------------------------------


@dataclass(frozen=True, eq=False)
class Pair:
    """A mask of tilemask, made on a device, and the oracle's rule for it."""

    mask: Callable[[str], masks.Mask | None]
    rule: oracle.Rule

    def __and__(self, other: Pair) -> Pair:
        return Pair(lambda device: self.mask(device) & other.mask(device), self.rule & other.rule)


def on(device, value, dtype=torch.int64):
    """A list as a tensor on the device; everything else as it is."""
    return torch.tensor(value, dtype=dtype, device=device) if isinstance(value, list) else value


def everything():
    return Pair(lambda device: None, oracle.everything())


def causal(offset=0, align=None):
    lower_right = align == "lower_right"
    return Pair(
        lambda device: masks.causal(on(device, offset), align=align),
        oracle.causal(offset, lower_right),
    )


def window(left, right, offset=0, align=None):
    lower_right = align == "lower_right"
    return Pair(
        lambda device: masks.window(left, right, offset=on(device, offset), align=align),
        oracle.window(left, right, offset, lower_right),
    )


def chunked(size):
    return Pair(lambda device: masks.chunked(size), oracle.chunked(size))


def padding(lengths=None, **options):
    def mask(device):
        types = {"keep": torch.bool}
        given = {n: on(device, v, types.get(n, torch.int32)) for n, v in options.items()}
        return masks.padding(on(device, lengths), **given)

    return Pair(mask, oracle.padding(lengths, **options))


def tokens(ids, pad_id):
    keep = [[token != pad_id for token in row] for row in ids]
    return Pair(
        lambda device: masks.padding_from_tokens(on(device, ids), pad_id),
        oracle.padding(keep=keep),
    )


def varlen(cu_q, cu_k=None, within=None):
    def mask(device):
        inner = within.mask(device) if within else None
        return masks.varlen(on(device, cu_q, torch.int32), on(device, cu_k, torch.int32), inner)

    return Pair(mask, oracle.varlen(cu_q, cu_k, within.rule if within else None))


def documents(query_ids, key_ids=None, contiguous=False, within=None):
    def mask(device):
        return masks.documents(
            on(device, query_ids),
            on(device, key_ids),
            contiguous=contiguous,
            within=within.mask(device) if within else None,
        )

    return Pair(mask, oracle.documents(query_ids, key_ids, within.rule if within else None))


def prefix_lm(lengths):
    return Pair(lambda device: masks.prefix_lm(on(device, lengths)), oracle.prefix_lm(lengths))


def intervals(lo, hi):
    return Pair(
        lambda device: masks.intervals(lo.to(device), hi.to(device)), oracle.intervals(lo, hi)
    )


def dense(mask, layout="contiguous", split=None):
    """mask: 2-D to 4-D, or 5-D [B1|1, B2|1, H|1, Lq|1, Lk|1] with ``split`` = (B1, B2)."""
    mask = repeated(mask, layout)
    view = laid_out(mask, layout)
    sizes = [size if stride else 1 for size, stride in zip(view.shape, view.stride(), strict=True)]
    by_key = all(size == 1 for size in sizes[-3:-1]) and sizes[-1] > 1  # like padding with holes
    return Pair(
        lambda device: masks.dense(laid_out(mask.to(device), layout)),
        oracle.dense(mask, split, by_key),
    )


# -- matrices in memory ---------------------------------------------------------------------------

DIMENSIONS = {"B": -4, "H": -3, "Q": -2, "K": -1}


def repeated(matrix: Tensor, layout: str) -> Tensor:
    """The matrix with equal values along what ``layout`` expands over."""
    if not layout.startswith("expanded over "):
        return matrix
    for letter in layout.removeprefix("expanded over "):
        matrix = matrix.narrow(DIMENSIONS[letter], 0, 1).expand_as(matrix)
    return matrix.contiguous()


def laid_out(matrix: Tensor, layout: str) -> Tensor:
    """A dense mask or a bias [..., H, Lq, Lk] in memory: "contiguous"; "transposed", keys outside
    rows; "heads last", as a bias [Lq, Lk, H] that is permuted; "sliced", part of a larger tensor
    from an odd place; "expanded over HQ" and so on, stride 0 where it is ``repeated``.
    """
    if layout == "transposed":
        return matrix.mT.contiguous().mT
    if layout == "heads last":
        return matrix.movedim(-3, -1).contiguous().movedim(-1, -3)
    if layout == "sliced":
        rows, cols = matrix.shape[-2:]
        outside = True if matrix.dtype == torch.bool else torch.nan
        larger = matrix.new_full((*matrix.shape[:-2], rows + 2, (cols | 1) + 6), outside)
        return larger[..., 2:, 3 : 3 + cols].copy_(matrix)
    if layout.startswith("expanded over "):
        part = matrix
        for letter in layout.removeprefix("expanded over "):
            part = part.narrow(DIMENSIONS[letter], 0, 1)
        return part.expand_as(matrix)
    assert layout == "contiguous", layout
    return matrix


# -- random parts of masks ------------------------------------------------------------------------


def generator(name: str) -> torch.Generator:
    """The same numbers for the same name, in every process."""
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def random_intervals(name, shape, Lk, empty=0.2):
    """lo and hi in any order along the rows; some rows see nothing, some have lo > hi."""
    g = generator(name)
    ends = torch.randint(0, Lk + 1, (2, *shape), generator=g)
    lo, hi = ends.amin(0), ends.amax(0)
    swapped = torch.rand(shape, generator=g) < empty
    return torch.where(swapped, hi, lo), torch.where(swapped, lo, hi)


def random_bits(name, shape, visible=0.5):
    return torch.rand(shape, generator=generator(name)) < visible


def random_keep(name, B, Lk, visible=0.6):
    return random_bits(name, (B, Lk), visible).tolist()


def random_blocks(name, shape, block, visible=0.4):
    """Bits that are the same all over a block of (rows, columns)."""
    grid = [-(-n // size) for n, size in zip(shape[-2:], block, strict=True)]
    bits = random_bits(name, (*shape[:-2], *grid), visible)
    bits = bits.repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    return bits[..., : shape[-2], : shape[-1]]


def random_tree(name, nodes, context=0):
    """Bits [nodes, context + nodes] of a tree of guesses: a node sees the context, its ancestors
    and itself."""
    g = generator(name)
    seen = torch.zeros(nodes, context + nodes, dtype=torch.bool)
    seen[:, :context] = True
    for node in range(nodes):
        if node % 5:  # every fifth is a root
            seen[node] = seen[int(torch.randint(0, node, (1,), generator=g))]
        seen[node, context + node] = True
    return seen


def shape_of(letters: str, split: tuple[int, int] | None, B, H, Lq, Lk) -> list[int]:
    """The shape that letters like "B1QK" or, with two batch dimensions, "X1HQK" stand for."""
    outer, inner = split or (None, None)
    sizes = {"X": outer, "Y": inner, "B": B, "H": H, "Q": Lq, "K": Lk, "1": 1}
    return [sizes[letter] for letter in letters]


def runs(*lengths):
    """Ids of documents that stand one after another: runs((7, 3), (1, 2)) = 7 7 7 1 1."""
    return [number for number, length in lengths for _ in range(length)]


# -- cases ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Case:
    """One call of attention(). Hkv, Lk and Dv are Hq, Lq and D where not given.

    bias: up to four letters out of "BHQK", "1" where it broadcasts, such as "1HQK"; five for two
    batch dimensions, "XYHQK", where split = (X, Y) and X * Y = B. bias_values: "normal", "-inf"
    (some pairs, and whole rows), "min" (finfo.min so) or "-1e9" (so). bias_layout: of laid_out().
    alibi: "H" or "BH". values: "normal", or "far below" for scores around -200.
    layout: "bhld"; "blhd", heads inside rows; "transposed", last stride not 1; "expanded over
    batch" and "expanded over heads", stride 0 in k and v; "sliced", parts of larger tensors, where
    q, k and v have different strides.
    poison: NaN and Inf in whatever padding takes out. lse_grad: lse has an upstream gradient too.
    """

    name: str
    pair: Pair
    B: int = 1
    Hq: int = 1
    Hkv: int | None = None
    Lq: int = 64
    Lk: int | None = None
    D: int = 16
    Dv: int | None = None
    scale: float | None = None
    bias: str | None = None
    bias_values: str = "normal"
    bias_dtype: torch.dtype | None = None
    bias_layout: str = "contiguous"
    split: tuple[int, int] | None = None
    softcap: float = 0.0
    alibi: str | None = None
    sinks: bool = False
    dropout_p: float = 0.0
    dropout_seed: int | None = None
    layout: str = "bhld"
    values: str = "normal"
    poison: bool = False
    lse_grad: bool = False
    dtypes: tuple[torch.dtype, ...] = ALL_DTYPES

    def __post_init__(self):
        for name, default in (("Hkv", self.Hq), ("Lk", self.Lq), ("Dv", self.D)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)

    def __repr__(self):
        return self.name

    def mask(self, device) -> masks.Mask | None:
        """tilemask's mask."""
        return self.pair.mask(device)

    def seen(self) -> Tensor:
        """The oracle's mask, bool [B, Hq, Lq, Lk]."""
        return self.pair.rule.seen(self.B, self.Hq, self.Lq, self.Lk)

    def live_keys(self) -> Tensor:
        """bool [B, Lk]."""
        return self.pair.rule.live_keys(self.B, self.Lk)

    def live_rows(self) -> Tensor:
        """bool [B, Lq]."""
        return self.pair.rule.live_rows(self.B, self.Lq)


def interval_cases() -> list[Case]:
    """What is an interval per row, without bias, softcap, ALiBi, sinks or dropout."""
    cases = []

    def add(name, pair=None, **options):
        cases.append(Case(name, pair or everything(), **options))

    # lengths around tiles of 16, 32 and 64, and primes
    for length in (1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 97):
        add(f"causal_{length}", causal(), Lq=length, lse_grad=length % 2 == 0)
    for Lq, Lk in (
        (1, 64),
        (1, 1),
        (1, 131),
        (64, 1),
        (16, 48),
        (7, 97),
        (97, 7),
        (33, 65),
        (65, 33),
    ):
        add(f"everything_{Lq}x{Lk}", Lq=Lq, Lk=Lk, lse_grad=Lk == 97)
    add("no_keys", Lq=5, Lk=0, Hq=2)
    add("no_keys_causal", causal(), Lq=5, Lk=0)
    add("no_rows", Lq=0, Lk=5, Hq=2)
    add("no_rows_varlen", varlen([0, 0], [0, 5]), Lq=0, Lk=5)
    add("no_batch", causal(), B=0, Hq=2, Lq=33)
    add("no_batch_padding", padding([]), B=0, Hq=2, Lq=33)

    # widths
    for D in (1, 8, 40, 64, 72, 128, 256):
        add(f"width_{D}", causal(), Lq=33, Lk=40, D=D)
    for D, Dv in ((16, 64), (64, 16), (40, 128), (1, 256), (192, 128)):
        add(f"width_{D}_{Dv}", window(20, 3), Lq=40, Lk=33, D=D, Dv=Dv, lse_grad=D == 40)

    # heads
    for Hq, Hkv in ((3, 3), (4, 2), (6, 2), (4, 1)):
        add(f"heads_{Hq}_{Hkv}", causal(), B=2, Hq=Hq, Hkv=Hkv, Lq=40, lse_grad=Hq == 6)
    add("heads_of_batches", padding([50, 17, 33]), B=3, Hq=4, Hkv=2, Lq=20, Lk=50)

    # layouts
    add("layout_blhd", causal(), B=2, Hq=4, Hkv=2, Lq=50, layout="blhd")
    add("layout_blhd_decoding", causal(align="lower_right"), B=2, Hq=4, Lq=1, Lk=50, layout="blhd")
    add("layout_transposed", causal(), B=2, Hq=2, Lq=33, Lk=40, layout="transposed")
    add("layout_sliced", window(20, 20), B=2, Hq=4, Hkv=2, Lq=37, Lk=53, layout="sliced")
    add("layout_sliced_widths", prefix_lm([3, 40]), B=2, Hq=2, Lq=40, D=24, Dv=40, layout="sliced")
    for length in (33, 65):  # Lk % 32 == 1 with broadcast k and v was wrong in torch
        over = "expanded over batch"
        add(f"layout_expanded_batch_{length}", B=3, Hq=2, Lq=20, Lk=length, layout=over)
        over = "expanded over heads"
        add(f"layout_expanded_heads_{length}", causal(), Hq=3, Lq=20, Lk=length, layout=over)

    # affine masks
    for offset in (9, -5, -70, 200):
        add(f"causal_offset_{offset}", causal(offset), Lq=80, Lk=70, lse_grad=offset == -5)
    add("causal_upper_left", causal(align="upper_left"), Lq=40, Lk=70)
    add("causal_lower_right", causal(align="lower_right"), Lq=40, Lk=97, Hq=2)
    add("causal_lower_right_dead_rows", causal(align="lower_right"), Lq=97, Lk=40, Hq=2)
    add("causal_offsets", causal([0, -33, 40]), B=3, Hq=2, Lq=65, lse_grad=True)
    add("window_both", window(8, 5), Lq=97)
    add("window_left", window(16, -1), Lq=70)
    add("window_right", window(-1, 3), Lq=70)
    add("window_nothing_cut", window(-1, -1), Lq=33)
    add("window_diagonal", window(0, 0), Lq=70, lse_grad=True)
    add("window_offset", window(10, 0, offset=-20), Lq=70)
    add("window_offsets", window(10, 3, offset=[0, 40, -90]), B=3, Lq=70)
    add("window_lower_right", window(20, 0, align="lower_right"), Lq=33, Lk=97)
    add("window_lower_right_dead_rows", window(20, 0, align="lower_right"), Lq=97, Lk=33)
    add("padding_lengths", padding([97, 1, 64]), B=3, Hq=2, Lq=33, Lk=97, poison=True)
    add("padding_one_length", padding(40), B=2, Lq=33, Lk=97, poison=True)
    add("padding_batch_empty", padding([70, 0, 33]), B=3, Lq=40, Lk=70, poison=True, lse_grad=True)
    add("padding_left", padding(start=[0, 30, 70]), B=3, Lq=40, Lk=70, poison=True)
    add("padding_both", padding(start=[3, 33], end=[70, 40]), B=2, Lq=40, Lk=70, poison=True)
    add("padding_rows", padding(query_lengths=[40, 0, 33]), B=3, Lq=40, poison=True)
    add(
        "padding_all",
        padding([64, 33], start=[5, 32], query_lengths=[31, 70]),
        B=2, Hq=4, Hkv=2, Lq=70, poison=True, lse_grad=True,
    )  # fmt: skip
    add("padding_blhd", padding([64, 33]), B=2, Hq=2, Lq=70, poison=True, layout="blhd")
    add("padding_causal", padding([64, 33]) & causal(), B=2, Hq=2, Lq=70, poison=True)
    add(
        "padding_left_causal",
        padding(start=[0, 33]) & causal(align="lower_right"),
        B=2, Hq=2, Lq=40, Lk=65, poison=True, lse_grad=True,
    )  # fmt: skip
    add(
        "padding_window_offsets",
        causal([5, -9]) & window(30, -1) & padding([64, 33], query_lengths=[70, 50]),
        B=2, Lq=70, poison=True,
    )  # fmt: skip

    # explicit intervals
    add("chunked_16", chunked(16), Lq=70)
    add("chunked_7_causal", chunked(7) & causal(), Lq=97, Lk=40, Hq=2)
    add("prefix_lm", prefix_lm([40, 1, 0]), B=3, Hq=2, Lq=70, lse_grad=True)
    add("prefix_lm_wide", prefix_lm(50), Lq=33, Lk=97)
    add("varlen", varlen([0, 20, 53, 97]), Lq=97, Hq=2)
    add("varlen_empty", varlen([0, 0, 20, 20, 20, 70, 70]), Lq=70)
    add("varlen_keys", varlen([0, 20, 53, 70], [0, 33, 33, 97]), Lq=70, Lk=97, lse_grad=True)
    add("varlen_rows_left", varlen([0, 20, 40], [0, 33, 50]), Lq=70, Lk=97, poison=True)
    add("varlen_batches", varlen([0, 20, 53, 70]), B=2, Hq=4, Hkv=2, Lq=70)
    add("varlen_causal", varlen([0, 20, 53, 97], within=causal()), Lq=97, Hq=4, Hkv=2)
    add(
        "varlen_causal_lower_right",
        varlen([0, 20, 53, 70], [0, 33, 40, 97], within=causal(align="lower_right")),
        Lq=70, Lk=97,
    )  # fmt: skip
    add(
        "varlen_causal_offsets",
        varlen([0, 20, 53, 70], [0, 33, 40, 97], within=causal([5, 0, -3])),
        Lq=70, Lk=97,
    )  # fmt: skip
    add("varlen_window", varlen([0, 20, 53, 97], within=window(5, 2)), Lq=97)
    add("varlen_prefix", varlen([0, 20, 53, 97], within=prefix_lm([20, 0, 7])), Lq=97)
    add("varlen_chunked", varlen([0, 20, 53, 97], within=chunked(9) & causal()), Lq=97)
    add("varlen_padding", varlen([0, 20, 53, 97], within=padding([20, 0, 9])), Lq=97)
    ids = runs((4, 20), (1, 1), (9, 33), (0, 16))
    shuffled = runs((9, 30), (0, 16), (7, 11), (4, 40))
    add("documents", documents([ids], contiguous=True), Lq=70, Hq=2)
    add("documents_permuted", documents([ids], [shuffled], contiguous=True), Lq=70, Lk=97)
    add("documents_batches", documents([ids, ids[::-1]], contiguous=True), B=2, Lq=70, Hq=2)
    add("documents_causal", documents([ids], contiguous=True, within=causal()), Lq=70)
    add(
        "documents_lower_right",
        documents([ids], [shuffled], contiguous=True, within=causal(align="lower_right")),
        Lq=70, Lk=97, lse_grad=True,
    )  # fmt: skip
    add("intervals", intervals(*random_intervals("rows", (70,), 97)), Lq=70, Lk=97, B=2)
    add(
        "intervals_heads",
        intervals(*random_intervals("h", (1, 4, 40), 97)),
        Hq=4,
        Hkv=2,
        Lq=40,
        Lk=97,
    )
    add("intervals_batches", intervals(*random_intervals("b", (3, 1, 40), 70)), B=3, Lq=40, Lk=70)
    add(
        "intervals_all",
        intervals(*random_intervals("bh", (2, 3, 40), 70, empty=0.5)),
        B=2, Hq=3, Lq=40, Lk=70, lse_grad=True,
    )  # fmt: skip

    # intersections of explicit and affine masks
    add("varlen_and_causal", varlen([0, 20, 53, 97]) & causal(), Lq=97)
    add(
        "prefix_padding",
        prefix_lm([40, 10]) & padding([50, 70], start=[3, 0]),
        B=2, Hq=2, Lq=70, poison=True,
    )  # fmt: skip
    add(
        "documents_window_padding",
        documents([ids], contiguous=True)
        & window(12, 12)
        & padding([64, 33], query_lengths=[70, 69]),
        B=2, Hq=2, Lq=70, poison=True,
    )  # fmt: skip
    add(
        "four_masks",
        intervals(*random_intervals("four", (1, 2, 70), 70, empty=0))
        & causal([10, -3])
        & padding(start=[0, 20])
        & chunked(48),
        B=2, Hq=2, Lq=70, poison=True,
    )  # fmt: skip

    # numbers
    add("scale_0", causal(), Lq=40, scale=0.0, lse_grad=True)
    add("scale_negative", causal(), Lq=40, scale=-0.5)
    add("scale_large", window(9, 9), Lq=70, scale=4.0)
    for length in (64, 192):  # length % 128 == 64 with lse < -88 gave NaN in cuDNN
        add(f"far_below_{length}", padding([length, 40]), B=2, Lq=40, Lk=length, values="far below")

    # larger
    add("large_causal", causal(), B=2, Hq=4, Hkv=2, Lq=128, Lk=160)
    add("large_window", window(64, 0), Hq=2, Lq=257, lse_grad=True)
    add(
        "large_varlen",
        varlen([0, 100, 101, 300], [0, 200, 300, 520], within=causal(align="lower_right")),
        Lq=300, Lk=520, D=64,
    )  # fmt: skip
    return cases


def other_cases() -> list[Case]:
    """Bits, bias, softcap, ALiBi, sinks and dropout."""
    cases = []

    def add(name, pair=None, **options):
        cases.append(Case(name, pair or everything(), **options))

    # key bits
    keep = random_keep("keep", 3, 70)
    keep[1] = [False] * 70
    add("keep", padding(keep=keep), B=3, Hq=2, Lq=40, Lk=70, poison=True, lse_grad=True)
    add("keep_one_for_all", padding(keep=keep[:1]), B=3, Lq=33, Lk=70, poison=True)
    add("keep_causal", padding(keep=keep) & causal(), B=3, Hq=4, Hkv=2, Lq=70, poison=True)
    add(
        "keep_in_range",
        padding([70, 60, 40], start=[0, 3, 9], keep=keep, query_lengths=[40, 1, 39]),
        B=3, Lq=40, Lk=70, poison=True,
    )  # fmt: skip
    twice = padding(keep=keep) & padding(keep=random_keep("again", 3, 70))
    add("keep_twice", twice, B=3, Lq=33, Lk=70, poison=True)
    add("keep_varlen", padding(keep=keep) & varlen([0, 33, 70]), B=3, Lq=70, poison=True)
    add("tokens", tokens([[7, 6, 0, 0], [1, 2, 3, 0]], 0), B=2, Hq=2, Lq=4, poison=True)

    # bits per pair
    for letters in ("QK", "HQK", "BHQK", "B1QK", "1HQK", "B11K", "11Q1", "B1Q1", "1K"):
        sizes = {"B": 2, "H": 4, "Q": 37, "K": 53, "1": 1}
        bits = random_bits(letters, [sizes[letter] for letter in letters])
        add(f"dense_{letters}", dense(bits), B=2, Hq=4, Hkv=2, Lq=37, Lk=53)
    lonely = random_bits("dead rows", (37, 53))
    lonely[[0, 5, 36]] = False
    add("dense_dead_rows", dense(lonely), Hq=2, Lq=37, Lk=53, lse_grad=True)
    add("dense_nothing", dense(torch.zeros(1, 1, dtype=torch.bool)), Hq=2, Lq=37, Lk=53)
    add(
        "dense_causal_padding",
        dense(random_bits("both", (1, 4, 70, 70))) & causal() & padding([70, 33]),
        B=2, Hq=4, Lq=70, poison=True,
    )  # fmt: skip
    add(
        "dense_keep_dense",
        dense(lonely)
        & padding(keep=random_keep("d", 2, 53))
        & dense(random_bits("e", (2, 1, 1, 53))),
        B=2, Hq=2, Lq=37, Lk=53, poison=True,
    )  # fmt: skip
    mixed = torch.randint(0, 4, (2, 40), generator=generator("mixed")).tolist()
    others = torch.randint(0, 5, (2, 53), generator=generator("others")).tolist()
    add("documents_mixed", documents(mixed), B=2, Hq=2, Lq=40)
    add("documents_mixed_keys", documents(mixed, others), B=2, Lq=40, Lk=53)
    add("documents_mixed_causal", documents(mixed, within=causal()), B=2, Lq=40)
    add(
        "documents_mixed_lower_right",
        documents(mixed, others, within=causal(align="lower_right")) & window(30, 20),
        B=2, Lq=40, Lk=53, lse_grad=True,
    )  # fmt: skip
    add("documents_one_for_all", documents(mixed[:1], others), B=2, Lq=40, Lk=53)

    # bias
    for letters in (
        "BHQK",
        "1HQK",
        "B1QK",
        "11QK",
        "B11K",
        "1H1K",
        "BHQ1",
        "1111",
        "HQK",
        "QK",
        "1K",
    ):
        options = dict(B=2, Hq=4, Hkv=2, Lq=33, Lk=40)
        add(f"bias_{letters}", bias=letters, lse_grad=letters == "1HQK", **options)
    small = dict(B=2, Hq=2, Lq=33, Lk=40)
    add("bias_causal", causal(), bias="1HQK", **small)
    add("bias_minus_inf", bias="BHQK", bias_values="-inf", lse_grad=True, **small)
    add("bias_minus_inf_causal", causal(-3), bias="11QK", bias_values="-inf", **small)
    add("bias_min", bias="B1QK", bias_values="min", **small)
    add("bias_min_causal", causal(), bias="11QK", bias_values="min", **small)
    add(
        "bias_1e9", bias="11QK", bias_values="-1e9",
        dtypes=(torch.float64, torch.float32, torch.bfloat16), **small,
    )  # fmt: skip
    add("bias_float32", bias="1HQK", bias_dtype=torch.float32, **small)
    add("bias_float32_min", bias="B11K", bias_dtype=torch.float32, bias_values="min", **small)
    add("bias_keep", padding(keep=random_keep("bk", 2, 40)), bias="1HQK", poison=True, **small)
    add("bias_blhd", causal(), bias="BHQK", layout="blhd", **small)

    # softcap, ALiBi, sinks
    add("softcap", causal(), softcap=2.0, scale=1.0, lse_grad=True, **small)
    add("softcap_bias", bias="1HQK", softcap=5.0, **small)
    add("alibi", causal(align="lower_right"), alibi="H", B=2, Hq=4, Hkv=2, Lq=33, Lk=40)
    add("alibi_batches", alibi="BH", **small)
    add("alibi_more_rows", window(9, -1), alibi="H", Hq=2, Lq=50, Lk=33)
    add("sinks", sinks=True, B=2, Hq=4, Hkv=2, Lq=33, Lk=40, lse_grad=True)
    add("sinks_causal", causal(), sinks=True, B=2, Hq=4, Hkv=1, Lq=40)
    add("sinks_dead_rows", causal(-9), sinks=True, lse_grad=True, **small)
    add("sinks_no_keys", sinks=True, Hq=2, Lq=5, Lk=0, lse_grad=True)
    add("sinks_bias_minus_inf", sinks=True, bias="11QK", bias_values="-inf", **small)
    add("sinks_window", window(3, 9), sinks=True, layout="blhd", **small)

    # dropout
    add("dropout", dropout_p=0.1, dropout_seed=1, B=2, Hq=4, Hkv=2, Lq=33, Lk=70)
    add("dropout_half", causal(), dropout_p=0.5, dropout_seed=2, Lq=65, lse_grad=True)
    add("dropout_all", dropout_p=1.0, dropout_seed=3, Lq=7)
    add("dropout_seed_of_64_bits", dropout_p=0.3, dropout_seed=-(2**62) - 12345, Lq=33)
    add("dropout_dead_rows", causal(-5), dropout_p=0.2, dropout_seed=4, **small)
    add("dropout_no_keys", dropout_p=0.2, dropout_seed=5, Hq=2, Lq=5, Lk=0)

    # everything at once
    add(
        "all_at_once",
        dense(random_bits("all", (1, 4, 40, 40), 0.8))
        & causal(3)
        & padding([40, 33], start=[0, 5]),
        B=2, Hq=4, Hkv=2, Lq=40, D=24, Dv=40, scale=0.7, softcap=3.0, bias="1HQK", alibi="BH",
        sinks=True, dropout_p=0.1, dropout_seed=6, layout="sliced", poison=True, lse_grad=True,
    )  # fmt: skip
    return cases


def mask_cases() -> list[Case]:
    """Masks that are no intervals: their densities, shapes and strides, and what they meet."""
    cases = []

    def add(name, pair, **options):
        cases.append(Case(name, pair, **options))

    # random bits
    small = dict(Hq=2, Lq=37, Lk=53)
    for visible in (0.02, 0.5, 0.98):
        bits = random_bits(f"visible {visible}", (2, 37, 53), visible)
        add(f"bits_{visible}", dense(bits), lse_grad=visible == 0.5, **small)
    ones = torch.ones(37, 53, dtype=torch.bool)
    add("bits_everything", dense(ones), **small)
    dead = ones.clone()
    dead[[0, 17, 36]] = False
    add("bits_full_but_dead_rows", dense(dead), lse_grad=True, **small)
    for Lq, Lk in (
        (33, 127), (127, 33), (20, 128), (128, 20), (17, 129), (129, 17), (16, 130), (130, 16),
        (9, 257), (257, 9), (129, 130),
    ):  # fmt: skip
        bits = random_bits(f"{Lq} x {Lk}", (Lq, Lk), 0.6)
        add(f"bits_{Lq}x{Lk}", dense(bits), Lq=Lq, Lk=Lk, lse_grad=Lk in (127, 9))

    # shapes and strides
    small = dict(B=2, Hq=2, Lq=20, Lk=53)
    add("bits_head_keys", dense(random_bits("hk", (2, 4, 1, 40))), B=2, Hq=4, Hkv=2, Lq=20, Lk=40)
    add("bits_head_keys_257", dense(random_bits("1hk", (2, 1, 257))), Hq=2, Lq=9, Lk=257)
    for layout in ("transposed", "heads last"):
        bits = dense(random_bits(layout, (2, 2, 20, 53)), layout)
        add(f"bits_{layout.replace(' ', '_')}", bits, **small)
    for shape in ((20, 53), (2, 1, 20, 53), (2, 20, 53)):
        bits = random_bits(f"sliced {shape}", shape)
        add(f"bits_sliced_{len(shape)}d", dense(bits, "sliced"), **small)
    for over in ("B", "H", "BH", "HK", "BQ"):
        bits = dense(random_bits(f"expanded {over}", (2, 2, 20, 53)), "expanded over " + over)
        add(f"bits_expanded_{over}", bits, **small)
    keys = dense(random_bits("keys", (2, 2, 20, 53)), "expanded over HQ")
    add("dense_keys_expanded", keys, poison=True, **small)
    keys = dense(random_bits("sliced keys", (2, 1, 1, 53)), "sliced")
    add("dense_keys_sliced", keys, poison=True, lse_grad=True, **small)
    keys = dense(random_bits("transposed keys", (2, 1, 1, 53)), "transposed")
    add("dense_keys_causal", keys & causal(9), poison=True, **small)

    # two batch dimensions
    def two_batches(letters, layout="contiguous", visible=0.6):
        shape = shape_of(letters, (2, 3), 6, 2, 17, 35)
        return dense(random_bits(f"{letters} {layout}", shape, visible), layout, split=(2, 3))

    six = dict(B=6, Lq=17, Lk=35)
    for letters in ("X1HQK", "1YHQK", "XYHQK", "11HQK", "XYH1K", "1YHQ1"):
        add(f"dense_{letters}", two_batches(letters), Hq=2, **six)
    for letters in ("X11QK", "1Y1QK", "X11Q1"):
        add(f"dense_{letters}", two_batches(letters), lse_grad=letters == "1Y1QK", **six)
    for letters in ("X111K", "1Y11K", "XY11K"):
        add(f"dense_{letters}", two_batches(letters), poison=True, **six)
    add("dense_1Y1QK_transposed", two_batches("1Y1QK", "transposed"), **six)
    add("dense_X1HQK_sliced", two_batches("X1HQK", "sliced") & causal(12), Hq=2, **six)
    both = two_batches("X11QK", visible=0.7) & two_batches("1YHQ1", visible=0.8)
    both = both & dense(random_bits("flat", (6, 1, 17, 35), 0.8))
    add("dense_5d_and_4d", both, Hq=2, lse_grad=True, **six)

    # what people make
    blocks = random_blocks("32", (2, 1, 70, 140), (32, 32))
    add("blocks_32", dense(blocks), B=2, Lq=70, Lk=140)
    blocks = random_blocks("16x64", (2, 70, 200), (16, 64))
    add("blocks_16x64", dense(blocks), Hq=2, Lq=70, Lk=200, lse_grad=True)
    blocks = random_blocks("64", (1, 2, 129, 129), (64, 64), 0.5)
    add("blocks_64_causal", dense(blocks) & causal(), Hq=2, Lq=129)
    tree = random_tree("tree", 24, context=40)
    add("tree", dense(tree), Hq=4, Hkv=2, Lq=24, Lk=64)
    trees = torch.stack([random_tree(f"tree {b}", 24, context=33) for b in (0, 1)])[:, None]
    add(
        "tree_padding",
        dense(trees) & padding(start=[0, 11]),
        B=2, Lq=24, Lk=57, poison=True,
    )  # fmt: skip
    i, j = torch.arange(70)[:, None], torch.arange(70)
    prefix = (j < torch.tensor([40, 0]).view(2, 1, 1, 1)) | (j <= i)
    add("prefix_as_bits", dense(prefix), B=2, Lq=70)
    add("causal_as_bits", dense(j <= i), Hq=2, Lq=70, lse_grad=True)
    mixed = torch.randint(0, 3, (2, 40), generator=generator("windows")).tolist()
    add("documents_mixed_window", documents(mixed) & window(20, 9), B=2, Hq=2, Lq=40)
    inside = documents(mixed, within=window(5, 2))
    add("documents_mixed_window_within", inside, B=2, Lq=40, lse_grad=True)
    inside = documents(mixed[:1], within=causal()) & dense(random_bits("d b", (2, 1, 40, 40), 0.8))
    add("documents_mixed_bits", inside, B=2, Hq=2, Lq=40)
    inside = documents(mixed) & documents([runs((1, 15), (2, 25))] * 2)
    add("documents_twice", inside, B=2, Lq=40)

    # holes, bits and intervals together: none of them expands another
    def holes(name, Lk, B=2):
        return padding(keep=random_keep(name, B, Lk, 0.7))

    for Lk in (127, 128, 129, 257):
        add(f"holes_{Lk}", holes(f"{Lk}", Lk), B=2, Lq=17, Lk=Lk, poison=True)
    add(
        "holes_causal_window",
        holes("hcw", 70) & causal(3) & window(30, -1),
        B=2, Hq=2, Hkv=1, Lq=70, poison=True, lse_grad=True,
    )  # fmt: skip
    add(
        "holes_varlen_causal",
        holes("hvc", 97) & varlen([0, 20, 53, 97], within=causal()),
        B=2, Lq=97, poison=True,
    )  # fmt: skip
    ids = runs((4, 20), (1, 1), (9, 33), (0, 16))
    shuffled = runs((9, 30), (0, 16), (7, 11), (4, 40))
    add(
        "holes_documents",
        holes("hd", 97) & documents([ids], [shuffled], contiguous=True),
        B=2, Lq=70, Lk=97, poison=True,
    )  # fmt: skip
    add(
        "holes_prefix_padding",
        holes("hpp", 70) & prefix_lm([40, 10]) & padding([70, 50], query_lengths=[69, 33]),
        B=2, Lq=70, poison=True,
    )  # fmt: skip
    add(
        "holes_bits_explicit",
        holes("hbe", 70)
        & dense(random_bits("hbe bits", (1, 2, 40, 70), 0.7))
        & intervals(*random_intervals("hbe rows", (2, 1, 40), 70, empty=0.1)),
        B=2, Hq=2, Hkv=1, Lq=40, Lk=70, poison=True, lse_grad=True,
    )  # fmt: skip
    add(
        "holes_bits_explicit_heads",
        holes("hbh", 70, B=1)
        & dense(random_bits("hbh bits", (2, 1, 40, 70), 0.7))
        & intervals(*random_intervals("hbh rows", (1, 2, 40), 70, empty=0.1)),
        B=2, Hq=2, Lq=40, Lk=70, poison=True,
    )  # fmt: skip
    add(
        "bits_explicit_causal",
        dense(random_bits("bec", (2, 40, 70), 0.8)) & varlen([0, 15, 40], [0, 33, 70]) & causal(25),
        B=2, Hq=2, Lq=40, Lk=70,
    )  # fmt: skip
    add(
        "bits_keys_and_rows",
        dense(random_bits("by key", (2, 1, 1, 53), 0.8))
        & dense(random_bits("by row", (2, 20, 1), 0.8))
        & dense(random_bits("by both", (20, 53), 0.8)),
        poison=True, **small,
    )  # fmt: skip

    # rows that only several parts together kill: they count for no tile's class
    lonely = ones.clone()
    lonely[3], lonely[20:22] = False, False
    lonely[3, 5], lonely[20:22, 50] = True, True
    keep = [[column not in (5, 50) for column in range(53)]]
    small = dict(Hq=2, Lq=37, Lk=53)
    add("holes_kill_rows", dense(lonely) & padding(keep=keep), poison=True, **small)
    add("padding_kills_rows", dense(lonely) & padding([50]), poison=True, **small)
    add("causal_kills_rows", dense(lonely) & causal(16), lse_grad=True, **small)
    return cases


def bias_cases() -> list[Case]:
    """Shapes and strides of a bias, each with its gradient."""
    cases = []

    def add(name, pair=None, **options):
        cases.append(Case(name, pair or everything(), **options))

    six = dict(B=6, Lq=17, Lk=20, split=(2, 3))
    for letters in ("X1HQK", "1YHQK", "XYHQK", "11HQK", "XYH1K", "X1HQ1"):
        add(f"bias_{letters}", causal(5), bias=letters, Hq=2, **six)
    for letters in ("X11QK", "1Y1QK"):
        add(f"bias_{letters}", causal(5), bias=letters, lse_grad=letters == "1Y1QK", **six)
    swin = dense(random_bits("shifted windows", (1, 3, 1, 17, 20), 0.7), split=(2, 3))
    add("bias_swin", swin, bias="11HQK", Hq=2, **six)
    add("bias_1Y1QK_transposed", bias="1Y1QK", bias_layout="transposed", **six)
    add("bias_X11QK_minus_inf", bias="X11QK", bias_values="-inf", **six)

    small = dict(B=2, Hq=2, Lq=33, Lk=20)
    for letters in ("BHQK", "1HQK", "QK", "B11K"):
        options = dict(bias=letters, bias_layout="transposed", **small)
        add(f"bias_transposed_{letters}", causal(5), **options)
    for letters in ("1HQK", "HQK", "BHQK", "BH1K"):
        options = dict(bias=letters, bias_layout="heads last", **small)
        add(f"bias_heads_last_{letters}", lse_grad=letters == "1HQK", **options)
    for letters in ("BHQK", "1HQK", "QK", "B1QK", "1H1K"):
        add(f"bias_sliced_{letters}", bias=letters, bias_layout="sliced", **small)
    for letters, over in (
        ("BHQK", "B"), ("BHQK", "H"), ("1HQK", "Q"), ("BHQK", "K"), ("QK", "QK"), ("BHQK", "BQ"),
    ):  # fmt: skip
        options = dict(bias=letters, bias_layout=f"expanded over {over}", **small)
        add(f"bias_expanded_{letters}_{over}", causal(5), **options)

    # float32 bias with halves
    halves = (torch.float16, torch.bfloat16)
    for letters in ("BHQK", "B11K", "QK", "BHQ1", "1111", "1H1K"):
        options = dict(bias=letters, bias_dtype=torch.float32, dtypes=halves, **small)
        add(f"bias_float32_{letters}", causal(5), **options)
    add(
        "bias_float32_heads_last", bias="1HQK", bias_layout="heads last", bias_dtype=torch.float32,
        dtypes=halves, **small,
    )  # fmt: skip
    add(
        "bias_float32_X11QK", bias="X11QK", bias_layout="sliced", bias_dtype=torch.float32,
        dtypes=halves, **six,
    )  # fmt: skip

    # past one tile and past the words of a row
    wide = dict(Hq=2, Lq=20, Lk=130)
    add("bias_wide", padding([129]), bias="1HQK", poison=True, **wide)
    add("bias_wide_keys", bias="1H1K", bias_layout="sliced", **wide)
    add("bias_long_rows", causal(), bias="HQ1", Hq=2, Lq=130, Lk=20)
    one = dict(B=2, Hq=4, Hkv=2, Lq=1, Lk=129)
    add("bias_decoding", padding([129, 50]), bias="BH1K", poison=True, **one)
    return cases


# -- every pair of options ------------------------------------------------------------------------

PAIR_SIZE = dict(B=2, Hq=2, Hkv=2, Lq=33, Lk=40, D=16, Dv=16)
PAIR_MASKS = {
    "none": everything(),
    "causal": causal(),
    "lengths": padding([40, 17]),
    "keys": padding(keep=random_keep("pair", 2, 40)),
    "varlen": varlen([0, 10, 33], [0, 25, 40]),
    "dense": dense(random_bits("pair", (2, 1, 33, 40))),
    "dense_causal_lengths": dense(random_bits("pairs", (33, 40), 0.7))
    & causal(3)
    & padding([40, 17]),
}
PAIR_OPTIONS = {
    "bias": dict(bias="1HQK"),
    "dropout": dict(dropout_p=0.2, dropout_seed=11),
    "softcap": dict(softcap=2.0),
    "alibi": dict(alibi="H"),
    "sinks": dict(sinks=True),
    "gqa": dict(Hq=4),
    "value_width": dict(Dv=24),
    "lse": dict(lse_grad=True),
}


def pair_cases() -> list[Case]:
    """Every kind of mask with every option, and every option with every other, under causal and
    padding or under bits."""
    cases = []

    def add(name, pair, **options):
        poison = not pair.rule.live_keys(2, 40).all()
        options = PAIR_SIZE | options | dict(poison=poison)
        cases.append(Case(f"pair_{name}", pair, **options))

    for mask, pair in PAIR_MASKS.items():
        for option, values in PAIR_OPTIONS.items():
            add(f"{mask}_{option}", pair, **values)
    grounds = itertools.cycle((causal() & padding([40, 17]), PAIR_MASKS["dense"]))
    for (one, values), (other, more) in itertools.combinations(PAIR_OPTIONS.items(), 2):
        add(f"{one}_{other}", next(grounds), **values, **more)
    return cases


def decode_cases() -> list[Case]:
    """A few rows at the end of a long cache: keys are split over programs, and heads folded."""
    cases = []

    def add(name, pair=None, **options):
        options = dict(B=2, Hq=4, Hkv=2, Lq=1, Lk=330) | options
        cases.append(Case(f"decode_{name}", pair or everything(), **options))

    latest = causal(align="lower_right")
    add("everything", lse_grad=True)
    add("heads", latest, Hq=8, Hkv=1, D=64)
    add("causal_3", latest, Lq=3)
    add("causal_16", latest, Lq=16, lse_grad=True)
    add("causal_17", latest, Lq=17)
    add("upper_left", causal(), Lq=4, Hkv=4)
    add("lengths", padding([330, 7]), poison=True)
    add("empty", padding([0, 300]), poison=True, lse_grad=True)
    add("left", padding(start=[0, 200]) & latest, Lq=2, poison=True)
    add("row_left_out", padding(query_lengths=[1, 0]), poison=True)
    add("window", window(100, 0, align="lower_right"))
    add("window_5", window(40, 0, align="lower_right"), Lq=5, layout="blhd")
    add("offsets", causal([329, 40]) & padding([330, 100]), poison=True)
    add("negative_scale", latest, scale=-0.5)
    add("blhd", padding([330, 40]), layout="blhd", poison=True)
    add("widths", latest, D=40, Dv=24, layout="sliced")
    add("softcap", latest, softcap=2.0, scale=1.0)
    add("sinks", padding([330, 0]), sinks=True, poison=True, lse_grad=True)
    add("bias", bias="1H1K", lse_grad=True)
    add("bias_min", bias="B11K", bias_values="min")
    add("bias_minus_inf", bias="BHQK", bias_values="-inf", Lq=4)
    add("alibi", latest, alibi="H", Lq=2)
    add("dropout", latest, dropout_p=0.3, dropout_seed=9)
    add("keys", padding(keep=random_keep("decode", 2, 330)), poison=True)
    add("dense", dense(random_bits("decode", (2, 4, 3, 330), 0.1)), Lq=3)
    add("tree", dense(random_bits("drafts", (7, 330))) & padding([330, 300]), Lq=7, poison=True)
    add("documents", varlen([0, 2, 3], [0, 100, 330]), Lq=3)

    # several shares of four tiles of 128 keys
    long = dict(Hq=2, Hkv=1, Lk=1100)
    add("long", latest, lse_grad=True, **long)
    add("long_rows", latest, Lq=5, **long)
    add("long_lengths", padding([1100, 30]), Lq=2, poison=True, **long)
    add("long_wide", window(700, 0, align="lower_right"), D=160, Dv=136, **long)
    keep = padding(keep=random_keep("long", 2, 1100, 0.1))
    add("long_keys", keep, sinks=True, poison=True, **long)
    bits = dense(random_bits("long", (3, 1100), 0.01)) & padding([1100, 600])
    add("long_bits", bits, Lq=3, softcap=2.0, poison=True, **long)
    add("long_bias", bias="1H1K", alibi="H", dropout_p=0.2, dropout_seed=4, **long)
    # more heads that share a key head than a tile has rows
    add("long_group", padding([1100, 40]), poison=True, lse_grad=True, **long | {"Hq": 20})
    return cases


CASES = [
    *interval_cases(),
    *other_cases(),
    *mask_cases(),
    *bias_cases(),
    *decode_cases(),
    *pair_cases(),
]
_BY_NAME = {case.name: case for case in CASES}
assert len(_BY_NAME) == len(CASES), "two cases have one name"


def named(name: str) -> Case:
    return _BY_NAME[name]


# -- inputs ---------------------------------------------------------------------------------------


def placed(values: Tensor, layout: str, tensor: str, device) -> Tensor:
    """``values`` [B, H, L, D] on the device, laid out in memory as the case wants it; a leaf."""
    values = values.to(device)
    B, H, L, D = values.shape
    if layout == "blhd":
        values = values.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "transposed":
        values = values.mT.contiguous().mT
    elif layout == "sliced":
        rows, width = {"q": (3, 8), "k": (5, 16), "v": (0, 24), "dout": (1, 8)}[tensor]
        outer = (
            (B, L + rows, H, D + width) if tensor in ("v", "dout") else (B, H, L + rows, D + width)
        )
        larger = torch.full(outer, float("nan"), dtype=values.dtype, device=device)
        larger = larger.transpose(1, 2) if tensor in ("v", "dout") else larger
        view = larger[:, :, rows : rows + L, :D]
        values = view.copy_(values)
    elif layout.startswith("expanded") and tensor in "kv":
        dim = 0 if layout == "expanded over batch" else 1
        values = values.narrow(dim, 0, 1).expand(B, H, L, D)
    return values.detach()


def poisoned(values: Tensor, live: Tensor, name: str) -> Tensor:
    """``values`` [B, H, L, D] with NaN, Inf and -Inf in the rows that are not ``live`` [B, L]."""
    kinds = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=values.dtype)
    pick = torch.randint(0, 3, values.shape, generator=generator(name))
    return torch.where(live[:, None, :, None], values, kinds[pick])


def bias_tensor(case: Case, dtype: torch.dtype) -> Tensor:
    shape = shape_of(case.bias, case.split, case.B, case.Hq, case.Lq, case.Lk)
    g = generator(case.name + " bias")
    bias = torch.randn(shape, dtype=torch.float64, generator=g).to(case.bias_dtype or dtype)
    if case.bias_values != "normal":
        low = {"-inf": -torch.inf, "min": torch.finfo(bias.dtype).min, "-1e9": -1e9}
        cut = torch.rand(shape, generator=g) < 0.3
        if bias.shape[-2] > 1:
            cut[..., [0, bias.shape[-2] // 2], :] = True
        bias = bias.masked_fill(cut, low[case.bias_values])
    return repeated(bias, case.bias_layout)


def one_batch(case: Case, bias: Tensor) -> Tensor:
    """The bias with its two batch dimensions, if it has two, flattened to one."""
    return bias.expand(*case.split, *bias.shape[2:]).flatten(0, 1) if bias.dim() == 5 else bias


def summed_to(case: Case, gradient: Tensor, shape: torch.Size) -> Tensor:
    """A gradient [B, Hq, Lq, Lk] summed over what a bias of ``shape`` broadcasts over."""
    gradient = gradient.unflatten(0, case.split) if len(shape) == 5 else gradient
    return gradient.sum_to_size(shape) if gradient.shape != shape else gradient


@functools.cache
def canonical_inputs(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """All tensors of a call on the CPU, contiguous; read only."""
    g = generator(case.name)

    def normal(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=g).to(dtype)

    q = normal(case.B, case.Hq, case.Lq, case.D)
    k = normal(case.B, case.Hkv, case.Lk, case.D)
    v = normal(case.B, case.Hkv, case.Lk, case.Dv)
    if case.values == "far below":
        q, k = 3 + q.abs(), -3 - k.abs()
    if case.layout == "expanded over batch":
        k, v = (t[:1].repeat(case.B, 1, 1, 1) for t in (k, v))
    if case.layout == "expanded over heads":
        k, v = (t[:, :1].repeat(1, case.Hkv, 1, 1) for t in (k, v))
    if case.poison:
        q = poisoned(q, case.live_rows(), case.name + " q")
        k = poisoned(k, case.live_keys(), case.name + " k")
        v = poisoned(v, case.live_keys(), case.name + " v")
    tensors = {"q": q, "k": k, "v": v}
    if case.bias:
        tensors["bias"] = bias_tensor(case, dtype)
    if case.alibi:
        shape = (case.Hq,) if case.alibi == "H" else (case.B, case.Hq)
        tensors["alibi_slopes"] = torch.rand(shape, dtype=torch.float64, generator=g).to(
            torch.float32
        )
    if case.sinks:
        tensors["sinks"] = normal(case.Hq)
    tensors["dout"] = normal(case.B, case.Hq, case.Lq, case.Dv)
    if case.lse_grad:
        lse_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        tensors["dlse"] = normal(case.B, case.Hq, case.Lq).to(lse_dtype)
    return tensors


GRADIENTS = {"q": "dq", "k": "dk", "v": "dv", "bias": "dbias", "sinks": "dsinks"}


def inputs(case: Case, dtype: torch.dtype, device="cpu") -> dict[str, Tensor]:
    """q, k, v, dout and, where the case has them, bias, alibi_slopes, sinks, dlse: on the device,
    in the case's layout. Those that get a gradient are leaves that require one.
    """
    made = {}
    for name, values in canonical_inputs(case, dtype).items():
        if name in ("q", "k", "v", "dout"):
            made[name] = placed(values, case.layout, name, device)
        elif name == "bias":
            made[name] = laid_out(values.to(device, copy=True), case.bias_layout).detach()
        else:
            made[name] = values.detach().to(device, copy=True)
        made[name].requires_grad_(name in GRADIENTS)
    return made


def options(case: Case, given: dict[str, Tensor], device) -> dict:
    """The keyword arguments of attention() for the case."""
    said = {n: given[n] for n in ("bias", "alibi_slopes", "sinks") if n in given}
    for name in ("scale", "softcap", "dropout_p", "dropout_seed"):
        if getattr(case, name):
            said[name] = getattr(case, name)
    if case.scale == 0:
        said["scale"] = case.scale
    return {"mask": case.mask(device), **said}


def run(case: Case, dtype: torch.dtype, device="cpu", backend=None, wrap=None) -> dict[str, Tensor]:
    """out, lse and the gradients dq, dk, dv, dbias, dsinks of attention(), on the CPU.

    wrap: applied to attention() before it is called, torch.compile for one.
    """
    given = inputs(case, dtype, device)
    attend = wrap(tilemask.attention) if wrap else tilemask.attention
    out, lse = attend(
        given["q"], given["k"], given["v"],
        **options(case, given, device), return_lse=True, backend=backend,
    )  # fmt: skip
    results = {"out": out, "lse": lse, **gradients(out, lse, given)}
    return {name: tensor.detach().cpu() for name, tensor in results.items()}


def gradients(out: Tensor, lse: Tensor, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """dq, dk, dv, dbias, dsinks for the upstream gradients in ``given``."""
    leaves = {GRADIENTS[name]: given[name] for name in GRADIENTS if name in given}
    outputs, upstream = [out], [given["dout"]]
    if "dlse" in given:
        outputs.append(lse)
        upstream.append(given["dlse"])
    grads = torch.autograd.grad(outputs, list(leaves.values()), upstream)
    return dict(zip(leaves, grads, strict=True))


# -- what a result is compared with ---------------------------------------------------------------


@functools.cache
def dropout_keep(case: Case) -> tuple[Tensor, float] | None:
    if not case.dropout_p:
        return None
    size = case.B, case.Hq, case.Lq, case.Lk
    return oracle.dropout_keep(case.dropout_p, case.dropout_seed, *size)


@functools.cache
def expected(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """The oracle's results in float64, from the inputs as rounded to ``dtype``.

    Where the bias is finfo.min or -1e9, float32 is meant to swallow the scores: torch's arithmetic.
    """
    swallowing = case.bias_values in ("min", "-1e9") and dtype != torch.float64
    given = {n: t.double() for n, t in canonical_inputs(case, dtype).items()}
    for name in GRADIENTS:
        if name in given:
            given[name] = given[name].detach().requires_grad_()
    bias = one_batch(case, given["bias"]) if case.bias else None
    out, lse = oracle.attention_oracle(
        given["q"], given["k"], given["v"], case.seen(),
        scale=case.scale, bias=bias, softcap=case.softcap,
        alibi_slopes=given.get("alibi_slopes"), sinks=given.get("sinks"), keep=dropout_keep(case),
        live_keys=case.live_keys(), live_rows=case.live_rows(),
        held_in=torch.float32 if swallowing else None,
    )  # fmt: skip
    results = {"out": out, "lse": lse, **gradients(out, lse, given)}
    return {name: tensor.detach() for name, tensor in results.items()}


def clean_inputs(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """The inputs with zeros where padding takes out, leaves that require gradients."""
    given = dict(canonical_inputs(case, dtype))
    dead_keys, dead_rows = ~case.live_keys()[:, None, :, None], ~case.live_rows()[:, None, :, None]
    given["q"] = given["q"].masked_fill(dead_rows, 0)
    given["k"], given["v"] = (given[n].masked_fill(dead_keys, 0) for n in "kv")
    return {n: t.detach().clone().requires_grad_(n in GRADIENTS) for n, t in given.items()}


def logits(case: Case, q: Tensor, k: Tensor, given: dict[str, Tensor]):
    """Scores up to the mask, [B, Hq, Lq, Lk], in plain torch, and tanh of the softcap."""
    scores = q @ k.repeat_interleave(case.Hq // case.Hkv, 1).mT
    scores = scores * (case.D**-0.5 if case.scale is None else case.scale)
    tanh = None
    if case.softcap:
        tanh = torch.tanh(scores / case.softcap)
        scores = case.softcap * tanh
    if case.bias:
        scores = scores + one_batch(case, given["bias"])
    if case.alibi:
        distance = torch.arange(case.Lq)[:, None] + case.Lk - case.Lq - torch.arange(case.Lk)
        slopes = given["alibi_slopes"].to(scores.dtype).view(-1, case.Hq, 1, 1)
        scores = scores - slopes * distance.abs()
    return scores.masked_fill(~case.seen(), -torch.inf), tanh


def torch_eager(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """softmax(scores) @ v as anybody would write it, every step in ``dtype``. lse in float32."""
    given = clean_inputs(case, dtype)
    q, k, v = given["q"], given["k"], given["v"]

    def with_sinks(scores):
        if not case.sinks:
            return scores
        sink = given["sinks"].to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        return torch.cat([scores, sink], -1)

    columns = with_sinks(logits(case, q, k, given)[0])
    dead = (columns == -torch.inf).all(-1, keepdim=True)
    p = torch.softmax(columns.masked_fill(dead, 0), -1).masked_fill(dead, 0)[..., : case.Lk]
    if case.dropout_p:
        keep, factor = dropout_keep(case)
        p = p * keep * factor
    out = p.to(dtype) @ v.repeat_interleave(case.Hq // case.Hkv, 1)

    math = torch.promote_types(dtype, torch.float32)
    columns = with_sinks(logits(case, q.to(math), k.to(math), given)[0])
    lse = columns.masked_fill(dead, 0).logsumexp(-1).masked_fill(dead[..., 0], -torch.inf)
    results = {"out": out, "lse": lse, **gradients(out, lse.to(math), given)}
    return {name: tensor.detach() for name, tensor in results.items()}


PIVOTS = (0.0, 0.25, 0.5, 0.75)
MORE_PIVOTS = tuple(i / 16 for i in range(16))  # for dsinks: so few numbers need more throws


def torch_fused(
    case: Case, dtype: torch.dtype, pivot: float = 0.0
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The order of a fused kernel in plain torch: float32 inside, ``dtype`` for what tensor cores
    multiply and for out, which the backward reads again. Also the largest terms that each gradient
    is a sum of.

    Where a row sees one key, gradients of scores are a difference of two equal numbers: exactly 0
    in torch_eager, but of the size of a rounding error here and in every kernel. Where a row sees a
    few, chance decides how well rounding errors of out cancel in its delta: ``pivot``, the power
    of two that weights are held relative to while they are rounded, throws the dice again.
    """
    math = torch.promote_types(dtype, torch.float32)
    given = {n: t.detach().to(math) for n, t in clean_inputs(case, dtype).items()}
    group = case.Hq // case.Hkv
    q, dout = given["q"], given["dout"]
    k, v = (given[n].repeat_interleave(group, 1) for n in "kv")

    def rounded(tensor):
        return tensor.to(dtype).to(math)

    def per_key_head(tensor):
        return tensor.unflatten(1, (case.Hkv, group)).sum(2)

    scores, tanh = logits(case, q, given["k"], given)
    columns = scores
    if case.sinks:
        sink = given["sinks"].view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        columns = torch.cat([scores, sink], -1)
    dead = (columns == -torch.inf).all(-1, keepdim=True)
    lse = columns.masked_fill(dead, 0).logsumexp(-1, keepdim=True)
    # not exp(scores - lse): near finfo.min lse cannot hold the logarithm of a sum
    p = torch.softmax(columns.masked_fill(dead, 0), -1).masked_fill(dead, 0)[..., : case.Lk]
    kept, factor = dropout_keep(case) or (torch.ones(()), 1.0)
    dropped = rounded(p * kept * factor)
    unit = p.amax(-1, keepdim=True) * 2**-pivot if case.Lk else torch.zeros_like(lse)
    unit = unit.masked_fill(unit == 0, 1)
    out = rounded((rounded(p * kept * factor / unit) @ v) * unit)

    dp = (dout @ v.mT) * kept * factor
    delta = (dout * out).sum(-1, keepdim=True)
    dlse = given["dlse"][..., None] if case.lse_grad else torch.zeros_like(lse)
    dbias = p * (dp - delta + dlse)
    scale = case.D**-0.5 if case.scale is None else case.scale
    slope = 1 - tanh.square() if case.softcap else 1.0
    ds = rounded(dbias * slope) * scale
    results = {
        "out": out,
        "lse": lse.masked_fill(dead, -torch.inf)[..., 0],
        "dq": ds @ k,
        "dk": per_key_head(ds.mT @ q),
        "dv": per_key_head(dropped.mT @ dout),
    }
    term = largest(p * (dp.abs() + delta.abs() + dlse.abs()))
    terms = {"dq": abs(scale) * term * largest(k), "dk": abs(scale) * term * largest(q)}
    if case.bias:
        results["dbias"] = summed_to(case, dbias, given["bias"].shape)
        terms["dbias"] = term
    if case.sinks:
        weight = torch.exp(given["sinks"].view(1, -1, 1, 1) - lse).masked_fill(dead, 0)
        results["dsinks"] = (weight * (dlse - delta)).sum((0, 2, 3))
        terms["dsinks"] = largest(weight * (dlse.abs() + delta.abs()))
    own = {"lse": math, "dbias": case.bias_dtype or dtype}
    return {name: t.to(own.get(name, dtype)) for name, t in results.items()}, terms


def largest(tensor: Tensor) -> float:
    """max |x| over what is finite; 0 for nothing."""
    tensor = tensor.abs()
    tensor = tensor[tensor.isfinite()]
    return tensor.max().item() if tensor.numel() else 0.0


def error(got: Tensor, truth: Tensor) -> float:
    """max |got - truth|; equal infinities agree."""
    difference = got.double() - truth
    return largest(difference.masked_fill(got.double() == truth, 0))


@functools.cache
def torch_errors(case: Case, dtype: torch.dtype) -> dict[str, float]:
    """The error of plain torch in ``dtype`` per tensor: the largest of torch_eager's, torch_fused's
    and that of rounding the truth.
    """
    truth = expected(case, dtype)
    eager = torch_eager(case, dtype)
    pivots = MORE_PIVOTS if case.sinks else PIVOTS
    fused = [torch_fused(case, dtype, pivot)[0] for pivot in pivots]
    errors = {}
    for name, exact in truth.items():
        own = eager[name].dtype
        answers = [*(results[name] for results in fused), exact.to(own)]
        if not (case.bias_values == "min" and dtype == torch.float16):
            answers.append(eager[name])  # -65504 swallows scores in float16, not in float32
        errors[name] = max(error(answer, exact) for answer in answers)
    return errors


@functools.cache
def allowed_errors(case: Case, dtype: torch.dtype) -> dict[str, float]:
    """Twice torch's error and a little of the tensor's size (of its terms where they cancel)."""
    _, terms = torch_fused(case, torch.float64)
    little = 1e-12 if dtype == torch.float64 else 1e-5
    truth = expected(case, dtype)
    return {
        name: 2 * measured + little * max(largest(truth[name]), terms.get(name, 0.0))
        for name, measured in torch_errors(case, dtype).items()
    }


def check(case: Case, dtype: torch.dtype, result: dict[str, Tensor]) -> None:
    """Assert that a result of ``run`` (or the same as float64) is right."""
    truth, allowed = expected(case, dtype), allowed_errors(case, dtype)
    assert set(result) == set(truth), f"{case}: got {sorted(result)}, expected {sorted(truth)}"
    for name, exact in truth.items():
        got = torch.as_tensor(result[name]).detach().cpu().double()
        assert got.shape == exact.shape, (
            f"{case} {name}: {tuple(got.shape)}, not {tuple(exact.shape)}"
        )
        assert not got.isnan().any(), (
            f"{case} {name}: {int(got.isnan().sum())} of {got.numel()} NaN"
        )
        infinite = exact == -torch.inf
        assert torch.equal(got == -torch.inf, infinite), f"{case} {name}: -inf in the wrong places"
        measured = error(got, exact)
        assert (got.isinf() == infinite).all(), f"{case} {name}: Inf"
        assert measured <= allowed[name], (
            f"{case} {name} in {dtype}: error {measured:.3g}, allowed {allowed[name]:.3g}, "
            f"torch's {torch_errors(case, dtype)[name]:.3g}, largest {largest(exact):.3g}"
        )
    # what sees nothing and what nobody sees is not small but 0
    for name, visible in (
        ("out", rows_seen),
        ("dq", rows_seen),
        ("dk", keys_seen),
        ("dv", keys_seen),
    ):
        dead = ~visible(case, dtype)
        got = torch.as_tensor(result[name]).cpu()
        assert (got[dead] == 0).all(), f"{case} {name}: not 0 where nothing is visible"


@functools.cache
def visible_pairs(case: Case, dtype: torch.dtype) -> Tensor:
    """Which pairs have any weight, bool [B, Hq, Lq, Lk]: seen, and no bias of -inf."""
    seen = case.seen()
    if case.bias:
        seen = seen & (one_batch(case, canonical_inputs(case, dtype)["bias"]) > -torch.inf)
    return seen


def rows_seen(case: Case, dtype: torch.dtype) -> Tensor:
    """Rows that see something, bool [B, Hq, Lq]."""
    return visible_pairs(case, dtype).any(-1)


def keys_seen(case: Case, dtype: torch.dtype) -> Tensor:
    """Keys that somebody sees, bool [B, Hkv, Lk]."""
    seen = visible_pairs(case, dtype).any(2)
    return seen.unflatten(1, (case.Hkv, case.Hq // case.Hkv)).any(2)


def parameters(cases=None, dtypes=ALL_DTYPES):
    """(case, dtype) for pytest.mark.parametrize, with names to select by."""
    import pytest

    return [
        pytest.param(case, dtype, id=f"{case}-{str(dtype).removeprefix('torch.')}")
        for case in (CASES if cases is None else cases)
        for dtype in case.dtypes
        if dtype in dtypes
    ]
