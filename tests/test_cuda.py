"""The CUDA library, on a GPU or in the PTX emulator: the common cases, forward and backward, with
every race, missing wait and stray access an error; its structs, and who chooses it."""

import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import cases
import numpy as np
import nvcc
import published
import pytest
import test_source_cases
import test_triton
import test_weights
import torch
import ways
from ptx_emulator import Config, EmulatorError
from ptx_emulator import cuda as posed

import tilemask
from tilemask import autograd, backends, library, masks
from tilemask.attention import checked
from tilemask.backends import cuda, prepared, triton

ROOT = Path(__file__).resolve().parents[1]
GPU = torch.cuda.is_available()
MODES = ("random", "late", "early")


def way_of(config=None, arch: int = 80):
    """The library on this machine's GPU, or compiled for ``arch`` in the emulator, under a
    schedule."""
    return ways.Gpu("cuda") if GPU else ways.EmulatedLibrary(config, arch)


@pytest.fixture
def way():
    return way_of()


needs_library = pytest.mark.skipif(
    GPU and library.unavailable() is not None, reason=f"on a GPU: {library.unavailable()}"
)
emulated = pytest.mark.skipif(GPU, reason="the GPU runs the kernels themselves")


# -- the structs ----------------------------------------------------------------------------------

LAYOUTS = [cuda.FORWARD, cuda.BACKWARD, cuda.SUMS, cuda.PACK, cuda.TRANSPOSE, cuda.LOWER]
NUMBERS = {
    "TILEMASK_ABI": library.ABI,
    "TILEMASK_NO_KERNEL": library.NO_KERNEL,
    "TILEMASK_FLOAT16": cuda.DTYPES[torch.float16],
    "TILEMASK_BFLOAT16": cuda.DTYPES[torch.bfloat16],
    "TILEMASK_FLOAT32": cuda.DTYPES[torch.float32],
    "TILEMASK_FORWARD": cuda.KERNELS["forward"],
    "TILEMASK_DECODE": cuda.KERNELS["decode"],
    "TILEMASK_DQ": cuda.KERNELS["dq"],
    "TILEMASK_DKV": cuda.KERNELS["dkv"],
    "TILEMASK_DQKV": cuda.KERNELS["dqkv"],
}
KIND = """
#define KIND(x) _Generic((x), uint32_t: 'I', int32_t: 'i', int64_t: 'q', float: 'f', default: 'P')
#define SHOW(T, field, first) printf("%zu %zu %c\\n", offsetof(T, field), \\
    sizeof(((T*)0)->field), KIND(((T*)0)->first))
"""


@pytest.fixture(scope="module")
def header(tmp_path_factory):
    """What a C compiler makes of csrc/tilemask.h: offset, size and type of each field that
    backends/cuda.py names, by struct, with the size of the struct last; and NUMBERS."""
    lines = ["#include <stddef.h>", "#include <stdint.h>", "#include <stdio.h>"]
    lines += ['#include "tilemask.h"', KIND, "int main(void) {"]
    for layout in LAYOUTS:
        for field, kind in layout.fields.items():
            first = f"{field}[0]" if len(kind) > 1 else field
            lines.append(f"  SHOW({layout.name}, {field}, {first});")
        lines.append(f'  printf("%zu\\n", sizeof({layout.name}));')
    lines += [f'  printf("%d\\n", (int){name});' for name in NUMBERS]
    folder = tmp_path_factory.mktemp("header")
    (folder / "header.c").write_text("\n".join([*lines, "}"]))
    compiler = os.environ.get("CC") or "gcc"
    command = [compiler, "-I", ROOT / "csrc", folder / "header.c", "-o", folder / "header"]
    subprocess.run(command, check=True)
    told = iter(subprocess.check_output([folder / "header"], text=True).splitlines())
    structs = {
        layout.name: [next(told).split() for _ in range(len(layout.fields) + 1)]
        for layout in LAYOUTS
    }
    return structs, [int(line) for line in told]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_fields_lie_where_the_header_has_them(header, layout):
    *fields, (size,) = header[0][layout.name]
    formats, end = list(layout.fields.values()), 0
    for i, (name, (offset, extent, kind)) in enumerate(zip(layout.fields, fields, strict=True)):
        own = struct.calcsize(f"@{formats[i]}")
        before = struct.calcsize("@" + "".join(formats[: i + 1])) - own
        assert (before, own, formats[i][-1]) == (int(offset), int(extent), kind), name
        assert before == end, f"the header has something before {name} that is not named"
        end = before + own
    assert layout.size == end == int(size)


def test_numbers_are_those_of_the_header(header):
    assert dict(zip(NUMBERS, header[1], strict=True)) == NUMBERS


# -- the common cases -----------------------------------------------------------------------------


def parameters() -> list:
    """(case, dtype, schedule, architecture). Per commit each case in one of the two dtypes for
    sm_80, under a schedule of its own; the other dtype is slow, and so is most of sm_90a, and of
    sm_86, which has no room for the backward in one pass."""
    made = []
    for index, case in enumerate(cases.CASES):
        names = [n for n in ("bfloat16", "float16") if getattr(torch, n) in case.dtypes]
        for name in names:
            first = name == names[index % len(names)]
            config = Config(seed=index, asynchronous=MODES[index % 3])
            marks = () if GPU or first else pytest.mark.slow
            made.append(pytest.param(case, name, config, 80, id=f"{case}-{name}", marks=marks))
            for arch, turn in ((86, 4), (90, 0)) if first and not GPU else ():
                marks = () if index % 8 == turn else pytest.mark.slow
                label = f"{case}-{name}-sm_{arch}"
                made.append(pytest.param(case, name, config, arch, id=label, marks=marks))
    return made


