"""Backups: one SQLite file with a consistent snapshot of a database of either kind.

A backup has the schema that its source has, so that one can be made before an upgrade, and opens as
a database itself.  It is read in one transaction, while writers go on, and gets its name when it is
complete and on disk.  Restoring is one transaction too: it succeeds as a whole, or leaves the
database as empty as it was.  Text, JSON included, numbers and bytes are copied as they are stored.
"""

from __future__ import annotations

import os
import sqlite3
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from sqlalchemy import (
    JSON,
    URL,
    Column,
    Connection,
    Engine,
    Float,
    MetaData,
    NullPool,
    String,
    Table,
    create_engine,
    event,
    func,
    insert,
    inspect,
    select,
)
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from nas.errors import Conflict, InvalidInput, NotFound, StoreUnavailable
from nas.store import lifecycle, rows
from nas.store.copying import (
    check_known,
    copy_rows,
    count_rows,
    revision_of,
    said,
    shown,
    tables_of,
)
from nas.store.engine import open_engine, translated
from nas.store.migrate import (
    SCHEMA_LOCK,
    check_references,
    downgrade_within,
    lift_timeouts,
    migrating,
    upgrade_within,
)
from nas.store.schema import Base, SearchRow, database_now

#: Tables that upgrades of the schema do not fill.
_RESULTS = ("searches", "trials", "points", "events")
#: Suffixes of the files that SQLite keeps beside an open or unclosed database.
_SIDECARS = ("-wal", "-shm", "-journal")
_SQLITE_HEADER = b"SQLite format 3\0"
#: Describes the backup in its own file; without a row here the backup is incomplete.
_MANIFEST = Table(
    "backup",
    MetaData(),
    Column("revision", String(32), nullable=False),
    Column("program", String(64), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("source", String(16), nullable=False),
    Column("rows", JSON, nullable=False),
)


@dataclass(frozen=True, slots=True)
class Manifest:
    """A backup's description of itself."""

    #: of the schema of the file and of its source
    revision: str
    #: version of einsum-nas that made it
    program: str
    #: of the snapshot, by the clock of the source: seconds since 1970
    created_at: float
    #: sqlite | postgresql
    source: str
    #: table → rows
    rows: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Backup:
    """A backup that was made."""

    path: Path
    bytes: int
    manifest: Manifest


@dataclass(frozen=True, slots=True)
class Restored:
    """What a restore has written to a database."""

    #: revisions of the schema: of the file, and of the database now
    file_revision: str
    revision: str
    #: None for a file that is a plain database
    manifest: Manifest | None
    #: table → rows that were copied
    rows: Mapping[str, int]
    #: searches that a worker held at the snapshot, which nobody holds now
    released: tuple[str, ...]


# --- backup


def backup(url: str, path: Path, *, overwrite: bool = False) -> Backup:
    """Write a snapshot of the database at `url` to one file, which only its owner may read.

    The database is not upgraded.  Writers are not blocked; changes of the schema wait for the end.

    Raises
    ------
    InvalidInput
        About `file`: it exists, its folder does not, or the log of another database lies beside it.
    NotFound
        There is no database of this program at `url`.
    StoreUnavailable
        The database, or the disk of the file, is unavailable.
    """
    path = path.absolute()
    engine = open_engine(url)
    _check_place(path, engine, overwrite)
    part = _unnamed(path)
    try:
        with translated(), _snapshot(engine) as source:
            manifest = _write(source, part)
        _put_in_place(part, path)
    finally:
        engine.dispose()
        for name in ("", *_SIDECARS):
            Path(f"{part}{name}").unlink(missing_ok=True)
    return Backup(path, path.stat().st_size, manifest)


def _check_place(path: Path, engine: Engine, overwrite: bool) -> None:
    """Raise where the file cannot be written, or the source is not there."""
    if engine.dialect.name == "sqlite":
        source = Path(engine.url.database or "")
        if not source.is_file():
            raise NotFound(f"there is no database at {shown(engine)}")
        if path.exists() and path.samefile(source):
            raise InvalidInput("file", str(path), "another file than the database itself")
    if not path.parent.is_dir():
        raise InvalidInput("file", str(path), f"a file in a folder that exists; not {path.parent}")
    if path.is_dir() or (path.exists() and not overwrite):
        raise InvalidInput("file", str(path), "a file that does not exist, or --overwrite")
    for name in _SIDECARS:
        if Path(f"{path}{name}").exists():
            # SQLite would take the log of the file that had the name for that of the new one
            accepted = f"a name without an open database's files: {path.name}{name} lies beside it"
            raise InvalidInput("file", str(path), accepted)


def _unnamed(path: Path) -> Path:
    try:
        handle, name = tempfile.mkstemp(".part", f".{path.name}.", path.parent)
    except OSError as error:
        accepted = f"a folder that can be written ({error.strerror})"
        raise InvalidInput("file", str(path), accepted) from None
    os.close(handle)
    return Path(name)


def _put_in_place(part: Path, path: Path) -> None:
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def _snapshot(engine: Engine) -> Iterator[Connection]:
    """A transaction that sees one state of the database and blocks no writer."""
    if engine.dialect.name == "sqlite":
        with engine.begin() as connection:
            yield connection
        return
    with engine.execution_options(isolation_level="AUTOCOMMIT").connect() as guard:
        guard.exec_driver_sql("SET statement_timeout = 0")
        # no schema changes between the look at the tables and the hold on them
        guard.exec_driver_sql(f"SELECT pg_advisory_lock_shared({SCHEMA_LOCK})")
        tables = {*Base.metadata.tables, "alembic_version"} & {*inspect(guard).get_table_names()}
        reader = engine.execution_options(
            isolation_level="REPEATABLE READ", postgresql_readonly=True
        )
        with reader.begin() as connection:
            lift_timeouts(connection)
            if tables:  # the snapshot begins with the first statement after this one
                held = ", ".join(sorted(tables))
                connection.exec_driver_sql(f"LOCK TABLE {held} IN ACCESS SHARE MODE")
            guard.exec_driver_sql(f"SELECT pg_advisory_unlock_shared({SCHEMA_LOCK})")
            yield connection


def _write(source: Connection, part: Path) -> Manifest:
    """Copy everything that `source` sees into an empty file."""
    revision = revision_of(source)
    if revision is None:
        raise NotFound(f"{shown(source.engine)} holds no database of einsum-nas")
    check_known(revision, "database_url", shown(source.engine))
    created_at = float(source.execute(select(database_now())).scalar_one())
    file = _file_engine(part, "rw")
    try:
        with file.begin() as target:
            upgrade_within(target, revision)
            _MANIFEST.create(target)
        with file.begin() as target:
            copied = copy_rows(source, target)
            manifest = Manifest(
                revision, version("einsum-nas"), created_at, source.dialect.name, copied
            )
            names = _MANIFEST.columns.keys()
            target.execute(insert(_MANIFEST), {name: getattr(manifest, name) for name in names})
    except DBAPIError as error:  # those of the source have been told already
        raise StoreUnavailable(f"{part}: {said(error)}") from error
    finally:
        file.dispose()
    return manifest


def _file_engine(path: Path, mode: str) -> Engine:
    """An engine on one SQLite file without a log beside it, which `_put_in_place` syncs."""

    def connect() -> sqlite3.Connection:
        connection = sqlite3.connect(f"{path.as_uri()}?mode={mode}", uri=True, isolation_level=None)
        if mode == "rw":
            connection.execute("PRAGMA synchronous=OFF")
        return connection

    engine = create_engine(
        URL.create("sqlite", database=str(path)), creator=connect, poolclass=NullPool
    )
    event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
    return engine


# --- restore


def restore(path: Path, url: str) -> Restored:
    """Copy a backup, or a plain SQLite database of this program, into the empty database at `url`.

    The database gets the newest schema, whatever the file has.  Searches that a worker held at the
    time of the backup are queued again; writes of that worker are refused, and no failure is
    counted.  If the restore fails, the database stays empty.

    Raises
    ------
    InvalidInput
        About `file`: it is not of this program, or is damaged, incomplete, changed after the
        backup, or newer than this program.
    Conflict
        The database is not empty.
    StoreUnavailable
        The database is unavailable.
    """
    path = path.absolute()
    _check_header(path)
    file = _file_engine(path, "ro")
    try:
        with file.begin() as source:
            with _readable(path):
                revision, manifest = _checked(source, path)
            with migrating(url) as target:
                _make_room(target)
                upgrade_within(target, revision)
                copied = copy_rows(source, target)
                check_references(target)
                _set_sequences(target)
                upgrade_within(target)
                released = _release(target)
                now = revision_of(target) or ""
    finally:
        file.dispose()
    return Restored(revision, now, manifest, copied, released)


def _check_header(path: Path) -> None:
    """Raise unless SQLite can open the file."""
    accepted = "a file that `einsum-nas db backup` made, or a SQLite database of einsum-nas"
    try:
        with path.open("rb") as file:
            header = file.read(len(_SQLITE_HEADER))
    except OSError as error:
        raise InvalidInput("file", str(path), f"{accepted} ({error.strerror})") from None
    if header != _SQLITE_HEADER:
        raise InvalidInput("file", str(path), accepted)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn what SQLite says of a damaged file into `InvalidInput`."""
    try:
        yield
    except DBAPIError as error:
        raise InvalidInput("file", str(path), f"a file that can be read: {said(error)}") from None


def _checked(source: Connection, path: Path) -> tuple[str, Manifest | None]:
    """(revision, manifest) of a file that is whole."""
    found = source.exec_driver_sql("PRAGMA integrity_check").scalars().all()
    if found != ["ok"]:
        raise InvalidInput("file", str(path), f"a file that is not damaged: {'; '.join(found[:3])}")
    revision = revision_of(source)
    if revision is None:
        accepted = "a file that `einsum-nas db backup` made, or a SQLite database of einsum-nas"
        raise InvalidInput("file", str(path), accepted)
    check_known(revision, "file", str(path))
    try:
        check_references(source)
    except StoreUnavailable as error:
        raise InvalidInput("file", str(path), f"a file that is not damaged: {error}") from None
    if not inspect(source).has_table(_MANIFEST.name):
        return revision, None
    row = source.execute(select(_MANIFEST)).one_or_none()
    if row is None:
        raise InvalidInput("file", str(path), "a backup that was completed")
    manifest = Manifest(**row._mapping)
    # a backup that was opened may have been upgraded, which fills the other tables anew
    for name in manifest.rows if manifest.revision == revision else _RESULTS:
        counted = count_rows(source, name)
        if counted != manifest.rows[name]:
            raise InvalidInput(
                "file", str(path),
                f"an unchanged backup: table {name} had {manifest.rows[name]} rows when it was "
                f"made, and has {counted} now; drop its table {_MANIFEST.name} to restore it as "
                "it is",
            )  # fmt: skip
    return revision, manifest


def _make_room(target: Connection) -> None:
    """Raise `Conflict` unless the database holds nothing; tables without a search are dropped."""
    names = set(inspect(target).get_table_names())
    ours = set(Base.metadata.tables) | {"alembic_version"}
    if not names:
        return
    where = shown(target.engine)
    if not {"searches", "alembic_version"} <= names:
        found = ", ".join(sorted(names)[:8])
        raise Conflict(f"{where} is not empty: it holds the tables {found}; name an empty database")
    held = {name: count_rows(target, name) for name in ("searches", "trials") if name in names}
    if held["searches"]:
        raise Conflict(
            f"{where} is not empty: it holds {held['searches']:,} searches with "
            f"{held.get('trials', 0):,} trials; name an empty database"
        )
    if names - ours:
        found = ", ".join(sorted(names - ours)[:8])
        raise Conflict(f"{where} is not empty: it holds the tables {found}; name an empty database")
    check_known(revision_of(target) or "", "database_url", where)
    # made by a service that was started before the restore
    downgrade_within(target, "base")


def _set_sequences(target: Connection) -> None:
    """Set PostgreSQL's sequences past the ids of the copied rows."""
    if target.dialect.name != "postgresql":
        return
    for table in tables_of(target):
        for column in table.primary_key.columns:
            name = target.scalar(select(func.pg_get_serial_sequence(table.name, column.name)))
            last = target.scalar(select(func.max(column))) if name is not None else None
            if last is not None:
                target.execute(select(func.setval(name, last)))


def _release(target: Connection) -> tuple[str, ...]:
    """Take every running search from its worker at the time of the backup; return their ids."""
    released: list[str] = []
    running = select(SearchRow).where(SearchRow.state == "running").order_by(SearchRow.sequence)
    with Session(target) as session:
        for row in session.scalars(running).all():
            data = {"worker": row.worker, "epoch": row.epoch + 1}
            row.epoch += 1
            rows.add_event(session, row.id, "restored", data)
            lifecycle.take_back(session, row)
            released.append(row.id)
        session.flush()
    return tuple(released)
