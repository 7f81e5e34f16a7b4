"""A small table of EinBench with made-up curves, whose best at every budget is known."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nas.einbench.table
from nas.designs.design import parse_design
from nas.einbench import EinBench
from nas.einbench.files import write_table
from nas.planning.recipe import REGRESSION, Recipe, with_overrides
from nas.planning.runs import plan_of_steps
from nas.service.published import table_of

RECIPE: Recipe = with_overrides(REGRESSION, {"batch": 128, "min_steps": 60})
BUDGET, STEPS = 1e11, (100, 200, 400)
#: Design → loss at the last step of width 32, of its first seed.
LOSSES = {"dense": 0.5, "monarch": 0.4, "low-rank:rho=1/2": 0.6, "kronecker": 0.7}
DEVICE = "cpu Made-up, 1 thread, float32"


def write_small(folder: Path) -> EinBench:
    """The table in a folder: four designs at two widths, three seeds that differ by 1%."""
    rows: list[dict[str, Any]] = []
    for text, loss in LOSSES.items():
        for width in (32, 64):
            plan = plan_of_steps(RECIPE, parse_design(text), width, STEPS[-1])
            for seed in range(3):
                own = loss * (32 / width) ** 0.1 * 1.01**seed
                losses = [own * (STEPS[-1] / step) ** 0.3 for step in STEPS]
                rows.append({
                    "design": plan.design.text, "name": plan.design.name,
                    "family": plan.design.family, "dense": plan.dense, "width": width,
                    "structures": list(plan.structures), "seed": seed, "params": plan.params,
                    "forward_flops_per_token": plan.forward_flops_per_token,
                    "train_flops_per_step": plan.train_flops_per_step, "steps": list(STEPS),
                    "loss": losses, "loss_stderr": [0.01] * 3,
                    "seconds": [step / 100 for step in STEPS], "seconds_per_step": 0.01,
                    "peak_memory_bytes": 1000 * width, "trained_together": 3, "device": DEVICE,
                    "torch": "2.9",
                })  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    about = {
        "task": "regression", "task_fingerprint": "published-1", "recipe": RECIPE.as_dict(),
        "train_flops": BUDGET, "einsum_nas": "0.2.0", "date": "2026-11-29",
    }  # fmt: skip
    write_table(folder / "regression.parquet", rows, about)
    return EinBench("regression", folder)


@contextmanager
def small_table(folder: Path) -> Iterator[EinBench]:
    """The table, written to a folder, in the place of those that come with the package."""
    written, packaged = write_small(folder), nas.einbench.table.PACKAGED
    nas.einbench.table.PACKAGED = folder
    table_of.cache_clear()
    try:
        yield written
    finally:
        nas.einbench.table.PACKAGED = packaged
        table_of.cache_clear()
