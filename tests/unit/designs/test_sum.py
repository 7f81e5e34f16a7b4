from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.utils.flop_counter import FlopCounterMode

from nas.designs.aligned import Aligned
from nas.designs.block_sparse import BlockSparse, Butterfly, Channels
from nas.designs.convolution import Convolution, ConvolutionStructure
from nas.designs.design import Design, inspect_design, parse_design, structure_of
from nas.designs.einsum import Structure
from nas.designs.mixture import Mixture
from nas.designs.structure import LinearStructure
from nas.designs.sum import Sum, SumStructure, parse_sum
from nas.designs.taxonomy import parse_theta
from nas.designs.theta import DENSE
from nas.errors import InvalidInput
from nas.layers import SumLinear, build_layer, layer_of, param_groups
from nas.planning.recipe import TEXT
from nas.planning.runs import fit
from tests.support.strategies import thetas
from tests.support.tiers import thinned
from tests.unit.designs.test_block_sparse import designs as block_sparse
from tests.unit.designs.test_chain import chains, three

dimensions = st.integers(1, 40)
kernels = st.sampled_from([0.0, 0.5, 1.0])
parts = thetas() | three | block_sparse | st.builds(Convolution, kernels)
sums = st.builds(lambda one, other: Sum((one, other)), parts, parts)
TEXTS = [
    "pixelfly:rank=1/2,blocks=1/2",
    "lost:rank=1/2,channels=1/2",
    "sum(monarch;btt:cores=3,rho=1/8)",
    "sum(convolution:kernel=1/2;block-sparse:blocks=1,stride=1/2)",
]
SHAPES = [(12, 12), (12, 30), (30, 13), (16, 9)]


def parts_of(layer: SumLinear) -> list[Tensor]:
    """The matrices of both parts, each by a layer of its own with the same numbers."""
    found = []
    for which, structure in zip(("first", "second"), layer.structure.parts, strict=True):
        part = build_layer(structure, bias=False, dtype=torch.float64)
        with torch.no_grad():
            for name, parameter in part.named_parameters():
                parameter.copy_(layer.get_parameter(f"{which}_{name}"))
        found.append(part.to_matrix().detach())
    return found


def layer_in_float64(text: str, d_in: int, d_out: int, **options: Any) -> SumLinear:
    return SumLinear(text, d_in, d_out, dtype=torch.float64, **options)


@settings(max_examples=120, deadline=None)
@given(sums, dimensions, dimensions, st.integers(0, 4))
def test_forward_is_the_sum_of_the_products(design: Sum, d_in: int, d_out: int, n: int) -> None:
    torch.manual_seed(0)
    structure = structure_of(design, d_in, d_out)
    each = [structure_of(part, d_in, d_out) for part in design.parts]
    if not isinstance(structure, SumStructure):
        assert structure == Structure.of(DENSE, d_in, d_out)
        assert any(s.is_dense for s in each)
        return
    layer = SumLinear(structure, d_in, d_out, bias=False, dtype=torch.float64)
    x = torch.randn(n, d_in, dtype=torch.float64)
    expected = sum(parts_of(layer), torch.zeros(d_out, d_in, dtype=torch.float64))
    torch.testing.assert_close(layer.to_matrix(), expected)
    torch.testing.assert_close(layer(x), x @ expected.T)
    torch.testing.assert_close(layer.plain(x, layer.effective_factors()), x @ expected.T)
    stacked = [torch.stack([f, f]) for f in layer.effective_factors()]
    torch.testing.assert_close(layer.matrices(stacked), torch.stack([expected, expected]))
    assert structure.macs == sum(s.macs for s in each)
    assert structure.params == sum(s.params for s in each)
    assert structure.params == sum(p.numel() for p in layer.parameters())
    assert structure.is_degenerate == (structure.macs > d_in * d_out)
    assert torch.linalg.matrix_rank(expected) <= structure.rank <= min(d_in, d_out)
    assert [len(layer.factors()), len(set(structure.factors))] == [len(structure.factors)] * 2


