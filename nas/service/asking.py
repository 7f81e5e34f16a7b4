"""Trials that clients train: asked for, and told of, over REST and in process."""

from __future__ import annotations

import math
from statistics import fmean, stdev
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from nas.errors import InvalidInput
from nas.planning.accepted import validated
from nas.planning.request import WHOLE, clean_text
from nas.planning.runs import RunPlan, evaluation_steps
from nas.records.base import Record
from nas.records.trial import StoredPoint, Trial
from nas.store import Store
from nas.store.offers import LEAST_LEASE, MOST_LEASE, Offers

MAX_LOSSES, MAX_POINTS, MAX_ERROR, MAX_STEP = 2048, 64, 2000, 1 << 40
#: So that the mean and the variance of losses are finite.
MAX_LOSS = 1e30
_FORBID = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
_NAME = r"^[!-~]([ -~]*[!-~])?$"


class Ask(BaseModel):
    """Who asks for a trial.  Build with `checked`."""

    model_config = _FORBID

    holder: str = Field(
        "client", pattern=_NAME, max_length=128,
        description="Name of the process that will train it, shown to users.",
    )  # fmt: skip
    lease_seconds: float = Field(
        600.0, ge=LEAST_LEASE, le=MOST_LEASE, strict=False,
        description="Seconds after which the trial is given to another, unless it is told of.",
    )  # fmt: skip

    @classmethod
    def checked(cls, values: Any) -> Ask:
        """Validate plain values; `InvalidInput` names the first bad field."""
        return validated(cls, values)


class Told(BaseModel):
    """An evaluation of a trial."""

    model_config = _FORBID

    step: Annotated[int, Field(ge=1, le=MAX_STEP), WHOLE] = Field(
        description="Optimiser steps taken."
    )
    losses: list[Annotated[float, Field(ge=-MAX_LOSS, le=MAX_LOSS)]] = Field(
        min_length=2, max_length=MAX_LOSSES,
        description="Validation loss of each sample, or of each batch of samples: the same ones in "
        "the same order for every trial of a search. Their mean is the loss, and intervals and "
        "comparisons rest on them.",
    )  # fmt: skip
    seconds: float = Field(ge=0.0, le=1e9, description="Seconds of training so far.")

    @property
    def point(self) -> StoredPoint:
        """As it is stored, but for its FLOPs."""
        stderr = stdev(self.losses) / math.sqrt(len(self.losses))
        return StoredPoint(
            self.step, 0.0, fmean(self.losses), stderr, self.seconds, tuple(self.losses)
        )


class Tell(BaseModel):
    """What the holder of a trial tells of it.  Build with `checked`."""

    model_config = _FORBID

    token: str = Field(
        pattern=r"^[0-9a-f]{32}$", description="Of the lease, as the answer to `ask` gave it."
    )
    points: list[Told] = Field(
        [], max_length=MAX_POINTS, description="Evaluations; with none the lease is renewed.",
        json_schema_extra={"minItems": 0},
    )  # fmt: skip
    outcome: Literal["complete", "failed"] | None = Field(
        None,
        description="complete: the last step was told | failed: no result | null: it goes on",
    )
    error: Annotated[str, Field(min_length=1, max_length=MAX_ERROR)] | None = Field(
        None, description="Why it failed; null otherwise."
    )

    @classmethod
    def checked(cls, values: Any) -> Tell:
        """Validate plain values; `InvalidInput` names the first bad field."""
        found = validated(cls, values)
        if (found.outcome == "failed") != (found.error is not None):
            raise InvalidInput("error", found.error, "why it failed; null unless outcome is failed")
        if found.error is not None and not clean_text(found.error):
            raise InvalidInput("error", found.error, "text without NUL and lone surrogates")
        return found


class AskedTrial(Record):
    """A trial to be trained, or none."""

    trial: Trial | None = Field(description="the trial to train; null where there is none now")
    token: str | None = Field(description="secret of its lease, for what is told of it")
    lease_seconds: float | None = Field(
        description="seconds until it is given to another, unless it is told of"
    )
    evaluation_steps: list[int] = Field(
        description="steps at which other trials are evaluated; any other step may be told too"
    )
    recipe: dict[str, Any] | None = Field(description="settings of the recipe")
    ended: bool = Field(description="whether the search has ended, so that there will be none")


class ToldTrial(Record):
    """What became of what was told."""

    lease_seconds: float | None = Field(description="length of the lease from now; null once ended")
    outcome: Literal["complete", "failed"] | None = Field(
        description="of the trial, if it has ended"
    )


def ask(store: Store, search_id: str, wanted: Ask) -> AskedTrial:
    """Lease the next trial of a search whose trials clients train.

    Raises
    ------
    NotFound, Conflict
        No such search; one whose trials workers train.
    """
    found = Offers(store).ask(search_id, wanted.holder, wanted.lease_seconds)
    if found.trial_id is None:
        return AskedTrial(
            trial=None, token=None, lease_seconds=None, evaluation_steps=[], recipe=None,
            ended=found.ended,
        )  # fmt: skip
    trial = store.trial(found.trial_id)
    recipe = store.search(search_id).request.settings
    return AskedTrial(
        trial=trial, token=found.token, lease_seconds=wanted.lease_seconds,
        evaluation_steps=evaluation_steps(RunPlan.of(trial), recipe),
        recipe=recipe.as_dict(), ended=False,
    )  # fmt: skip


def tell(store: Store, trial_id: int, told: Tell) -> ToldTrial:
    """Store what the holder of a trial tells of it.

    Raises
    ------
    NotFound, LeaseLost, Conflict, InvalidInput
        As of `nas.store.offers.Offers.tell` and `end`.
    """
    offers = Offers(store)
    left: float | None = None
    if told.points or told.outcome is None:
        left = offers.tell(trial_id, told.token, [p.point for p in told.points])
    if told.outcome is None:
        return ToldTrial(lease_seconds=left, outcome=None)
    outcome = offers.end(trial_id, told.token, told.error)
    return ToldTrial(lease_seconds=None, outcome=outcome)
