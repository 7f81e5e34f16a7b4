"""Workers killed, stopped and crowded: the benchmark's scenarios at a reduced size."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.databases import DATABASES
from tests.support.faults.databases import Database
from tests.support.faults.kills import Faults, claim_once, kill_and_stop
from tests.support.tiers import FULL, only


@pytest.mark.parametrize("migrated_url", only(["postgresql"], DATABASES), indirect=True)
def test_killed_and_stopped_workers_lose_and_repeat_nothing(
    database: Database, tmp_path: Path
) -> None:
    faults = Faults(kills=15, stops=5, zombies=1, between=0.35)
    figures, broken = kill_and_stop(database, tmp_path, faults, seed=0)
    assert broken == []
    assert figures["kills"] >= 15
    assert figures["stops"] >= 5
    assert figures["accepted_stale"] == 0
    assert figures["refused_counted"] >= figures["refused_reported"] >= 1


@FULL
@pytest.mark.parametrize("migrated_url", only(["postgresql"], DATABASES), indirect=True)
def test_many_workers_at_one_queue_run_each_search_once(database: Database, tmp_path: Path) -> None:
    figures, broken = claim_once(database, tmp_path, workers=8, searches=30)
    assert broken == []
    assert figures["run_twice_in_an_epoch"] == 0
    assert figures["workers_that_claimed"] > 1
