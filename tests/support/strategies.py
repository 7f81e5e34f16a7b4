"""Hypothesis strategies of the field's values."""

from __future__ import annotations

from hypothesis import strategies as st

from nas.designs.theta import Theta


@st.composite
def simplex(draw: st.DrawFn) -> list[float]:
    """Three shares that sum to 1, any of them often 0."""
    parts = [draw(st.sampled_from([0.0, 0.0, 0.25, 0.5, 1.0]) | st.floats(0, 1)) for _ in range(3)]
    total = sum(parts)
    return [1.0, 0.0, 0.0] if total < 1e-3 else [p / total for p in parts]


@st.composite
def thetas(draw: st.DrawFn) -> Theta:
    rho = draw(st.sampled_from([0.0, 0.25]) | st.floats(0, 1))
    return Theta.of([*draw(simplex()), *draw(simplex()), rho])


@st.composite
def twelfths(draw: st.DrawFn) -> Theta:
    """A θ on the grid of multiples of 1/12."""
    groups = []
    for _ in range(2):
        one = draw(st.integers(0, 12))
        two = draw(st.integers(0, 12 - one))
        groups += [one / 12, two / 12, (12 - one - two) / 12]
    return Theta.of([*groups, draw(st.integers(0, 12)) / 12])
