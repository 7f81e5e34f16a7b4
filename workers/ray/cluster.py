"""The Ray cluster that trials run on: joining it, its resources, and detecting that it is gone."""

from __future__ import annotations

import logging
import os
import platform
import secrets
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from importlib.metadata import PackageNotFoundError, version
from typing import Any

# read when ray is imported or started: no usage report, and logs that do not grow without end
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_ROTATION_MAX_BYTES", str(16 * 2**20))
os.environ.setdefault("RAY_ROTATION_BACKUP_COUNT", "2")

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from nas.errors import ClusterUnavailable, InvalidInput, one_line
from nas.settings import Settings
from workers import metrics
from workers.ray import internals, temporary
from workers.ray.address import cluster_address

_log = logging.getLogger(__name__)
#: Token of a cluster of this process's own: no file has it, only the processes of the cluster.
_OWN_TOKEN = secrets.token_hex(32)
_TOKEN_VARIABLES = {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
#: Seconds between checks whether Ray has started.
_KEEP_SECONDS = 0.02
#: Seconds for a connection to the head, and for an answer of each node.
_CONNECT_SECONDS = 5.0
_PROBE_SECONDS = 60.0
#: Seconds between checks of the head, and without an answer before the cluster counts as gone.  A
#: head that stores its state elsewhere may be restarted within this time.
_LOOK_SECONDS = 2.0
#: Between two questions for what was not handed over yet.
_MOMENT_SECONDS = 0.002
_PATIENCE_SECONDS = 30.0
#: Characters of what Ray says of an error.
_LONGEST = 500
#: Packages whose versions a node shares with this process, for what is sent between them.
_SHARED = ("einsum-nas", "ray", "torch")


def connect(settings: Settings) -> None:
    """Join the cluster of `RAY_ADDRESS`, or start one of this process's own.

    The latter listens on loopback only, and requires its token.

    Raises
    ------
    ClusterUnavailable
        It cannot be reached, requires another token, or has other versions of shared packages; or
        one of this process's own does not start.
    """
    if ray.is_initialized():
        if listens(str(ray.get_runtime_context().gcs_address)):
            return
        disconnect()  # its head is gone; there may be a new one by now
        metrics.RAY_RECONNECTS.inc()
    wanted = cluster_address()
    _beside(lambda: _start_local(settings) if wanted is None else _join(wanted))


#: Set once the thread that Ray was started in may end.
_left = threading.Event()
#: Of a Ray of this process's own, where its default folder will not do.
_folder: tempfile.TemporaryDirectory[str] | None = None


def disconnect() -> None:
    """Leave the cluster, or end the local one."""
    global _folder
    ray.shutdown()
    _left.set()
    if _folder is not None:
        _folder.cleanup()
        _folder = None


def _beside(start: Callable[[], None]) -> None:
    """Start Ray in a thread, which lives until `disconnect`.

    Outside of the main thread Ray's Python code does not replace our signal handlers.  A worker
    needs these to hand its search back if it is stopped while Ray starts.  The thread has to stay
    alive, because the system ends Ray's processes with the thread that started them.
    """
    global _left
    left, started = threading.Event(), Future[None]()
    _left = left

    def run() -> None:
        try:
            start()
        except BaseException as error:
            started.set_exception(error)
        else:
            started.set_result(None)
            left.wait()

    threading.Thread(target=run, name="ray", daemon=True).start()
    while not started.done():
        time.sleep(_KEEP_SECONDS)
        _keep_signals()
    _keep_signals()
    started.result()


def _keep_signals() -> None:
    """Restore our signal handlers: Ray's core replaces them by its own, which abort."""
    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            signal.signal(number, signal.getsignal(number))


def _start_local(settings: Settings) -> None:
    global _folder
    _expect_others(False)
    _folder = temporary.made_folder(settings.resolved_home)
    try:
        ray.init(
            address="local",
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
            num_cpus=max(os.cpu_count() or 1, settings.cpus_per_trial),
            resources=dict(settings.resources_per_trial) or None,
            **internals.on_loopback(None if _folder is None else _folder.name),
        )
    except Exception as error:  # such as a system that lets it start no process
        disconnect()
        raise _unavailable("Ray does not start on this machine", error) from error


def _expect_others(expected: bool) -> None:
    """Configure Ray, before it starts, for use by other machines or by this process only.

    In the latter case its servers accept connections from this machine only, and only with the
    token; a token and a mode set in the environment are kept.
    """
    internals.expect_others(expected)
    if expected and os.environ.get("RAY_AUTH_TOKEN") == _OWN_TOKEN:
        del os.environ["RAY_AUTH_TOKEN"]
        os.environ.pop("RAY_AUTH_MODE", None)  # which Ray itself has set
    elif not expected and not os.environ.keys() & _TOKEN_VARIABLES:
        os.environ["RAY_AUTH_TOKEN"] = _OWN_TOKEN
    internals.forget_token()


def _join(wanted: str) -> None:
    _expect_others(True)
    if wanted != "auto" and not listens(wanted):
        raise ClusterUnavailable(
            f"no Ray head answers at RAY_ADDRESS={wanted}; start it, or correct the address"
        )
    try:
        ray.init(address=wanted, logging_level=logging.WARNING, log_to_driver=False)
        _check_nodes()
    except Exception as error:
        ray.shutdown()
        if isinstance(error, ClusterUnavailable):
            raise
        what = f"the Ray cluster at RAY_ADDRESS={wanted} cannot be joined"
        raise _unavailable(what, error) from error


def _unavailable(what: str, error: Exception) -> ClusterUnavailable:
    said = one_line(error)[:_LONGEST]
    return ClusterUnavailable(f"{what}: {said}; `einsum-nas doctor` looks for the cause")


def listens(wanted: str) -> bool:
    """Whether anything takes connections at HOST:PORT."""
    host, _, port = wanted.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS):
            return True
    except ValueError:
        raise InvalidInput("RAY_ADDRESS", wanted, "HOST:PORT of the head, or auto") from None
    except OSError:
        return False


