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

from nas.designs.convolution import (
    Convolution,
    ConvolutionStructure,
    inspect_convolution,
    parse_convolution,
)
from nas.errors import InvalidInput
from nas.layers import param_groups
from nas.layers.convolution import ConvolutionLinear

dimensions = st.integers(1, 40)
kernels = st.sampled_from([0.0, 0.25, 0.5, 2 / 3, 1.0])
SHAPES = [(12, 12), (12, 30), (30, 12), (24, 24), (1, 5), (5, 1)]


def circulants(layer: ConvolutionLinear) -> Tensor:
    """W from its definition: row l of a block has tap k in column (l + k) mod L."""
    s, size = layer.structure, layer.structure.length
    w = torch.zeros(s.padded_out, s.padded_in, dtype=layer.A.dtype)
    for o in range(s.channels_out):
        for i in range(s.channels_in):
            for k in range(s.taps):
                for row in range(size):
                    w[o * size + row, i * size + (row + k) % size] += layer.A[o, i, k].detach()
    return w[: s.d_out, : s.d_in]


def layer_of(kernel: float, d_in: int, d_out: int, **options: Any) -> ConvolutionLinear:
    return ConvolutionLinear(Convolution(kernel), d_in, d_out, dtype=torch.float64, **options)


@settings(max_examples=60, deadline=None)
@given(kernels, dimensions, dimensions, st.integers(0, 4))
def test_forward_is_the_product_with_circulant_blocks(
    kernel: float, d_in: int, d_out: int, n: int
) -> None:
    layer = layer_of(kernel, d_in, d_out, bias=False)
    x = torch.randn(n, d_in, dtype=torch.float64)
    expected = circulants(layer)
    torch.testing.assert_close(layer.to_matrix(), expected)
    torch.testing.assert_close(layer(x), x @ expected.T)
    assert layer(x).shape == (n, d_out)


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 1), dimensions, dimensions)
def test_integers(kernel: float, d_in: int, d_out: int) -> None:
    s = ConvolutionStructure.of(Convolution(kernel), d_in, d_out)
    assert s.padded_in >= d_in
    assert s.padded_out >= d_out
    assert min(s.padded_in / d_in, s.padded_out / d_out) == 1
    assert 1 <= s.taps <= s.length
    layer = ConvolutionLinear(s, d_in, d_out, bias=False)
    assert s.params == layer.A.numel()
    # every number in the padded matrix is one multiplication
    assert s.macs == s.padded_in * s.padded_out * s.taps // s.length
    cut = torch.count_nonzero(circulants(layer)).item()
    assert s.waste == pytest.approx((s.macs - cut) / cut)
    if s.taps == s.length and d_in == s.padded_in and d_out == s.padded_out:
        assert s.macs == d_in * d_out
        assert not s.is_degenerate


@settings(max_examples=40, deadline=None)
@given(kernels, dimensions, dimensions)
def test_rank_is_full(kernel: float, d_in: int, d_out: int) -> None:
    torch.manual_seed(0)
    layer = layer_of(kernel, d_in, d_out)
    assert torch.linalg.matrix_rank(layer.to_matrix()) == layer.structure.rank == min(d_in, d_out)


def test_a_worked_example() -> None:
    s = ConvolutionStructure.of(Convolution(0.5), 1024, 4096)
    assert (s.length, s.channels_in, s.channels_out, s.taps) == (1024, 1, 4, 32)
    assert (s.macs, s.flops, s.params) == (4 * 32 * 1024, 8 * 32 * 1024, 128)
    assert s.fans("A") == (32, 128)
    assert s.init_std("A") == math.sqrt(32) / 32
    assert s.adam_lr_multiplier("A", 64) == 64 / 32
    assert s.fingerprint == "1024x4096:convolution:32"
    with pytest.raises(InvalidInput, match="factor: got B; accepted: A"):
        s.fans("B")


@pytest.mark.parametrize("tokens", [1, 50])
@pytest.mark.parametrize("shape", SHAPES[:4])
def test_flops_that_are_run_are_those_of_the_structure(tokens: int, shape: tuple[int, int]) -> None:
    layer = ConvolutionLinear("convolution", *shape)
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(tokens, shape[0]))
    assert counter.get_total_flops() == layer.structure.flops * tokens


