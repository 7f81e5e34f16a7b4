"""Student's t intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Interval = tuple[float, float]

CONFIDENCE = 0.95


def half_width(values: NDArray[np.float64], tests: int = 1) -> float:
    """Half the 95% t interval of a mean; infinite for a single value, which shows no spread.

    `tests` intervals hold together (Bonferroni).
    """
    if len(values) < 2:
        return math.inf
    spread = float(values.std(ddof=1)) / math.sqrt(len(values))
    return t_quantile(len(values) - 1, tests) * spread


@lru_cache(maxsize=1024)
def t_quantile(degrees: int, tests: int = 1) -> float:
    """Of Student's t, such that `tests` two-sided intervals together hold at 95% (Bonferroni)."""
    from scipy.special import stdtrit  # which takes long to import; a run alone needs none

    tail = (1 - CONFIDENCE) / (2 * max(1, tests))
    return float(stdtrit(degrees, 1 - tail))


def t_interval(values: Sequence[float]) -> Interval | None:
    """95% interval of a mean with n - 1 degrees of freedom; None for fewer than two values."""
    if len(values) < 2:
        return None
    array = np.asarray(values, dtype=np.float64)
    mean, half = float(array.mean()), half_width(array)
    return mean - half, mean + half


def around(loss: float, log_ratio: float, below: float, above: float) -> Interval:
    """Interval of (another loss − `loss`) from one of the logarithm of their ratio.

    Kept finite: few degrees of freedom give intervals beyond any float.
    """
    low, high = max(log_ratio - below, -_MOST), min(log_ratio + above, _MOST)
    return loss * math.expm1(low), loss * math.expm1(high)


_MOST = 600.0
