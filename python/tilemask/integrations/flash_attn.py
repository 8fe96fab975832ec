"""flash-attn 2's functions: its names, signatures, layouts and conventions, computed by tilemask.

``from tilemask.integrations.flash_attn import flash_attn_func`` in place of ``from flash_attn
import flash_attn_func``. The layout is [B, L, H, D], packed sequences are [T, H, D]; causal masks
and windows are aligned to the lower right corner; an lse is [B, H, L], packed [H, T], and +inf in a
row that sees nothing, where the output is 0. docs/flash_attn.md says what differs.
"""

from __future__ import annotations

import functools
import math
import numbers
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .. import lowering, masks
from ..attention import attention, attention_weights, check_dense, checked_seed, is_real
from ..masks import UNBOUNDED, Bounds, Mask, bounded, check_range, describe, is_int, is_int_tensor
from ..merge import merge_states
from ..philox import keep_mask

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]


def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """Attention of q [B, Lq, Hq, D] over k [B, Lk, Hkv, D], v [B, Lk, Hkv, Dv]: [B, Lq, Hq, Dv].

    causal: row i sees ``j <= i + Lk - Lq``. window_size (left, right): it sees ``i + Lk - Lq - left
    <= j <= i + Lk - Lq + right``, -1 = unbounded. softcap > 0 caps scores. alibi_slopes [Hq] or [B,
    Hq]: minus ``slope * abs(i + Lk - Lq - j)``. deterministic: the backward always is.

    return_attn_probs=True: (out, softmax_lse [B, Hq, Lq], S_dmask); S_dmask is empty without
    dropout, else the probabilities [B, Hq, Lq, Lk] before dropout, negative where dropped.
    """
    for name, tensor, heads in (("q", q, "Hq"), ("k", k, "Hkv"), ("v", v, "Hkv")):
        check_layout(name, tensor, f"[B, L, {heads}, D]")
    options = Options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    place = Whole(k.shape[1])
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out, lse = attend(q, k, v, place, options)
    out = out.transpose(1, 2).contiguous()
    if not return_attn_probs:
        return out
    return out, marked(lse), dropped_signs(q, k, place, options)


