"""Planted faults: each kind has a kernel that is stopped with the right message at the right line,
and a twin without the fault that runs through with right results, whatever the schedule."""

import dataclasses
import re
from collections.abc import Callable

import pytest
import torch
from ptx_emulator import Config, EmulatorError, Module, cuda

SEEDS = (0, 1, 2)
MODES = ("early", "late", "random")


@dataclasses.dataclass(frozen=True)
class Fault:
    """message: what the emulator says, a regular expression. arguments(): of the launch, outputs
    included. results(*arguments): {place: tensor} that a right kernel leaves. modes: those in which
    the wrong kernel must be stopped. blocks: how many interleave. deadlock: the message has no
    single line."""

    name: str
    arch: int
    message: str
    arguments: Callable
    results: Callable
    block: int = 128
    grid: int = 1
    shared: int = 0
    blocks: int = 1
    modes: tuple = MODES

    def __repr__(self):
        return self.name


def xy(n=512):
    return lambda: (torch.arange(1.0, n + 1), torch.zeros(128))


def flipped(x, y, *rest):
    """y[i] = x[n - 1 - i]"""
    return {1: x.flip(0)[:128]}


def tiles(x, y, count):
    return {1: x.view(count, -1).flip(1)[:, :128].sum(0)}


def matrices():
    """Core matrices of a [64, 16] and b [16, 8], in one array of words, and d."""
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(64, 16, generator=generator), torch.randn(8, 16, generator=generator)
    cores = [m.bfloat16().view(-1, 8, 2, 8).transpose(1, 2).flatten() for m in (a, b)]
    return torch.cat(cores).view(torch.int32), torch.zeros(128, 4)


def product(words, d):
    cores = words.view(torch.bfloat16).float()
    a, b = cores[:1024], cores[1024:]
    a, b = (m.view(-1, 2, 8, 8).transpose(1, 2).reshape(-1, 16) for m in (a, b))
    full = (a @ b.T).view(4, 2, 8, 4, 2)  # warp, half, group, within, pair
    return {1: full.permute(0, 2, 3, 1, 4).reshape(128, 4)}


def ints(n):
    return torch.arange(n, dtype=torch.int32)


def zeros(n):
    return torch.zeros(n, dtype=torch.int32)


# a copy that nobody waited for is on its way, or has come unseen, or has not begun
NOT_THERE = "in flight|race: read|never written"
FAULTS = [
    Fault("reverse", 80, "race: read|never written", lambda: (torch.arange(128.0),),
          lambda x: {0: torch.arange(128.0).flip(0)}),
    Fault("refill", 80, "race", lambda: (*xy(512)(), 4), tiles),
    Fault("exchange", 80, "race: read|never written", lambda: (torch.arange(32.0),),
          lambda x: {0: torch.arange(32.0).view(16, 2).flip(1).flatten()}, block=32),
    Fault("halves", 80, "race: write", lambda: (torch.arange(64, dtype=torch.int16),),
          lambda x: {0: torch.arange(64, dtype=torch.int16).flip(0)}, block=64),
    Fault("shared_end", 80, "shared", lambda: (torch.arange(128.0),),
          lambda x: {0: torch.arange(128.0).flip(0)}, shared=512),
    Fault("unfilled", 80, "never written", lambda: (torch.arange(128.0),),
          lambda x: {0: torch.arange(128.0).flip(0)}),
    Fault("in_flight", 80, "in flight", xy(), flipped),
    Fault("pipeline", 80, "in flight", lambda: (*xy(2048)(), 4), tiles),
    Fault("overwritten", 80, "in flight", xy(),
          lambda x, y: {1: torch.where(torch.arange(512) % 4 == 0, 0, x).flip(0)[:128]}),
    Fault("past_end", 80, "global", lambda: (torch.arange(100.0), torch.zeros(100), 100),
          lambda x, y, n: {1: 2 * x}),
    Fault("misaligned", 80, "aligned", lambda: (torch.arange(520.0), torch.zeros(128)),
          lambda x, y: {1: x[:512].view(128, 4).sum(1)}),
    Fault("matrix_row", 80, "align", lambda: (torch.ones(32),),
          lambda x: {0: torch.cat([torch.ones(32)])}, block=32),
    Fault("half_warp", 80, "shfl|lane", lambda: (ints(32),),
          lambda x: {0: torch.cat([ints(16) ^ 1, ints(32)[16:]])}, block=32),
    Fault("deadlock", 80, "(?s)deadlock.*warp 0.*warp 1", lambda: (zeros(64),),
          lambda x: {0: zeros(64) + 1}, block=64),
    Fault("lost_update", 80, "race", lambda: (zeros(1),), lambda x: {0: zeros(1) + 8},
          block=32, grid=8, blocks=4),
    Fault("flag", 80, "race", lambda: (zeros(1), zeros(1), zeros(4)),
          lambda ready, value, seen: {2: torch.tensor([0, 42, 42, 42], dtype=torch.int32)},
          block=32, grid=4, blocks=4),
    Fault("split_sum", 80, "race",
          lambda: (torch.arange(256.0), torch.zeros(8), zeros(1), torch.zeros(1)),
          lambda x, *rest: {3: x.sum().view(1)}, block=32, grid=8, blocks=4),
    Fault("lock", 80, "race", lambda: (zeros(1), zeros(1)), lambda *rest: {1: zeros(1) + 8},
          block=32, grid=8, blocks=4),
    Fault("not_awaited", 90, NOT_THERE, xy(128), flipped),
    Fault("wrong_phase", 90, NOT_THERE, xy(128), flipped,
          modes=("late", "random")),
    Fault("ignored_answer", 90, NOT_THERE, xy(128), flipped, modes=("late",)),
    Fault("too_few_bytes", 90, r"(?s)deadlock.*mbarrier", xy(128), flipped),
    Fault("too_many_arrivals", 90, "mbarrier.*arrival past its count", xy(128), flipped),
    Fault("init_not_seen", 90, "mbarrier", lambda: (zeros(64),), lambda x: {0: zeros(64) + 1},
          block=64),
    Fault("stage_reused", 90, "in flight|race|arrival past", lambda: (*xy(512)(), 4), tiles,
          block=160),
    Fault("store_unfenced", 90, "fence.proxy.async", xy(128), flipped),
    Fault("refill_unfenced", 90, "fence.proxy.async", xy(128), flipped),
    Fault("source_reused", 90, "in flight", xy(128), lambda x, y: {1: x}),
    Fault("odd_size", 90, "16", xy(128), lambda x, y: {1: x}),
    Fault("proxy_unfenced", 90, "fence.proxy.async", matrices, product),
    Fault("unfenced", 90, "wgmma.fence", matrices, product),
    Fault("too_early", 90, "wait_group", matrices, product),
    Fault("operand_written", 90, "in flight", matrices, product),
    Fault("budget", 90, "setmaxnreg.*66560.*65536", lambda: (zeros(384),),
          lambda x: {0: zeros(384) + 1}, block=384),
]  # fmt: skip
NO_LINE = ("deadlock", "too_few_bytes")  # all threads are named, wherever they wait


