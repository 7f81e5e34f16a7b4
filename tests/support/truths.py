"""Stores of made-up runs whose best structure at every budget is known.

Each store has structures at several widths with several seeds.  The loss of a structure of width w
after C train FLOPs is, in truth,

    L(C, w) = E + A · N(w)^-alpha + B · (C / N(w))^-beta,  N(w) in proportion to a step's FLOPs,

with its own A, B and offset; a run's losses are that times a factor of its own (seed noise) and one
of every evaluation.  At a budget, the truth of a structure is the least over its widths.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nas.designs.theta import DENSE, Theta
from nas.errors import NotFound
from nas.planning.cost import train_flops_per_step
from nas.planning.recipe import TEXT
from nas.records.answers import Answer
from nas.service.answers import get_best
from tests.support.planting import PlantedRun, open_store, plant, stand

STRUCTURES, SEEDS, EVALUATIONS = 20, 5, 12


WIDTHS = (16, 48, 112, 256)


#: Standard deviations of the logarithm of a loss: from seed to seed, and of an evaluation.
SEED_NOISE, POINT_NOISE = 0.01, 0.002


BUDGET = 1e12


#: Budgets asked for: within the data from here to `BUDGET`, and beyond it up to this factor.
LEAST, BEYOND = 0.05, 30.0


@dataclass(frozen=True)
class Truth:
    """One planted structure."""

    theta: Theta
    offset: float
    a: float
    b: float

    def params(self, width: int) -> int:
        """Those that a dense model would have, which uses each once for a token."""
        return self.flops_per_step(width) // (6 * TEXT.tokens_per_step)

    def flops_per_step(self, width: int) -> int:
        return train_flops_per_step(TEXT, self.theta, width)

    def loss(self, flops: float, width: int) -> float:
        """At a width."""
        n = self.params(width)
        return float(self.offset + self.a * n**-0.2 + self.b * (flops / n) ** -0.3)

    def best(self, flops: float) -> float:
        """At the width that is best for it."""
        return min(self.loss(flops, w) for w in WIDTHS)


def draw_truths(rng: np.random.Generator) -> list[Truth]:
    """Structures whose constants differ by some per cent, dense among them."""
    found = []
    for i in range(STRUCTURES):
        if i == 0:
            theta = DENSE
        else:
            alpha, epsilon = rng.uniform(0.4, 0.9, 2)  # so that none costs more than dense
            theta = Theta(alpha, 0, 1 - alpha, 0, epsilon, 1 - epsilon, rng.uniform(0, 0.1))
        found.append(
            Truth(
                theta=theta,
                offset=float(rng.uniform(0.9, 1.1)),
                a=float(8 * np.exp(rng.normal(0, 0.1))),
                b=float(60 * np.exp(rng.normal(0, 0.15))),
            )
        )
    return found


def draw_runs(truths: list[Truth], rng: np.random.Generator) -> list[PlantedRun]:
    """Every structure at every width with every seed, each up to the budget."""
    runs = []
    for truth in truths:
        for width in WIDTHS:
            per_step = truth.flops_per_step(width)
            last = int(BUDGET // per_step)
            steps = sorted({round(last / math.sqrt(2) ** i) for i in range(EVALUATIONS)} - {0})
            for seed in range(SEEDS):
                own = rng.normal(0, SEED_NOISE)
                losses = [
                    truth.loss(s * per_step, width) * math.exp(own + rng.normal(0, POINT_NOISE))
                    for s in steps
                ]
                curve = list(zip(steps, losses, strict=True))
                runs.append(
                    PlantedRun(truth.theta, width, seed, per_step, truth.params(width), curve)
                )
    return runs


def judge(answer: Answer, truths: list[Truth], budget: float) -> dict[str, Any]:
    """One answer against the truth."""
    by_theta = {t.theta.canonical().values: t for t in truths}
    best = min(truths, key=lambda t: t.best(budget))

    def of(theta: list[float]) -> Truth:
        return by_theta[Theta(*theta).canonical().values]

    chosen = [(of(answer.theta), answer.width)]
    chosen += [(of(r.theta), r.width) for r in answer.indistinguishable]
    top = chosen[0][0].loss(budget, chosen[0][1])
    interval = answer.interval
    return {
        "held": any(t is best for t, _ in chosen),
        "won": chosen[0][0] is best,
        "size": len(chosen),
        "worst": max(t.loss(budget, w) / best.best(budget) for t, w in chosen),
        "regret": top / best.best(budget),
        "covered": None if interval is None else interval[0] <= top <= interval[1],
        "error": answer.expected_loss / top - 1,
    }


def run_store(seed: int, budgets: int) -> dict[str, list[dict[str, Any]]]:
    """Every question to one store, and how each was answered."""
    rng = np.random.default_rng(seed)
    truths = draw_truths(rng)
    found: dict[str, list[dict[str, Any]]] = {"measured": [], "predicted": [], "mislabelled": []}
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(f"sqlite:///{Path(folder) / 'planted.db'}")
        endless = {"max_steps": 1 << 30}  # what is refused for its length is tested for itself
        runs = draw_runs(truths, rng)
        plant(store, runs, fingerprint="planted", budget=BUDGET, overrides=endless)
        stand(store)
        inside = np.exp(rng.uniform(math.log(LEAST * BUDGET), math.log(BUDGET), budgets))
        outside = BUDGET * np.exp(rng.uniform(math.log(1.1), math.log(BEYOND), budgets // 10))
        for budget in [*inside.tolist(), *outside.tolist()]:
            answer = get_best(store, task="text@planted", train_flops=budget)
            kind = "measured" if budget <= BUDGET else "predicted"
            if answer.kind != kind or (answer.extrapolation is None) != (kind == "measured"):
                found["mislabelled"].append({"budget": budget})
            found[kind].append(judge(answer, truths, budget))
        try:
            get_best(store, task="text@planted", train_flops=1.0)
            found["mislabelled"].append({"budget": 1.0})
        except NotFound:
            pass
        store.close()
    return found
