"""The ways to run a case on the kernels: Triton's in its interpreter, these and the CUDA library in
the PTX emulator, and both on a GPU.

Triton decides when it is imported whether functions are interpreted, so the interpreter lives in a
process of its own: a worker that this module starts when the first test asks for it, and that runs
functions of this module by name. Results travel as float64 NumPy arrays, which hold every dtype
exactly.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import cases
import torch

TILE = (32, 32, 4, 2)  # small tiles: more of them, and more edges, in a small case


class Interpreter:
    """Triton's interpreter on CPU tensors."""

    name, backend = "interpreter", "triton"
    device = "cpu"
    default_tile = TILE

    def __init__(self):
        self.pool = None

    def call(self, function, *arguments):
        """Run a function of this module in the worker."""
        if self.pool is None:
            self.pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
            os.environ["TRITON_INTERPRET"] = "1"
            try:
                self.pool.submit(start_worker).result()
            finally:
                del os.environ["TRITON_INTERPRET"]
            atexit.register(self.pool.shutdown)
        return self.pool.submit(function, *arguments).result()


class Gpu:
    """The kernels of a backend on the GPU of this machine, in this process."""

    device = "cuda"
    default_tile = None  # the table's

    def __init__(self, backend: str = "triton"):
        self.name, self.backend = f"gpu-{backend}" if backend != "triton" else "gpu", backend

    def call(self, function, *arguments):
        return function(*arguments)


class Emulator:
    """Triton's kernels for sm_<arch>, their PTX emulated on CPU tensors, in this process.

    seed and asynchronous: the schedule, see ptx_emulator.Config.
    """

    device, backend = "cpu", "triton"
    default_tile = TILE

    def __init__(self, arch: int, seed: int = 1, asynchronous: str = "random"):
        self.name, self.arch = f"sm{arch}", arch
        self.seed, self.asynchronous = seed, asynchronous

    @contextlib.contextmanager
    def running(self, rewrite=None):
        """The Triton backend runs on the CPU inside the block; yields ptx_emulator's driver, which
        loads rewrite(name, ptx) in place of the PTX of a kernel."""
        from ptx_emulator import Config, triton_driver

        from tilemask.backends import triton

        assert not triton.INTERPRETED
        answers = {
            "unfit": lambda device: None,
            "architecture": lambda device: self.arch,
            "multiprocessors": lambda device: config.multiprocessors,
        }
        config = Config(seed=self.seed, asynchronous=self.asynchronous)
        before = {name: getattr(triton, name) for name in answers}
        vars(triton).update(answers)
        try:
            with triton_driver.running(self.arch, config, rewrite) as driver:
                yield driver
        finally:
            vars(triton).update(before)

    def call(self, function, *arguments):
        with self.running():
            return function(*arguments)


class EmulatedLibrary:
    """The CUDA library that ships, but for PTX in place of machine code, with the PTX emulator as
    its CUDA runtime: on CPU tensors, in this process.

    config: a ptx_emulator.Config, the schedule of every launch; arch: the compute capability of the
    GPU that it poses as. The sources are compiled for 8.0 or 9.0a.
    """

    name, backend = "emulated-cuda", "cuda"
    device = "cpu"
    default_tile = None  # the library's own

    def __init__(self, config=None, arch: int = 80):
        self.config, self.arch = config, arch

    @contextlib.contextmanager
    def running(self):
        """The CUDA backend runs on the CPU inside the block. Of the memory, a launch may touch the
        storages of the tensors whose pointers its struct was given."""
        import ptx_emulator

        from tilemask import library
        from tilemask.backends import cuda, prepared

        loaded, emulator = emulated_library(90 if self.arch == 90 else 80), ptx_emulator.library()
        settings = (self.config or ptx_emulator.Config(seed=1, asynchronous="random")).packed()
        given = []

        def pointer(tensor):
            if tensor is not None:
                given.append(tensor)
            return own["pointer"](tensor)

        def launch(name, packed, **tensors):
            pointed = set(memoryview(packed).cast("Q"))
            mine = [tensor for tensor in given if tensor.data_ptr() in pointed]
            memory = ptx_emulator.emu_buffers(mine)
            emulator.emu_configure(settings, memory, len(memory))
            try:
                own["launch"](name, packed, **tensors)
            except RuntimeError as error:
                message = f"{error}\n{ptx_emulator.failure()}"
                raise ptx_emulator.EmulatorError(message) from None

        stand_ins = {"pointer": pointer, "launch": launch}
        stand_ins |= {"unfit": lambda device: None, "unavailable": lambda: None}
        for name in ("tile_of", "has_room"):  # of this GPU
            stand_ins[name] = prepared.asked_once(getattr(cuda, name).__wrapped__)
        own = {name: getattr(cuda, name) for name in stand_ins}
        load, library.load = library.load, lambda: loaded
        vars(cuda).update(stand_ins)
        nothing = ptx_emulator.emu_buffers([])
        emulator.emu_set_arch(self.arch)
        emulator.emu_configure(settings, nothing, len(nothing))
        emulator.emu_forget_launches()
        try:
            yield
        finally:
            vars(cuda).update(own)
            library.load = load

    def call(self, function, *arguments):
        with self.running():
            return function(*arguments)


