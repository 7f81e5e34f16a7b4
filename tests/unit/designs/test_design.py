"""Designs: text, integers at every layer of a model, budgets, and models with aligned heads."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.utils.checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nas.designs.aligned import Aligned, aligned
from nas.designs.chain_structure import ChainStructure
from nas.designs.convolution import Convolution, ConvolutionStructure
from nas.designs.design import Design, inspect_design, parse_design, structure_of
from nas.designs.einsum import Sizes, Structure, with_heads
from nas.designs.mixture import Mixture, MixtureStructure
from nas.designs.structure import LinearStructure
from nas.designs.sum import SumStructure
from nas.designs.taxonomy import parse_theta
from nas.designs.theta import DENSE, Theta
from nas.errors import InvalidInput
from nas.layers import (
    EinsumLinear,
    MixtureLinear,
    auxiliary_loss,
    build_layer,
    layer_of,
    param_groups,
    replace_linears,
)
from nas.planning import cost, runs
from nas.planning.recipe import IMAGES_VIT, PIXELS, REGRESSION, TEXT, Recipe
from nas.training.tasks import build_model, learning_rates

DESIGNS = (
    "dense",
    "monarch",
    "btt:rho=1/4",
    "btt:rho=1/4@heads",
    "0.5,0.25,0.25,0,0.5,0.5,0",
    "btt:cores=3,rho=1/8",
    "btt:cores=3,rho=1/8@heads",
    "tensor-train:cores=3,rho=1/4",
    "btt-moe:experts=8,active=3,shared=1",
    "btt-moe:experts=4,active=2@heads",
    "low-rank-moe:rho=3/4,experts=4,active=1",
    "dense-moe:experts=4,active=2",
    "ffn-moe:experts=4,active=2",
    "ffn-moe:experts=8,active=4,shared=1,granularity=4",
    "convolution:kernel=1/2",
    "blast:blocks=1/4,rho=1/2",
    "blast:blocks=1/4,rho=1/2@heads",
    "block-sparse:pattern=butterfly,blocks=1/2,stride=1",
    "block-sparse:pattern=channels,channels=3/4",
    "pixelfly:rank=1/4,blocks=1/2",
    "lost:rank=1/2,channels=1/2",
    "lost:rank=1/2,channels=1/2@heads",
    "sum(monarch;btt:cores=3,rho=1/8)",
    "cola-mlp:rank=1/2,activation=silu",
    "activated(btt:rho=1/4;gelu)",
)
designs = pytest.mark.parametrize("text", DESIGNS)


def sizes_of(structure: LinearStructure) -> Sizes:
    """The axes of two factors; of a mixture, those of an expert."""
    two = structure.expert if isinstance(structure, MixtureStructure) else structure
    assert isinstance(two, Structure)
    return two.sizes


@designs
def test_the_text_of_a_design_is_read_back(text: str) -> None:
    design = parse_design(text)
    assert parse_design(design.text) == design
    assert parse_design(design.canonical().text) == design.canonical()
    assert parse_design(design.text).described
    assert isinstance(design.name, str)


def test_names_families_and_kinds() -> None:
    found = {text: (parse_design(text).family, parse_design(text).kind) for text in DESIGNS}
    assert found["dense"] == ("einsum", "dense")
    assert found["btt:rho=1/4@heads"] == ("einsum", "two factors")
    assert found["btt:cores=3,rho=1/8"] == ("einsum3", "three factors")
    assert found["btt-moe:experts=4,active=2@heads"] == ("btt-moe", "mixture of experts")
    assert found["ffn-moe:experts=4,active=2"] == ("ffn-moe", "mixture of experts")
    assert found["convolution:kernel=1/2"] == ("convolution", "convolution")
    assert found["blast:blocks=1/4,rho=1/2"] == ("blast", "blast")
    assert found["pixelfly:rank=1/4,blocks=1/2"] == ("pixelfly", "sum")
    assert found["lost:rank=1/2,channels=1/2"] == ("lost", "sum")
    assert found["sum(monarch;btt:cores=3,rho=1/8)"] == ("sum", "sum")
    assert found["cola-mlp:rank=1/2,activation=silu"] == ("cola-mlp", "activated")
    assert found["activated(btt:rho=1/4;gelu)"] == ("activated", "activated")
    assert parse_design("block-sparse").family == parse_design("block-sparse").kind
    assert parse_design("monarch@heads").name == "monarch@heads"
    assert len(parse_design("btt:cores=3").exponents) == 14
    assert parse_design("convolution").exponents == ()
    assert parse_design("monarch@heads").exponents == parse_theta("monarch").values


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nonsense", "nonsense"),
        ("monarch@tails", "monarch@tails"),
        ("dense@heads", "dense"),
        ("convolution@heads", "convolution"),
        ("sum(convolution;block-sparse)@heads", "sum(block-sparse"),
        ("block-sparse@heads", "block-sparse"),
        ("cola-mlp@heads", "cola-mlp"),
        ("activated(monarch;silu)@heads", "activated(monarch;silu)"),
        ("sum(cola-mlp;monarch)", "without an activation"),
        ("sum(monarch@heads;kronecker)", "nor aligned with heads"),
        ("sum(btt-moe;monarch)", "neither a mixture"),
        ("ffn-moe@heads", "ffn-moe"),
        ("btt-moe:experts=1", "at least 2"),
        ("btt-moe:experts=4,active=5", "active=5 of experts=4"),
        ("x" * 5000, "…"),
        ("", "monarch"),
    ],
)
def test_what_is_no_design_is_refused(text: str, words: str) -> None:
    with pytest.raises(InvalidInput, match="accepted") as caught:
        parse_design(text)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 2000


def test_two_factors_are_a_theta() -> None:
    assert parse_design("1/2,0,1/2,0,1/2,1/2,1/4") == parse_theta("btt:rho=1/4")
    assert parse_design("btt:cores=2,rho=1/4") == parse_theta("btt:rho=1/4")


@designs
@pytest.mark.parametrize("recipe", [TEXT, REGRESSION, IMAGES_VIT, PIXELS], ids=lambda r: r.name)
def test_a_model_has_the_parameters_and_flops_that_are_charged(text: str, recipe: Recipe) -> None:
    """Parameters are counted by torch, forward FLOPs by torch's own counter."""
    width = 64
    recipe = replace(recipe, batch=2)
    if text.endswith("@heads") and not recipe.attends:
        text = text.removesuffix("@heads")
    design = runs.fit(recipe, parse_design(text), width)
    plan = runs.plan_of_steps(recipe, design, width, 10)
    torch.manual_seed(0)
    model = build_model(recipe, design, width)
    # routing that computes exactly what is charged: one expert after another
    for layer in model.modules():
        if isinstance(layer, MixtureLinear):
            layer.plan = "grouping=experts"
    assert sum(p.numel() for p in model.parameters()) == plan.params
    if recipe.is_token_model:
        x = torch.zeros(recipe.batch, recipe.tokens, dtype=torch.long)
    elif recipe.attends:
        x = torch.randn(recipe.batch, recipe.tokens, recipe.features)
    else:
        x = torch.randn(recipe.batch, recipe.features)
    # the fused attention of CPUs is unknown to the counter
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    structures = cost.structures_of(recipe, design, width)
    parts = [p for s in structures for p in (s.parts if isinstance(s, SumStructure) else (s,))]
    materialised = [s for s in parts if isinstance(s, Structure) and not s.is_dense]
    counted = counter.get_total_flops()
    charged = cost.forward_flops_per_sample(recipe, design, width) * recipe.batch
    if materialised or design.family.startswith("einsum3"):
        return  # plans of narrow layers may compute otherwise; their own tests count them
    assert counted == charged


