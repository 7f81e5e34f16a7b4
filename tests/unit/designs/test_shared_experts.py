"""Experts that every token uses, and feed-forward experts of a part of the hidden dimension."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from nas.designs.design import inspect_design, parse_design
from nas.designs.einsum import Structure
from nas.designs.mixture import Mixture, MixtureStructure, ffn_structures, parse_mixture
from nas.designs.theta import DENSE, Theta
from nas.errors import InvalidInput
from nas.layers.einsum import EinsumLinear
from nas.layers.kernels.mixture_plan import choose_mixture_plan
from nas.layers.mixture import MixtureFFN, MixtureLinear
from nas.layers.routing import Routing, auxiliary_loss, route, router_statistics
from tests.support.strategies import thetas
from tests.support.tiers import FULL

PLANS = ["grouping=experts", "grouping=batched", "grouping=grouped", "grouping=matrices",
         "grouping=all tile=4", None]  # fmt: skip
FINE = "ffn-moe:experts=6,active=4,shared=2,granularity=3"


def drawn(module: nn.Module) -> Any:
    with torch.no_grad():
        for p in module.parameters():
            p.normal_()
    return module


def counts(draw: Any) -> tuple[int, int, int]:
    """E, k and S."""
    experts = draw(st.integers(2, 5))
    active = draw(st.integers(1, experts))
    return experts, active, draw(st.integers(0, active - 1))


def weights_of(layer: MixtureLinear, token: Tensor) -> dict[int, Tensor]:
    """The weight of every expert that a token uses."""
    assert layer.gate is not None
    s = layer.structure
    logits = [layer.gate[e] @ token for e in range(s.experts - s.shared)]
    chosen = sorted(range(len(logits)), key=lambda e: -logits[e].item())[: s.active - s.shared]
    total = torch.stack([logits[e].exp() for e in chosen]).sum()
    weights = {e: logits[e].exp() / total for e in chosen}
    return weights | {e: torch.ones(()).double() for e in range(len(logits), s.experts)}


def gate_loss_of(layer: MixtureLinear, x: Tensor) -> Tensor:
    """E·Σ p̂ f̂ + 0.1·mean(lse²) of the routed experts, token by token."""
    assert layer.gate is not None
    s = layer.structure
    routed = s.experts - s.shared
    total: Tensor = 0.1 * torch.stack([(layer.gate @ t).exp().sum().log() ** 2 for t in x]).mean()
    for e in range(routed):
        p = torch.stack([torch.softmax(layer.gate @ token, 0)[e] for token in x]).mean()
        f = sum(e in weights_of(layer, token) for token in x)
        total = total + routed * p * f / (len(x) * (s.active - s.shared))
    return total


def matrices_of(layer: MixtureLinear) -> list[Tensor]:
    """W of each expert, with a graph to the factors."""
    s = layer.structure
    one = EinsumLinear(s.expert, s.d_in, s.d_out, False, dtype=torch.float64)
    eye = torch.eye(s.d_in).double()
    names = [name for _, name, _ in one._factors]
    return [
        torch.func.functional_call(one, {n: getattr(layer, n)[e] for n in names}, (eye,)).T
        for e in range(s.experts)
    ]  # fmt: skip


def assert_every_plan_gives(
    module: nn.Module, x: Tensor, expected: Tensor, expected_loss: Tensor
) -> None:
    """The output and the auxiliary loss, and the gradients of both."""
    dy = torch.randn(expected.shape).double()
    wanted = [x, *module.parameters()]
    gradients = torch.autograd.grad((expected * dy).sum() + expected_loss, wanted)
    for plan in PLANS:
        for layer in module.modules():
            if isinstance(layer, MixtureLinear):
                layer.plan = plan
        y = module(x)
        loss = auxiliary_loss(module)
        assert loss is not None
        found = [y, loss, *torch.autograd.grad((y * dy).sum() + loss, wanted)]
        for one, other in zip(found, [expected, expected_loss, *gradients], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


# --- the definition -----------------------------------------------------------------------------


@settings(max_examples=8, deadline=None)
@given(thetas(), st.integers(2, 12), st.integers(2, 12), st.booleans(), st.data())
def test_a_layer_and_its_gradients_are_sums_over_experts_token_by_token(
    theta: Theta, d_in: int, d_out: int, bias: bool, data: st.DataObject
) -> None:
    torch.manual_seed(0)
    experts, active, shared = counts(data.draw)
    structure = MixtureStructure(Structure.of(theta, d_in, d_out), experts, active, shared=shared)
    layer = drawn(MixtureLinear(structure, d_in, d_out, bias, dtype=torch.float64))
    x = torch.randn(4, d_in, dtype=torch.float64, requires_grad=True)
    w = matrices_of(layer)
    rows = [sum(g * w[e] for e, g in weights_of(layer, token).items()) @ token for token in x]
    expected = torch.stack(rows) + (layer.bias if bias else 0)
    assert_every_plan_gives(layer, x, expected, gate_loss_of(layer, x))


def feed_forward(block: MixtureFFN, e: int, token: Tensor) -> Tensor:
    """One expert of a block, without the last bias."""
    one, two = block.mlp_in, block.mlp_out
    assert isinstance(one.bias, Tensor)
    y: Tensor = two.weight[e] @ functional.gelu(one.weight[e] @ token + one.bias)
    return y


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 4), st.data())
def test_a_block_and_its_gradients_are_those_of_deepseek_moe(
    granularity: int, data: st.DataObject
) -> None:
    """y = Σ_shared FFN_i(x) + Σ_topk g_i FFN_i(x), arXiv:2401.06066, section 3.2, without the
    residual; g_i are the paper's, a softmax over all routed experts, divided by their sum."""
    torch.manual_seed(0)
    experts, active, shared = counts(data.draw)
    mixture = Mixture(None, experts, active, shared, granularity)
    block = drawn(MixtureFFN.of(mixture, 6, 12, dtype=torch.float64))
    assert block.mlp_in.out_features == 12 // granularity
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    routed = experts - shared
    rows = []
    for token in x:
        y = torch.zeros(6).double()
        for e in range(routed, experts):
            y = y + feed_forward(block, e, token)
        s = torch.softmax(block.mlp_in.gate @ token, 0)
        best = s.topk(active - shared)
        for g, at in zip(*best, strict=True):
            y = y + g / best.values.sum() * feed_forward(block, int(at), token)
        rows.append(y)
    expected = torch.stack(rows) + block.mlp_out.bias
    assert_every_plan_gives(block, x, expected, gate_loss_of(block.mlp_in, x))
    torch.testing.assert_close(block.plain(x), expected)