@functools.cache
def emulated_library(arch: int):
    """libtilemask.so linked against the emulator, loaded; compiled first if csrc/ has changed."""
    from nvcc import build_for_emulator
    from ptx_emulator import cuda

    from tilemask import library

    path = build_for_emulator(arch)
    cuda.loaded(path)
    return library.opened(path)


WAYS = [Gpu()] if torch.cuda.is_available() else [Interpreter()]


def start_worker():
    import poison

    from tilemask.backends import triton

    assert triton.INTERPRETED
    torch.set_num_threads(1)
    poison.install()


# -- functions that run in the worker, or on the GPU ----------------------------------------------


def forced_tile(tile):
    """Force a tile shape (block_m, block_n, num_warps, num_stages); None = the table's."""
    from tilemask.kernels import tuning

    return tuning.forced(None if tile is None else tuning.TileConfig(*tile))


def run_case(name: str, dtype: str, tile, device: str, backend: str = "triton") -> dict:
    """Results of a case on a backend, as float64 arrays."""
    with forced_tile(tile):
        results = cases.run(cases.named(name), getattr(torch, dtype), device, backend)
    return {key: value.cpu().double().numpy() for key, value in results.items()}


def run_weights(name: str, dtype: str, reduce: str | None, tile, device: str, backend="triton"):
    """attention_weights of a case on a backend, as a float64 array."""
    import test_weights

    with forced_tile(tile):
        got = test_weights.run(name, getattr(torch, dtype), reduce, device, backend)
    return got.cpu().double().numpy()


def run_source(name: str, dtype: str, device: str, backend: str = "triton") -> None:
    """An example of the documents the project was founded on, on a GPU backend."""
    import test_source_cases

    with forced_tile(TILE):
        test_source_cases.run_source(name, dtype, device, backend)


def visits(name: str, dtype: str, tile, device: str, backend: str = "triton") -> dict:
    """How often each kernel visited each tile in each class: int32 [B * Hq, rows, columns, 2], and
    the tile shape it ran with."""
    from tilemask import backends
    from tilemask.attention import checked

    case, kernels = cases.named(name), backends.named(backend)
    given = cases.inputs(case, getattr(torch, dtype), device)
    with forced_tile(tile):
        call = checked(
            given["q"].detach(), given["k"].detach(), given["v"].detach(), case.mask(device)
        )
        assert backends.choose(call, backend) is kernels
        passes = ["dq", "dkv"] + ["dqkv"] * (backend == "cuda")  # in the place of the others
        shapes = {kernel: kernels.list_key(call, kernel)[:2] for kernel in ["forward", *passes]}
        counters = {kernel: counter(call, tile) for kernel, tile in shapes.items()}
        out, lse, rest = kernels.forward(call, counters["forward"])
        visited = tuple(counters[kernel] for kernel in passes)
        kernels.backward(call, out, lse, rest, given["dout"], None, visits=visited)
    return {k: (shapes[k], counters[k].cpu().numpy()) for k in counters}