@designs
@pytest.mark.parametrize("budget", [2e9, 5e10])
def test_every_width_that_a_budget_admits_fits_it_within_a_step(text: str, budget: float) -> None:
    design = parse_design(text)
    least = runs.least_budget(TEXT, design)
    plans = runs.plans(TEXT, design, max(budget, least))
    assert plans
    for plan in plans:
        assert plan.train_flops <= max(budget, least) < plan.train_flops + plan.train_flops_per_step
        assert plan.steps >= TEXT.min_steps
        again = runs.RunPlan.from_dict(plan.as_dict())
        assert again == plan


@settings(max_examples=60, deadline=None)
@given(
    alpha=st.floats(0, 1), epsilon=st.floats(0, 1), rho=st.floats(0, 1),
    experts=st.sampled_from([2, 3, 8]), heads=st.booleans(),
    width=st.sampled_from([16, 48, 64, 256]),
)  # fmt: skip
def test_fitted_mixtures_share_their_ranks_evenly(
    alpha: float, epsilon: float, rho: float, experts: int, heads: bool, width: int
) -> None:
    theta = Theta(alpha, 0, 1 - alpha, 0, epsilon, 1 - epsilon, rho)
    design: Design = Mixture(theta, experts, 1)
    if heads and not theta.is_dense:
        design = aligned(design)
    fitted = runs.fit(TEXT, design, width)
    for s in cost.structures_of(TEXT, fitted, width):
        assert isinstance(s, MixtureStructure)
        assert s.expert.macs <= s.d_in * s.d_out
    assert runs.fit(TEXT, fitted, width) == fitted