@settings(max_examples=60, deadline=None)
@given(parts, parts, dimensions, dimensions)
def test_the_order_of_the_parts_says_nothing(
    one: Design, other: Design, d_in: int, d_out: int
) -> None:
    design = Sum((one, other))
    assert design == Sum((other, one)) == Sum((one.canonical(), other.canonical()))
    assert design.text == Sum((other, one)).text
    assert parse_design(design.text) == design
    assert design.canonical() == (DENSE if DENSE in design.parts else design)
    assert isinstance(design.described, str)
    assert len(design.name) <= 96
    found = structure_of(design, d_in, d_out)
    if isinstance(found, SumStructure):
        turned = SumStructure(found.second, found.first)
        assert turned.fingerprint == found.fingerprint
        assert SumLinear(turned, d_in, d_out)._shapes() == SumLinear(found, d_in, d_out)._shapes()


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 1), block_sparse)
def test_names_say_low_rank_plus_sparse(rank: float, sparse: BlockSparse) -> None:
    low_rank = parse_theta("low-rank")
    design = Sum((sparse, type(low_rank)(1, 0, 0, 0, 1, 0, rank)))
    if DENSE in design.parts:  # of what is dense at every dimension nothing else is said
        assert design.family == "sum"
        return
    family = "pixelfly" if isinstance(sparse.pattern, Butterfly) else "lost"
    assert design.family == family
    assert design.text.startswith(f"{family}:rank=")
    assert parse_sum(design.text) == design
    written = f"sum({low_rank.text.rpartition(',')[0]},{rank:.20f};{sparse.text})"
    again = parse_sum(written)
    assert again.family == family


def test_named_sums_and_their_defaults() -> None:
    low_rank = parse_theta("low-rank:rho=1/2")
    assert parse_sum("pixelfly") == Sum((low_rank, BlockSparse(Butterfly(0.5, 1))))
    assert parse_sum("lost") == Sum((low_rank, BlockSparse(Channels(0.5))))
    found = parse_sum("pixelfly:rank=1/4,blocks=3/4,stride=1/2")
    assert found == parse_sum("sum(block-sparse:blocks=3/4,stride=1/2; low-rank:rho=1/4)")
    assert found.name == "pixelfly:rank=1/4,blocks=3/4,stride=1/2"
    assert parse_sum("lost:channels=1/4").name == "lost:rank=1/2,channels=1/4"
    assert parse_sum("sum(monarch;kronecker)").family == "sum"


def test_pixelfly_is_low_rank_outside_the_mask_of_its_paper() -> None:
    """arXiv:2112.00029: beside U V, entries where blocks differ in one bit at most."""
    torch.manual_seed(0)
    layer = layer_in_float64("pixelfly:rank=1/4,blocks=1/2", 64, 128, bias=False)
    rows, columns = torch.arange(128) // 16, torch.arange(64) // 8
    differing = torch.tensor([[(int(i) ^ int(j)).bit_count() for j in columns] for i in rows])
    mask = differing <= 1
    # low-rank: A is (1, ρ, 1, 1, d_in), B is (1, 1, ρ, 1, d_out)
    down = layer.get_parameter("second_A").view(3, 64)
    up = layer.get_parameter("second_B").view(3, 128)
    rest = layer.to_matrix() - up.T @ down
    torch.testing.assert_close(rest[~mask], torch.zeros(int((~mask).sum()), dtype=rest.dtype))
    assert (rest[mask] != 0).all()
    assert layer.structure.params == int(mask.sum()) + 3 * (64 + 128)


def test_lost_is_low_rank_in_the_channels_that_are_not_kept() -> None:
    torch.manual_seed(0)
    layer = layer_in_float64("lost:rank=1/4,channels=1/2", 64, 128, bias=False)
    kept = torch.zeros(64, dtype=torch.bool)
    kept[::8] = True
    w = layer.to_matrix()
    assert torch.linalg.matrix_rank(w[:, ~kept]) == 3
    assert torch.linalg.matrix_rank(w) == layer.structure.rank == 3 + 8
    assert layer.structure.params == 8 * 128 + 3 * (64 + 128)


