"""Tables of outcomes: methods, ratios between them, and answers held against the truth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np

from benchmarks.search.experiment import GRID, TARGETS, Outcome
from benchmarks.search.measures import Middle, middle, ratio, share_interval
from benchmarks.search.methods import OPTUNA

#: What ratios are told of, unless another is asked for.
TARGET = 0.99
#: Shares of the whole table's compute at which hypervolume and regret are told.
_AT = (0.01, 0.1)

Outcomes = Mapping[str, Sequence[Outcome]]


def finite(value: float) -> float | None:
    """For JSON and tables, which have no ∞."""
    return value if math.isfinite(value) else None


def method_row(name: str, outcomes: Sequence[Outcome], budget: float) -> dict[str, Any]:
    """What a method found over its seeds; compute in whole runs.

    A median that lies beyond what was simulated is None, and `reached` says how many came so far.
    """
    row: dict[str, Any] = {"method": name, "searches": len(outcomes)}
    row["begun"] = median(o.begun for o in outcomes)
    for at in _AT:
        place = int(np.argmin(np.abs(GRID - at)))
        row[f"hypervolume at {at:.0%}"] = median(float(o.hypervolume[place]) for o in outcomes)
        row[f"regret at {at:.0%}"] = finite(median(float(o.regret[place]) for o in outcomes))
    for target in TARGETS:
        reached = [o.compute_to[target] / budget for o in outcomes]
        found = middle(reached)
        row[f"runs to {target:.0%}"] = finite(found.value)
        row[f"low {target:.0%}"], row[f"high {target:.0%}"] = finite(found.low), finite(found.high)
        row[f"reached {target:.0%}"] = sum(map(math.isfinite, reached))
    row["cpu seconds"] = median(o.cpu_seconds for o in outcomes)
    return row


def stopping_row(name: str, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Truly optimal entries that a method began and did not train so far, and what it saved."""
    optimal = sum(o.optimal for o in outcomes)
    stopped, unfinished = sum(o.stopped for o in outcomes), sum(o.unfinished for o in outcomes)
    low, high = share_interval(stopped, optimal) if optimal else (None, None)
    return {
        "method": name,
        "optimal begun": optimal,
        "stopped": stopped / optimal if optimal else None,
        "stopped low": low,
        "stopped high": high,
        "unfinished": unfinished / optimal if optimal else None,
        "compute saved": median(o.saved for o in outcomes),
        "hypervolume kept": median(o.kept for o in outcomes),
    }


def better_optuna(outcomes: Outcomes, target: float) -> str | None:
    """The sampler and form of Optuna that comes to the target for the least median compute.

    Where medians are equal, as where none comes so far, the greater hypervolume at the end counts.
    """

    def order(name: str) -> tuple[float, float]:
        own = outcomes[name]
        reached = middle([o.compute_to[target] for o in own]).value
        return reached, -median(float(o.hypervolume[-1]) for o in own)

    return min((name for name in OPTUNA if name in outcomes), key=order, default=None)


def ratio_row(own: str, other: str, outcomes: Outcomes, target: float) -> dict[str, Any]:
    """Compute of one method over that of another, to the same target, in pairs of seeds."""
    seeds = {o.job.seed: o for o in outcomes[other]}
    pairs = [(o, seeds[o.job.seed]) for o in outcomes[own] if o.job.seed in seeds]
    found = Middle(math.nan, math.nan, math.nan)
    if pairs:
        most = max(o.train_flops for o in outcomes[other])
        found = ratio(
            [a.compute_to[target] for a, _ in pairs], [b.compute_to[target] for _, b in pairs], most
        )
    return {
        "method": own,
        "over": other,
        "target": f"{target:.0%}",
        "pairs": len(pairs),
        "ratio": finite(found.value),
        "low": finite(found.low),
        "high": finite(found.high),
        "other did not reach": sum(math.isinf(b.compute_to[target]) for _, b in pairs),
        "did not reach": sum(math.isinf(a.compute_to[target]) for a, _ in pairs),
    }


def answer_row(name: str, outcomes: Sequence[Outcome], whole: float) -> dict[str, Any]:
    """How often the answers of a method hold the true best, and how large their sets are."""
    told = [o.verdict for o in outcomes if o.verdict is not None]
    holds = sum(v.holds for v in told)
    low, high = share_interval(holds, len(outcomes))
    return {
        "method": name,
        "compute": f"{outcomes[0].job.share:.1%}",
        "whole runs": outcomes[0].job.share * whole,
        "searches": len(outcomes),
        "holds the best": holds / len(outcomes),
        "low": low,
        "high": high,
        "set size": median(v.size for v in told) if told else None,
        "most": max((v.size for v in told), default=None),
        "regret": median(v.regret for v in told) if told else None,
    }
