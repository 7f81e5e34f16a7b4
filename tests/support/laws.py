"""Curves drawn from known scaling laws, and whether fitted intervals hold the truth.

Each run has a level of its own (sd of its log 0.03), an exponent of its own (sd 2% of b, turned
round the middle of the range) and, where there is an offset, one of its own (sd 1%); points have
noise (sd of logs 0.01), and 5% of them are 30% too high.  A run has 12 points over three decades of
compute.  The offset is a share of the last loss; the loss is predicted at 3 times the last compute.
"""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np

from nas.analysis.laws import Curve, choose_law, fit_scaling_law

EXPONENTS = (0.1, 0.2, 0.35)


OFFSETS = (0.0, 0.3, 0.5)


RUNS = (3, 5, 20)


_FLOPS = np.geomspace(1e12, 1e15, 12)


_FURTHER = 3.0


#: One repetition in so many is also given to `choose_law`.
_CHOOSE_EVERY = 5


Case = tuple[float, float, int]


def truth(b: float, offset: float) -> dict[str, float]:
    """What the mean run has: the last loss is 1."""
    return {"b": b, "offset": offset, "loss": offset + (1.0 - offset) * _FURTHER**-b}


def draw(case: Case, rng: np.random.Generator) -> list[Curve]:
    """Runs of (b, offset, number of runs)."""
    b, offset, runs = case
    middle = math.sqrt(_FLOPS[0] * _FLOPS[-1])
    drawn = []
    for _ in range(runs):
        level = (1.0 - offset) * (_FLOPS[-1] / middle) ** b * math.exp(0.03 * rng.normal())
        own_b, own_offset = b * (1 + 0.02 * rng.normal()), offset * (1 + 0.01 * rng.normal())
        losses = own_offset + level * (_FLOPS / middle) ** -own_b
        losses *= np.exp(0.01 * rng.normal(size=len(_FLOPS)))
        losses[rng.random(len(_FLOPS)) < 0.05] *= 1.3
        drawn.append((_FLOPS, losses))
    return drawn


def repetition(job: tuple[int, int]) -> dict[str, Any]:
    """Estimates of one repetition of one case, and whether their intervals hold the truth."""
    index, number = job
    case = CASES[index]
    b, offset, _ = case
    runs = draw(case, np.random.default_rng([index, number]))
    law = fit_scaling_law(runs, offset=offset > 0)
    assert law is not None
    loss, interval = law.predict(_FURTHER * float(_FLOPS[-1]))
    found = {"b": (law.b, law.b_interval), "loss": (loss, interval)}
    if offset > 0:
        found["offset"] = (law.offset, law.offset_interval)
    known = truth(b, offset)
    result: dict[str, Any] = {}
    for name, (value, held) in found.items():
        assert held is not None
        result[name] = (value, held[1] - held[0], held[0] <= known[name] <= held[1])
    if number % _CHOOSE_EVERY == 0:
        chosen = choose_law(runs)
        assert chosen is not None
        result["chosen"] = chosen.offset > 0
    return result


CASES: tuple[Case, ...] = tuple(product(EXPONENTS, OFFSETS, RUNS))
