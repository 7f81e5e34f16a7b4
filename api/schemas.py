"""Response models of the REST service.  Times are seconds since 1970-01-01 UTC."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from nas.planning.request import MAX_PRIORITY, WHOLE, SearchRequest
from nas.records.progress import Overview, SearchProgress
from nas.records.search import Search
from nas.records.trial import KeptWeights, StoredPoint, Trial
from nas.service.dividing import BudgetParts


class _Out(BaseModel):
    model_config = ConfigDict(frozen=True)


class SearchOut(Search):
    """A search and its progress."""


class SearchDetail(SearchOut):
    """A search, and how far it has come."""

    overview: Overview
    progress: SearchProgress | None = Field(
        None, description="null for a search whose runs all train to their end"
    )


class SearchPage(_Out):
    """Searches, newest first."""

    items: list[SearchOut]
    next: str | None = Field(description="cursor of the next page")


class TrialOut(Trial):
    """One run of a search. FLOPs are train FLOPs and exact."""


class TrialPage(_Out):
    """Trials in the order of their numbers."""

    items: list[TrialOut]
    next: str | None = Field(description="cursor of the next page")


@dataclass(frozen=True, slots=True)
class PointOut(StoredPoint):
    """One evaluation of a run."""


class TrialDetail(TrialOut):
    """A trial with its learning curve."""

    curve: list[PointOut]
    weights: KeptWeights | None = Field(
        description="its trained weights, `GET /v1/trials/{id}/weights`; null if they are not kept"
    )

    @classmethod
    def of(cls, trial: Trial, curve: list[StoredPoint], weights: KeptWeights | None) -> TrialDetail:
        points = [PointOut(**asdict(p)) for p in curve]
        return cls(**dict(trial), curve=points, weights=weights)


class ReferenceOut(_Out):
    """A dense run with which a search would begin."""

    width: int
    steps: int
    train_flops: int
    params: int
    forward_flops_per_token: float


class Preview(_Out):
    """What a search would run."""

    request: SearchRequest
    recipe: dict[str, bool | int | float | str]
    loss_unit: str
    trials: int
    references: list[ReferenceOut]
    replicates: int
    total_runs: int | None = Field(
        description="of every candidate and reference with each of its seeds; null where a "
        "stopping rule decides how many there will be"
    )
    total_train_flops_at_most: float
    train_seconds_at_most: float | None = Field(
        description="estimate of training these, one run after another, at the median speed of "
        "this service's newest runs on the task; null where none was timed"
    )
    stopping_rule: str
    parts: BudgetParts | None = Field(
        description="how a budget for the whole search is divided; null without one, and for one "
        "in seconds while no run on the task was timed here"
    )
    train_flops_unit: str
    minimum_train_flops: float = Field(description="smallest budget accepted for this request")
    widths: dict[str, list[tuple[int, int]]]
    widths_unit: str


class FactorOut(_Out):
    """One of the parameter tensors of a structure."""

    name: str
    fan_in: int
    fan_out: int
    init_std: float
    adam_lr_multiplier: float
    axes: list[str] = []
    shape: list[int] = []


class PartOut(_Out):
    """One of the designs that a sum adds."""

    name: str
    text: str
    macs: int
    params: int
    fingerprint: str


class StructureOut(_Out, extra="allow"):
    """Exact properties of a structure for one layer; the fields depend on its family.

    Those of families that other packages add are not listed here.

    FLOPs are forward FLOPs per token: 1 MAC = 2 FLOPs.
    """

    name: str
    d_in: int
    d_out: int
    macs: int
    flops: int
    params: int
    dense_macs: int
    fingerprint: str
    theta: list[float] = []
    canonical_theta: list[float] = []
    text: str = ""
    sizing: str = ""
    family: str = ""
    experts: int = 0
    active: int = 0
    shared: int = 0
    granularity: int = 0
    n_factors: int = 0
    sizes: dict[str, int] = {}
    einsum: str = ""
    contraction: list[str] = []
    factors: list[FactorOut] = []
    chain_macs: int = 0
    macs_a_first: int = 0
    macs_b_first: int = 0
    gate_macs: int = 0
    expert_macs: int = 0
    experts_macs_all: int = 0
    expert_dense: bool = False
    rho: int = 0
    rank: int | None = None
    rank_is: str = ""
    rank_bound: int = 0
    omega: float = 0.0
    psi: float = 0.0
    nu: float = 0.0
    omega_integer: float = 0.0
    psi_integer: float = 0.0
    nu_integer: float = 0.0
    padded_in: int = 0
    padded_out: int = 0
    dropped_inputs: int = 0
    constant_outputs: int = 0
    waste: float = 0.0
    degenerate: bool = False
    convolution: str = ""
    kernel: float = 0.0
    length: int = 0
    channels_in: int = 0
    channels_out: int = 0
    taps: int = 0
    blast: str = ""
    rows: int = 0
    columns: int = 0
    block_out: int = 0
    block_in: int = 0
    pattern: str = ""
    exponents: dict[str, float] = {}
    blocks: int = 0
    blocks_in_a_row: int = 0
    strides: list[int] = []
    channel_spacing: int = 0
    parts: list[PartOut] = []
    activation: str = ""
    linear: bool = True
    intermediate: int = 0


class RecipeOut(_Out):
    """A model family and its training settings."""

    name: str
    settings: dict[str, bool | int | float | str]
    loss_unit: str
    accepted_train_flops: str
    minimum_train_flops: float


class FingerprintOut(_Out):
    """One version of a task's data, and the searches that used it."""

    fingerprint: str
    searches: int
    recipe: str
    overrides: dict[str, bool | int | float | str] | None
    data: str | None
    trainer: str = Field(description="workers | client: who trained it")
    loss_unit: str


