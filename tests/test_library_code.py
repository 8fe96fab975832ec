"""Static gates on the machine code of the CUDA library: see library_code.py."""

import json
import re

import library_code
import pytest
import torch
import ways
from ptx_emulator import cuda as posed

import tilemask

pytestmark = pytest.mark.compiled

OTHER_ARCHS = ("86", "89", "90a", "100", "120")
SOURCES = [path.stem for path in library_code.toolchain.sources()]
REGISTER_FILE = 65536
SHARED_MEMORY = {"80": 164 * 1024, "86": 100 * 1024}  # of a multiprocessor
MOST_THREADS = {"80": 2048, "86": 1536}

# Instructions per score that a loop may have at most, by kernel and width: what the comment at the
# head of its source aims for. The first is that of full tiles. Loops are counted as if every branch
# were taken: with acc * rescale.
RESCALE = {64: 1.2, 128: 4.5, 256: 4.5}
AIMS = {
    ("forward", 64): (10 + RESCALE[64], 15 + RESCALE[64]),
    ("forward", 128): (16 + RESCALE[128], 24 + RESCALE[128]),
    ("forward", 256): (25 + RESCALE[256], 33 + RESCALE[256]),
    ("dqkv", 64): (18.5, 21.5),
    ("dqkv", 128): (28, 31),
    ("dqkv", 256): (58, 62),
    ("listed dqkv", 64): (19.5, 27.5),
    ("listed dqkv", 128): (29.5, 37),
    ("listed dqkv", 256): (60.5, 70),
    ("dq", 64): (13, 21),
    ("dq", 128): (19, 27),
    ("dq", 256): (53, 76),
    ("dkv", 64): (17, 28),
    ("dkv", 128): (34, 52),
    ("dkv", 256): (86, 106),
}

# Blocks of threads on a multiprocessor at once, for widths up to 64, 128 and 256.
PLANNED = {
    "80": {
        "forward": (2, 2, 1),
        "general forward": (2, 2, 1),
        "decode": (4, 2, 2),
        "general decode": (4, 2, 2),
        "general dq": (2, 1, 1),
        "general dkv": (1, 2, 1),
        "dqkv": (2, 1, 1),  # as of Kernel::BLOCKS there
        "general dqkv": (2, 1, 1),  # with lists
    },
    "86": {
        "forward": (2, 1, 1),
        "general forward": (2, 1, 1),
        "decode": (2, 1, 1),
        "general decode": (2, 1, 1),
        "dq": (1, 1, 1),
        "general dq": (1, 1, 1),
        "dkv": (1, 1, 1),
        "general dkv": (1, 1, 1),
    },
}


def each_arch(test):
    slow = [pytest.param(arch, marks=pytest.mark.slow) for arch in OTHER_ARCHS]
    return pytest.mark.parametrize("arch", ["80", *slow])(test)


@each_arch
@pytest.mark.parametrize("source", SOURCES)
def test_everything_stays_in_registers(source, arch):
    for kernel in library_code.kernels(source, arch):
        assert (kernel.spills, kernel.stack) == (0, 0), kernel.name


@each_arch
@pytest.mark.parametrize("source", library_code.LOOPS)
def test_loops_have_the_products_and_loads_of_a_tile(source, arch):
    found = library_code.kernels(source, arch)
    found = [kernel for kernel in found if kernel.loops]
    counts = {"sm80_forward": 28, "sm80_dqkv": 12, "sm80_dq": 12, "sm80_dkv": 12}
    assert len(found) == counts[source]
    for kernel in found:
        full, partial = kernel.loops
        wanted = library_code.expected(kernel)
        copies = wanted["LDGSTS"]
        if library_code.in_boxes(kernel, arch):  # k's and v's, one for each panel
            panels = library_code.width_of(kernel) // 64
            wanted |= {"LDGSTS": 0, "UTMALDG": 2 * panels}
        assert {name: full.count(name) for name in wanted} == wanted, kernel.name
        for name in ("HMMA", "LDSM"):
            assert partial.count(name) == wanted[name], kernel.name
        # a copy for masks without key bits, and a loop for those with them
        assert copies <= partial.count("LDGSTS") <= copies + 2, kernel.name
        assert len(full) < len(partial)


