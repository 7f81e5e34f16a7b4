"""What searches have done and cost so far: one with its rounds, or many at a glance."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from sqlalchemy import case, func, select

from nas.records.progress import Overview, Phase, SearchProgress
from nas.records.search import Search
from nas.store import rows
from nas.store.engine import reading
from nas.store.evidence import Standings
from nas.store.schema import EventRow, SearchRow, TrialRow
from nas.store.searches import Store


def progress_of(store: Store, search: Search) -> SearchProgress | None:
    """How far a search has come; None for one whose runs all train to their end.

    Raises
    ------
    NotFound
        It is there no more.
    """
    request = search.request
    if request.stopping_rule == "none":
        return None
    trained = TrialRow.trained_steps * TrialRow.train_flops_per_step
    stopped = case((TrialRow.state == "stopped", trained), else_=0)
    sums = select(func.sum(trained), func.sum(stopped)).where(TrialRow.search_id == search.id)
    newest = (
        select(EventRow.data)
        .where(EventRow.search_id == search.id, EventRow.kind == "round")
        .order_by(EventRow.id.desc())
        .limit(1)
    )
    with reading(store.engine) as session:
        row = store.row(session, search.id)
        of_all, of_stopped = (int(n or 0) for n in session.execute(sums).one())
        last = session.scalar(newest)
        now = rows.now(session)
    return SearchProgress(
        round=row.rounds,
        phase=None if last is None else _phase(last),
        spent=_held(row, now) if request.total_seconds is not None else float(of_all),
        total=request.total,
        unit="train FLOPs" if request.total_seconds is None else "seconds",
        trained_flops=of_all,
        stopped_flops=of_stopped,
    )


def overviews(store: Store, searches: Sequence[Search]) -> dict[str, Overview]:
    """Search id → overview, in three queries."""
    ids = [search.id for search in searches]
    trained = (
        select(TrialRow.search_id, func.sum(TrialRow.trained_steps * TrialRow.train_flops_per_step))
        .where(TrialRow.search_id.in_(ids))
        .group_by(TrialRow.search_id)
    )
    held = select(SearchRow).where(SearchRow.id.in_(ids))
    losses = Standings(store).lowest_losses(ids)
    with reading(store.engine) as session:
        flops = {search_id: int(n or 0) for search_id, n in session.execute(trained)}
        now = rows.now(session)
        seconds = {row.id: _held(row, now) for row in session.scalars(held)}
    found = {}
    for search in searches:
        counts, total = search.trial_counts, search.request.total
        spent = seconds.get(search.id, 0.0)
        trained_flops = flops.get(search.id, 0)
        ended = sum(counts.get(state, 0) for state in ("complete", "failed", "stopped"))
        share = ended / search.runs_total if search.runs_total else None
        if total is not None:
            in_seconds = search.request.total_seconds is not None
            share = (spent if in_seconds else trained_flops) / total
        found[search.id] = Overview(
            structured=losses.get((search.id, False)), dense=losses.get((search.id, True)),
            trained_flops=trained_flops, held_seconds=spent, share=share,
        )  # fmt: skip
    return found


def _phase(last: dict[str, int]) -> Phase:
    """Of a round, from the counts of its event."""
    if last["confirmations"]:
        return "confirming"
    return "exploring" if last["begun"] else "racing"


def _held(row: SearchRow, now: float) -> float:
    """Seconds that workers have held a search, the running claim included."""
    running = row.state == "running" and row.claimed_at is not None
    return row.held_seconds + (now - row.claimed_at if running and row.claimed_at else 0.0)


#: Newest runs of a task whose speed is that of the next.
_TIMED = 200


def seconds_per_flop(store: Store, task: str) -> float | None:
    """Seconds of training for a train FLOP, the median over the tenant's newest timed runs of a
    task; None without one."""
    rate = TrialRow.seconds_per_step / TrialRow.train_flops_per_step
    query = (
        select(rate)
        .join(SearchRow, TrialRow.search_id == SearchRow.id)
        .where(SearchRow.tenant == store.tenant, SearchRow.task == task)
        .where(TrialRow.state == "complete", TrialRow.seconds_per_step.is_not(None))
        .order_by(TrialRow.id.desc())
        .limit(_TIMED)
    )
    with reading(store.engine) as session:
        found = [float(value) for value in session.scalars(query) if value is not None]
    return median(found) if found else None
