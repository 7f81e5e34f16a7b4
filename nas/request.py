"""What a search is asked to do: one validated value, the same for REST, CLI and Python."""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nas.cost import MAX_TRAIN_FLOPS, MIN_REFERENCES, accepted_budget, minimum_train_flops
from nas.errors import InvalidInput
from nas.recipe import RECIPES, TASKS, Recipe, recipe_of
from nas.theta import Theta

Sampler = Literal["tpe", "nsga2", "random", "qmc", "gp"]
Objective = Literal["budget", "pareto"]
SAMPLERS: tuple[str, ...] = get_args(Sampler)
OBJECTIVES: tuple[str, ...] = get_args(Objective)
MAX_TRIALS = 10_000
MAX_REFERENCES = 32
MAX_CONFIRM_SEEDS = 64
#: Tokens that byte-pair text begins with; only text that is tokenised already may have fewer.
_BYTES = 256
MAX_SEED = 2**31 - 1


class ConfirmedRun(BaseModel):
    """A run to be run again as it was, but for its seed and its length."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    trial_id: int = Field(ge=0, le=2**63 - 1, description="The run that is confirmed.")
    theta: tuple[float, float, float, float, float, float, float]
    width: int = Field(ge=1, le=2**24)
    steps: int = Field(ge=1, le=2**53)


class Confirm(BaseModel):
    """Runs of a search and the fresh seeds that each is run again with."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    search: str = Field(max_length=64, description="The search whose runs are confirmed.")
    runs: tuple[ConfirmedRun, ...] = Field(min_length=1, max_length=MAX_TRIALS)
    seeds: tuple[int, ...] = Field(min_length=1, max_length=MAX_CONFIRM_SEEDS)
    longer: float = Field(1.0, ge=1, description="Steps over those of the confirmed run.")
    top: int = Field(ge=1, description="Candidates that were asked for.")
    spread: bool = Field(False, description="Whether across the ranking, not from its top.")


class SearchRequest(BaseModel):
    """A search: a task, a budget and how to look.

    Build one with `SearchRequest.checked`, which raises `InvalidInput` for the first bad field.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, str_max_length=4096
    )

    task: str = Field("text", description=f"Task to train: {', '.join(TASKS)}.", examples=["text"])
    data: str | None = Field(
        None,
        description="File or folder to train on instead of the task's default; over REST a name "
        "inside the service's data folder.",
    )
    recipe: str | None = Field(
        None,
        description="Named recipe of the task: model family and training settings; by "
        "default the task's first.",
        examples=["gpt-bpe-1"],
    )
    overrides: dict[str, bool | int | float | str] | None = Field(
        None, description="Settings of the recipe set anew, by name.", examples=[{"depth": 6}]
    )
    train_flops: float = Field(
        description="Budget of each run in train FLOPs (1 MAC = 2 FLOPs, training = 3 × forward).",
        examples=[3e11],
    )
    trials: int = Field(16, description="Candidates to run; dense references come on top.")
    objective: Objective = Field(
        "budget",
        description="budget: least validation loss at the budget. pareto: the run's own budget "
        "is proposed too, in [budget/32, budget], and loss and train FLOPs are minimised together.",
    )
    sampler: Sampler = Field("tpe", description="Optuna sampler that proposes candidates.")
    seed: int = Field(0, description="Seed of proposals and of every run.")
    references: int = Field(
        5, description="Dense runs at distinct widths, on top of trials; fewer only if the "
        "budget admits fewer widths."
    )  # fmt: skip

    confirm: Confirm | None = Field(
        None,
        strict=False,
        description="Given by `POST /v1/searches/{id}/confirm`: these runs with these seeds, "
        "instead of references and candidates.",
    )

    @property
    def settings(self) -> Recipe:
        """Model and training settings; a user's data may complete them (classes, features)."""
        return recipe_of(self.task, self.recipe, self.overrides)

    @property
    def digest(self) -> str:
        """SHA-256 of the request, equal for equal requests."""
        # requests from before there were confirmations keep their digests
        left_out = {"confirm"} if self.confirm is None else set()
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
        if not isinstance(values, dict):
            raise InvalidInput("body", values, "a JSON object with the fields of a search")
        try:
            request = cls(**{str(k): v for k, v in values.items()})
        except ValidationError as error:
            raise _explain(error) from None
        request._check_ranges()
        return request._plain()

    def _plain(self) -> SearchRequest:
        """The same request without settings that are the default, so that equal ones are equal."""
        same = self.recipe == recipe_of(self.task).name
        overrides = self.overrides or None
        return self.model_copy(
            update={"recipe": None if same else self.recipe, "overrides": overrides}
        )

    def check_budget(self, recipe: Recipe) -> None:
        """Raise `InvalidInput` if the budget is none for a recipe as its data completes it."""
        least = minimum_train_flops(recipe)
        if not (math.isfinite(self.train_flops) and least <= self.train_flops <= MAX_TRAIN_FLOPS):
            raise InvalidInput("train_flops", self.train_flops, accepted_budget(recipe))

    def _check_ranges(self) -> None:
        recipe = self.settings
        if self.data is not None and (not self.data or not _clean_text(self.data)):
            raise InvalidInput("data", self.data, _ACCEPTED["data"])
        if self.data is None:
            recipe.check_default_data()
        if self.data is None and recipe.tokenizer == "bpe" and recipe.vocabulary < _BYTES:
            accepted = f"at least {_BYTES}, the bytes, with tokenizer=bpe"
            raise InvalidInput("vocabulary", recipe.vocabulary, accepted)
        self.check_budget(recipe)
        self._check_confirm(recipe)
        for field, low, high in (
            ("trials", 1, MAX_TRIALS),
            ("references", MIN_REFERENCES, MAX_REFERENCES),
            ("seed", 0, MAX_SEED),
        ):
            if not low <= getattr(self, field) <= high:
                raise InvalidInput(field, getattr(self, field), _ACCEPTED[field])

    def _check_confirm(self, recipe: Recipe) -> None:
        if self.confirm is None:
            return
        if self.trials != len(self.confirm.runs) * len(self.confirm.seeds):
            raise InvalidInput("trials", self.trials, "runs × seeds of `confirm`")
        for seed in self.confirm.seeds:
            if not 0 <= seed <= MAX_SEED:
                raise InvalidInput("confirm", seed, _ACCEPTED["seed"])
        for run in self.confirm.runs:
            Theta(*run.theta)
            if run.width not in recipe.widths:
                raise InvalidInput("confirm", run.width, f"a width of recipe {recipe.name}")


