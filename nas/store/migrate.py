"""Schema migrations, run by Alembic from the package itself.

Alembic is imported only where a schema changes: it takes long, and most processes find theirs
current.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Connection, column, inspect, select, table

from nas.errors import StoreUnavailable
from nas.store import standings
from nas.store.engine import open_engine, translated

if TYPE_CHECKING:
    from alembic.config import Config

_MIGRATIONS = Path(__file__).with_name("migrations")
#: Where Alembic keeps the revision.
_VERSION = table("alembic_version", column("version_num"))
#: PostgreSQL's advisory lock of the process that changes the schema.
SCHEMA_LOCK = 7305614
#: How long a process waits for another that upgrades the same SQLite file.
_PATIENCE_SECONDS = 3600


def _config(connection: Connection | None = None) -> Config:
    from alembic.config import Config

    config = Config()
    folder = str(_MIGRATIONS).replace("%", "%%")  # it interpolates
    config.set_main_option("script_location", folder)
    config.attributes["connection"] = connection
    return config


@cache
def known_revisions() -> tuple[str, ...]:
    """Every revision of the schema that this program can read, the first one first.

    The names of their files begin with them, in that order.
    """
    files = (_MIGRATIONS / "versions").glob("[0-9]*_*.py")
    return tuple(sorted(file.name.partition("_")[0] for file in files))


def stored_revision(connection: Connection) -> str | None:
    """The revision of a database's schema; None for a database without one."""
    if not inspect(connection).has_table(_VERSION.name):
        return None
    found: str | None = connection.scalar(select(_VERSION.c.version_num))
    return found


def upgrade(url: str, revision: str = "head") -> None:
    """Upgrade the database to `revision`; safe to call again and from several processes.

    A database that has this revision is only read, so that a starting process waits for no lock.
    """
    if revision == "head" and _is_current(url):
        return
    with migrating(url) as connection:
        upgrade_within(connection, revision)


def _is_current(url: str) -> bool:
    engine = open_engine(url)
    try:
        with translated(), engine.connect() as connection:
            is_newest = stored_revision(connection) == known_revisions()[-1]
            return is_newest and standings.are_current(connection)
    finally:
        engine.dispose()


@contextmanager
def migrating(url: str) -> Iterator[Connection]:
    """A write transaction in which the schema may change, one at a time and of any length."""
    engine = open_engine(url, busy_timeout_seconds=_PATIENCE_SECONDS, enforce_foreign_keys=False)
    try:
        # one write transaction: a second process waits here and then finds nothing to do
        with translated(), engine.execution_options(writes=True).begin() as connection:
            if connection.dialect.name == "postgresql":
                # the upgrade of a large database takes long, and so does waiting for it
                lift_timeouts(connection)
                connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({SCHEMA_LOCK})")
            yield connection
    finally:
        engine.dispose()


def lift_timeouts(connection: Connection) -> None:
    """Let statements and pauses of the current PostgreSQL transaction take any time."""
    connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
    connection.exec_driver_sql("SET LOCAL idle_in_transaction_session_timeout = 0")


def upgrade_within(connection: Connection, revision: str = "head") -> None:
    """Bring the database to `revision` in the caller's transaction.

    Raises
    ------
    StoreUnavailable
        SQLite holds rows that refer to rows that do not exist.
    """
    from alembic import command

    command.upgrade(_config(connection), revision)
    check_references(connection)
    if revision == "head":
        standings.ensure(connection)


def check_references(connection: Connection) -> None:
    """Raise `StoreUnavailable` where a row of SQLite refers to one that does not exist.

    PostgreSQL refuses such rows as they come.
    """
    if connection.dialect.name != "sqlite":
        return
    broken = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
    if broken:
        raise StoreUnavailable(f"rows refer to rows that do not exist: {broken[:5]}")


def downgrade_within(connection: Connection, revision: str) -> None:
    """Take the schema back to `revision`, or to `base`, in the caller's transaction.

    What only newer revisions hold is lost.  Foreign keys must not be enforced; see
    `nas.store.engine.open_engine`.
    """
    from alembic import command

    command.downgrade(_config(connection), revision)
    check_references(connection)
