"""The workloads: named shapes and masks, and the suites they make.

A mask is said here once for every contender: as a mask of tilemask, as what users of torch's SDPA
pass, as a mask_mod for FlexAttention, and where it can be, as packed sequences with a window for
the varlen interfaces. Data is drawn from the workload's name, so that every process and every run
has the same.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tilemask import masks

FORWARD, TRAINING = "forward", "forward + backward"
HEADS = {64: 32, 128: 16, 256: 8}  # of a model 2048 wide
BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


# -- masks, said to everybody ---------------------------------------------------------------------


@dataclass(frozen=True)
class Packed:
    """Sequences side by side, as varlen interfaces take them: token t of row s of [B * L] tokens.

    cu_q, cu_k: int32 [sequences + 1]. index_q, index_k: which of the B * Lq and B * Lk tokens they
    are, int64; None = all of them, in order.
    """

    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int
    index_q: Tensor | None = None
    index_k: Tensor | None = None


@dataclass
class Pattern:
    """A mask in every form a contender takes. Values are tensors on one device.

    mask: tilemask's, None = everything. is_causal: whether SDPA's flag says it all. key_mask: bool
    [B, 1, 1, Lk] if that is what an SDPA user would pass. mod: mask_mod(b, h, i, j). window: (left,
    right) of flash-attn's interface, lower-right aligned, -1 = unbounded; None where it cannot say
    it. packed: sequences, each under ``window``; None where there are none. lengths: int32 [B],
    keys in a cache. rows: bool [B, Lq], those whose results anybody wants; None = all.
    """

    mask: masks.Mask | None
    mod: Callable | None = None
    is_causal: bool = False
    key_mask: Tensor | None = None
    window: tuple[int, int] | None = None
    packed: Packed | None = None
    lengths: Tensor | None = None
    rows: Tensor | None = None

    def attn_mask(self, work: Workload, device) -> Tensor | None:
        """What an SDPA user passes: bool, True = may attend, size 1 where it repeats."""
        if self.mask is None or self.key_mask is not None:
            return self.key_mask
        seen = self.mask.to_dense(work.B, work.Hq, work.Lq, work.Lk, device)
        for dim in range(2):
            if seen.stride(dim) == 0:
                seen = seen.narrow(dim, 0, 1)
        return seen.contiguous()


class Draw:
    """Random numbers, the same on every machine, and the device that masks are made on."""

    def __init__(self, text: str, device):
        self.generator = torch.Generator().manual_seed(zlib.crc32(text.encode()))
        self.device = device

    def integers(self, low: int, high: int, shape: tuple = ()) -> Tensor:
        """int64 in [low, high), on the CPU."""
        return torch.randint(low, max(high, low + 1), shape, generator=self.generator)

    def below(self, share: float, *shape: int) -> Tensor:
        """bool, True with probability ``share``, on the device."""
        return self.put(torch.rand(shape, generator=self.generator) < share)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def lengths(self, work: Workload, least: float) -> Tensor:
        """int64 [B] on the CPU: one full sequence, the others uniform from ``least`` of it."""
        lengths = self.integers(max(1, int(least * work.Lk)), work.Lk + 1, (work.B,))
        lengths[0] = work.Lk
        return lengths

    def put(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device)


PATTERNS: dict[str, Callable[[Workload, Draw], Pattern]] = {}


def pattern(name: str):
    """Register the maker of a mask."""

    def keep(function):
        PATTERNS[name] = function
        return function

    return keep


@pattern("full")
def full(work, draw):
    return Pattern(None, window=(-1, -1))


@pattern("causal")
def causal(work, draw):
    return Pattern(masks.causal(), lambda b, h, i, j: i >= j, is_causal=True, window=(-1, 0))


def padded(draw: Draw, work, start: Tensor, end: Tensor, also_causal: bool = False) -> Pattern:
    """A padded batch: batch b has the tokens start[b] <= t < end[b] of L."""
    places = torch.arange(work.Lk)
    keep = (places >= start[:, None]) & (places < end[:, None])
    index = draw.put(keep.flatten().nonzero()[:, 0])
    cu = draw.put(cumulated(end - start))
    longest = int((end - start).max())
    start, end, keep = draw.put(start), draw.put(end), draw.put(keep)
    if work.mask.endswith("left"):
        mask = masks.padding(start=start)
    else:
        mask = masks.padding(end, query_lengths=end)
    if also_causal:
        mask = mask & masks.causal()

    def mod(b, h, i, j):
        seen = (j >= start[b]) & (j < end[b])
        return seen & (i >= j) if also_causal else seen

    return Pattern(
        mask,
        mod,
        key_mask=None if also_causal else keep[:, None, None, :],
        window=(-1, 0) if also_causal else (-1, -1),
        packed=Packed(cu, cu, longest, longest, index, index),
        rows=keep,
    )


def cumulated(sizes: Tensor) -> Tensor:
    """int32 [n + 1]: 0 and the running sums."""
    return torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]).to(torch.int32)


@pattern("padding right")
def padding_right(work, draw):
    """Sequences of similar lengths, as after sorting: between half and all."""
    end = draw.lengths(work, 0.5)
    return padded(draw, work, torch.zeros_like(end), end)


@pattern("padding left")
def padding_left(work, draw):
    start = work.Lk - draw.lengths(work, 0.5)
    return padded(draw, work, start, torch.full_like(start, work.Lk))


@pattern("padding random")
def padding_random(work, draw):
    end = draw.lengths(work, 0.1)
    return padded(draw, work, torch.zeros_like(end), end)


@pattern("causal & padding")
def causal_padding(work, draw):
    end = draw.lengths(work, 0.1)
    return padded(draw, work, torch.zeros_like(end), end, also_causal=True)


@pattern("causal & padding left")
def causal_padding_left(work, draw):
    start = work.Lk - draw.lengths(work, 0.1)
    return padded(draw, work, start, torch.full_like(start, work.Lk), also_causal=True)


@pattern("sentences")
def sentences(work, draw):
    """Log-normal lengths as of sentences: median a quarter of the longest, none longer."""
    end = draw.normal(work.B).mul(0.6).exp().mul(work.Lk / 4).round().long().clamp(8, work.Lk)
    end[0] = work.Lk
    return padded(draw, work, torch.zeros_like(end), end)


@pattern("sliding window")
def sliding_window(work, draw):
    """Causal, 1024 keys wide; an eighth of a short sequence."""
    left = max(1, min(1024, work.Lk // 8)) - 1
    return Pattern(
        masks.window(left, 0), lambda b, h, i, j: (i >= j) & (i - j <= left), window=(left, 0)
    )


def of_documents(work, draw, also_causal: bool) -> Pattern:
    """Documents side by side in every batch, of random lengths up to a quarter of a row."""
    most = max(2, work.Lk // 4)
    rows, sizes = [], []
    for _ in range(work.B):
        own: list[int] = []
        while sum(own) < work.Lk:
            own.append(min(int(draw.integers(most // 16 + 1, most)), work.Lk - sum(own)))
        rows.append(torch.repeat_interleave(torch.arange(len(own)), torch.tensor(own)))
        sizes += own
    ids, cu = draw.put(torch.stack(rows)), draw.put(cumulated(torch.tensor(sizes)))
    mask = masks.documents(ids, contiguous=True)

    def mod(b, h, i, j):
        seen = ids[b, i] == ids[b, j]
        return seen & (i >= j) if also_causal else seen

    return Pattern(
        mask & masks.causal() if also_causal else mask,
        mod,
        window=(-1, 0) if also_causal else (-1, -1),
        packed=Packed(cu, cu, max(sizes), max(sizes)),
    )


@pattern("documents")
def documents(work, draw):
    return of_documents(work, draw, also_causal=False)


@pattern("causal documents")
def causal_documents(work, draw):
    return of_documents(work, draw, also_causal=True)


@pattern("prefix-LM")
def prefix_lm(work, draw):
    lengths = draw.put(draw.integers(work.Lk // 8, work.Lk // 2, (work.B,)))
    return Pattern(masks.prefix_lm(lengths), lambda b, h, i, j: (j < lengths[b]) | (i >= j))


@pattern("key holes")
def key_holes(work, draw):
    """A tenth of the keys is missing, anywhere."""
    keep = draw.below(0.9, work.B, work.Lk)
    return Pattern(
        masks.padding(keep=keep), lambda b, h, i, j: keep[b, j], key_mask=keep[:, None, None, :]
    )


def of_bits(bits: Tensor) -> Pattern:
    """A bool tensor [Lq, Lk], the same for all batches and heads."""
    return Pattern(masks.dense(bits), lambda b, h, i, j: bits[i, j])


for percent in (1, 10, 50, 90):

    @pattern(f"random bits {percent} %")
    def random_bits(work, draw, share=percent / 100):
        return of_bits(draw.below(share, work.Lq, work.Lk))


@pattern("block-sparse")
def block_sparse(work, draw):
    """A fifth of the 128 x 128 blocks, and the diagonal."""
    rows, cols = -(-work.Lq // 128), -(-work.Lk // 128)
    blocks = draw.below(0.2, rows, cols)
    blocks = blocks | torch.eye(rows, cols, dtype=torch.bool, device=draw.device)
    bits = blocks.repeat_interleave(128, 0).repeat_interleave(128, 1)
    return of_bits(bits[: work.Lq, : work.Lk].contiguous())


@pattern("tree")
def tree(work, draw):
    """Branches that share prefixes: a token sees itself and its ancestors.

    The rows are the last Lq of the Lk tokens; those before them are seen by every row. With Lq = Lk
    it is a tree of 32 segments, else a draft of branches to verify.
    """
    segments = min(32, work.Lq)
    above = torch.eye(segments, dtype=torch.bool)
    for s in range(1, segments):
        above[s] |= above[int(draw.integers(0, s))]
    places = torch.arange(work.Lq)
    of = places * segments // work.Lq
    own = above[of][:, of] & (places[:, None] >= places)
    past = torch.ones(work.Lq, work.Lk - work.Lq, dtype=torch.bool)
    return of_bits(draw.put(torch.cat([past, own], 1)))


@pattern("cache lengths")
def cache_lengths(work, draw):
    """Decoding: one row per batch, and caches filled to another length in every batch."""
    lengths = draw.put(draw.lengths(work, 0.25))
    keep = torch.arange(work.Lk, device=draw.device) < lengths[:, None]
    return Pattern(
        masks.padding(lengths),
        lambda b, h, i, j: j < lengths[b],
        key_mask=keep[:, None, None, :],
        lengths=lengths.to(torch.int32),
    )


MAKERS = ("causal", "window", "chunked", "padding", "varlen", "documents", "prefix_lm")
MAKERS += ("intervals", "dense")


@pattern("expression")
def expression(work, draw):
    """A mask in the words of tilemask.masks: "causal() & window(7, 0)"."""
    known = {name: getattr(masks, name) for name in MAKERS} | {"tensor": torch.tensor}
    try:
        mask = eval(work.text, {"__builtins__": {}}, known)
    except Exception as error:
        raise ValueError(
            f"{work.text!r} makes no mask of {', '.join(MAKERS)}: {type(error).__name__}: {error}"
        ) from None
    if not isinstance(mask, masks.Mask):
        raise ValueError(f"{work.text!r} makes no mask, but {mask!r}")
    return Pattern(mask)


# -- workloads ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Workload:
    """A call: shapes, dtype, mask, directions. q [B, Hq, Lq, D], k and v [B, Hkv, Lk, D and Dv].

    bias: which of (B, Hq, Lq, Lk) it has of its own, as letters of "bhqk"; the others are 1. text:
    the mask of the pattern "expression".
    """

    name: str
    mask: str
    B: int
    Hq: int
    Hkv: int
    Lq: int
    Lk: int
    D: int
    Dv: int
    dtype: str = "bfloat16"
    directions: tuple[str, ...] = (FORWARD, TRAINING)
    bias: str | None = None
    bias_gradient: bool = False
    scale: float | None = None
    text: str = ""

    def pattern(self, device) -> Pattern:
        """The mask; drawn from its name and sizes, so the same wherever it is asked for."""
        return PATTERNS[self.mask](self, Draw(f"{self.mask} {self.B} {self.Lq} {self.Lk}", device))

    def bias_shape(self) -> tuple[int, int, int, int] | None:
        if self.bias is None:
            return None
        sizes = zip("bhqk", (self.B, self.Hq, self.Lq, self.Lk), strict=True)
        return tuple(size if letter in self.bias else 1 for letter, size in sizes)

    def bias_size(self) -> int:
        """Elements of the bias."""
        shape = self.bias_shape()
        return 0 if shape is None else functools.reduce(int.__mul__, shape)

    def without_mask(self) -> Workload:
        """The same call with everything visible and no bias: what a mask is taxed against."""
        return dataclasses.replace(
            self, name=f"full {self.size_name()}", mask="full", bias=None, bias_gradient=False
        )

    def shape(self) -> str:
        heads = f"{self.Hq}" if self.Hq == self.Hkv else f"{self.Hq}:{self.Hkv}"
        lengths = f"{self.Lq}" if self.Lq == self.Lk else f"{self.Lq} x {self.Lk}"
        width = f"{self.D}" if self.Dv == self.D else f"{self.D}/{self.Dv}"
        bias = ""
        if self.bias is not None:
            bias = f", bias {list(self.bias_shape())}"
            bias += " with gradient" if self.bias_gradient else ""
        return f"B {self.B}, heads {heads}, L {lengths}, D {width}, {self.dtype}{bias}"

    def size_name(self) -> str:
        """Lengths and width, and what differs from bfloat16, 2048 wide, 16k tokens in all."""
        length = short(self.Lk) if self.Lq == self.Lk else f"{self.Lq} x {short(self.Lk)}"
        words = [length, f"D{self.D}"]
        if self.Hkv != self.Hq:
            words.append(f"H{self.Hq}:{self.Hkv}")
        elif self.Hq != HEADS.get(self.D):
            words.append(f"H{self.Hq}")
        if few_tokens(16384, self.Lk) != self.B:
            words.append(f"B{self.B}")
        if self.dtype != "bfloat16":
            words.append(self.dtype)
        return " ".join(words)


def few_tokens(tokens: int, L: int) -> int:
    """B, for ``tokens`` in all."""
    return max(1, tokens // L)


def short(length: int) -> str:
    return f"{length // 1024}k" if length >= 1024 and length % 1024 == 0 else str(length)


# -- suites ---------------------------------------------------------------------------------------


def square(mask: str, L: int, D: int, B: int, H: int | None = None, **more) -> Workload:
    """Self-attention of B sequences of length L."""
    H = HEADS[D] if H is None else H
    work = Workload("", mask, B, H, H, L, L, D, D, **more)
    return dataclasses.replace(work, name=f"{mask} {work.size_name()}")


def dense_suite() -> list[Workload]:
    return [
        square(mask, 1024 * L // 2, D, few_tokens(16384, 1024 * L // 2))
        for D in (128, 64, 256)
        for L in (32, 16, 8, 4, 2, 1, 64)
        for mask in ("full", "causal")
    ]


MASKS = (
    "causal & padding",
    "padding random",
    "sliding window",
    "causal documents",
    "random bits 50 %",
    "documents",
    "padding right",
    "padding left",
    "prefix-LM",
    "key holes",
    "block-sparse",
    "tree",
    "random bits 10 %",
    "random bits 1 %",
    "random bits 90 %",
    "causal & padding left",
)


def masks_suite() -> list[Workload]:
    sizes = ((8192, 128, 2, 16), (8192, 64, 2, 32), (32768, 128, 2, 8))
    return [square(mask, L, D, B, H) for L, D, B, H in sizes for mask in MASKS]


def with_bias(work: Workload, bias: str, gradient: bool) -> Workload:
    note = f"bias {bias or 'one'}" + (" trained" if gradient else "")
    return dataclasses.replace(work, name=f"{work.name}, {note}", bias=bias, bias_gradient=gradient)


def bias_suite() -> list[Workload]:
    base = square("full", 4096, 64, 4, 16)
    padded_base = square("padding random", 4096, 64, 4, 16)
    found = [
        with_bias(base, bias, gradient)
        for bias in ("hqk", "qk", "bhqk", "bk")
        for gradient in (True, False)
    ]
    return [*found, with_bias(padded_base, "hqk", True), with_bias(padded_base, "bhqk", True)]


def named(name: str, work: Workload, **changes) -> Workload:
    return dataclasses.replace(work, name=name, **changes)


def models_suite() -> list[Workload]:
    llama = Workload("", "causal documents", 1, 32, 8, 16384, 16384, 128, 128)
    t5 = square("sentences", 512, 64, 32, 12, bias="hqk", bias_gradient=True, scale=1.0)
    return [
        named("BERT-base, sentences", square("sentences", 512, 64, 32, 12)),
        named("Llama-8B, packed documents", llama),
        named(
            "Llama-8B, left-padded prompts",
            llama,
            mask="causal & padding left",
            B=4,
            Lq=4096,
            Lk=4096,
        ),
        named("Llama-8B, causal", llama, mask="causal", B=2, Lq=8192, Lk=8192),
        named("T5-base encoder, trained bias", t5),
        named("ViT-B/16 at 224", square("full", 197, 64, 64, 12)),
        named("ViT-L/16 at 384", square("full", 577, 64, 32, 16)),
    ]


def decode_suite() -> list[Workload]:
    found = []
    for B, L in ((16, 8192), (4, 32768), (64, 2048)):
        work = Workload("", "cache lengths", B, 32, 8, 1, L, 128, 128, directions=(FORWARD,))
        found.append(named(f"decode {work.size_name()}", work))
    draft = Workload("", "tree", 4, 32, 8, 64, 8192, 128, 128, directions=(FORWARD,))
    return [*found, named(f"tree draft {draft.size_name()}", draft)]


QUICK_MASKS = (
    "causal",
    "causal & padding",
    "sliding window",
    "causal documents",
    "random bits 50 %",
    "tree",
)


def quick_suite(gpu: bool) -> list[Workload]:
    if gpu:
        sizes = {"L": 4096, "D": 128, "B": 4}
        lengths = [square("causal", L, 128, few_tokens(16384, L)) for L in (1024, 2048)]
        bias = square("full", 4096, 64, 4, 16)
    else:
        sizes = {"L": 256, "D": 64, "B": 2, "H": 2, "dtype": "float32"}
        small = {"D": 64, "H": 2, "dtype": "float32"}
        lengths = [square("causal", L, B=512 // L, **small) for L in (64, 128)]
        bias = square("full", 256, B=2, **small)
    found = [square(mask, **sizes) for mask in ("full", *QUICK_MASKS)]
    return [*found, *lengths, with_bias(bias, "hqk", True)]


def gpu_suite() -> list[Workload]:
    """Most telling first: whoever cuts it short has the rows that matter."""
    at_8k = {D: {m: square(m, 8192, D, 2) for m in ("full", *MASKS)} for D in (128, 64)}
    at_16k = [square(m, 16384, D, 1) for D in (128, 64) for m in ("full", "causal")]
    first = ("causal & padding", "padding random", "sliding window", "causal documents")
    first += ("random bits 50 %",)
    return unique(
        [
            *at_16k,
            *(at_8k[D][m] for D in (128, 64) for m in ("full", *first)),
            bias_suite()[0],
            bias_suite()[-2],
            *decode_suite()[:2],
            models_suite()[0],
            models_suite()[1],
            models_suite()[4],
            *(at_8k[128][m] for m in MASKS),
            *(square("causal", L, 128, few_tokens(16384, L)) for L in (512, 1024, 2048, 4096)),
            *models_suite(),
            *decode_suite(),
            *bias_suite(),
            *(at_8k[64][m] for m in MASKS),
            *dense_suite(),
        ]
    )


def unique(works: list[Workload]) -> list[Workload]:
    return list({work.name: work for work in works}.values())


SUITES: dict[str, Callable[[bool], list[Workload]]] = {
    "quick": quick_suite,
    "dense": lambda gpu: dense_suite(),
    "masks": lambda gpu: masks_suite(),
    "bias": lambda gpu: bias_suite(),
    "models": lambda gpu: models_suite(),
    "decode": lambda gpu: decode_suite(),
    "gpu": lambda gpu: gpu_suite(),
}


def everything() -> dict[str, Workload]:
    """All workloads of all suites, by name."""
    found: dict[str, Workload] = {}
    for gpu in (False, True):
        for suite in SUITES.values():
            for work in suite(gpu):
                if found.setdefault(work.name, work) != work:
                    raise AssertionError(f"two workloads are called {work.name!r}")
    return found


def names() -> list[str]:
    return list(everything())


def workload_of(name: str) -> Workload:
    """The workload of that name."""
    found = everything().get(name)
    if found is None:
        known = "python -m tilemask cost --list"
        raise ValueError(f"no workload is called {name!r}; all names: {known}")
    return found
