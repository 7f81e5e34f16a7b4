"""The scripts of the deployment, run: the secrets, and a worker attached to a Ray cluster."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import psutil
import pytest
import yaml
from sqlalchemy.engine import make_url

from nas import settings as nas_settings
from tests.support.paths import ROOT
from tests.support.services import free_port
from tests.support.tiers import FULL

DOCKER = ROOT / "docker"
BIN = Path(sys.executable).parent
PATIENCE_SECONDS = 120


def _make_secrets(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [DOCKER / "make-secrets.sh", folder], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("script", "shell"), [("make-secrets.sh", "sh"), ("attached-worker", "bash")]
)
def test_scripts_parse(script: str, shell: str) -> None:
    subprocess.run([shell, "-n", DOCKER / script], check=True)
    assert os.access(DOCKER / script, os.X_OK)


def test_secrets_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "secrets"
    assert _make_secrets(folder).returncode == 0
    made = {path.name: path.read_text() for path in folder.iterdir()}
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    assert set(made) == set(compose["secrets"])
    # only the owner reaches the files; a container, whose user is another, reads what is mounted
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o444}
    for name in ("postgres_password", "ray_token"):
        assert re.fullmatch("[0-9a-f]{64}", made[name])
    assert made["postgres_password"] != made["ray_token"]

    (folder / "ray_token").unlink()
    assert "kept" in _make_secrets(folder).stderr
    again = {path.name: path.read_text() for path in folder.iterdir()}
    assert again.pop("ray_token") != made.pop("ray_token")
    assert again == made

    # what the services read there is the address of the database that compose makes
    monkeypatch.setenv(nas_settings.SECRETS_DIR, str(folder))
    monkeypatch.delenv("EINSUM_NAS_DATABASE_URL", raising=False)
    nas_settings.settings.cache_clear()
    url = make_url(nas_settings.settings().resolved_database_url)
    nas_settings.settings.cache_clear()
    postgres = compose["services"]["postgres"]["environment"]
    assert (url.username, url.database) == (postgres["POSTGRES_USER"], postgres["POSTGRES_DB"])
    assert (url.host, url.password) == ("postgres", made["postgres_password"])


def test_secrets_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    assert _make_secrets(tmp_path).returncode == 0
    (tmp_path / "postgres_password").unlink()
    found = _make_secrets(tmp_path)
    assert found.returncode == 2
    assert "EINSUM_NAS_DATABASE_URL and no postgres_password" in found.stderr
    assert not (tmp_path / "postgres_password").exists()


class Cluster:
    """The head of a Ray cluster that asks for a token, and programs beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.address = f"127.0.0.1:{free_port()}"
        assert _make_secrets(folder / "secrets").returncode == 0
        self.environment = os.environ | {
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "HOME": str(folder),
            "EINSUM_NAS_HOME": str(folder / "home"),
            "RAY_ADDRESS": self.address,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(folder / "secrets" / "ray_token"),
            "RAY_OBJECT_STORE_BYTES": "100000000",
            "RAY_TMPDIR": str(folder),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        self.log = (folder / "log").open("w")
        self.children: list[psutil.Popen] = []

    def open(self) -> None:
        self.start(
            "ray", "start", "--head", f"--port={self.address.partition(':')[2]}", "--num-cpus=0",
            "--num-gpus=0", "--include-dashboard=false", "--object-store-memory=100000000",
            "--disable-usage-stats", "--block",
        )  # fmt: skip
        self.wait_until(lambda: self.health().returncode == 0)

    def start(self, *command: str | Path) -> psutil.Popen:
        child = psutil.Popen(
            command, env=self.environment, stdout=self.log, stderr=self.log, start_new_session=True
        )
        self.children.append(child)
        return child

    def health(self, **changed: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [BIN / "ray", "health-check", "--address", self.address],
            env=self.environment | changed, capture_output=True, text=True, check=False,
        )  # fmt: skip

    def wait_until(self, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not holds():
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.2)

    def attach(self) -> psutil.Popen:
        """A worker that is a node of the cluster and looks for searches."""
        attached = self.start(DOCKER / "attached-worker")
        self.wait_until(
            lambda: (
                bool(_programs(attached, "raylet/raylet"))
                and bool(_programs(attached, "bin/einsum-nas"))
            )
        )
        (worker,) = _programs(attached, "bin/einsum-nas")
        self.wait_until(lambda: self._state(worker.pid) == "idle")  # it has joined the cluster
        return attached

    def _state(self, worker: int) -> str | None:
        """What a worker last said of itself; None before it did."""
        database = self.folder / "home" / "einsum-nas.db"
        if not database.exists():
            return None
        with closing(sqlite3.connect(database)) as connection:
            try:
                found = connection.execute(
                    "SELECT state FROM processes WHERE kind = 'worker' AND pid = ?", [worker]
                ).fetchone()
            except sqlite3.OperationalError:  # it makes the tables just now
                return None
        return found[0] if found else None

    def said(self) -> str:
        return (self.folder / "log").read_text()

    def close(self) -> None:
        for child in self.children:
            family = [child, *child.children(recursive=True)] if child.is_running() else []
            for process in family:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            child.wait(PATIENCE_SECONDS)
        self.log.close()


def _programs(parent: psutil.Popen, name: str) -> list[psutil.Process]:
    found = []
    for process in parent.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if any(word.endswith(name) for word in process.cmdline()):
                found.append(process)
    return found


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    # the path of a socket has at most 107 characters, and Ray adds 70 to that of its folder
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    made = Cluster(folder)
    try:
        made.open()
        yield made
    finally:
        made.close()
        shutil.rmtree(folder)


def test_the_cluster_refuses_whoever_lacks_its_token(cluster: Cluster, tmp_path: Path) -> None:
    assert cluster.health().returncode == 0
    other = tmp_path / "token"
    other.write_text("0" * 64)
    for changed in (
        {"RAY_AUTH_MODE": "disabled"},
        {"RAY_AUTH_TOKEN_PATH": str(other)},
    ):
        refused = cluster.health(**changed)
        assert refused.returncode == 1
        assert "InvalidAuthToken" in refused.stderr


@FULL
def test_a_worker_is_told_to_end_and_takes_its_node_along(cluster: Cluster) -> None:
    attached = cluster.attach()
    (node,) = _programs(attached, "raylet/raylet")
    attached.send_signal(signal.SIGTERM)
    assert attached.wait(PATIENCE_SECONDS) == 0, cluster.said()
    cluster.wait_until(lambda: not node.is_running())


@FULL
def test_a_worker_that_loses_its_node_ends(cluster: Cluster) -> None:
    """It would else claim one search after the other and fail them all."""
    attached = cluster.attach()
    (worker,) = _programs(attached, "bin/einsum-nas")
    (node,) = _programs(attached, "raylet/raylet")
    node.kill()
    assert attached.wait(PATIENCE_SECONDS) != 0
    assert "the Ray node has ended; ending the worker" in cluster.said()
    cluster.wait_until(lambda: not worker.is_running())


def test_a_worker_without_a_cluster_is_refused(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    found = subprocess.run(
        [DOCKER / "attached-worker"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode != 0
    assert "RAY_ADDRESS: the address of the head, such as ray-head:6379" in found.stderr
