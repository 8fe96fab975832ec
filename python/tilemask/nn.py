"""Drop-in modules: MultiheadAttention, and replace_attention() for models that exist.

Here True means *may not attend*, as in torch.nn.MultiheadAttention; everywhere else in tilemask it
means the opposite.
"""

from __future__ import annotations

import functools
import math
import weakref

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.transformer import _detect_is_causal_mask

from . import backends, lowering, masks
from .attention import CAUSAL, attention, attention_weights, checked, checked_seed
from .autograd import is_traced
from .masks import Mask, describe

__all__ = ["MultiheadAttention", "Replacement", "replace_attention"]


def no_fast_path(module, arguments):
    """A hook that does nothing: torch.nn.TransformerEncoderLayer takes its fast path, which goes
    around its attention module, only where no module in it has a hook."""


class MultiheadAttention(torch.nn.MultiheadAttention):
    """torch.nn.MultiheadAttention, with masks that cost what they leave.

    The same constructor, parameters and state dict, arguments and results, with these differences:

    * key_padding_mask and attn_mask are never merged; a bool one never becomes a float one;
    * a row that sees nothing gives weights 0 and the output of a zero vector (out_proj's bias), not
      NaN;
    * is_causal=True needs no attn_mask. With one it is the hint that this is the causal mask:
      believed on a GPU, checked on the CPU, where the mask counts if it is not.

    need_weights=True (the default, as in torch) costs a second pass over the scores: pass False
    where the weights are not used.
    """

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.register_forward_pre_hook(no_fast_path)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As torch.nn.MultiheadAttention.forward."""
        if query.is_nested or key.is_nested or value.is_nested:
            if query is not key or key is not value or not self.batch_first:
                raise TypeError("nested tensors are for self-attention with batch_first=True")
            if key_padding_mask is not None or attn_mask is not None:
                raise TypeError("nested tensors take neither key_padding_mask nor attn_mask")
            return self.forward_nested(query, need_weights, average_attn_weights, is_causal)
        check_shapes(query, key, value, key_padding_mask, attn_mask, self.num_heads)
        batched = query.dim() == 3
        q, k, v = self.projected(query, key, value)
        if not batched and key_padding_mask is not None:
            key_padding_mask = key_padding_mask[None]
        extra = (self.bias_k is not None) + self.add_zero_attn
        if extra:
            k = self.with_extra_keys(k, self.bias_k)
            v = self.with_extra_keys(v, self.bias_v)
        mask, bias = masks_and_bias(key_padding_mask, attn_mask, is_causal, q, k, extra)
        options = {"mask": mask, "bias": bias}
        if self.training and self.dropout:
            options |= {"dropout_p": self.dropout, "dropout_seed": checked_seed(None, q.device)}
        out = attention(q, k, v, **options)
        if batched and not self.batch_first:
            out = out.permute(2, 0, 1, 3).flatten(2)  # [L, B, E]
        else:
            out = out.transpose(1, 2).flatten(2)  # [B, L, E]
        out = F.linear(out, self.out_proj.weight, self.out_proj.bias)
        weights = None
        if need_weights:
            weights = weights_of(q, k, "mean_heads" if average_attn_weights else None, options)
        if not batched:
            return out[0], None if weights is None else weights[0]
        return out, weights

    def forward_nested(self, x: Tensor, need_weights, average_attn_weights, is_causal):
        """Self-attention of a nested tensor [B, *, E], as torch's fast path takes it."""
        lengths = [part.shape[0] for part in x.unbind()]
        padded = torch.nested.to_padded_tensor(x, 0.0)
        end = torch.tensor(lengths, device=x.device)
        padding = torch.arange(padded.shape[1], device=x.device) >= end[:, None]
        out, weights = self.forward(
            padded, padded, padded, padding, need_weights, None, average_attn_weights, is_causal
        )
        parts = [row[:length] for row, length in zip(out, lengths, strict=True)]
        return torch.nested.as_nested_tensor(parts, layout=x.layout), weights

    def projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """q, k and v [B, H, L, D], views of what the projections give."""
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if weight is None:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            biases = (None,) * 3 if bias is None else bias.chunk(3)
            parts = [F.linear(*args) for args in zip((query, key, value), weights, biases)]
        elif query is key and key is value:
            parts = F.linear(query, weight, bias).chunk(3, -1)
        else:
            weights = weight.chunk(3)
            biases = (None,) * 3 if bias is None else bias.chunk(3)
            if key is value:
                q = F.linear(query, weights[0], biases[0])
                E = self.embed_dim
                both = F.linear(key, weight[E:], None if bias is None else bias[E:])
                parts = (q, *both.chunk(2, -1))
            else:
                parts = [F.linear(*args) for args in zip((query, key, value), weights, biases)]
        return tuple(self.in_heads(part) for part in parts)

    def in_heads(self, x: Tensor) -> Tensor:
        """[L, E], [B, L, E] or, if not batch_first, [L, B, E] -> [B, H, L, D]"""
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        if x.dim() == 3:
            return x.transpose(0, 1)[None]
        return x.permute(0, 2, 1, 3) if self.batch_first else x.permute(1, 2, 0, 3)

    def with_extra_keys(self, x: Tensor, learned: Tensor | None) -> Tensor:
        """k or v with bias_k or bias_v, and a zero, behind the last key."""
        parts, shape = [x], (x.shape[0], self.num_heads, 1, self.head_dim)
        if learned is not None:
            learned = learned.view(1, self.num_heads, 1, self.head_dim)
            parts.append(learned.to(x.dtype).expand(shape))
        if self.add_zero_attn:
            parts.append(x.new_zeros(shape))
        return torch.cat(parts, 2)