@given(st.floats(0, 1))
def test_texts_are_read_back(kernel: float) -> None:
    convolution = Convolution(kernel)
    assert parse_convolution(convolution.text) == convolution
    assert parse_convolution(convolution.name).kernel == pytest.approx(kernel, abs=1e-4)
    assert parse_convolution("convolution") == Convolution(0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("conv", r"convolution: got conv; accepted: convolution or convolution:kernel=1/2"),
        ("convolution:size=3", r"convolution: got convolution:size=3; accepted"),
        ("convolution:kernel=2", r"convolution.kernel: got 2.0; accepted: a number from 0 to 1"),
        ("convolution:kernel=", r"convolution.kernel: got ; accepted: a decimal or a fraction"),
        (7, r"convolution: got 7; accepted"),
    ],
)
def test_texts_that_say_no_convolution_are_named(text: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        parse_convolution(text)


@pytest.mark.parametrize("kernel", [-0.1, 1.1, float("nan"), True, "1/2", None])
def test_kernels_off_their_range_are_named(kernel: Any) -> None:
    with pytest.raises(InvalidInput, match=r"convolution.kernel: got .*a number from 0 to 1"):
        Convolution(kernel)


def test_what_no_layer_can_be_built_from_is_named() -> None:
    with pytest.raises(InvalidInput, match=r"d_out: got 0; accepted: a whole number from 1"):
        ConvolutionStructure.of(Convolution(), 8, 0)
    with pytest.raises(InvalidInput, match=r"plan: got fft; accepted: None or conv1d"):
        ConvolutionLinear("convolution", 8, 8, plan="fft")
    with pytest.raises(InvalidInput, match=r"convolution: got 0.5; accepted: a Convolution"):
        ConvolutionLinear(0.5, 8, 8)  # type: ignore[arg-type]
    structure = ConvolutionStructure.of(Convolution(), 8, 9)
    with pytest.raises(InvalidInput, match=r"d_in, d_out: got 8, 8; accepted: 8, 9"):
        ConvolutionLinear(structure, 8, 8)
    assert ConvolutionLinear(structure, 8, 9, plan="conv1d").plan_for(3) == "conv1d"


def test_inspection_is_plain() -> None:
    found = inspect_convolution(Convolution(0.5), 100, 150)
    assert json.loads(json.dumps(found)) == found
    assert found["taps"] == 10
    assert found["padded_out"] == 200
    assert found["waste"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_against_finite_differences(shape: tuple[int, int], normalize: bool) -> None:
    layer = layer_of(0.5, *shape, normalize=normalize, gain=True)
    with torch.no_grad():
        layer.A.mul_(1.5)  # past the cap, so that normalisation has a gradient
    x = torch.randn(2, 2, shape[0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *layer.parameters()))


def test_function_transforms() -> None:
    layer = layer_of(0.5, 8, 12)
    parameters: dict[str, Tensor] = dict(layer.named_parameters())
    x = torch.randn(5, 8, dtype=torch.float64)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        total: Tensor = functional_call(layer, parameters, (x,)).square().sum()
        return total

    each = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(5):
        for name, found in grad(loss)(parameters, x[i]).items():
            torch.testing.assert_close(each[name][i], found)


def test_compiles_as_one_graph_for_any_number_of_tokens() -> None:
    torch._dynamo.reset()
    layer = ConvolutionLinear("convolution", 36, 50, normalize=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (7, 300):
        x = torch.randn(tokens, 36)
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-4)


def test_autocast_computes_in_bfloat16_and_trains() -> None:
    layer = ConvolutionLinear("convolution", 32, 48)
    x = torch.randn(5, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.A.grad is not None
    assert layer.A.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)


def test_zero_init_is_the_zero_map_that_can_learn() -> None:
    layer = ConvolutionLinear("convolution", 24, 30, zero_init=True, normalize=True, gain=True)
    x = torch.randn(4, 24)
    assert torch.count_nonzero(layer(x)) == 0
    layer(x).sum().backward()
    assert layer.A.grad is not None
    assert layer.A.grad.abs().max() > 0


def test_no_tokens_give_an_empty_output_and_zero_gradients() -> None:
    layer = ConvolutionLinear("convolution", 24, 30, normalize=True, gain=True)
    for shape in ((0, 24), (3, 0, 24)):
        y = layer(torch.zeros(shape, requires_grad=True))
        assert y.shape == (*shape[:-1], 30)
        y.sum().backward()
    for parameter in layer.parameters():
        assert parameter.grad is not None
        assert torch.count_nonzero(parameter.grad) == 0


def test_a_wrong_input_is_named() -> None:
    layer = ConvolutionLinear("convolution", 8, 8)
    with pytest.raises(ValueError, match=r"got an input of shape \(2, 9\).*must be 8"):
        layer(torch.zeros(2, 9))
    for dtype in (torch.int64, torch.complex64, torch.float64, torch.bool):
        with pytest.raises(TypeError, match=rf"got an input of dtype {dtype}.*torch.float32"):
            layer(torch.zeros(2, 8, dtype=dtype))


def test_initialisation_and_learning_rates() -> None:
    torch.manual_seed(0)
    layer = ConvolutionLinear("convolution:kernel=1", 4096, 4096, d_in_base=64)
    rates = {id(p): g["lr"] for g in param_groups(layer, 0.1) for p in g["params"]}
    assert rates[id(layer.A)] == pytest.approx(0.1 * 64 / 4096)
    assert layer.A.std().item() == pytest.approx(1 / 64, rel=5 / math.sqrt(2 * 4096))


def test_to_linear_computes_the_same() -> None:
    layer = layer_of(0.5, 24, 60)
    x = torch.randn(2, 24, dtype=torch.float64)
    torch.testing.assert_close(layer.to_linear()(x), layer(x))


def test_state_dict_round_trip() -> None:
    one, other = (ConvolutionLinear("convolution", 18, 50) for _ in range(2))
    other.load_state_dict(one.state_dict())
    x = torch.randn(3, 18)
    assert torch.equal(one(x), other(x))
    assert set(one.state_dict()) == {"A", "bias", "_extra_state"}
