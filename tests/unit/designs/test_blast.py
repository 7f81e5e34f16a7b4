from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.utils.flop_counter import FlopCounterMode

from nas.designs.blast import Blast, BlastStructure, inspect_blast, parse_blast
from nas.designs.design import parse_design, proposals
from nas.designs.theta import DENSE
from nas.errors import InvalidInput
from nas.layers import param_groups
from nas.layers.blast import BlastLinear
from nas.planning import runs
from nas.planning.cost import structures_of
from nas.planning.recipe import REGRESSION, TEXT

dimensions = st.integers(1, 40)
exponents = st.sampled_from([0.0, 0.25, 0.5, 0.8, 1.0])
SHAPES = [(12, 12), (12, 30), (30, 12), (25, 25), (7, 11), (1, 5), (5, 1), (1, 1)]


def assembled(layer: BlastLinear) -> Tensor:
    """W from its definition, block by block: U_i diag(s_ij) V_jᵀ."""
    s = layer.structure
    v, mix, u = (f.detach() for f in layer.effective_factors())
    blocks = [
        torch.cat([u[i] @ torch.diag(mix[:, i, j]) @ v[j] for j in range(s.columns)], dim=1)
        for i in range(s.rows)
    ]
    return torch.cat(blocks)[: s.d_out, : s.d_in]


def layer_of(blocks: float, rho: float, d_in: int, d_out: int, **options: Any) -> BlastLinear:
    return BlastLinear(Blast(blocks, rho), d_in, d_out, dtype=torch.float64, **options)


@settings(max_examples=60, deadline=None)
@given(exponents, exponents, dimensions, dimensions, st.integers(0, 4))
def test_forward_is_the_product_with_the_assembled_blocks(
    blocks: float, rho: float, d_in: int, d_out: int, n: int
) -> None:
    layer = layer_of(blocks, rho, d_in, d_out)
    bias = torch.nn.init.normal_(layer.get_parameter("bias")).detach()
    x = torch.randn(n, d_in, dtype=torch.float64)
    expected = assembled(layer)
    torch.testing.assert_close(layer.to_matrix(), expected)
    torch.testing.assert_close(layer(x), x @ expected.T + bias)
    assert layer(x).shape == (n, d_out)


@settings(max_examples=30, deadline=None)
@given(exponents, exponents, dimensions, dimensions)
def test_matrices_of_stacked_layers_are_those_of_each(
    blocks: float, rho: float, d_in: int, d_out: int
) -> None:
    layers = [layer_of(blocks, rho, d_in, d_out) for _ in range(3)]
    stacked = [
        torch.stack(f) for f in zip(*(each.effective_factors() for each in layers), strict=True)
    ]
    found = layers[0].matrices(stacked)
    torch.testing.assert_close(found, torch.stack([assembled(each) for each in layers]))


@settings(max_examples=100, deadline=None)
@given(st.floats(0, 1), st.floats(0, 1), dimensions, dimensions)
def test_integers(blocks: float, rho: float, d_in: int, d_out: int) -> None:
    s = BlastStructure.of(Blast(blocks, rho), d_in, d_out)
    narrow = min(d_in, d_out)
    # less than a block is padding
    assert 0 <= s.padded_in - d_in < s.block_in
    assert 0 <= s.padded_out - d_out < s.block_out
    target = narrow**blocks
    for count in (s.rows, s.columns):
        assert 1 <= count <= max(math.ceil(target), 4 / 3 * target)
    assert s.rho == round(narrow**rho)
    layer = BlastLinear(s, d_in, d_out, bias=False)
    assert s.params == sum(p.numel() for p in layer.parameters())
    # V_jᵀ x_j of each column, s_ij ∘ v_j of each block, U_i w_i of each row
    per_place = s.columns * s.block_in + s.rows * s.columns + s.rows * s.block_out
    assert s.macs == s.rho * per_place
    useful = s.rho * (d_in + d_out + s.rows * s.columns)
    assert s.waste == pytest.approx((s.macs - useful) / useful)
    assert s.is_degenerate == (s.macs > d_in * d_out)
    assert not s.is_dense


