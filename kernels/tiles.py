"""How kernels get at tensors: one argument per tensor, one function that loads a tile of rows."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl


class TensorArg(NamedTuple):
    """A tensor [B, H, L, D] with unit last stride, as one kernel argument."""

    ptr: torch.Tensor
    stride_b: int
    stride_h: int
    stride_l: int


def tensor_arg(tensor: torch.Tensor) -> TensorArg:
    stride_b, stride_h, stride_l, _ = tensor.stride()
    return TensorArg(tensor, stride_b, stride_h, stride_l)


@triton.jit
def head_of(tensor, b, h):
    """The [L, D] matrix of batch b and head h: (pointer, row stride). Offsets are 64 bits wide."""
    first = tensor.ptr + b.to(tl.int64) * tensor.stride_b + h.to(tl.int64) * tensor.stride_h
    return first, tensor.stride_l


@triton.jit
def pointers(head, first, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """[ROWS, BLOCK] pointers to rows first .. first + ROWS of a head."""
    start, stride = head
    offsets = tl.arange(0, ROWS)[:, None] * stride + tl.arange(0, BLOCK)[None, :]
    return start + first.to(tl.int64) * stride + offsets


@triton.jit
def load_tile(head, first, inside, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows first .. first + ROWS of a head, [ROWS, BLOCK]; 0 past WIDTH and where not inside
    [ROWS].

    inside=None loads every row: for tiles known to be full.
    """
    where = pointers(head, first, ROWS, BLOCK)
    dims = tl.arange(0, BLOCK)[None, :]
    if inside is None:
        if WIDTH == BLOCK:
            tile = tl.load(where)
        else:
            tile = tl.load(where, mask=dims < WIDTH, other=0.0)
    elif WIDTH == BLOCK:
        tile = tl.load(where, mask=inside[:, None], other=0.0)
    else:
        tile = tl.load(where, mask=inside[:, None] & (dims < WIDTH), other=0.0)
    return tile


@triton.jit
def store_tile(head, first, tile, inside, WIDTH: tl.constexpr):
    """Write tile [ROWS, BLOCK] where inside [ROWS] and below WIDTH, in the tensor's dtype."""
    ROWS: tl.constexpr = tile.shape[0]
    BLOCK: tl.constexpr = tile.shape[1]
    where = pointers(head, first, ROWS, BLOCK)
    dims = tl.arange(0, BLOCK)[None, :]
    tl.store(where, tile.to(head[0].dtype.element_ty), mask=inside[:, None] & (dims < WIDTH))
