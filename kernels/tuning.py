"""Tile shapes, one table: which block sizes, warps and stages a kernel runs with.

Keyed by kernel, arithmetic, architecture and head width. No autotuning on the call path.

No GPU has measured these rows yet. Each was chosen by compiling candidates ahead of time (Triton
3.7.1, tests/aot.py), largest tile first, and taking the first that keeps everything in registers
for every form of mask (on sm_86 and sm_120: nearly so) and fits the shared memory of a block;
tests/test_compiled.py holds them to it. float32 without tensor cores keeps whole operands in
registers, hence its small tiles.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple


class TileConfig(NamedTuple):
    block_m: int  # query rows
    block_n: int  # key columns
    num_warps: int
    num_stages: int


# arithmetic: "half" (float16, bfloat16), "tf32" and "ieee" (float32, with and without tensor
# cores). architecture: see row_of().
# The numbers of a row are for widths up to 64, 128 and 256 (the larger of D and Dv).
TABLE: dict[tuple[str, str], dict[int, tuple[TileConfig, TileConfig, TileConfig]]] = {
    ("forward", "half"): {
        80: (TileConfig(128, 64, 8, 3), TileConfig(128, 64, 8, 3), TileConfig(64, 64, 8, 2)),
        86: (TileConfig(128, 64, 8, 3), TileConfig(128, 64, 8, 3), TileConfig(64, 32, 8, 2)),
        90: (TileConfig(128, 128, 8, 3), TileConfig(128, 64, 8, 3), TileConfig(128, 32, 8, 2)),
        100: (TileConfig(128, 128, 8, 3), TileConfig(128, 64, 8, 3), TileConfig(64, 64, 8, 2)),
    },
    ("dq", "half"): {
        80: (TileConfig(128, 64, 8, 3), TileConfig(128, 32, 8, 2), TileConfig(64, 64, 8, 1)),
        86: (TileConfig(128, 64, 8, 3), TileConfig(128, 32, 8, 2), TileConfig(64, 32, 8, 1)),
        90: (TileConfig(128, 128, 8, 2), TileConfig(128, 64, 8, 2), TileConfig(64, 32, 8, 2)),
        100: (TileConfig(128, 128, 8, 2), TileConfig(128, 64, 8, 2), TileConfig(64, 64, 8, 2)),
    },
    ("dkv", "half"): {
        80: (TileConfig(32, 128, 8, 2), TileConfig(16, 128, 8, 2), TileConfig(32, 32, 8, 2)),
        86: (TileConfig(32, 128, 8, 2), TileConfig(16, 128, 8, 2), TileConfig(32, 32, 8, 1)),
        90: (TileConfig(64, 128, 8, 2), TileConfig(32, 128, 8, 2), TileConfig(32, 32, 8, 1)),
        100: (TileConfig(64, 128, 8, 1), TileConfig(64, 64, 8, 1), TileConfig(32, 32, 8, 2)),
    },
    ("forward", "tf32"): {
        80: (TileConfig(128, 64, 8, 2), TileConfig(128, 32, 8, 2), TileConfig(64, 32, 8, 2)),
        86: (TileConfig(128, 64, 8, 2), TileConfig(128, 32, 8, 2), TileConfig(32, 32, 8, 1)),
        90: (TileConfig(128, 64, 8, 2), TileConfig(128, 32, 8, 2), TileConfig(32, 32, 8, 1)),
        100: (TileConfig(128, 64, 8, 2), TileConfig(128, 32, 8, 2), TileConfig(32, 32, 8, 2)),
    },
    ("dq", "tf32"): {
        80: (TileConfig(64, 32, 8, 2), TileConfig(64, 32, 8, 2), TileConfig(32, 32, 8, 2)),
        86: (TileConfig(64, 32, 8, 2), TileConfig(64, 32, 8, 1), TileConfig(16, 32, 8, 1)),
        90: (TileConfig(64, 64, 8, 2), TileConfig(64, 32, 8, 2), TileConfig(32, 32, 8, 2)),
        100: (TileConfig(64, 64, 8, 2), TileConfig(64, 32, 8, 2), TileConfig(32, 32, 8, 2)),
    },
    ("dkv", "tf32"): {
        80: (TileConfig(64, 32, 8, 2), TileConfig(32, 64, 8, 2), TileConfig(16, 32, 8, 1)),
        86: (TileConfig(32, 64, 8, 2), TileConfig(32, 32, 8, 2), TileConfig(16, 16, 8, 1)),
        90: (TileConfig(64, 64, 8, 2), TileConfig(32, 32, 8, 1), TileConfig(32, 32, 8, 1)),
        100: (TileConfig(32, 64, 8, 2), TileConfig(32, 32, 8, 1), TileConfig(32, 32, 8, 1)),
    },
    ("forward", "ieee"): {
        80: (TileConfig(64, 32, 8, 2), TileConfig(32, 32, 8, 1), TileConfig(16, 32, 8, 2)),
        86: (TileConfig(64, 32, 8, 2), TileConfig(32, 32, 8, 1), TileConfig(16, 32, 8, 2)),
        90: (TileConfig(64, 32, 8, 2), TileConfig(32, 32, 8, 1), TileConfig(16, 32, 8, 2)),
        100: (TileConfig(64, 32, 8, 2), TileConfig(32, 32, 8, 1), TileConfig(16, 32, 8, 2)),
    },
    ("dq", "ieee"): {
        80: (TileConfig(64, 32, 8, 2), TileConfig(16, 16, 8, 2), TileConfig(16, 32, 8, 2)),
        86: (TileConfig(64, 32, 8, 2), TileConfig(16, 32, 8, 2), TileConfig(16, 32, 8, 2)),
        90: (TileConfig(64, 32, 8, 2), TileConfig(16, 32, 8, 2), TileConfig(16, 32, 8, 2)),
        100: (TileConfig(64, 32, 8, 2), TileConfig(16, 32, 8, 2), TileConfig(16, 32, 8, 2)),
    },
    ("dkv", "ieee"): {
        80: (TileConfig(32, 32, 8, 1), TileConfig(16, 32, 8, 2), TileConfig(16, 32, 8, 2)),
        86: (TileConfig(32, 32, 8, 2), TileConfig(32, 32, 8, 1), TileConfig(16, 32, 8, 2)),
        90: (TileConfig(32, 32, 8, 2), TileConfig(32, 32, 8, 1), TileConfig(16, 32, 8, 2)),
        100: (TileConfig(32, 32, 8, 2), TileConfig(32, 32, 8, 1), TileConfig(16, 32, 8, 2)),
    },
}

_forced: TileConfig | None = None


def row_of(architecture: int) -> int:
    """The row of a GPU with this compute capability (times ten).

    sm_86, sm_89 and sm_120 have 99 KiB of shared memory per block and mma.sync, and share a row.
    """
    if architecture in (86, 87, 89) or architecture >= 120:
        return 86
    return 100 if architecture >= 100 else 90 if architecture >= 90 else 80


def pick(kernel: str, arithmetic: str, architecture: int, width: int) -> TileConfig:
    """The configuration of ``kernel`` ("forward", "dq", "dkv") for a GPU and the larger head
    width."""
    if _forced is not None:
        return _forced
    row = TABLE[kernel, arithmetic][row_of(architecture)]
    return row[0 if width <= 64 else 1 if width <= 128 else 2]


@contextlib.contextmanager
def forced(config: TileConfig | None):
    """Run every kernel with ``config`` inside the block, for tests and tuning; None = the table."""
    global _forced
    before, _forced = _forced, config
    try:
        yield
    finally:
        _forced = before


def padded(width: int) -> int:
    """The power of two a head width is computed in; a tensor core needs at least 16."""
    return max(16, 1 << (width - 1).bit_length())
