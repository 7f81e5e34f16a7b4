"""The records of a trial and of its evaluations, for the store, REST and exported files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, SkipValidation, field_serializer

from nas.records.base import BYTES, DESIGN, FLOPS, LOSS, SECONDS, STEPS, THETA, Record

#: Why a trial has no result: its own doing, its process died, its time or its memory was used up,
#: or it was stopped with its search.
TrialFailure = Literal["run", "process", "timeout", "memory", "search"]
TrialState = Literal["planned", "running", "paused", "complete", "stopped", "failed"]
TrialKind = Literal["candidate", "reference", "confirmation"]


class Trial(Record):
    """One run of a search.  FLOPs are train FLOPs and exact; times are seconds since 1970-01-01.

    FLOPs count 1 MAC as 2, training as 3 × forward, and every matrix product of the model.  Fields
    with `exclude` are not shown by REST.
    """

    id: int = Field(description="id of the trial on its store")
    search_id: str = Field(description="search that the trial belongs to")
    number: int = Field(
        description="number of the trial in its search; the replicates of a candidate or a "
        "reference, which differ in their seed, follow one another"
    )
    kind: SkipValidation[TrialKind] = Field(
        description="candidate | reference (dense) | confirmation"
    )
    state: SkipValidation[TrialState] = Field(description=" | ".join(get_args(TrialState)))
    sampler_params: dict[str, int | float | str] | None = Field(
        description="point of the sampler's box; null for references"
    )
    sampler_state: dict[str, Any] = Field({}, exclude=True)
    unseen: tuple[int, ...] = Field(
        description="numbers of the trials of candidates that were still running when this one was "
        "proposed, so that the sampler did not know their results"
    )
    theta: tuple[float, ...] = Field(description=THETA)
    design: str = Field(description=DESIGN)
    name: str = Field(description="name of the structure")
    structures: tuple[str, ...] = Field(
        description="integer sizes of the layers of a block; with two factors "
        "d_in x d_out:alpha.beta.gamma.delta.epsilon.phi.rho"
    )
    dense: bool = Field(description="whether every layer is dense")
    width: int = Field(description="features of the model")
    depth: int = Field(description="layers of the model")
    steps: int = Field(description="optimiser steps of the whole run", json_schema_extra=STEPS)
    train_flops_per_step: int = Field(
        description="training FLOPs of a step, exact", json_schema_extra=FLOPS
    )
    train_flops: int = Field(
        description="training FLOPs of the whole run, exact; 1 MAC = 2 FLOPs, training = 3 × "
        "forward", json_schema_extra=FLOPS,
    )  # fmt: skip
    forward_flops_per_token: float = Field(
        description="forward FLOPs for a position of a sample", json_schema_extra=FLOPS
    )
    params: int = Field(description="trainable parameters of the whole model")
    seed: int = Field(description="seed of the run")
    key: str = Field("", description="digest of everything that decides the result", exclude=True)
    reused_from: int | None = Field(
        description="trial with an equal run, from which this result was copied"
    )
    attempts: int = Field(
        description="times that it was started; a paused run is started again when it goes on"
    )
    until_step: int | None = Field(
        None,
        description="step at which it is paused next, or was paused last; null if it trains to its "
        "last step at once", json_schema_extra=STEPS,
    )  # fmt: skip
    trained_steps: int = Field(
        0, description="optimiser steps that it had trained when it last paused or ended; a reused "
        "result has none", json_schema_extra=STEPS,
    )  # fmt: skip
    trained_flops: int = Field(
        0, description="training FLOPs of these steps, exact: what a stopped run has cost",
        json_schema_extra=FLOPS,
    )  # fmt: skip
    environment: dict[str, Any] | None = Field(
        description="where it ran: device, threads, versions"
    )
    loss: float | None = Field(
        description="validation loss at the last step, mean over the fixed validation samples; "
        "complete trials only", json_schema_extra=LOSS,
    )  # fmt: skip
    error: str | None = Field(description="why it failed or was stopped")
    created_at: float = Field(description="seconds since 1970-01-01 UTC", json_schema_extra=SECONDS)
    started_at: float | None = Field(
        description="seconds since 1970-01-01 UTC", json_schema_extra=SECONDS
    )
    finished_at: float | None = Field(
        description="seconds since 1970-01-01 UTC", json_schema_extra=SECONDS
    )
    model: str | None = Field(
        None, description="digest, equal for runs that differ in steps and seed only", exclude=True
    )
    confirms: int | None = Field(description="trial that this one repeats with a new seed")
    seconds_per_step: float | None = Field(
        description="measured training time of a step; null if unknown", json_schema_extra=SECONDS
    )
    peak_memory_bytes: int | None = Field(
        description="measured: parameters, optimiser state and the peak of what a step allocates; "
        "null if unknown", json_schema_extra=BYTES,
    )  # fmt: skip
    failure: SkipValidation[TrialFailure | None] = Field(
        description="why it has no result. run: an error of the run itself, such as a loss that is "
        "not finite | process: its process died | timeout | memory | search: stopped with its "
        "search"
    )

    @field_serializer("structures")
    def _each_once(self, structures: Sequence[str]) -> list[str]:
        return list(dict.fromkeys(structures))


class KeptWeights(Record):
    """The weights of a run at its last step, a safetensors file with its structures."""

    trial_id: int = Field(description="trial that they were trained in")
    bytes: int = Field(description="size of the file", json_schema_extra=BYTES)
    sha256: str = Field(description="digest of the file, hex")


@dataclass(frozen=True, slots=True)
class MeasuredCost:
    """Measured cost of a training step; None where the run was too short to tell.

    Its fields are those of a `Trial` that a run measures.
    """

    #: median on a CPU, mean of a burst on a GPU; evaluations are not in it
    seconds_per_step: float | None
    #: parameters, optimiser state, and the most that a step holds besides; neither data nor
    #: evaluations nor the process itself are in it
    peak_memory_bytes: int | None


@dataclass(frozen=True, slots=True)
class StoredPoint:
    """One evaluation of a run."""

    step: Annotated[int, Field(description="optimiser steps taken", json_schema_extra=STEPS)]
    train_flops: Annotated[
        float, Field(description="training FLOPs spent, a double", json_schema_extra=FLOPS)
    ]
    loss: Annotated[
        float,
        Field(
            description="validation loss, mean over the fixed validation samples",
            json_schema_extra=LOSS,
        ),
    ]
    loss_stderr: Annotated[
        float,
        Field(
            description="standard error of the loss over the validation samples",
            json_schema_extra=LOSS,
        ),
    ]
    train_seconds: Annotated[
        float,
        Field(description="seconds of training, evaluation left out", json_schema_extra=SECONDS),
    ]
    #: loss of each validation window; empty where a reader left it out
    window_losses: Annotated[tuple[float, ...], Field(exclude=True)] = ()