def shares(name: str, device: str) -> tuple[int, bool]:
    """Into how many shares a case's keys are split, and whether its heads are folded into rows."""
    import tilemask
    from tilemask.kernels import forward, split

    case, seen, launch = cases.named(name), [], forward.forward
    given = cases.inputs(case, torch.float32, device)

    def watched(*arguments, **options):
        seen.append((options.get("splits", 1), options["folded"]))
        return launch(*arguments, **options)

    forward.forward = split.forward = watched
    try:
        with forced_tile(TILE), torch.no_grad(), tilemask.use_backend("triton"):
            options = cases.options(case, given, device)
            tilemask.attention(given["q"], given["k"], given["v"], **options)
    finally:
        forward.forward = split.forward = launch
    (only,) = seen
    return only


def counter(call, tile):
    block_m, block_n = tile
    batch, heads, len_q, _ = call.q.shape
    shape = (batch * heads, -(-len_q // block_m), -(-call.k.shape[2] // block_n), 2)
    return torch.zeros(shape, dtype=torch.int32, device=call.q.device)


def lists(name: str, tile, transposed: bool, device: str, backend: str = "triton"):
    """counts and blocks of a case's tile lists."""
    from tilemask import backends
    from tilemask.attention import checked
    from tilemask.backends import prepared

    case = cases.named(name)
    given = cases.inputs(case, torch.float32, device)
    call = checked(*(given[name].detach() for name in "qkv"), case.mask(device))
    steps = backends.named(backend).launched()
    parts, bounds = prepared.mask_parts(call, steps), list(call.mask.bounds)
    counts, blocks = steps.lower(parts, bounds, prepared.sizes_of(call), *tile, transposed)
    return counts.cpu().numpy(), blocks.cpu().numpy()


def packed(name: str, device: str, backend: str = "triton") -> dict:
    """Words, transposed words and live rows of a case with bits per pair."""
    from tilemask import backends
    from tilemask.attention import checked
    from tilemask.backends import prepared

    case = cases.named(name)
    given = cases.inputs(case, torch.float32, device)
    call = checked(*(given[name].detach() for name in "qkv"), case.mask(device))
    prepared.mask_parts(call, backends.named(backend).launched(), transposed=True)
    names = ("words", "transposed", "keys", "live")
    made = {name: call.mask.prepared.get(name) for name in names}
    return {name: None if t is None else t.cpu().numpy() for name, t in made.items()}


def packed_in_strips(device: str, backend: str = "triton") -> bool:
    """Whether words packed strip by strip are those packed at once, and no more bits were made."""
    from tilemask import backends, masks
    from tilemask.attention import checked
    from tilemask.backends import prepared
    from tilemask.masks import PairBits

    ids = torch.arange(300, device=device) % 7
    q = torch.randn(2, 1, 300, 16, device=device)
    mask = masks.documents(ids)
    bits = checked(q, q, q, mask).mask.bits
    counts = []

    def rows(first, count):
        counts.append(count)
        return bits.rows(first, count)

    steps = backends.named(backend).launched()
    watched, before = PairBits(bits.shape, rows), prepared.STRIP
    whole = prepared.packed(watched, 300, steps)
    prepared.STRIP = 64 * 300
    try:
        strips = prepared.packed(watched, 300, steps)
    finally:
        prepared.STRIP = before
    return torch.equal(whole, strips) and counts == [300, 64, 64, 64, 64, 64]


def far_apart(device: str, backend: str = "triton"):
    """Largest difference of attention on tensors whose batches lie more than 2**31 elements apart
    from the same on compact ones."""
    import tilemask

    apart = 2**31 + 64
    storage = torch.empty(apart + 64 * 16, dtype=torch.float16, device=device)
    compact = torch.randn(2, 1, 64, 16, generator=torch.Generator().manual_seed(0))
    compact = compact.to(device, torch.float16)
    wide = storage.as_strided((2, 1, 64, 16), (apart, 1024, 16, 1))
    wide.copy_(compact)
    mask = tilemask.masks.causal()
    results = []
    for tensor in (wide, compact):
        tensor = tensor.detach().requires_grad_()
        out = tilemask.attention(tensor, tensor, tensor, mask=mask, backend=backend)
        results.append((out.detach(), *torch.autograd.grad(out.float().square().sum(), tensor)))
    return max((a - b).abs().max().item() for a, b in zip(*results, strict=True))


def traced(
    name: str, dtype: str, tile, device: str, backend: str = "triton"
) -> tuple[dict, dict, list[str]]:
    """A case eagerly and under torch.compile(fullgraph=True), and the ops in the compiled
    graphs."""
    from torch._dynamo.backends.common import aot_autograd

    case = cases.named(name)
    ops = []

    def record(graph, _):
        ops.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    with forced_tile(tile):
        eager = cases.run(case, getattr(torch, dtype), device, backend)
        torch._dynamo.reset()
        compiled = cases.run(
            case,
            getattr(torch, dtype),
            device,
            backend,
            wrap=lambda f: torch.compile(
                f, fullgraph=True, backend=aot_autograd(fw_compiler=record)
            ),
        )
    as_arrays = [{k: v.cpu().double().numpy() for k, v in r.items()} for r in (eager, compiled)]
    return *as_arrays, ops


def compiled_layers(device: str) -> list[str]:
    """The ops in the forward graph of a compiled two-layer model in training, each layer with a
    varlen mask of its own made from the same tensor."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    import tilemask

    ops = []

    def record(graph, _):
        ops.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    cu = torch.tensor([0, 20, 50], device=device)

    def model(x):
        for _ in range(2):
            mask = tilemask.masks.varlen(cu, within=tilemask.masks.causal())
            x = x + tilemask.attention(x, x, x, mask=mask, backend="triton")
        return x

    torch._dynamo.reset()
    backend = aot_autograd(
        fw_compiler=record,
        bw_compiler=lambda graph, _: graph,
        partition_fn=min_cut_rematerialization_partition,  # as the default backend has it
    )
    x = torch.randn(1, 2, 50, 16, device=device, requires_grad=True)
    with forced_tile(TILE):
        torch.compile(model, fullgraph=True, backend=backend)(x).sum().backward()
    return ops


def opcheck_all(device: str, tile, dtype: str = "float32", backend: str = "triton") -> None:
    """torch.library.opcheck on the ops as a backend uses them."""
    from tilemask import masks
    from tilemask.attention import checked

    kind = {"device": device, "dtype": getattr(torch, dtype)}
    q, k = torch.randn(2, 4, 40, 16, **kind), torch.randn(2, 2, 50, 16, **kind)
    bits = torch.rand(4, 40, 50, device=device) < 0.5
    keep = torch.rand(2, 50, device=device) < 0.8
    prefix = masks.prefix_lm(torch.tensor([3, 50], device=device))
    options = {
        "bias": torch.randn(1, 4, 40, 50, device=device),
        "sinks": torch.randn(4, device=device),
        "dropout_p": 0.1,
        "dropout_seed": 3,
    }
    with forced_tile(tile):
        opcheck(checked(q, k, k, prefix), backend)
        both = masks.dense(bits) & masks.padding(keep=keep)
        opcheck(checked(q, k, k, both, **options), backend)


def opcheck(call, name: str) -> None:
    from tilemask import autograd, backends
    from tilemask.backends import prepared

    backend = backends.named(name)
    check, ops, mask = torch.library.opcheck, torch.ops.tilemask, call.mask
    arguments = *call_tensors(call), *autograd.packed(call, backend, "forward"), name
    parts, rest = prepared.mask_parts(call, autograd.traced_steps(name)), [list(mask.bounds)]
    rest += [prepared.sizes_of(call), *backend.list_key(call, "forward"), name]
    check(ops.lower.default, (parts, *rest))
    if mask.bits is not None:
        check(ops.pack.default, (mask.bits.view, name))
        check(ops.transpose.default, (parts[4], mask.len_q, mask.len_k, name))
        check(ops.live.default, ([*parts[:3], None, *parts[4:]], *rest[:2], name))
    check(ops.forward.default, arguments)
    out, lse, left = ops.forward(*arguments)
    given = *call_tensors(call), *autograd.packed(call, backend, "backward"), name, True
    check(ops.backward.default, (out, lse, out, lse, left, *given))


def call_tensors(call):
    return call.q, call.k, call.v.clone()
