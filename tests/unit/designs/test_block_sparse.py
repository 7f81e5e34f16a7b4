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
from torch.func import functional_call, grad, vmap
from torch.utils.flop_counter import FlopCounterMode

from nas.designs.block_sparse import (
    BlockSparse,
    BlockSparseStructure,
    Butterfly,
    Channels,
    inspect_block_sparse,
    parse_block_sparse,
)
from nas.designs.design import family_of, structure_of
from nas.designs.theta import DENSE
from nas.errors import InvalidInput
from nas.layers import BlockSparseLinear, param_groups
from nas.planning.recipe import TEXT
from nas.planning.runs import fit
from tests.support.tiers import thinned

dimensions = st.integers(1, 40)
exponents = st.sampled_from([0.0, 0.25, 0.5, 2 / 3, 1.0])
patterns = st.builds(Butterfly, exponents, exponents) | st.builds(Channels, exponents)
designs = st.builds(BlockSparse, patterns)
SHAPES = [(12, 12), (12, 30), (30, 12), (13, 9), (1, 5), (5, 1)]
TEXTS = [
    "block-sparse:blocks=1/2",
    "block-sparse:blocks=1,stride=1/2",
    "block-sparse:pattern=channels,channels=1/2",
]


def spans(dimension: int, blocks: int) -> list[range]:
    """The indices of each block: numpy's split into parts of which the first are the larger."""
    parts = np.array_split(np.arange(dimension), blocks)
    return [range(int(part[0]), int(part[-1]) + 1) for part in parts]


def by_definition(layer: BlockSparseLinear) -> tuple[Tensor, Tensor]:
    """W, and where it may be other than zero, from the rule of the pattern entry by entry."""
    s, stored = layer.structure, layer.A.detach()
    w = torch.zeros(s.d_out, s.d_in, dtype=stored.dtype)
    mask = torch.zeros(s.d_out, s.d_in, dtype=torch.bool)
    if isinstance(s.design.pattern, Channels):
        for place, channel in enumerate(range(0, s.d_in, s.every)):
            w[:, channel] = stored[:, place]
            mask[:, channel] = True
        return w, mask
    limit = 2 ** (s.in_a_row - 1)
    rows, columns = spans(s.d_out, s.blocks), spans(s.d_in, s.blocks)
    for i in range(s.blocks):
        # one differing bit, below the stride limit; the block of the diagonal stands first
        others = [j for j in range(s.blocks) if (i ^ j).bit_count() == 1 and i ^ j < limit]
        for place, j in enumerate([i, *sorted(others, key=lambda j: i ^ j)]):
            for row, to in enumerate(rows[i]):
                for column, source in enumerate(columns[j]):
                    w[to, source] = stored[i, row, place * s.block_in + column]
                    mask[to, source] = True
    return w, mask


def layer_of(design: BlockSparse | str, d_in: int, d_out: int, **options: Any) -> BlockSparseLinear:
    return BlockSparseLinear(design, d_in, d_out, dtype=torch.float64, **options)


@settings(max_examples=120, deadline=None)
@given(designs, dimensions, dimensions, st.integers(0, 4))
def test_forward_is_the_product_with_the_stored_blocks(
    design: BlockSparse, d_in: int, d_out: int, n: int
) -> None:
    torch.manual_seed(0)
    layer = layer_of(design, d_in, d_out, bias=False)
    s = layer.structure
    x = torch.randn(n, d_in, dtype=torch.float64)
    expected, mask = by_definition(layer)
    torch.testing.assert_close(layer.to_matrix(), expected)
    torch.testing.assert_close(layer(x), x @ expected.T)
    torch.testing.assert_close(layer.plain(x, [layer.A]), x @ expected.T)
    two = torch.stack([layer.A, 2 * layer.A])
    torch.testing.assert_close(layer.matrices([two]), torch.stack([expected, 2 * expected]))
    assert layer(x).shape == (n, d_out)
    assert s.params == s.macs == layer.A.numel()
    assert s.waste == pytest.approx((s.macs - int(mask.sum())) / int(mask.sum()))
    assert mask.any(1).all()  # every output reads something
    if isinstance(design.pattern, Butterfly):
        assert mask.any(0).all()  # every input is read
    assert torch.linalg.matrix_rank(layer.to_matrix()) == s.rank == min(s.kept, d_out)
    assert s.is_dense == bool(mask.all())
    assert s.fingerprint.endswith(":dense") == s.is_dense
    assert structure_of(design, d_in, d_out).is_dense == s.is_dense


