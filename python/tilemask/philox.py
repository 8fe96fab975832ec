"""Random bits for dropout that every implementation can reproduce.

Philox4x32-7 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011;
7 rounds are the fewest that pass BigCrush). Key: the 64-bit seed. Counter: (row, column group,
b * Hq + h, 0). One call gives four 32-bit words and serves eight columns, 16 bits each:

    column c = 32*g + 8*i + 2*l + t  (i < 4, l < 4, t < 2)  belongs to group 4*g + l
    and uses half t (0 = low) of word i,

the eight columns of 32 that one lane of a tensor-core accumulator holds. An element is kept if its
16 bits are at least round(65536 * p); kept ones are multiplied by 65536 / (65536 - round(65536 *
p)).
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 7
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
MASK32 = 0xFFFFFFFF


def philox(counter: list[Tensor], key: list[Tensor]) -> list[Tensor]:
    """Philox4x32-7: four int64 tensors of 32-bit values from a counter of four and a key of two."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # an int64 product wraps modulo 2**64: its two halves are still the right bits
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & MASK32) ^ c1 ^ k0,
            product1 & MASK32,
            ((product0 >> 32) & MASK32) ^ c3 ^ k1,
            product0 & MASK32,
        )
        k0, k1 = (k0 + WEYL[0]) & MASK32, (k1 + WEYL[1]) & MASK32
    return [c0, c1, c2, c3]


def keep_mask(
    p: float, seed: Tensor, batch: int, heads: int, first: int, rows: int, len_k: int
) -> tuple[Tensor, float]:
    """Which pairs dropout keeps, bool [B, Hq, rows, Lk] for rows from ``first``, and their factor.

    seed: int64 [1].
    """
    threshold = round(p * 65536)
    factor = 65536 / (65536 - threshold) if threshold < 65536 else 0.0
    device = seed.device
    blocks = -(-len_k // 32)
    heads_index = torch.arange(batch * heads, device=device).view(batch, heads, 1, 1)
    row = torch.arange(first, first + rows, device=device).view(1, 1, rows, 1)
    group = torch.arange(4 * blocks, device=device).view(1, 1, 1, -1)
    zero = torch.zeros((), dtype=torch.int64, device=device)
    row, group, heads_index = torch.broadcast_tensors(row, group, heads_index)
    words = philox([row, group, heads_index, zero], [seed & MASK32, (seed >> 32) & MASK32])
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    bits = torch.stack(halves, -1).view(batch, heads, rows, blocks, 4, 4, 2)  # g, l, i, t
    bits = bits.transpose(4, 5).reshape(batch, heads, rows, 32 * blocks)  # g, i, l, t
    return bits[..., :len_k] >= threshold, factor
