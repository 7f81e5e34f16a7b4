"""How often the answer of a search holds what is truly best: as users get it, from its runs.

The runs that a search trained to their end are given to `nas.analysis.best` as stored runs: one
seed each, or, where the search confirmed some, these with their fresh seeds beside.  The *answer's
set* is the best structure and those that cannot be told apart from it.  The *true best* is the
structure of the entry whose loss at the budget, over all seeds of the table, has the least mean of
logarithms; the seed that a search observed is one of them.

The table keeps standard errors over validation samples, not the losses of single samples, which
answers from single seeds compare in pairs.  In their place stand normal samples with those errors
and with the correlation between runs that was measured when the table was collected.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from benchmarks.search.simulation import Trace
from benchmarks.search.table import Array, Table
from nas.analysis.best import best_for_budget
from nas.store import Run, StoredPoint

#: Median correlation, between two of the 40 lowest runs, of the losses of single samples; where it
#: was not measured they are taken as independent, which makes sets larger.
SAMPLE_CORRELATION = {"regression": 0.71, "images": 0.27}
_SAMPLES = 256


@dataclass(frozen=True)
class Verdict:
    """An answer held against the table."""

    #: whether the answer's set holds the structure of the true best entry
    holds: bool
    #: structures in the set
    size: int
    #: log of the mean loss of the answer's best entry over that of the true best
    regret: float


def verdict(table: Table, seed_index: int, trace: Trace) -> Verdict | None:
    """What the runs of a search answer; None where none came to its end."""
    last = table.levels - 1
    runs = []
    for entry, level in trace.reached.items():
        if level == last and entry not in trace.stopped:
            runs.append(_run(table, entry, seed_index, "candidate"))
            fresh = [s for s in range(table.seeds) if s != seed_index]
            for seed in fresh[: trace.confirmed.get(entry, 0)]:
                runs.append(_run(table, entry, seed, "confirmation"))
    if not runs:
        return None
    samples = _Samples(table)
    found = best_for_budget(runs, table.budget, samples)
    members = [
        found.best.run.structure,
        *(structure_of_run(table, r.trial_id) for r in found.indistinguishable),
    ]
    best = entry_of(table, found.best.run.trial_id)
    return Verdict(
        holds=_structure(table, table.best) in members,
        size=len(members),
        regret=float(np.log(table.truth[best, last] / table.truth[table.best, last])),
    )


def entry_of(table: Table, trial_id: int) -> int:
    """The entry of a run's number."""
    return trial_id // table.seeds


def structure_of_run(table: Table, trial_id: int) -> str:
    """The structure of a run's number."""
    return _structure(table, entry_of(table, trial_id))


def _structure(table: Table, entry: int) -> str:
    return _run(table, entry, 0, "candidate").structure


@lru_cache(maxsize=16_384)
def _run(table: Table, entry: int, seed_index: int, kind: str) -> Run:
    """A run of the table as the store has it, read at its end."""
    curve, plan = table.curves[entry], table.plans[entry]
    point = StoredPoint(
        step=plan.steps,
        train_flops=float(plan.train_flops),
        loss=float(curve.loss[seed_index, -1]),
        loss_stderr=float(curve.loss_stderr[seed_index, -1]),
        train_seconds=float(curve.seconds[seed_index, -1]),
    )
    return Run(
        search_id="simulated", trial_id=entry * table.seeds + seed_index, number=entry, kind=kind,
        name=curve.name, theta=list(plan.design.exponents), design=plan.design.text,
        width=plan.width, inference_flops=plan.forward_flops_per_token, params=plan.params,
        step_seconds=curve.seconds_per_step, peak_memory=curve.peak_memory_bytes,
        dense=plan.dense, model=str(entry), depth=plan.depth, steps=plan.steps,
        seed=int(curve.seeds[seed_index]), train_flops_per_step=plan.train_flops_per_step,
        points=(point,), device=curve.device,
    )  # fmt: skip


class _Samples:
    """`Windows` of `nas.analysis.best`: losses of validation samples, as the module says."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self._share = SAMPLE_CORRELATION.get(table.task, 0.0)
        self._common = _standard(0)

    def __call__(self, keys: Sequence[tuple[int, int]]) -> list[tuple[float, ...]]:
        found = []
        for trial_id, _ in keys:
            entry, seed = divmod(trial_id, self._table.seeds)
            curve = self._table.curves[entry]
            own = math.sqrt(1 - self._share) * _standard(1 + trial_id)
            shape = math.sqrt(self._share) * self._common + own
            spread = float(curve.loss_stderr[seed, -1]) * math.sqrt(_SAMPLES)
            found.append(tuple((float(curve.loss[seed, -1]) + spread * shape).tolist()))
        return found


@lru_cache(maxsize=16_384)
def _standard(seed: int) -> Array:
    """Normal numbers whose mean is 0 and whose standard deviation is 1, both exactly."""
    drawn = np.random.default_rng(seed).standard_normal(_SAMPLES)
    found: Array = (drawn - drawn.mean()) / drawn.std(ddof=1)
    return found
