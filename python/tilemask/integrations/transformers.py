"""Hugging Face transformers: ``register()`` makes ``attn_implementation="tilemask"`` work.

Two functions are registered. ``make_mask`` is called once per forward and kind of layer; it reads
what transformers says of a mask (a function of positions, the padding, the place of the queries in
the cache) and says it as a tilemask mask, wrapped in an ``AttentionMask`` that passes through model
code as a tensor [B, 1, Lq, Lk] without being one. ``attend`` is called by every layer.
"""

from __future__ import annotations

import functools
import importlib
import weakref

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .. import masks
from ..attention import CAUSAL, attention, attention_weights, scaled_dot_product_attention
from ..masks import describe

NAME = "tilemask"
_served = weakref.WeakValueDictionary()  # configs of models that call attend(), by identity


def register() -> None:
    """Register ``attn_implementation="tilemask"`` with transformers (4.57 or later).

    May be called again at any time. Models take it as any other name::

        AutoModel.from_pretrained(name, attn_implementation="tilemask")
        model.set_attn_implementation("tilemask")

    Raises ImportError where transformers is missing or too old.
    """
    import transformers

    if version() < (4, 57):
        raise ImportError(
            f"transformers {transformers.__version__} is installed; register() needs 4.57 or later"
        )
    transformers.AttentionInterface.register(NAME, attend)
    transformers.AttentionMaskInterface.register(NAME, make_mask)
    if version() < (5, 0):
        register_classes()


def version() -> tuple[int, ...]:
    import transformers

    return tuple(int(part) for part in transformers.__version__.split(".")[:2])


# -- what travels through a model -----------------------------------------------------------------

aten = torch.ops.aten
COPIES = (aten.detach.default, aten.alias.default, aten.clone.default, aten._to_copy.default)
ADDS = (aten.add.Tensor, aten.add_.Tensor)
ARITHMETIC = (aten.mul.Tensor, aten.sub.Tensor, aten.rsub.Scalar, aten.rsub.Tensor, aten.div.Tensor)


class AttentionMask(Tensor):
    """A tilemask mask that model code can carry as a bool tensor [B, 1, Lq, Lk], True = may attend.

    It owns no memory of that size. Moving and copying keep it as it is; any other operation is done
    on the dense mask, so what model code does with a mask stays right. Added to float scores, by
    models that compute attention themselves, it acts as the additive mask they expect.
    """

    mask: masks.Mask

    @staticmethod
    def __new__(cls, mask: masks.Mask, shape, device):
        self = Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=torch.bool, device=device)
        self.mask = mask
        self.packed = {}  # with cu_seqlens, by their identity
        return self

    def dense(self) -> Tensor:
        B, H, Lq, Lk = self.shape
        return self.mask.to_dense(B, H, Lq, Lk, self.device)

    def __repr__(self, **_):
        return f"AttentionMask({self.mask!r}, shape={tuple(self.shape)}, device={self.device})"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in COPIES and kwargs.get("dtype", torch.bool) in (None, torch.bool):
            source = args[0]
            return cls(source.mask, source.shape, kwargs.get("device") or source.device)
        if func in ADDS:
            other = next((a for a in args[:2] if type(a) is not cls), None)
            if isinstance(other, Tensor) and other.is_floating_point():
                args = [additive(a.dense(), other.dtype) if type(a) is cls else a for a in args]
                return func(*args, **kwargs)
        if func in ADDS + ARITHMETIC:
            raise TypeError(
                f"{func} on a mask of tilemask: this model computes with its masks instead of "
                'handing them to the attention function; use attn_implementation="eager"'
            )
        args, kwargs = torch.utils._pytree.tree_map_only(cls, cls.dense, (args, kwargs))
        result = func(*args, **kwargs)
        is_mask = isinstance(result, Tensor) and result.dtype == torch.bool and result.dim() == 4
        if func.is_view and is_mask:
            return cls(masks.dense(result), result.shape, result.device)
        return result


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as transformers adds it to scores."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(
        ~seen, torch.finfo(dtype).min
    )


# -- from transformers' description of a mask to ours ---------------------------------------------


