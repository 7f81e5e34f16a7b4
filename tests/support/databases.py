"""Empty databases, those of the current schema copied from one that was migrated once."""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import psycopg

from nas.store import upgrade

DATABASES = ("sqlite", "postgresql")


@lru_cache(maxsize=1)
def _template() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "empty.db"
        upgrade(f"sqlite:///{path}")
        return path.read_bytes()


def new_sqlite(path: Path) -> str:
    """URL of a new, empty SQLite database of the current schema at `path`."""
    path.write_bytes(_template())
    return f"sqlite:///{path}"


def on_server(url: str) -> psycopg.Connection[Any]:
    """A connection in which every statement is a transaction."""
    return psycopg.connect(url, autocommit=True)


@contextmanager
def new_postgresql(server: str, template: str = "template1") -> Iterator[str]:
    """URL of a new database of the server, a copy of `template`, which goes with the block."""
    name = f"t{uuid.uuid4().hex}"
    with on_server(server) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
    yield server.replace("/postgres?", f"/{name}?")
    with on_server(server) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
