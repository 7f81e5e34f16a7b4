"""The records of a completed run and of the points of its curve: what answers rest on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Self

from pydantic import Field

from nas.designs.design import family_of, parse_design
from nas.records.base import DESIGN, THETA, Record
from nas.records.device import device_of, is_timed, trained_together
from nas.records.trial import StoredPoint, Trial

#: Field of a run → field of its trial, where their names differ.
OF_TRIAL: Mapping[str, str] = {
    "trial_id": "id", "inference_flops": "forward_flops_per_token",
    "step_seconds": "seconds_per_step", "peak_memory": "peak_memory_bytes",
}  # fmt: skip

#: Fields of a run that are no columns of its trial.
NOT_STORED = frozenset({"complete", "points", "device", "together"})


class OfRun(Record):
    """What tells a run from others, and what it costs."""

    search_id: str
    trial_id: int
    number: int = Field(description="number of the trial in its search")
    kind: str = Field(description="candidate | reference | confirmation")
    name: str
    theta: list[float] = Field(description=THETA)
    design: str = Field(description=DESIGN)
    width: int
    inference_flops: float = Field(description="forward FLOPs per token of the whole model")
    params: int = Field(description="trainable parameters of the whole model")
    step_seconds: float | None = Field(description="measured seconds of a training step")
    peak_memory: int | None = Field(description="measured peak memory of training, bytes")

    def shared(self) -> dict[str, Any]:
        """These fields by name, for a record that has them and others."""
        return {name: getattr(self, name) for name in OfRun.model_fields}


class Run(OfRun):
    """A run with its learning curve."""

    dense: bool
    #: equal for runs that differ in steps and seed only
    model: str
    depth: int
    steps: int
    seed: int
    train_flops_per_step: int
    #: whether it has reached its last step
    complete: bool = True
    #: in the order of their steps, without the losses of single samples; empty where a reader left
    #: them out
    points: tuple[StoredPoint, ...] = ()
    #: see `nas.records.device`; None where it was not recorded, or a reader left it out
    device: str | None = None
    together: int = 1

    @classmethod
    def of(cls, trial: Trial) -> Self:
        """The run of a stored trial, without its points."""
        names = cls.model_fields.keys() - NOT_STORED - {"model"}
        values = {name: getattr(trial, OF_TRIAL.get(name, name)) for name in names}
        model, ran = trial.model or str(trial.id), trial.environment
        return cls(
            **values, model=model, complete=trial.state == "complete", device=device_of(ran),
            together=trained_together(ran),
        )  # fmt: skip

    @property
    def timed(self) -> bool:
        """Whether it has measured seconds, and it is known of which device."""
        return self.device is not None and is_timed([p.train_seconds for p in self.points])

    @property
    def structure(self) -> str:
        """The design in canonical form as text, equal for equal structures at any width."""
        return structure_key(self.design)


@lru_cache(maxsize=65536)
def structure_key(design: str) -> str:
    """A design's canonical form as text, equal for equal structures at any width."""
    found = parse_design(design).canonical()
    if family_of(found).exponents_suffice:
        return ",".join(f"{v:.6g}" for v in found.exponents)
    return found.text


@dataclass(frozen=True, slots=True)
class CurvePoint(StoredPoint):
    """A point of a learning curve with its run, which the points of a curve share."""

    run: Run = field(kw_only=True)
