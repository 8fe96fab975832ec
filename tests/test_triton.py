"""The Triton kernels, in the interpreter or on a GPU: the common cases, and which tiles they
visit."""

import cases
import numpy as np
import pytest
import torch
import ways
from ways import WAYS

KERNEL_CASES = cases.KERNEL_CASES
# float16 and bfloat16 differ in casts alone: every third case runs both
PARAMETERS = [
    pytest.param(case, dtype, id=f"{case.name}-{dtype}")
    for index, case in enumerate(KERNEL_CASES)
    for dtype in ("float32", "bfloat16", *(["float16"] if index % 3 == 0 else []))
]


@pytest.fixture(params=WAYS, ids=lambda way: way.name)
def way(request):
    return request.param


@pytest.mark.parametrize("case, dtype", PARAMETERS)
def test_case(way, case, dtype):
    results = way.call(ways.run_case, case.name, dtype, way.default_tile, way.device)
    results = {name: torch.from_numpy(value) for name, value in results.items()}
    cases.check(case, getattr(torch, dtype), results)


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


@pytest.mark.parametrize("case", KERNEL_CASES, ids=lambda case: case.name)
def test_visited_tiles(way, case):
    """Forward, dQ and dK/dV visit exactly the tiles the mask leaves, once, in their class."""
    visited = way.call(ways.visits, case.name, "bfloat16", (16, 32, 4, 1), way.device)
    for kernel, (shape, counts) in visited.items():
        np.testing.assert_array_equal(counts, expected_classes(case.seen(), *shape), err_msg=kernel)


PERMUTED = [case for case in KERNEL_CASES if "permuted" in case.name]


def test_a_permuted_document_mask_is_among_the_cases():
    assert PERMUTED


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("tile", [(16, 16), (64, 64), (128, 32)])
@pytest.mark.parametrize("case", PERMUTED, ids=lambda case: case.name)
def test_lists_name_the_tiles(way, case, tile, transposed):
    counts, blocks = way.call(ways.lists, case.name, tile, transposed, way.device)
    classes = expected_classes(case.seen(), *tile)
    classes = classes.reshape(case.B, case.Hq, *classes.shape[1:])
    for b, h, block in np.ndindex(*counts.shape[:3]):
        across = classes[b, h, :, block] if transposed else classes[b, h, block]
        for kind in (0, 1):
            listed = blocks[b, h, block, kind, : counts[b, h, block, kind]]
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
