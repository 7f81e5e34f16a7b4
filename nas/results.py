"""Answers as values: the same for REST, the command line and Python.

Torch-free.  What an answer is good for, a layer or a whole model in its structure, is imported on
use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from nas.design import Aligned, described, parse_design
from nas.mixture import Mixture

if TYPE_CHECKING:
    from torch import nn

    from nas.layers import StructuredLinear
    from nas.layers.surgery import Surgery

Pair = tuple[float, float]
THETA = (
    "exponents: seven for two factors and mixtures of them, more for a longer chain, none for a "
    "convolution and for experts that are feed-forward blocks"
)
DESIGN = "structure of every layer, as text that `einsum-nas inspect` and `replace_linears` read"


class Result(BaseModel):
    """A frozen value whose fields can also be read as items."""

    model_config = ConfigDict(frozen=True)

    def __getitem__(self, name: str) -> Any:
        if name not in type(self).model_fields:
            raise KeyError(name)
        return getattr(self, name)


class Point(Result):
    """A point of a run's learning curve."""

    search_id: str
    trial_id: int
    number: int = Field(description="number of the trial in its search")
    kind: str = Field(description="candidate | reference | confirmation")
    name: str
    theta: list[float] = Field(description=THETA)
    design: str = Field(description=DESIGN)
    width: int
    seed: int
    steps: int
    train_flops: float
    loss: float = Field(description="mean over the task's fixed validation samples")
    loss_stderr: float = Field(description="standard error over the validation samples")
    train_seconds: float = Field(description="measured seconds of training up to this point")
    inference_flops: float = Field(description="forward FLOPs per token of the whole model")
    params: int = Field(description="trainable parameters of the whole model")
    step_seconds: float | None = Field(description="measured seconds of a training step")
    peak_memory: int | None = Field(description="measured peak memory of training, bytes")


class FrontierAnswer(Result):
    """Pareto fronts of loss against one axis, both minimised, over completed runs."""

    x: str = Field(description="axis: the field of a point that the front is drawn against")
    x_unit: str
    x_measured: bool = Field(
        description="whether values of the axis were measured during the runs, not computed"
    )
    y: Literal["loss"] = "loss"
    y_unit: str
    frontier: list[Point] = Field(description="over every structure")
    structured: list[Point]
    dense: list[Point]
    compute_optimal: list[int] | None = Field(
        description="positions in `frontier` of the compute-optimal points: those on the lower "
        "convex hull in log-log or within 2% of it; null on other axes than train FLOPs"
    )
    structured_law: Law | None = Field(description="null if there are too few points")
    dense_law: Law | None
    hypervolume: Hypervolume | None = Field(description="null for an empty front")
    points: int = Field(description="evaluations of completed runs")
    trials: int = Field(description="completed runs")


class Law(Result):
    """loss = offset + a · C^(-b), C in train FLOPs, fitted to compute-optimal points of a front.

    It is fitted to whatever runs are on the front, so it has no interval.
    """

    a: float
    b: float
    offset: float = Field(description="0 unless the points support another value")
    points: int
    fitted: Pair = Field(description="least and greatest train FLOPs of the points")


class Hypervolume(Result):
    """Area that a front dominates, over decades of the axis times the unit of the loss.

    Up to the reference point: the greatest value of the axis on any front, and the greatest loss.
    """

    overall: float
    structured: float
    dense: float
    reference: Pair = Field(description="(axis, loss)")
    unit: str


class Candidate(Result):
    """A structure at a width, and its loss at the budget."""

    search_id: str
    trial_id: int = Field(description="trial of the first of its runs")
    number: int
    kind: str
    name: str
    theta: list[float] = Field(description=THETA)
    design: str = Field(description=DESIGN)
    width: int
    seeds: int = Field(description="number of runs with distinct seeds; the loss is their mean")
    steps: int
    train_flops: float
    loss: float
    confirmed: bool = Field(description="whether the loss comes from confirmations only")
    inference_flops: float
    params: int
    step_seconds: float | None
    peak_memory: int | None


class Rival(Candidate):
    """A structure compared with another."""

    difference: float = Field(description="its loss minus the other's")
    difference_interval: Pair | None = Field(
        description="95%; simultaneous over all compared structures in measured answers, for each "
        "structure alone in predicted ones; null if unknown"
    )


class Multiplier(Result):
    """Compute multiplier over dense: train FLOPs of the best dense run within the budget, divided
    by the train FLOPs that the structure needs for the same loss."""

    value: float | None
    kind: str = Field(
        description="exact | at_least: the structure's curves begin below that loss | less_than: "
        "they never reach it | undetermined | predicted"
    )
    interval: Pair | None = Field(description="95% over seeds; null for a bound or a single seed")
    seeds: int


