from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nas.designs.taxonomy import parse_theta, taxonomy
from nas.designs.theta import AXES, DENSE, Theta
from nas.errors import InvalidInput
from tests.support.strategies import thetas


@given(thetas())
def test_canonical_form_is_one_of_two_and_stable(theta: Theta) -> None:
    canonical = theta.canonical()
    assert canonical == theta.swapped().canonical()
    assert canonical == canonical.canonical()
    assert canonical in (theta, theta.swapped(), DENSE)
    inner, outer = min(canonical.alpha, canonical.epsilon), min(canonical.beta, canonical.delta)
    assert inner >= outer - 1e-12


@given(thetas())
def test_text_reads_back(theta: Theta) -> None:
    again = Theta.parse(",".join(f"{v:.17f}" for v in theta.values))
    assert again.values == pytest.approx(theta.values, abs=1e-9)


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, math.inf, "x", None, True])
@pytest.mark.parametrize("axis", range(7))
def test_exponents_off_their_range_are_refused(axis: int, value: object) -> None:
    values: list[object] = [0.5, 0, 0.5, 0, 0.5, 0.5, 0]
    values[axis] = value
    with pytest.raises(InvalidInput) as caught:
        Theta(*values)  # type: ignore[arg-type]
    assert caught.value.field == f"theta.{AXES[axis]}"


def test_sums_are_checked_with_the_tolerance_of_the_papers() -> None:
    assert Theta(0.33, 0, 0.67, 0, 0.33, 0.66, 0).phi == 0.66
    with pytest.raises(InvalidInput, match=r"alpha=0.5, beta=0, gamma=0.4 \(sum 0.9\)"):
        Theta(0.5, 0, 0.4, 0, 0.5, 0.5, 0)


@pytest.mark.parametrize(
    "text",
    ["", "1,0", "1/0,0,1,0,1,0,0", "nope", "btt:sigma=1", "monarch:rho=1/2", "btt:rho=2",
     "1/2,0,1/2,0,1/2,1/2,0,0", "1e999999999,0,0,0,1,0,0", "nan,0,1,0,1,0,0", "low-rank:rho=",
     "\x00", "9" * 1000, "dense,"],
)  # fmt: skip
def test_bad_texts_are_refused(text: str) -> None:
    with pytest.raises(InvalidInput):
        parse_theta(text)


@pytest.mark.parametrize(
    ("text", "omega", "psi", "nu"),
    [
        ("monarch", 0, 1, 1 / 2),
        ("dense", 0, 1, 1),
        ("kronecker", 1 / 2, 1, 1 / 2),
        ("low-rank:rho=1/4", 0, 1 / 4, 1 / 4),
        ("btt:alpha=4/5,epsilon=4/5,rho=1/10", 0, 1 / 2, 3 / 10),
        # the figure's Tensor-Train example, at its canonical form
        ("1/3,2/3,0,3/4,1/4,0,0", 1 / 4, 7 / 12, 1 / 3),
    ],
)
def test_taxonomy_of_worked_examples(text: str, omega: float, psi: float, nu: float) -> None:
    got = taxonomy(parse_theta(text))
    assert (got.omega, got.psi, got.nu) == pytest.approx((omega, psi, nu))


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("dense", "dense"),
        ("monarch", "monarch"),
        ("btt:rho=0", "monarch"),
        ("btt:rho=1/4", "btt:alpha=1/2,epsilon=1/2,rho=1/4"),
        ("low-rank:rho=1/2", "low-rank:rho=1/2"),
        ("btt:alpha=1,epsilon=1,rho=1/8", "low-rank:rho=1/8"),
        ("block-dense", "block-dense:blocks=1/4,rho=1/2"),
        ("btt:alpha=2/3,epsilon=1,rho=1/4", "block-dense:blocks=1/3,rho=1/4"),
        ("block-dense:blocks=0,rho=1/4", "low-rank:rho=1/4"),
        ("block-dense:blocks=1", "dense"),
        # the transpose, dense first, has no name of its own
        ("btt:alpha=1,epsilon=2/3,rho=1/4", "btt:alpha=1,epsilon=2/3,rho=1/4"),
        ("kronecker", "kronecker:alpha=1/2,epsilon=1/2"),
        ("tensor-train:rho=1/4", "tensor-train:alpha=1/2,epsilon=1/2,rho=1/4"),
        ("1/2,1/4,1/4,1/4,1/2,1/4,0", "einsum"),
        ("0,1/2,1/2,0,1/2,1/2,1/4", "dense"),
    ],
)
def test_names_are_the_most_specific(text: str, name: str) -> None:
    assert parse_theta(text).name == name
    assert parse_theta(text).swapped().name == name


@given(thetas())
@example(Theta(1 / 3, 2 / 3, 0, 1 / 3, 2 / 3, 0, 0))
@example(Theta(2 / 3, 1 - 2 / 3, 0, 2 / 3, 1 - 2 / 3, 0, 0))
@example(Theta(1, 0, 0, 0, 1, 8.9e-308, 0))
@example(Theta(1, 0, 0, 0, 1.1e-79, 1, 0))
def test_names_read_back(theta: Theta) -> None:
    name = theta.name
    if name not in ("einsum", "dense") and "." not in name:
        assert parse_theta(name).name == name


twelfth = st.integers(0, 12).map(lambda n: Fraction(n, 12))


@pytest.mark.parametrize(
    ("options", "of"),
    [
        ("low-rank:rho={r}", lambda _a, _e, r: (1, 0, 0, 0, 1, 0, r)),
        ("kronecker:alpha={a},epsilon={e}", lambda a, e, _r: (a, 1 - a, 0, 1 - e, e, 0, 0)),
        ("tensor-train:alpha={a},epsilon={e},rho={r}",
         lambda a, e, r: (a, 1 - a, 0, 1 - e, e, 0, r)),
        ("btt:alpha={a},epsilon={e},rho={r}", lambda a, e, r: (a, 0, 1 - a, 0, e, 1 - e, r)),
        ("block-dense:blocks={a},rho={r}", lambda a, _e, r: (1 - a, 0, a, 0, 1, 0, r)),
    ],
)  # fmt: skip
@given(twelfth, twelfth, twelfth)
def test_every_family_has_its_form_and_is_found_again(
    options: str, of: Callable[..., tuple[Fraction, ...]], a: Fraction, e: Fraction, r: Fraction
) -> None:
    theta = Theta(*of(a, e, r))  # type: ignore[arg-type]
    assert parse_theta(options.format(a=a, e=e, r=r)).values == pytest.approx(theta.values)
    again = parse_theta(theta.name).canonical()
    assert again.values == pytest.approx(theta.canonical().values)
