"""The store on both databases."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nas.store import Store, upgrade


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    """An empty store of each kind."""
    upgrade(database_url)
    opened = Store(database_url)
    yield opened
    opened.close()
