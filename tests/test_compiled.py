"""Static gates on the code that Triton makes of the shipped configurations, without a GPU.

Every row of the table is compiled for its architecture, must fit a block's shared memory, and on
sm_80, sm_90 and sm_100 keep everything in registers (no spill, no stack). The representative of a
row is bfloat16 (or float32) at the row's full width with affine bounds per batch. The full matrix
(-m slow) adds the other forms of mask, odd widths and Dv != D.
"""

import re

import aot
import pytest
from aot import SHARED_LIMIT, compile_kernel, compile_packing

from tilemask.kernels import tuning

pytestmark = pytest.mark.compiled

WIDTHS = (64, 128, 256)
HEAVY_FORMS = ("words", "keys", "lists and words")
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
    heavy = bool(options.get("option")) or options.get("form") in HEAVY_FORMS
    config = tuning.pick(kernel, arithmetic, arch, WIDTHS[place], heavy)
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
    wide = arithmetic == "half" and arch == 90 and WIDTHS[place] <= 128
    if wide and kernel != "decode":
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


HEAVY_ROWS = [
    pytest.param(kernel, arch, place, id=f"{kernel}-sm{arch}-{WIDTHS[place]}")
    for kernel in aot.KERNELS
    for arch in (80, 90)
    for place in range(3)
]


@pytest.mark.parametrize("kernel, arch, place", HEAVY_ROWS)
def test_row_with_bits(kernel, arch, place):
    """Explicit intervals and bits per pair together, in half precision; also with an option."""
    code = compiled(kernel, "half", arch, place, form="lists and words")
    gate(code, arch)


@pytest.mark.slow
@pytest.mark.parametrize(
    "form, option", [("keys", None), *(("lists and words", o) for o in aot.OPTIONS)]
)
@pytest.mark.parametrize("kernel, arch, place", HEAVY_ROWS)
def test_row_with_bits_and_options(kernel, arch, place, form, option):
    per_batch = form == "keys"
    gate(compiled(kernel, "half", arch, place, form=form, option=option, per_batch=per_batch), arch)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("arch", [80, 90])
def test_merge(arch, width):
    from tilemask.kernels import split

    code = aot.compile_merge(arch, "bf16", width, split.MOST)
    assert (code.spills, code.stack) == (0, 0)
    # no product is contracted with an addition of the sums, or lanes that stand for the same
    # element could round it otherwise
    addends = re.findall(r"fma\.rn\.f32\s+.*, (\S+);", code.ptx)
    assert set(addends) == {"0f00000000"}


PACKING = {
    "pack_bits_kernel": {"ROWS": 64},
    "transpose_words_kernel": {},
    "live_rows_kernel": {"ROWS": 32, "CHUNK": 8},
    "classify_kernel": {"BLOCK_M": 128, "BLOCK_N": 64, "CHUNK": 8},
    "compact_kernel": {"CHUNK": 512},
}


@pytest.mark.parametrize("kernel", PACKING)
@pytest.mark.parametrize("arch", [80, 90])
def test_packing(arch, kernel):
    code = compile_packing(kernel, arch, **PACKING[kernel])
    assert (code.spills, code.stack) == (0, 0)


def test_packing_reads_a_mask_in_wide_loads():
    """The one pass over a bool mask is as fast as memory: 16 bytes per load."""
    code = compile_packing("pack_bits_kernel", 90, ROWS=64)
    assert code.count("LDG") == 4 and code.sass.count("LDG.E.128") == 4


# -- the cost of the mask -------------------------------------------------------------------------


def main_loops(kernel, arch, config, form):
    """(full, partial): the mnemonics of a kernel's two main loops."""
    code = compile_kernel(kernel, arch, config, form=form)
    loops = [[name for name in loop if name != "NOP"] for loop in aot.loops(code.sass)]
    return sorted(loops, key=len)[-2:]


TILES = {  # two widths tell the cost per element from the cost per tile
    ("forward", 80): ((128, 32, 8, 2), (128, 64, 8, 2)),
    ("forward", 90): ((128, 64, 8, 2), (128, 128, 8, 2)),
    ("dkv", 80): ((32, 128, 8, 2), (64, 128, 8, 2)),
    ("dkv", 90): ((32, 128, 8, 2), (64, 128, 8, 2)),
}


@pytest.mark.parametrize("form", ["affine", "words"])
@pytest.mark.parametrize("kernel, arch", TILES)
def test_the_cost_of_a_partial_tile(kernel, arch, form):
    """The full loop has no mask code. The partial one sets the predicates of several elements with
    one R2P instruction: at most 2.4 instructions more per element, and for the words, the edges of
    K and V and the pivot at most 130 more per tile."""
    extra = []
    for tile in TILES[kernel, arch]:
        full, partial = main_loops(kernel, arch, tuning.TileConfig(*tile), form)
        assert "R2P" not in full and "R2P" in partial
        assert full.count("STS") == partial.count("STS")  # no layout goes through shared memory
        extra.append(len(partial) - len(full))
    elements = [m * n / (32 * warps) for m, n, warps, _ in TILES[kernel, arch]]
    per_element = (extra[1] - extra[0]) / (elements[1] - elements[0])
    assert per_element <= 2.4
    assert extra[0] - per_element * elements[0] <= 130