@pytest.mark.parametrize("text", ["monarch@heads", "btt:rho=1/4@heads", "btt-moe:experts=4@heads"])
@pytest.mark.parametrize("width", [32, 48, 64])
def test_a_block_of_weights_makes_one_head_alone(text: str, width: int) -> None:
    """Perturbing the weights of block φ = h of a query projection changes head h and no other,
    and the mirror: block γ = h of the output projection reads head h alone."""
    design = runs.fit(TEXT, parse_design(text), width)
    assert isinstance(design, Aligned)
    torch.manual_seed(0)
    model = build_model(TEXT, design, width)
    heads = width // TEXT.head_dim

    def projection(name: str) -> EinsumLinear | MixtureLinear:
        found = model.get_submodule(f"blocks.0.linears.{name}")
        assert isinstance(found, EinsumLinear | MixtureLinear)
        return found

    x = torch.randn(5, width)
    for name in ("query", "key", "value"):
        layer = projection(name)
        phi_of_a = layer.A.dim() - 3  # (…, φ, δ, α)
        phi_of_b = layer.B.dim() - 5  # (φ, γ, ρ, β, ε)
        assert layer.A.shape[phi_of_a] == layer.B.shape[phi_of_b] == heads
        before = layer(x).view(5, heads, TEXT.head_dim)
        for h in range(heads):
            with torch.no_grad():
                a, b = layer.A.clone(), layer.B.clone()
                # a change of sign alone leaves the RMS, which normalisation caps, as it was
                layer.A.select(phi_of_a, h).neg_()
                layer.B.select(phi_of_b, h)[..., ::2].neg_()
                changed = (layer(x).view(5, heads, TEXT.head_dim) - before).abs().amax((0, 2))
                layer.A.copy_(a)
                layer.B.copy_(b)
            assert changed[h] > 0
            assert changed.sum() == changed[h]
    out = projection("attention_out")
    gamma_of_a, gamma_of_b = out.A.dim() - 5, out.B.dim() - 4
    with torch.no_grad():
        for factor in (out.A, out.B):
            factor.normal_()
        for h in range(heads):
            saved = out.A.clone()
            out.A.select(gamma_of_a, h).zero_()
            inputs = torch.randn(5, heads, TEXT.head_dim)
            muted = inputs.clone()
            muted[:, h] = 0
            if "moe" not in text:  # a router reads every head
                assert torch.allclose(out(inputs.flatten(1)), out(muted.flatten(1)), atol=1e-5)
            out.A.copy_(saved)
    assert out.B.shape[gamma_of_b] == heads


