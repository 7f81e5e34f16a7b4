"""The values that the store returns: frozen, and independent of any connection."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from nas.planning.cost import RunPlan
from nas.planning.request import SearchRequest

SearchState = Literal["queued", "running", "paused", "succeeded", "failed", "cancelled"]
#: Why a search failed: its attempts are used up, its input cannot be used, no candidate completed,
#: or a limit was reached before one did.
SearchFailure = Literal["attempts", "input", "trials", "limit"]
#: Why a trial has no result: its own doing, its process died, its time or its memory was used up,
#: or it was stopped with its search.
TrialFailure = Literal["run", "process", "timeout", "memory", "search"]
TrialState = Literal["planned", "running", "complete", "stopped", "failed"]
TrialKind = Literal["candidate", "reference", "confirmation"]
TERMINAL: tuple[SearchState, ...] = ("succeeded", "failed", "cancelled")
UNFINISHED: tuple[TrialState, ...] = ("planned", "running")


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


@dataclass(frozen=True, slots=True)
class StoredPoint:
    """One evaluation of a trial; see `nas.training.run.Point`."""

    step: int
    train_flops: float
    loss: float
    loss_stderr: float
    seconds: float
    #: loss of each validation window; empty where a reader left it out
    window_losses: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Trial:
    """A stored trial. Times are seconds since 1970, FLOPs are train FLOPs unless named."""

    id: int
    search_id: str
    number: int
    kind: str
    state: TrialState
    params: Mapping[str, float | str] | None
    sampler_state: Mapping[str, Any]
    unseen: tuple[int, ...]
    theta: tuple[float, ...]
    #: text of the design, which `nas.designs.design.parse_design` reads
    design: str
    name: str
    structures: tuple[str, ...]
    dense: bool
    width: int
    depth: int
    steps: int
    train_flops_per_step: int
    #: exact: steps × train_flops_per_step
    train_flops: int
    forward_flops_per_token: float
    model_params: int
    seed: int
    key: str
    reused_from: int | None
    attempts: int
    environment: Mapping[str, Any] | None
    loss: float | None
    error: str | None
    created_at: float
    started_at: float | None
    finished_at: float | None
    #: equal for runs that differ in steps and seed only; None in a search whose data is not loaded
    model: str | None
    #: the trial that this one runs again with a fresh seed
    confirms: int | None
    #: measured; None where the run was too short to tell
    seconds_per_step: float | None
    #: measured; what the run added to its process or took on its device; None where unknown
    peak_memory_bytes: int | None
    #: why it has no result; None where it has one, or ended before reasons were kept apart
    failure: TrialFailure | None


@dataclass(frozen=True, slots=True)
class MeasuredCost:
    """Measured cost of a run, on the machine that it ran on."""

    seconds_per_step: float | None
    peak_memory_bytes: int | None


@dataclass(frozen=True, slots=True)
class Search:
    """A stored search with the counts of its trials."""

    id: str
    sequence: int
    state: SearchState
    task: str
    task_fingerprint: str | None
    request: SearchRequest
    data_path: str | None
    created_at: float
    started_at: float | None
    finished_at: float | None
    cancel_requested: bool
    error: str | None
    epoch: int
    failures: int
    worker: str | None
    #: trial state → how many
    trial_counts: Mapping[str, int]
    #: dense references planned; 0 before a worker has begun the search
    references: int
    tenant: str
    #: searches of higher priority are claimed first
    priority: int
    #: whether the running search is to be paused
    pause_requested: bool
    failure: SearchFailure | None
    #: the limit of its request that ended it before its last trial
    limit_reached: str | None
    #: writes refused because they named an earlier epoch
    stale_writes: int
    #: how long workers have held it in earlier claims
    held_seconds: float
    cloned_from: str | None
    #: train FLOPs that count against the tenant's quota
    charged_flops: float
    #: folder that the data may not lead out of
    data_root: str | None


@dataclass(frozen=True, slots=True)
class Event:
    """One entry of a search's log."""

    id: int
    search_id: str
    created_at: float
    kind: str
    data: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """A point of a learning curve with the fields that identify its run."""

    trial_id: int
    search_id: str
    number: int
    kind: str
    dense: bool
    name: str
    theta: tuple[float, ...]
    #: text of the design
    design: str
    width: int
    seed: int
    #: optimiser steps taken at this point
    step: int
    train_flops: float
    loss: float
    loss_stderr: float
    #: seconds of training up to this point
    seconds: float
    #: whether the run it belongs to has completed
    complete: bool
    forward_flops_per_token: float
    params: int
    seconds_per_step: float | None
    peak_memory_bytes: int | None


@dataclass(frozen=True, slots=True)
class Run:
    """A completed run with its learning curve: the evidence that answers rest on."""

    trial_id: int
    search_id: str
    number: int
    kind: str
    dense: bool
    name: str
    theta: tuple[float, ...]
    #: text of the design
    design: str
    #: the design in canonical form as text: equal for equal structures at any width
    structure: str
    #: equal for runs that differ in steps and seed only
    model: str
    width: int
    depth: int
    steps: int
    seed: int
    train_flops_per_step: int
    forward_flops_per_token: float
    params: int
    seconds_per_step: float | None
    peak_memory_bytes: int | None
    #: in the order of their steps, without the losses of single samples
    points: tuple[StoredPoint, ...]


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
class ConfirmedPair:
    """A run of a search and the results of its confirmations with new seeds."""

    trial_id: int
    #: the search that it belongs to, and its budget
    search_id: str
    train_flops: float
    dense: bool
    #: loss of the run that was confirmed
    proxy_loss: float
    #: mean loss of its confirmations
    confirmed_loss: float
    seeds: int
    #: train FLOPs of the confirmations over those of the run
    longer: float
