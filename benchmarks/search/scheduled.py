"""Runs a `Scheduler` of `nas.search.scheduling` on a table, as the workers run it live."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from benchmarks.search.simulation import Clock, Method, Setting, Trace
from benchmarks.search.table import Table
from nas.planning.recipe import Recipe
from nas.planning.request import SearchRequest
from nas.search.propose import Proposal
from nas.search.scheduling import (
    Advance,
    Begin,
    Confirm,
    Curve,
    CurveState,
    End,
    Move,
    Scheduler,
    SearchView,
    Stop,
)

#: Rounds without any training after which a scheduler is taken not to end.
_MOST_IDLE = 3


@dataclass(frozen=True)
class Entries:
    """New candidates of a search on a table: its entries that were not begun.

    It serves as `Propose` of `nas.search.scheduling` and as the pool of the rule `frontier`, whose
    third argument is a seed.
    """

    table: Table
    seed: int

    def proposal(self, entry: int) -> Proposal:
        """An entry as a candidate."""
        plan = self.table.plans[entry]
        return Proposal({"design": plan.design.text, "width": float(plan.width)}, plan)

    def __call__(
        self, count: int, curves: Sequence[Curve], seed: int | None = None
    ) -> list[Proposal]:
        """At most `count` of them by chance; the same for the same curves and seed."""
        begun = {self.table.entry_of(c.plan) for c in curves}
        rng = np.random.default_rng([self.seed, len(begun), 0 if seed is None else seed])
        left = [entry for entry in range(len(self.table)) if entry not in begun]
        if len(left) > count:
            left = rng.choice(left, count, replace=False).tolist()
        return [self.proposal(entry) for entry in left]

    def propose(self, count: int, first: int, curves: Sequence[Curve]) -> list[Proposal]:
        """As `Propose`, for rules that take candidates from a sampler: random ones."""
        return self(count, curves, first)


#: (request, recipe, candidates) → what decides the rounds.
SchedulerFactory = Callable[[SearchRequest, Recipe, Entries], Scheduler]


def scheduled(factory: SchedulerFactory, *, stopping: str, references: bool = False) -> Method:
    """The searches of a scheduler, as a method.

    Parameters
    ----------
    factory
        Makes the scheduler of a search.
    stopping
        Rule that the search's request names.
    references
        Whether the dense entries are trained first, as references, and paid for; without them a
        search of the table has no run that it did not choose.
    """

    def search(setting: Setting) -> Trace:
        table = setting.table
        request = table.request(
            seed=setting.seed, trials=len(table), objective="pareto", stopping=stopping,
            total_train_flops=setting.total,
        )  # fmt: skip
        scheduler = factory(request, table.recipe, Entries(table, setting.seed))
        return run_scheduler(scheduler, setting, references=references)

    return search


@dataclass
class _Run:
    """A candidate or a reference of a simulated search."""

    place: int
    entry: int
    proposal: Proposal | None
    state: CurveState = "paused"
    confirmed: dict[int, float] = field(default_factory=dict)


def run_scheduler(scheduler: Scheduler, setting: Setting, *, references: bool = False) -> Trace:
    """A search of which a scheduler decides every round, up to its end.

    The moves of a round run on the workers in the order in which they were decided.  `Confirm`
    repeats an entry with the table's other seeds, of which there may be fewer than it asks for.

    Raises
    ------
    ValueError
        A move that no search could carry out, more compute than there is, or no end.
    """
    return _Scheduled(scheduler, setting).run(references)


class _Scheduled:
    def __init__(self, scheduler: Scheduler, setting: Setting) -> None:
        self.scheduler, self.setting, self.table = scheduler, setting, setting.table
        self.clock = Clock(setting)
        self.runs: list[_Run] = []
        #: entries that the rule stopped while others went on
        self.stopped: set[int] = set()
        #: what is trained in a round: (run, level)
        self.work: list[tuple[_Run, int]] = []

    def run(self, references: bool) -> Trace:
        if references:
            for entry, plan in enumerate(self.table.plans):
                if plan.dense:
                    self._begin(None, entry, self.table.levels - 1)
            self._train()
        idle = 0
        while moves := self.scheduler.next_round(self._view()):
            before = self.clock.committed
            for move in moves:
                self._do(move)
            self._train()
            if self.clock.committed > before:
                # not those that are closed when nothing goes on
                stops = (m.place for m in moves if isinstance(m, Stop))
                self.stopped.update(self.runs[place].entry for place in stops)
            idle = 0 if self.clock.committed > before else idle + 1
            if idle == _MOST_IDLE:
                raise ValueError(f"{idle} rounds without training; the last was {moves[:3]}")
        confirmed = {r.entry: len(r.confirmed) for r in self.runs if r.confirmed}
        return self.clock.trace(frozenset(self.stopped), confirmed)

    def _do(self, move: Move) -> None:
        if isinstance(move, Begin):
            entry = self.table.entry_of(move.proposal.plan)
            if any(r.entry == entry and r.proposal for r in self.runs):
                raise ValueError(f"entry {entry} was begun before")
            self._begin(move.proposal, entry, self.table.level_of(entry, move.until))
            return
        run = self.runs[move.place]
        wanted = "complete" if isinstance(move, Confirm) else "paused"
        if run.state != wanted:
            raise ValueError(f"{move} of a run that is {run.state}")
        if isinstance(move, Advance):
            self.work.append((run, self.table.level_of(run.entry, move.until)))
        elif isinstance(move, Stop):
            run.state = "stopped"
        elif isinstance(move, End):
            run.state = "complete"
        else:
            own = self.setting.seed_index
            fresh = [s for s in range(self.table.seeds) if s != own and s not in run.confirmed]
            for seed in fresh[: move.seeds]:
                self.clock.confirm(run.entry, seed)
                run.confirmed[seed] = float(self.table.loss[run.entry, seed, -1])

    def _begin(self, proposal: Proposal | None, entry: int, level: int) -> None:
        run = _Run(len(self.runs), entry, proposal)
        self.runs.append(run)
        self.work.append((run, level))

    def _train(self) -> None:
        last = self.table.levels - 1
        for run, level in self.work:
            self.clock.begin(run.entry, level)
            if level == last:
                run.state = "complete"
        if self.clock.committed > self.setting.total * (1 + 1e-9):
            raise ValueError(f"{self.clock.committed:.4g} of {self.setting.total:.4g} train FLOPs")
        self.clock.drain()
        self.work.clear()

    def _view(self) -> SearchView:
        begun = sum(r.proposal is not None for r in self.runs)
        return SearchView(
            curves=[self._curve(run) for run in self.runs],
            spent=self.clock.committed,
            total=self.setting.total,
            left=len(self.table) - begun,
            slots=self.setting.workers,
        )

    def _curve(self, run: _Run) -> Curve:
        table, level = self.table, self.clock.reached[run.entry]
        return Curve(
            place=run.place,
            plan=table.plans[run.entry],
            reference=run.proposal is None,
            state=run.state,
            points=tuple(
                (float(table.flops[run.entry, at]), self.clock.loss(run.entry, at))
                for at in range(int(table.first[run.entry]), level + 1)
            ),
            step=int(table.steps[run.entry, level]),
            params=None if run.proposal is None else run.proposal.params,
            confirmed=dict(run.confirmed),
        )
