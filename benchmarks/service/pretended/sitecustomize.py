"""Runs that take a given time, whatever they train: put its folder on PYTHONPATH of the actors.

`EINSUM_NAS_PRETENDED_SECONDS` is the time of a whole run; `EINSUM_NAS_PRETENDED_BURN` tells whether
it uses a core or sleeps.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
import time
from collections.abc import Sequence
from types import ModuleType
from typing import Any

SECONDS = float(os.environ.get("EINSUM_NAS_PRETENDED_SECONDS", "0"))
BURN = os.environ.get("EINSUM_NAS_PRETENDED_BURN") == "1"


def spend(until: float) -> None:
    """Let time pass, by the monotonic clock."""
    if not BURN:
        time.sleep(max(until - time.monotonic(), 0.0))
        return
    import torch

    square = torch.ones(128, 128)
    while time.monotonic() < until:
        square = torch.tanh(square @ square)


def pretended(module: ModuleType) -> Any:
    def run(plan: Any, recipe: Any, *args: Any, **_: Any) -> Any:
        seeds, until = args[2], args[7] if len(args) > 7 else None
        steps = module.evaluation_steps(plan, recipe)
        started = time.monotonic()
        for step in (s for s in steps if until is None or s <= until):
            spent = SECONDS * step / plan.steps
            spend(started + spent)
            yield {
                seed: module.Point(
                    step, step * plan.train_flops_per_step, 2.0 + 1.0 / step, 0.01, spent, (2.0,)
                )
                for seed in seeds
            }
        return dict.fromkeys(seeds)

    return run


class Finder(importlib.abc.MetaPathFinder):
    """Replaces the training of `nas.training.run` when it is imported."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != "nas.training.run":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def replaced(module: ModuleType) -> None:
                execute(module)
                module.train_replicates = pretended(module)  # type: ignore[attr-defined]

            spec.loader.exec_module = replaced  # type: ignore[method-assign]
        return spec


if SECONDS:
    sys.meta_path.insert(0, Finder())
