"""The loop: for every workload the truth, then each contender compared, timed and written down."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

import tilemask

from . import check, overhead, record, report, timing
from .area import count
from .cells import case_of, cell_of, stepper
from .cost import Cost, cost_of
from .peers import Case, Contender, Tilemask, backends_here, chosen_peers, reasons, sentence
from .workloads import SUITES, Workload

SECONDS, FEW_SECONDS = 0.25, 0.06  # of samples per cell; in the suite quick and on a CPU
QUICK = 55  # seconds that the suite quick has unless it is told otherwise
PATIENCE = 150  # seconds for a case of a peer in a process of its own
PEER_SHARE = 0.25  # of a time limit, the most that one peer may use, compiling included
FIGURES = ("overhead", "prepare")  # suites whose rows are one figure each
TILE = (128, 128)  # of the areas that are written down


class Stop(Exception):
    """The run ends here, with what it has."""


# -- peers with a process of their own ------------------------------------------------------------

_last: tuple[Workload, Case] | None = None  # in such a process: the case of the last call


def cell_elsewhere(name: str, work: Workload, device: str, direction: str, seconds: float) -> dict:
    global _last
    if _last is None or _last[0] != work:
        _last = None
        _last = work, case_of(work, device)
    (contender,) = chosen_peers([name])
    return cell_of(contender, _last[1], direction, seconds)


class Alone:
    """The process of one peer, started when it is first needed, started anew after it died."""

    def __init__(self):
        self.pool: futures.ProcessPoolExecutor | None = None

    def cell(self, contender: Contender, work: Workload, device: str, direction, seconds) -> dict:
        if self.pool is None:
            context = multiprocessing.get_context("spawn")
            self.pool = futures.ProcessPoolExecutor(1, mp_context=context)
        asked = self.pool.submit(cell_elsewhere, contender.name, work, device, direction, seconds)
        try:
            return asked.result(PATIENCE)
        except futures.TimeoutError:
            reason = f"took more than {PATIENCE} s"
        except BrokenProcessPool:
            reason = "its process died"
        except Exception as error:
            reason = sentence(error, [])
        self.end()
        return {"status": "cannot", "reason": reason}

    def end(self) -> None:
        if self.pool is None:
            return
        workers = list((self.pool._processes or {}).values())
        self.pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.kill()
        self.pool = None


# -- the run --------------------------------------------------------------------------------------


def new_row(suite: str, work: Workload, direction: str) -> dict:
    return {
        "kind": "attention",
        "suite": suite,
        "name": work.name,
        "direction": direction,
        "workload": dataclasses.asdict(work),
        "shape": work.shape(),
        "area": {},
        "cost": {},
        "cells": {},
    }


class Run:
    """What is planned, what is known so far, and the document that it goes into.

    limit: seconds. only: parts of names; workloads that hold none of them are left out.
    """

    def __init__(self, suites, backends, peers, out: Path, device: str, limit=None, only=()):
        self.device, self.out = device, out
        self.began = time.monotonic()
        self.deadline = None if limit is None else self.began + limit
        self.clock = timing.clock_for(device)
        self.plan: list[tuple[str, Workload]] = []
        for suite in suites:
            if suite not in FIGURES:
                known = {work.name for _, work in self.plan}
                for work in SUITES[suite](device == "cuda"):
                    wanted = not only or any(part in work.name for part in only)
                    if wanted and work.name not in known:
                        self.plan.append((suite, work))
        self.backends = [Tilemask(name) for name in backends]
        self.document = record.new_document(
            device, self.clock.name, suites, [peer.name for peer in peers]
        )
        self.peers: list[Contender] = []
        for contender in [*self.backends, *peers]:
            reason = contender.absent(device)
            if reason is None and contender not in self.backends:
                self.peers.append(contender)
            elif reason is not None:
                self.document["absent"][contender.name] = reason
        self.alone: dict[str, Alone] = {}
        self.spent: dict[str, float] = {}  # seconds by contender
        self.dense: dict[tuple, float] = {}  # unmasked milliseconds

    def go(self) -> int:
        """Everything that was planned, or what there is time for; the exit code."""
        self.out.mkdir(parents=True, exist_ok=True)
        before = signal.signal(signal.SIGTERM, stop)
        try:
            self.everything()
        except KeyboardInterrupt:
            self.document["stopped"] = "interrupted"
        except Stop as reason:
            self.document["stopped"] = str(reason)
        finally:
            signal.signal(signal.SIGTERM, before)
            for process in self.alone.values():
                process.end()
            self.write()
            record.write(self.out / "report.html", report.page(self.document))
        print("\n" + report.table(self.document))
        for name in ("results.json", "report.html"):
            print(f"written: {self.out / name}")
        return exit_code(self.document)

    def everything(self) -> None:
        if self.plan:
            self.measure_ceilings()
        figures = [suite for suite in FIGURES if suite in self.document["suites"]]
        total = len(self.plan) + len(figures)
        for number, (suite, work) in enumerate(self.plan, 1):
            self.check_time()
            self.say(f"[{number}/{total}] {work.name}: {work.shape()}")
            self.workload(suite, work)
        if self.plan:
            self.measure_ceilings()
        for number, suite in enumerate(figures, len(self.plan) + 1):
            self.check_time()
            self.say(f"[{number}/{total}] {suite}")
            for row in overhead.rows(suite, self.device, [b.backend for b in self.here()]):
                self.document["rows"].append(row)
                self.write()
                self.check_time()

    def check_time(self) -> None:
        if self.deadline is not None and time.monotonic() > self.deadline:
            seconds = self.deadline - self.began
            raise Stop(f"the time limit of {seconds:.0f} s")

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.began:5.0f} s  {text}", flush=True)

    def write(self) -> None:
        self.document["seconds"] = round(time.monotonic() - self.began, 1)
        record.save(self.out / "results.json", self.document)

    def workload(self, suite: str, work: Workload) -> None:
        """The rows of a workload, one per direction; first those of the same call unmasked, if they
        are not there yet: a tax needs them."""
        if (work.mask != "full" or work.bias is not None) and self.has_no_dense(work):
            plain = work.without_mask()
            self.say(f"        first {plain.name}: what the mask is taxed against")
            self.rows_of(suite, plain, peers=any(plain == other for _, other in self.plan))
        self.rows_of(suite, work)

    def has_no_dense(self, work: Workload) -> bool:
        keys = [self.dense_key(work, d, b.name) for d in work.directions for b in self.here()]
        return any(key not in self.dense for key in keys)

    def here(self) -> list[Tilemask]:
        return [b for b in self.backends if b.name not in self.document["absent"]]

    def dense_key(self, work: Workload, direction: str, name: str) -> tuple:
        plain = dataclasses.replace(work.without_mask(), name="", directions=())
        return plain, direction, name

    def rows_of(self, suite: str, work: Workload, peers: bool = True) -> None:
        """A row per direction, those left out that are there already."""
        rows = [new_row(suite, work, direction) for direction in work.directions]
        known = {record.key_of(row) for row in self.document["rows"]}
        rows = [row for row in rows if record.key_of(row) not in known]
        if not rows:
            return
        try:
            case = case_of(work, self.device)
            mask = case.pattern.mask
            area = count(mask, work.B, work.Hq, work.Lq, work.Lk, TILE, self.device)
        except Exception as error:
            self.no_case(rows, error)
            return
        contenders = [*self.here(), *(self.peers if peers else [])]
        for row in rows:
            row["area"] = dataclasses.asdict(area)
            row["cost"] = cost_of(work, row["direction"], area)._asdict()
            self.document["rows"].append(row)
            try:
                for contender in contenders:
                    self.cell(row, contender, case, row["direction"])
            finally:
                for contender in contenders:
                    cut = {"status": "cut", "reason": "the run ended before it"}
                    row["cells"].setdefault(contender.name, cut)
                if all(cell["status"] == "cut" for cell in row["cells"].values()):
                    self.document["rows"].remove(row)
                if self.device == "cuda":
                    row["clocks"] = record.clocks_now()
                self.write()
        if self.device == "cuda":
            del case
            torch.cuda.empty_cache()

    def no_case(self, rows: list[dict], error: Exception) -> None:
        """Rows of a workload whose truth or mask could not be made: nothing in them is timed."""
        memory = isinstance(error, torch.cuda.OutOfMemoryError)
        reason = "not compared: " + sentence(error, [])
        for row in rows:
            for contender in self.here():
                status = "cannot" if memory else "failed"
                row["cells"][contender.name] = {"status": status, "reason": reason}
            self.document["rows"].append(row)
        self.say(f"        {reason}")
        self.write()

    def cell(self, row: dict, contender: Contender, case: Case, direction: str) -> None:
        self.check_time()
        work = case.work
        few = row["suite"] == "quick" or self.device == "cpu"
        seconds = FEW_SECONDS if few else SECONDS
        before = time.monotonic()
        if self.used_up(contender):
            cell = {"status": "cut", "reason": "it has used its share of the time limit"}
        elif contender.alone:
            process = self.alone.setdefault(contender.name, Alone())
            cell = process.cell(contender, work, self.device, direction, seconds)
        else:
            cell = cell_of(contender, case, direction, seconds)
        spent = self.spent.get(contender.name, 0.0) + time.monotonic() - before
        self.spent[contender.name] = spent
        if cell["status"] == "ok":
            cell |= self.derived(cell, contender, work, direction, row["cost"])
        row["cells"][contender.name] = cell
        self.say(f"        {direction:18} {contender.name:20} {report.in_short(cell)}")
        self.check_context(contender)

    def used_up(self, contender: Contender) -> bool:
        """Whether a peer must leave what is left of the time to others."""
        if self.deadline is None or isinstance(contender, Tilemask):
            return False
        return self.spent.get(contender.name, 0.0) > PEER_SHARE * (self.deadline - self.began)

    def derived(self, cell: dict, contender, work: Workload, direction: str, cost: dict) -> dict:
        """Figures that follow from the median: TFLOP/s, share of the roofline, mask tax."""
        found = {
            "spread_ms": round(timing.spread(cell["samples_ms"]), 6),
            "tflops": cost["flops"] / cell["ms"] / 1e9,
            "roofline_share": self.roofline_share(work.dtype, cost, cell["ms"]),
        }
        if not isinstance(contender, Tilemask):
            return found
        key = self.dense_key(work, direction, contender.name)
        if work.mask == "full" and work.bias is None:
            self.dense[key] = cell["ms"]
        elif key in self.dense and cell["visited"]:
            found["mask_tax"] = cell["ms"] / (cell["visited"] * self.dense[key])
        return found

    def roofline_share(self, dtype: str, cost: dict, milliseconds: float) -> float:
        ceilings = self.document["ceilings"]
        rates = ceilings["flops_per_second"][dtype], ceilings["bytes_per_second"]
        return Cost(**cost).seconds(*rates) / (milliseconds * 1e-3)

    def measure_ceilings(self) -> None:
        """Before the first row and after the last, the better of both: something else may have run
        meanwhile. Shares that were written before are brought to it."""
        dtypes = {work.dtype for _, work in self.plan}
        found = timing.ceilings(self.clock, self.device, dtypes)
        self.document["ceilings"] = timing.better(self.document["ceilings"], found)
        for row in self.document["rows"]:
            for cell in row.get("cells", {}).values():
                if cell["status"] == "ok":
                    dtype = row["workload"]["dtype"]
                    share = self.roofline_share(dtype, row["cost"], cell["ms"])
                    cell["roofline_share"] = share

    def check_context(self, contender: Contender) -> None:
        """End the run if the GPU is lost: after an illegal access every call fails."""
        if self.device != "cuda" or contender.alone:
            return
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            first = str(error).splitlines()[0]
            raise Stop(f"{contender.name} lost the GPU ({first}): run again without it") from None


def stop(*_):
    raise KeyboardInterrupt


def exit_code(document: dict) -> int:
    """1 if tilemask was wrong or failed anywhere, or did nothing; else 0."""
    own = [
        cell["status"]
        for row in document["rows"]
        for name, cell in row.get("cells", {}).items()
        if name.startswith("tilemask ")
    ]
    own += [row.get("status", "ok") for row in document["rows"] if row["kind"] != "attention"]
    return int("ok" not in own or "wrong" in own or "failed" in own)


# -- compiling beforehand -------------------------------------------------------------------------


def warm(suites, backends, peers, device: str, jobs: int, seconds: float) -> None:
    """Run every case once, in ``jobs`` processes side by side, so that Triton's and torch's caches
    on disk hold what the timed run will need. Their failures are left for that run to tell."""
    code = "from tilemask.bench.run import warm_share; import sys; warm_share(*sys.argv[1:])"
    words = [",".join(suites), ",".join(backends), ",".join(p.name for p in peers), device]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, *words, str(share), str(jobs)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for share in range(jobs)
    ]
    deadline = time.monotonic() + seconds
    try:
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, deadline - time.monotonic()))
    finally:
        for process in processes:
            process.kill()
            process.wait()


def warm_share(suites: str, backends: str, peers: str, device: str, share: str, jobs: str) -> None:
    """What process ``share`` of ``jobs`` does: every jobs-th workload, most telling first."""
    works = [w for s in suites.split(",") if s not in FIGURES for w in SUITES[s](device == "cuda")]
    contenders: list[Contender] = [Tilemask(name) for name in backends.split(",")]
    contenders += [p for p in chosen_peers(peers.split(",")) if p.name == "flex"] if peers else []
    for work in works[int(share) :: int(jobs)]:
        pattern = work.pattern(device)
        given = check.draw_inputs(work, pattern.rows, device, 0)
        case = Case(work, pattern, device, [given], None)
        for contender in contenders:
            for direction in work.directions:
                with contextlib.suppress(Exception), reasons():
                    if contender.why_not(case, direction) is None:
                        step, _ = stepper(contender.ready(case).attend, case, direction)
                        step(0)


# -- the command ----------------------------------------------------------------------------------


def main(options) -> int:
    """python -m tilemask bench."""
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        print("bench: torch can use no GPU here: python -m tilemask doctor", file=sys.stderr)
        return 2
    if "gpu" in options.suite and device != "cuda":
        print("bench: the suite gpu needs an NVIDIA GPU that torch can use", file=sys.stderr)
        return 2
    try:
        backends = backends_here(options.backends, device)
        peers = chosen_peers(options.peers)
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    if device == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # small tensors: threads that wait for each other blur every time
    where = torch.cuda.get_device_name(0) if device == "cuda" else "the CPU"
    print(f"tilemask {tilemask.__version__} on {where}", flush=True)
    limit, began = options.limit, time.monotonic()
    if limit is None and options.suite == ["quick"]:
        limit = QUICK
    if options.warm:
        print(f"compiling in {options.warm} processes ...", flush=True)
        share = 90 if limit is None else min(90, limit / 5)
        running = [name for name in backends if name in tilemask.available_backends()]
        warm(options.suite, running, peers, device, options.warm, share)
        limit = None if limit is None else limit - (time.monotonic() - began)
    run = Run(options.suite, backends, peers, Path(options.out), device, limit, options.only)
    if not run.plan and not set(options.suite) & set(FIGURES):
        print(f"bench: no workload of these suites holds {options.only}", file=sys.stderr)
        return 2
    return run.go()
