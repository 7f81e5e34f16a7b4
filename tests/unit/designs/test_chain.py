from __future__ import annotations

import json
import math
from collections.abc import Iterator
from itertools import combinations, permutations
from typing import Any

import opt_einsum
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from nas.designs.axes import cover_axes
from nas.designs.chain import ChainTheta, intervals, parse_chain
from nas.designs.chain_structure import ChainStructure, Path, inspect_chain
from nas.designs.einsum import Structure
from nas.designs.taxonomy import parse_theta
from nas.designs.theta import Theta
from nas.errors import InvalidInput
from nas.layers import EinsumLinear, param_groups
from nas.layers.chain import ChainLinear
from tests.support.strategies import thetas
from tests.support.tiers import only

dimensions = st.integers(1, 40)
#: Every axis of a three-factor chain is there.
FULL = ",".join(["1/6"] * 12 + ["1/8"] * 2)
#: Axes of each factor alone and of all three.
MIXED = "1/4,1/4,1/4,0,0,1/4,1/4,1/4,1/4,0,0,1/4,1/8,1/8"
NAMES = ["tensor-train:cores=3,rho=1/4", "btt:cores=3,rho=1/4", "btt:cores=4,rho=1/8", FULL, MIXED]


def _shares(count: int) -> st.SearchStrategy[list[float]]:
    weights = st.lists(st.sampled_from([0, 0, 1, 1, 2, 3]), min_size=count, max_size=count)
    return weights.filter(any).map(lambda w: [v / sum(w) for v in w])


two_to_four = st.integers(2, 4)


@st.composite
def chains(draw: st.DrawFn, factors: st.SearchStrategy[int] = two_to_four) -> ChainTheta:
    n = draw(factors)
    count = len(intervals(n))
    bonds = st.lists(st.sampled_from([0, 0.1, 0.25, 0.5]), min_size=n - 1, max_size=n - 1)
    return ChainTheta((*draw(_shares(count)), *draw(_shares(count)), *draw(bonds)))


three = chains(st.just(3))


def by_definition(layer: ChainLinear, x: Tensor) -> Tensor:
    """The whole einsum at once, from the equation and the stored factors alone."""
    s = layer.structure
    padded = torch.zeros(len(x), s.padded_in, dtype=x.dtype)
    padded[:, : s.d_in] = x
    cube = padded.reshape(len(x), *(a.size for a in s.input_axes))
    y: Tensor = opt_einsum.contract(s.einsum, *layer.factors().values(), cube)
    return y.reshape(len(x), s.padded_out)[:, : s.d_out]


def _best(s: ChainStructure, tokens: int) -> tuple[Path, Any]:
    shapes = [*s.shapes, (tokens, *(a.size for a in s.input_axes))]
    found: tuple[Path, Any] = opt_einsum.contract_path(
        s.einsum.replace("...", "Z"), *shapes, shapes=True, optimize="optimal"
    )
    return found


def opt_einsum_cost(s: ChainStructure, tokens: int) -> int:
    return int(_best(s, tokens)[1].opt_cost)


def opt_einsum_path(s: ChainStructure, tokens: int) -> Path:
    return tuple((min(pair), max(pair)) for pair in _best(s, tokens)[0])


def layer_of(theta: Any, d_in: int, d_out: int, **options: Any) -> ChainLinear:
    return ChainLinear(theta, d_in, d_out, dtype=torch.float64, **options)


# the exponents


@given(chains(st.integers(2, 5)))
def test_texts_and_names_are_read_back(theta: ChainTheta) -> None:
    assert ChainTheta.parse(theta.text) == theta
    assert ChainTheta.of(list(theta.values)) == theta
    assert theta.reversed().reversed() == theta
    found = theta.canonical()
    again = parse_chain(theta.text).canonical()
    assert again == found == found.canonical()
    # sums of absorbed axes may differ in their last bit
    assert theta.reversed().canonical().values == pytest.approx(found.values, abs=1e-12)
    if ":" in theta.name and isinstance(found, ChainTheta):
        named = parse_chain(theta.name).canonical()
        assert named.values == pytest.approx(found.values, abs=1e-4)


