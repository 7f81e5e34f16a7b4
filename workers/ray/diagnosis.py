"""Checks the Ray cluster as a worker would use it, in a child process that can be killed.

A child, because joining a cluster can hang for minutes if the network blocks what Ray needs.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from nas.errors import ClusterUnavailable, InvalidInput, one_line
from nas.service.doctor import Check, shared_memory
from nas.settings import Settings
from workers.ray import temporary
from workers.ray.address import cluster_address

#: Seconds for joining the cluster and asking every node.
PATIENCE_SECONDS = 75.0
#: Seconds for the answer of one node, which has to start a process for it.
_NODE_SECONDS = 25.0
#: Seconds within which a process without a token joins, if it is let in, from when all else is
#: known.
_STRANGER_SECONDS = 10.0
_NEEDED = {"cpus_per_trial", "gpus_per_trial", "resources_per_trial"}
_MARK = "einsum-nas-diagnosis:"


def examine_cluster(settings: Settings, patience_seconds: float = PATIENCE_SECONDS) -> list[Check]:
    """Checks of the cluster at `RAY_ADDRESS`, or of what a local Ray needs."""
    try:
        wanted = cluster_address()
    except InvalidInput as error:
        found = f"RAY_ADDRESS={error.value} is one of Ray's client server"
        advice = (
            "give the head itself: HOST:PORT (such as 10.0.0.1:6379), or auto on one of its nodes; "
            "a worker has to be the driver"
        )
        return [Check("cluster", "problem", found, advice)]
    if wanted is not None:
        return _in_child(settings, wanted, patience_seconds)
    count = max(os.cpu_count() or 1, settings.cpus_per_trial)
    found = f"no RAY_ADDRESS: a worker starts a Ray of its own here, with {count} CPU(s)"
    return [Check("cluster", "ok", found), *_folder(settings)]


def _folder(settings: Settings) -> Iterator[Check]:
    """Where a Ray of a worker's own keeps its files, if not where it would by itself."""
    try:
        short = temporary.short_folder(settings.resolved_home)
    except ClusterUnavailable as error:
        yield Check("Ray's folder", "problem", str(error), "set TMPDIR to a short path, in ASCII")
        return
    if short is not None:
        name, folder = temporary.default_folder()
        yield Check(
            "Ray's folder", "warning",
            f"Ray cannot keep its files in {name}={folder}: {temporary.trouble_with(folder)}; a "
            f"worker makes a folder for them in {short}",
            f"if that disk is too small for them, set {name} to another short path, in ASCII",
        )  # fmt: skip


def _in_child(settings: Settings, wanted: str, patience_seconds: float) -> list[Check]:
    # not the other settings: whoever may list processes reads the words of a command
    needed = settings.model_dump_json(include=_NEEDED)
    child = subprocess.Popen(
        [sys.executable, "-m", "workers.ray.diagnosis", needed],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        out, errors = child.communicate(timeout=patience_seconds)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
        within = f"in {patience_seconds:.0f} s"
        found = f"no Ray cluster could be joined at RAY_ADDRESS={wanted} {within}"
        advice = (
            "see that its head runs, that this machine and its nodes reach each other on all of "
            "Ray's ports, and that each node's own address is one that the others reach"
        )
        return [Check("cluster", "problem", found, advice)]
    for line in out.splitlines():
        if line.startswith(_MARK):
            return [Check(**c) for c in json.loads(line.removeprefix(_MARK))]
    said = one_line(errors or out)[-500:]
    found = f"joining RAY_ADDRESS={wanted} ended with status {child.returncode}: {said}"
    return [Check("cluster", "problem", found, "see the message; the head's log may say more")]


def _examined(settings: Settings) -> Iterator[Check]:
    """Runs in the child."""
    from workers.ray import cluster  # isort: skip  # sets what Ray reads when it is imported
    import ray

    wanted = str(cluster_address())
    if wanted != "auto" and not cluster.listens(wanted):
        yield Check(
            "cluster", "problem", f"nothing listens at RAY_ADDRESS={wanted}",
            "start the head with `ray start --head`, or correct the address",
        )  # fmt: skip
        return
    try:
        ray.init(address=wanted, logging_level="error", log_to_driver=False)
    except Exception as error:
        yield _not_joined(wanted, error)
        return
    with _stranger(wanted) as stranger:
        yield from _joined(settings, wanted, stranger)


def _joined(settings: Settings, wanted: str, stranger: subprocess.Popen[bytes]) -> Iterator[Check]:
    import ray

    from workers.ray import cluster

    nodes = cluster.alive_nodes()
    # the stranger is tried meanwhile
    answers = list(_nodes(nodes))
    opened = _was_let_in(stranger)
    dead = len(ray.nodes()) - len(nodes)
    gone = f", {dead} no longer alive" if dead else ""
    held = _amounts(ray.cluster_resources())
    yield Check(
        "cluster", "warning" if opened else "ok",
        f"joined at {wanted}: {len(nodes)} node(s){gone}, {held}; Ray {ray.__version__}; "
        + ("it accepts clients without a token" if opened else "it requires a token"),
        "whoever reaches its ports can run programs on it: keep them in a private network, and set "
        "RAY_AUTH_MODE=token and a token on all its nodes and workers" if opened else "",
    )  # fmt: skip
    yield from answers
    try:
        needs = cluster.trial_resources(settings)
        count = cluster.trial_capacity(needs)
        yield Check("trials", "ok", f"{count} at once, each with {_amounts(needs)}")
    except ClusterUnavailable as error:
        advice = "lower what a trial needs, or add a node that has it"
        yield Check("trials", "problem", str(error), advice)
    yield from shared_memory()


@contextmanager
def _stranger(wanted: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process without a token that tries to join."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH_")}
    join = "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False)"
    with tempfile.TemporaryDirectory() as empty:  # a token may also lie in the user's home
        started = subprocess.Popen(
            [sys.executable, "-c", join, wanted],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env={**kept, "RAY_AUTH_MODE": "disabled", "HOME": empty},
        )  # fmt: skip
        try:
            yield started
        finally:
            started.kill()
            started.wait()


