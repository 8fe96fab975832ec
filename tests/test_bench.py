"""The benchmark suite: what it compares, how it times, what it keeps when it is cut."""

import itertools
import json
import signal
import sys
import time
import types

import pytest
import torch
import torch.nn.functional as F

import tilemask
from tilemask import __main__ as command_line
from tilemask import backends
from tilemask.backends import reference
from tilemask.bench import cells, check, peers, record, report, run, timing, workloads
from tilemask.bench.workloads import FORWARD, TRAINING, Workload

SMALL = Workload("small", "causal & padding", 2, 4, 2, 40, 40, 16, 16, "float32")


def small(mask, **changes):
    lengths = {"Lq": 1} if mask == "cache lengths" else {}
    return Workload(**(vars(SMALL) | {"name": f"small {mask}", "mask": mask} | lengths | changes))


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    """Few samples, small ceilings."""
    monkeypatch.setattr(timing, "LEAST", 2)
    monkeypatch.setattr(timing, "MOST", 3)
    monkeypatch.setattr(cells, "PAIRS", 1)
    ceilings = {
        "flops_per_second": {"float32": 1e12, "bfloat16": 1e12},
        "bytes_per_second": 1e10,
        "samples_ms": {},
    }
    monkeypatch.setattr(timing, "ceilings", lambda *_: dict(ceilings))


def cell(contender, work, direction=TRAINING):
    return cells.cell_of(contender, cells.case_of(work, "cpu"), direction, 0.0)


def bench(monkeypatch, out, works, *arguments):
    """Run the command on a suite of these workloads; its exit code and document."""
    monkeypatch.setitem(workloads.SUITES, "quick", lambda gpu: works)
    code = command_line.main(["bench", "--device", "cpu", "--out", str(out), *arguments])
    return code, record.load(out / "results.json")


# -- masks, said to everybody ---------------------------------------------------------------------

MASKS = [name for name in workloads.PATTERNS if name != "expression"]


@pytest.mark.parametrize("mask", MASKS)
def test_every_form_of_a_mask_says_the_same(mask):
    """Where anybody wants a result: rows of padding may differ."""
    work = small(mask, B=3)
    pattern = work.pattern("cpu")
    B, H, Lq, Lk = work.B, work.Hq, work.Lq, work.Lk
    truth = torch.ones(B, H, Lq, Lk, dtype=torch.bool)
    if pattern.mask is not None:
        truth = pattern.mask.to_dense(B, H, Lq, Lk)
    wanted = torch.ones(B, Lq, dtype=torch.bool) if pattern.rows is None else pattern.rows
    truth = truth & wanted[:, None, :, None]

    seen = pattern.attn_mask(work, "cpu")
    if seen is not None:
        assert torch.equal((seen & wanted[:, None, :, None]).expand_as(truth), truth)
    if pattern.mod is not None:
        b, i, j = torch.arange(B), torch.arange(Lq), torch.arange(Lk)
        said = pattern.mod(b[:, None, None], None, i[:, None], j).expand(B, Lq, Lk)
        assert torch.equal(said & wanted[..., None], truth[:, 0])
    if pattern.is_causal:
        assert torch.equal(torch.ones(Lq, Lk, dtype=torch.bool).tril(), truth[0, 0])
    if pattern.packed is not None:
        assert torch.equal(from_packed(work, pattern), truth[:, 0])
    assert pattern.mask is None or pattern.mod is not None


def from_packed(work, pattern):
    """bool [B, Lq, Lk] of sequences and a window, token by token."""
    packed, (left, right) = pattern.packed, pattern.window
    seen = torch.zeros(work.B * work.Lq, work.B * work.Lk, dtype=torch.bool)
    index = packed.index_q if packed.index_q is not None else torch.arange(work.B * work.Lq)
    bounds = packed.cu_q.tolist()
    for first, end in itertools.pairwise(bounds):
        tokens = index[first:end].tolist()
        for row, col in itertools.product(range(len(tokens)), repeat=2):
            near = (left == -1 or row - col <= left) and (right == -1 or col - row <= right)
            seen[tokens[row], tokens[col]] = near
    assert bounds[-1] == len(index)
    assert packed.max_q == max(b - a for a, b in itertools.pairwise(bounds))
    blocks = seen.view(work.B, work.Lq, work.B, work.Lk)
    diagonal = blocks[torch.arange(work.B), :, torch.arange(work.B)]
    assert diagonal.sum() == seen.sum()  # nothing across batches
    return diagonal


