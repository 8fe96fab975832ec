"""The reference: plain PyTorch, on any device, the meaning of every option.

It works through chunks of query rows, so that memory stays bounded whatever the lengths, and is
differentiable twice. Order of operations, as everywhere: scale * q k^T, softcap, bias and ALiBi,
mask, softmax (with sinks), dropout, times v.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..masks import visible
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


def forward(call) -> tuple[Tensor, Tensor]:
    """out [B, Hq, Lq, Dv] in q's dtype and lse float32 [B, Hq, Lq] (float64 for float64 inputs)."""
    kind = call.q.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):  # inputs are cast already, no more
        with torch.autocast(kind, enabled=False):
            return forward(call)
    q, k, v = call.q, call.k, call.v
    math = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, heads, len_q, _ = q.shape
    len_k = k.shape[2]

    # what padding excludes never reaches a result: 0 * NaN would be NaN
    live_keys, live_rows = call.mask.live_keys(q.device), call.mask.live_rows(q.device)
    q, k, v = q.to(math), k.to(math), v.to(math)
    if live_keys is not None:
        dead = ~live_keys[..., None]
        k, v = k.masked_fill(dead, 0), v.masked_fill(dead, 0)
    if live_rows is not None:
        q = q.masked_fill(~live_rows[..., None], 0)

    lo, hi = call.mask.intervals(q.device)
    step = max(1, CHUNK // max(1, batch * heads * len_k))
    if step >= len_q:
        out, lse = attend_rows(call, q, k, v, lo, hi, 0, call.bias, call.sinks)
        return out.to(call.q.dtype), lse
    chunks = []
    for first in range(0, len_q, step):
        rows = slice(first, first + step)
        arguments = (call, q[:, :, rows], k, v, lo[..., rows], hi[..., rows], first)
        arguments += (call.bias, call.sinks)
        if torch.is_grad_enabled():  # keep the inputs of a chunk, not its scores
            chunk = checkpoint(
                attend_rows, *arguments, use_reentrant=False, preserve_rng_state=False
            )
        else:
            chunk = attend_rows(*arguments)
        chunks.append((chunk[0].to(call.q.dtype), chunk[1]))
    outs, lses = zip(*chunks, strict=True)
    return torch.cat(outs, 2), torch.cat(lses, 2)


def attend_rows(call, q, k, v, lo, hi, first, bias, sinks) -> tuple[Tensor, Tensor]:
    """Attention of the rows from ``first`` on: q [B, Hq, rows, D], lo and hi [B|1, H|1, rows]."""
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
        scores = scores + rows_of(bias, first, rows).to(scores.dtype)
    if call.alibi_slopes is not None:
        index = torch.arange(first, first + rows, device=q.device)[:, None]
        distance = (index + len_k - call.mask.len_q - cols).abs()
        scores = scores - call.alibi_slopes.to(scores.dtype)[:, :, None, None] * distance
    if not call.mask.is_everything:
        bits = None if call.mask.bits is None else rows_of(call.mask.bits, first, rows)
        seen = visible(lo, hi, call.mask.key_bits, bits, cols)
        scores = scores.masked_fill(~seen, float("-inf"))

    # softmax; a row that sees nothing gets a finite pivot, sum 0, output 0 and lse -inf
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
    folded = (p / total).view(batch, kv_heads, group * rows, len_k)
    out = (folded @ v).view(batch, heads, rows, v.shape[3])
    return out, lse[..., 0]


def rows_of(matrix: Tensor, first: int, rows: int) -> Tensor:
    """Rows of [B|1, H|1, Lq|1, Lk|1]."""
    return matrix if matrix.shape[2] == 1 else matrix[:, :, first : first + rows]


def backward(call, out, lse, dout, dlse):
    """Gradients by running the forward again under autograd."""
    from . import recompute

    return recompute(call, dout, dlse)
