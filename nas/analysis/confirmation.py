"""Whether the ranking of the runs holds for fresh seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.special import ndtri
from scipy.stats import kendalltau

from nas.analysis.intervals import CONFIDENCE, Interval
from nas.store import ConfirmedPair

#: Fewest pairs of which an interval is given: its variance has n - 4 in the denominator.
MIN_PAIRS = 5
#: Variance of Fisher's z of Kendall's τ times (n - 4).
#: Source: Fieller, Hartley and Pearson, "Tests for rank correlation coefficients" (1957).
_VARIANCE = 0.437


@dataclass(frozen=True, slots=True)
class Confirmation:
    """Kendall's τ-b between the losses of runs and of their confirmations."""

    #: None for fewer than 2 pairs, or where all losses of one side are equal
    tau: float | None
    #: 95%; None below `MIN_PAIRS` pairs
    interval: Interval | None
    candidates: int
    #: fewest confirmations of one of them
    seeds: int
    #: compute of a confirmation over that of its run, the greatest
    longer: float


def rank_correlation(pairs: Sequence[ConfirmedPair]) -> Confirmation | None:
    """How well the ranking by the runs is that of their confirmations; None without any.

    A run that was confirmed at several lengths counts with its longest.
    """
    longest: dict[int, ConfirmedPair] = {}
    for pair in sorted(pairs, key=lambda p: p.longer):
        longest[pair.trial_id] = pair
    used = [p for _, p in sorted(longest.items())]
    if not used:
        return None
    tau = kendall_tau([p.proxy_loss for p in used], [p.confirmed_loss for p in used])
    return Confirmation(
        tau=tau,
        interval=None if tau is None else tau_interval(tau, len(used)),
        candidates=len(used),
        seeds=min(p.seeds for p in used),
        longer=max(p.longer for p in used),
    )


def kendall_tau(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Kendall's τ-b; None where it has no meaning."""
    if len(set(x)) < 2 or len(set(y)) < 2:
        return None
    tau = float(kendalltau(x, y).statistic)
    return tau if math.isfinite(tau) else None


def tau_interval(tau: float, n: int) -> Interval | None:
    """95% interval of Kendall's τ over n independent pairs; None below `MIN_PAIRS`."""
    if n < MIN_PAIRS:
        return None
    half = float(ndtri((1 + CONFIDENCE) / 2)) * math.sqrt(_VARIANCE / (n - 4))
    # τ of ±1 has an infinite z; the next pair could have been the other way round
    z = math.atanh(min(max(tau, -1 + 1 / n**2), 1 - 1 / n**2))
    return math.tanh(z - half), math.tanh(z + half) if tau < 1 else 1.0
