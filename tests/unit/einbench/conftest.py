from __future__ import annotations

from pathlib import Path

import pytest

from nas.einbench import EinBench
from tests.support.einbench import PART, small_table


@pytest.fixture(scope="session")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small table with invented curves."""
    return small_table(tmp_path_factory.mktemp("einbench"))


@pytest.fixture(scope="session")
def bench(table: Path) -> EinBench:
    return EinBench(PART.task, table)