def run(way, case, name: str) -> dict:
    results = way.call(ways.run_case, case.name, name, way.default_tile, way.device, way.backend)
    return {key: torch.from_numpy(value) for key, value in results.items()}


@needs_library
@pytest.mark.parametrize("case, name, config, arch", parameters())
def test_case(case, name, config, arch):
    cases.check(case, getattr(torch, name), run(way_of(config, arch), case, name))


@needs_library
@pytest.mark.parametrize("reduce", test_weights.REDUCE)
@pytest.mark.parametrize("name", test_weights.NAMES[::2])
def test_weights_of_a_case(way, name, reduce):
    kinds = [d for d in (torch.bfloat16, torch.float16) if d in cases.named(name).dtypes]
    kind = kinds[test_weights.REDUCE.index(reduce) % len(kinds)]
    dtype = str(kind).removeprefix("torch.")
    got = way.call(ways.run_weights, name, dtype, reduce, None, way.device, way.backend)
    test_weights.check(name, kind, reduce, torch.from_numpy(got).to(kind))


@needs_library
@pytest.mark.parametrize("name", [n for n in test_source_cases.SOURCES if n != "nn_transformer"])
def test_source(way, name):
    """But for the whole model, in which the rounding of bfloat16 adds up."""
    way.call(ways.run_source, name, "bfloat16", way.device, way.backend)


@emulated
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_published_samples(way, dtype):
    """PyTorch's own, of scaled_dot_product_attention: no further from the truth than twice
    torch."""

    def attend(*tensors, **options):
        with tilemask.use_backend(way.backend):
            return tilemask.scaled_dot_product_attention(*tensors, **options)

    count = 0
    for tensors, options in published.sdpa_samples(dtype):
        with way.running():
            got = published.results(attend, tensors, options)
        published.check(got, tensors, options, dtype)
        count += 1
    assert count >= 20


@needs_library
@pytest.mark.parametrize("case", test_triton.masked(0))
def test_visited_tiles(way, case):
    """Forward, dQ and dK/dV, or both in one pass, visit exactly the tiles the mask leaves, once, in
    their class."""
    visited = way.call(ways.visits, case.name, "bfloat16", None, way.device, way.backend)
    one_pass = "dqkv" in visited and visited["dqkv"][1].any()
    idle = ("dq", "dkv") if one_pass else ("dqkv",)
    for kernel, (shape, counts) in visited.items():
        expected = test_triton.expected_classes(case.seen(), *shape)
        wanted = np.zeros_like(expected) if kernel in idle else expected
        np.testing.assert_array_equal(counts, wanted, err_msg=kernel)


@needs_library
@pytest.mark.parametrize("transposed", [0, 1, 2])
@pytest.mark.parametrize("tile", [(16, 128), (64, 32), (128, 64)])
@pytest.mark.parametrize("case", test_triton.LISTED, ids=lambda case: case.name)
def test_lists_name_the_tiles(way, case, tile, transposed):
    test_triton.check_lists(way, case, tile, transposed)


@needs_library
@pytest.mark.skipif(not GPU, reason="tests/test_packing.py compares both with the definition")
@pytest.mark.parametrize("name", ["dense_BHQK", "keep_causal", "dense_causal_padding"])
def test_both_gpu_backends_pack_the_same_bits(name):
    made, wanted = (ways.packed(name, "cuda", backend) for backend in ("cuda", "triton"))
    for key, value in wanted.items():
        np.testing.assert_array_equal(made[key], value, err_msg=key)


# -- decoding -------------------------------------------------------------------------------------


def launched() -> list[str]:
    """The kernels that the emulator has run since it stood in."""
    from ptx_emulator import cuda as posed

    return [kernel for kernel, _ in posed.launches()]


LONG = [case.name for case in cases.CASES if case.name.startswith("decode_long")]


@emulated
@pytest.mark.parametrize("name", [*LONG, "decode_everything", "decode_causal_17", "large_window"])
def test_few_rows_are_split(name):
    """Over blocks, and merged by a kernel of its own; more rows, or few tiles, are not."""
    case = cases.named(name)
    given = cases.inputs(case, torch.float16)
    with ways.EmulatedLibrary().running(), torch.no_grad():
        options = cases.options(case, given, "cpu")
        tilemask.attention(given["q"], given["k"], given["v"], backend="cuda", **options)
        kernels = launched()
    assert sum("forward_kernel" in kernel for kernel in kernels) == 1
    assert sum("merge_kernel" in kernel for kernel in kernels) == (name in LONG)


# -- schedules, and what the emulator finds -------------------------------------------------------

SCHEDULES = [Config(seed=s, asynchronous=m) for s in (0, 1, 2) for m in MODES]


