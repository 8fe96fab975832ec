"""PyTorch's own sample inputs: of its attention modules and of scaled_dot_product_attention."""

import sys
import types
import unittest
import warnings

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map

MODULES = (
    "MultiheadAttention",
    "TransformerEncoderLayer",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "Transformer",
)


def import_published():
    """torch.testing._internal's two lists, without expecttest, which they do not need."""
    if "expecttest" not in sys.modules:
        try:
            import expecttest  # noqa: F401
        except ImportError:
            stand_in = types.ModuleType("expecttest")
            stand_in.TestCase = unittest.TestCase
            sys.modules["expecttest"] = stand_in
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_methods_invocations import op_db
        from torch.testing._internal.common_modules import module_db
    return op_db, module_db


def module_samples(name: str, training: bool, requires_grad: bool):
    """(module, args, kwargs) in float64 on the CPU; dropout 0."""
    _, module_db = import_published()
    for info in module_db:
        if info.module_cls.__name__ != name:
            continue
        samples = info.module_inputs_func(
            info,
            device="cpu",
            dtype=torch.float64,
            requires_grad=requires_grad,
            training=training,
        )
        for sample in samples:
            made, given = sample.constructor_input, sample.forward_input
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # nested tensors would need batches first
                module = info.module_cls(*made.args, **made.kwargs).double().train(training)
            for part in module.modules():
                if isinstance(part, torch.nn.Dropout):
                    part.p = 0.0
                if isinstance(part, torch.nn.MultiheadAttention):
                    part.dropout = 0.0
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.normal_()
            yield module, given.args, given.kwargs


def sdpa_samples(dtype):
    """(tensors, kwargs) of scaled_dot_product_attention, without dropout."""
    op_db, _ = import_published()
    name = "nn.functional.scaled_dot_product_attention"
    for info in (info for info in op_db if info.name == name):
        for sample in info.sample_inputs("cpu", dtype, requires_grad=True):
            options = {**sample.kwargs, "dropout_p": 0.0}
            yield (sample.input, *sample.args), options


def check(got, tensors, options, dtype) -> None:
    """got: results() of a sample of scaled_dot_product_attention in ``dtype``; they are no further
    from those in float64 than twice torch's."""
    attend = torch.nn.functional.scaled_dot_product_attention
    truth = results(attend, *tree_map(wider, (tensors, options)))
    with sdpa_kernel(SDPBackend.MATH):
        torchs = results(attend, tensors, options)
    for theirs, mine, right in zip(*map(tree_leaves, (torchs, got, truth)), strict=True):
        assert mine.dtype == theirs.dtype == dtype
        errors = [(t.double() - right).abs().max().item() for t in (theirs, mine)]
        # sums of float32 numbers in the hundreds that cancel: inputs go up to 9
        tiny = 4 * torch.finfo(dtype).eps * max(1.0, right.abs().max().item()) + 1e-5
        assert errors[1] <= 2 * errors[0] + tiny


def wider(t):
    if not torch.is_tensor(t) or t.dtype == torch.bool:
        return t
    return t.detach().double().requires_grad_(t.requires_grad)


def results(function, args, kwargs, parameters=(), grad=True):
    """The tensors that function gives, and the gradients of inputs and parameters."""

    def fresh(t):
        return t.detach().clone().requires_grad_(t.requires_grad) if torch.is_tensor(t) else t

    args, kwargs = tree_map(fresh, (args, kwargs))
    with torch.set_grad_enabled(grad), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mismatched masks
        out = [t for t in tree_leaves(function(*args, **kwargs)) if torch.is_tensor(t)]
    if not grad:
        return out, []
    leaves = [t for t in tree_leaves((args, kwargs)) if torch.is_tensor(t) and t.requires_grad]
    torch.manual_seed(0)
    upstream = [torch.randn(t.shape, dtype=t.dtype) for t in out]
    leaves += parameters
    return out, list(torch.autograd.grad(out, leaves, upstream, allow_unused=True))
