"""Timing two callables in turn, so that a drift of the machine's speed cancels in their ratio."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table


def ratio(one: Callable[[], object], other: Callable[[], object], repeats: int) -> dict[str, float]:
    """Seconds of both (medians) and the ratio one/other: median of pairs and their quartiles."""
    one(), other()
    pairs = np.array([[_seconds(one), _seconds(other)] for _ in range(repeats)])
    ratios = pairs[:, 0] / pairs[:, 1]
    low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    return {
        "seconds": float(np.median(pairs[:, 0])),
        "other_seconds": float(np.median(pairs[:, 1])),
        "ratio": float(middle),
        "ratio_low": float(low),
        "ratio_high": float(high),
    }


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def report(title: str, rows: list[dict[str, Any]]) -> None:
    """A table for people, then the same as JSON."""
    table = Table(title=title, title_justify="left")
    for column in rows[0]:
        table.add_column(column.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    Console(width=140).print(table)
    print(json.dumps({"title": title, "rows": rows}))
