"""The truth that every backend is compared with: masks and attention by their definitions.

Full matrices, float64, plain loops. Nothing of tilemask is imported here, so that no mistake is
made twice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# -- masks ----------------------------------------------------------------------------------------


class Grid:
    """The indices of all pairs: b [B, 1, 1, 1], h [H, 1, 1], i [Lq, 1], j [Lk].

    ``sequence`` is set inside one sequence of a packed batch: positions and lengths are its own.
    """

    def __init__(self, B: int, H: int, Lq: int, Lk: int, sequence: int | None = None):
        self.B, self.H, self.Lq, self.Lk, self.sequence = B, H, Lq, Lk, sequence
        self.shape = (B, H, Lq, Lk)
        self.b = torch.arange(B).view(B, 1, 1, 1)
        self.h = torch.arange(H).view(H, 1, 1)
        self.i = torch.arange(Lq).view(Lq, 1)
        self.j = torch.arange(Lk)

    def parameter(self, value: int | list[int]) -> int | Tensor:
        """One number for all, or one per batch (inside sequences: one per sequence)."""
        if isinstance(value, int):
            return value
        if self.sequence is not None:
            return value[self.sequence]
        return torch.tensor(value).view(-1, 1, 1, 1)


def everywhere(grid: Grid) -> Tensor:
    return torch.ones(grid.shape, dtype=torch.bool)


@dataclass(frozen=True)
class Rule:
    """Which pairs a mask lets through, and which keys and rows padding takes out altogether.

    Each is a function of a Grid that gives a bool which broadcasts to [B, H, Lq, Lk]; ``keys`` does
    not depend on rows, nor ``rows`` on keys.
    """

    pairs: Callable[[Grid], Tensor]
    keys: Callable[[Grid], Tensor] = everywhere
    rows: Callable[[Grid], Tensor] = everywhere

    def seen(self, B: int, H: int, Lq: int, Lk: int) -> Tensor:
        """bool [B, H, Lq, Lk]."""
        return self.of(Grid(B, H, Lq, Lk))

    def of(self, grid: Grid) -> Tensor:
        return everywhere(grid) & self.pairs(grid) & self.keys(grid) & self.rows(grid)

    def live_keys(self, B: int, Lk: int) -> Tensor:
        """bool [B, Lk]: keys that padding leaves in."""
        grid = Grid(B, 1, 1, Lk)
        return (everywhere(grid) & self.keys(grid))[:, 0, 0]

    def live_rows(self, B: int, Lq: int) -> Tensor:
        """bool [B, Lq]: rows inside the query range."""
        grid = Grid(B, 1, Lq, 1)
        return (everywhere(grid) & self.rows(grid))[:, 0, :, 0]

    def __and__(self, other: Rule) -> Rule:
        return Rule(
            lambda grid: self.pairs(grid) & other.pairs(grid),
            lambda grid: self.keys(grid) & other.keys(grid),
            lambda grid: self.rows(grid) & other.rows(grid),
        )


def everything() -> Rule:
    return Rule(everywhere)


def causal(offset: int | list[int] = 0, lower_right: bool = False) -> Rule:
    def pairs(g):
        shift = g.Lk - g.Lq if lower_right else g.parameter(offset)
        return g.j <= g.i + shift

    return Rule(pairs)


def window(left: int, right: int, offset: int | list[int] = 0, lower_right: bool = False) -> Rule:
    def pairs(g):
        centre = g.i + (g.Lk - g.Lq if lower_right else g.parameter(offset))
        seen = everywhere(g)
        if left != -1:
            seen = seen & (g.j >= centre - left)
        if right != -1:
            seen = seen & (g.j <= centre + right)
        return seen

    return Rule(pairs)


def chunked(size: int) -> Rule:
    return Rule(lambda g: g.i // size == g.j // size)


def prefix_lm(lengths: int | list[int]) -> Rule:
    return Rule(lambda g: (g.j < g.parameter(lengths)) | (g.j <= g.i))


def padding(
    lengths: int | list[int] | None = None,
    start: int | list[int] | None = None,
    end: int | list[int] | None = None,
    keep: list[list[bool]] | None = None,
    query_lengths: int | list[int] | None = None,
) -> Rule:
    end = lengths if end is None else end

    def keys(g):
        seen = everywhere(g)
        if start is not None:
            seen = seen & (g.j >= g.parameter(start))
        if end is not None:
            seen = seen & (g.j < g.parameter(end))
        if keep is not None:
            seen = seen & torch.tensor(keep, dtype=torch.bool)[:, None, None, :]
        return seen

    def rows(g):
        if query_lengths is None:
            return everywhere(g)
        return g.i < g.parameter(query_lengths)

    return Rule(everywhere, keys, rows)


def varlen(cu_q: list[int], cu_k: list[int] | None = None, within: Rule | None = None) -> Rule:
    keys_from = cu_q if cu_k is None else cu_k
    inner = within or everything()

    def pairs(g):
        seen = torch.zeros(g.shape, dtype=torch.bool)
        for s in range(len(cu_q) - 1):
            rows = slice(cu_q[s], cu_q[s + 1])
            cols = slice(keys_from[s], keys_from[s + 1])
            own = Grid(1, 1, rows.stop - rows.start, cols.stop - cols.start, sequence=s)
            seen[:, :, rows, cols] = inner.of(own)
        return seen

    return Rule(pairs, lambda g: g.j < keys_from[-1], lambda g: g.i < cu_q[-1])


def documents(
    query_ids: list[list[int]], key_ids: list[list[int]] | None = None, within: Rule | None = None
) -> Rule:
    """Ids [B or 1][L]. Inside a document positions count its own rows and its own keys."""
    keys_of = query_ids if key_ids is None else key_ids
    inner = within or everything()

    def pairs(g):
        seen = torch.zeros(g.shape, dtype=torch.bool)
        for b in range(g.B):
            rows_ids, cols_ids = query_ids[b % len(query_ids)], keys_of[b % len(keys_of)]
            for document in set(rows_ids):
                rows = [i for i in range(g.Lq) if rows_ids[i] == document]
                cols = [j for j in range(g.Lk) if cols_ids[j] == document]
                own = inner.of(Grid(1, 1, len(rows), len(cols), sequence=0))[0, 0]
                for place, row in enumerate(rows):
                    seen[b, :, row, cols] = own[place]
        return seen

    return Rule(pairs)


def intervals(lo: Tensor, hi: Tensor) -> Rule:
    """lo, hi [Lq] or [B|1, H|1, Lq]."""
    return Rule(lambda g: (g.j >= lo[..., None]) & (g.j < hi[..., None]))


def dense(mask: Tensor, split: tuple[int, int] | None = None, by_key: bool = False) -> Rule:
    """bool, broadcastable to [B, H, Lq, Lk]; a 5-D one to [*split, H, Lq, Lk], then flattened.

    by_key: the mask says which keys exist, the same for all heads and rows, as padding does.
    """
    if mask.dim() == 5:
        mask = mask.expand(*split, *mask.shape[2:]).flatten(0, 1)
    if not by_key:
        return Rule(lambda g: mask)
    keys = mask[(None,) * (4 - mask.dim())][:, :1, :1]
    return Rule(everywhere, lambda g: keys)


# -- attention ------------------------------------------------------------------------------------


def attention_oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    keep: tuple[Tensor, float] | None = None,
    live_keys: Tensor | None = None,
    live_rows: Tensor | None = None,
    held_in: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """out [B, Hq, Lq, Dv] and lse [B, Hq, Lq] in float64, differentiable.

    seen bool [B, Hq, Lq, Lk]; keep: which pairs dropout keeps and the factor of those; live_keys
    [B, Lk] and live_rows [B, Lq]: what padding leaves, the rest is never looked at. held_in: the
    dtype in which scores plus bias are held, where that is part of the truth.
    """
    q, k, v = q.double(), k.double(), v.double()
    zero = torch.zeros((), dtype=torch.float64)
    if live_keys is not None:
        k = torch.where(live_keys[:, None, :, None], k, zero)
        v = torch.where(live_keys[:, None, :, None], v, zero)
    if live_rows is not None:
        q = torch.where(live_rows[:, None, :, None], q, zero)
    Hq, Lq, D = q.shape[1:]
    Lk = k.shape[2]
    group = Hq // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)

    scores = (D**-0.5 if scale is None else scale) * torch.einsum("bhid,bhjd->bhij", q, k)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.double()
    if alibi_slopes is not None:
        distance = (torch.arange(Lq)[:, None] + Lk - Lq - torch.arange(Lk)).abs()
        slopes = alibi_slopes.double()
        slopes = slopes[None] if slopes.dim() == 1 else slopes
        scores = scores - slopes[:, :, None, None] * distance
    if held_in is not None:
        scores = scores + (scores.detach().to(held_in).double() - scores.detach())
    scores = torch.where(seen, scores, -torch.inf)

    # softmax over the keys and, where there is one, the sink: a key without a value
    logits = scores
    if sinks is not None:
        sink = sinks.double()[None, :, None, None].expand(*scores.shape[:3], 1)
        logits = torch.cat([scores, sink], -1)
    nothing = (logits == -torch.inf).all(-1)
    logits = torch.where(nothing[..., None], zero, logits)
    lse = torch.where(nothing, -torch.inf, torch.logsumexp(logits, -1))
    p = torch.where(nothing[..., None], zero, torch.softmax(logits, -1))[..., :Lk]
    if keep is not None:
        kept, factor = keep
        p = torch.where(kept, p * factor, zero)
    return torch.einsum("bhij,bhjd->bhid", p, v), lse


# -- dropout --------------------------------------------------------------------------------------


def philox4x32(counter: tuple[int, ...], key: tuple[int, ...], rounds: int = 7) -> tuple[int, ...]:
    """Philox4x32 on Python ints, as in the SC 2011 paper."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        high0, low0 = divmod(0xD2511F53 * c0, 1 << 32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 1 << 32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = (k0 + 0x9E3779B9) % (1 << 32)
        k1 = (k1 + 0xBB67AE85) % (1 << 32)
    return c0, c1, c2, c3


def dropout_keep(p: float, seed: int, B: int, H: int, Lq: int, Lk: int) -> tuple[Tensor, float]:
    """Which pairs dropout keeps, bool [B, H, Lq, Lk], and the factor of those it keeps.

    One call of Philox serves eight columns: column c = 32*g + 8*i + 2*l + t takes half t of word i
    of the counter (row, 4*g + l, b*H + h, 0).
    """
    threshold = round(p * 65536)
    key = seed % (1 << 32), (seed >> 32) % (1 << 32)

    @functools.cache
    def words(row, group, head):
        return philox4x32((row, group, head, 0), key)

    kept = torch.zeros((B, H, Lq, Lk), dtype=torch.bool)
    for head in range(B * H):
        for row in range(Lq):
            bits = []
            for c in range(Lk):
                g, i, l, t = c // 32, c % 32 // 8, c % 8 // 2, c % 2
                word = words(row, 4 * g + l, head)[i]
                bits.append((word >> 16 * t) % (1 << 16))
            kept[head // H, head % H, row] = torch.tensor(bits, dtype=torch.int64) >= threshold
    return kept, 65536 / (65536 - threshold) if threshold < 65536 else 0.0
