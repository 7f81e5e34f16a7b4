"""How far searches have come: at a glance, and by rounds where a stopping rule divides them."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field, computed_field

from nas.records.base import FLOPS, SECONDS, Record

#: Of a round: new candidates begin, none does and paused ones go on, or runs get fresh seeds.
Phase = Literal["exploring", "racing", "confirming"]


class SearchProgress(Record):
    """What a search has done by rounds so far."""

    round: int = Field(description="number of the round that runs, or ran last; 0 before the first")
    phase: Phase | None = Field(
        description=f"{' | '.join(get_args(Phase))}: what that round does; null before the first"
    )
    spent: float = Field(
        description="train FLOPs that its runs have trained, or seconds that workers have held it "
        "where its budget is in seconds; reused results cost nothing"
    )
    total: float | None = Field(description="budget of the whole search; null without one")
    unit: Literal["train FLOPs", "seconds"]
    trained_flops: int = Field(description="train FLOPs that its runs have trained, exact")
    stopped_flops: int = Field(description="train FLOPs of the runs that its rule stopped")


class Overview(Record):
    """A search at a glance: its lowest losses, what it has cost, and how long it will take."""

    structured: float | None = Field(
        description="lowest measured loss of a completed structured run; null without one"
    )
    dense: float | None = Field(description="the same of a dense run")
    trained_flops: int = Field(
        description="train FLOPs that its runs have trained, exact", json_schema_extra=FLOPS
    )
    held_seconds: float = Field(
        description="seconds that workers have held it, the running claim included",
        json_schema_extra=SECONDS,
    )
    share: float | None = Field(
        description="of its runs or its budget, what is done; null where neither is known yet"
    )

    @computed_field(  # type: ignore[prop-decorator]
        description="estimate: what is left takes as long, for its share, as what is done; null "
        "where that is not known",
        json_schema_extra=SECONDS,
    )
    @property
    def seconds_left(self) -> float | None:
        """Estimate: what is left takes as long, for its share, as what is done."""
        if not self.share or self.share >= 1 or not self.held_seconds:
            return None
        return self.held_seconds * (1 - self.share) / self.share
