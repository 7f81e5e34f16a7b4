"""The checker of the fault tests finds what was broken on purpose."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.faults.checker import Expected, audit
from tests.support.faults.databases import Database, new_sqlite
from tests.support.faults.fleet import Fleet
from tests.support.faults.kills import POINTS, Queue, acknowledged
from tests.support.faults.worker import WorkerPlan, read_reports, read_tag, tag

_EXPECTED = Expected(points=POINTS)
_LIKE_THE_FIRST = "INSERT INTO events (search_id, created_at, kind, data) SELECT id, 0"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a database whose one search was finished by the second of two workers."""
    folder = tmp_path_factory.mktemp("sound")
    database = new_sqlite(folder, "sound")
    queue = Queue(database, folder)
    queue.add(trials=2)
    plan = WorkerPlan(database.url, folder, 1.0, POINTS, pause=0.01)

    def half_way() -> bool:
        return sum(1 for line in read_reports(folder) if line["kind"] == "complete") >= 2

    with Fleet([plan]) as fleet:
        assert fleet.wait(half_way, 60)
        assert fleet.kill(0)
        assert fleet.wait(lambda: not queue.unfinished, 60)
    queue.store.close()
    database.execute("DROP TRIGGER events_append_only")
    return folder


@pytest.fixture
def copy(sound: Path, tmp_path: Path) -> Database:
    for path in sound.glob("sound.db*"):
        shutil.copy(path, tmp_path / path.name)
    return Database(f"sqlite:///{tmp_path / 'sound.db'}")


def test_nothing_is_found_where_nothing_is_wrong(sound: Path, copy: Database) -> None:
    kept = acknowledged(sound)
    found = audit(copy, _EXPECTED, kept)
    assert found.violations == []
    assert (found.searches, found.trials, found.points) == (1, 5, 5 * POINTS)
    assert (found.lease_lost, found.stale_accepted) == (1, 0)
    assert {line["epoch"] for line in kept} == {1, 2}


def _events(database: Database, kind: str) -> list[dict[str, Any]]:
    rows = database.rows(f"SELECT * FROM events WHERE kind = '{kind}' ORDER BY id")
    return [{**row, "data": json.loads(row["data"])} for row in rows]


def _stale_event(database: Database, kind: str) -> None:
    """Make the last event of a kind one that the first worker wrote."""
    last = _events(database, kind)[-1]
    _, attempt, ordinal = read_tag(last["data"]["loss"])
    data = json.dumps({**last["data"], "loss": tag(1, attempt, ordinal)})
    database.execute(f"UPDATE events SET data = '{data}' WHERE id = {last['id']}")


def _stale_row(database: Database) -> None:
    last = database.rows("SELECT * FROM points ORDER BY trial_id DESC, step LIMIT 1")[0]
    _, attempt, ordinal = read_tag(last["loss"])
    where = f"trial_id = {last['trial_id']} AND step = {last['step']}"
    database.execute(f"UPDATE points SET loss = {tag(1, attempt, ordinal)} WHERE {where}")


def _sql(*statements: str) -> Callable[[Database], None]:
    return lambda database: database.execute(*statements)


@pytest.mark.parametrize(
    ("tamper", "complaint"),
    [
        (lambda d: _stale_event(d, "point"), "point of epoch 1 accepted in epoch 2"),
        (lambda d: _stale_event(d, "trial_complete"), "complete of epoch 1 accepted in epoch 2"),
        (_stale_row, "points of (epoch, attempt) [(1, "),
        (_sql("UPDATE trials SET epoch = 1"), "points of (epoch, attempt) [(2, "),
        (_sql(f"{_LIKE_THE_FIRST}, 'trial_complete', '{{\"number\": 3}}' FROM searches"),
         "completed 2 times"),
        (_sql(f"{_LIKE_THE_FIRST}, 'trial_planned', '{{\"number\": 3}}' FROM searches"),
         "accepted while nobody held the search"),
        (_sql(f"{_LIKE_THE_FIRST}, 'claimed', '{{\"epoch\": 3}}' FROM searches"),
         "epoch 3 claimed while succeeded"),
        (_sql("DELETE FROM events WHERE kind = 'lease_lost'"), "claimed while held by epoch 1"),
        (_sql("DELETE FROM events WHERE id = (SELECT max(id) FROM events WHERE kind = 'point')"),
         "after (2, "),
        (_sql(f"{_LIKE_THE_FIRST}, 'cancelled', '{{}}' FROM searches"),
         "cancelled after succeeded"),
        (_sql("UPDATE searches SET state = 'cancelled'"), "its log says succeeded"),
        (_sql("UPDATE searches SET epoch = 7"), "the last claimed is 2"),
        (_sql("UPDATE searches SET stale_writes = stale_writes + 1"), "stale writes counted"),
        (_sql("UPDATE trials SET state = 'running' WHERE number = 1"), "unfinished trials"),
        (_sql("UPDATE searches SET tally = '{\"complete\": 4, \"references\": 3}'"),
         "its trials are"),
        (_sql("UPDATE trials SET number = 9 WHERE number = 3"),
         "trials are numbered [0, 1, 2, 4, 9]"),
        (_sql("UPDATE trials SET attempts = attempts + 1 WHERE number = 0"), "attempts, log"),
        (_sql("DELETE FROM points WHERE trial_id = 2 AND step = (SELECT min(step) FROM points "
              "WHERE trial_id = 2)"), "points [1, 2, 3, 4, 5]"),
        (_sql("UPDATE trials SET loss = loss + 1"), "its last point is not its result"),
        (_sql("DELETE FROM points WHERE trial_id = 3", "DELETE FROM trials WHERE id = 3"),
         "4 of 5 trials complete"),
    ],
)  # fmt: skip
def test_what_was_tampered_with_is_found(
    copy: Database, tamper: Callable[[Database], None], complaint: str
) -> None:
    tamper(copy)
    violations = audit(copy, _EXPECTED).violations
    assert any(complaint in violation for violation in violations), violations


def test_a_lost_completion_is_found(sound: Path, copy: Database) -> None:
    first, *_ = acknowledged(sound)
    (violation,) = audit(copy, _EXPECTED, [{**first, "epoch": 5}]).violations
    assert "completion lost" in violation
