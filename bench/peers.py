"""What is timed: tilemask on each of its backends, and the other ways people compute the same.

Each peer is called as its users call it: with the mask in the form it takes, sequences gathered and
scattered back where it needs them packed, keys repeated over heads where it has no grouped heads.
What it cannot do is a sentence.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import tilemask

from .check import Inputs, Truth
from .workloads import FORWARD, Packed, Pattern, Workload

Attend = Callable[[Inputs], Tensor]  # -> out [B, Hq, Lq, Dv]


@dataclass
class Case:
    """A workload with its data on a device."""

    work: Workload
    pattern: Pattern
    device: str
    sets: list[Inputs]
    truth: Truth

    @functools.cached_property
    def attn_mask(self) -> Tensor | None:
        return self.pattern.attn_mask(self.work, self.device)


@dataclass
class Ready:
    """A contender ready for a case: the call, and what its users do once per mask, not per call."""

    attend: Attend
    prepare: Callable[[], object] | None = None
    facts: dict = field(default_factory=dict)


class Contender:
    """A way to compute attention.

    name: as in the table. module: what must be importable. alone: whether it needs a process of its
    own, because its libraries clash with others or may end the process.
    """

    name = ""
    module: str | None = None
    alone = False

    def absent(self, device: str) -> str | None:
        """Why it cannot run anything here, None if it can."""
        if self.module is not None and not installed(self.module):
            return f"{self.module} is not installed"
        return None

    def why_not(self, case: Case, direction: str) -> str | None:
        """Why it cannot run this case, as far as its users know beforehand."""
        return None

    def ready(self, case: Case) -> Ready:
        raise NotImplementedError

    def context(self):
        """Entered around all calls of a case."""
        return contextlib.nullcontext()


def installed(module: str) -> bool:
    """Whether a module is there, without importing any part of it."""
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None or not rest:
        return spec is not None
    homes = [Path(home, *rest) for home in spec.submodule_search_locations or ()]
    return any(home.is_dir() or home.with_suffix(".py").is_file() for home in homes)


class Tilemask(Contender):
    def __init__(self, backend: str):
        self.backend = backend
        self.name = f"tilemask {backend}"

    def absent(self, device):
        if self.backend not in tilemask.available_backends():
            return f"backend {self.backend!r} does not run here: python -m tilemask doctor"
        return None

    def ready(self, case):
        mask, scale, backend = case.pattern.mask, case.work.scale, self.backend

        def attend(given):
            return tilemask.attention(
                given.q,
                given.k,
                given.v,
                mask=mask,
                bias=given.bias,
                scale=scale,
                backend=backend,
            )

        given = case.sets[0]
        said = tilemask.explain(given.q, given.k, given.v, mask=mask, backend=backend)
        return Ready(attend, facts={"tile": list(said.tile), "visited": said.visited})


class Sdpa(Contender):
    """torch's F.scaled_dot_product_attention, held to one of its backends."""

    def __init__(self, name: str, backend: SDPBackend, gpu_only: bool):
        self.name, self.backend, self.gpu_only = f"sdpa {name}", backend, gpu_only

    def absent(self, device):
        if self.gpu_only and device != "cuda":
            return "it has no CPU kernel"
        return None

    def why_not(self, case, direction):
        work = case.work
        if self.backend == SDPBackend.MATH and case.device == "cuda":
            scores = 4 * work.B * work.Hq * work.Lq * work.Lk
            if scores > torch.cuda.get_device_properties(0).total_memory / 6:
                return f"holds all scores: {scores / 2**30:.0f} GiB each time, and several times"
        return None

    def context(self):
        return sdpa_kernel([self.backend])

    def ready(self, case):
        work, causal = case.work, case.pattern.is_causal and case.work.bias is None
        seen = None if causal else case.attn_mask
        # the efficient kernel takes no grouped heads: its users repeat the keys
        repeat = work.Hq // work.Hkv if self.backend == SDPBackend.EFFICIENT_ATTENTION else 1

        def attend(given):
            k, v = given.k, given.v
            if repeat > 1:
                k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
            mask = seen
            if given.bias is not None:
                bias = given.bias
                mask = bias if seen is None else bias.masked_fill(~seen, float("-inf"))
            return F.scaled_dot_product_attention(
                given.q,
                k,
                v,
                attn_mask=mask,
                is_causal=causal,
                scale=work.scale,
                enable_gqa=k.shape[1] != work.Hq,
            )

        return Ready(attend)


