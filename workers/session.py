"""One claimed search: decides which trials are next, and stores the results.

It does not depend on Ray.  Every method that writes does so under the lease, so it raises
`LeaseLost` once another worker has claimed the search.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from statistics import fmean
from typing import Any, TypeVar

from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_random_exponential

from nas.errors import EinsumNasError, StoreUnavailable, counted
from nas.planning.recipe import Recipe
from nas.planning.request import Confirm, SearchRequest
from nas.planning.runs import RunPlan, plan_of_steps, references
from nas.search import PastTrial, propose
from nas.store import (
    Lease,
    Leases,
    MeasuredCost,
    Renewal,
    Search,
    Store,
    StoredPoint,
    Trial,
    TrialDraft,
    TrialFailure,
)
from nas.store.records import UNFINISHED
from nas.training.replicates import pay

T = TypeVar("T")


def run_key(recipe: Recipe, fingerprint: str, plan: RunPlan, seed: int) -> str:
    """Digest of everything that decides a run's result: equal keys, equal curves."""
    decides = {
        "task": [recipe.task, fingerprint],
        "recipe": recipe.as_dict(),
        "depth": plan.depth,
        "width": plan.width,
        "steps": plan.steps,
        "structures": plan.structures,
        "seed": seed,
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


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


@dataclass(frozen=True, slots=True)
class Pack:
    """Trials that one process trains together: runs of one plan, each with a seed of its own."""

    trials: tuple[Trial, ...]
    #: names the state that is kept of them; the same whichever of the planned runs are left
    key: str

    def of(self, seed: int) -> Trial:
        """The trial with a seed."""
        return next(t for t in self.trials if t.seed == seed)


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
    ) -> None:
        self.search, self.request, self.signals = search, search.request, signals
        self.recipe, self.fingerprint = recipe, fingerprint
        self._store, self._lease = store, lease
        self._leases = leases or Leases(store)
        self._device = "cpu"
        self._waiting: deque[Pack] = deque()
        #: key → trials that equal the running one and will share its result
        self._twins: dict[str, list[Trial]] = {}
        self._running: dict[int, Trial] = {}
        #: looked up no more: Tune asks for trials many times a second
        self._proposed_all = False

    def _sql(self, write: Callable[..., T], *args: Any, **named: Any) -> T:
        """Retry while the database is unavailable; the watchdog ends the process if that lasts."""
        retrying = Retrying(
            retry=retry_if_exception_type(StoreUnavailable),
            wait=wait_random_exponential(multiplier=0.1, max=2.0),
            stop=stop_after_delay(self._lease.seconds),
            reraise=True,
        )
        return retrying(write, *args, **named)

    def prepare(self, device: str = "cpu") -> int:
        """Plan the references and queue unfinished trials; return how many may still start.

        Parameters
        ----------
        device
            Kind of device on which they will train: cpu | cuda.
        """
        self._device = device
        stored = self._sql(self._store.trials, self.search.id)
        numbers = {t.number for t in stored}
        if self.request.confirm is not None:
            self._prepare_confirmation(self.request.confirm, numbers)
        else:
            self._prepare_references(numbers)
        stored = self._sql(self._store.trials, self.search.id)
        packs = (pack for group in self._groups(stored) for pack in self._packs(group))
        self._waiting.extend(sorted(packs, key=lambda pack: pack.trials[0].number))
        left = sum(t.state in UNFINISHED for t in stored)
        return left + self._unproposed(stored) * self.request.replicates

    def _prepare_references(self, planned: set[int]) -> None:
        plans = references(self.recipe, self.request.train_flops, self.request.references)
        for place, plan in enumerate(plans):
            if place * self.request.replicates not in planned:
                self._add(place, plan, kind="reference")
        self._first_candidate = len(plans)

    def _prepare_confirmation(self, confirm: Confirm, planned: set[int]) -> None:
        """Plan every run with the first seed, then every run with the second, and so on, so that a
        search that ends early has confirmed all runs with about as many seeds, unless the seeds of
        a run train together."""
        pairs = [(seed, run) for seed in confirm.seeds for run in confirm.runs]
        for number, (seed, run) in enumerate(pairs):
            if number not in planned:
                plan = plan_of_steps(self.recipe, run.as_design, run.width, run.steps)
                self._add(number, plan, kind="confirmation", seed=seed, confirms=run.trial_id)

    def _groups(self, trials: Iterable[Trial]) -> list[list[Trial]]:
        """The trials of each candidate, reference or confirmed run, which differ in their seed."""
        groups: dict[int, list[Trial]] = {}
        for t in trials:
            of = t.number // self.request.replicates if t.confirms is None else t.confirms
            groups.setdefault(of, []).append(t)
        return list(groups.values())

    def _packs(self, group: Sequence[Trial]) -> list[Pack]:
        """How those of a group that are unfinished are to run; `group` is all that is planned."""
        left = tuple(t for t in group if t.state in UNFINISHED)
        together = self.recipe.ranks == 1 and pay(plan_of_trial(group[0]), self._device)
        if not left or len(group) == 1 or not together:
            return _apart(left)
        keys = "/".join(t.key for t in group)
        return [Pack(left, hashlib.sha256(keys.encode()).hexdigest())]

    def _unproposed(self, stored: Sequence[Trial]) -> int:
        """Candidates that the sampler has still to propose; none for a confirmation."""
        if self.request.confirm is not None:
            return 0
        trials = sum(t.kind == "candidate" for t in stored)
        return self.request.trials - trials // self.request.replicates

    def _add(
        self, place: int, plan: RunPlan, *, kind: Any, seed: int | None = None,
        sampler_state: Mapping[str, Any] | None = None, **proposed: Any,
    ) -> list[Trial]:  # fmt: skip
        """Store the trials of a candidate, reference or confirmation: all of them, or none."""
        seed, count = self.request.seed if seed is None else seed, self.request.replicates
        first = TrialDraft(
            place * count, kind, plan, seed, self._key(plan, seed), plan.name,
            sampler_state=sampler_state, **proposed,
        )  # fmt: skip
        others = [
            replace(
                first, number=first.number + i, seed=seed + i, key=self._key(plan, seed + i),
                sampler_state=None,
            )
            for i in range(1, count)
        ]  # fmt: skip
        return self._sql(self._leases.add_trials, self._lease, [first, *others])

    def _key(self, plan: RunPlan, seed: int) -> str:
        return run_key(self.recipe, self.fingerprint, plan, seed)

    def next_pack(self) -> Pack | None:
        """The next trials to run, stored as running; None if none can start now."""
        while not self.signals.stop:
            if not self._waiting:
                self._waiting.extend(self._propose())
            if not self._waiting:
                return None
            pack = self._waiting.popleft()
            due = tuple(t for t in pack.trials if self._is_due(t))
            for trial in due:
                self._sql(self._leases.start_trial, self._lease, trial.id)
                self._twins[trial.key] = []
                self._running[trial.id] = trial
            if due:
                return replace(pack, trials=due)
        return None

    def _is_due(self, trial: Trial) -> bool:
        """Whether a trial has to run: no equal one is running or has a result."""
        if trial.key in self._twins:
            self._twins[trial.key].append(trial)
            return False
        return not self._sql(self._leases.reuse_result, self._lease, trial.id)

    def unfinished(self, pack: Pack) -> tuple[Trial, ...]:
        """Those of a pack that still run."""
        return tuple(t for t in pack.trials if t.id in self._running)

    @property
    def exhausted(self) -> bool:
        """Whether no further trial will ever start: one that runs may have to start again."""
        return self.signals.stop or (
            not self._waiting and not self._running and self._planned_all()
        )

    def _planned_all(self) -> bool:
        if self._proposed_all:
            return True
        stored = self._sql(self._store.trials, self.search.id)
        return self._unproposed(stored) <= 0 or self._flops_reached(stored) is not None

    def _flops_reached(self, stored: Sequence[Trial]) -> str | None:
        """The limit on the FLOPs of all runs, where one more candidate could exceed it."""
        limits = self.request.limits
        if limits is None or limits.total_train_flops is None:
            return None
        spent = sum(t.train_flops for t in stored if t.reused_from is None)
        more = self.request.train_flops * self.request.replicates
        if spent + more <= limits.total_train_flops:
            return None
        return f"total_train_flops {limits.total_train_flops:.6g}"

    def _propose(self) -> list[Pack]:
        """The runs of one more candidate; none if there is to be none."""
        if self._proposed_all:
            return []
        stored = self._sql(self._store.trials, self.search.id)
        self._proposed_all = self._unproposed(stored) <= 0
        if self._proposed_all or self._flops_reached(stored) is not None:
            return []
        candidates = self._groups(t for t in stored if t.kind == "candidate")
        place, seed = self._first_candidate + len(candidates), self.request.seed
        known = {t.key for t in stored}
        past = [_as_past(group, self.request) for group in candidates]
        found = propose(
            self.request, self.recipe, place, past, lambda plan: self._key(plan, seed) in known
        )
        unseen = tuple(t.number for g in candidates if _is_unfinished(g) for t in g)
        params, state = found.params, found.sampler_state
        added = self._add(
            place, found.plan, kind="candidate", params=params, sampler_state=state, unseen=unseen
        )
        return self._packs(added)

    def point(self, trial_id: int, point: StoredPoint) -> None:
        """Store one evaluation of a running trial."""
        self._sql(self._leases.add_point, self._lease, trial_id, point)

    def complete(
        self, trial_id: int, environment: Mapping[str, Any], cost: MeasuredCost | None = None
    ) -> None:
        """End a trial that reached its last step, and give its result to its twins."""
        self._sql(self._leases.complete_trial, self._lease, trial_id, environment, cost)
        self._settle(trial_id)

    def fail(self, trial_id: int, reason: str, failure: TrialFailure = "run") -> None:
        """End a trial without a result; a waiting twin gets its own run."""
        self._sql(self._leases.fail_trial, self._lease, trial_id, reason, failure)
        self._settle(trial_id)

    def retry(self, pack: Pack, *, apart: bool = False) -> None:
        """Queue what is unfinished of a pack whose process died; it is the next one.

        Parameters
        ----------
        apart
            Each run by itself.
        """
        left = self.unfinished(pack)
        for trial in left:
            self._settle(trial.id)
        packs = _apart(left) if apart else [replace(pack, trials=left)] if left else []
        self._waiting.extendleft(reversed(packs))

    def _settle(self, trial_id: int) -> None:
        trial = self._running.pop(trial_id)
        # back to the queue: `next_pack` finds the result there, or runs the twin itself
        self._waiting.extendleft(reversed(_apart(self._twins.pop(trial.key))))

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
        trials = self._sql(self._store.trials, self.search.id)
        unfinished = [t.number for t in trials if t.state in UNFINISHED]
        missing = self._unproposed(trials)
        reached = None
        if unfinished or missing > 0:
            reached = self._limit_reached(trials, unfinished=bool(unfinished))
            if reached is None:
                left = f"trials {unfinished} unfinished, {missing} not proposed"
                raise EinsumNasError(f"the runner ended early: {left}")
        release = partial(self._leases.release, limit_reached=reached)
        if any(t.state == "complete" and t.kind != "reference" for t in trials):
            self._sql(release, self._lease, "succeeded")
        else:
            reasons = grouped(t.error for t in trials if t.error)
            reasons += [reached] if reached else []
            why = f"no candidate completed: {'; '.join(reasons)}"
            failure = "limit" if reached else "trials"
            self._sql(release, self._lease, "failed", why, failure=failure)

    def _limit_reached(self, trials: Sequence[Trial], *, unfinished: bool) -> str | None:
        """The limit that explains why the search ends before its last trial."""
        if self.signals.overtime.is_set() and self.request.limits is not None:
            return f"seconds {self.request.limits.seconds:.6g}"
        # the limit on FLOPs only prevents proposals, so it does not explain unfinished trials
        return None if unfinished else self._flops_reached(trials)


