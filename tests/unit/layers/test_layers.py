from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nas.designs.einsum import Structure
from nas.designs.theta import Theta
from nas.errors import InvalidInput
from nas.layers import EinsumLinear, param_groups
from tests.support.paths import DATA
from tests.support.strategies import thetas

GOLDEN = json.loads((DATA / "layers.json").read_text())
NAMES = ["dense", "monarch", "btt:rho=1/4", "low-rank:rho=1/2", "kronecker",
         "tensor-train:rho=1/4", "1/2,1/4,1/4,1/4,1/2,1/4,1/4"]  # fmt: skip
dimensions = st.integers(1, 40)


def by_definition(layer: EinsumLinear, x: Tensor) -> Tensor:
    """y[δ,ε,φ] = Σ B[β,γ,ε,φ,ρ] A[α,γ,δ,φ,ρ] x[α,β,γ], in numpy, from the formula alone."""
    s, structure = layer.structure.sizes, layer.structure
    if structure.is_dense:
        return x @ layer.weight.T
    a = layer.A.detach().numpy().transpose(4, 0, 3, 2, 1)  # (γ,ρ,φ,δ,α) → (α,γ,δ,φ,ρ)
    b = layer.B.detach().numpy().transpose(3, 1, 4, 0, 2)  # (φ,γ,ρ,β,ε) → (β,γ,ε,φ,ρ)
    padded = np.zeros((len(x), structure.padded_in))
    padded[:, : structure.d_in] = x.detach().numpy()
    # flattened input is (γ, β, α) with α innermost, flattened output (φ, ε, δ) with δ innermost
    cube = padded.reshape(-1, s.gamma, s.beta, s.alpha)
    y = np.einsum("bgefr,agdfr,ngba->nfed", b, a, cube)
    return torch.from_numpy(y.reshape(len(x), structure.padded_out)[:, : structure.d_out])


@settings(max_examples=150, deadline=None)
@given(thetas(), dimensions, dimensions, st.integers(0, 5))
def test_forward_is_the_formula(theta: Theta, d_in: int, d_out: int, n: int) -> None:
    layer = EinsumLinear(theta, d_in, d_out, bias=False, dtype=torch.float64)
    x = torch.randn(n, d_in, dtype=torch.float64)
    y = layer(x)
    assert y.shape == (n, d_out)
    torch.testing.assert_close(y, by_definition(layer, x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(y, x @ layer.to_matrix().T, rtol=1e-10, atol=1e-10)


def test_the_formula_helper_notices_a_wrong_layer() -> None:
    layer = EinsumLinear("1/2,1/4,1/4,1/4,1/2,1/4,1/4", 24, 36, bias=False, dtype=torch.float64)
    x = torch.randn(3, 24, dtype=torch.float64)
    before = by_definition(layer, x)
    with torch.no_grad():
        layer.A.copy_(layer.A.flip(4))
    assert not torch.allclose(layer(x), before)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(12, 20), (13, 7)])
def test_gradients_against_finite_differences(
    name: str, shape: tuple[int, int], normalize: bool
) -> None:
    layer = EinsumLinear(name, *shape, normalize=normalize, gain=True, dtype=torch.float64)
    with torch.no_grad():
        for factor in layer.factors().values():
            factor.mul_(1.5)  # past the cap, so that normalisation has a gradient
    x = torch.randn(2, 3, shape[0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *layer.parameters()))


@pytest.mark.parametrize("name", NAMES)
def test_every_input_reaches_every_output_at_awkward_sizes(name: str) -> None:
    layer = EinsumLinear(name, 37, 53, bias=False, dtype=torch.float64)
    assert layer.to_matrix().abs().min() > 0


