"""Models computed as one, against the same models computed by their own modules one by one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from nas.designs.design import as_design
from nas.errors import RunFailed
from nas.layers import auxiliary_loss
from nas.layers.building import plan_text
from nas.layers.mixture import MixtureLinear
from nas.planning.cost import structures_of
from nas.planning.recipe import IMAGES_VIT, PIXELS, REGRESSION, TEXT, Recipe
from nas.planning.runs import RunPlan, plan_of_steps
from nas.tasks import load_data
from nas.tasks.batches import sample_losses
from nas.training.checkpoint import Checkpoint
from nas.training.engine import CPU, ROUTER_WEIGHT, Engine
from nas.training.run import Point, train, train_replicates
from nas.training.stacked import STACKED
from nas.training.tasks import build_model, learning_rates
from tests.support.tiers import only
from tests.unit.training.test_run import TINY, TRAIN, VALIDATION

DESIGNS = (
    "dense", "monarch", "btt:rho=1/4", "low-rank:rho=1/2", "kronecker", "tensor-train:rho=1/4",
    "0.3,0.2,0.5,0.4,0.5,0.1,0.3", "btt:cores=3,rho=1/8", "monarch@heads",
    "convolution:kernel=1/2", "blast", "block-sparse:blocks=1/2", "lost:rank=1/2,channels=1/2",
    "pixelfly:rank=1/4,blocks=1/2", "cola-mlp:rank=1/2,activation=silu",
    "btt-moe:experts=4,active=2", "btt-moe:experts=4,active=3,shared=1",
    "ffn-moe:experts=8,active=4,shared=1,granularity=4",
)  # fmt: skip
#: Recipe → width: of token ids with capped factors, numbers with biases, patches.
RECIPES: dict[str, tuple[Recipe, int]] = {
    "text": (dataclasses.replace(TEXT, depth=2, context=8, batch=3), 48),
    "regression": (dataclasses.replace(REGRESSION, depth=2, batch=32), 40),
    "vit": (dataclasses.replace(IMAGES_VIT, depth=2, batch=4), 16),
    "pixels": (dataclasses.replace(PIXELS, depth=1, batch=2), 32),
}
_STEPS = 12
#: Designs that `make test` trains on text; on regression it trains the others.
_TEXT = ("dense", "btt:rho=1/4", "btt:cores=3,rho=1/8", "monarch@heads",
         "ffn-moe:experts=8,active=4,shared=1,granularity=4")  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def batches(recipe: Recipe, runs: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each run its own, (runs, batch, ...)."""
    draw, lead = torch.Generator().manual_seed(1), (runs, recipe.batch)
    for _ in range(_STEPS):
        if recipe.is_token_model:
            shape = *lead, recipe.tokens
            yield tuple(  # type: ignore[misc]
                torch.randint(n, shape, generator=draw)
                for n in (recipe.embedded_tokens, recipe.outputs)
            )
            continue
        positions = () if recipe.tokens == 1 else (recipe.tokens,)
        numbers = *lead, *positions, recipe.features
        x = torch.randn(numbers, generator=draw, dtype=torch.float64)
        if recipe.task == "regression":
            yield x, torch.randn(lead, generator=draw, dtype=torch.float64)
        else:
            yield x, torch.randint(recipe.outputs, lead, generator=draw)


def one_by_one(recipe: Recipe, plan: RunPlan, run: int, runs: int) -> list[float]:
    """Training losses of one run by the modules of its model."""
    torch.manual_seed(run)
    model = build_model(recipe, plan.design, plan.width).double()
    optimizer = torch.optim.AdamW(
        learning_rates(model, recipe, plan.width),
        betas=(recipe.beta1, recipe.beta2),
        weight_decay=recipe.weight_decay,
    )
    losses = []
    for x, y in batches(recipe, runs):
        loss = sample_losses(recipe, model(x[run]), y[run]).mean()
        routing = auxiliary_loss(model)
        optimizer.zero_grad()
        torch.autograd.backward(loss if routing is None else loss + ROUTER_WEIGHT * routing)
        if recipe.clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        losses.append(loss.item())
    return losses