def test_tiny_exponents_survive_the_text() -> None:
    theta = ChainTheta((1 - 1e-5, 1e-5, 0, 0.1 + 0.2, 0.7, 0, 1 / 3))
    assert "e" not in theta.text
    assert ChainTheta.parse(theta.text) == theta


def test_vanishing_exponents_are_zero_and_sums_have_a_tolerance() -> None:
    theta = ChainTheta((1, 1e-12, 0, 0.33, 0.66, 0, 1e-10))
    assert theta.values[1] == theta.values[-1] == 0


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("tensor-train:cores=3,rho=1/4",
         [*[1 / 3] * 3, *[0] * 3, *[1 / 3] * 3, *[0] * 3, *[0.25] * 2]),
        ("btt:cores=3,rho=1/8",
         [1 / 3, 0, 0, 1 / 3, 0, 1 / 3, 0, 0, 1 / 3, 0, 1 / 3, 1 / 3, 0.125, 0.125]),
        ("btt:cores=3,inputs=1/2+1/4+1/4,rho=1/8+1/4",
         [1 / 2, 0, 0, 1 / 4, 0, 1 / 4, 0, 0, 1 / 3, 0, 1 / 3, 1 / 3, 0.125, 0.25]),
    ],
)  # fmt: skip
def test_families_are_what_their_names_say(text: str, values: list[float]) -> None:
    theta = parse_chain(text)
    assert isinstance(theta, ChainTheta)
    assert theta.values == pytest.approx(values)
    assert theta.name == theta.reversed().name == text


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("tensor-train:cores=2,rho=1/4", "tensor-train:rho=1/4"),
        ("btt:cores=2,rho=1/8", "btt:rho=1/8"),
        ("1/2,0,1/2,0,1/2,1/2,0", "monarch"),
        ("kronecker", "kronecker"),
    ],
)
def test_two_cores_are_a_theta(text: str, same: str) -> None:
    assert parse_chain(text) == parse_theta(same)


def test_a_chain_without_a_name_is_called_by_its_numbers() -> None:
    assert parse_chain(FULL).described.startswith("einsum3 0.167,0.167,")
    assert parse_chain(FULL).name == "einsum3"


def test_equal_axes_are_arranged_for_the_least_cost() -> None:
    """1024 is 8·8·16: with the 16 on an axis that all factors share it would cost 2.7 times it."""
    s = ChainStructure.of(parse_chain("btt:cores=3,rho=1/8"), 1024, 1024)
    assert {a.name: a.size for a in s.axes if a.size == 16} == {"in_1": 16, "out_3": 16}
    assert s.macs == 3 * 16 * 1024
    shared = list(s.sizes)
    for one, other in ((0, 5), (8, 11)):  # in_1 and in_123, out_3 and out_123
        shared[one], shared[other] = shared[other], shared[one]
    assert ChainStructure(s.theta, 1024, 1024, tuple(shared)).macs == 8 * 16 * 1024


def test_idle_end_factors_are_absorbed() -> None:
    # F1 has no axis of its own: in_12 is F2's alone once it is gone, in_123 what in_23 is
    theta = ChainTheta.parse("0,1/4,1/4,0,1/4,1/4,0,1/4,1/4,1/4,1/4,0,1/2,1/8")
    assert theta.canonical() == Theta(0.25, 0.25, 0.5, 0.5, 0.25, 0.25, 0.125).canonical()
    assert theta.reversed().canonical() == theta.canonical()
    # of four, first F4 and then what is left of F3
    values = [0.5, 0.5, 0, 0, *[0] * 6, 0.5, 0.5, 0, 0, *[0] * 6, 0.25, 0.25, 0.25]
    assert ChainTheta(tuple(values)).canonical() == parse_theta("tensor-train:rho=1/4")
    dense = ChainTheta.parse("0,0,0,0,0,1,0,0,0,0,0,1,0,0")
    assert dense.canonical() == parse_theta("dense")
    assert dense.name == "dense"