def test_suites_have_what_they_promise():
    dense = workloads.SUITES["dense"](True)
    assert {work.D for work in dense} == {64, 128, 256}
    assert {work.Lk for work in dense} == {512 * 2**n for n in range(7)}
    assert all(work.B * work.Lk == max(16384, work.Lk) for work in dense)
    masks = workloads.SUITES["masks"](True)
    assert {work.Lk for work in masks} == {8192, 32768}
    assert len({work.mask for work in masks}) >= 14
    assert {work.bias_gradient for work in workloads.SUITES["bias"](True)} == {True, False}
    gpu = workloads.SUITES["gpu"](True)
    assert [(w.mask, w.Lk, w.D) for w in gpu[:4]] == [
        ("full", 16384, 128),
        ("causal", 16384, 128),
        ("full", 16384, 64),
        ("causal", 16384, 64),
    ]
    first = [work.mask for work in gpu[4:10]]
    assert first == ["full", *workloads.MASKS[:5]]
    assert sum(work.bias is not None for work in gpu[:24]) == 3
    assert "cache lengths" in {work.mask for work in gpu[:24]}
    for suite in workloads.SUITES.values():
        names = [work.name for work in suite(True)]
        assert len(set(names)) == len(names)


def test_names_are_of_one_workload_each():
    assert len(workloads.names()) > 100  # everything() raises on a name given twice


def test_an_expression_that_makes_no_mask():
    for text in ("causal(", "open('x')", "3", "causal().__class__"):
        with pytest.raises(ValueError, match="makes no mask"):
            small("expression", text=text).pattern("cpu")
    made = small("expression", text="causal() & window(3, 0)").pattern("cpu")
    assert "/" in made.mask.picture(40, 40)


