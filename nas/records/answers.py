"""Answers as values: the same for REST, the command line and Python.

Torch-free.  What an answer is good for, a layer or a whole model in its structure, is imported on
use.
"""

from __future__ import annotations

from collections.abc import Callable
from textwrap import TextWrapper
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, PrivateAttr

from nas.designs.design import AT_HEADS, family_of, parse_design
from nas.errors import InvalidInput, NotFound
from nas.records import notebook
from nas.records.base import DESIGN, SECONDS, THETA, Record
from nas.records.device import DEVICE, OnDevice
from nas.records.run import CurvePoint, OfRun

if TYPE_CHECKING:
    from torch import nn

    from nas.layers import StructuredLinear
    from nas.layers.surgery import Surgery

Pair = tuple[float, float]


class Point(OfRun):
    """A point of a run's learning curve."""

    seed: int
    steps: int
    train_flops: float
    loss: float = Field(description="mean over the task's fixed validation samples")
    loss_stderr: float = Field(description="standard error over the validation samples")
    train_seconds: float = Field(description="measured seconds of training up to this point")

    @classmethod
    def of(cls, point: CurvePoint) -> Point:
        """A stored point."""
        own = ("train_flops", "loss", "loss_stderr", "train_seconds")
        return cls(
            **point.run.shared(), seed=point.run.seed, steps=point.step,
            **{name: getattr(point, name) for name in own},
        )  # fmt: skip


class FrontierAnswer(OnDevice):
    """Pareto fronts of loss against one axis, both minimised, over completed runs.

    On an axis that was measured, they are of the runs of one device.
    """

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

    def _repr_html_(self) -> str:
        """The front as a table, for notebooks."""
        return notebook.front(self)


class Law(Record):
    """loss = offset + a · C^(-b), C in train FLOPs, fitted to compute-optimal points of a front.

    It is fitted to whatever runs are on the front, so it has no interval.
    """

    a: float
    b: float
    offset: float = Field(description="0 unless the points support another value")
    points: int
    fitted: Pair = Field(description="least and greatest train FLOPs of the points")


class Hypervolume(Record):
    """Area that a front dominates, over decades of the axis times the unit of the loss.

    Up to the reference point: the greatest value of the axis on any front, and the greatest loss.
    """

    overall: float
    structured: float
    dense: float
    reference: Pair = Field(description="(axis, loss)")
    unit: str


class Candidate(OfRun):
    """A structure at a width, and its loss at the budget."""

    trial_id: int = Field(description="trial of the first of its runs")
    seeds: int = Field(description="number of runs with distinct seeds; the loss is their mean")
    steps: int
    train_flops: float
    loss: float
    confirmed: bool = Field(description="whether the loss comes from confirmations only")
    train_seconds: float | None = Field(
        None, description="measured seconds of training up to there, mean over its runs; null "
        "unless all of them were timed on one device", json_schema_extra=SECONDS,
    )  # fmt: skip
    device: str | None = Field(
        None, description=f"{DEVICE} of its runs; null if not recorded, or if they differ"
    )


class Rival(Candidate):
    """A structure compared with another."""

    difference: float = Field(description="its loss minus the other's")
    difference_interval: Pair | None = Field(
        description="95%; simultaneous over all compared structures in measured answers, for each "
        "structure alone in predicted ones; null if unknown"
    )


class Multiplier(Record):
    """Compute multiplier over dense: train FLOPs of the best dense run within the budget, divided
    by the train FLOPs that the structure needs for the same loss."""

    value: float | None
    kind: str = Field(
        description="exact | at_least: the structure's curves begin below that loss | less_than: "
        "they never reach it | undetermined | predicted"
    )
    interval: Pair | None = Field(
        description="95% over seeds; null for a bound or a single measured seed. A predicted value "
        "always has one"
    )
    seeds: int
    reason: str | None = Field(None, description="why there is no value; null where there is one")


class RealisedMultiplier(Multiplier):
    """Realised multiplier over dense: measured seconds of training that the best dense run within
    the budget takes to its loss, divided by those that the structure takes to the same loss.

    The compared runs are those of the compute multiplier, seed by seed; only the axis differs.  So
    it says what is left of the saved FLOPs on one device: 0.5 if the structure takes twice as long.
    Of a budget in seconds the runs are found in seconds, and both multipliers compare them.

    There is none, with the reason, where a compared run was not timed or the two ran on different
    devices.
    """

    device: str | None = Field(None, description=f"where the compared runs ran: {DEVICE}")
    together: list[int] = Field(
        [], description="numbers of runs that were trained as one when the compared ones were; a "
        "run's seconds are its share"
    )  # fmt: skip


