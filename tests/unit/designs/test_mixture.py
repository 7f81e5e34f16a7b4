from __future__ import annotations

import copy
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from nas.designs.einsum import Structure
from nas.designs.mixture import (
    Mixture,
    MixtureStructure,
    ffn_structures,
    inspect_mixture,
    parse_mixture,
)
from nas.designs.theta import Theta
from nas.errors import InvalidInput
from nas.layers.einsum import EinsumLinear
from nas.layers.kernels.mixture_plan import MixturePlan, choose_mixture_plan
from nas.layers.mixture import MixtureFFN, MixtureLinear
from nas.layers.mup import param_groups
from nas.layers.routing import (
    auxiliary_loss,
    balance_loss,
    gate_loss,
    route,
    router_statistics,
    shares,
    z_loss,
)
from tests.support.strategies import thetas
from tests.support.tiers import FULL, thinned

PLANS = ["grouping=experts", "grouping=batched", "grouping=grouped", "grouping=matrices",
         "grouping=all tile=4", None]  # fmt: skip
NAMES = [
    "btt-moe:experts=4,active=2",
    "btt-moe:rho=1/2,experts=2,active=1",
    "low-rank-moe:rho=0,experts=3,active=2",
    "dense-moe:experts=3,active=2",
    "einsum-moe:theta=.5 .25 .25 .25 .5 .25 0,experts=4,active=3",
    "btt-moe:experts=5,active=4,shared=2",
]
EINSUM = Theta(0.5, 0.25, 0.25, 0.25, 0.5, 0.25, 0)


def made(mixture: Any, d_in: int, d_out: int, **options: Any) -> MixtureLinear:
    """A layer in double precision whose gate and bias are drawn, so that nothing ties."""
    options = {"dtype": torch.float64, **options}
    layer = MixtureLinear(mixture, d_in, d_out, **options)
    with torch.no_grad():
        assert layer.gate is not None
        layer.gate.normal_()
        if layer.bias is not None:
            layer.bias.normal_()
    return layer


def gradients(layer: nn.Module, x: Tensor, dy: Tensor, call: Any = None) -> list[Tensor]:
    """Output, and gradients of x and all parameters, the auxiliary loss included."""
    x = x.clone().requires_grad_()
    y = (layer if call is None else call)(x)
    aux = auxiliary_loss(layer)
    assert aux is not None
    loss = (y * dy).sum() + aux
    return [y.detach(), *torch.autograd.grad(loss, [x, *layer.parameters()])]


def assert_all_close(one: list[Tensor], other: list[Tensor], error: float = 1e-9) -> None:
    for got, expected in zip(one, other, strict=True):
        torch.testing.assert_close(got, expected, rtol=error, atol=error)


def by_experts(layer: MixtureLinear, x: Tensor) -> Tensor:
    """The definition: the weighted sum of the matrices of the chosen experts, token by token, and
    those of the shared ones."""
    assert layer.gate is not None
    s = layer.structure
    matrices = []
    for e in range(s.experts):
        one = EinsumLinear(s.expert, s.d_in, s.d_out, False, dtype=x.dtype)
        with torch.no_grad():
            for name, factor in one.factors().items():
                factor.copy_(layer.factors()[name][e])
        matrices.append(one.to_matrix())
    rows = []
    for token in x:
        best, chosen = (layer.gate @ token).topk(s.active - s.shared)
        weights = torch.softmax(best, 0)
        matrix = sum(w * matrices[int(e)] for w, e in zip(weights, chosen, strict=True))
        for e in range(s.experts - s.shared, s.experts):
            matrix = matrix + matrices[e]
        rows.append(matrix @ token)
    y = torch.stack(rows)
    return y if layer.bias is None else y + layer.bias


# --- integers -----------------------------------------------------------------------------------


def test_the_integers_of_a_mixture() -> None:
    mixture = Mixture(Theta(0.5, 0, 0.5, 0, 0.5, 0.5, 0), 8, 2)
    structure = MixtureStructure.of(mixture, 1024, 1024)
    one = Structure.of(Theta(0.5, 0, 0.5, 0, 0.5, 0.5, 0), 1024, 1024)
    assert structure.expert == one
    assert structure.macs == 2 * one.macs + 8 * 1024
    assert structure.params == 8 * one.params + 8 * 1024
    assert structure.whole.sizes.rho == 8
    assert not structure.is_dense
    assert not structure.is_degenerate
    assert structure.init_std("A") == one.init_std("A")
    assert structure.adam_lr_multiplier("B", 64) == one.adam_lr_multiplier("B", 64)
    assert structure.adam_lr_multiplier("gate", 64) == 64 / 1024
    assert MixtureStructure.of(mixture, 1024, 1024, gated=False).gate_macs == 0


