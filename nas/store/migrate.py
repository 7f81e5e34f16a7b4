"""Schema migrations, run by Alembic from the package itself."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection

from nas.errors import StoreUnavailable
from nas.store import standings
from nas.store.engine import open_engine, translated

#: How long a process waits for another that upgrades the same SQLite file.
_PATIENCE_SECONDS = 3600


def _config(connection: Connection | None = None) -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")))
    config.attributes["connection"] = connection
    return config


def upgrade(url: str, revision: str = "head") -> None:
    """Bring the database to `revision`; safe to call again and from several processes."""
    engine = open_engine(url, busy_timeout_seconds=_PATIENCE_SECONDS, enforce_foreign_keys=False)
    try:
        # one write transaction: a second process waits here and then finds nothing to do
        with translated(), engine.execution_options(writes=True).begin() as connection:
            if connection.dialect.name == "postgresql":
                # a large database takes its time, and so does who waits for it
                connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
                connection.exec_driver_sql("SET LOCAL idle_in_transaction_session_timeout = 0")
                connection.exec_driver_sql("SELECT pg_advisory_xact_lock(7305614)")
            command.upgrade(_config(connection), revision)
            if connection.dialect.name == "sqlite":
                broken = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
                if broken:
                    raise StoreUnavailable(f"rows refer to rows that do not exist: {broken[:5]}")
            if revision == "head":
                standings.ensure(connection)
    finally:
        engine.dispose()