class Evidence(Record):
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


class RankCorrelation(Record):
    """How well the runs that were ranked agree with their confirmations: Kendall's τ-b.

    Over the runs of one search at one budget: the largest such group that was confirmed.
    """

    tau: float | None = Field(description="null for fewer than 2 runs, or if all are tied")
    interval: Pair | None = Field(description="95%; null for fewer than 5 runs")
    candidates: int = Field(description="runs that were confirmed, dense ones included")
    seeds: int = Field(description="smallest number of confirmations of one of these runs")
    longer: float = Field(description="train FLOPs of a confirmation relative to its run's")


class Extrapolation(Record):
    """How far a predicted answer lies outside of what was measured."""

    measured: Pair = Field(description="least and greatest train FLOPs of the evidence")
    beyond: float = Field(description="budget divided by the greatest measured train FLOPs")
    law: str = Field(description="law that was fitted to the structure's compute-optimal points")
    widths: int = Field(description="number of widths that it was fitted to")
    left_out: int = Field(
        0, description="structures near the best that are not extrapolated: no law can be fitted "
        "to them at widths that would be run at this budget"
    )  # fmt: skip


class PublishedTable(Record):
    """The published table of runs that an answer rests on, where this service has none.

    Its runs are of another recipe and scale than a search of this service, on one machine.
    """

    name: str
    version: str = Field(description="of einsum-nas, whose runs they are")
    date: str = Field(description="when it was written, ISO 8601")
    recipe: str = Field(description="named recipe of its runs")
    settings: dict[str, bool | int | float | str] = Field(
        description="settings in which its runs differ from that recipe"
    )
    fingerprint: str = Field(
        description="of its data and recipe; searches of this service have another one unless they "
        "set the same"
    )
    machine: str = Field(description=f"{DEVICE} of its runs")
    entries: int = Field(description="designs at a width, dense ones included")
    widths: list[int] = Field(description="of its structured models")
    dense_widths: list[int]
    seeds: list[int] = Field(description="with which every entry was run")
    budgets: Pair = Field(description="least and greatest budget that it answers at")
    read_at: float = Field(
        description="budget that the answer holds for: the asked one, or the table's greatest"
    )
    axis_unit: str = Field(description="unit of the budgets")


