"""Trains random entries of EinBench again, and compares.

With the seeds of the table an entry gives its own curve again: on the machine of the table to
rounding, elsewhere only at first, for rounding grows with the steps.  With fresh seeds its losses
come from the same distribution.  That is tested on the logarithm of the last loss, whose noise is
alike at every loss: by Student's t in each entry, and over all entries by how many differ at
5% and by the mean of their differences, so that neither a few wrong entries nor a small error of
all of them stays unseen.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.stats import binom, ttest_1samp, ttest_ind

from benchmarks.reporting import report
from nas.einbench.files import Curve, Floats
from nas.einbench.table import EinBench
from nas.errors import EinsumNasError, RunFailed
from nas.records.device import processor_name
from nas.tasks import TaskData, load_data
from nas.training.run import CPU, train_replicates

#: How often a table that is right is called wrong, by each of the two tests over all entries.
ALARM = 0.001
#: Level of the test of one entry.
LEVEL = 0.05
#: Largest relative difference of losses that counts as rounding.
ROUNDING = 1e-5


@dataclass(frozen=True)
class Compared:
    """An entry and its runs with fresh seeds."""

    curve: Curve
    #: last loss of each fresh run
    fresh: Sequence[float]
    #: largest relative difference of a loss from that of the same seed in the table
    same_seed: float = 0.0

    @property
    def difference(self) -> float:
        """Mean log of the fresh last losses less that of the table's."""
        return float(np.log(self.fresh).mean() - np.log(self.curve.loss[:, -1]).mean())

    @property
    def p(self) -> float:
        """Of Student's two-sided test that both have one mean."""
        return float(ttest_ind(np.log(self.curve.loss[:, -1]), np.log(self.fresh)).pvalue)


@dataclass(frozen=True)
class Verdict:
    """What all compared entries say together."""

    entries: int
    #: entries that differ at `LEVEL`, and the most that chance explains at `ALARM`
    differ: int
    most: int
    #: mean of `Compared.difference`, and the p of its being 0
    shift: float
    shift_p: float

    @property
    def holds(self) -> bool:
        """Whether nothing speaks against one distribution of the table's and the fresh losses."""
        return self.differ <= self.most and self.shift_p > ALARM


def judged(compared: Sequence[Compared]) -> Verdict:
    """The verdict over entries; at least two.

    Few seeds make each entry's own estimate of its noise poor, so the second test takes the noise
    from the differences themselves.
    """
    differences = [c.difference for c in compared]
    return Verdict(
        entries=len(compared),
        differ=sum(c.p < LEVEL for c in compared),
        most=int(binom.ppf(1 - ALARM, len(compared), LEVEL)),
        shift=float(np.mean(differences)),
        shift_p=float(ttest_1samp(differences, 0.0).pvalue),
    )


def trained(curve: Curve, bench: EinBench, data: TaskData, seeds: Sequence[int]) -> Floats:
    """The losses (seeds, n) of an entry's runs with these seeds, computed as the table's were.

    Raises
    ------
    EinsumNasError
        A run failed.
    """
    plans = json.loads(curve.execution_plans or "null")
    run = partial(
        train_replicates, bench.plan(curve), data.recipe, data.train, data.validation,
        execution=CPU, layer_plans=plans,
    )  # fmt: skip
    losses: dict[int, list[float]] = {}
    for own in [seeds] if curve.trained_together > 1 else [[seed] for seed in seeds]:
        for found in run(seeds=own):
            for seed, point in found.items():
                if isinstance(point, RunFailed):
                    raise EinsumNasError(f"{curve.design} with seed {seed}: {point}")
                losses.setdefault(seed, []).append(point.loss)
    return np.array([losses[seed] for seed in seeds])


def drawn(bench: EinBench, entries: int, seed: int) -> list[Curve]:
    """Random entries without replacement."""
    places = np.random.default_rng(seed).permutation(len(bench.entries))[:entries]
    return [bench.entries[i] for i in places]


def compare(bench: EinBench, curves: Iterable[Curve]) -> Iterator[Compared]:
    """Each entry trained again: with the seeds of the table, and with as many fresh ones.

    Raises
    ------
    EinsumNasError
        The task's data here is not that of the table.
    """
    data = load_data(bench.recipe)
    wanted = bench.about["task_fingerprint"]
    if data.fingerprint != wanted:
        raise EinsumNasError(
            f"the data of {bench.task} here has fingerprint {data.fingerprint}, that of the table "
            f"{wanted}: {data.summary}"
        )
    for curve in curves:
        seeds = curve.seeds.tolist()
        fresh = range(max(seeds) + 1, max(seeds) + 1 + len(seeds))
        again = trained(curve, bench, data, seeds)
        last = trained(curve, bench, data, list(fresh))[:, -1]
        apart = float(np.max(np.abs(again - curve.loss) / curve.loss))
        yield Compared(curve, last.tolist(), apart)


def verify(bench: EinBench, entries: int, seed: int) -> bool:
    """Compare random entries and print them; whether the table holds.

    On the kind of device that the table was measured on, each entry's own seeds must give its own
    curve to `ROUNDING`.
    """
    torch.set_num_threads(1)  # as the workers of `collect` on a CPU
    compared = []
    for found in compare(bench, drawn(bench, entries, seed)):
        compared.append(found)
        print(json.dumps(_row(found)), flush=True)
    verdict = judged(compared)
    here = f"cpu {processor_name()}, 1 thread, float32"
    same_kind = all(c.curve.device == here for c in compared)
    equal = max(c.same_seed for c in compared) <= ROUNDING
    report(
        f"EinBench {bench.task}: entries trained again with their seeds and with fresh ones; "
        f"here is {here}, which is {'' if same_kind else 'not '}the device of the table",
        [{**asdict(verdict), "holds": verdict.holds, "same seed, same curve": equal}],
        [_row(c) for c in compared],
    )
    return verdict.holds and (equal or not same_kind)


def _row(c: Compared) -> dict[str, Any]:
    return {
        "design": c.curve.design, "width": c.curve.width,
        "table": c.curve.loss[:, -1].tolist(), "fresh": list(c.fresh),
        "log difference": c.difference, "p": c.p, "same seed": c.same_seed,
    }  # fmt: skip
