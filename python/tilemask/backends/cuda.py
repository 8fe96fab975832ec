"""The CUDA library: what it can run, and how a call becomes one struct of its C interface.

csrc/tilemask.h is the interface, tilemask.library finds and loads the library. Every entry takes
the address of one struct; here a struct is packed from numbers, in the order of its fields.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import struct

import torch
from torch import Tensor

from .. import library
from ..lowering import stream_id
from . import prepared
from .prepared import (
    Steps,
    asked_once,
    folded,
    folds,
    has_rest,
    is_decoding,
    mask_fields,
    mask_parts,
    score_fields,
    unit_stride,
)

NAME = "cuda"
DTYPES = {torch.float16: 1, torch.bfloat16: 2, torch.float32: 3}  # float32: of bias and sums alone
LEAST_SCALE = 1e-30  # of csrc/backward.cuh
LARGEST = torch.finfo(torch.float32).max  # what scale and softcap may be there
KERNELS = {"forward": 0, "decode": 1, "dq": 2, "dkv": 3, "dqkv": 4}


# -- what it can run ------------------------------------------------------------------------------


@asked_once
def unavailable() -> str | None:
    """Why no call at all can run here; None if some can. Does not start CUDA."""
    return library.unavailable() or prepared.no_gpu()


@asked_once
def unfit(device: torch.device) -> str | None:
    """Why the kernels cannot run on tensors of this device."""
    if device.type != "cuda":
        return f"q is on {device.type}; the CUDA kernels need an NVIDIA GPU"
    return unavailable() or prepared.too_old(device) or library.unfit(device.index)


def why_not(call) -> str | None:
    reason = unfit(call.q.device)
    if reason is not None:
        return reason
    if call.q.dtype not in (torch.float16, torch.bfloat16):
        return f"the CUDA kernels compute float16 and bfloat16, not {call.q.dtype}"
    return prepared.too_large(call)


# Which backend runs what both GPU backends can: by calls (see calls_of) and the row of the GPU in
# kernels/tuning.py, for widths up to 64, 128 and 256, the larger of D and Dv. No GPU has measured
# this: it rests on the instructions that the two use, and on how many (docs/backends.md).
PREFERRED = {
    ("decode", 80): ("cuda", "cuda", "cuda"),
    ("decode", 86): ("cuda", "cuda", "cuda"),
    ("decode", 90): ("cuda", "cuda", "cuda"),
    ("decode", 100): ("cuda", "cuda", "cuda"),
    ("plain", 80): ("cuda", "cuda", "cuda"),
    ("plain", 86): ("cuda", "cuda", "cuda"),
    ("plain", 90): ("triton", "triton", "triton"),
    ("plain", 100): ("triton", "triton", "triton"),
    ("options", 80): ("triton", "cuda", "cuda"),
    ("options", 86): ("triton", "triton", "cuda"),
    ("options", 90): ("triton", "triton", "triton"),
    ("options", 100): ("triton", "triton", "triton"),
}
WIDER = {90: "wgmma", 100: "tcgen05"}  # than mma.sync, which the library multiplies with


def preferred(call) -> tuple[str, str]:
    """Which of "cuda" and "triton" runs a call that both can, and why."""
    calls, row = calls_of(call), row_of(call.q.device)
    width = max(call.q.shape[3], call.v.shape[3])
    name = PREFERRED[calls, row][0 if width <= 64 else 1 if width <= 128 else 2]
    if calls == "decode":
        why = f"up to {prepared.FEW_ROWS} rows both multiply with mma.sync; it is compiled already"
    elif row in WIDER:
        why = f"it multiplies with {WIDER[row]} on this GPU, the CUDA library with mma.sync"
    elif name == "triton":
        why = "it compiles a kernel for the options of a call, with fewer instructions per score"
    else:
        why = "it is compiled already, and needs about as many instructions per score, or fewer"
    return name, why


def calls_of(call) -> str:
    """The calls of PREFERRED: "decode" for few rows, "plain" where scores are scaled products, and
    "options"."""
    if is_decoding(call):
        return "decode"
    bent = call.softcap or call.dropout_p or call.bias is not None or call.alibi_slopes is not None
    return "options" if bent else "plain"


@asked_once
def row_of(device: torch.device) -> int:
    """The row of a GPU in kernels/tuning.py."""
    from ..kernels import tuning

    return tuning.row_of(prepared.architecture(device))


# -- the structs of csrc/tilemask.h ---------------------------------------------------------------


class Layout(struct.Struct):
    """A struct of the header, by its fields in order: the letter of a type for the struct module,
    or the fields of a struct inside it."""

    def __init__(self, name: str, **fields: str | dict):
        self.name = name
        self.fields = dict(flattened(fields))  # "q.row": "q"
        counts = [int(kind[:-1] or 1) for kind in self.fields.values()]
        starts = itertools.accumulate(counts, initial=0)
        self.at = dict(zip(self.fields, starts))  # "q.row": its place among the values of pack()
        super().__init__("@" + "".join(self.fields.values()))


def flattened(fields: dict, prefix: str = ""):
    for name, kind in fields.items():
        if isinstance(kind, dict):
            yield from flattened(kind, f"{prefix}{name}.")
        else:
            yield prefix + name, kind


def all_of(kind: str, names: str) -> dict:
    """Fields of one type."""
    return dict.fromkeys(names.split(), kind)


HEAD = {**all_of("I", "size abi"), **all_of("i", "device dtype"), "stream": "P"}
TENSOR = {"data": "P", **all_of("q", "batch head row")}
MASK = {
    **all_of("P", "batch_bounds lo hi live words keys"),
    **all_of("q", "interval_batch interval_head live_batch live_head"),
    **all_of("q", "words_outer words_inner words_head words_group words_line keys_batch"),
    "bounds": "6i",
    **all_of("i", "words_split reserved"),
}
LISTS = {
    **all_of("P", "counts blocks"),
    **all_of("q", "batch head"),
    **all_of("i", "block_m block_n"),
}
SCORE = {
    "bias": "P",
    **all_of("q", "bias_outer bias_inner bias_head bias_row bias_col"),
    "slopes": "P",
    "slopes_batch": "q",
    **all_of("P", "sinks seed"),
    **all_of("i", "bias_dtype bias_split"),
    **all_of("f", "softcap keep_factor"),
    "threshold": "I",
    "reserved": "i",
}
SIZES = {**all_of("i", "batch heads kv_heads len_q len_k width width_v"), "scale": "f"}
WORKSPACE = {"workspace": "P", "workspace_size": "q"}

FORWARD = Layout(
    "TilemaskForward",
    head=HEAD,
    **dict.fromkeys(("q", "k", "v", "out"), TENSOR),
    **all_of("P", "lse rest visits"),
    **WORKSPACE,
    mask=MASK,
    lists=LISTS,
    score=SCORE,
    sizes=SIZES,
    **all_of("i", "folded reserved"),
)
BACKWARD = Layout(
    "TilemaskBackward",
    head=HEAD,
    **dict.fromkeys(("q", "k", "v", "out", "dout", "dq", "dk", "dv"), TENSOR),
    **all_of("P", "lse rest dlse delta visits_dq visits_dkv visits_dqkv"),
    **WORKSPACE,
    mask=MASK,
    mask_transposed=MASK,
    lists=LISTS,
    lists_transposed=LISTS,
    score=SCORE,
    sizes=SIZES,
)
SUMS = Layout(
    "TilemaskSums",
    head=HEAD,
    **dict.fromkeys(("q", "k", "v", "dout"), TENSOR),
    **all_of("P", "lse rest delta sums"),
    **WORKSPACE,
    mask=MASK,
    score=SCORE,
    sizes=SIZES,
    **all_of("i", "outer inner outer_kept inner_kept heads_kept rows_kept cols_kept sums_dtype"),
    weight="f",
    reserved="i",
)
PACK = Layout(
    "TilemaskPack",
    head=HEAD,
    bits="P",
    **all_of("q", "bits_outer bits_inner bits_head bits_row bits_col"),
    words="P",
    **all_of("i", "outer inner heads rows len_k first_row all_rows reserved"),
)
TRANSPOSE = Layout(
    "TilemaskTranspose",
    head=HEAD,
    **all_of("P", "words transposed"),
    **all_of("i", "planes groups lines len_k groups_out reserved"),
)
LOWER = Layout(
    "TilemaskLower",
    head=HEAD,
    mask=MASK,
    **all_of("P", "live classes counts blocks"),
    **all_of("i", "batch heads len_q len_k block_m block_n transposed reserved"),
)


def pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def head_values(layout: Layout, tensor: Tensor) -> tuple:
    """HEAD of a call on the tensor's device and its current stream."""
    device = tensor.device
    kind = DTYPES.get(tensor.dtype, 0)
    return layout.size, library.ABI, device.index or 0, kind, stream_id(device)


