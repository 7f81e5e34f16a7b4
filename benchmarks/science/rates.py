"""Learning-rate transfer: is the best rate of a narrow model that of a wide one?

An MLP learns the papers' regression at two widths with learning rates a factor of two apart.

    python -m benchmarks.science.rates [--widths 128 512] [--seeds 2] [--processes 2]
        [--folder FOLDER]
"""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import mean
from typing import Any

from benchmarks.reporting import report
from benchmarks.science.studies import options_of_runs, parsed
from nas.designs.taxonomy import parse_theta
from nas.planning.recipe import REGRESSION
from nas.planning.runs import plan_of_steps
from nas.study.runs import StudyRun, run_all
from nas.tasks import load_data
from nas.training.run import Execution

STRUCTURES = ("dense", "monarch", "btt:rho=1/4", "low-rank:rho=1/2")
RATES = tuple(1e-3 * 2**k for k in range(6))
_STEPS = 300
_RECIPE = replace(
    REGRESSION, batch=256, schedule="cosine", warmup_steps=30, evaluations=1, pool=65_536
)


def main() -> None:
    parser = options_of_runs(__doc__, seeds=2)
    parser.add_argument("--widths", type=int, nargs=2, default=[128, 512])
    options = parsed(parser)
    data = [load_data(replace(_RECIPE, lr=rate)) for rate in RATES]
    jobs = {}
    for structure in STRUCTURES:
        for width in options.widths:
            for d in data:
                plan = plan_of_steps(d.recipe, parse_theta(structure), width, _STEPS)
                jobs[structure, width, d.recipe.lr] = [
                    StudyRun.of(d, plan, seed) for seed in range(options.seeds)
                ]
    flat = [run for runs in jobs.values() for run in runs]
    records = {
        r["key"]: r
        for r in run_all(
            flat, data, options.folder, processes=options.processes, execution=Execution()
        )
    }

    def loss(runs: list[StudyRun]) -> float:
        """Mean over seeds; infinite where one failed, for such a rate is no choice."""
        found = [records[r.key] for r in runs]
        return mean(math.inf if r["failure"] else r["points"][-1]["loss"] for r in found)

    rows: list[dict[str, Any]] = []
    for structure in STRUCTURES:
        best = []
        for width in options.widths:
            losses = {rate: loss(jobs[structure, width, rate]) for rate in RATES}
            best.append(min(losses, key=lambda rate: losses[rate]))
            shown = {f"lr {rate:g}": value for rate, value in losses.items()}
            steps = abs(round(math.log2(best[-1] / best[0])))
            rows.append(
                {"structure": structure, "width": width} | shown
                | {"best": best[-1], "factor_2_steps_apart": steps}
            )  # fmt: skip
    report("Validation loss by learning rate", rows)


if __name__ == "__main__":
    main()