def _was_let_in(stranger: subprocess.Popen[bytes]) -> bool:
    try:
        return stranger.wait(_STRANGER_SECONDS) == 0
    except subprocess.TimeoutExpired:
        return False


def _not_joined(wanted: str, error: Exception) -> Check:
    said = one_line(error)[:500]
    lower = said.lower()
    if "version mismatch" in lower:
        advice = "install the Ray and Python of the cluster here, or the other way round"
    else:  # Ray says no more where a token is wrong than where a port is closed
        advice = (
            "something listens there: see that this process has the cluster's token "
            "(RAY_AUTH_MODE=token with RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, as on its head), and "
            "that this machine reaches all of Ray's ports"
        )
    return Check("cluster", "problem", f"RAY_ADDRESS={wanted} cannot be joined: {said}", advice)


def _nodes(nodes: list[dict[str, Any]]) -> Iterator[Check]:
    """Each node by itself: one that does not answer must not hide what is wrong with others."""
    import ray

    from workers.ray import cluster

    own = cluster.versions()
    asked = cluster.ask_versions(nodes)
    ray.wait(list(asked.values()), num_returns=len(asked), timeout=_NODE_SECONDS)
    for node in nodes:
        address = cluster.node_name(node)
        name = f"node {address}"
        has = _amounts(node["Resources"])
        try:
            found = ray.get(asked[address], timeout=0.5)
        except Exception as error:
            yield _no_answer(name, has, error)
            continue
        other = [f"{n} {v} (here {own[n]})" for n, v in found.items() if v != own[n]]
        same = ", ".join(f"{n} {v}" for n, v in own.items())
        text = f"{has}; it has {', '.join(other)}" if other else f"{has}; {same}"
        yield Check.of(name, text, (bool(other), "problem", f"install the same there: {same}"))


def _no_answer(name: str, has: str, error: Exception) -> Check:
    said = one_line(error)[-300:]
    if "ModuleNotFoundError" in str(error):
        advice = "install einsum-nas there, in the Python that runs Ray, in this version"
        return Check(name, "problem", f"{has}; einsum-nas cannot be imported: {said}", advice)
    found = f"{has}; no answer to a tiny task: {type(error).__name__} {said}"
    advice = "see that this machine and the node reach each other, and the node's Ray log"
    return Check(name, "problem", found, advice)


def _amounts(resources: Mapping[str, float]) -> str:
    """The resources that people ask for, without those that Ray makes up for each node."""
    return ", ".join(
        f"{amount / 2**30 if 'memory' in name else amount:.4g} "
        + ("GiB memory" if name == "memory" else name)
        for name, amount in sorted(resources.items())
        if not name.startswith("node:") and name != "object_store_memory"
    )


def _main(settings_json: str) -> None:
    try:
        checks = list(_examined(Settings.model_validate_json(settings_json)))
    except InvalidInput as error:
        checks = [Check("cluster", "problem", str(error), f"set it to {error.accepted}")]
    print(_MARK + json.dumps([asdict(c) for c in checks]), flush=True)
    os._exit(0)  # leaving the cluster in order can take as long as joining it


if __name__ == "__main__":
    _main(sys.argv[1])