@pytest.mark.parametrize("power", range(1, 8))
def test_the_whole_flat_butterfly_has_the_published_number_of_blocks(power: int) -> None:
    """arXiv:2112.00029: with n blocks on a side and every stride, n (1 + log2 n) of n²."""
    n = 1 << power
    s = BlockSparseStructure.of(BlockSparse(Butterfly(0.5, 1)), n * n, n * n)
    if n > 2:  # two blocks that both reach each other are one matrix
        assert (s.blocks, s.block_in, s.block_out) == (n, n, n)
        assert s.macs == n * (1 + math.log2(n)) * n * n
    else:
        assert s.is_dense
        assert s.macs == 4 * 4


def test_a_worked_example() -> None:
    s = BlockSparseStructure.of(BlockSparse(Butterfly(0.5, 0.5)), 256, 1024)
    assert (s.blocks, s.strides, s.block_in, s.block_out) == (16, (1, 2), 16, 64)
    assert (s.macs, s.flops, s.params) == (16 * 3 * 16 * 64, 2 * 16 * 3 * 16 * 64, 16 * 3 * 16 * 64)
    assert s.fans("A") == (48, 192)
    assert s.init_std("A") == math.sqrt(48) / 48
    assert s.adam_lr_multiplier("A", 64) == 64 / 48
    assert s.adam_lr_multiplier("A") == 256 / 48
    assert s.fingerprint == "256x1024:butterfly:16.4"
    with pytest.raises(InvalidInput, match="factor: got B; accepted: A"):
        s.fans("B")
    c = BlockSparseStructure.of(BlockSparse(Channels(0.5)), 256, 1024)
    assert (c.every, c.kept, c.macs, c.rank) == (16, 16, 16 * 1024, 16)
    assert c.fans("A") == (16, 1024)
    assert c.fingerprint == "256x1024:channels:16"


@pytest.mark.parametrize("tokens", [1, 50])
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_flops_that_are_run_are_those_of_the_structure(
    tokens: int, text: str, shape: tuple[int, int]
) -> None:
    layer = BlockSparseLinear(text, *shape)
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(tokens, shape[0]))
    assert counter.get_total_flops() == layer.structure.flops * tokens


@given(designs | st.builds(BlockSparse, st.builds(Butterfly, st.floats(0, 1), st.floats(0, 1))))
def test_texts_are_read_back(design: BlockSparse) -> None:
    assert parse_block_sparse(design.text) == design
    named = parse_block_sparse(design.name)
    assert type(named.pattern) is type(design.pattern)
    assert named.options == pytest.approx(design.options, abs=1e-4)


