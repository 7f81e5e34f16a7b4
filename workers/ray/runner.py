"""Runs the packs of one session with Ray Tune: FIFO, with reused actors and our own Searcher.

A trial of Tune is a slot that runs one pack after another: one of our trials, or several that train
together.  It ends where there is none to run at the moment.
"""

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
from dataclasses import dataclass, field
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
from nas.remote import RemoteFolder
from nas.settings import Settings
from nas.store import MeasuredCost, StoredPoint, Trial, TrialFailure
from nas.tasks import TaskData
from nas.training.checkpoint import forget, prune
from workers import metrics
from workers.packs import Pack
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
#: Evaluations that follow one another sooner reach the driver together, which answers each report
#: in milliseconds in which the actor waits.
_REPORT_SECONDS = 0.5
#: Share of its time after which a trial that died is taken to have died of the limit: the driver
#: hears of its beginning a little late.
_NEARLY = 0.95


@dataclass
class _Experiment:
    """What belongs to one call of Tune."""

    session: SearchSession
    #: limit of one attempt at a trial; that of a pack is so much for each of its trials
    trial_seconds: float
    #: the error that ends the experiment, which Tune would wrap beyond recognition
    error: Exception | None = None
    #: Tune's trial id → when its attempt began, by this process's monotonic clock
    begun: dict[str, float] = field(default_factory=dict)
    #: Tune's trial id → why its last attempt ended
    reasons: dict[str, str] = field(default_factory=dict)
    #: Tune's trial id → what it runs
    packs: dict[str, Pack] = field(default_factory=dict)
    #: our trial id → how often its process died
    deaths: Counter[int] = field(default_factory=Counter)
    #: what packs are handed over by; without it each is a trial of Tune's own
    shared: cluster.Shared | None = None
    #: size of a model above which the weights of its run are not kept
    weights_bytes: int = 0
    #: Tune's trial id → packs that it was given
    given: Counter[str] = field(default_factory=Counter)

    def seconds(self, pack: Pack) -> float:
        """Limit of one attempt at a pack."""
        return self.trial_seconds * len(pack.trials)

    def give(self, trial_id: str, pack: Pack) -> dict[str, Any]:
        """The configuration of Tune's trial that runs a pack, and then the next one."""
        self.packs[trial_id] = pack
        self.given[trial_id] += 1
        follows = None if self.shared is None else self.next_key(trial_id)
        return trial_config(self.session, pack, self.seconds(pack), follows, self.weights_bytes)

    def next_key(self, trial_id: str) -> str:
        """Under which the actor of Tune's trial asks for its next pack."""
        return f"{trial_id}/{self.given[trial_id]}"

    def go_on(self, trial_id: str) -> None:
        """Hand the next pack to the actor of a trial of Tune's, or tell it that there is none."""
        if self.shared is None:
            return
        key, pack = self.next_key(trial_id), self.session.next_pack()
        run = "{}" if pack is None else str(self.give(trial_id, pack)["run"])
        self.shared.hand(key, run)

    def count_death(self, trial_id: str, reason: str) -> tuple[str, TrialFailure] | None:
        """Count that the process of a pack has died; None if the same runs may run again.

        Otherwise why they have failed, and the kind of that.
        """
        pack = self.packs[trial_id]
        left = self.session.unfinished(pack)
        self.deaths.update(t.id for t in left)
        now, limit = time.monotonic(), self.seconds(pack)
        if now - self.begun.get(trial_id, now) >= _NEARLY * limit:
            runs = len(pack.trials)
            whose = f"the time limit of {runs} runs" if runs > 1 else "its time limit"
            return f"ended after {limit:.6g} s, {whose}", "timeout"
        deaths = max((self.deaths[t.id] for t in left), default=0)
        kind: TrialFailure = "memory" if _of_memory(reason) else "process"
        if not left or (kind == "memory" and len(left) > 1):
            return reason, kind
        if deaths <= _MAX_PROCESS_FAILURES:
            return None
        return f"failed {counted(deaths, 'time')}; before the last: {reason}", kind

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
    ranks = session.recipe.ranks
    needs = cluster.trial_resources(settings, ranks)
    # a trial that has more ranks than there is room for fails by itself, and tells why
    capacity = max(1, cluster.trial_capacity(needs) // ranks)
    slots = min(settings.concurrency or capacity, capacity)
    checkpoints = settings.resolved_home / "checkpoints"
    url = settings.checkpoints_url
    remote = None if url is None else RemoteFolder(url)
    session.forget = lambda key: forget(checkpoints, _stored_as(session, key), remote)
    remaining = session.prepare("cuda" if "GPU" in needs else "cpu", slots)
    if remaining == 0:
        return
    limits = session.request.limits
    trial_seconds = (limits and limits.trial_seconds) or settings.trial_timeout_seconds
    prune(checkpoints, max_bytes=settings.checkpoint_bytes, remote=remote)
    shared = cluster.Shared(data.train, data.validation)
    spread = {"resources": needs} if ranks > 1 else {}
    trainable = tune.with_resources(
        tune.with_parameters(
            SpreadTrainable if spread else ProxyTrainable,
            data=shared.owner,
            threads=settings.cpus_per_trial,
            checkpoints=str(checkpoints),
            rates=str(settings.resolved_rates_home),
            memory=settings.memory_per_trial,
            report_seconds=_REPORT_SECONDS,
            checkpoints_url=url,
            **spread,
        ),
        tune.PlacementGroupFactory([OF_TRIAL if spread else needs]),  # one bundle: on one node
    )
    key = uuid.uuid4().hex
    experiment = _Experiment(
        session, trial_seconds, shared=shared, weights_bytes=settings.weights_bytes
    )
    scratch = tempfile.mkdtemp(prefix="einsum-nas-tune-")
    _experiments[key] = experiment
    try:
        with cluster.HeadWatch(partial(_abandon, session), lambda: session.signals.stop):
            tune.Tuner(
                trainable,
                tune_config=tune.TuneConfig(
                    search_alg=_SessionSearcher(key),
                    # at most: one that Tune gives up too early becomes another of Tune's, and so
                    # does each run of a pack that has to run apart
                    num_samples=remaining * (2 + _MAX_PROCESS_FAILURES),
                    max_concurrent_trials=slots,
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
    """Hands the session's packs to Tune and Tune's results to the session."""

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        session = self._experiment.session
        with self._experiment.remembering():
            pack = session.next_pack()
            if pack is None:
                return Searcher.FINISHED if session.exhausted else None
            return self._experiment.give(trial_id, pack)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        report = _read_report(result)
        parts = report.get("batch", [report])
        self._hear_points(trial_id, parts)
        for part in parts:
            self._hear(trial_id, part)

    def _hear_points(self, trial_id: str, parts: list[dict[str, Any]]) -> None:
        """Store the points of all evaluations at once."""
        session, pack = self._experiment.session, self._experiment.packs.get(trial_id)
        with self._experiment.remembering():
            if pack is None or session.signals.lost.is_set():
                return
            found = [
                (pack.of(int(seed)).id, StoredPoint(train_seconds=told.pop("seconds"), **told))
                for part in parts
                for seed, of_run in part.get("runs", {}).items()
                if (told := of_run.get("point")) is not None
            ]
            with bound(trial_id=_named(pack)):
                session.points(found)

    def _hear(self, trial_id: str, report: dict[str, Any]) -> None:
        """One report of an actor."""
        experiment = self._experiment
        pack = experiment.packs.get(trial_id)
        if pack is None:
            return
        with experiment.remembering():
            if "begun" in report:
                experiment.begun[trial_id] = time.monotonic()
                with bound(trial_id=_named(pack)):
                    _log.info("trial begun on %s", report["begun"])
            for seed, found in report.get("runs", {}).items():
                if "failure" in found and not experiment.session.signals.lost.is_set():
                    self._fail(trial_id, pack.of(int(seed)), found["failure"])
            if experiment.shared is not None and report.keys() & {"ended", "failure"}:
                self._ended(trial_id, report, False)
                experiment.go_on(trial_id)

    def _fail(self, trial_id: str, trial: Trial, why: str) -> None:
        """A run has failed by itself; those that train with it go on."""
        with bound(trial_id=trial.id):
            _log.warning("trial failed: %s", why)
            self._experiment.session.fail(trial.id, why)
            self._count(trial_id, "failed")

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        with self._experiment.remembering():
            self._ended(trial_id, _read_report(result or {}), error)

    def _ended(self, trial_id: str, report: dict[str, Any], error: bool) -> None:
        """A pack has ended; unless it was stored before."""
        experiment = self._experiment
        pack = experiment.packs.get(trial_id)
        if pack is None or experiment.session.signals.lost.is_set():
            return
        with bound(trial_id=_named(pack)):
            self._end(trial_id, pack, report, error)
        del experiment.packs[trial_id]
        experiment.begun.pop(trial_id, None)

    def _end(self, trial_id: str, pack: Pack, report: dict[str, Any], error: bool) -> None:
        """Store how those of a pack ended that had not.

        Where a process dies as it is handed from one trial to the next, Tune counts its death
        twice, and gives the trial up before its process has died as often as it may.
        """
        session = self._experiment.session
        if error:
            reason = self._experiment.reasons.get(trial_id, "its process died")
            failed = self._experiment.count_death(trial_id, reason)
            if failed is None:
                _log.warning("trial queued again: %s", reason)
                session.retry(pack)
                return
            self._give_up(trial_id, pack, *failed)
        elif "failure" in report:
            self._give_up(trial_id, pack, **report["failure"])
        else:
            cost = MeasuredCost(**report["ended"]["cost"]) if "ended" in report else None
            if cost is not None and report["ended"]["resumed_at"] is not None:
                _log.info("trial had gone on from step %d", report["ended"]["resumed_at"])
            for trial in session.unfinished(pack):
                if cost is not None:
                    ended, seed = report["ended"], str(trial.seed)
                    weights = self._weights(ended.get("weights", {}).get(seed))
                    environment = ended["environments"][seed]
                    state = session.complete(trial.id, environment, cost, weights)
                # stopped with the search, it stays unfinished until the search ends
                self._count(trial_id, "stopped" if cost is None else state)

    def _weights(self, told: dict[str, str] | None) -> bytes | str | None:
        """The weights that a run has left, or why it has not."""
        shared = self._experiment.shared
        if told is None or shared is None:
            return None
        return told["left"] if "left" in told else shared.collect(told["key"])

    def _give_up(self, trial_id: str, pack: Pack, reason: str, kind: TrialFailure) -> None:
        session = self._experiment.session
        left = session.unfinished(pack)
        if len(left) > 1 and kind in ("memory", "run"):
            # one alone needs less memory, and an error may be of one of them only
            _log.warning("trials run apart from now on: %s", reason)
            session.retry(pack, apart=True)
            return
        for trial in left:
            _log.warning("trial failed: %s", reason)
            session.fail(trial.id, reason, kind)
            self._count(trial_id, "failed")

    def _count(self, trial_id: str, state: str) -> None:
        """Count the end of one run in the metrics."""
        metrics.TRIALS.labels(state).inc()
        begun = self._experiment.begun.get(trial_id)
        if begun is not None:
            metrics.TRIAL_SECONDS.observe(time.monotonic() - begun)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the store is the only truth."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing; see `save`."""


class _Attempts(_OfExperiment, Callback):
    """Records why trials are restarted, and prevents the restart of those that ran out of time."""

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **_info: Any) -> None:
        experiment = self._experiment
        pack = experiment.packs.get(trial.trial_id)
        if pack is None:  # it died with nothing to do
            trial.config["run"] = "{}"
            return
        experiment.reasons[trial.trial_id] = reason = _reason(trial)
        failed = experiment.count_death(trial.trial_id, reason)
        # its config may be of an earlier pack
        run = json.loads(experiment.give(trial.trial_id, pack)["run"])
        # those that failed by themselves are not repeated
        run["seeds"] = [t.seed for t in experiment.session.unfinished(pack)]
        for t in experiment.session.unfinished(pack):
            experiment.session.spans.event(t.id, "process died", {})
        if failed is None:
            _log.warning("trial started anew: %s", reason)
        else:
            # let the process that Tune starts for the next attempt report that there is none
            reason, kind = failed
            run["failure"] = {"reason": reason, "kind": kind}
            _log.warning("trial ended: %s", reason)
        trial.config["run"] = json.dumps(run)
        experiment.begun.pop(trial.trial_id, None)


def _named(pack: Pack) -> int | str:
    """Our trial ids, for the log."""
    return ", ".join(str(t.id) for t in pack.trials) if len(pack.trials) > 1 else pack.trials[0].id


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


def trial_config(
    session: SearchSession,
    pack: Pack,
    seconds: float,
    follows: str | None = None,
    weights_bytes: int = 0,
) -> dict[str, Any]:
    """A pack as the Tune configuration of its actor.

    Parameters
    ----------
    seconds
        Limit of an attempt at it.
    follows
        By which the actor asks for the next pack.
    weights_bytes
        Size of a model above which the weights of its run are not kept.
    """
    plan, search = RunPlan.of(pack.trials[0]).as_dict(), session.search
    run = {
        "plan": plan,
        "recipe": session.recipe.as_dict(),
        "seeds": [t.seed for t in pack.trials],
        "seconds": seconds,
        "until": pack.until,
        "next": follows,
        "key": _stored_as(session, pack.key),
    }
    if traces := {t.seed: p for t in pack.trials if (p := session.spans.traceparent(t.id))}:
        run["traces"] = traces
    keeps, below = session.keeps
    if keeps and weights_bytes and pack.until is None:
        about = {
            "search_id": search.id,
            "trials": {str(t.seed): t.id for t in pack.trials},
            "task": search.task,
            "fingerprint": session.fingerprint,
            "recipe": run["recipe"],
            **{name: plan[name] for name in ("design", "width", "steps")},
            "loss_unit": session.recipe.loss_unit,
        }
        run["keep"] = {"below": below, "most_bytes": weights_bytes, "about": about}
    return {"run": json.dumps(run)}  # one text: Tune would spell nested values out in file names


def _stored_as(session: SearchSession, key: str) -> str:
    """Names the state of a pack; what one tenant has computed is not another's to go on from."""
    return f"{session.search.tenant}/{key}"


def _read_report(result: dict[str, Any]) -> dict[str, Any]:
    """What the trainable reported last; empty before its first report."""
    report: dict[str, Any] = json.loads(result.get("report", "{}"))
    return report