@settings(max_examples=60, deadline=None)
@given(exponents, exponents, dimensions, dimensions)
def test_the_rank_is_that_of_random_factors(
    blocks: float, rho: float, d_in: int, d_out: int
) -> None:
    torch.manual_seed(0)
    layer = layer_of(blocks, rho, d_in, d_out)
    assert torch.linalg.matrix_rank(layer.to_matrix()) == layer.structure.rank


def test_the_rank_in_closed_form() -> None:
    # b·r where that is less than every other bound, all where a block's side is at most r
    assert BlastStructure.of(Blast(0.25, 0.25), 256, 512).rank == 4 * 4
    assert BlastStructure.of(Blast(0.5, 0.5), 256, 512).rank == 256
    # 13 = 5 + 5 + 3: the last block is smaller, and of rank 3 though r = 4
    s = BlastStructure.of(Blast(0.5, 0.5), 13, 13)
    assert (s.rows, s.columns, s.block_in, s.rho) == (3, 3, 5, 4)
    assert s.rank == 4 + 4 + 3


@settings(max_examples=30, deadline=None)
@given(exponents, dimensions, dimensions)
def test_one_block_is_low_rank_with_a_diagonal(rho: float, d_in: int, d_out: int) -> None:
    layer = layer_of(0.0, rho, d_in, d_out)
    s = layer.structure
    assert (s.rows, s.columns, s.waste) == (1, 1, 0)
    assert s.macs == s.rho * (d_in + d_out + 1)
    assert s.rank == s.rho  # which is at most both dimensions
    expected = (layer.U[0] * layer.S[:, 0, 0]) @ layer.V[0]
    torch.testing.assert_close(layer.to_matrix(), expected)


@pytest.mark.parametrize("d", [1, 2, 5, 16])
def test_blocks_of_one_number(d: int) -> None:
    """W[i, j] = Σ_k u_ik s_ijk v_jk: any matrix, for one k already."""
    for rho, r in ((0.0, 1), (1.0, d)):
        layer = layer_of(1.0, rho, d, d)
        s = layer.structure
        assert (s.rows, s.columns, s.block_in, s.block_out, s.rho) == (d, d, 1, 1, r)
        assert (s.macs, s.rank, s.is_degenerate) == (r * (2 * d + d * d), d, True)
        expected = torch.einsum("ik,kij,jk->ij", layer.U[:, 0], layer.S, layer.V[:, :, 0])
        torch.testing.assert_close(layer.to_matrix(), expected)


def test_block_diagonal_matrices_are_among_them() -> None:
    layer = layer_of(0.5, 0.5, 16, 16, bias=False)
    with torch.no_grad():
        layer.U.copy_(torch.eye(4, dtype=torch.float64).expand(4, 4, 4))
        layer.S.copy_(torch.eye(4, dtype=torch.float64).expand(4, 4, 4))
    blocks = torch.block_diag(*layer.V)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(layer.to_matrix(), blocks)


def test_a_worked_example() -> None:
    s = BlastStructure.of(Blast(0.25, 0.5), 768, 3072)
    # 768^(1/4) = 5.26, and of 4 to 7 only 4 and 6 divide both, of which 6 is nearer
    assert (s.rows, s.columns, s.block_out, s.block_in, s.rho) == (6, 6, 512, 128, 28)
    assert (s.macs, s.flops) == (28 * (768 + 3072 + 36), 56 * (768 + 3072 + 36))
    assert s.fingerprint == "768x3072:blast:512.128.28"
    assert [s.fans(f) for f in s.factors] == [(128, 28), (6, 6), (28, 512)]
    assert s.init_std("V") == math.sqrt(28) / 128
    assert s.init_std("S") == math.sqrt(6) / 6
    assert s.adam_lr_multiplier("U", 64) == 64 / (3 * 28)
    with pytest.raises(InvalidInput, match=r"factor: got A; accepted: V \| S \| U"):
        s.fans("A")


