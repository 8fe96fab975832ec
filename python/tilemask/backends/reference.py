"""The reference: plain PyTorch, on any device, the meaning of every option.

It works through chunks of query rows, so that memory stays bounded whatever the lengths, and is
differentiable twice. Order of operations, as everywhere: scale * q k^T, softcap, bias and ALiBi,
mask, softmax (with sinks), dropout, times v.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..masks import split_batch, visible
from ..philox import keep_mask

NAME = "reference"
CHUNK = 1 << 25  # scores computed at a time; a few such arrays are alive at once


def unavailable() -> str | None:
    return None


def tile(call) -> tuple[int, int]:
    """The tile shape explain() reports; the reference itself works by rows."""
    return 64, 64


def why_not(call) -> str | None:
    return None


def without_autocast(function):
    """A function of a call, with autocast off: q, k and v are cast already, nothing else is."""

    @functools.wraps(function)
    def run(call, *arguments):
        kind = call.q.device.type
        if kind == "meta" or not torch.is_autocast_enabled(kind):
            return function(call, *arguments)
        with torch.autocast(kind, enabled=False):
            return function(call, *arguments)

    return run


@without_autocast
def forward(call) -> tuple[Tensor, Tensor]:
    """out [B, Hq, Lq, Dv] in q's dtype and lse float32 [B, Hq, Lq] (float64 for float64 inputs)."""
    chunks = [(out.to(call.q.dtype), lse) for out, lse in by_rows(call, attend_rows)]
    outs, lses = zip(*chunks, strict=True)
    return joined(outs, 2), joined(lses, 2)


@without_autocast
def weights(call, reduce: str | None = None) -> Tensor:
    """The probabilities in q's dtype: [B, Hq, Lq, Lk], their mean over heads [B, Lq, Lk] for
    "mean_heads", or their sum over rows [B, Hq, Lk] for "sum_queries". Does not read v."""
    chunks = by_rows(call, weigh_rows, reduce)
    if reduce == "sum_queries":
        return functools.reduce(torch.add, chunks).to(call.q.dtype)
    return joined([p.to(call.q.dtype) for p in chunks], 1 if reduce else 2)


def joined(chunks, dim: int) -> Tensor:
    return chunks[0] if len(chunks) == 1 else torch.cat(chunks, dim)


