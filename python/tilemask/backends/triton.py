"""The Triton kernels: what they can run, and how a call is laid out for them.

The kernels themselves are in tilemask.kernels, which is imported when the first call needs it. With
TRITON_INTERPRET=1 in the environment they run on CPU tensors, slowly, for tests.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import os

import torch
from torch import Tensor

from . import prepared
from .prepared import (
    Steps,
    architecture,
    asked_once,
    folded,
    folds,
    has_bits,
    has_rest,
    is_decoding,
    is_plain,
    mask_fields,
    mask_parts,
    score_fields,
    spread,
    unit_stride,
)

NAME = "triton"
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
OLDEST = (3, 6)  # of Triton
WIDEST_STRIDE = 1 << 23  # offsets inside a tile are int32


@asked_once
def unavailable() -> str | None:
    """Why no call at all can run here; None if some can. Does not start CUDA."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # some builds have no record
        version = importlib.metadata.version("triton")
        if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
            return f"Triton {version} is older than 3.6 (pip install --upgrade triton)"
    return None if INTERPRETED else prepared.no_gpu()


@asked_once
def unfit(device: torch.device) -> str | None:
    """Why the kernels cannot run on tensors of this device."""
    if device.type == "cpu" and INTERPRETED:
        return None
    if device.type != "cuda":
        return f"q is on {device.type}; the Triton kernels need an NVIDIA GPU"
    return unavailable() or prepared.too_old(device)


@asked_once
def multiprocessors(device: torch.device) -> int:
    """How many the GPU has; 8 for the interpreter."""
    if device.type != "cuda":
        return 8
    return torch.cuda.get_device_properties(device).multi_processor_count


def why_not(call) -> str | None:
    q, k, v = call.q, call.k, call.v
    reason = unfit(q.device)
    if reason is not None:
        return reason
    if q.dtype not in DTYPES:
        return f"the Triton kernels compute float16, bfloat16 and float32, not {q.dtype}"
    reason = prepared.too_large(call)
    if reason is not None:
        return reason
    if max(q.stride(2), k.stride(2), v.stride(2)) >= WIDEST_STRIDE:
        return f"a row stride of q, k or v is {WIDEST_STRIDE} elements or more"
    if call.bias is not None and max(call.bias.stride()[3:]) >= WIDEST_STRIDE:
        return f"a row or column stride of bias is {WIDEST_STRIDE} elements or more"
    return None


@torch.compiler.assume_constant_result  # while tracing it only chooses a tile shape
def precision(dtype: torch.dtype) -> str:
    """How float32 products are computed: "tf32" where torch is set to it, else "ieee"."""
    if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee"


def config(call, kernel: str):
    """The tile shape that ``kernel`` ("forward", "dq" or "dkv") runs this call with."""
    from ..kernels import tuning

    if kernel == "forward" and is_decoding(call):
        kernel = "decode"
    arithmetic = precision(call.q.dtype) if call.q.dtype == torch.float32 else "half"
    width = max(call.q.shape[3], call.v.shape[3])
    heavy = has_bits(call.mask) or not is_plain(call)
    return tuning.pick(kernel, arithmetic, architecture(call.q.device), width, heavy)


def tile(call) -> tuple[int, int]:
    """The forward's tile shape."""
    return config(call, "forward")[:2]


# -- what the kernels read ------------------------------------------------------------------------


@functools.cache
def launched() -> Steps:
    """What makes words and lists, by kernels that are launched at once."""
    from ..kernels import pack

    return Steps(pack.pack_bits, pack.transpose_words, live_rows, build_lists)


def live_rows(parts, bounds, sizes) -> Tensor:
    from ..kernels import pack
    from ..kernels.masks import MaskArgs

    batch, heads, len_q, len_k = sizes
    mask = MaskArgs(**mask_fields(parts, batch))
    return pack.live_rows(mask, bounds, spread(parts, batch, heads), len_q, len_k)


def build_lists(parts, bounds, sizes, block_m: int, block_n: int, transposed: int):
    from ..kernels import pack
    from ..kernels.masks import MaskArgs

    batch, heads, len_q, len_k = sizes
    mask, planes = MaskArgs(**mask_fields(parts, batch)), spread(parts, batch, heads)
    tile = block_m, block_n
    return pack.build_lists(mask, bounds, planes, len_q, len_k, *tile, transposed=bool(transposed))


def list_key(call, kernel: str) -> tuple[int, int, int]:
    """What the tile lists of a kernel are kept under: see prepared.lists_for."""
    tile = config(call, kernel)
    return tile.block_m, tile.block_n, int(kernel == "dkv")


def list_keys(call, backward: bool) -> list[tuple[int, int, int]]:
    """The same of all lists that a forward or a backward walks."""
    return [list_key(call, kernel) for kernel in (("dq", "dkv") if backward else ("forward",))]


def prepare(call, backward: bool, steps: Steps | None = None) -> None:
    """Make and keep all that the kernels read of the call's mask."""
    if steps is None:  # for masks.prepare()
        with on_device(call.q):
            return prepare(call, backward, launched())
    keys = list_keys(call, False) + (list_keys(call, True) if backward else [])
    prepared.prepare(call, keys, backward, steps)