class Flex(Contender):
    """FlexAttention: compiled on a GPU; eager on a CPU, where compiling takes longer than a run."""

    name = "flex"
    module = "torch.nn.attention.flex_attention"

    def why_not(self, case, direction):
        if case.pattern.mod is None and case.pattern.mask is not None:
            return "the mask is not written as a mask_mod"
        if case.device == "cpu" and direction != FORWARD:
            return "FlexAttention has no backward on a CPU"
        return None

    def ready(self, case):
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        work, mod, compiled = case.work, case.pattern.mod, case.device == "cuda"

        def prepare():
            return create_block_mask(mod, work.B, None, work.Lq, work.Lk, device=case.device)

        block_mask = None if mod is None else prepare()
        own = [int(size > 1) for size in work.bias_shape() or ()]

        def call(q, k, v, bias):
            def score_mod(score, b, h, i, j):
                return score + bias[b * own[0], h * own[1], i * own[2], j * own[3]]

            return flex_attention(
                q,
                k,
                v,
                score_mod=None if bias is None else score_mod,
                block_mask=block_mask,
                scale=work.scale,
                enable_gqa=work.Hq != work.Hkv,
            )

        if compiled:
            torch._dynamo.reset()  # a mask each time: without it torch soon gives up compiling
            call = torch.compile(call, dynamic=False, fullgraph=True)

        def attend(given):
            return call(given.q, given.k, given.v, given.bias)

        facts = {"note": "compiled" if compiled else "eager"}
        return Ready(attend, None if mod is None else prepare, facts)


# -- interfaces for packed sequences --------------------------------------------------------------


def pack(tensor: Tensor, index: Tensor | None) -> Tensor:
    """[B, H, L, D] to the tokens [T, H, D] that ``index`` takes of B * L."""
    tokens = tensor.transpose(1, 2).flatten(0, 1)
    return tokens if index is None else tokens.index_select(0, index)


def unpack(tokens: Tensor, index: Tensor | None, B: int, L: int) -> Tensor:
    """[T, H, D] back to [B, H, L, D], 0 where there is no token."""
    if index is not None:
        whole = tokens.new_zeros(B * L, *tokens.shape[1:])
        tokens = whole.index_copy(0, index, tokens)
    return tokens.unflatten(0, (B, L)).transpose(1, 2)


class PackedContender(Contender):
    """What takes full, causal and windowed attention over dense or packed sequences, and no more.

    A subclass has ``dense(given, case)`` on [B, H, L, D], or None, and ``varlen(q, k, v, packed,
    case)`` on tokens [T, H, D].
    """

    needs_half = True

    def absent(self, device):
        if device != "cuda":
            return "it has no CPU kernel"
        return super().absent(device)

    def why_not(self, case, direction):
        if case.work.bias is not None:
            return "takes no bias"
        if case.pattern.window is None and case.pattern.lengths is None:
            return "takes causal, windows and packed sequences, not this mask"
        if self.needs_half and case.work.dtype == "float32":
            return "takes float16 and bfloat16"
        if case.work.Dv != case.work.D:
            return "takes D = Dv"
        return None

    def ready(self, case):
        packed, work = case.pattern.packed, case.work
        if packed is None:
            return Ready(lambda given: self.dense(given, case))

        def attend(given):
            q = pack(given.q, packed.index_q)
            k, v = pack(given.k, packed.index_k), pack(given.v, packed.index_k)
            out = self.varlen(q, k, v, packed, case)
            return unpack(out, packed.index_q, work.B, work.Lq)

        return Ready(attend)

    def dense(self, given: Inputs, case: Case) -> Tensor:
        raise NotImplementedError

    def varlen(self, q: Tensor, k: Tensor, v: Tensor, packed: Packed, case: Case) -> Tensor:
        raise NotImplementedError


class VarlenAttn(PackedContender):
    """torch.nn.attention.varlen.varlen_attn."""

    name = "varlen_attn"
    module = "torch.nn.attention.varlen"

    def why_not(self, case, direction):
        if case.pattern.packed is None:
            return "for packed sequences: here there are none"
        return super().why_not(case, direction)

    def varlen(self, q, k, v, packed, case):
        from torch.nn.attention.varlen import varlen_attn

        sizes = (packed.cu_q, packed.cu_k, packed.max_q, packed.max_k)
        options = {
            "scale": case.work.scale,
            "window_size": case.pattern.window,
            "enable_gqa": case.work.Hq != case.work.Hkv,
        }
        return varlen_attn(q, k, v, *sizes, **accepted(varlen_attn, options))