def test_huge_layers_are_sized_at_once() -> None:
    for blocks in (0.5, 0.9, 1.0):
        s = BlastStructure.of(Blast(blocks, 0.0), (1 << 24) - 3, 1 << 24)
        assert s.columns <= s.d_in
        assert s.padded_in - s.d_in < s.block_in


@settings(max_examples=60, deadline=None)
@given(exponents, exponents, dimensions, dimensions, exponents, exponents)
def test_fingerprints_are_equal_for_equal_operators_only(
    blocks: float, rho: float, d_in: int, d_out: int, other_blocks: float, other_rho: float
) -> None:
    one = BlastStructure.of(Blast(blocks, rho), d_in, d_out)
    other = BlastStructure.of(Blast(other_blocks, other_rho), d_in, d_out)
    assert (one.fingerprint == other.fingerprint) == (one.shapes == other.shapes)


@pytest.mark.parametrize("tokens", [1, 50])
@pytest.mark.parametrize("shape", SHAPES)
def test_flops_that_are_run_are_those_of_the_structure(tokens: int, shape: tuple[int, int]) -> None:
    layer = BlastLinear("blast", *shape)
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(tokens, shape[0]))
    assert counter.get_total_flops() == layer.structure.flops * tokens


@given(st.floats(0, 1), st.floats(0, 1))
def test_texts_are_read_back(blocks: float, rho: float) -> None:
    blast = Blast(blocks, rho)
    assert parse_blast(blast.text) == parse_design(blast.text) == blast
    assert blast.canonical() == blast
    named = parse_blast(blast.name)
    assert (named.blocks, named.rho) == pytest.approx((blocks, rho), abs=1e-4)


def test_exponents_that_are_not_given_are_a_half() -> None:
    assert parse_blast("blast") == Blast(0.5, 0.5)
    assert parse_blast(" blast:rho=1/4 ") == Blast(0.5, 0.25)
    assert parse_blast("blast:blocks=1/3") == Blast(1 / 3, 0.5)
    assert Blast(1e-12, 0.5) == Blast(0.0, 0.5)
    assert (Blast().family, Blast().kind, Blast().exponents) == ("blast", "blast", ())
    assert Blast().name == "blast:blocks=1/2,rho=1/2"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("blasts", r"blast: got blasts; accepted: blast or blast:blocks=1/4,rho=1/2"),
        ("blast:size=3", r"blast: got blast:size=3; accepted: blast takes blocks=, rho= each once"),
        ("blast:rho=1/2,rho=1/2", r"accepted: blast takes blocks=, rho= each once"),
        ("blast:blocks=2", r"blast.blocks: got 2.0; accepted: a number from 0 to 1"),
        ("blast:rho=", r"blast.rho: got ; accepted: a decimal or a fraction"),
        (7, r"blast: got 7; accepted"),
    ],
)
def test_texts_that_say_no_blast_are_named(text: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        parse_blast(text)


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), True, "1/2", None])
def test_exponents_off_their_range_are_named(value: Any) -> None:
    with pytest.raises(InvalidInput, match=r"blast.blocks: got .*a number from 0 to 1"):
        Blast(value, 0.5)
    with pytest.raises(InvalidInput, match=r"blast.rho: got .*a number from 0 to 1"):
        Blast(0.5, value)


def test_what_no_layer_can_be_built_from_is_named() -> None:
    with pytest.raises(InvalidInput, match=r"d_out: got 0; accepted: a whole number from 1"):
        BlastStructure.of(Blast(), 8, 0)
    with pytest.raises(InvalidInput, match=r"plan: got bmm; accepted: None or batched"):
        BlastLinear("blast", 8, 8, plan="bmm")
    with pytest.raises(InvalidInput, match=r"blast: got 0.5; accepted: a Blast"):
        BlastLinear(0.5, 8, 8)  # type: ignore[arg-type]
    structure = BlastStructure.of(Blast(), 8, 9)
    with pytest.raises(InvalidInput, match=r"d_in, d_out: got 8, 8; accepted: 8, 9"):
        BlastLinear(structure, 8, 8)
    assert BlastLinear(structure, 8, 9, plan="batched").plan_for(3) == "batched"


