from __future__ import annotations

import pytest

from tests.support.faults.databases import Database


@pytest.fixture
def database(migrated_url: str) -> Database:
    """An empty database of each kind with the schema of today."""
    return Database(migrated_url)
