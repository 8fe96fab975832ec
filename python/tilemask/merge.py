"""merge_states(): attention over two disjoint sets of keys, from attention over each."""

from __future__ import annotations

import torch
from torch import Tensor

from .masks import describe

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def merge_states(out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over all keys from attention over two disjoint parts of them: (out, lse).

    out1, out2 [B, H, L, Dv], lse1, lse2 [B, H, L]: what attention(..., return_lse=True) gave for
    the same queries and either part; any leading dimensions will do. Equivalent to::

        w1, w2 = softmax([lse1, lse2])
        out, lse = w1 * out1 + w2 * out2, logaddexp(lse1, lse2)

    Exact, associative up to rounding, differentiable in all four. A row that sees nothing in one
    part (lse -inf, out 0) is the other part's; in both: output 0 and lse -inf. lse +inf, which
    flash-attn writes into such rows, means the same. Computed in float32 (float64 for float64) and
    rounded to out1's dtype once. Sinks belong in one of the parts only, or they count twice.
    """
    check("1", out1, lse1)
    check("2", out2, lse2)
    if out1.shape != out2.shape or out1.dtype != out2.dtype or out1.device != out2.device:
        raise ValueError(
            "out1 and out2 must have one shape, dtype and device, got "
            f"{describe(out1)} and {describe(out2)}"
        )
    math = torch.promote_types(torch.float32, torch.promote_types(out1.dtype, lse1.dtype))
    lse1, lse2 = (lse.to(math).masked_fill(lse.isinf(), -torch.inf) for lse in (lse1, lse2))
    pivot = torch.maximum(lse1, lse2).detach()
    pivot = pivot.masked_fill(pivot == -torch.inf, 0)
    weight1, weight2 = (lse1 - pivot).exp(), (lse2 - pivot).exp()
    total = weight1 + weight2
    dead = total == 0
    total = total.masked_fill(dead, 1)
    out = (weight1 / total)[..., None] * out1.to(math)
    out = out + (weight2 / total)[..., None] * out2.to(math)
    return out.to(out1.dtype), (pivot + total.log()).masked_fill(dead, -torch.inf)


def check(number: str, out, lse) -> None:
    if not isinstance(out, Tensor) or out.dtype not in FLOATS or out.dim() == 0:
        raise TypeError(f"out{number} must be a float tensor [B, H, L, Dv], got {describe(out)}")
    if not isinstance(lse, Tensor) or lse.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"lse{number} must be a float32 tensor [B, H, L] (float64 for float64), "
            f"got {describe(lse)}"
        )
    if lse.shape != out.shape[:-1] or lse.device != out.device:
        raise ValueError(
            f"lse{number} must have the shape of out{number} without its last dimension, on its "
            f"device: got {describe(lse)} for {describe(out)}"
        )
