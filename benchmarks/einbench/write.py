"""From the database of `collect` to the Parquet files of `nas.einbench`."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.einbench.collect import PARTS, SEEDS, Part
from nas.designs.design import parse_design
from nas.einbench.files import write_table
from nas.errors import EinsumNasError, counted
from nas.planning.recipe import Recipe
from nas.planning.runs import plan_of_steps
from nas.records.device import device_of, processor_name, trained_together
from nas.store import Search, Store
from nas.store.dump import StoredRun, iterate_runs
from nas.training.run import evaluation_steps

LICENCE = "CC-BY-4.0"
#: A design at a width: the width, and the integers of its layers.
Entry = tuple[int, tuple[str, ...]]


@dataclass(frozen=True)
class Written:
    """What a part's file holds, and what the part lacks."""

    task: str
    rows: int
    #: width → entries
    entries: dict[int, int]
    #: in words; empty where the part is complete
    missing: list[str]
    #: None where nothing was written
    file: Path | None


def write(
    store: Store, folder: Path, *, partial: bool = False, parts: Sequence[Part] = PARTS
) -> list[Written]:
    """Write the complete entries of each part, all of whose seeds are complete, to its file.

    Parameters
    ----------
    partial
        Whether parts are written that lack entries; their files tell what is missing.

    Raises
    ------
    EinsumNasError
        A stored run contradicts its plan, or its curve is not finite and ascending.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return [_write_part(store, folder, part, partial) for part in parts]


def searches_of(store: Store, part: Part) -> Iterator[Search]:
    """The searches that train a part, whichever release submitted them."""
    for search in store.searches(limit=200):
        r = search.request
        given = r.candidates is not None and {c.width for c in r.candidates} <= set(part.widths)
        same = (r.task, r.train_flops, r.overrides or {}, r.replicates, r.data)
        if given and same == (part.task, part.train_flops, dict(part.overrides), SEEDS, None):
            yield search


def _write_part(store: Store, folder: Path, part: Part, partial: bool) -> Written:
    found: dict[Entry, dict[int, dict[str, Any]]] = defaultdict(dict)
    fingerprints: set[str] = set()
    lacking: Counter[str] = Counter()
    for search in searches_of(store, part):
        for run in iterate_runs(store, search_id=search.id):
            trial = run.trial
            if trial.state != "complete":
                lacking[trial.state] += 1
            elif trial.seed not in found[trial.width, tuple(trial.structures)]:
                fingerprints.add(str(run.fingerprint))
                entry = found[trial.width, tuple(trial.structures)]
                entry[trial.seed] = checked_row(run, part.recipe)
    if len(fingerprints) > 1:
        raise EinsumNasError(f"{part.task}: runs of different data, {sorted(fingerprints)}")
    whole = {entry: runs for entry, runs in found.items() if len(runs) == SEEDS}
    rows = [run for runs in whole.values() for _, run in sorted(runs.items())]
    entries = Counter(width for width, _ in whole)
    missing = [*_missing(part, entries, rows), *(f"{n} runs {s}" for s, n in lacking.items())]
    file = folder / f"{part.task}.parquet" if rows and (partial or not missing) else None
    if file is not None:
        write_table(file, rows, _about(part, fingerprints.pop(), missing))
    return Written(part.task, len(rows), dict(sorted(entries.items())), missing, file)


def _missing(part: Part, entries: Counter[int], rows: Sequence[dict[str, Any]]) -> list[str]:
    """What a part lacks, in words."""
    of_designs = {w: part.designs - entries[w] for w in part.widths}
    found = [
        f"{counted(n, 'design')} of {part.designs} at width {w}" for w, n in of_designs.items() if n
    ]
    dense = {row["width"] for row in rows if row["dense"]}
    # the candidates have dense at their own widths, which may be none of the references'
    if len(dense) < part.dense:
        found.append(f"dense at {part.dense - len(dense)} of {part.dense} widths")
    return found


def checked_row(run: StoredRun, recipe: Recipe) -> dict[str, Any]:
    """The row of a complete run.

    Raises
    ------
    EinsumNasError
        It contradicts its plan, or its curve is not finite and ascending.
    """
    trial, points = run.trial, run.points
    plan = plan_of_steps(recipe, parse_design(trial.design), trial.width, trial.steps)
    planned = (plan.structures, plan.params, plan.train_flops_per_step)
    if planned != (trial.structures, trial.params, trial.train_flops_per_step):
        raise EinsumNasError(f"trial {trial.id} has other integers than its design's: {planned}")
    steps, expected = [p.step for p in points], evaluation_steps(plan, recipe)
    if steps != expected:
        raise EinsumNasError(f"trial {trial.id} was evaluated at {steps}, not at {expected}")
    ran = trial.environment or {}
    measured = [x for p in points for x in (p.loss, p.loss_stderr, p.train_seconds)]
    if not all(math.isfinite(x) and x > 0 for x in measured):
        raise EinsumNasError(f"trial {trial.id} has a value that is not finite and above 0")
    if any(a.train_seconds >= b.train_seconds for a, b in pairwise(points)):
        raise EinsumNasError(f"trial {trial.id} has seconds that do not ascend")
    return {
        "design": trial.design, "name": trial.name, "family": plan.design.family,
        "dense": trial.dense, "width": trial.width, "structures": list(trial.structures),
        "seed": trial.seed, "params": trial.params,
        "forward_flops_per_token": trial.forward_flops_per_token,
        "train_flops_per_step": trial.train_flops_per_step, "steps": steps,
        "loss": [p.loss for p in points], "loss_stderr": [p.loss_stderr for p in points],
        "seconds": [p.train_seconds for p in points],
        "seconds_per_step": trial.seconds_per_step, "peak_memory_bytes": trial.peak_memory_bytes,
        "trained_together": trained_together(ran), "device": device_of(ran),
        "execution_plans": json.dumps(ran.get("execution_plans"), sort_keys=True),
        "torch": ran.get("torch"),
    }  # fmt: skip


def _about(part: Part, fingerprint: str, missing: Sequence[str]) -> dict[str, Any]:
    """What the file says of itself."""
    return {
        "title": f"EinBench {part.task}: learning curves of structured models",
        "task": part.task,
        "task_fingerprint": fingerprint,
        "recipe": part.recipe.as_dict(),
        "train_flops": part.train_flops,
        "loss_unit": part.recipe.loss_unit,
        "licence": LICENCE,
        "einsum_nas": version("einsum-nas"),
        "processor": processor_name(),
        "date": datetime.now(UTC).date().isoformat(),
        "missing": list(missing),
    }
