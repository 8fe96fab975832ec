"""tilemask: masked attention that costs only the tiles the mask leaves."""

from . import masks
from .attention import (
    attention,
    attention_weights,
    explain,
    reference_attention,
    scaled_dot_product_attention,
)
from .backends import available_backends, use_backend
from .merge import merge_states

__version__ = "0.1.0"
__all__ = [
    "attention",
    "attention_weights",
    "available_backends",
    "explain",
    "masks",
    "merge_states",
    "reference_attention",
    "scaled_dot_product_attention",
    "use_backend",
]
