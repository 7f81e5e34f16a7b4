"""Backups hold exactly what was there at one moment, and restore as a whole or not at all."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from typer.testing import CliRunner

from nas.cli.db import app
from nas.errors import Conflict, EinsumNasError, InvalidInput, LeaseLost, NotFound
from nas.service.answers import get_best, get_frontier
from nas.settings import settings
from nas.store import AXES, Lease, Leases, Store, StoredPoint, upgrade
from nas.store.backup import Restored, _snapshot, backup, restore
from nas.store.engine import open_engine, writing
from nas.store.keys import Keys
from nas.store.migrate import downgrade_within, known_revisions, migrating
from nas.store.schema import Base, EventRow, PointRow, ProcessRow, TrialRow
from nas.store.tenants import set_quotas
from tests.support.stored import (
    LONG,
    REQUEST,
    begun,
    check_consistent,
    draft,
    run_to_plan,
)
from tests.support.tiers import only

KINDS = ("sqlite", "postgresql")
HEAD = known_revisions()[-1]
NewDatabase = Callable[[str], str]


@pytest.fixture
def new_database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[NewDatabase]:
    """A function from a kind to the URL of a new database of it."""
    made: list[str] = []

    def make(kind: str) -> str:
        name = f"b{uuid.uuid4().hex}"
        if kind == "sqlite":
            return f"sqlite:///{tmp_path / name}.db"
        server = str(request.getfixturevalue("postgresql_server"))
        with psycopg.connect(server, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        made.append(name)
        return server.replace("/postgres?", f"/{name}?")

    yield make
    if made:
        server = str(request.getfixturevalue("postgresql_server"))
        with psycopg.connect(server, autocommit=True) as connection:
            for name in made:
                connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


def fill(store: Store) -> str:
    """A search that succeeded, with extreme values, and one that is running; the latter's id."""
    lease = begun(store)
    for number in range(6):
        run_to_plan(store, lease, number, [3.0, 2.5 - number / 7, 2.0 + number / 10])
    Leases(store).release(lease, "succeeded")
    with writing(store.engine) as session:
        trial = session.scalars(sa.select(TrialRow).order_by(TrialRow.id)).first()
        assert trial is not None
        trial.train_flops_per_step = 2**62 + 1
        trial.forward_flops_per_token = 5e-324
        trial.sampler_state = {"θ": [0.1 + 0.2, 1e-320, 2**80, None, True, {}], "empty": []}
        trial.error = "ρ → φ\n\"quoted\", 'single', \\u0000 as text"
        trial.params, trial.environment = None, sa.null()  # JSON's null, and none at all
        point = session.get(PointRow, (trial.id, trial.steps))
        assert point is not None
        point.window_losses = bytes(range(256))
        point.seconds, point.loss_stderr = 1.7976931348623157e308, 0.1 + 0.7
    lease = begun(store, "f2", seed=1)
    run_to_plan(store, lease, 0, [3.0, 2.0])
    trial_id = Leases(store).add_trial(lease, draft(1)).id
    Leases(store).start_trial(lease, trial_id)
    Leases(store).add_point(lease, trial_id, StoredPoint(1, 1.0, 4.0, 0.1, 1.0, (4.0,)))
    Leases(store).add_trial(lease, draft(2))
    keys = Keys(store)
    key, _ = keys.create("a", "ada", ["read"])
    keys.sign_in(key, 3600)
    keys.note_use(key)  # PostgreSQL keeps the changed row behind that of its session
    set_quotas(store, "a", searches=3)
    return lease.search_id


def contents(url: str, without: tuple[str, ...] = ("processes",)) -> dict[str, list[Any]]:
    """Every row of every table in the order of its key; JSON as the text that is stored."""
    engine = open_engine(url)
    found: dict[str, list[Any]] = {}
    with engine.connect() as connection:
        for name, table in Base.metadata.tables.items():
            if name in without:
                continue
            columns = [
                sa.cast(c, sa.Text) if isinstance(c.type, sa.JSON) else c for c in table.columns
            ]
            rows = connection.execute(sa.select(*columns).order_by(*table.primary_key.columns))
            found[name] = [tuple(row) for row in rows]
    engine.dispose()
    return found


