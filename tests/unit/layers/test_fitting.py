from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from nas.designs.einsum import Structure
from nas.designs.taxonomy import parse_theta
from nas.designs.theta import Theta
from nas.errors import InvalidInput
from nas.layers import fitting
from nas.layers.fitting import Fit, fit_factors
from tests.support.strategies import thetas

GENERAL = "1/2,1/4,1/4,1/4,1/2,1/4,1/4"
NAMES = ["monarch", "btt:rho=1/4", "low-rank:rho=1/2", "kronecker", "tensor-train:rho=1/4", GENERAL]
dimensions = st.integers(2, 24)


def structure_of(name: str, d_out: int, d_in: int) -> Structure:
    return Structure.of(parse_theta(name), d_in, d_out)


def random(*shape: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draw, dtype=torch.float64)


def full_product(a: Tensor, b: Tensor) -> Tensor:
    """W (padded d_out, padded d_in) of the factors."""
    w = torch.einsum("grfda,fgrbe->fedgba", a, b)
    return w.reshape(math.prod(w.shape[:3]), -1)


def matrix(a: Tensor, b: Tensor, structure: Structure) -> Tensor:
    """W (d_out, d_in): surplus of the product is cut; what it does not reach is zero."""
    w = torch.zeros(structure.d_out, structure.d_in, dtype=a.dtype)
    part = full_product(a, b)[: structure.d_out, : structure.d_in]
    w[: part.shape[0], : part.shape[1]] = part
    return w


def member(structure: Structure, seed: int = 0) -> Tensor:
    """A matrix that the structure represents exactly."""
    s = structure.sizes
    a = random(s.gamma, s.rho, s.phi, s.delta, s.alpha, seed=seed)
    b = random(s.phi, s.gamma, s.rho, s.beta, s.epsilon, seed=seed + 1)
    return matrix(a, b, structure)


def error(w: Tensor, fit: Fit, structure: Structure) -> float:
    return float((w - matrix(fit.factors[0], fit.factors[1], structure)).norm() / w.norm())


def is_padded(structure: Structure) -> bool:
    return (structure.padded_in, structure.padded_out) != (structure.d_in, structure.d_out)


def discarded(m: Tensor, rank: int) -> float:
    """Squared singular values of m past the first `rank`."""
    return float(torch.linalg.svdvals(m)[..., rank:].square().sum())


@settings(max_examples=80, deadline=None)
@given(thetas(), dimensions, dimensions, st.booleans())
def test_a_matrix_of_the_structure_is_recovered(
    theta: Theta, d_in: int, d_out: int, exact: bool
) -> None:
    structure = Structure.of(theta, d_in, d_out)
    if exact:  # the dimensions that the axes fill
        structure = replace(structure, d_in=structure.padded_in, d_out=structure.padded_out)
    assume(not structure.is_dense)
    w, s = member(structure), structure.sizes
    fit = fit_factors(w, structure)
    assert fit.factors[0].shape == (s.gamma, s.rho, s.phi, s.delta, s.alpha)
    assert fit.factors[1].shape == (s.phi, s.gamma, s.rho, s.beta, s.epsilon)
    assert fit.relative_error == pytest.approx(error(w, fit, structure), abs=1e-12)
    # one factor has the private input axis, the other the private output axis: free entries are
    # whole rows and columns of a block
    if not is_padded(structure) or s.beta == s.delta == 1 or s.alpha == s.epsilon == 1:
        assert fit.relative_error < 1e-10
    else:  # alternating least squares may end in a local minimum
        assert fit.relative_error <= fit_factors(w, structure, max_sweeps=0).relative_error + 1e-12


@pytest.mark.parametrize("name", ["kronecker", "tensor-train:rho=1/4", GENERAL])
@pytest.mark.parametrize("shape", [(53, 37), (101, 127), (59, 23)])
def test_recovery_through_padding(name: str, shape: tuple[int, int]) -> None:
    structure = structure_of(name, *shape)
    assert is_padded(structure)
    w = member(structure)
    assert fit_factors(w, structure, max_sweeps=0).relative_error > 0.01
    assert fit_factors(w, structure).relative_error < 1e-8