def flash_attn_qkvpacked_func(
    qkv,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """flash_attn_func of qkv [B, L, 3, H, D]; nothing is unpacked."""
    check_packed("qkv", qkv, 3, "[B, L, 3, H, D]")
    return flash_attn_func(
        *qkv.unbind(2),
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_kvpacked_func(
    q,
    kv,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """flash_attn_func of q [B, Lq, Hq, D] and kv [B, Lk, 2, Hkv, D]; nothing is unpacked."""
    check_packed("kv", kv, 2, "[B, L, 2, Hkv, D]")
    return flash_attn_func(
        q,
        *kv.unbind(2),
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    """Attention inside sequences packed along the first dimension: q [Tq, Hq, D], k [Tk, Hkv, D],
    v [Tk, Hkv, Dv] -> [Tq, Hq, Dv].

    cu_seqlens_q, cu_seqlens_k: int [sequences + 1], the first row of each sequence and the end.
    max_seqlen_q and max_seqlen_k are not needed: None, an int or a tensor, which is not read. The
    other arguments are those of flash_attn_func, in every sequence's own coordinates;
    alibi_slopes [Hq] or [sequences, Hq]. Rows after the last sequence give 0.

    return_attn_probs=True: (out, softmax_lse [Hq, Tq], an empty tensor); with dropout, and for
    block_table, NotImplementedError.
    """
    for name, tensor, heads in (("q", q, "Hq"), ("k", k, "Hkv"), ("v", v, "Hkv")):
        check_layout(name, tensor, f"[T, {heads}, D]")
    for name, most in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        known = most is None or isinstance(most, (numbers.Integral, torch.SymInt))
        if not known and not is_int_tensor(most):
            raise TypeError(f"{name} must be an int (it is not needed), got {describe(most)}")
    if block_table is not None:
        raise NotImplementedError(
            "block_table is not supported with packed queries: use flash_attn_with_kvcache"
        )
    if return_attn_probs and dropout_p:
        raise NotImplementedError(
            "return_attn_probs=True with dropout_p > 0 is not supported for packed sequences: "
            "tilemask.attention_weights() gives probabilities"
        )
    options = Options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    place = Packed(cu_seqlens_q, cu_seqlens_k, q.shape[0], k.shape[0])
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    out, lse = attend(q, k, v, place, options)
    out = out[0].transpose(0, 1).contiguous()
    return (out, marked(lse)[0], q.new_empty(0)) if return_attn_probs else out


def flash_attn_varlen_qkvpacked_func(
    qkv,
    cu_seqlens,
    max_seqlen,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """flash_attn_varlen_func of qkv [T, 3, H, D]; nothing is unpacked."""
    check_packed("qkv", qkv, 3, "[T, 3, H, D]")
    return flash_attn_varlen_func(
        *qkv.unbind(1),
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_kvpacked_func(
    q,
    kv,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """flash_attn_varlen_func of q [Tq, Hq, D] and kv [Tk, 2, Hkv, D]; nothing is unpacked."""
    check_packed("kv", kv, 2, "[T, 2, Hkv, D]")
    return flash_attn_varlen_func(
        q,
        *kv.unbind(1),
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


@torch.no_grad()
def flash_attn_with_kvcache(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    rotary_cos=None,
    rotary_sin=None,
    cache_seqlens=None,
    cache_batch_idx=None,
    cache_leftpad=None,
    block_table=None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    rotary_interleaved=True,
    alibi_slopes=None,
    num_splits=0,
    return_softmax_lse=False,
):
    """Attention of q [B, Lq, Hq, D] over a cache, after k, v [B, Lnew, Hkv, D] went into it.

    k_cache, v_cache: [Bc, S, Hkv, D], any strides; k and v are written in place from
    ``cache_seqlens[b]`` on. cache_seqlens: int, or int [B]: how many keys of each the cache holds;
    None = all S. Row i of q stands at key ``cache_seqlens[b] + Lnew - Lq + i``: causal, window_size
    and alibi_slopes count from there. cache_leftpad int [B]: keys before it are not seen.

    cache_batch_idx int [B]: row b's entry of the cache, by default b. block_table int [B, blocks]:
    the cache is pages [pages, page size, Hkv, D], and row b's are these. Both copy the entries they
    read; everything else reads the cache as it lies.

    rotary_cos, rotary_sin [positions, R / 2], R <= D: k, and q if causal or windowed, are rotated
    by their position, else all of q by position ``cache_seqlens[b]``. num_splits changes no result
    and is ignored. No gradients, as in flash-attn. Nothing is read from the device.

    Returns out [B, Lq, Hq, Dv]; with return_softmax_lse=True (out, softmax_lse [B, Hq, Lq]).
    """
    check_layout("q", q, "[B, Lq, Hq, D]")
    check_cache(q, k_cache, v_cache, k, v, block_table)
    if not is_int(num_splits) or num_splits < 0:
        raise ValueError(f"num_splits must be an int >= 0, got {describe(num_splits)}")
    batch, len_q = q.shape[:2]
    new = 0 if k is None else k.shape[1]
    size = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    if cache_seqlens is None:
        if new:
            raise ValueError("cache_seqlens must say where k and v go, got None")
        cache_seqlens = size
    fixed = is_int(cache_seqlens) or isinstance(cache_seqlens, torch.SymInt)
    if fixed:
        if not 0 <= cache_seqlens <= size - new:
            raise ValueError(
                f"cache_seqlens must lie in [0, {size - new}] for a cache of {size} keys and "
                f"{new} new ones, got {cache_seqlens}"
            )
    else:
        check_per_batch("cache_seqlens", cache_seqlens, q, 0, size - new)
    if cache_leftpad is not None:
        check_per_batch("cache_leftpad", cache_leftpad, q, 0, size)
    if cache_batch_idx is not None:
        if block_table is not None:
            raise ValueError("give cache_batch_idx or block_table, not both")
        check_per_batch("cache_batch_idx", cache_batch_idx, q, 0, k_cache.shape[0] - 1)
    elif block_table is None and k_cache.shape[0] < batch:
        raise ValueError(f"k_cache has {k_cache.shape[0]} entries for {batch} rows of q")
    options = Options(0.0, softmax_scale, causal, window_size, softcap, alibi_slopes)

    if rotary_cos is not None or rotary_sin is not None:
        if k is None:
            raise ValueError("rotary_cos and rotary_sin rotate new keys: k and v are missing")
        steps = len_q if options.causal or tuple(window_size) != (-1, -1) else 1
        check_rotary(rotary_cos, rotary_sin, q, size - new + max(steps, new))
        first = cache_seqlens if fixed else cache_seqlens.long()[:, None]
        k = rotated(k, rotary_cos, rotary_sin, first, new, rotary_interleaved)
        q = rotated(q, rotary_cos, rotary_sin, first, steps, rotary_interleaved)

    if new:
        for cache, fresh in ((k_cache, k), (v_cache, v)):
            append(cache, fresh, cache_seqlens, cache_batch_idx, block_table)
    end = cache_seqlens + new if fixed else size
    keys, values = (
        first_keys(cache, batch, end, cache_batch_idx, block_table) for cache in (k_cache, v_cache)
    )
    if fixed:
        place = Whole(keys.shape[2], cache_leftpad)
    else:
        place = Cached(cache_seqlens, new, size, cache_leftpad)
    out, lse = attend(q.transpose(1, 2), keys, values, place, options)
    out = out.transpose(1, 2).contiguous()
    return (out, marked(lse)) if return_softmax_lse else out


# -- the work -------------------------------------------------------------------------------------


class Options:
    """What all calls share, checked as far as attention() does not."""

    def __init__(self, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes):
        pair = isinstance(window_size, (tuple, list)) and len(window_size) == 2
        if not pair or not all(is_int(n) and n >= -1 for n in window_size):
            raise ValueError(
                "window_size must be two ints >= -1 (left, right; -1 = unbounded), got "
                f"{describe(window_size)}"
            )
        self.causal = bool(causal)
        self.left = None if window_size[0] == -1 else window_size[0]
        self.right = 0 if causal else None if window_size[1] == -1 else window_size[1]
        if softmax_scale is not None and not (
            is_real(softmax_scale) and math.isfinite(softmax_scale)
        ):
            raise TypeError(
                f"softmax_scale must be a finite number or None, got {describe(softmax_scale)}"
            )
        self.scale = softmax_scale
        self.softcap = 0.0 if is_real(softcap) and softcap < 0 else softcap  # > 0 turns it on
        self.slopes = alibi_slopes
        self.dropout_p = dropout_p
        self.seed: Tensor | None = None

    def common(self) -> dict:
        return {"scale": self.scale, "softcap": self.softcap}


def attend(q, k, v, place, options: Options) -> tuple[Tensor, Tensor]:
    """out [B, Hq, Lq, Dv] and lse [B, Hq, Lq], -inf where a row sees nothing."""
    slopes = options.slopes
    left, right = options.left, options.right
    if q.shape[2] == 1 and place.ends_with_the_last_row:
        right = None if slopes is None or place.has_alibi(slopes) else 0
    if options.dropout_p:
        options.seed = checked_seed(None, q.device)
    settings = options.common()
    settings.update(dropout_p=options.dropout_p, dropout_seed=options.seed, return_lse=True)
    if slopes is not None:
        check_slopes(slopes, place.sequences(q), q.shape[1], q.device)
    if slopes is None or place.has_alibi(slopes):
        return attention(q, k, v, mask=place.mask(left, right), alibi_slopes=slopes, **settings)
    # ALiBi from each sequence's own diagonal. On one side of it abs() is linear, so that it is a
    # bias per key and a constant per row, which shifts nothing but lse; both sides are merged.
    per_key, per_row = place.linear(slopes, q)
    out, lse = attention(q, k, v, mask=place.mask(left, 0), bias=-per_key, **settings)
    lse = lse + per_row
    if right == 0:
        return out, lse
    above = place.mask(-1, right)
    out_above, lse_above = attention(q, k, v, mask=above, bias=per_key, **settings)
    return merge_states(out, lse, out_above, lse_above - per_row)


def append(cache: Tensor, fresh: Tensor, lengths, entries, block_table) -> None:
    """Write fresh [B, Lnew, Hkv, D] into the cache, row b from ``lengths[b]`` on."""
    batch, new = fresh.shape[:2]
    if not isinstance(lengths, Tensor) and block_table is None:
        part = cache.narrow(1, lengths, new)
        if entries is None:
            part[:batch].copy_(fresh)
        else:
            part.index_put_((entries.long(),), fresh)
        return
    first = lengths.long()[:, None] if isinstance(lengths, Tensor) else lengths
    slots = (torch.arange(new, device=cache.device) + first).expand(batch, new)
    if block_table is not None:
        page = cache.shape[1]
        lines, slots = block_table.long().gather(1, slots // page), slots % page
    elif entries is not None:
        lines = entries.long()[:, None]
    else:
        lines = torch.arange(batch, device=cache.device)[:, None]
    cache.index_put_((lines, slots), fresh)


def first_keys(cache: Tensor, batch: int, end: int, entries, block_table) -> Tensor:
    """[B, Hkv, end, D] of a cache: a view unless entries or pages are picked."""
    if block_table is not None:  # what the table holds past the end of a sequence may be anything
        table = block_table[:, : -(-end // cache.shape[1])].long()
        cache = cache[table.clamp(0, max(0, cache.shape[0] - 1))].flatten(1, 2)
    cache = cache.narrow(1, 0, end)
    cache = cache[:batch] if entries is None else cache.index_select(0, entries.long())
    return cache.transpose(1, 2)


def marked(lse: Tensor) -> Tensor:
    """lse as flash-attn marks rows that see nothing: +inf."""
    return lse.masked_fill(lse == -torch.inf, torch.inf)


@torch.no_grad()
def dropped_signs(q, k, place, options: Options) -> Tensor:
    """S_dmask: probabilities before dropout, negative where they were dropped."""
    if not options.dropout_p:
        return q.new_empty(0)
    p = attention_weights(
        q,
        k,
        mask=place.mask(options.left, options.right),
        alibi_slopes=options.slopes,
        **options.common(),
    )
    batch, heads, len_q, len_k = p.shape
    kept, _ = keep_mask(options.dropout_p, options.seed, batch, heads, 0, len_q, len_k)
    return torch.where(kept, p, -p)


def rotated(x: Tensor, cos, sin, first, steps: int, interleaved: bool) -> Tensor:
    """x [B, L, H, D] with its first dimensions rotated, row i by the angles of position ``first +
    i``, i < steps; all rows by those of ``first`` if steps is 1."""
    positions = torch.arange(steps, device=x.device) + first  # [steps] or [B, steps]
    half = cos.shape[1]
    turned = x[..., : 2 * half].float()
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
    else:
        a, b = turned[..., :half], turned[..., half:]
    cos, sin = (t[positions].float().unsqueeze(-2) for t in (cos, sin))  # [(B,) steps, 1, R / 2]
    both = a * cos - b * sin, a * sin + b * cos
    turned = torch.stack(both, -1).flatten(-2) if interleaved else torch.cat(both, -1)
    return torch.cat((turned.to(x.dtype), x[..., 2 * half :]), -1)


# -- where rows stand among keys ------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Span(Mask):
    """Row i sees ``i + n - Lq - left <= j <= i + n - Lq + right`` of its n keys; None = unbounded,
    a left of -1 begins right of the diagonal.

    n is the number of keys of a batch or sequence, or ``lengths + new`` where lengths are given;
    keys before ``start`` are not seen.
    """

    left: int | None
    right: int | None
    lengths: Tensor | None = None
    new: int = 0
    start: Tensor | None = None

    def bounds(self, rows):
        end = rows.len_k
        if self.lengths is not None:
            end = rows.per_batch(self.lengths, "cache_seqlens") + self.new
        offset = end - rows.len_q
        return Bounds(
            start=0 if self.start is None else rows.per_batch(self.start, "cache_leftpad"),
            end=UNBOUNDED if self.lengths is None else end,
            left=-UNBOUNDED if self.left is None else bounded(offset - self.left),
            right=UNBOUNDED if self.right is None else bounded(offset + self.right + 1),
        )

    def tensors(self):
        return tuple(t for t in (self.lengths, self.start) if t is not None)


@functools.lru_cache(64)
def span(left, right) -> Mask:
    """One object for all calls, so that its lowered form is kept."""
    return Span(left, right)


class Whole:
    """Every row of a batch has the same len_k keys, those before ``start`` [B] hidden."""

    ends_with_the_last_row = True  # which stands at the last key and sees to the end

    def __init__(self, len_k: int, start: Tensor | None = None):
        self.len_k, self.start = len_k, start

    def mask(self, left, right) -> Mask | None:
        if self.start is not None:
            return kept(
                ("whole", left, right), lambda start: Span(left, right, start=start), self.start
            )
        if left is None and right is None:
            return None
        return Span(left, right) if lowering.is_watched() else span(left, right)

    def sequences(self, q: Tensor) -> int:
        return q.shape[0]

    def has_alibi(self, slopes: Tensor) -> bool:
        return True


class Cached:
    """Row b of a batch has ``lengths[b] + new`` of ``size`` keys, those before ``start`` hidden."""

    ends_with_the_last_row = True

    def __init__(self, lengths: Tensor, new: int, size: int, start: Tensor | None):
        self.lengths, self.new, self.size, self.start = lengths, new, size, start

    def mask(self, left, right) -> Mask:
        def make(lengths, start=None):
            return Span(left, right, lengths, self.new, start)

        given = (self.lengths,) if self.start is None else (self.lengths, self.start)
        return kept(("cached", left, right, self.new), make, *given)

    def sequences(self, q: Tensor) -> int:
        return q.shape[0]

    def has_alibi(self, slopes: Tensor) -> bool:
        return False

    def linear(self, slopes: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """slope times the distance from the last key [B, Hq, 1, S], and from the last row [B, Hq,
        Lq]."""
        slopes = slopes.to(number_type(q)).view(-1, q.shape[1], 1)
        last = self.lengths.long().view(-1, 1, 1) + (self.new - 1)
        to_key = last - torch.arange(self.size, device=q.device)
        to_row = q.shape[2] - 1 - torch.arange(q.shape[2], device=q.device)
        return (slopes * to_key)[:, :, None], slopes * to_row


class Packed:
    """Sequences packed one after another, in one batch."""

    ends_with_the_last_row = False  # one row may be no sequence's

    def __init__(self, cu_q: Tensor, cu_k: Tensor, len_q: int, len_k: int):
        self.cu_q = masks.check_cu_seqlens("cu_seqlens_q", cu_q)
        self.cu_k = masks.check_cu_seqlens("cu_seqlens_k", cu_k)
        self.len_q, self.len_k = len_q, len_k

    def mask(self, left, right) -> Mask:
        within = None if left is None and right is None else Span(left, right)

        def make(cu_q, cu_k=None):
            return masks.varlen(cu_q, cu_k, within)

        given = (self.cu_q,) if self.cu_k is self.cu_q else (self.cu_q, self.cu_k)
        return kept(("packed", left, right), make, *given)

    def sequences(self, q: Tensor) -> int:
        return self.cu_q.shape[0] - 1

    def has_alibi(self, slopes: Tensor) -> bool:
        """Whether distances in the whole row are those inside sequences."""
        return self.cu_q is self.cu_k and self.len_q == self.len_k and slopes.dim() == 1

    def linear(self, slopes: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """slope times the distance from the last key of the sequence [1, Hq, 1, Tk], and from its
        last row [1, Hq, Tq]."""
        slopes = slopes.to(number_type(q))

        def part(cu: Tensor, length: int) -> Tensor:
            cu = cu.to(q.device, torch.int64)
            place = torch.arange(length, device=q.device)
            number = (torch.searchsorted(cu, place, right=True) - 1).clamp(0, cu.numel() - 2)
            own = slopes[:, None] if slopes.dim() == 1 else slopes[number].T
            return (own * (cu[number + 1] - 1 - place))[None]

        return part(self.cu_k, self.len_k)[:, :, None], part(self.cu_q, self.len_q)


def number_type(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


_kept = WeakIdKeyDictionary()  # by the first tensor of a mask: the masks made of it


def kept(key: tuple, make, *tensors: Tensor) -> Mask:
    """``make(*tensors)``, or what it gave for the same tensors, so that the layers of a model share
    one mask and what is prepared for it. The mask has aliases: it keeps no key of ``_kept``
    alive."""
    plain = all(type(t) is Tensor for t in tensors)
    if not plain or lowering.is_watched() or not masks.is_caching():
        return make(*tensors)
    forms = _kept.setdefault(tensors[0], {})
    others, aliases, mask = forms.get(key, ((), (), None))
    same = mask is not None and len(aliases) == len(tensors)
    same = same and all(ref() is t for ref, t in zip(others, tensors[1:], strict=True))
    if not same or not all(map(Tensor.is_set_to, tensors, aliases)):
        aliases = tuple(t.detach() for t in tensors)
        mask = make(*aliases)
        if len(forms) >= lowering.MOST_KEPT:
            forms.clear()
        forms[key] = tuple(weakref.ref(t) for t in tensors[1:]), aliases, mask
    return mask


# -- checks ---------------------------------------------------------------------------------------


def check_layout(name: str, tensor, layout: str) -> None:
    check_dense(name, tensor)
    if tensor.dim() != layout.count(",") + 1:
        raise ValueError(f"{name} must be {layout}, got {describe(tensor)}")


def check_packed(name: str, tensor, count: int, layout: str) -> None:
    check_layout(name, tensor, layout)
    if tensor.shape[-3] != count:
        raise ValueError(f"{name} must be {layout}, got {describe(tensor)}")


def check_slopes(slopes, batch: int, heads: int, device) -> None:
    if not isinstance(slopes, Tensor) or not slopes.dtype.is_floating_point:
        raise TypeError(f"alibi_slopes must be a float tensor, got {describe(slopes)}")
    if tuple(slopes.shape) not in ((heads,), (batch, heads)) or slopes.device != device:
        raise ValueError(
            f"alibi_slopes must be ({heads},) or ({batch}, {heads}) on {device}, "
            f"got {describe(slopes)}"
        )
    if slopes.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "alibi_slopes requires a gradient, which is not computed: pass alibi_slopes.detach()"
        )


def check_cache(q, k_cache, v_cache, k, v, block_table) -> None:
    caches = "[Bc, S, Hkv, D]" if block_table is None else "[pages, page size, Hkv, D]"
    check_layout("k_cache", k_cache, caches)
    check_layout("v_cache", v_cache, caches)
    if k_cache.shape[:3] != v_cache.shape[:3]:
        raise ValueError(
            "k_cache and v_cache must agree in all but the last dimension, got "
            f"{describe(k_cache)} and {describe(v_cache)}"
        )
    heads, width = k_cache.shape[2:]
    if width != q.shape[3] or q.shape[2] % max(1, heads):  # before anything is written
        raise ValueError(
            "q and k_cache must have one width, and q a multiple of the cache's heads: got "
            f"{describe(q)} and {describe(k_cache)}"
        )
    cast = q.device.type != "meta" and torch.is_autocast_enabled(q.device.type)
    if not cast and not q.dtype == k_cache.dtype == v_cache.dtype:
        raise TypeError(
            "q, k_cache and v_cache must have one dtype, got "
            f"{q.dtype}, {k_cache.dtype} and {v_cache.dtype}"
        )
    if block_table is not None:
        two = is_int_tensor(block_table) and block_table.dim() == 2
        if not two or block_table.shape[0] != q.shape[0]:
            raise ValueError(
                f"block_table must be an int tensor [{q.shape[0]}, blocks], "
                f"got {describe(block_table)}"
            )
    if (k is None) != (v is None):
        raise ValueError("k and v must be given together")
    for name, tensor, cache in (("k", k, k_cache), ("v", v, v_cache)):
        if tensor is None:
            continue
        check_layout(name, tensor, "[B, Lnew, Hkv, D]")
        expected = (q.shape[0], k.shape[1], *cache.shape[2:])
        if tuple(tensor.shape) != expected or tensor.dtype != cache.dtype:
            raise ValueError(
                f"{name} must be {cache.dtype} {expected} for {name}_cache "
                f"{tuple(cache.shape)}, got {describe(tensor)}"
            )


def check_per_batch(name: str, value, q: Tensor, low: int, high: int) -> None:
    if not is_int_tensor(value):
        also = "an int or " if name == "cache_seqlens" else ""
        raise TypeError(f"{name} must be {also}an int tensor [B], got {describe(value)}")
    if tuple(value.shape) != (q.shape[0],) or value.device != q.device:
        raise ValueError(f"{name} must be [{q.shape[0]}] on {q.device}, got {describe(value)}")
    check_range(value, name, low, high)


def check_rotary(cos, sin, q: Tensor, positions: int) -> None:
    for name, tensor in (("rotary_cos", cos), ("rotary_sin", sin)):
        if not isinstance(tensor, Tensor) or tensor.dim() != 2:
            raise TypeError(f"{name} must be a tensor [positions, R / 2], got {describe(tensor)}")
    if cos.shape != sin.shape or 2 * cos.shape[1] > q.shape[3]:
        raise ValueError(
            "rotary_cos and rotary_sin must have one shape [positions, R / 2] with R <= "
            f"{q.shape[3]}, got {describe(cos)} and {describe(sin)}"
        )
    if cos.shape[0] < positions:
        raise ValueError(
            f"rotary_cos and rotary_sin have {cos.shape[0]} positions, a full cache has {positions}"
        )
