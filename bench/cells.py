"""One contender on one case: compared with the truth, then timed."""

from __future__ import annotations

import statistics
import time

import torch

from tilemask import masks

from . import check, record, timing
from .peers import Case, Contender, Tilemask, reasons, sentence
from .workloads import FORWARD, Workload

PAIRS = 3  # of calls with and without what is kept of a mask


def case_of(work: Workload, device: str) -> Case:
    pattern = work.pattern(device)
    first = check.draw_inputs(work, pattern.rows, device, seed=0)
    truth = check.truth_of(work, pattern.mask, pattern.rows, first)
    tensors = (first.q, first.k, first.v, first.dout, first.bias)
    size = sum(t.numel() * t.element_size() for t in tensors if t is not None)
    sets = [first]
    for seed in range(1, timing.sets_for(size, device)):
        sets.append(check.draw_inputs(work, pattern.rows, device, seed))
    return Case(work, pattern, device, sets, truth)


def stepper(attend, case: Case, direction: str):
    """(step, results): a call on input set ``number``, and the named results of set 0."""
    if direction == FORWARD:
        sets = case.sets

        def step(number):
            with torch.no_grad():
                return attend(sets[number % len(sets)])

        return step, lambda: {"out": step(0)}
    sets = [given.leaves(case.work.bias_gradient) for given in case.sets]
    wanted = [given.wanted() for given in sets]

    def train(number):
        index = number % len(sets)
        out = attend(sets[index])
        return out, torch.autograd.grad(out, list(wanted[index].values()), sets[index].dout)

    def named():
        out, gradients = train(0)
        return {"out": out.detach(), **dict(zip(wanted[0], gradients, strict=True))}

    return train, named


def cell_of(contender: Contender, case: Case, direction: str, seconds: float) -> dict:
    """Compare, then time: what stands in the table. Exceptions of tilemask are its failure, those
    of a peer its sentence."""
    reason = contender.why_not(case, direction)
    if reason is not None:
        return {"status": "cannot", "reason": reason}
    clock = timing.clock_for(case.device)
    with reasons() as warned:
        try:
            with contender.context():
                return timed(contender, case, direction, seconds, clock)
        except Exception as error:
            mine = isinstance(contender, Tilemask)
            failure, status = error, "failed" if mine else "cannot"
    text = sentence(failure, warned)
    del failure
    return {"status": status, "reason": text}


def timed(contender: Contender, case: Case, direction: str, seconds: float, clock) -> dict:
    ready = contender.ready(case)
    step, named = stepper(ready.attend, case, direction)
    cell = {"status": "ok", **ready.facts, "first_call_ms": timing.first_call(clock, step)}
    got = named()
    errors = case.truth.errors(got)
    reason = case.truth.wrong(errors)
    if reason is None and isinstance(contender, Tilemask):
        if (got["out"] * case.truth.dead).any():
            reason = "out is not 0 in a row that sees nothing"
    cell["errors"] = {
        name: [None if error == float("inf") else error, case.truth.allowed[name]]
        for name, error in errors.items()
    }
    if reason is not None:
        return {"status": "wrong", "reason": reason, "errors": cell["errors"]}
    del got
    cell |= record.figure(timing.measure(clock, step, seconds, len(case.sets)), "ms")
    cell["peak_extra_bytes"] = peak_extra(step, clock, case.device)
    if ready.prepare is not None:
        ready.prepare()
        clock.wait()
        cell["prepare_ms"] = statistics.median(waited(clock, ready.prepare) for _ in range(3))
    if isinstance(contender, Tilemask):
        cell["prepare_ms"] = preparation(step, clock, case.pattern.mask)
    return cell


def waited(clock, function) -> float:
    """Milliseconds by the host's clock, until the device is done."""
    start = time.perf_counter()
    function()
    clock.wait()
    return 1e3 * (time.perf_counter() - start)


def preparation(step, clock, mask) -> float:
    """Milliseconds that a call takes longer when nothing is kept of its mask: the median of the
    differences of a few pairs of calls, 0 where there is no mask."""
    if mask is None:
        return 0.0
    kept, anew = [], []
    for _ in range(PAIRS):
        with masks.caching(False):
            anew.append(waited(clock, lambda: step(0)))
        step(0)  # keeps it again
        kept.append(waited(clock, lambda: step(0)))
    return max(0.0, statistics.median(anew) - statistics.median(kept))


def peak_extra(step, clock, device: str) -> int | None:
    """Bytes that one call allocates at most beside its inputs; None on a CPU: not measured."""
    if device != "cuda":
        return None
    clock.wait()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(0)
    clock.wait()
    return torch.cuda.max_memory_allocated() - before