@settings(max_examples=40, deadline=None)
@given(thetas(), dimensions, dimensions)
def test_no_sweep_raises_the_error(theta: Theta, d_in: int, d_out: int) -> None:
    structure = Structure.of(theta, d_in, d_out)
    assume(not structure.is_dense)
    w = random(d_out, d_in)
    errors = [
        fit_factors(w, structure, max_sweeps=n, tolerance=0).relative_error
        for n in (0, 1, 2, 3, 4, 5, 10, 20)
    ]
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(errors))


@pytest.mark.parametrize("name", ["kronecker", "tensor-train:rho=1/4", GENERAL])
def test_sweeps_agree_with_filling_the_free_entries_in(name: str) -> None:
    """Another algorithm: fill the free entries with the product, truncate again, repeat."""
    structure = structure_of(name, 11, 13)
    s, w = structure.sizes, random(11, 13)
    filled = torch.zeros(structure.padded_out, structure.padded_in, dtype=torch.float64)
    for _ in range(3000):
        filled[:11, :13] = w
        cube = filled.reshape(s.phi, s.epsilon, s.delta, s.gamma, s.beta, s.alpha)
        blocks = cube.permute(3, 0, 4, 1, 2, 5).reshape(
            s.gamma, s.phi, s.beta * s.epsilon, s.delta * s.alpha
        )
        u, sigma, vh = torch.linalg.svd(blocks, full_matrices=False)
        low = (u[..., : s.rho] * sigma[..., None, : s.rho]) @ vh[..., : s.rho, :]
        cube = low.reshape(s.gamma, s.phi, s.beta, s.epsilon, s.delta, s.alpha)
        filled = cube.permute(1, 3, 4, 0, 2, 5).reshape(filled.shape).clone()
    by_filling = ((filled[:11, :13] - w).norm() / w.norm()).item()
    fit = fit_factors(w, structure, max_sweeps=1000, tolerance=0)
    assert fit.relative_error == pytest.approx(by_filling, rel=1e-3)


def test_low_rank_is_the_plain_svd() -> None:
    structure, w = structure_of("low-rank:rho=1/2", 36, 25), random(36, 25)
    fit = fit_factors(w, structure)
    squared = (fit.relative_error * w.norm().item()) ** 2
    assert squared == pytest.approx(discarded(w, structure.sizes.rho), rel=1e-10)


@pytest.mark.parametrize("name", ["kronecker", "tensor-train:rho=1/4"])
def test_kronecker_is_the_svd_of_the_rearranged_matrix(name: str) -> None:
    """Row (i, j) of the rearrangement is block (i, j) of W, read as a vector."""
    structure, w = structure_of(name, 36, 16), random(36, 16)
    s = structure.sizes
    rows = [
        w[i * s.delta : (i + 1) * s.delta, j * s.alpha : (j + 1) * s.alpha].flatten()
        for i in range(s.epsilon)
        for j in range(s.beta)
    ]
    fit = fit_factors(w, structure)
    squared = (fit.relative_error * w.norm().item()) ** 2
    assert squared == pytest.approx(discarded(torch.stack(rows), s.rho), rel=1e-10)
    terms = [
        torch.kron(fit.factors[1][0, 0, r].T.contiguous(), fit.factors[0][0, r, 0])
        for r in range(s.rho)
    ]
    torch.testing.assert_close(
        torch.stack(terms).sum(0), matrix(fit.factors[0], fit.factors[1], structure)
    )


