"""Weights of the best runs of a search, each a safetensors file in parts.

They are written in the transaction that completes their trial, so that a complete trial has them or
never will.  Of a search the runs of the lowest losses keep theirs, as many as its request says.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

from sqlalchemy import Select, delete, func, select, true
from sqlalchemy.orm import Session

from nas.errors import NotFound
from nas.records.trial import KeptWeights
from nas.store import rows
from nas.store.engine import SECONDS_PER_DAY, one_at_a_time, reading, writing
from nas.store.schema import SearchRow, TrialRow, WeightsPartRow, WeightsRow, database_now
from nas.store.searches import Store
from nas.store.selecting import pages

#: Bytes of a part: so many that a download is few queries, so few that copies of the database,
#: which hold hundreds of rows at once, take little memory.
PART = 128 * 1024
#: First key of the lock under which a tenant's total is checked; an arbitrary constant.
_LOCK = 7305617


def keep(
    session: Session, search: SearchRow, trial: TrialRow, file: bytes, most: int | None
) -> dict[str, Any]:
    """Keep the weights of a trial that completes now; what its event says of them.

    Parameters
    ----------
    most
        Bytes that the weights of the tenant may take together; None for any number.
    """
    count = int(search.request.get("keep_weights", 1))
    kept = (
        select(WeightsRow, TrialRow.loss)
        .join(TrialRow, TrialRow.id == WeightsRow.trial_id)
        .where(TrialRow.search_id == search.id)
        .order_by(TrialRow.loss, TrialRow.id)
    )
    found = session.execute(kept).all()
    assert trial.loss is not None
    if len(found) >= count and (count == 0 or trial.loss >= found[count - 1].loss):
        return {}
    dropped = [row.WeightsRow for row in found[max(count - 1, 0) :]]
    if most is not None:
        one_at_a_time(session, _LOCK, func.hashtext(search.tenant))
        total = session.scalar(_total(search.tenant)) or 0
        total -= sum(row.bytes for row in dropped)
        if total + len(file) > most:
            why = f"{len(file):,} bytes beside {total:,} of the tenant exceed {most:,}"
            return {"weights_left": why}
    for row in dropped:
        session.delete(row)
    digest = hashlib.sha256(file).hexdigest()
    session.add(
        WeightsRow(trial_id=trial.id, created_at=rows.now(session), bytes=len(file), sha256=digest)
    )
    session.flush()
    for number, begin in enumerate(range(0, len(file), PART)):
        part = file[begin : begin + PART]
        session.add(WeightsPartRow(trial_id=trial.id, number=number, data=part))
    return {"weights": len(file)}


def _total(tenant: str) -> Select[Any]:
    return (
        select(func.sum(WeightsRow.bytes))
        .join(TrialRow, TrialRow.id == WeightsRow.trial_id)
        .join(SearchRow, SearchRow.id == TrialRow.search_id)
        .where(SearchRow.tenant == tenant)
    )


def weights_of(store: Store, trial_id: int) -> KeptWeights | None:
    """The weights of a trial, or of the equal run whose result it has; None if not kept.

    Raises
    ------
    NotFound
        No such trial.
    """
    with reading(store.engine) as session:
        trial = store.trial_row(session, trial_id)
        row = session.get(WeightsRow, trial.reused_from or trial.id)
        return None if row is None else _kept(row)


def weights_of_model(store: Store, trial_id: int) -> KeptWeights | None:
    """The weights of the run with the lowest loss among those that differ from a trial in seed and
    steps only; None if none of them has kept its own."""
    with reading(store.engine) as session:
        trial = store.trial_row(session, trial_id)
        query = (
            select(WeightsRow)
            .join(TrialRow, TrialRow.id == WeightsRow.trial_id)
            .join(SearchRow, SearchRow.id == TrialRow.search_id)
            .where(
                TrialRow.model == trial.model,
                SearchRow.tenant == store.tenant if store.confined else true(),
            )
            .order_by(TrialRow.loss, TrialRow.id)
            .limit(1)
        )
        row = session.scalars(query).one_or_none()
        return None if row is None else _kept(row)


def _kept(row: WeightsRow) -> KeptWeights:
    return KeptWeights(trial_id=row.trial_id, bytes=row.bytes, sha256=row.sha256)


def read_weights(store: Store, trial_id: int) -> tuple[KeptWeights, Iterator[bytes]]:
    """The weights of a trial, and their file in parts.

    Raises
    ------
    NotFound
        No such trial, or its weights are not kept; also while the parts are read, if the weights of
        a better run take their place meanwhile.
    """
    found = weights_of(store, trial_id)
    if found is None:
        raise NotFound(f"the weights of trial {trial_id} are not kept; {_others(store, trial_id)}")
    return found, _parts(store, found)


def _parts(store: Store, kept: KeptWeights) -> Iterator[bytes]:
    for number in range(-(-kept.bytes // PART)):
        with reading(store.engine) as session:
            row = session.get(WeightsPartRow, (kept.trial_id, number))
        if row is None:
            raise NotFound(f"the weights of trial {kept.trial_id} are no longer kept")
        yield row.data


def _others(store: Store, trial_id: int) -> str:
    """What a search keeps instead of the weights of one of its trials."""
    search = store.search(store.trial(trial_id).search_id)
    with reading(store.engine) as session:
        ids = session.scalars(
            select(WeightsRow.trial_id)
            .join(TrialRow, TrialRow.id == WeightsRow.trial_id)
            .where(TrialRow.search_id == search.id)
            .order_by(TrialRow.loss)
        ).all()
    asked = search.request.keep_weights
    if search.request.trainer == "client":
        return "those of trials that clients train stay with the clients"
    rule = f"search {search.id} keeps those of its {asked} best complete runs (`keep_weights`)"
    return f"{rule}: {', '.join(f'trial {i}' for i in ids) or 'none so far'}"


def prune_weights(store: Store, days: float, *, dry_run: bool) -> int:
    """Delete the weights of searches that ended so many days ago; how many."""
    old = (
        select(WeightsRow.trial_id)
        .join(TrialRow, TrialRow.id == WeightsRow.trial_id)
        .join(SearchRow, SearchRow.id == TrialRow.search_id)
        .where(SearchRow.finished_at < database_now() - days * SECONDS_PER_DAY)
    )
    count = 0
    for page in pages(store.engine, old, WeightsRow.trial_id):
        ids = [row.trial_id for row in page]
        if not dry_run:
            chosen = delete(WeightsRow).where(WeightsRow.trial_id.in_(ids))
            with writing(store.engine) as session:
                ids = list(session.scalars(chosen.returning(WeightsRow.trial_id)))
        count += len(ids)
    return count