def test_a_worked_example() -> None:
    s = SumStructure.of(parse_sum("pixelfly:rank=1/2,blocks=1/2"), 256, 1024)
    assert s.macs == s.params == 16 * 5 * 16 * 64 + 16 * (256 + 1024)
    assert s.flops == 2 * s.macs
    assert s.factors == ("first_A", "second_A", "second_B")
    assert [s.fans(f) for f in s.factors] == [(80, 320), (256, 16), (16, 1024)]
    # alone √80/80, √16/256 and √16/16; √2 of one factor, its root of each of two
    stds = [math.sqrt(80) / 80 / math.sqrt(2), 4 / 256 / 2**0.25, 4 / 16 / 2**0.25]
    assert [s.init_std(f) for f in s.factors] == pytest.approx(stds)
    # alone 64/80, 64/(2·256) and 64/(2·16)
    rates = [64 / 80 / 2, 64 / 256 / 4, 64 / 16 / 4]
    assert [s.adam_lr_multiplier(f, 64) for f in s.factors] == pytest.approx(rates)
    assert s.fingerprint == "sum(256x1024:butterfly:16.16;256x1024:256.1.1.1.1024.1.16)"
    assert s.waste == 0
    for factor in ("A", "third_A", "first_B"):
        with pytest.raises(InvalidInput, match=f"factor: got {factor}; accepted: first_A"):
            s.fans(factor)


def test_waste_is_that_of_both_parts() -> None:
    s = SumStructure.of(parse_sum("sum(convolution:kernel=1/2;monarch)"), 10, 14)
    useful = [part.macs / (1 + part.waste) for part in s.parts]  # type: ignore[attr-defined]
    assert all(part.waste > 0 for part in s.parts)  # type: ignore[attr-defined]
    assert s.waste == pytest.approx((s.macs - sum(useful)) / sum(useful))


@pytest.mark.parametrize("text", ["sum(dense;monarch)", "sum(monarch;block-sparse:blocks=0)"])
def test_a_sum_with_dense_is_dense(text: str) -> None:
    design = parse_design(text)
    assert parse_design(design.text) == design
    assert design.canonical() == fit(TEXT, design, 64) == DENSE
    assert structure_of(design, 48, 80) == Structure.of(DENSE, 48, 80)
    found = inspect_design(design, 48, 80)
    assert (found["macs"], found["degenerate"], len(found["parts"])) == (48 * 80, False, 2)  # type: ignore[arg-type]
    assert type(layer_of(design, 48, 80)).__name__ == "EinsumLinear"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("total(monarch;dense)", r"sum: got total.*; accepted: two designs of single layers"),
        ("sum(monarch)", r"sum: got sum\(monarch\); accepted: two designs of single layers"),
        ("sum(monarch;dense;dense)", r"sum: got .*; accepted: two designs of single layers"),
        ("sum(monarch;kronecker", r"sum: got .*; accepted: two designs of single layers"),
        ("sum(monarch;sum(monarch;dense))", r"sum: got .*neither a mixture, a sum nor aligned"),
        ("sum(btt-moe;monarch)", r"sum: got btt-moe.*neither a mixture, a sum nor aligned"),
        ("sum(monarch;ffn-moe)", r"sum: got ffn-moe.*neither a mixture, a sum nor aligned"),
        ("sum(monarch@heads;dense)", r"sum: got .*@heads.*neither a mixture, a sum nor aligned"),
        ("sum(nonsense;dense)", r"theta: got nonsense; accepted"),
        ("sum(;dense)", r"theta: got ; accepted"),
        ("pixelfly:channels=1/2", r"sum: got .*; accepted: pixelfly takes rank=, blocks=, stride="),
        ("lost:rank=1,rank=1", r"sum: got .*each once"),
        ("lost:rank=2", r"sum.rank: got 2; accepted: a number from 0 to 1"),
        ("lost:channels=x", r"sum.channels: got x; accepted: a decimal or a fraction"),
        (7, r"sum: got 7; accepted"),
    ],
)
def test_texts_that_say_no_sum_are_named(text: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        parse_sum(text)


def test_what_no_sum_can_be_built_from_is_named() -> None:
    monarch = parse_theta("monarch")
    one, wide = Structure.of(monarch, 16, 16), Structure.of(monarch, 16, 32)
    mixture = Mixture(monarch, 4, 2)
    for part in (mixture, Aligned(monarch), Sum((monarch, monarch))):
        with pytest.raises(InvalidInput, match="neither a mixture, a sum nor aligned"):
            Sum((monarch, part))
    with pytest.raises(InvalidInput, match="sum: got 1 parts; accepted: two designs"):
        Sum((monarch,))  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="16 → 16 and 16 → 32; accepted: two structures"):
        SumStructure(one, wide)
    nested = SumStructure(one, ConvolutionStructure.of(Convolution(), 16, 16))
    for refused in (nested, structure_of(mixture, 16, 16), Structure.of(DENSE, 16, 16), "monarch"):
        with pytest.raises(InvalidInput, match="neither dense, nor sums, nor mixtures"):
            SumStructure(one, refused)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="neither dense, nor sums, nor mixtures"):
        SumLinear("pixelfly", 1, 9)
    with pytest.raises(InvalidInput, match="d_out: got 0; accepted: a whole number from 1"):
        SumLinear("pixelfly", 8, 0)
    with pytest.raises(InvalidInput, match=r"sum: got 0\.5; accepted: a Sum, its text"):
        SumLinear(0.5, 8, 8)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="d_in, d_out: got 16, 32; accepted: 16, 16"):
        SumLinear(nested, 16, 32)


