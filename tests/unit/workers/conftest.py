"""A store that the tests of a module share, each as a tenant of its own."""

from __future__ import annotations

from collections.abc import Iterator
from zlib import crc32

import pytest

from nas.store import Store, upgrade


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    url = f"sqlite:///{tmp_path_factory.mktemp('workers') / 's.db'}"
    upgrade(url)
    opened = Store(url)
    yield opened
    opened.close()


@pytest.fixture
def store(database: Store, request: pytest.FixtureRequest) -> Store:
    """A view of a tenant of the test's own: nothing is shared with other tests."""
    return database.view(f"t{crc32(request.node.nodeid.encode())}")
