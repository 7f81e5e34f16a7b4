"""Whether the ranking of the runs holds for fresh seeds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from nas.analysis.intervals import Interval, t_quantile
from nas.records.answers import RankCorrelation
from nas.store import ConfirmedPair

#: Fewest pairs of which an interval is given: its variance has n - 4 in the denominator.
MIN_PAIRS = 5
#: Variance of Fisher's z of Kendall's τ times (n - 4).
#: Source: Fieller, Hartley and Pearson, "Tests for rank correlation coefficients" (1957).
_VARIANCE = 0.437
#: Budgets within this factor are one.
_SAME_BUDGET = 1.05


def rank_correlation(pairs: Sequence[ConfirmedPair]) -> RankCorrelation | None:
    """How well the ranking by the runs is that of their confirmations; None without any.

    Only runs of one search at one budget are ranked against each other: more compute gives a lower
    loss in both, which is no skill.  Of several such groups the largest is taken, of equal ones the
    newest.  A run that was confirmed at several lengths counts with its longest.
    """
    longest: dict[int, ConfirmedPair] = {}
    for pair in sorted(pairs, key=lambda p: p.longer):
        longest[pair.trial_id] = pair
    groups = _at_one_budget(longest.values())
    used = max(groups, key=lambda g: (len(g), g[0].trial_id), default=[])
    if not used:
        return None
    proxy, confirmed = [p.proxy_loss for p in used], [p.confirmed_loss for p in used]
    tau = kendall_tau(proxy, confirmed)
    return RankCorrelation(
        tau=tau,
        interval=None if tau is None else tau_interval(proxy, confirmed),
        candidates=len(used),
        seeds=min(p.seeds for p in used),
        longer=max(p.longer for p in used),
    )


def _at_one_budget(pairs: Iterable[ConfirmedPair]) -> list[list[ConfirmedPair]]:
    """Pairs of one search, confirmed at one length, whose budgets differ by the steps that do not
    fill them alone."""
    groups: list[list[ConfirmedPair]] = []
    order = sorted(pairs, key=lambda p: (p.search_id, p.longer, p.train_flops, p.trial_id))
    for pair in order:
        first = groups[-1][0] if groups else None
        same = (
            first is not None
            and (first.search_id, round(first.longer, 2)) == (pair.search_id, round(pair.longer, 2))
            and pair.train_flops <= first.train_flops * _SAME_BUDGET
        )
        if same:
            groups[-1].append(pair)
        else:
            groups.append([pair])
    return [sorted(g, key=lambda p: p.trial_id) for g in groups]


def kendall_tau(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Kendall's τ-b; None where it has no meaning."""
    if len(set(x)) < 2 or len(set(y)) < 2:
        return None
    # takes half a second to import, which every command would pay
    from scipy.stats import kendalltau

    tau = float(kendalltau(x, y).statistic)
    return round(tau, 12) if math.isfinite(tau) else None  # 1 - 2e-16 is 1


def tau_interval(x: Sequence[float], y: Sequence[float]) -> Interval | None:
    """95% interval of Kendall's τ; None below `MIN_PAIRS` pairs.

    On Fisher's z with Student's t, and the larger of two standard errors: Fieller's, which is too
    small for strong correlations, and the delete-one jackknife's, which is too small for few pairs.

    Parameters
    ----------
    x, y
        Pairs (n,); τ has a meaning for them.
    """
    n = len(x)
    if n < MIN_PAIRS:
        return None
    signs = np.sign(np.subtract.outer(x, x)) * np.sign(np.subtract.outer(y, y))
    without = (signs.sum() - 2 * signs.sum(axis=1)) / ((n - 1) * (n - 2))
    error = math.sqrt((n - 1) / n * float(((without - without.mean()) ** 2).sum()))
    # τ of ±1 has an infinite z: its interval begins at the next value that τ can have
    step = 4 / (n * (n - 1))
    tau = float(signs.sum()) / (n * (n - 1))
    inside = min(max(tau, step - 1), 1 - step)
    half = t_quantile(n - 2) * max(math.sqrt(_VARIANCE / (n - 4)), error / (1 - inside**2))
    z = math.atanh(inside)
    low, high = math.tanh(z - half), math.tanh(z + half)
    return (-1.0 if tau <= step - 1 else low), (1.0 if tau >= 1 - step else high)