def test_fine_experts_that_are_all_used_are_the_whole_block() -> None:
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6, bias=False)).double()
    first, last = whole[0], whole[2]
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    block = drawn(
        MixtureFFN.of("ffn-moe:experts=4,active=4,shared=3,granularity=3", 6, 12, False,
                      dtype=torch.float64)
    )  # fmt: skip
    with torch.no_grad():
        first.bias.zero_()
        block.mlp_out.weight[0].zero_()
        block.mlp_in.weight[1:] = first.weight.view(3, 4, 6)
        block.mlp_out.weight[1:] = last.weight.view(6, 3, 4).transpose(0, 1)
    x = torch.randn(5, 6).double()
    torch.testing.assert_close(block(x), whole(x))


def test_without_shared_experts_routing_is_bit_for_bit_a_top_k() -> None:
    torch.manual_seed(0)
    x, gate = torch.randn(50, 16), torch.randn(8, 16)
    found = route(x, gate, 3, 0)
    best, chosen = (x @ gate.T).topk(3)
    assert torch.equal(found.weights, torch.softmax(best.mT, -2).mT)
    assert torch.equal(found.chosen, chosen)
    assert found.routed.shape == found.chosen.shape
    text = "btt-moe:experts=8,active=3"
    plain = MixtureLinear(text, 16, 16)
    other = MixtureLinear(f"{text},shared=0", 16, 16)
    other.load_state_dict(plain.state_dict())
    assert torch.equal(plain(x), other(x))
    assert parse_mixture(f"{text},shared=0").text == parse_mixture(text).text
    assert "shared" not in plain.structure.fingerprint + repr(plain)


