"""Dense weights projected to every family of one matrix: what is exact, what never gets worse."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nas.designs.chain import parse_chain
from nas.designs.chain_structure import ChainStructure
from nas.designs.einsum import Structure
from nas.designs.taxonomy import parse_theta
from nas.errors import InvalidInput
from nas.layers import (
    BlastLinear,
    BlockSparseLinear,
    ChainLinear,
    ConvolutionLinear,
    EinsumLinear,
    MixtureLinear,
    StructuredLinear,
    SumLinear,
    layer_of,
    replace_linears,
)
from nas.layers.alternating import nearest_factors
from nas.layers.fitting import Fit, fit_factors
from tests.support.tiers import FULL, only

CHAINS = (
    "btt:cores=3,rho=1/8", "tensor-train:cores=3,rho=1/4", "btt:cores=4,rho=1/4",
    "1/4,1/4,1/4,1/8,1/8,0,1/4,1/4,1/4,1/8,0,1/8,1/4,1/4",
)  # fmt: skip
ONE_FACTOR = (
    "block-sparse", "block-sparse:blocks=3/4,stride=1/2",
    "block-sparse:pattern=channels,channels=1/2", "convolution", "convolution:kernel=1",
)  # fmt: skip
SUMS = (
    "lost", "pixelfly", "sum(monarch;convolution)", "sum(kronecker;btt:cores=3,rho=1/8)",
    "sum(blast;block-sparse)",
)  # fmt: skip
ALL = ("btt:rho=1/4", "dense", *CHAINS, "blast", "blast:blocks=1/4,rho=1/2", *ONE_FACTOR, *SUMS)
dimensions = st.integers(2, 16)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Matrices this small gain nothing from more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def layer(text: str, d_out: int, d_in: int) -> StructuredLinear:
    return layer_of(text, d_in, d_out, bias=False, dtype=torch.float64)


def random(*shape: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draw, dtype=torch.float64)


def matrix(of: StructuredLinear, factors: Sequence[Tensor]) -> Tensor:
    """W by the products of the layer, which no fit uses."""
    eye = torch.eye(of.in_features, dtype=torch.float64)
    return of.plain(eye, [factor.double() for factor in factors]).T


def member(of: StructuredLinear, seed: int = 0) -> Tensor:
    return matrix(of, [random(*p.shape, seed=seed + i) for i, p in enumerate(of.parameters())])


def error(of: StructuredLinear, w: Tensor, fit: Fit) -> float:
    return float((w.double() - matrix(of, fit.factors)).norm() / w.double().norm())


def is_padded(structure: object) -> bool:
    assert isinstance(structure, ChainStructure)
    shape = structure.d_in, structure.d_out
    return (structure.padded_in, structure.padded_out) != shape


@settings(max_examples=6, deadline=None)
@given(st.sampled_from(CHAINS), dimensions, dimensions, st.integers(0, 9))
def test_a_matrix_of_a_chain_is_recovered_where_nothing_is_padded(
    text: str, d_in: int, d_out: int, seed: int
) -> None:
    found = ChainStructure.of(parse_chain(text), d_in, d_out)
    structure = ChainStructure(found.theta, found.padded_in, found.padded_out, found.sizes)
    of = ChainLinear(structure, structure.d_in, structure.d_out, False, dtype=torch.float64)
    w = member(of, seed)
    fit = of.nearest(w)
    assert [f.shape for f in fit.factors] == list(structure.shapes)
    assert fit.relative_error == pytest.approx(error(of, w, fit), abs=1e-12)
    assert fit.relative_error < 1e-6


@pytest.mark.parametrize("shape", [(13, 19), pytest.param((53, 37), marks=FULL)])
@pytest.mark.parametrize("text", CHAINS[:3])
def test_a_matrix_of_a_chain_is_recovered_through_padding(
    text: str, shape: tuple[int, int]
) -> None:
    of = layer(text, *shape)
    assert is_padded(of.structure)
    w = member(of)
    assert (w - matrix(of, of._start(w))).norm() > 0.01 * w.norm() or text.startswith("btt")
    assert of.nearest(w).relative_error < 1e-6


@pytest.mark.parametrize("name", ["monarch", "btt:rho=1/4", "kronecker"])
def test_a_chain_of_two_factors_is_fitted_as_two_factors(name: str) -> None:
    w, structure = random(36, 16), Structure.of(parse_theta(name), 16, 36)
    of = ChainLinear(parse_theta(name), 16, 36, False, dtype=torch.float64)
    one, other = of.nearest(w), fit_factors(w, structure)
    assert one.relative_error == pytest.approx(other.relative_error, rel=1e-9)


@settings(max_examples=10, deadline=None)
@given(st.sampled_from(ONE_FACTOR), dimensions, dimensions, st.integers(0, 9))
def test_one_factor_is_the_least_squares_solution(
    text: str, d_in: int, d_out: int, seed: int
) -> None:
    of, w = layer(text, d_out, d_in), random(d_out, d_in, seed=seed)
    (parameter,) = of.parameters()
    units = torch.eye(parameter.numel(), dtype=torch.float64).view(-1, *parameter.shape)
    columns = torch.stack([matrix(of, [unit]).flatten() for unit in units], dim=1)
    solution = torch.linalg.lstsq(columns, w.flatten().unsqueeze(1), driver="gelsd").solution
    expected = (columns @ solution).view_as(w)
    fit = of.nearest(w)
    torch.testing.assert_close(matrix(of, fit.factors), expected, rtol=1e-9, atol=1e-9)
    assert fit.relative_error == pytest.approx(error(of, w, fit), abs=1e-12)
    again = of.nearest(expected)
    assert again.relative_error < 1e-9


@settings(max_examples=4, deadline=None)
@given(st.sampled_from((*CHAINS, "blast", "blast:blocks=1/4,rho=1/2")), dimensions, dimensions)
def test_no_sweep_raises_the_error(text: str, d_in: int, d_out: int) -> None:
    of, w = layer(text, d_out, d_in), random(d_out, d_in)
    start = of._start(w)
    begun = float((w - matrix(of, start)).norm() / w.norm())
    assert begun <= 1 + 1e-12

    def after(sweeps: int) -> float:
        return nearest_factors(
            w, lambda f: of.matrices([t.unsqueeze(0) for t in f])[0], start,
            [of.structure.init_std(name) for name in of.structure.factors],
            max_sweeps=sweeps, tolerance=0,
        ).relative_error  # fmt: skip

    errors = [begun, *(after(n) for n in (0, 1, 2, 4))]
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(errors))
    assert of.nearest(w).relative_error <= begun + 1e-12


@pytest.mark.parametrize("shape", [(12, 12), (13, 9)])
def test_blast_is_no_farther_than_the_best_matrix_of_its_rank(shape: tuple[int, int]) -> None:
    of, w = layer("blast", *shape), random(*shape)
    assert isinstance(of, BlastLinear)
    u, sigma, vh = torch.linalg.svd(w)
    rank = of.structure.rho
    by_rank = float(sigma[rank:].norm() / sigma.norm())
    fit = of.nearest(w)
    assert fit.relative_error < 0.95 * by_rank
    low = (u[:, :rank] * sigma[:rank]) @ vh[:rank]
    assert of.nearest(low).relative_error < 1e-12


@pytest.mark.parametrize(("sweeps", "bound"), only([(10, 5e-5)], [(10, 5e-5), (100, 1e-6)]))
def test_a_blast_matrix_is_recovered_from_a_start_near_to_its_factors(
    sweeps: int, bound: float
) -> None:
    of = layer("blast:blocks=1/4,rho=1/4", 16, 16)
    own = [random(*p.shape, seed=i) for i, p in enumerate(of.parameters())]
    factors = [t + 1e-3 * random(*t.shape, seed=9) for t in own]
    w, errors = matrix(of, own), [1e-3]
    for _ in range(sweeps):
        fit = of.nearest(w, factors)
        factors = list(fit.factors)
        errors.append(fit.relative_error)
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(errors))
    assert errors[-1] < bound


@settings(max_examples=4, deadline=None)
@given(st.sampled_from(SUMS), dimensions, dimensions)
def test_a_sum_is_no_farther_than_either_part_alone(text: str, d_in: int, d_out: int) -> None:
    of = layer(text, d_out, d_in)
    assume(isinstance(of, SumLinear))
    assert isinstance(of, SumLinear)
    w = random(d_out, d_in)
    fit = of.nearest(w)
    assert fit.relative_error == pytest.approx(error(of, w, fit), abs=1e-12)
    for part in of._parts:
        assert fit.relative_error <= part.nearest(w).relative_error + 1e-12


@pytest.mark.parametrize(
    "text", only(["lost"], ["lost", "sum(monarch;convolution)", "sum(kronecker;low-rank:rho=1/4)"])
)
def test_a_sum_is_recovered_where_its_parts_can_be_told_apart(text: str) -> None:
    of = layer(text, 53, 37)
    w = of.to_matrix().detach()
    assert isinstance(of, SumLinear)
    assert min(part.nearest(w).relative_error for part in of._parts) > 0.1
    assert of.nearest(w).relative_error < 1e-6


@pytest.mark.parametrize("text", only((CHAINS[0], "blast"), (*CHAINS, "blast")))
@pytest.mark.parametrize("shape", [(16, 16), (13, 19)])
def test_factors_are_balanced_at_their_initial_stds(text: str, shape: tuple[int, int]) -> None:
    of = layer(text, *shape)
    fit = of.nearest(random(*shape))
    sizes = [
        factor.square().mean().sqrt().item() / of.structure.init_std(name)
        for name, factor in zip(of.structure.factors, fit.factors, strict=True)
    ]
    assert sizes == pytest.approx([sizes[0]] * len(sizes))


@pytest.mark.parametrize("text", [CHAINS[0], CHAINS[3], "blast", "lost"])
@pytest.mark.parametrize("rank", [0, 1])
def test_what_a_weight_leaves_empty_can_learn(text: str, rank: int) -> None:
    """A weight of rank 0 or 1: every factor has a gradient within two steps."""
    of = layer(text, 24, 24)
    w = random(24, rank) @ random(rank, 24, seed=1)
    of.take_nearest(w)
    assert of.relative_error == pytest.approx(0, abs=1e-9) if not rank else True
    x, target = random(64, 24), random(64, 24, seed=2)
    optimizer = torch.optim.SGD(of.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        (of(x) - target).square().mean().backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in of.parameters())


@pytest.mark.parametrize("text", only(("blast", "lost", CHAINS[0]), ALL))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_is_kept_and_the_error_is_that_of_the_rounded_factors(
    text: str, dtype: torch.dtype
) -> None:
    of, w = layer(text, 16, 24), random(16, 24).to(dtype)
    fit = of.nearest(nn.Parameter(w))
    assert all(f.dtype == dtype and not f.requires_grad for f in fit.factors)
    assert fit.relative_error == pytest.approx(error(of, w, fit), abs=1e-9)


@pytest.mark.parametrize("text", [CHAINS[0], "blast", "convolution", "lost"])
@pytest.mark.parametrize("scale", [1e-290, 1e290])
def test_extreme_scales_are_fitted(text: str, scale: float) -> None:
    of, w = layer(text, 12, 16), random(12, 16)
    expected = of.nearest(w).relative_error
    assert of.nearest(w * scale).relative_error == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (EinsumLinear, "monarch"), (EinsumLinear, "dense"), (ChainLinear, CHAINS[0]),
        (BlastLinear, "blast"), (BlockSparseLinear, "block-sparse"),
        (ConvolutionLinear, "convolution"), (SumLinear, "pixelfly"),
    ],
)  # fmt: skip
def test_a_layer_is_made_of_a_linear_one(kind: type[StructuredLinear], text: str) -> None:
    dense = nn.Linear(18, 12).double().eval()
    made = kind.from_linear(dense, text, d_in_base=6)
    assert type(made) is kind
    assert made.bias is not None
    assert torch.equal(made.bias, dense.bias)
    assert (made.d_in_base, made.training) == (6, False)
    lost = (made.to_matrix() - dense.weight).norm() / dense.weight.norm()
    assert made.relative_error == pytest.approx(lost.item(), abs=1e-9)
    with pytest.raises(InvalidInput, match=r"accepted: a torch\.nn\.Linear"):
        kind.from_linear(nn.Conv1d(1, 1, 1), text)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="meta device"):
        kind.from_linear(nn.Linear(8, 8, device="meta"), text)
    dense.weight.data[0, 0] = math.nan
    with pytest.raises(InvalidInput, match="1 entries that are NaN"):
        kind.from_linear(dense, text)
    with pytest.raises(InvalidInput, match=r"shape \(d_out, d_in\) = \(12, 18\)"):
        made.nearest(torch.zeros(18, 12))


@pytest.mark.parametrize("text", only(("blast", "lost", "convolution", CHAINS[0]), ALL))
def test_a_replaced_model_computes_what_the_fitted_matrices_do(text: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16), nn.Linear(24, 16))
    model = model.double()
    model[3].weight = model[2].weight  # shared, and so fitted once
    weights = [model.get_parameter(f"{i}.weight").detach().clone() for i in (0, 2)]
    biases = [model.get_parameter(f"{i}.bias") for i in (0, 2)]
    surgery = replace_linears(model, text, from_dense=True)
    x = random(5, 16)
    fitted = []
    for weight, row in zip(weights, surgery.replaced, strict=False):
        fit = layer(text, *weight.shape).nearest(weight)
        assert row.relative_error == pytest.approx(fit.relative_error, abs=1e-12)
        fitted.append(matrix(layer(text, *weight.shape), fit.factors))
    hidden = nn.functional.gelu(x @ fitted[0].T + biases[0])
    torch.testing.assert_close(model[:3](x), hidden @ fitted[1].T + biases[1])
    assert surgery.replaced[2].relative_error == surgery.replaced[1].relative_error
    shared = [dict(model[i].named_parameters()) for i in (2, 3)]
    assert all(shared[1][name] is p for name, p in shared[0].items() if name != "bias")


@pytest.mark.parametrize("text", ["btt-moe", "low-rank-moe:experts=2", "dense-moe"])
def test_mixtures_are_refused_by_name(text: str) -> None:
    model = nn.Sequential(nn.Linear(24, 36))
    match = rf"0\.from_dense: got {text.partition(':')[0]}.*; accepted: a design of one matrix"
    with pytest.raises(InvalidInput, match=match):
        replace_linears(model, text, from_dense=True)
    assert type(model[0]) is nn.Linear
    with pytest.raises(InvalidInput, match="MixtureLinear; accepted: a design of one matrix"):
        MixtureLinear.from_linear(nn.Linear(24, 36), text)
