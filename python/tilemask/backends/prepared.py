"""What the GPU backends share: the form in which kernels read a mask, made once and kept, the
options of a call by name, and what is computed outside the kernels.

A backend brings ``Steps``, which make that form, and the tile shapes of its kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..masks import split_batch

WIDEST = 256
FEW_ROWS = 16  # one tile of rows: their keys are split over programs
LONGEST = 1 << 30  # positions are int32 in the kernels
LEAST_BLOCK = 16  # rows or columns of a tile, at least
MOST_BLOCKS = (1 << 31) - 1  # in a grid
STRIP = 1 << 25  # bits per pair computed at a time, before they are packed


def asked_once(function):
    """Cache answers about the machine, also while torch.compile traces."""
    cached = functools.cache(function)

    @torch.compiler.assume_constant_result
    @functools.wraps(function)
    def ask(*arguments):
        return cached(*arguments)

    return ask


def no_gpu() -> str | None:
    """Why no NVIDIA GPU can be used at all; None if one can. Does not start CUDA."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if torch.cuda.device_count() == 0:
        return "no NVIDIA GPU is visible"
    return None


@asked_once
def architecture(device: torch.device) -> int:
    """Compute capability times ten; 80 where the CPU stands for a GPU, in tests."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def too_old(device: torch.device) -> str | None:
    """Why a GPU is too old for the kernels; None if it is not."""
    if architecture(device) >= 80:
        return None
    major, minor = divmod(architecture(device), 10)
    return f"{device} has compute capability {major}.{minor}; the kernels need 8.0 or newer"


def too_large(call) -> str | None:
    """Why no kernel takes a call of such sizes, or one in such a place; None if they do."""
    q, k, v = call.q, call.k, call.v
    if torch._C._functorch.maybe_current_level() is not None:
        return "a torch.func transform (vmap, grad, ...) is active, which sees through PyTorch only"
    if q.shape[3] > WIDEST or v.shape[3] > WIDEST:
        return f"head widths go up to {WIDEST}, got D = {q.shape[3]} and Dv = {v.shape[3]}"
    if q.shape[2] >= LONGEST or k.shape[2] >= LONGEST:
        return f"lengths go up to {LONGEST - 1}, got Lq = {q.shape[2]} and Lk = {k.shape[2]}"
    blocks = q.shape[0] * q.shape[1] * (max(q.shape[2], k.shape[2]) // LEAST_BLOCK + 1)
    if blocks > MOST_BLOCKS:
        return f"B * Hq * (max(Lq, Lk) // 16 + 1) goes up to {MOST_BLOCKS}, got {blocks}"
    return None


# -- the mask, as kernels read it -----------------------------------------------------------------


class Steps(NamedTuple):
    """The functions of a backend, or the ops that stand for them while tracing.

    pack(bits bool [B1, B2, H, L, Lk][, words, first_row]) -> words int32 [B1, B2, H, groups, L, 4];
    transpose(words, Lq, Lk) -> [B1, B2, H, groups of rows|1, Lk, 4];
    live(parts, bounds, sizes) -> int32 [B|1, H|1, Lq];
    lower(parts, bounds, sizes, block_m, block_n, transposed) -> counts int32 [B|1, H|1, blocks, 2]
    and blocks int32 [B|1, H|1, blocks, 2, most].

    parts: batch_bounds, lo, hi, live, words, keys, any of them None. sizes: B, H, Lq, Lk.
    """

    pack: Callable
    transpose: Callable
    live: Callable
    lower: Callable
    traced: bool = False


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
    """batch_bounds, lo, hi, live, words (or the transposed ones) and keys, made where they are not
    kept."""
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


def lists_for(call, key: tuple[int, int, int], steps: Steps) -> tuple[Tensor, Tensor] | None:
    """counts and blocks of the tile lists for key = (block_m, block_n, transposed), under which
    they are kept; None for affine masks. transposed: 0, of row blocks; 1, of column blocks; 2, of
    column blocks in pairs with whose turn is before theirs (csrc/tilemask.h)."""
    mask = call.mask
    if mask.lo is None and not has_bits(mask):
        return None
    parts = mask_parts(call, steps)
    return mask.prepared.make(
        key, lambda: steps.lower(parts, list(mask.bounds), sizes_of(call), *key)
    )


def prepare(call, keys: list[tuple], backward: bool, steps: Steps) -> None:
    """Make and keep all that kernels read of the call's mask; keys: of their lists."""
    for key in keys:
        lists_for(call, key, steps)
    mask_parts(call, steps, transposed=backward)


