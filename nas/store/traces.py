"""The span of a search: from its submission, or the last retry, to its end, whoever held it.

The log of a search keeps the `traceparent` of the request that queued it.  From that every worker
makes the same span, so that what it does for the search has a parent, and whoever writes the end of
the search tells it.
"""

from __future__ import annotations

import logging

from sqlalchemy import Engine, event, select
from sqlalchemy.orm import Session

from nas import tracing
from nas.errors import StoreUnavailable
from nas.planning.request import SearchRequest
from nas.store.engine import reading
from nas.store.schema import EventRow, SearchRow

_log = logging.getLogger(__name__)
#: Events that begin the span.
_BEGINNING = ("queued", "retried")


def span_of(engine: Engine, search_id: str) -> tracing.Span:
    """The span of a search, within which its worker's spans begin."""
    if not tracing.on():
        return tracing.Span()
    try:
        with reading(engine) as session:
            return _span(session, session.get_one(SearchRow, search_id))
    except StoreUnavailable as error:
        _log.warning("search %s goes on without a trace: %s", search_id, error)
        return tracing.Span()


def tell(session: Session, row: SearchRow) -> None:
    """Tell the span of a search that has ended in this transaction, once that is committed."""
    if not tracing.on():
        return
    found, at = _span(session, row), row.finished_at
    found.set({"einsum_nas.search.state": row.state, "einsum_nas.search.claims": row.epoch})
    if row.state == "failed":
        found.fail(row.failure or "failed")

    @event.listens_for(session, "after_commit", once=True)
    def _(_: Session) -> None:
        found.end(at)


def _span(session: Session, row: SearchRow) -> tracing.Span:
    query = select(EventRow).where(EventRow.search_id == row.id, EventRow.kind.in_(_BEGINNING))
    begun = session.scalars(query.order_by(EventRow.id.desc()).limit(1)).one_or_none()
    request = SearchRequest(**row.request)
    attributes = {
        "einsum_nas.search.id": row.id,
        "einsum_nas.task": row.task,
        "einsum_nas.sampler": request.sampler,
        "einsum_nas.stopping": request.stopping_rule,
        "einsum_nas.train_flops": request.train_flops,
        "einsum_nas.candidates": request.trials,
    }
    return tracing.begin_lasting(
        "search", f"{row.id} {begun.id if begun else 0}", attributes,
        parent=begun.data.get("traceparent") if begun else None,
        at=begun.created_at if begun else row.created_at,
    )  # fmt: skip
