from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.linalg import block_diag

from nas.designs.einsum import Factor, Sizes, Structure, inspect_structure
from nas.designs.structure import Sizing
from nas.designs.taxonomy import Taxonomy, parse_theta, taxonomy
from nas.designs.theta import DENSE, Theta
from nas.errors import InvalidInput
from tests.support.paths import DATA
from tests.support.strategies import thetas, twelfths

GOLDEN = json.loads((DATA / "layers.json").read_text())
#: The θ of the papers' runs.
NAMED = {row["name"]: Theta.of(row["theta"]) for row in GOLDEN}
SIZINGS: tuple[Sizing, ...] = ("least-waste", "paper")
MONARCH = Theta(0.5, 0, 0.5, 0, 0.5, 0.5, 0)
#: The public code drops an eighth of the inputs of this one at 3072.
TRAP = Theta(0.5, 0.25, 0.25, 0.25, 0.5, 0.25, 0)
dimensions = st.integers(1, 48)
any_dimension = st.integers(1, 5000) | st.sampled_from([768, 3072, 50257, 65537])


def random_factors(
    structure: Structure, seed: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Generic factors A (α, γ, δ, φ, ρ) and B (β, γ, ε, φ, ρ)."""
    s, rng = structure.sizes, np.random.default_rng(seed)
    return (
        rng.standard_normal((s.alpha, s.gamma, s.delta, s.phi, s.rho)),
        rng.standard_normal((s.beta, s.gamma, s.epsilon, s.phi, s.rho)),
    )


def random_matrix(structure: Structure, seed: int = 0) -> NDArray[np.float64]:
    """The operator (d_out, d_in) of `random_factors`, from the definition.

    Columns past αβγ and rows past δεφ are zero.
    """
    w = np.einsum("agdfr,bgefr->fedgba", *random_factors(structure, seed))
    w = w.reshape(math.prod(w.shape[:3]), -1)[: structure.d_out, : structure.d_in]
    return np.pad(w, [(0, structure.d_out - w.shape[0]), (0, structure.d_in - w.shape[1])])


@pytest.mark.parametrize(
    ("row", "sizing"),
    [(r, sizing) for r in GOLDEN for sizing in SIZINGS if sizing == "paper" or r["exact"]],
    ids=lambda v: v if isinstance(v, str) else f"{v['name']}-{v['d_in']}",
)
def test_agrees_with_the_papers_code(row: dict[str, object], sizing: Sizing) -> None:
    got = inspect_structure(Theta.of(row["theta"]), row["d_in"], row["d_out"], sizing)  # type: ignore[arg-type]
    assert list(got["sizes"].values()) == row["sizes"]  # type: ignore[attr-defined]
    assert got["macs_a_first"] == row["macs_a_first"]
    assert got["macs_b_first"] == row["macs_b_first"]
    assert got["params"] == row["params"]
    cores = [
        (f["fan_in"], f["fan_out"], f["init_std"], f["adam_lr_multiplier"])
        for f in got["factors"]  # type: ignore[attr-defined]
    ]
    expected = [
        (c["fan_in"], c["fan_out"], c["init_std"], c["adam_lr_mult"])
        for c in row["cores"]  # type: ignore[attr-defined]
    ]
    assert np.array(cores) == pytest.approx(np.array(expected), rel=1e-12)


def test_golden_rows_are_there() -> None:
    assert sum(r["exact"] for r in GOLDEN) == 16
    assert (len(GOLDEN), len(NAMED)) == (69, 23)


@given(thetas(), any_dimension, any_dimension)
@example(TRAP, 3072, 3072)
def test_no_input_is_dropped_and_no_output_is_short(theta: Theta, d_in: int, d_out: int) -> None:
    structure = Structure.of(theta, d_in, d_out)
    assert structure.padded_in >= d_in
    assert structure.padded_out >= d_out
    assert structure.dropped_inputs == structure.constant_outputs == 0
    s = structure.sizes
    for padded, d in ((s.alpha * s.beta * s.gamma, d_in), (s.delta * s.epsilon * s.phi, d_out)):
        assert d <= padded <= 2 * d


@given(thetas(), dimensions, dimensions)
def test_every_output_depends_on_every_input(theta: Theta, d_in: int, d_out: int) -> None:
    structure = Structure.of(theta, d_in, d_out)
    assert np.all(random_matrix(structure) != 0.0)


@given(thetas(), any_dimension, any_dimension)
def test_swapping_the_factors_gives_the_same_structure(theta: Theta, d_in: int, d_out: int) -> None:
    one, other = Structure.of(theta, d_in, d_out), Structure.of(theta.swapped(), d_in, d_out)
    assert one == other
    assert one.sizes.macs_a_first <= one.sizes.macs_b_first


@given(thetas(), any_dimension, any_dimension)
def test_sizes_stay_near_theta(theta: Theta, d_in: int, d_out: int) -> None:
    structure = Structure.of(theta, d_in, d_out)
    one, two = structure.theta, structure.theta.swapped()
    s = structure.sizes

    def near(t: Theta) -> bool:
        pairs = [
            (s.alpha, d_in**t.alpha), (s.beta, d_in**t.beta), (s.gamma, d_in**t.gamma),
            (s.delta, d_out**t.delta), (s.epsilon, d_out**t.epsilon), (s.phi, d_out**t.phi),
        ]  # fmt: skip
        # rounding a small axis up doubles it at most, and the tolerance of the sums adds d^0.01
        return all(n / want <= 2.0 * d_in**0.01 and want / n <= 2.0 for n, want in pairs)

    assert near(one) or near(two)
    assert s.rho == max(1, round(min(d_in, d_out) ** one.rho))


def _macs_by_counting(structure: Structure, first: Factor) -> int:
    """MACs as the sizes of the index sets of both products, derived from the einsum."""
    s = structure.sizes
    size = dict(
        zip("abgdefr", (s.alpha, s.beta, s.gamma, s.delta, s.epsilon, s.phi, s.rho), strict=True)
    )
    factors = {"A": set("agdfr"), "B": set("bgefr")}
    second: Factor = "B" if first == "A" else "A"
    x = set("abg")
    one = x | factors[first]
    kept = one & (factors[second] | set("def"))  # indices still needed after the first product
    two = kept | factors[second]
    return sum(math.prod(size[i] for i in indices) for indices in (one, two))


@given(thetas(), any_dimension, any_dimension)
def test_macs_equal_the_index_sets_of_the_products(theta: Theta, d_in: int, d_out: int) -> None:
    structure = Structure.of(theta, d_in, d_out)
    if structure.is_dense:
        assert structure.macs == structure.params == d_in * d_out
        return
    assert structure.macs_a_first == _macs_by_counting(structure, "A")
    assert structure.macs_b_first == _macs_by_counting(structure, "B")
    assert structure.macs == structure.macs_a_first


@settings(max_examples=200)
@given(thetas(), dimensions, dimensions, st.sampled_from(SIZINGS))
def test_rank_is_the_numeric_rank(theta: Theta, d_in: int, d_out: int, sizing: Sizing) -> None:
    structure = Structure.of(theta, d_in, d_out, sizing)
    s, numeric = structure.sizes, np.linalg.matrix_rank(random_matrix(structure))
    uncut = structure.padded_in <= d_in and structure.padded_out <= d_out
    family = s.beta == s.delta == 1 or s.alpha == s.epsilon == 1 or s.gamma == s.phi == s.rho == 1
    assert structure.rank <= min(d_in, d_out)
    if structure.is_dense:
        assert structure.rank == min(d_in, d_out)
    elif uncut and family:
        assert numeric == structure.rank
    else:
        assert numeric <= structure.rank


def test_rank_is_a_bound_that_few_shapes_miss() -> None:
    rng = np.random.default_rng(0)
    shapes = [Sizes(*map(int, rng.integers(1, 5, 7))) for _ in range(300)]
    structures = [
        Structure(DENSE, s.alpha * s.beta * s.gamma, s.delta * s.epsilon * s.phi, s, "paper")
        for s in [Sizes(6, 2, 2, 9, 3, 1, 1), *shapes]
    ]
    numeric = [np.linalg.matrix_rank(random_matrix(s)) for s in structures]
    assert (numeric[0], structures[0].rank) == (21, 24)
    assert all(n <= s.rank for n, s in zip(numeric, structures, strict=True))
    assert sum(n == s.rank for n, s in zip(numeric, structures, strict=True)) >= 290


@given(st.floats(0, 1), any_dimension, any_dimension)
def test_a_factor_without_private_axes_is_absorbed(rho: float, d_in: int, d_out: int) -> None:
    for theta in (Theta(0, 0.5, 0.5, 0, 0.5, 0.5, rho), Theta(0.5, 0, 0.5, 0.5, 0, 0.5, rho)):
        structure = Structure.of(theta, d_in, d_out)
        assert structure.theta == DENSE
        assert structure.macs == structure.params == d_in * d_out
        assert structure.init_std("A") == math.sqrt(min(d_in, d_out)) / d_in
        assert structure.adam_lr_multiplier("A", 64) == 64 / d_in


def test_least_waste_comes_before_nearness() -> None:
    s = Structure.of(MONARCH, 768, 3072)
    assert (s.sizes.alpha, s.sizes.gamma) == (24, 32)
    assert (s.padded_in, s.padded_out) == (768, 3072)
    prime = Structure.of(MONARCH, 50257, 50257)
    near = range(168, 300)  # within 4/3 of sqrt(50257) = 224.2
    assert prime.padded_in == min(a * b for a in near for b in near if a * b >= 50257) == 50264


def test_degeneracy_is_decided_by_rounding() -> None:
    btt16 = Theta(0.33, 0, 0.67, 0, 0.33, 0.67, 0.25)
    assert btt16.rho < min(btt16.alpha, btt16.epsilon)
    assert Structure.of(btt16, 1024, 1024).is_degenerate
    assert not Structure.of(MONARCH, 1024, 1024).is_degenerate


@given(twelfths(), st.sampled_from([2**12, 2**24]))
def test_degeneracy_is_that_of_the_exponents_where_sizes_are_powers(theta: Theta, d: int) -> None:
    t = theta.canonical()
    expected = not t.is_dense and t.rho > min(t.alpha, t.epsilon) - 1e-12
    assert Structure.of(theta, d, d).is_degenerate == expected


def test_the_public_codes_sizes_drop_inputs_and_leave_outputs_constant() -> None:
    paper, ours = Structure.of(TRAP, 3072, 3072, "paper"), Structure.of(TRAP, 3072, 3072)
    assert (paper.padded_in, paper.padded_out) == (55 * 7 * 7, 55 * 7 * 7)
    assert (paper.dropped_inputs, paper.constant_outputs) == (377, 377)
    assert paper.dropped_inputs / 3072 == pytest.approx(0.123, abs=5e-4)
    assert (ours.dropped_inputs, ours.constant_outputs) == (0, 0)
    assert paper.waste == 0.0  # a shortfall is no surplus


@given(thetas(), dimensions, dimensions)
def test_dropped_inputs_and_constant_outputs_are_the_zeros_of_the_operator(
    theta: Theta, d_in: int, d_out: int
) -> None:
    structure = Structure.of(theta, d_in, d_out, "paper")
    w = random_matrix(structure)
    assert np.sum(np.all(w == 0.0, axis=0)) == structure.dropped_inputs
    assert np.sum(np.all(w == 0.0, axis=1)) == structure.constant_outputs


@given(thetas(), any_dimension, any_dimension)
def test_paper_sizing_keeps_labels_as_given(theta: Theta, d_in: int, d_out: int) -> None:
    one = Structure.of(theta, d_in, d_out, "paper")
    other = Structure.of(theta.swapped(), d_in, d_out, "paper")
    assert (one.theta, other.theta) == (theta, theta.swapped())
    assert one.sizes == other.sizes.swapped()
    assert (one.macs, one.params, one.rank) == (other.macs, other.params, other.rank)


def test_the_public_codes_dense_is_two_factors() -> None:
    dense = Structure.of(DENSE, 64, 256, "paper")
    assert dense.macs == dense.params == 2 * 64 * 256
    assert (dense.rank, dense.is_degenerate) == (64, True)


def test_fingerprints_are_those_of_the_stores() -> None:
    assert Structure.of(MONARCH, 768, 3072).fingerprint == "768x3072:24.1.32.1.48.64.1"
    assert Structure.of(DENSE, 768, 3072).fingerprint == "768x3072:dense"


@given(thetas(), dimensions, dimensions)
@example(DENSE, 16, 16)
@example(MONARCH, 16, 16)
def test_sizings_share_a_fingerprint_only_for_one_operator(
    theta: Theta, d_in: int, d_out: int
) -> None:
    one, other = (Structure.of(theta, d_in, d_out, sizing) for sizing in SIZINGS)
    same = one.fingerprint == other.fingerprint
    assert same == (one.sizes == other.sizes and not one.is_dense)
    if same:
        assert (one.macs, one.params) == (other.macs, other.params)
        assert np.array_equal(random_matrix(one), random_matrix(other))


@pytest.mark.parametrize("sizing", ["Paper", "", None, ["paper"]])
def test_unknown_sizings_are_refused(sizing: object) -> None:
    with pytest.raises(InvalidInput, match=r"sizing: got .*; accepted: least-waste \| paper"):
        Structure.of(DENSE, 8, 8, sizing)  # type: ignore[arg-type]


def test_waste_of_a_worked_example() -> None:
    # 7 → 3·3: two of nine inputs are zeros and two of nine outputs are cut, 3 MACs for each
    s = Structure.of(MONARCH, 7, 7)
    assert (s.padded_in, s.padded_out, s.macs_a_first) == (9, 9, 54)
    assert s.waste == 12 / 42


@given(thetas(), any_dimension, any_dimension)
def test_waste_is_charged_over_used_macs(theta: Theta, d_in: int, d_out: int) -> None:
    structure = Structure.of(theta, d_in, d_out)
    s = structure.sizes
    used = d_in * s.delta * s.phi * s.rho + d_out * s.beta * s.gamma * s.rho
    charged_over_used = 1.0 if structure.is_dense else structure.macs / used
    assert 1.0 + structure.waste == pytest.approx(charged_over_used, rel=1e-12)


def test_waste_of_the_papers_structures_is_small_at_any_dimension() -> None:
    squares = (96, 768, 1000, 3072, 11008, 50257, 65537)
    structures = [Structure.of(t, d, d) for t, d in product(NAMED.values(), squares)]
    assert max(s.waste for s in structures) < 1e-3
    assert all(s.dropped_inputs == 0 for s in structures)


@given(any_dimension, any_dimension)
def test_integer_taxonomy_of_dense_is_that_of_its_exponents(d_in: int, d_out: int) -> None:
    assert Structure.of(DENSE, d_in, d_out).integer_taxonomy == taxonomy(DENSE)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("monarch", Taxonomy(omega=0.0, psi=1.0, nu=0.5 + 1 / 12)),
        ("kronecker", Taxonomy(omega=0.5, psi=1.0, nu=0.5 + 1 / 12)),
        ("low-rank:rho=1/4", Taxonomy(omega=0.0, psi=0.25, nu=0.25 + 1 / 12)),
    ],
)
def test_integer_taxonomy_includes_constants(name: str, expected: Taxonomy) -> None:
    # each costs 2·d^(1+ν), and 2 is 4096^(1/12)
    got = Structure.of(parse_theta(name), 4096, 4096).integer_taxonomy
    assert (got.omega, got.psi, got.nu) == pytest.approx(
        (expected.omega, expected.psi, expected.nu), rel=1e-12
    )


@given(thetas(), any_dimension, any_dimension, st.sampled_from(SIZINGS))
@example(MONARCH, 1, 1, "paper")
@example(MONARCH, 1, 4096, "least-waste")
def test_integer_taxonomy_is_finite_on_every_rectangle(
    theta: Theta, d_in: int, d_out: int, sizing: Sizing
) -> None:
    structure = Structure.of(theta, d_in, d_out, sizing)
    got = structure.integer_taxonomy
    assert all(math.isfinite(v) for v in (got.omega, got.psi, got.nu))
    assert 0.0 <= got.psi <= 1.0
    assert (got.psi == 1.0) == (structure.rank == min(d_in, d_out))


def assert_slopes(sizes_at: Callable[[int], Sizes], theta: Theta) -> None:
    """MACs, parameters and rank grow from d = 2^48 to 2^60 as the taxonomy of θ says."""
    low, high = sizes_at(48), sizes_at(60)

    def slope(quantity: Callable[[Sizes], int]) -> float:
        return math.log2(quantity(high) / quantity(low)) / 12

    expected = taxonomy(theta)
    macs = slope(lambda s: min(s.macs_a_first, s.macs_b_first))
    assert macs == pytest.approx(1 + expected.nu, abs=5e-3)
    assert slope(lambda s: s.params) == pytest.approx(1 + expected.nu - expected.omega, abs=5e-3)
    assert slope(lambda s: s.rank) == pytest.approx(expected.psi, abs=5e-3)


@given(twelfths())
def test_integers_grow_as_the_taxonomy_says(theta: Theta) -> None:
    powers = [round(12 * t) for t in theta.canonical().values]
    assert_slopes(lambda log2_d: Sizes(*(2 ** (log2_d // 12 * p) for p in powers)), theta)


@pytest.mark.parametrize("theta", NAMED.values(), ids=NAMED.keys())
def test_integers_of_the_papers_structures_grow_as_the_taxonomy_says(theta: Theta) -> None:
    exponents = theta.canonical().values
    assert_slopes(lambda log2_d: Sizes(*(round(2 ** (log2_d * t)) for t in exponents)), theta)


def test_slopes_off_the_taxonomy_are_noticed() -> None:
    with pytest.raises(AssertionError):
        assert_slopes(lambda log2_d: Sizes(*[2 ** (log2_d // 2)] * 7), MONARCH)


@given(st.integers(0, 12), st.integers(0, 12), dimensions, dimensions)
def test_kronecker_is_the_kronecker_product(a: int, e: int, d_in: int, d_out: int) -> None:
    theta = parse_theta(f"kronecker:alpha={a}/12,epsilon={e}/12")
    structure = Structure.of(theta, d_in, d_out)
    assume(not structure.theta.is_dense)
    A, B = random_factors(structure)
    expected = np.kron(B[:, 0, :, 0, 0].T, A[:, 0, :, 0, 0].T)[:d_out, :d_in]
    np.testing.assert_allclose(random_matrix(structure), expected, rtol=1e-12)


@given(st.integers(0, 12), dimensions, dimensions)
def test_low_rank_is_the_product_of_two_matrices(r: int, d_in: int, d_out: int) -> None:
    structure = Structure.of(parse_theta(f"low-rank:rho={r}/12"), d_in, d_out)
    A, B = random_factors(structure)
    assert A.shape == (d_in, 1, 1, 1, structure.sizes.rho)
    expected = B.reshape(d_out, -1) @ A.reshape(d_in, -1).T
    np.testing.assert_allclose(random_matrix(structure), expected, rtol=1e-12, atol=1e-12)


@given(dimensions, dimensions)
def test_monarch_is_two_block_diagonals_and_a_permutation(d_in: int, d_out: int) -> None:
    structure = Structure.of(MONARCH, d_in, d_out)
    s = structure.sizes
    A, B = random_factors(structure)
    first = block_diag(*(A[:, g, 0, :, 0].T for g in range(s.gamma)))  # (γ, α) → (γ, φ)
    second = block_diag(*(B[0, :, :, f, 0].T for f in range(s.phi)))  # (φ, γ) → (φ, ε)
    transposed = np.arange(s.gamma * s.phi).reshape(s.gamma, s.phi).T.ravel()
    expected = (second @ first[transposed])[:d_out, :d_in]
    np.testing.assert_allclose(random_matrix(structure), expected, rtol=1e-12)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, 2**24 + 1, "8"])
def test_bad_dimensions_are_refused(value: object) -> None:
    with pytest.raises(InvalidInput, match="d_in: got"):
        Structure.of(DENSE, value, 8)  # type: ignore[arg-type]
