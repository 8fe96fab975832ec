"""Tile shapes, one table: which block sizes, warps and stages a kernel runs with.

Keyed by kernel, kind of arithmetic, GPU architecture and head width. No autotuning on the call path.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple


class TileConfig(NamedTuple):
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def padded(width: int) -> int:
    """The power of two a head width is computed in; a tensor core needs at least 16."""
    return max(16, 1 << (width - 1).bit_length())


# placeholder
def pick(kernel, arithmetic, architecture, width):
    return forced_config or TileConfig(32,32,4,2)
forced_config=None
