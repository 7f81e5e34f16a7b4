"""The request of a search: one validated value, the same for REST, CLI and Python."""

from __future__ import annotations

import hashlib
import json
import math
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.config import JsonDict

from nas.designs.design import Design, parse_design, proposals, structure_of
from nas.designs.mixture import Mixture
from nas.designs.theta import DENSE, Theta
from nas.errors import InvalidInput
from nas.planning.accepted import validated
from nas.planning.recipe import (
    RECIPES,
    SETTINGS,
    TASKS,
    ImageRecipe,
    Recipe,
    TextRecipe,
    recipe_of,
)
from nas.planning.runs import MAX_TRAIN_FLOPS, MIN_REFERENCES, accepted_budget, least_budget

#: Families of designs that a search may propose; "einsum" has `Space.factors` factors.
FAMILIES = tuple(proposals())
if TYPE_CHECKING:
    Family = str
else:
    Family = Literal[FAMILIES]
Heads = Literal["free", "aligned"]
MAX_FACTORS = 4
Sampler = Literal["tpe", "nsga2", "random", "qmc", "gp"]
Objective = Literal["budget", "pareto"]
SAMPLERS: tuple[str, ...] = get_args(Sampler)
OBJECTIVES: tuple[str, ...] = get_args(Objective)
MAX_TRIALS = 10_000
MAX_REFERENCES = 32
MAX_REPLICATES = 16
MAX_CONFIRM_SEEDS = 64
MAX_SEED = 2**31 - 1
MAX_PRIORITY = 1000
#: Longest limit of time, three years: an operating system's clock must be able to hold it.
MAX_SECONDS = 1e8


def _as_whole(given: Any) -> Any:
    return int(given) if isinstance(given, float) and given.is_integer() else given


#: JSON has one kind of number: 16.0 is the whole number 16.
WHOLE = BeforeValidator(_as_whole)


class ConfirmedRun(BaseModel):
    """A run to be repeated with another seed, and possibly more steps."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    trial_id: int = Field(ge=0, le=2**63 - 1, description="The run that is confirmed.")
    theta: tuple[float, ...] = Field(max_length=64)
    design: str | None = Field(
        None, max_length=2048, description="Text of the design; null for two factors, as in theta."
    )
    width: int = Field(ge=1, le=2**24)
    steps: int = Field(ge=1, le=2**53)

    @property
    def as_design(self) -> Design:
        """The design; older confirmations give it by theta only."""
        return Theta.of(self.theta) if self.design is None else parse_design(self.design)


class Confirm(BaseModel):
    """Runs of a search, and the new seeds with which each is repeated."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    search: str = Field(max_length=64, description="The search whose runs are confirmed.")
    runs: tuple[ConfirmedRun, ...] = Field(min_length=1, max_length=MAX_TRIALS)
    seeds: tuple[Annotated[int, Field(ge=0, le=MAX_SEED)], ...] = Field(
        min_length=1, max_length=MAX_CONFIRM_SEEDS
    )
    longer: float = Field(1.0, ge=1, description="Steps relative to those of the confirmed run.")
    top: int = Field(ge=1, description="Number of candidates that was requested.")
    spread: bool = Field(
        False, description="Whether they were taken from the whole ranking, not from its top."
    )


def _choices(default: tuple[Any, ...], most: int, description: str) -> Any:
    """A field of one to `most` different values."""
    once: JsonDict = {"uniqueItems": True}
    return Field(
        default, min_length=1, max_length=most, description=description, json_schema_extra=once
    )


class Space(BaseModel):
    """Which designs a search may propose; each choice adds a dimension to the search space."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    families: tuple[Family, ...] = _choices(("einsum",), len(FAMILIES), " | ".join(FAMILIES))
    factors: tuple[Annotated[int, Field(ge=2, le=MAX_FACTORS, strict=True), WHOLE], ...] = _choices(
        (2,), MAX_FACTORS, "Factors of family einsum."
    )
    experts: tuple[Annotated[int, Field(ge=2, le=1024, strict=True), WHOLE], ...] = _choices(
        (8,), 16, "Experts of the mixtures."
    )
    active: tuple[Annotated[int, Field(ge=1, le=1024, strict=True), WHOLE], ...] = _choices(
        (2,), 16, "Experts that process each token."
    )
    heads: tuple[Heads, ...] = _choices(
        ("free",),
        2,
        "Whether attention heads coincide with blocks of the projections: free | aligned. Applies "
        "to two factors, btt-moe and low-rank-moe; other designs are free.",
    )

    def check(self) -> None:
        """Raise `InvalidInput` for choices that contradict each other."""
        for name in type(self).model_fields:
            chosen = getattr(self, name)
            if len(set(chosen)) != len(chosen):
                raise InvalidInput(f"space.{name}", list(chosen), "each choice once")
        for experts in self.experts:
            for active in self.active:
                Mixture(None, experts, active)  # raises if `active` exceeds `experts`

    def dearest(self) -> Design:
        """A design that at every width costs at least as much as any in the space."""
        dear = [p.dearest for name, p in proposals().items() if name in self.families and p.dearest]
        of_each = [DENSE, *(dearest(self) for dearest in dear)]
        return max(of_each, key=lambda design: structure_of(design, 1024, 1024).macs)


class Limits(BaseModel):
    """Limits of a search; the first one reached ends it, and its results are kept."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    trial_seconds: float | None = Field(
        None,
        gt=0,
        le=MAX_SECONDS,
        description="Most seconds of one attempt at a trial; then the trial fails. Runs that train "
        "together have so many seconds each: three have three times as many.",
    )
    seconds: float | None = Field(
        None,
        gt=0,
        le=MAX_SECONDS,
        description="Most seconds that workers may hold the search; time in the queue does not "
        "count.",
    )
    total_train_flops: float | None = Field(
        None,
        gt=0,
        description="Most train FLOPs of all its runs together; no run is proposed that could "
        "exceed it. A run that is repeated after a crash counts once, a reused result not at all.",
    )