def make_mask(
    batch_size,
    kv_length,
    kv_offset=0,
    mask_function=None,
    attention_mask=None,
    cache_position=None,
    q_length=None,
    q_offset=0,
    allow_is_causal_skip=True,
    allow_is_bidirectional_skip=False,
    device=None,
    **options,
):
    """The mask function: what transformers passes on to every layer.

    transformers 4.57 gives the queries' positions as cache_position [Lq], 5 as q_length and
    q_offset, an int or (static caches) a tensor. attention_mask: bool [B, L] of what was seen so
    far, or the [B, Lq, Lk] of a caller. mask_function: a function of (batch, head, row, column).
    """
    from transformers import masking_utils

    if isinstance(attention_mask, AttentionMask):
        return attention_mask
    if mask_function is None:
        mask_function = masking_utils.causal_mask_function
    if cache_position is not None:
        q_length, q_offset = cache_position.shape[0], cache_position
        device = cache_position.device
    elif isinstance(q_length, Tensor):  # the first releases of 5
        q_length, q_offset = q_length.shape[0], q_length
        device = q_offset.device
    pairs = None
    if attention_mask is not None and attention_mask.dim() != 2:
        pairs, attention_mask = pairs_of(attention_mask, batch_size, q_length, kv_length), None
    if not torch.compiler.is_compiling():
        place = Place(q_length, kv_length, q_offset, kv_offset, device)
        mask = translated(mask_function, place)
        if mask is not None:
            keep = place.keep(attention_mask)
            mask = mask if keep is None else both(mask, masks.padding(keep=keep))
            mask = mask if pairs is None else both(mask, masks.dense(pairs))
            mask = AttentionMask(mask, (batch_size, 1, q_length, kv_length), device)
            # a step with a static cache may be compiled, and one row is small
            step = q_length == 1 and not allow_is_causal_skip
            return mask.dense() if step and id(options.get("config")) in _served else mask
    plain = attention_mask is None and pairs is None
    if torch.compiler.is_compiling():
        causal = mask_function is masking_utils.causal_mask_function
        if plain and causal and allow_is_causal_skip and no_cache(q_length, kv_length, q_offset):
            return None
        if not causal and mask_function is getattr(
            masking_utils, "bidirectional_mask_function", None
        ):
            if plain and allow_is_bidirectional_skip:
                return None
            if attention_mask is not None and attention_mask.shape[1] == kv_length:
                return attention_mask[:, None, None, :].expand(-1, -1, q_length, -1)
    place = {"cache_position": cache_position} if cache_position is not None else {}
    if not place:
        place = {"q_length": q_length, "q_offset": q_offset, "device": device}
    seen = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](
        batch_size=batch_size,
        kv_length=kv_length,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
        **place,
        **options,
    )
    seen = seen if pairs is None else seen & pairs
    if torch.compiler.is_compiling():
        return seen
    return AttentionMask(masks.dense(seen), (batch_size, 1, q_length, kv_length), seen.device)


def no_cache(q_length, kv_length, q_offset) -> bool:
    return q_length == kv_length and (isinstance(q_offset, Tensor) or q_offset == 0)


def pairs_of(mask: Tensor, batch: int, len_q: int, len_k: int) -> Tensor:
    """A caller's [B, Lq, Lk] as bool [B, 1, Lq, Lk]."""
    if mask.dim() != 3 or mask.is_floating_point():
        raise TypeError(
            "attention_mask must be [B, L] or [B, Lq, Lk], bool or integer with nonzero = may "
            f"attend, or [B, 1, Lq, Lk], bool or additive float; got {describe(mask)}"
        )
    if mask.shape[0] not in (1, batch) or tuple(mask.shape[1:]) != (len_q, len_k):
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}, expected ({batch}, {len_q}, {len_k})"
        )
    return (mask != 0)[:, None]


class Place:
    """Where the rows and columns of a call stand in their sequences.

    Row i is position ``first + i``, column j is position ``j + kv_offset``.
    """

    def __init__(self, len_q, len_k, q_offset, kv_offset, device):
        self.len_q, self.len_k, self.kv_offset, self.device = len_q, len_k, kv_offset, device
        if isinstance(q_offset, Tensor) and q_offset.dim() == 1:
            q_offset = first_of(q_offset)
        elif isinstance(q_offset, Tensor):
            q_offset = q_offset.reshape(1)
        self.offset = q_offset - kv_offset  # from a row to the column of its position

    def keep(self, padding: Tensor | None) -> Tensor | None:
        """The keys that padding [B, L] leaves, bool [B, Lk]; None where it is known to leave all.

        What it does not reach is not written yet.
        """
        if padding is None:
            return None
        end = self.kv_offset + self.len_k
        padding = padding[:, self.kv_offset : end].to(torch.bool)
        if padding.shape[1] < self.len_k:
            padding = torch.nn.functional.pad(padding, (0, self.len_k - padding.shape[1]))
        if padding.device.type == "cpu" and bool(padding.all()):
            return None
        return padding


