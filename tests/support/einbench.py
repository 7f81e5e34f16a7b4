"""A small table of EinBench with invented curves, and the store that it would be written from."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.einbench.collect import SEEDS, Part
from nas.designs.design import parse_design
from nas.einbench.files import write_table
from nas.planning.runs import RunPlan, given_plan, references
from nas.store import Leases, MeasuredCost, Store, StoredPoint, TrialDraft
from nas.training.run import evaluation_steps

PART = Part(
    "images", 5e8, (32, 64), 12, dense=3,
    overrides={
        "batch": 16, "evaluations": 6, "validation_samples": 64, "min_steps": 16, "warmup_steps": 4,
    },
)  # fmt: skip
ABOUT: dict[str, Any] = {
    "title": "a test", "task": PART.task, "task_fingerprint": "f1", "licence": "none",
    "recipe": PART.recipe.as_dict(), "train_flops": PART.train_flops, "missing": [],
    "date": "2026-01-01", "loss_unit": PART.recipe.loss_unit,
}  # fmt: skip
ENVIRONMENT = {
    "device": "cpu", "device_name": "a test", "threads": 1, "replicates": SEEDS, "torch": "0",
    "execution_plans": {"a": "stacked"},
}  # fmt: skip


@cache
def plans() -> tuple[RunPlan, ...]:
    """Of every entry of `PART`, dense among them once a width."""
    found = [*references(PART.recipe, PART.train_flops, PART.dense)]
    for request in PART.requests():
        for c in request.candidates or ():
            design = parse_design(c.design)
            found.append(given_plan(PART.recipe, design, c.width, PART.train_flops))
    return tuple({(p.width, p.structures): p for p in found}.values())


def points(plan: RunPlan, seed: int) -> Iterator[StoredPoint]:
    """A curve that no two runs share: a power law with noise."""
    draw = np.random.default_rng([seed, plan.params, plan.train_flops_per_step])
    floor, seconds = draw.uniform(0.1, 0.5), draw.uniform(1e-4, 1e-3)
    for step in evaluation_steps(plan, PART.recipe):
        flops = step * plan.train_flops_per_step
        loss = (floor + (flops / 1e6) ** -0.3) * math.exp(0.05 * draw.normal())
        yield StoredPoint(step, float(flops), loss, 0.1 * loss, step * seconds)


def row(plan: RunPlan, seed: int) -> dict[str, Any]:
    """The row of a run, as the table holds it."""
    found = list(points(plan, seed))
    return {
        "design": plan.design.text, "name": plan.name, "family": plan.design.family,
        "dense": plan.dense, "width": plan.width, "structures": list(plan.structures),
        "seed": seed, "params": plan.params,
        "forward_flops_per_token": plan.forward_flops_per_token,
        "train_flops_per_step": plan.train_flops_per_step, "steps": [p.step for p in found],
        "loss": [p.loss for p in found], "loss_stderr": [p.loss_stderr for p in found],
        "seconds": [p.train_seconds for p in found], "seconds_per_step": 0.5 + seed,
        "peak_memory_bytes": 1000 + seed, "trained_together": SEEDS,
        "device": "cpu a test, 1 thread, float32", "execution_plans": '{"a": "stacked"}',
        "torch": "0",
    }  # fmt: skip


def small_table(folder: Path) -> Path:
    """The folder, with the table of `PART` in it."""
    rows = [row(plan, seed) for plan in plans() for seed in range(SEEDS)]
    write_table(folder / f"{PART.task}.parquet", rows, ABOUT)
    return folder


def fill(store: Store, *, leave_out: int = 0) -> None:
    """The searches of `PART` in a store, their runs complete but for the last `leave_out`."""
    leases = Leases(store)
    dense = references(PART.recipe, PART.train_flops, PART.dense)
    for request in PART.requests():
        store.create_search(request)
        claimed = leases.claim("w", 60.0)
        assert claimed is not None
        lease = claimed[0]
        leases.set_fingerprint(lease, "f1")
        widths = {c.width for c in request.candidates or ()}
        wanted = [*dense, *(p for p in plans() if p.width in widths and p not in dense)]
        runs = [(plan, seed) for plan in wanted for seed in range(SEEDS)]
        for number, (plan, seed) in enumerate(runs):
            trial = leases.add_trial(
                lease,
                TrialDraft(
                    number=number, kind="candidate", plan=plan, seed=seed, name=plan.name,
                    key=f"{lease.search_id}-{number}", params=None, sampler_state={}, unseen=(),
                ),
            )  # fmt: skip
            leases.start_trial(lease, trial.id)
            for point in points(plan, seed):
                leases.add_point(lease, trial.id, point)
            if number < len(runs) - leave_out:
                cost = MeasuredCost(0.5 + seed, 1000 + seed)
                leases.complete_trial(lease, trial.id, ENVIRONMENT, cost)
        leases.release(lease, "succeeded")
