"""One claimed search: decides which trials are next, and stores the results.

It does not depend on Ray.  Every method that writes does so under the lease, so it raises
`LeaseLost` once another worker has claimed the search.
"""

from __future__ import annotations

import gc
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, TypeVar

from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_random_exponential

from nas import tracing
from nas.errors import EinsumNasError, StoreUnavailable
from nas.planning.recipe import Recipe
from nas.planning.request import MAX_TRIALS, Confirm
from nas.planning.runs import RunPlan, plan_of_steps, references
from nas.records.trial import TrialState
from nas.search.scheduling import Scheduler
from nas.store import (
    Lease,
    Leases,
    MeasuredCost,
    Renewal,
    Round,
    Search,
    Store,
    StoredPoint,
    Trial,
    TrialDraft,
    TrialFailure,
)
from nas.store.progress import TrialProgress, read_points, read_progress, told
from nas.store.records import DUE
from nas.training.replicates import pay
from workers.packs import Pack, each_apart, pack_key, run_key
from workers.progress import Progress, Proposals
from workers.reasons import grouped
from workers.rounds import Planner, view_of
from workers.traces import OpenSpans, about_trial

T = TypeVar("T")
_STATE = "einsum_nas.trial.state"


@dataclass
class Signals:
    """Events by which the heartbeat thread tells the run to stop, and why."""

    cancel: threading.Event = field(default_factory=threading.Event)
    pause: threading.Event = field(default_factory=threading.Event)
    #: the search has been held for as long as its limits allow
    overtime: threading.Event = field(default_factory=threading.Event)
    lost: threading.Event = field(default_factory=threading.Event)
    shutdown: threading.Event = field(default_factory=threading.Event)

    def hear(self, renewal: Renewal) -> None:
        """Pass on what a renewal said."""
        for name in ("cancel", "pause", "overtime"):
            if getattr(renewal, name):
                getattr(self, name).set()

    @property
    def hand_back(self) -> bool:
        """Whether the search is to be queued again or paused, to be continued later."""
        return (self.shutdown.is_set() or self.pause.is_set()) and not self.cancel.is_set()

    @property
    def stop(self) -> bool:
        """Whether the run should end now."""
        return any(getattr(self, signal.name).is_set() for signal in fields(self))