def accepted(function, options: dict) -> dict:
    """Those of the options that a function takes: versions differ."""
    known = inspect.signature(function).parameters
    if any(p.kind == inspect.Parameter.VAR_KEYWORD for p in known.values()):
        return options
    return {name: value for name, value in options.items() if name in known}


class FlashAttention(PackedContender):
    """flash-attn 2, 3 or 4: one interface, three packages that do not share a process."""

    alone = True

    def __init__(self, version: int, module: str):
        self.name, self.module = f"flash-attn {version}", module

    def why_not(self, case, direction):
        if case.pattern.lengths is not None and not self.function("flash_attn_with_kvcache"):
            return "has no function for caches of several lengths"
        return super().why_not(case, direction)

    def function(self, name: str):
        return getattr(importlib.import_module(self.module), name, None)

    def options(self, case) -> dict:
        window = case.pattern.window or (-1, -1)
        unbounded = None if self.module.endswith("cute") else -1
        return {
            "softmax_scale": case.work.scale,
            "causal": window[1] == 0,
            "window_size": tuple(unbounded if side == -1 else side for side in window),
        }

    def run(self, name: str, tensors, options: dict) -> Tensor:
        function = self.function(name)
        out = function(*tensors, **accepted(function, options))
        return out[0] if isinstance(out, tuple) else out

    def dense(self, given, case):
        tensors = [t.transpose(1, 2) for t in (given.q, given.k, given.v)]
        options = self.options(case)
        if case.pattern.lengths is None:
            return self.run("flash_attn_func", tensors, options).transpose(1, 2)
        options |= {"cache_seqlens": case.pattern.lengths}
        return self.run("flash_attn_with_kvcache", tensors, options).transpose(1, 2)

    def varlen(self, q, k, v, packed, case):
        sizes = {
            "cu_seqlens_q": packed.cu_q,
            "cu_seqlens_k": packed.cu_k,
            "max_seqlen_q": packed.max_q,
            "max_seqlen_k": packed.max_k,
        }
        return self.run("flash_attn_varlen_func", (q, k, v), sizes | self.options(case))


