"""Every method on a task of EinBench, over seeds: what it found, and for how much compute."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from joblib import Memory

from benchmarks.search.answers import Verdict, verdict
from benchmarks.search.measures import Yardstick, compute_to
from benchmarks.search.methods import METHODS
from benchmarks.search.simulation import Setting, Trace
from benchmarks.search.table import Array, Snapper, Table
from nas.einbench import EinBench

TARGETS = (0.90, 0.95, 0.98, 0.99)
#: Compute at which curves are read, as shares of the whole table's.
GRID: Array = np.logspace(-3, 0, 61)


@dataclass(frozen=True)
class World:
    """A task of EinBench, made ready."""

    table: Table
    snapper: Snapper
    yardsticks: tuple[Yardstick, ...]


@lru_cache(maxsize=4)
def world(task: str, folder: Path | None = None) -> World:
    """The task, once a process."""
    table = Table.of(EinBench(task, folder))
    return World(table, Snapper(table), tuple(Yardstick.of(table, i) for i in range(table.seeds)))


@dataclass(frozen=True)
class Job:
    """One simulated search."""

    task: str
    folder: Path | None
    method: str
    seed: int
    #: its compute, as a share of the whole table's
    share: float
    workers: int


@dataclass(frozen=True)
class Outcome:
    """What one simulated search did."""

    job: Job
    #: (grid,) share of the whole table's hypervolume, and log loss over the table's least
    hypervolume: Array
    regret: Array
    #: target → train FLOPs, ∞ where it was not reached
    compute_to: Mapping[float, float]
    train_flops: float
    simulated_seconds: float
    begun: int
    repeats: int
    #: entries truly on the front that were begun; of these, those stopped by the rule before they
    #: came to it, and those left unfinished
    optimal: int
    stopped: int
    unfinished: int
    #: of the compute of all begun runs to their ends, what was not spent; confirming left out
    saved: float
    #: final hypervolume over that of all begun runs to their ends
    kept: float
    verdict: Verdict | None
    cpu_seconds: float


def simulate(job: Job) -> Outcome:
    """Run a search and measure it."""
    found = world(job.task, job.folder)
    table = found.table
    setting = Setting(table, found.snapper, job.share * table.whole, job.workers, job.seed)
    began = time.process_time()
    trace = METHODS[job.method](setting)
    took = time.process_time() - began
    yardstick = found.yardsticks[setting.seed_index]
    shares, regret = yardstick.hypervolume(trace), yardstick.regret(trace)
    optimal, stopped, unfinished = lost(table, trace)
    saved, kept = saving(yardstick, trace, shares)
    at = np.searchsorted(trace.spent, GRID * table.whole, side="right") - 1
    return Outcome(
        job=job,
        hypervolume=np.where(at >= 0, shares[at], 0.0),
        regret=np.where(at >= 0, regret[at], np.inf),
        compute_to={t: compute_to(trace, shares, t) for t in TARGETS},
        train_flops=float(trace.spent[-1]),
        simulated_seconds=float(trace.seconds[-1]),
        begun=len(trace.reached),
        repeats=trace.repeats,
        optimal=optimal,
        stopped=stopped,
        unfinished=unfinished,
        saved=saved,
        kept=kept,
        verdict=verdict(table, setting.seed_index, trace),
        cpu_seconds=took,
    )


def lost(table: Table, trace: Trace) -> tuple[int, int, int]:
    """(truly optimal entries that were begun, those that were stopped, those left unfinished).

    An entry is truly optimal where it is on the front of the means over the seeds at some level; it
    is lost where its run ended before the last of these levels.
    """
    wanted = dict(sorted(table.true_front))
    begun = {e: level for e, level in trace.reached.items() if e in wanted}
    short = {entry for entry, level in begun.items() if level < wanted[entry]}
    return len(begun), len(short & trace.stopped), len(short - trace.stopped)


def saving(yardstick: Yardstick, trace: Trace, shares: Array) -> tuple[float, float]:
    """(compute saved, hypervolume kept) against training all that was begun to its end."""
    table = yardstick.table
    begun = sorted(trace.reached)
    spent = sum(float(table.flops[e, level]) for e, level in trace.reached.items())
    whole = float(table.flops[begun, -1].sum())
    return 1 - spent / whole, float(shares[-1]) / yardstick.full(begun)


def run(jobs: Sequence[Job], processes: int = 1, kept: Path | None = None) -> list[Outcome]:
    """All of them, in their order.

    Parameters
    ----------
    kept
        Folder of outcomes, which are read if they are there: delete it where the code has changed.
    """
    one = partial(_kept, kept) if kept is not None else simulate
    if processes == 1:
        return [one(job) for job in jobs]
    with ProcessPoolExecutor(processes) as pool:
        return list(pool.map(one, jobs))


def _kept(folder: Path, job: Job) -> Outcome:
    found: Outcome = Memory(folder, verbose=0).cache(simulate)(job)
    return found
