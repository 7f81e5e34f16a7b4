"""Engines and transactions for SQLite and PostgreSQL."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, func, select
from sqlalchemy.engine import URL, ExceptionContext, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, DisconnectionError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session
from tenacity import retry, retry_if_exception, stop_after_delay, wait_random_exponential

from nas.errors import InvalidInput, one_line
from nas.store.troubles import DatabaseTrouble, is_busy, trouble_of

#: What a database's address may be.
ACCEPTED = "sqlite:///path/to/file.db or postgresql://user:password@host/database"
#: Rows of one INSERT or DELETE, and values of one IN: within the limits of every database, and few
#: enough that other writers do not wait long.
AT_ONCE = 500
SECONDS_PER_DAY = 86_400.0
_BUSY_TIMEOUT_SECONDS = 30
_STATEMENT_TIMEOUT_MS = 30_000
#: Limit of an idle transaction; transactions take milliseconds.  One whose client was disconnected
#: locks its search's row until then, and no other worker can claim that search.
_IDLE_TIMEOUT_MS = 8_000
#: Options of a connection to PostgreSQL unless its URL has others.  TCP keep-alive: a connection
#: whose other end is gone is closed after about half a minute.
_CONNECTING = {
    "connect_timeout": 10,  # seconds
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
    parsed = parse(url)
    if parsed.get_backend_name() == "postgresql":
        engine = create_engine(
            parsed.set(drivername="postgresql+psycopg"),
            pool_pre_ping=True,
            connect_args=connect_arguments(
                parsed,
                statement_timeout=_STATEMENT_TIMEOUT_MS,
                idle_in_transaction_session_timeout=_IDLE_TIMEOUT_MS,
            ),
        )
        # before SQLAlchemy asks the server anything, which fails where answers are bytes
        event.listen(engine, "connect", _refuse_encoding, insert=True)
        return engine
    engine = create_engine(parsed, connect_args={"timeout": busy_timeout_seconds})
    file = parsed.database
    if file and not file.startswith("file:"):
        _keep_to_file(engine, Path(file))
    event.listen(engine, "connect", _configure_sqlite)
    if not enforce_foreign_keys:
        event.listen(engine, "connect", _ignore_foreign_keys)
    event.listen(engine, "begin", _begin_sqlite)
    event.listen(engine, "handle_error", _drop_unusable)
    return engine


def sqlite_file(url: str) -> Path | None:
    """The file of a SQLite URL; None for another kind of database."""
    parsed = parse(url)
    is_file = parsed.get_backend_name() == "sqlite"
    return Path(str(parsed.database)) if is_file else None


def parse(url: str, field: str = "database_url") -> URL:
    """The parts of a database's URL.

    Raises
    ------
    InvalidInput
        About `field`: no URL, another kind of database than SQLite and PostgreSQL, or options that
        would be ignored.  The message repeats neither a password nor what may be a part of one.
    """
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise InvalidInput(field, "a text that is no URL", ACCEPTED) from None
    if "@" in (parsed.host or ""):
        # the host would begin within the password, and be told in every error
        accepted = f"{ACCEPTED}, with %40 for each @ of the user's name and password"
        raise InvalidInput(field, "a URL with more than one @", accepted)
    shown = shown_url(parsed)
    backend = parsed.get_backend_name()
    if backend == "postgresql":
        # which takes long to import, and only such a database needs it
        from psycopg import ProgrammingError
        from psycopg.conninfo import make_conninfo

        try:
            make_conninfo("", **{name: str(value) for name, value in parsed.query.items()})
        except ProgrammingError as error:
            accepted = f"options that PostgreSQL knows: {one_line(error)}"
            raise InvalidInput(field, shown, accepted) from None
        return parsed
    if backend != "sqlite" or parsed.host or parsed.database in (None, "", ":memory:"):
        raise InvalidInput(field, shown, ACCEPTED)
    if parsed.query and "uri" not in parsed.query:
        # the driver would ignore them; or the name of the file has a question mark
        accepted = "sqlite:///path/to/file.db without options, and %3F for a ? in its path"
        raise InvalidInput(field, f"{shown}?{'&'.join(parsed.query)}", accepted)
    return parsed


def shown_url(url: URL) -> str:
    """A database's URL without its password, and without options, of which one may be another."""
    return url.set(query={}).render_as_string(hide_password=True)


def connect_arguments(url: URL, **own: Any) -> dict[str, Any]:
    """What the driver gets besides a PostgreSQL URL, whose own options it does not replace.

    Parameters
    ----------
    own
        PostgreSQL settings of the session, such as `statement_timeout`.
    """
    found = {name: value for name, value in _CONNECTING.items() if name not in url.query}
    if "PGCONNECT_TIMEOUT" in os.environ:
        found.pop("connect_timeout", None)
    given = url.query.get("options", os.environ.get("PGOPTIONS", ""))
    # of two that set the same, PostgreSQL takes the later
    options = [f"-c {name}={value}" for name, value in own.items()]
    options += [given] if isinstance(given, str) else given
    return {**found, "options": " ".join(options).strip(), "client_encoding": "utf8"}


def _refuse_encoding(connection: Any, _record: Any) -> None:
    """Raise `InvalidInput` unless the database can hold every text, and tells texts from bytes."""
    found = connection.info.parameter_status("server_encoding")
    if found in (None, "UTF8"):  # not every pool between us and the server tells
        return
    name = connection.info.dbname
    connection.close()
    accepted = (
        "one in UTF8: CREATE DATABASE name ENCODING 'UTF8' TEMPLATE template0; pg_dump and "
        "pg_restore move what this one holds"
    )
    raise InvalidInput("database_url", f"database {name}, whose encoding is {found}", accepted)


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


def inserting(session: Session, table: type[Any]) -> Any:
    """An INSERT with `on_conflict_do_nothing` and `on_conflict_do_update`."""
    # one of the two is there already, and the other takes long to import
    if session.get_bind().dialect.name == "postgresql":
        from sqlalchemy.dialects import postgresql

        return postgresql.insert(table)
    from sqlalchemy.dialects import sqlite

    return sqlite.insert(table)


def one_at_a_time(session: Session, *key: Any) -> None:
    """Lock out, until the transaction ends, other transactions that ask with the same key.

    Needed where concurrent transactions would not count each other's rows.  SQLite has one writer
    anyway.
    """
    if session.get_bind().dialect.name == "postgresql":
        session.execute(select(func.pg_advisory_xact_lock(*key)))


def pieces(values: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """The values in parts of at most `AT_ONCE`."""
    return (values[i : i + AT_ONCE] for i in range(0, len(values), AT_ONCE))