@settings(max_examples=30, deadline=None)
@given(three, st.integers(2, 12), st.integers(2, 12))
def test_absorption_loses_no_operator_and_costs_no_more(
    theta: ChainTheta, d_in: int, d_out: int
) -> None:
    s = ChainStructure.of(theta, d_in, d_out)
    assert (s.n_factors == 1) == s.is_dense
    if s.is_dense:
        assert (s.macs, s.params, s.rank) == (d_in * d_out, d_in * d_out, min(d_in, d_out))
        assert s.fingerprint == Structure.of(parse_theta("dense"), d_in, d_out).fingerprint
        assert s.adam_lr_multiplier("F1") == 1
    else:
        for end, axis in ((0, "1"), (-1, str(s.n_factors))):
            own = [a.size for a in s.factor_axes[end] if a.name in (f"in_{axis}", f"out_{axis}")]
            assert max(own) > 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0.5, 0.5), r"theta: got \[0.5, 0.5\]; accepted: .*7, 14, 23 or 34.*got 2 numbers"),
        ([0.1] * 14, r"theta: got in_1=0.1, .*sum 0.6\); accepted: in_1 \+ in_2 .* = 1 within"),
        ([0.0] * 14, r"theta: got in_\* all 0 \(sum 0\)"),
        ([2, *[0] * 13], r"theta.in_1: got 2; accepted: a number from 0 to 1"),
        ([1, *[0] * 5, 1, *[0] * 6, -0.5], r"theta.bond_2: got -0.5; accepted: a number from 0"),
        ([True, *[0] * 13], r"theta.in_1: got True"),
        ([1, *[0] * 5, float("nan"), *[0] * 7], r"theta.out_1: got nan"),
        (3, r"theta: got 3; accepted: tensor-train:cores=3"),
        ("1,2", r"theta: got 1,2"),
    ],
)  # fmt: skip
def test_exponents_off_the_space_are_named(values: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        ChainTheta.of(values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("btt:cores=1", r"theta.cores: got 1; accepted: a whole number from 2 to 5"),
        ("btt:cores=9,rho=1/4", r"theta.cores: got 9; accepted: a whole number from 2 to 5"),
        ("btt:cores=three", r"theta.cores: got three"),
        ("monarch:cores=3", r"theta: got monarch:cores=3; accepted: tensor-train:cores=3"),
        ("btt:cores=3,alpha=1", r"theta: got .*; accepted: btt takes cores=, inputs="),
        ("btt:cores=3,rho=2", r"theta.bond_1: got 2.0; accepted: a number from 0 to 1"),
        ("btt:cores=3,rho=x", r"theta.rho: got x; accepted: a decimal or a fraction"),
        ("btt:cores=3,inputs=1/2+1/2", r"theta.inputs: got 1/2\+1/2; accepted: 3 exponents joined"),
        ("btt:cores=3,inputs=1/2+1/2+1/2", r"theta: got in_1=0.5, .*sum 1.5"),
        ("1,0,0,1", r"theta: got 1,0,0,1; accepted: .*got 4 parts"),
        ("butterfly", r"theta: got butterfly; accepted: tensor-train:cores=3"),
        ("1," * 2000, r"theta: got 1,1"),
    ],
)
def test_texts_that_say_no_chain_are_named(text: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        parse_chain(text)


# the integers


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_axes_cover_their_dimension_with_little_waste(data: st.DataObject) -> None:
    dimension = data.draw(st.integers(1, 20_000))
    exponents = data.draw(_shares(data.draw(st.sampled_from([4, 6, 10, 15]))))
    sizes = cover_axes(dimension, tuple(exponents))
    assert dimension <= math.prod(sizes) <= 2 * dimension
    assert all(n == 1 for n, e in zip(sizes, exponents, strict=True) if e == 0)


@pytest.mark.parametrize("factors", [3, 4, 5])
@pytest.mark.parametrize("power", [6, 8, 10, 12, 13])
def test_powers_of_two_are_not_padded(factors: int, power: int) -> None:
    for family in ("tensor-train", "btt"):
        s = ChainStructure.of(parse_chain(f"{family}:cores={factors}"), 2**power, 2**power)
        assert (s.padded_in, s.padded_out, s.waste) == (2**power, 2**power, 0)


@settings(max_examples=150, deadline=None)
@given(thetas(), dimensions, dimensions)
def test_two_factors_have_the_integers_of_a_structure(theta: Theta, d_in: int, d_out: int) -> None:
    old = Structure.of(theta, d_in, d_out)
    new = ChainStructure.of(ChainTheta.of(theta.values), d_in, d_out)
    if old.is_dense:
        assert new.is_dense
        return
    o = old.sizes
    assert new.sizes == (o.alpha, o.beta, o.gamma, o.delta, o.epsilon, o.phi, o.rho)
    assert (new.padded_in, new.padded_out) == (old.padded_in, old.padded_out)
    assert (new.params, new.rank, new.chain_macs) == (old.params, old.rank, old.macs)
    assert new.waste == pytest.approx(old.waste)
    assert new.fingerprint != old.fingerprint
    if not old.is_degenerate:
        assert (new.macs, new.flops) == (old.macs, old.flops)
    for one, other in (("A", "F1"), ("B", "F2")):
        assert new.fans(other) == old.fans(one)
        assert new.init_std(other) == old.init_std(one)
        for base in (None, 7):
            assert new.adam_lr_multiplier(other, base) == old.adam_lr_multiplier(one, base)


def sequential_macs(s: ChainStructure, order: tuple[int, ...]) -> int:
    """MACs of x through the factors in this order, counted index by index."""
    factors = [{a.letter: a.size for a in axes} for axes in s.factor_axes]
    current = {a.letter: a.size for a in s.input_axes}
    outputs = {a.letter for a in s.output_axes}
    total = 0
    for place, k in enumerate(order):
        current |= factors[k]
        total += math.prod(current.values())
        later = outputs.union(*(factors[j] for j in order[place + 1 :]))
        current = {letter: n for letter, n in current.items() if letter in later}
    return total


def multiplies_strangers(s: ChainStructure, path: Path) -> bool:
    """Whether a product sums no index, which only factors that are no neighbours have."""
    for step in s.contraction(path):
        inputs, output = step.replace("...", "").split("->")
        if set(inputs) - {","} == set(output):
            return True
    return False


@settings(max_examples=80, deadline=None)
@given(chains(st.integers(2, 4)), st.integers(2, 300), st.integers(2, 300))
def test_cost_is_that_of_the_best_path(theta: ChainTheta, d_in: int, d_out: int) -> None:
    s = ChainStructure.of(theta, d_in, d_out)
    n = s.n_factors
    orders = {order: sequential_macs(s, order) for order in permutations(range(n))}
    assert s.chain_macs == orders[tuple(range(n))] <= orders[tuple(range(n))[::-1]]
    for tokens in (1, 64):
        path = s.path_for(tokens)
        cost = s.macs_along(path, tokens)
        assert cost == min(s.macs_along(p, tokens) for p in every_path(n + 1))
        assert cost <= tokens * s.macs <= tokens * min(orders.values())
        charged = opt_einsum_cost(s, tokens)
        if n == 2 or not multiplies_strangers(s, opt_einsum_path(s, tokens)):
            assert 2 * cost == charged
        else:  # it charges half for what sums no index
            assert charged <= 2 * cost <= 2 * charged


def every_path(operands: int) -> Iterator[Path]:
    """Every order of pairwise products."""
    if operands == 1:
        yield ()
        return
    for pair in combinations(range(operands), 2):
        for rest in every_path(operands - 1):
            yield (pair, *rest)


@pytest.mark.parametrize("name", NAMES[:3])
@pytest.mark.parametrize("shape", [(64, 64), (100, 300), (768, 192)])
def test_named_families_cost_what_opt_einsum_says_and_pass_x_through_the_chain(
    name: str, shape: tuple[int, int]
) -> None:
    s = ChainStructure.of(parse_chain(name), *shape)
    assert 2 * s.macs == s.flops == opt_einsum_cost(s, 1)
    assert s.path == s.chain_path
    assert s.macs == s.chain_macs == min(
        sequential_macs(s, order) for order in permutations(range(s.n_factors))
    )  # fmt: skip


def test_worked_example() -> None:
    # BTT of three cores at 512: each is 64 blocks that map 8 (times bond) to 8 (times bond)
    s = ChainStructure.of(parse_chain("btt:cores=3,rho=1/9"), 512, 512)
    assert {a.name: a.size for a in s.axes if a.size > 1} == {
        "in_1": 8, "in_12": 8, "in_123": 8, "out_3": 8, "out_23": 8, "out_123": 8,
        "bond_1": 2, "bond_2": 2,
    }  # fmt: skip
    assert s.macs == s.params == 64 * (8 * 16 + 16 * 16 + 16 * 8)
    assert [s.fans(f) for f in s.factors] == [(8, 16), (16, 16), (16, 8)]
    assert s.adam_lr_multiplier("F2", 64) == 64 / (3 * 16)
    with pytest.raises(InvalidInput, match=r"factor: got A; accepted: F1 \| F2 \| F3"):
        s.fans("A")


@settings(max_examples=60, deadline=None)
@given(chains(st.integers(2, 4)), st.integers(2, 48), st.integers(2, 48))
def test_rank_is_bounded_by_the_narrowest_cut(theta: ChainTheta, d_in: int, d_out: int) -> None:
    s = ChainStructure.of(theta, d_in, d_out)
    assert s.numeric_rank() <= s.rank <= min(d_in, d_out)


@pytest.mark.parametrize("rho", ["0", "1/8", "1/4"])
@pytest.mark.parametrize("shape", [(64, 64), (27, 125), (60, 90), (216, 64)])
def test_rank_of_named_families_is_the_bound(rho: str, shape: tuple[int, int]) -> None:
    for family in ("btt", "tensor-train"):
        s = ChainStructure.of(parse_chain(f"{family}:cores=3,rho={rho}"), *shape)
        assert s.numeric_rank() == s.numeric_rank(seed=1) == s.rank
    # a narrow middle bond
    narrow = "1,0,0,0,0,0,0,0,1,0,0,0,1/4,1/2"
    s = ChainStructure.of(parse_chain(narrow), *shape)
    assert s.numeric_rank() == s.rank == round(min(shape) ** 0.25)


@given(three, dimensions, dimensions)
@settings(max_examples=40, deadline=None)
def test_equal_operators_have_equal_fingerprints(theta: ChainTheta, d_in: int, d_out: int) -> None:
    s = ChainStructure.of(theta, d_in, d_out)
    assert s == ChainStructure.of(theta.reversed(), d_in, d_out)
    assert s.fingerprint.startswith(f"{d_in}x{d_out}:")
    assert s.factors == tuple(f"F{k}" for k in range(1, s.n_factors + 1))


def test_inspection_is_plain_and_complete() -> None:
    theta = parse_chain("btt:cores=3,rho=1/8")
    found = inspect_chain(theta, 100, 200)
    assert json.loads(json.dumps(found)) == found
    s = ChainStructure.of(theta, 100, 200)
    assert found["rank"] == found["rank_bound"] == s.rank
    assert found["rank_is"] == "numeric"
    assert found["macs"] == s.macs
    assert found["flops"] == 2 * s.macs
    assert isinstance(found["contraction"], list)
    assert len(found["contraction"]) == 3
    assert isinstance(found["factors"], list)
    assert [f["name"] for f in found["factors"]] == ["F1", "F2", "F3"]
    assert inspect_chain(theta, 4096, 4096)["rank_is"] == "upper bound"


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((2,) * 3, r"sizes: got \[2, 2, 2\]; accepted: 2, 7, 14, 23, 34 sizes"),
        ((0,) * 14, r"sizes: got .*; accepted: whole numbers from 1"),
        ((2,) * 14, r"sizes: got input axes of product 64; accepted: .* cover d_in = 65"),
        ((3, *[2] * 13), r"sizes: got output axes of product 64; accepted: .* cover d_out = 65"),
    ],
)
def test_sizes_that_drop_inputs_are_refused(sizes: tuple[int, ...], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        ChainStructure(ChainTheta.parse(FULL), 65, 65, sizes)


@pytest.mark.parametrize("dimension", [0, -1, 2.0, True, 1 << 25])
def test_dimensions_out_of_range_are_named(dimension: Any) -> None:
    with pytest.raises(InvalidInput, match=r"d_in: got .*whole number from 1 to 16777216"):
        ChainStructure.of(ChainTheta.parse(FULL), dimension, 8)


# the layer


@settings(max_examples=120, deadline=None)
@given(chains(), dimensions, dimensions, st.integers(0, 5))
@example(ChainTheta.parse(FULL), 64, 64, 5)
def test_forward_is_the_einsum(theta: ChainTheta, d_in: int, d_out: int, n: int) -> None:
    layer = layer_of(theta, d_in, d_out, bias=False)
    x = torch.randn(n, d_in, dtype=torch.float64)
    y = layer(x)
    assert y.shape == (n, d_out)
    torch.testing.assert_close(y, by_definition(layer, x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(y, x @ layer.to_matrix().T, rtol=1e-10, atol=1e-10)
    assert sum(p.numel() for p in layer.parameters()) == layer.structure.params


@pytest.mark.parametrize("shape", [(64, 27), (40, 100)])
def test_every_path_computes_the_same(shape: tuple[int, int]) -> None:
    layer = layer_of(FULL, *shape)
    x = torch.randn(7, shape[0], dtype=torch.float64)
    expected = layer(x)
    for first in ("(0,1)", "(0,2)", "(1,2)", "(0,3)", "(3,1)", "(2,3)"):
        for second in ("(0,1)", "(0,2)", "(1,2)"):
            layer.plan = f"path {first} {second} (0,1)"
            torch.testing.assert_close(layer(x), expected)
    layer.plan = None
    assert layer.plan is None
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize(
    "plan", ["a-first", "path", "path (0,3)", "path (0,0) (0,1) (0,1)", "path (0,3) (0,3) (0,1)", 3]
)
def test_a_plan_that_is_no_path_is_named(plan: Any) -> None:
    with pytest.raises(InvalidInput, match=r"plan: got .*; accepted: None or 3 pairs of operands"):
        ChainLinear(FULL, 64, 64, plan=plan)


@settings(max_examples=60, deadline=None)
@given(thetas(), dimensions, dimensions)
def test_two_factors_are_an_einsum_linear(theta: Theta, d_in: int, d_out: int) -> None:
    old = EinsumLinear(theta, d_in, d_out, dtype=torch.float64)
    new = layer_of(theta.values, d_in, d_out)
    with torch.no_grad():
        for one, other in zip(old.parameters(), new.parameters(), strict=True):
            assert one.shape == other.shape
            other.copy_(one)
    x = torch.randn(3, d_in, dtype=torch.float64)
    torch.testing.assert_close(new(x), old(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(new.to_matrix(), old.to_matrix(), rtol=1e-12, atol=1e-12)


def test_tensor_train_is_the_product_of_its_cores() -> None:
    layer = layer_of("tensor-train:cores=3,rho=1/4", 27, 64, bias=False)
    s = layer.structure
    (a, b, c), (d, e, f) = s.sizes[:3], s.sizes[6:9]
    assert (a * b * c, d * e * f) == (27, 64)
    f1, f2, f3 = (t.squeeze() for t in layer.factors().values())  # (p,d,a), (p,b,q,e), (q,c,f)
    w = torch.einsum("pda,pbqe,qcf->fedcba", f1, f2, f3).reshape(64, 27)
    torch.testing.assert_close(layer.to_matrix(), w)


def test_block_tensor_train_is_a_product_of_permuted_blocks() -> None:
    layer = layer_of("btt:cores=3,rho=0", 64, 64, bias=False)
    f1, f2, f3 = (t.squeeze() for t in layer.factors().values())
    x = torch.randn(64, dtype=torch.float64)
    y = torch.empty(4, 4, 4, dtype=torch.float64)
    cube = x.view(4, 4, 4)  # in_123, in_12, in_1
    for first in range(4):  # out_123
        for second in range(4):  # out_23
            rows = [
                torch.stack([f1[c, b, first] @ cube[c, b] for b in range(4)])
                @ f2[c, first, :, second]
                for c in range(4)
            ]
            inner = torch.stack(rows)
            y[first, second] = inner @ f3[first, second]
    torch.testing.assert_close(layer(x), y.flatten())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [1, 16, 1000])
def test_flops_that_are_run_are_those_of_the_structure(name: str, tokens: int) -> None:
    for shape in ((64, 64), (60, 125)):
        layer = ChainLinear(name, *shape)
        s = layer.structure
        with FlopCounterMode(display=False) as counter:
            layer(torch.randn(tokens, shape[0]))
        path = s.path_for(tokens)
        assert counter.get_total_flops() == 2 * s.macs_along(path, tokens)
        assert counter.get_total_flops() <= s.flops * tokens
        layer.plan = layer.plan_for(1)
        if s.path == s.chain_path:
            with FlopCounterMode(display=False) as counter:
                layer(torch.randn(tokens, shape[0]))
            assert counter.get_total_flops() == s.flops * tokens


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(32, 48), (37, 53)])
def test_numeric_rank_is_that_of_a_layer(name: str, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer = layer_of(name, *shape)
    rank = int(torch.linalg.matrix_rank(layer.to_matrix()))
    assert rank == layer.structure.numeric_rank() <= layer.structure.rank


@pytest.mark.parametrize("name", NAMES)
def test_every_input_reaches_every_output_at_awkward_sizes(name: str) -> None:
    assert layer_of(name, 37, 53, bias=False).to_matrix().abs().min() > 0


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_against_finite_differences(name: str, normalize: bool) -> None:
    layer = layer_of(name, 9, 10, normalize=normalize, gain=True)
    with torch.no_grad():
        for factor in layer.factors().values():
            factor.mul_(1.5)  # past the cap, so that normalisation has a gradient
    x = torch.randn(2, 2, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *layer.parameters()))


def test_second_derivatives_and_checkpointing() -> None:
    layer = layer_of("btt:cores=3,rho=1/4", 8, 10)
    x = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(layer, x)
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    again = checkpoint(layer, x, use_reentrant=False)
    assert isinstance(again, Tensor)
    (found,) = torch.autograd.grad(again.square().sum(), x)
    torch.testing.assert_close(found, expected)


def test_function_transforms() -> None:
    layer = layer_of("btt:cores=3,rho=1/4", 8, 12, normalize=True)
    parameters: dict[str, Tensor] = dict(layer.named_parameters())
    x = torch.randn(5, 8, dtype=torch.float64)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        total: Tensor = functional_call(layer, parameters, (x,)).square().sum()
        return total

    each = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(5):
        for name, found in grad(loss)(parameters, x[i]).items():
            torch.testing.assert_close(each[name][i], found)
    biases = torch.randn(3, 12, dtype=torch.float64)
    y = vmap(lambda b: functional_call(layer, {"bias": b}, (x,)))(biases)
    assert y.shape == (3, 5, 12)


@pytest.mark.parametrize("name", only({NAMES[1]}, [NAMES[1], MIXED]))
def test_compiles_as_one_graph_for_any_number_of_tokens(name: str) -> None:
    torch._dynamo.reset()
    layer = ChainLinear(name, 36, 50, normalize=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (7, 300):
        x = torch.randn(tokens, 36)
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-4)
    layer.zero_grad()
    compiled(x).square().sum().backward()
    found = {n: p.grad for n, p in layer.named_parameters()}
    layer.zero_grad()
    layer(x).square().sum().backward()
    for n, parameter in layer.named_parameters():
        torch.testing.assert_close(found[n], parameter.grad, rtol=1e-3, atol=1e-3)


def test_autocast_computes_in_bfloat16_and_trains() -> None:
    layer = ChainLinear("btt:cores=3,rho=1/4", 32, 48)
    x = torch.randn(5, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    for parameter in layer.parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", NAMES)
def test_zero_init_is_the_zero_map_that_can_learn(name: str) -> None:
    layer = ChainLinear(name, 24, 30, zero_init=True, normalize=True, gain=True)
    last = layer.factors()[layer.structure.factors[-1]]
    assert [bool(f.any()) for f in layer.factors().values()].count(False) == 1
    x = torch.randn(4, 24)
    assert torch.count_nonzero(layer(x)) == 0
    layer(x).sum().backward()
    assert last.grad is not None
    assert last.grad.abs().max() > 0


def test_normalisation_caps_the_rms_and_leaves_smaller_factors() -> None:
    layer, plain = (layer_of(FULL, 64, 64, bias=False, normalize=n) for n in (True, False))
    for scale in (0.5, 3.0):
        with torch.no_grad():
            for f, factor in layer.factors().items():
                factor.div_(factor.square().mean().sqrt()).mul_(layer.structure.init_std(f) * scale)
                plain.factors()[f].copy_(factor / max(scale, 1.0))
        torch.testing.assert_close(layer.to_matrix(), plain.to_matrix())


def test_initialisation_and_learning_rates() -> None:
    torch.manual_seed(0)
    layer = ChainLinear("btt:cores=3,rho=1/4", 512, 512, d_in_base=64, normalize=True, gain=True)
    rates = {id(p): g["lr"] for g in param_groups(layer, 0.1) for p in g["params"]}
    for name, factor in layer.factors().items():
        fan_in, fan_out = layer.structure.fans(name)
        error = 5 / math.sqrt(2 * factor.numel())
        std = math.sqrt(min(fan_in, fan_out)) / fan_in
        assert factor.std().item() == pytest.approx(std, rel=error)
        assert rates[id(factor)] == pytest.approx(0.1 * 64 / (3 * fan_in))
    one, other = (torch.Generator().manual_seed(3) for _ in range(2))
    layer.reset_parameters(one)
    first = layer.to_matrix()
    layer.reset_parameters(other)
    assert torch.equal(first, layer.to_matrix())


@pytest.mark.parametrize("name", NAMES)
def test_no_tokens_give_an_empty_output_and_zero_gradients(name: str) -> None:
    layer = ChainLinear(name, 24, 30, normalize=True, gain=True)
    for shape in ((0, 24), (3, 0, 24)):
        x = torch.zeros(shape, requires_grad=True)
        y = layer(x)
        assert y.shape == (*shape[:-1], 30)
        y.sum().backward()
        assert x.grad is not None
    for parameter in layer.parameters():
        assert parameter.grad is not None
        assert torch.count_nonzero(parameter.grad) == 0


def test_a_wrong_input_is_named() -> None:
    layer = ChainLinear(FULL, 8, 8)
    with pytest.raises(ValueError, match=r"ChainLinear\(.*got an input of shape \(2, 9\).*be 8"):
        layer(torch.zeros(2, 9))
    with pytest.raises(ValueError, match=r"got an input of shape \(\).*must be 8"):
        layer(torch.zeros(()))
    for dtype in (torch.int64, torch.complex64, torch.float64, torch.bool):
        with pytest.raises(TypeError, match=rf"got an input of dtype {dtype}.*torch.float32"):
            layer(torch.zeros(2, 8, dtype=dtype))


def test_a_sized_structure_keeps_its_dimensions() -> None:
    structure = ChainStructure.of(ChainTheta.parse(FULL), 27, 64)
    assert ChainLinear(structure, 27, 64).structure is structure
    with pytest.raises(InvalidInput, match=r"d_in, d_out: got 27, 27; accepted: 27, 64"):
        ChainLinear(structure, 27, 27)


def test_an_absorbed_chain_is_a_linear_layer() -> None:
    layer = layer_of("dense", 12, 20)
    linear = torch.nn.Linear(12, 20, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(layer.get_parameter("F1"))
        linear.bias.copy_(layer.bias)  # type: ignore[arg-type]
    x = torch.randn(2, 3, 12, dtype=torch.float64)
    torch.testing.assert_close(layer(x), linear(x))
    torch.testing.assert_close(layer.to_linear()(x), linear(x))


def test_state_dict_round_trip() -> None:
    one, other = (ChainLinear("btt:cores=3,rho=1/8", 18, 50) for _ in range(2))
    other.load_state_dict(one.state_dict())
    x = torch.randn(3, 18)
    assert torch.equal(one(x), other(x))
    assert set(one.state_dict()) == {"F1", "F2", "F3", "bias", "_extra_state"}
