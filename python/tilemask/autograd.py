"""How a checked call runs: directly in eager mode, through torch.library ops while tracing.

Eager: the backend is called directly, inside an autograd.Function only if a gradient is needed; the
reference is differentiated by autograd itself. While tracing (torch.compile, torch.export, fake
tensors, dispatch modes) three functional ops stand for the call, ``tilemask::lower``, ``forward``
and ``backward``; the backend is chosen by the same rules, from shapes, dtypes and devices alone,
once for a call, and each of its ops has its name.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import backends
from .backends import Call
from .backends.prepared import Steps, spread
from .lowering import LoweredMask
from .masks import HeldBits

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
        return Attention.apply(call, backend, call.q, call.k, call.v, call.bias, call.sinks)
    return backend.forward(call)[:2]


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
    def forward(ctx, call: Call, backend, q, k, v, bias, sinks):
        out, lse, rest = backend.forward(call)
        ctx.save_for_backward(q, k, v, bias, sinks, out, lse, rest)
        ctx.call = backends.replaced(call, q=None, k=None, v=None, bias=None, sinks=None)
        ctx.backend = backend
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        if dout is None and dlse is None:
            return (None,) * 7
        with torch.no_grad():
            q, k, v, bias, sinks, out, lse, rest = ctx.saved_tensors
            call = backends.replaced(ctx.call, q=q, k=k, v=v, bias=bias, sinks=sinks)
            dout = torch.zeros_like(out) if dout is None else dout
            grads = ctx.backend.backward(
                call, out, lse, rest, dout, dlse, bias_gradient=ctx.needs_input_grad[5]
            )
        if torch.is_grad_enabled():  # create_graph=True: an error if anybody follows the graph
            given = [g.requires_grad_() for g in grads if g is not None]
            delayed = iter(torch._C._functions.DelayedError(TWICE, len(given))(*given))
            grads = [None if g is None else next(delayed) for g in grads]
        return None, None, *grads


# -- the ops --------------------------------------------------------------------------------------
#
# A call travels flat: options = [bias, alibi_slopes, sinks, dropout_seed]; mask = [batch_bounds,
# lo, hi, key_bits, bits, then what the kernels read in place of the last two: live, words, keys,
# transposed words, and counts and blocks of each list the op walks]; bounds = the six ints, then
# block_m, block_n and "transposed" of each list; numbers = [scale, softcap, dropout_p].

library = torch.library.Library("tilemask", "DEF")
library.define("pack(Tensor bits, str backend) -> Tensor")
library.define("transpose(Tensor words, SymInt len_q, SymInt len_k, str backend) -> Tensor")
library.define("live(Tensor?[] parts, SymInt[] bounds, SymInt[] sizes, str backend) -> Tensor")
library.define(
    "lower(Tensor?[] parts, SymInt[] bounds, SymInt[] sizes, int block_m, int block_n,"
    " int transposed, str backend) -> (Tensor counts, Tensor blocks)"
)
library.define(
    "forward(Tensor q, Tensor k, Tensor v, Tensor?[] options, Tensor?[] mask, SymInt[] bounds,"
    " float[] numbers, str backend) -> (Tensor out, Tensor lse, Tensor rest)"
)
library.define(
    "backward(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, Tensor rest, Tensor q, Tensor k,"
    " Tensor v, Tensor?[] options, Tensor?[] mask, SymInt[] bounds, float[] numbers, str backend,"
    " bool bias_gradient) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsinks)"
)

PREPARED = ("live", "words", "keys", "transposed")


def packed(call: Call, backend, direction: str) -> tuple[list, list, list, list]:
    """options, mask, bounds and numbers of a call for the op of a direction."""
    mask = call.mask
    tensors, tiles = [mask.batch_bounds, mask.lo, mask.hi], []
    if backend is backends.reference:
        tensors.append(mask.key_bits)
        tensors.append(None if mask.bits is None else mask.bits.tensor(mask.len_q))
    else:
        backend.prepare(call, direction == "backward", traced_steps(backend.NAME))
        tensors += [None, None, *(mask.prepared.get(name) for name in PREPARED)]
        if direction == "forward":
            tensors[-1] = None
        for key in backend.list_keys(call, direction == "backward"):
            if key in mask.prepared:
                tensors += mask.prepared[key]
                tiles += key
    return (
        [call.bias, call.alibi_slopes, call.sinks, call.dropout_seed],
        tensors,
        [*mask.bounds, *tiles],
        [call.scale, call.softcap, call.dropout_p],
    )


def unpacked(q, k, v, options, mask, bounds, numbers) -> Call:
    """The call that went into an op."""
    bits = None if mask[4] is None else HeldBits(mask[4], q.shape[0])
    lowered = LoweredMask(q.shape[2], k.shape[2], tuple(bounds[:6]), *mask[:4], bits)
    for name, tensor in zip(PREPARED, mask[5:9], strict=False):
        if tensor is not None:
            lowered.prepared[name] = tensor
    lists = zip(bounds[6::3], bounds[7::3], bounds[8::3], mask[9::2], mask[10::2], strict=True)
    for *key, counts, blocks in lists:
        lowered.prepared[tuple(key)] = (counts, blocks)
    scale, softcap, dropout_p = numbers
    bias, alibi_slopes, sinks, seed = options
    return Call(q, k, v, lowered, scale, bias, softcap, alibi_slopes, sinks, dropout_p, seed)


def traced_steps(backend: str) -> Steps:
    """The ops that stand for the steps of a backend."""
    ops = torch.ops.tilemask
    return Steps(
        lambda bits: ops.pack(bits, backend),
        lambda words, len_q, len_k: ops.transpose(words, len_q, len_k, backend),
        lambda parts, bounds, sizes: ops.live(parts, bounds, sizes, backend),
        lambda parts, bounds, sizes, *key: ops.lower(parts, bounds, sizes, *key, backend),
        traced=True,
    )


def op_pack(bits, backend):
    return backends.named(backend).launched().pack(bits)


def op_transpose(words, len_q, len_k, backend):
    return backends.named(backend).launched().transpose(words, len_q, len_k)


def op_live(parts, bounds, sizes, backend):
    return backends.named(backend).launched().live(parts, bounds, sizes)


def op_lower(parts, bounds, sizes, block_m, block_n, transposed, backend):
    steps = backends.named(backend).launched()
    return steps.lower(parts, bounds, sizes, block_m, block_n, transposed)


def op_forward(q, k, v, options, mask, bounds, numbers, backend):
    call = unpacked(q, k, v, options, mask, bounds, numbers)
    out, lse, *rest = backends.named(backend).forward(call)
    rest = q.new_empty(0, dtype=lse.dtype) if not rest or rest[0] is None else rest[0]
    return laid_out(out, q), lse, rest


def op_backward(
    dout, dlse, out, lse, rest, q, k, v, options, mask, bounds, numbers, backend, bias_gradient
):
    call = unpacked(q, k, v, options, mask, bounds, numbers)
    rest = rest if rest.numel() or not lse.numel() else None
    grads = backends.named(backend).backward(call, out, lse, rest, dout, dlse, bias_gradient)
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


for op, implementation in (
    ("pack", op_pack),
    ("transpose", op_transpose),
    ("live", op_live),
    ("lower", op_lower),
    ("forward", op_forward),
    ("backward", op_backward),
):
    library.impl(op, implementation, "CompositeExplicitAutograd")


@torch.library.register_fake("tilemask::pack")
def fake_pack(bits, backend):
    *planes, rows, len_k = bits.shape
    return bits.new_empty((*planes, -(-len_k // 128), rows, 4), dtype=torch.int32)


@torch.library.register_fake("tilemask::transpose")
def fake_transpose(words, len_q, len_k, backend):
    *planes, _, lines, _ = words.shape
    return words.new_empty((*planes, 1 if lines == 1 else -(-len_q // 128), len_k, 4))


@torch.library.register_fake("tilemask::live")
def fake_live(parts, bounds, sizes, backend):
    made = next(t for t in parts if t is not None)
    return made.new_empty((*spread(parts, *sizes[:2]), sizes[2]), dtype=torch.int32)


@torch.library.register_fake("tilemask::lower")
def fake_lower(parts, bounds, sizes, block_m, block_n, transposed, backend):
    shape = spread(parts, *sizes[:2])
    across = [-(-sizes[2] // block_m), -(-sizes[3] // block_n)]
    blocks, most = reversed(across) if transposed else across
    made = next(t for t in parts if t is not None)
    counts = made.new_empty((*shape, blocks, 2), dtype=torch.int32)
    return counts, made.new_empty((*shape, blocks, 2, most), dtype=torch.int32)


@torch.library.register_fake("tilemask::forward")
def fake_forward(q, k, v, options, mask, bounds, numbers, backend):
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = q.new_empty(q.shape[:3], dtype=dtype)
    call = unpacked(q, k, v, options, mask, bounds, numbers)
    has_rest = backend != "reference" and backends.named(backend).has_rest(call)
    rest = torch.empty_like(lse) if has_rest else q.new_empty(0, dtype=dtype)
    return backends.empty_like_query(q, v.shape[3]), lse, rest


@torch.library.register_fake("tilemask::backward")
def fake_backward(
    dout, dlse, out, lse, rest, q, k, v, options, mask, bounds, numbers, backend, bias_gradient
):
    bias, _, sinks, _ = options
    return (
        *(backends.empty_like_query(t, t.shape[3]) for t in (q, k, v)),
        q.new_empty(0)
        if bias is None or not bias_gradient
        else torch.empty_like(bias, memory_format=torch.contiguous_format),
        q.new_empty(0) if sinks is None else torch.empty_like(sinks),
    )


def attend_traced(call: Call, name: str | None) -> tuple[Tensor, Tensor]:
    """As attend(), through the ops."""
    backend = backends.choose(call, name)
    options, mask, bounds, numbers = packed(call, backend, "forward")
    if not (torch.is_grad_enabled() and needs_gradient(call)):
        return torch.ops.tilemask.forward(
            call.q, call.k, call.v, options, mask, bounds, numbers, backend.NAME
        )[:2]
    _, mask_backward, bounds_backward, _ = packed(call, backend, "backward")
    tensors = [call.q, call.k, call.v, *options, *mask]
    split = len(tensors)
    return TracedAttention.apply(
        split, bounds, bounds_backward, numbers, backend.NAME, *distinct(tensors + mask_backward)
    )


def distinct(tensors: list) -> list:
    """The same tensors, none of them twice: Dynamo refuses repeated inputs of a Function."""
    result = []
    for tensor in tensors:
        again = tensor is not None and any(tensor is other for other in result)
        result.append(tensor.view_as(tensor) if again else tensor)
    return result


class TracedAttention(torch.autograd.Function):
    """As Attention, in terms of the ops, for tracing.

    Every tensor is an argument of its own: q, k, v, the four options, the mask of the forward; from
    ``split`` on, the mask of the backward.
    """

    @staticmethod
    def forward(ctx, split, bounds, bounds_backward, numbers, name, q, k, v, *rest):
        options, mask = list(rest[:4]), list(rest[4 : split - 3])
        out, lse, left = torch.ops.tilemask.forward(q, k, v, options, mask, bounds, numbers, name)
        ctx.save_for_backward(out, lse, left, q, k, v, *options, *rest[split - 3 :])
        ctx.arguments = bounds_backward, numbers, name
        ctx.has_bias, ctx.has_sinks = options[0] is not None, options[2] is not None
        ctx.constants = len(rest) - 3  # tensors after bias, alibi_slopes and sinks
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse):
        saved = ctx.saved_tensors
        bias_gradient = ctx.has_bias and ctx.needs_input_grad[8]
        dq, dk, dv, dbias, dsinks = torch.ops.tilemask.backward(
            dout, dlse, *saved[:6], saved[6:10], saved[10:], *ctx.arguments, bias_gradient
        )
        dbias = dbias if bias_gradient else None
        dsinks = dsinks if ctx.has_sinks else None
        constants = (None,) * ctx.constants
        return (None, None, None, None, None, dq, dk, dv, dbias, None, dsinks, *constants)
