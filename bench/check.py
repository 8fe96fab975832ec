"""The truth in float64, written out, and how far from it a result may be.

A result is right if its largest error is at most twice that of plain torch in the same dtype, plus
a little of the size of what is summed. Plain torch's error is measured here, on the same numbers:
the same formulas in float32 with probabilities, their gradients and results rounded to the dtype,
as every fused kernel rounds them; at least that of rounding the truth.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tilemask import masks

from .area import seen_rows
from .workloads import Workload

CHUNK = {"cpu": 1 << 23, "cuda": 1 << 26}  # scores held at a time
LITTLE = 1e-5


@dataclass
class Inputs:
    """One set of inputs. q, k, v and dout lie in memory as [B, L, H, D], as projections leave them.

    bias: [B|1, Hq|1, Lq|1, Lk|1] or None. dout is 0 where nobody wants a result.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    bias: Tensor | None = None

    def leaves(self, bias_gradient: bool) -> Inputs:
        """The same memory, with gradients wanted."""
        q, k, v = (t.detach().requires_grad_() for t in (self.q, self.k, self.v))
        bias = self.bias
        if bias is not None and bias_gradient:
            bias = bias.detach().requires_grad_()
        return Inputs(q, k, v, self.dout, bias)

    def wanted(self) -> dict[str, Tensor]:
        """What needs a gradient, by the gradient's name."""
        found = {"dq": self.q, "dk": self.k, "dv": self.v, "dbias": self.bias}
        return {n: t for n, t in found.items() if t is not None and t.requires_grad}


