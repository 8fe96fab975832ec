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

NAME = "triton"
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
OLDEST = (3, 6)  # of Triton
WIDEST = 256
LONGEST = 1 << 30  # positions are int32 in the kernels
WIDEST_STRIDE = 1 << 23  # offsets inside a tile are int32 too


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
    if call.mask.bits is not None:
        return "the mask needs bits per pair, which the Triton kernels do not read yet"
    if call.mask.key_bits is not None:
        return "the mask has key bits (holes), which the Triton kernels do not read yet"
    for name in ("bias", "alibi_slopes", "sinks"):
        if getattr(call, name) is not None:
            return f"{name} is not in the Triton kernels yet"
    if call.softcap:
        return "softcap is not in the Triton kernels yet"
    if call.dropout_p:
        return "dropout is not in the Triton kernels yet"
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

    arithmetic = precision(call.q.dtype) if call.q.dtype == torch.float32 else "half"
    width = max(call.q.shape[3], call.v.shape[3])
    return tuning.pick(kernel, arithmetic, architecture(call.q.device), width)


def tile(call) -> tuple[int, int]:
    """The forward's tile shape."""
    return config(call, "forward")[:2]


def lists_for(call, kernel: str, tile) -> tuple[Tensor, Tensor] | None:
    """Tile lists that ``kernel`` walks: None for affine masks, else kept with the lowered mask."""
    mask = call.mask
    if mask.lo is None:
        return None
    key = tile.block_m, tile.block_n, kernel == "dkv"
    if key not in mask.lists:
        from ..kernels.pack import build_lists

        mask.lists[key] = build_lists(mask.lo, mask.hi, mask.len_k, *key)
    return mask.lists[key]


def list_key(call, kernel: str) -> tuple[int, int, bool]:
    """What tile lists are kept under: the tile shape, and whether they are transposed."""
    tile = config(call, kernel)
    return tile.block_m, tile.block_n, kernel == "dkv"


def mask_args(mask):
    from ..kernels.masks import MaskArgs

    if mask.lo is None:
        return MaskArgs(mask.batch_bounds, None, None, 0, 0)
    batch, heads, _ = mask.lo.shape
    return MaskArgs(
        mask.batch_bounds, mask.lo, mask.hi, heads if batch > 1 else 0, 1 if heads > 1 else 0
    )


def unit_stride(tensor: Tensor) -> Tensor:
    """The tensor as it is in memory, with last stride 1; copied only if it is not already so."""
    tensor = tensor.resolve_neg()
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def forward(call, visits: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """out [B, Hq, Lq, Dv] in q's dtype and order, lse float32 [B, Hq, Lq]."""
    from ..kernels.forward import forward as launch
    from . import empty_like_query

    q, k, v = unit_stride(call.q), unit_stride(call.k), unit_stride(call.v)
    out = empty_like_query(q, v.shape[3])
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    tile = config(call, "forward")
    with on_device(q):
        launch(
            q,
            k,
            v,
            out,
            lse,
            call.mask.bounds,
            mask_args(call.mask),
            lists_for(call, "forward", tile),
            call.scale,
            precision(q.dtype),
            tile,
            INTERPRETED,
            visits,
        )
    return out, lse


def backward(
    call,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    visits: tuple[Tensor, Tensor] | None = None,
):
    """Gradients of q, k and v, each in the order of its tensor. Deterministic."""
    from ..kernels.backward import backward_dkv, backward_dq
    from . import Gradients, empty_like_query

    q, k, v = unit_stride(call.q), unit_stride(call.k), unit_stride(call.v)
    dout = unit_stride(dout)
    dlse = None if dlse is None else dlse.contiguous()
    dq, dk, dv = (empty_like_query(t, t.shape[3]) for t in (q, k, v))
    delta = torch.empty_like(lse)
    mask, bounds = mask_args(call.mask), call.mask.bounds
    visits_dq, visits_dkv = visits or (None, None)
    tile_dq, tile_dkv = config(call, "dq"), config(call, "dkv")
    with on_device(q):
        backward_dq(
            q,
            k,
            v,
            out,
            dout,
            dq,
            lse,
            dlse,
            delta,
            bounds,
            mask,
            lists_for(call, "dq", tile_dq),
            call.scale,
            precision(q.dtype),
            tile_dq,
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
            delta,
            bounds,
            mask,
            lists_for(call, "dkv", tile_dkv),
            call.scale,
            precision(q.dtype),
            tile_dkv,
            INTERPRETED,
            visits_dkv,
        )
    return Gradients(dq, dk, dv)


def on_device(tensor: Tensor):
    """Triton launches on the current device: make it the tensor's."""
    if tensor.is_cuda:
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()
