"""Tasks of plug-ins: what is counted of them, what is refused, and how they train."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from nas.designs.design import parse_design
from nas.layers import forward_flops
from nas.planning import cost, sheets, tasks
from nas.planning.recipe import RECIPES, REGRESSION, PluginRecipe, Recipe, stored_recipe
from nas.planning.runs import RunPlan, plan_of_steps
from nas.tasks import load_data
from nas.tasks.task import LinearFactory
from nas.training import tasks as code
from nas.training.checkpoint import Checkpoint
from nas.training.models import FAMILIES
from nas.training.plugin import counted_sheets, described
from nas.training.run import Point, train, train_replicates
from tests.support.tasks import SETTINGS, Net, Plain
from tests.support.tiers import only

DESIGNS = ["dense", "monarch", "btt:rho=1/4", "btt-moe:experts=4,active=2"]


@pytest.mark.parametrize("name", only(["gpt-chars-1", "mlp-digits-1"], RECIPES))
def test_a_built_in_model_counts_as_its_formulas_say(name: str) -> None:
    recipe = replace(
        RECIPES[name], min_width=RECIPES[name].head_dim, max_width=4 * RECIPES[name].head_dim
    )
    for width, counted in counted_sheets(code.task_of(recipe), recipe).items():
        said = cost.sheet_of(recipe, width)
        each = [layer for _ in range(recipe.depth) for layer in said.layers]
        roles = [(one.role.d_in, one.role.d_out, one.role.d_in_base, one.role.heads, one.role.side)
                 for one in each]  # fmt: skip
        found = [(one.role.d_in, one.role.d_out, one.role.d_in_base, one.role.heads, one.role.side)
                 for one in counted.layers]  # fmt: skip
        assert (found, counted.macs, counted.params) == (roles, said.macs, said.params)
        assert {one.positions for one in counted.layers} == {recipe.tokens}


def card(task: Plain) -> tasks.TaskCard:
    """What the service would know of a task."""
    return tasks.card_of("here", json.loads(json.dumps(described(task))))


def recipe_of(task: Plain, number: int = 0, **changes: Any) -> PluginRecipe:
    found = card(task)
    assert found.refusal is None
    recipe = found.recipes[number]
    assert isinstance(recipe, PluginRecipe)
    return replace(recipe, **changes)


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> Plain:
    task = Plain()
    known = {**tasks.task_cards(), "plain": card(task)}
    monkeypatch.setattr(tasks, "task_cards", lambda: known)
    monkeypatch.setattr(code, "_by_name", lambda source: {"plain": task})
    return task


@pytest.mark.parametrize("text", DESIGNS)
@pytest.mark.parametrize("width", [16, 64])
def test_a_model_has_the_parameters_and_flops_that_are_charged(
    text: str, width: int, plain: Plain
) -> None:
    recipe, design = recipe_of(plain, 1, normalize=True), parse_design(text)
    model = code.build_model(recipe, design, width).eval()
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == cost.parameters(recipe, design, width)
    counted = forward_flops(model, torch.zeros(3, 6))
    assert counted == 3 * cost.forward_flops_per_sample(recipe, design, width)


def test_learning_rates_follow_from_the_base_model(plain: Plain) -> None:
    settings = SETTINGS | {"base_width": 16, "lr": 1.0}
    recipe = recipe_of(changed(recipes={"narrow": settings}))
    model = code.build_model(recipe, parse_design("dense"), 64)
    rates = {
        id(p): group["lr"]
        for group in code.learning_rates(model, recipe, 64)
        for p in group["params"]
    }
    found = {name: rates[id(p)] for name, p in model.named_parameters()}
    assert found["embedding.weight"] == found["norm.weight"] == 1.0  # its inputs do not grow
    assert found["layers.0.weight"] == found["head.weight"] == 0.25


def test_a_recipe_of_a_plugin_is_read_back(plain: Plain) -> None:
    recipe = recipe_of(plain)
    assert stored_recipe(json.loads(json.dumps(recipe.as_dict()))) == recipe
    assert recipe.loss_unit == "squared error"
    with pytest.raises(ValueError, match="this one is another"):
        cost.sheet_of(replace(recipe, counted="0" * 16), 16)


def points(
    task: Plain, recipe: Recipe, seeds: list[int], plan: RunPlan, **options: Any
) -> dict[int, list[Point]]:
    train_data, held = task.load(recipe, None)
    found: dict[int, list[Point]] = {seed: [] for seed in seeds}
    for news in train_replicates(plan, recipe, train_data, held, seeds, **options):
        for seed, point in news.items():
            assert isinstance(point, Point), point
            found[seed].append(replace(point, seconds=0.0))
    return found


def test_runs_train_together_as_they_do_alone(plain: Plain) -> None:
    recipe = recipe_of(plain)
    plan = plan_of_steps(recipe, parse_design("monarch"), 32, 120)
    together = points(plain, recipe, [3, 4], plan)
    alone = points(plain, recipe, [4], plan)
    assert [p.loss for p in together[4]] == pytest.approx([p.loss for p in alone[4]], rel=1e-4)
    assert together[3] != together[4]
    assert alone[4][-1].loss < 0.5 * alone[4][0].loss  # it learns, with a loss of 1 at first
    assert alone == points(plain, recipe, [4], plan)


def test_a_run_goes_on_from_its_checkpoint_as_if_nothing_had_happened(
    plain: Plain, tmp_path: Path
) -> None:
    recipe = recipe_of(plain, evaluations=6)
    plan = plan_of_steps(recipe, parse_design("btt:rho=1/4"), 32, 60)
    whole = points(plain, recipe, [5, 6], plan)
    kept = Checkpoint(tmp_path / "kept", "key", every_seconds=0.0)
    first = points(plain, recipe, [5, 6], plan, checkpoint=kept, until=whole[5][2].step)
    assert first == {seed: found[:3] for seed, found in whole.items()}
    assert points(plain, recipe, [5, 6], plan, checkpoint=kept) == whole  # dropout, norms and all


def test_what_is_frozen_stays_and_the_rest_trains(
    plain: Plain, monkeypatch: pytest.MonkeyPatch
) -> None:
    def model(recipe: Recipe, width: int, linear: LinearFactory) -> nn.Module:
        made = Net(recipe, width, linear)
        made.head.weight.requires_grad = False  # alone with its learning rate
        return made

    monkeypatch.setattr(plain, "model", model)
    recipe = recipe_of(plain, base_width=16)
    plan = plan_of_steps(recipe, parse_design("dense"), 32, 30)
    (found,) = points(plain, recipe, [1], plan).values()
    assert found[-1].loss < found[0].loss


def test_a_plugin_with_a_built_in_model_trains_as_the_built_in_task(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = replace(REGRESSION, pool=512, batch=32, depth=2, validation_samples=64)
    data = load_data(asked)

    class Same(Plain):
        recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
            "same": {
                name: getattr(asked, name)
                for name in ("depth", "lr", "beta2", "batch", "head_dim", "base_width", "min_width",
                             "max_width", "min_steps", "max_steps", "validation_samples")
            } | {"max_width": 64}
        }  # fmt: skip

        def model(self, recipe: Recipe, width: int, linear: LinearFactory) -> nn.Module:
            return FAMILIES["mlp"](asked, width, linear)

        def example(self, recipe: Recipe, count: int) -> Tensor:
            return torch.zeros(count, asked.features)

    task = Same()
    own = recipe_of(task)
    monkeypatch.setattr(code, "_by_name", lambda source: {"plain": task})
    design = parse_design("btt:rho=1/4")
    plans = [plan_of_steps(r, design, 32, 60) for r in (asked, own)]
    assert plans[0] == plans[1]
    curves = [
        [p.loss for p in train(plan, recipe, data.train, data.validation, 1)]
        for plan, recipe in zip(plans, (asked, own), strict=True)
    ]
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)


def changed(**members: Any) -> Plain:
    made: type[Plain] = type("Changed", (Plain,), members)
    return made()


def _no_layers(self: Plain, recipe: Recipe, width: int, linear: LinearFactory) -> nn.Module:
    return nn.Linear(6, width)


def _fewer(self: Plain, recipe: Recipe, width: int, linear: LinearFactory) -> nn.Module:
    return Net(replace(recipe, depth=1 if width < 64 else 2), width, linear)


def _unused(self: Plain, recipe: Recipe, width: int, linear: LinearFactory) -> nn.Module:
    model = Net(recipe, width, linear)
    model.other = linear(width, width)
    return model


def _fixed(self: Plain, recipe: Recipe, width: int, linear: LinearFactory) -> nn.Module:
    return Net(recipe, 32, linear)


def _mismatched(self: Plain, recipe: Recipe, width: int, linear: LinearFactory) -> nn.Module:
    return nn.Sequential(nn.Linear(6, width), linear(2 * width, width))


class _OverBatch(Net):
    def forward(self, x: Tensor) -> Tensor:
        return (x @ x.T) @ super().forward(x)


class _OverValues(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else x


class _Uncounted(Net):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.fft.fft(super().forward(x))
        return y.real


def _raises(self: Plain, recipe: Recipe, width: int, linear: LinearFactory) -> nn.Module:
    raise RuntimeError(f"no model of width {width}")


@pytest.mark.parametrize(
    ("methods", "said"),
    [
        ({"model": _no_layers}, "0 at width 16.*at least 1"),
        ({"model": _fewer}, "1 at width 16|2 at width"),
        ({"model": _unused}, "layer 2, 16→16, which no sample passes"),
        ({"model": _fixed}, "costs more the wider it is"),
        ({"model": _mismatched}, "last dimension is 16; accepted: 32"),
        ({"model": _raises}, "no model of width 64"),
        ({"model": lambda s, r, w, linear: _OverBatch(r, w, linear)}, "in proportion"),
        ({"model": lambda s, r, w, linear: _OverValues(r, w, linear)}, "shapes of its inputs"),
        ({"model": lambda s, r, w, linear: _Uncounted(r, w, linear)}, "aten._fft"),
        ({"model": lambda s, r, w, linear: "a model"}, "got str; accepted: a torch.nn.Module"),
        ({"load": lambda s, r, d: ({"inputs": 1}, {})}, "Error"),
        ({"recipes": {}}, "names of recipes"),
        ({"recipes": {"Not A Name!": SETTINGS}, "name": "Not A Task"}, "task"),
        ({"recipes": {"a": {**SETTINGS, "lr": "fast"}}}, "lr"),
        ({"recipes": {"a": {**SETTINGS, "unit": "mine"}}}, "unit"),
        ({"recipes": {"a": {**SETTINGS, "ranks": 2}}}, "ranks"),
        ({"recipes": {"a": {**SETTINGS, "max_width": 16}}}, "min_width, max_width"),
        ({"recipes": {"a": {"lr": 1.0}}}, "batch|required"),
    ],
)
def test_what_cannot_be_searched_says_why(methods: dict[str, Any], said: str) -> None:
    found = card(changed(**methods))
    assert found.refusal is not None
    assert re.search(said, found.refusal), found.refusal


def test_a_model_that_is_not_the_one_that_was_counted_is_refused(
    plain: Plain, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(plain)
    for deeper, said in ((2, "16→16 as layer 2"), (0, "a model of 0 layers")):
        monkeypatch.setattr(
            plain, "model", lambda r, w, lin, d=deeper: Net(_depth(r, d), w, lin), raising=False
        )
        with pytest.raises(ValueError, match=said):
            code.build_model(recipe, parse_design("dense"), 16)


def _depth(recipe: Recipe, depth: int) -> Any:
    class Other:
        pass

    other = Other()
    other.depth = depth  # type: ignore[attr-defined]
    return other


def test_sheets_are_known_by_what_they_say(plain: Plain) -> None:
    counted = sheets.as_values(counted_sheets(plain, recipe_of(plain)))
    digest = sheets.know_sheets(json.loads(json.dumps(counted)))
    assert digest == recipe_of(plain).counted != recipe_of(plain, 1).counted
    with pytest.raises(ValueError, match="from 16 to 96"):
        sheets.sheet_at("plain", digest, 112)
