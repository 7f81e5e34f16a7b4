"""Recipes: every setting of a run that is not its structure, width, seed or budget.

A recipe names its task, its family of models and how these are trained.  Those whose names end in
``-1`` are scaled to runs of seconds on a CPU core and keep a constant learning rate after the
warm-up, so that every point of a curve is a valid (compute, loss) measurement; those that end in
``-paper`` have the published settings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from nas.errors import InvalidInput

#: Task → what is predicted and the unit of its loss.
LOSS_UNITS = {
    "text": "nats per token",
    "regression": "mean squared error over the variance of the target",
    "pixels": "nats per pixel value",
    "images": "nats per image",
}
TASKS = tuple(LOSS_UNITS)
_TOKEN_MODELS = ("gpt", "pixels")


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the models of a task are shaped and trained; fields of other families are 0.

    Source of the settings: arXiv:2410.02117 and arXiv:2406.06248, appendices.
    """

    name: str
    #: text | regression | pixels | images
    task: str
    #: gpt | pixels (autoregressive image transformer) | vit | mlp
    model: str
    #: residual blocks
    depth: int
    #: width of the dense model at which `lr` was tuned
    base_width: int
    #: widths of models are multiples of it; in a transformer the width of one attention head
    head_dim: int
    #: hidden width of the feed-forward block over the width of the model
    mlp_ratio: int
    #: whether structured layers have biases
    bias: bool
    #: whether the factors of structured layers are capped at their initial RMS
    normalize: bool
    #: Adam learning rate at the base width
    lr: float
    beta1: float
    beta2: float
    weight_decay: float
    #: largest norm of the whole gradient; 0: no limit
    clip: float
    #: samples per step: sequences, images or rows
    batch: int
    #: steps over which the learning rate rises linearly
    warmup_steps: int
    #: constant | cosine (from the end of the warm-up towards 0 after the last step)
    schedule: str
    #: fewest steps of a run that still says something
    min_steps: int
    #: widths whose run would be longer than this are too narrow for the budget
    max_steps: int
    #: narrowest and widest model
    min_width: int
    max_width: int
    #: samples of the fixed validation set, at most and at least
    validation_samples: int
    min_validation_samples: int
    #: evaluations of a run, at step counts spaced by a constant ratio up to the last step; a
    #: cosine run has one, for its earlier points are no results of shorter runs
    evaluations: int
    #: text: tokens per sequence
    context: int = 0
    #: token models: distinct tokens that are predicted
    vocabulary: int = 0
    #: text: characters | bpe
    tokenizer: str = "characters"
    #: images and pixels: height and width in pixels, and channels (1: grey, 3: red green blue)
    side: int = 0
    channels: int = 0
    #: vit: height and width of a patch in pixels
    patch: int = 0
    #: images: classes; a user's data decides
    classes: int = 0
    #: images: none | crop | crop+flip
    augmentation: str = "none"
    #: regression: numbers per sample; a user's data decides
    input_dim: int = 0
    #: regression: samples generated before training; 0: fresh ones at every step; a user's data
    #: decides
    pool: int = 0
    #: regression: seed of the target and its samples
    data_seed: int = 0

    def __post_init__(self) -> None:
        _check(self)

    @property
    def is_token_model(self) -> bool:
        """Whether the model reads token ids and predicts one at each position."""
        return self.model in _TOKEN_MODELS

    @property
    def attends(self) -> bool:
        """Whether the model is a transformer."""
        return self.model != "mlp"

    @property
    def tokens(self) -> int:
        """Positions of one sample: what structured layers see of it."""
        if self.model == "gpt":
            return self.context
        if self.model == "pixels":
            return self.side**2 * self.channels
        return (self.side // self.patch) ** 2 if self.model == "vit" else 1

    @property
    def features(self) -> int:
        """Numbers that enter at each position; 0 where token ids do."""
        if self.is_token_model:
            return 0
        if self.model == "vit":
            return self.patch**2 * self.channels
        return self.input_dim if self.task == "regression" else self.side**2 * self.channels

    @property
    def embedded_tokens(self) -> int:
        """Distinct token ids that enter: pixels begin with one of their own."""
        return self.vocabulary + (1 if self.model == "pixels" else 0)

    @property
    def outputs(self) -> int:
        """Numbers that the head gives: logits, or the prediction."""
        if self.is_token_model:
            return self.vocabulary
        return 1 if self.task == "regression" else self.classes

    @property
    def predictions(self) -> int:
        """Positions of a sample at which the head is applied."""
        return self.tokens if self.is_token_model else 1

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.tokens

    @property
    def least_tokens(self) -> int:
        """text: tokens that training and validation need each."""
        return self.min_validation_samples * (self.context + 1)

    @property
    def has_default_data(self) -> bool:
        """Whether the task's default data suits the recipe: the digits are grey and 8×8."""
        return self.task in ("text", "regression") or (self.side, self.channels) == (8, 1)

    def check_default_data(self) -> None:
        """Raise `InvalidInput` unless the task's default data suits the recipe."""
        if not self.has_default_data:
            accepted = (
                f"images of {self.side}×{self.side} pixels and {self.channels} channels: "
                f"recipe {self.name} has no default data"
            )
            raise InvalidInput("data", "nothing", accepted)

    @property
    def widths(self) -> range:
        """Every width a model may have."""
        return range(self.min_width, self.max_width + 1, self.head_dim)

    @property
    def loss_unit(self) -> str:
        if self.task == "text" and self.tokenizer == "characters":
            return "nats per character"
        return LOSS_UNITS[self.task]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def learning_rate_factor(self, step: int, steps: int) -> float:
        """Learning rate of step 1 … `steps` of a run over its peak."""
        if step <= self.warmup_steps:
            return step / self.warmup_steps
        if self.schedule == "constant":
            return 1.0
        past, whole = step - 1 - self.warmup_steps, steps - self.warmup_steps
        return 0.5 * (1.0 + math.cos(math.pi * past / whole))


_TEXT_FIELDS = {
    "name": "the name of a recipe",
    "task": " | ".join(TASKS),
    "model": "gpt | pixels | vit | mlp",
    "schedule": "constant | cosine",
    "tokenizer": "characters | bpe",
    "augmentation": "none | crop | crop+flip",
}
#: Field → least and greatest value.
_RANGES: dict[str, tuple[float, float]] = {
    "depth": (1, 256), "base_width": (1, 1 << 16), "head_dim": (1, 1024), "mlp_ratio": (1, 64),
    "lr": (1e-12, 1e30), "beta1": (0.0, 0.9999999), "beta2": (0.0, 0.9999999),
    "weight_decay": (0.0, 1e3), "clip": (0.0, 1e9), "batch": (1, 1 << 16),
    # with fewer steps, those of the dearest run would cost more FLOPs than 64 bits hold
    "warmup_steps": (0, 1 << 30), "min_steps": (16, 1 << 30), "max_steps": (16, 1 << 30),
    "min_width": (1, 1 << 16), "max_width": (1, 1 << 16),
    # every point keeps the loss of each sample
    "validation_samples": (2, 1 << 14), "min_validation_samples": (2, 1 << 14),
    "evaluations": (1, 32), "context": (0, 1 << 16), "vocabulary": (0, 1 << 16),
    "side": (0, 1024), "channels": (0, 3), "patch": (0, 1024), "classes": (0, 1 << 16),
    "input_dim": (0, 4096), "pool": (0, 1 << 22), "data_seed": (0, 2**31 - 1),
}  # fmt: skip
#: Fields of certain tasks or models only.
_OWN: dict[str, tuple[str, ...]] = {
    "context": ("gpt",), "vocabulary": ("gpt", "pixels"), "tokenizer": ("gpt",),
    "side": ("pixels", "images"), "channels": ("pixels", "images"), "patch": ("vit",),
    "classes": ("images",), "augmentation": ("images",),
    "input_dim": ("regression",), "pool": ("regression",), "data_seed": ("regression",),
}  # fmt: skip
#: Positions of one step, and numbers generated in advance, at most: what a machine can hold.
_MOST_TOKENS, _MOST_NUMBERS = 1 << 22, 1 << 28
#: Widths that a recipe may have: dense references need three, and each is looked at when a budget
#: is divided.
_LEAST_WIDTHS, _MOST_WIDTHS = 3, 1024
#: Fields that make a recipe what it is; they cannot be changed on their own.
_FIXED = ("name", "task", "model", "bias")


def _check(recipe: Recipe) -> None:
    """Raise `InvalidInput` for the first field that no run could use."""
    for name, choices in _TEXT_FIELDS.items():
        if name != "name" and getattr(recipe, name) not in choices.split(" | "):
            raise InvalidInput(name, getattr(recipe, name), choices)
    for name, (low, high) in _RANGES.items():
        if not low <= getattr(recipe, name) <= high:
            raise InvalidInput(name, getattr(recipe, name), f"a number from {low:g} to {high:g}")
    r = recipe
    if r.min_width % r.head_dim or not _LEAST_WIDTHS <= len(r.widths) <= _MOST_WIDTHS:
        accepted = (
            f"multiples of head_dim, {r.head_dim}, with {_LEAST_WIDTHS} to {_MOST_WIDTHS} of them "
            "from the least to the greatest"
        )
        raise InvalidInput("min_width, max_width", f"{r.min_width}, {r.max_width}", accepted)
    if r.tokens < 1 or r.outputs < 1 or not (r.is_token_model or r.features):
        raise InvalidInput(
            "context, vocabulary, side, channels, patch, classes, input_dim",
            f"{r.context}, {r.vocabulary}, {r.side}, {r.channels}, {r.patch}, {r.classes}, "
            f"{r.input_dim}",
            f"those that a model {r.model!r} of task {r.task!r} needs, all at least 1",
        )
    if r.model == "vit" and r.side % r.patch:
        raise InvalidInput("patch", r.patch, f"a divisor of side, {r.side}")
    if r.tokenizer == "characters" and r.task == "text" and r.vocabulary != 96:
        raise InvalidInput("vocabulary", r.vocabulary, "96 with tokenizer=characters")
    if r.channels == 2:
        raise InvalidInput("channels", r.channels, "1 | 3")
    if r.warmup_steps >= r.min_steps:
        raise InvalidInput("warmup_steps", r.warmup_steps, f"below min_steps, {r.min_steps}")
    if r.tokens_per_step > _MOST_TOKENS:
        accepted = f"at most {_MOST_TOKENS} positions in a step, over {r.tokens} of a sample"
        raise InvalidInput("batch", r.batch, accepted)
    if r.pool * r.input_dim > _MOST_NUMBERS:
        accepted = f"at most {_MOST_NUMBERS} numbers, over input_dim {r.input_dim}"
        raise InvalidInput("pool", r.pool, accepted)


def with_overrides(recipe: Recipe, overrides: Mapping[str, Any]) -> Recipe:
    """The recipe with some of its fields set anew; numbers may be given as text.

    Raises
    ------
    InvalidInput
        A field that does not exist or is fixed, or a value that it cannot have.

    >>> with_overrides(REGRESSION, {"input_dim": "16"}).features
    16
    """
    own = {recipe.task, recipe.model}
    free = {
        f.name: f.type
        for f in fields(Recipe)
        if f.name not in _FIXED and own.intersection(_OWN.get(f.name, own))
    }
    values: dict[str, Any] = {}
    for name, value in overrides.items():
        if name not in free:
            accepted = f"settings of recipe {recipe.name}: {', '.join(free)}"
            raise InvalidInput("overrides", name, accepted)
        values[name] = _converted(name, value, str(free[name]))
    return replace(recipe, **values)


def _converted(name: str, value: Any, kind: str) -> Any:
    accepted = {"int": "a whole number", "float": "a number", "bool": "true | false"}
    try:
        if kind == "bool":
            return {"true": True, "false": False}[str(value).lower()]
        if isinstance(value, bool):
            raise ValueError
        if kind == "int":
            if isinstance(value, float) and not value.is_integer():
                raise ValueError
            return int(value)
        return float(value) if kind == "float" else str(value)
    except (KeyError, ValueError, TypeError, OverflowError):
        raise InvalidInput(name, value, accepted.get(kind, _TEXT_FIELDS.get(name, kind))) from None


#: The `text` task on characters: at 2e11 train FLOPs 5 to 45 seconds on one CPU core.
#: The learning rate is the best of 3e-3, 6e-3, 1.2e-2 and 2.4e-2 for dense at the base width.
TEXT = Recipe(
    name="gpt-chars-1",
    task="text",
    model="gpt",
    depth=3,
    context=64,
    batch=8,
    vocabulary=96,
    head_dim=16,
    mlp_ratio=4,
    bias=False,
    normalize=True,
    base_width=64,
    lr=1.2e-2,
    beta1=0.9,
    beta2=0.95,
    weight_decay=0.0,
    clip=1.0,
    warmup_steps=50,
    schedule="constant",
    min_steps=150,
    max_steps=4000,
    min_width=16,
    max_width=4096,
    validation_samples=256,
    min_validation_samples=32,
    evaluations=8,
)
TEXT_BPE = replace(TEXT, name="gpt-bpe-1", tokenizer="bpe", vocabulary=1024)
#: arXiv:2410.02117: characters, 65,536 tokens a step, constant after 2,000 steps.  The base width
#: is not stated there; it is the narrowest of the published runs.
TEXT_PAPER = replace(
    TEXT, name="gpt-chars-paper", context=128, batch=512, head_dim=64, base_width=256, lr=3e-3,
    warmup_steps=2000, min_steps=4000, max_steps=100_000, min_width=64, validation_samples=1024,
)  # fmt: skip
REGRESSION = Recipe(
    name="mlp-regression-1",
    task="regression",
    model="mlp",
    depth=3,
    input_dim=8,
    pool=65_536,
    batch=512,
    head_dim=8,
    mlp_ratio=4,
    bias=True,
    normalize=False,
    base_width=64,
    lr=1e-3,
    beta1=0.9,
    beta2=0.999,
    weight_decay=0.0,
    clip=1.0,
    warmup_steps=50,
    schedule="constant",
    min_steps=300,
    max_steps=20_000,
    min_width=16,
    max_width=4096,
    validation_samples=2048,
    min_validation_samples=32,
    evaluations=8,
)
#: arXiv:2410.02117: a million cosine steps of 4,096 at learning rate 1e-3.
REGRESSION_PAPER = replace(
    REGRESSION, name="mlp-regression-paper", pool=0, batch=4096, lr=1e-3, clip=0.0,
    warmup_steps=0, schedule="cosine", min_steps=1000, max_steps=1_000_000,
    validation_samples=8192,
)  # fmt: skip
#: Next pixel value on 8×8 images; the default suits the grey handwritten digits of 17 levels.
PIXELS = replace(
    TEXT, name="ar-digits-1", task="pixels", model="pixels", context=0, vocabulary=17, side=8,
    channels=1, max_steps=2000,
)  # fmt: skip
PIXELS_CIFAR = replace(PIXELS, name="ar-cifar-1", vocabulary=256, channels=3, lr=3e-3, batch=4)
#: arXiv:2410.02117: 8×8×3 images, learning rate 3e-3 with cosine decay, batches of 64.
PIXELS_PAPER = replace(
    PIXELS_CIFAR, name="ar-pixels-paper", batch=64, warmup_steps=0, schedule="cosine", clip=1.0,
    min_steps=1000, max_steps=1_000_000, min_width=16,
)  # fmt: skip
IMAGES = replace(
    REGRESSION, name="mlp-digits-1", lr=3e-3, task="images", input_dim=0, pool=0, batch=128, side=8,
    channels=1, classes=10, augmentation="crop", min_steps=100, max_steps=4000,
)  # fmt: skip
IMAGES_VIT = replace(
    TEXT, name="vit-digits-1", task="images", model="vit", context=0, vocabulary=0, side=8,
    channels=1, patch=2, classes=10, augmentation="crop", batch=64, lr=6e-3, min_steps=100,
)  # fmt: skip
IMAGES_CIFAR = replace(
    IMAGES, name="mlp-cifar-1", side=32, channels=3, augmentation="crop+flip", batch=256
)
IMAGES_VIT_CIFAR = replace(
    IMAGES_VIT, name="vit-cifar-1", side=32, channels=3, patch=4, augmentation="crop+flip",
    lr=3e-3, batch=32,
)  # fmt: skip
#: arXiv:2406.06248: ViT-S/32 on ImageNet; a width of 384 and a depth of 12 are the S.
IMAGES_PAPER = replace(
    IMAGES_VIT_CIFAR, name="vit-s32-paper", side=224, patch=32, classes=1000, depth=12,
    head_dim=64, base_width=384, lr=2e-3, weight_decay=0.05, batch=3072, warmup_steps=10_000,
    schedule="cosine", min_steps=20_000, max_steps=125_000, min_width=64, validation_samples=8192,
)  # fmt: skip

#: Name → recipe; the first of each task is its default.
RECIPES: dict[str, Recipe] = {
    r.name: r
    for r in (
        TEXT, TEXT_BPE, TEXT_PAPER,
        REGRESSION, REGRESSION_PAPER,
        PIXELS, PIXELS_CIFAR, PIXELS_PAPER,
        IMAGES, IMAGES_VIT, IMAGES_CIFAR, IMAGES_VIT_CIFAR, IMAGES_PAPER,
    )
}  # fmt: skip


def recipe_of(task: str, name: str | None = None, overrides: Mapping[str, Any] | None = None
) -> Recipe:  # fmt: skip
    """The recipe of a task: by name, by default its first, with some settings set anew.

    Raises
    ------
    InvalidInput
        No such task, no such recipe of it, or overrides that it cannot have.
    """
    own = [r for r in RECIPES.values() if r.task == task]
    if not own:
        raise InvalidInput("task", task, " | ".join(TASKS))
    found = own[0] if name is None else next((r for r in own if r.name == name), None)
    if found is None:
        raise InvalidInput("recipe", name, " | ".join(r.name for r in own))
    return with_overrides(found, overrides or {})
