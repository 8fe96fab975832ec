"""Static gates on the machine code of the CUDA library: see library_code.py."""

import json
import re

import library_code
import pytest

pytestmark = pytest.mark.compiled

OTHER_ARCHS = ("86", "89", "90a", "100", "120")
SOURCES = [path.stem for path in library_code.toolchain.sources()]
PRODUCTS = {"forward": 2, "dq": 3, "dkv": 4}  # of matrices, per tile
BLOCKS = 2  # of 128 threads, at least, on a multiprocessor at once
REGISTER_FILE = 65536

# Instructions per score that a loop may have at most, by kernel and width: what the comment at the
# head of its source aims for. The first is that of full tiles.
AIMS = {
    ("forward", 64): (11.2, 19),
    ("forward", 128): (20.5, 34),
    ("forward", 256): (40, 66),
    ("dq", 64): (13, 27),
    ("dq", 128): (19, 32),
    ("dq", 256): (53, 93),
    ("dkv", 64): (17, 38),
    ("dkv", 128): (34.5, 70),
    ("dkv", 256): (86, 126),
}


def each_arch(test):
    slow = [pytest.param(arch, marks=pytest.mark.slow) for arch in OTHER_ARCHS]
    return pytest.mark.parametrize("arch", ["80", *slow])(test)


@each_arch
@pytest.mark.parametrize("source", SOURCES)
def test_everything_stays_in_registers(source, arch):
    for kernel in library_code.kernels(source, arch):
        assert (kernel.spills, kernel.stack) == (0, 0), kernel.name
        assert kernel.registers * 128 * BLOCKS <= REGISTER_FILE, kernel.name


@each_arch
@pytest.mark.parametrize("source", library_code.LOOPS)
def test_loops_have_the_products_of_a_tile_and_nothing_is_fetched_bit_by_bit(source, arch):
    found = library_code.kernels(source, arch)
    assert len(found) == {"sm80_forward": 24, "sm80_dq": 12, "sm80_dkv": 12}[source]
    for kernel in found:
        full, partial = kernel.loops
        width = int(re.search(r", (\d+)", kernel.name)[1])
        scores = library_code.scores_per_thread(kernel) * library_code.WARP  # of a warp
        products = PRODUCTS[kernel.name.split("_")[0]] * scores // (16 * 8) * (width // 16)
        for loop in (full, partial):
            assert loop.count("HMMA") == products, kernel.name
            assert loop.count("LDSM") > 0 and loop.count("LDGSTS") > 0
            assert loop.count("HMMA") >= loop.count("LDSM")
        assert len(full) < len(partial)


@pytest.mark.parametrize("source", library_code.LOOPS)
def test_loops_meet_their_aims(source):
    for kernel in library_code.kernels(source, "80"):
        name, width = kernel.name.split("_")[0], int(re.search(r", (\d+)", kernel.name)[1])
        plain = ", false" in kernel.name and ", true" not in kernel.name
        if not plain:
            continue
        scores = library_code.scores_per_thread(kernel)
        for loop, aim in zip(kernel.loops, AIMS[name, width], strict=True):
            assert len(loop) / scores <= aim, f"{kernel.name}: {len(loop) / scores:.1f} > {aim}"


def test_the_report_is_that_of_these_sources():
    """A loop that grows is seen here; after a change that is meant: library_code.py --write."""
    kept = json.loads((library_code.STATIC / "sm_80.json").read_text())
    if kept["nvcc"] != library_code.nvcc_release():
        pytest.skip(f"the report was made with nvcc {kept['nvcc']}")
    found = library_code.report("80")
    assert found.keys() == kept["kernels"].keys()
    for name, kernel in found.items():
        assert kernel == kept["kernels"][name], f"{name}: python tests/library_code.py --write"


def test_readable_names():
    symbol = "_ZN48_GLOBAL__N__a1d71094_15_sm80_forward_cu_7440856014forward_kernelI8BFloat16"
    name = library_code.readable(symbol + "Li64ELb0ELb1EEEv11ForwardCall")
    assert name == "forward_kernel<BFloat16, 64, false, true>"
    assert library_code.readable("_ZN12_GLOBAL__N_112probe_kernelEv") == "probe_kernel"