def test_slices_are_divided_evenly() -> None:
    mixture = Mixture(Theta(0.5, 0, 0.5, 0, 0.5, 0.5, 0.5), 4, 2)
    structure = MixtureStructure.of(mixture, 64, 256)
    whole = Structure.of(mixture.theta, 64, 256)  # type: ignore[arg-type]
    assert (whole.sizes.rho, structure.expert.sizes.rho) == (8, 2)
    assert structure.whole.sizes == whole.sizes
    assert structure.experts * structure.expert.macs == whole.macs
    # of three experts the nearest multiple, 9 slices
    assert MixtureStructure.of(Mixture(mixture.theta, 3, 2), 64, 256).whole.sizes.rho == 9
    with pytest.raises(InvalidInput, match=r"experts: got 9; accepted: at most .* ρ=8"):
        MixtureStructure.of(Mixture(mixture.theta, 9, 2), 64, 256)
    with pytest.raises(InvalidInput, match=r"experts: got 3; accepted: a divisor .* ρ=8"):
        MixtureStructure.split(whole, 3, 2)


def test_an_expert_of_other_sizes_can_be_given() -> None:
    expert = Structure.of(Theta(0.5, 0, 0.5, 0, 0.5, 0.5, 0), 64, 64).with_output_blocks(4)
    structure = MixtureStructure(expert, 4, 2)
    assert made(structure, 64, 64)(torch.zeros(2, 64).double()).shape == (2, 64)
    with pytest.raises(InvalidInput, match="64, 64"):
        MixtureLinear(structure, 64, 32)


def test_experts_of_a_feed_forward_block() -> None:
    first, second = ffn_structures(parse_mixture("ffn-moe:experts=4"), 16, 64)
    assert (first.macs, second.macs) == (2 * 16 * 64 + 4 * 16, 2 * 16 * 64)
    assert (first.params, second.params) == (4 * 16 * 64 + 4 * 16, 4 * 16 * 64)
    assert first.fingerprint != second.fingerprint
    with pytest.raises(InvalidInput, match="ffn-moe"):
        ffn_structures(parse_mixture("btt-moe"), 16, 64)
    with pytest.raises(InvalidInput, match="ffn_structures"):
        MixtureStructure.of(parse_mixture("ffn-moe"), 16, 64)


@pytest.mark.parametrize("name", NAMES)
def test_inspected(name: str) -> None:
    found = inspect_mixture(parse_mixture(name), 36, 49)
    layer = MixtureLinear(name, 36, 49, bias=False)
    assert found["params"] == sum(p.numel() for p in layer.parameters())
    assert found["fingerprint"] == layer.structure.fingerprint
    assert found["macs"] == layer.structure.macs
    listed = found["factors"]
    assert isinstance(listed, list)
    assert [f["name"] for f in listed] == list(layer.factors())