def tables(url: str) -> list[str]:
    engine = open_engine(url)
    names = sa.inspect(engine).get_table_names()
    engine.dispose()
    return names


def opened(url: str) -> Store:
    upgrade(url)
    return Store(url)


def of_file(path: Path) -> str:
    return f"sqlite:///{path}"


@pytest.mark.parametrize("target", KINDS)
@pytest.mark.parametrize("source", KINDS)
def test_every_value_comes_back_exactly(
    new_database: NewDatabase, tmp_path: Path, source: str, target: str
) -> None:
    url, path = new_database(source), tmp_path / "backup.db"
    store = opened(url)
    running = fill(store)
    before = contents(url)
    assert before["trials"][0][5] == "null"  # the two nulls of JSON are there to be told apart
    assert None in before["trials"][0]
    made = backup(url, path)
    assert contents(of_file(path)) == before
    assert contents(url) == before
    assert made.manifest.rows == {k: len(rows) for k, rows in before.items()}
    assert (made.manifest.revision, made.manifest.source) == (store.schema_revision(), source)
    assert made.bytes == path.stat().st_size
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []

    restored_url = new_database(target)
    done = restore(path, restored_url)
    assert done == Restored(HEAD, HEAD, made.manifest, made.manifest.rows, (running,))
    after = contents(restored_url)
    assert {k: v for k, v in after.items() if k not in ("searches", "events", "trials")} == {
        k: v for k, v in before.items() if k not in ("searches", "events", "trials")
    }
    # but for the search that was running, of which the next test is
    for name, column in (("searches", 0), ("trials", 1), ("events", 1)):
        assert [r for r in after[name] if r[column] != running] == [
            r for r in before[name] if r[column] != running
        ]
    restored = Store(restored_url)
    with restored.engine.connect() as connection:
        context = MigrationContext.configure(connection)
        assert compare_metadata(context, Base.metadata) == []
    for axis in AXES:
        assert get_frontier(restored, task="text", x=axis) == get_frontier(
            store, task="text", x=axis
        )
    # numbers go on after those that came
    known = {t.id for s in store.searches() for t in store.trials(s.id)}
    claimed = Leases(restored).claim("w", LONG)
    assert claimed is not None
    assert Leases(restored).add_trial(claimed[0], draft(7)).id > max(known)
    store.close()
    restored.close()