def tensor_values(tensor: Tensor) -> tuple:
    """TENSOR of [B, H, L, D]; the stride of a dimension of one is 0, not what it happens to be."""
    strides = tensor.stride()[:3]
    if (strides[0] | strides[1] | strides[2]) % 8:
        strides = [s if size > 1 else 0 for s, size in zip(strides, tensor.shape)]
    return pointer(tensor), *strides


def mask_values(fields: dict, bounds, len_q: int) -> tuple:
    """MASK from prepared.mask_fields()."""
    if not fields:
        return 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, *bounds, 1, 0
    get = fields.get
    return (
        *(pointer(get(name)) for name in ("bounds", "lo", "hi", "live", "words", "keys")),
        get("lo_batch", 0) * len_q,
        get("lo_head", 0) * len_q,
        get("live_batch", 0) * len_q,
        get("live_head", 0) * len_q,
        get("words_outer", 0),
        get("words_inner", 0),
        get("words_head", 0),
        get("words_group", 0),
        get("words_line", 0),
        get("keys_batch", 0),
        *bounds,
        get("words_split", 1),
        0,
    )


def list_values(lists: tuple[Tensor, Tensor] | None, key) -> tuple:
    """LISTS of tile lists that were made for ``key``."""
    if lists is None:
        return 0, 0, 0, 0, 0, 0
    return pointer(lists[0]), pointer(lists[1]), *prepared.head_steps(lists[0]), *key[:2]