@pytest.mark.parametrize("row", GOLDEN, ids=lambda r: f"{r['name']}-{r['d_in']}")
def test_initialisation_and_rates_are_those_of_the_papers_code(row: dict[str, object]) -> None:
    torch.manual_seed(0)
    theta = Theta.of(row["theta"])
    layer = EinsumLinear(theta, row["d_in"], row["d_out"], sizing="paper")  # type: ignore[arg-type]
    rates = {id(p): g["lr"] for g in param_groups(layer, 1.0) for p in g["params"]}
    for factor, core in zip(layer.factors().values(), row["cores"], strict=True):  # type: ignore[call-overload]
        assert factor.numel() == math.prod(core["shape"])
        assert rates[id(factor)] == pytest.approx(core["adam_lr_mult"], rel=1e-12)
        # the standard deviation of n normal draws has a relative error of 1/sqrt(2n)
        error = 5 / math.sqrt(2 * factor.numel())
        assert factor.std().item() == pytest.approx(core["init_std"], rel=error)


def test_learning_rates_follow_the_base_model() -> None:
    dense = EinsumLinear("dense", 256, 64, d_in_base=64)
    low_rank = EinsumLinear("low-rank:rho=1/2", 256, 64, d_in_base=64)
    groups = param_groups(torch.nn.ModuleList([dense, low_rank]), 0.1)
    rates = {p: g["lr"] for g in groups for p in g["params"]}
    assert rates[dense.weight] == pytest.approx(0.1 * 64 / 256)
    assert rates[low_rank.A] == pytest.approx(0.1 * 64 / (2 * 256))
    assert rates[low_rank.B] == pytest.approx(0.1 * 64 / (2 * 8))
    assert dense.bias is not None
    assert rates[dense.bias] == pytest.approx(0.1)


@pytest.mark.parametrize("name", NAMES)
def test_zero_init_is_the_zero_map_that_can_learn(name: str) -> None:
    layer = EinsumLinear(name, 24, 30, zero_init=True, normalize=True, gain=True)
    x = torch.randn(4, 24)
    assert torch.count_nonzero(layer(x)) == 0
    layer(x).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters() if p.grad is not None)
    last = layer.weight if layer.structure.is_dense else layer.B
    assert last.grad is not None
    assert last.grad.abs().max() > 0


@pytest.mark.parametrize("name", NAMES)
def test_normalisation_caps_the_rms_and_leaves_smaller_factors(name: str) -> None:
    layer = EinsumLinear(name, 32, 32, bias=False, normalize=True, dtype=torch.float64)
    plain = EinsumLinear(name, 32, 32, bias=False, dtype=torch.float64)
    for scale in (0.5, 3.0):
        with torch.no_grad():
            for f, factor in layer.factors().items():
                factor.div_(factor.square().mean().sqrt()).mul_(layer.structure.init_std(f) * scale)
                plain.factors()[f].copy_(factor / max(scale, 1.0))
        torch.testing.assert_close(layer.to_matrix(), plain.to_matrix())


def test_same_generator_same_factors() -> None:
    layer = EinsumLinear("monarch", 16, 16)
    layer.reset_parameters(torch.Generator().manual_seed(3))
    first = layer.A.clone()
    layer.reset_parameters(torch.Generator().manual_seed(3))
    assert torch.equal(first, layer.A)


def test_autocast_computes_in_bfloat16_and_trains() -> None:
    layer = EinsumLinear("btt:rho=1/4", 32, 48)
    x = torch.randn(5, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    assert layer.A.grad is not None
    assert layer.A.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", ["dense", "monarch"])
def test_a_wrong_input_is_named(name: str) -> None:
    layer = EinsumLinear(name, 8, 8)
    with pytest.raises(ValueError, match=r"got an input of shape \(2, 9\).*must be 8"):
        layer(torch.zeros(2, 9))
    with pytest.raises(ValueError, match=r"got an input of shape \(\).*must be 8"):
        layer(torch.zeros(()))
    for dtype in (torch.int64, torch.complex64, torch.float64, torch.bool):
        with pytest.raises(TypeError, match=rf"got an input of dtype {dtype}.*torch.float32"):
            layer(torch.zeros(2, 8, dtype=dtype))
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(TypeError, match=r"dtype torch.int64.*floating point under autocast"),
    ):
        layer(torch.zeros(2, 8, dtype=torch.int64))


