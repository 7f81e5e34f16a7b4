"""What a search does next, decided from its curves alone: the same in live searches and replays.

A search with a stopping rule advances in *rounds*.  A round is a set of moves: candidates that
begin, paused runs that go on, runs that are stopped, runs that are confirmed with fresh seeds.
Each run of a round trains up to an evaluation of its own and is paused there, and the next round is
decided when all of them have ended.  So no decision depends on the order in which runs end, and a
search that is interrupted decides what it would have decided.  A scheduler keeps no state of its
own: what it decides is a function of the view.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from nas.planning.runs import RunPlan
from nas.search.propose import Proposal

CurveState = Literal["paused", "complete", "stopped", "failed"]


@dataclass(frozen=True, slots=True)
class Curve:
    """What is known of a candidate or a dense reference: the mean over its replicates."""

    #: place in the search: references first, then candidates, in the order in which they began
    place: int
    plan: RunPlan
    reference: bool
    state: CurveState
    #: (train FLOPs, loss) of each evaluation so far, ascending
    points: tuple[tuple[float, float], ...]
    #: last step that it has trained
    step: int
    #: of a candidate that was proposed, the point of the sampler's box
    params: Mapping[str, float | str] | None = None
    #: and what the sampler keeps of its ask, see `nas.search.propose`
    sampler_state: Mapping[str, Any] = field(default_factory=dict)
    #: seed → loss of its confirmations, which end where the run ends
    confirmed: Mapping[int, float] = field(default_factory=dict)

    @property
    def train_flops(self) -> int:
        """Spent on one replicate."""
        return self.step * self.plan.train_flops_per_step


@dataclass(frozen=True, slots=True)
class SearchView:
    """All that a scheduler may decide by; every run that was begun has ended or is paused."""

    curves: Sequence[Curve]
    #: spent so far, of `total`, both in train FLOPs or both in seconds
    spent: float
    #: None without a budget for the whole search
    total: float | None
    #: candidates that may still begin
    left: int
    #: runs that train at once
    slots: int
    #: `spent` for a train FLOP, so far; 1.0 where the budget is one of FLOPs
    cost_of_flop: float = 1.0


@dataclass(frozen=True, slots=True)
class Begin:
    """A new candidate, trained up to a step."""

    proposal: Proposal
    until: int


@dataclass(frozen=True, slots=True)
class Advance:
    """A paused run goes on up to a step."""

    place: int
    until: int


@dataclass(frozen=True, slots=True)
class Stop:
    """A paused run never goes on."""

    place: int
    reason: str


@dataclass(frozen=True, slots=True)
class End:
    """A paused run ends where it is, as a complete run of fewer steps: at a constant learning rate
    a prefix of a run is the result of a shorter one."""

    place: int


@dataclass(frozen=True, slots=True)
class Confirm:
    """A complete run is repeated with fresh seeds."""

    place: int
    #: number of fresh seeds
    seeds: int


Move = Begin | Advance | Stop | End | Confirm


class Scheduler(Protocol):
    """Decides the next round of a search."""

    def next_round(self, view: SearchView) -> Sequence[Move]:
        """The moves of the next round; none where the search has ended.

        The same view gives the same moves.
        """


#: (candidates wanted, place of the first, curves so far) → proposals, different from all curves.
Propose = Callable[[int, int, Sequence[Curve]], Sequence[Proposal]]