def by_rows(call, work, *extra):
    """Results of ``work(call, q, k, v, lo, hi, first, bias, sinks, *extra)`` for one chunk of query
    rows after the other, at most CHUNK scores each: q, lo, hi and bias are those of the rows from
    ``first`` on, and numbers are held in float32 (float64 for float64 inputs)."""
    q, k, v, bias = call.q, call.k, call.v, call.bias
    math = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, heads, len_q, _ = q.shape

    # what padding excludes never reaches a result: 0 * NaN would be NaN
    live_keys, live_rows = call.mask.live_keys(q.device), call.mask.live_rows(q.device)
    q, k, v = q.to(math), k.to(math), v.to(math)
    if live_keys is not None:
        dead = ~live_keys[..., None]
        k, v = k.masked_fill(dead, 0), v.masked_fill(dead, 0)
    if live_rows is not None:
        q = q.masked_fill(~live_rows[..., None], 0)

    lo, hi = call.mask.intervals(q.device)
    step = max(1, CHUNK // max(1, batch * heads * k.shape[2]))
    if step >= len_q:
        yield work(call, q, k, v, lo, hi, 0, bias, call.sinks, *extra)
        return
    firsts = range(0, len_q, step)
    per_row = bias is not None and bias.shape[3] > 1
    biases = bias.split(step, 3) if per_row else [bias] * len(firsts)
    pieces = (q.split(step, 2), lo.split(step, 2), hi.split(step, 2), firsts, biases)
    for q, lo, hi, first, bias in zip(*pieces, strict=True):
        arguments = (call, q, k, v, lo, hi, first, bias, call.sinks, *extra)
        if torch.is_grad_enabled():  # keep the inputs of a chunk, not its scores
            yield checkpoint(work, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            yield work(*arguments)


def attend_rows(call, q, k, v, lo, hi, first, bias, sinks) -> tuple[Tensor, Tensor]:
    """out [B, Hq, rows, Dv] and lse [B, Hq, rows] of the rows from ``first`` on."""
    p, lse = probabilities(call, q, k, lo, hi, first, bias, sinks)
    batch, heads, rows, len_k = p.shape
    kv_heads = k.shape[1]
    group = heads // max(1, kv_heads)
    out = p.reshape(batch, kv_heads, group * rows, len_k) @ v
    return out.view(batch, heads, rows, v.shape[3]), lse


def weigh_rows(call, q, k, v, lo, hi, first, bias, sinks, reduce) -> Tensor:
    """Probabilities of the rows from ``first`` on, reduced."""
    p, _ = probabilities(call, q, k, lo, hi, first, bias, sinks)
    if reduce == "mean_heads":
        return p.sum(1) / max(1, p.shape[1])
    return p.sum(2) if reduce == "sum_queries" else p


def probabilities(call, q, k, lo, hi, first, bias, sinks) -> tuple[Tensor, Tensor]:
    """Softmax after dropout [B, Hq, rows, Lk] and lse [B, Hq, rows] of the rows from ``first`` on:
    q [B, Hq, rows, D], lo and hi [B|1, H|1, rows], bias [B1|1, B2|1, Hq|1, rows|1, Lk|1]."""
    batch, heads, rows, _ = q.shape
    kv_heads, len_k = k.shape[1], k.shape[2]
    group = heads // max(1, kv_heads)
    cols = torch.arange(len_k, device=q.device)

    # query heads that share a key head are folded into its rows: K and V are never copied
    folded = q.reshape(batch, kv_heads, group * rows, q.shape[3]) * call.scale
    scores = (folded @ k.transpose(-1, -2)).view(batch, heads, rows, len_k)
    if call.softcap:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    if bias is not None:
        split = split_batch(batch, *bias.shape[:2])
        scores = (scores.unflatten(0, split) + bias.to(scores.dtype)).flatten(0, 1)
    if call.alibi_slopes is not None:
        index = torch.arange(first, first + rows, device=q.device)[:, None]
        distance = (index + len_k - call.mask.len_q - cols).abs()
        scores = scores - call.alibi_slopes.to(scores.dtype)[:, :, None, None] * distance
    if not call.mask.is_everything:
        bits = None if call.mask.bits is None else call.mask.bits.rows(first, rows)
        seen = visible(lo, hi, call.mask.key_bits, bits, cols)
        scores = scores.masked_fill(~seen, float("-inf"))

    # softmax; a row that sees nothing gets a finite pivot, sum 0, weights 0 and lse -inf
    pivot = scores.detach().amax(-1, keepdim=True) if len_k else scores.new_full((1,), -torch.inf)
    if sinks is not None:
        sinks = sinks.to(scores.dtype)[None, :, None, None]
        pivot = torch.maximum(pivot, sinks.detach())
    pivot = pivot.masked_fill(pivot == float("-inf"), 0)
    p = torch.exp(scores - pivot)
    total = p.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks - pivot)
    empty = total == 0
    total = total.masked_fill(empty, 1)
    lse = (pivot + torch.log(total)).masked_fill(empty, float("-inf"))

    if call.dropout_p:
        keep, factor = keep_mask(
            call.dropout_p, call.dropout_seed, batch, heads, first, rows, len_k
        )
        p = p * keep * factor
    return p / total, lse[..., 0]


def backward(call, out, lse, rest, dout, dlse, bias_gradient: bool = True):
    """Gradients by running the forward again under autograd."""
    from . import recompute

    grads = recompute(call, dout, dlse)
    return grads if bias_gradient else grads._replace(bias=None)