def check_shapes(query, key, value, key_padding_mask, attn_mask, heads: int) -> None:
    dims = query.dim()
    if dims not in (2, 3) or key.dim() != dims or value.dim() != dims:
        raise ValueError(
            "query, key and value must all be batched (3 dimensions) or all unbatched (2), got "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )
    if key.shape[:-1] != value.shape[:-1]:
        raise ValueError(
            f"key {tuple(key.shape)} and value {tuple(value.shape)} differ in length or batch"
        )
    for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
        if mask is None:
            continue
        if not isinstance(mask, Tensor) or not (
            mask.dtype == torch.bool or mask.is_floating_point()
        ):
            raise TypeError(
                f"{name} must be a bool tensor (True = may not attend) or a float one (added), "
                f"got {describe(mask)}"
            )


# -- masks ----------------------------------------------------------------------------------------


def masks_and_bias(
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
    q: Tensor,
    k: Tensor,
    extra: int,
) -> tuple[Mask | None, Tensor | None]:
    """(mask, bias) for attention(). ``extra``: keys at the end of k, which every row sees.

    key_padding_mask [B, S], attn_mask [L, S] or [B * H, L, S].
    """
    B, H, L = q.shape[:3]
    S = k.shape[2] - extra
    if key_padding_mask is not None and key_padding_mask.shape != (B, S):
        raise ValueError(
            f"key_padding_mask has shape {tuple(key_padding_mask.shape)}, expected (N, S) = "
            f"{(B, S)}, or (S,) without batch"
        )
    if attn_mask is not None and attn_mask.shape not in ((L, S), (B * H, L, S)):
        raise ValueError(
            f"attn_mask has shape {tuple(attn_mask.shape)}, expected (L, S) = {(L, S)} or "
            f"(N * num_heads, L, S) = {(B * H, L, S)}"
        )
    if key_padding_mask is None and attn_mask is None:
        if not is_causal:
            return None, None
        if not extra:
            return CAUSAL, None
    mask, causal = kept_mask(key_padding_mask, attn_mask, is_causal, (B, H, L, S), extra, q.device)
    bias = None
    if attn_mask is not None and attn_mask.is_floating_point() and not causal:
        bias = with_extra(by_head(attn_mask, B, H), extra)
    if key_padding_mask is not None and key_padding_mask.is_floating_point():
        keys = with_extra(key_padding_mask[:, None, None, :], extra)
        bias = keys if bias is None else bias + keys
    if bias is not None and bias.dtype not in (q.dtype, torch.float32):
        raise TypeError(
            f"float masks must be float32 or {q.dtype}, as the projected query, got {bias.dtype}"
        )
    return mask, bias


def made_mask(
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
    sizes,
    extra: int,
    device,
) -> tuple[Mask | None, bool]:
    """The mask of what is bool, or -inf for a key; and whether causal() stands for attn_mask.

    sizes: B, H, L and S, without the extra keys.
    """
    B, H, L, S = sizes
    parts = []
    causal = is_causal and not extra and (attn_mask is None or may_be_causal(attn_mask))
    if causal:
        parts.append(CAUSAL)
    elif attn_mask is not None and attn_mask.dtype == torch.bool:
        seen = ~by_head(masks.without_repeats(attn_mask), B, H)
        parts.append(masks.dense(with_extra(seen, extra, S)))
    elif attn_mask is None and is_causal:
        seen = torch.ones(L, S, dtype=torch.bool, device=device).tril()
        parts.append(masks.dense(with_extra(seen, extra)))
    if key_padding_mask is not None:
        floats = key_padding_mask.is_floating_point()
        keep = key_padding_mask != -math.inf if floats else ~key_padding_mask
        parts.append(masks.padding(keep=with_extra(keep.expand(B, S), extra)))
    return (functools.reduce(Mask.__and__, parts) if parts else None), causal


