from __future__ import annotations

import copy
import io
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel

from nas.errors import InvalidInput
from nas.layers import (
    EinsumLinear,
    SelfGuided,
    StructuredLinear,
    forward_flops,
    load,
    param_groups,
    replace_linears,
    save,
)

#: Of each family with a matrix: design, and whether it starts from the dense weight.
FAMILIES = [
    ("btt:rho=1/4", True), ("low-rank:rho=1/2", True), ("dense", True),
    ("btt:cores=3,rho=1/8", False), ("btt:cores=3,rho=1/8", True), ("convolution:kernel=1/2", True),
    ("blast", True), ("block-sparse", True), ("lost", True),
]  # fmt: skip


def mlp(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(16, 36), nn.GELU(), nn.Linear(36, 16))


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(1))


def structured(model: nn.Module) -> list[StructuredLinear]:
    return [m for m in model.modules() if isinstance(m, StructuredLinear)]


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(param_groups(model, lr=1e-2))


def train(
    model: nn.Module, guide: SelfGuided | None, optimizer: torch.optim.Optimizer, steps: range
) -> None:
    for step in steps:
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        if guide is not None and not guide.ended:
            guide.step()


def test_alpha_falls_from_one_to_zero_by_half_a_cosine() -> None:
    guide = SelfGuided(mlp(), "monarch", steps=8)
    found = []
    while not guide.ended:
        found.append(guide.alpha)
        guide.step()
    expected = [0.5 + 0.5 * math.cos(math.pi * t / 8) for t in range(8)]
    assert found == pytest.approx(expected)
    assert found[0] == 1
    assert found[4] == pytest.approx(0.5)
    assert guide.alpha == 0


@pytest.mark.parametrize(("design", "from_dense"), FAMILIES)
@pytest.mark.parametrize("bias", [True, False])
def test_output_is_the_mean_of_dense_and_structured_with_one_bias(
    design: str, from_dense: bool, bias: bool
) -> None:
    model = nn.Sequential(nn.Linear(16, 24, bias=bias)).double()
    weight = model.get_parameter("0.weight").detach().clone()
    b = model.get_parameter("0.bias").detach().clone() if bias else torch.zeros(24).double()
    x = inputs(2, 5, 16, dtype=torch.float64)
    dense = model(x)
    guide = SelfGuided(model, design, steps=6, from_dense=from_dense)
    assert torch.equal(model(x), dense)
    for _ in range(6):
        a = guide.alpha
        (layer,) = structured(model)
        expected = a * (x @ weight.T) + (1 - a) * (x @ layer.to_matrix().T) + b
        torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
        guide.step()
    (layer,) = structured(model)
    torch.testing.assert_close(model(x), x @ layer.to_matrix().T + b, rtol=1e-12, atol=1e-12)


def test_structured_weights_start_as_replace_linears_makes_them() -> None:
    model, plain = mlp(), mlp()
    guide = SelfGuided(model, {"0": "monarch", "*": "btt:rho=1/4"}, ["0", "2"], steps=3)
    report = replace_linears(plain, {"0": "monarch", "*": "btt:rho=1/4"}, from_dense=True)
    assert str(guide.report) == str(report)
    torch.testing.assert_close(dict(model.named_parameters()), dict(plain.named_parameters()))


def test_gradient_reaches_structured_weights_alone() -> None:
    model = mlp().double()
    weight = model.get_parameter("0.weight")
    guide = SelfGuided(model, "monarch", ["0"], steps=4)
    guide.step()
    x = inputs(7, 16, dtype=torch.float64).requires_grad_()
    model[0](x).sum().backward()
    layer = model[0]
    assert isinstance(layer, EinsumLinear)
    dense, matrix = weight.detach(), layer.to_matrix().detach()
    mean = guide.alpha * dense + (1 - guide.alpha) * matrix
    assert x.grad is not None
    torch.testing.assert_close(x.grad, mean.sum(0).expand(7, 16))
    assert layer.bias is not None
    torch.testing.assert_close(layer.bias.grad, torch.full((36,), 7.0).double())
    assert weight.grad is None
    assert all(p is not weight for p in model.parameters())

    # (1 − α) of what the structured layer alone would get
    (alone,) = torch.autograd.grad(layer.to_matrix().matmul(x.detach().T).sum(), layer.A)
    torch.testing.assert_close(layer.A.grad, (1 - guide.alpha) * alone)