# --- the gate -----------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", PLANS)
def test_no_gradient_reaches_the_gate_through_shared_experts(plan: str | None) -> None:
    torch.manual_seed(0)
    layer = drawn(MixtureLinear("dense-moe:experts=5,active=4,shared=2", 6, 7, plan=plan))
    assert layer.gate.shape == (3, 6)
    x = torch.randn(9, 6)
    (reaches,) = torch.autograd.grad(layer(x).square().sum(), layer.gate)
    assert reaches.abs().max() > 0
    with torch.no_grad():
        layer.weight[:3] = 0
    (through_shared,) = torch.autograd.grad(layer(x).square().sum(), layer.gate)
    assert torch.count_nonzero(through_shared) == 0


def test_losses_and_counters_know_routed_experts_alone() -> None:
    torch.manual_seed(0)
    layer = drawn(MixtureLinear("btt-moe:experts=5,active=4,shared=2", 16, 16))
    routing = layer.route(torch.randn(30, 16))
    assert (routing.experts, routing.shared) == (5, 2)
    assert routing.logits.shape == (30, 3)
    assert routing.chosen[:, 2:].tolist() == [[3, 4]] * 30
    assert routing.routed.max() < 3
    assert (routing.weights[:, 2:] == 1).all()
    torch.testing.assert_close(routing.weights.sum(1), torch.full((30,), 3.0))
    assert routing.counts[3:].tolist() == [30, 30]
    found = router_statistics(layer)[""]
    assert len(found["load"]) == 3
    assert sum(found["load"]) == pytest.approx(1)
    assert (found["assignments"], found["dropped"]) == (60, 0)
    with torch.no_grad():
        layer.gate.zero_()
    layer(torch.randn(30, 16))
    # a router that chooses two of three alike: 3 · Σ ⅓ f̂ = 1, and lse² = log(3)²
    assert layer.auxiliary_loss.item() == pytest.approx(1 + 0.1 * torch.tensor(3.0).log() ** 2)
    no_tokens = Routing.of(torch.ones(0, 2), torch.zeros(0, 2).long(), torch.ones(0, 3), 2)
    assert no_tokens.chosen.shape == no_tokens.weights.shape == (0, 4)


# --- cost ---------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 20), st.integers(1, 8), st.data())
def test_finer_experts_cost_the_same_apart_from_the_gate(
    width: int, part: int, m: int, data: st.DataObject
) -> None:
    experts = data.draw(st.integers(2, 16))
    active = data.draw(st.integers(1, experts))
    coarse = ffn_structures(Mixture(None, experts, active), width, part * m)
    fine = ffn_structures(Mixture(None, m * experts, m * active, granularity=m), width, part * m)
    for one, other in zip(coarse, fine, strict=True):
        assert one.macs - one.gate_macs == other.macs - other.gate_macs
        assert one.params - one.gate_macs == other.params - other.gate_macs


def test_a_shared_expert_costs_what_an_active_one_does() -> None:
    one = Structure.of(Theta(0.5, 0, 0.5, 0, 0.5, 0.5, 0), 64, 64)
    mixture = parse_mixture("btt-moe:experts=8,active=3,shared=1")
    structure = MixtureStructure.of(mixture, 64, 64)
    assert structure.macs == 3 * one.macs + 7 * 64
    assert structure.params == 8 * one.params + 7 * 64
    assert structure.fans("gate") == (64, 7)
    assert MixtureStructure.of(mixture, 64, 64, gated=False).macs == 3 * one.macs
    assert structure.fingerprint == f"3of8 1shared:{one.fingerprint}"
    told = inspect_design(mixture, 64, 64)
    assert (told["shared"], told["gate_macs"]) == (1, 7 * 64)
    block = inspect_design(parse_design(FINE), 16, 48)
    assert (block["shared"], block["granularity"]) == (2, 3)
    assert block["macs"] == 4 * 2 * 16 * 16 + 16 * 4
    assert block["contraction"] == ["16 → 16 → 16, experts whole"]


