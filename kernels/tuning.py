"""Tile shapes, one table: which block sizes, warps and stages a kernel runs with.

Keyed by kernel, arithmetic, architecture and head width. No autotuning on the call path.

No GPU has measured these rows yet. Each was chosen by compiling candidates ahead of time (Triton
3.7.1, tests/aot.py), largest tile first, and taking the first that keeps everything in registers
for every form of mask without bits (on sm_86 and sm_120: nearly so) and fits the shared memory of a
block; with bits and options, in half precision on sm_80 and sm_90, the rule at ``HEAVY`` does.
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
    ("decode", "half"): {
        80: (TileConfig(16, 128, 4, 3), TileConfig(16, 64, 4, 3), TileConfig(16, 32, 4, 3)),
        86: (TileConfig(16, 64, 4, 3), TileConfig(16, 64, 4, 2), TileConfig(16, 32, 4, 2)),
        90: (TileConfig(16, 128, 4, 3), TileConfig(16, 64, 4, 3), TileConfig(16, 32, 4, 3)),
        100: (TileConfig(16, 128, 4, 3), TileConfig(16, 64, 4, 3), TileConfig(16, 32, 4, 3)),
    },
    ("decode", "tf32"): {
        80: (TileConfig(16, 64, 4, 2), TileConfig(16, 32, 4, 2), TileConfig(16, 32, 4, 1)),
        86: (TileConfig(16, 64, 4, 2), TileConfig(16, 32, 4, 2), TileConfig(16, 32, 4, 1)),
        90: (TileConfig(16, 64, 4, 2), TileConfig(16, 32, 4, 2), TileConfig(16, 32, 4, 1)),
        100: (TileConfig(16, 64, 4, 2), TileConfig(16, 32, 4, 2), TileConfig(16, 32, 4, 1)),
    },
    ("decode", "ieee"): {
        80: (TileConfig(16, 32, 4, 2), TileConfig(16, 32, 8, 1), TileConfig(16, 32, 8, 1)),
        86: (TileConfig(16, 32, 4, 2), TileConfig(16, 32, 8, 1), TileConfig(16, 32, 8, 1)),
        90: (TileConfig(16, 32, 4, 2), TileConfig(16, 32, 8, 1), TileConfig(16, 32, 8, 1)),
        100: (TileConfig(16, 32, 4, 2), TileConfig(16, 32, 8, 1), TileConfig(16, 32, 8, 1)),
    },
    ("sums", "half"): {
        80: (TileConfig(64, 64, 8, 1), TileConfig(64, 64, 8, 1), TileConfig(32, 64, 8, 1)),
        86: (TileConfig(64, 64, 8, 1), TileConfig(64, 64, 8, 1), TileConfig(32, 32, 8, 1)),
        90: (TileConfig(64, 64, 8, 1), TileConfig(64, 64, 8, 1), TileConfig(32, 64, 8, 1)),
        100: (TileConfig(64, 64, 8, 1), TileConfig(64, 64, 8, 1), TileConfig(32, 64, 8, 1)),
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
        # one stage: with more, Triton 3.7 leaves out a fence.proxy.async between the copy of v and
        # the wgmma that reads it (tests/test_emulator_triton.py)
        90: (TileConfig(64, 64, 8, 1), TileConfig(64, 16, 8, 1), TileConfig(32, 32, 8, 1)),
        100: (TileConfig(64, 64, 8, 2), TileConfig(64, 32, 8, 2), TileConfig(32, 32, 8, 2)),
    },
    ("dkv", "tf32"): {
        80: (TileConfig(64, 32, 8, 2), TileConfig(32, 64, 8, 2), TileConfig(16, 32, 8, 1)),
        86: (TileConfig(32, 64, 8, 2), TileConfig(32, 32, 8, 2), TileConfig(16, 16, 8, 1)),
        90: (TileConfig(64, 64, 8, 2), TileConfig(32, 32, 8, 1), TileConfig(32, 32, 8, 1)),
        100: (TileConfig(32, 64, 8, 2), TileConfig(32, 32, 8, 1), TileConfig(32, 32, 8, 1)),
    },
    ("sums", "tf32"): {
        80: (TileConfig(64, 32, 8, 1), TileConfig(32, 16, 8, 1), TileConfig(16, 32, 8, 1)),
        86: (TileConfig(64, 32, 8, 1), TileConfig(32, 16, 8, 1), TileConfig(16, 32, 8, 1)),
        90: (TileConfig(64, 32, 8, 1), TileConfig(32, 16, 8, 1), TileConfig(16, 32, 8, 1)),
        100: (TileConfig(64, 32, 8, 1), TileConfig(32, 16, 8, 1), TileConfig(16, 32, 8, 1)),
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
    ("sums", "ieee"): {
        80: (TileConfig(32, 32, 8, 1), TileConfig(32, 32, 8, 1), TileConfig(16, 16, 8, 1)),
        86: (TileConfig(32, 32, 8, 1), TileConfig(32, 32, 8, 1), TileConfig(16, 16, 8, 1)),
        90: (TileConfig(32, 32, 8, 1), TileConfig(32, 32, 8, 1), TileConfig(16, 16, 8, 1)),
        100: (TileConfig(32, 32, 8, 1), TileConfig(32, 32, 8, 1), TileConfig(16, 16, 8, 1)),
    },
}

# Calls with packed bits, or with options that need registers of their own, run with half the tile
# that the loop walks; where that does not keep everything in registers, with these.
HEAVY: dict[tuple[str, str, int], dict[int, TileConfig]] = {
    ("forward", "half", 80): {1: TileConfig(64, 32, 8, 2), 2: TileConfig(32, 32, 4, 2)},
    ("dq", "half", 80): {1: TileConfig(64, 32, 8, 2), 2: TileConfig(32, 16, 8, 1)},
    ("dkv", "half", 80): {1: TileConfig(16, 64, 8, 2)},
    ("sums", "half", 80): {2: TileConfig(64, 16, 8, 1)},
    ("sums", "half", 90): {2: TileConfig(64, 16, 8, 1)},
}
LEAST = 16  # rows or columns of a tile: what a tensor core instruction takes

_forced: TileConfig | None = None


def row_of(architecture: int) -> int:
    """The row of a GPU with this compute capability (times ten).

    sm_86, sm_89 and sm_120 have 99 KiB of shared memory per block and mma.sync, and share a row.
    """
    if architecture in (86, 87, 89) or architecture >= 120:
        return 86
    return 100 if architecture >= 100 else 90 if architecture >= 90 else 80


def pick(
    kernel: str, arithmetic: str, architecture: int, width: int, heavy: bool = False
) -> TileConfig:
    """The configuration of ``kernel`` ("forward", "decode", "dq", "dkv", "sums") for a GPU and the
    larger head width. heavy: the call has packed bits, or options that need registers of their own.
    """
    if _forced is not None:
        return _forced
    row, place = row_of(architecture), 0 if width <= 64 else 1 if width <= 128 else 2
    config = TABLE[kernel, arithmetic][row][place]
    if not heavy:
        return config
    return HEAVY.get((kernel, arithmetic, row), {}).get(place) or lighter(config, kernel)


def lighter(config: TileConfig, kernel: str) -> TileConfig:
    """Half the tile that the loop walks: what else a call needs then stays in registers."""
    block_m, block_n, *rest = config
    if kernel == "dkv":
        return TileConfig(max(LEAST, block_m // 2), block_n, *rest)
    return TileConfig(block_m, max(LEAST, block_n // 2), *rest)


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
