"""The database taken away from under its workers, once each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.faults.databases import Database, PostgresqlServer, new_sqlite
from tests.support.faults.outages import black_hole, foreign_lock, kill_postmaster
from tests.support.tiers import FULL


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresqlServer]:
    """A PostgreSQL that no other test uses, for it is killed."""
    # the server package asks for the user's runtime folder and warns where there is none
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(tmp_path_factory.mktemp("runtime")))
        started = PostgresqlServer(tmp_path_factory.mktemp("postgresql"))
        yield started
        started.close()


@FULL
def test_workers_outlive_the_death_of_their_postgresql(
    server: PostgresqlServer, tmp_path: Path
) -> None:
    database = server.create("killed")
    figures, broken = kill_postmaster(server, database, tmp_path, kills=2, seed=0)
    assert broken == []
    assert figures["accepted_stale"] == 0


def test_a_worker_in_a_black_hole_ends_and_its_search_moves_on(
    server: PostgresqlServer, tmp_path: Path
) -> None:
    figures, broken = black_hole(server, server.create("hole"), tmp_path, rounds=1)
    assert broken == []
    assert figures["ended_by_watchdog"] == 1
    assert figures["leases_lost"] == 1


def test_a_worker_that_is_locked_out_ends_and_its_search_moves_on(tmp_path: Path) -> None:
    database: Database = new_sqlite(tmp_path, "locked")
    figures, broken = foreign_lock(database, tmp_path, rounds=1)
    assert broken == []
    assert figures["ended_by_watchdog"] == 1
    assert figures["leases_lost"] == 1