def test_without_alignment_a_block_is_spread_over_heads() -> None:
    """The opposite, so that the test above can fail: Monarch's own blocks are no heads."""
    structures = cost.structures_of(TEXT, parse_design("monarch"), 64)
    sizes = sizes_of(structures[0])
    assert (sizes.phi, sizes.epsilon * sizes.delta) != (64 // TEXT.head_dim, TEXT.head_dim)


def test_heads_have_to_divide_the_dimension() -> None:
    with pytest.raises(InvalidInput, match=r"heads: got 7.*divisor of the dimension, 64"):
        with_heads(Structure.of(parse_theta("monarch"), 64, 64), 7, "out")


def test_experts_that_are_feed_forward_blocks_leave_attention_dense() -> None:
    design = parse_design("ffn-moe:experts=4,active=2")
    *attention, first, second = cost.structures_of(TEXT, design, 32)
    assert all(s.is_dense for s in attention)
    assert (first.d_in, first.d_out, second.d_out) == (32, 128, 32)
    assert first.macs - second.macs == 32 * 4  # one gate routes both
    fine = parse_design("ffn-moe:experts=8,active=4,shared=1,granularity=2")
    *_, narrow, _ = cost.structures_of(TEXT, fine, 32)
    assert (narrow.d_in, narrow.d_out, narrow.macs) == (32, 64, 4 * 32 * 64 + 32 * 7)
    with pytest.raises(InvalidInput):
        structure_of(design, 32, 32)


@designs
def test_every_parameter_of_a_model_has_one_learning_rate(text: str) -> None:
    design = runs.fit(TEXT, parse_design(text), 32)
    model = build_model(TEXT, design, 32)
    groups = learning_rates(model, TEXT, 32)
    members = [p for group in groups for p in group["params"]]
    assert len(members) == len(set(members)) == len(list(model.parameters()))
    assert all(math.isfinite(group["lr"]) and group["lr"] > 0 for group in groups)


def test_a_gate_learns_as_a_dense_layer() -> None:
    layer = layer_of(parse_design("btt-moe:experts=4"), 64, 64, d_in_base=32)
    groups = param_groups(nn.Sequential(layer), 1.0)
    rate = next(g["lr"] for g in groups if any(p is layer.gate for p in g["params"]))
    assert rate == 32 / 64


@pytest.mark.parametrize("text", [t for t in DESIGNS if "@" not in t and "ffn" not in t])
def test_uses_are_what_a_factor_multiplies_over_its_numbers(text: str) -> None:
    structure = structure_of(parse_design(text), 256, 1024)
    layer = build_layer(structure, device="meta")
    numbers = {name: factor.numel() for name, factor in layer.factors().items()}
    for name in structure.factors:
        std, rate = structure.spectral_gains(name)
        assert (std >= 1, rate >= 1) == (True, True)
        if structure.uses(name) == 1:
            assert (std, rate) == (1, 1)
    charged: int | None = None
    if isinstance(structure, Structure) and not structure.is_dense:
        s = structure.sizes
        charged = s.beta * s.gamma * s.delta * s.phi * s.rho * (s.alpha + s.epsilon)
    elif isinstance(structure, ChainStructure):
        charged = structure.chain_macs
    elif isinstance(structure, ConvolutionStructure):
        charged = structure.macs
    if charged is not None:
        assert sum(structure.uses(name) * numbers[name] for name in structure.factors) == charged


def test_a_layer_is_drawn_anew_by_another_rule_and_keeps_it() -> None:
    layer = layer_of("tensor-train:rho=1/4", 256, 256, d_in_base=64, normalize=True)
    published = {n: layer.adam_lr_multiplier(n, 64) for n in ("A", "B")}
    assert published == {"A": 64 / 32, "B": 64 / 128}
    layer.reparametrize("spectral")
    # A: 16 → 64, B: 64 → 16, each with 16 vectors of a token
    assert layer.adam_lr_multiplier("A", 64) == pytest.approx(4 * published["A"])
    assert layer.adam_lr_multiplier("B", 64) == pytest.approx(4 * published["B"])
    stds = {n: float(p.detach().std()) for n, p in layer.factors().items()}
    assert stds == pytest.approx({"A": 1 / 4, "B": 1 / 8}, rel=0.2)
    rates = {p: g["lr"] for g in param_groups(layer, 1.0) for p in g["params"]}
    assert rates[layer.factors()["A"]] == pytest.approx(4 * published["A"])
    again = build_layer(layer.structure, **layer.record.options)
    assert again.parametrization == "spectral"
    again.load_state_dict(layer.state_dict())
    other = layer_of("tensor-train:rho=1/4", 256, 256, d_in_base=64, normalize=True)
    with pytest.raises(RuntimeError, match="spectral"):
        other.load_state_dict(layer.state_dict())  # whose weights are capped elsewhere
    with pytest.raises(InvalidInput, match=r"parametrization: got mup; accepted: published"):
        layer.reparametrize("mup")  # type: ignore[arg-type]


@pytest.mark.parametrize("text", [t for t in DESIGNS if "@" not in t and "ffn" not in t])
def test_linear_layers_of_any_model_take_any_design_of_a_single_layer(text: str) -> None:
    model = nn.Sequential(nn.Linear(24, 36), nn.GELU(), nn.Linear(36, 10))
    surgery = replace_linears(model, text)
    assert len(surgery.replaced) == 2
    assert surgery.flops_after == sum(
        2 * structure_of(parse_design(text), *d).macs for d in ((24, 36), (36, 10))
    )
    y = model(torch.randn(3, 24))
    assert y.shape == (3, 10)
    loss = y.square().mean()
    routing = auxiliary_loss(model)
    (loss if routing is None else loss + routing).backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert parse_design(text).described in str(surgery)


@pytest.mark.parametrize(
    ("text", "words"), [("monarch@heads", "which layers make heads"), ("ffn-moe", "feed-forward")]
)
def test_designs_of_whole_blocks_are_refused_for_single_layers(text: str, words: str) -> None:
    model = nn.Sequential(nn.Linear(24, 36))
    with pytest.raises(InvalidInput, match=words):
        replace_linears(model, text)
    assert type(model[0]) is nn.Linear


@designs
def test_everything_exact_about_a_design_is_told(text: str) -> None:
    design = parse_design(text)
    found = inspect_design(design, 64, 256)
    for key in ("name", "macs", "flops", "params", "dense_macs", "fingerprint"):
        assert key in found
    assert isinstance(found["macs"], int)
    assert found["flops"] == 2 * found["macs"]
    if not isinstance(design, Theta | Aligned):
        with pytest.raises(InvalidInput, match="sizing"):
            inspect_design(design, 64, 256, "paper")


def test_a_layer_of_given_integers_has_them() -> None:
    structure = Structure.of(parse_theta("monarch"), 64, 64).with_output_blocks(4)
    layer = build_layer(structure, bias=False)
    assert layer.structure == structure
    assert sum(p.numel() for p in layer.parameters()) == structure.params
    assert structure.with_output_blocks(4) == structure
    assert Structure.of(DENSE, 64, 64).with_input_blocks(4).is_dense
    assert Convolution(0.5).text == "convolution:kernel=0.5"


@pytest.mark.parametrize("width", [64, 96, 256, 1024])
def test_a_mixture_that_fits_is_left_as_it_is(width: int) -> None:
    """So that runs of one design at several widths are told to be of one structure."""
    for text in ("low-rank-moe:rho=3/4,experts=8,active=2", "btt-moe:rho=1/2,experts=4@heads"):
        design = parse_design(text)
        assert runs.fit(TEXT, design, width) == design


@pytest.mark.parametrize("text", ["btt-moe:experts=4@heads", "monarch@heads"])
def test_projections_of_an_aligned_design_can_be_built_alone(text: str) -> None:
    made = layer_of(text, 64, 64, heads=4)
    read = layer_of(text, 64, 64, heads=4, side="in")
    blocks = [sizes_of(s.structure) for s in (made, read)]
    assert (blocks[0].phi, blocks[1].gamma) == (4, 4)
    for heads, side, words in ((5, "out", "divisor"), (4, "up", "in | out")):
        with pytest.raises(InvalidInput, match="accepted") as caught:
            layer_of(text, 64, 64, heads=heads, side=side)
        assert words in str(caught.value)
    with pytest.raises(InvalidInput, match="no @heads"):
        layer_of("monarch", 64, 64, heads=4)


def test_an_aligned_design_is_canonical() -> None:
    theta = Theta(0, 0.25, 0.75, 0.5, 0.25, 0.25, 0)
    design = Aligned(theta)
    assert parse_design(design.text) == design == Aligned(theta.swapped())


def test_a_wide_bond_is_not_built_to_be_measured() -> None:
    """Its factors would fill the memory."""
    text = "btt:cores=3,inputs=.15+0+.85,outputs=.85+0+.15,rho=1"
    found = inspect_design(parse_design(text), 512, 2048)
    assert found["rank_is"] == "upper bound"
    assert inspect_design(parse_design("btt:cores=3,rho=1/8"), 512, 512)["rank_is"] == "numeric"


@pytest.mark.parametrize("text", ["btt-moe:experts=4,active=2", "dense-moe:experts=4,active=1"])
def test_gradients_of_single_samples(text: str) -> None:
    layer = layer_of(parse_design(text), 12, 10)
    torch.nn.init.normal_(layer.get_parameter("gate"))
    params: dict[str, torch.Tensor] = dict(layer.named_parameters())

    def loss(params: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        total: torch.Tensor = torch.func.functional_call(layer, params, (x[None],)).square().sum()
        return total

    x = torch.randn(5, 12)
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(params, x)
    whole = torch.func.grad(lambda p: sum(loss(p, row) for row in x))(params)
    for name, gradient in whole.items():
        torch.testing.assert_close(each[name].sum(0), gradient, rtol=1e-4, atol=1e-5)


def test_an_auxiliary_loss_without_a_graph_is_not_given_out() -> None:
    layer = layer_of(parse_design("btt-moe:experts=4"), 16, 16)
    x = torch.randn(3, 16, requires_grad=True)
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        auxiliary_loss(layer)
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    routing = auxiliary_loss(layer)
    assert routing is not None
    assert routing.requires_grad
    layer.eval()
    layer(x)
    assert auxiliary_loss(layer) is None