@pytest.mark.parametrize("target", KINDS)
def test_a_running_search_is_queued_again_and_its_worker_refused(
    new_database: NewDatabase, tmp_path: Path, target: str
) -> None:
    url, path = new_database("sqlite"), tmp_path / "backup.db"
    store = opened(url)
    begun(store)  # to be cancelled
    store.cancel(store.searches()[0].id)
    begun(store, seed=1)  # to be paused
    store.pause(store.searches()[0].id)
    running = fill(store)
    before = store.search(running)
    backup(url, path)
    restored_url = new_database(target)
    done = restore(path, restored_url)
    restored = Store(restored_url)
    assert done.released == tuple(s.id for s in store.searches()[::-1] if s.state == "running")
    assert [restored.search(i).state for i in done.released] == ["cancelled", "paused", "queued"]
    after = restored.search(running)
    assert (after.epoch, after.failures, after.worker) == (before.epoch + 1, before.failures, None)
    assert (before.trial_counts, after.trial_counts) == (
        {"complete": 1, "planned": 1, "running": 1}, {"complete": 1, "planned": 2}
    )  # fmt: skip
    assert [t.state for t in restored.trials(running)] == ["complete", "planned", "planned"]
    assert restored.events(running)[-1].kind == "restored"
    old = Lease(running, before.epoch, "w", LONG)
    trial = restored.trials(running)[1]
    with pytest.raises(LeaseLost):
        Leases(restored).start_trial(old, trial.id)
    claimed = Leases(restored).claim("new", LONG)
    assert claimed is not None
    assert (claimed[0].search_id, claimed[0].epoch) == (running, before.epoch + 2)
    with pytest.raises(LeaseLost):
        Leases(restored).start_trial(old, trial.id)
    Leases(restored).start_trial(claimed[0], trial.id)
    store.close()
    restored.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_snapshot_neither_sees_nor_stops_writers(new_database: NewDatabase, kind: str) -> None:
    url = new_database(kind)
    store = opened(url)
    lease = begun(store)
    engine = open_engine(url)
    counted = sa.select(sa.func.count()).select_from(TrialRow)
    with _snapshot(engine) as connection:
        assert connection.scalar(counted) == 0
        run_to_plan(store, lease, 0, [2.0])
        upgrade(url)  # as every process does that starts meanwhile
        assert connection.scalar(counted) == 0
        if kind == "postgresql":
            assert connection.exec_driver_sql("SHOW statement_timeout").scalar() == "0"
            with pytest.raises(sa.exc.DBAPIError, match="read-only"):
                connection.execute(sa.delete(EventRow))
    engine.dispose()
    assert len(store.trials(lease.search_id)) == 1
    store.close()


@pytest.mark.parametrize("kind", only(["postgresql"], KINDS))
def test_a_backup_under_load_is_one_moment(
    new_database: NewDatabase, tmp_path: Path, kind: str
) -> None:
    url = new_database(kind)
    store = opened(url)
    finished = fill_until_done(store)
    fronts = [get_frontier(store, search_id=finished, x=axis) for axis in AXES]
    ended, written, errors = threading.Event(), [0, 0], list[BaseException]()

    def write(index: int) -> None:
        try:
            own, number = Store(url), 0
            lease = begun(own, f"w{index}", seed=index)
            while not ended.is_set():
                run_to_plan(own, lease, number, [3.0, 2.0 + (number * 7 % 11) / 10])
                number += 1
                written[index] = number
            own.close()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    try:
        made = []
        for number in range(2):
            while not errors and min(written) < 2 * (number + 1):
                time.sleep(0.01)
            made.append(backup(url, tmp_path / f"{number}.db"))
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    assert errors == []
    counts = [m.manifest.rows["trials"] for m in made]
    assert counts == sorted(set(counts))  # each caught a moment of its own
    best = get_best(store, search_id=finished, train_flops=2e11)
    for m in made:
        copy = m.path.with_suffix(".copy")  # looking at the standings sweeps them
        copy.write_bytes(m.path.read_bytes())
        found = Store(of_file(copy))
        assert [get_frontier(found, search_id=finished, x=axis) for axis in AXES] == fronts
        assert get_best(found, search_id=finished, train_flops=2e11) == best
        check_consistent(found)
        found.close()
    restored_url = new_database(kind)
    restore(made[-1].path, restored_url)
    restored = Store(restored_url)
    check_consistent(restored)
    assert [get_frontier(restored, search_id=finished, x=axis) for axis in AXES] == fronts
    restored.close()
    store.close()


def fill_until_done(store: Store) -> str:
    lease = begun(store, "done", seed=9)
    for number in range(5):
        run_to_plan(store, lease, number, [3.0, 2.5 - number / 20, 2.2 - number / 20])
    Leases(store).release(lease, "succeeded")
    return lease.search_id


@pytest.mark.parametrize("kind", KINDS)
def test_an_inconsistent_store_is_told_from_a_consistent_one(
    new_database: NewDatabase, kind: str
) -> None:
    store = opened(new_database(kind))
    fill_until_done(store)
    check_consistent(store)
    with writing(store.engine) as session:
        trial = session.scalars(sa.select(TrialRow).order_by(TrialRow.id)).first()
        assert trial is not None
        session.execute(sa.delete(PointRow).where(PointRow.trial_id == trial.id))
    with pytest.raises(AssertionError):
        check_consistent(store)
    store.close()


