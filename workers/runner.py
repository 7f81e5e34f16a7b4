"""Runs the trials of one session with Ray Tune: FIFO, reused actors, our own Searcher."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import tempfile
import threading
import uuid
from typing import Any

# read when ray.tune is imported: no result files, no signal handler, no usage report
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "86400")
os.environ.setdefault("TUNE_RESULT_BUFFER_LENGTH", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
from ray import tune
from ray.tune import Callback
from ray.tune.search import Searcher
from ray.tune.stopper import Stopper

from nas.checkpoint import prune
from nas.cost import RunPlan
from nas.design import parse_design
from nas.errors import EinsumNasError
from nas.settings import Settings
from nas.store import MeasuredCost, StoredPoint, Trial
from nas.tasks import TaskData
from workers.session import SearchSession
from workers.trainable import ProxyTrainable

_log = logging.getLogger(__name__)
# it reports that no result files were written, which is how it is set up
logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)
# it warns that a local cluster asks for a token, which is as it should be
_AUTHENTICATION_NOTICE = "ray._private.authentication.authentication_token_setup"
logging.getLogger(_AUTHENTICATION_NOTICE).setLevel(logging.ERROR)
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
#: Times Ray starts a trial anew after its process died.
_MAX_PROCESS_FAILURES = 3
#: Sessions of this process. Tune copies and pickles its searcher and stopper, which therefore
#: hold only a key of this mapping.
_sessions: dict[str, SearchSession] = {}
#: Tune's trial id → why its last attempt ended.
_reasons: dict[str, str] = {}


def start_ray(settings: Settings) -> None:
    """Connect to `RAY_ADDRESS`, or start Ray on this machine's loopback interface."""
    if ray.is_initialized():
        return
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level=logging.WARNING, log_to_driver=False)
    else:
        ray.init(
            address="local",
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
            _node_ip_address="127.0.0.1",
            num_cpus=max(os.cpu_count() or 1, settings.cpus_per_trial),
        )
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():  # Ray puts its own in their place
            signal.signal(number, handler)


def stop_ray() -> None:
    """Leave the cluster, or end the local one."""
    ray.shutdown()


def run_session(session: SearchSession, data: TaskData, settings: Settings) -> None:
    """Run every trial that the session still has; returns when none is left or it must stop.

    Raises
    ------
    LeaseLost
        Another worker has claimed the search.
    """
    remaining = session.prepare()
    if remaining == 0:
        return
    resources = _resources(settings)
    fitting = _fitting(resources)
    checkpoints = settings.resolved_home / "checkpoints"
    prune(checkpoints)
    trainable = tune.with_resources(
        tune.with_parameters(
            ProxyTrainable,
            train_data=data.train,
            validation_data=data.validation,
            threads=settings.cpus_per_trial,
            checkpoints=str(checkpoints),
        ),
        resources,
    )
    key = uuid.uuid4().hex
    searcher = _SessionSearcher(key)
    scratch = tempfile.mkdtemp(prefix="einsum-nas-tune-")
    _sessions[key] = session
    try:
        tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                num_samples=remaining,
                max_concurrent_trials=min(settings.concurrency or fitting, fitting),
                reuse_actors=True,
                trial_dirname_creator=_directory_name,
            ),
            run_config=tune.RunConfig(
                name=session.search.id,
                storage_path=scratch,
                stop=_SessionStopper(key),
                callbacks=[_Reasons()],
                failure_config=tune.FailureConfig(max_failures=_MAX_PROCESS_FAILURES),
                verbose=0,
            ),
        ).fit()
    except Exception:
        # Tune wraps what a searcher raises; the first of our own errors is the cause
        if isinstance(_errors.get(key), EinsumNasError):
            raise _errors[key] from None
        raise
    finally:
        _sessions.pop(key, None)
        _errors.pop(key, None)
        shutil.rmtree(scratch, ignore_errors=True)


_errors: dict[str, Exception] = {}


def _resources(settings: Settings) -> dict[str, float]:
    """Resources of one trial: a GPU (or a share of one) where the cluster has any."""
    needs: dict[str, float] = {"CPU": settings.cpus_per_trial}
    if ray.cluster_resources().get("GPU", 0) > 0:
        needs["GPU"] = settings.gpus_per_trial
    return needs