@pytest.fixture(scope="module")
def modules():
    sources = {arch: cuda.KERNELS / f"faults_sm{arch}.cu" for arch in (80, 90)}
    return {arch: Module(cuda.ptx(source, arch)) for arch, source in sources.items()}


def launch(module, fault, kind, seed, mode):
    arguments = fault.arguments()
    config = Config(seed=seed, asynchronous=mode, resident_blocks=fault.blocks)
    counts = module.launch(
        f"{fault.name}_{kind}", (fault.grid,), (fault.block,), *arguments,
        shared=fault.shared, config=config,
    )  # fmt: skip
    return arguments, counts


def lines_of(fault) -> list[int]:
    """The lines of the source that are marked with the name of the fault."""
    text = (cuda.KERNELS / f"faults_sm{fault.arch}.cu").read_text().splitlines()
    marked = [re.search(r"\S\s+//((?: \w+)+)$", line) for line in text]
    return [n for n, found in enumerate(marked, 1) if found and fault.name in found[1].split()]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_right_twin_runs(modules, fault, seed, mode):
    before = fault.arguments()
    arguments, _ = launch(modules[fault.arch], fault, "right", seed, mode)
    for place, wanted in fault.results(*before).items():
        torch.testing.assert_close(arguments[place], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_wrong_twin_is_stopped_at_its_line(modules, fault, seed, mode):
    if mode not in fault.modes:
        pytest.skip("in this mode the schedule may hide it")
    with pytest.raises(EmulatorError, match=fault.message) as raised:
        launch(modules[fault.arch], fault, "wrong", seed, mode)
    if fault.name not in NO_LINE:
        places = [f"faults_sm{fault.arch}.cu:{line}" for line in lines_of(fault)]
        assert places and any(place in str(raised.value) for place in places), raised.value


def test_blocks_that_do_not_interleave_hide_nothing_that_is_ordered(modules):
    """One block after another: the counter is right, and the run says so."""
    fault = next(fault for fault in FAULTS if fault.name == "lock")
    alone = dataclasses.replace(fault, blocks=1)
    arguments, counts = launch(modules[80], alone, "right", 0, "late")
    assert arguments[1].item() == 8 and counts["blocks"] == 8


def test_bank_conflicts_are_counted(modules):
    """A column of a 32 x 32 tile is in one bank: 32 wavefronts per load instead of one."""
    for kind, per_load in (("right", 1), ("wrong", 32)):
        x = torch.arange(1024.0)
        counts = modules[80].launch(f"transpose_{kind}", (1,), (32, 32), x)
        assert torch.equal(x.view(32, 32), torch.arange(1024.0).view(32, 32).T)
        assert counts["shared_loads"] == 32
        assert counts["shared_load_wavefronts"] == 32 * per_load
        assert counts["shared_load_ideal"] == 32


def test_checks_can_be_switched_off(modules):
    """A race is then a race: the kernel runs through."""
    x = torch.arange(128.0)
    modules[80].launch("reverse_wrong", (1,), (128,), x, config=Config(checks=False))


def test_the_same_seed_gives_the_same_message(modules):
    fault = next(fault for fault in FAULTS if fault.name == "stage_reused")
    said = set()
    for _ in range(3):
        with pytest.raises(EmulatorError) as raised:
            launch(modules[90], fault, "wrong", 7, "random")
        said.add(str(raised.value))
    assert len(said) == 1
