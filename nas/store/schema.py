"""Tables, and the clock that every host shares: the database's."""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    UniqueConstraint,
    false,
    text,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.sql.functions import FunctionElement


class Base(DeclarativeBase):
    """Root of the tables, with constraint names that migrations can refer to."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class database_now(FunctionElement[float]):
    """The database's wall clock, seconds since 1970-01-01 UTC."""

    type = Float()
    inherit_cache = True


@compiles(database_now, "sqlite")
def _sqlite_now(_element: database_now, _compiler: Any, **_kw: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(database_now, "postgresql")
def _postgresql_now(_element: database_now, _compiler: Any, **_kw: Any) -> str:
    return "EXTRACT(EPOCH FROM clock_timestamp())::double precision"


_BIG = BigInteger().with_variant(Integer, "sqlite")  # SQLite autoincrements INTEGER only


class SearchRow(Base):
    """One search: its request, its state, and who holds its lease."""

    __tablename__ = "searches"

    #: 32 hex digits
    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    #: grows with creation; the key of pagination
    sequence: Mapped[int] = mapped_column(_BIG, unique=True)
    state: Mapped[str] = mapped_column(String(16))
    task: Mapped[str] = mapped_column(String(64))
    #: fingerprint of the task's data, set when a worker first loads it
    task_fingerprint: Mapped[str | None] = mapped_column(String(32))
    #: the SearchRequest
    request: Mapped[dict[str, Any]] = mapped_column(JSON)
    #: absolute path of the data, None for the default
    data_path: Mapped[str | None] = mapped_column(String(4096))
    idempotency_key: Mapped[str | None] = mapped_column(String(255))
    request_digest: Mapped[str] = mapped_column(String(64))
    #: seconds since 1970, as every other time
    created_at: Mapped[float] = mapped_column(Float)
    started_at: Mapped[float | None] = mapped_column(Float)
    finished_at: Mapped[float | None] = mapped_column(Float)
    cancel_requested: Mapped[bool] = mapped_column(default=False)
    error: Mapped[str | None] = mapped_column(String(4096))
    #: fencing token: grows with each claim
    epoch: Mapped[int] = mapped_column(default=0)
    #: claims that ended in a lost lease or an infrastructure error
    failures: Mapped[int] = mapped_column(default=0)
    worker: Mapped[str | None] = mapped_column(String(255))
    lease_until: Mapped[float | None] = mapped_column(Float)
    #: not claimed before this time (backoff)
    not_before: Mapped[float] = mapped_column(Float, default=0.0)
    #: trial state → how many, and `references` → how many are planned; kept with every change, so
    #: that a list of searches counts nothing
    tally: Mapped[dict[str, int]] = mapped_column(JSON, server_default=text("'{}'"))
    #: whose search it is; how many of a tenant run at once can be limited
    tenant: Mapped[str] = mapped_column(String(64), server_default=text("'default'"))
    #: the greater goes first
    priority: Mapped[int] = mapped_column(server_default=text("0"))
    pause_requested: Mapped[bool] = mapped_column(server_default=false())
    #: why it failed: attempts | input | trials | limit
    failure: Mapped[str | None] = mapped_column(String(16))
    #: the limit of its request that ended it before its last trial
    limit_reached: Mapped[str | None] = mapped_column(String(255))
    #: writes refused because they named an earlier epoch
    stale_writes: Mapped[int] = mapped_column(server_default=text("0"))
    #: begin of the claim that holds it, and the seconds that earlier ones held it
    claimed_at: Mapped[float | None] = mapped_column(Float)
    held_seconds: Mapped[float] = mapped_column(Float, server_default=text("0"))
    cloned_from: Mapped[str | None] = mapped_column(String(32))
    #: train FLOPs that count against its tenant's quota; see `nas.store.quotas`
    charged_flops: Mapped[float] = mapped_column(Float, server_default=text("0"))
    #: rounds that it has begun under its stopping rule
    rounds: Mapped[int] = mapped_column(server_default=text("0"))
    #: labels, which people change at any time
    name: Mapped[str | None] = mapped_column(String(120))
    tags: Mapped[list[str]] = mapped_column(JSON, server_default=text("'[]'"))
    notes: Mapped[str | None] = mapped_column(String(4000))
    archived: Mapped[bool] = mapped_column(server_default=false())
    #: folder that its data may not lead out of, for data named over the network
    data_root: Mapped[str | None] = mapped_column(String(4096))

    __table_args__ = (
        Index("ix_searches_state_sequence", "state", "sequence"),
        Index("ix_searches_tenant_sequence", "tenant", "sequence"),
        UniqueConstraint("tenant", "idempotency_key", name="uq_searches_tenant_idempotency_key"),
    )


class TrialRow(Base):
    """One run of a search: its plan, committed before it is dispatched, and its outcome."""

    __tablename__ = "trials"

    id: Mapped[int] = mapped_column(_BIG, primary_key=True, autoincrement=True)
    search_id: Mapped[str] = mapped_column(ForeignKey("searches.id", ondelete="CASCADE"))
    number: Mapped[int]
    #: candidate | reference | confirmation
    kind: Mapped[str] = mapped_column(String(16))
    state: Mapped[str] = mapped_column(String(16))
    #: point of the sampler's box, None for a reference
    params: Mapped[dict[str, float | str] | None] = mapped_column(JSON)
    sampler_state: Mapped[dict[str, Any]] = mapped_column(JSON)
    #: numbers of earlier trials that were still running when this one was proposed
    unseen: Mapped[list[int]] = mapped_column(JSON)
    #: exponents; see `nas.designs.design.exponents`
    theta: Mapped[list[float]] = mapped_column(JSON)
    #: text of the design; None for two factors, which theta says
    design: Mapped[str | None] = mapped_column(String(2048))
    name: Mapped[str] = mapped_column(String(128))
    structures: Mapped[list[str]] = mapped_column(JSON)
    dense: Mapped[bool]
    width: Mapped[int]
    depth: Mapped[int]
    steps: Mapped[int] = mapped_column(_BIG)
    #: exact
    train_flops_per_step: Mapped[int] = mapped_column(_BIG)
    #: steps × FLOPs of a step as a double, for sorting; the product of the two columns is exact
    train_flops: Mapped[float] = mapped_column(Float)
    forward_flops_per_token: Mapped[float] = mapped_column(Float)
    model_params: Mapped[int] = mapped_column(_BIG)
    seed: Mapped[int] = mapped_column(_BIG)
    #: digest of everything that decides the result
    key: Mapped[str] = mapped_column(String(64), index=True)
    #: trial whose result this one shares, because their keys are equal
    reused_from: Mapped[int | None] = mapped_column(_BIG)
    #: times it was dispatched
    attempts: Mapped[int] = mapped_column(default=0)
    #: epoch of the write that planned, started or ended it
    epoch: Mapped[int]
    #: where it ran: device, threads, execution plan, library versions
    environment: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    loss: Mapped[float | None] = mapped_column(Float)
    error: Mapped[str | None] = mapped_column(String(4096))
    created_at: Mapped[float] = mapped_column(Float)
    started_at: Mapped[float | None] = mapped_column(Float)
    finished_at: Mapped[float | None] = mapped_column(Float)
    #: digest of task, width, depth and integer structures: equal but for steps and seed
    model: Mapped[str | None] = mapped_column(String(64), index=True)
    #: trial that this one runs again with a fresh seed
    confirms: Mapped[int | None] = mapped_column(_BIG, index=True)
    #: measured
    seconds_per_step: Mapped[float | None] = mapped_column(Float)
    peak_memory_bytes: Mapped[int | None] = mapped_column(_BIG)
    #: why it failed: run (its own doing) | process | timeout | memory
    failure: Mapped[str | None] = mapped_column(String(16))
    #: last step of the slice that it trains or has trained last; None for all of its steps
    until_step: Mapped[int | None] = mapped_column(_BIG)
    #: steps that it had trained when it last paused or ended; a shared result has none
    trained_steps: Mapped[int] = mapped_column(_BIG, server_default=text("0"))
    #: steps of all attempts, which count against its tenant's quota; see `nas.store.quotas`
    charged_steps: Mapped[int] = mapped_column(_BIG, server_default=text("0"))

    __table_args__ = (UniqueConstraint("search_id", "number"),)


class PointRow(Base):
    """One evaluation of a trial."""

    __tablename__ = "points"

    trial_id: Mapped[int] = mapped_column(
        ForeignKey("trials.id", ondelete="CASCADE"), primary_key=True
    )
    step: Mapped[int] = mapped_column(_BIG, primary_key=True)
    train_flops: Mapped[float] = mapped_column(Float)
    loss: Mapped[float] = mapped_column(Float)
    loss_stderr: Mapped[float] = mapped_column(Float)
    seconds: Mapped[float] = mapped_column(Float)
    #: loss of each validation window, float32 little-endian, for paired comparisons
    window_losses: Mapped[bytes] = mapped_column(LargeBinary)


class WeightsRow(Base):
    """The kept weights of a complete trial."""

    __tablename__ = "weights"

    trial_id: Mapped[int] = mapped_column(
        ForeignKey("trials.id", ondelete="CASCADE"), primary_key=True, autoincrement=False
    )
    created_at: Mapped[float] = mapped_column(Float)
    #: of the file
    bytes: Mapped[int] = mapped_column(_BIG)
    sha256: Mapped[str] = mapped_column(String(64))


class WeightsPartRow(Base):
    """A part of a file of weights; all but the last are as long."""

    __tablename__ = "weights_parts"

    trial_id: Mapped[int] = mapped_column(
        ForeignKey("weights.trial_id", ondelete="CASCADE"), primary_key=True, autoincrement=False
    )
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    data: Mapped[bytes] = mapped_column(LargeBinary)


class OfferRow(Base):
    """A trial that a process which is no worker may train, and how far it is."""

    __tablename__ = "offers"

    trial_id: Mapped[int] = mapped_column(
        ForeignKey("trials.id", ondelete="CASCADE"), primary_key=True
    )
    search_id: Mapped[str] = mapped_column(
        ForeignKey("searches.id", ondelete="CASCADE"), index=True
    )
    #: who trains it, and the secret of the lease under which it does; None while nobody does
    holder: Mapped[str | None] = mapped_column(String(128))
    token: Mapped[str | None] = mapped_column(String(64))
    lease_seconds: Mapped[float | None] = mapped_column(Float)
    lease_until: Mapped[float | None] = mapped_column(Float)
    #: complete | failed, as the holder said
    outcome: Mapped[str | None] = mapped_column(String(16))
    error: Mapped[str | None] = mapped_column(String(4096))
    #: whether the search has taken the outcome over
    settled: Mapped[bool] = mapped_column(default=False)


class ToldRow(Base):
    """An evaluation that the holder of an offer has told."""

    __tablename__ = "told"

    trial_id: Mapped[int] = mapped_column(
        ForeignKey("offers.trial_id", ondelete="CASCADE"), primary_key=True
    )
    step: Mapped[int] = mapped_column(_BIG, primary_key=True)
    loss: Mapped[float] = mapped_column(Float)
    loss_stderr: Mapped[float] = mapped_column(Float)
    seconds: Mapped[float] = mapped_column(Float)
    #: loss of each validation sample, float32 little-endian
    losses: Mapped[bytes] = mapped_column(LargeBinary)
    #: whether the search has taken it over
    taken: Mapped[bool] = mapped_column(default=False)


class WebhookRow(Base):
    """An address that is told of the events of a tenant's searches."""

    __tablename__ = "webhooks"

    id: Mapped[str] = mapped_column(String(16), primary_key=True)
    tenant: Mapped[str] = mapped_column(String(64), index=True)
    url: Mapped[str] = mapped_column(String(2048))
    #: by which deliveries are signed
    secret: Mapped[str] = mapped_column(String(64))
    events: Mapped[list[str]] = mapped_column(JSON)
    #: whether it may be an address of this machine or of a private network
    private: Mapped[bool]
    created_at: Mapped[float] = mapped_column(Float)


class DeliveryRow(Base):
    """An event that is to be told, or was; written in the transaction of the event."""

    __tablename__ = "deliveries"

    id: Mapped[int] = mapped_column(_BIG, primary_key=True, autoincrement=True)
    webhook_id: Mapped[str] = mapped_column(
        ForeignKey("webhooks.id", ondelete="CASCADE"), index=True
    )
    body: Mapped[dict[str, Any]] = mapped_column(JSON)
    attempts: Mapped[int] = mapped_column(default=0)
    #: when it is tried next; None once it was delivered or given up
    due_at: Mapped[float | None] = mapped_column(Float, index=True)
    delivered_at: Mapped[float | None] = mapped_column(Float)
    #: of the last attempt
    error: Mapped[str | None] = mapped_column(String(512))


class EventRow(Base):
    """Append-only log of the events of searches; a trigger refuses changes to its rows."""

    __tablename__ = "events"

    id: Mapped[int] = mapped_column(_BIG, primary_key=True, autoincrement=True)
    search_id: Mapped[str] = mapped_column(ForeignKey("searches.id", ondelete="CASCADE"))
    created_at: Mapped[float] = mapped_column(Float)
    kind: Mapped[str] = mapped_column(String(32))
    data: Mapped[dict[str, Any]] = mapped_column(JSON)

    __table_args__ = (Index("ix_events_search_id_id", "search_id", "id"),)


class ProcessRow(Base):
    """A worker or a service that uses this store, as it last reported itself."""

    __tablename__ = "processes"

    #: host:pid, with what it is in front where that is no worker
    name: Mapped[str] = mapped_column(String(255), primary_key=True)
    #: worker | api | doctor
    kind: Mapped[str] = mapped_column(String(16))
    host: Mapped[str] = mapped_column(String(255))
    pid: Mapped[int] = mapped_column(_BIG)
    #: of einsum-nas
    version: Mapped[str] = mapped_column(String(64))
    started_at: Mapped[float] = mapped_column(Float)
    seen_at: Mapped[float] = mapped_column(Float)
    #: idle | busy | waiting (for its cluster) | draining
    state: Mapped[str] = mapped_column(String(16))
    #: what it works on
    search_id: Mapped[str | None] = mapped_column(String(32))
    #: resources of its cluster, and whatever else it tells
    about: Mapped[dict[str, Any]] = mapped_column(JSON)


class KeyRow(Base):
    """An API key, or the session of a browser; only the digest of the secret is stored."""

    __tablename__ = "api_keys"

    #: 12 hex digits, for people
    id: Mapped[str] = mapped_column(String(16), primary_key=True)
    #: SHA-256 of the secret, hex
    digest: Mapped[str] = mapped_column(String(64), unique=True)
    tenant: Mapped[str] = mapped_column(String(64))
    name: Mapped[str] = mapped_column(String(64))
    #: read, submit, admin, keys; apart by commas
    scopes: Mapped[str] = mapped_column(String(64))
    #: of a session: the key that opened it, and without which it is nothing; no foreign key, for
    #: a copy of the table brings its rows in any order
    parent: Mapped[str | None] = mapped_column(String(16))
    rotated_from: Mapped[str | None] = mapped_column(String(16))
    #: of an account, whose secret nobody has: a digest of its provider and its name there
    subject: Mapped[str | None] = mapped_column(String(64), unique=True)
    #: the key by which it was made over REST; None for one that the operator has made
    created_by: Mapped[str | None] = mapped_column(String(16))
    #: of the request that made it: the same one makes no second key
    idempotency_key: Mapped[str | None] = mapped_column(String(255))
    request_digest: Mapped[str | None] = mapped_column(String(64))
    created_at: Mapped[float] = mapped_column(Float)
    expires_at: Mapped[float | None] = mapped_column(Float)
    revoked_at: Mapped[float | None] = mapped_column(Float)
    #: last use, to the hour
    used_at: Mapped[float | None] = mapped_column(Float)

    __table_args__ = (
        UniqueConstraint("tenant", "idempotency_key", name="uq_api_keys_tenant_idempotency_key"),
    )


class TenantRow(Base):
    """Quotas of a tenant; None where the settings' apply."""

    __tablename__ = "tenants"

    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    searches: Mapped[int | None]
    train_flops: Mapped[float | None] = mapped_column(Float)
    concurrency: Mapped[int | None]


class AuditRow(Base):
    """Who did what, and who was refused; triggers refuse changes, and deletes within 90 days."""

    __tablename__ = "audit"

    id: Mapped[int] = mapped_column(_BIG, primary_key=True, autoincrement=True)
    created_at: Mapped[float] = mapped_column(Float)
    tenant: Mapped[str | None] = mapped_column(String(64))
    key_id: Mapped[str | None] = mapped_column(String(16))
    #: method and route, or what was done to a key or a tenant
    action: Mapped[str] = mapped_column(String(128))
    #: what it was done to, such as the path
    target: Mapped[str | None] = mapped_column(String(128))
    #: of the answer
    status: Mapped[int | None]
    reason: Mapped[str | None] = mapped_column(String(255))
    address: Mapped[str | None] = mapped_column(String(64))
    request_id: Mapped[str | None] = mapped_column(String(128))


class ScopeRow(Base):
    """Counts and revision of a scope: a search (its id), a task (`name@fingerprint`), or a bare
    task name, which has a revision only; scopes of other tenants than `default` begin with
    `tenant/`.  Those of devices within a scope count the timed runs and their points."""

    __tablename__ = "scopes"

    scope: Mapped[str] = mapped_column(String(128), primary_key=True)
    revision: Mapped[int] = mapped_column(_BIG)
    #: completed runs, their points and their searches
    trials: Mapped[int] = mapped_column(_BIG)
    points: Mapped[int] = mapped_column(_BIG)
    searches: Mapped[int] = mapped_column(_BIG)
    least_flops: Mapped[float | None] = mapped_column(Float)
    greatest_flops: Mapped[float | None] = mapped_column(Float)


class BarRow(Base):
    """The bars of a scope on an axis; a point above them does not enter the standings."""

    __tablename__ = "bars"

    scope: Mapped[str] = mapped_column(String(128), primary_key=True)
    axis: Mapped[str] = mapped_column(String(24), primary_key=True)
    dense: Mapped[bool] = mapped_column(primary_key=True)
    #: standing points, and those of them that came since the last look at them all
    size: Mapped[int] = mapped_column(_BIG)
    added: Mapped[int] = mapped_column(_BIG)
    #: pairs (x, loss), float64 little-endian, in order: a point at or right of x and above the loss
    #: is beaten by enough runs
    edges: Mapped[bytes] = mapped_column(LargeBinary)


class StandingRow(Base):
    """A point of one of the best runs of a scope at some budget; see `nas.store.fronts`."""

    __tablename__ = "standings"

    scope: Mapped[str] = mapped_column(String(128), primary_key=True)
    axis: Mapped[str] = mapped_column(String(24), primary_key=True)
    trial_id: Mapped[int] = mapped_column(
        ForeignKey("trials.id", ondelete="CASCADE"),
        primary_key=True,
        autoincrement=False,
        index=True,  # a trial that is deleted takes its rows along
    )
    step: Mapped[int] = mapped_column(_BIG, primary_key=True, autoincrement=False)
    dense: Mapped[bool]
    #: what is run with several seeds; see `nas.store.fronts.model_number`
    model: Mapped[int] = mapped_column(_BIG)
    #: in the unit of the axis
    x: Mapped[float] = mapped_column(Float)
    loss: Mapped[float] = mapped_column(Float)
