"""The best runs of every task and search at every budget, updated in SQL whenever a run completes.

A *scope* is a search (its id) or a task of one tenant: `tenant/name@fingerprint`, or only
`name@fingerprint` for the tenant `default`.  For each scope and *axis* (train FLOPs, parameters, …)
the table holds *standings*: every point (a value of the axis and a loss) that fewer than
`KEPT_MODELS` other models beat.  To beat a point is to equal or undercut it in both the axis and
the loss.  A model is a structure at a width; its runs with different seeds count as one.
Structured and dense models have separate standings.  The points that no other model beats are the
Pareto front; the others belong to the models that the best one has to be compared with.

A point that `KEPT_MODELS` models beat is deleted.  It never has to come back, because completed
runs do not change.

A new run does not read the other standings.  Each sweep (see below) leaves a short list of *bars*.
A new point above a bar is certainly beaten and is dropped at once; all others are inserted.  When a
quarter of the standings is new, a sweep compares all of them, deletes those that are beaten, and
sets new bars.  Until then the table may hold points that are beaten.  They change no answer: every
query computes the front, or the lowest losses, from all points that are there.

Only completed runs enter, never stopped, failed or running ones.
"""

from __future__ import annotations

import bisect
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import (
    ColumnElement,
    Connection,
    and_,
    delete,
    func,
    insert,
    or_,
    select,
    tuple_,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from nas.planning.recipe import TASKS
from nas.records.run import CurvePoint, Run
from nas.records.trial import StoredPoint
from nas.settings import DEFAULT_TENANT
from nas.store import rows
from nas.store.engine import reading, translated
from nas.store.records import ConfirmedPair, ScopeState
from nas.store.schema import BarRow, PointRow, ScopeRow, SearchRow, StandingRow, TrialRow
from nas.store.searches import Store

#: Number of models that are kept at every budget, for structured and for dense layers each.
KEPT_MODELS = 64
#: Version of the table's contents, stored as the revision of the scope `*`; raise it to rebuild.
LAYOUT = 1
_LAYOUT_SCOPE = "*"
#: A sweep happens when more than `_SWEPT_AT_LEAST` points, and one in `_SWEPT_SHARE`, are new.
_SWEPT_AT_LEAST = 256
_SWEPT_SHARE = 4
_MOST_EDGES = 256
#: Rows of one INSERT, and values of one IN: within the limits of every database.
_AT_ONCE = 500


@dataclass(frozen=True, slots=True)
class Axis:
    """A quantity that a Pareto front is drawn against."""

    meaning: str
    unit: str
    #: whether every point of a curve has a value; otherwise each run has one, at its end
    along_curve: bool
    #: whether it is a time or a size measured where the run ran
    measured: bool


AXES: Mapping[str, Axis] = {
    "train_flops": Axis(
        "training compute", "train FLOPs: 1 MAC = 2 FLOPs, training = 3 × forward, all matrix "
        "products", True, False,
    ),
    "train_seconds": Axis("training time", "seconds", True, True),
    "inference_flops": Axis(
        "inference compute", "forward FLOPs per token of the whole model", False, False
    ),
    "params": Axis("parameters", "trainable parameters of the whole model", False, False),
    "step_seconds": Axis("time of a training step", "seconds per step", False, True),
    "peak_memory": Axis("peak memory of training", "bytes", False, True),
}  # fmt: skip
#: Column of a trial that a per-run axis reads.
_COLUMN_OF = {name: rows.column_of(name) for name, axis in AXES.items() if not axis.along_curve}


@dataclass(slots=True)
class Points:
    """Points of runs on one axis, as columns of equal length (n,)."""

    #: identifies what is run with several seeds; see `model_number`
    model: NDArray[np.int64]
    trial: NDArray[np.int64]
    step: NDArray[np.int64]
    x: NDArray[np.float64]
    loss: NDArray[np.float64]

    @classmethod
    def of(cls, rows: Sequence[Sequence[Any]]) -> Points:
        """From rows of (model, trial, step, x, loss)."""
        model, trial, step, x, loss = zip(*rows, strict=True) if rows else ((),) * 5
        return cls(
            np.array(model, dtype=np.int64),
            np.array(trial, dtype=np.int64),
            np.array(step, dtype=np.int64),
            np.array(x, dtype=np.float64),
            np.array(loss, dtype=np.float64),
        )

    @classmethod
    def together(cls, parts: Sequence[Points]) -> Points:
        """The points of all parts."""
        names = ("model", "trial", "step", "x", "loss")
        return cls(*(np.concatenate([getattr(p, n) for p in parts]) for n in names))

    def __len__(self) -> int:
        return len(self.trial)

    def select(self, which: Any) -> Points:
        """Those of a mask or of indices."""
        return Points(
            self.model[which], self.trial[which], self.step[which], self.x[which], self.loss[which]
        )

    def rows(self) -> Iterable[tuple[int, int, int, float, float]]:
        """(model, trial, step, x, loss) of each."""
        return zip(
            self.model.tolist(), self.trial.tolist(), self.step.tolist(), self.x.tolist(),
            self.loss.tolist(), strict=True,
        )  # fmt: skip


def model_number(model: str | None, trial_id: int) -> int:
    """60 bits of a model's digest, enough to distinguish a billion models."""
    return int(model[:15], 16) if model and _HEXADECIMAL.match(model) else -trial_id


_HEXADECIMAL = re.compile(r"[0-9a-f]{15}")


def kept(points: Points, models: int | None = None) -> NDArray[np.bool_]:
    """Which points lower their own model's loss and are beaten by fewer than `models` others.

    A model beats a point if one of its own has no more of the axis and no higher loss; of equal
    points, the one with the lower trial id is first.  By default `KEPT_MODELS`.
    """
    return _sweep(points, KEPT_MODELS if models is None else models)[0]


def _sweep(points: Points, models: int) -> tuple[NDArray[np.bool_], list[tuple[float, float]]]:
    """(what `kept` gives, every (x, loss) from which on a point is beaten by `models` models)."""
    order = np.lexsort((points.step, points.trial, points.loss, points.x))
    # points that are not finite cannot be compared; they take no part
    usable = np.isfinite(points.x) & np.isfinite(points.loss)
    order = order[usable[order]]
    chosen = np.zeros(len(points), dtype=bool)
    bars: list[tuple[float, float]] = []
    lowest: list[tuple[float, int]] = []  # the best loss so far of the `models` best, sorted
    own: dict[int, float] = {}
    bar = math.inf  # highest loss in `lowest` once it is full: points at or above it are beaten
    xs, owners, losses = points.x.tolist(), points.model.tolist(), points.loss.tolist()
    for i in order.tolist():
        loss, owner = losses[i], owners[i]
        if loss >= bar:
            continue
        before = own.get(owner, math.inf)
        if loss >= before:
            continue
        chosen[i] = True
        own[owner] = loss
        if before < math.inf:
            at = bisect.bisect_left(lowest, (before, owner))
            if at < len(lowest) and lowest[at] == (before, owner):
                del lowest[at]
        bisect.insort(lowest, (loss, owner))
        del lowest[models:]
        if len(lowest) == models and lowest[-1][0] < bar:
            bar = lowest[-1][0]
            bars.append((xs[i], bar))
    return chosen, bars


def task_scope(task: str, fingerprint: str, tenant: str = DEFAULT_TENANT) -> str:
    """The scope of a task's data and recipe among a tenant's searches."""
    return of_tenant(f"{task}@{fingerprint}", tenant)


def of_tenant(name: str, tenant: str) -> str:
    """The scope for a search's id, a task's name or name@fingerprint, as one tenant uses them."""
    is_search = name not in TASKS and "@" not in name
    return name if is_search or tenant == DEFAULT_TENANT else f"{tenant}/{name}"


def _is_default(search: SearchRow) -> bool:
    """Whether a bare task name may mean this search's data and recipe."""
    request = search.request
    chosen = request.get("recipe") or request.get("overrides")  # older requests lack both fields
    return search.data_path is None and not chosen


def _scopes(search: SearchRow, reused: bool) -> list[str]:
    """The scopes that a completed run counts in.

    A run that reuses the result of another search counts in its search, but not in the task again.
    """
    if reused or search.task_fingerprint is None:
        return [search.id]
    return sorted([search.id, task_scope(search.task, search.task_fingerprint, search.tenant)])


def _locked_scope(session: Session, scope: str) -> ScopeRow:
    """The scope's row, created if missing, and locked until the transaction ends."""
    new = {"scope": scope, "revision": 0, "trials": 0, "points": 0, "searches": 0}
    dialect = session.get_bind().dialect.name
    make = postgresql.insert if dialect == "postgresql" else sqlite.insert
    session.execute(make(ScopeRow).values(**new).on_conflict_do_nothing())
    query = select(ScopeRow).where(ScopeRow.scope == scope).with_for_update()
    return session.scalars(query, execution_options={"populate_existing": True}).one()


def touch(session: Session, search: SearchRow) -> None:
    """Raise the revision of the bare task name, which may mean other data from now on."""
    if _is_default(search):
        _locked_scope(session, of_tenant(search.task, search.tenant)).revision += 1


def enter(session: Session, search: SearchRow, trial: TrialRow) -> None:
    """Add a run that has just completed, in the transaction that completes it."""
    source = trial.reused_from and session.get(TrialRow, trial.reused_from)
    if source and source.search_id == search.id:
        return  # the run whose result it reuses has entered already
    query = (
        select(PointRow.step, PointRow.train_flops, PointRow.loss, PointRow.seconds)
        .where(PointRow.trial_id == trial.id)
        .order_by(PointRow.step)
    )
    curve = session.execute(query).all()
    found = _points_of(trial, curve)
    for scope in _scopes(search, bool(source)):
        state = _locked_scope(session, scope)
        state.revision += 1
        state.trials += 1
        state.points += len(curve)
        state.searches += _is_first(session, search, trial, scope)
        ends = [c.train_flops for c in curve]
        state.least_flops = min(ends + _known(state.least_flops))
        state.greatest_flops = max(ends + _known(state.greatest_flops))
        _merge(session, scope, trial.dense, found)
    confirmed = trial.confirms and session.get(TrialRow, trial.confirms)
    if confirmed:  # answers about the confirmed search include its confirmations
        _locked_scope(session, confirmed.search_id).revision += 1
    if not source:
        touch(session, search)


def _is_first(session: Session, search: SearchRow, trial: TrialRow, scope: str) -> bool:
    """Whether a completed run is the first of its search in a scope."""
    others = select(TrialRow.id).where(
        TrialRow.search_id == search.id, TrialRow.state == "complete", TrialRow.id != trial.id
    )
    if scope != search.id:
        others = others.where(TrialRow.reused_from.is_(None))
    return session.scalar(others.limit(1)) is None


def _known(value: float | None) -> list[float]:
    return [] if value is None else [value]


def _points_of(trial: TrialRow, curve: Sequence[Any]) -> dict[str, Points]:
    """The run's points on every axis that it has a value of."""
    last, model = curve[-1], model_number(trial.model, trial.id)
    found = {
        "train_flops": [(model, trial.id, c.step, c.train_flops, c.loss) for c in curve],
        "train_seconds": [(model, trial.id, c.step, c.seconds, c.loss) for c in curve],
    }
    for axis, column in _COLUMN_OF.items():
        value = getattr(trial, column)
        if value is not None:
            found[axis] = [(model, trial.id, last.step, float(value), last.loss)]
    return {axis: Points.of(rows) for axis, rows in found.items()}


def _merge(session: Session, scope: str, dense: bool, new: Mapping[str, Points]) -> None:
    """Add the points of a new run to the standings of a locked scope."""
    query = select(BarRow).where(BarRow.scope == scope, BarRow.dense == dense)
    bars = {bar.axis: bar for bar in session.scalars(query)}
    for axis, points in new.items():
        bar = bars.get(axis)
        if bar is None:
            bar = BarRow(scope=scope, axis=axis, dense=dense, size=0, added=0, edges=b"")
            session.add(bar)
        entering = points.select(kept(points) & ~_is_beaten(points, bar.edges))
        if not len(entering):
            continue
        _insert(session, _as_rows(scope, axis, dense, entering))
        bar.size += len(entering)
        bar.added += len(entering)
        if bar.added > max(_SWEPT_AT_LEAST, bar.size // _SWEPT_SHARE):
            session.flush()
            _sweep_out(session, bar)


def _is_beaten(points: Points, packed: bytes) -> NDArray[np.bool_]:
    """Which points are certainly beaten by enough models, judging by the bars."""
    if not packed:
        return np.zeros(len(points), dtype=bool)
    x, loss = np.frombuffer(packed, dtype="<f8").reshape(-1, 2).T
    at = np.searchsorted(x, points.x, side="right") - 1
    # only strictly above: of equal points the lower trial id is the better, and may come later
    return (at >= 0) & (points.loss > loss[np.maximum(at, 0)])


def _sweep_out(session: Session, bar: BarRow) -> None:
    """Delete the points that enough other models beat by now, and set new bars."""
    own = and_(
        StandingRow.scope == bar.scope, StandingRow.axis == bar.axis,
        StandingRow.dense == bar.dense,
    )  # fmt: skip
    query = select(
        StandingRow.model, StandingRow.trial_id, StandingRow.step, StandingRow.x, StandingRow.loss
    )
    points = Points.of(session.execute(query.where(own)).all())
    stays, bars = _sweep(points, KEPT_MODELS)
    leaving = points.select(~stays)
    key = tuple_(StandingRow.trial_id, StandingRow.step)
    for part in _pieces(list(zip(leaving.trial.tolist(), leaving.step.tolist(), strict=True))):
        session.execute(delete(StandingRow).where(own, key.in_(part)))
    bar.size, bar.added, bar.edges = int(stays.sum()), 0, _packed(bars)


def _packed(bars: Sequence[tuple[float, float]]) -> bytes:
    """At most `_MOST_EDGES` of the bars; with fewer, more points stay until the next sweep."""
    every = max(1, math.ceil(len(bars) / _MOST_EDGES))
    return np.array(bars[::-1][::every][::-1], dtype="<f8").tobytes()


def _as_rows(scope: str, axis: str, dense: bool, points: Points) -> list[dict[str, Any]]:
    same = {"scope": scope, "axis": axis, "dense": dense}
    return [
        {**same, "model": m, "trial_id": t, "step": s, "x": x, "loss": y}
        for m, t, s, x, y in points.rows()
    ]


def _pieces(values: Sequence[Any]) -> Iterable[Sequence[Any]]:
    return (values[i : i + _AT_ONCE] for i in range(0, len(values), _AT_ONCE))


def _insert(session: Session, rows: Sequence[Mapping[str, Any]]) -> None:
    for part in _pieces(rows):
        session.execute(insert(StandingRow), list(part))


# --- rebuilding


def are_current(connection: Connection) -> bool:
    """Whether the standings have the contents that this version keeps."""
    with Session(connection) as session:
        layout = session.get(ScopeRow, _LAYOUT_SCOPE)
        return layout is not None and layout.revision == LAYOUT


def ensure(connection: Connection) -> None:
    """Rebuild the standings if they are not this version's."""
    if not are_current(connection):
        with Session(connection) as session:
            rebuild(session)
            session.flush()


def rebuild(session: Session) -> None:
    """Rebuild standings and counts of every scope from the completed runs, in one transaction.

    The transaction is the caller's.  It reads search by search, so that memory holds the points of
    one search and the standings of the tasks only.  Revisions continue from their old values.
    """
    revisions = dict(session.execute(select(ScopeRow.scope, ScopeRow.revision)).all())
    for table in (StandingRow, BarRow, ScopeRow):
        session.execute(delete(table))
    session.flush()
    counts: dict[str, dict[str, Any]] = {}
    tasks: dict[tuple[str, bool, str], list[Points]] = {}
    for search in session.scalars(select(SearchRow).order_by(SearchRow.sequence)).all():
        if _is_default(search):
            counts.setdefault(of_tenant(search.task, search.tenant), _no_counts())
        own, shared = _of_search(session, search)
        _tally(counts, search.id, own)
        scope = task_scope(search.task, search.task_fingerprint or "", search.tenant)
        if search.task_fingerprint is not None:
            _tally(counts, scope, shared)
        for (axis, dense), points in own.points.items():
            _stand(session, search.id, axis, dense, points)
        for (axis, dense), points in shared.points.items():
            if search.task_fingerprint is None:
                continue
            held = tasks.setdefault((scope, dense, axis), [])
            held.append(points.select(kept(points)))
            if len(held) > 16:
                merged = Points.together(held)
                tasks[scope, dense, axis] = [merged.select(kept(merged))]
    for (scope, dense, axis), parts in tasks.items():
        _stand(session, scope, axis, dense, Points.together(parts))
    for scope, values in counts.items():
        revision = revisions.get(scope, 0) + 1
        session.execute(insert(ScopeRow).values(scope=scope, revision=revision, **values))
    session.execute(
        insert(ScopeRow).values(scope=_LAYOUT_SCOPE, **{**_no_counts(), "revision": LAYOUT})
    )


def _stand(session: Session, scope: str, axis: str, dense: bool, points: Points) -> None:
    """Insert all standings of a scope on an axis, which has none yet."""
    stays, bars = _sweep(points, KEPT_MODELS)
    _insert(session, _as_rows(scope, axis, dense, points.select(stays)))
    session.execute(
        insert(BarRow).values(
            scope=scope, axis=axis, dense=dense, size=int(stays.sum()), added=0,
            edges=_packed(bars),
        )
    )  # fmt: skip


def _no_counts() -> dict[str, Any]:
    return {
        "trials": 0, "points": 0, "searches": 0, "least_flops": None, "greatest_flops": None
    }  # fmt: skip


@dataclass
class _OfSearch:
    """The completed runs of one search."""

    trials: int
    points: dict[tuple[str, bool], Points]


def _tally(counts: dict[str, dict[str, Any]], scope: str, found: _OfSearch) -> None:
    if not found.trials:
        return
    state = counts.setdefault(scope, _no_counts())
    state["trials"] += found.trials
    state["searches"] += 1
    curves = [p for (axis, _), p in found.points.items() if axis == "train_flops"]
    state["points"] += sum(len(p) for p in curves)
    flops = np.concatenate([p.x for p in curves])
    state["least_flops"] = min([float(flops.min()), *_known(state["least_flops"])])
    state["greatest_flops"] = max([float(flops.max()), *_known(state["greatest_flops"])])


def _of_search(session: Session, search: SearchRow) -> tuple[_OfSearch, _OfSearch]:
    """(what counts in the search, what counts in its task)."""
    own = select(TrialRow.id).where(TrialRow.search_id == search.id)
    counts = or_(TrialRow.reused_from.is_(None), TrialRow.reused_from.not_in(own.scalar_subquery()))
    where = (TrialRow.search_id == search.id, TrialRow.state == "complete", counts)
    columns = [getattr(TrialRow, name) for name in _COLUMN_OF.values()]
    trials = session.execute(
        select(TrialRow.id, TrialRow.dense, TrialRow.reused_from, TrialRow.steps, TrialRow.loss,
               TrialRow.model, *columns).where(*where)
    ).all()  # fmt: skip
    curves = session.execute(
        select(PointRow.trial_id, PointRow.step, PointRow.train_flops, PointRow.seconds,
               PointRow.loss)
        .join(TrialRow, PointRow.trial_id == TrialRow.id)
        .where(*where)
    ).all()  # fmt: skip
    every = np.array(curves, dtype=np.float64).reshape(-1, 5)  # ids are exact up to 2^53
    dense = {t.id for t in trials if t.dense}
    reused = {t.id for t in trials if t.reused_from is not None}
    parts: dict[tuple[str, bool], Points] = {}
    ids, steps = every[:, 0].astype(np.int64), every[:, 1].astype(np.int64)
    numbers = {t.id: model_number(t.model, t.id) for t in trials}
    models = np.array([numbers[i] for i in ids.tolist()], dtype=np.int64)
    is_dense = np.isin(ids, list(dense))
    for kind in (False, True):
        of_kind = is_dense == kind
        if of_kind.any():
            for axis, column in (("train_flops", 2), ("train_seconds", 3)):
                parts[axis, kind] = Points(
                    models[of_kind],
                    ids[of_kind],
                    steps[of_kind],
                    every[of_kind, column],
                    every[of_kind, 4],
                )
        for axis, name in _COLUMN_OF.items():
            rows = [
                (numbers[t.id], t.id, t.steps, float(getattr(t, name)), t.loss)
                for t in trials
                if t.dense == kind and getattr(t, name) is not None
            ]
            if rows:
                parts[axis, kind] = Points.of(rows)
    first = {
        key: points.select(~np.isin(points.trial, list(reused))) for key, points in parts.items()
    }
    first = {key: points for key, points in first.items() if len(points)}
    return _OfSearch(len(trials), parts), _OfSearch(len(trials) - len(reused), first)


# --- reading


class Standings:
    """Reads what answers are computed from: the fronts, the runs near them, and their curves."""

    def __init__(self, store: Store) -> None:
        self._engine = store.engine
        self._plain = store.engine.execution_options(isolation_level="AUTOCOMMIT")

    def state(self, scope: str) -> ScopeState | None:
        """Counts of a scope; None if no run has completed in it."""
        columns = (
            ScopeRow.revision, ScopeRow.trials, ScopeRow.points, ScopeRow.searches,
            ScopeRow.least_flops, ScopeRow.greatest_flops,
        )  # fmt: skip
        with reading(self._engine) as session:
            row = session.execute(select(*columns).where(ScopeRow.scope == scope)).one_or_none()
        return None if row is None else ScopeState(*row)

    def revisions(self, scopes: Iterable[str]) -> dict[str, int]:
        """Scope → revision, for those of the scopes and bare task names that have one.

        A revision grows with every change of the runs that answers about the scope are computed
        from; that of a bare name also when the name begins to mean other data.  The read is one
        statement without a transaction.
        """
        query = select(ScopeRow.scope, ScopeRow.revision).where(ScopeRow.scope.in_(list(scopes)))
        with translated(), self._plain.connect() as connection:
            return {scope: int(revision) for scope, revision in connection.execute(query)}

    def front(self, scope: str, axis: str, *, dense: bool) -> list[CurvePoint]:
        """The Pareto front of a scope, in the order of the axis."""
        order = (StandingRow.x, StandingRow.loss, StandingRow.trial_id, StandingRow.step)
        lowest_before = func.min(StandingRow.loss).over(order_by=order, rows=(None, -1))
        ranked = (
            select(StandingRow, lowest_before.label("before"))
            .where(_standing(scope, axis, dense))
            .subquery()
        )
        first = (
            select(ranked.c.trial_id, ranked.c.step)
            .where(or_(ranked.c.before.is_(None), ranked.c.loss < ranked.c.before))
            .order_by(ranked.c.x)
        )
        with reading(self._engine) as session:
            keys = [(int(trial), int(step)) for trial, step in session.execute(first)]
        found = {(p.run.trial_id, p.step): p for p in self._curve_points(keys)}
        # a stored loss that is not finite belongs to no front, however it got there
        return [found[key] for key in keys if math.isfinite(found[key].loss)]

    def lowest(self, scope: str, axis: str, limit: float, *, dense: bool) -> list[int]:
        """A trial of each of the `KEPT_MODELS` models with the lowest losses within a limit."""
        best = func.min(StandingRow.loss)
        query = (
            select(func.min(StandingRow.trial_id))
            .where(_standing(scope, axis, dense), StandingRow.x <= limit)
            .group_by(StandingRow.model)
            .order_by(best, func.min(StandingRow.trial_id))
            .limit(KEPT_MODELS)
        )
        with reading(self._engine) as session:
            return list(session.scalars(query))

    def least(self, scope: str, axis: str) -> float | None:
        """The smallest value of an axis among completed runs; None if there is none."""
        query = select(func.min(StandingRow.x)).where(
            StandingRow.scope == scope, StandingRow.axis == axis
        )
        with reading(self._engine) as session:
            return session.scalar(query)

    def _curve_points(self, keys: Sequence[tuple[int, int]]) -> Iterable[CurvePoint]:
        with reading(self._engine) as session:
            for part in _pieces(keys):
                query = (
                    select(*rows.RUN, *rows.POINT, rows.COMPLETE)
                    .join(TrialRow, PointRow.trial_id == TrialRow.id)
                    .where(tuple_(PointRow.trial_id, PointRow.step).in_(part))
                )
                yield from rows.to_curve_points(session.execute(query))

    def runs(
        self,
        scope: str,
        *,
        trials: Iterable[int] = (),
        models: Iterable[str] = (),
    ) -> list[Run]:
        """Completed runs of a scope with their curves: those named, and all of the given models.

        Of runs that share one result, only the one that was executed is included.
        """
        ids, digests = sorted(set(trials)), sorted(set(models))
        where = _in_scope(scope)
        found: dict[int, Any] = {}
        curves: dict[int, list[StoredPoint]] = {}
        with reading(self._engine) as session:
            wanted: tuple[tuple[Any, Sequence[Any]], ...] = (
                (TrialRow.id, ids), (TrialRow.model, digests)
            )  # fmt: skip
            for column, values in wanted:
                for part in _pieces(values):
                    query = (
                        select(*rows.RUN)
                        .join(SearchRow, TrialRow.search_id == SearchRow.id)
                        .where(TrialRow.state == "complete", where, column.in_(part))
                    )
                    found.update((r.trial_id, r) for r in session.execute(query))
            for part in _pieces(sorted(found)):
                curve = select(PointRow.trial_id, *rows.POINT).order_by(PointRow.step)
                points = curve.where(PointRow.trial_id.in_(part))
                for trial, *values in session.execute(points):
                    curves.setdefault(trial, []).append(StoredPoint(*values))
        return [rows.to_run(row, curves.get(trial, ())) for trial, row in sorted(found.items())]

    def models(self, trials: Iterable[int]) -> set[str]:
        """The models of the given trials."""
        found: set[str] = set()
        with reading(self._engine) as session:
            for part in _pieces(sorted(set(trials))):
                query = select(TrialRow.model).where(
                    TrialRow.id.in_(part), TrialRow.model.is_not(None)
                )
                found.update(str(m) for m in session.scalars(query))
        return found

    def confirmed(self, scope: str) -> list[ConfirmedPair]:
        """Every run of a scope that was confirmed, with the results of its confirmations.

        For a search these are the runs that it confirms, and its own runs that others confirmed.
        """
        source = TrialRow.__table__.alias("source")
        either = or_(TrialRow.search_id == scope, source.c.search_id == scope)
        query = (
            select(
                source.c.id, source.c.search_id, source.c.train_flops, source.c.dense,
                source.c.loss, func.avg(TrialRow.loss), func.count(TrialRow.seed.distinct()),
                TrialRow.train_flops / source.c.train_flops,
            )
            .join(SearchRow, TrialRow.search_id == SearchRow.id)
            .join(source, source.c.id == TrialRow.confirms)
            .where(TrialRow.state == "complete", source.c.state == "complete")
            .where(TrialRow.confirms.is_not(None), TrialRow.reused_from.is_(None))
            .where(_in_scope(scope) if "@" in scope else either)
            .group_by(source.c.id, source.c.search_id, source.c.train_flops, source.c.dense,
                      source.c.loss, TrialRow.train_flops / source.c.train_flops)
            .order_by(source.c.id)
        )  # fmt: skip
        with reading(self._engine) as session:
            return [ConfirmedPair(*row) for row in session.execute(query)]


def _standing(scope: str, axis: str, dense: bool) -> ColumnElement[bool]:
    return and_(StandingRow.scope == scope, StandingRow.axis == axis, StandingRow.dense == dense)


def _in_scope(scope: str) -> ColumnElement[bool]:
    owner, _, named = scope.rpartition("/")
    task, _, fingerprint = named.partition("@")
    if not fingerprint:
        own = select(TrialRow.id).where(TrialRow.search_id == scope).scalar_subquery()
        elsewhere = or_(TrialRow.reused_from.is_(None), TrialRow.reused_from.not_in(own))
        return and_(SearchRow.id == scope, elsewhere)
    return and_(
        SearchRow.tenant == (owner or DEFAULT_TENANT),
        SearchRow.task == task,
        SearchRow.task_fingerprint == fingerprint,
        TrialRow.reused_from.is_(None),
    )