def spread(parts: list, batch: int, heads: int) -> tuple[int, int]:
    """(B|1, H|1): over which batches and heads a mask differs."""
    batch_bounds, lo, _, live, words, keys = parts
    batches = [t.shape[0] for t in (batch_bounds, lo, live, keys) if t is not None]
    differs = [t.shape[1] for t in (lo, live) if t is not None]
    if words is not None:
        batches.append(words.shape[0] * words.shape[1])
        differs.append(words.shape[2])
    return batch if max(batches) > 1 else 1, heads if max(differs, default=1) > 1 else 1


def mask_fields(parts: list, batch: int, transposed: bool = False) -> dict:
    """A mask by the names of kernels.masks.MaskArgs: its tensors and their steps.

    Steps are in elements, those of lo and live in rows, and 0 where a dimension repeats. What the
    mask has not is left out. batch: B. transposed: words are the transposed ones.
    """
    batch_bounds, lo, hi, live, words, keys = parts
    fields: dict = {}
    if batch_bounds is not None:
        fields["bounds"] = batch_bounds
    if lo is not None:
        fields["lo"], fields["hi"] = lo, hi
        fields["lo_batch"], fields["lo_head"] = head_steps(lo)
    if live is not None:
        fields["live"] = live
        fields["live_batch"], fields["live_head"] = head_steps(live)
    if words is not None:
        outer, inner, heads, groups, lines, _ = words.shape
        matrix = groups * lines * 4
        fields["words"] = words
        fields["words_outer"] = inner * heads * matrix if outer > 1 else 0
        fields["words_inner"] = heads * matrix if inner > 1 else 0
        fields["words_split"] = inner_batches(batch, outer, inner)
        fields["words_head"] = matrix if heads > 1 else 0
        fields["words_group"] = 0 if transposed and groups == 1 else lines * 4
        fields["words_line"] = 0 if not transposed and lines == 1 else 4
    if keys is not None:
        fields["keys"] = keys
        fields["keys_batch"] = keys.stride(0) if keys.shape[0] > 1 else 0
    return fields


def head_steps(tensor: Tensor) -> tuple[int, int]:
    """Heads of [B|1, H|1, ...] from one batch, and one head, to the next; 0 where they repeat."""
    batch, heads = tensor.shape[:2]
    return heads if batch > 1 else 0, 1 if heads > 1 else 0


def inner_batches(batch: int, outer: int, inner: int) -> int:
    """B2 where B = B1 * B2 are two batch dimensions, of which a tensor has ``outer`` and ``inner``;
    1 where it has neither."""
    return split_batch(batch, outer, inner)[1] if outer > 1 or inner > 1 else 1


# -- options --------------------------------------------------------------------------------------


def is_plain(call) -> bool:
    """Whether a call has none of the options that score_fields() names."""
    tensors = (call.bias, call.alibi_slopes, call.sinks)
    return not (call.softcap or call.dropout_p or any(t is not None for t in tensors))


