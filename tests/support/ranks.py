"""Small runs over several ranks, each a process with gloo, and what rank 0 was told.

python -m tests.support.ranks FOLDER
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed
from torch._C._distributed_c10d import HashStore
from torch.multiprocessing.spawn import spawn

from nas.designs.design import parse_design
from nas.errors import RunFailed
from nas.planning.recipe import TEXT, Recipe
from nas.planning.runs import RunPlan, plan_of_steps
from nas.training.checkpoint import Checkpoint
from nas.training.distributed import train_on_rank
from nas.training.run import Point
from nas.training.weights import Keeping

RANKS, STEPS = 2, 24
#: an odd number of validation samples, so that ranks do not have equal parts
TINY = replace(
    TEXT, depth=2, context=16, batch=4, min_steps=20, warmup_steps=5, evaluations=3,
    validation_samples=23, min_validation_samples=4,
)  # fmt: skip
_RNG = np.random.default_rng(0)
#: Learnable text: each character is one of the two that follow its predecessor.
_STEPS = np.cumsum(_RNG.integers(1, 3, size=20_000)) % 96
TRAIN = {"tokens": _STEPS[:15_000].astype(np.uint8)}
VALIDATION = {"tokens": _STEPS[15_000:].astype(np.uint8)}
DESIGNS = ("dense", "monarch", "btt-moe")
#: Rounding may make a router choose otherwise, so a mixture is compared in double precision.  Gates
#: begin as zero, and products with their eight rows round all ties alike.
EXACT = "btt-moe:experts=9,active=3,shared=1"


class _Once(Checkpoint):
    """Saved after one step, between the first two points."""

    _asked = 0

    @property
    def is_due(self) -> bool:
        self._asked += 1
        return self._asked == 14


def plan(design: str) -> RunPlan:
    return plan_of_steps(TINY, parse_design(design), 32, STEPS)


def _told(
    recipe: Recipe,
    design: str,
    checkpoint: Checkpoint | None = None,
    most: int | None = None,
    keeping: Keeping | None = None,
) -> dict[str, Any]:
    """Points, failure and statistics of a run, or its first points alone."""
    run = train_on_rank(
        plan(design), recipe, TRAIN, VALIDATION, 3, checkpoint=checkpoint, keeping=keeping
    )
    found: dict[str, Any] = {"points": [], "failure": None, "routers": None}

    def evaluations() -> Iterator[dict[int, Point | RunFailed]]:
        found["routers"] = (yield from run).get(3)

    for each in islice(evaluations(), most):
        if isinstance(each[3], RunFailed):
            found["failure"] = str(each[3])
        else:
            found["points"].append(asdict(replace(each[3], seconds=0.0)))
    return found


def _exact(recipe: Recipe) -> dict[str, Any]:
    torch.set_default_dtype(torch.float64)
    try:
        return _told(recipe, EXACT)
    finally:
        torch.set_default_dtype(torch.float32)


def _rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=RANKS
    )
    found = {}
    for sharding in ("none", "full"):
        recipe = replace(TINY, ranks=RANKS, sharding=sharding)
        for design in DESIGNS:
            about = {"recipe": TINY.as_dict(), "design": design, "width": 32}
            keeping = Keeping(None, 2**24, about)
            found[f"{sharding} {design}"] = _told(recipe, design, keeping=keeping)
            for weights in keeping.found.values():
                (folder / f"{rank} {sharding} {design}.safetensors").write_bytes(weights)
        found[f"{sharding} exact"] = _exact(recipe)
        path = folder / f"{sharding}.pt"

        def checkpoint(path: Path = path) -> Checkpoint:
            return _Once(path if rank == 0 else folder / "nothing", "key")

        # killed after its second point, with the state of an earlier step
        found[f"{sharding} begun"] = _told(recipe, "btt-moe", checkpoint(), most=2)
        torch.manual_seed(99)
        found[f"{sharding} resumed"] = _told(recipe, "btt-moe", checkpoint())
        # of another model: it begins anew
        found[f"{sharding} other"] = _told(recipe, "monarch", checkpoint())
        found[f"{sharding} diverged"] = _told(replace(recipe, lr=1e30, clip=0.0), "dense")
    (folder / f"{rank}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    (Path(sys.argv[1]) / "one.json").write_text(json.dumps({"exact": _exact(TINY)}))
    distributed.destroy_process_group()
    spawn(_rank, (Path(sys.argv[1]),), nprocs=RANKS)  # type: ignore[no-untyped-call]
