"""torch.nn.functional.scaled_dot_product_attention, through tilemask: patch().

Only lookups at call time are reached: ``F.scaled_dot_product_attention(...)``, and PyTorch's own
modules. ``from torch.nn.functional import scaled_dot_product_attention`` before patch() keeps
torch's function.
"""

from __future__ import annotations

import threading

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.jit._builtins import _register_builtin
from torch.nn.attention.bias import CausalBias

import tilemask

KNOWN = (Tensor, torch.nn.Parameter, FakeTensor, FunctionalTensor, CausalBias)

_lock = threading.Lock()
_active = 0  # patches that are in force
_on = False  # whether there are any
_original = F.scaled_dot_product_attention  # torch's function and setting, before the first
_fast_path = True


def scaled_dot_product_attention(
    query,
    key,
    value,
    attn_mask=None,
    dropout_p=0.0,
    is_causal=False,
    scale=None,
    enable_gqa=False,
):
    """tilemask.scaled_dot_product_attention, or torch's for what only torch takes."""
    function = tilemask.scaled_dot_product_attention
    if not _on or is_torchs_own(query, key, value, attn_mask):
        function = _original
    return function(
        query,
        key,
        value,
        attn_mask=attn_mask,
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
    )


def is_torchs_own(query, key, value, attn_mask) -> bool:
    """Whether a call is left to torch: nested and sparse tensors, tensor subclasses of others,
    heads of width 0, and torch.jit.trace()."""
    if torch.jit.is_tracing():
        return True
    for tensor in (query, key, value):
        if type(tensor) not in KNOWN or tensor.is_nested or tensor.layout != torch.strided:
            return True
    if isinstance(attn_mask, Tensor) and type(attn_mask) not in KNOWN:
        return True
    return 0 in (query.shape[-1:] + value.shape[-1:])


# torch.jit.script() of code that calls F.scaled_dot_product_attention gets torch's operator
_register_builtin(scaled_dot_product_attention, "aten::scaled_dot_product_attention")


class Patch:
    """A patch in force. ``undo()`` ends it, as does leaving a ``with`` block; the last one to end
    gives torch its function back."""

    def __init__(self):
        global _active, _on, _original, _fast_path
        self._ended = False
        with _lock:
            _active += 1
            if not _on:
                if F.scaled_dot_product_attention is not scaled_dot_product_attention:
                    _original = F.scaled_dot_product_attention
                    F.scaled_dot_product_attention = scaled_dot_product_attention
                _fast_path = torch.backends.mha.get_fastpath_enabled()
                torch.backends.mha.set_fastpath_enabled(False)
                _on = True

    def undo(self) -> None:
        """Does nothing the second time."""
        global _active, _on
        with _lock:
            if self._ended:
                return
            self._ended = True
            _active -= 1
            if not _active:
                _on = False
                if F.scaled_dot_product_attention is scaled_dot_product_attention:
                    F.scaled_dot_product_attention = _original
                torch.backends.mha.set_fastpath_enabled(_fast_path)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.undo()


def patch() -> Patch:
    """Route torch.nn.functional.scaled_dot_product_attention through tilemask, from now on.

    For the whole process, until ``.undo()`` of what is returned, or inside ``with patch():``. Also
    reaches the calls in nn.MultiheadAttention and F.multi_head_attention_forward; the inference
    fast path of nn.MultiheadAttention and nn.TransformerEncoderLayer, which computes attention by
    other means, is switched off meanwhile. Patches may nest and overlap: the last to end restores
    torch's function. Nested tensors, sparse ones and foreign tensor subclasses go to torch.
    """
    return Patch()