def by_head(attn_mask: Tensor, B: int, H: int) -> Tensor:
    """[L, S], [1, L, S] or [B * H, L, S] -> a view that broadcasts to [B, H, L, S]"""
    if attn_mask.dim() == 3 and attn_mask.shape[0] == B * H:
        return attn_mask.unflatten(0, (B, H)) if B * H else attn_mask[None]
    return attn_mask


def with_extra(tensor: Tensor, extra: int, length: int | None = None) -> Tensor:
    """What holds for the keys, and then for the extra ones: True, or 0 of a bias."""
    if not extra:
        return tensor
    if length is not None:  # a dimension of 1 must not be taken for the keys
        tensor = tensor.expand(*tensor.shape[:-1], length)
    return F.pad(tensor, (0, extra), value=float(tensor.dtype == torch.bool))


def may_be_causal(attn_mask: Tensor) -> bool:
    """Whether the hint is_causal is right, as far as that can be seen without a GPU waiting."""
    if attn_mask.requires_grad:
        return False
    if not masks.check_values_of(attn_mask):
        return True
    L, S = attn_mask.shape[-2:]
    blocked = torch.ones(L, S, dtype=torch.bool, device=attn_mask.device).triu(1)
    if attn_mask.dtype != torch.bool:
        blocked = torch.zeros(L, S, device=attn_mask.device).masked_fill(blocked, -math.inf)
    return bool((attn_mask.detach() == blocked).all())


# Every layer of a model gets the same masks: what was made of them is kept with tilemask's cache of
# lowered masks, while they live unchanged.
_made: weakref.WeakKeyDictionary[lowering.Cache, dict] = weakref.WeakKeyDictionary()


def kept_mask(key_padding_mask, attn_mask, is_causal, sizes, extra, device):
    """As made_mask(), from the cache where it has it."""
    given = [t for t in (key_padding_mask, attn_mask) if t is not None]
    cache = lowering.cache_for(tuple(given), device) if given else None
    if cache is None:
        return made_mask(key_padding_mask, attn_mask, is_causal, sizes, extra, device)
    kept = _made.setdefault(cache, {})
    stream = lowering.stream_id(device)
    key = (id(key_padding_mask), id(attn_mask), is_causal, sizes, extra, device, stream)
    versions = [t._version for t in given]
    owners, seen, value = kept.get(key, ((), None, None))
    if seen == versions and all([ref() is t for ref, t in zip(owners, given)]):
        return value
    with torch.inference_mode(False), torch.no_grad():
        value = made_mask(key_padding_mask, attn_mask, is_causal, sizes, extra, device)
    owners = [weakref.ref(t, lambda _, key=key: kept.pop(key, None)) for t in given]
    if len(kept) >= lowering.MOST_SHARED:
        kept.clear()
    kept[key] = owners, versions, value
    return value


# -- weights --------------------------------------------------------------------------------------


class Weights(torch.autograd.Function):
    """attention_weights() on a backend that has no gradient for them: should anybody ask for it,
    the reference computes them anew."""

    @staticmethod
    def forward(ctx, q, k, bias, reduce, options):
        ctx.save_for_backward(q, k, bias)
        ctx.options = options | {"reduce": reduce}
        return attention_weights(q, k, bias=bias, **ctx.options)

    @staticmethod
    def backward(ctx, dweights):
        again = torch.is_grad_enabled()  # create_graph=True
        given = [t if t is None or again else t.detach() for t in ctx.saved_tensors]
        asked = [t for t, need in zip(given, ctx.needs_input_grad) if need]
        with torch.enable_grad():
            if not again:
                for tensor in asked:
                    tensor.requires_grad_()
            q, k, bias = given
            weights = attention_weights(q, k, bias=bias, backend="reference", **ctx.options)
            found = iter(torch.autograd.grad(weights, asked, dweights, create_graph=again))
        return *(next(found) if need else None for need in ctx.needs_input_grad[:3]), None, None


def weights_of(q: Tensor, k: Tensor, reduce: str | None, options: dict) -> Tensor:
    """attention_weights(); what it costs to be differentiable is paid by who differentiates."""
    bias = options["bias"]
    wanted = any(t is not None and t.requires_grad for t in (q, k, bias))
    if wanted and torch.is_grad_enabled() and not is_traced(q, k):
        if backends.choose(checked(q, k, k[..., :1], **options)) is not backends.reference:
            options = {name: value for name, value in options.items() if name != "bias"}
            return Weights.apply(q, k, bias, reduce, options)
    return attention_weights(q, k, reduce=reduce, **options)