def grouped(errors: Iterable[str]) -> list[str]:
    """Errors of trials with how many have each, the most frequent first.

    Errors that differ in numbers alone, such as the step or a process id, count as one.
    """
    groups: dict[str, list[str]] = {}
    for error in errors:
        told = _STEP.sub("", error)
        groups.setdefault(_NUMBER.sub("#", told), []).append(told)
    told_first = sorted(groups.values(), key=lambda g: (-len(g), g[0]))
    return [
        f"{counted(len(g), 'trial')}: {g[0]}{' (numbers differ)' if len(set(g)) > 1 else ''}"
        for g in told_first
    ]


_STEP = re.compile(r" at step \d+( of \d+)?")
_NUMBER = re.compile(r"\b(?=[0-9a-f]*\d)[0-9a-f]{6,}\b|\d+(\.\d+)?")


def _apart(trials: Iterable[Trial]) -> list[Pack]:
    """Each trial as a pack of its own."""
    return [Pack((t,), t.key) for t in trials]


def plan_of_trial(trial: Trial) -> RunPlan:
    """A stored trial has the fields of its plan."""
    return RunPlan.from_dict({f.name: getattr(trial, f.name) for f in fields(RunPlan)})


def _is_unfinished(group: Iterable[Trial]) -> bool:
    return any(t.state in UNFINISHED for t in group)


def _as_past(group: Sequence[Trial], request: SearchRequest) -> PastTrial:
    """A candidate as one observation: the mean loss of its trials, once all of them have ended.

    It has failed if one of them failed by itself, or none has a result.
    """
    first = group[0]
    assert first.sampler_params is not None
    past = partial(PastTrial, first.sampler_params, sampler_state=first.sampler_state)
    if _is_unfinished(group):
        return past("running", None)
    losses = [t.loss for t in group if t.state == "complete" and t.loss is not None]
    if not losses or any(t.state == "failed" and t.failure == "run" for t in group):
        return past("failed", None)
    loss = fmean(losses)
    if request.objective == "pareto":
        # logarithm, because the most expensive runs would dominate a hypervolume in plain FLOPs
        return past("complete", (loss, math.log(first.train_flops)))
    return past("complete", (loss,))