def draw_inputs(work: Workload, rows: Tensor | None, device, seed: int) -> Inputs:
    """Normal q, k, v, dout and bias; rows: see Pattern."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, work.dtype)

    def drawn(heads, length, width):
        shape = (work.B, length, heads, width)
        numbers = torch.randn(shape, generator=generator, device=device).to(dtype)
        return numbers.transpose(1, 2)

    q = drawn(work.Hq, work.Lq, work.D)
    k, v = drawn(work.Hkv, work.Lk, work.D), drawn(work.Hkv, work.Lk, work.Dv)
    dout = drawn(work.Hq, work.Lq, work.Dv)
    if rows is not None:
        dout.mul_(rows[:, None, :, None])
    bias = None
    if work.bias is not None:
        bias = torch.randn(work.bias_shape(), generator=generator, device=device).to(dtype)
    return Inputs(q, k, v, dout, bias)


@dataclass
class Truth:
    """The right results of one input set, float64, and the largest error each may have.

    rows: bool [B, 1, Lq, 1]: where ``out`` is compared; None = everywhere. dead: bool, broadcasts
    to out: rows that see nothing, where tilemask promises 0.
    """

    results: dict[str, Tensor]
    allowed: dict[str, float]
    rows: Tensor | None
    dead: Tensor

    def errors(self, results: dict[str, Tensor]) -> dict[str, float]:
        """max |result - truth| per name; inf where a result has a wrong shape, NaN or Inf."""
        found = {}
        for name, got in results.items():
            exact = self.results[name]
            if got.shape != exact.shape:
                found[name] = float("inf")
                continue
            difference = (got.double() - exact).abs()
            if name == "out" and self.rows is not None:
                difference = difference.masked_fill(~self.rows, 0)
            worst = difference.max().item() if difference.numel() else 0.0
            found[name] = worst if worst == worst else float("inf")
        return found

    def wrong(self, errors: dict[str, float]) -> str | None:
        """What is wrong, in words; None if nothing is."""
        bad = []
        for name, error in errors.items():
            if error == float("inf"):
                bad.append(f"{name} has NaN, Inf or another shape")
            elif error > self.allowed[name]:
                bad.append(f"{name} off by {error:.2g}, allowed {self.allowed[name]:.2g}")
        return ", ".join(bad) or None


def truth_of(work: Workload, mask: masks.Mask | None, rows: Tensor | None, given: Inputs) -> Truth:
    with torch.no_grad():
        training = len(work.directions) > 1
        exact, terms, dead = compute(work, mask, given, torch.float64, training)
        held_in = given.q.dtype
        rounded, _, _ = compute(work, mask, given, torch.float32, training, held_in)
        allowed = {}
        for name, right in exact.items():
            largest = right.abs().max().item() if right.numel() else 0.0
            off = max(
                (answer.double() - right).abs().max().item() if right.numel() else 0.0
                for answer in (rounded[name].to(held_in), right.to(held_in))
            )
            allowed[name] = 2 * off + LITTLE * max(largest, terms.get(name, 0.0))
    return Truth(exact, allowed, None if rows is None else rows[:, None, :, None], dead)


def compute(work: Workload, mask, given: Inputs, math, training: bool, held_in=None):
    """out, and with ``training`` the gradients, in the arithmetic ``math``; the size of the terms
    that cancel in gradients; rows that see nothing, bool [B|1, H|1, Lq, 1].

    held_in: the dtype that probabilities, their gradients and results are rounded to.
    """
    B, Hq, Hkv, Lq, Lk = work.B, work.Hq, work.Hkv, work.Lq, work.Lk
    scale = work.D**-0.5 if work.scale is None else work.scale
    q, k, v, dout = (t.to(math) for t in (given.q, given.k, given.v, given.dout))
    k, v = (t.repeat_interleave(Hq // Hkv, 1) for t in (k, v))

    def rounded(tensor):
        return tensor if held_in is None else tensor.to(held_in).to(math)

    mask = masks.padding(Lk) if mask is None else mask
    step = max(1, CHUNK[q.device.type] // max(1, B * Hq * Lk))
    outs, dqs, dead = [], [], []
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    dbias = None
    if training and work.bias_gradient:
        dbias = torch.zeros(given.bias.shape, dtype=math, device=q.device)
    term = 0.0
    for first, seen in seen_rows(mask, B, Hq, Lq, Lk, step, q.device):
        part = slice(first, first + step)
        scores = q[:, :, part] @ k.mT * scale
        if given.bias is not None:
            bias = given.bias if given.bias.shape[2] == 1 else given.bias[:, :, part]
            scores += bias.to(math)
        scores = scores.masked_fill(~seen, float("-inf"))
        nothing = ~seen.any(-1, keepdim=True)
        dead.append(nothing)
        p = torch.softmax(scores, -1).masked_fill(nothing, 0)
        del scores
        unit = 1.0 if held_in is None else p.amax(-1, keepdim=True).masked_fill(nothing, 1)
        outs.append(rounded((rounded(p / unit) @ v) * unit))
        if not training:
            continue
        rows = dout[:, :, part]
        dp = rows @ v.mT
        delta = (rows * outs[-1]).sum(-1, keepdim=True)
        term = max(term, (p * (dp.abs() + delta.abs())).max().item())
        ds = p * (dp - delta)
        del dp
        dv += rounded(p).mT @ rows
        if dbias is not None:
            own = summed_to(
                ds, (*dbias.shape[:2], min(dbias.shape[2], ds.shape[2]), dbias.shape[3])
            )
            if dbias.shape[2] == 1:
                dbias += own
            else:
                dbias[:, :, part] = own
        ds = rounded(ds) * scale
        dqs.append(ds @ k)
        dk += ds.mT @ q[:, :, part]
    results = {"out": torch.cat(outs, 2)}
    if not training:
        return results, {}, torch.cat(dead, 2)
    dk, dv = (t.unflatten(1, (Hkv, -1)).sum(2) for t in (dk, dv))
    results |= {"dq": torch.cat(dqs, 2), "dk": dk, "dv": dv}
    terms = {"dq": abs(scale) * term * size(k), "dk": abs(scale) * term * size(q)}
    if dbias is not None:
        results["dbias"], terms["dbias"] = dbias, term
    return results, terms, torch.cat(dead, 2)


def size(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0


def summed_to(tensor: Tensor, shape) -> Tensor:
    """The tensor summed over what is 1 in ``shape``."""
    over = [dim for dim, n in enumerate(shape) if n == 1 and tensor.shape[dim] != 1]
    return tensor.sum(over, keepdim=True) if over else tensor