@pytest.mark.parametrize("name", ["monarch", "btt:rho=1/4"])
def test_btt_is_the_svd_of_every_block(name: str) -> None:
    structure, w = structure_of(name, 36, 16), random(36, 16)
    s = structure.sizes
    lost = sum(
        discarded(rows[:, g * s.alpha : (g + 1) * s.alpha], s.rho)
        for rows in torch.split(w, s.epsilon)
        for g in range(s.gamma)
    )
    fit = fit_factors(w, structure)
    assert (fit.relative_error * w.norm().item()) ** 2 == pytest.approx(lost, rel=1e-10)


@pytest.mark.parametrize("shape", [(16, 16), (16, 81), (19, 13)])
@pytest.mark.parametrize("name", NAMES)
def test_the_fit_is_a_local_minimum(name: str, shape: tuple[int, int]) -> None:
    structure, w = structure_of(name, *shape), random(*shape)
    fit = fit_factors(w, structure, max_sweeps=5000, tolerance=0)
    a, b = fit.factors[0].clone().requires_grad_(), fit.factors[1].clone().requires_grad_()
    loss = (w - matrix(a, b, structure)).square().sum()
    gradients = torch.autograd.grad(loss, (a, b))
    assert max(g.abs().max().item() for g in gradients) < 1e-5 * w.norm().item()
    for size in (1e-3, 1e-2, 1e-1):
        for seed in range(5):
            near = a + size * random(*a.shape, seed=seed), b + size * random(*b.shape, seed=seed)
            assert (w - matrix(*near, structure)).square().sum() >= loss


def test_a_wrong_pairing_of_axes_would_be_noticed() -> None:
    structure = structure_of(GENERAL, 16, 16)
    w = member(structure)
    fit = fit_factors(w, structure)
    assert error(w, replace(fit, factors=(fit.factors[0].flip(4), fit.factors[1])), structure) > 0.1


def test_factors_stay_bounded_where_no_nearest_product_exists() -> None:
    """With free entries the infimum need not be attained: more sweeps grow the factors here."""
    structure, w = structure_of(GENERAL, 13, 19), random(13, 19)
    start, fit = fit_factors(w, structure, max_sweeps=0), fit_factors(w, structure)
    assert fit.relative_error < start.relative_error
    assert fit.factors[0].abs().max() < 10 * start.factors[0].abs().max()
    halved = fit_factors(w.bfloat16(), structure).relative_error
    assert halved == pytest.approx(fit.relative_error, rel=0.01)


@pytest.mark.parametrize("shape", [(16, 16), (13, 19)])
@pytest.mark.parametrize("name", NAMES)
def test_factors_are_balanced_at_their_initial_stds(name: str, shape: tuple[int, int]) -> None:
    structure = structure_of(name, *shape)
    fit = fit_factors(random(*shape), structure)
    used = fit.factors[1].abs().sum((3, 4)).permute(1, 2, 0)[..., None, None] > 0  # (γ, ρ, φ, 1, 1)
    rms = [f.square().mean().sqrt().item() for f in (fit.factors[0] * used, fit.factors[1])]
    assert rms[0] / structure.init_std("A") == pytest.approx(rms[1] / structure.init_std("B"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)]
)
def test_dtype_is_kept_and_the_error_is_that_of_the_rounded_factors(
    name: str, dtype: torch.dtype, bound: float
) -> None:
    structure = structure_of(name, 16, 16)
    w = torch.nn.Parameter(member(structure).to(dtype))
    fit = fit_factors(w, structure)
    assert fit.factors[0].dtype == fit.factors[1].dtype == dtype
    assert not fit.factors[0].requires_grad
    assert not fit.factors[1].requires_grad
    wide = Fit(tuple(factor.double() for factor in fit.factors), 0.0)
    assert fit.relative_error == pytest.approx(error(w.detach().double(), wide, structure))
    assert fit.relative_error < bound


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(16, 16), (13, 19)])
def test_zero_gives_a_zero_product_that_can_learn(name: str, shape: tuple[int, int]) -> None:
    structure = structure_of(name, *shape)
    fit = fit_factors(torch.zeros(shape), structure)
    assert fit.relative_error == 0.0
    assert torch.count_nonzero(fit.factors[1]) == 0
    assert fit.factors[0].abs().min() > 0