@pytest.mark.parametrize(
    ("theta", "message"),
    [
        ((0.5, 0, 0.25, 0, 0.5, 0.5, 0), r"theta: got alpha=0.5, beta=0, gamma=0.25 \(sum 0.75\)"),
        ((2, 0, 0, 0, 0.5, 0.5, 0), r"theta.alpha: got 2; accepted: a number from 0 to 1"),
        ("butterfly", r"theta: got butterfly; accepted: dense, low-rank"),
        ((0.5, 0.5), r"theta: got .*got 2 numbers"),
        ((float("nan"), 0, 0, 0, 0.5, 0.5, 0), r"theta.alpha: got nan"),
    ],
)
def test_a_theta_off_its_space_is_named(theta: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        EinsumLinear(theta, 8, 8)


@pytest.mark.parametrize("name", NAMES)
def test_no_tokens_give_an_empty_output_and_zero_gradients(name: str) -> None:
    layer = EinsumLinear(name, 24, 30, normalize=True, gain=True)
    for shape in ((0, 24), (3, 0, 24)):
        x = torch.zeros(shape, requires_grad=True)
        y = layer(x)
        assert y.shape == (*shape[:-1], 30)
        y.sum().backward()
        assert x.grad is not None
        assert x.grad.shape == shape
    for parameter in layer.parameters():
        assert parameter.grad is not None
        assert torch.count_nonzero(parameter.grad) == 0


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_nan_never_becomes_a_number(name: str, normalize: bool) -> None:
    layer = EinsumLinear(name, 24, 30, normalize=normalize)
    last = layer.weight if layer.structure.is_dense else layer.B
    with torch.no_grad():
        last.fill_(float("nan"))
    assert torch.isnan(layer(torch.randn(3, 24))).all()
    x = torch.randn(3, 24)
    x[1, 5] = float("nan")
    y = EinsumLinear(name, 24, 30)(x)
    assert torch.isnan(y[1]).all()
    assert torch.isfinite(y[[0, 2]]).all()


def _block_diag(blocks: Tensor) -> Tensor:
    made: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    return made


def _axes(layer: EinsumLinear) -> tuple[int, ...]:
    s = layer.structure.sizes
    return s.alpha, s.beta, s.gamma, s.delta, s.epsilon, s.phi, s.rho


def test_special_cases_are_what_their_names_say() -> None:
    def layer_of(name: str, d_in: int, d_out: int) -> EinsumLinear:
        return EinsumLinear(name, d_in, d_out, bias=False, dtype=torch.float64)

    dense = layer_of("dense", 12, 20)
    linear = torch.nn.Linear(12, 20, bias=False, dtype=torch.float64)
    linear.load_state_dict(dense.state_dict())
    x = torch.randn(3, 12, dtype=torch.float64)
    torch.testing.assert_close(dense(x), linear(x))

    low_rank = layer_of("low-rank:rho=1/2", 25, 36)
    a, b = low_rank.A[0, :, 0, 0], low_rank.B[0, 0, :, 0]  # (ρ, d_in), (ρ, d_out)
    torch.testing.assert_close(low_rank.to_matrix(), b.T @ a)

    kronecker = layer_of("kronecker", 36, 100)
    assert _axes(kronecker)[2] == _axes(kronecker)[5] == 1
    a, b = kronecker.A[0, 0, 0], kronecker.B[0, 0, 0]  # (δ, α), (β, ε)
    torch.testing.assert_close(kronecker.to_matrix(), torch.kron(b.T.contiguous(), a))

    monarch = layer_of("monarch", 36, 64)
    alpha, _, gamma, _, _, phi, _ = _axes(monarch)
    first = _block_diag(monarch.A[:, 0, :, 0])  # γ blocks (φ, α)
    second = _block_diag(monarch.B[:, :, 0, 0].mT)  # φ blocks (ε, γ)
    order = torch.arange(gamma * phi).view(gamma, phi).T.flatten()  # (γ, φ) → (φ, γ)
    permutation = torch.eye(gamma * phi, dtype=torch.float64)[order]
    torch.testing.assert_close(monarch.to_matrix(), second @ permutation @ first)
    assert alpha * gamma == 36

    block_dense = layer_of("block-dense:blocks=1/4,rho=1/2", 256, 48)  # arXiv:2406.16450
    assert _axes(block_dense) == (64, 1, 4, 1, 48, 1, 7)
    first = _block_diag(block_dense.A[:, :, 0, 0])  # 4 blocks (ρ, α)
    second = block_dense.B.view(4 * 7, 48).T
    torch.testing.assert_close(block_dense.to_matrix(), second @ first)
    assert block_dense.structure.params == block_dense.structure.macs == 7 * (256 + 4 * 48)

    train = layer_of("tensor-train:rho=1/4", 36, 100)
    alpha, beta, _, delta, epsilon, _, rho = _axes(train)
    assert rho > 1
    x = torch.randn(4, beta, alpha, dtype=torch.float64)
    cores = train.A[0, :, 0], train.B[0, 0]  # (ρ, δ, α), (ρ, β, ε)
    y = torch.stack([sum(cores[1][r].T @ x[n] @ cores[0][r].T for r in range(rho))  # type: ignore[misc]
                     for n in range(4)])  # fmt: skip
    torch.testing.assert_close(train(x.flatten(1)), y.reshape(4, epsilon * delta))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(32, 48), (31, 37)])
