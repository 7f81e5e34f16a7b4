"""The values that the store gives and takes besides the records of `nas.records`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nas.planning.runs import RunPlan
from nas.records.search import SearchState
from nas.records.trial import TrialKind, TrialState

TERMINAL: tuple[SearchState, ...] = ("succeeded", "failed", "cancelled")
#: States of trials that are to train now, and of all that have not ended.
DUE: tuple[TrialState, ...] = ("planned", "running")
UNFINISHED: tuple[TrialState, ...] = (*DUE, "paused")


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to write to one search, until another worker claims it."""

    search_id: str
    epoch: int
    worker: str
    #: length of the lease at each renewal
    seconds: float


@dataclass(frozen=True, slots=True)
class Renewal:
    """What a worker learns when it renews its lease."""

    #: the search is to be cancelled
    cancel: bool = False
    #: the search is to be paused
    pause: bool = False
    #: the search has been held for as long as its limits allow
    overtime: bool = False


@dataclass(frozen=True, slots=True)
class TrialDraft:
    """A trial before it is stored."""

    number: int
    kind: TrialKind
    plan: RunPlan
    seed: int
    key: str
    name: str
    params: Mapping[str, float | str] | None = None
    sampler_state: Mapping[str, Any] | None = None
    unseen: tuple[int, ...] = ()
    #: the trial that this one runs again with a fresh seed
    confirms: int | None = None
    #: last step of its first slice; None for all of its steps
    until_step: int | None = None


@dataclass(frozen=True, slots=True)
class Round:
    """What a search does next under its stopping rule; see `nas.search.scheduling`."""

    #: 1 for the first of the search
    number: int
    #: candidates that begin, and confirmations
    begun: Sequence[TrialDraft] = ()
    #: paused trial → last step of its next slice; None for all of its steps
    advanced: Mapping[int, int | None] = field(default_factory=dict)
    #: paused trial → why it never goes on
    stopped: Mapping[int, str] = field(default_factory=dict)
    #: paused trial → its key as a run that ends where it is
    ended: Mapping[int, str] = field(default_factory=dict)

    @property
    def moves(self) -> int:
        """Number of runs that it is about."""
        return len(self.begun) + len(self.advanced) + len(self.stopped) + len(self.ended)


@dataclass(frozen=True, slots=True)
class Event:
    """One entry of a search's log."""

    id: int
    search_id: str
    created_at: float
    kind: str
    data: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ScopeState:
    """How much is measured on a task or in a search."""

    #: grows with every change of what answers are made of
    revision: int
    #: completed runs
    trials: int
    #: their evaluations
    points: int
    #: searches that they belong to
    searches: int
    #: least and greatest train FLOPs of any of their points; None before the first
    least_flops: float | None
    greatest_flops: float | None


@dataclass(frozen=True, slots=True)
class DeviceState:
    """How much is measured on one device."""

    #: see `nas.records.device.device_of`
    name: str
    #: the scope of its runs, within the one that was asked for; see `nas.store.scopes`
    scope: str
    #: completed runs that were timed
    trials: int


@dataclass(frozen=True, slots=True)
class ConfirmedPair:
    """A run of a search and the results of its confirmations with new seeds."""

    trial_id: int
    #: the search that it belongs to, and its budget
    search_id: str
    train_flops: float
    dense: bool
    #: loss of the run that was confirmed, mean over the seeds that its search ran it with
    proxy_loss: float
    #: mean loss of its confirmations
    confirmed_loss: float
    seeds: int
    #: train FLOPs of the confirmations over those of the run
    longer: float
