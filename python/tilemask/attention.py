"""The calls: attention(), attention_weights() and scaled_dot_product_attention(), their argument
checks and docstrings.

Everything after this module assumes checked arguments.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.bias import CausalBias, CausalVariant
from torch.overrides import handle_torch_function, has_torch_function

from . import backends, lowering, masks
from .autograd import attend, is_traced, needs_gradient
from .backends import Call
from .masks import describe

CAUSAL = masks.causal()  # one object, so that its lowered form is kept
HALVES = (torch.float16, torch.bfloat16)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: masks.Mask | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
):
    """softmax(scale * q k^T, masked and biased) v, at the cost of the tiles that the mask leaves.

    q [B, Hq, Lq, D], k [B, Hkv, Lk, D], v [B, Hkv, Lk, Dv], all float16, bfloat16, float32 or
    float64, with any strides; Hq is a multiple of Hkv (query head h uses key head h // (Hq //
    Hkv)). Returns out [B, Hq, Lq, Dv] in q's dtype; with return_lse=True (out, lse), lse [B, Hq,
    Lq] the natural-log log-sum-exp of the scores, float32 (float64 for float64), differentiable.

    Equivalent, for bool ``seen = mask.to_dense(B, Hq, Lq, Lk)``, to::

        scores = scale * q @ k.mT                     # k, v repeated over the group
        scores = softcap * tanh(scores / softcap)     # if softcap
        scores = scores + bias - slopes * abs(i + Lk - Lq - j)
        out = softmax(scores.masked_fill(~seen, -inf)) @ v

    mask: a mask of tilemask.masks, or None to see everything. A row that sees nothing gives output
        0, lse -inf (with sinks: the sink) and zero gradients, never NaN; what padding leaves out is
        never read.
    bias: float, 2-D to 4-D, broadcastable to [B, Hq, Lq, Lk], in q's dtype or float32; may hold
        -inf. 5-D is [B1|1, B2|1, Hq|1, Lq|1, Lk|1], B = B1 * B2: two batch dimensions that were
        flattened to B. Read as it is, never expanded or copied.
    scale: default 1 / sqrt(D); any finite number, 0 and negative ones included. softcap: 0 = none.
    alibi_slopes: float [Hq] or [B, Hq]. sinks: float [Hq], one learned logit per head in the
        softmax denominator.
    dropout_p: probability of dropping, quantised to 1/65536. dropout_seed: an int or int64 tensor
        [1]; by default drawn from torch's generator of q's device.
    backend: force "cuda", "triton" or "reference"; see available_backends() and explain().

    Raises TypeError or ValueError for arguments, naming them; RuntimeError where a forced backend
    cannot run.
    """
    if has_torch_function((q, k, v, bias, alibi_slopes, sinks)):
        return handle_torch_function(
            attention,
            (q, k, v, bias, alibi_slopes, sinks),
            q,
            k,
            v,
            mask=mask,
            bias=bias,
            scale=scale,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
            dropout_p=dropout_p,
            dropout_seed=dropout_seed,
            return_lse=return_lse,
            backend=backend,
        )
    call = checked(
        q, k, v, mask, bias, scale, softcap, alibi_slopes, sinks, dropout_p, dropout_seed
    )
    out, lse = attend(call, backend)
    return (out, lse) if return_lse else out


def attention_weights(
    q: Tensor,
    k: Tensor,
    *,
    mask: masks.Mask | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    reduce: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """The probabilities that attention() multiplies v with, or a sum of them that is small.

    q [B, Hq, Lq, D], k [B, Hkv, Lk, D] and all options as in attention(). Returns, in q's dtype::

        reduce=None            [B, Hq, Lq, Lk]
        reduce="mean_heads"    [B, Lq, Lk], the mean over heads: what nn.MultiheadAttention returns
        reduce="sum_queries"   [B, Hq, Lk], the sum over rows: how much attention each key got

    The last two never hold anything of size [B, Hq, Lq, Lk], and sum in float32 (float64 for
    float64). Hidden pairs are exactly 0; a row that sees nothing is 0; every other row sums to 1,
    to less with sinks. With dropout_p the dropped ones are 0 and the others rescaled: out of
    attention() with the same dropout_seed is these weights times v.

    Differentiable. Gradients, torch.compile and other tracing run on the reference.

    Raises TypeError or ValueError for arguments, naming them; RuntimeError where a forced backend
    cannot run.
    """
    if has_torch_function((q, k, bias, alibi_slopes, sinks)):
        return handle_torch_function(
            attention_weights,
            (q, k, bias, alibi_slopes, sinks),
            q,
            k,
            mask=mask,
            bias=bias,
            scale=scale,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
            dropout_p=dropout_p,
            dropout_seed=dropout_seed,
            reduce=reduce,
            backend=backend,
        )
    if reduce not in (None, "mean_heads", "sum_queries"):
        raise ValueError(
            f'reduce must be None, "mean_heads" or "sum_queries", got {describe(reduce)}'
        )
    check_dense("q", q)
    check_dense("k", k)
    q, k = autocast(q, k)
    check_tensors(q, k)
    v = k[..., :1]  # a stand-in: nobody asked for the output
    call = checked(
        q, k, v, mask, bias, scale, softcap, alibi_slopes, sinks, dropout_p, dropout_seed
    )
    return backend_of_weights(call, backend).weights(call, reduce)


def backend_of_weights(call: Call, name: str | None):
    """The backend that computes weights: the reference alone can be differentiated and traced."""
    if is_traced(call.q, call.k):
        reason = "attention_weights() is traced, which sees through PyTorch only"
    elif torch.is_grad_enabled() and needs_gradient(call):
        reason = "attention_weights() needs gradients, which only the reference has"
    else:
        return backends.choose(call, name)
    name = backends.forced_name(name)
    if name is not None and backends.named(name) is not backends.reference:
        raise RuntimeError(f"backend {name!r} cannot run this call: {reason}")
    return backends.reference


def reference_attention(q: Tensor, k: Tensor, v: Tensor, **options):
    """attention() in plain PyTorch, with the same arguments except ``backend``: what tests compare
    to."""
    if "backend" in options:
        raise TypeError("reference_attention() has no argument backend: it is the reference")
    return attention(q, k, v, backend="reference", **options)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask=None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention, with masks that cost what they leave.

    query (N, ..., Hq, L, E), key (N, ..., H, S, E), value (N, ..., H, S, Ev) -> (N, ..., Hq, L,
    Ev); 2 or more dimensions, batch dimensions broadcast. attn_mask: bool (True = attend) or float
    (added; float32 or query's dtype), broadcastable to (N, ..., Hq, L, S) with 2 dimensions or
    more, torch's CausalBias, or a tilemask mask. is_causal=True (upper-left aligned, as in torch)
    may come together with any attn_mask. enable_gqa=True lets Hq be a multiple of H.

    A row that sees nothing gives 0. Errors are those of attention().
    """
    if isinstance(attn_mask, CausalBias):
        lower_right = attn_mask.variant == CausalVariant.LOWER_RIGHT
        attn_mask = masks.causal(align="lower_right" if lower_right else "upper_left")
    tensors = (query, key, value, attn_mask)
    if has_torch_function(tensors):
        return handle_torch_function(
            scaled_dot_product_attention,
            tensors,
            query,
            key,
            value,
            attn_mask=attn_mask,
            dropout_p=dropout_p,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
        )
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_dense(name, tensor)
        if tensor.dim() < 2:
            raise ValueError(f"{name} must have at least 2 dimensions, got {describe(tensor)}")
    query, key, value = autocast(query, key, value)
    plain = query.dim() == key.dim() == value.dim() == 4
    plain = plain and query.shape[0] == key.shape[0] == value.shape[0]
    batch, lead = query.shape[:1], ()
    if not plain:
        query, key, value, batch, lead = four_dimensional(query, key, value)
    query, key, value = matched_heads(query, key, value, enable_gqa)
    heads = query.shape[1]
    if isinstance(attn_mask, Tensor) and attn_mask.dtype in HALVES:
        (attn_mask,) = autocast(attn_mask)
    mask, bias = split_attn_mask(attn_mask, batch, heads, query, key)
    if is_causal:
        mask = CAUSAL if mask is None else mask & CAUSAL
    out, _ = attend(call_of(query, key, value, mask, bias, scale, dropout_p=dropout_p), None)
    return out if plain else out.reshape(*batch, *(heads for _ in lead), *out.shape[2:])