class TaskOut(_Out):
    """A task and its recipes."""

    name: str
    loss_unit: str
    refusal: str | None = Field(description="why the task of a plug-in cannot be used, or null")
    recipes: list[RecipeOut]
    minimum_references: int
    default_fingerprint: str | None
    fingerprints: list[FingerprintOut]


class TaskList(_Out):
    """Every task."""

    items: list[TaskOut]


class PriorityIn(BaseModel):
    """A search's priority; searches of higher priority run first."""

    model_config = ConfigDict(extra="forbid", strict=True)

    priority: Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY), WHOLE]


class ProcessOut(_Out):
    """A worker or a service, as it last reported itself."""

    name: str
    kind: str = Field(description="worker | api")
    state: str = Field(
        description="idle | busy | waiting (for its Ray cluster) | draining (about to end)"
    )
    search_id: str | None = Field(description="search that it runs")
    host: str
    pid: int
    version: str = Field(description="version of einsum-nas")
    started_at: float
    seen_at: float
    about: dict[str, Any] = Field(description="further details, such as what it waits for")


class WorkerList(_Out):
    """Workers and services that were seen recently."""

    items: list[ProcessOut]


class AuditEntry(_Out):
    """One record of the audit log."""

    id: int
    created_at: float
    tenant: str | None
    key_id: str | None
    action: str = Field(description="method and outcome, or what was done to a key or a tenant")
    target: str | None = Field(description="path of the request, or name of the key")
    status: int | None = Field(description="status of the response")
    reason: str | None
    address: str | None = Field(description="address that the request came from")
    request_id: str | None


class AuditPage(_Out):
    """Records of the audit log, newest first."""

    items: list[AuditEntry]
    next: str | None = Field(description="cursor of the next page")


class KeyOut(_Out):
    """An API key, without its secret."""

    id: str
    tenant: str
    name: str
    scopes: list[str]
    created_at: float
    expires_at: float | None = Field(description="null for one that never expires")
    revoked_at: float | None
    used_at: float | None = Field(description="last use, to the hour")
    rotated_from: str | None = Field(description="the key that it replaces")
    created_by: str | None = Field(
        description="the key that made it over REST; null for one of the command line"
    )


class KeyPage(_Out):
    """Keys, newest first."""

    items: list[KeyOut]
    next: str | None = Field(description="cursor of the next page")


class MadeKey(KeyOut):
    """A key that was made just now, with its secret."""

    key: str | None = Field(
        description="the secret, which is not stored and cannot be read again; null where an "
        "earlier request with the same Idempotency-Key had made the key"
    )
