"""Muon and SGD on the factors of structured layers: blocks, rates, steps, and going on."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nas.designs.design import parse_design
from nas.errors import InvalidInput
from nas.layers import layer_of
from nas.planning.recipe import Recipe, stored_recipe, with_overrides
from nas.planning.runs import plan_of_steps
from nas.tasks.batches import sample_losses
from nas.training.checkpoint import Checkpoint
from nas.training.engine import CPU, Engine, execution_plans
from nas.training.muon import BatchedMuon, WithMuon, factors_of, muon_rate
from nas.training.run import Point, train_replicates
from nas.training.sgd import sgd_rate
from nas.training.tasks import learning_rates
from tests.support.ranks import TINY as RANKED
from tests.support.tiers import only
from tests.unit.training.test_run import TINY, TRAIN, VALIDATION
from tests.unit.training.test_stacked import DESIGNS, batches

MUON = replace(TINY, optimizer="muon")
SGD = replace(TINY, optimizer="sgd", sgd_lr=0.1, parametrization="spectral")
#: Designs of one layer, whose blocks lie in different ways.
ALONE = [d for d in DESIGNS if "@" not in d and not d.startswith("ffn-moe")]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("design", ALONE)
def test_blocks_are_a_view_of_all_numbers(design: str) -> None:
    layer = layer_of(design, 48, 80)
    for name, factor in layer.factors().items():
        if name == "gate":
            continue
        numbers = torch.arange(6 * factor.numel()).view(2, 3, *factor.shape)
        blocks = layer.blocks(name, numbers)
        assert blocks.shape[:2] == (2, 3)
        assert blocks.untyped_storage().data_ptr() == numbers.untyped_storage().data_ptr()
        assert torch.equal(blocks.flatten().sort().values, numbers.flatten())
        one = layer.blocks(name, factor)
        assert one.dim() == 3
        assert blocks.shape[2:] == one.shape


@pytest.mark.parametrize(
    "design",
    ["dense", "monarch", "btt:rho=1/4", "low-rank:rho=1/2", "btt:cores=3,rho=1/8", "blast"],
)
def test_a_block_is_what_its_inputs_are_multiplied_by(design: str) -> None:
    """Where only the first factor's first block is not zero and the others pass everything on, the
    layer's matrix has that block's rank."""
    layer = layer_of(design, 64, 64, bias=False, dtype=torch.float64)
    first, *_ = layer.structure.factors
    f_in, f_out = layer.structure.fans(first)
    with torch.no_grad():
        blocks = layer.blocks(first, layer.factors()[first])
        assert blocks.shape[1:] == (f_out, f_in)
        blocks[1:] = 0.0
        u, v = torch.randn(f_out, 1).double(), torch.randn(1, f_in).double()
        blocks[0] = u @ v
    rows = layer.to_matrix()
    # every row of W is a multiple of v on the inputs that the block reads
    assert torch.linalg.matrix_rank(rows) <= 1


def test_a_batch_of_matrices_moves_as_each_by_torchs_own() -> None:
    torch.manual_seed(0)
    start = torch.randn(5, 12, 7)
    together = start.clone()
    apart = [m.clone() for m in start]
    ours = BatchedMuon([{"params": [together], "lr": 0.03}], weight_decay=0.1)
    # torch's own scales the rate of matrices that are higher than wide
    theirs = [
        torch.optim.Muon([m], lr=0.03 / math.sqrt(12 / 7), weight_decay=0.1 * math.sqrt(12 / 7))
        for m in apart
    ]
    for _ in range(4):
        gradients = torch.randn(5, 12, 7)
        together.grad = gradients
        ours.step()
        for matrix, optimizer, gradient in zip(apart, theirs, gradients, strict=True):
            matrix.grad = gradient
            optimizer.step()  # type: ignore[no-untyped-call]
    assert (together - start).abs().mean() > 0.01
    # orthogonalised in bfloat16, whose products of a batch are summed in another order
    assert (together - torch.stack(apart)).norm() < 0.05 * (together - start).norm()


def test_rates_follow_the_spectral_condition() -> None:
    rates = {}
    for d in (64, 1024):
        dense = layer_of("dense", d, d, d_in_base=64)
        rates[d] = muon_rate(dense, "A")
    assert rates[64] == pytest.approx(0.2 * 8)
    assert rates[1024] == rates[64]  # sqrt(f_out / f_in) stays
    up = layer_of("dense", 256, 1024, d_in_base=64)
    assert muon_rate(up, "A") == pytest.approx(2 * 0.2 * 8)
    layer = layer_of("btt:rho=1/4", 256, 256, d_in_base=64)
    for factor in ("A", "B"):
        f_in, f_out = layer.structure.fans(factor)
        assert muon_rate(layer, factor) == pytest.approx(0.2 * 8 * math.sqrt(f_out / f_in) / 2)


def _dense_steps(recipe: Any, plan: Any, seed: int, steps: int) -> dict[str, Tensor]:
    """Parameters after steps of torch's own optimisers on the modules themselves."""
    from nas.training.engine import _clipped
    from nas.training.tasks import build_model, learning_rates, task_of

    torch.manual_seed(seed)
    model: nn.Module = build_model(recipe, plan.design, plan.width)
    factors = factors_of(model)
    named = dict(model.named_parameters())
    groups = learning_rates(model, recipe, plan.width)
    rest = [
        {**g, "params": [p for p in g["params"] if all(p is not named[n] for n in factors)]}
        for g in groups
    ]
    adamw = torch.optim.AdamW(rest, betas=(recipe.beta1, recipe.beta2), weight_decay=0.0)
    muon = BatchedMuon(
        [
            {"params": [named[n].detach().view(1, *named[n].shape)],
             "lr": recipe.lr * muon_rate(layer, factor)}
            for n, (layer, factor) in factors.items()
        ]
    )  # fmt: skip
    rates = [*(g["lr"] for g in rest), *(recipe.lr * muon_rate(*f) for f in factors.values())]
    task, drawn = task_of(recipe), batches(recipe, 2)
    for step, (x, y) in enumerate(islice(drawn, steps), start=1):
        factor = recipe.learning_rate_factor(step, plan.steps)
        for group, rate in zip((*adamw.param_groups, *muon.param_groups), rates, strict=True):
            group["lr"] = rate * factor
        loss = task.loss(recipe, model(x[0]), y[0]).mean()
        found = torch.autograd.grad(loss, list(named.values()), materialize_grads=True)
        clipped = _clipped([g.reshape(1, -1) for g in found], recipe.clip)
        for p, g in zip(named.values(), clipped, strict=True):
            p.grad = g.view(p.shape)
        for group, name in zip(muon.param_groups, factors, strict=True):
            gradient = named[name].grad
            assert gradient is not None
            group["params"][0].grad = gradient.view(1, *gradient.shape)
        adamw.step()
        muon.step()
    return {name: p.detach().clone() for name, p in named.items()}