# -- the shapes of torch's contract ---------------------------------------------------------------


def four_dimensional(query, key, value):
    """[B, H, L, D] views of tensors with 2 or more dimensions, the broadcast batch shape, and
    (None,) if the result has a dimension of heads, () if all three are matrices."""
    lead = () if query.dim() == key.dim() == value.dim() == 2 else (None,)
    tensors = [t if t.dim() > 2 else t[None] for t in (query, key, value)]
    try:
        batch = torch.broadcast_shapes(*(t.shape[:-3] for t in tensors))
    except RuntimeError:
        raise ValueError(
            "the batch dimensions of query, key and value do not broadcast: "
            + shapes(query, key, value)
        ) from None
    flat = math.prod(batch)
    tensors = [t.expand(*batch, *t.shape[-3:]).reshape(flat, *t.shape[-3:]) for t in tensors]
    return *tensors, batch, lead


def matched_heads(query, key, value, enable_gqa: bool):
    """query, key and value under torch's rule: one head broadcasts, others are equal, or divisors
    of query's with enable_gqa."""
    found = key.shape[1], value.shape[1]
    if query.shape[1] == found[0] == found[1]:
        return query, key, value
    if query.shape[1] == 1 and max(found) > 1:
        query = query.expand(-1, max(found), -1, -1)
    heads = query.shape[1]
    for name, count in zip(("key", "value"), found, strict=True):
        if count == heads or count == 1:
            continue
        if not enable_gqa:
            raise ValueError(
                f"query has {heads} heads and {name} {count}: pass enable_gqa=True to share key "
                "heads among query heads"
            )
        if count == 0 or heads % count:
            raise ValueError(
                f"query has {heads} heads, which is not a multiple of {name}'s {count}"
            )
    if found[0] != found[1]:  # rare: bring the smaller to the larger, or both to the query's
        key, value = (
            t.expand(-1, heads, -1, -1)
            if t.shape[1] == 1
            else t.repeat_interleave(heads // t.shape[1], 1)
            for t in (key, value)
        )
    return query, key, value


def split_attn_mask(attn_mask, batch, heads: int, query, key):
    """(mask, bias) of an attn_mask: bool tensors are masks, float ones are added."""
    if attn_mask is None or isinstance(attn_mask, masks.Mask):
        return attn_mask, None
    if not isinstance(attn_mask, Tensor):
        raise TypeError(
            f"attn_mask must be a tensor, a tilemask mask or None, got {describe(attn_mask)}"
        )
    if attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
        raise TypeError(
            f"attn_mask must be bool, float32 or query's {query.dtype}, got {describe(attn_mask)}"
        )
    full = (*batch, heads, query.shape[2], key.shape[2])
    shape = tuple(attn_mask.shape)
    missing = len(full) - len(shape)
    fits = missing >= 0 and all(
        [have == 1 or have == want for have, want in zip(shape, full[missing:], strict=True)]
    )
    if len(shape) < 2 or not fits:
        advice = "; is it a padding mask? use mask[:, None, None, :] or masks.padding(keep=mask)"
        raise ValueError(
            f"attn_mask has shape {shape}, which does not broadcast to (..., Hq, L, S) = {full} "
            f"from 2 dimensions or more{advice if len(shape) <= 2 else ''}"
        )
    if len(full) != 4:
        attn_mask = with_two_batches(attn_mask.reshape((1,) * missing + shape), batch)
    return (masks.Dense(attn_mask), None) if attn_mask.dtype == torch.bool else (None, attn_mask)


def with_two_batches(attn_mask: Tensor, batch) -> Tensor:
    """An attn_mask [*batch, H, L, S], any size 1 where it broadcasts, with one or two batch
    dimensions: neighbours are merged. A view, except where three must stay apart."""
    inner = attn_mask.shape[-3:]
    if 0 in batch:
        return attn_mask.expand(*batch, *inner).reshape(0, *inner)
    if not attn_mask.requires_grad:  # a gradient has the shape that was given
        for dim in range(len(batch)):
            if attn_mask.stride(dim) == 0:
                attn_mask = attn_mask.narrow(dim, 0, 1)
    merged, first_of, step = [], [], 0  # sizes; first dimension of each; stride of the last one
    for dim, full in enumerate(batch):
        if full == 1:
            continue
        size, stride = attn_mask.shape[dim], attn_mask.stride(dim)
        alike = bool(merged) and (size == 1) == (merged[-1] == 1)
        if alike and (size == 1 or step == size * stride):
            merged[-1] *= size
        else:
            merged.append(size)
            first_of.append(dim)
        step = stride
    if len(merged) > 2:  # rare: all but the first are written out
        kept = first_of[1]
        attn_mask = attn_mask.expand(*attn_mask.shape[:kept], *batch[kept:], *inner)
        merged = [merged[0], math.prod(batch[kept:])]
    return attn_mask.reshape(*merged or (1,), *inner)


# -- checks ---------------------------------------------------------------------------------------


def autocast(*tensors):
    """Tensors in autocast's dtype where it is on for their device; float64 stays, as in torch."""
    kind = tensors[0].device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t.to(dtype) if t.dtype in FLOATS[:3] else t for t in tensors)


