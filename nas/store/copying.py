"""Copying every row of one database into the empty tables of another, of either kind."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from sqlalchemy import (
    JSON,
    Connection,
    Engine,
    MetaData,
    Table,
    Text,
    cast,
    event,
    func,
    insert,
    inspect,
    select,
    table,
)
from sqlalchemy.exc import (
    DataError,
    DBAPIError,
    IntegrityError,
    OperationalError,
    ProgrammingError,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeDecorator

from nas.errors import EinsumNasError, InvalidInput, StoreUnavailable, one_line
from nas.store.engine import shown_url, translated
from nas.store.migrate import known_revisions, stored_revision
from nas.store.schema import Base

#: Rows that are in memory at once.
_BATCH = 500
#: Alembic's own, and those that tell of processes which are alive now.
_LEFT_OUT = ("alembic_version", "processes")


class _as_json(FunctionElement[str]):
    """Text that goes into a JSON column."""

    type = Text()
    inherit_cache = True


@compiles(_as_json)
def _text_as_json(element: _as_json, compiler: Any, **kw: Any) -> str:
    return str(compiler.process(element.clauses, **kw))


@compiles(_as_json, "postgresql")
def _postgresql_text_as_json(element: _as_json, compiler: Any, **kw: Any) -> str:
    return f"CAST({compiler.process(element.clauses, **kw)} AS JSON)"


class _StoredJson(TypeDecorator[str]):
    """JSON as its stored text, so that it is copied without being parsed and written again."""

    impl = Text
    cache_ok = True

    def column_expression(self, column: Any) -> Any:
        return cast(column, Text)

    def bind_expression(self, bindparam: Any) -> Any:
        return _as_json(bindparam)


def _keep_json(_inspector: Any, _table: Any, column: Any) -> None:
    if isinstance(column["type"], JSON):
        column["type"] = _StoredJson()


def tables_of(connection: Connection) -> list[Table]:
    """The tables of a database that a backup holds, each after those that it refers to."""
    wanted = {t.name for t in Base.metadata.sorted_tables} - set(_LEFT_OUT)
    metadata = MetaData()
    event.listen(metadata, "column_reflect", _keep_json)
    there = wanted & set(inspect(connection).get_table_names())
    metadata.reflect(connection, only=sorted(there))
    return list(metadata.sorted_tables)


def copy_rows(source: Connection, target: Connection) -> dict[str, int]:
    """Copy every row into the empty tables of the same revision; table → rows.

    Raises
    ------
    EinsumNasError
        A table is not as its revision makes it, or a row does not fit.
    StoreUnavailable
        The target cannot be written, for example because its disk is full.
    """
    origins = {origin.name: origin for origin in tables_of(source)}
    copied: dict[str, int] = {}
    for into in tables_of(target):
        origin = origins.get(into.name)
        if origin is None or set(origin.columns.keys()) != set(into.columns.keys()):
            raise EinsumNasError(
                f"table {into.name} of {shown(source.engine)} differs from revision "
                f"{revision_of(source)} of the schema"
            )
        query = select(*(origin.columns[column.name] for column in into.columns))
        read = 0
        with translated():  # of the source; `_insert` tells of the target
            result = source.execute(query.execution_options(yield_per=_BATCH))
            for part in result.partitions():
                _insert(target, into, [dict(row._mapping) for row in part])
                read += len(part)
        copied[into.name] = count_rows(target, into.name)
        if copied[into.name] != read:
            raise EinsumNasError(f"table {into.name}: {copied[into.name]} of {read} rows copied")
    return copied


def _insert(target: Connection, into: Table, part: list[dict[str, Any]]) -> None:
    try:
        target.execute(insert(into), part)
    except (DataError, IntegrityError, ProgrammingError) as error:
        # SQLite takes texts of any length and characters that PostgreSQL has no room for
        raise EinsumNasError(
            f"table {into.name}: a row does not fit into {shown(target.engine)}: {said(error)}"
        ) from None
    except OperationalError as error:
        raise StoreUnavailable(f"{shown(target.engine)}: {said(error)}") from error


def said(error: DBAPIError) -> str:
    """A driver's error message, in one line."""
    return one_line(error.orig)


def count_rows(connection: Connection, name: str) -> int:
    """Rows of a table."""
    return int(connection.execute(select(func.count()).select_from(table(name))).scalar_one())


def revision_of(connection: Connection) -> str | None:
    """The revision of a database's schema; None if it is not a database of this program."""
    if not {"alembic_version", "searches"} <= set(inspect(connection).get_table_names()):
        return None
    return stored_revision(connection)


def check_known(revision: str, field: str, where: str) -> None:
    """Raise `InvalidInput` about `field` for a schema that this program does not know."""
    known = known_revisions()
    if revision not in known:
        raise InvalidInput(
            field, where,
            f"a schema of this program, {known[0]} to {known[-1]}; this one is {revision!r}, of a "
            f"newer einsum-nas than {version('einsum-nas')}: upgrade the program",
        )  # fmt: skip


def shown(engine: Engine) -> str:
    """Where a database is, without its password and options."""
    if engine.dialect.name == "sqlite":
        return str(engine.url.database or "the file")
    return shown_url(engine.url)
