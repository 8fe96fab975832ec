"""How a checked call runs: directly in eager mode, through torch.library ops while tracing.

Eager: the backend is called directly, inside an autograd.Function only if a gradient is needed; the
reference is differentiated by autograd itself. While tracing (torch.compile, torch.export, fake
tensors, dispatch modes) three functional ops stand for the call, ``tilemask::lower``, ``forward``
and ``backward``; the backend is chosen by the same rules, from shapes, dtypes and devices alone.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import backends
from .backends import Call
from .lowering import LoweredMask

TWICE = (
    b"differentiating through the backward of a tilemask kernel: only the reference is "
    b'differentiable twice, call attention(..., backend="reference")'
)


def attend(call: Call, name: str | None = None) -> tuple[Tensor, Tensor]:
    """out and lse of a checked call, differentiable where autograd is on."""
    if is_traced(call.q, call.k, call.v):
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


def is_traced(*tensors: Tensor) -> bool:
    """Whether somebody other than the GPU watches: then the ops stand for the call."""
    if torch.compiler.is_compiling():
        return True
    plain = all(type(t) is Tensor or type(t) is torch.nn.Parameter for t in tensors)
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
    def backward(ctx, dout, dlse):
        if dout is None and dlse is None:
            return None, None, None, None, None
        with torch.no_grad():
            q, k, v, out, lse = ctx.saved_tensors
            call = backends.replaced(ctx.call, q=q, k=k, v=v)
            dout = torch.zeros_like(out) if dout is None else dout
            grads = ctx.backend.backward(call, out, lse, dout, dlse)[:3]
        if torch.is_grad_enabled():  # create_graph=True: an error if anybody follows the graph
            grads = (g.requires_grad_() for g in grads)
            grads = torch._C._functions.DelayedError(TWICE, 3)(*grads)
        return None, None, *grads


# -- the ops --------------------------------------------------------------------------------------
#
# A call travels flat: options = [bias, alibi_slopes, sinks, dropout_seed]; mask = [batch_bounds,
# lo, hi, key_bits, bits, then counts and blocks of each list the op walks]; bounds = the six ints,
# then block_m and block_n of each list; numbers = [scale, softcap, dropout_p].

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


def unpacked(q, k, v, options, mask, bounds, numbers, direction: str) -> Call:
    """The call that went into an op."""
    lowered = LoweredMask(q.shape[2], k.shape[2], tuple(bounds[:6]), *mask[:5])
    scale, softcap, dropout_p = numbers
    bias, alibi_slopes, sinks, seed = options
    lists = zip(
        LISTS_OF[direction], bounds[6::2], bounds[7::2], mask[5::2], mask[6::2], strict=False
    )
    for kernel, block_m, block_n, counts, blocks in lists:
        lowered.lists[block_m, block_n, kernel == "dkv"] = (counts, blocks)
    return Call(q, k, v, lowered, scale, bias, softcap, alibi_slopes, sinks, dropout_p, seed)


def op_lower(lo, hi, len_k, block_m, block_n, transposed):
    from .kernels.pack import build_lists

    return build_lists(lo, hi, len_k, block_m, block_n, transposed)


def op_forward(q, k, v, options, mask, bounds, numbers, backend):
    call = unpacked(q, k, v, options, mask, bounds, numbers, "forward")
    out, lse = backends.named(backend).forward(call)
    return laid_out(out, q), lse


def op_backward(dout, dlse, out, lse, q, k, v, options, mask, bounds, numbers, backend):
    call = unpacked(q, k, v, options, mask, bounds, numbers, "backward")
    grads = backends.named(backend).backward(call, out, lse, dout, dlse)
    return (
        *(laid_out(g, t) for g, t in ((grads.q, q), (grads.k, k), (grads.v, v))),
        q.new_empty(0) if grads.bias is None else grads.bias.contiguous(),
        q.new_empty(0) if grads.sinks is None else grads.sinks,
    )


def laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    """``tensor`` in the memory order that the fake promises, as a kernel's result already is."""
    if backends.heads_inside_rows(like):
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    return tensor.contiguous()


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
        q.new_empty(0)
        if bias is None
        else torch.empty_like(bias, memory_format=torch.contiguous_format),
        q.new_empty(0) if sinks is None else torch.empty_like(sinks),
    )


def attend_traced(call: Call, name: str | None) -> tuple[Tensor, Tensor]:
    """As attend(), through the ops."""
    backend = backends.choose(call, name)
    options, mask, bounds, numbers = packed(call)
    tiles, lists = lists_of(call, backend, "forward")
    bounds_forward = bounds + tiles
    if not (torch.is_grad_enabled() and needs_gradient(call)):
        return torch.ops.tilemask.forward(
            call.q, call.k, call.v, options, mask + lists, bounds_forward, numbers, backend.NAME
        )
    tensors = [call.q, call.k, call.v, *options, *mask, *lists]
    split = len(tensors)
    tiles, lists = lists_of(call, backend, "backward")
    return TracedAttention.apply(
        split, bounds_forward, bounds + tiles, numbers, backend.NAME, *distinct(tensors + lists)
    )


def distinct(tensors: list) -> list:
    """The same tensors, none of them twice: Dynamo refuses repeated inputs of a Function."""
    result = []
    for tensor in tensors:
        again = tensor is not None and any(tensor is other for other in result)
        result.append(tensor.view_as(tensor) if again else tensor)
    return result


def lists_of(call: Call, backend, direction: str) -> tuple[list[int], list[Tensor]]:
    """Tile shapes, and counts and blocks, of the lists that the op walks, made by
    tilemask::lower."""
    mask = call.mask
    tiles, lists = [], []
    if mask.lo is None or backend is backends.reference:
        return tiles, lists
    for kernel in LISTS_OF[direction]:
        key = backend.list_key(call, kernel)
        if key not in mask.lists:
            mask.lists[key] = torch.ops.tilemask.lower(mask.lo, mask.hi, mask.len_k, *key)
        tiles += key[:2]
        lists += mask.lists[key]
    return tiles, lists


class TracedAttention(torch.autograd.Function):
    """As Attention, in terms of the ops, for tracing.

    Every tensor is an argument of its own: q, k, v, the four options, the five of the mask, and the
    lists of the forward; from ``split`` on, the lists of the backward.
    """

    @staticmethod
    def forward(ctx, split, bounds, bounds_backward, numbers, name, q, k, v, *rest):
        options, mask = list(rest[:4]), list(rest[4 : split - 3])
        out, lse = torch.ops.tilemask.forward(q, k, v, options, mask, bounds, numbers, name)
        ctx.save_for_backward(out, lse, q, k, v, *options, *rest[4:9], *rest[split - 3 :])
        ctx.arguments = bounds_backward, numbers, name
        ctx.has_bias, ctx.has_sinks = options[0] is not None, options[2] is not None
        ctx.constants = len(rest) - 3  # tensors after bias, alibi_slopes and sinks
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse):
        saved = ctx.saved_tensors
        dq, dk, dv, dbias, dsinks = torch.ops.tilemask.backward(
            dout, dlse, *saved[:5], saved[5:9], saved[9:], *ctx.arguments
        )
        dbias = dbias if ctx.has_bias else None
        dsinks = dsinks if ctx.has_sinks else None
        constants = (None,) * ctx.constants
        return (None, None, None, None, None, dq, dk, dv, dbias, None, dsinks, *constants)
