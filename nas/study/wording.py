"""Estimates and verdicts of a study in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nas.analysis.scaling import Estimate, Multiplier
from nas.errors import counted

Json = dict[str, Any]

REFERENCE = "ω = 0, ψ = 1"


def multiplier_text(m: Multiplier) -> str:
    n = len(m.by_seed)
    if m.value is not None:
        interval = list(m.interval) if m.interval else None
        return number({"value": m.value, "interval": interval, "by_seed": m.by_seed}, digits=2)
    censored = f"{m.censored} of {counted(n, 'seed')} censored"
    if m.least is not None:
        return f"≥ {m.least:.2f} ({censored})"
    if m.most is not None:
        return f"{'<' if m.censored == n else '≤'} {m.most:.2f} ({censored})"
    signs = {"exact": "", "at_least": "≥ ", "less_than": "< "}
    return ", ".join(f"{signs[b.kind]}{b.value:.2f}" for b in m.by_seed.values()) + f" ({censored})"


def verdict_of(ratio: Mapping[str, Any] | None) -> str:
    """worse | better | undecided (the interval has 1 inside, or is unknown) | unknown."""
    if ratio is None:
        return "unknown"
    if ratio["interval"] is None or ratio["interval"][0] <= 1 <= ratio["interval"][1]:
        return "undecided"
    return "worse" if ratio["interval"][0] > 1 else "better"


def verdict_text(ratio: Mapping[str, Any] | None, than: str) -> str:
    """The verdict as a sentence with its numbers."""
    if ratio is None:
        return f"not compared with {than}: no seed has both"
    start = {
        "worse": f"worse than {than}",
        "better": f"better than {than}",
        "undecided": f"cannot be told apart from {than}",
    }[verdict_of(ratio)]
    return f"{start}: loss × {number(ratio)}"


def number(e: Mapping[str, Any] | None, digits: int = 3) -> str:
    """A ratio and its interval: `1.230 (95% 1.180–1.290, 3 seeds)`."""
    if e is None:
        return "—"
    value, n = f"{e['value']:.{digits}f}", counted(len(e["by_seed"]), "seed")
    if e["interval"] is None:
        return f"{value} ({n}, interval unknown)"
    low, high = e["interval"]
    return f"{value} (95% {low:.{digits}f}–{high:.{digits}f}, {n})"


def plain(e: Mapping[str, Any] | None) -> str:
    """A loss or an exponent: four significant digits, and the interval."""
    if e is None:
        return "—"
    if e["interval"] is None:
        return f"{e['value']:.4g} (1 seed, interval unknown)"
    low, high = e["interval"]
    return f"{e['value']:.4g} (95% {low:.4g}–{high:.4g}, {counted(len(e['by_seed']), 'seed')})"


def flops(value: float) -> str:
    return f"{value:.3g} train FLOPs"


def estimate(e: Estimate | None) -> Json | None:
    if e is None:
        return None
    return {
        "value": e.value,
        "interval": list(e.interval) if e.interval else None,
        "by_seed": {str(k): v for k, v in sorted(e.by_seed.items())},
    }
