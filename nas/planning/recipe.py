"""Recipes: every setting of a run that is not its structure, width, seed or budget.

A recipe names its task, its family of models and how these are trained.  Those whose names end in
``-1`` are scaled to runs of seconds on a CPU core and keep a constant learning rate after the
warm-up, so that every point of a curve is a valid (compute, loss) measurement; those that end in
``-paper`` have the published settings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from nas.designs.structure import Parametrization
from nas.errors import InvalidInput
from nas.planning.accepted import refusal

#: Task → what is predicted and the unit of its loss.
LOSS_UNITS = {
    "text": "nats per token",
    "regression": "mean squared error over the variance of the target",
    "pixels": "nats per pixel value",
    "images": "nats per image",
}
TASKS = tuple(LOSS_UNITS)
#: Positions of one step, and numbers generated in advance, at most: what a machine can hold.
_MOST_TOKENS, _MOST_NUMBERS = 1 << 22, 1 << 28
#: Widths that a recipe may have: dense references need three, and each is looked at when a budget
#: is divided.
_LEAST_WIDTHS, _MOST_WIDTHS = 3, 1024
#: What a plug-in may call its task and its recipes.
PLUGIN_NAME = r"^[a-z][a-z0-9-]{0,31}$"
#: Settings that only some tasks have, and what the recipes of the others say in their place where
#: they are stored or shown; fingerprints of tasks and runs depend on it.
_OF_SOME = {
    "context": 0, "vocabulary": 0, "tokenizer": "characters", "side": 0, "channels": 0, "patch": 0,
    "classes": 0, "augmentation": "none", "input_dim": 0, "pool": 0, "data_seed": 0,
}  # fmt: skip
#: Settings that are stored where they are not these: fingerprints of tasks and runs depend on what
#: is stored, and most are of before these settings.
_LEFT_OUT = {
    "ranks": 1, "sharding": "none", "optimizer": "adamw", "parametrization": "published",
    "depth_rule": "sqrt", "sgd_lr": 1.0,
}  # fmt: skip


def _no_truth(given: Any) -> Any:
    """A truth value is no number, although Python counts with it."""
    return repr(given) if isinstance(given, bool) else given


def _as_truth(given: Any) -> Any:
    return {"true": True, "false": False}.get(str(given).lower(), given)


_NUMBER = BeforeValidator(_no_truth)
_Whole = Annotated[int, _NUMBER]
_Real = Annotated[float, _NUMBER]
_Size = Annotated[int, Field(ge=1, le=1 << 16), _NUMBER]
# with fewer steps, those of the dearest run would cost more FLOPs than 64 bits hold
_Steps = Annotated[int, Field(ge=16, le=1 << 30), _NUMBER]
# every point keeps the loss of each sample
_Samples = Annotated[int, Field(ge=2, le=1 << 14), _NUMBER]
_Decay = Annotated[float, Field(ge=0.0, le=0.9999999), _NUMBER]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How the models of a task are shaped and trained; each task's own class adds its settings.

    Source of the settings: arXiv:2410.02117 and arXiv:2406.06248, appendices.
    """

    #: settings that make a recipe what it is; they cannot be changed on their own
    fixed: ClassVar[tuple[str, ...]] = ("name", "task", "model", "bias")

    name: str
    task: str
    #: gpt | pixels (autoregressive image transformer) | vit | mlp | own (a plug-in's)
    model: str
    #: residual blocks
    depth: _Whole = Field(3, ge=1, le=256)
    #: width of the dense model at which `lr` was tuned
    base_width: _Size = 64
    #: widths of models are multiples of it; in a transformer the width of one attention head
    head_dim: _Whole = Field(ge=1, le=1024)
    #: hidden width of the feed-forward block over the width of the model
    mlp_ratio: _Whole = Field(4, ge=1, le=64)
    #: whether structured layers have biases
    bias: bool
    #: whether the factors of structured layers are capped at their initial RMS
    normalize: Annotated[bool, Field(strict=True), BeforeValidator(_as_truth)]
    #: which rule sets initial standard deviations and learning rates of factors
    parametrization: Parametrization = "published"
    #: how branches enter: times sqrt(3/depth), or 3/depth as CompleteP has it
    depth_rule: Literal["sqrt", "completep"] = "sqrt"
    #: what trains the factors of structured layers, dense ones included; AdamW trains all else
    optimizer: Literal["adamw", "muon", "sgd"] = "adamw"
    #: Adam learning rate at the base width; Muon's follows from it, see `nas.training.muon`
    lr: _Real = Field(ge=1e-12, le=1e30)
    #: SGD learning rate of a square dense layer, see `nas.training.sgd`
    sgd_lr: _Real = Field(1.0, ge=1e-12, le=1e30)
    beta1: _Decay = 0.9
    beta2: _Decay
    weight_decay: _Real = Field(0.0, ge=0.0, le=1e3)
    #: largest norm of the whole gradient; 0: no limit
    clip: _Real = Field(1.0, ge=0.0, le=1e9)
    #: samples per step: sequences, images or rows
    batch: _Size
    #: steps over which the learning rate rises linearly
    warmup_steps: _Whole = Field(50, ge=0, le=1 << 30)
    #: constant | cosine (from the end of the warm-up towards 0 after the last step)
    schedule: Literal["constant", "cosine"] = "constant"
    #: fewest steps of a run that still says something
    min_steps: _Steps
    #: widths whose run would be longer than this are too narrow for the budget
    max_steps: _Steps
    #: narrowest and widest model
    min_width: _Size = 16
    max_width: _Size = 4096
    #: samples of the fixed validation set, at most and at least
    validation_samples: _Samples
    min_validation_samples: _Samples = 32
    #: evaluations of a run, at step counts spaced by a constant ratio up to the last step; a
    #: cosine run has one, for its earlier points are no results of shorter runs
    evaluations: _Whole = Field(8, ge=1, le=32)
    #: devices that train one run together, each with its part of every batch
    ranks: _Whole = Field(1, ge=1, le=64)
    #: what of parameters, gradients and optimiser state each of several ranks holds: all of it
    #: (none: DDP), or its part (full: FSDP)
    sharding: Literal["none", "full"] = "none"

    def __post_init__(self) -> None:
        if self.min_width % self.head_dim or not (
            _LEAST_WIDTHS <= len(self.widths) <= _MOST_WIDTHS
        ):
            accepted = (
                f"multiples of head_dim, {self.head_dim}, with {_LEAST_WIDTHS} to {_MOST_WIDTHS} "
                "of them from the least to the greatest"
            )
            given = f"{self.min_width}, {self.max_width}"
            raise InvalidInput("min_width, max_width", given, accepted)
        if self.warmup_steps >= self.min_steps:
            accepted = f"below min_steps, {self.min_steps}"
            raise InvalidInput("warmup_steps", self.warmup_steps, accepted)
        self._check_own()
        if self.tokens_per_step > _MOST_TOKENS:
            accepted = f"at most {_MOST_TOKENS} positions in a step, over {self.tokens} of a sample"
            raise InvalidInput("batch", self.batch, accepted)
        if self.batch % self.ranks:
            raise InvalidInput("ranks", self.ranks, f"a divisor of batch, {self.batch}")
        if self.optimizer != "adamw" and self.ranks > 1:
            raise InvalidInput("optimizer", self.optimizer, "adamw with more than one rank")
        if self.sharding == "full" and self.ranks == 1:
            raise InvalidInput("sharding", self.sharding, "none with ranks=1")

    def _check_own(self) -> None:
        """Raise `InvalidInput` for settings of the task that contradict each other."""

    @property
    def is_token_model(self) -> bool:
        """Whether the model reads token ids and predicts one at each position."""
        return self.model in ("gpt", "pixels")

    @property
    def attends(self) -> bool:
        """Whether the model is a transformer."""
        return self.model not in ("mlp", "own")

    @property
    def tokens(self) -> int:
        """Positions of one sample: what structured layers see of it."""
        return 1

    @property
    def features(self) -> int:
        """Numbers that enter at each position; 0 where token ids do."""
        return 0

    @property
    def embedded_tokens(self) -> int:
        """Distinct token ids that enter; 0 where numbers do."""
        return self.outputs if self.is_token_model else 0

    @property
    def outputs(self) -> int:
        """Numbers that the head gives: logits, or the prediction."""
        return 1

    @property
    def predictions(self) -> int:
        """Positions of a sample at which the head is applied."""
        return self.tokens if self.is_token_model else 1

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.tokens

    @property
    def has_default_data(self) -> bool:
        """Whether the task's default data suits the recipe."""
        return True

    @property
    def widths(self) -> range:
        """Every width a model may have."""
        return range(self.min_width, self.max_width + 1, self.head_dim)

    @property
    def loss_unit(self) -> str:
        return LOSS_UNITS[self.task]

    def as_dict(self) -> dict[str, Any]:
        """As JSON values; `stored_recipe` reads them.

        With every setting of `SETTINGS`, but those of `_LEFT_OUT` only where they have other
        values than there.
        """
        values = dict.fromkeys(f.name for f in fields(Recipe)) | _OF_SOME | asdict(self)
        return {n: v for n, v in values.items() if n not in _LEFT_OUT or v != _LEFT_OUT[n]}

    def learning_rate_factor(self, step: int, steps: int) -> float:
        """Learning rate of step 1 … `steps` of a run over its peak."""
        if step <= self.warmup_steps:
            return step / self.warmup_steps
        if self.schedule == "constant":
            return 1.0
        past, whole = step - 1 - self.warmup_steps, steps - self.warmup_steps
        return 0.5 * (1.0 + math.cos(math.pi * past / whole))


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRecipe(Recipe):
    """Next token of a text."""

    task: Literal["text"] = "text"
    model: Literal["gpt"] = "gpt"
    #: tokens per sequence
    context: _Size
    #: distinct tokens
    vocabulary: _Size
    tokenizer: Literal["characters", "bpe"] = "characters"

    def _check_own(self) -> None:
        if self.tokenizer == "characters" and self.vocabulary != 96:
            raise InvalidInput("vocabulary", self.vocabulary, "96 with tokenizer=characters")

    @property
    def tokens(self) -> int:
        return self.context

    @property
    def outputs(self) -> int:
        return self.vocabulary

    def check_bytes(self) -> None:
        """Raise `InvalidInput` for a vocabulary of byte pairs that is too small for the bytes.

        Only text that is tokenised already may have less.
        """
        if self.tokenizer == "bpe" and self.vocabulary < 256:
            accepted = "at least 256, the bytes, with tokenizer=bpe"
            raise InvalidInput("vocabulary", self.vocabulary, accepted)

    @property
    def least_tokens(self) -> int:
        """Tokens that training and validation need each."""
        return self.min_validation_samples * (self.context + 1)

    @property
    def loss_unit(self) -> str:
        return "nats per character" if self.tokenizer == "characters" else LOSS_UNITS["text"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RegressionRecipe(Recipe):
    """A number from numbers."""

    task: Literal["regression"] = "regression"
    model: Literal["mlp"] = "mlp"
    #: numbers per sample; a user's data decides
    input_dim: _Whole = Field(ge=1, le=4096)
    #: samples generated before training; 0: fresh ones at every step; a user's data decides
    pool: _Whole = Field(ge=0, le=1 << 22)
    #: seed of the target and its samples
    data_seed: _Whole = Field(0, ge=0, le=2**31 - 1)

    def _check_own(self) -> None:
        if self.pool * self.input_dim > _MOST_NUMBERS:
            accepted = f"at most {_MOST_NUMBERS} numbers, over input_dim {self.input_dim}"
            raise InvalidInput("pool", self.pool, accepted)

    @property
    def features(self) -> int:
        return self.input_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRecipe(Recipe):
    """What the two tasks of images share."""

    #: height and width in pixels
    side: _Whole = Field(ge=1, le=1024)
    #: 1: grey, 3: red green blue
    channels: _Whole = Field(ge=1, le=3)

    def _check_own(self) -> None:
        if self.channels == 2:
            raise InvalidInput("channels", self.channels, "1 | 3")

    @property
    def values(self) -> int:
        """Numbers of an image."""
        return self.side**2 * self.channels

    @property
    def has_default_data(self) -> bool:
        return (self.side, self.channels) == (8, 1)  # the handwritten digits

    def check_default_data(self) -> None:
        """Raise `InvalidInput` unless the task's default data suits the recipe."""
        if not self.has_default_data:
            accepted = (
                f"images of {self.side}×{self.side} pixels and {self.channels} channels: "
                f"recipe {self.name} has no default data"
            )
            raise InvalidInput("data", "nothing", accepted)


@dataclass(frozen=True, slots=True, kw_only=True)
class PixelsRecipe(ImageRecipe):
    """Next value of a pixel."""

    task: Literal["pixels"] = "pixels"
    model: Literal["pixels"] = "pixels"
    #: distinct values of a pixel
    vocabulary: _Size

    @property
    def tokens(self) -> int:
        return self.values

    @property
    def embedded_tokens(self) -> int:
        return self.vocabulary + 1  # an image begins with a token of its own

    @property
    def outputs(self) -> int:
        return self.vocabulary


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassesRecipe(ImageRecipe):
    """Class of an image."""

    task: Literal["images"] = "images"
    #: classes; a user's data decides
    classes: _Size = 10
    augmentation: Literal["none", "crop", "crop+flip"]

    @property
    def outputs(self) -> int:
        return self.classes


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatRecipe(ClassesRecipe):
    """Class of an image, by an MLP of all its pixels."""

    model: Literal["mlp"] = "mlp"

    @property
    def features(self) -> int:
        return self.values


@dataclass(frozen=True, slots=True, kw_only=True)
class VitRecipe(ClassesRecipe):
    """Class of an image, by a vision transformer of its patches."""

    model: Literal["vit"] = "vit"
    #: height and width of a patch in pixels
    patch: _Whole = Field(ge=1, le=1024)

    def _check_own(self) -> None:
        ClassesRecipe._check_own(self)
        if self.side % self.patch:
            raise InvalidInput("patch", self.patch, f"a divisor of side, {self.side}")

    @property
    def tokens(self) -> int:
        return (self.side // self.patch) ** 2

    @property
    def features(self) -> int:
        return self.patch**2 * self.channels


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginRecipe(Recipe):
    """A task that a plug-in adds; see `nas.tasks.task`.

    Its model is counted at every width of the recipe: what changes the model is fixed.
    """

    fixed: ClassVar[tuple[str, ...]] = (
        *Recipe.fixed, "depth", "base_width", "head_dim", "mlp_ratio", "ranks", "sharding",
        "unit", "positions", "heads", "version", "counted",
    )  # fmt: skip

    task: str = Field(pattern=PLUGIN_NAME)
    model: Literal["own"] = "own"
    #: every layer of the model says so itself
    bias: bool = False
    normalize: Annotated[bool, Field(strict=True), BeforeValidator(_as_truth)] = False
    head_dim: _Whole = Field(16, ge=1, le=1024)
    beta2: _Decay = 0.999
    validation_samples: _Samples = 1024
    #: of the loss
    unit: str = Field(min_length=1, max_length=64)
    #: positions of one sample, over which FLOPs of a token are told
    positions: _Size = 1
    #: whether any layer makes or reads heads of attention
    heads: bool = False
    #: of the plug-in: another one trains otherwise, and its runs are not compared
    version: str = Field("1", max_length=64)
    #: digest of the sheets of the model, see `nas.planning.sheets`
    counted: str = ""

    def _check_own(self) -> None:
        if self.ranks != 1:
            raise InvalidInput("ranks", self.ranks, "1 for the task of a plug-in")

    @property
    def attends(self) -> bool:
        return self.heads

    @property
    def tokens(self) -> int:
        return self.positions

    @property
    def loss_unit(self) -> str:
        return self.unit


#: Every setting of any recipe, in the order of `Recipe.as_dict`, which may leave some out.
SETTINGS = (*(f.name for f in fields(Recipe)), *_OF_SOME)
AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)
_STORED: TypeAdapter[Recipe] = TypeAdapter(
    Annotated[
        TextRecipe | RegressionRecipe | PixelsRecipe
        | Annotated[FlatRecipe | VitRecipe, Field(discriminator="model")],
        Field(discriminator="task"),
    ]
)  # fmt: skip


def stored_recipe(values: Mapping[str, Any]) -> Recipe:
    """The recipe that `Recipe.as_dict` wrote; settings of other tasks are passed over."""
    if values.get("model") == "own":
        own = {f.name for f in fields(PluginRecipe)}
        return PluginRecipe(**{name: value for name, value in values.items() if name in own})
    return _STORED.validate_python(values)


def with_overrides(recipe: AnyRecipe, overrides: Mapping[str, Any]) -> AnyRecipe:
    """The recipe with some of its fields set anew; numbers may be given as text.

    Raises
    ------
    InvalidInput
        A field that does not exist or is fixed, or a value that it cannot have.

    >>> with_overrides(REGRESSION, {"input_dim": "16"}).features
    16
    """
    free = [f.name for f in fields(recipe) if f.name not in recipe.fixed]
    for name in overrides:
        if name not in free:
            accepted = f"settings of recipe {recipe.name}: {', '.join(free)}"
            raise InvalidInput("overrides", name, accepted)
    try:
        return replace(recipe, **overrides)
    except ValidationError as error:
        raise refusal(type(recipe), error) from None


_TRANSFORMER: dict[str, Any] = {
    "head_dim": 16, "bias": False, "normalize": True, "beta2": 0.95, "validation_samples": 256,
}  # fmt: skip
_MLP: dict[str, Any] = {
    "head_dim": 8, "bias": True, "normalize": False, "beta2": 0.999, "validation_samples": 2048,
}  # fmt: skip
#: The `text` task on characters: at 2e11 train FLOPs 5 to 45 seconds on one CPU core.
#: The learning rate is the best of 3e-3, 6e-3, 1.2e-2 and 2.4e-2 for dense at the base width.
TEXT = TextRecipe(
    name="gpt-chars-1", context=64, vocabulary=96, batch=8, lr=1.2e-2, min_steps=150,
    max_steps=4000, **_TRANSFORMER,
)  # fmt: skip
TEXT_BPE = replace(TEXT, name="gpt-bpe-1", tokenizer="bpe", vocabulary=1024)
#: arXiv:2410.02117: characters, 65,536 tokens a step, constant after 2,000 steps.  The base width
#: is not stated there; it is the narrowest of the published runs.
TEXT_PAPER = replace(
    TEXT, name="gpt-chars-paper", context=128, batch=512, head_dim=64, base_width=256, lr=3e-3,
    warmup_steps=2000, min_steps=4000, max_steps=100_000, min_width=64, validation_samples=1024,
)  # fmt: skip
REGRESSION = RegressionRecipe(
    name="mlp-regression-1", input_dim=8, pool=65_536, batch=512, lr=1e-3, min_steps=300,
    max_steps=20_000, **_MLP,
)  # fmt: skip
#: arXiv:2410.02117: a million cosine steps of 4,096 at learning rate 1e-3.
REGRESSION_PAPER = replace(
    REGRESSION, name="mlp-regression-paper", pool=0, batch=4096, lr=1e-3, clip=0.0,
    warmup_steps=0, schedule="cosine", min_steps=1000, max_steps=1_000_000,
    validation_samples=8192,
)  # fmt: skip
#: Next pixel value on 8×8 images; the default suits the grey handwritten digits of 17 levels.
PIXELS = PixelsRecipe(
    name="ar-digits-1", vocabulary=17, side=8, channels=1, batch=8, lr=1.2e-2, min_steps=150,
    max_steps=2000, **_TRANSFORMER,
)  # fmt: skip
PIXELS_CIFAR = replace(PIXELS, name="ar-cifar-1", vocabulary=256, channels=3, lr=3e-3, batch=4)
#: arXiv:2410.02117: 8×8×3 images, learning rate 3e-3 with cosine decay, batches of 64.
PIXELS_PAPER = replace(
    PIXELS_CIFAR, name="ar-pixels-paper", batch=64, warmup_steps=0, schedule="cosine", clip=1.0,
    min_steps=1000, max_steps=1_000_000, min_width=16,
)  # fmt: skip
IMAGES = FlatRecipe(
    name="mlp-digits-1", side=8, channels=1, augmentation="crop", batch=128, lr=3e-3, min_steps=100,
    max_steps=4000, **_MLP,
)  # fmt: skip
IMAGES_VIT = VitRecipe(
    name="vit-digits-1", side=8, channels=1, patch=2, augmentation="crop", batch=64, lr=6e-3,
    min_steps=100, max_steps=4000, **_TRANSFORMER,
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