def test_blocks_of_zeros_can_learn() -> None:
    structure, w = structure_of("monarch", 16, 16), random(16, 16)
    w[:8, :8] = 0.0
    fit = fit_factors(w, structure)
    assert fit.factors[0].abs().min() > 0
    alone = fit_factors(torch.where(w == 0, w, 2 * w), structure)
    assert fit.relative_error == pytest.approx(alone.relative_error)


@pytest.mark.parametrize("scale", [1e-290, 1e290])
def test_extreme_scales_are_fitted(scale: float) -> None:
    structure = structure_of(GENERAL, 13, 19)
    w = random(13, 19)
    expected = fit_factors(w, structure).relative_error
    assert fit_factors(w * scale, structure).relative_error == pytest.approx(expected, rel=1e-6)


def test_surplus_slices_change_nothing_and_can_learn() -> None:
    structure, w = structure_of("btt:rho=1", 16, 16), random(16, 16)
    s = structure.sizes
    rank = min(s.beta * s.epsilon, s.delta * s.alpha)
    assert s.rho > rank
    fit = fit_factors(w, structure)
    assert fit.relative_error < 1e-12
    assert torch.count_nonzero(fit.factors[1][:, :, rank:]) == 0
    assert fit.factors[0][:, rank:].std().item() == pytest.approx(structure.init_std("A"), rel=0.2)
    assert torch.equal(fit.factors[0], fit_factors(w, structure).factors[0])
    a, b = fit.factors[0].clone().requires_grad_(), fit.factors[1].clone().requires_grad_()
    torch.autograd.backward((full_product(a, b) + random(16, 16, seed=1)).square().sum())
    assert b.grad is not None
    assert b.grad[:, :, rank:].abs().min() > 0


def test_what_the_axes_do_not_reach_counts_as_error() -> None:
    structure = structure_of("kronecker", 16, 36)
    larger = replace(structure, d_in=40, d_out=19)
    w = random(19, 40)
    w[:16, :36] = member(structure)
    fit = fit_factors(w, larger)
    lost = w[16:].square().sum() + w[:16, 36:].square().sum()
    assert fit.relative_error == pytest.approx((lost.sqrt() / w.norm()).item(), rel=1e-10)
    mixed = replace(structure, d_in=33, d_out=19)
    w = w[:, :33]
    assert fit_factors(w, mixed).relative_error == pytest.approx(
        (w[16:].norm() / w.norm()).item(), rel=1e-6
    )


@pytest.mark.parametrize("name", NAMES)
def test_small_chunks_give_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    structure, w = structure_of(name, 29, 31), random(29, 31)
    whole = fit_factors(w, structure, tolerance=0)
    monkeypatch.setattr(fitting, "_CHUNK_ENTRIES", 100)
    pieces = fit_factors(w, structure, tolerance=0)
    assert pieces.relative_error == pytest.approx(whole.relative_error, rel=1e-9)


@pytest.mark.parametrize(
    ("weight", "name", "message"),
    [
        (torch.zeros(8, 4), "monarch", r"weight: got \(8, 4\); .*shape \(d_out, d_in\) = \(4, 8\)"),
        (torch.zeros(32), "monarch", r"weight: got \(32,\)"),
        (torch.zeros(4, 8, dtype=torch.int64), "monarch", r"torch.int64; .*floating-point"),
        (torch.zeros(4, 8, dtype=torch.complex64), "monarch", r"torch.complex64; .*real"),
        (torch.full((4, 8), math.nan), "monarch", r"32 entries that are NaN or infinite"),
        (torch.eye(4, 8) / 0, "monarch", r"entries that are NaN or infinite"),
        (torch.zeros(4, 8), "dense", r"structure: got dense; accepted: a structure of two factors"),
    ],
)
def test_bad_inputs_are_named(weight: Tensor, name: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        fit_factors(weight, structure_of(name, 4, 8))