def test_after_the_warm_up_nothing_is_left_of_it() -> None:
    model, plain = mlp(), mlp()
    replace_linears(plain, "monarch", from_dense=True)
    weight = weakref.ref(model.get_parameter("0.weight"))
    storage = weakref.ref(model.get_parameter("0.weight").untyped_storage())
    guide = SelfGuided(model, "monarch", steps=3)
    optimizer = adam(model)
    before = list(model.parameters())
    train(model, guide, optimizer, range(3))
    assert guide.ended
    assert weight() is None
    assert storage() is None
    assert all(a is b for a, b in zip(model.parameters(), before, strict=True))
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert list(model.buffers()) == []
    assert repr(model) == repr(plain)
    for layer in structured(model):
        assert not layer._forward_hooks
        assert not layer._non_persistent_buffers_set
    values = [p.detach().clone() for p in model.parameters()]
    train(model, guide, optimizer, range(3, 4))
    assert not any(torch.equal(a, b) for a, b in zip(model.parameters(), values, strict=True))


@pytest.mark.parametrize("stop", [0, 2, 4, 6])
def test_a_resumed_run_ends_with_the_same_bits(stop: int, tmp_path: Path) -> None:
    def begun(seed: int) -> tuple[nn.Module, SelfGuided, torch.optim.Optimizer]:
        model = mlp(seed)
        guide = SelfGuided(model, "monarch", steps=4)
        return model, guide, adam(model)

    model, guide, optimizer = begun(0)
    train(model, guide, optimizer, range(stop))
    states = {"guide": guide.state_dict(), "model": model.state_dict()}
    torch.save(states | {"optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    train(model, guide, optimizer, range(stop, 8))

    stored = torch.load(tmp_path / "run.pt")
    again, second, other = begun(1)  # other weights, dense ones too
    second.load_state_dict(stored["guide"])
    again.load_state_dict(stored["model"])
    other.load_state_dict(stored["optimizer"])
    train(again, second, other, range(stop, 8))
    for (name, expected), found in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(found, expected), name


def test_a_model_in_its_warm_up_is_not_taken_for_one_after_it(tmp_path: Path) -> None:
    model = mlp()
    guide = SelfGuided(model, "monarch", ["0"], steps=2)
    with pytest.raises(InvalidInput, match="dense weights in 0; accepted: one whose guide has end"):
        save(model, tmp_path / "model.safetensors")
    with pytest.raises(InvalidInput, match=r"has 0\.dense_weight, which the model does not"):
        load(mlp(), model.state_dict())
    guide.step()
    guide.step()
    save(model, tmp_path / "model.safetensors")
    same = load(mlp(1), tmp_path / "model.safetensors")
    x = inputs(3, 16)
    assert torch.equal(same(x), model(x))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda m: SelfGuided(m, "monarch", steps=0), "steps: got 0"),
        (lambda m: SelfGuided(m, "monarch", steps=2.5), "steps: got 2.5"),  # type: ignore[arg-type]
        (lambda m: SelfGuided(m, "monarch", steps=True), "steps: got True"),
        (lambda m: SelfGuided(None, "monarch", steps=1), "a torch.nn.Module"),  # type: ignore[arg-type]
        (lambda m: SelfGuided(m, "monarch", ["9"], steps=1), "got 9"),
        (lambda m: SelfGuided(m, "btt-moe", steps=1), "or from_dense=False"),
        (lambda m: SelfGuided(m, "monarch", steps=1, normalize=True), "normalize: got True"),
    ],
)
def test_what_cannot_be_guided_is_refused(call: Callable[[nn.Module], object], match: str) -> None:
    model = mlp()
    before = list(model.modules())
    with pytest.raises(InvalidInput, match=match):
        call(model)
    assert list(model.modules()) == before


def test_a_model_of_which_nothing_can_be_replaced_is_refused() -> None:
    model = nn.Sequential(nn.Embedding(9, 9), nn.Linear(9, 9, bias=False))
    model[1].weight = model[0].weight
    with pytest.raises(InvalidInput, match=r"1: its weight is also 0\.weight"):
        SelfGuided(model, "monarch", steps=1)


def test_steps_and_states_that_do_not_fit_are_refused() -> None:
    guide = SelfGuided(mlp(), "monarch", steps=2)
    for state in (
        {}, {"step": 1}, {"step": 1, "steps": 3}, {"step": 3, "steps": 2},
        {"step": -1, "steps": 2}, {"step": 1.0, "steps": 2}, {"step": 1, "steps": 2, "x": 0},
    ):  # fmt: skip
        with pytest.raises(InvalidInput, match="state_dict"):
            guide.load_state_dict(state)
    assert guide.alpha == 1
    guide.step()
    guide.step()
    with pytest.raises(InvalidInput, match="step: got 3; accepted: 2, the steps of the warm-up"):
        guide.step()
    with pytest.raises(InvalidInput, match="'step' from 2 to 2"):
        guide.load_state_dict({"step": 1, "steps": 2})
    guide.load_state_dict({"step": 2, "steps": 2})


