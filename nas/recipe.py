"""Recipes: every setting of a proxy run that is not its structure, width, seed or budget."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class GptRecipe:
    """How a GPT is shaped and trained.

    The learning rate is constant after the warm-up, so every point of a curve is a valid
    (compute, loss) measurement.  Source of the scheme: arXiv:2410.02117, appendix; sizes and
    step counts are scaled down to runs of seconds.
    """

    name: str
    #: residual blocks
    depth: int
    #: tokens per sequence
    context: int
    #: sequences per step
    batch: int
    #: distinct tokens
    vocabulary: int
    #: width of one attention head; widths of models are multiples of it
    head_dim: int
    #: hidden width of the feed-forward block over the width of the model
    mlp_ratio: int
    #: width of the dense model at which `lr` was tuned
    base_width: int
    #: Adam learning rate at the base width
    lr: float
    beta1: float
    beta2: float
    weight_decay: float
    #: largest norm of the whole gradient
    clip: float
    #: steps over which the learning rate rises linearly to its constant value
    warmup_steps: int
    #: fewest steps of a run that still says something
    min_steps: int
    #: widths whose run would be longer than this are too narrow for the budget
    max_steps: int
    #: narrowest and widest model
    min_width: int
    max_width: int
    #: windows of the fixed validation set, at most and at least; they do not overlap
    validation_sequences: int
    min_validation_sequences: int
    #: evaluations of a run, at step counts spaced by a constant ratio up to the last step
    evaluations: int

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.context

    @property
    def least_characters(self) -> int:
        """Tokens that training and validation need each."""
        return self.min_validation_sequences * (self.context + 1)

    @property
    def widths(self) -> range:
        """Every width a model may have."""
        return range(self.min_width, self.max_width + 1, self.head_dim)

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


#: The `text` task on characters: at 2e11 train FLOPs 5 to 45 seconds on one CPU core.
#: The learning rate is the best of 3e-3, 6e-3, 1.2e-2 and 2.4e-2 for dense at the base width.
TEXT = GptRecipe(
    name="gpt-chars-1",
    depth=3,
    context=64,
    batch=8,
    vocabulary=96,
    head_dim=16,
    mlp_ratio=4,
    base_width=64,
    lr=1.2e-2,
    beta1=0.9,
    beta2=0.95,
    weight_decay=0.0,
    clip=1.0,
    warmup_steps=50,
    min_steps=150,
    max_steps=4000,
    min_width=16,
    max_width=4096,
    validation_sequences=256,
    min_validation_sequences=32,
    evaluations=8,
)
