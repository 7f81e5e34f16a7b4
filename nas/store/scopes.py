"""Scopes: what completed runs are counted in, and answers are given about.

A *scope* is a search (its id) or a task of one tenant: `tenant/name@fingerprint`, or only
`name@fingerprint` for the tenant `default`.  A bare task name has a revision too, because it may
mean other data from one search to the next.

What was measured is of one device: each scope has one within it for every device that its runs ran
on, named `scope|digest`, with the standings on measured axes.
"""

from __future__ import annotations

import hashlib

from sqlalchemy import ColumnElement, select
from sqlalchemy.orm import Session

from nas.planning.tasks import task_names
from nas.settings import DEFAULT_TENANT
from nas.store.engine import inserting
from nas.store.schema import ScopeRow, SearchRow, TrialRow


def task_scope(task: str, fingerprint: str, tenant: str = DEFAULT_TENANT) -> str:
    """The scope of a task's data and recipe among a tenant's searches."""
    return of_tenant(f"{task}@{fingerprint}", tenant)


def of_tenant(name: str, tenant: str) -> str:
    """The scope for a search's id, a task's name or name@fingerprint, as one tenant uses them."""
    is_search = name not in task_names() and "@" not in name
    return name if is_search or tenant == DEFAULT_TENANT else f"{tenant}/{name}"


def device_scope(scope: str, device: str) -> str:
    """The scope of those runs of a scope that were measured on one device."""
    return within_scope(scope) + hashlib.sha256(device.encode()).hexdigest()[:12]


def within_scope(scope: str) -> str:
    """What the names of the scopes of a scope's devices begin with."""
    return f"{scope}|"


def scopes_of(search: SearchRow) -> list[str]:
    """The scopes that completed runs of a search count in, in the order in which to lock them."""
    if search.task_fingerprint is None:
        return [search.id]
    return sorted([search.id, task_scope(search.task, search.task_fingerprint, search.tenant)])


def within(
    search_id: str | None, task: str | None, fingerprint: str | None, tenant: str
) -> list[ColumnElement[bool]]:
    """Selects the trials, joined with their searches, of a search or of a tenant's searches."""
    where = [SearchRow.tenant == tenant if search_id is None else SearchRow.id == search_id]
    if task is not None:
        where.append(SearchRow.task == task)
    if fingerprint is not None:
        where.append(SearchRow.task_fingerprint == fingerprint)
    return where


def repeats(search_id: str | None) -> ColumnElement[bool]:
    """Whether a trial shares the result of another run in the search, or in any search for None.

    Such a trial is no evidence of its own.  A search shows a result that it found done elsewhere;
    of a task as a whole each run counts once, because the run that was reused is in it too.
    """
    shared = TrialRow.reused_from.is_not(None)
    if search_id is None:
        return shared
    own = select(TrialRow.id).where(TrialRow.search_id == search_id)
    return shared & TrialRow.reused_from.in_(own.scalar_subquery())


def evidence_in(scope: str) -> list[ColumnElement[bool]]:
    """Selects the trials of a scope, joined with their searches, less those that repeat others."""
    owner, _, named = scope.rpartition("/")
    task, _, fingerprint = named.partition("@")
    if not fingerprint:
        return [*within(scope, None, None, ""), ~repeats(scope)]
    return [*within(None, task, fingerprint, owner or DEFAULT_TENANT), ~repeats(None)]


def locked_scope(session: Session, scope: str) -> ScopeRow:
    """The scope's row, created if missing, and locked until the transaction ends."""
    new = {"scope": scope, "revision": 0, "trials": 0, "points": 0, "searches": 0}
    session.execute(inserting(session, ScopeRow).values(**new).on_conflict_do_nothing())
    query = select(ScopeRow).where(ScopeRow.scope == scope).with_for_update()
    return session.scalars(query, execution_options={"populate_existing": True}).one()


def touch(session: Session, search: SearchRow) -> None:
    """Raise the revision of the bare task name, if it may mean the search's data and recipe."""
    request = search.request
    chosen = request.get("recipe") or request.get("overrides")  # older requests lack both fields
    if search.data_path is None and not chosen:
        locked_scope(session, of_tenant(search.task, search.tenant)).revision += 1
