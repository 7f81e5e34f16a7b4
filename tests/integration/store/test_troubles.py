"""Every way in which a database can be unavailable, from real databases, and none besides."""

from __future__ import annotations

import pickle
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import errors as of_psycopg
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, IntegrityError

from nas.errors import StoreUnavailable
from nas.store import Store, upgrade
from nas.store.engine import open_engine, reading, writing
from nas.store.troubles import TROUBLE_KINDS, DatabaseTrouble, trouble_of


@pytest.fixture
def on_postgresql(postgresql_server: str) -> Iterator[Store]:
    opened = Store(postgresql_server)
    yield opened
    opened.close()


def run(store: Store, statement: str, **values: Any) -> None:
    with writing(store.engine) as session:
        session.execute(text(statement), values)


def trouble(call: Callable[[], None]) -> str:
    with pytest.raises(DatabaseTrouble) as caught:
        call()
    return caught.value.kind


def test_errors_of_programs_and_of_integrity_stay_what_they_are(store: Store) -> None:
    for statement in ("SELECT * FROM nowhere", "SELECT nothing FROM searches", "SELEC 1"):
        with pytest.raises(DBAPIError):
            run(store, statement)
    entry = (
        "INSERT INTO processes (name, kind, host, pid, version, started_at, seen_at, state, about)"
        " VALUES ('a', 'api', 'h', 1, '1', 0, 0, 'idle', '{}')"
    )
    run(store, entry)
    with pytest.raises(IntegrityError):
        run(store, entry)


def test_a_pool_that_is_used_up(store: Store) -> None:
    pool: Any = store.engine.pool
    pool._timeout = 0.05
    held = [store.engine.connect() for _ in range(pool.size() + pool._max_overflow)]
    with pytest.raises(DatabaseTrouble) as caught:
        store.searches()
    assert caught.value.kind == "exhausted"
    for connection in held:
        connection.close()
    assert store.searches() == []


def test_a_lock_that_is_not_released(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'e.db'}"
    upgrade(url)
    store, hasty = Store(url), Store(url)
    hasty.engine = open_engine(url, busy_timeout_seconds=0.05)
    forget = "DELETE FROM processes"
    with writing(store.engine) as session:
        session.execute(text(forget))
        with pytest.raises(DatabaseTrouble) as caught:
            run(hasty, forget)
    assert caught.value.kind == "locked"
    run(hasty, forget)


@pytest.mark.parametrize("at", [0, 4096])
def test_a_file_that_is_damaged(tmp_path: Path, at: int) -> None:
    file = tmp_path / "e.db"
    upgrade(f"sqlite:///{file}")
    with file.open("r+b") as opened:
        opened.seek(at)
        opened.write(b"\x55" * 4096 * 200)
    store = Store(f"sqlite:///{file}")
    with pytest.raises(DatabaseTrouble) as caught:
        store.searches()
    assert caught.value.kind == "damaged"


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DatabaseTrouble) as caught:
        Store(f"sqlite:///{tmp_path / 'none' / 'e.db'}").searches()
    assert caught.value.kind == "away"


def test_a_file_put_in_the_place_of_another_is_opened(tmp_path: Path) -> None:
    file, other = tmp_path / "e.db", tmp_path / "other.db"
    for path in (file, other):
        upgrade(f"sqlite:///{path}")
    store, second = Store(f"sqlite:///{file}"), Store(f"sqlite:///{other}")
    run(second, "CREATE TABLE mark (x INTEGER)")
    second.close()
    assert store.searches() == []
    other.rename(file)
    run(store, "INSERT INTO mark VALUES (1)")
    store.close()


def test_a_connection_lost_in_the_middle(on_postgresql: Store) -> None:
    engine = on_postgresql.engine

    def lose() -> None:
        with writing(engine) as session:
            pid = session.scalar(text("SELECT pg_backend_pid()"))
            run(on_postgresql, "SELECT pg_terminate_backend(:pid)", pid=pid)
            session.execute(text("SELECT 1"))

    assert trouble(lose) == "away"
    with reading(engine) as session:
        assert session.scalar(text("SELECT 1")) == 1