@settings(max_examples=200)
@given(thetas(), st.integers(2, 1024), st.data())
def test_texts_are_exact(theta: Theta, experts: int, data: st.DataObject) -> None:
    active = data.draw(st.integers(1, experts))
    mixture = Mixture(theta, experts, active, data.draw(st.integers(0, active - 1)))
    assert parse_mixture(mixture.text) == mixture
    assert mixture.name.startswith(f"{mixture.family}:")
    assert ("shared" in mixture.text) == ("shared" in mixture.name) == (mixture.shared > 0)
    whole = Mixture(None, experts, active, mixture.shared, data.draw(st.integers(1, 1024)))
    assert parse_mixture(whole.text) == parse_mixture(whole.name) == whole


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("btt-moe", "btt-moe:alpha=1/2,epsilon=1/2,experts=8,active=2"),
        ("btt-moe:rho=1/2,active=1", "btt-moe:alpha=1/2,epsilon=1/2,rho=1/2,experts=8,active=1"),
        ("low-rank-moe", "low-rank-moe:rho=1/2,experts=8,active=2"),
        ("dense-moe:experts=16", "dense-moe:experts=16,active=2"),
        ("ffn-moe:experts=16,active=1", "ffn-moe:experts=16,active=1"),
        ("ffn-moe:shared=0,granularity=1", "ffn-moe:experts=8,active=2"),
        ("ffn-moe:granularity=4,shared=1,experts=32,active=8",
         "ffn-moe:experts=32,active=8,shared=1,granularity=4"),
        ("dense-moe:shared=1", "dense-moe:experts=8,active=2,shared=1"),
        ("einsum-moe:theta=0.5 1/4 .25 0 .5 .5 0",
         "einsum-moe:theta=1/2 1/4 1/4 0 1/2 1/2 0,experts=8,active=2"),
    ],
)  # fmt: skip
def test_names(text: str, name: str) -> None:
    mixture = parse_mixture(text)
    assert (mixture.name, str(mixture)) == (name, name)
    assert parse_mixture(mixture.text) == parse_mixture(name) == mixture


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("moe", "mixture: got moe; accepted: btt-moe"),
        ("btt-moe:gamma=1/2", "alpha=, epsilon=, rho=, experts=, active="),
        ("dense-moe:rho=1/2", "dense-moe takes experts=, active="),
        ("btt-moe:rho=0,rho=1", "each once"),
        ("btt-moe:experts=1", "experts: got 1; .* a mixture has at least 2 experts"),
        ("btt-moe:experts=1025", "from 2 to 1024"),
        ("btt-moe:experts=-4", "experts: got -4"),
        ("btt-moe:experts=4,active=5", "active=5 of experts=4; accepted: .* from 1 to 4"),
        ("btt-moe:active=0", "active=0 of experts=8"),
        ("btt-moe:shared=2", "shared=2 of active=2; accepted: .* from 0 to 1; .* chooses at least"),
        ("ffn-moe:active=1,shared=1", "shared=1 of active=1"),
        ("btt-moe:shared=1/2", "shared: got 1/2; accepted: a whole number"),
        ("dense-moe:granularity=2", "dense-moe takes experts=, active=, shared="),
        ("ffn-moe:granularity=0", "granularity: got 0; accepted: a whole number from 1 to 1024"),
        ("ffn-moe:granularity=1025", "from 1 to 1024"),
        ("btt-moe:alpha=2", "theta.alpha"),
        ("einsum-moe", "einsum-moe:theta="),
        ("einsum-moe:theta=1 0 0", "seven numbers"),
        ("einsum-moe:theta=1 1 1 1 1 1 1", "alpha . beta . gamma = 1"),
    ],
)
def test_a_bad_mixture_is_named(text: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        parse_mixture(text)


@pytest.mark.parametrize(
    "counts", [(True, 1), (4.0, 2), (4, 2.0), (4, True), (4, 2, True), (4, 2, -1), (4, 2, 0, True)]
)
def test_counts_are_whole(counts: Any) -> None:
    with pytest.raises(InvalidInput, match="whole number"):
        Mixture(None, *counts)


# --- the layer ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(16, 16), (13, 29)])
def test_forward_is_the_definition(name: str, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer = made(name, *shape)
    x = torch.randn(7, shape[0], dtype=torch.float64)
    expected = by_experts(layer, x)
    for plan in PLANS:
        layer.plan = plan
        torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(layer(x.view(7, 1, -1)), expected.view(7, 1, -1))
    with torch.no_grad():
        next(iter(layer.factors().values()))[0].mul_(2)
    assert not torch.allclose(layer(x), expected)


@settings(max_examples=60, deadline=None)
@given(
    thetas(), st.integers(1, 24), st.integers(1, 24), st.integers(2, 5), st.integers(0, 12),
    st.booleans(), st.data(),
)  # fmt: skip
def test_every_plan_is_compute_all(
    theta: Theta, d_in: int, d_out: int, experts: int, n: int, bias: bool, data: st.DataObject
) -> None:
    torch.manual_seed(0)
    active = data.draw(st.integers(1, experts))
    structure = MixtureStructure(Structure.of(theta, d_in, d_out), experts, active)
    layer = made(structure, d_in, d_out, bias=bias, plan="grouping=all")
    x, dy = torch.randn(n, d_in).double(), torch.randn(n, d_out).double()
    expected = gradients(layer, x, dy)
    for plan in PLANS:
        layer.plan = plan
        assert_all_close(gradients(layer, x, dy), expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("load", ["one token", "one expert", "an idle expert", "no tokens"])
def test_uneven_loads(name: str, load: str) -> None:
    torch.manual_seed(1)
    layer = made(name, 20, 16, plan="grouping=all")
    n = {"one token": 1, "no tokens": 0}.get(load, 9)
    x, dy = torch.randn(n, 20).double(), torch.randn(n, 16).double()
    assert layer.gate is not None
    with torch.no_grad():
        if load == "one expert":
            x = x.abs()
            layer.gate[: layer.structure.active] += 9
        if load == "an idle expert":
            x = x.abs()
            layer.gate[-1] -= 9
    expected = gradients(layer, x, dy)
    for plan in PLANS:
        layer.plan = plan
        assert_all_close(gradients(layer, x, dy), expected)
        found = router_statistics(layer)[""]
        assert found["dropped"] == 0
        assert found["assignments"] == n * (layer.structure.active - layer.structure.shared)


@pytest.mark.parametrize("name", NAMES)
def test_single_precision_plans_agree(name: str) -> None:
    torch.manual_seed(0)
    layer = made(name, 36, 50, dtype=torch.float32, plan="grouping=all")
    x, dy = torch.randn(40, 36), torch.randn(40, 50)
    expected = gradients(layer, x, dy)
    for plan in PLANS:
        layer.plan = plan
        assert_all_close(gradients(layer, x, dy), expected, 2e-4)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", NAMES)
def test_gradients_against_finite_differences(name: str, plan: str | None) -> None:
    torch.manual_seed(0)
    layer = made(name, 9, 6, plan=plan, normalize=True, gain=True)
    x = torch.randn(3, 9, dtype=torch.float64, requires_grad=True)

    def call(x: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        y = layer(x)
        assert layer.auxiliary_loss is not None
        return y, layer.auxiliary_loss

    assert torch.autograd.gradcheck(call, (x, *layer.parameters()), fast_mode=True)


@pytest.mark.parametrize("name", [NAMES[0], NAMES[3]])
def test_second_derivatives(name: str) -> None:
    torch.manual_seed(0)
    layer = made(name, 6, 5)
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(
        lambda x, *_: layer(x), (x, *layer.parameters()), fast_mode=True
    )


def test_function_transforms() -> None:
    torch.manual_seed(0)
    layer = made(NAMES[0], 16, 9)
    x = torch.randn(5, 16, dtype=torch.float64)
    parameters: dict[str, Tensor] = dict(layer.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        total: Tensor = torch.func.functional_call(layer, parameters, (x,)).square().sum()
        return total

    found = torch.func.grad(loss)(parameters, x)
    expected = torch.autograd.grad(layer(x).square().sum(), list(parameters.values()))
    assert_all_close([found[name] for name in parameters], list(expected))
    assert layer.auxiliary_loss is not None
    assert layer.auxiliary_loss.isfinite()


@pytest.mark.parametrize("needed", [{"A"}, {"B"}, {"gate"}, {"x"}, {"A", "x"}, set()])
@pytest.mark.parametrize("plan", PLANS)
def test_only_wanted_gradients(plan: str | None, needed: set[str]) -> None:
    torch.manual_seed(0)
    layer = made(NAMES[0], 16, 16, bias=False, plan=plan)
    x = torch.randn(6, 16, dtype=torch.float64, requires_grad=True)
    everything = {**dict(layer.named_parameters()), "x": x}
    grads = torch.autograd.grad(layer(x).sum(), list(everything.values()))
    expected = dict(zip(everything, grads, strict=True))
    for name, leaf in everything.items():
        leaf.requires_grad_(name in needed)
    y = layer(x)
    assert y.requires_grad == bool(needed)
    if needed:
        y.sum().backward()
    for name, leaf in everything.items():
        assert (leaf.grad is not None) == (name in needed)
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad, expected[name])


@pytest.mark.parametrize("name", NAMES)
def test_all_experts_active_is_the_weighted_sum_of_slices(name: str) -> None:
    torch.manual_seed(0)
    layer = made(parse_mixture(name), 16, 16, bias=False)
    layer = made(MixtureStructure(layer.structure.expert, 4, 4), 16, 16, bias=False)
    assert layer.gate is not None
    x = torch.randn(5, 16, dtype=torch.float64)
    slices = []
    for e in range(4):
        one = EinsumLinear(layer.structure.expert, 16, 16, False, dtype=torch.float64)
        with torch.no_grad():
            for key, factor in one.factors().items():
                factor.copy_(layer.factors()[key][e])
        slices.append(one(x))
    stacked = torch.stack(slices, -1)
    weights = torch.softmax(x @ layer.gate.T, -1)
    torch.testing.assert_close(layer(x), (stacked * weights[:, None]).sum(-1))
    with torch.no_grad():
        layer.gate.zero_()
    torch.testing.assert_close(layer(x), stacked.mean(-1))


@pytest.mark.parametrize(
    "theta", ["btt:rho=1/2", "low-rank:rho=1/2", "1/2,1/4,1/4,1/4,1/2,1/4,1/2"]
)
@pytest.mark.parametrize("normalize", [False, True])
def test_slices_of_a_layer_become_experts(theta: str, normalize: bool) -> None:
    torch.manual_seed(0)
    layer = EinsumLinear(
        theta, 64, 50, d_in_base=32, normalize=normalize, gain=True, dtype=torch.float64
    )
    rho = layer.structure.sizes.rho
    assert layer.bias is not None
    with torch.no_grad():
        layer.bias.normal_()
        for factor in layer.factors().values():
            factor.mul_(1.5)  # past the cap
    x = torch.randn(3, 64, dtype=torch.float64)
    mixture = MixtureLinear.from_einsum(layer, rho, rho)
    torch.testing.assert_close(mixture(x), layer(x))
    assert mixture.structure.whole.sizes == layer.structure.sizes
    assert mixture.d_in_base == 32
    with pytest.raises(InvalidInput, match=f"a divisor of the rank axis, ρ={rho}"):
        MixtureLinear.from_einsum(layer, rho + 1, 1)


def test_what_cannot_be_split() -> None:
    dense = EinsumLinear("dense", 16, 16)
    for layer in (dense, nn.Linear(16, 16), EinsumLinear("monarch", 16, 16, sizing="paper")):
        with pytest.raises(InvalidInput, match="EinsumLinear"):
            MixtureLinear.from_einsum(layer, 2, 1)  # type: ignore[arg-type]


def test_initialisation_and_rates_are_those_of_one_expert() -> None:
    torch.manual_seed(0)
    layer = MixtureLinear("btt-moe:experts=8", 256, 1024, d_in_base=64)
    expert = layer.structure.expert
    for name in ("A", "B"):
        factor = layer.factors()[name]
        error = 5 / math.sqrt(2 * factor.numel())
        assert factor.std().item() == pytest.approx(expert.init_std(name), rel=error)
    assert layer.gate is not None
    assert torch.count_nonzero(layer.gate) == 0
    rates = {p: g["lr"] for g in param_groups(layer, 1.0) for p in g["params"]}
    assert rates[layer.A] == pytest.approx(expert.adam_lr_multiplier("A", 64))
    assert rates[layer.B] == pytest.approx(expert.adam_lr_multiplier("B", 64))
    assert rates[layer.gate] == pytest.approx(64 / 256)
    zero = MixtureLinear("btt-moe", 16, 16, zero_init=True)
    x = torch.randn(3, 16)
    assert torch.count_nonzero(zero(x)) == 0
    zero(x).sum().backward()
    assert zero.B.grad is not None
    assert zero.B.grad.abs().max() > 0


# --- losses and statistics ----------------------------------------------------------------------


def test_balance_loss_of_balanced_and_collapsed_routers() -> None:
    logits = 50 * torch.eye(4).double().repeat(3, 1) * 10
    chosen = logits.topk(1, dim=-1).indices
    assert balance_loss(logits, chosen).item() == pytest.approx(1.0, abs=1e-12)
    uniform = torch.zeros(12, 4).double()
    assert balance_loss(uniform, chosen).item() == pytest.approx(1.0, abs=1e-12)
    assert z_loss(uniform).item() == pytest.approx(math.log(4) ** 2)
    collapsed = torch.zeros(12, 8).double()
    collapsed[:, :2] = 1000
    # all mass on k = 2 of E = 8: E·Σ ½·½ over both = E/k
    assert balance_loss(collapsed, collapsed.topk(2).indices).item() == pytest.approx(8 / 2)
    assert shares(chosen, 4).sum().item() == pytest.approx(1.0)
    both = balance_loss(collapsed, chosen % 2) + 0.1 * z_loss(collapsed)
    assert gate_loss(collapsed, chosen % 2).item() == pytest.approx(both.item())


def test_gate_loss_has_the_gradient_of_its_terms() -> None:
    torch.manual_seed(0)
    logits = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    chosen = logits.topk(2).indices
    (one,) = torch.autograd.grad(gate_loss(logits, chosen), logits)
    terms = balance_loss(logits, chosen) + 0.1 * z_loss(logits)
    (other,) = torch.autograd.grad(terms, logits)
    torch.testing.assert_close(one, other)
    assert torch.autograd.gradgradcheck(lambda x: gate_loss(x, chosen), logits)


def test_the_loss_of_a_model_is_the_mean_over_its_gates() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(made(NAMES[0], 8, 16), nn.GELU(), made(NAMES[3], 16, 8), nn.Linear(8, 8))
    assert auxiliary_loss(model) is None
    assert router_statistics(model) == {}
    assert auxiliary_loss(nn.Linear(2, 2)) is None
    x = torch.randn(6, 8, dtype=torch.float64)
    model.double()(x)
    first, second = model[0], model[2]
    assert isinstance(first, MixtureLinear)
    assert isinstance(second, MixtureLinear)
    assert first.auxiliary_loss is not None
    assert second.auxiliary_loss is not None
    mean = (first.auxiliary_loss + second.auxiliary_loss) / 2
    total = auxiliary_loss(model)
    assert total is not None
    assert total.item() == pytest.approx(mean.item())
    torch.autograd.backward(total)
    assert first.gate is not None
    assert first.gate.grad is not None
    model.eval()(2 * x)
    assert auxiliary_loss(model) is None
    found = router_statistics(model)
    assert set(found) == {"0", "2"}
    assert sum(found["0"]["load"]) == pytest.approx(1)
    assert found["0"]["dropped"] == 0
    assert 0 <= found["0"]["load_entropy"] <= math.log(4) + 1e-12
    assert 1 <= found["2"]["max_load"] <= 3


def test_ties_are_the_same_every_time() -> None:
    torch.manual_seed(0)
    layer = MixtureLinear("btt-moe:experts=8,active=2", 16, 16)
    x = torch.randn(40, 16)
    first, again = layer.route(x).chosen, layer.route(x).chosen
    assert torch.equal(first, again)
    assert len(set(first.flatten().tolist())) == 2  # every token the same two
    layer(x)
    assert router_statistics(layer)[""]["gate_entropy"] == pytest.approx(math.log(8))


def test_routing_is_sorted_by_expert() -> None:
    torch.manual_seed(0)
    routing = route(torch.randn(9, 4), torch.randn(5, 4), 2)
    by_expert = routing.chosen.flatten()[routing.order].tolist()
    assert by_expert == sorted(by_expert)
    assert routing.counts.sum() == 18
    assert routing.experts == 5
    torch.testing.assert_close(routing.weights.sum(1), torch.ones(9))
    assert all((routing.order[i] < routing.order[j]) for (i, j) in pairwise(range(18))
               if by_expert[i] == by_expert[j])  # fmt: skip


# --- cost ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(16, 36), (13, 29)])
def test_counted_flops_are_the_formula(name: str, shape: tuple[int, int]) -> None:
    layer = MixtureLinear(name, *shape, bias=False)
    assert layer.gate is not None
    with torch.no_grad():
        layer.gate.normal_()
    plan = "materialised" if layer.structure.expert.is_dense else "a-first"
    layer.plan = f"grouping=experts {plan}"
    x = torch.randn(11, shape[0])
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 11 * layer.structure.flops
    layer.plan = "grouping=all"
    with FlopCounterMode(display=False) as counter:
        layer(x)
    s = layer.structure
    assert counter.get_total_flops() >= 11 * 2 * (s.experts * s.expert.macs + s.gate_macs)


def test_the_cost_model_chooses_by_size_alone() -> None:
    structure = MixtureStructure.of(parse_mixture("btt-moe"), 64, 64)
    chosen = choose_mixture_plan(structure, 500)
    assert chosen == choose_mixture_plan(structure, 512)
    large = MixtureStructure.of(parse_mixture("btt-moe"), 1024, 1024)
    assert choose_mixture_plan(large, 4096).grouping == "experts"
    layer = MixtureLinear("btt-moe", 64, 64)
    assert layer.plan_for(500) == chosen
    for kind, dtype in (("cuda", torch.bfloat16), ("cuda", torch.float64), ("meta", torch.float32)):
        assert choose_mixture_plan(large, 4096, kind, dtype).grouping in ("grouped", "batched")
        assert choose_mixture_plan(structure, 16, kind, dtype).grouping == "all"


@pytest.mark.parametrize(
    "text",
    [
        "grouping=experts",
        "grouping=experts a-first tile=256 first=batched second=batched gemm=blas",
        "grouping=batched",
        "grouping=grouped",
        "grouping=matrices",
        "grouping=all tile=0",
    ],
)
def test_a_plan_reads_its_own_text(text: str) -> None:
    assert str(MixturePlan.parse(text)) == text
    layer = made(NAMES[0], 16, 16, plan=text)
    assert str(layer.plan) == text
    assert torch.isfinite(layer(torch.randn(3, 16).double())).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "grouping=batched"),
        ("batched", "grouping=batched"),
        ("grouping=none", "experts . batched . grouped . matrices . all"),
        ("grouping=batched tile=3", "grouping=batched"),
        ("grouping=all tile=-3", "plan.tile"),
        ("grouping=experts sideways", "plan.order"),
        ("grouping=experts materialised extra", "plan"),
    ],
)
def test_a_bad_plan_is_named(text: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        MixtureLinear("btt-moe", 16, 16, plan=text)


def test_plans_that_contradict_themselves() -> None:
    layer = MixtureLinear("dense-moe", 16, 16)
    with pytest.raises(InvalidInput, match="materialised"):
        layer.plan = "grouping=experts a-first"
    with pytest.raises(InvalidInput, match="a MixturePlan"):
        layer.plan = 3
    with pytest.raises(InvalidInput, match="grouping=all"):
        MixturePlan("batched", tile=4)
    layer.plan = None
    assert layer.plan is None


# --- modes of torch -----------------------------------------------------------------------------


@pytest.mark.parametrize("plan", PLANS)
def test_autocast(plan: str | None) -> None:
    torch.manual_seed(0)
    layer = made(NAMES[0], 16, 24, dtype=torch.float32, plan=plan)
    x, dy = torch.randn(12, 16), torch.randn(12, 24)
    expected = gradients(layer, x, dy)
    with torch.autocast("cpu", torch.bfloat16):
        routing = layer.route(x)
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert routing.logits.dtype == routing.weights.dtype == torch.float32

    def call(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            out: Tensor = layer(x)
        return out.float()

    for got, full in zip(gradients(layer, x, dy, call), expected, strict=True):
        assert got.dtype == torch.float32
        assert (got - full).norm() <= 0.03 * full.norm()


@pytest.mark.parametrize("plan", thinned([None, "grouping=experts", "grouping=all"], 1))
def test_compiled_without_a_graph_break(plan: str | None) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    layer = made(NAMES[0], 16, 24, plan=plan)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for n in (6, 11):
        x, dy = torch.randn(n, 16).double(), torch.randn(n, 24).double()
        assert_all_close(gradients(layer, x, dy, compiled), gradients(layer, x, dy))
    compiled(x)
    assert router_statistics(layer)[""]["assignments"] == 22


@FULL
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own, when it is imported
def test_compiled_by_inductor() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    layer = made(NAMES[0], 32, 32, dtype=torch.float32)
    compiled = torch.compile(layer, fullgraph=True)
    x, dy = torch.randn(40, 32), torch.randn(40, 32)
    assert_all_close(gradients(layer, x, dy, compiled), gradients(layer, x, dy), 1e-3)


def test_a_compiled_block() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    block = MixtureFFN.of("ffn-moe:experts=3,active=2", 8, 12, dtype=torch.float64)
    assert block.mlp_in.gate is not None
    nn.init.normal_(block.mlp_in.gate)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x, dy = torch.randn(2, 5, 8).double(), torch.randn(2, 5, 8).double()
    assert_all_close(gradients(block, x, dy, compiled), gradients(block, x, dy))


def test_activation_checkpoint() -> None:
    torch.manual_seed(0)
    layer = made(NAMES[0], 16, 16)
    x, dy = torch.randn(6, 16).double(), torch.randn(6, 16).double()
    again = gradients(layer, x, dy, lambda x: checkpoint(layer, x, use_reentrant=False))
    assert_all_close(again, gradients(layer, x, dy), 0)


@pytest.mark.parametrize("plan", PLANS)
def test_the_same_input_gives_the_same_bits(plan: str | None) -> None:
    torch.manual_seed(0)
    layer = made(NAMES[0], 64, 64, dtype=torch.float32, plan=plan)
    x, dy = torch.randn(100, 64), torch.randn(100, 64)
    for one, other in zip(gradients(layer, x, dy), gradients(layer, x, dy), strict=True):
        assert torch.equal(one, other)


def test_state_dict_and_copies() -> None:
    torch.manual_seed(0)
    layer, other = made(NAMES[0], 16, 16), made(NAMES[0], 16, 16)
    x = torch.randn(4, 16, dtype=torch.float64)
    y = layer(x)
    assert set(layer.state_dict()) == {"A", "B", "gate", "bias", "_extra_state"}
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), y)
    copied = copy.deepcopy(layer)  # whose loss has a graph
    assert copied.auxiliary_loss is None
    assert router_statistics(copied) == {}
    assert torch.equal(copied(x), y)


def test_a_wrong_input_is_named() -> None:
    layer = MixtureLinear("btt-moe", 16, 24)
    with pytest.raises(ValueError, match=r"shape \(3, 17\); its last dimension must be 16"):
        layer(torch.zeros(3, 17))
    with pytest.raises(TypeError, match=r"torch\.float64.*torch\.float32"):
        layer(torch.zeros(3, 16, dtype=torch.float64))
    with pytest.raises(TypeError, match="not one matrix"):
        layer.to_matrix()
    with pytest.raises(TypeError, match="not one matrix"):
        layer.to_linear()
    ungated = MixtureLinear(MixtureStructure(layer.structure.expert, 8, 2, False), 16, 24)
    assert ungated.gate is None
    with pytest.raises(ValueError, match="has no gate"):
        ungated(torch.zeros(3, 16))
    x = torch.randn(3, 16)
    assert ungated(x, layer.route(x)).shape == (3, 24)


# --- blocks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", PLANS)
def test_a_block_is_the_sum_over_its_experts(plan: str | None) -> None:
    torch.manual_seed(0)
    block = MixtureFFN.of("ffn-moe:experts=4,active=2", 8, 20, dtype=torch.float64, plan=plan)
    with torch.no_grad():
        for p in block.parameters():
            p.normal_()
    x, dy = torch.randn(7, 8).double(), torch.randn(7, 8).double()

    def explicit(x: Tensor) -> Tensor:
        one, two = block.mlp_in, block.mlp_out
        assert one.gate is not None
        assert two.bias is not None
        logits = x @ one.gate.T
        best, chosen = logits.topk(2)
        gates = torch.zeros_like(logits).scatter(1, chosen, torch.softmax(best, -1))
        y = sum(
            gates[:, e, None] * functional.linear(
                functional.gelu(functional.linear(x, one.weight[e], one.bias)), two.weight[e])
            for e in range(4)
        )  # fmt: skip
        block.mlp_in.auxiliary_loss = gate_loss(logits, chosen)
        assert isinstance(y, Tensor)
        return y + two.bias

    assert_all_close(gradients(block, x, dy), gradients(block, x, dy, explicit))


def test_blocks_start_as_zero_and_must_fit() -> None:
    block = MixtureFFN.of("ffn-moe", 8, 32, zero_init=True)
    assert torch.count_nonzero(block(torch.randn(2, 3, 8))) == 0
    assert block(torch.zeros(0, 8)).shape == (0, 8)
    rates = {p: g["lr"] for g in param_groups(block, 1.0) for p in g["params"]}
    assert rates[block.mlp_out.weight] == 1.0
    with pytest.raises(InvalidInput, match="one hidden dimension"):
        MixtureFFN(block.mlp_out, block.mlp_in)
    with pytest.raises(ValueError, match="last dimension must be 8"):
        block(torch.zeros(2, 9))
