"""Searches as a user of Optuna writes them, random ones, and our own sampler in the same form:
`ask`, train, `tell`."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.samplers import (
    BaseSampler,
    GPSampler,
    NSGAIISampler,
    QMCSampler,
    RandomSampler,
    TPESampler,
)

from benchmarks.search.simulation import Clock, Method, Setting, Trace
from benchmarks.search.table import Table, group_of
from nas.planning.request import Space
from nas.search.propose import ask_seed
from nas.search.sampler import SurrogateSampler
from nas.search.space import design_of, distributions

Form = Literal["full", "budgets"]
#: Proposals in a row that repeat an entry, after which a search has nothing new to say.
MOST_REPEATS = 300
SAMPLERS: dict[str, Callable[[int], BaseSampler]] = {
    "random": lambda seed: RandomSampler(seed=seed),
    "qmc": lambda seed: QMCSampler(seed=seed, warn_independent_sampling=False),
    "tpe": lambda seed: TPESampler(seed=seed),
    "tpe-multivariate": lambda seed: TPESampler(seed=seed, multivariate=True),
    "nsga2": lambda seed: NSGAIISampler(seed=seed),
    "gp": lambda seed: GPSampler(seed=seed),
}
#: Our sampler proposes in the box of one request, so it has the most frequent kind of entries only.
OWN = "surrogate"


def uniform(setting: Setting) -> Trace:
    """Entries in a random order, each once and to its end: random search that wastes nothing."""
    clock = Clock(setting)
    last = setting.table.levels - 1
    for entry in np.random.default_rng(setting.seed).permutation(len(setting.table)).tolist():
        if not clock.affords(entry, last):
            break
        while not clock.free:
            clock.wait()
        clock.begin(entry, last)
    return clock.trace()


@dataclass(frozen=True)
class Kind:
    """The box of one family and number of factors, as a search over these alone has it."""

    designs: Space
    box: Mapping[str, BaseDistribution]
    #: of the table's entries, those of all kinds up to this one
    upto: float


@lru_cache(maxsize=8)
def kinds_of(table: Table) -> tuple[Kind, ...]:
    """The kinds of a table's entries, from the most frequent on."""
    groups = Counter(group_of(plan.design) for plan in table.plans)
    found, upto = [], 0.0
    for group, count in groups.most_common():
        if group.endswith("-moe"):
            own: dict[str, Any] = {"families": [group], "experts": [4, 8]}
        else:
            own = {"factors": [int(group.removeprefix("einsum") or 2)]}
        request = table.request(space=own, objective="budget")
        upto += count / len(table)
        found.append(Kind(request.designs, distributions(request, table.recipe), upto))
    return tuple(found)


def suggested(trial: optuna.Trial, name: str, of: BaseDistribution) -> float | str | int:
    """A value of a distribution, by the call that a user writes."""
    if isinstance(of, FloatDistribution):
        return trial.suggest_float(name, of.low, of.high, log=of.log)
    assert isinstance(of, CategoricalDistribution)
    found: str | int = trial.suggest_categorical(name, of.choices)  # type: ignore[assignment]
    return found


def optuna_search(sampler: str, form: Form, most_trials: int | None = None) -> Method:
    """A study of Optuna.

    Parameters
    ----------
    sampler
        One of `SAMPLERS`, with its defaults, or `OWN`.
    form
        `full`: one objective, the logarithm of the loss of whole runs.  `budgets`: the compute of
        a run is proposed too, log-uniform over the table's levels, and the logarithms of it and of
        the loss are minimised together.
    most_trials
        Trials after which the search ends; for samplers whose proposals take seconds.

    A proposal is snapped to an entry and, in `budgets`, to the nearest level.  What is known of an
    entry is told at once and costs nothing, and of a longer run only the rest is paid.
    """

    def search(setting: Setting) -> Trace:
        return _Study(setting, sampler, form, most_trials).run()

    return search


