"""The request of a search: one validated value, the same for REST, CLI and Python."""

from __future__ import annotations

import hashlib
import json
import math
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.config import JsonDict

from nas.designs.cola import ACTIVATIONS, Activation
from nas.designs.design import Design, parse_design, proposals, structure_of
from nas.designs.mixture import MAX_GRANULARITY, Mixture
from nas.designs.theta import DENSE, Theta
from nas.errors import InvalidInput
from nas.planning.accepted import validated
from nas.planning.cost import structures_of
from nas.planning.recipe import (
    SETTINGS,
    ImageRecipe,
    Recipe,
    TextRecipe,
)
from nas.planning.runs import (
    MAX_TRAIN_FLOPS,
    MIN_REFERENCES,
    RunPlan,
    accepted_budget,
    given_plan,
    least_budget,
)
from nas.planning.tasks import recipe_of, task_cards, task_names

#: Families of designs that a search may propose; "einsum" has `Space.factors` factors.
FAMILIES = tuple(proposals())
if TYPE_CHECKING:
    Family = str
else:
    Family = Literal[FAMILIES]
Heads = Literal["free", "aligned"]
MAX_FACTORS = 4
Sampler = Literal["surrogate", "tpe", "nsga2", "random", "qmc", "gp"]
Objective = Literal["budget", "pareto"]
Trainer = Literal["workers", "client"]
WarmStart = Literal["auto", "none"]
Stopping = Literal["none", "median", "mo-asha", "frontier"]
SAMPLERS: tuple[str, ...] = get_args(Sampler)
OBJECTIVES: tuple[str, ...] = get_args(Objective)
STOPPING: tuple[str, ...] = get_args(Stopping)
MAX_TRIALS = 10_000
MAX_REFERENCES = 32
MAX_REPLICATES = 16
MAX_CONFIRM_SEEDS = 64
MAX_KEPT = 16
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


