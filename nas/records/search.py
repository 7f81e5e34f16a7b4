"""The record of a search: what the store returns, REST shows and the command line prints."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field, SkipValidation

from nas.planning.request import SearchRequest
from nas.records.base import SECONDS, Record

SearchState = Literal["queued", "running", "paused", "succeeded", "failed", "cancelled"]
#: Why a search failed: its attempts are used up, its input cannot be used, no candidate completed,
#: or a limit was reached before one did.
SearchFailure = Literal["attempts", "input", "trials", "limit"]


class Search(Record):
    """A search and its progress.  Times are seconds since 1970-01-01 UTC.

    Fields with `exclude` are the service's own: users see none of them.
    """

    id: str
    state: SkipValidation[SearchState] = Field(description=" | ".join(get_args(SearchState)))
    task: str
    task_fingerprint: str | None = Field(
        description="fingerprint of the data, null until a worker has loaded it"
    )
    request: SearchRequest
    created_at: float = Field(json_schema_extra=SECONDS)
    started_at: float | None = Field(json_schema_extra=SECONDS)
    finished_at: float | None = Field(json_schema_extra=SECONDS)
    cancel_requested: bool
    error: str | None
    worker: str | None
    rounds: int = Field(
        0, description="rounds that it has begun under its stopping rule; 0 without one"
    )
    epoch: int = Field(description="number of times that a worker claimed it")
    trial_counts: dict[str, int] = Field(description="trial state → number of trials")
    runs_total: int | None = Field(
        description="runs of the whole search, references and every seed included; null until "
        "they are planned, and where a stopping rule decides how many there will be"
    )
    tenant: str
    priority: int = Field(description="searches of higher priority run first")
    pause_requested: bool
    failures: int = Field(description="lost leases and infrastructure errors since it was queued")
    failure: SkipValidation[SearchFailure | None] = Field(
        description="why it failed. attempts: too many lost leases and infrastructure errors, may "
        "be retried | input: its data cannot be used | trials: no candidate completed | limit: a "
        "limit was reached before a candidate completed"
    )
    limit_reached: str | None = Field(
        description="the limit that ended the search before its last trial"
    )
    held_seconds: float = Field(
        description="seconds that workers held it in earlier claims", json_schema_extra=SECONDS
    )
    stale_writes: int = Field(
        description="refused writes of workers from which another worker had taken the search over"
    )
    cloned_from: str | None
    name: str | None = Field(None, description="what people call it")
    tags: list[str] = Field([], description="words to find it by")
    notes: str | None = None
    archived: bool = Field(False, description="whether lists leave it out")
    #: grows with creation; the key of pagination
    sequence: int = Field(0, exclude=True)
    #: runs of dense references planned; 0 before a worker has begun the search
    references: int = Field(0, exclude=True)
    #: path of the data on this host, and the folder that it may not lead out of
    data_path: str | None = Field(None, exclude=True)
    data_root: str | None = Field(None, exclude=True)
    #: train FLOPs that count against the tenant's quota
    charged_flops: float = Field(0.0, exclude=True)