def score_values(fields: dict) -> tuple:
    """SCORE from prepared.score_fields(), which must outlive the launch."""
    if not fields:
        return 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0.0, 1.0, 0, 0
    get = fields.get
    bias = get("bias")
    return (
        pointer(bias),
        get("bias_outer", 0),
        get("bias_inner", 0),
        get("bias_head", 0),
        get("bias_row") or 0,
        get("bias_col") or 0,
        pointer(get("slopes")),
        get("slopes_batch", 0),
        pointer(get("sinks")),
        pointer(get("seed")),
        0 if bias is None else DTYPES[bias.dtype],
        get("bias_split", 1),
        min(get("softcap", 0.0), LARGEST),
        get("factor", 1.0),
        get("threshold", 0),
        0,
    )


def size_values(q: Tensor, k: Tensor, width_v: int, scale: float) -> tuple:
    """SIZES; q [B, H, Lq, D], k [B, Hkv, Lk, D]."""
    batch, heads, len_q, width = q.shape
    scale = max(-LARGEST, min(scale, LARGEST))
    return batch, heads, k.shape[1], len_q, k.shape[2], width, width_v, scale


def launch(name: str, packed: bytes, **tensors: Tensor | None) -> None:
    """Call tilemask_<name>. RuntimeError: what it answered, with the tensors of the call."""
    code = getattr(library.load(), "tilemask_" + name)(packed)
    if code:
        given = ", ".join(
            f"{key} {tuple(t.shape)} {t.dtype}" for key, t in tensors.items() if t is not None
        )
        raise RuntimeError(f"tilemask_{name}({given}) failed: {library.error_text(code)}")