def test_the_engine_takes_the_steps_of_the_modules() -> None:
    recipe = replace(MUON, depth=2, normalize=False)
    plan = plan_of_steps(recipe, parse_design("dense"), 32, 20)
    engine = Engine(plan, recipe, (0, 1), CPU, execution_plans(plan, recipe, CPU))
    assert isinstance(engine.optimizer, WithMuon)
    before = {n: p.detach().clone() for n, p in engine.model_of(0).named_parameters()}
    for step, (x, y) in enumerate(islice(batches(recipe, 2), 3), start=1):
        engine.set_rate(recipe.learning_rate_factor(step, plan.steps))
        engine.step(x, y)
    expected = _dense_steps(recipe, plan, 0, 3)
    model = engine.model_of(0)
    factors = factors_of(model)
    assert factors
    after = {name: p.detach() for name, p in model.named_parameters()}
    # in the whole: gradients that are zero but for rounding, of a bias of keys, move too under Adam
    for own, most in ((after.keys() & factors, 0.1), (after.keys() - factors, 0.05)):
        moved = math.hypot(*(float((after[n] - before[n]).norm()) for n in own))
        apart = math.hypot(*(float((after[n] - expected[n]).norm()) for n in own))
        assert apart < most * moved


@pytest.mark.parametrize("design", ["dense", "monarch", "tensor-train:rho=1/4", "blast"])
@pytest.mark.parametrize("depth_rule", ["sqrt", "completep"])
def test_sgd_takes_the_steps_of_torch(design: str, depth_rule: str) -> None:
    recipe = with_overrides(SGD, {"depth": 6, "depth_rule": depth_rule, "normalize": False})
    plan = plan_of_steps(recipe, parse_design(design), 32, 20)
    engine = Engine(plan, recipe, (0,), CPU, execution_plans(plan, recipe, CPU), torch.float64)
    model = copy.deepcopy(engine.model_of(0))
    factors = factors_of(model)
    lr = 0.1 * (2 if depth_rule == "completep" else 1)
    rates = {model.get_parameter(name): lr * sgd_rate(*f) for name, f in factors.items()}
    sgd = torch.optim.SGD([{"params": [p], "lr": r} for p, r in rates.items()], momentum=0.9)
    others = [
        {**group, "params": [p for p in group["params"] if p not in rates]}
        for group in learning_rates(model, recipe, 32)
    ]
    adamw = torch.optim.AdamW(others, betas=(recipe.beta1, recipe.beta2), weight_decay=0.0)
    for x, y in islice(batches(recipe, 1), 3):
        engine.step(x, y)
        sgd.zero_grad()
        adamw.zero_grad()
        torch.autograd.backward(sample_losses(recipe, model(x[0]), y[0]).mean())
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        sgd.step()
        adamw.step()
    after = dict(engine.model_of(0).named_parameters())
    for name, p in model.named_parameters():
        torch.testing.assert_close(after[name], p, rtol=1e-6, atol=1e-9)


