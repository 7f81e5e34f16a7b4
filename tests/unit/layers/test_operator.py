"""Structured matrices as operators of CoLA, against the dense matrix in float64."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import cola
import pytest
import torch
from cola.linalg import CG, GMRES, LU, Exact, Lanczos
from cola.ops import Dense, I_like, Kronecker
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nas.designs.theta import Theta
from nas.errors import InvalidInput
from nas.layers import EinsumLinear, StructuredLinear, layer_of
from nas.layers.operators import LayerOperator, SquareBlocksOperator
from tests.support.strategies import thetas
from tests.support.tiers import thinned

#: Square blocks with every axis larger than 1 but ρ, and with ρ > 1.
WIDE_BLOCKS, RANK_BLOCKS = "1/2,1/4,1/4,1/4,1/2,1/4,0", "2/3,0,1/3,0,2/3,1/3,1/3"
#: W square, A and B not.
SKEW_KRONECKER = "2/3,1/3,0,1/3,2/3,0,0"
DESIGNS = (
    "dense", "kronecker", "monarch", "btt:rho=1/4", "low-rank:rho=1/2", "tensor-train:rho=1/4",
    "btt:cores=3,rho=1/8", "blast", "convolution:kernel=1/2",
)  # fmt: skip
#: (design, d) of invertible matrices d × d, and what cola gets; 37 is padded.
INVERTIBLE: tuple[tuple[str, int, type], ...] = (
    ("dense", 36, Dense),
    ("kronecker", 36, Kronecker),
    ("monarch", 36, SquareBlocksOperator),
    (WIDE_BLOCKS, 16, SquareBlocksOperator),
    (RANK_BLOCKS, 8, SquareBlocksOperator),
    ("monarch", 37, LayerOperator),
    ("btt:rho=1/4", 36, LayerOperator),
    ("btt:cores=3,rho=1/8", 36, LayerOperator),
    ("blast", 36, LayerOperator),
    ("convolution:kernel=1/2", 36, LayerOperator),
)
#: Layers whose factors are capped and scaled, both in effect, and those that are not.
OPTIONS: tuple[dict[str, Any], ...] = ({}, {"normalize": True, "gain": True, "bias": False})
PRODUCTS: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}
EPS = torch.finfo(torch.float64).eps


def made(design: str, d_in: int, d_out: int, **options: Any) -> StructuredLinear:
    torch.manual_seed(0)
    layer = layer_of(design, d_in, d_out, dtype=torch.float64, **options)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name == "bias" or name.startswith("gain"):
                parameter.fill_(1.7)  # what an operator may or may not have in it
            elif layer.normalize:
                parameter.mul_(1.3)
    return layer


def vectors(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def condition(w: Tensor) -> float:
    return float(torch.linalg.cond(w))


def close(w: Tensor) -> dict[str, Any]:
    """What LU, which is backward stable, reaches: relative errors of the order of d κ ε."""
    atol = 10 * len(w) * condition(w) * EPS
    assert atol < 1e-4  # else the test would say nothing
    return {"rtol": 0.0, "atol": atol}


def check_products(layer: StructuredLinear) -> None:
    a, w = layer.as_operator(), layer.to_matrix()
    d_out, d_in = w.shape
    assert (a.shape, a.dtype, a.device) == ((d_out, d_in), w.dtype, w.device)
    for x, y in ((vectors(d_in), vectors(d_out)), (vectors(d_in, 3), vectors(d_out, 3))):
        torch.testing.assert_close(a @ x, w @ x, **PRODUCTS)
        torch.testing.assert_close(a.T @ y, w.T @ y, **PRODUCTS)
        torch.testing.assert_close(y.t() @ a, y.t() @ w, **PRODUCTS)
    torch.testing.assert_close(a.to_dense(), w, **PRODUCTS)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("d_in", "d_out"), [(36, 36), (30, 50), (48, 20)])
@pytest.mark.parametrize("design", [*DESIGNS, WIDE_BLOCKS, RANK_BLOCKS, SKEW_KRONECKER])
def test_products_are_those_of_the_matrix(
    design: str, d_in: int, d_out: int, options: dict[str, Any]
) -> None:
    check_products(made(design, d_in, d_out, **options))


@settings(max_examples=60, deadline=None)
@given(thetas(), st.integers(1, 40), st.integers(1, 40))
def test_products_of_any_theta_are_those_of_its_matrix(theta: Theta, d_in: int, d_out: int) -> None:
    layer = EinsumLinear(theta, d_in, d_out, dtype=torch.float64)
    a, w = layer.as_operator(), layer.to_matrix()
    x, y = vectors(d_in, 2), vectors(d_out, 2)
    torch.testing.assert_close(a @ x, w @ x, **PRODUCTS)
    torch.testing.assert_close(a.T @ y, w.T @ y, **PRODUCTS)


def test_complex_vectors() -> None:
    a, w = made("btt:rho=1/4", 36, 36).as_operator(), made("btt:rho=1/4", 36, 36).to_matrix()
    z = torch.complex(vectors(36, 2), vectors(36, 2))
    torch.testing.assert_close(a @ z, w.to(z.dtype) @ z, **PRODUCTS)
    torch.testing.assert_close(a.T @ z, w.T.to(z.dtype) @ z, **PRODUCTS)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("design", "d", "kind"), thinned(INVERTIBLE, 5), ids=str)
def test_direct_algorithms(design: str, d: int, kind: type, options: dict[str, Any]) -> None:
    layer = made(design, d, d, **options)
    a, w = layer.as_operator(), layer.to_matrix().detach()
    assert isinstance(a, kind)
    near = close(w)
    for b in (vectors(d), vectors(d, 3)):
        x = torch.linalg.solve(w, b)
        scale = x.abs().max()
        for found in (cola.linalg.solve(a, b), cola.linalg.inv(a) @ b):
            torch.testing.assert_close(found / scale, x / scale, **near)
    for found in (cola.linalg.logdet(a), cola.linalg.slogdet(a)[1]):
        torch.testing.assert_close(found, torch.linalg.slogdet(w)[1], **near)
    torch.testing.assert_close(cola.linalg.trace(a), w.trace(), **PRODUCTS)
    torch.testing.assert_close(cola.linalg.diag(a), w.diag(), **PRODUCTS)


@pytest.mark.parametrize("design", ["kronecker", "monarch"])
def test_what_cola_can_take_apart_is_solved_exactly_at_any_size(design: str) -> None:
    d = 1024  # above 10^6 entries cola goes over to iterations
    layer = made(design, d, d)
    a, w, b = layer.as_operator(), layer.to_matrix().detach(), vectors(d)
    near = close(w)
    x = torch.linalg.solve(w, b)
    torch.testing.assert_close(cola.linalg.solve(a, b) / x.abs().max(), x / x.abs().max(), **near)
    torch.testing.assert_close(cola.linalg.logdet(a), torch.linalg.slogdet(w)[1], **near)


def test_a_kronecker_product_of_rectangles_has_the_diagonal_of_its_matrix() -> None:
    layer = made(SKEW_KRONECKER, 64, 64)
    assert layer.factors()["A"].shape[3:] == (4, 16)
    a, w = layer.as_operator(), layer.to_matrix()
    torch.testing.assert_close(cola.linalg.diag(a), w.diag(), **PRODUCTS)
    torch.testing.assert_close(cola.linalg.trace(a), w.trace(), **PRODUCTS)


@pytest.mark.parametrize("design", ["monarch", "btt:rho=1/4", "blast", "convolution:kernel=1/2"])
def test_iterative_algorithms(design: str) -> None:
    layer, d = made(design, 36, 36), 36
    a, w, b = layer.as_operator(), layer.to_matrix().detach(), vectors(36)
    x = torch.linalg.solve(w, b)
    # cola's GMRES ends in normal equations: errors of the order of κ² ε
    error = (cola.linalg.solve(a, b, GMRES(tol=1e-13)) - x).norm() / x.norm()
    assert error < d * condition(w) ** 2 * EPS
    # no eigenvalue of WᵀW + I is below 1, so that the error is at most the residual, 2 tol |b|
    ridge = cola.PSD(a.T @ a + I_like(a))
    x = torch.linalg.solve(w.T @ w + torch.eye(d, dtype=w.dtype), b)
    assert (cola.linalg.solve(ridge, b, CG(tol=1e-10)) - x).norm() < 4e-10 * b.norm()


# each a number of an operator, and the same of a matrix
def _product(a: Any, b: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    return (a @ b).square().sum(), lambda w: (w @ b).square().sum()


def _transpose(a: Any, b: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    return (a.T @ b).pow(3).sum(), lambda w: (w.T @ b).pow(3).sum()


def _solve(a: Any, b: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    return cola.linalg.solve(a, b).sum(), lambda w: torch.linalg.solve(w, b).sum()


def _logdet(a: Any, b: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    return cola.linalg.logdet(a), lambda w: torch.linalg.slogdet(w)[1]


def _trace(a: Any, b: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    return cola.linalg.trace(a), torch.trace


def _ridge(a: Any, b: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    found = cola.linalg.solve(cola.PSD(a.T @ a + I_like(a)), b, CG(tol=1e-13)).sum()
    return found, lambda w: torch.linalg.solve(w.T @ w + torch.eye(len(w)).to(w), b).sum()


@pytest.mark.parametrize(
    "function", [_product, _transpose, _solve, _logdet, _trace, _ridge], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("design", "d", "kind"), thinned(INVERTIBLE, 5), ids=str)
def test_gradients_reach_the_factors(
    design: str,
    d: int,
    kind: type,
    options: dict[str, Any],
    function: Callable[[Any, Tensor], tuple[Tensor, Callable[[Tensor], Tensor]]],
) -> None:
    layer = made(design, d, d, **options)
    b = vectors(d)
    learned = [p for name, p in layer.named_parameters() if name != "bias"]
    value, of_matrix = function(layer.as_operator(), b)
    found = torch.autograd.grad(value, learned)
    expected = torch.autograd.grad(of_matrix(layer.to_matrix()), learned)
    # the gradient of a solve has two solves in it
    rtol = 10 * d * condition(layer.to_matrix().detach()) ** 2 * EPS + 1e-11
    assert rtol < 0.1
    for one, other in zip(found, expected, strict=True):
        assert other.abs().max() > 0
        assert (one - other).norm() < rtol * other.norm()


def test_dtype_and_device_are_the_layers() -> None:
    layer = layer_of("monarch", 16, 16)
    a = layer.as_operator()
    assert a.dtype == (a @ torch.ones(16)).dtype == torch.float32
    with pytest.raises(TypeError, match=r"EinsumLinear\(.*\) got an input of dtype torch.float64"):
        a @ vectors(16)
    for design in DESIGNS:
        on_meta = layer_of(design, 36, 36, device="meta").as_operator()
        x = torch.ones(36, device="meta")
        for y in (on_meta @ x, on_meta.T @ x, x @ on_meta, cola.linalg.logdet(on_meta)):
            assert on_meta.device.type == y.device.type == "meta"


@pytest.mark.parametrize("design", ["btt-moe:experts=4,active=2", "dense-moe"])
def test_mixtures_are_refused(design: str) -> None:
    with pytest.raises(
        InvalidInput, match=r"layer: got MixtureLinear\(experts=.*; accepted: a layer of one matrix"
    ):
        layer_of(design, 16, 16).as_operator()


def test_layers_run_without_cola() -> None:
    code = """