# -- compared -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "work",
    [
        SMALL,
        small("tree", bias="hqk", bias_gradient=True),
        small("key holes", bias="bk", bias_gradient=True, Hkv=4),
        small("random bits 50 %", scale=-0.3, Dv=8),
        small("full", dtype="bfloat16"),
        small("documents", dtype="bfloat16", D=64, Dv=64),
    ],
    ids=str,
)
def test_truth_is_torchs_and_the_reference_passes(work):
    case = cells.case_of(work, "cpu")
    given = case.sets[0].leaves(work.bias_gradient)
    q, k, v = (t.detach().double().requires_grad_() for t in (given.q, given.k, given.v))
    bias = None if given.bias is None else given.bias.detach().double().requires_grad_()
    seen = torch.ones(work.Lq, work.Lk, dtype=torch.bool)
    if case.pattern.mask is not None:
        seen = case.pattern.mask.to_dense(work.B, work.Hq, work.Lq, work.Lk)
    full = seen if bias is None else bias.masked_fill(~seen, -torch.inf)
    wide = (t.repeat_interleave(work.Hq // work.Hkv, 1) for t in (k, v))
    out = F.scaled_dot_product_attention(q, *wide, attn_mask=full, scale=work.scale)
    leaves = {"dq": q, "dk": k, "dv": v} | ({} if bias is None else {"dbias": bias})
    gradients = torch.autograd.grad(out, list(leaves.values()), given.dout.double())
    right = {"out": out, **dict(zip(leaves, gradients, strict=True))}
    assert set(right) == set(case.truth.results)
    for name, exact in case.truth.results.items():
        torch.testing.assert_close(exact, right[name], rtol=1e-9, atol=1e-9)
    good = cell(peers.Tilemask("reference"), work)
    assert good["status"] == "ok", good
    assert set(good["errors"]) == set(right)


SABOTAGE = {
    "nothing": lambda out: out,
    "scaled": lambda out: out * 1.01,
    "one number": lambda out: out.index_fill(-1, torch.tensor(3), 0),
    "one row": lambda out: out.index_add(2, torch.tensor([5]), torch.full_like(out[:, :, :1], 0.1)),
    "nan": lambda out: out.index_fill(2, torch.tensor(7), float("nan")),
    "gradient": lambda out: out + (out - out.detach()),
    "shape": lambda out: out[..., :-1],
    "a row that sees nothing": lambda out: out + (out == 0).all(-1, keepdim=True) * 0.5,
}


@pytest.mark.parametrize("fault", SABOTAGE)
def test_a_wrong_backend_is_caught(fault, monkeypatch, tmp_path, capsys):
    """In the backend itself: WRONG, no time, exit code 1."""
    right = reference.forward

    def forward(call):
        out, lse = right(call)
        return SABOTAGE[fault](out), lse

    monkeypatch.setattr(reference, "forward", forward)
    code, document = bench(monkeypatch, tmp_path, [SMALL], "--peers", "none")
    printed = capsys.readouterr().out
    own = [
        row["cells"]["tilemask reference"] for row in document["rows"] if row["name"] == SMALL.name
    ]
    assert len(own) == 2
    if fault == "nothing":
        assert code == 0 and all(c["status"] == "ok" for c in own) and "WRONG" not in printed
        return
    assert code == 1
    assert own[-1]["status"] in ("wrong", "failed"), own
    if fault != "shape":
        assert "WRONG" in printed and "WRONG" in (tmp_path / "report.html").read_text()
    for c in own:
        assert c["status"] == "ok" or not any(key.startswith(("ms", "samples")) for key in c)


def test_a_wrong_peer_is_caught_and_tilemask_is_not_blamed(monkeypatch, tmp_path):
    math = next(peer for peer in peers.PEERS if peer.name == "sdpa math")
    ready = peers.Sdpa.ready

    def wrong(self, case):
        made = ready(self, case)
        attend = made.attend
        made.attend = (lambda given: attend(given) * 1.02) if self is math else attend
        return made

    monkeypatch.setattr(peers.Sdpa, "ready", wrong)
    code, document = bench(monkeypatch, tmp_path, [small("causal")], "--peers", "sdpa")
    row = next(row for row in document["rows"] if row["name"] == "small causal")
    assert code == 0
    assert row["cells"]["sdpa math"]["status"] == "wrong" and "ms" not in row["cells"]["sdpa math"]
    assert row["cells"]["sdpa flash"]["status"] == "ok"
    assert "WRONG (" in report.table(document)


def test_an_exception_in_tilemask_is_a_failed_row(monkeypatch, tmp_path):
    def broken(call):
        raise IndexError("tile 7 of 6")

    monkeypatch.setattr(reference, "forward", broken)
    code, document = bench(monkeypatch, tmp_path, [small("full")], "--peers", "sdpa math")
    cells_found = document["rows"][0]["cells"]
    assert code == 1
    assert cells_found["tilemask reference"]["status"] == "failed"
    assert cells_found["tilemask reference"]["reason"] == "IndexError: tile 7 of 6"
    assert cells_found["sdpa math"]["status"] == "ok"
    assert "FAILED" in report.table(document)


@pytest.mark.parametrize(
    "error, status, code",
    [(ValueError("no such ids"), "failed", 1), (torch.cuda.OutOfMemoryError("2 TiB"), "cannot", 0)],
)
def test_a_case_that_cannot_be_made_does_not_end_the_run(
    error, status, code, monkeypatch, tmp_path
):
    truth_of = check.truth_of

    def broken(work, *arguments):
        if work.mask == "tree":
            raise error
        return truth_of(work, *arguments)

    monkeypatch.setattr(check, "truth_of", broken)
    works = [small("full"), small("tree"), small("causal")]
    found, document = bench(monkeypatch, tmp_path, works, "--peers", "none")
    own = {row["name"]: row["cells"]["tilemask reference"] for row in document["rows"]}
    assert found == code
    assert own["small tree"]["status"] == status
    assert own["small tree"]["reason"].startswith("not compared: ")
    assert own["small causal"]["status"] == "ok"
    assert "not compared: " in report.table(document) + report.page(document)


def test_an_exception_in_a_peer_is_its_sentence(monkeypatch, tmp_path):
    def broken(self, case):
        raise RuntimeError("no such kernel\nand a long story")

    monkeypatch.setattr(peers.Flex, "ready", broken)
    code, document = bench(monkeypatch, tmp_path, [small("full")], "--peers", "flex")
    assert code == 0
    flex = document["rows"][0]["cells"]["flex"]
    assert flex == {"status": "cannot", "reason": "RuntimeError: no such kernel"}
    assert "RuntimeError: no such kernel" in report.table(document)
    assert "no backward on a CPU" in report.page(document)


def test_out_of_memory_in_words():
    error = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 64 GiB")
    assert peers.sentence(error, []) == "out of memory"
    warned = [
        "Memory efficient kernel not used because: (Triggered internally at sdp_utils.cpp:1.)",
        "Flash Attention does not support non-null attn_mask. (Triggered internally at x.)",
        "Flash attention has been runtime disabled.",
    ]
    refused = RuntimeError("No available kernel. Aborting execution.")
    text = "Flash Attention does not support non-null attn_mask."
    assert peers.sentence(refused, warned) == text


# -- peers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["causal", "padding random", "tree"])
def test_peers_of_this_machine_are_right(mask):
    for peer in peers.PEERS:
        if peer.absent("cpu") is None:
            found = cell(peer, small(mask), FORWARD)
            assert found["status"] == "ok", (peer.name, found)
            assert found["samples_ms"]
    flex = cell(peers.Flex(), small(mask), FORWARD)
    assert flex["prepare_ms"] > 0 and flex["note"] == "eager"


def test_bias_of_peers():
    work = small("tree", bias="hqk", bias_gradient=True, Hkv=4)
    flex, math = peers.Flex(), peers.chosen_peers(["sdpa math"])[0]
    assert cell(flex, work, FORWARD)["status"] == "ok"
    assert cell(math, work, TRAINING)["status"] == "ok"
    assert cell(peers.VarlenAttn(), work)["reason"] == "for packed sequences: here there are none"


def windowed(q, k, v, causal, window_size, softmax_scale=None):
    """Attention on [B, L, H, D] as flash-attn's functions have it, by torch."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    rows, cols = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    rows = rows + k.shape[2] - q.shape[2]
    left, right = ((-1 if side is None else side) for side in window_size)
    right = 0 if causal else right
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    seen = seen if left == -1 else seen & (rows - cols <= left)
    seen = seen if right == -1 else seen & (cols - rows <= right)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=seen, scale=softmax_scale, enable_gqa=True
    )
    return out.transpose(1, 2)


def fake_flash_attn():
    module = types.ModuleType("flash_attn")

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options
    ):
        parts = [
            windowed(*(t[None, a:b] for t in (q, k, v)), **options)[0]
            for a, b in itertools.pairwise(cu_seqlens_q.tolist())
        ]
        return torch.cat(parts)

    def flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens, softmax_scale, causal):
        parts = [
            windowed(q[b : b + 1], k_cache[b : b + 1, :n], v_cache[b : b + 1, :n], causal, (-1, -1))
            for b, n in enumerate(cache_seqlens.tolist())
        ]
        return torch.cat(parts), None

    def flash_attn_func(q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1)):
        return windowed(q, k, v, causal, window_size, softmax_scale), "lse"

    vars(module).update(locals())
    return module


@pytest.mark.parametrize(
    "mask",
    [
        "full",
        "causal",
        "sliding window",
        "causal & padding left",
        "causal documents",
        "padding right",
        "cache lengths",
    ],
)
def test_flash_attn_is_called_as_its_users_call_it(mask, monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", fake_flash_attn())
    contender = peers.FlashAttention(2, "flash_attn")
    contender.needs_half = False
    work = small(mask, directions=(FORWARD,) if mask == "cache lengths" else (FORWARD, TRAINING))
    for direction in work.directions:
        found = cell(contender, work, direction)
        assert found["status"] == "ok", found


def test_varlen_attn_is_called_as_its_users_call_it(monkeypatch):
    def varlen_attn(query, key, value, cu_q, cu_k, max_q, max_k, *, scale=None, window_size):
        run = fake_flash_attn().flash_attn_varlen_func
        return run(
            query,
            key,
            value,
            cu_q,
            cu_k,
            max_q,
            max_k,
            causal=False,
            window_size=window_size,
            softmax_scale=scale,
        )

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    contender = peers.VarlenAttn()
    contender.needs_half = False
    for mask in ("padding left", "causal documents"):
        assert cell(contender, small(mask))["status"] == "ok"


def test_reasons_are_known_before_the_call():
    flash = peers.FlashAttention(2, "flash_attn")
    half = {"dtype": "bfloat16"}
    cases = {
        "takes no bias": small("full", bias="hqk", **half),
        "not this mask": small("tree", **half),
        "float16 and bfloat16": small("full"),
        "D = Dv": small("full", Dv=8, **half),
    }
    for words, work in cases.items():
        assert words in flash.why_not(cells.case_of(work, "cpu"), FORWARD)
    assert flash.absent("cpu") == "it has no CPU kernel"
    assert "not installed" in flash.absent("cuda") or peers.installed("flash_attn")
    assert not peers.installed("flash_attn_of_nobody.cute") and peers.installed(
        "torch.nn.attention"
    )


def test_names_of_peers():
    assert [p.name for p in peers.chosen_peers(["sdpa"])] == [
        "sdpa flash",
        "sdpa cudnn",
        "sdpa efficient",
        "sdpa math",
    ]
    assert peers.chosen_peers(["none"]) == [] and peers.chosen_peers(None) == peers.PEERS
    with pytest.raises(ValueError, match="unknown peer 'abacus'"):
        peers.chosen_peers(["abacus"])


def test_a_peer_in_a_process_of_its_own(tmp_path, monkeypatch):
    """It gives its cell; one that kills its process, or is too slow, gives a sentence."""
    (tmp_path / "flash_attn.py").write_text("import os; os._exit(3)")
    monkeypatch.syspath_prepend(tmp_path)
    alone = run.Alone()
    try:
        math = peers.chosen_peers(["sdpa math"])[0]
        assert alone.cell(math, SMALL, "cpu", FORWARD, 0.0)["status"] == "ok"
        assert alone.cell(math, small("no such mask"), "cpu", FORWARD, 0.0) == {
            "status": "cannot",
            "reason": "KeyError: 'no such mask'",
        }
        deadly = peers.FlashAttention(2, "flash_attn")
        work = small("full", dtype="bfloat16")
        died = {"status": "cannot", "reason": "its process died"}
        assert alone.cell(deadly, work, "cpu", FORWARD, 0.0) == died
        monkeypatch.setattr(run, "PATIENCE", 0.01)
        late = alone.cell(math, SMALL, "cpu", FORWARD, 0.0)
        assert late == {"status": "cannot", "reason": "took more than 0.01 s"}
        assert alone.pool is None
    finally:
        alone.end()


# -- timed ----------------------------------------------------------------------------------------


class Ticks:
    """A clock whose calls take what a list says."""

    def __init__(self, milliseconds):
        self.milliseconds, self.calls = milliseconds, []

    def run(self, step, count, first=0):
        for number in range(first, first + count):
            step(number)
        return [self.milliseconds[n % len(self.milliseconds)] for n in range(first, first + count)]

    def wait(self):
        pass


def test_measure_takes_as_many_samples_as_there_is_time_for(monkeypatch):
    monkeypatch.setattr(timing, "LEAST", 5)
    monkeypatch.setattr(timing, "MOST", 100)
    for each, count in ((1.0, 100), (10.0, 25), (1000.0, 5)):
        calls = []
        samples = timing.measure(Ticks([each]), calls.append, 0.25)
        assert samples == [each] * count
        assert calls == list(range(timing.WARM_UP + count))


def test_measure_warms_every_input_set():
    calls = []
    timing.measure(Ticks([1.0]), calls.append, 0.0, sets=7)
    assert calls[:7] == list(range(7)) and len(calls) == 7 + timing.LEAST


def test_spread_is_half_the_distance_of_the_quartiles():
    assert timing.spread([1.0, 2.0, 3.0, 4.0, 5.0]) == 1.0
    assert timing.spread([7.0]) == 0.0


def test_wall_clock(monkeypatch):
    now = iter([0.0, 0.002, 1.0, 1.004])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(now))
    samples = timing.WallClock().run(lambda _: None, 2)
    assert samples == pytest.approx([2.0, 4.0])


def test_cuda_events_surround_each_call(monkeypatch):
    """The order on the stream, and that nothing waits between the calls."""
    stream = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.place = len(stream)
            stream.append("event")

        def elapsed_time(self, end):
            assert stream[-1] == "synchronize"
            return float(end.place - self.place)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: stream.append("synchronize"))
    samples = timing.CudaEvents().run(lambda number: stream.append(number), 3, first=4)
    assert stream == ["event", 4, "event", "event", 5, "event", "event", 6, "event", "synchronize"]
    assert samples == [2.0, 2.0, 2.0]


def test_input_sets_outgrow_the_cache(monkeypatch):
    properties = types.SimpleNamespace(L2_cache_size=50 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    assert timing.sets_for(200 << 20, "cuda") == 1
    assert timing.sets_for(40 << 20, "cuda") == 4
    assert timing.sets_for(1 << 10, "cuda") == 256
    assert timing.sets_for(1 << 10, "cpu") == 1


def test_calls_walk_over_the_input_sets(monkeypatch):
    monkeypatch.setattr(timing, "sets_for", lambda *_: 3)
    case = cells.case_of(SMALL, "cpu")
    seen = []
    step, named = cells.stepper(lambda given: seen.append(given) or given.q, case, FORWARD)
    for number in range(5):
        step(number)
    named()
    assert [id(given) for given in seen] == [id(case.sets[n]) for n in (0, 1, 2, 0, 1, 0)]
    assert not torch.equal(case.sets[0].q, case.sets[1].q)


def test_peak_memory_is_the_difference(monkeypatch):
    calls = []
    for name, value in (("memory_allocated", 100), ("max_memory_allocated", 175)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: calls.append("reset"))
    assert cells.peak_extra(lambda n: calls.append(n), Ticks([1.0]), "cuda") == 75
    assert calls == ["reset", 0]
    assert cells.peak_extra(None, None, "cpu") is None


def test_preparation_is_what_a_call_takes_longer(monkeypatch):
    """A mask that takes 20 ms to lower, once it is not kept."""
    mask = tilemask.masks.causal()
    bounds = type(mask).bounds

    def slow(self, rows):
        time.sleep(0.02)
        return bounds(self, rows)

    monkeypatch.setattr(type(mask), "bounds", slow)
    q = torch.randn(1, 1, 8, 8)
    step = lambda _: tilemask.attention(q, q, q, mask=mask, backend="trivial")
    from tilemask.bench import overhead

    with overhead.trivial_backend(q):
        measured = cells.preparation(step, timing.WallClock(), mask)
    assert 15 < measured < 200
    assert cells.preparation(None, None, None) == 0.0


def test_the_tax_and_the_roofline(monkeypatch, tmp_path):
    work = small("causal", Lq=128, Lk=128)
    _, document = bench(monkeypatch, tmp_path, [work], "--peers", "none")
    plain, masked = (
        next(r for r in document["rows"] if r["name"] == name and r["direction"] == TRAINING)
        for name in (work.without_mask().name, work.name)
    )
    full, own = (row["cells"]["tilemask reference"] for row in (plain, masked))
    assert "mask_tax" not in full and own["visited"] == 0.75 and own["tile"] == [64, 64]
    assert own["mask_tax"] == pytest.approx(own["ms"] / (0.75 * full["ms"]))
    pairs = 2 * 4 * 128 * 129 // 2
    assert masked["area"]["pairs"] == pairs
    assert masked["cost"]["flops"] == pairs * (4 * 16 + 10 * 16)
    assert own["tflops"] == pytest.approx(masked["cost"]["flops"] / own["ms"] / 1e9)
    floor = max(masked["cost"]["flops"] / 1e12, masked["cost"]["bytes"] / 1e10)
    assert own["roofline_share"] == pytest.approx(floor / own["ms"] * 1e3)


# -- a run ----------------------------------------------------------------------------------------


def test_rows_are_written_as_they_come_and_a_cut_run_keeps_them(monkeypatch, tmp_path, capsys):
    """Ctrl-C in the third workload: two are whole, the page is there."""
    works = [small("full"), small("causal", Hkv=4), small("tree", Hq=8)]
    seen = []
    case_of = run.case_of

    def watched(work, device):
        path = tmp_path / "results.json"
        seen.append(len(json.loads(path.read_text())["rows"]) if path.exists() else 0)
        if work.mask == "tree":
            signal.raise_signal(signal.SIGTERM)
        return case_of(work, device)

    monkeypatch.setattr(run, "case_of", watched)
    code, document = bench(monkeypatch, tmp_path, works, "--peers", "none")
    assert code == 0
    assert seen[:3] == [0, 2, 4]
    assert document["stopped"] == "interrupted"
    assert "small causal" in {row["name"] for row in document["rows"]}
    assert "small tree" not in {row["name"] for row in document["rows"]}
    assert "cut short: interrupted" in (tmp_path / "report.html").read_text()
    assert "cut short: interrupted" in capsys.readouterr().out


def test_the_time_limit(monkeypatch, tmp_path):
    now = itertools.count(0.0, 10.0)
    monkeypatch.setattr(run.time, "monotonic", lambda: next(now))
    works = [small("full"), small("causal")]
    code, document = bench(monkeypatch, tmp_path, works, "--peers", "none", "--limit", "60")
    assert document["stopped"] == "the time limit of 60 s"
    assert {row["name"] for row in document["rows"]} == {"small full"}
    assert code == 0
    with pytest.raises(SystemExit):
        command_line.main(["bench", "--limit", "0"])


def test_a_peer_leaves_time_to_the_others(monkeypatch, tmp_path):
    """One that takes long to compile has a quarter of the limit, and no more."""
    ready = peers.Flex.ready

    def slow(self, case):
        time.sleep(0.3)
        return ready(self, case)

    monkeypatch.setattr(peers.Flex, "ready", slow)
    monkeypatch.setattr(run, "PEER_SHARE", 0.001)
    works = [small("full", directions=(FORWARD,)), small("causal", directions=(FORWARD,))]
    _, document = bench(monkeypatch, tmp_path, works, "--peers", "flex", "--limit", "200")
    found = {row["name"]: row["cells"].get("flex") for row in document["rows"]}
    assert found["small full"]["status"] == "ok"
    said = {"status": "cut", "reason": "it has used its share of the time limit"}
    assert found["small causal"] == said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and both may run")
def test_a_backend_for_gpus_that_does_not_run_is_reported(tmp_path):
    backends = peers.backends_here(None, "cuda")
    assert backends == ["cuda", "triton"]
    left_out = run.Run(["quick"], backends, [], tmp_path, "cpu").document["absent"]
    assert set(left_out) == {"tilemask cuda", "tilemask triton"}
    assert "python -m tilemask doctor" in left_out["tilemask cuda"]


def test_a_lost_gpu_ends_the_run(monkeypatch, tmp_path):
    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    one = run.Run(["overhead"], ["reference"], [], tmp_path, "cpu", None)
    one.check_context(peers.Flex())
    one.device = "cuda"
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(run.Stop, match=r"flex lost the GPU .*illegal memory access"):
        one.check_context(peers.Flex())


def test_a_backend_that_is_not_here(monkeypatch, tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("Triton can run here")
    arguments = ("--peers", "none", "--backends", "triton", "reference")
    code, document = bench(monkeypatch, tmp_path, [small("full")], *arguments)
    assert code == 0
    assert list(document["rows"][0]["cells"]) == ["tilemask reference"]
    assert (
        "left out: tilemask triton: backend 'triton' does not run here" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("--peers", "abacus"), "unknown peer 'abacus'"),
        (("--suite", "gpu", "--device", "cpu"), "needs an NVIDIA GPU"),
    ],
)
def test_wrong_arguments(arguments, said, capsys, tmp_path):
    assert command_line.main(["bench", "--out", str(tmp_path / "x"), *arguments]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_only_some_workloads(monkeypatch, tmp_path, capsys):
    works = [small("full"), small("tree"), small("causal")]
    _, document = bench(monkeypatch, tmp_path, works, "--peers", "none", "--only", "tre", "full")
    assert {row["name"] for row in document["rows"]} == {"small full", "small tree"}
    assert command_line.main(["bench", "--only", "abacus", "--out", str(tmp_path / "x")]) == 2
    assert "no workload of these suites" in capsys.readouterr().err


def test_quick_ends_in_time(monkeypatch, tmp_path):
    limits = []
    monkeypatch.setattr(run.Run, "go", lambda self: limits.append(self.deadline - self.began) or 0)
    bench_of = lambda *words: command_line.main(["bench", "--device", "cpu", *words])
    assert bench_of() == 0 and bench_of("--limit", "7") == 0
    assert limits == [run.QUICK, 7.0] and run.QUICK < 60


def test_suites_of_the_command_line_are_those_there_are():
    options = command_line.parser().parse_args(["bench", "--suite", *workloads.SUITES])
    assert options.suite == list(workloads.SUITES)
    assert command_line.parser().parse_args(["bench", "--suite", *run.FIGURES])
    with pytest.raises(SystemExit):
        command_line.parser().parse_args(["bench", "--suite", "nonsense"])


def test_nothing_wrong_is_not_enough(tmp_path):
    """A run in which no cell of tilemask is ok has failed."""
    document = {"rows": [{"kind": "attention", "cells": {"sdpa math": {"status": "ok"}}}]}
    assert run.exit_code(document) == 1
    assert run.exit_code({"rows": []}) == 1


def test_warming_runs_a_share_of_the_cases_once(monkeypatch):
    ran = []
    monkeypatch.setitem(
        workloads.SUITES, "quick", lambda gpu: [SMALL, small("tree"), small("full")]
    )
    attention = tilemask.attention
    monkeypatch.setattr(
        tilemask, "attention", lambda *a, **o: ran.append(o["mask"]) or attention(*a, **o)
    )
    run.warm_share("quick,overhead", "reference", "", "cpu", "1", "2")
    assert len(ran) == 2  # small("tree"), in both directions
    run.warm(["overhead"], ["reference"], [], "cpu", 1, 30.0)


# -- overhead and preparing -----------------------------------------------------------------------


def test_overhead_and_prepare(monkeypatch, tmp_path, capsys):
    from tilemask.bench import overhead

    monkeypatch.setattr(overhead, "ROUNDS", 2)
    monkeypatch.setattr(overhead, "CALLS", 3)
    monkeypatch.setattr(overhead, "PREPARED", ("prefix-LM", "key holes"))
    before = list(backends.BACKENDS)
    code = command_line.main(
        ["bench", "--suite", "overhead", "prepare", "--device", "cpu", "--out", str(tmp_path)]
    )
    document = record.load(tmp_path / "results.json")
    assert code == 0 and before == backends.BACKENDS
    names = [row["name"] for row in document["rows"]]
    assert names[0] == "attention, no mask" and "torch's, is_causal, computed" in names
    assert "prefix-LM 512, reference" in names
    assert "host time of a call" in capsys.readouterr().out
    assert "key holes 512, reference" in (tmp_path / "report.html").read_text()


def test_a_mask_prepared_wrongly_is_not_timed(monkeypatch):
    from tilemask.bench import overhead

    right = reference.forward
    monkeypatch.setattr(reference, "forward", lambda call: tuple(2 * t for t in right(call)))
    case = cells.case_of(small("prefix-LM", directions=(FORWARD,)), "cpu")
    row = overhead.prepare_one(peers.Tilemask("reference"), case)
    assert row["status"] == "wrong" and "out off by" in row["reason"] and "ms" not in row
    document = {"rows": [row]}
    assert run.exit_code(document) == 1
    assert record.problems_of_row(row) == []


def test_check_sums_a_bias_over_what_it_shares():
    tensor = torch.arange(24.0).view(2, 3, 4)
    assert torch.equal(check.summed_to(tensor, (1, 3, 1)), tensor.sum((0, 2), keepdim=True))
    assert check.summed_to(tensor, (2, 3, 4)) is tensor