@pytest.mark.parametrize("text", TEXTS)
def test_inspection_is_plain(text: str) -> None:
    found: dict[str, Any] = inspect_design(parse_design(text), 100, 150)
    assert json.loads(json.dumps(found)) == found
    assert found["macs"] == sum(part["macs"] for part in found["parts"])
    s = SumStructure.of(parse_sum(found["text"]), found["d_in"], found["d_out"])
    assert [part["fingerprint"] for part in found["parts"]] == [p.fingerprint for p in s.parts]
    assert [parse_design(part["text"]).text for part in found["parts"]] == [
        part["text"] for part in found["parts"]
    ]
    assert found["rank_is"] == ("upper bound" if text.startswith("sum") else "generic")


@pytest.mark.parametrize("tokens", [1, 50])
@pytest.mark.parametrize("shape", SHAPES)
def test_flops_that_are_run_are_those_of_the_structure(tokens: int, shape: tuple[int, int]) -> None:
    """Of parts that run as they are charged, whatever the shape."""
    layer = SumLinear(TEXTS[3], *shape)
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(tokens, shape[0]))
    assert counter.get_total_flops() == layer.structure.flops * tokens


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("text", thinned(TEXTS, 2))
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_against_finite_differences(
    text: str, shape: tuple[int, int], normalize: bool
) -> None:
    layer = layer_in_float64(text, *shape, normalize=normalize, gain=True)
    with torch.no_grad():
        for factor in layer.factors().values():
            factor.mul_(1.5)  # past the cap, so that normalisation has a gradient
    x = torch.randn(2, 2, shape[0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *layer.parameters()))


