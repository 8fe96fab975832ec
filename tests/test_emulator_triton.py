"""The Triton kernels as they are compiled for sm_80 and sm_90, in the PTX emulator: the common
cases, forward and backward, with every race, missing wait and stray access an error."""

import dataclasses
import itertools
import re

import cases
import pytest
import test_weights
import torch
import ways
from ptx_emulator import Config, EmulatorError

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.compiled,
    pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU runs the kernels themselves"),
]

NAMES = ("bfloat16", "float32", "float16")
ARCHES = (80, 90)
# small tiles: more of them in a small case, and less code; two warps are enough to race
TILES = {80: (16, 32, 2, 2), 90: (32, 32, 4, 2)}
GROUP = 43  # of cases: see parameters(), and the test that each option meets both architectures
WGMMA = (64, 64, 4, 2)  # what sm_90 needs for wgmma in every kernel


def parameters() -> list:
    """(case, dtype, arch). Per commit each case in one dtype on one architecture; the rest is slow.

    Neighbours in the list are alike, and share kernels: they take turns in groups.
    """
    turns = list(itertools.product(NAMES, ARCHES))
    made = []
    for index, case in enumerate(cases.CASES):
        names = [name for name in NAMES if getattr(torch, name) in case.dtypes]
        name, arch = turns[index // GROUP % len(turns)]
        chosen = name if name in names else names[0], arch
        for turn in itertools.product(names, ARCHES):
            marks = () if turn == chosen else pytest.mark.slow
            made.append(pytest.param(case, *turn, id=f"{case}-{turn[0]}-sm{turn[1]}", marks=marks))
    return made


def run(case, name, arch, tile, config=None) -> dict:
    """Results of a case on an emulated GPU, and the launches that made them."""
    way = ways.Emulator(arch)
    with way.running() as driver:
        driver.config = config or driver.config
        results = ways.run_case(case.name, name, tile, way.device)
    return {key: torch.from_numpy(value) for key, value in results.items()}, driver.launches


@pytest.mark.parametrize("case, name, arch", parameters())
def test_case(case, name, arch):
    results, _ = run(case, name, arch, TILES[arch])
    cases.check(case, getattr(torch, name), results)


def test_every_option_runs_on_both_architectures():
    """Among what runs on every commit: each kind of mask and each option, on sm_80 and sm_90."""
    seen = {80: set(), 90: set()}
    for parameter in parameters():
        case, _, arch = parameter.values
        if not parameter.marks:
            options = {
                f.name for f in dataclasses.fields(case) if getattr(case, f.name) != f.default
            }
            seen[arch] |= options | set(case.name.split("_"))
    assert seen[80] & set(cases.PAIR_OPTIONS) == seen[90] & set(cases.PAIR_OPTIONS)
    words = {"causal", "window", "padding", "varlen", "documents", "dense", "keep",
             "decode", "bias", "alibi", "sinks", "softcap", "dropout_p", "lse_grad", "layout",
             "poison", "D", "Dv", "Hkv", "split", "scale"}  # fmt: skip
    assert words <= seen[80] and words <= seen[90], (words - seen[80], words - seen[90])


# -- the shipped tile shapes ----------------------------------------------------------------------

SHIPPED = {  # by width: the three rows of the table
    "large_window": 64,
    "width_128": 128,
    "width_256": 256,
}


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("name", [n for n in SHIPPED if n in {c.name for c in cases.CASES}])
def test_row_of_the_table(name, arch):
    """The configurations that calls run with."""
    case = cases.named(name)
    results, launches = run(case, "bfloat16", arch, None)
    cases.check(case, torch.bfloat16, results)
    multiplied = sum(counts["mma"] + counts["wgmma"] for _, counts in launches)
    assert multiplied > 0
    if arch == 90 and case.D <= 128:
        assert sum(counts["wgmma"] for _, counts in launches) > 0


@pytest.mark.parametrize("name", ["causal_97", "varlen_causal_lower_right"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_wgmma(name, dtype):
    case = cases.named(name)
    results, launches = run(case, dtype, 90, WGMMA)
    cases.check(case, getattr(torch, dtype), results)
    kernels = {kernel for kernel, counts in launches if counts["wgmma"]}
    assert {"forward_kernel", "dq_kernel", "dkv_kernel"} <= kernels


@pytest.mark.parametrize("name", ["causal_97", "width_128", "width_192_128"])
@pytest.mark.parametrize("arch", ARCHES)
def test_tf32(name, arch):
    """float32 on tensor cores, which torch's precision setting asks for, in the shipped tiles."""
    case = cases.named(name)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        results, launches = run(case, "float32", arch, None)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert sum(counts["mma"] + counts["wgmma"] for _, counts in launches) > 0
    for key, exact in cases.expected(case, torch.float32).items():
        error = cases.error(results[key], exact) / cases.largest(exact)
        assert 1e-6 < error < 5e-3, (key, error)


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("reduce", test_weights.REDUCE)
@pytest.mark.parametrize("name", ["causal_65", "dense_causal_padding", "all_at_once"])
def test_weights_of_a_case(name, reduce, arch):
    way = ways.Emulator(arch)
    got = way.call(ways.run_weights, name, "bfloat16", reduce, TILES[arch], way.device)
    got = torch.from_numpy(got).to(torch.bfloat16)
    test_weights.check(name, torch.bfloat16, reduce, got)


# -- schedules ------------------------------------------------------------------------------------

SCHEDULES = [Config(seed=s, asynchronous=m) for s in (0, 1, 2) for m in ("early", "late", "random")]


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("name", ["causal_97", "pair_dense_bias", "decode_keys"])
def test_schedules(name, arch):
    """The results do not depend on the order of threads, nor on when copies land."""
    case = cases.named(name)
    tile = WGMMA if name == "causal_97" else TILES[arch]
    first, _ = run(case, "bfloat16", arch, tile, SCHEDULES[0])
    cases.check(case, torch.bfloat16, first)
    for config in SCHEDULES[1:]:
        again, _ = run(case, "bfloat16", arch, tile, config)
        assert all(torch.equal(again[key], first[key]) for key in first), config


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("name", ["causal_97", "decode_everything", "pair_varlen_gqa"])
def test_interleaved_blocks(name, arch):
    """Blocks of a kernel share nothing that they write."""
    case = cases.named(name)
    config = Config(seed=3, asynchronous="random", resident_blocks=6)
    results, _ = run(case, "bfloat16", arch, TILES[arch], config)
    cases.check(case, torch.bfloat16, results)


# -- mutations of the compiled code ---------------------------------------------------------------


def mutants(ptx: str, pattern: str, replacement: str) -> list[str]:
    """``ptx`` with one match of the pattern after the other replaced."""
    return [
        ptx[: found.start()] + found.expand(replacement) + ptx[found.end() :]
        for found in re.finditer(pattern, ptx)
    ]


# (what, of which architecture, pattern, replacement, what is said, the share that must be found)
MUTATIONS = [
    ("barrier dropped", 80, r"bar\.sync\s+0;", "", "race|in flight", 0.5),
    ("barrier dropped", 90, r"bar\.sync\s+0;", "", "race|in flight|proxy|wgmma", 0.5),
    ("wait weakened", 80, r"cp\.async\.wait_group\s+0x0;|cp\.async\.wait_group\s+0;",
     "cp.async.wait_group 9;", "in flight", 0.5),
    ("fence dropped", 90, r"wgmma\.fence\.sync\.aligned;", "", "wgmma.fence", 0.5),
    ("proxy fence dropped", 90, r"fence\.proxy\.async\.shared::cta;", "", "fence.proxy.async", 0.5),
    ("wait dropped", 90, r"wgmma\.wait_group\.sync\.aligned\s+0;",
     "wgmma.wait_group.sync.aligned 7;", "wait_group|in flight", 0.5),
    ("guard of a store dropped", 80, r"@%p\d+( st\.global)", r"\1", "global", 0.5),
]  # fmt: skip


@pytest.mark.parametrize(
    "what, arch, pattern, replacement, message, share",
    MUTATIONS, ids=[f"{m[0]} sm{m[1]}".replace(" ", "_") for m in MUTATIONS],
)  # fmt: skip
@pytest.mark.parametrize("kernel", ["forward_kernel", "dkv_kernel"])
def test_mutation(kernel, what, arch, pattern, replacement, message, share):
    """Each way to break the code Triton made is either found, or changes no result: the compiler
    is careful, so a few of its barriers may be spare."""
    case, way = cases.named("causal_97"), ways.Emulator(arch, seed=2, asynchronous="late")
    tile = WGMMA if arch == 90 else (32, 32, 4, 2)
    texts = {}

    def keep(name, ptx):
        texts[name] = ptx
        return ptx

    with way.running(keep):
        ways.run_case(case.name, "bfloat16", tile, way.device)
    made = mutants(texts[kernel], pattern, replacement)
    assert made, f"nothing in {kernel} matches {pattern}"
    found = 0
    for mutant in made:
        with way.running(lambda name, ptx, m=mutant: m if name == kernel else ptx):
            try:
                results = ways.run_case(case.name, "bfloat16", tile, way.device)
            except EmulatorError as error:
                assert re.search(message, str(error)), error
                assert re.search(r"\.py:\d+|it ended with", str(error)), error
                found += 1
                continue
        results = {key: torch.from_numpy(value) for key, value in results.items()}
        cases.check(case, torch.bfloat16, results)
    assert found >= share * len(made), f"{found} of {len(made)} found"
