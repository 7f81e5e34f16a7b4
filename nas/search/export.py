"""Stored runs as an Optuna study of two objectives, train FLOPs and loss, both minimised.

Every completed run becomes one COMPLETE trial at its last point.  Each point of the Pareto front
that is no run's last point is one more, marked ``shortened``: at a constant learning rate a point
of a curve is the result of a shorter run.  So the study's `best_trials` are the Pareto front of
the completed runs, point by point.

Failed and stopped runs are FAIL trials with their reason, for they have no value at their last
step; runs that have not ended are left out, as are results that were taken from another run of
the study.  A trial whose FLOPs and loss both equal those of an earlier run's point on the front
would stand in `best_trials` next to it, where our front names the earlier run alone.  It keeps
its values and says ``equals_trial``, and its Optuna constraint, 1 instead of 0, takes it out of
`best_trials`.

Optuna's storages take some 30 ms of a core for a trial with ten points.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import chain
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import DuplicatedStudyError, StorageInternalError
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from nas.analysis.frontier import non_dominated
from nas.designs.theta import AXES
from nas.errors import InvalidInput, NotFound, StoreUnavailable
from nas.store import CurvePoint, StoredPoint
from nas.store.dump import (
    ForeignDatabase,
    StoredRun,
    foreign_database,
    refusing,
    translating,
)

METRICS = ("train_flops", "loss")
_LONGEST_NAME = 512  # characters, the width of Optuna's column
_EXPONENT = FloatDistribution(0.0, 1.0)
_STATES = {
    "complete": TrialState.COMPLETE,
    "failed": TrialState.FAIL,
    "stopped": TrialState.FAIL,
}
#: What a user can tell runs by: user attribute → field of `nas.store.Trial`.
_ATTRIBUTES = {
    "search_id": "search_id", "trial_id": "id", "trial_number": "number", "kind": "kind",
    "state": "state", "name": "name", "design": "design", "dense": "dense", "depth": "depth",
    "seed": "seed",
    "params": "params", "forward_flops_per_token": "forward_flops_per_token",
    "seconds_per_step": "seconds_per_step", "peak_memory_bytes": "peak_memory_bytes",
    "reason": "error", "reused_from": "reused_from",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class WrittenStudy:
    """What an export to Optuna has written and left out, in trials."""

    name: str
    #: the storage's URL without password
    shown: str
    complete: int
    #: points of the front that are no run's last point
    shortened: int
    failed: int
    stopped: int
    #: planned, running and paused
    unfinished: int
    #: results taken from another run of the study
    repeats: int

    @property
    def trials(self) -> int:
        return self.complete + self.shortened + self.failed + self.stopped


def export_to_optuna(
    runs: Iterable[StoredRun],
    url: str,
    *,
    name: str,
    widths: Sequence[int],
    attributes: Mapping[str, Any],
) -> WrittenStudy:
    """Make a study of `runs`, which are read once and not kept.

    Parameters
    ----------
    runs
        In the order of their trial ids, as `nas.store.dump.iterate_runs` gives them.
    url
        An Optuna storage: SQLite or PostgreSQL.
    name
        Of the new study, 1 to 512 characters.
    widths
        Least and greatest width that the recipe admits: the range of the parameter ``width``.
    attributes
        User attributes of the study.

    Raises
    ------
    InvalidInput
        About ``out``: the URL cannot be used; about ``study``: the name is taken or no name.
    NotFound
        No run has ended; nothing is created then.
    StoreUnavailable
        The storage stopped answering; the study is deleted again if it can be.
    """
    if not 1 <= len(name) <= _LONGEST_NAME or not name.isprintable():
        raise InvalidInput("study", name, f"1 to {_LONGEST_NAME} printable characters")
    counts: Counter[str] = Counter()
    ended = _ended(runs, counts)
    first = next(ended, None)
    if first is None:
        raise NotFound(
            f"no run has ended yet ({counts['unfinished']} planned, running or paused); "
            "`einsum-nas worker` runs what is queued"
        )
    database = foreign_database(url, "out")
    with _opened(database) as storage:
        study = _new_study(storage, name, database, attributes)
        study_id = storage.get_study_id_from_name(name)
        try:
            with _writing(database):
                for trial, count in _trials(chain([first], ended), widths):
                    # past the study's cache, which would keep every trial in memory
                    storage.create_new_trial(study_id, template_trial=trial)
                    counts[count] += 1
                study.set_user_attr("trials_exported", sum(counts[c] for c in _WRITTEN))
        except BaseException:
            # half a study would have another front; its deletion may fail as the writing did
            with contextlib.suppress(Exception):
                storage.delete_study(study_id)
            raise
    kinds = (*_WRITTEN, "unfinished", "repeats")
    return WrittenStudy(name, database.shown, **{kind: counts[kind] for kind in kinds})


_WRITTEN = ("complete", "shortened", "failed", "stopped")


def _ended(runs: Iterable[StoredRun], left_out: Counter[str]) -> Iterator[StoredRun]:
    """The runs that become trials; the others are counted."""
    for run in runs:
        if run.trial.state not in _STATES:
            left_out["unfinished"] += 1
        elif run.repeats:
            left_out["repeats"] += 1
        else:
            yield run


@contextlib.contextmanager
def _opened(database: ForeignDatabase) -> Iterator[RDBStorage]:
    """Optuna's storage with its tables, and no connection left open at the end."""
    with refusing(database, "out"):
        try:
            storage = RDBStorage(
                database.url, engine_kwargs={"connect_args": dict(database.connect_args)}
            )
        except (RuntimeError, ImportError, StorageInternalError) as error:
            # the schema of another Optuna, or a database that could not be written
            accepted = f"an Optuna storage of version {optuna.__version__}: {error}"
            raise InvalidInput("out", database.shown, accepted) from None
    try:
        yield storage
    finally:
        storage.remove_session()
        storage.engine.dispose()