import sys
sys.modules["cola"] = None
from nas.layers import layer_of
from tests.support.tiers import thinned
try:
    layer_of("monarch", 16, 16).as_operator()
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "cola" in done.stdout


@pytest.mark.filterwarnings(r"ignore:[\s\S]*typing.Callable deprecated")  # of cola's annotations
def test_cola_still_has_the_limits_that_the_guide_names() -> None:
    signs = set()
    for seed in range(8):
        torch.manual_seed(seed)
        layer = layer_of("btt:rho=1/4", 9, 9, dtype=torch.float64)
        a, w = layer.as_operator(), layer.to_matrix().detach()
        signs.add((cola.linalg.slogdet(a, LU())[0] * torch.linalg.det(w) > 0).item())
    assert signs == {True, False}
    small = cola.PSD(0.01 * (a.T @ a) + 0.01 * I_like(a))
    expected = torch.logdet(small.to_dense())
    assert expected < 0
    torch.testing.assert_close(cola.linalg.logdet(small), expected)
    found = cola.linalg.logdet(small, Lanczos(max_iters=9), Exact())
    torch.testing.assert_close(found, -expected)
    on_meta = layer_of("btt:rho=1/4", 9, 9, device="meta").as_operator()
    with pytest.raises(AssertionError, match="device mismatch"):
        cola.linalg.inv(on_meta)
    b = vectors(9)
    with pytest.raises(TypeError, match="multiple values for argument 'rhs'"):
        cola.linalg.solve(a, b, GMRES()).sum().backward()
