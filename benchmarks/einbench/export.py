"""EinBench in the files of other benchmark suites.

Syne Tune reads a folder of its blackbox repository (`syne_tune.blackbox_repository`,
`blackbox_tabular.deserialize`)::

    configspace.json, fidelityspace.json    the domains of hyperparameters and of the fidelity
    hyperparameters.parquet                 a row a configuration
    objectives_evaluations.npy              float32 (tasks, configurations, seeds, fidelities,
                                            objectives)
    fidelities_values.npy                   the fidelities
    metadata.json                           names of objectives and tasks

A table there has one space for all its rows, so it holds the designs of two factors: their seven
exponents in canonical form, and the width.  Its fidelities are those of every row: the last
evaluations of a run, numbered from 1; r of R has 2^((r − R) / 2) of the budget, to a step.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nas.designs.design import parse_design
from nas.designs.theta import AXES, Theta
from nas.einbench.files import Curve
from nas.einbench.table import EinBench
from nas.errors import EinsumNasError

#: Objectives in the order of the array; seconds and FLOPs are those up to the evaluation.
OBJECTIVES = ("metric_loss", "metric_elapsed_time", "metric_train_flops")
#: Name of the fidelity.
FIDELITY = "hp_evaluation"


@dataclass(frozen=True)
class Exported:
    """What a folder holds, and how many entries are not in it."""

    entries: int
    #: of other families
    others: int
    #: with fewer evaluations
    shorter: int


def to_syne_tune(bench: EinBench, folder: Path, evaluations: int) -> Exported:
    """Write a task as a folder of Syne Tune's blackbox repository.

    Parameters
    ----------
    evaluations
        Fidelities; entries with fewer evaluations are left out, because Syne Tune would fill what
        is missing with other values.

    Raises
    ------
    EinsumNasError
        No entry has so many evaluations.
    """
    designs = [(c, parse_design(c.design).canonical()) for c in bench.entries]
    of_two = [(c, d) for c, d in designs if isinstance(d, Theta)]
    kept = [(c, d) for c, d in of_two if len(c.steps) >= evaluations]
    if not kept:
        most = max((len(c.steps) for c, _ in of_two), default=0)
        raise EinsumNasError(f"no entry has {evaluations} evaluations; the most are {most}")
    folder.mkdir(parents=True, exist_ok=True)
    columns: dict[str, Any] = {f"hp_{a}": [getattr(d, a) for _, d in kept] for a in AXES}
    columns["hp_width"] = [c.width for c, _ in kept]
    # a codec that every reader of Parquet has, which Syne Tune's own files have, too
    pq.write_table(pa.table(columns), folder / "hyperparameters.parquet", compression="gzip")
    objectives = np.stack([_objectives(c, evaluations) for c, _ in kept])[None]
    np.save(folder / "objectives_evaluations.npy", objectives.astype(np.float32))
    np.save(folder / "fidelities_values.npy", np.arange(1, evaluations + 1))
    space = {f"hp_{axis}": _domain("Float", 0.0, 1.0) for axis in AXES}
    space["hp_width"] = {
        "domain_cls": "Ordinal",
        "domain_kwargs": {"categories": sorted(set(columns["hp_width"]))},
        "sampler_cls": "Uniform",
        "sampler_kwargs": {},
    }
    about = {key: bench.about[key] for key in ("licence", "title", "date", "loss_unit")}
    for name, content in {
        "configspace": space,
        "fidelityspace": {FIDELITY: _domain("Integer", 1, evaluations)},
        "metadata": {
            "objectives_names": list(OBJECTIVES), "task_names": [bench.task], **about,
            "metric_elapsed_time": "metric_elapsed_time", "metric_val": "metric_loss",
        },
    }.items():  # fmt: skip
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1))
    return Exported(len(kept), len(designs) - len(of_two), len(of_two) - len(kept))


def _objectives(curve: Curve, evaluations: int) -> np.ndarray[Any, Any]:
    """(seeds, fidelities, objectives) of the last evaluations."""
    flops = np.broadcast_to(curve.train_flops, curve.loss.shape)
    return np.stack([curve.loss, curve.seconds, flops], axis=-1)[:, -evaluations:]


def _domain(kind: str, lower: float, upper: float) -> dict[str, Any]:
    """A uniform domain as Syne Tune's `config_space.to_dict` writes it."""
    return {
        "domain_cls": kind,
        "domain_kwargs": {"lower": lower, "upper": upper},
        "sampler_cls": "Uniform",
        "sampler_kwargs": {},
    }
