"""Packs: what one process trains together, and the keys by which runs are told apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from nas.planning.recipe import Recipe
from nas.planning.runs import RunPlan
from nas.store import Trial


def run_key(recipe: Recipe, fingerprint: str, plan: RunPlan, seed: int) -> str:
    """Digest of everything that decides a run's result: equal keys, equal curves."""
    decides = {
        "task": [recipe.task, fingerprint],
        "recipe": recipe.as_dict(),
        "depth": plan.depth,
        "width": plan.width,
        "steps": plan.steps,
        "structures": plan.structures,
        "seed": seed,
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Pack:
    """Trials that one process trains together: runs of one plan, each with a seed of its own."""

    trials: tuple[Trial, ...]
    #: names the state that is kept of them; the same whichever of the planned runs are left
    key: str

    @property
    def until(self) -> int | None:
        """Step at which they pause; None if they train to their end."""
        return self.trials[0].until_step

    def of(self, seed: int) -> Trial:
        """The trial with a seed."""
        return next(t for t in self.trials if t.seed == seed)


def pack_key(keys: Sequence[str]) -> str:
    """Names the state of runs that train together, by their own keys."""
    return hashlib.sha256("/".join(keys).encode()).hexdigest()


def each_apart(trials: Iterable[Trial]) -> list[Pack]:
    """Each trial as a pack of its own."""
    return [Pack((t,), t.key) for t in trials]
