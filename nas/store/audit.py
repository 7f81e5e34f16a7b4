"""The audit log: who did what, and who was refused.  The database refuses changes to records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from nas.errors import InvalidInput, echo
from nas.logs import masked
from nas.store import rows
from nas.store.engine import SECONDS_PER_DAY, reading, writing
from nas.store.schema import AuditRow, database_now
from nas.store.searches import Store
from nas.store.selecting import newest, pages

#: Days for which the database itself refuses to delete a record.
LEAST_DAYS = 90.0


@dataclass(frozen=True, slots=True)
class Entry:
    """One record of the log."""

    id: int
    #: seconds since 1970
    created_at: float
    tenant: str | None
    key_id: str | None
    #: method and route, or what was done to a key or a tenant
    action: str
    #: what it was done to
    target: str | None
    #: of the answer
    status: int | None
    reason: str | None
    #: address that the request came from
    address: str | None
    request_id: str | None


def add_audit(session: Session, action: str, **values: str | int | None) -> None:
    """Append a record in the caller's transaction; texts are cut to the columns' lengths.

    Parameters
    ----------
    values
        The other fields of an `Entry`, but for its id and its time.
    """
    columns: Any = AuditRow.__table__.columns
    stored = {
        name: masked(echo(v))[: columns[name].type.length] if isinstance(v, str) else v
        for name, v in {"action": action, **values}.items()
    }
    session.add(AuditRow(created_at=rows.now(session), **stored))


class Audit:
    """The audit log of a store."""

    def __init__(self, store: Store) -> None:
        self._engine = store.engine

    def add(self, action: str, **values: str | int | None) -> None:
        """Append a record; see `add_audit`."""
        with writing(self._engine) as session:
            add_audit(session, action, **values)

    def entries(
        self, *, before: int | None = None, limit: int = 50, tenant: str | None = None
    ) -> list[Entry]:
        """The newest records, or those before the id `before`."""
        query = newest(AuditRow, AuditRow.id, before, limit, tenant=tenant)
        with reading(self._engine) as session:
            return [Entry(**row._mapping) for row in session.execute(query)]

    def prune(self, days: float, *, dry_run: bool = False) -> int:
        """Delete records older than so many days; return their number.

        Raises
        ------
        InvalidInput
            Fewer days than the database enforces.
        """
        if not days >= LEAST_DAYS:
            raise InvalidInput("audit_days", days, f"a number of days from {LEAST_DAYS:g}")
        count = 0
        old = select(AuditRow.id).where(
            AuditRow.created_at < database_now() - days * SECONDS_PER_DAY
        )
        for page in pages(self._engine, old, AuditRow.id):
            if dry_run:
                count += len(page)
                continue
            ids = [row.id for row in page]
            gone = delete(AuditRow).where(AuditRow.id.in_(ids)).returning(AuditRow.id)
            with writing(self._engine) as session:
                count += len(session.execute(gone).all())
        return count
