from __future__ import annotations

import pytest

from nas.store import upgrade
from tests.support.faults.databases import Database


@pytest.fixture
def database(database_url: str) -> Database:
    """An empty database of each kind with the schema of today."""
    upgrade(database_url)
    return Database(database_url)
