"""Two live searches of one total budget: the default, and random candidates trained to their end.

    python -m benchmarks.search.live [--task text] [--train-flops 2e10] [--total 1.2e12]

Both run through the service, one after the other, in a database of their own, and begin with
nothing.  What is compared is the front of structured runs against train FLOPs.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.reporting import report
from benchmarks.search.figure import write_page
from nas.analysis.style import figure_layout, log_axis
from nas.cli.local import Local
from nas.records.answers import Answer, FrontierAnswer
from nas.store import Store, upgrade

#: Shares of a run's budget at which the fronts are told.
_SHARES = {"1/16": 1 / 16, "1/8": 1 / 8, "1/4": 1 / 4, "1/2": 1 / 2, "the budget": 1.0}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run both, print what they found, and draw it where asked to."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.search.live", description=__doc__)
    parser.add_argument("--task", default="text")
    parser.add_argument("--train-flops", type=float, default=2e10)
    parser.add_argument("--total", type=float, default=1.2e12)
    parser.add_argument("--overrides", type=json.loads, default={}, help="of the recipe, as JSON")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    common = {
        "task": given.task, "train_flops": given.train_flops, "references": 3,
        "overrides": given.overrides or None, "warm_start": "none",
    }  # fmt: skip
    ways: dict[str, dict[str, Any]] = {
        "default": {"total_train_flops": given.total},
        "random, all to their end": {
            "sampler": "random", "stopping": "none", "trials": 1000,
            "limits": {"total_train_flops": given.total},
        },
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as home:
        os.environ["EINSUM_NAS_HOME"] = home
        url = f"sqlite:///{home}/searches.db"
        os.environ["EINSUM_NAS_DATABASE_URL"] = url
        upgrade(url)
        local, rows, fronts = Local(Store(url)), [], {}
        for name, fields in ways.items():
            began = time.perf_counter()
            search = local.search(**{**common, **fields}).wait()
            seconds = time.perf_counter() - began
            fronts[name] = search.frontier()
            rows.append(_row(name, search.data, fronts[name], search.best(), seconds))
    report(f"{given.task}, {given.total:.3g} train FLOPs a search", rows)
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
        write_page(given.out / "live.html", [_figure(given.task, fronts)])
        told = {"rows": rows, "fronts": {n: f.model_dump(mode="json") for n, f in fronts.items()}}
        (given.out / "live.json").write_text(json.dumps(told) + "\n", encoding="utf-8")


def _row(
    name: str, search: dict[str, Any], front: FrontierAnswer, best: Answer, seconds: float
) -> dict[str, Any]:
    counts, budget = search["trial_counts"], search["request"]["train_flops"]
    interval = "–" if best.interval is None else "{:.4f} to {:.4f}".format(*best.interval)
    return {
        "search": name,
        **{state: counts.get(state, 0) for state in ("complete", "stopped", "failed")},
        "seconds": seconds,
        **{f"front at {told}": lowest(front, share * budget) for told, share in _SHARES.items()},
        "best": best.name,
        "width": best.width,
        "loss": best.expected_loss,
        "interval": interval,
        "not told apart": len(best.indistinguishable),
    }


def lowest(front: FrontierAnswer, train_flops: float) -> float | None:
    """The least loss of structured runs up to so many train FLOPs, and 2% more: runs of one budget
    end within a step of it."""
    return min(
        (p.loss for p in front.structured if p.train_flops <= 1.02 * train_flops), default=None
    )


def _figure(task: str, fronts: dict[str, FrontierAnswer]) -> dict[str, Any]:
    traces: list[dict[str, Any]] = [
        {
            "x": [p.train_flops for p in front.structured],
            "y": [p.loss for p in front.structured],
            "text": [f"{p.name}, width {p.width}" for p in front.structured],
            "name": name, "mode": "lines+markers", "line": {"shape": "hv"},
        }
        for name, front in fronts.items()
    ]  # fmt: skip
    y = {"title": {"text": next(iter(fronts.values())).y_unit}, "type": "log"}
    title = f"{task}: fronts of structured runs, the same total budget"
    return {
        "data": traces,
        "layout": figure_layout(title, log_axis("train FLOPs of a run"), y, height=520),
    }


if __name__ == "__main__":
    main()