def test_inspection_is_plain() -> None:
    found = inspect_blast(Blast(0.5, 0.5), 97, 200)
    assert json.loads(json.dumps(found)) == found
    assert (found["rows"], found["columns"], found["rho"], found["rank"]) == (10, 10, 10, 97)
    assert (found["padded_in"], found["padded_out"], found["degenerate"]) == (100, 200, False)
    assert found["waste"] == pytest.approx(3 / (97 + 200 + 100))


@settings(max_examples=40, deadline=None)
@given(st.floats(0, 1), st.floats(0, 1), st.sampled_from([16, 48, 96]))
def test_what_is_fitted_costs_at_most_dense(blocks: float, rho: float, width: int) -> None:
    blast = Blast(blocks, rho)
    for recipe in (TEXT, REGRESSION):
        fitted = runs.fit(recipe, blast, width)
        found = structures_of(recipe, fitted, width)
        assert not any(s.is_degenerate for s in found)
        if not any(s.is_degenerate for s in structures_of(recipe, blast, width)):
            assert fitted == blast
        elif isinstance(fitted, Blast) and fitted.blocks == blast.blocks:
            # one more on the rank axis would be too dear for one of the layers
            assert any(
                isinstance(s, BlastStructure) and s.macs // s.rho * (s.rho + 1) > s.d_in * s.d_out
                for s in found
            )


def test_what_no_rank_makes_cheap_gets_fewer_blocks_or_is_dense() -> None:
    fitted = runs.fit(TEXT, Blast(1.0, 0.5), 64)
    assert isinstance(fitted, Blast)
    assert fitted.blocks < 1
    assert runs.fit(TEXT, Blast(0.0, 0.0), 2) == DENSE


@given(st.floats(0, 1), st.floats(0, 1))
def test_proposals_cost_no_more_than_dense_in_exponents(blocks: float, share: float) -> None:
    proposed = proposals()["blast"].design({"blast_blocks": blocks, "blast_rho_share": share})
    assert isinstance(proposed, Blast)
    assert proposed.rho + max(1, 2 * proposed.blocks) <= 2 + 1e-9
    assert proposed == Blast(blocks, share * min(1, 2 - 2 * blocks))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_against_finite_differences(shape: tuple[int, int], normalize: bool) -> None:
    layer = layer_of(0.5, 0.5, *shape, normalize=normalize, gain=True)
    with torch.no_grad():
        for factor in layer.factors().values():
            factor.mul_(1.5)  # past the cap, so that normalisation has a gradient
    x = torch.randn(2, 2, shape[0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *layer.parameters()))


def test_derivatives_of_gradients() -> None:
    layer = layer_of(0.5, 0.5, 7, 11)
    x = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x, *_: layer(x), (x, *layer.parameters()))


def test_function_transforms() -> None:
    layer = layer_of(0.5, 0.5, 8, 12)
    parameters: dict[str, Tensor] = dict(layer.named_parameters())
    x = torch.randn(5, 8, dtype=torch.float64)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        total: Tensor = functional_call(layer, parameters, (x,)).square().sum()
        return total

    each = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(5):
        for name, found in grad(loss)(parameters, x[i]).items():
            torch.testing.assert_close(each[name][i], found)


def test_compiles_as_one_graph_for_any_number_of_tokens() -> None:
    torch._dynamo.reset()
    layer = BlastLinear("blast", 36, 50, normalize=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (7, 300):
        x = torch.randn(tokens, 36)
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-4)


