"""Searches and trials written to a store as a worker would write them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from nas.planning.request import SearchRequest
from nas.planning.runs import references
from nas.store import Lease, Leases, MeasuredCost, Store, StoredPoint, Trial, TrialDraft, standings
from nas.store.engine import writing
from nas.store.fronts import sweep_out
from nas.store.schema import BarRow, PointRow, ScopeRow, SearchRow, StandingRow, TrialRow

REQUEST = SearchRequest.checked({"train_flops": 2e11, "trials": 4})


PLANS = references(REQUEST.settings, REQUEST.train_flops, 5)


LONG = 60.0


def draft(number: int, **changes: Any) -> TrialDraft:
    plan = PLANS[number % len(PLANS)]
    fields: dict[str, Any] = {
        "number": number, "kind": "candidate", "plan": plan, "seed": 0, "key": f"key-{number}",
        "name": "dense", "params": {"alpha": 0.1 + number}, "sampler_state": {"trial": {"g": 1}},
        "unseen": (1, 2), **changes,
    }  # fmt: skip
    return TrialDraft(**fields)


def last_point(trial: Trial, loss: float = 2.0) -> StoredPoint:
    return StoredPoint(trial.steps, trial.train_flops, loss, 0.01, 1.5, (loss - 0.5, loss + 0.5))


def completed(leases: Leases, lease: Lease, d: TrialDraft, loss: float = 2.0) -> Trial:
    trial = leases.add_trial(lease, d)
    leases.start_trial(lease, trial.id)
    leases.add_point(lease, trial.id, last_point(trial, loss))
    leases.complete_trial(lease, trial.id, {"device": "cpu"})
    return trial


def together(count: int, act: Callable[[int], object]) -> None:
    """Run `act` in `count` threads that start at the same moment; errors are raised here."""
    barrier = threading.Barrier(count)
    errors: list[BaseException] = []

    def run(i: int) -> None:
        barrier.wait()
        try:
            act(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if errors:
        raise errors[0]


def begun(store: Store, fingerprint: str | None = "f1", **changes: Any) -> Lease:
    store.create_search(REQUEST.model_copy(update=changes))
    claimed = Leases(store).claim("w", 60.0)
    assert claimed is not None
    if fingerprint is not None:
        Leases(store).set_fingerprint(claimed[0], fingerprint)
    return claimed[0]


#: Where runs ran.
ENVIRONMENT = {"device": "cpu", "threads": 1}


def run(
    store: Store, lease: Lease, number: int, losses: list[float], *, flops: float = 1e9,
    environment: dict[str, Any] | None = ENVIRONMENT, **plan: Any,
) -> int:  # fmt: skip
    """A completed run with points at equal distances."""
    leases = Leases(store)
    trial = leases.add_trial(lease, draft(number, **plan))
    leases.start_trial(lease, trial.id)
    for i, loss in enumerate(losses):
        step = trial.steps if i == len(losses) - 1 else i + 1
        point = StoredPoint(step, flops * (i + 1), loss, 0.01, i + 1.0, (loss, loss))
        leases.add_point(lease, trial.id, point)
    cost = MeasuredCost(0.01 * (number + 1), 1000 + number)
    leases.complete_trial(lease, trial.id, environment, cost)
    return trial.id


def standing(store: Store) -> set[tuple[Any, ...]]:
    """Counts and standings, once what does not belong any more has been swept out."""
    with writing(store.engine) as session:
        for bar in session.scalars(sa.select(BarRow)):
            sweep_out(session, bar)
    with Session(store.engine) as session:
        rows = session.execute(sa.select(StandingRow.__table__)).all()
        scopes = session.execute(
            sa.select(ScopeRow.scope, ScopeRow.trials, ScopeRow.points, ScopeRow.searches,
                      ScopeRow.least_flops, ScopeRow.greatest_flops)
        ).all()  # fmt: skip
    return {tuple(r) for r in rows} | {tuple(s) for s in scopes}


def run_to_plan(
    store: Store, lease: Lease, number: int, losses: list[float], **changes: Any
) -> int:
    """A completed run, every other one dense, whose last point has the FLOPs of its plan."""
    leases = Leases(store)
    plan = replace(PLANS[number % len(PLANS)], dense=number % 2 == 0)
    fields: dict[str, Any] = {"plan": plan, "key": f"{lease.search_id}-{number}", **changes}
    trial = leases.add_trial(lease, draft(number, **fields))
    leases.start_trial(lease, trial.id)
    for i, loss in enumerate(losses):
        step = trial.steps - len(losses) + 1 + i
        flops = float(trial.train_flops * (i + 1) / len(losses))
        leases.add_point(lease, trial.id, StoredPoint(step, flops, loss, 0.01, i + 1.0, (loss,)))
    cost = MeasuredCost(0.01 * (number + 1), 1000 + number)
    leases.complete_trial(lease, trial.id, ENVIRONMENT, cost)
    return trial.id


def check_consistent(store: Store) -> None:
    """Assert what every committed state of a store has."""
    with writing(store.engine) as session:
        for trial in session.scalars(sa.select(TrialRow).where(TrialRow.state == "complete")):
            last = session.get(PointRow, (trial.id, trial.steps))
            assert last is not None
            assert last.loss == trial.loss
        for search in session.scalars(sa.select(SearchRow)):
            of_search = sa.select(TrialRow.state, sa.func.count()).where(
                TrialRow.search_id == search.id
            )
            counted = {str(s): int(n) for s, n in session.execute(of_search.group_by("state"))}
            assert {k: n for k, n in search.tally.items() if k != "references"} == counted
    stood = standing(store)
    with writing(store.engine) as session:
        standings.rebuild(session)
    assert standing(store) == stood