@emulated
@pytest.mark.parametrize(
    "name", ["causal_97", "pair_dense_bias", "pair_bias_dropout", "decode_long_keys"]
)
def test_schedules(name):
    """The results do not depend on the order of threads, nor on when copies land."""
    case = cases.named(name)
    first = run(way_of(SCHEDULES[0]), case, "bfloat16")
    cases.check(case, torch.bfloat16, first)
    for config in SCHEDULES[1:]:
        again = run(way_of(config), case, "bfloat16")
        assert all(torch.equal(again[key], first[key]) for key in first), config


@emulated
@pytest.mark.parametrize(
    "name", ["causal_97", "decode_everything", "decode_long_bits", "pair_varlen_gqa"]
)
def test_interleaved_blocks(name):
    """Blocks of a kernel share nothing that they write."""
    case = cases.named(name)
    config = Config(seed=3, asynchronous="random", resident_blocks=6)
    cases.check(case, torch.float16, run(way_of(config), case, "float16"))


# -- the backward in one pass ---------------------------------------------------------------------


def draws(seed: int, *shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


# the last rows and keys are parts of tiles
ONE_PASS = {
    "everything": None,
    "causal": masks.causal(),
    "window": masks.window(90, 20),
    "padding": masks.padding(torch.tensor([300, 77])) & masks.causal(),
    "bits": masks.dense(draws(1, 2, 1, 150, 400) < 0.5),
    "few tiles": masks.dense(torch.arange(150)[:, None] // 30 * 2 == torch.arange(400) // 40),
    "keys": masks.padding(keep=draws(2, 2, 400) < 0.9),
    "documents": masks.documents(torch.arange(150)[None] // 40, torch.arange(400)[None] // 100),
}


def tensors_of(width: int, **kind):
    """q, k, v and dout of two query heads to a key head, for four blocks of columns."""
    torch.manual_seed(0)
    made = [torch.randn(2, heads, rows, width, **kind) for heads, rows in ((2, 150), (1, 400))]
    q, k = (t.requires_grad_() for t in made)
    return q, k, torch.randn_like(k).requires_grad_(), torch.randn_like(q)


def turns() -> list:
    """Masks and widths; of the widest heads two are enough each time."""
    return [
        pytest.param(
            name,
            width,
            marks=pytest.mark.slow if width == 256 and name not in ("causal", "few tiles") else (),
        )
        for name in ONE_PASS
        for width in (64, 128, 256)
    ]


@emulated
@pytest.mark.parametrize("name, width", turns())
def test_column_blocks_take_turns_at_dq(name, width):
    """Many at once or one after the other, on any schedule: the same bits, and they wait for each
    other as the emulator's race checks ask. A block is never waited for that has not started."""
    q, k, v, dout = tensors_of(width, dtype=torch.bfloat16)
    found = []
    for seed, blocks in ((0, 1), (1, 2), (2, 5), (3, 16)):
        config = Config(seed=seed, asynchronous=MODES[seed % 3], resident_blocks=blocks)
        with ways.EmulatedLibrary(config).running():
            out = tilemask.attention(q, k, v, mask=ONE_PASS[name], backend="cuda")
            found.append(torch.autograd.grad(out, (q, k, v), dout))
            assert any("dqkv_kernel" in kernel for kernel in launched())
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    out = tilemask.attention(*wide, mask=ONE_PASS[name], backend="reference")
    truth = torch.autograd.grad(out, wide, dout.double())
    for got, want in zip(found[0], truth, strict=True):
        assert (got.double() - want).norm() < 0.01 * want.norm()


RANGES = r"""
#include <cstdio>
#include <random>
#include "mask.cuh"
#include "tiles.h"

std::mt19937 random_bits(1);
int draw(int first, int last) { return first + random_bits() % (last - first + 1); }
int bound(int far) {
  const int all[] = {draw(-far, far), draw(-40, 40), -FAR, FAR};
  return all[draw(0, 3)];
}
template <int BLOCK_M, int BLOCK_N>
bool agree(const Bounds& bounds, int len_q, int len_k) {
  for (int i = 0; i * BLOCK_M < len_q; ++i) {
    const Ranges across = column_ranges<BLOCK_M, BLOCK_N>(bounds, i * BLOCK_M);
    for (int j = 0; j * BLOCK_N < len_k; ++j) {
      const Ranges down = row_ranges<BLOCK_M, BLOCK_N>(bounds, j * BLOCK_N);
      const bool visits = down.first <= i && i < down.last;
      if (visits != (across.first <= j && j < across.last)) return false;
    }
  }
  return true;
}
int main() {
  constexpr TileShape NARROW = dqkv_tile(64), WIDE = dqkv_tile(128), WIDEST = dqkv_tile(256);
  int visited = 0;
  for (int i = 0; i < 100000; ++i) {
    const int len_q = draw(1, 700), len_k = draw(1, 900);
    const Bounds bounds{draw(0, 1) * draw(0, len_k), draw(0, 1) ? len_k : draw(0, len_k),
                        bound(1000), bound(1000), draw(0, 1) * draw(0, len_q),
                        draw(0, 1) ? len_q : draw(0, len_q)};
    if (!agree<NARROW.block_m, NARROW.block_n>(bounds, len_q, len_k) ||
        !agree<WIDE.block_m, WIDE.block_n>(bounds, len_q, len_k) ||
        !agree<WIDEST.block_m, WIDEST.block_n>(bounds, len_q, len_k)) {
      printf("lengths %d %d, bounds %d %d %d %d %d %d\n", len_q, len_k, bounds.start, bounds.end,
             bounds.left, bounds.right, bounds.q_start, bounds.q_end);
      return 1;
    }
    visited += row_ranges<NARROW.block_m, NARROW.block_n>(bounds, 0).last > 0;
  }
  printf("%d\n", visited);
}
"""


@emulated
def test_rows_and_columns_agree_on_what_they_visit(tmp_path):
    """Column blocks wait for those after them that visit the same rows, by what column_ranges says
    of the rows: were it another than row_ranges, they would wait forever."""
    (tmp_path / "ranges.cu").write_text(RANGES)
    command = [nvcc.find_nvcc(), "-std=c++17", f"-I{ROOT / 'csrc'}", tmp_path / "ranges.cu"]
    subprocess.run([*command, "-o", tmp_path / "ranges"], check=True)
    done = subprocess.run([tmp_path / "ranges"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert int(done.stdout) > 10000  # of 100000 see the first columns


@emulated
@pytest.mark.parametrize(
    "options, arch, passes",
    [
        ({}, 80, 1),
        ({"mask": masks.causal()}, 90, 1),
        ({"mask": masks.causal()}, 86, 2),  # two blocks do not fit on a multiprocessor
        ({"mask": masks.dense(torch.rand(150, 400) < 0.5)}, 80, 1),
        ({"mask": masks.dense(torch.rand(150, 400) < 0.5)}, 86, 2),
        (
            {
                "mask": masks.documents(
                    torch.arange(150)[None] // 40, torch.arange(400)[None] // 100
                )
            },
            80,
            1,
        ),
        ({"softcap": 5.0}, 80, 2),
        ({"scale": -1.0}, 80, 2),
    ],
)
@pytest.mark.parametrize("width", [40, 128, 136])
def test_which_backward_runs(options, arch, passes, width):
    q, k, v, dout = tensors_of(width, dtype=torch.float16)
    with ways.EmulatedLibrary(arch=arch).running():
        out = tilemask.attention(q, k, v, backend="cuda", **options)
        torch.autograd.grad(out, (q, k, v), dout)
        kernels = [
            name for kernel in launched() for name in re.findall(r"d(?:q|kv|qkv)_kernel", kernel)
        ]
    assert kernels == (["dqkv_kernel"] if passes == 1 else ["dq_kernel", "dkv_kernel"])


@emulated
@pytest.mark.parametrize("arch", [80, 86])
def test_rows_that_are_no_whole_chunks_take_two_passes(arch):
    """With lists: what prepare() makes is for rows where they usually lie."""
    _, k, v, dout = tensors_of(64, dtype=torch.float16)
    q = torch.randn(2, 2, 150, 65, dtype=torch.float16)[..., 1:].requires_grad_()
    mask = masks.dense(draws(3, 150, 400) < 0.5)
    with ways.EmulatedLibrary(arch=arch).running():
        ready = masks.prepare(mask, q, k, v, backward=True)
        turns = [key[2] for key in ready.lowered.prepared.kept if isinstance(key, tuple)]
        assert turns == ([0, 2] if arch == 80 else [0, 0, 1])
        out = tilemask.attention(q, k, v, mask=ready, backend="cuda")
        found = torch.autograd.grad(out, (q, k, v), dout)
        assert any("dkv_kernel" in name and "dqkv" not in name for name in launched())
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    out = tilemask.attention(*wide, mask=mask, backend="reference")
    for got, want in zip(found, torch.autograd.grad(out, wide, dout.double()), strict=True):
        assert (got.double() - want).norm() < 0.01 * want.norm()


@emulated
@pytest.mark.parametrize("arch, rows", [(80, 128), (86, 64), (89, 64), (90, 64), (120, 64)])
def test_the_forward_tile_of_wide_heads_is_that_of_the_gpu(arch, rows):
    """sm_80 has room for one large block or one small, sm_90 for two small ones, others for one."""
    q = torch.randn(1, 1, 20, 256, dtype=torch.float16)
    with ways.EmulatedLibrary(arch=arch).running():
        assert cuda.tile_of("forward", 256, q.device) == (rows, 64)
        assert cuda.tile_of("forward", 128, q.device) == (128, 32)
        tilemask.attention(q, q, q, mask=masks.dense(torch.rand(20, 20) < 0.5), backend="cuda")
        assert any(f"Li256ELb0ELi{rows}E" in kernel for kernel in launched())


def copied_in_boxes() -> int:
    """Bytes of all launches since the emulator stood in."""
    return sum(counts["bulk_bytes"] for _, counts in posed.launches())


@emulated
@pytest.mark.parametrize("arch", [80, 90, 120])
@pytest.mark.parametrize(
    "rows, width, box, shares",
    [
        (70, 40, (64, 64), 1),
        (70, 128, (32, 128), 1),
        (60, 200, (64, 256), 1),
        (9, 72, (128, 128), 2),  # decoding
    ],
)
def test_full_tiles_come_in_boxes(arch, rows, width, box, shares):
    """From sm_90 on, but for the first k, which threads copy as they do in partial tiles. The code
    for sm_80, which stands for that of sm_120 here, has none."""
    tile, padded = box
    full, heads = 4, 3
    q, k, v = (torch.randn(1, heads, n, width).half() for n in (rows, *2 * [full * tile + 5]))
    with ways.EmulatedLibrary(arch=arch).running():
        out = tilemask.attention(q, k, v, backend="cuda")
        copies = heads * (2 * full - shares) if arch == 90 else 0
        assert copied_in_boxes() == copies * tile * padded * 2
    wanted = tilemask.attention(q.float(), k.float(), v.float(), backend="reference")
    torch.testing.assert_close(out.float(), wanted, rtol=2e-3, atol=2e-3)


REPEATED = {
    "over heads": lambda x: x[:, :1].expand_as(x),
    "over the batch": lambda x: x[:1].expand_as(x),
    "over both": lambda x: x[:1, :1].expand_as(x),
    "of one row": lambda x: x[:, :, :1].expand_as(x),
    "in rows that overlap": lambda x: x.as_strided(x.shape, (8 * 3 * 400, 8 * 400, 8, 1)),
    "beside others": lambda x: torch.cat([x, x], 3)[..., 64:],
}


@emulated
@pytest.mark.parametrize("name", REPEATED)
def test_boxes_of_tensors_that_repeat_themselves(name):
    """A tensor map gets no stride of 0: such heads and batches are one. Rows that overlap are left
    to the threads of the general kernel."""
    torch.manual_seed(0)
    q = torch.randn(2, 3, 70, 64).half()
    k, v = (REPEATED[name](torch.randn(2, 3, 400, 64).half()) for _ in "kv")
    with ways.EmulatedLibrary(arch=90).running():
        out = tilemask.attention(q, k, v, backend="cuda")
        assert (copied_in_boxes() == 0) == (name in ("of one row", "in rows that overlap"))
    wanted = tilemask.attention(q.float(), k.float(), v.float(), backend="reference")
    torch.testing.assert_close(out.float(), wanted, rtol=2e-3, atol=2e-3)


@emulated
@pytest.mark.parametrize("heads, rows, keys", [(0, 20, 300), (2, 0, 300), (2, 20, 0)])
def test_gradients_where_there_is_nothing_to_sum(heads, rows, keys):
    q = torch.randn(1, heads, rows, 64, dtype=torch.float16, requires_grad=True)
    k, v = (torch.randn(1, 2, keys, 64, dtype=torch.float16).requires_grad_() for _ in "kv")
    with ways.EmulatedLibrary().running():
        out = tilemask.attention(q, k, v, backend="cuda")
        for gradient in torch.autograd.grad(out, (q, k, v), torch.ones_like(out)):
            assert torch.equal(gradient, torch.zeros_like(gradient))


@emulated
def test_a_backward_without_its_workspace_is_refused(monkeypatch):
    q, k, v, dout = tensors_of(64, dtype=torch.float16)
    with ways.EmulatedLibrary().running():
        out = tilemask.attention(q, k, v, backend="cuda")
        monkeypatch.setattr(
            cuda,
            "with_workspace",
            lambda layout, values, size, device: (layout.pack(*values), None),
        )
        with pytest.raises(EmulatorError, match="workspace is missing or too small"):
            torch.autograd.grad(out, q, dout)


@needs_library
def test_rows_do_not_depend_on_those_beside_them(way):
    """To the last bit: what rows outside the query range hold changes no other row."""
    torch.manual_seed(0)
    kind = {"dtype": torch.float16, "device": way.device}
    q, k, v = (torch.randn(1, 1, rows, 64, **kind) for rows in (128, 512, 512))
    mask = masks.padding(query_lengths=torch.tensor([70], device=way.device))

    def attend(q):
        return tilemask.attention(q, k, v, mask=mask, backend="cuda")[:, :, :70]

    others = q.clone()
    others[:, :, 70:] *= 1000
    torch.testing.assert_close(way.call(attend, others), way.call(attend, q), rtol=0, atol=0)


@emulated
@pytest.mark.parametrize("width", [64, 128, 256])
def test_fragments_load_without_bank_conflicts(width):
    """Each ldmatrix loads four matrices of 128 bytes: four accesses of shared memory, no more."""
    q = torch.randn(1, 1, 65, width, dtype=torch.float16, requires_grad=True)
    with way_of().running():
        for option in ({}, {"softcap": 5.0}):  # the backward in one pass, and in two
            out = tilemask.attention(q, q, q, mask=masks.causal(), backend="cuda", **option)
            torch.autograd.grad(out, q, torch.ones_like(out))
        tilemask.attention(q[:, :, :1].detach(), q.detach(), q.detach(), backend="cuda")
        launches = posed.launches()
    loads = {}
    for kernel, counts in launches:
        if counts["ldmatrix"]:
            assert counts["ldmatrix_wavefronts"] == 4 * counts["ldmatrix"], kernel
            loads[kernel] = counts["ldmatrix"]
    # decoding; without options and with: forward; dQ, dK and dV in one pass or in two
    assert len(loads) == 6


@emulated
@pytest.mark.parametrize("missing", ["out", "lse", "k"])
def test_memory_that_was_not_given_is_out_of_bounds(missing, monkeypatch):
    """A launch may touch what its struct points to, and nothing else."""
    given = []
    q, k, v = (torch.randn(1, 1, 40, 16, dtype=torch.float16) for _ in range(3))
    with ways.EmulatedLibrary().running():
        recorded, real = cuda.pointer, torch.Tensor.data_ptr
        index = {"k": 1, "out": 3, "lse": 4}[missing]

        def pointer(tensor):
            given.append(tensor)
            return real(tensor) if len(given) == index + 1 else recorded(tensor)

        found = pytest.raises(
            EmulatorError, match=r"(?s)tilemask_forward\(q \(1, 1, 40, 16\).*global"
        )
        with monkeypatch.context() as inside, found:
            inside.setattr(cuda, "pointer", pointer)
            tilemask.attention(q, k, v, backend="cuda")


# -- the ops --------------------------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize("name", ["large_window", "large_varlen"])
def test_compiled_equals_eager(way, name):
    """torch.compile(fullgraph=True) runs the same kernels through the ops, lists included."""
    arguments = name, "bfloat16", None, way.device, way.backend
    eager, compiled, ops = way.call(ways.traced, *arguments)
    for key, value in eager.items():
        np.testing.assert_array_equal(compiled[key], value, err_msg=key)
    assert any("tilemask.forward" in op for op in ops)
    assert any("tilemask.lower" in op for op in ops) == (name == "large_varlen")


@needs_library
def test_ops_pass_opcheck(way):
    way.call(ways.opcheck_all, way.device, None, "float16", way.backend)


@needs_library
def test_backward_runs_where_forward_ran(way):
    """Also where another backend is forced in between: rest is of the backend that made it."""
    case = cases.named("sinks")
    given = cases.inputs(case, torch.float16, way.device)

    def gradients(between):
        with way.running() if hasattr(way, "running") else tilemask.use_backend("cuda"):
            options = cases.options(case, given, way.device)
            q, k, v = given["q"], given["k"], given["v"]
            out = tilemask.attention(q, k, v, **options, backend="cuda")
            with tilemask.use_backend(between):
                return torch.autograd.grad(out, (q, k, v, given["sinks"]), given["dout"])

    calls, own = [], cuda.backward
    cuda.backward = lambda *a, **o: calls.append(1) or own(*a, **o)
    try:
        for a, b in zip(gradients("reference"), gradients("cuda"), strict=True):
            assert torch.equal(a, b)
    finally:
        cuda.backward = own
    assert len(calls) == 2


# -- without Triton -------------------------------------------------------------------------------

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # import triton raises ImportError
import cases, torch, ways
import tilemask
from tilemask.backends import triton
triton.unavailable = lambda: "Triton is not installed"
with ways.EmulatedLibrary().running():
    for name in ("causal_33", "all_at_once", "pair_varlen_gqa", "decode_keys"):
        case = cases.named(name)
        cases.check(case, torch.float16, cases.run(case, torch.float16))
    given = cases.inputs(cases.named("causal_33"), torch.float16)
    assert tilemask.explain(given["q"], given["k"], given["v"]).backend == "cuda"
    prepared = tilemask.masks.prepare(tilemask.masks.dense(torch.rand(33, 33) < 0.5),
                                      given["q"], given["k"], backward=True)
    out = torch.compile(tilemask.attention, fullgraph=True, backend="aot_eager")(
        given["q"], given["k"], given["v"], mask=prepared)
    torch.autograd.grad(out, given["q"], given["dout"])
    assert sys.modules["triton"] is None and "tilemask.kernels.pack" not in sys.modules
print("fine")
"""


@emulated
def test_nothing_needs_triton():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON],
        cwd=ROOT / "tests",
        capture_output=True,
        text=True,
    )
    assert done.stdout == "fine\n", done.stderr


# -- who chooses it -------------------------------------------------------------------------------


def call_of(dtype=torch.float16, D=16, Dv=16, Lq=40, **options):
    q, k = (torch.zeros(1, 2, length, D, dtype=dtype) for length in (Lq, 40))
    return checked(q, k, torch.zeros(1, 2, 40, Dv, dtype=dtype), **options)


@pytest.fixture
def both(monkeypatch):
    """A function that pretends that both GPU backends can run on the CPU, as a GPU of some
    compute capability."""

    from tilemask.kernels import tuning

    def on(arch):
        for backend in (cuda, triton):
            monkeypatch.setattr(backend, "unfit", lambda device: None)
        monkeypatch.setattr(triton, "architecture", lambda device: arch)
        monkeypatch.setattr(cuda, "row_of", lambda device: tuning.row_of(arch))
        monkeypatch.setattr(cuda, "tile_of", lambda kernel, width, device: (64, 64))

    return on


@pytest.mark.parametrize(
    "arch, plain, options, reason",
    [
        (80, "cuda", ("triton", "cuda", "cuda"), "instructions per score"),
        (86, "cuda", ("triton", "triton", "cuda"), "instructions per score"),
        (89, "cuda", ("triton", "triton", "cuda"), "instructions per score"),
        (90, "triton", ("triton", "triton", "triton"), "wgmma"),
        (100, "triton", ("triton", "triton", "triton"), "tcgen05"),
        (103, "triton", ("triton", "triton", "triton"), "tcgen05"),
        (120, "cuda", ("triton", "triton", "cuda"), "instructions per score"),
    ],
)
def test_the_table_decides_between_the_two(both, arch, plain, options, reason):
    both(arch)
    other = {"cuda": "triton", "triton": "cuda"}

    def check(chosen, why, **given):
        call = call_of(**given)
        assert chosen == backends.choose(call).NAME
        told = tilemask.explain(call.q, call.k, call.v, softcap=call.softcap, sinks=call.sinks)
        assert chosen == told.backend
        assert told.reasons[other[chosen]].startswith(f"{chosen} comes first: ")
        assert why in told.reasons[other[chosen]]
        assert told.reasons["reference"] == f"{chosen} comes first"

    for width, chosen in zip((64, 128, 256), options, strict=True):
        check(plain, reason, D=16, Dv=width, sinks=torch.zeros(2))
        check(chosen, reason, D=width, softcap=1.0)
        check("cuda", "up to 16 rows", D=width, softcap=1.0, Lq=16)
    assert cuda.calls_of(call_of(dropout_p=0.1)) == "options"
    assert cuda.calls_of(call_of(bias=torch.zeros(40, 40))) == "options"
    assert cuda.calls_of(call_of(alibi_slopes=torch.ones(2))) == "options"


def test_the_table_has_a_row_for_every_gpu():
    from tilemask.kernels import tuning

    rows = {tuning.row_of(arch) for arch in range(80, 130)}
    calls = ("decode", "plain", "options")
    assert set(cuda.PREFERRED) == {(kind, row) for kind in calls for row in rows}
    for names in cuda.PREFERRED.values():
        assert len(names) == 3 and set(names) <= {"cuda", "triton"}


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_a_forced_backend_runs_whatever_the_table_says(both, name):
    both(90)
    call = call_of()
    assert name == backends.choose(call, name).NAME
    with tilemask.use_backend(name):
        assert name == backends.choose(call).NAME
        reasons = tilemask.explain(call.q, call.k, call.v).reasons
    other = {"cuda": "triton", "triton": "cuda"}[name]
    assert reasons[other] == f"{name} is forced"


def test_without_triton_it_runs_everything_it_can(both, monkeypatch):
    both(90)
    monkeypatch.setattr(triton, "unfit", lambda device: "Triton is not installed")
    assert backends.choose(call_of()).NAME == "cuda"
    assert backends.choose(call_of(torch.float32)).NAME == "reference"


def test_what_it_leaves_to_others(both):
    both(80)
    assert cuda.why_not(call_of()) is None
    assert cuda.why_not(call_of(torch.bfloat16, D=256, Dv=1, softcap=3.0)) is None
    told = "the CUDA kernels compute float16 and bfloat16, not torch.float32"
    assert cuda.why_not(call_of(torch.float32)) == told
    assert backends.choose(call_of(torch.float32)).NAME == "triton"
    assert cuda.why_not(call_of(Dv=257)) == "head widths go up to 256, got D = 16 and Dv = 257"
    huge = torch.zeros(1, 1, 1, 16, dtype=torch.float16).expand(1, 1, 1 << 30, 16)
    reason = cuda.why_not(backends.replaced(call_of(), k=huge, v=huge))
    assert reason == "lengths go up to 1073741823, got Lq = 40 and Lk = 1073741824"
    many = call_of().q[:, :1, :1].expand(1 << 16, 1 << 15, 1, 16)
    reason = cuda.why_not(backends.replaced(call_of(), q=many, k=many, v=many))
    assert reason == "B * Hq * (max(Lq, Lk) // 16 + 1) goes up to 2147483647, got 2147483648"
    reasons = []
    torch.vmap(lambda x: reasons.append(cuda.why_not(call_of())) or x)(torch.zeros(2))
    assert "torch.func transform" in reasons[0]


@pytest.mark.skipif(GPU, reason="pretends that there is no GPU")
def test_why_it_is_not_there(monkeypatch):
    assert cuda.why_not(call_of()) == "q is on cpu; the CUDA kernels need an NVIDIA GPU"
    monkeypatch.setattr(library, "unavailable", lambda: "no library")
    assert cuda.unavailable.__wrapped__() == "no library"
    assert cuda.unfit.__wrapped__(torch.device("cuda", 0)).startswith(cuda.unavailable())
    message = "backend 'cuda' cannot run this call: q is on cpu; the CUDA kernels need"
    with pytest.raises(RuntimeError, match=message):
        backends.choose(call_of(), "cuda")


@emulated
def test_an_error_of_the_library_is_raised(monkeypatch):
    """With its text and the call; nothing else answers for it."""
    with ways.EmulatedLibrary().running():
        monkeypatch.setattr(library, "ABI", library.ABI + 1)
        message = r"tilemask_forward\(q \(1, 2, 40, 16\) torch.float16, .*\) failed: the caller's"
        with pytest.raises(RuntimeError, match=message):
            backends.cuda.forward(call_of())


@pytest.fixture
def two_devices():
    import ptx_emulator

    emulator = ptx_emulator.library()
    emulator.emu_set_devices(2)
    yield emulator
    emulator.emu_set_devices(1)


@emulated
@pytest.mark.parametrize("device", [0, 1, 2])
def test_the_device_changes_only_where_it_is_another(device, two_devices, monkeypatch):
    """Then its context, and no other, is made current for the call."""
    emulator, head_values = two_devices, cuda.head_values

    def on_device(layout, tensor):
        size, abi, _, kind, stream = head_values(layout, tensor)
        return size, abi, device, kind, stream

    monkeypatch.setattr(cuda, "head_values", on_device)
    q = torch.randn(1, 2, 40, 16, dtype=torch.float16, requires_grad=True)
    mask = masks.dense(torch.rand(40, 40) < 0.5)
    with ways.EmulatedLibrary().running():
        if device == 2:
            with pytest.raises(RuntimeError, match="invalid device ordinal"):
                tilemask.attention(q, q, q, backend="cuda")
            assert emulator.emu_launches() == 0
        else:
            out = tilemask.attention(q, q, q, mask=mask, backend="cuda")
            torch.autograd.grad(out, q, torch.ones_like(out))
            devices = [emulator.emu_launch_device(i) for i in range(emulator.emu_launches())]
            assert len(devices) > 5 and set(devices) == {device}
    assert emulator.emu_contexts_made(0) == 0
    assert (emulator.emu_contexts_made(1) > 5) == (device == 1)
    assert emulator.emu_contexts_open() == 0


def struct_of(layout, **given) -> bytes:
    """A struct of the header without tensors; given: the sizes that are not 1, other fields by
    their names with "__" for the dot."""
    values = {"head.size": layout.size, "head.abi": library.ABI}
    values["head.dtype"] = cuda.DTYPES[torch.float16]
    values |= dict.fromkeys((f"sizes.{name}" for name in SIZES), 1)
    for name, value in given.items():
        values[f"sizes.{name}" if name in SIZES else name.replace("__", ".")] = value
    packed = []
    for name, kind in layout.fields.items():
        packed += [values.get(name, 0)] * int(kind[:-1] or 1)
    return layout.pack(*packed)


SIZES = ("batch", "heads", "kv_heads", "len_q", "len_k", "width", "width_v")


@emulated
@pytest.mark.parametrize("batch, refused", [(1 << 16, True), (0, False)])
def test_more_blocks_than_a_grid_has_are_refused(batch, refused):
    """By the library too, before it touches anything."""
    with ways.EmulatedLibrary().running():
        code = library.load().tilemask_forward(struct_of(cuda.FORWARD, batch=batch, heads=1 << 15))
        assert not refused or library.error_text(code).endswith("is out of range")
    assert bool(code) == refused


@emulated
def test_a_struct_of_another_abi_has_no_workspace(monkeypatch):
    with ways.EmulatedLibrary().running():
        workspace = library.load().tilemask_forward_workspace
        assert workspace(struct_of(cuda.FORWARD, len_k=4096)) > 0
        monkeypatch.setattr(library, "ABI", library.ABI + 1)
        assert workspace(struct_of(cuda.FORWARD, len_k=4096)) == 0


@emulated
@pytest.mark.parametrize("tensor", ["q", "dout"])
def test_rows_that_lie_far_apart_take_two_passes(tensor):
    """The pass over column blocks counts from row to row by int32."""
    given = {"width": 64, "width_v": 64, "sizes__scale": 1.0}
    with ways.EmulatedLibrary().running():
        workspace = library.load().tilemask_backward_workspace
        for row, one_pass in ((64, True), ((1 << 31) - 8, True), (1 << 31, False)):
            packed = struct_of(cuda.BACKWARD, **given, **{f"{tensor}__row": row})
            assert (workspace(packed) > 0) == one_pass, row


def test_the_ops_keep_the_name_of_the_backend():
    """Each op of a traced call runs on the backend that the call was traced for."""
    steps = {name: autograd.traced_steps(name) for name in ("cuda", "triton")}
    bits = torch.zeros(1, 1, 1, 4, 4, dtype=torch.bool)
    for name, step in steps.items():
        calls, own = [], backends.named(name).launched
        backends.named(name).launched = lambda calls=calls: prepared.Steps(
            lambda bits: calls.append("pack") or torch.zeros(1, 1, 1, 1, 4, 4, dtype=torch.int32),
            None,
            None,
            None,
        )
        try:
            step.pack(bits)
        finally:
            backends.named(name).launched = own
        assert calls == ["pack"]


@needs_library
def test_prepared_masks(way):
    """masks.prepare() makes all that the kernels read; the call makes nothing."""

    def check():
        case = cases.named("pair_varlen_gqa")
        given = cases.inputs(case, torch.float16, way.device)
        q, k, v = given["q"], given["k"], given["v"]
        with tilemask.use_backend("cuda"):
            mask = masks.prepare(case.mask(way.device), q, k, v, backward=True)
            kept = dict(mask.lowered.prepared.kept)
            out = tilemask.attention(q, k, v, mask=mask)
            wanted = tilemask.attention(q, k, v, mask=case.mask(way.device))
            torch.autograd.grad(out, q, given["dout"])
        assert mask.lowered.prepared.kept == kept and kept
        assert torch.equal(out, wanted)

    way.call(check)


@emulated
def test_doctor_checks_it(monkeypatch):
    """In float16, which it has."""
    from tilemask import doctor

    monkeypatch.setattr(doctor, "devices", lambda backend: ["cpu"])
    assert doctor.state(cuda) == (False, f"does not run: {cuda.unavailable()}")
    with ways.EmulatedLibrary().running():
        good, told = doctor.state(cuda)
        assert good and told.startswith("runs; checked on cpu (largest difference from torch ")
        with monkeypatch.context() as inside:
            inside.setattr(cuda, "unfit", lambda device: "no kernel for it")
            assert doctor.state(cuda) == (False, "does not run: no kernel for it")
    assert cuda.unfit(torch.device("cpu")) is not None
