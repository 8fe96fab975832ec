"""bfloat16 for Triton's CPU interpreter, which has none: installed where TRITON_INTERPRET=1 is set.

The interpreter of Triton 3.6 to 3.9 keeps bfloat16 as raw 16-bit integers: ``tl.dot`` multiplies
the bit patterns, casts from float32 truncate, arithmetic works on bits. Here products and casts go
through float32 with rounding to nearest even, and arithmetic on bfloat16 raises, since a kernel
should have cast to float32 first.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def is_bf16(handle) -> bool:
    return isinstance(handle, interpreter.TensorHandle) and handle.dtype.scalar == tl.bfloat16


def widened(handle):
    """A bfloat16 handle as an exact float32 one; others unchanged."""
    if not is_bf16(handle):
        return handle
    bits = handle.data.astype(np.uint32) << np.uint32(16)
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)


def narrowed(values: np.ndarray) -> np.ndarray:
    """float32 values as bfloat16 bits, rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)


def install() -> None:
    """Patch the interpreter once."""
    builder = interpreter.InterpreterBuilder
    if getattr(builder, "tilemask_bf16", False):
        return
    dot, cast = builder.create_dot, builder.cast_impl

    def create_dot(self, a, b, *rest):
        return dot(self, widened(a), widened(b), *rest)

    def cast_impl(self, source, target):
        if is_bf16(source) and target.scalar == tl.bfloat16:
            return source
        source = widened(source)
        if target.scalar == tl.bfloat16:
            values = source.data.astype(np.float32)
            return interpreter.TensorHandle(narrowed(values), tl.bfloat16)
        return source if target.scalar == source.dtype.scalar else cast(self, source, target)

    def refusing(name):
        original = getattr(builder, name)

        def operation(self, *arguments):
            if any(map(is_bf16, arguments)):
                raise TypeError(f"{name} on bfloat16 in the interpreter: cast to float32 first")
            return original(self, *arguments)

        return operation

    builder.create_dot, builder.cast_impl = create_dot, cast_impl
    for name in ("binary_op", "unary_op"):
        setattr(builder, name, refusing(name))
    builder.tilemask_bf16 = True