class Xformers(PackedContender):
    """xformers.ops.memory_efficient_attention, which also takes a bias."""

    name = "xformers"
    module = "xformers"
    alone = True
    needs_half = False

    def why_not(self, case, direction):
        if case.work.bias is not None:
            return None if case.pattern.mask is None else "takes a bias, or a mask"
        if case.pattern.lengths is not None:
            return "its masks for caches need keys of all batches in one row"
        window = case.pattern.window
        if window is not None and window[0] != -1:
            return "windows are left out here"
        return super().why_not(case, direction)

    def grouped(self, tensor, heads: int):
        """[B, L, Hkv, D] as [B, L, heads, D]."""
        return tensor.repeat_interleave(heads // tensor.shape[2], 2)

    def run(self, q, k, v, attn_bias, case):
        from xformers.ops import memory_efficient_attention

        k, v = self.grouped(k, q.shape[2]), self.grouped(v, q.shape[2])
        return memory_efficient_attention(q, k, v, attn_bias=attn_bias, scale=case.work.scale)

    def dense(self, given, case):
        work, bias = case.work, given.bias
        if bias is not None:
            bias = bias.expand(work.B, work.Hq, work.Lq, work.Lk)
        elif case.pattern.is_causal:
            from xformers.ops import LowerTriangularMask

            bias = LowerTriangularMask()
        tensors = (t.transpose(1, 2) for t in (given.q, given.k, given.v))
        return self.run(*tensors, bias, case).transpose(1, 2)

    def varlen(self, q, k, v, packed, case):
        from xformers.ops import fmha

        q_sizes, k_sizes = packed.cu_q.diff().tolist(), packed.cu_k.diff().tolist()
        mask = fmha.BlockDiagonalMask.from_seqlens(q_sizes, k_sizes)
        mask = mask.make_causal() if case.pattern.window == (-1, 0) else mask
        return self.run(q[None], k[None], v[None], mask, case)[0]


class FlashInfer(PackedContender):
    """FlashInfer's prefill over ragged sequences, a mask of bits included: inference only."""

    name = "flashinfer"
    module = "flashinfer"
    alone = True

    def why_not(self, case, direction):
        if direction != FORWARD:
            return "inference only"
        if case.work.bias is not None:
            return "takes no bias"
        if case.work.dtype == "float32":
            return "takes float16 and bfloat16"
        if case.work.Lk > 16384 and case.pattern.window is None:
            return "its mask would have one entry per pair of every batch"
        return None

    def ready(self, case):
        import flashinfer

        work, pattern = case.work, case.pattern
        lengths = torch.arange(work.B + 1, dtype=torch.int32, device=case.device)
        packed = pattern.packed if pattern.window is not None else None
        if packed is None:
            packed = Packed(lengths * work.Lq, lengths * work.Lk, work.Lq, work.Lk)
        window = pattern.window
        flat = None
        if window is None:
            seen = case.attn_mask.expand(work.B, -1, work.Lq, work.Lk)
            if seen.shape[1] != 1:
                raise ValueError("one mask for all heads")
            flat = seen.flatten()
        space = torch.empty(1 << 28, dtype=torch.uint8, device=case.device)
        wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(space, "NHD")
        options = {
            "custom_mask": flat,
            "causal": window is not None and window[1] == 0,
            "window_left": -1 if window is None else window[0],
            "sm_scale": work.scale,
            "q_data_type": getattr(torch, work.dtype),
            "kv_data_type": getattr(torch, work.dtype),
        }

        def prepare():
            wrapper.plan(
                packed.cu_q,
                packed.cu_k,
                work.Hq,
                work.Hkv,
                work.D,
                **accepted(wrapper.plan, options),
            )

        prepare()

        def attend(given):
            q = pack(given.q, packed.index_q)
            k, v = pack(given.k, packed.index_k), pack(given.v, packed.index_k)
            return unpack(wrapper.run(q, k, v), packed.index_q, work.B, work.Lq)

        return Ready(attend, prepare)


PEERS: list[Contender] = [
    Sdpa("flash", SDPBackend.FLASH_ATTENTION, gpu_only=False),
    Sdpa("cudnn", SDPBackend.CUDNN_ATTENTION, gpu_only=True),
    Sdpa("efficient", SDPBackend.EFFICIENT_ATTENTION, gpu_only=True),
    Sdpa("math", SDPBackend.MATH, gpu_only=False),
    Flex(),
    VarlenAttn(),
    FlashAttention(2, "flash_attn"),
    FlashAttention(3, "flash_attn_interface"),
    FlashAttention(4, "flash_attn.cute"),
    Xformers(),
    FlashInfer(),
]


def peer_names() -> list[str]:
    return [peer.name for peer in PEERS]


def chosen_peers(names: list[str] | None) -> list[Contender]:
    """The peers of those names, all for None; "none" for none. "sdpa" stands for its four."""
    if names is None:
        return list(PEERS)
    if names == ["none"]:
        return []
    found = []
    for name in names:
        own = [p for p in PEERS if p.name == name or p.name.split(" ")[0] == name]
        if not own:
            raise ValueError(f"unknown peer {name!r}; known: {', '.join(peer_names())}, or none")
        found += [peer for peer in own if peer not in found]
    return found


def backends_here(names: list[str] | None, device: str) -> list[str]:
    """The backends to time: those asked for, else those for GPUs, of which one that does not run is
    reported as left out; without a GPU the reference."""
    return names or (["cuda", "triton"] if device == "cuda" else ["reference"])


@contextlib.contextmanager
def reasons():
    """Collects what torch warns of inside the block: why a kernel does not take a call."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield found
        finally:
            found += [str(item.message) for item in caught]


def sentence(error: BaseException, warned: list[str]) -> str:
    """One line on why a call failed: torch's own reason if it warned of one."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of memory"
    useful = [
        text for text in warned if "not used because" not in text and "runtime disabled" not in text
    ]
    if useful and "No available kernel" in str(error):
        lines = [text.strip().splitlines()[0] for text in useful]
        lines = [line.split(" (Triggered")[0] for line in lines]
        return "; ".join(dict.fromkeys(lines))[:300]
    if "No available kernel" in str(error):
        return "torch has no kernel of this kind for the call"
    first = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {first[0]}"[:300]
