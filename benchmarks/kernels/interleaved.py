"""Timing contenders in turn, so that a drift of the machine's speed cancels in their ratios."""

from __future__ import annotations

import ctypes
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom


def keep_freed_memory() -> None:
    """Ask glibc not to return memory to the system while contenders are compared.

    Otherwise a contender pays for new pages or not by what was freed before it, and the medians
    compare the allocator's luck.  This is a control: a program that returns memory pays for new
    pages besides, and for more of them where more is allocated.
    """
    if platform.libc_ver()[0] == "glibc":
        libc, trim_threshold, mmap_max = ctypes.CDLL(None), -1, -4  # as malloc.h numbers them
        if not (libc.mallopt(trim_threshold, -1) and libc.mallopt(mmap_max, 0)):
            raise RuntimeError("glibc refused to keep freed memory")


def rounds(
    contenders: Mapping[str, Callable[[], tuple[float, ...]]],
    budget_seconds: float,
    least: int = 5,
    most: int = 25,
) -> dict[str, NDArray[np.float64]]:
    """Seconds of every contender in every round (rounds, parts).

    A contender returns the seconds of its parts.  Rounds end when the budget is spent, but not
    before `least` of them, and after `most`.  The first round, in which caches fill, is not kept,
    unless it alone took the whole budget.
    """
    started = time.perf_counter()
    kept = {name: [call()] for name, call in contenders.items()}
    if time.perf_counter() - started < budget_seconds:
        kept = {name: [] for name in contenders}
        started = time.perf_counter()
    while (done := len(next(iter(kept.values())))) < most:
        if done >= least and time.perf_counter() - started > budget_seconds:
            break
        for name, call in contenders.items():
            kept[name].append(call())
    return {name: np.array(times) for name, times in kept.items()}


def median_interval(values: NDArray[np.float64]) -> tuple[float, float, float]:
    """(median, low, high): order statistics that cover the median with 95 % or nearest to it.

    With fewer than six values they are the least and the greatest, which cover it with 94 % of
    five and 75 % of three.
    """
    ordered = np.sort(values)
    outside = int(binom.ppf(0.025, len(ordered), 0.5))
    outside = max(0, outside - 1) if binom.cdf(outside - 1, len(ordered), 0.5) > 0.025 else outside
    low, high = ordered[max(0, outside - 1)], ordered[min(len(ordered) - 1, len(ordered) - outside)]
    return float(np.median(ordered)), float(low), float(high)


def ratio(one: Callable[[], object], other: Callable[[], object], repeats: int) -> dict[str, float]:
    """Seconds of both (medians) and the ratio one/other: median of pairs with its interval."""
    timed = rounds({"one": _timed(one), "other": _timed(other)}, 0.0, repeats, repeats)
    middle, low, high = median_interval((timed["one"] / timed["other"])[:, 0])
    return {
        "seconds": float(np.median(timed["one"])),
        "other_seconds": float(np.median(timed["other"])),
        "ratio": middle,
        "ratio_low": low,
        "ratio_high": high,
    }


def _timed(call: Callable[[], object]) -> Callable[[], tuple[float]]:
    def run() -> tuple[float]:
        started = time.perf_counter()
        call()
        return (time.perf_counter() - started,)

    return run


def add_ratios(
    row: dict[str, Any],
    seconds: Mapping[str, NDArray[np.float64]],
    pairs: Iterable[tuple[str, str]],
) -> None:
    """Put `ONE_over_OTHER` of each pair of contenders into a row, with its _low and _high."""
    for one, other in pairs:
        key = f"{one}_over_{other}"
        row[key], row[f"{key}_low"], row[f"{key}_high"] = median_interval(
            seconds[one] / seconds[other]
        )


def with_interval(row: Mapping[str, Any], key: str) -> str:
    """A ratio of `add_ratios` for people."""
    return f"{row[key]:.2f} ({row[f'{key}_low']:.2f}–{row[f'{key}_high']:.2f})"
