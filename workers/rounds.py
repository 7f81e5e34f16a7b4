"""From what a scheduler decides to a round that the store can begin."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from nas.errors import EinsumNasError
from nas.planning.request import MAX_SEED, SearchRequest
from nas.planning.runs import RunPlan
from nas.search.scheduling import Advance, Begin, Confirm, End, Move, SearchView, Stop
from nas.store.progress import TrialProgress
from nas.store.records import Round, TrialDraft
from workers.progress import Group, Progress

#: (plan, seed) → key of the run.
KeyOf = Callable[[RunPlan, int], str]


def view_of(
    progress: Progress, request: SearchRequest, *, slots: int, held_seconds: float, left: int
) -> SearchView:
    """All that a scheduler decides by.

    Parameters
    ----------
    slots
        Runs that train at once.
    held_seconds
        Time for which workers have held the search.
    left
        Candidates that may still begin.
    """
    trained = progress.trained_flops()
    in_seconds = request.total_seconds is not None
    return SearchView(
        curves=[group.curve() for group in progress.groups],
        spent=held_seconds if in_seconds else float(trained),
        total=request.total,
        left=left,
        slots=slots,
        cost_of_flop=held_seconds / trained if in_seconds and trained else 1.0,
    )


class Planner:
    """Turns moves into trials to plan, to go on and to end.

    Parameters
    ----------
    used_seeds
        Model → seeds that any run of it has.
    """

    def __init__(
        self,
        progress: Progress,
        request: SearchRequest,
        key_of: KeyOf,
        used_seeds: Callable[[str], set[int]],
    ) -> None:
        self._progress, self._request = progress, request
        self._key_of, self._used_seeds = key_of, used_seeds

    def round_of(self, number: int, moves: Sequence[Move]) -> Round:
        """The round of a scheduler's moves; without moves the last one, which stops what is left.

        Runs of a candidate of which another has failed are stopped, for it is never asked of again.
        """
        stopped: dict[int, str] = {}
        ended: dict[int, str] = {}
        advanced: dict[int, int | None] = {}
        for group in self._progress.groups:
            if group.paused and (group.state in ("failed", "stopped") or not moves):
                why = f"a run with another seed has {group.state}" if moves else "the search ends"
                stopped.update(dict.fromkeys((t.id for t in group.paused), why))
        ends: dict[int, RunPlan] = {}
        for move in moves:
            match move:
                case Stop(place, reason):
                    stopped.update({t.id: reason for t in self._paused(place)})
                case End(place):
                    for t in self._paused(place):
                        ends[place] = replace(t.plan, steps=t.trained_steps)
                        ended[t.id] = self._key_of(ends[place], t.seed)
                case Advance(place, until):
                    for t in self._paused(place):
                        advanced[t.id] = _slice(t.plan, t.trained_steps, until)
        begun = [*self._candidates(moves)]
        begun += self._confirmations(moves, ends, self._progress.next_number + len(begun))
        return Round(number, begun, advanced, stopped, ended)

    def _group(self, place: int) -> Group:
        if not 0 <= place < len(self._progress.groups):
            raise EinsumNasError(f"the stopping rule names place {place}, which is none")
        return self._progress.groups[place]

    def _paused(self, place: int) -> list[TrialProgress]:
        group = self._group(place)
        if group.state != "paused":
            raise EinsumNasError(f"the stopping rule names place {place}, which is not paused")
        return group.paused

    def _candidates(self, moves: Sequence[Move]) -> Iterator[TrialDraft]:
        number = self._progress.next_number
        for move in moves:
            if not isinstance(move, Begin):
                continue
            found, until = move.proposal, _slice(move.proposal.plan, 0, move.until)
            for i in range(self._request.replicates):
                seed = self._request.seed + i
                yield TrialDraft(
                    number, "candidate", found.plan, seed, self._key_of(found.plan, seed),
                    found.plan.name, params=found.params,
                    sampler_state=found.sampler_state if i == 0 else None, until_step=until,
                )  # fmt: skip
                number += 1

    def _confirmations(
        self, moves: Sequence[Move], ends: dict[int, RunPlan], number: int
    ) -> Iterator[TrialDraft]:
        """Fresh seeds of complete runs; the smallest that no run of the model has."""
        for move in moves:
            if not isinstance(move, Confirm):
                continue
            group = self._group(move.place)
            first = group.first
            if move.place not in ends and group.state != "complete":
                raise EinsumNasError(f"the stopping rule confirms place {move.place}, not complete")
            plan = ends.get(move.place, first.plan)
            used = {t.seed for t in (*group.runs, *group.confirmations)}
            used |= self._used_seeds(first.model) if first.model else set()
            fresh = (seed for seed in range(MAX_SEED + 1) if seed not in used)
            for _, seed in zip(range(move.seeds), fresh, strict=False):
                yield TrialDraft(
                    number, "confirmation", plan, seed, self._key_of(plan, seed), plan.name,
                    confirms=first.id,
                )  # fmt: skip
                number += 1


def _slice(plan: RunPlan, trained: int, until: int) -> int | None:
    """Last step of a slice; None where it is that of the run."""
    if not trained < until <= plan.steps:
        steps = f"{trained + 1} to {plan.steps}"
        raise EinsumNasError(f"the stopping rule asks for steps up to {until}, of {steps}")
    return until if until < plan.steps else None