def test_counted_flops_of_a_block_are_the_formula() -> None:
    block = drawn(MixtureFFN.of(FINE, 16, 48, False))
    block.mlp_in.plan = block.mlp_out.plan = "grouping=experts materialised"
    with FlopCounterMode(display=False) as counter:
        block(torch.randn(11, 16))
    assert counter.get_total_flops() == 11 * (
        block.mlp_in.structure.flops + block.mlp_out.structure.flops
    )


def test_hidden_dimensions_are_rounded_and_at_least_one() -> None:
    first, second = ffn_structures(parse_mixture("ffn-moe:granularity=3"), 8, 32)
    assert (first.d_out, second.d_in) == (11, 11)
    with pytest.raises(InvalidInput, match=r"granularity: got 33; accepted: at most .*, 32"):
        ffn_structures(parse_mixture("ffn-moe:granularity=33"), 8, 32)
    with pytest.raises(InvalidInput, match="granularity: got 2; accepted: 1: E and θρ"):
        Mixture(DENSE, 4, 2, granularity=2)


def test_layers_of_other_shared_experts_make_no_block() -> None:
    one = MixtureFFN.of("ffn-moe:experts=4,active=2", 8, 8)
    other = MixtureFFN.of("ffn-moe:experts=4,active=2,shared=1", 8, 8)
    with pytest.raises(InvalidInput, match="E, k and S"):
        MixtureFFN(one.mlp_in, other.mlp_out)
    with pytest.raises(RuntimeError, match="1shared"):
        one.load_state_dict(other.state_dict())


# --- plans and modes of torch -------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_no_plan_pads_experts_to_the_load_of_shared_ones(device: str, dtype: torch.dtype) -> None:
    for text in ("btt-moe:experts=8,active=3,shared=1", "dense-moe:experts=16,active=8,shared=2"):
        for width in (16, 64, 256, 1024):
            structure = MixtureStructure.of(parse_mixture(text), width, width)
            for tokens in (1, 64, 4096):
                plan = choose_mixture_plan(structure, tokens, device, dtype)
                assert plan.grouping != "batched"
    layer = MixtureLinear(text, 64, 64, device="meta")
    own = choose_mixture_plan(layer.structure, 64, "meta", torch.float32)
    assert layer.plan_for(64) == own


def compiled_alike(block: nn.Module, x: Tensor, error: float, **how: Any) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, **how)
    found = []
    for call in (block, compiled):
        y = call(x)
        own = auxiliary_loss(block)
        assert own is not None
        loss = y.square().mean() + own
        found.append([y, own, *torch.autograd.grad(loss, list(block.parameters()))])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=error, atol=error)


@FULL
def test_a_compiled_block() -> None:
    torch.manual_seed(0)
    block = drawn(MixtureFFN.of(FINE, 6, 12, dtype=torch.float64))
    compiled_alike(block, torch.randn(2, 5, 6).double(), 1e-9, backend="aot_eager")


@FULL
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own, when it is imported
def test_a_block_compiled_by_inductor() -> None:
    torch.manual_seed(0)
    compiled_alike(MixtureFFN.of(FINE, 16, 48), torch.randn(40, 16), 1e-3)


def test_autocast() -> None:
    torch.manual_seed(0)
    block = MixtureFFN.of(FINE, 16, 48)
    nn.init.normal_(block.mlp_in.gate)  # type: ignore[arg-type]
    x = torch.randn(12, 16)
    full = block(x)
    with torch.autocast("cpu", torch.bfloat16):
        half = block(x)
    assert half.dtype == torch.bfloat16
    assert (half.float() - full).norm() <= 0.03 * full.norm()
