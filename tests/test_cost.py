"""python -m tilemask cost: counts against brute force, operations and bytes against their sums."""

import random

import oracle
import pytest
import torch

from tilemask import __main__ as command_line
from tilemask import masks
from tilemask.bench import area, cost, workloads
from tilemask.bench.workloads import FORWARD, TRAINING, Workload

CASES = 60


def brute_force(seen, tile):
    """The counts of a bool [B, H, Lq, Lk], tile by tile and pair by pair."""
    B, H, Lq, Lk = seen.shape
    block_m, block_n = tile
    counts = {"empty": 0, "partial": 0, "full": 0}
    for b in range(B):
        for h in range(H):
            for top in range(0, Lq, block_m):
                rows = [seen[b, h, i].tolist() for i in range(top, min(top + block_m, Lq))]
                for left in range(0, Lk, block_n):
                    right = left + block_n
                    parts = [row[left:right] for row in rows]
                    alive = [part for part, row in zip(parts, rows, strict=True) if any(row)]
                    if not any(any(part) for part in parts):
                        counts["empty"] += 1
                    elif right <= Lk and all(all(part) for part in alive):
                        counts["full"] += 1
                    else:
                        counts["partial"] += 1
    return counts | {
        "pairs": sum(map(sum, seen.flatten(0, 2).tolist())),
        "rows": sum(any(row) for row in seen.flatten(0, 2).tolist()),
        "keys": sum(any(col) for batch in seen for col in batch.flatten(0, 1).mT.tolist()),
        "total": B * H * Lq * Lk,
    }


def random_mask(rng, B, H, Lq, Lk):
    """A mask of one or two random parts, and bool [B, H, Lq, Lk] by the oracle."""

    def part():
        kind = rng.choice(
            ["causal", "window", "padding", "keep", "documents", "prefix", "intervals", "bits"]
        )
        if kind == "causal":
            offset = rng.randint(-4, 8)
            return masks.causal(offset), oracle.causal(offset)
        if kind == "window":
            left, right = rng.randint(-1, 9), rng.randint(-1, 9)
            return masks.window(left, right), oracle.window(left, right)
        if kind == "padding":
            ends = [rng.randint(0, Lk) for _ in range(B)]
            starts = [rng.randint(0, end) for end in ends]
            rows = [rng.randint(0, Lq) for _ in range(B)]
            made = masks.padding(ends, start=starts, query_lengths=rows)
            return made, oracle.padding(ends, starts, query_lengths=rows)
        if kind == "keep":
            keep = [[rng.random() < 0.6 for _ in range(Lk)] for _ in range(B)]
            return masks.padding(keep=torch.tensor(keep)), oracle.padding(keep=keep)
        if kind == "documents":
            rows, cols = (
                [[rng.randint(0, 3) for _ in range(n)] for _ in range(B)] for n in (Lq, Lk)
            )
            made = masks.documents(torch.tensor(rows), torch.tensor(cols))
            return made, oracle.documents(rows, cols)
        if kind == "prefix":
            lengths = [rng.randint(0, Lk) for _ in range(B)]
            return masks.prefix_lm(lengths), oracle.prefix_lm(lengths)
        if kind == "intervals":
            shape = rng.choice([(Lq,), (B, 1, Lq), (1, H, Lq)])
            lo, hi = (torch.randint(0, Lk + 1, shape) for _ in range(2))
            return masks.intervals(lo, hi), oracle.intervals(lo, hi)
        bits = torch.rand(rng.choice([1, B]), rng.choice([1, H]), Lq, Lk) < rng.choice([0.03, 0.9])
        return masks.dense(bits), oracle.dense(bits)

    mask, rule = part()
    if rng.random() < 0.5:
        more, also = part()
        mask, rule = mask & more, rule & also
    return mask, rule.seen(B, H, Lq, Lk)


@pytest.mark.parametrize("chunk", [1 << 25, 64], ids=["at once", "in pieces"])
def test_counts_agree_with_brute_force_on_random_masks(chunk, monkeypatch):
    monkeypatch.setattr(area, "CHUNK", chunk)
    rng = random.Random(5)
    ways = set()
    of_intervals = area.of_intervals
    monkeypatch.setattr(area, "of_intervals", lambda *a: ways.add("intervals") or of_intervals(*a))
    of_pairs = area.of_pairs
    monkeypatch.setattr(area, "of_pairs", lambda *a: ways.add("pairs") or of_pairs(*a))
    for number in range(CASES):
        B, H = rng.randint(1, 3), rng.randint(1, 2)
        Lq, Lk = rng.choice([1, 7, 32, 33, 50]), rng.choice([1, 16, 31, 32, 48])
        tile = rng.choice([(16, 16), (32, 16), (8, 64), (64, 8)])
        mask, seen = random_mask(rng, B, H, Lq, Lk)
        found = area.count(mask, B, H, Lq, Lk, tile)
        expected = brute_force(seen, tile)
        got = {name: getattr(found, name) for name in expected}
        assert got == expected, (number, mask, B, H, Lq, Lk, tile)
        tiles = found.empty + found.partial + found.full
        assert found.visited == (found.partial + found.full) / tiles
    assert ways == {"intervals", "pairs"}


def test_no_mask_is_everything():
    found = area.count(None, 2, 3, 40, 50, (16, 16))
    assert (found.pairs, found.total) == (2 * 3 * 40 * 50,) * 2
    assert (found.empty, found.partial, found.full) == (0, 2 * 3 * 3, 2 * 3 * 3 * 3)
    assert (found.rows, found.keys, found.bits) == (2 * 3 * 40, 2 * 50, 0)


