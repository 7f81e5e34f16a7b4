"""The papers' study from data to report: resumable, one folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nas.errors import EinsumNasError, InvalidInput
from nas.study.page import render
from nas.study.report import analyse
from nas.study.runs import run_all
from nas.study.scales import runs_of, studies_of
from nas.tasks import load_data
from nas.training.run import Execution

MIN_SEEDS, MAX_SEEDS = 1, 100
#: (runs finished, runs in all, what happens) → shown to people
Progress = Callable[[int, int, str], None]


def reproduce(
    scale: str, folder: Path, *, seeds: int, processes: int | None, progress: Progress
) -> dict[str, Any]:
    """Run a scale's studies, then write ``report.html`` and ``report.json``; return the latter.

    Parameters
    ----------
    folder
        Holds records, checkpoints and the report.  What is there already is not run again.
    processes
        Runs at once; by default one a core, or one on a GPU.

    Raises
    ------
    InvalidInput
        No such scale, or a number of seeds or processes out of range.
    EinsumNasError
        GPU scale without a GPU.
    """
    if not MIN_SEEDS <= seeds <= MAX_SEEDS:
        raise InvalidInput("seeds", seeds, f"a whole number from {MIN_SEEDS} to {MAX_SEEDS}")
    if processes is not None and processes < 1:
        raise InvalidInput("processes", processes, "a whole number from 1")
    studies = studies_of(scale)
    if scale == "gpu" and not torch.cuda.is_available():
        raise EinsumNasError("scale gpu needs a GPU that torch can use; --scale cpu needs none")
    execution = Execution.on("cuda" if scale == "gpu" else "cpu")
    if processes is None:
        processes = 1 if scale == "gpu" else os.cpu_count() or 1
    progress(0, 0, "reading the data")
    data = [load_data(study.recipe) for study in studies]
    runs = [r for s, d in zip(studies, data, strict=True) for r in runs_of(s, d, seeds)]
    progress(0, len(runs), "training")
    records = []
    found = run_all(runs, data, folder, processes=processes, execution=execution)
    for record in found:
        records.append(record)
        shown = f"{record['task']} {record['name']} width {record['width']}"
        progress(len(records), len(runs), record["failure"] or shown)
    # in the order of the study, whatever order the runs ended in
    place = {run.key: i for i, run in enumerate(runs)}
    records.sort(key=lambda r: place[r["key"]])
    result = analyse(records, scale=scale)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(result, indent=1, allow_nan=False))
    (folder / "report.html").write_text(render(result), encoding="utf-8")
    return result