def together(recipe: Recipe, plan: RunPlan, runs: int, stacked: bool) -> Tensor:
    """The same of several runs at once (runs, steps)."""
    plans = {
        s.fingerprint: STACKED
        if stacked and s.is_linear
        else plan_text(s, recipe.tokens_per_step, torch.device("cpu"), torch.float64)
        for s in structures_of(recipe, plan.design, plan.width)
    }
    engine = Engine(plan, recipe, range(runs), CPU, plans, torch.float64)
    return torch.stack([engine.step(x, y) for x, y in batches(recipe, runs)], dim=1)


CASES = [
    (name, design)
    for name, (recipe, _) in RECIPES.items()
    for design in DESIGNS
    if recipe.attends or "@heads" not in design
]


@pytest.fixture
def _gates_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gates that differ from the start: at zero experts tie, and rounding decides who is chosen."""
    reset = MixtureLinear.reset_parameters

    def drawn(layer: MixtureLinear, generator: torch.Generator | None = None) -> None:
        reset(layer, generator)
        if layer.gate is not None:
            torch.nn.init.normal_(layer.gate)

    monkeypatch.setattr(MixtureLinear, "reset_parameters", drawn)


@pytest.mark.usefixtures("_gates_apart")
@pytest.mark.parametrize(
    ("name", "design"),
    only([c for c in CASES if c[0] == ("text" if c[1] in _TEXT else "regression")], CASES),
)
def test_models_computed_as_one_train_as_each_by_its_modules(name: str, design: str) -> None:
    recipe, width = RECIPES[name]
    plan = plan_of_steps(recipe, as_design(design), width, _STEPS)
    for runs, stacked in ((1, True), (1, False), (3, True), (2, False)):
        found = together(recipe, plan, runs, stacked)
        for run in range(runs):
            expected = torch.tensor(one_by_one(recipe, plan, run, runs), dtype=torch.float64)
            assert expected.std() > 1e-6
            # gates amplify rounding: what they choose is no continuous function
            many = 6 if "moe" in design else _STEPS
            torch.testing.assert_close(found[run, :many], expected[:many], rtol=1e-9, atol=0.0)


@pytest.mark.usefixtures("_gates_apart")
@pytest.mark.parametrize("ill", [0, 1, 2])
def test_a_run_that_overflows_changes_no_other(ill: int) -> None:
    recipe, width = RECIPES["text"]
    for design in ("monarch", "btt-moe:experts=2,active=1", "ffn-moe:experts=4,active=2"):
        plan = plan_of_steps(recipe, as_design(design), width, _STEPS)
        plans = {
            s.fingerprint: STACKED for s in structures_of(recipe, plan.design, plan.width)
        }  # fmt: skip
        found = []
        for spoilt in (False, True):
            engine = Engine(plan, recipe, range(3), CPU, plans)
            if spoilt:
                with torch.no_grad():
                    for parameter in engine.stacked.parameters:
                        parameter[ill] = torch.inf
            found.append(torch.stack([engine.step(x, y) for x, y in batches(recipe, 3)]))
        well, spoilt_one = found
        assert not spoilt_one[:, ill].isfinite().any()
        others = [r for r in range(3) if r != ill]
        # products of other numbers of rows round otherwise
        torch.testing.assert_close(spoilt_one[:, others], well[:, others], rtol=1e-4, atol=0.0)


# --- whole runs

PLAN = plan_of_steps(TINY, as_design("btt:rho=1/4"), 32, 60)
SEEDS = (3, 7, 11)


def by_seed(found: Iterator[dict[int, Point | RunFailed]]) -> dict[int, list[Point | RunFailed]]:
    curves: dict[int, list[Point | RunFailed]] = {}
    for news in found:
        for seed, new in news.items():
            curves.setdefault(seed, []).append(new)
    return curves


def losses(points: list[Point | RunFailed]) -> list[float]:
    return [p.loss for p in points if isinstance(p, Point)]


@pytest.fixture(scope="module")
def curves() -> dict[int, list[Point | RunFailed]]:
    """Three runs that were never interrupted."""
    torch.set_num_threads(1)
    return by_seed(train_replicates(PLAN, TINY, TRAIN, VALIDATION, SEEDS))


def test_each_of_several_runs_has_the_curve_of_the_run_alone(
    curves: dict[int, list[Point | RunFailed]],
) -> None:
    assert set(curves) == set(SEEDS)
    assert len({tuple(losses(points)) for points in curves.values()}) == 3
    for seed in SEEDS:
        alone = list(train(PLAN, TINY, TRAIN, VALIDATION, seed))
        assert [p.step for p in alone] == [p.step for p in curves[seed] if isinstance(p, Point)]
        # single precision: sums in another order, over sixty steps
        assert losses(curves[seed]) == pytest.approx([p.loss for p in alone], rel=2e-3)


def interrupted(path: Checkpoint, after: int) -> None:
    """Three runs that stop after so many evaluations, and have saved their state by then."""
    runs = train_replicates(PLAN, TINY, TRAIN, VALIDATION, SEEDS, checkpoint=path)
    for _ in range(after):
        next(runs)
    runs.close()


@pytest.mark.parametrize("seeds", [SEEDS, (7,), (11, 3)])
def test_runs_go_on_from_a_common_checkpoint_all_or_some(
    seeds: tuple[int, ...], tmp_path: object, curves: dict[int, list[Point | RunFailed]]
) -> None:
    path = Checkpoint(tmp_path / "state.pt", "key", every_seconds=0.0)  # type: ignore[operator]
    interrupted(path, 4)
    saved = path.load()
    assert saved is not None
    assert saved["step"] > TINY.warmup_steps
    resumed = by_seed(
        train_replicates(PLAN, TINY, TRAIN, VALIDATION, seeds, checkpoint=path)
    )  # fmt: skip
    assert set(resumed) == set(seeds)
    for seed in seeds:
        exact = len(seeds) == len(SEEDS)
        expected = losses(curves[seed])
        assert losses(resumed[seed]) == (expected if exact else pytest.approx(expected, rel=2e-3))


def test_a_run_that_diverges_ends_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object, curves: dict[int, list[Point | RunFailed]]
) -> None:
    step, taken = Engine.step, [0]

    def spoil(engine: Engine, x: Tensor, y: Tensor) -> Tensor:
        taken[0] += 1
        if taken[0] == 30:
            with torch.no_grad():
                engine.stacked.parameters[0][1] = torch.nan
        return step(engine, x, y)

    monkeypatch.setattr(Engine, "step", spoil)
    path = Checkpoint(tmp_path / "state.pt", "key", every_seconds=0.0)  # type: ignore[operator]
    found = by_seed(train_replicates(PLAN, TINY, TRAIN, VALIDATION, SEEDS, checkpoint=path))
    assert str(found[7][-1]) == "training loss is nan at step 30 of 60"
    assert losses(found[7]) == losses(curves[7])[: len(found[7]) - 1]
    for seed in (3, 11):
        assert losses(found[seed]) == losses(curves[seed])
    # and so it does where the runs are gone on with
    again = by_seed(train_replicates(PLAN, TINY, TRAIN, VALIDATION, SEEDS, checkpoint=path))
    assert isinstance(again[7][-1], RunFailed)
    assert losses(again[11]) == losses(curves[11])


def test_runs_that_all_diverge_end_early() -> None:
    wild = dataclasses.replace(REGRESSION, pool=256, batch=16, validation_samples=32, lr=1e30)
    data, plan = load_data(wild), plan_of_steps(wild, as_design("monarch"), 16, 60)
    found = by_seed(train_replicates(plan, wild, data.train, data.validation, (0, 1)))
    assert set(found) == {0, 1}
    assert all(isinstance(points[-1], RunFailed) for points in found.values())