def first_of(positions: Tensor) -> Tensor | int:
    """The first of consecutive positions [Lq]: an int on the CPU, int [1] elsewhere."""
    ahead = torch.arange(positions.shape[0], device=positions.device)
    consecutive = (positions - ahead == positions[:1]).all()
    if positions.device.type == "cpu":
        if not bool(consecutive):
            raise ValueError(
                f"cache_position must be consecutive positions, got {positions.tolist()}"
            )
        return int(positions[0]) if positions.shape[0] else 0
    torch._assert_async(consecutive, "cache_position must be consecutive positions")
    return positions[:1]


def translated(function, place: Place, positions=None) -> masks.Mask | None:
    """The mask that one of transformers' mask functions describes; None for any other function.

    positions: of the rows in packed sequences, [B, Lq], consecutive inside each.
    """
    from transformers import masking_utils

    if function is masking_utils.causal_mask_function:
        return masks.causal(place.offset)
    if function is getattr(masking_utils, "bidirectional_mask_function", None):
        return masks.Mask()
    if getattr(function, "__module__", None) != masking_utils.__name__:
        return None
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    given = {name: cell.cell_contents for name, cell in cells}
    maker = function.__qualname__.partition(".")[0]
    if maker == "and_masks":
        parts = [translated(part, place, positions) for part in given["mask_functions"]]
        return None if None in parts else functools.reduce(both, parts)
    if maker == "sliding_window_overlay":  # the row itself counts
        return masks.window(given["sliding_window"] - 1, -1, offset=place.offset)
    if maker == "sliding_window_bidirectional_overlay":
        size = given["sliding_window"]
        return masks.window(size, size, offset=place.offset)
    if maker == "chunked_overlay":
        return chunked(given["chunk_size"], given["left_padding"], place, positions)
    if maker == "packed_sequence_mask_function":  # numbers that grow along L
        return documents(given["packed_sequence_mask"])
    if maker == "remap_positions_for_packed_sequence":
        return translated(given["mask_function"], place, given["position_ids"])
    return None


def both(a: masks.Mask, b: masks.Mask) -> masks.Mask:
    """``a & b``, without a part that leaves everything."""
    if type(a) is masks.Mask:
        return b
    return a if type(b) is masks.Mask else a & b


def documents(ids: Tensor) -> masks.Mask:
    if ids.device.type == "cpu" and bool((ids == 0).all()):
        return masks.Mask()
    return masks.documents(ids, contiguous=True)


def chunked(size: int, padding: Tensor, place: Place, positions=None) -> masks.Mask:
    """Rows see the columns of their own chunk; chunks count from the end of the left padding [B].

    positions: as in translated().
    """
    rows = torch.arange(place.len_q, device=place.device) + place.offset  # as columns
    if positions is None:
        positions = rows + place.kv_offset
    lo = rows - (positions - padding.to(rows.device).reshape(-1, 1)) % size  # [B, Lq]
    lo, hi = (bound.clamp(0, place.len_k) for bound in (lo, lo + size))
    return masks.intervals(lo[:, None], hi[:, None])


# -- the attention function -----------------------------------------------------------------------

# What model code passes down that says nothing about attention, or nothing that the mask does not.
HARMLESS = {
    "attention_mask",
    "cache_position",
    "decoder_attention_mask",
    "deterministic",
    "encoder_attention_mask",
    "global_attention_mask",
    "key_padding_mask",
    "mask_time_indices",
    "max_length_k",
    "max_length_q",
    "past_key_values",
    "use_cache",
}
TELLING = ("alibi", "bias", "block", "cache", "cap", "indices", "mask", "sink", "slopes", "window")


