"""Engines and transactions for SQLite and PostgreSQL."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import ExceptionContext, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, DisconnectionError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session
from tenacity import retry, retry_if_exception, stop_after_delay, wait_random_exponential

from nas.errors import InvalidInput
from nas.store.troubles import DatabaseTrouble, is_busy, trouble_of

_ACCEPTED = "sqlite:///path/to/file.db or postgresql+psycopg://user:password@host/database"
_BUSY_TIMEOUT_SECONDS = 30
_STATEMENT_TIMEOUT_MS = 30_000
#: Limit of an idle transaction; transactions take milliseconds.  One whose client was disconnected
#: locks its search's row until then, and no other worker can claim that search.
_IDLE_TIMEOUT_MS = 8_000
#: TCP keep-alive: a connection whose other end is gone is closed after about half a minute.
_KEEPALIVE = {
    "keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3,
    "tcp_user_timeout": 30_000,  # milliseconds
}  # fmt: skip


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
            f"-c idle_in_transaction_session_timeout={_IDLE_TIMEOUT_MS}"
        )
        return create_engine(
            parsed.set(drivername="postgresql+psycopg"),
            pool_pre_ping=True,
            connect_args={"connect_timeout": 10, "options": options, **_KEEPALIVE},
        )
    if backend != "sqlite":
        raise InvalidInput("database_url", parsed.render_as_string(), _ACCEPTED)
    engine = create_engine(parsed, connect_args={"timeout": busy_timeout_seconds})
    file = parsed.database
    if file and file != ":memory:" and not file.startswith("file:"):
        _keep_to_file(engine, Path(file))
    event.listen(engine, "connect", _configure_sqlite)
    if not enforce_foreign_keys:
        event.listen(engine, "connect", _ignore_foreign_keys)
    event.listen(engine, "begin", _begin_sqlite)
    event.listen(engine, "handle_error", _drop_unusable)
    return engine


def _keep_to_file(engine: Engine, path: Path) -> None:
    """Detect that the database's file was removed or replaced.

    Otherwise an open connection would go on writing to the removed file, and a new connection would
    create an empty one.
    """
    found: set[bool] = set()

    def identity() -> tuple[int, int]:
        try:
            status = path.stat()
        except OSError as error:
            gone = sqlite3.OperationalError(f"the file of the database: {error.strerror}")
            gone.sqlite_errorcode = sqlite3.SQLITE_CANTOPEN
            raise gone from None
        return status.st_dev, status.st_ino

    def before(*_: Any) -> None:
        if found:
            identity()

    def after(_connection: Any, record: Any) -> None:
        record.info["file"] = identity()
        found.add(True)

    def lent(_connection: Any, record: Any, _proxy: Any) -> None:
        try:
            same = record.info.get("file") == identity()
        except sqlite3.OperationalError as error:
            raise DisconnectionError(str(error)) from None
        if not same:
            raise DisconnectionError("the file of the database was replaced")

    event.listen(engine, "do_connect", before)
    event.listen(engine, "connect", after)
    event.listen(engine, "checkout", lent)


def _configure_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # the driver's own BEGIN takes the write lock too late
    cursor = connection.cursor()
    for pragma in ("synchronous=FULL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    _write_ahead(cursor)
    cursor.close()


def _drop_unusable(context: ExceptionContext) -> None:
    """Close all connections to SQLite's file after errors from which a connection never recovers.

    For example, a connection that was opened while the file was read-only can never write, and nor
    can any opened beside it: SQLite shares the log's index between a process's connections.
    """
    kind = trouble_of(context.original_exception)
    if kind in ("away", "read_only", "damaged", "failing"):
        context.is_disconnect = True
        # a cursor that its error keeps alive would keep the file open
        if context.execution_context is not None and context.execution_context.cursor is not None:
            context.execution_context.cursor.close()
        if context.engine is not None:
            context.engine.dispose()


def _ignore_foreign_keys(connection: Any, _record: Any) -> None:
    connection.execute("PRAGMA foreign_keys=OFF")


# turning the log on while another connection writes fails at once, whatever the busy timeout
@retry(
    retry=retry_if_exception(is_busy),
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
    """Raise `StoreUnavailable` for a database that is unreachable, locked, full or read-only.

    Programming and integrity errors are not translated.
    """
    try:
        yield
    except DBAPIError as error:
        kind = trouble_of(error.orig, lost=error.connection_invalidated)
        if kind is None:
            raise
        raise DatabaseTrouble(kind, str(error.orig)) from error
    except PoolTimeout as error:
        raise DatabaseTrouble("exhausted", str(error)) from error


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
