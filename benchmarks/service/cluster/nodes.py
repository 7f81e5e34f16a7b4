"""Ray clusters of several nodes on one machine, which can be lost, and workers beside them."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import psutil

from tests.support.services import free_port

#: Seconds for a node to join, and for a process to end.
_PATIENCE = 90.0
_OBJECT_STORE_BYTES = 200_000_000


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to a process and everything below it."""
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    process.kill()
    for child in family:
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait(_PATIENCE)
    psutil.wait_procs(family, timeout=_PATIENCE)


class Cluster:
    """A head without CPUs, nodes that train, and a token that all of them ask for.

    Where this may be done (by root on Linux), every node has a mount namespace in which the
    worker's folders are empty: what reaches it comes through Ray.

    Parameters
    ----------
    hidden
        Folders of the worker that nodes do not see.
    environment
        What nodes and workers are told besides.
    """

    def __init__(
        self,
        folder: Path,
        hidden: tuple[Path, ...] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._log, self._hidden = folder / "ray.log", hidden
        # Ray's sockets have paths of at most 107 bytes
        self._temporary = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
        self.port = free_port()
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self.environment = {**token, **(environment or {})}
        self.head: subprocess.Popen[bytes] | None = None
        self.nodes: list[subprocess.Popen[bytes]] = []
        self.isolated = self._can_isolate()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:  # fmt: skip
        for node in self.nodes:
            kill_tree(node)
        if self.head is not None:
            kill_tree(self.head)
        shutil.rmtree(self._temporary, ignore_errors=True)

    @property
    def address(self) -> str:
        """For RAY_ADDRESS."""
        return f"127.0.0.1:{self.port}"

    def start_head(self, cpus: int = 0) -> None:
        """Start the head; it runs trials on its CPUs, by default none."""
        self.head = self._start(
            [
                "--head",
                "--port",
                str(self.port),
                "--num-cpus",
                str(cpus),
                "--include-dashboard=false",
                "--temp-dir",
                str(self._temporary),
            ],
            hide=False,
        )
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.2)
        raise RuntimeError("the head does not listen")

    def add_node(self, cpus: int = 1) -> subprocess.Popen[bytes]:
        """Start a node that runs trials; returns when it has joined.

        Nodes of one machine take their sockets' names from what is there: one after another.
        """
        said = self._said()
        node = self._start(["--address", self.address, "--num-cpus", str(cpus)], hide=True)
        self.nodes.append(node)
        deadline = time.monotonic() + _PATIENCE
        while self._said() == said:
            if node.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"a node does not join: {self._log.read_text()[-2000:]}")
            time.sleep(0.2)
        return node

    def _said(self) -> int:
        """Nodes that have said that they run."""
        return self._log.read_text().count("Ray runtime started")

    def await_cpus(self, count: int) -> None:
        """Wait until the cluster offers so many CPUs."""
        program = (
            "import ray, sys, time\n"
            f"ray.init('{self.address}', logging_level=40, log_to_driver=False)\n"
            f"while ray.cluster_resources().get('CPU', 0) < {count}: time.sleep(0.5)\n"
        )
        subprocess.run(
            [sys.executable, "-c", program], env=self._environment(), timeout=_PATIENCE, check=True
        )

    def lose(self, node: subprocess.Popen[bytes]) -> None:
        """The node is gone from one moment to the next."""
        self.nodes.remove(node)
        kill_tree(node)

    def lose_head(self) -> None:
        """The head is gone, and with it what the cluster knew."""
        assert self.head is not None
        kill_tree(self.head)
        self.head = None

    def lose_nodes(self) -> None:
        """Every node but the head is gone."""
        for node in list(self.nodes):
            self.lose(node)

    def _environment(self) -> dict[str, str]:
        return {**os.environ, **self.environment, "RAY_USAGE_STATS_ENABLED": "0"}

    def _start(self, arguments: list[str], *, hide: bool) -> subprocess.Popen[bytes]:
        ray = Path(sys.executable).with_name("ray")
        command = [str(ray), "start", "--block", "--node-ip-address", "127.0.0.1"]
        command += ["--object-store-memory", str(_OBJECT_STORE_BYTES), *arguments]
        if hide and self.isolated:
            mounts = " && ".join(f"mount -t tmpfs none {folder}" for folder in self._hidden)
            command = ["unshare", "--mount", "sh", "-c", f'{mounts} && exec "$@"', "sh", *command]
        with self._log.open("a") as log:
            return subprocess.Popen(
                command, env=self._environment(), stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip

    def _can_isolate(self) -> bool:
        if not self._hidden or shutil.which("unshare") is None:
            return False
        tried = ["unshare", "--mount", "mount", "-t", "tmpfs", "none", str(self._hidden[0])]
        return subprocess.run(tried, capture_output=True, check=False).returncode == 0


class SupervisedWorker:
    """A worker that is started anew whenever it ends, as a container would be.

    Parameters
    ----------
    environment
        Its settings: nothing else tells it where the database and the cluster are.
    """

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.home, self.scratch = folder / "home", folder / "scratch"
        for made in (self.home, self.scratch):
            made.mkdir(parents=True, exist_ok=True)
        self.log = folder / "worker.log"
        self._environment = {
            **os.environ,
            "EINSUM_NAS_HOME": str(self.home),
            "TMPDIR": str(self.scratch),
            **environment,
        }
        self.process: subprocess.Popen[bytes] | None = None
        #: exit statuses of those that have ended
        self.ended: list[int] = []

    def look(self) -> None:
        """Start it if it does not run."""
        if self.process is not None and self.process.poll() is not None:
            self.ended.append(self.process.returncode)
            self.process = None
        if self.process is None:
            with self.log.open("a") as log:
                self.process = subprocess.Popen(
                    [sys.executable, "-m", "nas.cli", "worker"], env=self._environment,
                    stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                )  # fmt: skip

    def stop(self) -> int:
        """SIGTERM, and its exit status once it has handed back what it holds."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(_PATIENCE)
        finally:
            kill_tree(self.process)