def test_to_linear_and_back(name: str, shape: tuple[int, int]) -> None:
    torch.manual_seed(
        0
    )  # from some weights the fit of an unnamed structure ends at a local optimum
    layer = EinsumLinear(name, *shape, dtype=torch.float64)
    assert layer.bias is not None
    with torch.no_grad():
        layer.bias.normal_()
    linear = layer.to_linear()
    x = torch.randn(5, shape[0], dtype=torch.float64)
    torch.testing.assert_close(linear(x), layer(x))
    again = EinsumLinear.from_linear(linear, name)
    assert again.relative_error is not None
    lost = (again.to_matrix() - linear.weight).norm() / linear.weight.norm()
    assert again.relative_error == pytest.approx(lost.item(), abs=1e-9)
    if shape == (32, 48):
        assert again.relative_error < 1e-3
    torch.testing.assert_close(again.bias, layer.bias)


def test_from_linear_says_what_it_needs() -> None:
    with pytest.raises(InvalidInput, match=r"linear: got Conv1d; accepted: a torch\.nn\.Linear"):
        EinsumLinear.from_linear(torch.nn.Conv1d(1, 1, 1), "monarch")  # type: ignore[arg-type]
    broken = torch.nn.Linear(8, 8)
    with torch.no_grad():
        broken.weight[0, 0] = float("nan")
    for name in ("monarch", "dense"):
        with pytest.raises(InvalidInput, match="weight: got"):
            EinsumLinear.from_linear(broken, name)


def test_state_dict_round_trip() -> None:
    one, other = (EinsumLinear("kronecker", 18, 50) for _ in range(2))
    other.load_state_dict(one.state_dict())
    x = torch.randn(3, 18)
    assert torch.equal(one(x), other(x))
    assert set(one.state_dict()) == {"A", "B", "bias", "_extra_state"}
    assert set(EinsumLinear("dense", 4, 4).state_dict()) == {"weight", "bias"}


@given(thetas(), dimensions, dimensions)
@settings(max_examples=50, deadline=None)
def test_parameters_are_counted(theta: Theta, d_in: int, d_out: int) -> None:
    layer = EinsumLinear(theta, d_in, d_out, bias=False)
    assert sum(p.numel() for p in layer.parameters()) == Structure.of(theta, d_in, d_out).params
