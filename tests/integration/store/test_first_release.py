"""A database of the first release goes on in today's program: what it holds is what it held."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from nas.errors import IdempotencyConflict
from nas.planning.request import SearchRequest
from nas.service.answers import get_best, get_frontier
from nas.store import Leases, Store, migrate, upgrade
from nas.store.backup import backup, restore
from nas.store.engine import open_engine
from nas.store.migrate import downgrade_within, known_revisions, migrating, upgrade_within
from nas.store.rows import unpack_floats
from nas.store.schema import Base
from tests.support.paths import DATA
from tests.support.stored import check_consistent

FILE = DATA / "first-release.db"
BUDGET = 4.9e10
Rows = dict[str, list[dict[str, Any]]]


def stored(path: Path) -> Rows:
    """Table → rows as plain SQLite reads them, in the order of their keys."""
    connection = sqlite3.connect(path)
    connection.row_factory = sqlite3.Row
    keys = {"searches": "sequence", "trials": "id", "points": "trial_id, step", "events": "id"}
    found = {
        table: [dict(r) for r in connection.execute(f"SELECT * FROM {table} ORDER BY {key}")]
        for table, key in keys.items()
    }
    connection.close()
    return found


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A copy of the file, as it stands on a user's disk."""
    return Path(shutil.copy(FILE, tmp_path / "einsum-nas.db"))


@pytest.fixture
def before(file: Path) -> Rows:
    """What the file held before anything of today's program touched it."""
    copy = file.with_name("read.db")
    shutil.copy(file, copy)
    return stored(copy)


@pytest.fixture
def upgraded_url(database_url: str, file: Path, before: Rows) -> str:
    """The old database in today's schema: SQLite upgraded in place, PostgreSQL from the file."""
    assert before["searches"]  # read before
    if database_url.startswith("sqlite"):
        upgrade(f"sqlite:///{file}")
        return f"sqlite:///{file}"
    done = restore(file, database_url)
    assert (done.file_revision, done.manifest) == ("0001", None)
    return database_url


@pytest.fixture
def store(upgraded_url: str) -> Iterator[Store]:
    opened = Store(upgraded_url)
    yield opened
    opened.close()


def held(url: str, columns: Rows) -> Rows:
    """What the database holds now in the tables and columns of old; JSON as its text."""
    engine = open_engine(url)
    found: Rows = {}
    with engine.connect() as connection:
        for name, rows in columns.items():
            table = Base.metadata.tables[name]
            chosen = [
                sa.cast(table.c[c], sa.Text).label(c)
                if isinstance(table.c[c].type, sa.JSON)
                else table.c[c]
                for c in rows[0]
            ]
            order = (table.c.sequence,) if name == "searches" else tuple(table.primary_key)
            query = sa.select(*chosen).order_by(*order)
            found[name] = [dict(r._mapping) for r in connection.execute(query)]
    engine.dispose()
    return found


def without(rows: Rows, search_id: str) -> Rows:
    """All but one search's."""
    trials = {t["id"] for t in rows["trials"] if t["search_id"] == search_id}
    return {
        "searches": [s for s in rows["searches"] if s["id"] != search_id],
        "trials": [t for t in rows["trials"] if t["search_id"] != search_id],
        "points": [p for p in rows["points"] if p["trial_id"] not in trials],
        "events": [e for e in rows["events"] if e["search_id"] != search_id],
    }


def of_key(rows: Rows, key: str) -> dict[str, Any]:
    (found,) = (s for s in rows["searches"] if s["idempotency_key"] == key)
    return found


def test_the_file_is_of_the_first_release(before: Rows) -> None:
    """What the other tests rest on is there."""
    assert FILE.stat().st_size < 300_000
    assert {s["state"] for s in before["searches"]} == {
        "queued", "running", "succeeded", "failed", "cancelled"
    }  # fmt: skip
    assert {t["state"] for t in before["trials"]} == {"complete", "running", "stopped"}
    assert any(t["reused_from"] is not None for t in before["trials"])
    assert "tally" not in before["searches"][0]


