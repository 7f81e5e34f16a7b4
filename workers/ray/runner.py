"""Runs the trials of one session with Ray Tune: FIFO, with reused actors and our own Searcher."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from operator import attrgetter
from typing import Any

# read when ray.tune is imported: no result files, no signal handler
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "86400")
os.environ.setdefault("TUNE_RESULT_BUFFER_LENGTH", "1")
# an actor that does not end by itself when its search is stopped is killed after so many seconds
os.environ.setdefault("TUNE_FORCE_TRIAL_CLEANUP_S", "10")
# why a trial failed is stored and logged by us
os.environ.setdefault("TUNE_PRINT_ALL_TRIAL_ERRORS", "0")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")

from workers.ray import cluster  # isort: skip  # sets what Ray reads when it is imported
from ray import tune
from ray.tune import Callback
from ray.tune.search import Searcher
from ray.tune.stopper import Stopper

from nas.errors import EinsumNasError, counted
from nas.logs import bound
from nas.planning.runs import RunPlan
from nas.settings import Settings
from nas.store import MeasuredCost, StoredPoint, Trial, TrialFailure
from nas.tasks import TaskData
from nas.training.checkpoint import prune
from workers import metrics
from workers.ray import internals
from workers.ray.spread import OF_TRIAL, SpreadTrainable
from workers.ray.trainable import ProxyTrainable
from workers.session import SearchSession

_log = logging.getLogger(__name__)
# it reports that no result files were written, which is how it is set up
logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)
#: Times Ray starts a trial anew after its process died.
_MAX_PROCESS_FAILURES = 3
#: Characters of what Ray says of a trial whose process died.
_LONGEST_REASON = 300
#: Exit status of a process whose cluster is gone.
CLUSTER_LOST_STATUS = 76
#: Share of its time after which a trial that died is taken to have died of the limit: the driver
#: hears of its beginning a little late.
_NEARLY = 0.95


@dataclass
class _Experiment:
    """What belongs to one call of Tune."""

    session: SearchSession
    #: limit of one attempt at a trial
    trial_seconds: float
    #: the error that ends the experiment, which Tune would wrap beyond recognition
    error: Exception | None = None
    #: Tune's trial id → when its attempt began, by this process's monotonic clock
    begun: dict[str, float] = field(default_factory=dict)
    #: Tune's trial id → why its last attempt ended
    reasons: dict[str, str] = field(default_factory=dict)
    #: Tune's trial id → ours
    ids: dict[str, int] = field(default_factory=dict)
    #: our trial id → how often its process died
    deaths: Counter[int] = field(default_factory=Counter)

    def count_death(self, trial_id: str, reason: str) -> tuple[str, TrialFailure] | None:
        """Count that a trial's process has died; None if the trial may run again.

        Otherwise why it has failed, and the kind of that.
        """
        ours = self.ids[trial_id]
        self.deaths[ours] += 1
        now = time.monotonic()
        if now - self.begun.get(trial_id, now) >= _NEARLY * self.trial_seconds:
            return f"ended after {self.trial_seconds:.6g} s, its time limit", "timeout"
        if self.deaths[ours] <= _MAX_PROCESS_FAILURES:
            return None
        times = counted(self.deaths[ours], "time")
        kind: TrialFailure = "memory" if _of_memory(reason) else "process"
        return f"failed {times}; before the last: {reason}", kind

    @contextmanager
    def remembering(self) -> Iterator[None]:
        """Keep the error that ends the experiment."""
        try:
            yield
        except Exception as error:
            _log.warning("search ends early: %s", error)
            self.error = self.error or error
            raise


#: Experiments of this process, by the keys that `_OfExperiment` holds.
_experiments: dict[str, _Experiment] = {}


def run_session(session: SearchSession, data: TaskData, settings: Settings) -> None:
    """Run every trial that the session still has; returns when none is left or it must stop.

    Raises
    ------
    LeaseLost
        Another worker has claimed the search.
    ClusterUnavailable
        No node has room for a trial.
    """
    remaining = session.prepare()
    if remaining == 0:
        return
    limits = session.request.limits
    trial_seconds = (limits and limits.trial_seconds) or settings.trial_timeout_seconds
    ranks = session.recipe.ranks
    needs = cluster.trial_resources(settings, ranks)
    # a trial that has more ranks than there is room for fails by itself, and tells why
    capacity = max(1, cluster.trial_capacity(needs) // ranks)
    checkpoints = settings.resolved_home / "checkpoints"
    prune(checkpoints, max_bytes=settings.checkpoint_bytes)
    shared = cluster.Shared(data.train, data.validation)
    spread = {"resources": needs} if ranks > 1 else {}
    trainable = tune.with_resources(
        tune.with_parameters(
            SpreadTrainable if spread else ProxyTrainable,
            data=shared.owner,
            threads=settings.cpus_per_trial,
            checkpoints=str(checkpoints),
            seconds=trial_seconds,
            memory=settings.memory_per_trial,
            **spread,
        ),
        tune.PlacementGroupFactory([OF_TRIAL if spread else needs]),  # one bundle: on one node
    )
    key = uuid.uuid4().hex
    experiment = _Experiment(session, trial_seconds)
    scratch = tempfile.mkdtemp(prefix="einsum-nas-tune-")
    _experiments[key] = experiment
    try:
        with cluster.HeadWatch(partial(_abandon, session), lambda: session.signals.stop):
            tune.Tuner(
                trainable,
                tune_config=tune.TuneConfig(
                    search_alg=_SessionSearcher(key),
                    # at most, for a trial that Tune gives up too early becomes another of Tune's
                    num_samples=remaining * (1 + _MAX_PROCESS_FAILURES),
                    max_concurrent_trials=min(settings.concurrency or capacity, capacity),
                    reuse_actors=True,
                    trial_dirname_creator=attrgetter("trial_id"),
                ),
                run_config=tune.RunConfig(
                    name=session.search.id,
                    storage_path=scratch,
                    stop=_SessionStopper(key),
                    callbacks=[_Attempts(key)],
                    # with a checkpoint of Tune's own every node would have to see `scratch`
                    checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                    failure_config=tune.FailureConfig(max_failures=_MAX_PROCESS_FAILURES),
                    verbose=0,
                ),
            ).fit()
    except Exception:
        # Tune wraps what a searcher raises; the first of our own errors is the cause
        if isinstance(experiment.error, EinsumNasError):
            raise experiment.error from None
        raise
    finally:
        shared.free()
        del _experiments[key]
        shutil.rmtree(scratch, ignore_errors=True)


def _abandon(session: SearchSession, why: str) -> None:
    """Queue the search again and end this process, because its calls to Ray may never return."""
    _log.error("%s; the search goes back and this process ends", why)
    asked = session.signals.hand_back  # its cluster may have been told to stop as well
    try:
        session.hand_back() if asked else session.requeue(why)
    except Exception as error:
        _log.warning("the search is left to its lease: %s", error)
    finally:
        os._exit(0 if asked and session.signals.shutdown.is_set() else CLUSTER_LOST_STATUS)


class _OfExperiment:
    """What Tune is given of ours; Tune copies and pickles it, so it holds only a key."""

    def __init__(self, key: str) -> None:
        super().__init__()
        self._key = key

    @property
    def _experiment(self) -> _Experiment:
        return _experiments[self._key]


class _SessionSearcher(_OfExperiment, Searcher):
    """Hands the session's trials to Tune and Tune's results to the session."""

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        session = self._experiment.session
        with self._experiment.remembering():
            trial = session.next_trial()
            if trial is None:
                return Searcher.FINISHED if session.exhausted else None
            self._experiment.ids[trial_id] = trial.id
            return trial_config(session, trial)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        experiment = self._experiment
        ours = experiment.ids[trial_id]
        with experiment.remembering(), bound(trial_id=ours):
            report = _read_report(result)
            if "begun" in report:
                experiment.begun[trial_id] = time.monotonic()
                _log.info("trial begun on %s", report["begun"])
            elif "point" in report and not experiment.session.signals.lost.is_set():
                point = report["point"]
                stored = StoredPoint(train_seconds=point.pop("seconds"), **point)
                experiment.session.point(ours, stored)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        experiment = self._experiment
        with experiment.remembering():
            ours = experiment.ids.get(trial_id)
            if ours is None or experiment.session.signals.lost.is_set():
                return
            with bound(trial_id=ours):
                state = self._end(trial_id, ours, _read_report(result or {}), error)
            del experiment.ids[trial_id]
            begun = experiment.begun.pop(trial_id, None)
            if state is None:
                return
            metrics.TRIALS.labels(state).inc()
            if begun is not None:
                metrics.TRIAL_SECONDS.observe(time.monotonic() - begun)

    def _end(self, trial_id: str, ours: int, report: dict[str, Any], error: bool) -> str | None:
        """Store how a trial ended; its state, or None if it is to run again.

        Where a process dies as it is handed from one trial to the next, Tune counts its death
        twice, and gives the trial up before its process has died as often as it may.
        """
        session = self._experiment.session
        if error:
            reason = self._experiment.reasons.get(trial_id, "its process died")
            failed = self._experiment.count_death(trial_id, reason)
            if failed is None:
                _log.warning("trial queued again: %s", reason)
                session.retry(ours)
                return None
            _log.warning("trial given up: %s", reason)
            session.fail(ours, *failed)
            return "failed"
        if "failure" in report:
            failure = report["failure"]
            _log.warning("trial failed: %s", failure["reason"])
            session.fail(ours, failure["reason"], failure["kind"])
            return "failed"
        if "ended" in report:
            ended = report["ended"]
            session.complete(ours, ended["environment"], MeasuredCost(**ended["cost"]))
            return "complete"
        return "stopped"  # with the search: it stays unfinished until the search ends

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the store is the only truth."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing; see `save`."""