def workspace_size(name: str, layout: Layout, values: list) -> int:
    """Bytes that a call needs beside its results."""
    return getattr(library.load(), f"tilemask_{name}_workspace")(layout.pack(*values))


def with_workspace(layout: Layout, values: list, size: int, device) -> tuple[bytes, Tensor | None]:
    """The struct of a call that needs so many bytes, and that memory."""
    if size == 0:
        return layout.pack(*values), None
    workspace = torch.empty(size, dtype=torch.uint8, device=device)
    at = layout.at["workspace"]
    values[at], values[at + 1] = pointer(workspace), size
    return layout.pack(*values), workspace


# -- what the kernels read of a mask --------------------------------------------------------------


@functools.cache
def launched() -> Steps:
    """What makes words and lists, by the library."""
    return Steps(pack_bits, transpose_words, live_rows, build_lists)


def pack_bits(bits: Tensor, words: Tensor | None = None, first_row: int = 0) -> Tensor:
    outer, inner, heads, rows, len_k = bits.shape
    if words is None:
        shape = (outer, inner, heads, -(-len_k // 128), rows, 4)
        words = torch.empty(shape, dtype=torch.int32, device=bits.device)
    sizes = outer, inner, heads, rows, len_k, first_row, words.shape[4], 0
    packed = PACK.pack(
        *head_values(PACK, bits), pointer(bits), *bits.stride(), pointer(words), *sizes
    )
    launch("pack", packed, bits=bits)
    return words


def transpose_words(words: Tensor, len_q: int, len_k: int) -> Tensor:
    planes, groups, lines = words.shape[:3], words.shape[3], words.shape[4]
    groups_out = 1 if lines == 1 else -(-len_q // 128)
    out = torch.empty(*planes, groups_out, len_k, 4, dtype=torch.int32, device=words.device)
    packed = TRANSPOSE.pack(
        *head_values(TRANSPOSE, words),
        pointer(words),
        pointer(out),
        planes.numel(),
        groups,
        lines,
        len_k,
        groups_out,
        0,
    )
    launch("transpose", packed, words=words)
    return out


def live_rows(parts, bounds, sizes) -> Tensor:
    batch, heads, len_q, len_k = sizes
    planes, made = prepared.spread(parts, batch, heads), first_of(parts)
    live = torch.empty(*planes, len_q, dtype=torch.int32, device=made.device)
    packed = LOWER.pack(
        *head_values(LOWER, made),
        *mask_values(mask_fields(parts, batch), bounds, len_q),
        pointer(live),
        *(0, 0, 0),
        *planes,
        len_q,
        len_k,
        *(0, 0, 0, 0),
    )
    launch("live", packed, live=live)
    return live


def build_lists(parts, bounds, sizes, block_m: int, block_n: int, transposed: int):
    batch, heads, len_q, len_k = sizes
    planes, made = prepared.spread(parts, batch, heads), first_of(parts)
    row_blocks, col_blocks = -(-len_q // block_m), -(-len_k // block_n)
    blocks, across = (col_blocks, row_blocks) if transposed else (row_blocks, col_blocks)
    new = functools.partial(torch.empty, device=made.device)
    classes = new(*planes, row_blocks, col_blocks, dtype=torch.uint8)
    counts = new(*planes, blocks, 2, dtype=torch.int32)
    lists = new(*planes, blocks, 2, across, dtype=torch.int32)
    packed = LOWER.pack(
        *head_values(LOWER, made),
        *mask_values(mask_fields(parts, batch), bounds, len_q),
        *(0, pointer(classes), pointer(counts), pointer(lists)),
        *planes,
        len_q,
        len_k,
        block_m,
        block_n,
        transposed,
        0,
    )
    launch("lists", packed, counts=counts)
    return counts, lists


def first_of(parts) -> Tensor:
    """A tensor of a mask that has some."""
    return next(t for t in parts if t is not None)


@asked_once
def tile_of(kernel: str, width: int, device: torch.device) -> tuple[int, int]:
    """The tile shape of a kernel for the larger of D and Dv, on a GPU."""
    tile = (ctypes.c_int32 * 2)()
    code = library.load().tilemask_tile(KERNELS[kernel], width, device.index or 0, tile)
    if code:
        raise RuntimeError(f"tilemask_tile({kernel}, {width}) failed: {library.error_text(code)}")
    return tuple(tile)


def list_key(call, kernel: str) -> tuple[int, int, int]:
    """What the tile lists of a kernel are kept under: see prepared.lists_for."""
    if kernel == "forward" and is_decoding(call):
        kernel = "decode"
    width = max(call.q.shape[3], call.v.shape[3])
    return *tile_of(kernel, width, call.q.device), {"dkv": 1, "dqkv": 2}.get(kernel, 0)


def list_keys(call, backward: bool) -> list[tuple[int, int, int]]:
    """The same of all lists that a forward or a backward walks. Where the tensors of a call lie in
    memory may let its backward walk others: those it makes itself."""
    if not backward:
        return [list_key(call, "forward")]
    widths = call.q.shape[3], call.v.shape[3]
    chunked = widths[0] % 8 == 0 and widths[1] % 8 == 0
    plain = prepared.is_plain(call) and call.scale > LEAST_SCALE
    one_pass = chunked and plain and has_room(*widths, call.q.device)
    return [list_key(call, kernel) for kernel in (("dqkv",) if one_pass else ("dq", "dkv"))]


@asked_once
def has_room(width: int, width_v: int, device: torch.device) -> bool:
    """Whether a GPU runs plain backward calls in one pass."""
    values = [0] * len(BACKWARD.unpack(bytes(BACKWARD.size)))
    head = BACKWARD.size, library.ABI, device.index or 0, DTYPES[torch.float16]
    values[: len(head)] = head
    values[BACKWARD.at["sizes.batch"] :] = 1, 1, 1, 1, 1, width, width_v, 1.0
    return workspace_size("backward", BACKWARD, values) > 0


def tile(call) -> tuple[int, int]:
    """The forward's tile shape."""
    return list_key(call, "forward")[:2]


def prepare(call, backward: bool, steps: Steps | None = None) -> None:
    """Make and keep all that the kernels read of the call's mask."""
    keys = list_keys(call, False) + (list_keys(call, True) if backward else [])
    prepared.prepare(call, keys, backward, steps or launched())


def mask_of(call, transposed: bool = False) -> dict:
    """prepared.mask_fields() of a call."""
    return mask_fields(mask_parts(call, launched(), transposed), call.q.shape[0], transposed)


# -- calls ----------------------------------------------------------------------------------------


def forward(call, visits: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """out [B, Hq, Lq, Dv] in q's dtype and order, lse float32 [B, Hq, Lq], and what the backward
    needs beside it: ``rest``, float32 [B, Hq, Lq], in some calls.

    visits: int32 zeros [B * Hq, row blocks, column blocks, 2], counted up by tile and class.
    """
    q, k, v = unit_stride(call.q), unit_stride(call.k), unit_stride(call.v)
    out, lse, rest = prepared.new_results(q, v.shape[3], has_rest(call))
    is_folded = visits is None and folds(call)
    q_rows, out_rows = q, out
    if is_folded:
        q_rows, out_rows = folded(q, k.shape[1]), folded(out, k.shape[1])
    mask, score, bounds = mask_of(call), score_fields(call), call.mask.bounds
    key = list_key(call, "forward")
    lists = prepared.lists_for(call, key, launched())
    values = [
        *head_values(FORWARD, q),
        *tensor_values(q_rows),
        *tensor_values(k),
        *tensor_values(v),
        *tensor_values(out_rows),
        pointer(lse),
        pointer(rest),
        pointer(visits),
        *(0, 0),
        *mask_values(mask, bounds, q.shape[2]),
        *list_values(lists, key),
        *score_values(score),
        *size_values(q_rows, k, v.shape[3], call.scale),
        is_folded,
        0,
    ]
    if is_decoding(call):
        size = workspace_size("forward", FORWARD, values)
        packed, _workspace = with_workspace(FORWARD, values, size, q.device)
    else:
        packed = FORWARD.pack(*values)
    launch("forward", packed, q=q, k=k, v=v)
    return out, lse, rest


def backward(
    call,
    out: Tensor,
    lse: Tensor,
    rest: Tensor | None,
    dout: Tensor,
    dlse: Tensor | None,
    bias_gradient: bool = True,
    visits: tuple[Tensor | None, ...] | None = None,
):
    """Gradients of q, k and v, each in the order of its tensor, of sinks, and of the bias if it is
    asked for. Deterministic.

    visits: as in the forward, for the kernels dq, dkv and dqkv, of which either the first two or
    the last run.
    """
    from . import Gradients

    q, k, v = unit_stride(call.q), unit_stride(call.k), unit_stride(call.v)
    dout = unit_stride(dout)
    dlse = None if dlse is None else dlse.contiguous()
    dq, dk, dv, delta = prepared.new_gradients(q, k, v, lse)
    mask, transposed, score = mask_of(call), mask_of(call, transposed=True), score_fields(call)
    bounds, len_q = call.mask.bounds, q.shape[2]
    visited = (*(visits or ()), None, None, None)[:3]
    values = [
        *head_values(BACKWARD, q),
        *(number for t in (q, k, v, out, dout, dq, dk, dv) for number in tensor_values(t)),
        *(pointer(t) for t in (lse, rest, dlse, delta, *visited)),
        *(0, 0),
        *mask_values(mask, bounds, len_q),
        *mask_values(transposed, bounds, len_q),
        *list_values(None, ()) * 2,
        *score_values(score),
        *size_values(q, k, v.shape[3], call.scale),
    ]
    # in one pass where that asks for a workspace; then only column blocks have lists
    size = workspace_size("backward", BACKWARD, values)
    walked = {"lists_transposed": "dqkv"} if size else {"lists": "dq", "lists_transposed": "dkv"}
    for field, kernel in walked.items():
        key = list_key(call, kernel)
        at = BACKWARD.at[f"{field}.counts"]
        values[at : at + len(LISTS)] = list_values(prepared.lists_for(call, key, launched()), key)
    packed, _workspace = with_workspace(BACKWARD, values, size, q.device)
    launch("backward", packed, q=q, k=k, v=v)
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
    """Sums of weight * p, or with dout and delta of weight * ds: [B1|1, B2|1, Hq|1, Lq|1, Lk|1].

    shape: that of the result, 1 where it sums; B1 * B2 = B. dtype: of the result.
    """
    q, k = unit_stride(call.q), unit_stride(call.k)
    v = None if dout is None else unit_stride(call.v)
    dout = None if dout is None else unit_stride(dout)
    sums = torch.empty(tuple(shape), dtype=dtype, device=q.device)
    mask, score = mask_of(call), score_fields(call)
    inner = prepared.inner_batches(q.shape[0], *shape[:2])
    values = [
        *head_values(SUMS, q),
        *tensor_values(q),
        *tensor_values(k),
        *((0,) * 8 if v is None else (*tensor_values(v), *tensor_values(dout))),
        *(pointer(t) for t in (lse, rest, delta, sums)),
        *(0, 0),
        *mask_values(mask, call.mask.bounds, q.shape[2]),
        *score_values(score),
        *size_values(q, k, call.v.shape[3], call.scale),
        q.shape[0] // max(1, inner),
        inner,
        *shape,
        DTYPES[dtype],
        weight,
        0,
    ]
    size = workspace_size("sums", SUMS, values)
    packed, _workspace = with_workspace(SUMS, values, size, q.device)
    launch("sums", packed, q=q, k=k, v=v)
    return sums