def test_everything_is_as_it_was(upgraded_url: str, store: Store, before: Rows) -> None:
    running = of_key(before, "killed")["id"]
    after = held(upgraded_url, before)
    assert without(after, running) == without(before, running)
    assert after["points"] == before["points"]
    # of the search that a worker held, the fencing token alone has changed in place
    (was,), (now,) = (
        [s for s in rows["searches"] if s["id"] == running] for rows in (before, after)
    )
    same = {"state": "running", "epoch": was["epoch"] + 1}
    released = {"state": "queued", "epoch": was["epoch"] + 2, "worker": None, "lease_until": None}
    in_place = upgraded_url.startswith("sqlite")
    assert now == {**was, **(same if in_place else released)}
    log = [e for e in after["events"] if e["search_id"] == running]
    kinds = [] if in_place else ["restored"]
    old_log = [e for e in before["events"] if e["search_id"] == running]
    assert log[: len(old_log)] == old_log
    assert [e["kind"] for e in log[len(old_log) :]] == kinds


def test_everything_reads_back(store: Store, before: Rows) -> None:
    curves: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for point in before["points"]:
        curves[point["trial_id"]].append(point)
    assert [s.id for s in store.searches()[::-1]] == [s["id"] for s in before["searches"]]
    for old in before["searches"]:
        search = store.search(old["id"])
        assert search.request.train_flops == json.loads(old["request"])["train_flops"]
        assert (search.tenant, search.priority, search.held_seconds >= 0) == ("default", 0, True)
        trials = [t for t in before["trials"] if t["search_id"] == old["id"]]
        read = store.trials(old["id"])
        assert [t.id for t in read] == [t["id"] for t in trials]
        for trial, raw in zip(read, trials, strict=True):
            assert trial.theta == tuple(json.loads(raw["theta"]))
            assert trial.structures == tuple(json.loads(raw["structures"]))
            assert (trial.loss, trial.error, trial.key) == (raw["loss"], raw["error"], raw["key"])
            assert trial.environment == json.loads(raw["environment"] or "null")
            curve = [
                (p.step, p.train_flops, p.loss, p.loss_stderr, p.train_seconds, p.window_losses)
                for p in store.curve(trial.id)
            ]
            assert curve == [
                (p["step"], p["train_flops"], p["loss"], p["loss_stderr"], p["seconds"],
                 unpack_floats(p["window_losses"]))
                for p in curves[trial.id]
            ]  # fmt: skip
        logged = [e for e in before["events"] if e["search_id"] == old["id"]]
        assert [(e.id, e.kind, e.data) for e in store.events(old["id"])][: len(logged)] == [
            (e["id"], e["kind"], json.loads(e["data"])) for e in logged
        ]
    check_consistent(store)


def test_a_request_that_is_repeated_makes_no_second_search(store: Store, before: Rows) -> None:
    for old in before["searches"]:
        repeated = SearchRequest.checked(json.loads(old["request"]))
        found, new = store.create_search(repeated, idempotency_key=old["idempotency_key"])
        assert (found.id, new) == (old["id"], False)
        other = repeated.model_copy(update={"seed": repeated.seed + 1})
        with pytest.raises(IdempotencyConflict):
            store.create_search(other, idempotency_key=old["idempotency_key"])


def front_of(trials: list[dict[str, Any]], rows: Rows) -> list[tuple[float, float]]:
    """The Pareto front of train FLOPs and loss, from its definition."""
    ids = {t["id"] for t in trials}
    points = [(p["train_flops"], p["loss"]) for p in rows["points"] if p["trial_id"] in ids]
    return sorted(
        (x, y)
        for x, y in points
        if not any(a <= x and b <= y and (a, b) != (x, y) for a, b in points)
    )


def lowest_of(trials: list[dict[str, Any]], rows: Rows) -> float:
    """Least loss at the budget of any model: of its seeds' last points the geometric mean."""
    models: dict[tuple[Any, ...], dict[int, float]] = defaultdict(dict)
    for trial in trials:
        curve = [p for p in rows["points"] if p["trial_id"] == trial["id"]]
        assert all(p["train_flops"] <= BUDGET for p in curve)
        model = (trial["width"], trial["depth"], trial["structures"])
        models[model][trial["seed"]] = curve[-1]["loss"]
    return min(geometric_mean(losses.values()) for losses in models.values())