@contextmanager
def _without_collections() -> Iterator[None]:
    """No garbage collections: of what is read at once and kept, they take half of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class SearchSession:
    """Hands out the trials of one search in order and stores what comes back.

    A candidate or reference has `request.replicates` trials, numbered one after another.  What is
    confirmed has as many as there are seeds.

    Parameters
    ----------
    recipe
        The recipe of the search, as its data completes it.
    fingerprint
        Fingerprint of the task: the data that the trials will train on, and the recipe.
    scheduler
        Decides which runs begin, go on and are stopped; without one every run trains to its end.
    """

    def __init__(
        self,
        store: Store,
        lease: Lease,
        search: Search,
        recipe: Recipe,
        fingerprint: str,
        signals: Signals,
        *,
        leases: Leases | None = None,
        scheduler: Scheduler | None = None,
    ) -> None:
        self.search, self.request, self.signals = search, search.request, signals
        self.recipe, self.fingerprint = recipe, fingerprint
        self._store, self._lease = store, lease
        self._leases = leases or Leases(store)
        self._device, self._slots = "cpu", 1
        self._waiting: deque[Pack] = deque()
        #: key → trials that equal the running one and will share its result
        self._twins: dict[str, list[Trial]] = {}
        self._running: dict[int, Trial] = {}
        #: of the trials that run, by id
        self.spans: OpenSpans[int] = OpenSpans()
        self._progress = Progress(self.request)
        self._proposals = Proposals(self.request, recipe)
        self._scheduler, self._rounds, self._decided_all = scheduler, search.rounds, False
        self._planner = Planner(self._progress, self.request, self._key, self._used_seeds)
        self._claimed_at = time.monotonic()
        #: losses of runs whose weights have reached the store
        self._kept: list[float] = []
        #: trials that others have gone on with meanwhile, which are not started anew, with what is
        #: stored of them
        self.adopted: Mapping[int, dict[int, tuple[float, float, float, float]]] = {}
        #: told the key of a pack that never goes on
        self.forget: Callable[[str], None] = lambda key: None

    def _used_seeds(self, model: str) -> set[int]:
        store = self._store.view(self.search.tenant)
        return self._sql(store.seeds_of_models, {model})

    def _sql(self, write: Callable[..., T], *args: Any, **named: Any) -> T:
        """Retry while the database is unavailable; the watchdog ends the process if that lasts."""
        retrying = Retrying(
            retry=retry_if_exception_type(StoreUnavailable),
            wait=wait_random_exponential(multiplier=0.1, max=2.0),
            stop=stop_after_delay(self._lease.seconds),
            reraise=True,
        )
        return retrying(write, *args, **named)

    def prepare(self, device: str = "cpu", slots: int = 1) -> int:
        """Plan the references and queue unfinished trials; return how many may still start.

        Parameters
        ----------
        device
            Kind of device on which they will train: cpu | cuda.
        slots
            How many train at once.
        """
        self._device, self._slots = device, slots
        with _without_collections():
            return self._prepare()

    def _prepare(self) -> int:
        stored = self._sql(read_progress, self._store, self.search.id)
        if self._scheduler is not None:
            points = self._sql(read_points, self._store, self.search.id)
            for trial in stored:
                trial.points = points.get(trial.id, {})
        self._progress.add(stored)
        due = self._sql(self._store.trials, self.search.id, states=DUE) if stored else []
        numbers = {t.number for t in stored}
        if self.request.confirm is not None:
            due += self._prepare_confirmation(self.request.confirm, numbers)
        else:
            due += self._prepare_references(numbers)
            due += self._prepare_given(numbers)
        self._waiting.extend(self._packs(due))
        if self._scheduler is None:
            return len(due) + self._unproposed * self.request.replicates
        if not self._waiting:
            self._waiting.extend(self._next_round())
        # how many runs and slices there will be is not known yet
        return MAX_TRIALS * self.recipe.evaluations if self._waiting else 0

    def _prepare_references(self, planned: set[int]) -> list[Trial]:
        plans = references(self.recipe, self.request.train_flops, self.request.references)
        return [
            trial
            for place, plan in enumerate(plans)
            if place * self.request.replicates not in planned
            for trial in self._add(plan, kind="reference")
        ]

    def _prepare_given(self, planned: set[int]) -> list[Trial]:
        if self.request.candidates is None:
            return []
        plans = self.request.given_plans(self.recipe)
        return [
            trial
            for place, plan in enumerate(plans, self._progress.references)
            if place * self.request.replicates not in planned
            for trial in self._add(plan, kind="candidate")
        ]

    def _prepare_confirmation(self, confirm: Confirm, planned: set[int]) -> list[Trial]:
        """Plan every run with the first seed, then every run with the second, and so on, so that a
        search that ends early has confirmed all runs with about as many seeds, unless the seeds of
        a run train together."""
        pairs = [(seed, run) for seed in confirm.seeds for run in confirm.runs]
        added: list[Trial] = []
        for number, (seed, run) in enumerate(pairs):
            if number not in planned:
                plan = plan_of_steps(self.recipe, run.as_design, run.width, run.steps)
                kind = "confirmation"
                added += self._add(plan, kind=kind, seed=seed, confirms=run.trial_id)
        return added

    def _packs(self, due: Sequence[Trial]) -> list[Pack]:
        """How trials are to run, in their order: those that differ in their seed alone together,
        where that takes less time."""
        found: dict[str, Pack] = {}
        for trial in sorted(due, key=lambda t: t.number):
            keys = self._progress.together(trial)
            together = self.recipe.ranks == 1 and pay(RunPlan.of(trial), self._device)
            apart = len(keys) == 1 or not together
            key = trial.key if apart else pack_key(keys)
            # the runs of a pack train as far, and equal runs of a search are apart
            named = f"{key} {trial.until_step} {trial.number if apart else None}"
            before = found[named].trials if named in found else ()
            found[named] = Pack((*before, trial), key)
        return list(found.values())

    @property
    def _unproposed(self) -> int:
        """Candidates that may still begin; none for a confirmation."""
        return 0 if self.request.confirm is not None else self.request.trials - self._progress.begun

    def _add(
        self, plan: RunPlan, *, kind: Any, seed: int | None = None,
        sampler_state: Mapping[str, Any] | None = None, **proposed: Any,
    ) -> list[Trial]:  # fmt: skip
        """Store the trials of a candidate, reference or confirmation: all of them, or none."""
        number = self._progress.next_number
        return self._store_all(self._drafts(plan, number, kind, seed, sampler_state, **proposed))

    def _store_all(self, drafts: Sequence[TrialDraft]) -> list[Trial]:
        added = self._sql(self._leases.add_trials, self._lease, drafts)
        self._progress.add(TrialProgress.of(trial) for trial in added)
        return added

    def _drafts(
        self, plan: RunPlan, number: int, kind: Any, seed: int | None = None,
        sampler_state: Mapping[str, Any] | None = None, **proposed: Any,
    ) -> list[TrialDraft]:  # fmt: skip
        """The trials of a candidate, reference or confirmation, numbered from `number` on."""
        seed, count = self.request.seed if seed is None else seed, self.request.replicates
        first = TrialDraft(
            number, kind, plan, seed, self._key(plan, seed), plan.name,
            sampler_state=sampler_state, **proposed,
        )  # fmt: skip
        others = [
            replace(
                first, number=first.number + i, seed=seed + i, key=self._key(plan, seed + i),
                sampler_state=None,
            )
            for i in range(1, count)
        ]  # fmt: skip
        return [first, *others]

    def _key(self, plan: RunPlan, seed: int) -> str:
        return run_key(self.recipe, self.fingerprint, plan, seed)

    def next_pack(self) -> Pack | None:
        """The next trials to run, stored as running; None if none can start now."""
        while not self.signals.stop:
            if not self._waiting:
                propose = self._propose if self._scheduler is None else self._next_round
                self._waiting.extend(propose())
            if not self._waiting:
                return None
            pack = self._waiting.popleft()
            due = tuple(t for t in pack.trials if self._is_due(t))
            for trial in due:
                self._start(trial)
            if due:
                return replace(pack, trials=due)
        return None

    def _start(self, trial: Trial) -> None:
        adopted = trial.id in self.adopted
        start = self._leases.adopt_trial if adopted else self._leases.start_trial
        self._sql(start, self._lease, trial.id)
        self._twins[trial.key] = []
        self._running[trial.id] = trial
        self._begin_span(trial)
        known = self._progress[trial.id]
        kept = known.trained_steps
        known.points = {step: p for step, p in known.points.items() if step <= kept}
        if adopted:
            known.points = dict(self.adopted[trial.id])
        self._progress.set_state(trial.id, "running")

    def _begin_span(self, trial: Trial) -> None:
        self.spans.begin(trial.id, "trial", about_trial(trial, self.request.sampler))

    def _is_due(self, trial: Trial) -> bool:
        """Whether a trial has to run: no equal one is running or has a result."""
        if trial.id in self.adopted:
            return True
        if trial.key in self._twins:
            self._twins[trial.key].append(trial)
            return False
        if not self._sql(self._leases.reuse_result, self._lease, trial.id):
            return True
        twin = self._sql(self._store.trial, trial.id)
        points = self._sql(self._store.curve, trial.id) if self._scheduler is not None else ()
        self._progress.shared(trial.id, twin, points)
        self._begin_span(trial)
        shared = {_STATE: twin.state, "einsum_nas.trial.reused_from": twin.reused_from}
        self.spans.end(trial.id, shared)
        return False

    def restart(self, trial_id: int) -> None:
        """Begin a running trial anew, for its process is gone."""
        self._sql(self._leases.start_trial, self._lease, trial_id, anew=True)
        self._progress[trial_id].points = {}
        self.spans.event(trial_id, "started anew", {})

    @property
    def due(self) -> set[int]:
        """Ids of the trials that are to train now."""
        return {trial.id for trial in self._progress if trial.state in DUE}

    @property
    def running(self) -> Mapping[int, Trial]:
        """The trials that run, by id."""
        return self._running

    def unfinished(self, pack: Pack) -> tuple[Trial, ...]:
        """Those of a pack that still run."""
        return tuple(t for t in pack.trials if t.id in self._running)

    @property
    def exhausted(self) -> bool:
        """Whether no further trial will ever start: one that runs may have to start again."""
        return self.signals.stop or (not self._waiting and not self._running and self._planned_all)

    @property
    def _planned_all(self) -> bool:
        if self._scheduler is not None:
            return self._decided_all
        return self._unproposed <= 0 or self._flops_reached is not None

    @property
    def _flops_reached(self) -> str | None:
        """The limit on the FLOPs of all runs, where one more candidate could exceed it."""
        if self._affordable >= 1:
            return None
        assert self.request.limits is not None
        return f"total_train_flops {self.request.limits.total_train_flops:.6g}"

    @property
    def _affordable(self) -> float:
        """Candidates that can be begun within the limit on the FLOPs of all runs."""
        limits = self.request.limits
        if limits is None or limits.total_train_flops is None:
            return math.inf
        left = limits.total_train_flops - self._progress.planned_flops
        return left / (self.request.train_flops * self.request.replicates)

    def _propose(self) -> list[Pack]:
        """The runs of more candidates; none if there are to be none.

        Many are stored at once: a search that is interrupted goes on with all of them, so that it
        proposes what it would have proposed.
        """
        if self._planned_all:
            return []
        most = int(min(self._unproposed, self._affordable))
        number, unseen = self._progress.next_number, self._progress.unseen()
        packs: list[list[TrialDraft]] = []
        with tracing.span("propose", {"einsum_nas.search.id": self.search.id}) as span:
            proposed = self._proposals.next(self._progress, self._is_known, most)
            span.set({"einsum_nas.sampler": self.request.sampler})
            span.set({"einsum_nas.candidates": len(proposed)})
        for found in proposed:
            drafts = self._drafts(
                found.plan, number, "candidate", sampler_state=found.sampler_state,
                params=found.params, unseen=unseen,
            )  # fmt: skip
            number, unseen = number + len(drafts), (*unseen, *(d.number for d in drafts))
            packs.append(drafts)
        added = iter(self._store_all([draft for drafts in packs for draft in drafts]))
        return [p for drafts in packs for p in self._packs([next(added) for _ in drafts])]

    def _is_known(self, plan: RunPlan) -> bool:
        return self._key(plan, self.request.seed) in self._progress.keys

    def _next_round(self) -> list[Pack]:
        """The runs of the next round; none while one is in flight, or where the search ends."""
        assert self._scheduler is not None
        packs: list[Pack] = []
        while not (packs or self._running or self._decided_all or self.signals.stop):
            view = view_of(
                self._progress, self.request, slots=self._slots, held_seconds=self._held_seconds,
                left=int(min(self._unproposed, self._affordable)),
            )  # fmt: skip
            about = {
                "einsum_nas.search.id": self.search.id, "einsum_nas.round": self._rounds + 1,
                "einsum_nas.sampler": self.request.sampler,
            }  # fmt: skip
            with tracing.span("round", about) as span:
                moves = self._scheduler.next_round(view)
                round_ = self._planner.round_of(self._rounds + 1, moves)
                span.set({"einsum_nas.moves": round_.moves})
            self._decided_all = not moves
            if round_.moves:
                packs = self._packs(self._begin(round_))
            elif moves:
                raise EinsumNasError(f"the stopping rule asks for nothing by {moves}")
        return packs

    @property
    def _held_seconds(self) -> float:
        """Time for which workers have held the search."""
        return self.search.held_seconds + time.monotonic() - self._claimed_at

    def _begin(self, round_: Round) -> list[Trial]:
        """Store a round; the trials that are to train in it."""
        due = self._sql(self._leases.begin_round, self._lease, round_)
        self._rounds = round_.number
        for trial_id in (*round_.stopped, *round_.ended):
            ended = self._progress[trial_id]
            # it was trained alone or with others
            for state in {ended.key, pack_key(self._progress.together(ended))}:
                self.forget(state)
        for trial_id, key in round_.ended.items():
            self._progress.end_here(trial_id, key)
        for trial_id in round_.stopped:
            self._progress.stop(trial_id)
        for trial in due:
            if trial.id in round_.advanced:
                self._progress[trial.id].until_step = trial.until_step
                self._progress.set_state(trial.id, "planned")
        begun = (trial for trial in due if trial.id not in round_.advanced)
        self._progress.add(TrialProgress.of(trial) for trial in begun)
        return due

    def point(self, trial_id: int, point: StoredPoint) -> None:
        """`points` of one."""
        self.points([(trial_id, point)])

    def points(self, found: Sequence[tuple[int, StoredPoint]]) -> None:
        """Store evaluations of running trials; what is stored already is passed over."""
        new = [(i, p) for i, p in found if self._progress[i].points.get(p.step) != told(p)]
        if new:
            self._sql(self._leases.add_points, self._lease, new)
        for i, point in new:
            self._progress[i].points[point.step] = told(point)

    @property
    def keeps(self) -> tuple[bool, float | None]:
        """Whether a run that ends could keep its weights, and below which loss; None for any.

        It spares runs that others have beaten the way of their weights; the store decides.
        """
        count, losses = self.request.keep_weights, sorted(self._kept)
        return count > 0, losses[count - 1] if 0 < count <= len(losses) else None

    def complete(
        self,
        trial_id: int,
        environment: Mapping[str, Any],
        cost: MeasuredCost | None = None,
        weights: bytes | str | None = None,
    ) -> TrialState:
        """End a trial that reached its last step, and give its result to its twins; one that
        reached the last step of its slice is paused.  Return its state.

        Parameters
        ----------
        weights
            As of `Leases.complete_trial`.
        """
        trial = self._progress[trial_id]
        paused = trial.until_step is not None
        if paused:
            self._sql(self._leases.pause_trial, self._lease, trial_id, environment, cost)
        else:
            self._sql(
                self._leases.complete_trial, self._lease, trial_id, environment, cost, weights
            )
        trial.trained_steps = trial.until_step or trial.steps
        if not paused:
            trial.loss = trial.points[trial.steps][1]
            self._kept += [trial.loss] if isinstance(weights, bytes) else []
        self._settle(trial_id, "paused" if paused else "complete")
        return "paused" if paused else "complete"

    def fail(self, trial_id: int, reason: str, failure: TrialFailure = "run") -> None:
        """End a trial without a result; a waiting twin gets its own run."""
        self._sql(self._leases.fail_trial, self._lease, trial_id, reason, failure)
        trial = self._progress[trial_id]
        trial.failure, trial.trained_steps = failure, max(trial.points, default=0)
        self._settle(trial_id, "failed")

    def retry(self, pack: Pack, *, apart: bool = False) -> None:
        """Queue what is unfinished of a pack whose process died; it is the next one.

        Parameters
        ----------
        apart
            Each run by itself.
        """
        left = self.unfinished(pack)
        for trial in left:
            self._settle(trial.id, "planned")
        packs = each_apart(left) if apart else [replace(pack, trials=left)] if left else []
        self._waiting.extendleft(reversed(packs))

    def _settle(self, trial_id: int, state: TrialState) -> None:
        trial = self._running.pop(trial_id)
        self._progress.set_state(trial_id, state)
        # back to planned: its process has died
        failure = self._progress[trial_id].failure if state == "failed" else None
        died = "process" if state == "planned" else None
        self.spans.end(trial_id, {_STATE: state}, failure or died)
        if self._scheduler is None:
            self._progress[trial_id].points = {}  # nobody asks for them again
        # back to the queue: `next_pack` finds the result there, or runs the twin itself
        self._waiting.extendleft(reversed(each_apart(self._twins.pop(trial.key))))

    def hand_back(self) -> None:
        """Queue or pause the search, to be continued later; this counts as no failure."""
        self._sql(self._leases.hand_back, self._lease)

    def requeue(self, why: str) -> None:
        """Queue the search again after an infrastructure error, without retrying the write."""
        self._leases.requeue(self._lease, why)

    def finish(self) -> None:
        """End the search: cancelled if requested, else succeeded or failed, by its trials."""
        if self.signals.cancel.is_set():
            self._sql(self._leases.release, self._lease, "cancelled")
            return
        unfinished = sorted(t.number for t in self._progress if t.state in DUE)
        missing = self._missing
        reached = None
        if unfinished or missing:
            reached = self._limit_reached(unfinished=bool(unfinished))
            if reached is None:
                left = f"trials {unfinished} unfinished, {missing or 0} not proposed"
                raise EinsumNasError(f"the runner ended early: {left}")
        release = partial(self._leases.release, limit_reached=reached)
        if any(t.state == "complete" and t.kind != "reference" for t in self._progress):
            self._sql(release, self._lease, "succeeded")
        else:
            failed = self._sql(self._store.trials, self.search.id, states=("failed", "stopped"))
            reasons = grouped(t.error for t in failed if t.error)
            reasons += [reached] if reached else []
            why = f"no candidate completed: {'; '.join(reasons)}"
            failure = "limit" if reached else "trials"
            self._sql(release, self._lease, "failed", why, failure=failure)

    @property
    def _missing(self) -> int:
        """Candidates that the search has still to begin, as far as that is known."""
        if self._scheduler is None:
            return max(self._unproposed, 0)
        return 0 if self._decided_all and self._affordable >= 1 else self._unproposed

    def _limit_reached(self, *, unfinished: bool) -> str | None:
        """The limit that explains why the search ends before its last trial."""
        if self.signals.overtime.is_set() and self.request.limits is not None:
            return f"seconds {self.request.limits.seconds:.6g}"
        # the limit on FLOPs only prevents proposals, so it does not explain unfinished trials
        return None if unfinished else self._flops_reached