class _Study:
    def __init__(self, setting: Setting, sampler: str, form: Form, most: int | None) -> None:
        self.setting, self.form = setting, form
        self.most = math.inf if most is None else most
        self.clock = Clock(setting)
        self.kinds = kinds_of(setting.table)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self.study = optuna.create_study(
                sampler=self._own() if sampler == OWN else SAMPLERS[sampler](setting.seed),
                directions=["minimize"] * (1 if form == "full" else 2),
            )
        #: entry that is being trained → trials that wait for it, each with its level
        self.waiting: dict[int, list[tuple[optuna.Trial, int]]] = {}
        self.repeats = 0

    def _own(self) -> _Own:
        kind, table = self.kinds[0], self.setting.table
        objective = "budget" if self.form == "full" else "pareto"
        request = table.request(
            space=kind.designs.model_dump(exclude_unset=True), objective=objective,
            seed=self.setting.seed,
        )  # fmt: skip
        self.kinds = (Kind(kind.designs, distributions(request, table.recipe), 1.0),)
        return _Own(request, table.recipe, self.setting.seed)

    def run(self) -> Trace:
        trials, in_a_row, spent_up = 0, 0, False
        while True:
            while (
                self.clock.free and in_a_row < MOST_REPEATS and trials < self.most and not spent_up
            ):
                trial = self.study.ask()
                trials += 1
                entry, level = self._proposed(trial)
                if self.clock.reached.get(entry, -1) >= level or entry in self.waiting:
                    in_a_row += 1
                    self.repeats += 1
                    self._tell_or_wait(trial, entry, level)
                elif self.clock.affords(entry, level):
                    in_a_row = 0
                    self.clock.begin(entry, level)
                    self.waiting[entry] = [(trial, level)]
                else:
                    spent_up = True
            if not self.waiting:
                return self.clock.trace(repeats=self.repeats)
            ended = self.clock.wait()
            assert ended is not None
            self._ended(ended)

    def _proposed(self, trial: optuna.Trial) -> tuple[int, int]:
        """The entry and the level that a trial stands for.

        A kind has the share of its entries, so that a uniform proposal is one of entries, nearly.
        """
        table = self.setting.table
        place = trial.suggest_float("kind", 0.0, 1.0)
        kind = next((k for k in self.kinds if place < k.upto), self.kinds[-1])
        params = {name: suggested(trial, name, of) for name, of in kind.box.items()}
        at = int(float(params["width_position"]) * len(table.widths))
        width = table.widths[min(at, len(table.widths) - 1)]
        entry = self.setting.snapper.entry(design_of(kind.designs, params), width)
        level = table.levels - 1
        if self.form == "budgets":
            share = params.get("budget_share")  # of `OWN`
            if share is None:
                share = trial.suggest_float("budget_share", 2 ** (-level / 2), 1.0, log=True)
            level += round(2 * math.log2(float(share)))
        return entry, max(level, int(table.first[entry]))

    def _tell_or_wait(self, trial: optuna.Trial, entry: int, level: int) -> None:
        if entry in self.waiting:
            self.waiting[entry].append((trial, min(level, self.clock.reached[entry])))
        else:
            self._tell(trial, entry, level)

    def _ended(self, entry: int) -> None:
        for trial, level in self.waiting.pop(entry):
            self._tell(trial, entry, level)

    def _tell(self, trial: optuna.Trial, entry: int, level: int) -> None:
        loss = math.log(self.clock.loss(entry, level))
        cost = math.log(float(self.setting.table.flops[entry, level]))
        values: Sequence[float] = (loss,) if self.form == "full" else (loss, cost)
        self.study.tell(trial, values)


class _Own(SurrogateSampler):
    """Our sampler with a seed for each ask, as a search gives it."""

    def sample_relative(
        self, study: optuna.Study, trial: optuna.trial.FrozenTrial,
        search_space: dict[str, BaseDistribution],
    ) -> dict[str, Any]:  # fmt: skip
        self._seed = ask_seed(self._request.seed, trial.number, 0)
        return super().sample_relative(study, trial, search_space)
