"""Records of a study with a planted truth."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from nas.designs.taxonomy import parse_theta

Record = dict[str, Any]


BUDGET = 1e11


NAMES = {
    "dense": "dense", "monarch": "monarch", "btt:rho=1/4": "btt:alpha=1/2,epsilon=1/2,rho=1/4",
    "low-rank:rho=1/2": "low-rank:rho=1/2", "kronecker": "kronecker:alpha=1/2,epsilon=1/2",
}  # fmt: skip


def record(
    text: str, width: int, seed: int, loss: float, *, b: float = 0.1, task: str = "text",
    name: str | None = None, failure: str | None = None, evaluations: int = 13,
) -> Record:  # fmt: skip
    """A run whose curve is a power law through `loss` at the budget."""
    theta = parse_theta(text)
    flops = BUDGET / math.sqrt(2) ** np.arange(evaluations)[::-1]
    points = [
        {"step": i + 1, "train_flops": float(f), "loss": float(loss * (f / BUDGET) ** -b),
         "loss_stderr": 0.01, "seconds": 1.0}
        for i, f in enumerate(flops)
    ]  # fmt: skip
    return {
        "key": f"{task}{text}{width}{seed}", "task": task, "recipe": {"name": f"{task}-1"},
        "loss_unit": "nats per character", "name": name or NAMES.get(text, text),
        "theta": list(theta.values), "width": width, "depth": 3, "steps": 900, "params": 12345,
        "forward_flops_per_token": 2000.0 * width, "train_flops_per_step": 12345678, "seed": seed,
        "points": points, "failure": failure,
        "environment": {"device": "cpu", "threads": 1, "torch": "2.13", "execution_plans": ["x"]},
    }  # fmt: skip


def study(
    effects: Mapping[str, float], *, noise: float = 0.01, seeds: int = 3, task: str = "text"
) -> list[Record]:
    """Runs whose best width is the middle one, with loss = 2 × effect × what the seed does."""
    rng = np.random.default_rng(1)
    return [
        record(text, width, seed, 2.0 * effect * worse * shared * moved, task=task)
        for seed in range(seeds)
        for shared in [math.exp(rng.normal(0, noise))]
        for text, effect in effects.items()
        for moved in [math.exp(rng.normal(0, noise / 10))]
        for width, worse in ((32, 1.05), (64, 1.0), (96, 1.04))
    ]
