"""The table of workers and services that use the store, as they last reported themselves."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal, get_args

from sqlalchemy import delete, select

from nas.errors import InvalidInput
from nas.store.engine import inserting, reading, writing
from nas.store.schema import ProcessRow, database_now
from nas.store.searches import Store

ProcessKind = Literal["worker", "api", "doctor"]
ProcessState = Literal["idle", "busy", "waiting", "draining"]
#: Seconds without a report after which a process counts as gone; it reports three times as often.
LIVE_SECONDS = 45.0
WORD_SECONDS = LIVE_SECONDS / 3


@dataclass(frozen=True, slots=True)
class Process:
    """A worker or a service; times are seconds since 1970 by the database's clock."""

    name: str
    kind: ProcessKind
    host: str
    pid: int
    #: of einsum-nas
    version: str
    started_at: float
    seen_at: float
    state: ProcessState
    #: search that it runs
    search_id: str | None
    about: Mapping[str, Any]


class Processes:
    """The table of processes; each process that reports itself has one object of this class."""

    def __init__(self, store: Store) -> None:
        self._engine = store.engine
        self._entered: set[str] = set()

    def seen(
        self,
        name: str,
        kind: ProcessKind,
        state: ProcessState,
        *,
        search_id: str | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        """Insert or renew the entry of this process, in a committed transaction.

        Parameters
        ----------
        about
            Further details, which have to be JSON.

        Raises
        ------
        InvalidInput
            An unknown kind or state.
        StoreUnavailable
            The database did not accept the write.
        """
        for field, given, known in (
            ("kind", kind, get_args(ProcessKind)), ("state", state, get_args(ProcessState)),
        ):  # fmt: skip
            if given not in known:
                raise InvalidInput(field, given, " | ".join(known))
        told = {
            "kind": kind, "host": socket.gethostname(), "pid": os.getpid(),
            "version": version("einsum-nas"), "seen_at": database_now(), "state": state,
            "search_id": search_id, "about": dict(about or {}),
        }  # fmt: skip
        renewed = dict(told)
        if name not in self._entered:  # an entry of that name is of a process that has ended
            renewed["started_at"] = database_now()
        with writing(self._engine) as session:
            values = {"name": name, "started_at": database_now(), **told}
            row = inserting(session, ProcessRow).values(values)
            session.execute(row.on_conflict_do_update(index_elements=["name"], set_=renewed))
        self._entered.add(name)

    def gone(self, name: str) -> None:
        """Delete the entry of a process that ends, if it has one."""
        with writing(self._engine) as session:
            session.execute(delete(ProcessRow).where(ProcessRow.name == name))
        self._entered.discard(name)

    def alive(
        self, within_seconds: float = LIVE_SECONDS, *, kind: ProcessKind | None = None
    ) -> list[Process]:
        """Processes that reported themselves within so many seconds, by name."""
        query = (
            select(*ProcessRow.__table__.columns)
            .where(ProcessRow.seen_at >= database_now() - within_seconds)
            .order_by(ProcessRow.name)
        )
        if kind is not None:
            query = query.where(ProcessRow.kind == kind)
        with reading(self._engine) as session:
            return [Process(**row._mapping) for row in session.execute(query)]

    def forget(self, older_than_seconds: float) -> int:
        """Delete entries of processes that have not reported for so long; return their number."""
        old = ProcessRow.seen_at < database_now() - older_than_seconds
        with writing(self._engine) as session:
            found = session.execute(delete(ProcessRow).where(old).returning(ProcessRow.name))
            return len(found.all())