def test_defaults_and_canonical_forms() -> None:
    half = BlockSparse(Butterfly(0.5, 1.0))
    assert parse_block_sparse("block-sparse") == half == half.canonical()
    channels = parse_block_sparse("block-sparse:pattern=channels")
    assert channels == BlockSparse(Channels(0.5)) == channels.canonical()
    assert BlockSparse(Butterfly(0, 0.5)).canonical() == DENSE
    assert BlockSparse(Channels(1)).canonical() == DENSE


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sparse", r"block_sparse: got sparse; accepted: block-sparse:pattern=butterfly"),
        ("block-sparse:pattern=ring", r"block_sparse: got .*ring; accepted"),
        ("block-sparse:channels=1/2", r"block_sparse: got .*; accepted"),
        ("block-sparse:pattern=channels,blocks=1/2", r"block_sparse: got .*; accepted"),
        ("block-sparse:size=3", r"block_sparse: got .*; accepted: block-sparse takes pattern="),
        ("block-sparse:blocks=1,blocks=1", r"each once"),
        ("block-sparse:blocks=2", r"block_sparse.blocks: got 2.0; accepted: a number from 0 to 1"),
        ("block-sparse:stride=", r"block_sparse.stride: got ; accepted: a decimal or a fraction"),
        (7, r"block_sparse: got 7; accepted"),
    ],
)
def test_texts_that_say_no_pattern_are_named(text: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        parse_block_sparse(text)


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), True, "1/2", None])
def test_exponents_off_their_range_are_named(value: Any) -> None:
    for made in (lambda: Butterfly(value, 1), lambda: Butterfly(1, value), lambda: Channels(value)):
        with pytest.raises(InvalidInput, match=r"block_sparse\.\w+: got .*a number from 0 to 1"):
            made()


def test_what_no_layer_can_be_built_from_is_named() -> None:
    with pytest.raises(InvalidInput, match=r"block_sparse: got 0.5; accepted: a Butterfly"):
        BlockSparse(0.5)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match=r"d_out: got 0; accepted: a whole number from 1"):
        BlockSparseStructure.of(BlockSparse(Channels(0.5)), 8, 0)
    with pytest.raises(InvalidInput, match=r"plan: got fast; accepted: None or gathered"):
        BlockSparseLinear("block-sparse", 8, 8, plan="fast")
    with pytest.raises(InvalidInput, match=r"block_sparse: got 0.5; accepted: a BlockSparse"):
        BlockSparseLinear(0.5, 8, 8)  # type: ignore[arg-type]
    structure = BlockSparseStructure.of(BlockSparse(Channels(0.5)), 8, 9)
    with pytest.raises(InvalidInput, match=r"d_in, d_out: got 8, 8; accepted: 8, 9"):
        BlockSparseLinear(structure, 8, 8)
    assert BlockSparseLinear(structure, 8, 9, plan="gathered").plan_for(3) == "gathered"


@pytest.mark.parametrize("text", TEXTS)
def test_inspection_is_plain(text: str) -> None:
    found = inspect_block_sparse(parse_block_sparse(text), 100, 150)
    assert json.loads(json.dumps(found)) == found
    layer = BlockSparseLinear(text, 100, 150)
    assert found["factors"][0]["shape"] == list(layer.A.shape)  # type: ignore[index]
    assert found["params"] == layer.A.numel()


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_against_finite_differences(
    text: str, shape: tuple[int, int], normalize: bool
) -> None:
    layer = layer_of(text, *shape, normalize=normalize, gain=True)
    with torch.no_grad():
        layer.A.mul_(1.5)  # past the cap, so that normalisation has a gradient
    x = torch.randn(2, 2, shape[0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *layer.parameters()))


@pytest.mark.parametrize("text", TEXTS)
def test_gradients_of_stacked_matrices(text: str) -> None:
    layer = layer_of(text, 13, 10)
    stacked = torch.randn(2, *layer.A.shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: layer.matrices([a]), (stacked,))


@pytest.mark.parametrize("text", TEXTS)
def test_function_transforms(text: str) -> None:
    layer = layer_of(text, 9, 12)
    parameters: dict[str, Tensor] = dict(layer.named_parameters())
    x = torch.randn(5, 9, dtype=torch.float64)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        total: Tensor = functional_call(layer, parameters, (x,)).square().sum()
        return total

    each = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(5):
        for name, found in grad(loss)(parameters, x[i]).items():
            torch.testing.assert_close(each[name][i], found)


