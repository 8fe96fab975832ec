"""Operations and bytes of a workload, and the least time they take on a GPU: a roofline.

Operations are counted on the mask's own area, 2 per multiply-add: q·k and p·v forward; the same q·k
again, dout·v, pᵀ·dout, ds·k and dsᵀ·q backward. Bytes are what no kernel can avoid: every tensor
read or written once, rows and keys that nobody sees left out, and one bit per pair of the tiles
that the mask cuts where it is no interval. The exponentials are not counted.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

from .area import Area, count
from .workloads import BYTES, FORWARD, Workload, names, workload_of


class Cost(NamedTuple):
    flops: float  # on the mask's own area
    tile_flops: float  # on all pairs of the visited tiles
    bytes: float

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """The larger of the times for operations and for bytes."""
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)


def cost_of(work: Workload, direction: str, area: Area) -> Cost:
    per_pair = 2 * (work.D + work.Dv)
    size = BYTES[work.dtype]
    rows, keys = area.rows, area.keys * work.Hkv
    moved = size * (rows + keys) * (work.D + work.Dv) + area.bits / 8  # q, out, k, v
    bias = work.bias_size() * size
    moved += bias
    if direction != FORWARD:
        per_pair += 2 * (3 * work.D + 2 * work.Dv)
        # q, k, v, out, dout, lse in; dq, dk, dv out; mask and bias again
        moved += size * (rows * (2 * work.D + 2 * work.Dv) + 2 * keys * (work.D + work.Dv))
        moved += 4 * rows + area.bits / 8 + bias * (2 if work.bias_gradient else 1)
    tile = min(area.tile[0], work.Lq) * min(area.tile[1], work.Lk)
    return Cost(per_pair * area.pairs, per_pair * tile * (area.partial + area.full), moved)


class Ceiling(NamedTuple):
    """Published peaks of a GPU, without sparsity: dense matrix products, and memory."""

    half: float  # FLOP/s of float16 and bfloat16
    single: float  # FLOP/s of float32 outside the tensor cores
    memory: float  # bytes/s
    source: str


GPUS = {
    "A100": Ceiling(
        312e12,
        19.5e12,
        2.039e12,
        "A100 80GB SXM: https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/"
        "nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf",
    ),
    "H100": Ceiling(
        989e12, 67e12, 3.35e12, "H100 SXM: https://www.nvidia.com/en-us/data-center/h100/"
    ),
    "H200": Ceiling(
        989e12, 67e12, 4.8e12, "H200 SXM: https://www.nvidia.com/en-us/data-center/h200/"
    ),
    "L40S": Ceiling(
        362e12, 91.6e12, 0.864e12, "L40S: https://www.nvidia.com/en-us/data-center/l40s/"
    ),
    "B200": Ceiling(
        2250e12,
        75e12,
        8e12,
        "one of the eight of an HGX B200: https://www.nvidia.com/en-us/data-center/hgx/",
    ),
}


def peak(gpu: str, dtype: str) -> float:
    """FLOP/s: float32 is true float32, as torch computes it unless told otherwise."""
    return GPUS[gpu].single if dtype == "float32" else GPUS[gpu].half


def main(options) -> int:
    """python -m tilemask cost: print what the workloads must do, and on which GPU it takes how
    long at least."""
    if options.list:
        print("\n".join(names()))
        return 0
    try:
        works = [workload_of(name) for name in options.workloads]
        if options.mask is not None:
            works.append(custom(options))
        if not works:
            works = [workload_of("causal & padding 8k D128")]
        for number, work in enumerate(works):
            print(("\n" if number else "") + text(work, options.tile, options.gpus))
    except ValueError as error:
        print(f"cost: {error}", file=sys.stderr)
        return 2
    print("\nceilings, published, no sparsity:")
    for gpu in options.gpus:
        print(
            f"  {gpu:5} {GPUS[gpu].half / 1e12:5.0f} TFLOP/s half, {GPUS[gpu].single / 1e12:5.1f} "
            f"float32, {GPUS[gpu].memory / 1e12:6.3f} TB/s   {GPUS[gpu].source}"
        )
    return 0


def custom(options) -> Workload:
    """The workload of --mask, --shape and --dtype."""
    B, Hq, Hkv, Lq, Lk, D = options.shape
    return Workload(
        options.mask, "expression", B, Hq, Hkv, Lq, Lk, D, D, options.dtype, text=options.mask
    )


def text(work: Workload, tile: tuple[int, int], gpus: list[str]) -> str:
    pattern = work.pattern("cpu")
    area = count(pattern.mask, work.B, work.Hq, work.Lq, work.Lk, tile)
    tiles = area.empty + area.partial + area.full
    lines = [
        f"{work.name}: {work.shape()}",
        f"  pairs  {area.pairs:,} of {area.total:,} visible "
        f"({100 * area.pairs / max(1, area.total):.2f} %)",
        f"  tiles  {tile[0]} x {tile[1]}, {tiles:,}: {area.empty:,} empty, {area.partial:,} "
        f"partial, {area.full:,} full; {100 * area.visited:.2f} % visited",
    ]
    if area.pairs == 0:
        return "\n".join([*lines, "  nothing is visible: nothing to compute"])
    costs = {d: cost_of(work, d, area) for d in work.directions}
    for direction, cost in costs.items():
        lines.append(
            f"  {direction:18} {cost.flops / 1e9:12,.1f} GFLOP on the pairs, "
            f"{cost.tile_flops / 1e9:,.1f} on the visited tiles; {cost.bytes / 1e6:,.1f} MB"
        )
    lines.append(f"  {'least time, ms':18} {''.join(f'{gpu:>17}' for gpu in gpus)}")
    for direction, cost in costs.items():
        cells = []
        for gpu in gpus:
            rate, memory = peak(gpu, work.dtype), GPUS[gpu].memory
            limit = "memory" if cost.bytes / memory > cost.flops / rate else "compute"
            cells.append(f"{1e3 * cost.seconds(rate, memory):9.3f} {limit:>7}")
        lines.append(f"  {direction:18} {''.join(cells)}")
    return "\n".join(lines)
