"""Makes chosen runs fail for real: put its folder on PYTHONPATH of whoever trains.

`EINSUM_NAS_TEST_FAULTS` maps the width of dense runs to what befalls them.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

FAULTS: dict[str, str] = json.loads(os.environ.get("EINSUM_NAS_TEST_FAULTS", "{}"))
FOLDER = Path(os.environ.get("EINSUM_NAS_TEST_FOLDER", "."))


def befall(fault: str, width: int) -> None:
    if fault.endswith(" once"):
        mark = FOLDER / f"befallen-{width}"
        if mark.exists():
            return
        mark.touch()
    if fault in ("killed", "killed once"):
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "endless":
        while True:
            pass
    if fault in ("memory", "memory once"):
        import torch

        held = []
        while True:
            held.append(torch.ones(64 * 2**20))  # 256 MiB


@contextmanager
def no_numbers() -> Iterator[None]:
    """Every loss is NaN, as where weights have overflowed."""
    from torch.nn import functional

    real = functional.cross_entropy
    functional.cross_entropy = lambda *args, **kwargs: real(*args, **kwargs) * float("nan")
    try:
        yield
    finally:
        functional.cross_entropy = real


def midway(fault: str, width: int, evaluations: Iterator[dict[int, Any]]) -> Any:
    """What comes after the first evaluation: the process dies once, or the last seed diverges."""
    from nas.errors import RunFailed

    found = next(evaluations)
    yield found
    if fault == "killed midway":
        befall("killed once", width)
        return (yield from evaluations)
    lost = max(found)
    yield {**next(evaluations), lost: RunFailed("training loss is nan")}
    while True:
        try:
            found = next(evaluations)
        except StopIteration as end:
            return {seed: ended for seed, ended in end.value.items() if seed != lost}
        yield {seed: point for seed, point in found.items() if seed != lost}


def faulty(train_replicates: Any) -> Any:
    def run(plan: Any, recipe: Any, *args: Any, **kwargs: Any) -> Any:
        fault = FAULTS.get(str(plan.width), "") if plan.dense else ""
        befall(fault, plan.width)
        with no_numbers() if fault == "nan" else nullcontext():
            evaluations = train_replicates(plan, recipe, *args, **kwargs)
            if fault in ("diverges", "killed midway"):
                evaluations = midway(fault, plan.width, evaluations)
            return (yield from evaluations)

    return run


class Finder(importlib.abc.MetaPathFinder):
    """Patches `nas.training.run` when it is imported, and imports nothing itself."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != "nas.training.run":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def patched(module: ModuleType) -> None:
                execute(module)
                module.train_replicates = faulty(module.train_replicates)  # type: ignore[attr-defined]

            spec.loader.exec_module = patched  # type: ignore[method-assign]
        return spec


if FAULTS:
    sys.meta_path.insert(0, Finder())