def versions() -> dict[str, str]:
    """Python and the packages that nodes share, as they are where this runs."""
    found = {"python": platform.python_version()}
    for package in _SHARED:
        try:
            found[package] = version(package).partition("+")[0]  # torch tells its CUDA build there
        except PackageNotFoundError:
            found[package] = "none"
    return found


def ask_versions(nodes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Address of each node → reference to what `versions` gives there."""
    probe = ray.remote(num_cpus=0, max_retries=0)(versions)
    return {
        node_name(node): probe.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote()
        for node in nodes
    }


def node_name(node: Mapping[str, Any]) -> str:
    """Address and port of a node, by which people know it."""
    return f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}"


def node_versions() -> dict[str, dict[str, str]]:
    """Address of each living node → what `versions` gives there."""
    asked = ask_versions(alive_nodes())
    return dict(zip(asked, ray.get(list(asked.values()), timeout=_PROBE_SECONDS), strict=True))


def _check_nodes() -> None:
    own = versions()
    for node, found in node_versions().items():
        other = {name: v for name, v in found.items() if v != own[name]}
        if other:
            here = ", ".join(f"{name} {own[name]}" for name in other)
            there = ", ".join(f"{name} {v}" for name, v in other.items())
            raise ClusterUnavailable(
                f"node {node} has {there}, this worker has {here}; install the same on both"
            )


def alive_nodes() -> list[dict[str, Any]]:
    """Ray's description of each node that lives."""
    return [node for node in ray.nodes() if node["Alive"]]


def trial_resources(settings: Settings, ranks: int = 1) -> dict[str, float]:
    """Resources of one trial: a GPU (or a share of one) where the cluster has any.

    Those of each rank where there are several, which cannot share one.
    """
    needs: dict[str, float] = {"CPU": settings.cpus_per_trial, **settings.resources_per_trial}
    if ray.cluster_resources().get("GPU", 0) > 0:
        needs["GPU"] = settings.gpus_per_trial if ranks == 1 else max(1.0, settings.gpus_per_trial)
    return needs


def trial_capacity(needs: dict[str, float], ranks: int = 1) -> int:
    """How many trials the cluster holds at once, no rank of them spread over two nodes.

    Raises
    ------
    ClusterUnavailable
        Not a single trial fits.
    """
    held = [node["Resources"] for node in alive_nodes()]
    # 1e-4, because Ray counts in units of 1/10,000: so three times 1/3 fits into 1
    count = sum(
        int(min(have.get(name, 0.0) / n + 1e-4 for name, n in needs.items())) for have in held
    )
    if count < ranks:
        shown = [{name: have.get(name, 0) for name in needs} for have in held]
        what = (
            f"one trial needs {needs}; no node of the cluster has that much"
            if ranks == 1
            else f"one trial has {ranks} ranks that need {needs} each; the nodes of the cluster "
            f"have room for {count}"
        )
        raise ClusterUnavailable(
            f"{what}: {shown}; change "
            "EINSUM_NAS_CPUS_PER_TRIAL, EINSUM_NAS_GPUS_PER_TRIAL or "
            "EINSUM_NAS_RESOURCES_PER_TRIAL, or add a node"
        )
    return count // ranks


class Shared:
    """The data of a search in Ray's object store, from which every node reads it.

    An actor on the driver's node owns the data and ends with the search.  Data that the driver gave
    to Tune itself would stay as long as the driver, because Tune's classes keep references to it,
    and a worker that runs many searches would fill the store.
    """

    def __init__(self, train: Any, validation: Any) -> None:
        self._hooks = internals.count_hooks()
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        owner = ray.remote(num_cpus=0, scheduling_strategy=here)(_Owner)
        #: to be given to `taken`
        self.owner = owner.remote(train, validation)

    def hand(self, key: str, run: str) -> None:
        """Leave a run for the actor that asks for `key`; see `handed`."""
        self.owner.hand.remote(key, run)

    def collect(self, key: str) -> bytes | str:
        """What an actor has left under `key`, see `leave`; or why it cannot be had."""
        try:
            found: bytes | None = ray.get(self.owner.collect.remote(key))
        except RayError as error:
            return one_line(error)[:_LONGEST]
        return "they were lost on their way" if found is None else found

    def free(self) -> None:
        """Drop the data from every node; nothing may use it any more."""
        internals.drop_hooks(self._hooks)
        if ray.is_initialized():
            ray.kill(self.owner)


class _Owner:
    """Actor that owns objects of the store; they are freed when it ends.  Through it the driver
    hands runs to the actors of trials."""

    def __init__(self, *values: Any) -> None:
        self._references = [ray.put(value) for value in values]
        self._handed: dict[str, str] = {}
        self._left: dict[str, bytes] = {}

    def hand(self, key: str, run: str) -> None:
        self._handed[key] = run

    def take(self, key: str) -> str | None:
        return self._handed.pop(key, None)

    def leave(self, key: str, data: bytes) -> None:
        self._left[key] = data

    def collect(self, key: str) -> bytes | None:
        return self._left.pop(key, None)

    def references(self) -> list[Any]:
        return self._references


def taken(owner: Any) -> list[Any]:
    """The values that an owner holds, in memory that a node's processes share."""
    found: list[Any] = ray.get(ray.get(owner.references.remote()))
    return found


def handed(owner: Any, key: str) -> str:
    """What the driver has handed over, or is about to."""
    while (run := ray.get(owner.take.remote(key))) is None:
        time.sleep(_MOMENT_SECONDS)
    return str(run)


def leave(owner: Any, key: str, data: bytes) -> None:
    """Hand data to the driver, which asks for it by `Shared.collect`.

    Raises
    ------
    RayError
        The owner is gone.
    """
    ray.get(owner.leave.remote(key, data))


class HeadWatch:
    """Calls `gone` once the head of the cluster has not answered for too long.

    Ray itself would wait for a minute and then end the process without a log record.

    Parameters
    ----------
    hurried
        Tells whether the search is to stop anyway; then it does not wait for the head to return.
    """

    def __init__(self, gone: Callable[[str], object], hurried: Callable[[], bool]) -> None:
        self._gone, self._hurried = gone, hurried
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="head-watch", daemon=True)

    def __enter__(self) -> HeadWatch:
        self._head = str(ray.get_runtime_context().gcs_address)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()

    def _watch(self) -> None:
        seen = time.monotonic()
        while not self._done.wait(_LOOK_SECONDS):
            if listens(self._head):
                seen = time.monotonic()
                continue
            away = time.monotonic() - seen
            if away > (_LOOK_SECONDS if self._hurried() else _PATIENCE_SECONDS):
                self._gone(f"the Ray head at {self._head} has not answered for {away:.0f} s")
                return
