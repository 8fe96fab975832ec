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
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

NAME = "triton"
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
OLDEST = (3, 6)  # of Triton
WIDEST = 256
FEW_ROWS = 16  # one tile of rows: see kernels/split.py
LONGEST = 1 << 30  # positions are int32 in the kernels
WIDEST_STRIDE = 1 << 23  # offsets inside a tile are int32 too
STRIP = 1 << 25  # bits per pair computed at a time, before they are packed


def asked_once(function):
    """Cache answers about the machine, also while torch.compile traces."""
    cached = functools.cache(function)

    @torch.compiler.assume_constant_result
    @functools.wraps(function)
    def ask(*arguments):
        return cached(*arguments)

    return ask


@asked_once
def unavailable() -> str | None:
    """Why no call at all can run here; None if some can. Does not start CUDA."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # some builds have no record
        version = importlib.metadata.version("triton")
        if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
            return f"Triton {version} is older than 3.6 (pip install --upgrade triton)"
    if INTERPRETED:
        return None
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if torch.cuda.device_count() == 0:
        return "no NVIDIA GPU is visible"
    return None


@asked_once
def unfit(device: torch.device) -> str | None:
    """Why the kernels cannot run on tensors of this device."""
    if device.type == "cpu" and INTERPRETED:
        return None
    if device.type != "cuda":
        return f"q is on {device.type}; the Triton kernels need an NVIDIA GPU"
    reason = unavailable()
    if reason is None and architecture(device) < 80:
        major, minor = divmod(architecture(device), 10)
        reason = f"{device} has compute capability {major}.{minor}; the kernels need 8.0 or newer"
    return reason


@asked_once
def architecture(device: torch.device) -> int:
    """Compute capability times ten; 80 for the interpreter."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


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
    if torch._C._functorch.maybe_current_level() is not None:
        return "a torch.func transform (vmap, grad, ...) is active, which sees through PyTorch only"
    if q.dtype not in DTYPES:
        return f"the Triton kernels compute float16, bfloat16 and float32, not {q.dtype}"
    if q.shape[3] > WIDEST or v.shape[3] > WIDEST:
        return f"head widths go up to {WIDEST}, got D = {q.shape[3]} and Dv = {v.shape[3]}"
    if max(q.shape[2], k.shape[2]) >= LONGEST:
        return f"lengths go up to {LONGEST - 1}, got Lq = {q.shape[2]} and Lk = {k.shape[2]}"
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


# -- what the kernels read of a mask --------------------------------------------------------------


class Steps(NamedTuple):
    """The functions of tilemask.kernels.pack, or the ops that stand for them while tracing."""

    pack: Callable
    transpose: Callable
    live: Callable
    lower: Callable
    traced: bool = False


@functools.cache
def launched() -> Steps:
    from ..kernels import pack

    return Steps(pack.pack_bits, pack.transpose_words, pack.live_rows, pack.build_lists)


def sizes_of(call) -> list[int]:
    return [call.q.shape[0], call.q.shape[1], call.mask.len_q, call.mask.len_k]


def words_of(mask, steps: Steps) -> Tensor | None:
    """Packed bits per pair; None if the mask has none."""
    if mask.bits is None:
        return mask.prepared.get("words")
    return mask.prepared.make("words", lambda: packed(mask.bits, mask.len_q, steps))