def test_a_statement_that_takes_too_long(on_postgresql: Store) -> None:
    def wait() -> None:
        with writing(on_postgresql.engine) as session:
            session.execute(text("SET LOCAL statement_timeout = 50"))
            session.execute(text("SELECT pg_sleep(60)"))

    assert trouble(wait) == "timeout"


def test_a_transaction_that_may_only_read(on_postgresql: Store) -> None:
    def write() -> None:
        with writing(on_postgresql.engine) as session:
            session.execute(text("SET TRANSACTION READ ONLY"))
            session.execute(text("CREATE TABLE never (x INTEGER)"))

    assert trouble(write) == "read_only"


def test_a_deadlock(on_postgresql: Store) -> None:
    run(on_postgresql, "CREATE TABLE pair (x INTEGER PRIMARY KEY, y INTEGER)")
    run(on_postgresql, "INSERT INTO pair VALUES (0, 0), (1, 0)")
    both, kinds = threading.Barrier(2), []

    def cross(first: int) -> None:
        try:
            with writing(on_postgresql.engine) as session:
                change = text("UPDATE pair SET y = 1 WHERE x = :x")
                session.execute(change, {"x": first})
                both.wait(30)
                session.execute(change, {"x": 1 - first})
        except DatabaseTrouble as error:
            kinds.append(error.kind)

    threads = [threading.Thread(target=cross, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    run(on_postgresql, "DROP TABLE pair")
    assert kinds == ["locked"]


def test_a_user_without_rights(on_postgresql: Store, postgresql_server: str) -> None:
    run(on_postgresql, "CREATE TABLE theirs (x INTEGER)")
    run(on_postgresql, "CREATE ROLE guest LOGIN CONNECTION LIMIT 1")
    url = postgresql_server.replace("postgres:@", "guest:@")
    assert url != postgresql_server
    guest = Store(url)
    try:
        with pytest.raises(DatabaseTrouble) as caught:
            run(guest, "INSERT INTO theirs VALUES (1)")
        assert caught.value.kind == "refused"
        with reading(guest.engine), pytest.raises(DatabaseTrouble) as crowded:
            Store(url).searches()  # its one connection is taken
        assert crowded.value.kind in ("away", "exhausted")
    finally:
        guest.close()
        with psycopg.connect(postgresql_server, autocommit=True) as connection:
            connection.execute("DROP TABLE theirs")
            connection.execute("DROP ROLE guest")


def test_a_server_that_is_not_there_and_its_password() -> None:
    with pytest.raises(StoreUnavailable) as caught:
        Store("postgresql://me:hush@127.0.0.1:9/db").searches()
    error = caught.value
    assert isinstance(error, DatabaseTrouble)
    assert error.kind == "away"
    assert "hush" not in f"{error} {error.cause} {error.finding} {error.advice} {error!r}"
    assert "127.0.0.1" not in error.finding


@pytest.mark.parametrize(
    ("state", "kind"),
    [
        ("53100", "full"), ("53300", "exhausted"), ("53200", "exhausted"), ("57P01", "away"),
        ("57P02", "away"), ("57P03", "away"), ("57014", "timeout"), ("25006", "read_only"),
        ("25P03", "timeout"), ("58030", "failing"), ("XX001", "damaged"), ("08006", "away"),
        ("40001", "locked"), ("3D000", "away"), ("42P01", None), ("23505", None),
        ("22001", None), ("XX000", None), ("25P02", None),
    ],
)  # fmt: skip
def test_states_that_a_test_cannot_bring_about(state: str, kind: str | None) -> None:
    assert trouble_of(of_psycopg.lookup(state)("said")) == kind


def test_the_drivers_own_errors_are_no_troubles() -> None:
    connection = sqlite3.connect(":memory:")
    connection.close()
    with pytest.raises(sqlite3.ProgrammingError) as caught:
        connection.execute("SELECT 1")
    assert trouble_of(caught.value) is None
    assert trouble_of(ValueError("x")) is None


def test_every_trouble_says_what_to_do_and_survives_a_process() -> None:
    for kind in TROUBLE_KINDS:
        error = DatabaseTrouble(kind, "cause  of\nit " + "x" * 10_000)
        again = pickle.loads(pickle.dumps(error))
        assert (again.kind, str(again), again.cause) == (kind, str(error), error.cause)
        assert error.finding
        assert error.advice
        assert len(str(error)) < 1000
