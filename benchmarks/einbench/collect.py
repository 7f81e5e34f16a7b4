"""Trains what EinBench holds, through the service: one search a task and width.

    EINSUM_NAS_HOME=FOLDER python -m benchmarks.einbench collect

Each search is submitted once, whatever runs of it there are already, so the command goes on where
it was interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.einbench.designs import einbench_designs
from nas.cli.local import LocalSearch
from nas.planning.recipe import Recipe
from nas.planning.request import SearchRequest
from nas.planning.tasks import recipe_of
from nas.store import Search, Store

SEEDS = 3


@dataclass(frozen=True)
class Part:
    """The designs of EinBench on one task."""

    task: str
    train_flops: float
    widths: tuple[int, int]
    designs: int
    #: dense references at so many widths
    dense: int = 8
    overrides: Mapping[str, Any] = field(default_factory=dict)

    @property
    def recipe(self) -> Recipe:
        return recipe_of(self.task, None, self.overrides)

    def requests(self) -> list[SearchRequest]:
        """One a width; with the second, which has the same references, they are not run again."""
        designs = einbench_designs(self.task, self.recipe, self.widths, self.designs)
        return [
            SearchRequest.checked(
                {
                    "task": self.task,
                    "overrides": dict(self.overrides),
                    "train_flops": self.train_flops,
                    "references": self.dense,
                    "replicates": SEEDS,
                    "candidates": [{"design": d, "width": width} for d in designs],
                }
            )
            for width in self.widths
        ]


#: Twelve evaluations, spaced by √2, reach from 1/45 of the FLOPs to all of them.
_CURVE: dict[str, Any] = {"evaluations": 12, "validation_samples": 512}
PARTS = (
    Part(
        "images", 1e10, (32, 64), 64,
        overrides={**_CURVE, "min_steps": 50, "warmup_steps": 20},
    ),
    Part(
        "regression", 6e9, (32, 64), 620,
        overrides={**_CURVE, "batch": 128, "min_steps": 32, "warmup_steps": 20},
    ),
    Part(
        "text", 1.2e10, (16, 32), 208, dense=3,  # the budget admits no more dense widths
        overrides={**_CURVE, "validation_samples": 256, "min_steps": 32, "warmup_steps": 20},
    ),
)  # fmt: skip


def submitted(store: Store, parts: Sequence[Part] = PARTS) -> list[tuple[Part, Search]]:
    """The searches of all parts, made where they are not there yet."""
    found = []
    for part in parts:
        for width, request in zip(part.widths, part.requests(), strict=True):
            key = f"einbench/{part.task}/{width}/{request.digest[:16]}"
            found.append((part, store.create_search(request, idempotency_key=key)[0]))
    return found


def collect(store: Store, parts: Sequence[Part] = PARTS) -> None:
    """Run all searches to their end."""
    for part, search in submitted(store, parts):
        print(f"{part.task}: search {search.id}", file=sys.stderr, flush=True)
        ended = LocalSearch(search.id, {}, store).wait(poll_seconds=2.0)
        print(f"{part.task}: {ended.data['trial_counts']}", file=sys.stderr, flush=True)
