from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from nas.errors import InvalidInput
from nas.structure import Factor, Structure, inspect_structure
from nas.theta import DENSE, Theta
from tests.nas.test_theta import thetas

GOLDEN = json.loads((Path(__file__).parent.parent / "data" / "layers.json").read_text())
dimensions = st.integers(1, 48)
any_dimension = st.integers(1, 5000) | st.sampled_from([768, 3072, 50257, 65537])


def random_matrix(structure: Structure, seed: int = 0) -> NDArray[np.float64]:
    """A generic operator of the structure, cut to (d_out, d_in), from the definition."""
    s, rng = structure.sizes, np.random.default_rng(seed)
    a = rng.standard_normal((s.alpha, s.gamma, s.delta, s.phi, s.rho))
    b = rng.standard_normal((s.beta, s.gamma, s.epsilon, s.phi, s.rho))
    w = np.einsum("agdfr,bgefr->fedgba", a, b)
    w = w.reshape(s.phi * s.epsilon * s.delta, s.gamma * s.beta * s.alpha)
    return w[: structure.d_out, : structure.d_in]


@pytest.mark.parametrize(
    "row", [r for r in GOLDEN if r["exact"]], ids=lambda r: f"{r['name']}-{r['d_in']}"
)
def test_agrees_with_the_papers_code_where_sizes_are_exact(row: dict[str, object]) -> None:
    got = inspect_structure(Theta.of(row["theta"]), row["d_in"], row["d_out"])  # type: ignore[arg-type]
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


@given(thetas(), any_dimension, any_dimension)
@example(Theta(0.5, 0.25, 0.25, 0.25, 0.5, 0.25, 0), 3072, 3072)
def test_no_input_is_dropped_and_no_output_is_short(theta: Theta, d_in: int, d_out: int) -> None:
    structure = Structure.of(theta, d_in, d_out)
    assert structure.padded_in >= d_in
    assert structure.padded_out >= d_out
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
@given(thetas(), dimensions, dimensions)
def test_rank_is_the_numeric_rank(theta: Theta, d_in: int, d_out: int) -> None:
    structure = Structure.of(theta, d_in, d_out)
    numeric = np.linalg.matrix_rank(random_matrix(structure))
    if structure.is_dense:
        assert structure.rank == min(d_in, d_out)
    elif (structure.padded_in, structure.padded_out) == (d_in, d_out):
        assert numeric == structure.rank
    else:
        assert numeric <= structure.rank


@given(st.floats(0, 1), any_dimension, any_dimension)
def test_a_factor_without_private_axes_is_absorbed(rho: float, d_in: int, d_out: int) -> None:
    for theta in (Theta(0, 0.5, 0.5, 0, 0.5, 0.5, rho), Theta(0.5, 0, 0.5, 0.5, 0, 0.5, rho)):
        structure = Structure.of(theta, d_in, d_out)
        assert structure.theta == DENSE
        assert structure.macs == structure.params == d_in * d_out
        assert structure.init_std("A") == math.sqrt(min(d_in, d_out)) / d_in
        assert structure.adam_lr_multiplier("A", 64) == 64 / d_in


def test_least_waste_comes_before_nearness() -> None:
    s = Structure.of(Theta(0.5, 0, 0.5, 0, 0.5, 0.5, 0), 768, 3072)
    assert (s.sizes.alpha, s.sizes.gamma) == (24, 32)
    assert (s.padded_in, s.padded_out) == (768, 3072)
    prime = Structure.of(Theta(0.5, 0, 0.5, 0, 0.5, 0.5, 0), 50257, 50257)
    near = range(168, 300)  # within 4/3 of sqrt(50257) = 224.2
    assert prime.padded_in == min(a * b for a in near for b in near if a * b >= 50257) == 50264


def test_degeneracy_is_decided_by_rounding() -> None:
    btt16 = Theta(0.33, 0, 0.67, 0, 0.33, 0.67, 0.25)
    assert btt16.rho < min(btt16.alpha, btt16.epsilon)
    assert Structure.of(btt16, 1024, 1024).is_degenerate
    assert not Structure.of(Theta(0.5, 0, 0.5, 0, 0.5, 0.5, 0), 1024, 1024).is_degenerate


@pytest.mark.parametrize("value", [0, -1, 1.5, True, 2**24 + 1, "8"])
def test_bad_dimensions_are_refused(value: object) -> None:
    with pytest.raises(InvalidInput, match="d_in: got"):
        Structure.of(DENSE, value, 8)  # type: ignore[arg-type]
