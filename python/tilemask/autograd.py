"""How a checked call runs: directly in eager mode, through torch.library ops while tracing.

Eager: the backend is called directly, inside an autograd.Function only if a gradient is needed; the
reference is differentiated by autograd itself. While tracing (torch.compile, torch.export, fake
tensors, dispatch modes) three functional ops stand for the call, ``tilemask::lower``, ``forward`` and
``backward``; the backend is chosen by the same rules, from shapes, dtypes and devices alone.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import backends
from .backends import Call, Gradients
from .lowering import LoweredMask

TWICE = (
    "backward through tilemask's backward: only the reference is differentiable twice; "
    'call attention(..., backend="reference")'
)


def attend(call: Call, name: str | None = None) -> tuple[Tensor, Tensor]:
    """out and lse of a checked call, differentiable where autograd is on."""
    if is_traced(call.q):
        return attend_traced(call, name)
    backend = backends.choose(call, name)
    if backend is backends.reference:
        return backend.forward(call)
    if torch.is_grad_enabled() and needs_gradient(call):
        return Attention.apply(call, backend, call.q, call.k, call.v)
    return backend.forward(call)


def needs_gradient(call: Call) -> bool:
    tensors = (call.q, call.k, call.v, call.bias, call.sinks)
    return any(t is not None and t.requires_grad for t in tensors)


def is_traced(q: Tensor) -> bool:
    """Whether somebody other than the GPU watches: then the ops stand for the call."""
    if torch.compiler.is_compiling():
        return True
    plain = type(q) is Tensor or type(q) is torch.nn.Parameter
    return not plain or bool(torch._C._len_torch_dispatch_stack())


class Attention(torch.autograd.Function):
    """A call on a backend that has its own backward. Eager."""

    @staticmethod
    def forward(ctx, call: Call, backend, q, k, v):
        out, lse = backend.forward(call)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.call, ctx.backend = backends.replaced(call, q=None, k=None, v=None), backend
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse):
        q, k, v, out, lse = ctx.saved_tensors
        call = backends.replaced(ctx.call, q=q, k=k, v=v)
        if dout is None and dlse is None:
            return None, None, None, None, None
        dout = torch.zeros_like(out) if dout is None else dout
        grads = ctx.backend.backward(call, out, lse, dout, dlse)
        return None, None, grads.q, grads.k, grads.v


# -- the ops --------------------------------------------------------------------------------------
#
# A call travels flat: options = [bias, alibi_slopes, sinks, dropout_seed], mask = [batch_bounds, lo,
# hi, key_bits, bits, then counts and blocks of each list the op walks], bounds = the six ints,
# numbers = [scale, softcap, dropout_p].

library = torch.library.Library("tilemask", "DEF")
library.define(
    "lower(Tensor lo, Tensor hi, SymInt len_k, int block_m, int block_n, bool transposed)"
    " -> (Tensor counts, Tensor blocks)"
)
library.define(
    "forward(Tensor q, Tensor k, Tensor v, Tensor?[] options, Tensor?[] mask, SymInt[] bounds,"
    " float[] numbers, str backend) -> (Tensor out, Tensor lse)"
)
library.define(
    "backward(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v,"
    " Tensor?[] options, Tensor?[] mask, SymInt[] bounds, float[] numbers, str backend)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsinks)"
)

LISTS_OF = {"forward": ("forward",), "backward": ("dq", "dkv")}


def packed(call: Call) -> tuple[list, list, list, list]:
    """options, mask, bounds and numbers of a call, without lists."""
    mask = call.mask
    return (
        [call.bias, call.alibi_slopes, call.sinks, call.dropout_seed],
        [mask.batch_bounds, mask.lo, mask.hi, mask.key_bits, mask.bits],
        list(mask.bounds),
        [call.scale, call.softcap, call.dropout_p],
    )


def unpacked(q, k, v, options, mask, bounds, numbers, direction: str, name: str) -> Call:
    """The call that went into an op."""
    lowered = LoweredMask(q.shape[2], k.shape[2], tuple(bounds), *mask[:5])
    scale, softcap, dropout_p = numbers
    bias, alibi_slopes, sinks, seed = options
    call = Call(q, k, v, lowered, scale, bias, softcap, alibi_slopes, sinks, dropout_p, seed)
    backend = backends.named(name)
    for kernel, counts, blocks in zip(LISTS_OF[direction], mask[5::2], mask[6::2], strict=False):
        lowered.lists[backend.list_key(call, kernel)] = (counts, blocks)
    return call


def op_lower(lo, hi, len_k, block_m, block_n, transposed):
    from .kernels.pack import build_lists

    return build_lists(lo, hi, len_k, block_m, block_n, transposed)


def op_forward(q, k, v, options, mask, bounds, numbers, backend):
    call = unpacked(q, k, v, options, mask, bounds, numbers, "forward", backend)
    out, lse = backends.named(backend).forward(call)
    return laid_out(out, q, v.shape[3]), lse


def op_backward(dout, dlse, out, lse, q, k, v, options, mask, bounds, numbers, backend):
    call = unpacked(q, k, v, options, mask, bounds, numbers, "backward", backend)
    grads = backends.named(backend).backward(call, out, lse, dout, dlse)
    empty = q.new_empty(0)
    return (
        *(laid_out(g, t, t.shape[3]) for g, t in ((grads.q, q), (grads.k, k), (grads.v, v))),
        empty if grads.bias is None else grads.bias.contiguous(),
        q.new_empty(0) if grads.sinks is None else grads.sinks,
    )


def laid_out(tensor: Tensor, like: Tensor, width: int) -> Tensor:
    """``tensor`` with the strides that the fake implementation promises."""
    promised = backends.empty_like_query(like, width)
    return tensor if tensor.stride() == promised.stride() else promised.copy_(tensor)


for op, implementation in (("lower", op_lower), ("forward", op_forward), ("backward", op_backward)):
    library.impl(op, implementation, "CompositeExplicitAutograd")


@torch.library.register_fake("tilemask::lower")
def fake_lower(lo, hi, len_k, block_m, block_n, transposed):
    batch, heads, len_q = lo.shape
    across = [-(-len_q // block_m), -(-len_k // block_n)]
    blocks, most = reversed(across) if transposed else across
    counts = lo.new_empty((batch, heads, blocks, 2))
    return counts, lo.new_empty((batch, heads, blocks, 2, most))


@torch.library.register_fake("tilemask::forward")
def fake_forward(q, k, v, options, mask, bounds, numbers, backend):
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = q.new_empty(q.shape[:3], dtype=dtype)
    return backends.empty_like_query(q, v.shape[3]), lse


@torch.library.register_fake("tilemask::backward")
def fake_backward(dout, dlse, out, lse, q, k, v, options, mask, bounds, numbers, backend):
    bias, _, sinks, _ = options
    return (
        *(backends.empty_like_query(t, t.shape[3]) for t in (q, k, v)),
        q.new_empty(0) if bias is None else torch.empty_like(bias, memory_format=torch.contiguous_format),
        q.new_empty(0) if sinks is None else torch.empty_like(sinks),
    )


def attend_traced(call: Call, name: str | None) -> tuple[Tensor, Tensor]:
    """As attend(), through the ops."""
    backend = backends.choose(call, name)
    options, mask, bounds, numbers = packed(call)
    forward_mask = mask + lists_of(call, backend, "forward")
    if not (torch.is_grad_enabled() and needs_gradient(call)):
        return torch.ops.tilemask.forward(
            call.q, call.k, call.v, options, forward_mask, bounds, numbers, backend.NAME
        )
    backward_mask = mask + lists_of(call, backend, "backward")
    return TracedAttention.apply(
        call.q, call.k, call.v, *options, len(forward_mask), bounds, numbers, backend.NAME,
        *forward_mask, *backward_mask,
    )


def lists_of(call: Call, backend, direction: str) -> list[Tensor]:
    """counts and blocks of the lists that the op walks, made by tilemask::lower."""
    mask = call.mask
    if mask.lo is None or backend is backends.reference:
        return []
    lists = []
    for kernel in LISTS_OF[direction]:
        key = backend.list_key(call, kernel)
        if key not in mask.lists:
            mask.lists[key] = torch.ops.tilemask.lower(mask.lo, mask.hi, mask.len_k, *key)
        lists += mask.lists[key]
    return lists


class TracedAttention(torch.autograd.Function):
    """As Attention, in terms of the ops, for tracing. Every tensor is an argument of its own."""

    @staticmethod
    def forward(ctx, q, k, v, bias, alibi_slopes, sinks, seed, split, bounds, numbers, name, *masks):
        options = [bias, alibi_slopes, sinks, seed]
        out, lse = torch.ops.tilemask.forward(
            q, k, v, options, list(masks[:split]), bounds, numbers, name
        )
        ctx.save_for_backward(q, k, v, out, lse, *options, *masks[split:])
        ctx.arguments = bounds, numbers, name
        ctx.unused = 4 + len(masks)
        ctx.has_bias, ctx.has_sinks = bias is not None, sinks is not None
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse):
        q, k, v, out, lse, *rest = ctx.saved_tensors
        dq, dk, dv, dbias, dsinks = torch.ops.tilemask.backward(
            dout, dlse, out, lse, q, k, v, rest[:4], rest[4:], *ctx.arguments
        )
        dbias = dbias if ctx.has_bias else None
        dsinks = dsinks if ctx.has_sinks else None
        return (dq, dk, dv, dbias, None, dsinks, None, *(None for _ in range(ctx.unused)))
