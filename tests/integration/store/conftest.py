"""The store on both databases."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nas.store import Store


@pytest.fixture
def store(migrated_url: str) -> Iterator[Store]:
    """An empty store of each kind."""
    opened = Store(migrated_url)
    yield opened
    opened.close()