def attend(
    module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    head_mask: Tensor | None = None,
    output_attentions: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **others,
):
    """The attention function: (out [B, Lq, Hq, D], weights [B, Hq, Lq, Lk] or None).

    query [B, Hq, Lq, D], key and value [B, Hkv, Lk, D]; attention_mask: what make_mask() made, or a
    caller's tensor that broadcasts to [B, Hq, Lq, Lk], bool (True = may attend) or float (added);
    a mask says all, is_causal and sliding_window count where there is none.
    """
    for name, given in others.items():
        if given is None or given is False or name in HARMLESS:
            continue
        if any(word in name for word in TELLING):
            raise TypeError(
                f"tilemask cannot honour the attention argument {name}={describe(given)} of "
                f'{type(module).__name__}; use attn_implementation="eager" or "sdpa"'
            )
    if not torch.compiler.is_compiling() and hasattr(module, "config"):
        _served[id(module.config)] = module.config
    if query.shape[0] != key.shape[0]:  # learned queries
        B = max(query.shape[0], key.shape[0])
        query, key, value = (t.expand(B, -1, -1, -1) for t in (query, key, value))
    mask, bias = mask_and_bias(attention_mask, query, key)
    if attention_mask is None:
        mask = default_mask(module, query, key, is_causal, sliding_window)
    if cu_seq_lens_q is not None:
        causal = is_causal_of(module, is_causal)
        mask = packed(attention_mask, mask, cu_seq_lens_q, cu_seq_lens_k, causal, query, key)
    if position_bias is not None:
        bias = position_bias if bias is None else position_bias + bias
        bias = bias.to(query.dtype) if bias.dtype not in (query.dtype, torch.float32) else bias
    options = {
        "mask": mask,
        "bias": bias,
        "scale": scaling,
        "softcap": softcap or 0.0,
        "sinks": s_aux,
        "dropout_p": dropout if module.training else 0.0,
    }
    weights = None
    if wants_weights(module, output_attentions):
        if options["dropout_p"]:
            options["dropout_seed"] = torch.randint(2**63 - 1, (1,), device=query.device)
        weights = attention_weights(query, key, **options)
    out = attention(query, key, value, **options)
    if head_mask is not None:
        out, weights = with_head_mask(head_mask, out, weights)
    return out.transpose(1, 2).contiguous(), weights


def is_causal_of(module, is_causal: bool | None) -> bool:
    """transformers' rule: a module that says nothing is causal."""
    return bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)


def default_mask(module, query, key, is_causal, sliding_window) -> masks.Mask | None:
    """The mask of a layer that was given none."""
    len_q, len_k = query.shape[2], key.shape[2]
    causal = len_q > 1 and is_causal_of(module, is_causal)
    if causal and len_q != len_k:
        raise ValueError(
            f"{type(module).__name__} is causal and was given no mask for {len_q} queries and "
            f"{len_k} keys: where the queries stand among the keys is not known"
        )
    if sliding_window is None or sliding_window >= len_k:
        return CAUSAL if causal else None
    if not causal and len_q > 1:
        raise ValueError(
            f"{type(module).__name__} has sliding_window={sliding_window} and was given no mask: "
            "which rows it is a window of is not known"
        )
    return masks.window(sliding_window - 1, 0, align="lower_right")


def mask_and_bias(attention_mask, query, key) -> tuple[masks.Mask | None, Tensor | None]:
    """An attention_mask as tilemask takes it."""
    if attention_mask is None:
        return None, None
    if not isinstance(attention_mask, Tensor):
        raise TypeError(f"attention_mask must be a tensor, got {describe(attention_mask)}")
    len_k = key.shape[2]
    if attention_mask.shape[-1] > len_k and version() < (5, 0):  # its rule for static caches
        attention_mask = attention_mask[..., :len_k]
    if isinstance(attention_mask, AttentionMask):
        have, want = tuple(attention_mask.shape[2:]), (query.shape[2], len_k)
        if have != want:
            raise ValueError(f"the attention mask is for (Lq, Lk) = {have}, the call has {want}")
        mask = attention_mask.mask
        return None if type(mask) is masks.Mask else mask, None
    if attention_mask.dim() != 4 or not (
        attention_mask.dtype == torch.bool or attention_mask.is_floating_point()
    ):
        raise TypeError(
            "attention_mask must be [B, 1, Lq, Lk], bool (True = may attend) or float (added), got "
            f"{describe(attention_mask)}"
        )
    if attention_mask.dtype == torch.bool:
        return masks.dense(attention_mask), None
    if attention_mask.dtype not in (query.dtype, torch.float32):
        attention_mask = attention_mask.to(query.dtype)
    return None, attention_mask