def test_a_language_model_of_hugging_face() -> None:
    model: Any = GPT2LMHeadModel(
        GPT2Config(vocab_size=97, n_positions=32, n_embd=36, n_layer=2, n_head=4)
    ).eval()  # fmt: skip
    tokens = torch.arange(12)[None]
    dense = model(tokens).logits
    guide = SelfGuided(model, "monarch", "transformer.h.*", steps=2)
    assert len(guide.report.replaced) == 8
    torch.testing.assert_close(model(tokens).logits, dense)
    guide.step()
    half = model(tokens).logits
    guide.step()
    end = model(tokens).logits
    assert not torch.allclose(half, dense, atol=1e-3)
    assert not torch.allclose(half, end, atol=1e-3)
    assert not any("dense" in name for name in model.state_dict())


def test_shared_modules_and_weights_are_mixed_once() -> None:
    shared, last = nn.Linear(16, 16).double(), nn.Linear(16, 16).double()
    last.weight = shared.weight
    model = nn.Sequential(shared, shared, last)
    weight, b, c = (p.detach().clone() for p in (shared.weight, shared.bias, last.bias))
    guide = SelfGuided(model, "monarch", steps=4)
    assert [row.names for row in guide.report.replaced] == [("0", "1"), ("2",)]
    guide.step()
    mean = guide.alpha * weight + (1 - guide.alpha) * structured(model)[0].to_matrix()
    x = inputs(3, 16, dtype=torch.float64)
    torch.testing.assert_close(model(x), ((x @ mean.T + b) @ mean.T + b) @ mean.T + c)


def test_hooks_of_the_dense_layer_see_the_whole_output() -> None:
    model = mlp()
    seen: list[Tensor] = []
    old = model[0]
    handle = old.register_forward_hook(lambda layer, args, y: seen.append(y))
    guide = SelfGuided(model, "monarch", steps=2)
    guide.step()
    x = inputs(3, 16)
    y = model[0](x=x)
    assert torch.equal(seen[-1], y)
    assert torch.equal(old(x), seen[-1])  # the dense layer by itself goes on as it was
    assert not torch.allclose(old(x), y)
    guide.step()
    assert torch.equal(model[0](x), seen[-1])
    handle.remove()
    count = len(seen)
    model(x)
    assert len(seen) == count


def test_compiled_code_is_the_same_for_every_alpha() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model, x = mlp(), inputs(3, 16)
    guide = SelfGuided(model, "monarch", steps=4)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(4):
        torch.testing.assert_close(compiled(x), model(x))
        guide.step()
    assert counter.frame_count == 1
    torch.testing.assert_close(compiled(x), model(x))  # without the dense weights
    assert counter.frame_count == 2


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_are_those_of_checkpointing(reentrant: bool) -> None:
    model = mlp()
    SelfGuided(model, "monarch", steps=3).step()
    x, again = inputs(3, 16).requires_grad_(), inputs(3, 16).requires_grad_()
    model(x).square().sum().backward()
    recomputed: Any = checkpoint(model, again, use_reentrant=reentrant)
    recomputed.square().sum().backward()
    torch.testing.assert_close(again.grad, x.grad)


def test_autocast_modes_nested_tensors_and_dtypes() -> None:
    model = mlp()
    SelfGuided(model, "monarch", steps=3).step()
    x = inputs(5, 16)
    y = model(x)
    torch.testing.assert_close(model.eval()(x), y)
    with torch.autocast("cpu", torch.bfloat16):
        cast = model(x)
    assert cast.dtype == torch.bfloat16
    torch.testing.assert_close(cast.float(), y, atol=0.02, rtol=0.02)
    nested = torch.nested.nested_tensor([x[:2], x[2:]], layout=torch.jagged)
    torch.testing.assert_close(model(nested).values(), y)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), y)
    double = model.double()(x.double())
    torch.testing.assert_close(double.float(), y)


def test_a_copy_with_its_guide_goes_its_own_way() -> None:
    model = mlp()
    guide = SelfGuided(model, "monarch", steps=2)
    same, own = copy.deepcopy((model, guide))
    own.step()
    own.step()
    assert own.ended
    assert list(same.buffers()) == []
    assert not any(layer._forward_hooks for layer in structured(same))
    assert guide.alpha == 1
    x = inputs(3, 16)
    assert torch.equal(model(x), mlp()(x))
    kept = io.BytesIO()
    torch.save(model, kept)
    kept.seek(0)
    assert torch.equal(torch.load(kept, weights_only=False)(x), model(x))


def test_flops_of_the_warm_up_count_both_products() -> None:
    model, x = mlp(), inputs(3, 16)
    dense = forward_flops(model, x)
    guide = SelfGuided(model, "monarch", steps=1)
    during = forward_flops(model, x)
    guide.step()
    assert during == dense + forward_flops(model, x)
    assert during - dense == 3 * guide.report.flops_after