class Answer(OnDevice):
    """The best structure within a budget.

    Where the budget is measured, it is of the runs of one device.  A predicted one is a run that a
    search with this budget could make: its width and steps are within the recipe's.  A published
    one is of no run of this service; ids of its runs are negative and name rows of the table.
    """

    kind: Literal["measured", "predicted", "published"] = Field(
        description="measured: by runs of this service | predicted: extrapolated from them | "
        "published: by a table that comes with einsum-nas, because this service has no completed "
        "run within the budget"
    )
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
    verdict: Literal["structured is lower", "dense is lower", "no clear difference", "unconfirmed"]
    verdict_reason: str = Field(
        description="why. It is unconfirmed unless both the best structured and the best dense "
        "model were measured with several seeds, or with new ones"
    )
    multiplier_over_dense: Multiplier | None
    structured_multiplier: Multiplier | None = Field(
        description="multiplier of the best structured model, if the best model is dense"
    )
    realised_multiplier_over_dense: RealisedMultiplier | None = Field(
        None, description="the same comparison in measured seconds; null where the other is"
    )
    structured_realised_multiplier: RealisedMultiplier | None = Field(
        None, description="that of the best structured model"
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
    base_width: int = Field(
        description="width of the dense model at which `base_lr` was tuned: `base_width` of "
        "`nas.layers.param_groups`"
    )
    base_lr: float = Field(description="learning rate of the runs at that width")
    evidence: Evidence
    extrapolation: Extrapolation | None = Field(description="null unless it is predicted")
    weights: int | None = Field(
        None, description="trial of the best model, of those whose trained weights are kept the "
        "one with the lowest loss at its last step; null if none is kept, and for predicted and "
        "published answers",
    )  # fmt: skip
    published: PublishedTable | None = Field(
        None, description="what a published answer rests on; null for others"
    )

    #: the trained model of a trial; set by the client that has asked
    _model_of: Callable[[int], nn.Module] | None = PrivateAttr(None)

    def model(self) -> nn.Module:
        """The trained model: that of the run which `weights` names, downloaded, see `Client.model`.

        Raises
        ------
        NotFound
            None of its runs has kept its weights.
        InvalidInput
            The answer was not asked for by a `Client`.
        """
        if self.weights is None:
            raise NotFound(
                f"no run of {self.name!r} of width {self.width} has kept its weights; "
                "`keep_weights` of a search says how many of its best runs do"
            )
        if self._model_of is None:
            accepted = "an answer that a `nas.Client` has asked for; `nas.load_model` reads files"
            raise InvalidInput("answer", f"one read from elsewhere, of {self.task}", accepted)
        return self._model_of(self.weights)

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

    def _repr_html_(self) -> str:
        """The verdict and the best runs as a table, for notebooks."""
        return notebook.answer(self)

    @property
    def keeps_dense(self) -> bool:
        """Whether a model had better stay as it is: no structure is told apart from dense."""
        gap = self.dense_minus_structured
        interval = None if gap is None else gap.difference_interval
        return self._is_dense or interval is None or interval[0] <= 0

    @property
    def _is_dense(self) -> bool:
        return self.best_dense is not None and self.best_dense.design == self.design

    @property
    def snippet(self) -> str:
        """A program that puts this structure into a small model and trains a step; where nothing
        is told apart from dense, one that keeps the model dense."""
        design = parse_design(self.design)
        imports, model, use, run = "param_groups, replace_linears", _MODEL, _REPLACE, _STEP
        if self.keeps_dense:
            imports, use = "param_groups", ""
        elif design.text.endswith(AT_HEADS):
            imports, model, use, run = "layer_of, param_groups", _HEADS, _ALIGNED, "print(model)\n"
        elif family_of(design).alone(design):
            imports, model, use = "MixtureFFN, param_groups", _WIDTH, _FEED_FORWARD
        structure = "" if self.keeps_dense else f'structure = "{self.design}"\n'
        tuned = f"lr={self.base_lr:g}, base_width={self.base_width}, width=width"
        return (
            f"{self._about}import torch\nfrom nas.layers import {imports}\n\n{model}\n"
            f"# --- paste from here\n{structure}{use}"
            f"# the learning rate was tuned on dense models of width {self.base_width}; width is\n"
            "# that of your model\n"
            f"optimizer = torch.optim.AdamW(param_groups(model, {tuned}))\n"
            f"# --- to here\n\n{run}"
        )

    @property
    def _about(self) -> str:
        """What a snippet is for, as comments."""
        lines = [
            f"{self.kind} best for {self.task} within {self.budget:.4g} {self.budget_axis}: "
            f"{parse_design(self.design).described}",
            f"verdict: {self.verdict} ({self.verdict_reason})",
        ]
        if self.keeps_dense:
            lines.append(
                "keep dense: no structure is told apart from it, so your model stays as it is"
            )
            if self.best_structured is not None:
                lines.append(f'the best structure found: "{self.best_structured.design}"')
        wrap = TextWrapper(
            88, initial_indent="# ", subsequent_indent="# ", break_long_words=False,
            break_on_hyphens=False,
        )  # fmt: skip
        return "".join(wrap.fill(line) + "\n" for line in lines)


_WIDTH = "width = 256  # of your model, whose feed-forward block this is\n"
_MODEL = """\
# a small model to see it run; yours takes its place
width = 256
model = torch.nn.Sequential(
    torch.nn.Linear(width, 4 * width), torch.nn.GELU(), torch.nn.Linear(4 * width, width)
)
"""
_REPLACE = "print(replace_linears(model, structure))\n"
_STEP = """\
inputs = torch.randn(32, width)
loss = (model(inputs) - inputs).square().mean()
loss.backward()
optimizer.step()
print(f"loss {loss.item():.4f}, and one step taken")
"""
#: What single layers cannot be told of: which make heads, and which belong to one block.
_HEADS = "width, heads = 768, 12  # of your model, whose layers these are\n"
_ALIGNED = """\
layers = {
    name: layer_of(structure, width, width, heads=heads, side=side)
    for name, side in {"query": "out", "key": "out", "value": "out", "attention_out": "in"}.items()
}
layers["mlp_in"] = layer_of(structure, width, 4 * width)
layers["mlp_out"] = layer_of(structure, 4 * width, width)
model = torch.nn.ModuleDict(layers)
"""
_FEED_FORWARD = "model = MixtureFFN.of(structure, width, 4 * width)\n"
