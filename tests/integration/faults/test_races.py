"""Opposite wishes for one search at the same moment."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.databases import DATABASES
from tests.support.faults.databases import Database
from tests.support.faults.races import RACES, race
from tests.support.tiers import only


@pytest.mark.parametrize("migrated_url", only(["postgresql"], DATABASES), indirect=True)
def test_races_end_each_search_once_and_as_one_thing(database: Database, tmp_path: Path) -> None:
    figures, broken = race(database, tmp_path, rounds=10, seed=0)
    assert broken == []
    assert figures["searches"] == 10 * len(RACES)