@pytest.mark.parametrize("text", TEXTS)
def test_function_transforms(text: str) -> None:
    layer = layer_in_float64(text, 9, 12)
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
    layer = SumLinear(text, 37, 50, normalize=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (7, 300):
        x = torch.randn(tokens, 37)
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("text", TEXTS)
def test_autocast_computes_in_bfloat16_and_trains(text: str) -> None:
    layer = SumLinear(text, 32, 48)
    x = torch.randn(5, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert {p.grad.dtype for p in layer.parameters() if p.grad is not None} == {torch.float32}
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("text", TEXTS)
def test_zero_init_is_the_zero_map_that_can_learn(text: str, normalize: bool) -> None:
    layer = SumLinear(text, 24, 30, zero_init=True, normalize=normalize, gain=normalize)
    x = torch.randn(4, 24)
    assert torch.count_nonzero(layer(x)) == 0
    layer(x).sum().backward()
    count = len(layer.structure.first.factors)
    factors = list(layer.factors().values())
    for last in (factors[count - 1], factors[-1]):  # of each part
        assert torch.count_nonzero(last) == 0
        assert last.grad is not None
        assert last.grad.abs().max() > 0
    for other in (*factors[: count - 1], *factors[count:-1]):
        assert torch.count_nonzero(other) == other.numel()


@pytest.mark.parametrize("text", TEXTS)
def test_no_tokens_give_an_empty_output_and_zero_gradients(text: str) -> None:
    layer = SumLinear(text, 24, 30, normalize=True, gain=True)
    for shape in ((0, 24), (3, 0, 24)):
        y = layer(torch.zeros(shape, requires_grad=True))
        assert y.shape == (*shape[:-1], 30)
        y.sum().backward()
    for parameter in layer.parameters():
        assert parameter.grad is not None
        assert torch.count_nonzero(parameter.grad) == 0


@pytest.mark.parametrize("text", TEXTS)
def test_outputs_start_with_the_mean_variance_of_the_parts(text: str) -> None:
    torch.manual_seed(0)
    structure = SumStructure.of(parse_sum(text), 256, 256)
    x = torch.randn(64, 256)

    def mean_square(part: LinearStructure) -> float:
        layer, found = build_layer(part, bias=False), []
        for _ in range(20):
            layer.reset_parameters()
            found.append(layer(x).square().mean().item())
        return math.fsum(found) / len(found)

    alone = [mean_square(part) for part in structure.parts]
    assert mean_square(structure) == pytest.approx(sum(alone) / 2, rel=0.1)


@pytest.mark.parametrize(("d_in", "d_out"), [(512, 512), (128, 512), (512, 128)])
@pytest.mark.parametrize("text", TEXTS)
def test_initialisation_has_a_spectral_norm_of_the_size_of_its_parts(
    text: str, d_in: int, d_out: int
) -> None:
    torch.manual_seed(0)
    structure = SumStructure.of(parse_sum(text), d_in, d_out)

    def norm(layer: Any) -> float:
        found: float = torch.linalg.matrix_norm(layer.to_matrix().detach(), 2).item()
        return found

    alone = [norm(build_layer(part)) for part in structure.parts]
    assert 0.9 * max(alone) / math.sqrt(2) < norm(build_layer(structure))
    assert norm(build_layer(structure)) < 1.1 * sum(alone) / math.sqrt(2)


def test_learning_rates_of_a_model() -> None:
    layer = SumLinear("pixelfly:rank=1/2,blocks=1/2", 256, 256, d_in_base=64)
    rates = {id(p): g["lr"] for g in param_groups(layer, 0.1) for p in g["params"]}
    found = {name: rates[id(p)] for name, p in layer.named_parameters()}
    assert found == pytest.approx(
        {"first_A": 0.1 * 64 / 80 / 2, "second_A": 0.1 * 64 / 256 / 4,
         "second_B": 0.1 * 64 / 16 / 4, "bias": 0.1}
    )  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(st.builds(lambda a, b: Sum((a, b)), parts | chains(), parts), st.sampled_from([16, 48, 80]))
def test_a_fitted_sum_costs_at_most_dense(design: Sum, width: int) -> None:
    fitted = fit(TEXT, design, width)
    structures = [structure_of(fitted, *shape) for shape in ((width, width), (width, 4 * width))]
    assert not any(s.is_degenerate for s in structures)
    assert fit(TEXT, fitted, width) == fitted


def test_both_parts_are_lowered_until_they_fit() -> None:
    """So that the test above can fail: a sum is dear where neither part is."""
    design = parse_design("pixelfly:rank=0.8,blocks=1/2")
    assert not any(structure_of(p, 64, 64).is_degenerate for p in design.parts)  # type: ignore[attr-defined]
    assert structure_of(design, 64, 64).is_degenerate
    fitted = fit(TEXT, design, 64)
    assert isinstance(fitted, Sum)
    assert fitted.family == "pixelfly"
    assert fitted.name == "pixelfly:rank=0.6400,blocks=1/2,stride=4/5"


def test_plans_are_those_of_the_parts() -> None:
    layer = SumLinear("pixelfly", 64, 64)
    assert layer.plan is None
    chosen = str(layer.plan_for(1024))
    assert chosen.startswith("gathered + ")
    x = torch.randn(5, 64)
    expected = layer(x)
    for plan in (chosen, "gathered + b-first tile=8 first=batched second=batched gemm=blas"):
        layer.plan = plan
        assert layer.plan == plan == layer.plan_for(3)
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    layer.plan = None
    assert layer.plan_for(1024) == chosen
    for refused in ("gathered", "gathered + nonsense", 7):
        with pytest.raises(InvalidInput, match="plan"):
            layer.plan = refused  # type: ignore[assignment]
    assert layer.plan is None


@pytest.mark.parametrize("text", TEXTS)
def test_parts_are_no_modules_and_hold_no_numbers(text: str) -> None:
    layer = SumLinear(text, 20, 24, normalize=True, gain=True)
    assert list(layer.children()) == list(layer.buffers()) == []
    names = [f"first_{f}" for f in layer.structure.first.factors]
    names += [f"second_{f}" for f in layer.structure.second.factors]
    gains = [f"gain_{name}" for name in names]
    assert [name for name, _ in layer.named_parameters()] == [*names, *gains, "bias"]
    assert set(layer.state_dict()) == {*names, *gains, "bias", "_extra_state"}
    other = SumLinear(text, 20, 24, normalize=True, gain=True)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, 20)
    assert torch.equal(other(x), layer(x))
    assert torch.allclose(layer.to_linear()(x), layer(x), atol=1e-5)
