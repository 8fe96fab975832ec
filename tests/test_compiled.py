"""Static gates on the code that Triton makes of the shipped configurations, without a GPU.

Every row of the table is compiled for its architecture, must fit a block's shared memory, and on
sm_80, sm_90 and sm_100 keep everything in registers (no spill, no stack). The representative of a
row is bfloat16 (or float32) at the row's full width with affine bounds per batch. The full matrix
(-m slow) adds the other forms of mask, odd widths and Dv != D.
"""

import aot
import pytest
from aot import SHARED_LIMIT, compile_kernel, compile_list_builder

from tilemask.kernels import tuning

pytestmark = pytest.mark.compiled

WIDTHS = (64, 128, 256)
ARCHITECTURES = (80, 86, 90, 100, 120)
ROWS = [
    pytest.param(
        kernel, arithmetic, arch, place, id=f"{kernel}-{arithmetic}-sm{arch}-{WIDTHS[place]}"
    )
    for kernel, arithmetic in tuning.TABLE
    for arch in ARCHITECTURES  # one per row of the table, and sm_120, which shares sm_86's
    for place in range(3)
]


def compiled(kernel, arithmetic, arch, place, **options):
    config = tuning.pick(kernel, arithmetic, arch, WIDTHS[place])
    options = {
        "dtype": "bf16" if arithmetic == "half" else "fp32",
        "width": WIDTHS[place],
    } | options
    precision = "tf32" if arithmetic == "tf32" else "ieee"
    return compile_kernel(kernel, arch, config, precision=precision, **options)


def gate(code, arch):
    assert code.shared <= SHARED_LIMIT[arch] * 1024
    if arch in (
        80,
        90,
        100,
    ):  # sm_86 and sm_120 have less shared memory, and spill a little in some
        assert (code.spills, code.stack) == (0, 0)


@pytest.mark.parametrize("kernel, arithmetic, arch, place", ROWS)
def test_row_of_the_table(kernel, arithmetic, arch, place):
    code = compiled(kernel, arithmetic, arch, place, per_batch=True)
    gate(code, arch)
    if arithmetic == "half":
        assert code.count("HGMMA") + code.count("UTCHMMA") + code.count("HMMA") > 0
    if arithmetic == "half" and arch == 90 and WIDTHS[place] <= 128:
        assert code.count("HGMMA") > 0  # wgmma: tiles of at least 64 rows


@pytest.mark.slow
@pytest.mark.parametrize("form, per_batch", [("lists", True), ("lists", False), ("affine", False)])
@pytest.mark.parametrize("kernel, arithmetic, arch, place", ROWS)
def test_every_form_of_mask(kernel, arithmetic, arch, place, form, per_batch):
    gate(compiled(kernel, arithmetic, arch, place, form=form, per_batch=per_batch), arch)


@pytest.mark.slow
@pytest.mark.parametrize("kernel, arithmetic, arch, place", ROWS)
def test_odd_widths_compile(kernel, arithmetic, arch, place):
    width = WIDTHS[place] * 5 // 8
    code = compiled(kernel, arithmetic, arch, place, width=width, width_v=WIDTHS[place])
    assert code.shared <= SHARED_LIMIT[arch] * 1024


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("arch", [80, 90])
def test_list_builder(arch, transposed):
    code = compile_list_builder(arch, 128, 64, transposed)
    assert (code.spills, code.stack) == (0, 0)


# -- the cost of the mask -------------------------------------------------------------------------


def main_loops(arch, config):
    """(full, partial): the mnemonics of the forward's two main loops."""
    return sorted(aot.loops(compile_kernel("forward", arch, config).sass), key=len)[-2:]


@pytest.mark.parametrize(
    "arch, narrow, wide",
    [(80, (128, 32, 8, 2), (128, 64, 8, 2)), (90, (128, 64, 8, 2), (128, 128, 8, 2))],
)
def test_the_cost_of_a_partial_tile(arch, narrow, wide):
    """The full loop has no mask code. The partial one sets the predicates of several elements with
    one R2P instruction: at most 2.4 instructions more per element, and 100 more per tile for the
    words, the edges of K and V and the pivot. Two tile widths tell the two costs apart."""
    extra = []
    for tile in (narrow, wide):
        full, partial = main_loops(arch, tuning.TileConfig(*tile))
        assert "R2P" not in full and "R2P" in partial
        assert full.count("STS") == partial.count("STS")  # no layout goes through shared memory
        extra.append(len(partial) - len(full))
    elements = [m * n / (32 * warps) for m, n, warps, _ in (narrow, wide)]
    per_element = (extra[1] - extra[0]) / (elements[1] - elements[0])
    assert per_element <= 2.4
    assert extra[0] - per_element * elements[0] <= 100