@pytest.mark.parametrize("text", thinned(TEXTS, 1))
def test_compiles_as_one_graph_for_any_number_of_tokens(text: str) -> None:
    torch._dynamo.reset()
    layer = BlockSparseLinear(text, 37, 50, normalize=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (7, 300):
        x = torch.randn(tokens, 37)
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("text", TEXTS)
def test_autocast_computes_in_bfloat16_and_trains(text: str) -> None:
    layer = BlockSparseLinear(text, 32, 48)
    x = torch.randn(5, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.A.grad is not None
    assert layer.A.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("text", TEXTS)
def test_zero_init_is_the_zero_map_that_can_learn(text: str) -> None:
    layer = BlockSparseLinear(text, 24, 30, zero_init=True, normalize=True, gain=True)
    x = torch.randn(4, 24)
    assert torch.count_nonzero(layer(x)) == 0
    layer(x).sum().backward()
    assert layer.A.grad is not None
    assert layer.A.grad.abs().max() > 0


@pytest.mark.parametrize("text", TEXTS)
def test_no_tokens_give_an_empty_output_and_zero_gradients(text: str) -> None:
    layer = BlockSparseLinear(text, 23, 30, normalize=True, gain=True)
    for shape in ((0, 23), (3, 0, 23)):
        y = layer(torch.zeros(shape, requires_grad=True))
        assert y.shape == (*shape[:-1], 30)
        y.sum().backward()
    for parameter in layer.parameters():
        assert parameter.grad is not None
        assert torch.count_nonzero(parameter.grad) == 0


@pytest.mark.parametrize(("d_in", "d_out"), [(1024, 1024), (256, 1024), (1024, 256)])
@pytest.mark.parametrize("text", TEXTS)
def test_initialisation_has_the_spectral_norm_of_its_fans(text: str, d_in: int, d_out: int) -> None:
    """√(f_out/f_in), up to a constant: the condition of arXiv:2310.17813 for the stored blocks."""
    torch.manual_seed(0)
    layer = BlockSparseLinear(text, d_in, d_out, d_in_base=64)
    f_in, f_out = layer.structure.fans("A")
    std = math.sqrt(min(f_in, f_out)) / f_in
    assert layer.A.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * layer.A.numel()))
    norm = torch.linalg.matrix_norm(layer.to_matrix().detach(), 2).item()
    assert 1 <= norm / math.sqrt(f_out / f_in) < 3  # 2 of many entries in a row, more of few
    rates = {id(p): g["lr"] for g in param_groups(layer, 0.1) for p in g["params"]}
    assert rates[id(layer.A)] == pytest.approx(0.1 * 64 / f_in)


@settings(max_examples=30, deadline=None)
@given(designs, st.sampled_from([16, 48, 80]))
def test_a_fitted_design_costs_at_most_dense(design: BlockSparse, width: int) -> None:
    fitted = fit(TEXT, design, width)
    structures = [structure_of(fitted, *shape) for shape in ((width, width), (width, 4 * width))]
    assert not any(s.is_degenerate for s in structures)
    assert fit(TEXT, fitted, width) == fitted
    assert (fitted == DENSE) == all(s.is_dense for s in structures)


def test_padding_alone_makes_a_butterfly_too_dear() -> None:
    """So that the test above can fail: what is fitted is not always what was asked for."""
    asked = BlockSparse(Butterfly(1.0, 1.0))
    assert structure_of(asked, 5, 5).is_degenerate
    lowered = family_of(asked).fit(asked, 5, lambda design: [structure_of(design, 5, 5)])
    assert isinstance(lowered, BlockSparse)
    assert not structure_of(lowered, 5, 5).is_degenerate


def test_state_dict_round_trip() -> None:
    one, other = (BlockSparseLinear("block-sparse", 18, 50) for _ in range(2))
    other.load_state_dict(one.state_dict())
    x = torch.randn(3, 18)
    assert torch.equal(one(x), other(x))
    assert set(one.state_dict()) == {"A", "bias", "_extra_state"}
