"""The papers' study at two scales: which structures, widths, budgets and seeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nas.designs.taxonomy import parse_theta
from nas.errors import InvalidInput
from nas.planning.recipe import REGRESSION, TEXT, TEXT_PAPER, Recipe, with_overrides
from nas.planning.runs import RunPlan, plan_at, plans
from nas.study.runs import StudyRun
from nas.tasks import TaskData

#: The compared structures: of each kind of the taxonomy (ω, ψ) several.
STRUCTURES = (
    "dense",
    "monarch",
    "btt:rho=1/4",
    "2/3,0,1/3,0,1/3,2/3,0",
    "low-rank:rho=1/2",
    "low-rank:rho=3/4",
    "4/5,0,1/5,0,4/5,1/5,1/10",
    "kronecker",
    "tensor-train:rho=1/4",
    "1/2,1/4,1/4,1/4,1/2,1/4,0",
)


@dataclass(frozen=True)
class Study:
    """One task of a scale."""

    recipe: Recipe
    #: train FLOPs of every run
    budget: float
    #: places on the logarithmic range of widths that the budget admits
    positions: tuple[float, ...]


#: Scale → its studies.  At CPU scale both together take 20 minutes on two cores.
SCALES: Mapping[str, tuple[Study, ...]] = {
    "cpu": (
        Study(with_overrides(REGRESSION, {"batch": 1024}), 1e11, (0.1, 0.3, 0.5)),
        Study(TEXT, 1e11, (0.1, 0.3, 0.5)),
    ),
    "gpu": (
        Study(
            with_overrides(REGRESSION, {"pool": 0, "batch": 4096, "max_steps": 100_000}),
            1e15,
            (0.2, 0.35, 0.5, 0.65, 0.8),
        ),
        Study(
            with_overrides(TEXT_PAPER, {"batch": 128, "warmup_steps": 500, "min_steps": 1000}),
            3e15,
            (0.2, 0.35, 0.5, 0.65, 0.8),
        ),
    ),
}


def studies_of(scale: str) -> tuple[Study, ...]:
    """The studies of a scale.

    Raises
    ------
    InvalidInput
        No such scale.
    """
    if scale not in SCALES:
        raise InvalidInput("scale", scale, " | ".join(SCALES))
    return SCALES[scale]


def runs_of(study: Study, data: TaskData, seeds: int) -> list[StudyRun]:
    """Every run of a study: structures × widths × seeds, seed by seed.

    Seeds come first, so that a study that is cut short has every structure.
    """
    chosen = {name: _plans(data.recipe, name, study) for name in STRUCTURES}
    return [
        StudyRun.of(data, plan, seed)
        for seed in range(seeds)
        for name in STRUCTURES
        for plan in chosen[name]
    ]


def _plans(recipe: Recipe, name: str, study: Study) -> list[RunPlan]:
    """One run a position, at distinct widths: the next wider where two positions meet."""
    theta = parse_theta(name)
    admitted = plans(recipe, theta, study.budget)
    chosen: list[RunPlan] = []
    for position in study.positions:
        plan = plan_at(recipe, theta, position, study.budget)
        wider = [p for p in admitted if p.width >= plan.width and p not in chosen]
        chosen += wider[:1]
    return chosen