def test_a_killed_backup_is_never_taken_for_a_whole_one(tmp_path: Path) -> None:
    url, path = of_file(tmp_path / "source.db"), tmp_path / "backup.db"
    store = opened(url)
    search, _ = store.create_search(REQUEST)
    with writing(store.engine) as session:
        data = {"text": "x" * 500}
        row = {"search_id": search.id, "created_at": 0.0, "kind": "point", "data": data}
        session.execute(sa.insert(EventRow), [row] * 60_000)
    store.close()
    program = "import sys; from pathlib import Path; from nas.store.backup import backup; " \
        "backup(sys.argv[1], Path(sys.argv[2]))"  # fmt: skip
    process = subprocess.Popen([sys.executable, "-c", program, url, str(path)])
    while not (begun := [p for p in tmp_path.glob(".*.part") if p.stat().st_size > 2_000_000]):
        assert process.poll() is None
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL
    assert not path.exists()
    with pytest.raises(InvalidInput, match=r"completed|can be read"):
        restore(begun[0], of_file(tmp_path / "new.db"))
    assert not (tmp_path / "new.db").exists()
    assert backup(url, path).manifest.rows["events"] == 60_001


def test_a_disk_that_is_full_leaves_nothing(tmp_path: Path) -> None:
    """Files of this process may not grow past what the backup needs."""
    url, path = of_file(tmp_path / "source.db"), tmp_path / "backups" / "backup.db"
    path.parent.mkdir()
    store = opened(url)
    for _ in range(4):
        fill_until_done(store)
    store.close()
    limited = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))\n"
        "from nas.cli.db import app\n"
        "app()\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", limited, "backup", str(path)],
        env={**os.environ, "EINSUM_NAS_DATABASE_URL": url},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 1, result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert "backups" in result.stderr
    assert list(path.parent.iterdir()) == []
    assert backup(url, path).bytes > 150_000


