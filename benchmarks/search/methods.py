"""The methods that are compared, by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.search.asha import mo_asha
from benchmarks.search.plain import optuna_search, uniform
from benchmarks.search.scheduled import Entries, SchedulerFactory, scheduled
from benchmarks.search.simulation import Method
from nas.einbench import EinBench
from nas.planning.recipe import Recipe
from nas.planning.request import SearchRequest
from nas.records.evidence import Evidence
from nas.search.freeze_thaw import FrontierScheduler
from nas.search.rules import MedianRule, MoAshaRule
from nas.search.scheduling import Scheduler

#: Samplers of Optuna in both forms; the better of these is the one that counts.
OPTUNA = ("tpe", "tpe budgets", "tpe multivariate", "nsga2", "nsga2 budgets")
#: Trials of the Gaussian process of Optuna, whose proposals take seconds from some hundred on.
GP_TRIALS = 120
#: Trials of TPE, which at the whole budget proposes the same entries again and again, and with
#: budgets takes minutes for the next hundred.
TPE_TRIALS = 400
#: Our sampler, whose runs all train to their end, in both forms.
SAMPLER = ("surrogate", "surrogate budgets")
#: Methods of fewer searches than the others, because they take longest.
SEEDS = {"gp": 5} | dict.fromkeys(SAMPLER, 5)
#: Our own methods: by the search's own curves, with those of another task, and with the same turned
#: upside down, which mislead.
OURS = ("frontier", "frontier transfer", "frontier misled")
#: Compute of a search as a share of the whole table's, for methods that do not get all of it.
_LESS = dict.fromkeys((*OPTUNA, *SAMPLER), 0.25) | dict.fromkeys(OURS, 0.06)
#: Methods whose answers are held against the truth, and the compute of their searches.
ANSWERS = ("random", "tpe multivariate", "frontier")
SHARES = (0.06,)
#: Task → the one whose table is the evidence of an earlier search.
_EARLIER = {"regression": "images", "images": "regression", "text": "regression"}
#: Curves of it, at most.
_EVIDENCE = 512


def frontier(sign: float | None, folder: Path | None = None) -> Method:
    """The rule `frontier`, with evidence of another task whose log losses are times `sign`."""

    def begin(request: SearchRequest, recipe: Recipe, entries: Entries) -> Scheduler:
        evidence = () if sign is None else (_evidence(request.task, sign, folder),)
        return FrontierScheduler(request, recipe, entries, evidence)

    return scheduled(begin, stopping="frontier")


def _evidence(task: str, sign: float, folder: Path | None) -> Evidence:
    bench = EinBench(_EARLIER[task], folder)
    entries = [e for e in bench.entries if e.width in bench.widths]
    every = np.linspace(0, len(entries) - 1, min(_EVIDENCE, len(entries))).round().astype(int)
    chosen = [entries[i] for i in every]
    losses = [np.exp(sign * np.log(e.mean_loss)) for e in chosen]
    curves = [
        list(zip(e.train_flops.tolist(), y.tolist(), strict=True))
        for e, y in zip(chosen, losses, strict=True)
    ]
    return Evidence(list(map(bench.plan, chosen)), curves, bench.recipe, bench.task)


def _median(request: SearchRequest, recipe: Recipe, entries: Entries) -> Scheduler:
    return MedianRule(request, recipe, entries.propose)


def _halving(request: SearchRequest, recipe: Recipe, entries: Entries) -> Scheduler:
    return MoAshaRule(request, recipe, entries.propose, 4)


def _rule(factory: SchedulerFactory, stopping: str) -> Method:
    return scheduled(factory, stopping=stopping)


METHODS: dict[str, Method] = {
    "random": uniform,
    "random of the box": optuna_search("random", "full"),
    "qmc": optuna_search("qmc", "full"),
    "tpe": optuna_search("tpe", "full", TPE_TRIALS),
    "tpe budgets": optuna_search("tpe", "budgets", TPE_TRIALS),
    "tpe multivariate": optuna_search("tpe-multivariate", "full", TPE_TRIALS),
    "nsga2": optuna_search("nsga2", "full"),
    "nsga2 budgets": optuna_search("nsga2", "budgets"),
    "gp": optuna_search("gp", "full", GP_TRIALS),
    "surrogate": optuna_search("surrogate", "full", TPE_TRIALS),
    "surrogate budgets": optuna_search("surrogate", "budgets", 2 * TPE_TRIALS),
    "mo-asha 2": mo_asha(2),
    "mo-asha 4": mo_asha(4),
    "median": _rule(_median, "median"),
    "mo-asha rule 4": _rule(_halving, "mo-asha"),
    "frontier": frontier(None),
    "frontier transfer": frontier(1.0),
    "frontier misled": frontier(-1.0),
}


def shares_of(method: str) -> float:
    """What a search of a method may spend, as a share of the whole table's compute."""
    return _LESS.get(method, 1.0)