def test_counts_agree_with_explain_and_the_picture():
    import tilemask

    mask = masks.causal() & masks.padding([50, 96])
    q = torch.zeros(2, 2, 96, 8)
    said = tilemask.explain(q, q, q, mask=mask, backend="reference")
    found = area.count(mask, 2, 2, 96, 96, said.tile)
    assert found.visited == pytest.approx(said.visited)
    one = area.count(masks.causal(), 1, 1, 96, 96, (16, 32))
    drawn = masks.causal().picture(96, 96, tile=(16, 32))
    assert f"{one.empty} empty, {one.partial} partial, {one.full} full" in drawn


def test_bits_are_those_of_planes_that_are_there():
    bits = torch.rand(1, 2, 64, 64) < 0.5
    assert area.count(masks.dense(bits), 3, 2, 64, 64, (32, 32)).bits == 2 * 64 * 64
    keep = torch.rand(3, 64) < 0.5
    assert area.count(masks.padding(keep=keep), 3, 2, 64, 64, (32, 32)).bits == 0


def test_long_masks_are_counted_without_their_square():
    found = area.count(masks.causal(), 1, 1, 1 << 18, 1 << 18, (128, 128))
    n = (1 << 18) // 128
    assert (found.empty, found.partial, found.full) == (n * (n - 1) // 2, n, n * (n - 1) // 2)
    assert found.pairs == (1 << 17) * ((1 << 18) + 1)


def test_operations_and_bytes():
    """Written out for one call: 2 operations per multiply-add, every tensor once."""
    work = Workload(
        "w", "causal", 2, 4, 2, 64, 64, 16, 8, "bfloat16", bias="hqk", bias_gradient=True
    )
    found = area.count(masks.causal(), 2, 4, 64, 64, (32, 32))
    pairs, rows, keys = 2 * 4 * 64 * 65 // 2, 2 * 4 * 64, 2 * 2 * 64
    bias = 4 * 64 * 64 * 2
    forward = cost.cost_of(work, FORWARD, found)
    assert forward.flops == pairs * 2 * (16 + 8)
    assert forward.tile_flops == 2 * 4 * 3 * 32 * 32 * 2 * (16 + 8)
    assert forward.bytes == rows * (16 + 8) * 2 + keys * (16 + 8) * 2 + bias
    both = cost.cost_of(work, TRAINING, found)
    # again q k^T, then dout v^T, p^T dout, ds k, ds^T q
    assert both.flops == forward.flops + pairs * 2 * (16 + 8 + 8 + 16 + 16)
    read = rows * (16 + 8 + 8) * 2 + rows * 4 + keys * (16 + 8) * 2 + bias
    written = rows * 16 * 2 + keys * (16 + 8) * 2 + bias
    assert both.bytes == forward.bytes + read + written


def test_the_larger_of_two_times():
    one = cost.Cost(flops=8e12, tile_flops=9e12, bytes=2e9)
    assert one.seconds(1e12, 1e9) == 8.0
    assert one.seconds(1e15, 1e9) == 2.0


def test_ceilings_have_sources_and_sense():
    assert set(cost.GPUS) == {"A100", "H100", "H200", "L40S", "B200"}
    for gpu in cost.GPUS.values():
        assert "https://www.nvidia.com/" in gpu.source
        assert gpu.half > gpu.single > 1e13 and 5e11 < gpu.memory < 1e13
    assert cost.peak("H100", "float32") == cost.GPUS["H100"].single
    options = command_line.parser().parse_args(["cost"])
    assert options.gpus == list(cost.GPUS)


# -- the command ----------------------------------------------------------------------------------


def test_the_command(capsys):
    assert (
        command_line.main(["cost", "causal 1k D128", "--tile", "128", "64", "--gpus", "H200"]) == 0
    )
    printed = capsys.readouterr().out
    pairs = 16 * 16 * 1024 * 1025 // 2
    assert f"{pairs:,} of {16 * 16 * 1024 * 1024:,} visible (50.05 %)" in printed
    assert "128 x 64, 32,768: 14,336 empty, 4,096 partial, 14,336 full; 56.25 % visited" in printed
    milliseconds = 1e3 * pairs * 4 * 128 / 989e12
    assert f"{milliseconds:9.3f} compute" in printed
    assert "https://www.nvidia.com/en-us/data-center/h200/" in printed and "A100" not in printed


def test_decoding_is_bound_by_memory(capsys):
    name = next(n for n in workloads.names() if n.startswith("decode "))
    assert command_line.main(["cost", name]) == 0
    printed = capsys.readouterr().out
    assert printed.count(" memory") == 5 and "forward + backward" not in printed


def test_a_mask_of_ones_own(capsys):
    shape = ["--shape", "1", "4", "2", "256", "256", "64"]
    mask = ["--mask", "causal() & window(31, 0)"]
    assert command_line.main(["cost", *mask, *shape, "--tile", "64", "64"]) == 0
    printed = capsys.readouterr().out
    seen = masks.window(31, 0).to_dense(1, 1, 256, 256).sum().item()
    assert f"{4 * seen:,} of {4 * 256 * 256:,} visible" in printed
    assert "64 x 64, 64: 36 empty, 28 partial, 0 full" in printed
    nothing = ["cost", "--mask", "padding(0)", *shape]
    assert command_line.main(nothing) == 0
    assert "nothing is visible" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["no such"], "no workload is called 'no such'"),
        (["--mask", "causal("], "'causal(' makes no mask"),
        (["--mask", "__import__('os')"], "makes no mask"),
    ],
)
def test_what_it_refuses(arguments, said, capsys):
    assert command_line.main(["cost", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_the_list(capsys):
    assert command_line.main(["cost", "--list"]) == 0
    assert capsys.readouterr().out.splitlines() == workloads.names()