def test_places_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    source, path = tmp_path / "source.db", tmp_path / "backup.db"
    with pytest.raises(NotFound, match=r"source\.db"):
        backup(of_file(source), path)
    assert not source.exists()
    sqlite3.connect(source).close()
    source.write_bytes(b"")
    with pytest.raises(NotFound, match="no database of einsum-nas"):
        backup(of_file(source), path)
    opened(of_file(source)).close()
    with pytest.raises(InvalidInput, match="another file than the database itself"):
        backup(of_file(source), source, overwrite=True)
    with pytest.raises(InvalidInput, match="folder that exists"):
        backup(of_file(source), tmp_path / "missing" / "backup.db")
    with pytest.raises(InvalidInput, match="does not exist"):
        backup(of_file(source), tmp_path)
    path.write_text("something else")
    with pytest.raises(InvalidInput, match="--overwrite"):
        backup(of_file(source), path)
    assert path.read_text() == "something else"
    (tmp_path / "backup.db-wal").write_text("")
    with pytest.raises(InvalidInput, match=r"backup\.db-wal lies beside it"):
        backup(of_file(source), path, overwrite=True)
    (tmp_path / "backup.db-wal").unlink()
    backup(of_file(source), path, overwrite=True)
    assert path.stat().st_mode & 0o777 == 0o600
    assert sorted(p.name for p in tmp_path.iterdir() if "source" not in p.name) == ["backup.db"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_database_that_holds_something_is_left_as_it_is(
    new_database: NewDatabase, tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "backup.db"
    source = new_database("sqlite")
    opened(source).close()
    backup(source, path)
    full = new_database(kind)
    store = opened(full)
    fill(store)
    before = contents(full)
    with pytest.raises(Conflict, match="2 searches with 9 trials"):
        restore(path, full)
    assert contents(full) == before
    store.close()
    other = new_database(kind)
    engine = open_engine(other)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE studies (id INTEGER)")
    with pytest.raises(Conflict, match="studies"):
        restore(path, other)
    assert sa.inspect(engine).get_table_names() == ["studies"]
    engine.dispose()


@pytest.mark.parametrize("kind", KINDS)
def test_tables_of_a_service_that_waits_make_room(
    new_database: NewDatabase, tmp_path: Path, kind: str
) -> None:
    source, target = new_database("sqlite"), new_database(kind)
    store = opened(source)
    fill(store)
    with writing(store.engine) as session:
        session.add(process_row("of the source"))
    store.close()
    waiting = opened(target)
    with writing(waiting.engine) as session:
        session.add(process_row("here"))
    backup(source, tmp_path / "backup.db")
    done = restore(tmp_path / "backup.db", target)
    assert (done.rows["searches"], len(waiting.searches())) == (2, 2)
    assert contents(target, without=())["processes"] == []
    waiting.close()


def process_row(name: str) -> ProcessRow:
    return ProcessRow(
        name=name, kind="worker", host="h", pid=1, version="0", started_at=0.0, seen_at=0.0,
        state="idle", about={},
    )  # fmt: skip


def changed(path: Path, statement: str) -> None:
    connection = sqlite3.connect(path)
    connection.execute(statement)
    connection.commit()
    connection.close()


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("UPDATE alembic_version SET version_num = '9999'", "'9999', of a newer einsum-nas"),
        ("DELETE FROM backup", "completed"),
        ("DELETE FROM events WHERE kind = 'queued'", "table events had"),
        ("DELETE FROM alembic_version", "db backup"),
        ("DELETE FROM searches WHERE state = 'running'", "table searches had|rows refer"),
    ],
)
def test_files_that_cannot_be_trusted_are_refused(
    tmp_path: Path, statement: str, said: str
) -> None:
    source, path, target = (tmp_path / f"{n}.db" for n in ("source", "backup", "target"))
    store = opened(of_file(source))
    fill(store)
    store.close()
    backup(of_file(source), path)
    changed(path, statement)
    with pytest.raises(EinsumNasError, match=said):
        restore(path, of_file(target))
    assert not target.exists()


def test_files_that_are_no_backups_are_refused(tmp_path: Path) -> None:
    path, target = tmp_path / "backup.db", of_file(tmp_path / "target.db")
    with pytest.raises(InvalidInput, match="No such file"):
        restore(path, target)
    path.write_text("no database at all")
    with pytest.raises(InvalidInput, match="db backup"):
        restore(path, target)
    path.unlink()
    changed(path, "CREATE TABLE t (i INTEGER)")
    with pytest.raises(InvalidInput, match="db backup"):
        restore(path, target)
    store = opened(of_file(tmp_path / "source.db"))
    for _ in range(2):
        fill_until_done(store)
    store.close()
    path.unlink()
    backup(of_file(tmp_path / "source.db"), path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 9000] = b"\xff" * 9000
    path.write_bytes(content)
    with pytest.raises(InvalidInput, match=r"damaged|can be read"):
        restore(path, target)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InvalidInput, match=r"damaged|can be read"):
        restore(path, target)
    assert not (tmp_path / "target.db").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_restore_that_fails_leaves_nothing(
    new_database: NewDatabase, tmp_path: Path, kind: str
) -> None:
    source, target = tmp_path / "source.db", new_database(kind)
    store = opened(of_file(source))
    fill(store)
    store.close()
    changed(source, "ALTER TABLE points DROP COLUMN loss_stderr")
    with pytest.raises(EinsumNasError, match="table points"):
        restore(source, target)
    assert tables(target) == []
    backup_of_whole = tmp_path / "other.db"
    store = opened(of_file(backup_of_whole))
    fill(store)
    store.close()
    restore(backup_of_whole, target)
    assert "searches" in tables(target)