_ACCEPTED = {
    "confirm": "what POST /v1/searches/{id}/confirm makes of a search",
    "task": " | ".join(TASKS),
    "data": "a file or folder name of printable characters",
    "recipe": " | ".join(RECIPES),
    "overrides": "an object of settings of the recipe and their values",
    "train_flops": "a finite number of train FLOPs",
    "trials": f"a whole number from 1 to {MAX_TRIALS}",
    "objective": " | ".join(OBJECTIVES),
    "sampler": " | ".join(SAMPLERS),
    "seed": f"a whole number from 0 to {MAX_SEED}",
    "references": f"a whole number from {MIN_REFERENCES} to {MAX_REFERENCES}",
}


def _clean_text(text: str) -> bool:
    """Whether a database and a file system can take the text: no NUL, no lone surrogate."""
    return "\x00" not in text and not any(0xD800 <= ord(c) <= 0xDFFF for c in text)


def _explain(error: ValidationError) -> InvalidInput:
    first = error.errors(include_url=False, include_context=False)[0]
    field = str(first["loc"][0]) if first["loc"] else "body"
    if first["type"] == "missing":
        return InvalidInput(field, "nothing", _ACCEPTED[field])
    if field not in _ACCEPTED:
        return InvalidInput(field, first["input"], f"only the fields {', '.join(_ACCEPTED)}")
    return InvalidInput(field, first["input"], _ACCEPTED[field])


def data_inside(folder: Path | None, name: str) -> Path:
    """The path of `name` inside the data folder, for names that came over the network.

    Raises
    ------
    InvalidInput
        No data folder is configured, or the name leads out of it.
    """
    if folder is None:
        raise InvalidInput("data", name, "nothing: this service has no EINSUM_NAS_DATA_DIR")
    root = Path(os.path.realpath(folder))
    target = Path(os.path.realpath(root / name))
    if not target.is_relative_to(root):
        raise InvalidInput("data", name, "a file or folder name inside the service's data folder")
    return target