def packed(bits, len_q: int, steps: Steps) -> Tensor:
    """The words of PairBits. Computed bits are packed strip by strip: never all there at once."""
    batch, heads, rows, len_k = bits.shape
    if bits.view is not None or steps.traced:
        return steps.pack(bits.tensor(len_q))
    strip = max(64, STRIP // max(1, batch * heads * len_k) // 64 * 64)
    if strip >= rows:
        return steps.pack(bits.rows(0, len_q)[:, None])
    words = None
    for first in range(0, rows, strip):
        part = bits.rows(first, strip)[:, None]
        if words is None:
            shape = (batch, 1, heads, -(-len_k // 128), rows, 4)
            words = torch.empty(shape, dtype=torch.int32, device=part.device)
        steps.pack(part, words, first)
    return words


def keys_of(mask, steps: Steps) -> Tensor | None:
    """Packed key bits; None if the mask has none."""
    if mask.key_bits is None:
        return mask.prepared.get("keys")
    return mask.prepared.make("keys", lambda: steps.pack(mask.key_bits[:, None]))


def mask_parts(call, steps: Steps, transposed: bool = False) -> list[Tensor | None]:
    """The tensors that kernels.masks.mask_args takes, made where they are not kept."""
    mask = call.mask
    words, keys = words_of(mask, steps), keys_of(mask, steps)
    parts = [mask.batch_bounds, mask.lo, mask.hi, None, words, keys]
    if words is not None or keys is not None:
        made = list(parts)
        parts[3] = mask.prepared.make(
            "live", lambda: steps.live(made, list(mask.bounds), sizes_of(call))
        )
    if transposed and words is not None:
        parts[4] = mask.prepared.make(
            "transposed", lambda: steps.transpose(words, mask.len_q, mask.len_k)
        )
    return parts


def has_bits(mask) -> bool:
    """Whether a mask has words or key words, or will have."""
    return mask.bits is not None or mask.key_bits is not None or "live" in mask.prepared


def lists_for(call, kernel: str, steps: Steps) -> tuple[Tensor, Tensor] | None:
    """Tile lists that ``kernel`` walks: None for affine masks."""
    mask = call.mask
    if mask.lo is None and not has_bits(mask):
        return None
    key = list_key(call, kernel)
    parts = mask_parts(call, steps)
    return mask.prepared.make(
        key, lambda: steps.lower(parts, list(mask.bounds), sizes_of(call), *key)
    )


def list_key(call, kernel: str) -> tuple[int, int, bool]:
    """What tile lists are kept under: the tile shape, and whether they are transposed."""
    tile = config(call, kernel)
    return tile.block_m, tile.block_n, kernel == "dkv"


def prepare(call, backward: bool, steps: Steps | None = None) -> None:
    """Make and keep all that the kernels read of the call's mask."""
    if steps is None:  # for masks.prepare()
        with on_device(call.q):
            return prepare(call, backward, launched())
    for kernel in ("forward", "dq", "dkv") if backward else ("forward",):
        lists_for(call, kernel, steps)
    mask_parts(call, steps, transposed=backward)


def mask_of(call, transposed: bool = False):
    """MaskArgs of a call."""
    from ..kernels.masks import mask_args

    return mask_args(mask_parts(call, launched(), transposed), call.q.shape[0], transposed)


def score_of(call):
    """ScoreArgs of a call."""
    from ..kernels.scores import ScoreArgs, score_args

    if is_plain(call):
        return ScoreArgs()
    return score_args(
        call.softcap,
        call.bias,
        call.alibi_slopes,
        call.sinks,
        call.dropout_p,
        call.dropout_seed,
        call.q.shape[0],
    )


def is_plain(call) -> bool:
    tensors = (call.bias, call.alibi_slopes, call.sinks)
    return not (call.softcap or call.dropout_p or any(t is not None for t in tensors))


def unit_stride(tensor: Tensor) -> Tensor:
    """The tensor as it is in memory, with last stride 1; copied only if it is not already so."""
    tensor = tensor.resolve_neg()
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def forward(call, visits: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """out [B, Hq, Lq, Dv] in q's dtype and order, lse float32 [B, Hq, Lq], and what the backward
    needs beside it: ``rest``, float32 [B, Hq, Lq], in some calls.
    """
    from ..kernels.forward import forward as launch
    from . import empty_like_query

    q, k, v = unit_stride(call.q), unit_stride(call.k), unit_stride(call.v)
    out = empty_like_query(q, v.shape[3])
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    rest = torch.empty_like(lse) if has_rest(call) else None
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
            lists_for(call, "forward", launched()),
            score_of(call),
            call.scale,
            precision(q.dtype),
            tile,
            INTERPRETED,
            **options,
        )
    return out, lse, rest


def is_decoding(call) -> bool:
    """Whether rows are so few that their keys are split over programs."""
    return call.q.shape[2] <= FEW_ROWS


def folds(call) -> bool:
    """Whether query heads that share a key head become rows of one tile: where each has one row,
    and nothing but q tells them apart. K and V are then read once for all of them."""
    mask = call.mask
    alike = call.bias is None and call.alibi_slopes is None and call.sinks is None
    alike = alike and not call.dropout_p and mask.lo is None and not has_bits(mask)
    return bool(alike and call.q.shape[2] == 1 and call.q.shape[1] > call.k.shape[1])


def folded(tensor: Tensor | None, kv_heads: int) -> Tensor | None:
    """[B, Hq, 1, ...] as a view [B, Hkv, Hq / Hkv, ...]."""
    return None if tensor is None else tensor.unflatten(1, (kv_heads, -1)).squeeze(3)


def has_rest(call) -> bool:
    """Whether lse alone is too coarse, or (with sinks) does not tell rows that see nothing."""
    return call.bias is not None or call.sinks is not None or call.q.dtype == torch.float32


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
    from . import Gradients, empty_like_query

    q, k, v = unit_stride(call.q), unit_stride(call.k), unit_stride(call.v)
    dout = unit_stride(dout)
    dlse = None if dlse is None else dlse.contiguous()
    dq, dk, dv = (empty_like_query(t, t.shape[3]) for t in (q, k, v))
    delta = torch.empty_like(lse)
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
            lists_for(call, "dq", launched()),
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
            lists_for(call, "dkv", launched()),
            options,
            call.scale,
            precision(q.dtype),
            config(call, "dkv"),
            INTERPRETED,
            visits_dkv,
        )
        dbias = dsinks = None
        if call.bias is not None and bias_gradient:
            dbias = pair_sums(call, lse, rest, call.bias.shape, call.bias.dtype, dout, delta)
        if call.sinks is not None:
            dsinks = sink_gradient(call.sinks, lse, delta)
    return Gradients(dq, dk, dv, dbias, dsinks)


def sink_gradient(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """d loss / d sinks [Hq]: the sink is a key whose value is 0, so its ds is -p * delta."""
    p = torch.exp(sinks.float()[:, None] - lse).masked_fill(lse == float("-inf"), 0)
    return -(p * delta).sum((0, 2)).to(sinks.dtype)


def weights(call, reduce: str | None) -> Tensor:
    """Probabilities, or their sums: see attention_weights()."""
    from . import replaced

    batch, heads, len_q, _ = call.q.shape
    _, lse, rest = forward(replaced(call, dropout_p=0.0))
    rows = 1 if reduce == "sum_queries" else len_q
    shape = (batch, 1, 1 if reduce == "mean_heads" else heads, rows, call.k.shape[2])
    factor = 1 / max(1, heads) if reduce == "mean_heads" else 1.0
    with on_device(call.q):
        sums = pair_sums(call, lse, rest, shape, call.q.dtype, weight=factor)[:, 0]
    if reduce is None:
        return sums
    return sums.squeeze(1 if reduce == "mean_heads" else 2)


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
