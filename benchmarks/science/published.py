"""The papers' regression at the settings of `tests/data/mlp_curves.json`, against their own runs.

Each run there was made with the authors' layers; ours has the same structure, width and steps.
The random target differs, so each loss is divided by the dense loss at width 128 of its own set.
Ratios below 1 mean that ours is lower.

    python -m benchmarks.science.published [--seeds 3] [--processes 2] [--folder FOLDER]
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import mean, median
from typing import Any

from benchmarks.reporting import report
from benchmarks.science.studies import options_of_runs, parsed
from nas.designs.theta import DENSE, Theta
from nas.planning.recipe import REGRESSION, with_overrides
from nas.planning.runs import plan_of_steps
from nas.study.runs import StudyRun, run_all
from nas.tasks.regression import load_regression
from nas.training.run import Execution

_GOLDEN = Path(__file__).parents[2] / "tests" / "data" / "mlp_curves.json"
#: The settings stated in that file.
_SETTINGS = {
    "pool": 524_288, "batch": 1024, "lr": 1e-3, "clip": 0.0, "warmup_steps": 0,
    "schedule": "cosine", "validation_samples": 8192, "evaluations": 4,
}  # fmt: skip
_STEPS = 1500
#: Where the order of the structures is compared, the papers' forward MACs of one sample.
_MACS = 173_000


def _theta(text: str | None) -> Theta:
    return DENSE if text is None else Theta.parse(text.strip("()").replace("|", ","))


def run_published(seeds: int, processes: int, folder: Path) -> dict[str, Any]:
    """Train every published run `seeds` times and compare."""
    golden = json.loads(_GOLDEN.read_text())["runs"]
    losses: dict[tuple[str, int], list[float]] = {}
    jobs, data = [], []
    for seed in range(seeds):
        recipe = with_overrides(REGRESSION, {**_SETTINGS, "data_seed": seed})
        data.append(load_regression(recipe, None))
        for g in golden:
            plan = plan_of_steps(recipe, _theta(g["theta"]), g["width"], _STEPS)
            jobs.append(StudyRun.of(data[-1], plan, seed, g["name"]))
    records = {
        r["key"]: r for r in run_all(jobs, data, folder, processes=processes, execution=Execution())
    }
    for job in jobs:
        final = records[job.key]["points"][-1]["loss"]
        losses.setdefault((job.name, job.plan.width), []).append(final)
    return _compare(golden, losses)


def _compare(
    golden: list[dict[str, Any]], losses: dict[tuple[str, int], list[float]]
) -> dict[str, Any]:
    theirs = {(g["name"], g["width"]): g["curve"][-1]["test_mse"] for g in golden}
    own_base, their_base = losses["dense", 128], theirs["dense", 128]
    rows = []
    for (name, width), ours in losses.items():
        relative = mean(loss / base for loss, base in zip(ours, own_base, strict=True))
        published = theirs[name, width] / their_base
        rows.append(
            {
                "structure": name, "width": width, "mse": mean(ours),
                "over_dense_128": relative, "published": published,
                "ratio": relative / published,
            }
        )  # fmt: skip
    at = {(r["structure"], r["width"]): r["over_dense_128"] for r in rows}
    macs = {(g["name"], g["width"]): g["forward_macs_per_sample"] for g in golden}
    low, high = macs["dense", 64], macs["dense", 128]
    share = math.log(_MACS / low) / math.log(high / low)
    dense = at["dense", 64] ** (1 - share) * at["dense", 128] ** share
    order = {
        "btt1": at["btt1", 256], "g1": at["g1", 256], "dense, interpolated": dense,
        "kronecker": at["tt1", 256], "low-rank": at["l2", 256],
    }  # fmt: skip
    ratios = [r["ratio"] for r in rows]
    return {
        "rows": rows,
        "worst_ratio": max(ratios),
        "median_ratio": median(ratios),
        "order_at_173k_macs": order,
        "order_is_published": list(order.values()) == sorted(order.values()),
        "seeds": len(own_base),
    }


def main() -> None:
    options = parsed(options_of_runs(__doc__, seeds=3))
    result = run_published(options.seeds, options.processes, options.folder)
    report("Test MSE over that of dense, width 128, beside the published", result.pop("rows"))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
