"""Everything that was measured, for other tools: CSV, Parquet, JSON, or a study of Optuna.

A file has a row a trial, whatever its state, or a row an evaluation.  Missing values are missing:
null in Parquet and JSON, and in CSV an empty field without quotes.  Integers are exact.  Units and
meanings of the columns stand in the field metadata of Parquet (``unit``, ``meaning``), in JSON
under ``columns``, beside ``rows``::

    {"columns": {"loss": {"unit": "nats per character", "meaning": "…"}, …}, "rows": [{…}, …]}

and for CSV here.  Of a trial:

===========================  =======  ==========================================================
column                       unit     meaning
===========================  =======  ==========================================================
search_id                             search that the trial belongs to
task, fingerprint                     task, and digest of its data and recipe
trial_id                              id of the trial on its store
number                                number of the trial in its search
kind                                  candidate, reference (dense), or confirmation
state                                 planned, running, complete, stopped or failed
proposal                              point of the sampler's box, JSON; missing for references
unseen                                numbers of earlier trials that its proposal had not seen, JSON
theta_alpha … theta_rho               the seven exponents of θ; missing for other designs than of
                                      two factors and mixtures of them
design                                how every layer is built, as text that is read back exactly
name                                  name of the structure
structures                            integer structures of the model's layers, JSON
dense                                 whether every layer is dense
width, depth                          features and layers of the model
steps                        steps    optimiser steps of the whole run
train_flops_per_step         FLOPs    training FLOPs of a step, exact
train_flops                  FLOPs    training FLOPs of the whole run, exact
forward_flops_per_token      FLOPs    forward FLOPs for a position of a sample
params                                parameters of the model
seed                                  seed of the run
key                                   digest of everything that decides the result
reused_from                           trial whose result this one shares
attempts                              times that it was started
environment                           where it ran: device, threads, versions, JSON
loss                         task's   validation loss at the last step; complete trials only
error                                 why it failed or was stopped
created_at, started_at,      s        times, seconds since 1970-01-01 UTC
finished_at
model                                 digest, equal for runs that differ in steps and seed only
confirms                              trial that this one runs again with a fresh seed
seconds_per_step             s        measured training time of a step
peak_memory_bytes            bytes    measured peak memory of the run
failure                               kind of failure: run, process, timeout, memory or search
===========================  =======  ==========================================================

Of an evaluation, beside search_id, trial_id, number, kind, state, name, dense, width, seed and
reused_from of its trial:

===========================  =======  ==========================================================
step                         steps    optimiser steps taken
train_flops                  FLOPs    training FLOPs spent, a double
loss                         task's   validation loss, mean over the fixed validation samples
loss_stderr                  task's   standard error of the loss over the validation samples
train_seconds                s        seconds of training, evaluation left out
===========================  =======  ==========================================================

FLOPs count 1 MAC as 2, training as 3 × forward, and every matrix product of the model.  A
column of the store that this table lacks is written all the same.
"""

from __future__ import annotations

import json
import math
import os
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from gzip import GzipFile
from itertools import chain, islice
from pathlib import Path
from types import NoneType
from typing import Any, BinaryIO, Literal, cast, get_args, get_type_hints

from nas.designs.theta import AXES
from nas.errors import EinsumNasError, InvalidInput, NotFound
from nas.service.answers import resolve_task
from nas.store import Store, StoredPoint, Trial
from nas.store.dump import StoredRun, iterate_runs

FORMATS = ("csv", "parquet", "json", "optuna")
ROWS = ("trials", "points")
#: Stands for standard output where a file is named.
STANDARD_OUTPUT = "-"
_GZIP = ".gz"
#: Ends of names that promise what is not written.
_OTHER_COMPRESSIONS = (".bz2", ".xz", ".zst", ".lz4", ".br", ".zip", ".7z", ".tgz")
_LARGEST_INTEGER = 2**63 - 1
#: Rows held at once, and of a row group of Parquet.
_BATCH = 4096
_RUN_A_SEARCH = "`einsum-nas search --task {} --train-flops 5e10 --wait` runs one"

