"""Reads what answers are computed from: the fronts, the runs near them, and their curves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from sqlalchemy import func, or_, select, tuple_

from nas.records.device import device_of
from nas.records.run import CurvePoint, Run
from nas.store import rows
from nas.store.engine import pieces, reading, translated
from nas.store.fronts import KEPT_MODELS, standing_at
from nas.store.records import ConfirmedPair, DeviceState, ScopeState
from nas.store.schema import PointRow, ScopeRow, SearchRow, StandingRow, TrialRow
from nas.store.scopes import evidence_in, within_scope
from nas.store.searches import CLOUD, Cloud, Store
from nas.store.selecting import columns_of, curves_of


class Standings:
    """Reads what answers are computed from: the fronts, the runs near them, and their curves."""

    def __init__(self, store: Store) -> None:
        self._engine = store.engine
        self._plain = store.engine.execution_options(isolation_level="AUTOCOMMIT")

    def state(self, scope: str) -> ScopeState | None:
        """Counts of a scope; None if no run has completed in it."""
        return self.states([scope]).get(scope)

    def states(self, scopes: Sequence[str]) -> dict[str, ScopeState]:
        """Scope → counts, for those of the scopes in which a run has completed."""
        columns = columns_of(ScopeState, ScopeRow)
        query = select(ScopeRow.scope, *columns).where(ScopeRow.scope.in_(scopes))
        with reading(self._engine) as session:
            return {scope: ScopeState(*own) for scope, *own in session.execute(query)}

    def lowest_losses(self, scopes: Sequence[str]) -> dict[tuple[str, bool], float]:
        """(scope, whether dense) → the lowest measured loss of its completed runs."""
        query = (
            select(StandingRow.scope, StandingRow.dense, func.min(StandingRow.loss))
            .where(StandingRow.scope.in_(scopes), StandingRow.axis == "train_flops")
            .group_by(StandingRow.scope, StandingRow.dense)
        )
        with reading(self._engine) as session:
            return {(scope, bool(dense)): loss for scope, dense, loss in session.execute(query)}

    def revisions(self, scopes: Iterable[str]) -> dict[str, int]:
        """Scope → revision, for those of the scopes and bare task names that have one.

        A revision grows with every change of the runs that answers about the scope are computed
        from; that of a bare name also when the name begins to mean other data.  The read is one
        statement without a transaction.
        """
        query = select(ScopeRow.scope, ScopeRow.revision).where(ScopeRow.scope.in_(list(scopes)))
        with translated(), self._plain.connect() as connection:
            return {scope: int(revision) for scope, revision in connection.execute(query)}

    def devices(self, scope: str) -> list[DeviceState]:
        """The devices that runs of a scope were measured on, that with the most runs first."""
        within = within_scope(scope)
        one_of = (
            select(func.min(StandingRow.trial_id))
            .where(StandingRow.scope == ScopeRow.scope)
            .correlate(ScopeRow)
            .scalar_subquery()
        )
        query = (
            select(ScopeRow.scope, ScopeRow.trials, TrialRow.environment)
            .join(TrialRow, TrialRow.id == one_of)
            .where(func.substr(ScopeRow.scope, 1, len(within)) == within)  # LIKE ignores case
        )
        with reading(self._engine) as session:
            rows_found = session.execute(query).all()
        named = [(device_of(ran), name, trials) for name, trials, ran in rows_found]
        found = [DeviceState(device, name, trials) for device, name, trials in named if device]
        return sorted(found, key=lambda d: (-d.trials, d.name))

    def trials_on(self, search_id: str, device: str) -> set[int]:
        """The trials of a search that ran on a device."""
        query = select(TrialRow.id, TrialRow.environment).where(
            TrialRow.search_id == search_id, TrialRow.environment.is_not(None)
        )
        with reading(self._engine) as session:
            return {t for t, ran in session.execute(query) if device_of(ran) == device}

    def front(self, scope: str, axis: str, *, dense: bool) -> list[CurvePoint]:
        """The Pareto front of a scope, in the order of the axis."""
        order = (StandingRow.x, StandingRow.loss, StandingRow.trial_id, StandingRow.step)
        lowest_before = func.min(StandingRow.loss).over(order_by=order, rows=(None, -1))
        ranked = (
            select(StandingRow, lowest_before.label("before"))
            .where(standing_at(scope, axis, dense))
            .subquery()
        )
        first = (
            select(ranked.c.trial_id, ranked.c.step)
            .where(or_(ranked.c.before.is_(None), ranked.c.loss < ranked.c.before))
            .order_by(ranked.c.x)
        )
        with reading(self._engine) as session:
            keys = [(int(trial), int(step)) for trial, step in session.execute(first)]
        found = {(p.run.trial_id, p.step): p for p in self._curve_points(keys)}
        # a stored loss that is not finite belongs to no front, however it got there
        return [found[key] for key in keys if math.isfinite(found[key].loss)]

    def cloud(self, scope: str, axis: str) -> Cloud:
        """The points near the fronts: those that fewer than `KEPT_MODELS` other models beat.

        However many runs a scope has, these are few.
        """
        names = ("trial_id", "step", "x", "loss", "dense")
        columns = [getattr(StandingRow, name) for name in names]
        query = select(*columns).where(StandingRow.scope == scope, StandingRow.axis == axis)
        with reading(self._engine) as session:
            found = session.execute(query).all()
        return np.array([(*row, True) for row in found], dtype=CLOUD)

    def lowest(self, scope: str, axis: str, limit: float, *, dense: bool) -> list[int]:
        """A trial of each of the `KEPT_MODELS` models with the lowest losses within a limit."""
        best = func.min(StandingRow.loss)
        query = (
            select(func.min(StandingRow.trial_id))
            .where(standing_at(scope, axis, dense), StandingRow.x <= limit)
            .group_by(StandingRow.model)
            .order_by(best, func.min(StandingRow.trial_id))
            .limit(KEPT_MODELS)
        )
        with reading(self._engine) as session:
            return list(session.scalars(query))

    def least(self, scope: str, axis: str) -> float | None:
        """The smallest value of an axis among completed runs; None if there is none."""
        query = select(func.min(StandingRow.x)).where(
            StandingRow.scope == scope, StandingRow.axis == axis
        )
        with reading(self._engine) as session:
            return session.scalar(query)

    def _curve_points(self, keys: Sequence[tuple[int, int]]) -> Iterable[CurvePoint]:
        with reading(self._engine) as session:
            for part in pieces(keys):
                query = (
                    select(*rows.RUN, *rows.POINT, rows.COMPLETE)
                    .join(TrialRow, PointRow.trial_id == TrialRow.id)
                    .where(tuple_(PointRow.trial_id, PointRow.step).in_(part))
                )
                yield from rows.to_curve_points(session.execute(query))

    def runs(
        self,
        scope: str,
        *,
        trials: Iterable[int] = (),
        models: Iterable[str] = (),
    ) -> list[Run]:
        """Completed runs of a scope with their curves: those named, and all of the given models.

        Of runs that share one result, only the one that was executed is included.
        """
        query = (
            select(*rows.RUN, TrialRow.environment)
            .join(SearchRow, TrialRow.search_id == SearchRow.id)
            .where(TrialRow.state == "complete", *evidence_in(scope))
        )
        wanted: tuple[tuple[Any, set[Any]], ...] = (
            (TrialRow.id, set(trials)), (TrialRow.model, set(models))
        )  # fmt: skip
        found: dict[int, Any] = {}
        with reading(self._engine) as session:
            for column, values in wanted:
                for part in pieces(sorted(values)):
                    of_part = session.execute(query.where(column.in_(part)))
                    found.update((row.trial_id, row) for row in of_part)
            curves = curves_of(session, found)
        return [
            rows.to_run(row, curves.get(trial, ()), environment=row.environment)
            for trial, row in sorted(found.items())
        ]

    def models_of(self, scope: str) -> list[str]:
        """Every model that a completed run of a scope has, in the order of their first runs."""
        query = (
            select(TrialRow.model)
            .join(SearchRow, TrialRow.search_id == SearchRow.id)
            .where(TrialRow.state == "complete", *evidence_in(scope), TrialRow.model.is_not(None))
            .group_by(TrialRow.model)
            .order_by(func.min(TrialRow.id))
        )
        with reading(self._engine) as session:
            return [str(m) for m in session.scalars(query)]

    def models(self, trials: Iterable[int]) -> set[str]:
        """The models of the given trials."""
        found: set[str] = set()
        with reading(self._engine) as session:
            for part in pieces(sorted(set(trials))):
                query = select(TrialRow.model).where(
                    TrialRow.id.in_(part), TrialRow.model.is_not(None)
                )
                found.update(str(m) for m in session.scalars(query))
        return found

    def confirmed(self, scope: str) -> list[ConfirmedPair]:
        """Every run of a scope that was confirmed, with the results of its confirmations.

        For a search these are the runs that it confirms, and its own runs that others confirmed.
        """
        source = TrialRow.__table__.alias("source")
        either = or_(TrialRow.search_id == scope, source.c.search_id == scope)
        run = [source.c[n] for n in ("id", "search_id", "train_flops", "dense")]
        longer = TrialRow.train_flops / source.c.train_flops
        replicate = TrialRow.__table__.alias("replicate")
        alike = [source.c[n] for n in ("search_id", "model", "steps")]
        mean = (
            select(func.avg(replicate.c.loss))
            .where(replicate.c.state == "complete", replicate.c.confirms.is_(None))
            .where(*(replicate.c[column.name] == column for column in alike))
            .scalar_subquery()
        )
        proxy = func.coalesce(mean, source.c.loss)  # older runs do not say of what model they are
        ran = [func.avg(TrialRow.loss), func.count(TrialRow.seed.distinct())]
        query: Any = (
            select(*run, proxy, *ran, longer)
            .join(SearchRow, TrialRow.search_id == SearchRow.id)
            .join(source, source.c.id == TrialRow.confirms)
            .where(TrialRow.state == "complete", source.c.state == "complete")
            .where(TrialRow.confirms.is_not(None), TrialRow.reused_from.is_(None))
            .where(*(evidence_in(scope) if "@" in scope else [either]))
            .group_by(*run, source.c.loss, *alike, longer)
            .order_by(source.c.id)
        )
        with reading(self._engine) as session:
            return [ConfirmedPair(*row) for row in session.execute(query)]
