"""The store as users see it: create, read, list and change searches, and read their results."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from copy import copy
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import ColumnElement, Select, String, cast, func, or_, select, true, tuple_
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from nas import tracing
from nas.errors import IdempotencyConflict, NotFound
from nas.planning.request import SearchRequest
from nas.records.run import CurvePoint
from nas.records.search import Search
from nas.records.trial import StoredPoint, Trial
from nas.settings import DEFAULT_TENANT
from nas.store import lifecycle, rows
from nas.store.engine import open_engine, pieces, reading, writing
from nas.store.fronts import AXES
from nas.store.migrate import stored_revision
from nas.store.quotas import UNLIMITED, Quotas, check_quotas, most_flops, owed_flops
from nas.store.records import Event
from nas.store.schema import EventRow, PointRow, SearchRow, TrialRow
from nas.store.scopes import repeats, within
from nas.store.selecting import MAX_PAGE, newest

#: A point of `Store.cloud`: x is in the unit of the axis.
CLOUD = np.dtype(
    [("trial_id", "i8"), ("step", "i8"), ("x", "f8"), ("loss", "f8"), ("dense", "?"),
     ("complete", "?")]
)  # fmt: skip
Cloud = NDArray[np.void]


class Store:
    """Reads, and the writes that need no lease.

    Parameters
    ----------
    tenant
        Tenant of new searches; answers about tasks use the searches of this tenant only.
    quotas
        Quotas of tenants that have none of their own.
    """

    def __init__(
        self, url: str, *, tenant: str = DEFAULT_TENANT, quotas: Quotas = UNLIMITED
    ) -> None:
        self.engine = open_engine(url)
        self.tenant, self.quotas = tenant, quotas
        #: whether searches of other tenants are hidden, as if they did not exist
        self.confined = False

    def view(self, tenant: str, *, confined: bool = False) -> Store:
        """The same store for a tenant; if `confined`, it hides the searches of other tenants.

        It shares the connections, which only the original store closes.
        """
        shown = copy(self)
        shown.tenant, shown.confined = tenant, confined
        return shown

    def close(self) -> None:
        """Close every connection."""
        self.engine.dispose()

    def ping(self) -> None:
        """Raise if the database does not answer or its schema is missing."""
        with reading(self.engine) as session:
            session.execute(select(SearchRow.id).limit(1))

    def create_search(
        self,
        request: SearchRequest,
        *,
        data_path: str | None = None,
        idempotency_key: str | None = None,
        data_root: str | None = None,
        fingerprint: str | None = None,
        cloned_from: str | None = None,
        request_id: str | None = None,
    ) -> tuple[Search, bool]:
        """Queue a search of the tenant; return (search, whether it is new).

        A repetition with the same idempotency key, by the same tenant, returns the search that the
        first request created.

        Parameters
        ----------
        fingerprint
            If given, the search runs on this data and recipe only, and fails on others.
        data_root
            Folder that the data has to lie in.
        request_id
            Stored in the search's log, to find the request in the service's log.

        Raises
        ------
        IdempotencyConflict
            The key was used with another request.
        QuotaExceeded
            The search would exceed a quota of the tenant.
        """
        for attempt in range(50):
            try:
                return self._create(
                    request, idempotency_key, {} if request_id is None else {"request": request_id},
                    data_path=data_path, data_root=data_root, task_fingerprint=fingerprint,
                    tenant=self.tenant, cloned_from=cloned_from,
                )  # fmt: skip
            except IntegrityError:
                # another transaction took the key or the sequence number in between
                if attempt == 49:
                    raise
        raise AssertionError("unreachable")

    def _create(
        self, request: SearchRequest, key: str | None, logged: dict[str, str], **values: Any
    ) -> tuple[Search, bool]:
        with writing(self.engine) as session:
            if key is not None:
                same_key = _of_key(values["tenant"], key)
                found = session.scalars(same_key).one_or_none()
                if found is not None:
                    # digests of older versions cover fewer fields, so compare the requests, too
                    same = found.request_digest == request.digest
                    same = same or SearchRequest(**found.request) == request
                    if not same or found.cloned_from != values["cloned_from"]:
                        raise IdempotencyConflict(
                            f"Idempotency-Key {key!r} was used before with another request"
                        )
                    return rows.to_search(found), False
            charge = most_flops(request)
            check_quotas(session, self.tenant, self.quotas, charge)
            last = session.scalar(select(func.max(SearchRow.sequence))) or 0
            row = SearchRow(
                id=uuid.uuid4().hex,
                sequence=last + 1,
                state="queued",
                task=request.task,
                request=request.model_dump(mode="json"),
                priority=request.priority,
                idempotency_key=key,
                request_digest=request.digest,
                created_at=rows.now(session),
                charged_flops=charge,
                **values,
            )
            session.add(row)
            session.flush()
            rows.add_event(session, row.id, "queued", {**logged, **tracing.carrier()})
            if row.cloned_from is not None:
                rows.add_event(session, row.id, "cloned", {"from": row.cloned_from})
            return rows.to_search(row), True

    def search_of_key(self, idempotency_key: str) -> Search | None:
        """The search that the tenant created with an idempotency key; None if there is none."""
        with reading(self.engine) as session:
            row = session.scalars(_of_key(self.tenant, idempotency_key)).one_or_none()
            return None if row is None else rows.to_search(row)

    def seeds_of_models(self, models: Collection[str]) -> set[int]:
        """Seeds of the tenant's trials of the given models, in any state."""
        query = (
            select(TrialRow.seed)
            .join(SearchRow, TrialRow.search_id == SearchRow.id)
            .where(TrialRow.model.in_(models), SearchRow.tenant == self.tenant)
            .distinct()
        )
        with reading(self.engine) as session:
            return set(session.scalars(query))

    def seeds_of_confirmations(self, search_id: str) -> set[int]:
        """Seeds of all confirmations of a search, whether their trials are planned yet or not."""
        source = SearchRow.request[("confirm", "search")].as_string()
        with reading(self.engine) as session:
            found = session.scalars(select(SearchRow.request).where(source == search_id))
            return {seed for request in found for seed in request["confirm"]["seeds"]}

    def search(self, search_id: str) -> Search:
        """One search; `NotFound` if there is none with this id."""
        with reading(self.engine) as session:
            return rows.to_search(self.row(session, search_id))

    def row(self, session: Session, search_id: str, *, lock: bool = False) -> SearchRow:
        """The row of a search that this view shows; `NotFound` if there is none."""
        row = session.get(SearchRow, search_id, with_for_update=lock)
        if row is None or not self._shows(row):
            raise NotFound(f"no search {search_id!r}")
        return row

    def _shows(self, row: SearchRow) -> bool:
        return not self.confined or row.tenant == self.tenant

    def searches(
        self,
        *,
        before: int | None = None,
        limit: int = 50,
        state: str | None = None,
        failure: str | None = None,
        tenant: str | None = None,
        task: str | None = None,
        text: str | None = None,
        archived: bool | None = None,
    ) -> list[Search]:
        """The newest searches, or those created before the sequence number `before`.

        Parameters
        ----------
        state, failure, tenant, task, archived
            Only searches with this value.
        text
            Only searches whose name or tags contain it, or whose id begins with it.
        """
        equal = {"state": state, "failure": failure, "tenant": tenant, "task": task}
        query = newest(SearchRow, SearchRow.sequence, before, limit, **equal)
        if text is not None:
            tags = cast(SearchRow.tags, String)
            found = (c.icontains(text, autoescape=True) for c in (SearchRow.name, tags))
            by_id = SearchRow.id.startswith(text.lower(), autoescape=True)
            query = query.where(or_(*found, by_id))
        if archived is not None:
            query = query.where(SearchRow.archived == archived)
        if self.confined:
            query = query.where(SearchRow.tenant == self.tenant)
        with reading(self.engine) as session:
            return [rows.to_search(r) for r in session.execute(query)]

    def trials(
        self,
        search_id: str,
        *,
        after: int = -1,
        limit: int | None = None,
        states: Sequence[str] | None = None,
    ) -> list[Trial]:
        """Trials of a search with numbers above `after`, in the order of their numbers.

        Parameters
        ----------
        states
            Only trials in one of these.
        """
        query = (
            select(*TrialRow.__table__.columns)  # plain rows: ORM objects are slower
            .where(TrialRow.search_id == search_id, TrialRow.number > after)
            .order_by(TrialRow.number)
        )
        if states is not None:
            query = query.where(TrialRow.state.in_(states))
        with reading(self.engine) as session:
            found = [rows.to_trial(r) for r in session.execute(query.limit(limit))]
            if not found or self.confined:
                self.row(session, search_id)
            return found

    def trial(self, trial_id: int) -> Trial:
        """One trial; `NotFound` if there is none with this id."""
        with reading(self.engine) as session:
            return rows.to_trial(self.trial_row(session, trial_id))

    def trial_row(self, session: Session, trial_id: int) -> TrialRow:
        """The row of a trial of a search that this view shows; `NotFound` if there is none."""
        row = session.get(TrialRow, trial_id)
        search = None if row is None else session.get(SearchRow, row.search_id)
        if row is None or search is None or not self._shows(search):
            raise NotFound(f"no trial {trial_id!r}")
        return row

    def repeats_of(self, trial: Trial, limit: int) -> list[Trial]:
        """The first trials of a search that train the model of one of them with other seeds or
        steps, itself included; confirmations of it in other searches too."""
        query = select(*TrialRow.__table__.columns).join(
            SearchRow, TrialRow.search_id == SearchRow.id
        )
        same = (TrialRow.search_id == trial.search_id) & (TrialRow.model == trial.model)
        query = query.where(
            SearchRow.tenant == self.tenant if self.confined else true(),
            or_(same, TrialRow.confirms == trial.id, TrialRow.id == (trial.confirms or trial.id)),
        )
        with reading(self.engine) as session:
            found = session.execute(query.order_by(TrialRow.id).limit(limit))
            return [rows.to_trial(row) for row in found]

    def curve(self, trial_id: int) -> list[StoredPoint]:
        """The points of a trial in the order of their steps."""
        query = select(PointRow).where(PointRow.trial_id == trial_id).order_by(PointRow.step)
        with reading(self.engine) as session:
            if self.confined:
                self.trial_row(session, trial_id)
            return [rows.to_point(r) for r in session.scalars(query)]

    def events(self, search_id: str, *, after: int = 0, limit: int = MAX_PAGE) -> list[Event]:
        """Events of a search with ids above `after`, oldest first."""
        query = (
            select(EventRow)
            .where(EventRow.search_id == search_id, EventRow.id > after)
            .order_by(EventRow.id)
            .limit(limit)
        )
        with reading(self.engine) as session:
            if self.confined:
                self.row(session, search_id)
            return [rows.to_event(r) for r in session.scalars(query)]

    def cancel(self, search_id: str) -> Search:
        """Cancel a search: at once if no worker holds it, else at its worker's next lease renewal.

        Raises
        ------
        NotFound
            No such search.
        Conflict
            It has ended.
        """
        return self._changed(search_id, lifecycle.cancel)

    def pause(self, search_id: str) -> Search:
        """Pause a search: at once if no worker holds it, else at its worker's next lease renewal.

        Raises as `cancel` does; a paused search stays paused.
        """
        return self._changed(search_id, lifecycle.pause)

    def resume(self, search_id: str) -> Search:
        """Queue a paused search again, or withdraw the request to pause a running one.

        Raises
        ------
        NotFound, Conflict
            No such search, or it is not paused and no pause was requested.
        QuotaExceeded
            Its tenant exceeds a quota.
        """

        def change(session: Session, row: SearchRow) -> None:
            lifecycle.resume(session, row)
            check_quotas(session, row.tenant, self.quotas, 0.0, further=0)

        return self._changed(search_id, change)

    def can_retry(self, search_id: str) -> bool:
        """Whether `retry` would queue the search, as far as quotas allow."""
        with reading(self.engine) as session:
            return lifecycle.why_not_retried(session, self.row(session, search_id)) is None

    def retry(self, search_id: str) -> Search:
        """Queue an ended search again, to run the trials that are not complete.

        Raises
        ------
        NotFound, Conflict
            No such search; it has not ended, has nothing to run, or reached a limit.
        QuotaExceeded
            The search would exceed a quota of its tenant.
        """

        def change(session: Session, row: SearchRow) -> None:
            lifecycle.retry(session, row)
            # the quotas count already what it used before it ended; only the rest is added
            more = owed_flops(session, row.id, most_flops(SearchRequest(**row.request)))
            check_quotas(session, row.tenant, self.quotas, more, further=0)
            row.charged_flops += more

        return self._changed(search_id, change)

    def set_priority(self, search_id: str, priority: int) -> Search:
        """Set a search's priority: higher ones are claimed first; raises as `cancel` does."""
        return self._changed(search_id, partial(lifecycle.set_priority, priority=priority))

    def set_labels(self, search_id: str, labels: Mapping[str, Any]) -> Search:
        """Set labels of a search by their names; see `nas.service.labels`."""
        return self._changed(search_id, partial(lifecycle.set_labels, labels=labels))

    def _changed(self, search_id: str, change: Callable[[Session, SearchRow], None]) -> Search:
        with writing(self.engine) as session:
            row = self.row(session, search_id, lock=True)
            change(session, row)
            session.flush()
            return rows.to_search(row)

    def curve_points(
        self,
        *,
        search_id: str | None = None,
        task: str | None = None,
        fingerprint: str | None = None,
        at: Collection[tuple[int, int]] | None = None,
    ) -> list[CurvePoint]:
        """Points of complete, running and paused trials; reused, stopped and failed ones are left
        out.

        A trial that reuses another's result in the same search adds no evidence, so it is left out.

        Parameters
        ----------
        at
            Of these points those at given (trial, step) alone.
        """
        query = (
            select(*rows.RUN, *rows.POINT, rows.COMPLETE)
            .join(TrialRow, PointRow.trial_id == TrialRow.id)
            .join(SearchRow, TrialRow.search_id == SearchRow.id)
            .where(*within(search_id, task, fingerprint, self.tenant), *_drawn(search_id))
            .order_by(PointRow.train_flops, PointRow.loss, TrialRow.id)
        )
        parts = [query]
        if at is not None:
            key = tuple_(PointRow.trial_id, PointRow.step)
            # the first and the last trial: SQLite looks for pairs in all points that are left
            parts = [
                query.where(key.in_(part), TrialRow.id.between(part[0][0], part[-1][0]))
                for part in pieces(sorted(at))
            ]
        with reading(self.engine) as session:
            if search_id is not None:
                self.row(session, search_id)
            found = [
                point
                for part in parts
                for point in rows.to_curve_points(session.connection().execute(part))
            ]
        if len(parts) > 1:
            found.sort(key=lambda p: (p.train_flops, p.loss, p.run.trial_id))
        return found

    def cloud(self, search_id: str, axis: str) -> Cloud:
        """The points of `curve_points` of a search as plain columns, for there may be many.

        On an axis of which a run has one value, the ends of completed runs that have it.
        """
        shown = AXES[axis]
        x = getattr(PointRow if shown.along_curve else TrialRow, shown.column)
        query = (
            select(TrialRow.id, PointRow.step, x, PointRow.loss, TrialRow.dense, rows.COMPLETE)
            .join(TrialRow, PointRow.trial_id == TrialRow.id)
            .where(TrialRow.search_id == search_id, *_drawn(search_id))
        )
        if not shown.along_curve:
            ends = (PointRow.step == TrialRow.steps, rows.COMPLETE, x.is_not(None))
            query = query.where(*ends)
        with reading(self.engine) as session:
            self.row(session, search_id)
            # as the driver gives them: numbers need no conversion, and rows of SQLAlchemy's own
            # take twice as long
            found = session.connection().execute(query).cursor.fetchall()
        return np.array(found, dtype=CLOUD)

    def window_losses(self, at: Sequence[tuple[int, int]]) -> list[tuple[float, ...]]:
        """Loss of each validation sample at the given (trial, step) points, in their order."""
        query = select(PointRow.trial_id, PointRow.step, PointRow.window_losses).where(
            tuple_(PointRow.trial_id, PointRow.step).in_(set(at))
        )
        with reading(self.engine) as session:
            found = {(r[0], r[1]): rows.unpack_floats(r[2]) for r in session.execute(query)}
        return [found[key] for key in at]

    def default_fingerprint(self, task: str) -> str | None:
        """Fingerprint of the default data and recipe in the tenant's newest search on them."""
        query = (
            select(SearchRow.task_fingerprint)
            .where(
                SearchRow.tenant == self.tenant,
                SearchRow.task == task,
                SearchRow.data_path.is_(None),
                SearchRow.request["recipe"].as_string().is_(None),
                SearchRow.request["overrides"].as_string().is_(None),
                # a confirmation may run on older data
                SearchRow.request["confirm"].as_string().is_(None),
                # what clients train on is their own
                func.coalesce(SearchRow.request["trainer"].as_string(), "workers") == "workers",
                SearchRow.task_fingerprint.is_not(None),
            )
            .order_by(SearchRow.sequence.desc())
            .limit(1)
        )
        with reading(self.engine) as session:
            return session.scalar(query)

    def task_fingerprints(self, task: str) -> Sequence[tuple[str, int, SearchRequest]]:
        """(fingerprint, number of searches, newest request) of a task's data, newest first."""
        newest = (
            select(func.max(SearchRow.sequence).label("sequence"), func.count().label("searches"))
            .where(
                SearchRow.tenant == self.tenant,
                SearchRow.task == task,
                SearchRow.task_fingerprint.is_not(None),
            )
            .group_by(SearchRow.task_fingerprint)
            .subquery()
        )
        query = (
            select(SearchRow.task_fingerprint, newest.c.searches, SearchRow.request)
            .join(newest, SearchRow.sequence == newest.c.sequence)
            .order_by(SearchRow.sequence.desc())
        )
        with reading(self.engine) as session:
            found = session.execute(query).all()
        return [(str(f), int(n), SearchRequest(**request)) for f, n, request in found]

    def schema_revision(self) -> str | None:
        """The revision of the database's schema."""
        with reading(self.engine) as session:
            return stored_revision(session.connection())


def _of_key(tenant: str, idempotency_key: str) -> Select[SearchRow]:
    return select(SearchRow).where(
        SearchRow.tenant == tenant, SearchRow.idempotency_key == idempotency_key
    )


def _drawn(search_id: str | None) -> tuple[ColumnElement[bool], ...]:
    """Which trials have points in figures and analyses."""
    return ~repeats(search_id), TrialRow.state.in_(("complete", "running", "paused"))