@contextlib.contextmanager
def _writing(database: ForeignDatabase) -> Iterator[None]:
    with translating(database):
        try:
            yield
        except StorageInternalError as error:
            # Optuna's own words are general: the driver's are its cause
            said = " ".join(str(error.__cause__ or error).split())
            raise StoreUnavailable(f"{database.shown}: {said[:500]}") from None


def _new_study(
    storage: RDBStorage, name: str, database: ForeignDatabase, attributes: Mapping[str, Any]
) -> optuna.Study:
    with _writing(database):
        try:
            study = optuna.create_study(
                storage=storage, study_name=name, directions=["minimize", "minimize"]
            )
        except DuplicatedStudyError:
            accepted = f"a name that no study in {database.shown} has"
            raise InvalidInput("study", name, accepted) from None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names(list(METRICS))
        for key, value in attributes.items():
            study.set_user_attr(key, value)
        return study


def _trials(runs: Iterable[StoredRun], widths: Sequence[int]) -> Iterator[tuple[FrozenTrial, str]]:
    """(trial, what it counts as), those of the front's inner points last.

    Kept in memory: the front so far and the runs that it is made of.
    """
    front: tuple[CurvePoint, ...] = ()
    holders: dict[int, StoredRun] = {}
    for run in runs:
        trial = run.trial
        if trial.state != "complete":
            yield _trial(run, run.points, widths), trial.state
            continue
        front = non_dominated([*front, *run.curve_points()])
        holders = {p.run.trial_id: holders.get(p.run.trial_id, run) for p in front}
        yield _trial(run, run.points, widths, equals=_equal(front, run)), "complete"
    for point in front:
        run = holders[point.run.trial_id]
        if point.step != run.points[-1].step:
            upto = [p for p in run.points if p.step <= point.step]
            yield _trial(run, upto, widths, shortened=True), "shortened"


def _equal(front: Iterable[CurvePoint], run: StoredRun) -> int | None:
    """Id of the other run that the front names for the FLOPs and loss of this one's end."""
    end = run.points[-1]
    for point in front:
        if (point.train_flops, point.loss) == (end.train_flops, end.loss):
            return None if point.run.trial_id == run.trial.id else point.run.trial_id
    return None


def _constraint(equals: int | None) -> dict[str, Any]:
    """What keeps a trial that equals a better named one out of `best_trials`.

    The older form, a list, is understood by every Optuna since 4.5.  Those before 5 take a trial
    without constraints for one that violates them, so every trial has one.
    """
    return {"constraints": [0.0 if equals is None else 1.0]}


def _trial(
    run: StoredRun,
    curve: Sequence[StoredPoint],
    widths: Sequence[int],
    *,
    shortened: bool = False,
    equals: int | None = None,
) -> FrozenTrial:
    trial, state = run.trial, _STATES[run.trial.state]
    # other designs than of two factors have other exponents, or none
    axes = [f"theta_{axis}" for axis in AXES] if len(trial.theta) == len(AXES) else []
    distributions: dict[str, BaseDistribution] = dict.fromkeys(axes, _EXPONENT)
    # a recipe may have had other widths when an older version ran it
    low, high = min(trial.width, *widths), max(trial.width, *widths)
    distributions["width"] = IntDistribution(low, high)
    params = dict(zip(axes, trial.theta, strict=True)) if axes else {}
    found = {name: getattr(trial, field, None) for name, field in _ATTRIBUTES.items()}
    steps = curve[-1].step if shortened else trial.steps
    attributes = {
        **{name: value for name, value in found.items() if value is not None},
        "steps": steps,
        # exact, where the objective is a double
        "train_flops": steps * trial.train_flops_per_step,
        "shortened": shortened,
    }
    if state is TrialState.COMPLETE:
        attributes["loss_stderr"] = curve[-1].loss_stderr
        attributes["train_seconds"] = curve[-1].train_seconds
    if equals is not None:
        attributes["equals_trial"] = equals
    made = create_trial(
        state=state,
        values=([curve[-1].train_flops, curve[-1].loss] if state is TrialState.COMPLETE else None),
        params={**params, "width": trial.width},
        distributions=distributions,
        user_attrs=attributes,
        system_attrs=_constraint(equals) if state is TrialState.COMPLETE else {},
        intermediate_values={p.step: p.loss for p in curve},
    )
    # one that was stopped before it began has no start
    began = trial.created_at if trial.started_at is None else trial.started_at
    made.datetime_start = datetime.fromtimestamp(began)
    made.datetime_complete = datetime.fromtimestamp(
        began if trial.finished_at is None else trial.finished_at
    )
    return made
