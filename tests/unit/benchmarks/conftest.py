from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.search.experiment import World, world
from tests.support.einbench import PART, small_table


@pytest.fixture(scope="session")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small table with invented curves."""
    return small_table(tmp_path_factory.mktemp("search"))


@pytest.fixture(scope="session")
def small(tables: Path) -> World:
    return world(PART.task, tables)
