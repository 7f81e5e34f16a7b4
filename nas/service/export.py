"""Everything that was measured, for other tools: CSV, Parquet, JSON, or a study of Optuna.

A file has a row a trial, whatever its state, or a row an evaluation.  Missing values are missing:
null in Parquet and JSON, and in CSV an empty field without quotes.  Integers are exact.  Units and
meanings of the columns stand in the field metadata of Parquet (``unit``, ``meaning``), in JSON
under ``columns``, beside ``rows``::

    {"columns": {"loss": {"unit": "nats per character", "meaning": "…"}, …}, "rows": [{…}, …]}

and in the documentation's reference of exported files, which lists `columns_of`.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from types import NoneType
from typing import Any, BinaryIO, Literal, get_args, get_type_hints

from pydantic.fields import FieldInfo

from nas.designs.theta import AXES
from nas.errors import InvalidInput, NotFound
from nas.records.base import LOSS
from nas.service.answers import resolve_task
from nas.service.files import GZIP, checked_place, replaced
from nas.store import Store, StoredPoint, Trial
from nas.store.dump import StoredRun, iterate_runs

FORMATS = ("csv", "parquet", "json", "optuna", "mlflow", "wandb")
#: Formats that are no file: other programs have trials with their curves.
OF_TRIALS = FORMATS[3:]
ROWS = ("trials", "points")
#: Stands for standard output where a file is named.
STANDARD_OUTPUT = "-"
#: Ends of names that promise what is not written.
_OTHER_COMPRESSIONS = (".bz2", ".xz", ".zst", ".lz4", ".br", ".zip", ".7z", ".tgz")
_LARGEST_INTEGER = 2**63 - 1
#: Rows held at once, and of a row group of Parquet.
_BATCH = 4096
_RUN_A_SEARCH = "`einsum-nas search --task {} --train-flops 5e10 --wait` runs one"

Kind = Literal["text", "int", "float", "bool"]
#: Field of `Trial` → column, where they differ.
_RENAMED = {"id": "trial_id", "sampler_params": "proposal"}
#: What only a sampler can read.
_INTERNAL = ("sampler_state",)
#: Columns of its trial that a row of an evaluation begins with.
_OF_TRIAL = (
    "search_id", "trial_id", "number", "kind", "state", "name", "dense", "width", "seed",
    "reused_from",
)  # fmt: skip

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
    check_export(file_format, out, rows, study, overwrite=overwrite)
    scope = _resolved(store, task, search_id)
    if file_format == "optuna":
        return _export_study(store, out, scope, study)
    if file_format in OF_TRIALS:
        return _export_tracked(store, file_format, out, scope, study)
    return _export_file(store, file_format, Path(out), scope, rows)


def check_export(
    file_format: str, out: str, rows: str, study: str | None = None, *, overwrite: bool = False
) -> None:
    """Everything that can be refused before the store is read; see `export`."""
    if file_format not in FORMATS:
        raise InvalidInput("format", file_format, " | ".join(FORMATS))
    if rows not in ROWS:
        raise InvalidInput("rows", rows, " | ".join(ROWS))
    if file_format in OF_TRIALS:
        if rows != "trials":
            accepted = f"trials with format {file_format}: they have their curves"
            raise InvalidInput("rows", rows, accepted)
        if overwrite:
            raise InvalidInput("overwrite", "true", "files only; name another --study")
        return
    if study is not None:
        accepted = f"nothing, but with format {' | '.join(OF_TRIALS)}"
        raise InvalidInput("study", study, accepted)
    if out == STANDARD_OUTPUT:
        if overwrite:
            raise InvalidInput("overwrite", "true", "files only, not standard output")
        return
    path = Path(out)
    suffix = path.suffix.lower()
    if file_format == "parquet" and suffix == GZIP:
        raise InvalidInput("out", out, "a name without .gz: Parquet is compressed by itself")
    if suffix in _OTHER_COMPRESSIONS:
        raise InvalidInput("out", out, "a name that ends in .gz, or that promises no compression")
    checked_place(out, overwrite=overwrite)


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
            "train_flops_unit": "training FLOPs; 1 MAC = 2 FLOPs, training = 3 × forward",
        },
    )
    summary = (
        f"wrote study {written.name!r} to {written.shown}: {written.trials} trials "
        f"({written.complete} complete, {written.shortened} shortened runs of the front, "
        f"{written.failed} failed, {written.stopped} stopped); left out: "
        f"{written.unfinished} planned, running or paused, {written.repeats} repeated; "
        f"loss in {recipe.loss_unit}"
    )
    return Exported(written.trials, written.shown, recipe.loss_unit, summary)


def _export_tracked(
    store: Store, file_format: str, out: str, scope: _Scope, name: str | None
) -> Exported:
    from nas.service import tracking

    first = next(scope.runs(store), None)
    if first is None:
        raise _nothing(scope, "trial")
    unit = store.search(first.trial.search_id).request.settings.loss_unit
    named = f"einsum-nas {scope}" if name is None else name
    if file_format == "mlflow":
        about = {"task": first.task, "loss_unit": unit}
        count = tracking.to_mlflow(scope.runs(store), out, named, about)
        summary = f"wrote {count} runs that were not there to experiment {named!r} at {out}"
    else:
        count = tracking.to_wandb(scope.runs(store), out, name or "einsum-nas", str(scope))
        summary = f"wrote {count} offline runs to {out}/wandb; `wandb sync` uploads them"
    return Exported(count, out, unit, f"{summary}; loss in {unit}")


def _export_file(store: Store, file_format: str, out: Path, scope: _Scope, rows: str) -> Exported:
    first = next(iter(_sources(scope.runs(store), rows)), None)
    if first is None:
        raise _nothing(scope, "trial" if rows == "trials" else "evaluation")
    unit = store.search(first[0].trial.search_id).request.settings.loss_unit
    columns = columns_of(rows, unit)

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
            count = replaced(out, write)
        except OverflowError:
            # a run of 2^63 FLOPs or more: 64 bits are for everyone else, whose tools know them
            count = replaced(out, partial(write, wide=True))
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


def columns_of(rows: str, loss_unit: str) -> list[Column]:
    """The columns of a file in their order: the fields of `Trial`, or of `StoredPoint` behind some
    of those.

    Parameters
    ----------
    rows
        One of `ROWS`.
    loss_unit
        Unit of the task's losses.
    """
    of_trials = [c for name, field in _FIELDS.items() for c in _columns_of(name, field, loss_unit)]
    if rows == "trials":
        return of_trials
    known = {column.name: column for column in of_trials}
    of_points = [
        _column(name, field, loss_unit, partial(_of_point, name))
        for name, field in _POINT_FIELDS.items()
    ]
    return [*(known[name] for name in _OF_TRIAL), *of_points]


_FIELDS = {name: f for name, f in Trial.model_fields.items() if name not in _INTERNAL}
_POINT_FIELDS = {
    name: FieldInfo.from_annotation(hint)
    for name, hint in get_type_hints(StoredPoint, include_extras=True).items()
    if name != "window_losses"
}


def _columns_of(name: str, field: FieldInfo, loss_unit: str) -> Iterator[Column]:
    """The columns of a field of a trial."""
    if name == "theta":
        for i, axis in enumerate(AXES):
            meaning = f"exponent {axis} of θ; missing but for two factors"
            yield Column(f"theta_{axis}", "float", None, meaning, partial(_exponent, i))
        return
    yield _column(name, field, loss_unit, partial(_of_trial, name))
    if name == "search_id":
        yield Column("task", "text", None, "task", lambda s: s[0].task)
        meaning = "digest of the task's data and recipe"
        yield Column("fingerprint", "text", None, meaning, lambda s: s[0].fingerprint)


def _column(name: str, field: FieldInfo, loss_unit: str, read: Callable[[Source], Any]) -> Column:
    kind, extra = _kind(field.annotation), field.json_schema_extra
    unit = str(extra["unit"]) if isinstance(extra, dict) else None
    meaning = field.description or ""
    if kind is None:
        read, meaning = partial(_as_json, read), f"{meaning}, JSON"
    shown = loss_unit if extra is LOSS else unit
    return Column(_RENAMED.get(name, name), kind or "text", shown, meaning, read)


def _kind(hint: Any) -> Kind | None:
    """Kind of a field's column by its type; None for what is written as JSON."""
    options = [a for a in get_args(hint) if a is not NoneType] or [hint]
    texts = [text for option in options for text in get_args(option)] or options
    if all(isinstance(text, str) for text in texts):  # those of a Literal
        return "text"
    kinds: dict[Any, Kind] = {str: "text", int: "int", float: "float", bool: "bool"}
    return kinds.get(options[0]) if len(options) == 1 else None


def _of_point(field: str, source: Source) -> Any:
    return getattr(source[1], field)


def _of_trial(field: str, source: Source) -> Any:
    return getattr(source[0].trial, field)


def _exponent(axis: int, source: Source) -> float | None:
    theta = source[0].trial.theta
    return theta[axis] if len(theta) == len(AXES) else None


def _as_json(read: Callable[[Source], Any], source: Source) -> str | None:
    value = read(source)
    return None if value is None else json.dumps(value)


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