Kind = Literal["text", "int", "float", "bool"]
#: Column → (unit, meaning); "loss" stands for the task's unit of loss.
_MEANINGS: dict[str, tuple[str | None, str]] = {
    "search_id": (None, "search that the trial belongs to"),
    "task": (None, "task"),
    "fingerprint": (None, "digest of the task's data and recipe"),
    "trial_id": (None, "id of the trial on its store"),
    "number": (None, "number of the trial in its search"),
    "kind": (None, "candidate, reference (dense), or confirmation"),
    "state": (None, "planned, running, complete, stopped or failed"),
    "proposal": (None, "point of the sampler's box, JSON; missing for references"),
    "unseen": (None, "numbers of earlier trials that its proposal had not seen, JSON"),
    **{
        f"theta_{axis}": (None, f"exponent {axis} of θ; missing but for two factors")
        for axis in AXES
    },
    "design": (None, "how every layer is built, as text that the command line and Python read"),
    "name": (None, "name of the structure"),
    "structures": (None, "integer structures of the model's layers, JSON"),
    "dense": (None, "whether every layer is dense"),
    "width": (None, "features of the model"),
    "depth": (None, "layers of the model"),
    "steps": ("steps", "optimiser steps of the whole run"),
    "train_flops_per_step": ("FLOPs", "training FLOPs of a step, exact"),
    "train_flops": ("FLOPs", "training FLOPs; 1 MAC = 2 FLOPs, training = 3 × forward"),
    "forward_flops_per_token": ("FLOPs", "forward FLOPs for a position of a sample"),
    "params": (None, "parameters of the model"),
    "seed": (None, "seed of the run"),
    "key": (None, "digest of everything that decides the result"),
    "reused_from": (None, "trial whose result this one shares"),
    "attempts": (None, "times that it was started"),
    "environment": (None, "where it ran: device, threads, versions, JSON"),
    "loss": ("loss", "validation loss, mean over the fixed validation samples"),
    "error": (None, "why it failed or was stopped"),
    "created_at": ("s", "seconds since 1970-01-01 UTC"),
    "started_at": ("s", "seconds since 1970-01-01 UTC"),
    "finished_at": ("s", "seconds since 1970-01-01 UTC"),
    "model": (None, "digest, equal for runs that differ in steps and seed only"),
    "confirms": (None, "trial that this one runs again with a fresh seed"),
    "seconds_per_step": ("s", "measured training time of a step"),
    "peak_memory_bytes": ("bytes", "measured peak memory of the run"),
    "failure": (None, "kind of failure: run, process, timeout, memory or search"),
    "step": ("steps", "optimiser steps taken"),
    "loss_stderr": ("loss", "standard error of the loss over the validation samples"),
    "train_seconds": ("s", "seconds of training, evaluation left out"),
}
#: Field of `Trial` → column, where they differ.
_RENAMED = {"id": "trial_id", "model_params": "params", "params": "proposal"}
#: What only a sampler can read.
_INTERNAL = ("sampler_state",)
_OF_TRIAL = (
    "search_id", "trial_id", "number", "kind", "state", "name", "dense", "width", "seed",
    "reused_from",
)  # fmt: skip
#: Column → field of `StoredPoint`.
_OF_POINT = {
    "step": "step", "train_flops": "train_flops", "loss": "loss", "loss_stderr": "loss_stderr",
    "train_seconds": "seconds",
}  # fmt: skip

Source = tuple[StoredRun, StoredPoint | None]


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a file: what it holds, and how it is read from a run and one of its points."""

    name: str
    kind: Kind
    unit: str | None
    meaning: str
    read: Callable[[Source], Any]

    def of(self, source: Source) -> Any:
        """The value, None where there is none; a number that is not finite is no value."""
        value = self.read(source)
        return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written, for users."""

    rows: int
    #: file, or URL without password
    target: str
    loss_unit: str
    #: one line that says it
    summary: str


@dataclass(frozen=True, slots=True)
class _Scope:
    """The trials that are asked for: of a search, or of a task's data."""

    search_id: str | None
    task: str | None
    fingerprint: str | None

    def __str__(self) -> str:
        return self.search_id or f"{self.task}@{self.fingerprint}"

    def runs(self, store: Store) -> Iterator[StoredRun]:
        return iterate_runs(
            store, search_id=self.search_id, task=self.task, fingerprint=self.fingerprint
        )