def test_a_row_that_postgresql_has_no_room_for_fails_as_a_whole(
    new_database: NewDatabase, tmp_path: Path
) -> None:
    source, target = tmp_path / "source.db", new_database("postgresql")
    store = opened(of_file(source))
    fill(store)
    store.close()
    changed(source, f"UPDATE trials SET name = '{'n' * 129}' WHERE id = 3")
    with pytest.raises(EinsumNasError, match=r"table trials: a row does not fit .*too long"):
        restore(source, target)
    assert tables(target) == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("revision", only(["0001"], ["0001", "0002", "0003"]))
def test_an_older_database_is_backed_up_as_it_is(
    new_database: NewDatabase, tmp_path: Path, kind: str, revision: str
) -> None:
    url, path = new_database(kind), tmp_path / "backup.db"
    store = opened(url)
    fill(store)
    trials = contents(url)["trials"]
    store.close()
    with migrating(url) as connection:
        downgrade_within(connection, revision)
    made = backup(url, path)
    assert made.manifest.revision == revision
    for place in (url, of_file(path)):
        engine = open_engine(place)
        with engine.connect() as connection:
            found = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()
            assert found == revision
            assert connection.exec_driver_sql("SELECT count(*) FROM trials").scalar() == len(trials)
        engine.dispose()
    done = restore(path, new_database(kind))
    assert (done.file_revision, done.revision) == (revision, HEAD)
    assert done.rows == made.manifest.rows
    upgrade(of_file(path))  # which opening it does
    again = restore(path, new_database("sqlite"))
    assert (again.file_revision, again.rows["trials"]) == (HEAD, len(trials))


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """`einsum-nas db` on a database: the result of a command with arguments."""

    def run_command(url: str, *arguments: str) -> Any:
        monkeypatch.setenv("EINSUM_NAS_DATABASE_URL", url)
        settings.cache_clear()
        return CliRunner().invoke(app, list(arguments))

    yield run_command
    settings.cache_clear()


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_line_moves_a_database(
    new_database: NewDatabase, tmp_path: Path, command: Callable[..., Any], kind: str
) -> None:
    laptop, server, path = new_database("sqlite"), new_database(kind), tmp_path / "backup.db"
    store = opened(laptop)
    fill(store)
    store.close()
    made = command(laptop, "backup", str(path))
    assert made.exit_code == 0, made.output
    assert f"{path}: " in made.stdout
    assert "2 searches, 9 trials, 21 points" in made.stdout
    again = command(laptop, "backup", str(path))
    assert (again.exit_code, again.stdout) == (2, "")
    assert again.stderr.startswith("error: file: got ")
    told = json.loads(command(laptop, "backup", str(path), "--overwrite", "--json").stdout)
    assert (told["revision"], told["bytes"]) == (HEAD, path.stat().st_size)
    done = command(server, "restore", str(path))
    assert done.exit_code == 0, done.output
    assert "2 searches, 9 trials, 21 points" in done.stdout
    assert "at the time of the backup: 1" in done.stdout
    refused = command(server, "restore", str(path))
    assert refused.exit_code == 1
    assert "is not empty" in refused.stderr
    told = json.loads(command(new_database(kind), "restore", str(path), "--json").stdout)
    assert told["manifest"]["source"] == "sqlite"
    assert json.loads(command(server, "upgrade", "--json").stdout) == {"revision": HEAD}


def test_a_backup_opens_as_a_database(tmp_path: Path) -> None:
    source, path = of_file(tmp_path / "source.db"), tmp_path / "backup.db"
    store = opened(source)
    fill_until_done(store)
    expected = get_frontier(store, task="text").model_dump(mode="json")
    store.close()
    backup(source, path)
    environment = {**os.environ, "EINSUM_NAS_DATABASE_URL": of_file(path)}
    shown = subprocess.run(
        [sys.executable, "-m", "nas.cli", "frontier", "--json"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout) == expected
    # and is a backup still
    assert restore(path, of_file(tmp_path / "new.db")).manifest is not None
