"""How a search divides a budget for the whole of itself: exploring, racing and confirming.

*Confirming.*  An answer is a comparison over fresh seeds.  Its interval needs a variance, so two
seeds at the least, of two candidates (what is second best?) and of dense (what is saved?): six
runs.  With R runs of a arms the half-width of a difference is t √(2a/R) s, s being the noise of a
seed.  t, with a (R/a - 1) degrees of freedom, is 3.2 for 3 × 2 runs, 2.4 for 3 × 3 and 2.2 for
3 × 5.  More arms find a best that exploring had ranked lower, more seeds tell smaller differences;
there are as many arms as seeds, and at least three.

A share f of a budget of N runs gives R = f N, and narrows the interval like f^(-1/2).  What it
takes from exploring is the expected best of K candidates, σ √(2 ln K) for a spread σ between them,
which falls by σ f / √(2 ln K).  Equal at the margin:

    f = (t √6 (s/σ) √(2 ln K) / (2 √N))^(2/3),

0.24 of 50 runs, 0.15 of 200.  Half of the budget is the most, above the least of six runs.

*Racing.*  What is confirmed must have reached its end, so there must be as many whole runs left as
candidates will be confirmed.  *Exploring* has the rest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from nas.planning.request import MAX_TRIALS

#: Candidates and seeds, and so runs with those of dense, that are confirmed at the least.
LEAST_CANDIDATES, LEAST_SEEDS = 2, 2
LEAST_RUNS = (LEAST_CANDIDATES + 1) * LEAST_SEEDS
#: t of a difference between three arms of five seeds.
_T = 2.2
#: Noise of a seed over the spread between candidates.
_NOISE = 0.1
#: √(2 ln K) for 90 candidates; 2.4 for 20 and 3.7 for 1,000.
_EXPECTED_BEST = 3.0
_SHARE = (_T * math.sqrt(6) * _NOISE * _EXPECTED_BEST / 2) ** (2 / 3)


def confirming_share(runs: float) -> float:
    """Share of a budget of `runs` whole runs that is kept for confirming, before the least."""
    return min(0.5, _SHARE * runs ** (-1 / 3)) if runs > 0 else 0.0


def arms_and_seeds(runs: int, most: int) -> tuple[int, int]:
    """How many runs are confirmed, dense among them, and with how many seeds each.

    Parameters
    ----------
    runs
        Fresh runs that can be paid for.
    most
        Runs that there are to confirm.

    Returns
    -------
    (arms, seeds)
        arms × seeds ≤ runs; (0, 0) where they pay for nothing to compare.
    """
    arms = min(most, max(LEAST_CANDIDATES + 1, math.isqrt(max(runs, 0))))
    arms = min(arms, runs // LEAST_SEEDS)
    return (arms, runs // arms) if arms >= min(most, 2) > 0 else (0, 0)


@dataclass(frozen=True, slots=True)
class Division:
    """The parts of a total budget, in its unit."""

    #: what the dense references take
    references: float
    #: what trains candidates, to their first evaluations or beyond: all but references and
    #: confirming
    exploring: float
    #: what trains the confirmed candidates to their end: part of `exploring`
    racing: float
    confirming: float
    #: that are confirmed beside the best dense run, and fresh seeds of each, if nothing is left
    candidates: int
    seeds: int


def divide(total: float, references: float, run: float, replicates: int) -> Division:
    """The parts of a total budget.

    Parameters
    ----------
    total, references
        The budget, and what of it the dense references take.
    run
        The most that one run takes, in the same unit.
    replicates
        Runs of each candidate; each confirmation is one.
    """
    each, free = run * replicates, max(0.0, total - references)
    kept = min(free, max(LEAST_RUNS * run, confirming_share(free / each) * free))
    arms, seeds = arms_and_seeds(int(kept / run * (1 + 1e-9)), MAX_TRIALS)
    # two thirds of what is left at the most: some must be seen that are not trained on
    most = max(1, int(2 / 3 * (free - kept) / each * (1 + 1e-9)))
    candidates = min(max(arms - 1, 1), most)
    exploring = free - kept
    racing = min(exploring, candidates * each)
    return Division(references, exploring, racing, kept, candidates, seeds)
