"""Engines and transactions for SQLite and PostgreSQL."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, InterfaceError, OperationalError
from sqlalchemy.orm import Session
from tenacity import retry, retry_if_exception_type, stop_after_delay, wait_random_exponential

from nas.errors import InvalidInput, StoreUnavailable

_ACCEPTED = "sqlite:///path/to/file.db or postgresql+psycopg://user:password@host/database"
_BUSY_TIMEOUT_SECONDS = 30
_STATEMENT_TIMEOUT_MS = 30_000


def open_engine(
    url: str,
    *,
    busy_timeout_seconds: float = _BUSY_TIMEOUT_SECONDS,
    enforce_foreign_keys: bool = True,
) -> Engine:
    """An engine with the settings that leases rely on.

    SQLite: WAL, `synchronous=FULL`, foreign keys, busy timeout, and write transactions that take
    their lock at BEGIN.  PostgreSQL: psycopg, and limits on statements and idle transactions.

    Parameters
    ----------
    enforce_foreign_keys
        False for SQLite's way of changing a table, which is to make it anew and drop the old one:
        that must not take along what refers to it.
    """
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise InvalidInput("database_url", "a text that is no URL", _ACCEPTED) from None
    backend = parsed.get_backend_name()
    if backend == "postgresql":
        options = (
            f"-c statement_timeout={_STATEMENT_TIMEOUT_MS} "
            f"-c idle_in_transaction_session_timeout={_STATEMENT_TIMEOUT_MS}"
        )
        return create_engine(
            parsed.set(drivername="postgresql+psycopg"),
            pool_pre_ping=True,
            connect_args={"connect_timeout": 10, "options": options},
        )
    if backend != "sqlite":
        raise InvalidInput("database_url", parsed.render_as_string(), _ACCEPTED)
    engine = create_engine(parsed, connect_args={"timeout": busy_timeout_seconds})
    event.listen(engine, "connect", _configure_sqlite)
    if not enforce_foreign_keys:
        event.listen(engine, "connect", _ignore_foreign_keys)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _configure_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # the driver's own BEGIN is deferred; ours is not
    cursor = connection.cursor()
    for pragma in ("synchronous=FULL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    _write_ahead(cursor)
    cursor.close()


def _ignore_foreign_keys(connection: Any, _record: Any) -> None:
    connection.execute("PRAGMA foreign_keys=OFF")


# turning the log on while another connection writes fails at once, whatever the busy timeout
@retry(
    retry=retry_if_exception_type(sqlite3.OperationalError),
    wait=wait_random_exponential(multiplier=0.01, max=0.5),
    stop=stop_after_delay(_BUSY_TIMEOUT_SECONDS),
    reraise=True,
)
def _write_ahead(cursor: sqlite3.Cursor) -> None:
    if cursor.execute("PRAGMA journal_mode").fetchone() != ("wal",):
        cursor.execute("PRAGMA journal_mode=WAL")


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


@contextmanager
def translated() -> Iterator[None]:
    """Turn a database that is away, locked, full or read-only into `StoreUnavailable`."""
    try:
        yield
    except (OperationalError, InterfaceError) as error:
        raise StoreUnavailable(f"the database is unavailable: {error.orig}") from error


@contextmanager
def writing(engine: Engine) -> Iterator[Session]:
    """A session in a write transaction, committed at the end and rolled back on an error."""
    writer = engine.execution_options(writes=True)
    with translated(), Session(writer, expire_on_commit=False) as session, session.begin():
        yield session


@contextmanager
def reading(engine: Engine) -> Iterator[Session]:
    """A session for reads that see one state of the database."""
    with translated(), Session(engine, expire_on_commit=False) as session, session.begin():
        yield session
