"""Tenants: their use of quotas, and quotas of their own."""

from __future__ import annotations

from sqlalchemy import select

from nas.errors import InvalidInput
from nas.store.audit import add_audit
from nas.store.engine import inserting, reading, writing
from nas.store.quotas import Use, quotas_of, use_of
from nas.store.schema import SearchRow, TenantRow
from nas.store.searches import Store

_MOST = {"searches": 10**6, "train_flops": 1e30, "concurrency": 10**6}


def all_use(store: Store) -> list[Use]:
    """The use of each tenant that has a search or quotas of its own, by name."""
    with reading(store.engine) as session:
        names = set(session.scalars(select(SearchRow.tenant).distinct()))
        names |= set(session.scalars(select(TenantRow.name)))
        return [use_of(session, n, quotas_of(session, n, store.quotas)) for n in sorted(names)]


def set_quotas(store: Store, tenant: str, **given: float) -> None:
    """Set some of a tenant's own quotas: searches, train_flops, concurrency; the others stay.

    Raises
    ------
    InvalidInput
        A value is out of range.
    """
    for name, value in given.items():
        if not 0 <= value <= _MOST[name]:
            raise InvalidInput(name, value, f"a number from 0 to {_MOST[name]:g}")
    with writing(store.engine) as session:
        row = inserting(session, TenantRow).values(name=tenant, **given)
        session.execute(row.on_conflict_do_update(index_elements=["name"], set_=given))
        told = ", ".join(f"{name} {value:g}" for name, value in given.items())
        add_audit(session, "quota set", tenant=tenant, reason=told)
