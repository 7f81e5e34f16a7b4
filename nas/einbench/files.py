"""The files of EinBench: one Parquet file a task, one row a run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from nas.errors import InvalidInput

#: Grows with every change after which an older reader would misread a file.
SCHEMA_VERSION = 1
#: Key of the file's own description in its metadata, beside those that Arrow writes.
_ABOUT = b"einbench"

Floats = npt.NDArray[np.float64]
Whole = npt.NDArray[np.int64]


def _field(
    name: str, kind: pa.DataType, meaning: str, unit: str = "", *, null: bool = False
) -> Any:
    return pa.field(name, kind, nullable=null, metadata={"meaning": meaning, "unit": unit})


_TEXT, _INT, _REAL = pa.string(), pa.int64(), pa.float64()
#: Columns of a row, each with its meaning and unit in the metadata of the field.
SCHEMA = pa.schema(
    [
        _field("design", _TEXT, "exact text of the design as it was trained at this width"),
        _field("name", _TEXT, "its name"),
        _field("family", _TEXT, "einsum | einsum3 | einsum4 | …: the family of the design"),
        _field("dense", pa.bool_(), "whether every layer is one dense matrix"),
        _field("width", _INT, "features of the model"),
        _field("structures", pa.list_(_TEXT), "integers of each layer of a block, in order"),
        _field("seed", _INT, "seed of initialisation and training batches"),
        _field("params", _INT, "trainable parameters of the whole model"),
        _field("forward_flops_per_token", _REAL, "whole model, one position", "FLOPs"),
        _field("train_flops_per_step", _INT, "exact: 3 × forward, 1 MAC = 2 FLOPs", "FLOPs"),
        _field("steps", pa.list_(_INT), "optimiser steps at each evaluation, ascending", "steps"),
        _field("loss", pa.list_(_REAL), "validation loss at each evaluation, in the recipe's unit"),
        _field("loss_stderr", pa.list_(_REAL), "its standard error over the validation samples"),
        _field("seconds", pa.list_(_REAL), "training time up to each evaluation; of runs that "
               "trained together, the share of one", "seconds"),
        _field("seconds_per_step", _REAL, "median time of a training step", "seconds", null=True),
        _field("peak_memory_bytes", _INT, "parameters, optimiser state and the peak of what a step "
               "allocates", "bytes", null=True),
        _field("trained_together", _INT, "runs that trained as one model, this one included"),
        _field("device", _TEXT, "kind and name of the device, threads, precision", null=True),
        _field("execution_plans", _TEXT, "JSON: how each structure was computed", null=True),
        _field("torch", _TEXT, "version of torch", null=True),
    ]
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Curve:
    """The learning curves of one design at one width: k seeds, n evaluations.

    The learning rate is constant after the warm-up, so every evaluation is also the result of a
    shorter run.  Equal only to itself; arrays cannot be written.
    """

    #: exact text of the design as it was trained at this width, which `parse_design` reads
    design: str
    #: what the design is called
    name: str
    family: str
    #: whether every layer is one dense matrix
    dense: bool
    width: int
    #: integers of each layer of a block, in order
    structures: tuple[str, ...]
    #: (k,)
    seeds: Whole
    #: optimiser steps (n,), ascending
    steps: Whole
    #: validation loss (k, n), in the unit of the recipe
    loss: Floats
    #: its standard error over the validation samples (k, n)
    loss_stderr: Floats
    #: training time (k, n), evaluation left out; of runs that trained together, the share of one
    seconds: Floats
    #: trainable parameters of the whole model
    params: int
    #: exact FLOPs of a training step: 3 × forward, 1 MAC = 2 FLOPs
    train_flops_per_step: int
    #: forward FLOPs of the whole model for one position
    forward_flops_per_token: float
    #: mean over the seeds; None where none was measured
    seconds_per_step: float | None
    #: most of any seed; None where none was measured
    peak_memory_bytes: int | None
    #: runs that trained as one model: all of the seeds, or each alone (1)
    trained_together: int
    #: kind and name of the device, threads and precision
    device: str | None
    #: JSON: how each structure was computed; equal ones give equal curves on one machine
    execution_plans: str | None

    @cached_property
    def train_flops(self) -> Whole:
        """Exact train FLOPs of one run at each evaluation (n,)."""
        return _fixed(self.steps * self.train_flops_per_step)

    @cached_property
    def mean_loss(self) -> Floats:
        """Mean of the loss over the seeds at each evaluation (n,)."""
        return _fixed(self.loss.mean(axis=0))

    def losses(self, seed_index: int | None = None) -> Floats:
        """The loss of one seed (n,), by its place in `seeds`; None: `mean_loss`."""
        return self.mean_loss if seed_index is None else self.loss[self.seed_at(seed_index)]

    def seed_at(self, index: int) -> int:
        """`index`, if `seeds` has that place; raises `InvalidInput` otherwise."""
        if not 0 <= index < len(self.seeds):
            accepted = f"0 to {len(self.seeds) - 1}, the places of seeds {self.seeds.tolist()}"
            raise InvalidInput("seed_index", index, accepted)
        return index

    def reached(self, step: int) -> int:
        """How many evaluations a run has had at `step`.

        Raises
        ------
        InvalidInput
            A step between evaluations, of which nothing was measured.
        """
        found = int(np.searchsorted(self.steps, step))
        if found == len(self.steps) or self.steps[found] != step:
            raise InvalidInput("step", step, f"an evaluation, {self.steps.tolist()}")
        return found + 1


def write_table(path: Path, rows: Iterable[Mapping[str, Any]], about: Mapping[str, Any]) -> None:
    """Write the runs of a task.

    Parameters
    ----------
    rows
        One a run, with a value for each column of `SCHEMA`.
    about
        JSON values that `read_table` returns: at least `task`, `task_fingerprint`, `recipe`
        (`Recipe.as_dict`) and `train_flops`, the budget of each run.
    """
    described = {"schema_version": SCHEMA_VERSION, **about}
    text = json.dumps(described, sort_keys=True, allow_nan=False)
    schema = SCHEMA.with_metadata({_ABOUT: text.encode()})
    table = pa.Table.from_pylist([dict(row) for row in rows], schema=schema)
    table.validate(full=True)
    pq.write_table(table, path, compression="zstd", compression_level=19)


def read_about(path: Path) -> dict[str, Any]:
    """What a file says of itself, its runs left unread.

    Raises
    ------
    InvalidInput
        A file that is no table of EinBench, or one of another version of the schema.
    """
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (OSError, pa.ArrowInvalid) as error:
        raise InvalidInput("path", str(path), f"a Parquet file of EinBench: {error}") from None
    if _ABOUT not in metadata:
        raise InvalidInput("path", str(path), "a Parquet file that EinBench's `write` has made")
    about: dict[str, Any] = json.loads(metadata[_ABOUT])
    if about["schema_version"] != SCHEMA_VERSION:
        accepted = f"a table of schema version {SCHEMA_VERSION}, not {about['schema_version']}"
        raise InvalidInput("path", str(path), accepted)
    return about


def read_curves(path: Path) -> list[Curve]:
    """The curves of a file, in the order of their first run; runs of one design, width and
    structures are seeds of one curve."""
    runs: dict[tuple[int, tuple[str, ...]], list[dict[str, Any]]] = {}
    with pq.ParquetFile(path) as file:  # `read_table` imports pandas, which takes longest of all
        table = file.read().cast(SCHEMA)
    for row in table.to_pylist():
        runs.setdefault((row["width"], tuple(row["structures"])), []).append(row)
    return [_curve(sorted(of_one, key=lambda row: row["seed"])) for of_one in runs.values()]


def _curve(runs: list[dict[str, Any]]) -> Curve:
    first = runs[0]
    columns = ("loss", "loss_stderr", "seconds")
    stacked: dict[str, Any] = {name: _fixed(np.array([r[name] for r in runs])) for name in columns}
    same = ("design", "name", "family", "dense", "width", "params", "train_flops_per_step",
            "forward_flops_per_token", "trained_together", "device", "execution_plans")  # fmt: skip
    step_seconds = [r["seconds_per_step"] for r in runs if r["seconds_per_step"] is not None]
    memory = [r["peak_memory_bytes"] for r in runs if r["peak_memory_bytes"] is not None]
    return Curve(
        **{name: first[name] for name in same},
        **stacked,
        structures=tuple(first["structures"]),
        seeds=_fixed(np.array([run["seed"] for run in runs])),
        steps=_fixed(np.array(first["steps"])),
        seconds_per_step=float(np.mean(step_seconds)) if step_seconds else None,
        peak_memory_bytes=max(memory, default=None),
    )


def _fixed(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    array.flags.writeable = False
    return array