def _fitting(resources: dict[str, float]) -> int:
    """How many trials the cluster holds at once."""
    have = ray.cluster_resources()
    fitting = int(min(have.get(name, 0) / n for name, n in resources.items()))
    if fitting == 0:
        held = {name: have.get(name, 0) for name in resources}
        raise EinsumNasError(f"one trial needs {resources}, the cluster has {held}")
    return fitting


def _directory_name(trial: Any) -> str:
    return str(trial.trial_id)


class _SessionSearcher(Searcher):
    """Hands the session's trials to Tune and Tune's results to the session."""

    def __init__(self, key: str) -> None:
        super().__init__()
        self._key = key
        #: Tune's trial id → ours
        self._ids: dict[str, int] = {}

    @property
    def _session(self) -> SearchSession:
        return _sessions[self._key]

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        with _remembered(self._key):
            trial = self._session.next_trial()
            if trial is None:
                return Searcher.FINISHED if self._session.exhausted else None
            self._ids[trial_id] = trial.id
            return trial_config(self._session, trial)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        with _remembered(self._key):
            report = _read_report(result)
            if "point" in report and not self._session.signals.lost.is_set():
                self._session.point(self._ids[trial_id], StoredPoint(**report["point"]))

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        with _remembered(self._key):
            number = self._ids.pop(trial_id, None)
            if number is None or self._session.signals.lost.is_set():
                return
            report = _read_report(result or {})
            if error:
                times = _MAX_PROCESS_FAILURES + 1
                reason = _reasons.pop(trial_id, "its process died")
                self._session.fail(number, f"failed {times} times; before the last: {reason}")
            elif "failure" in report:
                self._session.fail(number, report["failure"])
            elif "ended" in report:
                ended = report["ended"]
                self._session.complete(number, ended["environment"], MeasuredCost(**ended["cost"]))
            # else stopped with the search: it stays unfinished until the search ends

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the store is the only truth."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing; see `save`."""


class _remembered:
    """Keeps the error that ends the experiment, which Tune would wrap beyond recognition."""

    def __init__(self, key: str) -> None:
        self._key = key

    def __enter__(self) -> None:
        return None

    def __exit__(self, _type: Any, error: BaseException | None, _trace: Any) -> None:
        if isinstance(error, Exception):
            _log.warning("search ends early: %s", error)
            _errors.setdefault(self._key, error)


class _Reasons(Callback):
    """Remembers why a trial is started anew; a searcher only hears that it has failed."""

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **_info: Any) -> None:
        text = str(trial.get_error() or "").strip()
        _reasons[trial.trial_id] = text.splitlines()[-1] if text else "its process died"
        _log.warning("trial started anew: %s", _reasons[trial.trial_id])


class _SessionStopper(Stopper):
    """Ends every trial once the session is to stop."""

    def __init__(self, key: str) -> None:
        self._key = key

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return self.stop_all()

    def stop_all(self) -> bool:
        session = _sessions.get(self._key)
        return session is not None and session.signals.stop


def trial_config(session: SearchSession, trial: Trial) -> dict[str, Any]:
    """A stored trial as the Tune configuration of its actor."""
    plan = RunPlan(
        design=parse_design(trial.design),
        width=trial.width,
        depth=trial.depth,
        steps=trial.steps,
        train_flops_per_step=trial.train_flops_per_step,
        forward_flops_per_token=trial.forward_flops_per_token,
        params=trial.model_params,
        structures=trial.structures,
        dense=trial.dense,
    )
    run = {
        "plan": plan.as_dict(),
        "recipe": session.recipe.as_dict(),
        "seed": trial.seed,
        "key": trial.key,
    }
    return {"run": json.dumps(run)}  # one text: Tune would spell nested values out in file names


def _read_report(result: dict[str, Any]) -> dict[str, Any]:
    """What the trainable reported last; empty before its first report."""
    report: dict[str, Any] = json.loads(result.get("report", "{}"))
    return report