def export(
    store: Store,
    file_format: str,
    out: str,
    *,
    task: str = "text",
    search_id: str | None = None,
    rows: str = "trials",
    study: str | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write the trials of a task, or of a search, to a file or an Optuna storage.

    A file appears under its name once it is whole; what stood there stays until then.  Memory
    does not grow with the number of rows.

    Parameters
    ----------
    file_format
        One of `FORMATS`.
    out
        Path of a file, `-` for standard output, or URL of an Optuna storage.  CSV and JSON whose
        name ends in `.gz` are compressed.
    task
        `name` or `name@fingerprint`; without effect next to `search_id`.
    rows
        One of `ROWS`; a study of Optuna has trials, with their curves.
    study
        Name of the Optuna study; by default it names the task's data or the search.
    overwrite
        Whether a file that exists is replaced.

    Raises
    ------
    InvalidInput
        An unknown format or kind of rows, a target that cannot be written or exists, a study
        whose name is taken, an unknown task.
    NotFound
        No such search, or nothing to export.
    EinsumNasError
        The file could not be written to its end.
    """
    _check(file_format, out, rows, study, overwrite)
    scope = _resolved(store, task, search_id)
    if file_format == "optuna":
        return _export_study(store, out, scope, study)
    return _export_file(store, file_format, Path(out), scope, rows)


def _check(file_format: str, out: str, rows: str, study: str | None, overwrite: bool) -> None:
    """Everything that can be refused before the store is read."""
    if file_format not in FORMATS:
        raise InvalidInput("format", file_format, " | ".join(FORMATS))
    if rows not in ROWS:
        raise InvalidInput("rows", rows, " | ".join(ROWS))
    if file_format == "optuna":
        if rows != "trials":
            raise InvalidInput("rows", rows, "trials with format optuna: they have their curves")
        if overwrite:
            raise InvalidInput("overwrite", "true", "files only; name another --study")
        return
    if study is not None:
        raise InvalidInput("study", study, "nothing, but with format optuna")
    if out == STANDARD_OUTPUT:
        if overwrite:
            raise InvalidInput("overwrite", "true", "files only, not standard output")
        return
    path = Path(out)
    suffix = path.suffix.lower()
    if file_format == "parquet" and suffix == _GZIP:
        raise InvalidInput("out", out, "a name without .gz: Parquet is compressed by itself")
    if suffix in _OTHER_COMPRESSIONS:
        raise InvalidInput("out", out, "a name that ends in .gz, or that promises no compression")
    if not out or "\0" in out or path.name in ("", ".."):
        raise InvalidInput("out", out, "the path of a file")
    if not path.parent.is_dir():
        raise InvalidInput("out", out, f"a file in a folder that exists; {path.parent} does not")
    try:
        path.lstat()
    except FileNotFoundError:
        return
    except OSError as error:  # such as a name that is too long
        raise InvalidInput("out", out, f"the path of a file: {error.strerror}") from None
    if not path.is_file():
        raise InvalidInput("out", out, "the path of a file; this is something else")
    if not overwrite:
        raise InvalidInput("out", out, "a file that does not exist, or any with --overwrite")


def _resolved(store: Store, task: str, search_id: str | None) -> _Scope:
    if search_id is not None:
        store.search(search_id)
        return _Scope(search_id, None, None)
    try:
        return _Scope(None, *resolve_task(store, task))
    except NotFound as error:
        raise NotFound(f"{error}; {_RUN_A_SEARCH.format(task)}") from None


def _nothing(scope: _Scope, what: str) -> NotFound:
    if scope.search_id is None:
        return NotFound(f"no {what} of task {scope}; {_RUN_A_SEARCH.format(scope.task)}")
    return NotFound(f"search {scope} has no {what} yet; `einsum-nas worker` runs it")


def _export_study(store: Store, url: str, scope: _Scope, name: str | None) -> Exported:
    from nas.search.export import export_to_optuna  # takes a second, and files need none of it

    runs = scope.runs(store)
    first = next(runs, None)
    if first is None:
        raise _nothing(scope, "trial")
    recipe = store.search(first.trial.search_id).request.settings
    written = export_to_optuna(
        chain([first], runs),
        url,
        name=f"einsum-nas {scope}" if name is None else name,
        widths=(recipe.widths[0], recipe.widths[-1]),
        attributes={
            "task": first.task,
            "fingerprint": first.fingerprint,
            **({} if scope.search_id is None else {"search_id": scope.search_id}),
            "loss_unit": recipe.loss_unit,
            "train_flops_unit": _MEANINGS["train_flops"][1],
        },
    )
    summary = (
        f"wrote study {written.name!r} to {written.shown}: {written.trials} trials "
        f"({written.complete} complete, {written.shortened} shortened runs of the front, "
        f"{written.failed} failed, {written.stopped} stopped); left out: "
        f"{written.unfinished} planned or running, {written.repeats} repeated; "
        f"loss in {recipe.loss_unit}"
    )
    return Exported(written.trials, written.shown, recipe.loss_unit, summary)


def _export_file(store: Store, file_format: str, out: Path, scope: _Scope, rows: str) -> Exported:
    first = next(iter(_sources(scope.runs(store), rows)), None)
    if first is None:
        raise _nothing(scope, "trial" if rows == "trials" else "evaluation")
    unit = store.search(first[0].trial.search_id).request.settings.loss_unit
    columns = _columns(rows, unit)

    def write(file: BinaryIO, wide: bool = False) -> int:
        sources = _sources(scope.runs(store), rows)
        if file_format == "json":
            return _write_json(file, columns, sources)
        return _write_arrow(file, file_format, columns, sources, wide)

    if str(out) == STANDARD_OUTPUT:
        # nothing that was written can be taken back
        wide = max(run.trial.train_flops for run in scope.runs(store)) > _LARGEST_INTEGER
        count = _written_out(partial(write, wide=wide))
    else:
        try:
            count = _replaced(out, write)
        except OverflowError:
            # a run of 2^63 FLOPs or more: 64 bits are for everyone else, whose tools know them
            count = _replaced(out, partial(write, wide=True))
    what = "trials" if rows == "trials" else "evaluations"
    where = "standard output" if str(out) == STANDARD_OUTPUT else out
    summary = f"wrote {count} rows to {where}: {what} of {scope}; loss in {unit}"
    return Exported(count, str(out), unit, summary)


def _sources(runs: Iterable[StoredRun], rows: str) -> Iterator[Source]:
    for run in runs:
        if rows == "trials":
            yield run, None
        else:
            yield from ((run, point) for point in run.points)


def _columns(rows: str, loss_unit: str) -> list[Column]:
    """The columns of a file in their order; those of trials follow the fields of `Trial`."""
    of_trials = _trial_columns(loss_unit)
    if rows == "trials":
        return of_trials
    known = {column.name: column for column in of_trials}
    hints = get_type_hints(StoredPoint)
    of_points = [
        _column(name, _kind(hints[field]), loss_unit, partial(_of_point, field))
        for name, field in _OF_POINT.items()
    ]
    return [*(known[name] for name in _OF_TRIAL), *of_points]


def _trial_columns(loss_unit: str) -> list[Column]:
    make = partial(_column, loss_unit=loss_unit)
    columns: list[Column] = []
    for field, hint in ((f.name, get_type_hints(Trial)[f.name]) for f in fields(Trial)):
        if field in _INTERNAL:
            continue
        if field == "theta":
            columns += [
                make(f"theta_{axis}", "float", read=partial(_exponent, i))
                for i, axis in enumerate(AXES)
            ]
            continue
        kind = _kind(hint)
        read = _plain if kind is not None else _as_json
        columns.append(make(_RENAMED.get(field, field), kind or "text", read=partial(read, field)))
    at = 1 + next(i for i, column in enumerate(columns) if column.name == "search_id")
    columns[at:at] = [
        make("task", "text", read=lambda s: s[0].task),
        make("fingerprint", "text", read=lambda s: s[0].fingerprint),
    ]
    return columns


def _column(name: str, kind: Kind, loss_unit: str, read: Callable[[Source], Any]) -> Column:
    unit, meaning = _MEANINGS.get(name, (None, f"field {name} of the stored trial"))
    return Column(name, kind, loss_unit if unit == "loss" else unit, meaning, read)


def _kind(hint: Any) -> Any:
    """Kind of a field's column by its type; None for what is written as JSON."""
    options = [a for a in get_args(hint) if a is not NoneType] or [hint]
    texts = [text for option in options for text in get_args(option)] or options
    if all(isinstance(text, str) for text in texts):  # those of a Literal
        return "text"
    kinds = {str: "text", int: "int", float: "float", bool: "bool"}
    return kinds.get(options[0]) if len(options) == 1 else None


def _of_point(field: str, source: Source) -> Any:
    return getattr(source[1], field)


def _exponent(axis: int, source: Source) -> float | None:
    theta = source[0].trial.theta
    return theta[axis] if len(theta) == len(AXES) else None


def _plain(field: str, source: Source) -> Any:
    return getattr(source[0].trial, field)


def _as_json(field: str, source: Source) -> str | None:
    value = getattr(source[0].trial, field)
    if value is None:
        return None
    return json.dumps(dict(value) if hasattr(value, "keys") else list(value))


def _batches(sources: Iterator[Source]) -> Iterator[list[Source]]:
    while batch := list(islice(sources, _BATCH)):
        yield batch


def _write_json(file: BinaryIO, columns: Sequence[Column], sources: Iterator[Source]) -> int:
    """One object, a line a row."""
    about = {c.name: {"unit": c.unit, "meaning": c.meaning} for c in columns}
    file.write(b'{"columns": ' + json.dumps(about).encode() + b',\n"rows": [')
    count = 0
    for source in sources:
        row = json.dumps({c.name: c.of(source) for c in columns}, allow_nan=False)
        file.write((",\n" if count else "\n").encode() + row.encode())
        count += 1
    file.write(b"\n]}\n")
    return count


def _write_arrow(
    file: BinaryIO,
    file_format: str,
    columns: Sequence[Column],
    sources: Iterator[Source],
    wide: bool,
) -> int:
    """CSV or Parquet; `wide` writes whole FLOPs of trials with 38 digits instead of 64 bits.

    Raises
    ------
    OverflowError
        Whole FLOPs do not fit into 64 bits, and not `wide`.
    """
    import pyarrow as pa
    from pyarrow.csv import CSVWriter
    from pyarrow.parquet import ParquetWriter

    types = {"text": pa.string(), "int": pa.int64(), "float": pa.float64(), "bool": pa.bool_()}
    schema = pa.schema(
        [
            pa.field(
                c.name,
                pa.decimal128(38, 0)
                if wide and (c.name, c.kind) == ("train_flops", "int")
                else types[c.kind],
                metadata={"meaning": c.meaning, **({"unit": c.unit} if c.unit else {})},
            )
            for c in columns
        ]
    )
    count = 0
    with (CSVWriter if file_format == "csv" else ParquetWriter)(file, schema) as writer:
        for batch in _batches(sources):
            arrays = [
                pa.array([c.of(source) for source in batch], field.type)
                for c, field in zip(columns, schema, strict=True)
            ]
            writer.write_batch(pa.record_batch(arrays, schema=schema))
            count += len(batch)
    return count


def _written_out(write: Callable[[BinaryIO], int]) -> int:
    """What `write` gives, once all that it has written has left for standard output."""
    count = write(sys.stdout.buffer)
    sys.stdout.buffer.flush()
    return count


def _replaced(out: Path, write: Callable[[BinaryIO], int]) -> int:
    """What `write` gives, once all that it has written stands under the name `out`."""
    with _beside(out) as part:
        try:
            with part.open("wb") as file:
                if out.suffix.lower() == _GZIP:
                    with GzipFile(out.stem, "wb", 6, file) as packed:
                        count = write(cast("BinaryIO", packed))
                else:
                    count = write(file)
                file.flush()
                os.fsync(file.fileno())
            part.replace(out)
        except OSError as error:
            raise EinsumNasError(f"cannot write {out}: {error.strerror or error}") from None
    return count


@contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """A name for a temporary file in the folder of `out`, gone at the end.

    Raises
    ------
    InvalidInput
        The folder cannot be written.
    """
    part = out.with_name(f".einsum-nas-{uuid.uuid4().hex}.part")
    try:
        part.touch(exist_ok=False)
    except OSError as error:
        accepted = f"a file in a folder that can be written: {error.strerror}"
        raise InvalidInput("out", str(out), accepted) from None
    try:
        yield part
    finally:
        part.unlink(missing_ok=True)
