"""What a worker knows of its search: read once, and kept up to date with what it writes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import log
from statistics import fmean

from nas.planning.recipe import Recipe
from nas.planning.request import SearchRequest
from nas.planning.runs import RunPlan
from nas.records.trial import StoredPoint, Trial
from nas.search.propose import PastTrial, Proposal, Proposer
from nas.search.scheduling import Curve, CurveState
from nas.store.progress import TrialProgress, told
from nas.store.records import DUE


@dataclass(eq=False)
class Group:
    """The runs of a candidate or dense reference, which differ in their seed."""

    #: place in the search: references first, then candidates, in the order in which they began
    place: int
    runs: list[TrialProgress] = field(default_factory=list)
    #: its confirmations
    confirmations: list[TrialProgress] = field(default_factory=list)
    #: its curve, until something of it changes
    cached: Curve | None = None

    @property
    def first(self) -> TrialProgress:
        return self.runs[0]

    @property
    def reference(self) -> bool:
        return self.first.kind == "reference"

    @property
    def due(self) -> bool:
        """Whether one of its runs is to train now."""
        return any(t.state in DUE for t in self.runs)

    @property
    def paused(self) -> list[TrialProgress]:
        return [t for t in self.runs if t.state == "paused"]

    @property
    def state(self) -> CurveState:
        """Its state where no run is due: a run that has failed fails all of them."""
        states = {t.state for t in self.runs}
        for state in ("failed", "stopped", "paused"):
            if state in states:
                return state
        return "complete"

    def curve(self) -> Curve:
        """What a scheduler sees of it: the mean of its runs where all have a point."""
        if self.cached is None:
            self.cached = self._curve()
        return self.cached

    def _curve(self) -> Curve:
        of_runs = [t.points for t in self.runs]
        steps = sorted(set.intersection(*map(set, of_runs)))
        flops = self.first.train_flops_per_step
        if len(of_runs) == 1:
            losses = [of_runs[0][step][1] for step in steps]
        else:
            losses = [fmean(points[step][1] for points in of_runs) for step in steps]
        return Curve(
            place=self.place,
            plan=self.first.plan,
            reference=self.reference,
            state=self.state,
            points=tuple((float(s * flops), loss) for s, loss in zip(steps, losses, strict=True)),
            step=steps[-1] if steps else 0,
            params=self.first.params,
            confirmed={
                t.seed: t.loss
                for t in self.confirmations
                if t.state == "complete" and t.loss is not None
            },
        )

    def past(self, objective: str) -> PastTrial:
        """A candidate as a sampler sees it: the mean loss of its runs, once all have ended.

        It has failed if one of them failed by itself, or none has a result.
        """
        assert self.first.params is not None
        past = partial(PastTrial, self.first.params, sampler_state=self.first.sampler_state)
        if self.due or self.paused:
            return past("running", None)
        losses = [t.loss for t in self.runs if t.state == "complete" and t.loss is not None]
        if not losses or any(t.state == "failed" and t.failure == "run" for t in self.runs):
            return past("failed", None)
        if objective == "pareto":
            # logarithm: the most expensive runs would dominate a hypervolume in plain FLOPs
            flops = self.first.steps * self.first.train_flops_per_step
            return past("complete", (fmean(losses), log(flops)))
        return past("complete", (fmean(losses),))


class Progress:
    """The trials of a search in memory, so that none is read again."""

    def __init__(self, request: SearchRequest) -> None:
        self._request = request
        #: by place
        self.groups: list[Group] = []
        #: keys of all runs
        self.keys: set[str] = set()
        #: number of the next trial
        self.next_number = 0
        #: candidates
        self.begun = 0
        #: train FLOPs of all runs as they are planned, or were stopped; without reused results
        self.planned_flops = 0
        self._trials: dict[int, TrialProgress] = {}
        #: trial → its group; of a confirmation that of the run that it repeats
        self._group_of: dict[int, Group] = {}
        #: trial → its confirmations, also of another search
        self._repeats: dict[int, list[TrialProgress]] = {}
        #: places of candidates of which a run is due
        self._open: set[int] = set()
        #: candidates that the sampler has not been told of since they changed, by place
        self._untold: dict[int, Group] = {}

    def __len__(self) -> int:
        return len(self._trials)

    def __getitem__(self, trial_id: int) -> TrialProgress:
        return self._trials[trial_id]

    def __iter__(self) -> Iterator[TrialProgress]:
        return iter(self._trials.values())

    @property
    def references(self) -> int:
        return len(self.groups) - self.begun

    def add(self, trials: Iterable[TrialProgress]) -> None:
        """Trials in the order of their numbers; the runs of a candidate follow one another."""
        for trial in trials:
            self._trials[trial.id] = trial
            self.keys.add(trial.key)
            self.next_number = max(self.next_number, trial.number + 1)
            if trial.reused_from is None:
                steps = trial.trained_steps if trial.state == "stopped" else trial.steps
                self.planned_flops += steps * trial.train_flops_per_step
            if trial.confirms is not None:
                self._repeats.setdefault(trial.confirms, []).append(trial)
                group = self._group_of.get(trial.confirms)
                if group is not None:  # else it repeats a run of another search
                    group.confirmations.append(trial)
                    self._group_of[trial.id], group.cached = group, None
                continue
            group = self.groups[-1] if self.groups else None
            if group is None or len(group.runs) == self._request.replicates:
                group = Group(len(self.groups))
                self.groups.append(group)
                self.begun += trial.kind == "candidate"
            group.runs.append(trial)
            self._group_of[trial.id] = group
            self._look(group)

    def together(self, trial: Trial | TrialProgress) -> list[str]:
        """Keys of the runs that differ from a trial in their seed alone, its own included."""
        if trial.confirms is None:
            return [t.key for t in self._group_of[trial.id].runs]
        return [t.key for t in self._repeats[trial.confirms]]

    def shared(self, trial_id: int, twin: Trial, points: Sequence[StoredPoint]) -> None:
        """A trial has the result of an equal run."""
        trial = self[trial_id]
        self.planned_flops -= trial.steps * trial.train_flops_per_step
        trial.reused_from, trial.loss = twin.reused_from, twin.loss
        trial.points = {p.step: told(p) for p in points}
        self.set_state(trial_id, "complete")

    def stop(self, trial_id: int) -> None:
        """A paused trial never goes on."""
        trial = self[trial_id]
        self.planned_flops -= (trial.steps - trial.trained_steps) * trial.train_flops_per_step
        self.set_state(trial_id, "stopped")

    def end_here(self, trial_id: int, key: str) -> None:
        """A paused trial is complete with the steps that it has trained, and has another key."""
        trial = self[trial_id]
        last = trial.trained_steps
        self.planned_flops -= (trial.steps - last) * trial.train_flops_per_step
        trial.plan = replace(trial.plan, steps=last)
        trial.steps, trial.until_step, trial.key = last, None, key
        trial.loss = trial.points[last][1]
        self.keys.add(key)
        self.set_state(trial_id, "complete")

    def set_state(self, trial_id: int, state: str) -> None:
        """The state of a trial has changed, and what else is known of it."""
        self[trial_id].state = state
        group = self._group_of.get(trial_id)
        if group is not None:
            self._look(group)

    def _look(self, group: Group) -> None:
        group.cached = None
        if group.reference:
            return
        (self._open.add if group.due else self._open.discard)(group.place)
        self._untold[group.place] = group

    def unseen(self) -> tuple[int, ...]:
        """Numbers of the trials of candidates of which one is still to train."""
        return tuple(t.number for place in sorted(self._open) for t in self.groups[place].runs)

    def news(self) -> list[Group]:
        """Candidates that are new or have changed since the last call, by place."""
        found = [self._untold[place] for place in sorted(self._untold)]
        self._untold.clear()
        return found

    def trained_flops(self) -> int:
        """Train FLOPs of all runs so far; what was trained again after a crash counts once."""
        return sum(t.trained_steps * t.train_flops_per_step for t in self)


#: Candidates that are proposed at once, at most.
_MOST_AT_ONCE = 64


class Proposals:
    """The sampler of a search without a stopping rule, told of what has changed before each ask."""

    def __init__(self, request: SearchRequest, recipe: Recipe) -> None:
        self._request = request
        self._kept = Proposer(request, recipe)

    def next(
        self, progress: Progress, is_known: Callable[[RunPlan], bool], most: int
    ) -> list[Proposal]:
        """The next candidates, none of which is known, if the sampler finds others.

        They are one, but for the sampler that proposes many at once: of a long search that
        proposes a 32nd of what it has proposed.
        """
        for group in progress.news():
            self._kept.observe(group.place, group.past(self._request.objective))
        place = len(progress.groups)
        count = min(_MOST_AT_ONCE, (place - progress.references) // 32)
        count = count if self._request.sampler == "surrogate" else 1
        return self._kept.propose(max(1, min(count, most)), place, is_known)