class GivenCandidate(BaseModel):
    """A candidate that a user gives, instead of one that a sampler proposes."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    design: str = Field(max_length=2048, description="Name or text of the design.")
    width: int = Field(ge=1, le=2**24, description="A width of the recipe.")


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
        (2,), 16, "Experts that process each token, shared ones among them."
    )
    shared: tuple[Annotated[int, Field(ge=0, le=1023, strict=True), WHOLE], ...] = _choices(
        (0,), 16, "Experts that process every token, and that no gate weighs."
    )
    granularity: tuple[Annotated[int, Field(ge=1, le=MAX_GRANULARITY, strict=True), WHOLE], ...] = (
        _choices(
            (1,), 16, "m of ffn-moe, each expert of which has 1/m of the block's hidden dimension."
        )
    )
    activation: tuple[Activation, ...] = _choices(
        ("silu",),
        len(ACTIVATIONS),
        "Between the factors of cola-mlp and activated: " + " | ".join(ACTIVATIONS) + ".",
    )
    heads: tuple[Heads, ...] = _choices(
        ("free",),
        2,
        "Whether attention heads coincide with blocks of the projections: free | aligned. Applies "
        "to einsums, btt-moe, low-rank-moe, blast, pixelfly and lost; other designs are free.",
    )

    def check(self) -> None:
        """Raise `InvalidInput` for choices that contradict each other."""
        for name in type(self).model_fields:
            chosen = getattr(self, name)
            if len(set(chosen)) != len(chosen):
                raise InvalidInput(f"space.{name}", list(chosen), "each choice once")
        for experts in self.experts:
            for active in self.active:
                for shared in self.shared:  # raises if these contradict each other
                    Mixture(None, experts, active, shared)

    def finest(self) -> Design:
        """The feed-forward blocks whose experts are the smallest."""
        return Mixture(None, max(self.experts), max(self.active), granularity=max(self.granularity))

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


def _recipe_names() -> list[str]:
    return [recipe.name for card in task_cards().values() for recipe in card.recipes]


class SearchRequest(BaseModel):
    """A search: a task, a budget, and how to search.

    Build one with `SearchRequest.checked`, which raises `InvalidInput` for the first bad field.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, str_max_length=4096
    )

    task: str = Field(
        "text",
        description="Task to train; `GET /v1/tasks` lists those there are.",
        examples=["text"],
        json_schema_extra=lambda schema: schema.update(enum=list(task_names())),
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
        json_schema_extra=lambda schema: schema.update(enum=[*_recipe_names(), None]),
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
        description="Candidates to run, besides the dense references. With a budget for the whole "
        f"search the most that it may begin, by default {MAX_TRIALS:,} over `replicates`.",
    )
    objective: Objective = Field(
        "budget",
        description="budget: minimise the validation loss at the budget. pareto: minimise loss and "
        "train FLOPs together; each run's budget is proposed as well, in [budget/32, budget].",
    )
    sampler: Sampler = Field(
        "surrogate",
        description="What proposes candidates. surrogate: a model of the loss over designs, widths "
        "and compute. The others are Optuna's.",
    )
    stopping: Stopping | None = Field(
        None,
        description="Rule by which runs are paused, continued and stopped before their last step. "
        "none: every run trains to its end. median: stops runs that are worse than the median at "
        "equal compute. mo-asha: the best of each rung go on, by loss and train FLOPs. frontier: "
        "stops runs that the frontier dominates with confidence; needs the sampler surrogate. By "
        "default frontier with a budget for the whole search, else none.",
    )
    total_train_flops: float | None = Field(
        None,
        gt=0,
        le=MAX_TRIALS * MAX_TRAIN_FLOPS,
        description="Budget of the whole search in train FLOPs, which it divides into exploring, "
        "racing and confirming with fresh seeds by itself. `train_flops` is then the most that one "
        "run may train.",
        examples=[1e13],
    )
    total_seconds: float | None = Field(
        None,
        gt=0,
        le=MAX_SECONDS,
        description="Budget of the whole search in seconds that workers hold it, instead of in "
        "train FLOPs; divided likewise. The costs of runs are estimated from those before them, so "
        "that it is met about, not exactly.",
    )
    warm_start: WarmStart = Field(
        "auto",
        description="auto: the sampler surrogate begins with what earlier searches of the task "
        "and EinBench have measured, which is fixed when the search begins. none: it begins with "
        "nothing. Answers never rest on it.",
    )
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
    candidates: tuple[GivenCandidate, ...] | None = Field(
        None,
        strict=False,
        min_length=1,
        max_length=MAX_TRIALS,
        description="Designs and widths to run in this order, each with the whole budget; nothing "
        "is proposed then, and `trials` is their number.",
        examples=[[{"design": "btt:rho=1/4", "width": 64}]],
    )
    trainer: Trainer = Field(
        "workers",
        description="workers: the service trains the trials. client: whoever asks for them "
        "(`POST /v1/searches/{id}/ask`) trains them, on data of their own, which `data` names.",
    )
    keep_weights: Annotated[int, Field(ge=0, le=MAX_KEPT), WHOLE] = Field(
        1,
        description="Complete runs, those of the lowest losses, whose trained weights are kept for "
        "download; those of trials that clients train stay with the clients.",
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
    def stopping_rule(self) -> Stopping:
        """The rule by which its runs are stopped, with the default filled in."""
        if self.stopping is not None:
            return self.stopping
        return "none" if self.total is None else "frontier"

    @property
    def total(self) -> float | None:
        """Budget of the whole search: train FLOPs or seconds, whichever is given."""
        return self.total_seconds if self.total_train_flops is None else self.total_train_flops

    @property
    def designs(self) -> Space:
        """The designs that may be proposed."""
        return self.space or Space()

    @property
    def digest(self) -> str:
        """SHA-256 of the request, equal for equal requests."""
        # unset newer fields are left out, so that older requests keep their digests
        later = (
            "confirm", "space", "limits", "priority", "candidates", "stopping",
            "total_train_flops", "total_seconds",
        )  # fmt: skip
        left_out = {name for name in later if not getattr(self, name)}
        left_out |= {"replicates"} if self.replicates == 1 else set()
        left_out |= {"trainer"} if self.trainer == "workers" else set()
        left_out |= {"keep_weights"} if self.keep_weights == 1 else set()
        left_out |= {"warm_start"} if self.warm_start == "auto" else set()
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
        if "trials" not in request.model_fields_set:
            request = request._with_trials()
        request._check_ranges()
        return request._plain()

    def _with_trials(self) -> SearchRequest:
        """The same request with the number of candidates that follows from its other fields."""
        if self.candidates is not None:
            return self.model_copy(update={"trials": len(self.candidates)})
        if self.total is not None:
            return self.model_copy(update={"trials": MAX_TRIALS // self.replicates})
        return self

    def _plain(self) -> SearchRequest:
        """The same request with None for defaults, so that equivalent requests compare equal."""
        same = self.recipe == recipe_of(self.task).name
        default = self.model_copy(update={"stopping": None}).stopping_rule
        changes = {
            "stopping": None if self.stopping == default else self.stopping,
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
        if "ffn-moe" in self.designs.families:  # raises if that is finer than the narrowest block
            structures_of(recipe, self.designs.finest(), min(recipe.widths))
        if self.data is not None and (not self.data or not clean_text(self.data)):
            raise InvalidInput("data", self.data, _ACCEPTED["data"])
        if self.trainer == "client":
            self._check_asked(recipe)
        elif self.data is None and isinstance(recipe, ImageRecipe):
            recipe.check_default_data()
        elif self.data is None and isinstance(recipe, TextRecipe):
            recipe.check_bytes()
        self.check_budget(recipe)
        self._check_confirm(recipe)
        self._check_candidates(recipe)
        self._check_replicates()
        self._check_limits()
        self._check_total()
        self._check_stopping(recipe)

    def _check_asked(self, recipe: Recipe) -> None:
        """Raise `InvalidInput` for what a search whose trials clients train cannot have."""
        if self.stopping_rule != "none":
            accepted = "none, and no budget of the whole search, with trainer=client"
            raise InvalidInput("stopping", self.stopping_rule, accepted)
        if self.limits is not None and self.limits.trial_seconds is not None:
            accepted = "null with trainer=client: leases end trials"
            raise InvalidInput("limits.trial_seconds", self.limits.trial_seconds, accepted)
        if self.keep_weights > 1:
            accepted = "0 or 1 with trainer=client, whose weights stay with the clients"
            raise InvalidInput("keep_weights", self.keep_weights, accepted)

    def _check_candidates(self, recipe: Recipe) -> None:
        if self.candidates is None:
            return
        if self.confirm is not None:
            raise InvalidInput("candidates", len(self.candidates), "null for a confirmation")
        if self.trials != len(self.candidates):
            accepted = f"{len(self.candidates)}, the number of `candidates`"
            raise InvalidInput("trials", self.trials, accepted)
        self.given_plans(recipe)

    def given_plans(self, recipe: Recipe) -> list[RunPlan]:
        """The runs of `candidates`; raises `InvalidInput` that names the first bad one."""
        plans = []
        for place, given in enumerate(self.candidates or ()):
            try:
                design = parse_design(given.design)
                plans.append(given_plan(recipe, design, given.width, self.train_flops))
            except InvalidInput as error:
                named = f"{given.design!r} of width {given.width}"
                accepted = f"{error.accepted} (its {error.field})"
                raise InvalidInput(f"candidates[{place}]", named, accepted) from None
        return plans

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

    def _check_stopping(self, recipe: Recipe) -> None:
        """Refuse a stopping rule where nothing can be stopped, or by which nothing can decide."""
        rule, field = self.stopping_rule, "stopping"
        if rule == "none":
            if self.total is not None:
                accepted = f"{' | '.join(STOPPING[1:])} with a budget for the whole search"
                raise InvalidInput(field, rule, accepted)
            return
        given: Any = self.stopping
        if given is None:  # the rule follows from the total
            field, given = self._total_field, self.total
        accepted = "null" if self.stopping is None else "none"
        if self.confirm is not None:
            raise InvalidInput(field, given, f"{accepted} for a confirmation: its runs are fixed")
        if self.candidates is not None:
            raise InvalidInput(field, given, f"{accepted} with `candidates`, which all run")
        if recipe.schedule == "cosine":
            why = "part of a run with schedule cosine is no result of a shorter one"
            raise InvalidInput(field, given, f"{accepted}, or schedule constant: {why}")
        if rule == "frontier" and self.sampler != "surrogate":
            others = " | ".join(name for name in STOPPING[1:] if name != rule)
            why = f"surrogate with stopping frontier; with {self.sampler} give stopping {others}"
            raise InvalidInput("sampler", self.sampler, why)

    @property
    def _total_field(self) -> str:
        return "total_seconds" if self.total_train_flops is None else "total_train_flops"

    def _check_total(self) -> None:
        """Refuse a budget for the whole search that contradicts another, or is too small."""
        if self.total is None:
            return
        field, limits = self._total_field, self.limits or Limits()
        if self.total_train_flops is not None and self.total_seconds is not None:
            raise InvalidInput("total_seconds", self.total_seconds, "null with total_train_flops")
        if limits.total_train_flops is not None:
            accepted = f"null with {field}, which is a limit itself"
            raise InvalidInput("limits.total_train_flops", limits.total_train_flops, accepted)
        if limits.seconds is not None and limits.seconds < (self.total_seconds or 0):
            accepted = f"at least total_seconds, {self.total_seconds:.6g}"
            raise InvalidInput("limits.seconds", limits.seconds, accepted)
        # two fresh seeds of two candidates and of dense, see `nas.search.phases`
        least = self.train_flops * ((self.references + 3) * self.replicates + 6)
        if self.total_train_flops is not None and self.total_train_flops < least:
            each = f", {self.replicates} runs of each" if self.replicates > 1 else ""
            accepted = (
                f"at least {least:.6g}, for the references and three candidates{each}, and six "
                "runs that confirm"
            )
            raise InvalidInput(field, self.total_train_flops, accepted)

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
    "candidates": "null, or a list of designs and widths, such as "
    '{"design": "btt:rho=1/4", "width": 64}',
    "confirm": "null, or the value that POST /v1/searches/{id}/confirm sets",
}


def clean_text(text: str) -> bool:
    """Whether databases and file systems accept the text: no NUL, no lone surrogate."""
    return "\x00" not in text and not any(0xD800 <= ord(c) <= 0xDFFF for c in text)
