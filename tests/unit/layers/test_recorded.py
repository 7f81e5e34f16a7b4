"""Layers as programs that run without this package, and in nested tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from nas.layers import MixtureFFN, layer_of
from tests.support.tiers import FULL, only

pytestmark = [  # of torch about itself
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`isinstance:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning"),
]

DESIGNS = (
    "monarch", "dense", "btt:cores=3,rho=1/8", "btt-moe:experts=4,active=2", "dense-moe",
    "btt-moe:experts=4,active=3,shared=1",
    "convolution:kernel=1/2", "blast", "block-sparse:blocks=1/2", "lost",
    "pixelfly:rank=1/4,blocks=1/2", "cola-mlp", "activated(btt:rho=1/4;relu)",
)  # fmt: skip
D_IN, D_OUT = 60, 77  # padded and cut in every family
ROWS = torch.export.Dim("rows", min=1, max=4096)


def model_of(design: str) -> nn.Module:
    torch.manual_seed(0)
    if design == "ffn-moe":
        model: nn.Module = MixtureFFN.of(
            "ffn-moe:experts=8,active=4,shared=1,granularity=4", D_IN, D_OUT
        )
    else:
        model = nn.Sequential(layer_of(design, D_IN, D_OUT, normalize=True, gain=True))
    for parameter in model.parameters():  # gates too, or all experts would be equally good
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def close(got: Any, want: Tensor) -> None:
    torch.testing.assert_close(torch.as_tensor(got), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=FULL)])
@pytest.mark.parametrize(
    "design",
    only({"monarch", "convolution:kernel=1/2", "lost", "blast", "ffn-moe"}, [*DESIGNS, "ffn-moe"]),
)
def test_an_exported_program_has_operators_of_torch_only(design: str, strict: bool) -> None:
    model, x = model_of(design), torch.randn(5, D_IN)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: ROWS},), strict=strict)
    names = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert not [name for name in names if "einsum_nas" in name or "promote" in name]
    for rows in (1, 33):  # any batch size
        x = torch.randn(rows, D_IN)
        close(program.module()(x), model(x))


@pytest.mark.parametrize("design", [*DESIGNS, "ffn-moe"])
def test_torch_fx_and_torch_jit_trace(design: str) -> None:
    model, x = model_of(design), torch.randn(2, 7, D_IN)
    close(torch.fx.symbolic_trace(model)(x), model(x))
    traced: Any = torch.jit.trace(model, (torch.randn(3, 2, D_IN),))  # type: ignore[no-untyped-call]
    close(traced(x), model(x))


@pytest.mark.parametrize("design", only({"monarch"}, [*DESIGNS, "ffn-moe"]))
def test_an_onnx_file_runs_in_another_runtime(design: str, tmp_path: Path) -> None:
    model, x = model_of(design), torch.randn(5, D_IN)
    program = torch.onnx.export(model, (x,), dynamo=True, dynamic_shapes=({0: ROWS},))
    assert program is not None
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    x = torch.randn(9, D_IN)
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    close(got, model(x))


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
@pytest.mark.parametrize("design", DESIGNS)
def test_nested_tensors_are_as_for_nn_linear(design: str, layout: torch.layout) -> None:
    model = model_of(design)
    parts = [torch.randn(3, D_IN, requires_grad=True), torch.randn(5, D_IN, requires_grad=True)]
    y = model(torch.nested.as_nested_tensor(parts, layout=layout))
    assert y.is_nested
    assert y.layout is layout
    for part, got in zip(parts, y.unbind(), strict=True):
        close(got, model(part))
    torch.autograd.backward([part.sum() for part in y.unbind()])
    grads = [part.grad for part in parts]
    for part, grad in zip(parts, grads, strict=True):
        (want,) = torch.autograd.grad(model(part).sum(), part)
        torch.testing.assert_close(grad, want)


def test_a_residual_of_nested_tensors() -> None:
    layer = layer_of("monarch", 16, 16)
    x = torch.nested.nested_tensor([torch.randn(3, 16), torch.randn(5, 16)], layout=torch.jagged)
    assert (x + layer(x)).is_nested  # the ragged dimensions are one
    with pytest.raises(ValueError, match="ragged"):
        layer(x.transpose(1, 2))