class Evidence(Result):
    """The runs that an answer rests on."""

    trials: int = Field(description="completed runs on the task or in the search")
    points: int = Field(description="their evaluations")
    searches: int
    seeds: int = Field(description="seeds behind the best one's loss")
    compared: int = Field(description="structures that the best was compared with")
    noise: float | None = Field(
        description="standard deviation of the logarithm of a loss from seed to seed, pooled over "
        "models that were run more than once; null where none was"
    )
    not_finite: int = Field(
        0, description="runs near the best that were left out because one of their stored values "
        "is not finite"
    )  # fmt: skip


class RankCorrelation(Result):
    """How well the runs that were ranked agree with their confirmations: Kendall's τ-b.

    Over the runs of one search at one budget: the largest such group that was confirmed.
    """

    tau: float | None = Field(description="null for fewer than 2 runs, or if all are tied")
    interval: Pair | None = Field(description="95%; null for fewer than 5 runs")
    candidates: int = Field(description="runs that were confirmed, dense ones included")
    seeds: int = Field(description="smallest number of confirmations of one of these runs")
    longer: float = Field(description="train FLOPs of a confirmation relative to its run's")


class Extrapolation(Result):
    """How far a predicted answer lies outside of what was measured."""

    measured: Pair = Field(description="least and greatest train FLOPs of the evidence")
    beyond: float = Field(description="budget divided by the greatest measured train FLOPs")
    law: str = Field(description="law that was fitted to the structure's compute-optimal points")
    widths: int = Field(description="number of widths that it was fitted to")


class Answer(Result):
    """The best structure within a budget."""

    kind: Literal["measured", "predicted"]
    budget: float
    budget_axis: str
    budget_unit: str
    task: str = Field(description="name@fingerprint")
    name: str
    theta: list[float] = Field(description=THETA)
    canonical_theta: list[float]
    design: str = Field(description=DESIGN)
    width: int
    steps: int
    train_flops: float
    train_flops_unit: str
    expected_loss: float
    loss_unit: str
    interval: Pair | None = Field(
        description="95% interval of the expected loss over other seeds; null if unknown"
    )
    interval_means: str
    validation_interval: Pair | None = Field(
        description="95% interval over the sampling of the validation data; null if unknown"
    )
    multiplier_over_dense: Multiplier | None
    structured_multiplier: Multiplier | None = Field(
        description="multiplier of the best structured model, if the best model is dense"
    )
    indistinguishable: list[Rival] = Field(
        description="structures whose loss does not clearly differ from that of the best"
    )
    comparisons_mean: str
    best_structured: Candidate | None
    best_dense: Candidate | None
    dense_minus_structured: Rival | None
    confirmed: bool = Field(
        description="whether the expected loss comes from new seeds only; otherwise it comes from "
        "the runs that the best was selected by, so it is biased low"
    )
    confirmation: RankCorrelation | None = Field(description="null before any `confirm`")
    evidence: Evidence
    extrapolation: Extrapolation | None = Field(description="null for a measured answer")

    def layer(self, d_in: int, d_out: int, **options: Any) -> StructuredLinear:
        """A layer of this structure; options as of `nas.layers.layer_of`, among them the heads
        that a projection of attention makes or reads."""
        from nas.layers import layer_of

        return layer_of(self.design, d_in, d_out, **options)

    def replace_linears(self, model: nn.Module, **options: Any) -> Surgery:
        """Put this structure in the place of a model's linear layers; options and report as of
        `nas.layers.replace_linears`."""
        from nas.layers import replace_linears

        return replace_linears(model, self.design, **options)

    @property
    def snippet(self) -> str:
        """Python that puts this structure into a model."""
        design = parse_design(self.design)
        imports, use = "param_groups, replace_linears", "print(replace_linears(model, structure))\n"
        if isinstance(design, Aligned):
            imports, use = "layer_of, param_groups", _ALIGNED_USE
        elif isinstance(design, Mixture) and design.theta is None:
            imports, use = "MixtureFFN, param_groups", _FEED_FORWARD_USE
        return (
            f"import torch\nfrom nas.layers import {imports}\n\n"
            f"# {described(self.design)}: {self.kind} best for {self.task} "
            f"within {self.budget:.4g} {self.budget_axis}\n"
            f'structure = "{self.design}"\n{use}'
            "optimizer = torch.optim.AdamW(param_groups(model, lr=1e-3))\n"
        )


#: What single layers cannot be told of: which make heads, and which belong to one block.
_ALIGNED_USE = """\
d_model, heads = 768, 12  # of your model, whose layers these are
layers = {
    name: layer_of(structure, d_model, d_model, heads=heads, side=side)
    for name, side in {"query": "out", "key": "out", "value": "out", "attention_out": "in"}.items()
}
layers["mlp_in"] = layer_of(structure, d_model, 4 * d_model)
layers["mlp_out"] = layer_of(structure, 4 * d_model, d_model)
model = torch.nn.ModuleDict(layers)
"""
_FEED_FORWARD_USE = """\
d_model = 768  # of your model, whose feed-forward block this is
model = MixtureFFN.of(structure, d_model, 4 * d_model)
"""
