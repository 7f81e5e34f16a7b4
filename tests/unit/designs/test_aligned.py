"""Heads that are blocks, in every family that has blocks, against explicit constructions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nas.designs.axes import divide_axes
from nas.designs.blast import Blast, BlastStructure
from nas.designs.chain_structure import ChainStructure
from nas.designs.design import LinearRole, parse_design, structure_in, structure_of
from nas.designs.einsum import Structure
from nas.designs.mixture import MixtureStructure
from nas.designs.sum import SumStructure
from nas.errors import InvalidInput
from nas.layers import StructuredLinear, build_layer, layer_of, replace_linears
from nas.planning import runs
from nas.planning.recipe import TEXT
from nas.training.tasks import build_model
from tests.support.tiers import only

CHAINS = (
    "btt:cores=3,rho=1/8", "tensor-train:cores=3,rho=1/4", "btt:cores=4,rho=1/4",
    "1/4,1/4,1/4,1/8,1/8,0,1/4,1/4,1/4,1/8,0,1/8,1/4,1/4",
)  # fmt: skip
OTHERS = ("blast", "blast:blocks=1/4,rho=3/4", "pixelfly", "sum(monarch;btt:cores=3,rho=1/8)")
MIXTURES = ("btt-moe:experts=2,active=1", "low-rank-moe:rho=3/4,experts=2,active=1",
            "einsum-moe:theta=1/2 1/4 1/4 1/4 1/2 1/4 0,experts=2,active=1")  # fmt: skip
SIDES = ("out", "in")


def layer(text: str, d_in: int, d_out: int, heads: int, side: str) -> StructuredLinear:
    options: dict[str, Any] = {"bias": False, "dtype": torch.float64}
    return layer_of(f"{text}@heads", d_in, d_out, heads=heads, side=side, **options)


def heads_of(w: Tensor, heads: int, side: str) -> Tensor:
    """(heads, rows or columns of a head, the others)."""
    return (w if side == "out" else w.T).reshape(heads, -1, w.shape[side == "out"])


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(CHAINS), st.integers(1, 6), st.integers(2, 12), st.integers(2, 40),
       st.sampled_from(SIDES))  # fmt: skip
def test_a_place_of_the_axis_that_all_factors_share_is_a_head(
    text: str, heads: int, size: int, other: int, side: str
) -> None:
    d_in, d_out = (other, heads * size) if side == "out" else (heads * size, other)
    of = layer(text, d_in, d_out, heads, side)
    s = of.structure
    if s.is_dense:
        return
    assert isinstance(s, ChainStructure)
    w = of.to_matrix().detach()
    axis = (s.output_axes if side == "out" else s.input_axes)[0]
    assert axis.name == f"{side}_" + "".join(map(str, range(1, s.n_factors + 1)))
    assert axis.size == heads
    for h in range(heads):
        # the einsum of the slices of head h, without the axis of heads
        terms, slices = [], []
        for axes, factor in zip(s.factor_axes, of.parameters(), strict=True):
            slices.append(factor.detach().select(axes.index(axis), h))
            terms.append("".join(a.letter for a in axes if a is not axis))
        outer = [a for a in (*s.output_axes, *s.input_axes) if a is not axis]
        made = torch.einsum(f"{','.join(terms)}->{''.join(a.letter for a in outer)}", *slices)
        rows = size if side == "out" else s.padded_out
        one = made.reshape(rows, -1)[:d_out, : d_in if side == "out" else size]
        expected = (
            w[h * size : (h + 1) * size] if side == "out" else w[:, h * size : (h + 1) * size]
        )
        torch.testing.assert_close(one, expected)


@pytest.mark.parametrize("side", SIDES)
def test_a_chain_keeps_ranks_and_the_other_side(side: str) -> None:
    free = structure_of(parse_design("btt:cores=3,rho=1/4"), 96, 96)
    role = LinearRole("", 96, 96, 96, 8, side)  # type: ignore[arg-type]
    found = structure_in(parse_design("btt:cores=3,rho=1/4@heads"), role)
    assert isinstance(free, ChainStructure)
    assert isinstance(found, ChainStructure)
    assert found.sizes[-2:] == free.sizes[-2:]
    kept = "output_axes" if side == "in" else "input_axes"
    assert [a.size for a in getattr(found, kept)] == [a.size for a in getattr(free, kept)]
    assert found.padded_in == found.padded_out == 96
    assert ChainStructure.of(found.theta, 96, 96).n_factors == 3


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", [(24, 36), (36, 24)])
def test_a_row_or_column_of_blast_blocks_is_a_head(shape: tuple[int, int], side: str) -> None:
    of = layer("blast:blocks=1/4,rho=1/2", *shape, 6, side)
    s = of.structure
    assert isinstance(s, BlastStructure)
    v, mix, u = (p.detach() for p in of.parameters())
    assert (s.rows if side == "out" else s.columns) == 6
    blocks = [
        [u[i] @ torch.diag(mix[:, i, j]) @ v[j] for j in range(s.columns)] for i in range(s.rows)
    ]
    w = torch.cat([torch.cat(row, dim=1) for row in blocks])[: s.d_out, : s.d_in]
    torch.testing.assert_close(of.to_matrix().detach(), w)
    free = BlastStructure.of(Blast(0.25, 0.5), *shape)
    assert s.rho == free.rho
    assert (s.columns if side == "out" else s.rows) == (
        free.columns if side == "out" else free.rows
    )
    with pytest.raises(InvalidInput, match="heads: got 7; accepted: a divisor of the dimension"):
        BlastStructure(Blast(), 24, 24, heads_out=7)


@pytest.mark.parametrize("side", SIDES)
def test_a_sum_aligns_the_parts_that_have_blocks(side: str) -> None:
    of = layer("pixelfly:rank=1/2,blocks=1/2", 32, 32, 4, side)
    free = structure_of(parse_design("pixelfly:rank=1/2,blocks=1/2"), 32, 32)
    low = structure_in(
        parse_design("low-rank:rho=1/2@heads"),
        LinearRole("", 32, 32, 32, 4, side),  # type: ignore[arg-type]
    )
    assert isinstance(of.structure, SumStructure)
    assert isinstance(free, SumStructure)
    assert isinstance(low, Structure)
    assert of.structure == SumStructure(free.first, low)
    sparse, *rest = of.parameters()
    w = build_layer(free.first, bias=False).matrices([sparse.detach().unsqueeze(0)])[0]
    w = w + build_layer(low, bias=False).matrices([p.detach().unsqueeze(0) for p in rest])[0]
    torch.testing.assert_close(of.to_matrix().detach(), w)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("text", MIXTURES)
def test_each_expert_of_a_mixture_has_heads(text: str, side: str) -> None:
    of = layer(text, 24, 24, 4, side)
    assert isinstance(of.structure, MixtureStructure)
    whole = structure_of(parse_design(text), 24, 24)
    assert isinstance(whole, MixtureStructure)
    expert = of.structure.expert
    assert expert.sizes.rho == whole.expert.sizes.rho
    with torch.no_grad():
        before = of.matrices([f.detach().unsqueeze(0) for f in of.effective_factors()])[0]
        a, b = (f.detach().clone() for f in of.effective_factors())
        # (E, γ, ρ, φ, δ, α) and (E, φ, γ, ρ, β, ε): the axis of heads is φ, or γ
        places = (3, 1) if side == "out" else (1, 2)
        sizes = (expert.sizes.phi, expert.sizes.gamma)
        assert sizes[side == "in"] == 4
        for axis, factor in zip(places, (a, b), strict=True):
            factor.select(axis, 1).mul_(2.0)
        after = of.matrices([a.unsqueeze(0), b.unsqueeze(0)])[0]
    for one, other in zip(before, after, strict=True):
        changed = (heads_of(other - one, 4, side)).abs().amax((1, 2))
        assert changed[1] > 0
        assert changed.sum() == changed[1]


@pytest.mark.parametrize("text", only((CHAINS[0], "blast", "pixelfly"), (*CHAINS, *OTHERS)))
def test_a_model_with_aligned_heads_fits_its_budget_and_trains(text: str) -> None:
    torch.manual_seed(0)
    design = runs.fit(TEXT, parse_design(f"{text}@heads"), 48)
    assert parse_design(design.text) == design
    model = build_model(TEXT, design, 48)
    loss = model(torch.zeros(2, 8, dtype=torch.long)).square().mean()
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    "text",
    [
        "dense",
        "convolution",
        "block-sparse",
        "dense-moe",
        "ffn-moe",
        "sum(convolution;block-sparse)",
    ],
)
def test_designs_without_blocks_are_refused(text: str) -> None:
    match = "heads: got .*; accepted: two factors, a mixture of them, a chain, blast, or a sum"
    with pytest.raises(InvalidInput, match=match):
        parse_design(f"{text}@heads")
    with pytest.raises(InvalidInput, match="side: got up; accepted: in"):
        layer("blast", 8, 8, 2, "up")
    with pytest.raises(InvalidInput, match="heads: got 3; accepted: a divisor"):
        layer(CHAINS[0], 8, 8, 3, "out")


@given(st.integers(1, 200), st.lists(st.floats(0, 1), min_size=1, max_size=4), st.integers(0, 2))
def test_axes_divide_a_number_exactly(number: int, shares: list[float], needed: int) -> None:
    sizes = divide_axes(number, shares, needed)
    product = 1
    for size in sizes:
        product *= size
    assert (product, len(sizes)) == (number, len(shares))
    assert sizes[0] > 1 or not needed or number == 1


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.mlp = nn.Linear(24, 72), nn.Linear(24, 24), nn.Linear(24, 24)


@pytest.mark.parametrize("text", only(("monarch",), ("monarch", CHAINS[0], "blast", "pixelfly",
                                                   "btt-moe:experts=2,active=1")))  # fmt: skip
def test_replaced_projections_have_heads(text: str) -> None:
    model = Attention()
    heads = {"q*": (12, "out"), "out": (4, "in")}
    from_dense = "moe" not in text
    surgery = replace_linears(model, f"{text}@heads", heads=heads, from_dense=from_dense)
    found = {row.names[0]: row.structure for row in surgery.replaced}
    design = parse_design(f"{text}@heads")
    assert found == {
        "qkv": structure_in(design, LinearRole("", 24, 72, 24, 12, "out")),
        "out": structure_in(design, LinearRole("", 24, 24, 24, 4, "in")),
        "mlp": structure_of(parse_design(text), 24, 24),
    }
    if from_dense:
        assert all(0 < (row.relative_error or 0) < 1 for row in surgery.replaced)


@pytest.mark.parametrize(
    ("theta", "heads", "match"),
    [
        ("monarch@heads", None, "which layers make heads"),
        ("monarch@heads", {"mlp": (5, "out")}, r"mlp\.heads: got 5; accepted: a divisor"),
        ("monarch@heads", {"mlp": (4, "up")}, r"mlp\.side: got up"),
        ("monarch@heads", {"nothing": (4, "in")}, "heads: got nothing; accepted: what selects"),
        ("monarch@heads", {"mlp": 4}, "heads: got 4; accepted: by pattern"),
        ("monarch@heads", 4, "heads: got 4; accepted: by pattern"),
        ("monarch", {"mlp": (4, "out")}, r"mlp\.heads: got 4; accepted: none"),
    ],
)
def test_heads_that_cannot_be_are_named(theta: str, heads: Any, match: str) -> None:
    model = Attention()
    with pytest.raises(InvalidInput, match=match):
        replace_linears(model, theta, heads=heads)
    assert type(model.mlp) is nn.Linear


def test_layers_that_share_a_weight_share_their_heads() -> None:
    model = Attention()
    model.mlp.weight = model.out.weight
    with pytest.raises(InvalidInput, match="whose weight it shares"):
        replace_linears(model, "monarch@heads", heads={"out": (4, "in")})
