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
from dataclasses import dataclass, field
from pathlib import Path
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

from nas.designs.design import parse_design
from nas.errors import EinsumNasError, counted
from nas.logs import bound
from nas.planning.cost import RunPlan
from nas.settings import Settings
from nas.store import MeasuredCost, StoredPoint, Trial, TrialFailure
from nas.tasks import TaskData
from nas.training.checkpoint import prune
from workers import metrics
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

    def out_of_time(self, trial_id: str) -> bool:
        """Whether an attempt that died just now had used up its time."""
        begun = self.begun.get(trial_id)
        return begun is not None and time.monotonic() - begun >= _NEARLY * self.trial_seconds

    def given_up(self, number: int, reason: str) -> tuple[str, TrialFailure]:
        """Why a trial failed whose process died as often as it may, and the kind of that."""
        times = counted(self.deaths[number], "time")
        kind: TrialFailure = "memory" if _of_memory(reason) else "process"
        return f"failed {times}; before the last: {reason}", kind

    @property
    def too_late(self) -> str:
        """Why a trial that used up its time has failed."""
        return f"ended after {self.trial_seconds:.6g} s, its time limit"


#: Experiments of this process. Tune copies and pickles its searcher and stopper, which therefore
#: hold only a key of this mapping.
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
    needs = cluster.trial_resources(settings)
    capacity = cluster.trial_capacity(needs)
    checkpoints = settings.resolved_home / "checkpoints"
    prune(checkpoints, max_bytes=settings.checkpoint_bytes)
    shared = cluster.Shared(data.train, data.validation)
    trainable = tune.with_resources(
        tune.with_parameters(
            ProxyTrainable,
            data=shared.owner,
            threads=settings.cpus_per_trial,
            checkpoints=str(checkpoints),
            seconds=trial_seconds,
            memory=settings.memory_per_trial,
        ),
        tune.PlacementGroupFactory([needs]),  # one bundle: on one node
    )
    key = uuid.uuid4().hex
    experiment = _Experiment(session, trial_seconds)
    scratch = tempfile.mkdtemp(prefix="einsum-nas-tune-")
    _experiments[key] = experiment
    try:
        watch = cluster.HeadWatch(
            lambda why: _abandon(session, why), hurried=lambda: session.signals.stop
        )
        with watch:
            tune.Tuner(
                trainable,
                tune_config=tune.TuneConfig(
                    search_alg=_SessionSearcher(key),
                    # at most, for a trial that Tune gives up too early becomes another of Tune's
                    num_samples=remaining * (1 + _MAX_PROCESS_FAILURES),
                    max_concurrent_trials=min(settings.concurrency or capacity, capacity),
                    reuse_actors=True,
                    trial_dirname_creator=_directory_name,
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


def _directory_name(trial: Any) -> str:
    return str(trial.trial_id)


class _SessionSearcher(Searcher):
    """Hands the session's trials to Tune and Tune's results to the session."""

    def __init__(self, key: str) -> None:
        super().__init__()
        self._key = key

    @property
    def _session(self) -> SearchSession:
        return _experiments[self._key].session

    @property
    def _ids(self) -> dict[str, int]:
        return _experiments[self._key].ids

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        with _remembered(self._key):
            trial = self._session.next_trial()
            if trial is None:
                return Searcher.FINISHED if self._session.exhausted else None
            self._ids[trial_id] = trial.id
            return trial_config(self._session, trial)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        with _remembered(self._key), bound(trial_id=self._ids[trial_id]):
            report = _read_report(result)
            if "begun" in report:
                _experiments[self._key].begun[trial_id] = time.monotonic()
                _log.info("trial begun on %s", report["begun"])
            elif "point" in report and not self._session.signals.lost.is_set():
                point = report["point"]
                stored = StoredPoint(train_seconds=point.pop("seconds"), **point)
                self._session.point(self._ids[trial_id], stored)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        with _remembered(self._key):
            number = self._ids.pop(trial_id, None)
            if number is None or self._session.signals.lost.is_set():
                return
            with bound(trial_id=number):
                state = self._end(trial_id, number, _read_report(result or {}), error)
            begun = _experiments[self._key].begun.pop(trial_id, None)
            if state is None:
                return
            metrics.TRIALS.labels(state).inc()
            if begun is not None:
                metrics.TRIAL_SECONDS.observe(time.monotonic() - begun)

    def _end(self, trial_id: str, number: int, report: dict[str, Any], error: bool) -> str | None:
        """Store how a trial ended; its state, or None if it is to run again."""
        if error:
            return "failed" if self._fail(trial_id, number) else None
        if "failure" in report:
            failed = report["failure"]
            _log.warning("trial failed: %s", failed["reason"])
            self._session.fail(number, failed["reason"], failed["kind"])
            return "failed"
        if "ended" in report:
            ended = report["ended"]
            self._session.complete(number, ended["environment"], MeasuredCost(**ended["cost"]))
            return "complete"
        return "stopped"  # with the search: it stays unfinished until the search ends

    def _fail(self, trial_id: str, number: int) -> bool:
        """End a trial whose process died and that Tune gives up; False if it is to run again.

        Where a process dies as it is handed from one trial to the next, Tune counts its death
        twice, and gives the trial up before its process has died as often as it may.
        """
        experiment = _experiments[self._key]
        experiment.deaths[number] += 1
        reason = experiment.reasons.get(trial_id, "its process died")
        if experiment.out_of_time(trial_id):
            self._session.fail(number, experiment.too_late, "timeout")
        elif experiment.deaths[number] <= _MAX_PROCESS_FAILURES:
            _log.warning("trial queued again: %s", reason)
            self._session.retry(number)
            return False
        else:
            _log.warning("trial given up: %s", reason)
            self._session.fail(number, *experiment.given_up(number, reason))
        return True

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the store is the only truth."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing; see `save`."""


class _remembered:
    """Keeps the error that ends the experiment."""

    def __init__(self, key: str) -> None:
        self._experiment = _experiments[key]

    def __enter__(self) -> None:
        return None

    def __exit__(self, _type: Any, error: BaseException | None, _trace: Any) -> None:
        if isinstance(error, Exception):
            _log.warning("search ends early: %s", error)
            self._experiment.error = self._experiment.error or error


class _Attempts(Callback):
    """Records why trials are restarted, and prevents the restart of those that ran out of time."""

    def __init__(self, key: str) -> None:
        self._key = key

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **_info: Any) -> None:
        experiment = _experiments[self._key]
        reason = _reason(trial)
        experiment.reasons[trial.trial_id] = reason
        number = experiment.ids[trial.trial_id]
        experiment.deaths[number] += 1
        if experiment.out_of_time(trial.trial_id):
            _refuse(trial, experiment.too_late, "timeout")
        elif experiment.deaths[number] > _MAX_PROCESS_FAILURES:
            _refuse(trial, *experiment.given_up(number, reason))
        else:
            _log.warning("trial started anew: %s", reason)
        experiment.begun.pop(trial.trial_id, None)


def _refuse(trial: Any, reason: str, kind: TrialFailure) -> None:
    """Let the process that Tune starts for the next attempt report that there is none."""
    run = json.loads(trial.config["run"])
    trial.config["run"] = json.dumps({**run, "failure": {"reason": reason, "kind": kind}})
    _log.warning("trial ended: %s", reason)


def _reason(trial: Any) -> str:
    """Why the last attempt at a trial ended, in a line.

    Tune's own `get_error` looks into the results' folder, where the text comes later.
    """
    try:
        text = Path(trial.error_file or "").read_text()
    except OSError:
        text = ""
    lines = text.rpartition("Failure # ")[2].strip().splitlines()
    told = [line for line in lines if line.startswith("The actor is dead")] or lines[-1:]
    return told[0][:_LONGEST_REASON] if told else "its process died"


def _of_memory(reason: str) -> bool:
    """Whether an attempt ran out of memory, judging by Ray's message."""
    signs = (
        "OutOfMemory", "MemoryError", "not enough memory", "out of memory", "can't allocate memory"
    )  # fmt: skip
    return any(sign in reason for sign in signs)


class _SessionStopper(Stopper):
    """Ends every trial once the session is to stop."""

    def __init__(self, key: str) -> None:
        self._key = key

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return self.stop_all()

    def stop_all(self) -> bool:
        experiment = _experiments.get(self._key)
        return experiment is not None and experiment.session.signals.stop


def trial_config(session: SearchSession, trial: Trial) -> dict[str, Any]:
    """A stored trial as the Tune configuration of its actor."""
    plan = RunPlan(
        design=parse_design(trial.design),
        width=trial.width,
        depth=trial.depth,
        steps=trial.steps,
        train_flops_per_step=trial.train_flops_per_step,
        forward_flops_per_token=trial.forward_flops_per_token,
        params=trial.params,
        structures=trial.structures,
        dense=trial.dense,
    )
    run = {
        "plan": plan.as_dict(),
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