def checked(q, k, v, *options, **more) -> Call:
    """A Call from the arguments of attention(), or an error that names the argument."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_dense(name, tensor)
    return call_of(*autocast(q, k, v), *options, **more)


def call_of(
    q,
    k,
    v,
    mask=None,
    bias=None,
    scale=None,
    softcap=0.0,
    alibi_slopes=None,
    sinks=None,
    dropout_p=0.0,
    dropout_seed=None,
) -> Call:
    """As checked(), of dense tensors that are cast already."""
    check_tensors(q, k, v)
    B, Hq, Lq, D = q.shape
    Lk = k.shape[2]
    if mask is not None and not isinstance(mask, masks.Mask):
        advice = (
            ": masks.dense(mask) makes one from a bool tensor" if isinstance(mask, Tensor) else ""
        )
        raise TypeError(f"mask must be a tilemask mask or None, got {describe(mask)}{advice}")
    if bias is not None:
        bias = checked_bias(bias, q, (B, Hq, Lq, Lk))
    if scale is None:
        scale = D**-0.5
    elif not is_real(scale) or not math.isfinite(scale):
        raise TypeError(f"scale must be a finite number or None, got {describe(scale)}")
    if not is_real(softcap) or not 0 <= softcap < math.inf:
        raise TypeError(f"softcap must be a finite number >= 0 (0 = none), got {describe(softcap)}")
    if alibi_slopes is not None:
        check_per_head("alibi_slopes", alibi_slopes, q, ((Hq,), (B, Hq)))
        if alibi_slopes.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "alibi_slopes requires a gradient, which no backend computes: pass "
                "alibi_slopes.detach(), or train a bias"
            )
        alibi_slopes = alibi_slopes.reshape(-1, Hq)
    if sinks is not None:
        check_per_head("sinks", sinks, q, ((Hq,),))
    if not is_real(dropout_p) or not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p must be a number in [0, 1], got {describe(dropout_p)}")
    if dropout_seed is not None or dropout_p:
        dropout_seed = checked_seed(dropout_seed, q.device)
    lowered = lowering.lower(mask, B, Hq, Lq, Lk, q.device)
    return Call(
        q,
        k,
        v,
        lowered,
        float(scale),
        bias,
        float(softcap),
        alibi_slopes,
        sinks,
        float(dropout_p),
        dropout_seed,
    )


def check_dense(name: str, tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {describe(tensor)}")
    if tensor.is_nested or tensor.layout != torch.strided:
        raise TypeError(
            f"{name} must be a dense tensor, got a nested or sparse one: pack the sequences "
            "along L and use mask=masks.varlen(cu_seqlens)"
        )


def check_tensors(q: Tensor, k: Tensor, v: Tensor | None = None) -> None:
    """v: None where there is none."""
    given = (q, k) if v is None else (q, k, v)
    names = "q and k" if v is None else "q, k and v"
    v = k if v is None else v
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(f"{names} must be [B, H, L, D] (4 dimensions), got {shapes(*given)}")
    if q.dtype not in FLOATS or k.dtype != q.dtype or v.dtype != q.dtype:
        raise TypeError(
            f"{names} must have one dtype of float16, bfloat16, float32, float64; got "
            + ", ".join(str(t.dtype) for t in given)
        )
    if k.device != q.device or v.device != q.device:
        raise ValueError(
            f"{names} must be on one device, got " + ", ".join(str(t.device) for t in given)
        )
    B, Hq, _, D = q.shape
    Bk, Hkv, Lk, Dk = k.shape
    if Dk != D or D == 0:
        raise ValueError(f"q and k must have one width D >= 1: {shapes(*given)}")
    if v.shape[:3] != (Bk, Hkv, Lk) or v.shape[3] == 0:
        raise ValueError(f"v must be [B, Hkv, Lk, Dv] with k's first three: {shapes(*given)}")
    if Bk != B:
        raise ValueError(f"{names} must have one batch size: {shapes(*given)}")
    if (Hkv == 0 and Hq) or (Hkv and Hq % Hkv):
        raise ValueError(
            f"k has {Hkv} heads, q has {Hq}: q heads must be a multiple of k heads "
            f"({shapes(*given)})"
        )


def shapes(*tensors) -> str:
    return ", ".join(f"{name} {tuple(t.shape)}" for name, t in zip("qkv", tensors))


def is_real(value) -> bool:
    if type(value) is float:  # as nearly always; the others ask an abstract class
        return True
    return isinstance(value, (numbers.Real, torch.SymFloat, torch.SymInt)) and not isinstance(
        value, bool
    )


def checked_bias(bias, q: Tensor, full: tuple[int, ...]) -> Tensor:
    """bias as a view [B1|1, B2|1, Hq|1, Lq|1, Lk|1]."""
    if not isinstance(bias, Tensor) or bias.dtype not in (q.dtype, torch.float32):
        hint = (
            ": a bool mask is mask=masks.dense(...)"
            if getattr(bias, "dtype", 0) == torch.bool
            else ""
        )
        raise TypeError(f"bias must be a float32 or {q.dtype} tensor, got {describe(bias)}{hint}")
    if bias.device != q.device:
        raise ValueError(f"bias is on {bias.device}, q on {q.device}")
    shape = tuple(bias.shape)
    fits = False
    if 2 <= len(shape) <= 4:
        shape = (1,) * (4 - len(shape)) + shape
        fits = masks.repeats(shape[0], full[0])
        shape = (shape[0], 1, *shape[1:])
    elif len(shape) == 5:
        split = masks.split_batch(full[0], *shape[:2])
        fits = masks.repeats(shape[0], split[0]) and masks.repeats(shape[1], split[1])
        fits = fits and split[0] * split[1] == full[0]
    if not fits or not all(masks.repeats(h, w) for h, w in zip(shape[2:], full[1:], strict=True)):
        raise ValueError(
            f"bias has shape {tuple(bias.shape)}, which does not broadcast to (B, Hq, Lq, Lk) "
            f"= {full} from 2 to 4 dimensions, nor from 5 with B = B1 * B2"
        )
    return bias.reshape(shape)


def check_per_head(name: str, value, q: Tensor, allowed) -> None:
    if not isinstance(value, Tensor) or not value.dtype.is_floating_point:
        raise TypeError(f"{name} must be a float tensor, got {describe(value)}")
    if tuple(value.shape) not in allowed or value.device != q.device:
        expected = " or ".join(str(shape) for shape in allowed)
        raise ValueError(f"{name} must be {expected} on {q.device}, got {describe(value)}")


def checked_seed(seed, device) -> Tensor:
    """int64 [1] on the device; drawn from torch's generator if None."""
    if seed is None:
        return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)
    if masks.is_int(seed):
        if not -(2**63) <= seed < 2**63:
            raise ValueError(f"dropout_seed must fit in 64 bits, got {seed}")
        return torch.full((1,), seed, dtype=torch.int64, device=device)
    if isinstance(seed, Tensor) and seed.dtype == torch.int64 and seed.numel() == 1:
        if seed.device != device:
            raise ValueError(f"dropout_seed is on {seed.device}, q on {device}")
        return seed.reshape(1)
    raise TypeError(f"dropout_seed must be an int or an int64 tensor [1], got {describe(seed)}")