def run_everything(width: int, arch: int):
    """Each kernel that loops over tiles on a GPU, plain and with an option, and the launches."""
    kind = {"dtype": torch.bfloat16}
    q, k, v = (torch.randn(1, 1, 17, width, **kind).requires_grad_() for _ in range(3))
    bits = tilemask.masks.dense(torch.ones(17, 17).tril() > 0)
    with ways.EmulatedLibrary(arch=arch).running():
        for options in ({}, {"mask": bits}, {"softcap": 2.0}):
            out = tilemask.attention(q, k, v, backend="cuda", **options)
            torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
            few = [t.detach() for t in (q[:, :, :1], k, v)]
            if "mask" not in options:
                tilemask.attention(*few, backend="cuda", **options)
        return posed.launches()


def planned(name: str, arch: str) -> int:
    """PLANNED of a kernel<type, width[, general[, rows]]>."""
    kernel, width, general, rows = re.fullmatch(
        r"(\w+)_kernel<BFloat16, (\d+)(?:, (\w+))?(?:, (\d+))?>", name
    ).groups()
    kernel = "decode" if rows == "16" else kernel
    blocks = PLANNED[arch][f"general {kernel}" if general == "true" else kernel]
    return blocks[(64, 128, 256).index(int(width))]


@pytest.mark.parametrize("arch", ["80", pytest.param("86", marks=pytest.mark.slow)])
@pytest.mark.parametrize("width", [64, 128, 256])
def test_as_many_blocks_run_at_once_as_planned(width, arch):
    """By threads, registers and shared memory."""
    compiled = {k.name: k for s in library_code.LOOPS for k in library_code.kernels(s, arch)}
    found = {}
    for symbol, counts in run_everything(width, int(arch)):
        kernel = compiled.get(library_code.readable(symbol))
        if kernel and kernel.loops:
            warp = -(-kernel.registers // 8) * 8 * library_code.WARP
            by_registers = REGISTER_FILE // (warp * counts["threads"] // library_code.WARP)
            by_memory = SHARED_MEMORY[arch] // (counts["shared_bytes"] + 1024)
            by_threads = MOST_THREADS[arch] // counts["threads"]
            found[kernel.name] = min(by_registers, by_memory, by_threads)
    assert len(found) == len(PLANNED[arch])
    assert found == {name: planned(name, arch) for name in found}


@pytest.mark.parametrize("source", library_code.LOOPS)
def test_loops_meet_their_aims(source):
    for kernel in library_code.kernels(source, "80"):
        name, width = kernel.name.split("_")[0], int(re.search(r", (\d+)", kernel.name)[1])
        if name == "dqkv":
            name = "listed dqkv" if ", true" in kernel.name else name
        elif ", true" in kernel.name or ", 16>" in kernel.name or not kernel.loops:
            continue  # with options, or decoding
        scores = library_code.scores_per_thread(kernel)
        for loop, aim in zip(kernel.loops, AIMS[name, width], strict=True):
            assert len(loop) / scores <= aim, f"{kernel.name}: {len(loop) / scores:.1f} > {aim}"


@pytest.mark.parametrize("arch", library_code.REPORTED)
def test_the_report_is_that_of_these_sources(arch):
    """A loop that grows is seen here; after a change that is meant: library_code.py --write."""
    kept = json.loads((library_code.STATIC / f"sm_{arch}.json").read_text())
    if kept["nvcc"] != library_code.nvcc_release():
        pytest.skip(f"the report was made with nvcc {kept['nvcc']}")
    found = library_code.report(arch)
    assert found.keys() == kept["kernels"].keys()
    for name, kernel in found.items():
        assert kernel == kept["kernels"][name], f"{name}: python tests/library_code.py --write"


def test_the_build_keeps_to_its_limits():
    """By the last report: a compiler's seconds are no test of each run."""
    kept = json.loads((library_code.STATIC / "build.json").read_text())
    targets = library_code.toolchain.by_ptx(library_code.toolchain.ARCHITECTURES)
    assert kept["commands"].keys() == set(SOURCES)
    assert kept["architectures"] == library_code.toolchain.ARCHITECTURES
    assert kept["cpus"] <= 2 and kept["whole"]["seconds"] < 600
    cubins = {f"{arch}.cubin" for of_ptx in targets.values() for arch in of_ptx if "sm" in arch}
    for costs in kept["commands"].values():
        assert costs.keys() == {f"{ptx}.ptx" for ptx in targets} | cubins | {"host.o", "o"}
        assert all(cost["seconds"] < 90 and cost["mib"] < 2048 for cost in costs.values())


def published(direction: str, width: int, kind: str) -> float:
    """The fewest instructions per score of FlashAttention-2's kernels that it takes on sm_80."""
    kept = json.loads((library_code.STATIC / "flash_attn_2.json").read_text())["kernels"]
    return min(
        kernel["loops"][kind]["per_score"]
        for name, kernel in kept.items()
        if name.startswith(f"{direction} {width}")
        and "sm_80" in kernel["chosen_on"]
        and kind in kernel["loops"]
    )


def loops_of(name: str) -> dict:
    return json.loads((library_code.STATIC / "sm_80.json").read_text())["kernels"][name]["loops"]


def forward_counts(width: int) -> dict[str, float]:
    """Of full tiles, without acc * rescale, which FlashAttention-2 does in every step; and of
    partial ones of a mask without bits, with the copies of the next tile."""
    loops = loops_of(f"forward_kernel<BFloat16, {width}, false, 128>")
    full = loops["full"]["per_score"] - RESCALE[width]
    copies = full - loops["full"]["least_per_score"]
    return {"full": full, "partial": loops["partial"]["least_per_score"] + copies}


def backward_counts(width: int, listed: bool) -> dict[str, float]:
    loops = loops_of(f"dqkv_kernel<BFloat16, {width}, {str(listed).lower()}>")
    return {kind: loop["per_score"] for kind, loop in loops.items()}


@pytest.mark.parametrize("kind", ["full", "partial"])
@pytest.mark.parametrize("width", [64, 128, 256])
def test_counts_against_published_ones(width, kind):
    """At most a tenth more than in FlashAttention-2, in full tiles and in those that a mask cuts,
    there a causal one. Its dQ is added up in no fixed order."""
    assert forward_counts(width)[kind] <= 1.1 * published("forward", width, kind)
    assert backward_counts(width, False)[kind] <= 1.1 * published("backward", width, kind)


def test_the_table_of_the_counts_is_that_of_the_reports():
    lines = ["| | FlashAttention-2 | the CUDA library |", "|---|---|---|"]
    for width in (64, 128, 256):
        for direction, counts in (
            ("forward", forward_counts(width)),
            ("backward", backward_counts(width, False)),
            ("backward with lists", backward_counts(width, True)),
        ):
            for kind, count in counts.items():
                theirs = "" if "lists" in direction else f"{published(direction, width, kind):.1f}"
                tiles = f"{direction}, width {width}: {kind} tiles"
                lines.append(f"| {tiles} | {theirs} | {count:.1f} |")
    text = (library_code.STATIC.parent / "README.md").read_text()
    assert "\n".join(lines) + "\n" in text, "it should be\n" + "\n".join(lines)


def test_readable_names():
    symbol = "_ZN48_GLOBAL__N__a1d71094_15_sm80_forward_cu_7440856014forward_kernelI8BFloat16"
    name = library_code.readable(symbol + "Li64ELb0ELi16EEEv11ForwardCall")
    assert name == "forward_kernel<BFloat16, 64, false, 16>"
    assert library_code.readable("_ZN12_GLOBAL__N_112probe_kernelEv") == "probe_kernel"
    symbol = (
        "_ZN1__GLOBAL__N__a1_12_sm80_dqkv_cu_13f0f1aa12round_kernelI7Float16Li128EEEvNS_8DqkvCallE"
    )
    assert library_code.readable(symbol) == "round_kernel<Float16, 128>"
