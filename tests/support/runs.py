"""A small run with checkpoints, trained here or in a process of its own.

python -m tests.support.runs RECIPE CHECKPOINT [URL]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from nas.designs.taxonomy import parse_theta
from nas.planning.recipe import RECIPES, with_overrides
from nas.planning.runs import plan_of_steps
from nas.remote import RemoteFolder
from nas.tasks import load_data
from nas.training.checkpoint import Checkpoint
from nas.training.run import Point, train

#: recipe → settings that make it quick
SMALL = {
    "mlp-regression-1": {"pool": 0, "validation_samples": 32},
    "ar-digits-1": {"validation_samples": 32},
}
STEPS = 60


def points(name: str, path: str | Path | None, url: str | None = None) -> Iterator[Point]:
    """A small run with a checkpoint after every step, if it has a path for it.

    With a URL each is copied there as well.
    """
    torch.set_num_threads(1)
    settings = {"depth": 2, "batch": 8, "warmup_steps": 5, "evaluations": 12, **SMALL[name]}
    recipe = with_overrides(RECIPES[name], settings)
    data = load_data(recipe)
    plan = plan_of_steps(recipe, parse_theta("btt:rho=1/4"), 32, STEPS)
    remote = None if url is None else RemoteFolder(url)
    checkpoint = None if path is None else Checkpoint(Path(path), "key", 0.0, remote)
    for point in train(plan, recipe, data.train, data.validation, 3, checkpoint=checkpoint):
        yield replace(point, seconds=0.0)


if __name__ == "__main__":
    for point in points(*sys.argv[1:]):
        print(point.step, flush=True)
