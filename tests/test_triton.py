"""The Triton kernels, in the interpreter or on a GPU: the common cases, and which tiles they
visit."""

import itertools

import cases
import numpy as np
import pytest
import test_source_cases
import test_weights
import torch
import ways
from ways import WAYS

GPU = torch.cuda.is_available()


def parameters() -> list:
    """(case, dtype): every second case but the pairs of options, in one of the three dtypes; the
    rest is slow, but on a GPU. (What is compiled of every case runs in test_emulator_triton.py.)
    """
    made = []
    for index, case in enumerate(cases.CASES):
        names = [n for n in ("float32", "bfloat16", "float16") if getattr(torch, n) in case.dtypes]
        often = names
        if not GPU:
            seldom = index % 2 or case.name.startswith("pair_")
            often = [] if seldom else [names[index // 2 % len(names)]]
        for name in names:
            marks = () if name in often else pytest.mark.slow
            made.append(pytest.param(case, name, id=f"{case.name}-{name}", marks=marks))
    return made


@pytest.fixture(params=WAYS, ids=lambda way: way.name)
def way(request):
    return request.param


@pytest.mark.parametrize("case, dtype", parameters())
def test_case(way, case, dtype):
    results = way.call(ways.run_case, case.name, dtype, way.default_tile, way.device)
    results = {name: torch.from_numpy(value) for name, value in results.items()}
    cases.check(case, getattr(torch, dtype), results)


@pytest.mark.parametrize("reduce", test_weights.REDUCE)
@pytest.mark.parametrize("name, dtype", test_weights.parameters()[::5])
def test_weights_of_a_case(way, name, dtype, reduce):
    dtype = torch.float32 if dtype == torch.float64 else dtype
    if dtype in cases.named(name).dtypes:
        kind = str(dtype).removeprefix("torch.")
        got = way.call(ways.run_weights, name, kind, reduce, way.default_tile, way.device)
        test_weights.check(name, dtype, reduce, torch.from_numpy(got).to(dtype))


@pytest.mark.parametrize("name", test_source_cases.SOURCES)
def test_source(way, name):
    way.call(ways.run_source, name, "float32", way.device)


# -- decoding -------------------------------------------------------------------------------------

FOLDED = {
    "decode_everything": True,
    "decode_heads": True,
    "decode_window": True,
    "decode_empty": True,
    "decode_softcap": True,
    "decode_upper_left": False,  # several rows
    "decode_causal_16": False,
    "decode_sinks": False,  # a number per head
    "decode_alibi": False,
    "decode_keys": False,  # lists are made for rows
    "decode_documents": False,
}


@pytest.mark.parametrize("name", FOLDED)
def test_few_rows_are_split(way, name):
    splits, folded = way.call(ways.shares, name, way.device)
    assert splits > 1 and folded == FOLDED[name]


def test_more_rows_are_not_split(way):
    assert way.call(ways.shares, "decode_causal_17", way.device) == (1, False)


def test_number_of_shares():
    """Two programs per multiprocessor, four tiles per share, and an end to it."""
    from tilemask.kernels import split

    assert split.count(programs=32, tiles=1000, multiprocessors=132) == 9
    assert split.count(programs=32, tiles=20, multiprocessors=132) == 5
    assert split.count(programs=1, tiles=10**6, multiprocessors=132) == split.MOST
    assert split.count(programs=264, tiles=1000, multiprocessors=132) == 1
    assert split.count(programs=32, tiles=0, multiprocessors=132) == 1
    assert split.count(programs=0, tiles=9, multiprocessors=132) == 1


# -- visited tiles --------------------------------------------------------------------------------


def expected_classes(seen: torch.Tensor, block_m: int, block_n: int) -> np.ndarray:
    """[B * H, rows, columns, 2]: 1 where a tile is partial, 1 where it is full, tile by tile."""
    batch, heads, len_q, len_k = seen.shape
    rows, columns = -(-len_q // block_m), -(-len_k // block_n)
    classes = np.zeros((batch * heads, rows, columns, 2), dtype=np.int32)
    for index, matrix in enumerate(seen.flatten(0, 1)):
        for r in range(rows):
            strip = matrix[r * block_m : (r + 1) * block_m]
            strip = strip[strip.any(1)]  # rows that see nothing count for nothing
            for c in range(columns):
                tile = strip[:, c * block_n : (c + 1) * block_n]
                if tile.any():
                    classes[index, r, c, int(tile.shape[1] == block_n and bool(tile.all()))] = 1
    return classes


MASKED = [case for case in cases.CASES if case.bias is None and "pair_" not in case.name]


def masked(first: int) -> list:
    """MASKED; all but every third from ``first`` are slow, but on a GPU."""
    marks = [() if GPU or i % 3 == first else pytest.mark.slow for i in range(len(MASKED))]
    return [pytest.param(c, marks=m, id=c.name) for c, m in zip(MASKED, marks, strict=True)]


@pytest.mark.parametrize("case", masked(1))
def test_visited_tiles(way, case):
    """Forward, dQ and dK/dV visit exactly the tiles the mask leaves, once, in their class."""
    visited = way.call(ways.visits, case.name, "bfloat16", (16, 32, 4, 1), way.device)
    for kernel, (shape, counts) in visited.items():
        np.testing.assert_array_equal(counts, expected_classes(case.seen(), *shape), err_msg=kernel)


LISTED = [
    case
    for case in cases.CASES
    if any(word in case.name for word in ("permuted", "blocks_", "tree", "kills_rows"))
]


def test_masks_whose_lists_are_not_ranges_are_among_the_cases():
    assert len(LISTED) > 5


def listed() -> list:
    """(case, tile, transposed): per commit each case with one tile, but on a GPU."""
    made = []
    tiles = [(16, 16), (64, 64), (128, 32)]
    for (index, case), (at, tile), across in itertools.product(
        enumerate(LISTED), enumerate(tiles), (False, True)
    ):
        marks = () if GPU or (index + across) % 3 == at else pytest.mark.slow
        label = f"{case.name}-{tile[0]}x{tile[1]}{'-transposed' * across}"
        made.append(pytest.param(case, tile, across, marks=marks, id=label))
    return made


@pytest.mark.parametrize("case, tile, transposed", listed())
def test_lists_name_the_tiles(way, case, tile, transposed):
    check_lists(way, case, tile, transposed)


def check_lists(way, case, tile, transposed):
    counts, blocks = way.call(ways.lists, case.name, tile, transposed, way.device, way.backend)
    classes = expected_classes(case.seen(), *tile)
    classes = classes.reshape(case.B, case.Hq, *classes.shape[1:])
    counts, blocks = (np.broadcast_to(t, (case.B, case.Hq, *t.shape[2:])) for t in (counts, blocks))
    for b, h, block in np.ndindex(*counts.shape[:3]):
        across = classes[b, h, :, block] if transposed else classes[b, h, block]
        for kind in (0, 1):
            count = counts[b, h, block, kind]
            if transposed < 2:
                listed = blocks[b, h, block, kind, :count]
            else:
                first = counts[b, h, block, 0] * kind
                pairs = blocks[b, h, block].reshape(-1, 2)[first : first + count]
                listed = pairs[:, 0]
                for row, before in pairs:
                    visitors = np.nonzero(classes[b, h, row].any(-1))[0]
                    assert before == next((other for other in visitors if other > block), -1)
            np.testing.assert_array_equal(listed, np.nonzero(across[:, kind])[0])


# -- every shipped tile shape ---------------------------------------------------------------------


def shipped() -> list:
    from tilemask.kernels import tuning

    rows = [row for table in tuning.TABLE.values() for row in table.values()]
    return sorted({config[:2] for row in rows for config in row})


@pytest.mark.parametrize("tile", shipped(), ids=lambda tile: f"{tile[0]}x{tile[1]}")
@pytest.mark.parametrize("name", ["large_window", "large_varlen"])
def test_every_tile_shape_of_the_table(way, name, tile):
    """Tile shapes change index arithmetic: each runs on lengths past two of its tiles."""
    results = way.call(ways.run_case, name, "bfloat16", (*tile, 4, 1), way.device)
    results = {key: torch.from_numpy(value) for key, value in results.items()}
    cases.check(cases.named(name), torch.bfloat16, results)


# -- the rest -------------------------------------------------------------------------------------


def test_offsets_are_64_bits_wide(way):
    assert way.call(ways.far_apart, way.device) == 0


@pytest.mark.parametrize("name", ["large_window", "large_varlen"])
def test_compiled_equals_eager(way, name):
    """torch.compile(fullgraph=True) runs the same kernels through the ops, lists included."""
    eager, compiled, ops = way.call(ways.traced, name, "float32", way.default_tile, way.device)
    for key, value in eager.items():
        np.testing.assert_array_equal(compiled[key], value, err_msg=key)
    assert any("tilemask.forward" in op for op in ops)
    assert any("tilemask.lower" in op for op in ops) == (name == "large_varlen")


def test_compiled_layers_share_one_lowering(way):
    ops = way.call(ways.compiled_layers, way.device)
    assert sum("tilemask.forward" in op for op in ops) == 2
    # one tile shape is forced: one list for the forward and dQ, and its transpose for dK and dV
    assert sum("tilemask.lower" in op for op in ops) in (1, 2)


def test_ops_pass_opcheck(way):
    way.call(ways.opcheck_all, way.device, way.default_tile)