class _Attempts(_OfExperiment, Callback):
    """Records why trials are restarted, and prevents the restart of those that ran out of time."""

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **_info: Any) -> None:
        experiment = self._experiment
        experiment.reasons[trial.trial_id] = reason = _reason(trial)
        failed = experiment.count_death(trial.trial_id, reason)
        if failed is None:
            _log.warning("trial started anew: %s", reason)
        else:
            # let the process that Tune starts for the next attempt report that there is none
            reason, kind = failed
            run = json.loads(trial.config["run"])
            trial.config["run"] = json.dumps({**run, "failure": {"reason": reason, "kind": kind}})
            _log.warning("trial ended: %s", reason)
        experiment.begun.pop(trial.trial_id, None)


def _reason(trial: Any) -> str:
    """Why the last attempt at a trial ended, in a line."""
    lines = internals.last_error(trial).splitlines()
    told = [line for line in lines if line.startswith("The actor is dead")] or lines[-1:]
    return told[0][:_LONGEST_REASON] if told else "its process died"


def _of_memory(reason: str) -> bool:
    """Whether an attempt ran out of memory, judging by Ray's message."""
    signs = (
        "OutOfMemory", "MemoryError", "not enough memory", "out of memory", "can't allocate memory"
    )  # fmt: skip
    return any(sign in reason for sign in signs)


class _SessionStopper(_OfExperiment, Stopper):
    """Ends every trial once the session is to stop."""

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return self.stop_all()

    def stop_all(self) -> bool:
        experiment = _experiments.get(self._key)
        return experiment is not None and experiment.session.signals.stop


def trial_config(session: SearchSession, trial: Trial) -> dict[str, Any]:
    """A stored trial as the Tune configuration of its actor."""
    # a stored trial has the fields of its plan
    plan = {field.name: getattr(trial, field.name) for field in fields(RunPlan)}
    run = {
        "plan": plan,
        "recipe": session.recipe.as_dict(),
        "seed": trial.seed,
        # what one tenant has computed is not another's to go on from
        "key": f"{session.search.tenant}/{trial.key}",
    }
    return {"run": json.dumps(run)}  # one text: Tune would spell nested values out in file names


def _read_report(result: dict[str, Any]) -> dict[str, Any]:
    """What the trainable reported last; empty before its first report."""
    report: dict[str, Any] = json.loads(result.get("report", "{}"))
    return report