def test_answers_are_those_of_the_stored_points(store: Store, before: Rows) -> None:
    complete = [t for t in before["trials"] if t["state"] == "complete"]
    scopes: list[tuple[dict[str, Any], list[dict[str, Any]]]] = [
        ({"task": "text"}, [t for t in complete if t["reused_from"] is None])
    ]
    for key in ("first", "again", "cancelled", "killed"):
        search_id = of_key(before, key)["id"]
        own = [t for t in complete if t["search_id"] == search_id]
        assert own
        scopes.append(({"search_id": search_id}, own))
    for scope, trials in scopes:
        answer = get_frontier(store, **scope)
        assert answer.trials == len(trials)
        for shown, of_kind in (
            (answer.frontier, trials),
            (answer.structured, [t for t in trials if not t["dense"]]),
            (answer.dense, [t for t in trials if t["dense"]]),
        ):
            assert [(p.train_flops, p.loss) for p in shown] == front_of(of_kind, before)
        best = get_best(store, train_flops=BUDGET, **scope)
        assert best.expected_loss == pytest.approx(lowest_of(trials, before), rel=1e-12)
        for found, of_kind in (
            (best.best_structured, [t for t in trials if not t["dense"]]),
            (best.best_dense, [t for t in trials if t["dense"]]),
        ):
            assert (found is None) == (of_kind == [])
            if found is not None:
                assert found.loss == pytest.approx(lowest_of(of_kind, before), rel=1e-12)


def test_a_search_of_then_goes_on(upgraded_url: str, store: Store, before: Rows) -> None:
    running, queued = of_key(before, "killed"), of_key(before, "second")
    leases = Leases(store)
    got = leases.claim("today", 60.0)
    assert got is not None
    lease, search = got
    assert (lease.search_id, search.state) == (running["id"], "running")
    assert lease.epoch >= running["epoch"] + 2
    # the lease was lost where the database is the same, and nobody's fault where it was moved
    assert search.failures == (1 if upgraded_url.startswith("sqlite") else 0)
    unfinished = [t for t in store.trials(lease.search_id) if t.state in ("planned", "running")]
    assert len(unfinished) == 2
    for trial in unfinished:
        leases.start_trial(lease, trial.id)
        assert store.trial(trial.id).attempts == 2
    assert store.search(lease.search_id).trial_counts == {"complete": 2, "running": 2}
    got = leases.claim("today", 60.0)
    assert got is not None
    assert got[0].search_id == queued["id"]
    assert leases.claim("today", 60.0) is None


def test_the_schema_is_that_of_the_code(store: Store) -> None:
    with store.engine.connect() as connection:
        context = MigrationContext.configure(connection)
        assert compare_metadata(context, Base.metadata) == []


def of_old(url: str, before: Rows) -> Rows:
    """What every step has to leave as it is: all but the fencing tokens of running searches."""
    found = held(url, before)
    for search in found["searches"]:
        search["epoch"] = search["epoch"] if search["state"] != "running" else None
    return found


def test_every_step_keeps_what_is_stored(database_url: str, file: Path, before: Rows) -> None:
    """Each revision forwards, then back to the first one and forwards again."""
    if database_url.startswith("sqlite"):
        url = f"sqlite:///{file}"
    else:
        url = database_url
        restore(file, url)
        with migrating(url) as connection:
            downgrade_within(connection, "0001")
    expected = of_old(url, before)
    assert [len(rows) for rows in expected.values()][1:3] == [20, 105]
    revisions = known_revisions()
    scripts = ScriptDirectory(str(Path(migrate.__file__).with_name("migrations")))
    assert revisions == tuple(s.revision for s in scripts.walk_revisions())[::-1]
    assert revisions[:4] == ("0001", "0002", "0003", "0004")
    there_and_back = [*revisions[1:], *revisions[-2::-1], *revisions[1:]]
    at = revisions[0]
    for revision in there_and_back:
        with migrating(url) as connection:
            move = upgrade_within if revision > at else downgrade_within
            move(connection, revision)
        assert of_old(url, before) == expected, f"{at} → {revision}"
        at = revision
    upgrade(url)
    store = Store(url)
    with store.engine.connect() as connection:
        context = MigrationContext.configure(connection)
        assert compare_metadata(context, Base.metadata) == []
    check_consistent(store)
    store.close()


def test_the_old_program_reads_what_a_backup_of_it_holds(file: Path, tmp_path: Path) -> None:
    """A backup that is made before an upgrade has the schema of before, and all of its rows."""
    path = tmp_path / "before-upgrade.db"
    rows = stored(file)
    backup(f"sqlite:///{file}", path)
    assert stored(path) == rows == stored(file)
    old, new = sqlite3.connect(file), sqlite3.connect(path)
    columns = "SELECT m.name, c.name, c.type, c.\"notnull\", c.pk FROM sqlite_master m " \
        "JOIN pragma_table_info(m.name) c WHERE m.type = 'table' AND m.name != 'backup' " \
        "ORDER BY 1, c.cid"  # fmt: skip
    assert old.execute(columns).fetchall() == new.execute(columns).fetchall()
    old.close()
    new.close()