# -- models that exist ----------------------------------------------------------------------------


class TransformerEncoderLayer(torch.nn.TransformerEncoderLayer):
    """torch's, with bool masks that stay bool and no fast path around ``self_attn``."""

    def forward(self, src, src_mask=None, src_key_padding_mask=None, is_causal=False):
        x = src
        attend = functools.partial(self._sa_block, is_causal=is_causal)
        if self.norm_first:
            x = x + attend(self.norm1(x), src_mask, src_key_padding_mask)
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(x + attend(x, src_mask, src_key_padding_mask))
        return self.norm2(x + self._ff_block(x))


class TransformerEncoder(torch.nn.TransformerEncoder):
    """torch's, with bool masks that stay bool and no nested tensors; but what these do to padded
    positions (0 before the last norm, in inference with padding on the right) is done here too."""

    def forward(self, src, mask=None, src_key_padding_mask=None, is_causal=None):
        first = self.layers[0]
        if mask is None or (is_causal is None and torch.compiler.is_compiling()):
            is_causal = bool(is_causal)
        else:
            length = src.shape[1 if first.self_attn.batch_first and src.dim() == 3 else 0]
            is_causal = _detect_is_causal_mask(mask, is_causal, length)
        padding = src_key_padding_mask
        zeroed = mask is None and padding is not None and self.would_pack(src, first)
        for layer in self.layers:
            src = layer(src, src_mask=mask, is_causal=is_causal, src_key_padding_mask=padding)
        if zeroed:
            padded = padding != 0  # float masks have -inf there
            on_the_right = (padded[:, 1:] >= padded[:, :-1]).all() if self.mask_check else True
            src = src.masked_fill((padded & on_the_right)[..., None], 0.0)
        return src if self.norm is None else self.norm(src)

    def would_pack(self, src: Tensor, first: torch.nn.Module) -> bool:
        """Whether torch's encoder would make a nested tensor of ``src`` and the padding mask."""
        return (
            torch.backends.mha.get_fastpath_enabled()
            and self.use_nested_tensor
            and not first.training
            and src.dim() == 3
            and not src.is_nested
            and not (self.mask_check and torch.compiler.is_compiling())
            and not torch.is_autocast_enabled()
            and not (
                torch.is_grad_enabled()
                and (src.requires_grad or any(p.requires_grad for p in first.parameters()))
            )
        )


OURS = (MultiheadAttention, TransformerEncoderLayer, TransformerEncoder)


class Replacement:
    """What replace_attention() did to a model; ``undo()`` takes it back, as does leaving a ``with``
    block. ``modules`` are the attention modules that it changed."""

    def __init__(self, model: torch.nn.Module):
        self.modules: list[torch.nn.Module] = []
        self._before = []  # module, its class, the hook's handle
        for module in model.modules():
            for ours in OURS:
                if isinstance(module, ours.__base__) and not isinstance(module, ours):
                    self._replace(module, ours)

    def _replace(self, module, ours):
        before, hook = type(module), None
        if ours is MultiheadAttention:
            hook = module.register_forward_pre_hook(no_fast_path)
            self.modules.append(module)
        module.__class__ = ours if before is ours.__base__ else mixed(before, ours)
        self._before.append((module, before, type(module), hook))

    def undo(self) -> None:
        """Give every module its class back. Does nothing the second time."""
        for module, before, now, hook in self._before:
            if type(module) is now:
                module.__class__ = before
            if hook is not None:
                hook.remove()
        self._before = []

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.undo()


@functools.cache
def mixed(cls: type, ours: type) -> type:
    """A subclass of torch's module with ours in place of torch's: its super() is ours."""

    def __reduce_ex__(self, protocol):
        _, _, *state = super(result, self).__reduce_ex__(protocol)
        return unmixed, (cls, ours), *state

    result = type(cls.__name__, (cls, ours), {"__reduce_ex__": __reduce_ex__})
    return result


def unmixed(cls: type, ours: type):
    """An empty module of mixed(cls, ours), for pickle and copy."""
    made = mixed(cls, ours)
    return made.__new__(made)


def replace_attention(model: torch.nn.Module) -> Replacement:
    """Turn every torch.nn.MultiheadAttention in ``model`` into tilemask's, in place.

    The modules stay the same objects, with their parameters, hooks and settings: only their class
    changes. Encoders and their layers (nn.Transformer has them) go with them, to hand on bool masks
    as they are and never take the fast path that computes attention without its module.
    Subclasses keep their own methods. Returns a Replacement: ``.undo()`` takes everything back, and
    ``with replace_attention(model):`` does so at the end of the block. What is replaced already is
    left alone.
    """
    return Replacement(model)