def test_autocast_computes_in_bfloat16_and_trains() -> None:
    layer = BlastLinear("blast", 32, 48)
    x = torch.randn(5, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    for factor in layer.factors().values():
        assert factor.grad is not None
        assert factor.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_tensors(layout: torch.layout) -> None:
    layer = BlastLinear("blast", 24, 30)
    parts = [torch.randn(n, 24) for n in (3, 5)]
    y = layer(torch.nested.nested_tensor(parts, layout=layout))
    for found, part in zip(y.unbind(), parts, strict=True):
        torch.testing.assert_close(found, layer(part))


def test_zero_init_is_the_zero_map_that_can_learn() -> None:
    layer = BlastLinear("blast", 24, 30, zero_init=True, normalize=True, gain=True)
    x = torch.randn(4, 24)
    assert torch.count_nonzero(layer(x)) == 0
    assert [n for n, f in layer.factors().items() if not f.count_nonzero()] == ["U"]
    layer(x).sum().backward()
    assert layer.U.grad is not None
    assert layer.U.grad.abs().max() > 0


def test_no_tokens_give_an_empty_output_and_zero_gradients() -> None:
    layer = BlastLinear("blast", 24, 30, normalize=True, gain=True)
    for shape in ((0, 24), (3, 0, 24)):
        y = layer(torch.zeros(shape, requires_grad=True))
        assert y.shape == (*shape[:-1], 30)
        y.sum().backward()
    for parameter in layer.parameters():
        assert parameter.grad is not None
        assert torch.count_nonzero(parameter.grad) == 0


def test_a_wrong_input_is_named() -> None:
    layer = BlastLinear("blast", 8, 8)
    with pytest.raises(ValueError, match=r"got an input of shape \(2, 9\).*must be 8"):
        layer(torch.zeros(2, 9))
    for dtype in (torch.int64, torch.complex64, torch.float64, torch.bool):
        with pytest.raises(TypeError, match=rf"got an input of dtype {dtype}.*torch.float32"):
            layer(torch.zeros(2, 8, dtype=dtype))


def test_initialisation_and_learning_rates() -> None:
    torch.manual_seed(0)
    layer = BlastLinear("blast", 1024, 1024, d_in_base=64)
    rates = {id(p): g["lr"] for g in param_groups(layer, 0.1) for p in g["params"]}
    for factor in layer.factors().values():  # of 32 inputs and 32 outputs each
        assert rates[id(factor)] == pytest.approx(0.1 * 64 / (3 * 32))
        std = factor.std().item()
        assert std == pytest.approx(1 / math.sqrt(32), rel=5 / math.sqrt(2 * factor.numel()))
    assert rates[id(layer.bias)] == 0.1


@pytest.mark.parametrize("blocks", [0.25, 0.5])
def test_random_layers_keep_their_norm_as_they_widen(blocks: float) -> None:
    """The spectral condition: the norm of W is of the order of √(d_out / d_in) = 1 at every width,
    which it is not with variances that ignore the structure."""
    torch.manual_seed(0)
    norms, blind = [], []
    for width in (64, 256, 1024):
        layer = BlastLinear(Blast(blocks, 1 - blocks), width, width, bias=False)
        norms.append(torch.linalg.matrix_norm(layer.to_matrix(), 2).item())
        with torch.no_grad():
            for factor in layer.factors().values():
                factor.normal_(0, width**-0.5)
        blind.append(torch.linalg.matrix_norm(layer.to_matrix(), 2).item())
    assert max(norms) < 2 * min(norms)
    assert max(blind) > 4 * min(blind)


def test_to_linear_computes_the_same() -> None:
    layer = layer_of(0.5, 0.5, 24, 60)
    x = torch.randn(2, 24, dtype=torch.float64)
    torch.testing.assert_close(layer.to_linear()(x), layer(x))


def test_state_dict_round_trip() -> None:
    one, other = (BlastLinear("blast", 18, 50) for _ in range(2))
    other.load_state_dict(one.state_dict())
    x = torch.randn(3, 18)
    assert torch.equal(one(x), other(x))
    assert set(one.state_dict()) == {"V", "S", "U", "bias", "_extra_state"}