def packed(attention_mask, mask, cu_q, cu_k, causal: bool, query, key) -> masks.Mask:
    """``mask`` cut at the ends of packed sequences."""
    cu_k = cu_q if cu_k is None else cu_k
    if query.shape[2] != key.shape[2] or query.shape[0] != 1:
        raise ValueError(
            "cu_seq_lens_q is for one batch of packed sequences without a cache: expected B = 1 "
            f"and Lq = Lk, got query {tuple(query.shape)} and key {tuple(key.shape)}"
        )
    kinds = {type(part) for part in masks.parts_of(mask or masks.Mask())}
    if masks.Intervals in kinds and masks.Documents not in kinds:
        raise ValueError(
            "chunked attention counts its chunks inside each packed sequence: give position_ids "
            "that restart, no attention_mask, and use_cache=False"
        )
    known = attention_mask.packed if isinstance(attention_mask, AttentionMask) else {}
    if (id(cu_q), id(cu_k)) not in known:
        within = masks.causal(align="lower_right") if causal else None
        ends = masks.varlen(cu_q, None if cu_k is cu_q else cu_k, within)
        known[id(cu_q), id(cu_k)] = ends if mask is None else both(mask, ends), (cu_q, cu_k)
    return known[id(cu_q), id(cu_k)][0]


def wants_weights(module, output_attentions: bool | None) -> bool:
    """Whether the caller of the model asked for attention weights."""
    if output_attentions is None:
        output_attentions = getattr(getattr(module, "config", None), "output_attentions", False)
    return bool(output_attentions)


def with_head_mask(head_mask: Tensor, out: Tensor, weights: Tensor | None):
    """Weights times a factor per head, [Hq] or [B|1, Hq, 1, 1], which is output times that."""
    if head_mask.dim() == 1:
        head_mask = head_mask[:, None, None]
    if head_mask.shape[-2:] != (1, 1):
        raise ValueError(f"head_mask must hold one number per head, got {describe(head_mask)}")
    return out * head_mask, None if weights is None else weights * head_mask


# -- transformers 4: models that choose a class of attention by name ------------------------------

TABLES = {  # models: the table in their module
    "albert": "ALBERT_ATTENTION_CLASSES",
    "bert": "BERT_SELF_ATTENTION_CLASSES",
    "camembert": "CAMEMBERT_SELF_ATTENTION_CLASSES",
    "olmoe": "OLMOE_ATTENTION_CLASSES",
    "phimoe": "PHIMOE_ATTENTION_CLASSES",
    "qwen2_moe": "QWEN2MOE_ATTENTION_CLASSES",
    "roberta": "ROBERTA_SELF_ATTENTION_CLASSES",
    "stablelm": "ATTENTION_CLASSES",
    "xlm_roberta": "XLM_ROBERTA_SELF_ATTENTION_CLASSES",
    "xlm_roberta_xl": "XLMROBERTAXL_SELF_ATTENTION_CLASSES",
}


def register_classes() -> None:
    """Add classes to the tables of models that are not written for attention functions."""
    for model, table in TABLES.items():
        module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
        classes = getattr(module, table, None)
        if classes and "sdpa" in classes and NAME not in classes:
            classes[NAME] = through_sdpa(classes["sdpa"])


def through_sdpa(base: type) -> type:
    """A class of attention that calls torch's SDPA, with tilemask's in its place."""

    def forward(self, *args, **kwargs):
        with Swapped():
            return base.forward(self, *args, **kwargs)

    made = {"forward": functools.wraps(base.forward)(forward), "__module__": base.__module__}
    return type(base.__name__.replace("Sdpa", "Tilemask"), (base,), made)


class Swapped(TorchFunctionMode):
    """Inside, torch's SDPA is tilemask's."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        kwargs |= zip(("query", "key", "value", "attn_mask", "dropout_p"), args, strict=False)
        if isinstance(kwargs.get("attn_mask"), AttentionMask):
            kwargs["attn_mask"] = kwargs["attn_mask"].mask
        return scaled_dot_product_attention(**kwargs)