class SearchRequest(BaseModel):
    """A search: a task, a budget, and how to search.

    Build one with `SearchRequest.checked`, which raises `InvalidInput` for the first bad field.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, str_max_length=4096
    )

    task: str = Field(
        "text",
        description=f"Task to train: {', '.join(TASKS)}.",
        examples=["text"],
        json_schema_extra={"enum": list(TASKS)},
    )
    data: str | None = Field(
        None,
        min_length=1,
        description="File or folder to train on instead of the task's default; over REST a name "
        "inside the service's data folder.",
        examples=["texts"],
    )
    recipe: str | None = Field(
        None,
        description="Named recipe of the task: model family and training settings; by "
        "default the task's first.",
        examples=["gpt-bpe-1"],
        json_schema_extra={"enum": [*RECIPES, None]},
    )
    overrides: dict[str, bool | int | float | str] | None = Field(
        None,
        description="Settings of the recipe to change, by name.",
        examples=[{"depth": 6}],
        json_schema_extra={"propertyNames": {"enum": list(SETTINGS)}},
    )
    train_flops: float = Field(
        # the accepted range depends on the recipe; check_budget raises an error that says it
        json_schema_extra={"exclusiveMinimum": 0, "maximum": MAX_TRAIN_FLOPS},
        description="Budget of each run in train FLOPs (1 MAC = 2 FLOPs, training = 3 × forward).",
        examples=[3e11],
    )
    trials: Annotated[int, Field(ge=1, le=MAX_TRIALS), WHOLE] = Field(
        16,
        description="Candidates to run, besides the dense references.",
    )
    objective: Objective = Field(
        "budget",
        description="budget: minimise the validation loss at the budget. pareto: minimise loss and "
        "train FLOPs together; each run's budget is proposed as well, in [budget/32, budget].",
    )
    sampler: Sampler = Field("tpe", description="Optuna sampler that proposes candidates.")
    seed: Annotated[int, Field(ge=0, le=MAX_SEED), WHOLE] = Field(
        0, description="Seed of proposals and of every run."
    )
    references: Annotated[int, Field(ge=MIN_REFERENCES, le=MAX_REFERENCES), WHOLE] = Field(
        5,
        description="Dense runs at distinct widths, besides the trials; fewer only if the "
        "budget admits fewer widths.",
    )
    replicates: Annotated[int, Field(ge=1, le=MAX_REPLICATES), WHOLE] = Field(
        1,
        description="Runs of each candidate and each dense reference: with `seed`, `seed` + 1 and "
        "so on. The sampler sees their mean loss. Small models train together in one process, "
        "which takes little more time than one of them.",
        examples=[3],
    )

    space: Space | None = Field(
        None,
        strict=False,
        description="Designs that may be proposed; by default those of two factors.",
        examples=[{"families": ["einsum", "btt-moe"], "factors": [2, 3], "experts": [8]}],
    )
    limits: Limits | None = Field(
        None,
        strict=False,
        description="Limits of the search; by default only the service's time limit of a trial.",
        examples=[{"trial_seconds": 600, "seconds": 86400, "total_train_flops": 1e14}],
    )
    priority: Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY), WHOLE] = Field(
        0,
        description="Searches of higher priority run first within a tenant, of equal ones the "
        "oldest.",
    )
    confirm: Confirm | None = Field(
        None,
        strict=False,
        description="Set by `POST /v1/searches/{id}/confirm`: the search repeats these runs with "
        "these seeds, instead of running references and candidates.",
    )

    @property
    def settings(self) -> Recipe:
        """Model and training settings; the data may complete them (classes, features)."""
        return recipe_of(self.task, self.recipe, self.overrides)

    @property
    def designs(self) -> Space:
        """The designs that may be proposed."""
        return self.space or Space()

    @property
    def digest(self) -> str:
        """SHA-256 of the request, equal for equal requests."""
        # unset newer fields are left out, so that older requests keep their digests
        later = ("confirm", "space", "limits", "priority")
        left_out = {name for name in later if not getattr(self, name)}
        left_out |= {"replicates"} if self.replicates == 1 else set()
        values = self.model_dump(mode="json", exclude=left_out)
        canonical = json.dumps(values, sort_keys=True, allow_nan=False)
        return hashlib.sha256(canonical.encode()).hexdigest()

    @classmethod
    def checked(cls, values: Any) -> SearchRequest:
        """Validate plain values.

        Raises
        ------
        InvalidInput
            Names the field, repeats the value and says what is accepted.
        """
        request = validated(cls, values, _ACCEPTED)
        request._check_ranges()
        return request._plain()

    def _plain(self) -> SearchRequest:
        """The same request with None for defaults, so that equivalent requests compare equal."""
        same = self.recipe == recipe_of(self.task).name
        changes = {
            "recipe": None if same else self.recipe,
            "overrides": self.overrides or None,
            "space": None if self.space == Space() else self.space,
            "limits": None if self.limits == Limits() else self.limits,
        }
        return self.model_copy(update=changes)

    def check_budget(self, recipe: Recipe) -> None:
        """Raise `InvalidInput` if the budget is out of range for the recipe, completed by data."""
        dearest = self.designs.dearest()
        least = least_budget(recipe, dearest)
        if not (math.isfinite(self.train_flops) and least <= self.train_flops <= MAX_TRAIN_FLOPS):
            raise InvalidInput("train_flops", self.train_flops, accepted_budget(recipe, dearest))

    def _check_ranges(self) -> None:
        recipe = self.settings
        self.designs.check()
        if not recipe.attends and "aligned" in self.designs.heads:
            accepted = f"free: models of recipe {recipe.name} have no attention"
            raise InvalidInput("space.heads", list(self.designs.heads), accepted)
        if self.data is not None and (not self.data or not _clean_text(self.data)):
            raise InvalidInput("data", self.data, _ACCEPTED["data"])
        if self.data is None and isinstance(recipe, ImageRecipe):
            recipe.check_default_data()
        if self.data is None and isinstance(recipe, TextRecipe):
            recipe.check_bytes()
        self.check_budget(recipe)
        self._check_confirm(recipe)
        self._check_replicates()
        self._check_limits()

    def _check_replicates(self) -> None:
        count = self.replicates
        if self.confirm is not None and count != 1:
            raise InvalidInput("replicates", count, "1 for a confirmation, which has its own seeds")
        if self.seed + count - 1 > MAX_SEED:
            accepted = f"at most {MAX_SEED - self.seed + 1} with seed {self.seed}"
            raise InvalidInput("replicates", count, f"{accepted}: seeds end at {MAX_SEED}")
        if self.trials * count > MAX_TRIALS:
            accepted = f"at most {MAX_TRIALS // self.trials} with {self.trials:,} trials"
            raise InvalidInput("replicates", count, f"{accepted}: {MAX_TRIALS:,} runs in all")

    def _check_limits(self) -> None:
        total = self.limits.total_train_flops if self.limits else None
        if total is None:
            return
        if self.confirm is not None:
            accepted = "null for a confirmation, because its runs are fixed"
            raise InvalidInput("limits.total_train_flops", total, accepted)
        least = self.train_flops * (self.references + 1) * self.replicates
        if total < least:
            each = f", {self.replicates} runs of each" if self.replicates > 1 else ""
            accepted = f"at least {least:.6g}, for the references and one candidate{each}"
            raise InvalidInput("limits.total_train_flops", total, accepted)

    def _check_confirm(self, recipe: Recipe) -> None:
        if self.confirm is None:
            return
        if self.trials != len(self.confirm.runs) * len(self.confirm.seeds):
            raise InvalidInput("trials", self.trials, "runs × seeds of `confirm`")
        for run in self.confirm.runs:
            _ = run.as_design
            if run.width not in recipe.widths:
                raise InvalidInput("confirm", run.width, f"a width of recipe {recipe.name}")


#: What fields accept whose schemas do not say it.
_ACCEPTED = {
    "data": "a file or folder name of printable characters",
    "overrides": "an object of settings of the recipe and their values",
    "confirm": "null, or the value that POST /v1/searches/{id}/confirm sets",
}


def _clean_text(text: str) -> bool:
    """Whether databases and file systems accept the text: no NUL, no lone surrogate."""
    return "\x00" not in text and not any(0xD800 <= ord(c) <= 0xDFFF for c in text)