def score_fields(call) -> dict:
    """The options of a call by the names of kernels.scores.ScoreArgs: what it has not is left out.

    The tensors among them may be new ones: they must outlive the launch.
    """
    fields: dict = {}
    if is_plain(call):
        return fields
    if call.softcap:
        fields["softcap"] = call.softcap
    bias, slopes = call.bias, call.alibi_slopes
    if bias is not None:
        steps = [stride if size > 1 else 0 for size, stride in zip(bias.shape, bias.stride())]
        fields["bias"] = bias
        fields["bias_outer"], fields["bias_inner"], fields["bias_head"] = steps[:3]
        fields["bias_split"] = inner_batches(call.q.shape[0], *bias.shape[:2])
        fields["bias_row"], fields["bias_col"] = steps[3] or None, steps[4] or None
    if slopes is not None:
        fields["slopes"] = slopes.to(torch.float32).contiguous()
        fields["slopes_batch"] = slopes.shape[1] if slopes.shape[0] > 1 else 0
    if call.sinks is not None:
        fields["sinks"] = call.sinks.to(torch.float32).contiguous()
    if call.dropout_p:
        threshold = round(call.dropout_p * 65536)
        fields["seed"], fields["threshold"] = call.dropout_seed, threshold
        fields["factor"] = 65536 / (65536 - threshold) if threshold < 65536 else 0.0
    return fields


def has_rest(call) -> bool:
    """Whether lse alone is too coarse, or (with sinks) does not tell rows that see nothing."""
    return call.bias is not None or call.sinks is not None or call.q.dtype == torch.float32


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


def unit_stride(tensor: Tensor) -> Tensor:
    """The tensor as it is in memory, with last stride 1; copied only if it is not already so."""
    tensor = tensor.resolve_neg()
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


# -- around the kernels ---------------------------------------------------------------------------


def new_results(q: Tensor, width_v: int, with_rest: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """What a forward writes: out [B, Hq, Lq, Dv] in the memory order of q, lse float32 [B, Hq, Lq],
    and rest, of lse's kind, or None."""
    from . import empty_like_query

    out = empty_like_query(q, width_v)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    return out, lse, torch.empty_like(lse) if with_rest else None


def new_gradients(q: Tensor, k: Tensor, v: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
    """What a backward writes: dq, dk and dv, each in the memory order of its tensor, and delta
    float32 [B, Hq, Lq]."""
    from . import empty_like_query

    return *(empty_like_query(t, t.shape[3]) for t in (q, k, v)), torch.empty_like(lse)


def option_gradients(call, lse, rest, dout, delta, bias_gradient: bool, pair_sums: Callable):
    """Gradients of bias, where it is asked for, and sinks; None for what the call has not.

    pair_sums: the backend's. delta: float32 [B, Hq, Lq], as its backward wrote it.
    """
    dbias = dsinks = None
    if call.bias is not None and bias_gradient:
        dbias = pair_sums(call, lse, rest, call.bias.shape, call.bias.dtype, dout, delta)
    if call.sinks is not None:
        dsinks = sink_gradient(call.sinks, lse, delta)
    return dbias, dsinks


def sink_gradient(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """d loss / d sinks [Hq]: the sink is a key whose value is 0, so its ds is -p * delta."""
    p = torch.exp(sinks.float()[:, None] - lse).masked_fill(lse == float("-inf"), 0)
    return -(p * delta).sum((0, 2)).to(sinks.dtype)


def weights(call, reduce: str | None, forward: Callable, pair_sums: Callable) -> Tensor:
    """Probabilities, or their sums: see attention_weights(). forward, pair_sums: the backend's."""
    from . import replaced

    batch, heads, len_q, _ = call.q.shape
    _, lse, rest = forward(replaced(call, dropout_p=0.0))
    rows = 1 if reduce == "sum_queries" else len_q
    shape = (batch, 1, 1 if reduce == "mean_heads" else heads, rows, call.k.shape[2])
    factor = 1 / max(1, heads) if reduce == "mean_heads" else 1.0
    sums = pair_sums(call, lse, rest, shape, call.q.dtype, weight=factor)[:, 0]
    if reduce is None:
        return sums
    return sums.squeeze(1 if reduce == "mean_heads" else 2)
