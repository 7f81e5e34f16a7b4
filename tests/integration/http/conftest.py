"""One application for the tests of a file, whose routes take a while to build.

A file that asks for `client` gives `settings`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from api.app import create_app
from nas.settings import Settings
from tests.support.databases import new_sqlite


@pytest.fixture(scope="module")
def app(settings: Settings) -> FastAPI:
    return create_app(settings)


@pytest.fixture
def client(app: FastAPI, settings: Settings, tmp_path: Path) -> Iterator[TestClient]:
    """The application on an empty database of its own."""
    settings.home, settings.database_url = tmp_path, new_sqlite(tmp_path / "einsum-nas.db")
    with TestClient(app, "http://127.0.0.1", raise_server_exceptions=False) as opened:
        yield opened