# -- explain --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Explanation:
    """What attention() would do with a call; ``print`` it, or read the fields."""

    backend: str
    reasons: dict[str, str]  # why each other backend does not run
    mask: str  # how the mask was lowered
    tile: tuple[int, int]
    visited: float  # share of the tiles that is visited

    def __str__(self) -> str:
        lines = [f"backend: {self.backend}"]
        lines += [f"  not {name}: {reason}" for name, reason in self.reasons.items()]
        lines.append(f"mask: {self.mask}")
        rows, cols = self.tile
        lines.append(f"tiles: {rows} x {cols}, {100 * self.visited:.1f} % visited")
        return "\n".join(lines)


def explain(q: Tensor, k: Tensor, v: Tensor, *, backend: str | None = None, mask=None, **options):
    """Which backend attention() would choose, why not the others, and what the mask leaves.

    Takes the arguments of attention(); computes nothing but the mask's tile classes. ``mask`` and
    the tensors are read, so this is no call for a hot path. Returns an Explanation; print it.
    """
    options.pop("return_lse", None)
    call = checked(q, k, v, mask, **options)
    chosen = backends.choose(call, backend)
    forced = backends.forced_name(backend)
    reasons = {}
    for other in backends.BACKENDS:
        if other is not chosen:
            reasons[other.NAME] = backends.reason_against(other, chosen, call, forced)
    tile = chosen.tile(call)
    B, Hq, Lq, _ = q.shape
    classes = lowering.tile_classes(mask, B, Hq, Lq, k.shape[2], tile, q.device)
    visited = (classes != lowering.EMPTY).float().mean().item() if classes.numel() else 0.0
    return Explanation(chosen.NAME, reasons, call.mask.form, tile, visited)