def test_a_square_dense_layer_has_the_rate_of_sgd_and_a_factor_that_of_its_blocks_and_uses() -> (
    None
):
    for d in (16, 64):
        assert sgd_rate(layer_of("dense", d, d), "A") == 1
    assert sgd_rate(layer_of("dense", 64, 256), "A") == 4
    train = layer_of("tensor-train:rho=1/4", 256, 256)  # sizes 16, rank 4
    assert train.structure.fans("A") == (16, 64)
    assert sgd_rate(train, "A") == pytest.approx(1 * 16 * 64 / 16 / 2)
    assert sgd_rate(train, "B") == pytest.approx(1 * 16 * 16 / 64 / 2)
    assert sgd_rate(layer_of("monarch", 64, 64), "A") == pytest.approx(8 * 1 * 1 / 2)


@pytest.mark.parametrize(
    "design", only({"monarch", "btt:cores=3,rho=1/8", "lost:rank=1/2,channels=1/2"}, DESIGNS)
)
@pytest.mark.parametrize("recipe", [MUON, SGD], ids=lambda r: r.optimizer)
def test_every_design_learns_and_goes_on_from_a_checkpoint(
    recipe: Recipe, design: str, tmp_path: Path
) -> None:
    plan = plan_of_steps(recipe, parse_design(design), 32, 24)
    whole: dict[int, list[float]] = {0: [], 1: []}
    for news in train_replicates(plan, recipe, TRAIN, VALIDATION, (0, 1)):
        for seed, p in news.items():
            assert isinstance(p, Point)
            whole[seed].append(p.loss)
    assert all(losses[-1] < losses[0] for losses in whole.values())
    path = Checkpoint(tmp_path / "c.pt", "key")
    step = next(iter(train_replicates(plan, recipe, TRAIN, VALIDATION, (0, 1))))[0].step  # type: ignore[union-attr]
    for _ in train_replicates(plan, recipe, TRAIN, VALIDATION, (0, 1), checkpoint=path, until=step):
        pass
    torch.manual_seed(9)
    resumed: dict[int, list[float]] = {0: [], 1: []}
    for news in train_replicates(plan, recipe, TRAIN, VALIDATION, (0, 1), checkpoint=path):
        for seed, p in news.items():
            assert isinstance(p, Point)
            resumed[seed].append(p.loss)
    assert resumed == whole


def test_the_setting_is_stored_only_where_it_is_chosen() -> None:
    assert "optimizer" not in TINY.as_dict()
    assert MUON.as_dict()["optimizer"] == "muon"
    assert stored_recipe(MUON.as_dict()) == MUON
    assert stored_recipe(TINY.as_dict()) == TINY
    for name in ("parametrization", "depth_rule", "sgd_lr"):
        assert name not in MUON.as_dict()
    assert stored_recipe(SGD.as_dict()) == SGD
    with pytest.raises(InvalidInput, match=r"optimizer.*muon.*more than one rank"):
        with_overrides(RANKED, {"optimizer": "muon", "ranks": 2})
