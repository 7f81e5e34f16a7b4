"""A key makes one search, whatever becomes of the service and however many ask at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.databases import DATABASES
from tests.support.faults.databases import Database
from tests.support.faults.service import die_after_commit, post_at_once
from tests.support.tiers import only


@pytest.fixture
def database(migrated_url: str) -> Database:
    return Database(migrated_url)


@pytest.mark.parametrize("migrated_url", only(["postgresql"], DATABASES), indirect=True)
def test_a_search_that_was_never_answered_is_answered_to_the_same_key(
    database: Database, tmp_path: Path
) -> None:
    figures, broken = die_after_commit(database, tmp_path, rounds=1)
    assert broken == []
    assert figures == {"deaths": 1, "unanswered": 1, "same_search": 1}


@pytest.mark.parametrize("migrated_url", only(["postgresql"], DATABASES), indirect=True)
def test_many_posts_of_one_key_make_one_search_and_another_body_is_refused(
    database: Database, tmp_path: Path
) -> None:
    figures, broken = post_at_once(database, tmp_path, posts=50)
    assert broken == []
    assert figures["searches"] == 1
    assert figures["status_of_another_body"] == 422