def mask_of(call, transposed: bool = False):
    """MaskArgs of a call."""
    from ..kernels.masks import MaskArgs

    parts = mask_parts(call, launched(), transposed)
    return MaskArgs(**mask_fields(parts, call.q.shape[0], transposed))


def lists_of(call, kernel: str):
    """ListArgs of a call."""
    from ..kernels.masks import ListArgs

    lists = prepared.lists_for(call, list_key(call, kernel), launched())
    return ListArgs() if lists is None else ListArgs(*lists, *prepared.head_steps(lists[0]))


def score_of(call):
    """ScoreArgs of a call."""
    from ..kernels.scores import ScoreArgs

    return ScoreArgs(**score_fields(call))


def forward(call, visits: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """out [B, Hq, Lq, Dv] in q's dtype and order, lse float32 [B, Hq, Lq], and what the backward
    needs beside it: ``rest``, float32 [B, Hq, Lq], in some calls.
    """
    from ..kernels.forward import forward as launch

    q, k, v = unit_stride(call.q), unit_stride(call.k), unit_stride(call.v)
    out, lse, rest = prepared.new_results(q, v.shape[3], has_rest(call))
    tile = config(call, "forward")
    options = {"visits": visits, "folded": visits is None and folds(call)}
    results = [q, out, lse, rest]
    if options["folded"]:
        results = [folded(t, k.shape[1]) for t in results]
    q_rows, out_rows, lse_rows, rest_rows = results
    if is_decoding(call) and visits is None:
        from ..kernels import split

        rows = -(-q_rows.shape[2] // tile.block_m) * q_rows.shape[0] * q_rows.shape[1]
        tiles = -(-k.shape[2] // tile.block_n)
        options["splits"] = split.count(rows, tiles, multiprocessors(q.device))
        if options["splits"] > 1:
            launch = split.forward_split
    with on_device(q):
        launch(
            q_rows,
            k,
            v,
            out_rows,
            lse_rows,
            rest_rows,
            call.mask.bounds,
            mask_of(call),
            lists_of(call, "forward"),
            score_of(call),
            call.scale,
            precision(q.dtype),
            tile,
            INTERPRETED,
            **options,
        )
    return out, lse, rest


def backward(
    call,
    out: Tensor,
    lse: Tensor,
    rest: Tensor | None,
    dout: Tensor,
    dlse: Tensor | None,
    bias_gradient: bool = True,
    visits: tuple[Tensor, Tensor] | None = None,
):
    """Gradients of q, k and v, each in the order of its tensor, of sinks, and of the bias if it is
    asked for. Deterministic."""
    from ..kernels.backward import backward_dkv, backward_dq
    from . import Gradients

    q, k, v = unit_stride(call.q), unit_stride(call.k), unit_stride(call.v)
    dout = unit_stride(dout)
    dlse = None if dlse is None else dlse.contiguous()
    dq, dk, dv, delta = prepared.new_gradients(q, k, v, lse)
    bounds, options = call.mask.bounds, score_of(call)
    visits_dq, visits_dkv = visits or (None, None)
    with on_device(q):
        backward_dq(
            q,
            k,
            v,
            out,
            dout,
            dq,
            lse,
            rest,
            dlse,
            delta,
            bounds,
            mask_of(call),
            lists_of(call, "dq"),
            options,
            call.scale,
            precision(q.dtype),
            config(call, "dq"),
            INTERPRETED,
            visits_dq,
        )
        backward_dkv(
            q,
            k,
            v,
            dout,
            dk,
            dv,
            lse,
            rest,
            delta,
            bounds,
            mask_of(call, transposed=True),
            lists_of(call, "dkv"),
            options,
            call.scale,
            precision(q.dtype),
            config(call, "dkv"),
            INTERPRETED,
            visits_dkv,
        )
    more = prepared.option_gradients(call, lse, rest, dout, delta, bias_gradient, pair_sums)
    return Gradients(dq, dk, dv, *more)


def weights(call, reduce: str | None) -> Tensor:
    """Probabilities, or their sums: see attention_weights()."""
    return prepared.weights(call, reduce, forward, pair_sums)


def pair_sums(
    call,
    lse: Tensor,
    rest: Tensor | None,
    shape,
    dtype: torch.dtype,
    dout: Tensor | None = None,
    delta: Tensor | None = None,
    weight: float = 1.0,
) -> Tensor:
    """Launch kernels.sums.pair_sums on a call: of p, or with dout and delta of ds."""
    from ..kernels.sums import pair_sums as launch

    with on_device(call.q):
        return launch(
            unit_stride(call.q),
            unit_stride(call.k),
            None if dout is None else unit_stride(call.v),
            None if dout is None else unit_stride(dout),
            lse,
            rest,
            delta,
            tuple(shape),
            dtype,
            call.mask.bounds,
            mask_of(call),
            score_of(call),
            call.scale,
            weight,
            precision(call.q.dtype),
            config(call, "sums"),
            INTERPRETED,
        )


def on_device(tensor: Tensor):
    """Triton launches on the current device: make it the tensor's."""
    if tensor.is_cuda:
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()
