"""A sample of the completed runs of two factors in a scope, for pictures of the space."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import func, select

from nas.store.engine import reading
from nas.store.schema import SearchRow, TrialRow
from nas.store.scopes import evidence_in
from nas.store.searches import Store


@dataclass(frozen=True, slots=True)
class Ended:
    """A completed run of two factors."""

    trial_id: int
    search_id: str
    #: of the trial in its search
    number: int
    name: str
    theta: tuple[float, ...]
    dense: bool
    width: int
    train_flops: float
    #: at its last step
    loss: float


@dataclass(frozen=True, slots=True)
class Sample:
    """Runs of a scope, those of low loss first."""

    runs: Sequence[Ended]
    #: completed runs of two factors, and of other designs
    two_factors: int
    others: int


def sample_runs(store: Store, scope: str, most: int) -> Sample:
    """The runs of a scope, or half of `most` with the lowest losses and an even sample of the rest.

    Runs that repeat others are left out; see `nas.store.scopes`.
    """
    of_scope = (TrialRow.state == "complete", TrialRow.loss.is_not(None), *evidence_in(scope))
    # of two factors theta says everything, and no text is stored
    usable = (TrialRow.design.is_(None), TrialRow.loss > 0, TrialRow.loss < math.inf)
    count = (
        select(func.count(), func.count(TrialRow.design))
        .join(SearchRow, TrialRow.search_id == SearchRow.id)
        .where(*of_scope)
    )
    query = (
        select(
            TrialRow.id.label("trial_id"), TrialRow.search_id, TrialRow.number,
            TrialRow.name, TrialRow.theta, TrialRow.dense, TrialRow.width, TrialRow.train_flops,
            TrialRow.loss,
        )
        .join(SearchRow, TrialRow.search_id == SearchRow.id)
        .where(*of_scope, *usable)
    )  # fmt: skip
    lowest = query.order_by(TrialRow.loss, TrialRow.id)
    with reading(store.engine) as session:
        total, others = session.execute(count).one()
        two_factors = total - others
        found = list(session.execute(lowest.limit(most if two_factors <= most else most // 2)))
        if two_factors > most:
            rest = most - len(found)
            every = -(-two_factors // rest)
            even = query.where(TrialRow.id % every == 0).order_by(TrialRow.id).limit(rest)
            seen = {row.trial_id for row in found}
            found += [row for row in session.execute(even) if row.trial_id not in seen]
    runs = [Ended(**{**row._mapping, "theta": tuple(row.theta)}) for row in found]
    return Sample(sorted(runs, key=lambda run: run.loss), two_factors, others)
