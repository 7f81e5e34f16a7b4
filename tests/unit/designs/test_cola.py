"""Two factors with an activation between them, against the formula and against torch's layers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.flop_counter import FlopCounterMode

from nas.designs.aligned import Aligned
from nas.designs.cola import ACTIVATIONS, Activated, ActivatedStructure, parse_cola
from nas.designs.design import inspect_design, parse_design, structure_of
from nas.designs.einsum import Structure
from nas.designs.sum import Sum, SumStructure
from nas.designs.taxonomy import parse_theta
from nas.designs.theta import DENSE, Theta
from nas.errors import InvalidInput
from nas.layers import (
    ActivatedLinear,
    EinsumLinear,
    MixtureLinear,
    SelfGuided,
    build_layer,
    layer_of,
    param_groups,
    replace_linears,
)
from nas.layers.building import matrix_pays
from nas.planning.recipe import TEXT
from nas.planning.runs import fit
from tests.support.strategies import thetas
from tests.support.tiers import only

dimensions = st.integers(1, 40)
two = thetas().filter(lambda theta: not theta.is_dense)
designs = st.builds(Activated, two, st.sampled_from(ACTIVATIONS))
#: With every axis, and the same with the factors exchanged, which is dearer.
WHOLE = "activated(1/2,1/4,1/4,1/4,1/2,1/4,1/4;gelu)"
SWAPPED = "activated(1/4,1/2,1/4,1/2,1/4,1/4,1/4;gelu)"
TEXTS = [
    "cola-mlp:rank=1/2,activation=silu",
    "activated(monarch;relu)",
    "activated(kronecker;silu)",
    WHOLE,
    SWAPPED,
]
SHAPES = [(12, 20), (13, 7)]

NUMPY: dict[str, Callable[[Any], Any]] = {
    "silu": lambda z: z / (1 + np.exp(-z)),
    "gelu": lambda z: z * (1 + np.vectorize(math.erf, otypes=[float])(z / math.sqrt(2))) / 2,
    "relu": lambda z: np.maximum(z, 0),
}


def by_definition(layer: ActivatedLinear, x: Tensor) -> Tensor:
    """z[β,γ,δ,φ,ρ] = Σ_α A x, y[δ,ε,φ] = Σ_{β,γ,ρ} B act(z), in numpy, from the formula alone."""
    s, structure = layer.structure.sizes, layer.structure
    a = layer.A.detach().numpy().transpose(4, 0, 3, 2, 1)  # (γ,ρ,φ,δ,α) → (α,γ,δ,φ,ρ)
    b = layer.B.detach().numpy().transpose(3, 1, 4, 0, 2)  # (φ,γ,ρ,β,ε) → (β,γ,ε,φ,ρ)
    padded = np.zeros((len(x), s.alpha * s.beta * s.gamma))
    padded[:, : structure.d_in] = x.detach().numpy()
    # flattened input is (γ, β, α) with α innermost, flattened output (φ, ε, δ) with δ innermost
    cube = padded.reshape(-1, s.gamma, s.beta, s.alpha)
    z = np.einsum("agdfr,ngba->nbgdfr", a, cube)
    assert z.size == len(x) * structure.intermediate
    y = np.einsum("bgefr,nbgdfr->nfed", b, NUMPY[structure.design.activation](z))
    y = y.reshape(len(x), s.delta * s.epsilon * s.phi)
    return torch.from_numpy(y[:, : structure.d_out])


def layer_in_float64(text: str | Activated, d_in: int, d_out: int, **options: Any) -> Any:
    return ActivatedLinear(text, d_in, d_out, dtype=torch.float64, **options)


def test_low_rank_is_a_linear_layer_the_activation_and_another() -> None:
    """arXiv:2502.10940, section 3.2: h = B σ(A x)."""
    layer = layer_in_float64("cola-mlp:rank=1/2", 25, 36)
    down = nn.Linear(25, 5, bias=False, dtype=torch.float64)
    up = nn.Linear(5, 36, dtype=torch.float64)
    with torch.no_grad():
        down.weight.copy_(layer.A.view(5, 25))
        up.weight.copy_(layer.B.view(5, 36).T)
        layer.bias.normal_()
        up.bias.copy_(layer.bias)
    x = torch.randn(3, 4, 25, dtype=torch.float64)
    expected = nn.Sequential(down, nn.SiLU(), up)(x)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    assert layer.structure.params == 5 * (25 + 36) == layer.structure.macs


@settings(max_examples=60, deadline=None)
@example(parse_cola(SWAPPED), 1, 1, 2)
@given(designs, dimensions, dimensions, st.integers(0, 4))
def test_forward_is_the_formula(design: Activated, d_in: int, d_out: int, n: int) -> None:
    torch.manual_seed(0)
    layer = layer_in_float64(design, d_in, d_out, bias=False)
    x = torch.randn(n, d_in, dtype=torch.float64)
    expected = by_definition(layer, x)
    y = layer(x)
    assert y.shape == (n, d_out)
    assert y.is_contiguous()
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    plain = layer.plain(x, layer.effective_factors())
    torch.testing.assert_close(plain, expected, rtol=1e-9, atol=1e-9)
    s = layer.structure
    assert s.params == sum(p.numel() for p in layer.parameters())
    assert not s.is_dense
    assert not s.is_linear
    assert s.is_degenerate == (s.macs > d_in * d_out)
    assert [math.prod(f) for f in (s.fans("A"), s.fans("B"))] == [
        t.shape[-1] * t.shape[-2] for t in (layer.blocks("A", layer.A), layer.blocks("B", layer.B))
    ]


def test_the_formula_helper_notices_a_wrong_layer() -> None:
    layer = layer_in_float64(WHOLE, 24, 36, bias=False)
    x = torch.randn(3, 24, dtype=torch.float64)
    before = by_definition(layer, x)
    with torch.no_grad():
        layer.A.copy_(layer.A.flip(4))
    assert not torch.allclose(layer(x), before)


@settings(max_examples=60, deadline=None)
@given(designs, dimensions, dimensions)
def test_without_an_activation_it_is_the_einsum(design: Activated, d_in: int, d_out: int) -> None:
    """So that the factors are those of two factors: relu of what is positive is the identity."""
    torch.manual_seed(0)
    layer = layer_in_float64(Activated(design.theta, "relu"), d_in, d_out, bias=False)
    with torch.no_grad():
        for factor in layer.factors().values():
            factor.abs_()
    structure = Structure(design.theta, d_in, d_out, layer.structure.sizes, "paper")
    linear = EinsumLinear(structure, d_in, d_out, bias=False, dtype=torch.float64)
    linear.load_state_dict({"A": layer.A, "B": layer.B}, strict=False)
    x = torch.rand(3, d_in, dtype=torch.float64)
    torch.testing.assert_close(layer(x), linear(x))
    s = layer.structure
    assert (s.macs, s.params) == (structure.macs_a_first, structure.params)
    assert s.waste == pytest.approx(structure.waste)
    for factor in s.factors:
        assert s.fans(factor) == structure.fans(factor)
        assert s.init_std(factor) == structure.init_std(factor)
        assert s.adam_lr_multiplier(factor, 7) == structure.adam_lr_multiplier(factor, 7)


@settings(max_examples=60, deadline=None)
@given(designs, dimensions, dimensions)
def test_texts_read_back_and_factors_are_not_exchanged(
    design: Activated, d_in: int, d_out: int
) -> None:
    assert parse_design(design.text) == design == design.canonical()
    assert len(design.name) <= len(design.described) <= 96
    assert design.kind == "activated"
    assert design.exponents == ()
    other = Activated(design.theta.swapped(), design.activation)
    if other != design:
        assert other.text != design.text
        assert other.described != design.described or "." in other.described
    one, two = (structure_of(d, d_in, d_out) for d in (design, other))
    assert isinstance(one, ActivatedStructure)
    assert isinstance(two, ActivatedStructure)
    assert (one.fingerprint == two.fingerprint) == (one.sizes == two.sizes)
    assert one.macs == one.sizes.macs_a_first
    assert one.fingerprint.split(":")[1] == design.activation


def test_exchanged_factors_are_another_function() -> None:
    """They are the same operators where the activation does nothing, and only there."""
    one, two = (
        layer_in_float64(text.replace("gelu", "relu"), 256, 256, bias=False)
        for text in (WHOLE, SWAPPED)
    )
    s = one.structure.sizes
    assert s.swapped() == two.structure.sizes
    assert two.structure.macs == s.macs_b_first > one.structure.macs
    x = torch.rand(3, 256, dtype=torch.float64)
    turned = x.view(3, s.gamma, s.beta, s.alpha).transpose(2, 3).flatten(1)
    same = []
    for sign in (1, -1):
        with torch.no_grad():
            for factor in one.factors().values():
                factor.abs_()[..., ::2] *= sign
            two.A.copy_(one.B.permute(1, 2, 0, 4, 3))
            two.B.copy_(one.A.permute(2, 0, 1, 4, 3))
        y = two(turned).view(3, s.phi, s.delta, s.epsilon).transpose(2, 3).flatten(1)
        same.append(torch.allclose(one(x), y))
    assert same == [True, False]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("cola-mlp", "cola-mlp:rank=1/2,activation=silu"),
        ("cola-mlp:activation=relu,rank=1/3", "cola-mlp:rank=1/3,activation=relu"),
        ("activated(low-rank:rho=1/4;gelu)", "cola-mlp:rank=1/4,activation=gelu"),
        ("activated(monarch; silu)", "activated(monarch;silu)"),
        (
            "activated(block-dense;silu)",
            "activated(block-dense:blocks=1/4,rho=1/2;silu)",
        ),
        # names of θ are those of its canonical form, which this is not
        (SWAPPED, "activated(einsum;gelu)"),
        ("activated(0,1/2,1/2,1/2,0,1/2,0;relu)", "activated(einsum;relu)"),
    ],
)
def test_names(text: str, name: str) -> None:
    assert parse_design(text).name == name
    assert parse_cola(text) == parse_design(text)
    assert parse_design(text).family == name.partition(":")[0].partition("(")[0]


def test_a_worked_example() -> None:
    s = ActivatedStructure.of(parse_cola(WHOLE), 256, 1296)
    n = s.sizes
    assert (n.alpha, n.beta, n.gamma, n.delta, n.epsilon, n.phi, n.rho) == (16, 4, 4, 6, 36, 6, 4)
    assert s.intermediate == 4 * 4 * 6 * 6 * 4
    assert s.macs == s.intermediate * (16 + 36)
    assert s.params == 4 * 6 * 4 * (16 * 6 + 4 * 36)
    assert [s.fans(f) for f in s.factors] == [(16, 6 * 6 * 4), (4 * 4 * 4, 36)]
    assert [s.init_std(f) for f in s.factors] == pytest.approx([4 / 16, 6 / 64])
    assert [s.adam_lr_multiplier(f, 64) for f in s.factors] == pytest.approx([2, 0.5])
    assert s.fingerprint == "256x1296:gelu:16.4.4.6.36.6.4"
    assert s.waste == 0
    with pytest.raises(InvalidInput, match=r"factor: got C; accepted: A \| B"):
        s.fans("C")


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [1, 50])
def test_flops_that_are_run_are_those_of_the_structure(
    text: str, shape: tuple[int, int], tokens: int
) -> None:
    layer = ActivatedLinear(text, *shape)
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(tokens, shape[0]))
    assert counter.get_total_flops() == layer.structure.flops * tokens


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (2, 3)])
def test_no_factor_is_absorbed_at_small_dimensions(shape: tuple[int, int]) -> None:
    """Where one has no axes of its own: the activation is still there, and so is its cost."""
    for text in TEXTS:
        layer = layer_in_float64(text, *shape)
        assert type(layer_of(text, *shape)) is ActivatedLinear
        x = torch.randn(5, shape[0], dtype=torch.float64)
        torch.testing.assert_close(layer(x), by_definition(layer, x), rtol=1e-9, atol=1e-9)
        with FlopCounterMode(display=False) as counter:
            layer(x)
        assert counter.get_total_flops() == layer.structure.flops * 5


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("text", only({TEXTS[0], TEXTS[1], WHOLE}, TEXTS))
@pytest.mark.parametrize("shape", [(8, 6), (5, 9)])
def test_gradients_against_finite_differences(
    text: str, shape: tuple[int, int], normalize: bool
) -> None:
    torch.manual_seed(0)
    layer = layer_in_float64(text, *shape, normalize=normalize, gain=True)
    with torch.no_grad():
        for factor in layer.factors().values():
            factor.mul_(1.5)  # past the cap, so that normalisation has a gradient
    x = torch.randn(2, 2, shape[0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *layer.parameters()))
    if layer.structure.design.activation != "relu":
        assert torch.autograd.gradgradcheck(layer, (x[:1, :1],))


@pytest.mark.parametrize("text", TEXTS)
def test_function_transforms(text: str) -> None:
    layer = layer_in_float64(text, 9, 12)
    parameters: dict[str, Tensor] = dict(layer.named_parameters())
    x = torch.randn(5, 9, dtype=torch.float64)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        total: Tensor = functional_call(layer, parameters, (x,)).square().sum()
        return total

    each = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(5):
        for name, found in grad(loss)(parameters, x[i]).items():
            torch.testing.assert_close(each[name][i], found)


@pytest.mark.parametrize("text", only({WHOLE}, TEXTS))
def test_compiles_as_one_graph_for_any_number_of_tokens(text: str) -> None:
    torch._dynamo.reset()
    layer = ActivatedLinear(text, 37, 50, normalize=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (7, 300):
        x = torch.randn(tokens, 37)
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("text", TEXTS)
def test_autocast_computes_in_bfloat16_and_trains(text: str) -> None:
    layer = ActivatedLinear(text, 32, 48)
    x = torch.randn(5, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert {p.grad.dtype for p in layer.parameters() if p.grad is not None} == {torch.float32}
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("text", TEXTS)
def test_zero_init_is_the_zero_map_that_can_learn(text: str, normalize: bool) -> None:
    layer = ActivatedLinear(text, 24, 30, zero_init=True, normalize=normalize, gain=normalize)
    x = torch.randn(4, 24)
    assert torch.count_nonzero(layer(x)) == 0
    layer(x).sum().backward()
    assert torch.count_nonzero(layer.A) == layer.A.numel()
    assert torch.count_nonzero(layer.B) == 0
    assert layer.B.grad is not None
    assert layer.B.grad.abs().max() > 0


@pytest.mark.parametrize("text", TEXTS)
def test_no_tokens_give_an_empty_output_and_zero_gradients(text: str) -> None:
    layer = ActivatedLinear(text, 24, 30, normalize=True, gain=True)
    for shape in ((0, 24), (3, 0, 24)):
        y = layer(torch.zeros(shape, requires_grad=True))
        assert y.shape == (*shape[:-1], 30)
        y.sum().backward()
    for parameter in layer.parameters():
        assert parameter.grad is not None
        assert torch.count_nonzero(parameter.grad) == 0


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("text", ["low-rank:rho=1/4", "low-rank:rho=3/4", "btt:rho=1/4"])
@pytest.mark.parametrize("width", only({64}, [64, 1024]))
def test_the_activation_takes_a_constant_of_the_rms_at_every_width(
    activation: str, text: str, width: int
) -> None:
    torch.manual_seed(0)
    layer = ActivatedLinear(f"activated({text};{activation})", width, width, bias=False)
    linear = EinsumLinear(text, width, width, bias=False)
    assert layer.structure.sizes == linear.structure.sizes
    linear.load_state_dict({"A": layer.A, "B": layer.B}, strict=False)
    x = torch.randn(512, width)
    share = (layer(x).square().mean() / linear(x).square().mean()).sqrt().item()
    assert 0.45 < share < 0.8


def test_learning_rates_of_a_model() -> None:
    layer = ActivatedLinear("cola-mlp", 256, 1024, d_in_base=64)
    rates = {id(p): g["lr"] for g in param_groups(layer, 0.1) for p in g["params"]}
    found = {name: rates[id(p)] for name, p in layer.named_parameters()}
    assert found == pytest.approx({"A": 0.1 * 64 / 512, "B": 0.1 * 64 / 32, "bias": 0.1})


@settings(max_examples=60, deadline=None)
@given(designs, st.sampled_from([16, 48, 80]))
def test_a_fitted_design_costs_at_most_dense(design: Activated, width: int) -> None:
    fitted = fit(TEXT, design, width)
    structures = [structure_of(fitted, *shape) for shape in ((width, width), (width, 4 * width))]
    assert not any(s.is_degenerate for s in structures)
    assert fit(TEXT, fitted, width) == fitted
    assert fitted == DENSE or getattr(fitted, "activation", None) == design.activation


def test_a_dear_design_is_fitted_by_its_rank_and_its_own_axes() -> None:
    dear = parse_design("cola-mlp:rank=1,activation=gelu")
    fitted = fit(TEXT, dear, 64)
    assert fitted.name == "cola-mlp:rank=5/6,activation=gelu"  # 32 of 64
    narrow = fit(TEXT, Activated(Theta(0.05, 0, 0.95, 0, 0.05, 0.95, 0)), 64)
    assert isinstance(narrow, Activated)
    assert min(narrow.theta.alpha, narrow.theta.epsilon) > 0.1  # axes of 2 at least
    # as much as dense at rank 1, where α and ε have to be raised, for A stays first
    turned = fit(TEXT, Activated(parse_theta("low-rank").swapped()), 64)
    assert isinstance(turned, Activated)
    assert turned.theta.alpha < turned.theta.beta


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("colour", r"cola: got colour; accepted: cola-mlp:rank=1/2"),
        ("activated(monarch)", r"cola: got activated\(monarch\); accepted"),
        ("activated(monarch;silu", r"cola: got activated\(monarch;silu; accepted"),
        ("activated(monarch;silu;relu)", r"cola: got .*; accepted"),
        ("activated(monarch;tanh)", r"cola.activation: got tanh; accepted: silu \| gelu \| relu"),
        ("activated(dense;silu)", r"cola: got .*; accepted: the θ of two factors that is not"),
        ("activated(0,1/2,1/2,0,1/2,1/2,0;silu)", r"cola: got .*; accepted: the θ of two factors"),
        ("activated(btt:cores=3;silu)", r"theta: got btt:cores=3; accepted"),
        ("activated(monarch@heads;silu)", r"theta: got monarch@heads; accepted"),
        ("activated(convolution;silu)", r"theta: got convolution; accepted"),
        ("cola-mlp:rho=1/2", r"cola: got .*; accepted: cola-mlp takes rank=, activation="),
        ("cola-mlp:rank=2", r"cola.rank: got 2; accepted: a number from 0 to 1"),
        ("cola-mlp:rank=x", r"cola.rank: got x; accepted: a decimal or a fraction"),
        ("cola-mlp:activation=sin", r"cola.activation: got sin; accepted: silu"),
        (7, r"cola: got 7; accepted"),
    ],
)
def test_texts_that_say_no_activated_factors_are_named(text: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        parse_cola(text)


def test_what_takes_a_linear_layer_refuses_by_name() -> None:
    design = parse_cola("cola-mlp")
    layer = ActivatedLinear(design, 16, 16)
    named = r"layer: got ActivatedLinear\(cola-mlp.*; accepted: a linear layer; this one has silu"
    for ask in (layer.to_matrix, layer.to_linear, layer.as_operator):
        with pytest.raises(InvalidInput, match=named):
            ask()
    with pytest.raises(InvalidInput, match=named):
        layer.matrices([layer.A[None], layer.B[None]])
    with pytest.raises(AttributeError, match="has no weight: select= of replace_linears"):
        _ = layer.weight
    assert not hasattr(layer.structure, "rank")
    assert "rank=" not in repr(ActivatedLinear(parse_cola(WHOLE), 16, 16))
    for tokens in (1, 1 << 16):  # nothing multiplies its factors out
        assert not matrix_pays(layer.structure, tokens, torch.device("cpu"))
        assert not matrix_pays(layer.structure, tokens, torch.device("cuda"))
    with pytest.raises(InvalidInput, match=r"sum: got cola-mlp.*without an activation"):
        Sum((parse_theta("monarch"), design))
    with pytest.raises(InvalidInput, match="accepted: linear structures"):
        SumStructure(Structure.of(parse_theta("monarch"), 16, 16), layer.structure)
    with pytest.raises(InvalidInput, match=r"heads: got cola-mlp.*; accepted: two factors"):
        Aligned(design)
    with pytest.raises(InvalidInput, match="layer: got ActivatedLinear; accepted: an EinsumLinear"):
        MixtureLinear.from_einsum(layer, 2, 1)  # type: ignore[arg-type]
    for bad in (DENSE, "monarch", None):
        with pytest.raises(InvalidInput, match="accepted: the θ of two factors"):
            Activated(bad)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="d_out: got 0; accepted: a whole number from 1"):
        ActivatedLinear("cola-mlp", 8, 0)
    with pytest.raises(InvalidInput, match=r"cola: got 0\.5; accepted: an Activated, its text"):
        ActivatedLinear(0.5, 8, 8)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="plan: got b-first; accepted: None or a-first"):
        ActivatedLinear("cola-mlp", 8, 8, plan="b-first")
    assert ActivatedLinear("cola-mlp", 8, 8, plan="a-first").plan == layer.plan_for(7) == "a-first"


def test_a_guide_takes_it_from_random_factors_alone() -> None:
    def dense() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 16))

    for surgery in (replace_linears, lambda m, t, **o: SelfGuided(m, t, steps=2, **o)):
        with pytest.raises(InvalidInput, match=r"from_dense: got cola-mlp.*: a design of one"):
            surgery(dense(), "cola-mlp", from_dense=True)
    model, x = dense(), torch.randn(3, 16)
    guide = SelfGuided(model, "cola-mlp", steps=2, from_dense=False)
    expected = dense()(x)
    torch.testing.assert_close(model(x), expected)
    guide.step()
    half = model(x)
    guide.step()
    torch.testing.assert_close(half, (expected + model(x)) / 2)


@pytest.mark.parametrize("text", TEXTS)
def test_inspection_is_plain(text: str) -> None:
    found: dict[str, Any] = inspect_design(parse_design(text), 100, 150)
    assert json.loads(json.dumps(found)) == found
    assert parse_design(found["text"]).text == found["text"]
    s = structure_of(parse_design(text), 100, 150)
    assert isinstance(s, ActivatedStructure)
    assert (found["linear"], found["intermediate"]) == (False, s.intermediate)
    assert found["activation"] == s.design.activation
    assert not {"rank", "omega", "psi", "nu"} & found.keys()
    assert build_layer(s).structure == s
