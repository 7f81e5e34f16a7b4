from __future__ import annotations

import copy
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any, TypeVar

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch.nn.utils import parametrizations, prune
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5EncoderModel,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.pytorch_utils import Conv1D

from nas.designs.einsum import Structure
from nas.designs.structure import LinearStructure
from nas.designs.theta import Theta
from nas.errors import InvalidInput
from nas.layers import EinsumLinear, Surgery, param_groups, references, replace_linears
from tests.support.tiers import FULL

EXACT = "btt:rho=1/2"  # any square matrix whose side is a square
Kind = TypeVar("Kind", bound=nn.Module)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def mlp(**options: Any) -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 64, **options), nn.GELU(), nn.Linear(64, 16, **options))


def gpt2(**options: Any) -> Any:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=97, n_positions=32, n_embd=36, n_layer=2, n_head=4,
            bos_token_id=0, eos_token_id=0, **options,
        )
    )  # fmt: skip


def vit() -> Any:
    return ViTForImageClassification(
        ViTConfig(
            image_size=16, patch_size=8, hidden_size=36, num_hidden_layers=2,
            num_attention_heads=4, intermediate_size=144, num_labels=10,
        )
    )  # fmt: skip


def part(model: nn.Module, name: str, kind: type[Kind]) -> Kind:
    found = model.get_submodule(name)
    assert isinstance(found, kind)
    return found


def theta_of(structure: LinearStructure) -> Theta:
    assert isinstance(structure, Structure)
    return structure.theta


def left_out(surgery: Surgery) -> dict[str, str]:
    return {name: layer.reason for layer in surgery.left_out for name in layer.names}


def replaced(surgery: Surgery) -> set[str]:
    return {name for layer in surgery.replaced for name in layer.names}


def unchanged(model: nn.Module, call: Callable[[], object], match: str) -> None:
    """The call is refused, and the model holds the very modules and parameters it held."""
    modules, parameters = list(model.named_modules()), list(model.named_parameters())
    with pytest.raises(InvalidInput, match=match):
        call()
    assert list(model.named_modules()) == modules
    assert all(a is b for (_, a), (_, b) in zip(model.named_parameters(), parameters, strict=True))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"deep": mlp()})
        self.linear = nn.Linear(16, 16)
        self.conv = Conv1D(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(self.linear(self.inner["deep"](x)))
        return y


def test_from_dense_computes_the_same_where_the_structure_can() -> None:
    model = Block().double()
    with torch.no_grad():
        model.conv.bias.normal_()
    x = torch.randn(5, 16, dtype=torch.float64)
    y = model(x)
    surgery = replace_linears(model, EXACT, ["linear", "conv"], from_dense=True)
    assert replaced(surgery) == {"linear", "conv"}
    torch.testing.assert_close(model(x), y, rtol=1e-9, atol=1e-9)
    for layer in surgery.replaced:
        assert layer.relative_error == pytest.approx(0, abs=1e-9)
    lossy = replace_linears(model, "kronecker", "inner.*", from_dense=True)
    for layer in lossy.replaced:
        assert layer.relative_error is not None
        assert 0.1 < layer.relative_error < 1


def test_conv1d_is_stored_transposed() -> None:
    model = nn.Sequential(Conv1D(24, 10)).double()
    weight = model.get_parameter("0.weight").detach().T
    (row,) = replace_linears(model, "low-rank:rho=1/2", from_dense=True).replaced
    assert (row.structure.d_in, row.structure.d_out) == (10, 24)
    layer = part(model, "0", EinsumLinear)
    lost = (layer.to_matrix() - weight).norm() / weight.norm()
    assert row.relative_error == pytest.approx(lost.item(), abs=1e-9)
    assert layer.nx == 10
    assert layer.nf == 24


def test_the_same_module_in_several_places_stays_one() -> None:
    shared = nn.Linear(16, 16)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": shared, "c": nn.Sequential(shared)})
    surgery = replace_linears(model, "monarch")
    assert model["a"][0] is model["b"] is model["c"][0]  # type: ignore[index]
    assert isinstance(model["b"], EinsumLinear)
    (row,) = surgery.replaced
    assert row.names == ("a.0", "b", "c.0")
    assert surgery.model_params_before == 16 * 16 + 16
    again = nn.ModuleDict({"a": nn.Sequential(one := nn.Linear(4, 4)), "b": one})
    assert replaced(replace_linears(again, "monarch", ["b"])) == {"a.0", "b"}


@pytest.mark.parametrize("from_dense", [False, True])
def test_layers_that_share_a_weight_share_the_factors(from_dense: bool) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    model[1].weight = model[0].weight
    surgery = replace_linears(model, EXACT, from_dense=from_dense)
    first, second, third = (part(model, name, EinsumLinear) for name in "012")
    assert first.A is second.A
    assert first.B is second.B
    assert first.bias is not second.bias
    assert third.A is not first.A
    params = 2 * first.structure.params + 3 * 16
    assert surgery.params_after == surgery.model_params_after == params
    assert surgery.params_after == sum(p.numel() for p in model.parameters())
    assert first.relative_error == second.relative_error
    kept = copy.deepcopy(model)
    assert kept[0].A is kept[1].A


def test_ties_that_cannot_be_kept_leave_layers_out() -> None:
    model = nn.ModuleDict(
        {name: nn.Linear(9, 9, bias=False) for name in ("head", "a", "b", "encode", "decode")}
        | {"embed": nn.Embedding(9, 9)}
    )
    weights = {name: model.get_parameter(f"{name}.weight") for name in model}
    model["head"].weight = weights["embed"]
    model["b"].weight = weights["a"]
    model["decode"].weight = nn.Parameter(weights["encode"].T)
    surgery = replace_linears(model, "monarch", ["head", "a", "encode", "decode"])
    assert replaced(surgery) == set()
    assert left_out(surgery) == {
        "head": "its weight is also embed.weight (Embedding)",
        "a": "its weight is also b.weight (Linear)",
        "b": "not selected",
        "encode": "its weight has, in another form, the memory of decode.weight (Linear)",
        "decode": "its weight has, in another form, the memory of encode.weight (Linear)",
    }
    assert model["head"].weight is model["embed"].weight
    model["decode"].weight = nn.Parameter(weights["encode"].data, requires_grad=False)
    assert replaced(replace_linears(model, "monarch", ["encode", "decode"])) == set()
    model["decode"].weight = nn.Parameter(weights["encode"].data)
    assert replaced(replace_linears(model, "monarch", "?*code")) == {"encode", "decode"}
    assert model["encode"].A is model["decode"].A
    assert "a: its weight is also b.weight" in str(surgery)


def test_one_weight_has_one_structure() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model[1].weight = model[0].weight
    unchanged(
        model,
        lambda: replace_linears(model, {"0": "monarch", "1": "kronecker"}),
        r"theta: got .* for 1; accepted: .*, as for 0, whose weight it shares",
    )


def test_a_zero_weight_becomes_the_zero_map_that_can_learn() -> None:
    for from_dense in (False, True):
        model = nn.Sequential(nn.Linear(16, 16), Conv1D(16, 16), nn.Linear(16, 16))
        with torch.no_grad():
            for name in "01":
                model.get_parameter(f"{name}.weight").zero_()
                model.get_parameter(f"{name}.bias").fill_(2.0)
        replace_linears(model, "monarch", from_dense=from_dense)
        x = torch.randn(3, 16)
        for name, zero in zip("012", (True, True, False), strict=True):
            layer = part(model, name, EinsumLinear)
            assert layer.zero_init == zero
            assert torch.equal(layer(x), torch.full((3, 16), 2.0)) == zero
            layer(x).square().sum().backward()
            assert layer.B.grad is not None
            assert layer.B.grad.abs().max() > 0
            layer.reset_parameters()
            assert (torch.count_nonzero(layer.to_matrix()) == 0) == zero


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_is_kept(dtype: torch.dtype) -> None:
    model = mlp(dtype=dtype)
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    model[2].eval()
    marked: Any = model[2]  # which declares no such attribute
    marked.marker = "mine"
    biases = [model[0].bias, model[2].bias]
    for from_dense in (False, True):
        other = copy.deepcopy(model)
        values = [other.get_parameter(f"{i}.bias").clone() for i in (0, 2)]
        replace_linears(other, "monarch", from_dense=from_dense)
        assert {p.dtype for p in other.parameters()} == {dtype}
        first, last = (part(other, name, EinsumLinear) for name in "02")
        assert [p.requires_grad for p in first.factors().values()] == [False, False]
        assert [p.requires_grad for p in last.factors().values()] == [True, True]
        assert other[0].bias.requires_grad
        assert not other[2].bias.requires_grad
        assert other[0].training
        assert not other[2].training
        assert other[2].marker == "mine"
        biases_now = [other.get_parameter(f"{i}.bias") for i in (0, 2)]
        assert [torch.equal(a, b) for a, b in zip(biases_now, values, strict=True)]
        assert other(torch.randn(3, 16, dtype=dtype)).dtype == dtype
    replace_linears(model, "monarch")
    assert model[0].bias is biases[0]
    assert model[2].bias is biases[1]


def test_without_a_bias_there_is_none() -> None:
    model = mlp(bias=False)
    replace_linears(model, "monarch")
    assert {n for n, _ in model.named_parameters()} == {"0.A", "0.B", "2.A", "2.B"}


def test_meta_tensors() -> None:
    model = mlp(device="meta")
    unchanged(
        model,
        lambda: replace_linears(model, "monarch", from_dense=True),
        r"0\.linear: got a weight on the meta device",
    )
    replace_linears(model, "monarch")
    assert all(p.is_meta for p in model.parameters())
    assert model(torch.empty(3, 16, device="meta")).shape == (3, 16)
    real = mlp()
    replace_linears(real, "monarch")
    model.load_state_dict(real.state_dict(), assign=True)
    x = torch.randn(3, 16)
    assert torch.equal(model(x), real(x))


def test_hooks_are_carried_over_with_their_handles() -> None:
    model = mlp()
    seen: list[tuple[str, type]] = []

    def note(kind: str) -> Callable[..., None]:
        return lambda module, *_, **__: seen.append((kind, type(module)))

    handles = [
        model[0].register_forward_pre_hook(note("pre"), with_kwargs=True),
        model[0].register_forward_hook(note("forward")),
        model[0].register_full_backward_hook(note("backward")),
    ]
    replace_linears(model, "monarch")
    x = torch.randn(2, 16, requires_grad=True)
    model(x).sum().backward()
    assert seen == [(kind, EinsumLinear) for kind in ("pre", "forward", "backward")]
    for handle in handles:
        handle.remove()
    model(x).sum().backward()
    assert len(seen) == 3


class Body(nn.Sequential):
    fc: nn.Linear


class ReadsWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = Body()
        self.body.fc = nn.Linear(16, 16)
        self.free = nn.Linear(16, 16)
        nn.init.zeros_(self.free.weight)  # reading it here does not matter

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.free(self._helper(x))
        return y

    def _helper(self, x: Tensor) -> Tensor:
        return x @ self.body.fc.weight.to(x.dtype).T


class Adapter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(16, 16)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(16, 4)})

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x) + self.lora_A["default"](x).sum()
        return y


def _special_layers() -> nn.ModuleDict:
    hooked, replaced_forward, stated = (nn.Linear(16, 16) for _ in range(3))
    hooked.weight.register_hook(lambda grad: grad)  # type: ignore[no-untyped-call]
    plain = replaced_forward.forward
    replaced_forward.forward = lambda x: plain(x)  # type: ignore[method-assign, assignment]
    stated.register_load_state_dict_post_hook(lambda *_: None)  # type: ignore[no-untyped-call]
    pruned = prune.random_unstructured(  # type: ignore[no-untyped-call]
        nn.Linear(16, 16), "weight", amount=0.5
    )
    return nn.ModuleDict(
        {
            "parametrized": parametrizations.weight_norm(nn.Linear(16, 16)),
            "spectral": nn.utils.spectral_norm(nn.Linear(16, 16)),
            "pruned": pruned,
            "hooked": hooked,
            "patched": replaced_forward,
            "stated": stated,
            "reader": ReadsWeight(),
            "adapter": Adapter(),
        }
    )


def test_layers_on_which_something_depends_are_left_out() -> None:
    model = _special_layers()
    x = torch.randn(2, 16)
    for child in model.values():
        child(x)
    surgery = replace_linears(model, "monarch")
    reasons = left_out(surgery)
    assert replaced(surgery) == {"reader.free"}
    for name, reason in {
        "parametrized": "it is a ParametrizedLinear, not a plain torch.nn.Linear",
        "spectral": "other parameters",
        "pruned": "other parameters",
        "hooked": "its weight has hooks",
        "patched": "its forward was replaced",
        "stated": "hooks on its state_dict",
        "reader.body.fc": "ReadsWeight reads its weight directly",
        "adapter.base_layer": "part of an adapter, Adapter",
        "adapter.lora_A.default": "part of an adapter, Adapter",
    }.items():
        assert reason in reasons[name]
    for child in model.values():
        child(x)


def test_lazy_layers_are_left_out() -> None:
    model = nn.Sequential(nn.LazyLinear(16), nn.Linear(16, 16))
    surgery = replace_linears(model, "monarch")
    assert "LazyLinear" in left_out(surgery)["0"]
    assert model(torch.randn(2, 5)).shape == (2, 16)
    assert len(param_groups(model, 1e-3, base_width=4)) > 1


@pytest.mark.parametrize("norm_first", [False, True])
def test_torch_transformers_run_in_training_and_inference(norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(
        16, 2, 64, dropout=0.0, batch_first=True, norm_first=norm_first
    )
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)
    x = torch.randn(3, 5, 16)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = True
    surgery = replace_linears(model, "monarch")
    assert len(surgery.replaced) == 4
    assert "NonDynamicallyQuantizableLinear" in left_out(surgery)["layers.0.self_attn.out_proj"]
    trained = model(x, src_key_padding_mask=padding)
    model.eval()
    with torch.no_grad():
        for one in (model, copy.deepcopy(model)):
            y = one(x, src_key_padding_mask=padding)
            torch.testing.assert_close(y[~padding], trained[~padding], rtol=1e-4, atol=1e-5)
            assert one(x).shape == x.shape

    decoder = nn.TransformerDecoderLayer(16, 2, 64, batch_first=True)
    replace_linears(decoder, "monarch")
    with torch.no_grad():
        assert decoder.eval()(x, x).shape == x.shape


def test_select_by_pattern_function_and_mapping() -> None:
    model = nn.Sequential(mlp(), mlp())
    assert replaced(replace_linears(model, "monarch", "0.*")) == {"0.0", "0.2"}
    chosen = replace_linears(model, "monarch", lambda name, m: m.in_features == 64)
    assert replaced(chosen) == {"1.2"}
    assert left_out(chosen)["0.2"] == "it is a structured layer, EinsumLinear"
    assert left_out(chosen)["1.0"] == "not selected"

    model = nn.Sequential(mlp(), mlp())
    surgery = replace_linears(model, {"0.*": "kronecker", "*.0": "low-rank:rho=1/2"})
    structures = {layer.names[0]: theta_of(layer.structure) for layer in surgery.replaced}
    kronecker, low_rank = (
        EinsumLinear(t, 4, 4).structure.theta for t in ("kronecker", "low-rank:rho=1/2")
    )
    assert structures == {"0.0": kronecker, "0.2": kronecker, "1.0": low_rank}
    # done once more there is nothing left to do
    assert replace_linears(model, "monarch", ["0.*"]).replaced == ()
    assert replace_linears(nn.GELU(), "monarch").replaced == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("butterfly",), "theta: got butterfly"),
        (({"0": "monarch", "2": (0.5, 0.5)},), "theta: got .*2 numbers"),
        (({"0": "monarch", "nowhere": "dense"},), "theta: got nowhere; .*of 0, 2"),
        (({},), r"theta: got \{\}"),
        (("monarch", "attn*"), r"select: got attn\*; accepted: what selects .* of 0, 2"),
        (("monarch", ["0", "7"]), "select: got 7"),
        (("monarch", []), r"select: got \[\]"),
        (("monarch", [3]), "select: got 3; accepted: a pattern"),
        (("monarch", 3), "select: got 3; accepted: a function"),
        (("monarch", lambda name, module: False), "select: got .*of 0, 2"),
    ],
)
def test_bad_input_changes_nothing(arguments: tuple[Any, ...], message: str) -> None:
    model = mlp()
    unchanged(model, lambda: replace_linears(model, *arguments), message)


def test_a_bad_weight_late_in_the_model_changes_nothing() -> None:
    model = mlp()
    with torch.no_grad():
        model.get_parameter("2.weight")[3, 3] = float("nan")
    unchanged(
        model,
        lambda: replace_linears(model, "monarch", from_dense=True),
        r"2\.weight: got 1 entries that are NaN",
    )
    unchanged(
        model,
        lambda: replace_linears(model, "monarch", from_dense=True, normalize=True),
        "normalize: got True; accepted: False with from_dense",
    )


def test_what_is_no_model_is_named() -> None:
    for layer in (nn.Linear(4, 4), Conv1D(4, 4)):
        with pytest.raises(InvalidInput, match=r"model: got a .*EinsumLinear\.from_linear"):
            replace_linears(layer, "monarch")
    with pytest.raises(InvalidInput, match="model: got list"):
        replace_linears([nn.Linear(4, 4)], "monarch")  # type: ignore[arg-type]


def test_a_wrapped_model_is_refused() -> None:
    group = torch.distributed
    group.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.parallel.DistributedDataParallel(mlp()))
        unchanged(
            model,
            lambda: replace_linears(model, "monarch"),
            "model: got DistributedDataParallel at 0; accepted: a model that is wrapped afterwards",
        )
    finally:
        group.destroy_process_group()


def test_normalize_and_gain_reach_the_layers() -> None:
    model = mlp()
    replace_linears(model, "monarch", normalize=True, gain=True)
    assert model[0].normalize
    assert model[2].gain_B is not None


@pytest.mark.parametrize("build", [gpt2, vit])
def test_the_report_is_what_can_be_counted(build: Callable[[], Any]) -> None:
    model = build()
    before = sum(p.numel() for p in model.parameters())
    dense = {
        name: sum(p.numel() for p in m.parameters())
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear | Conv1D) and name != "lm_head"
    }
    surgery = replace_linears(model, "btt:rho=1/4")
    layers = {name: m for name, m in model.named_modules() if isinstance(m, EinsumLinear)}
    assert set(layers) == set(dense) == replaced(surgery)
    assert surgery.model_params_before == before
    assert surgery.model_params_after == sum(p.numel() for p in model.parameters())
    assert surgery.params_before == sum(dense.values())
    assert surgery.params_after == sum(p.numel() for m in layers.values() for p in m.parameters())
    for row in surgery.replaced:
        layer = layers[row.names[0]]
        s = layer.structure.sizes
        assert row.params_before == dense[row.names[0]]
        assert row.params_after == sum(p.numel() for p in layer.parameters())
        assert row.flops_before == 2 * layer.in_features * layer.out_features
        if not layer.structure.is_dense:
            # every number of A meets βγδφρ·α inputs, every intermediate one ε outputs
            assert row.flops_after == 2 * (layer.A.numel() * s.beta + layer.B.numel() * s.delta)
    assert surgery.flops_after == sum(row.flops_after for row in surgery.replaced)
    lines = str(surgery).splitlines()
    assert len(lines) == 1 + len(layers) + 2 + len(surgery.left_out)
    assert f"{surgery.params_before:,}" in lines[len(layers) + 1]
    assert f"{before:,}" in lines[len(layers) + 2]


def _train_step_changes_everything(model: Any, step: Callable[[], Tensor]) -> None:
    groups = param_groups(model, 1e-3, base_width=9)
    listed = [p for group in groups for p in group["params"]]
    assert len(listed) == len(set(listed))
    assert set(listed) == set(model.parameters())
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    first = step()
    torch.autograd.backward(first)
    optimizer.step()
    for name, parameter in model.named_parameters():
        if name.rsplit(".", 1)[-1] in ("A", "B"):
            assert not torch.equal(parameter, before[name]), name
    with torch.no_grad():
        assert step() < first


def test_gpt2(tmp_path: Path) -> None:
    model = gpt2().eval()
    surgery = replace_linears(model, "monarch")
    assert len(surgery.replaced) == 8
    assert "transformer.wte.weight (Embedding)" in left_out(surgery)["lm_head"]
    assert model.lm_head.weight is model.transformer.wte.weight
    ids = torch.randint(1, 97, (3, 12))
    _train_step_changes_everything(model, lambda: model(ids, labels=ids).loss)

    prompt = ids[:1, :4]
    with torch.no_grad():
        told = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, do_sample=False,
            pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
    assert told.shape == (1, 9)
    assert torch.equal(told[:, :4], prompt)

    model.save_pretrained(tmp_path)
    other = gpt2().eval()
    replace_linears(other, "monarch")
    safetensors.torch.load_model(other, tmp_path / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(other(ids).logits, model(ids).logits)


def test_vit() -> None:
    model = vit()
    surgery = replace_linears(model, "monarch", normalize=True)
    assert len(surgery.replaced) == 13
    assert surgery.left_out == ()
    pixels, labels = torch.randn(4, 3, 16, 16), torch.arange(4)
    _train_step_changes_everything(model, lambda: model(pixels, labels=labels).loss)
    other = vit()
    replace_linears(other, "monarch", normalize=True)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(pixels).logits, model(pixels).logits)


def test_other_families_keep_running() -> None:
    ids = torch.randint(1, 50, (2, 6))
    t5 = T5EncoderModel(
        T5Config(vocab_size=50, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4)
    )
    surgery = replace_linears(t5, "monarch")
    # its forward looks at the dtype of wo.weight
    assert {n for n, r in left_out(surgery).items() if "reads its weight" in r} == {
        f"encoder.block.{i}.layer.1.DenseReluDense.wo" for i in (0, 1)
    }
    assert t5(ids).last_hidden_state.shape == (2, 6, 16)
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=44, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=16)
    )  # fmt: skip
    assert len(replace_linears(llama, "monarch").replaced) == 15
    assert llama(ids).logits.shape == (2, 6, 50)


def test_state_dict_through_safetensors_and_deepcopy(tmp_path: Path) -> None:
    model, other = Block(), Block()
    x = torch.randn(3, 16)
    for one in (model, other):
        replace_linears(one, "btt:rho=1/4")
    safetensors.torch.save_file(model.state_dict(), tmp_path / "state.safetensors")
    other.load_state_dict(safetensors.torch.load_file(tmp_path / "state.safetensors"))
    assert torch.equal(other(x), model(x))
    copied = copy.deepcopy(model)
    assert torch.equal(copied(x), model(x))
    assert not set(copied.parameters()) & set(model.parameters())


def rates(groups: list[dict[str, Any]]) -> dict[Tensor, float]:
    return {p: g["lr"] for g in groups for p in g["params"]}


def test_rates_of_a_model_wider_than_its_base() -> None:
    model = nn.ModuleDict(
        {
            "block": nn.Sequential(nn.Linear(64, 256), nn.Linear(256, 64)),
            "dense": nn.Linear(64, 64), "conv": Conv1D(192, 64), "pixels": nn.Linear(48, 64),
            "attention": nn.MultiheadAttention(64, 2), "norm": nn.LayerNorm(64),
            "embed": nn.Embedding(10, 64), "head": nn.Linear(64, 10, bias=False),
            "tied": nn.Linear(64, 10), "narrow": nn.Linear(12, 64),
        }
    )  # fmt: skip
    model["tied"].weight = model["embed"].weight
    replace_linears(model, "monarch", ["block.*", "narrow"])
    parameter = model.get_parameter
    head = parameter("head.weight")
    lr = rates(param_groups(model, 0.1, {head: 0.5}, base_width=16))
    for layer in model["block"]:  # type: ignore[attr-defined]
        for name, factor in layer.factors().items():
            fan_in = layer.structure.fans(name)[0]
            assert lr[factor] == pytest.approx(0.1 * (layer.in_features / 4) / (2 * fan_in))
        assert lr[layer.bias] == 0.1
    narrow = part(model, "narrow", EinsumLinear)
    for name, factor in narrow.factors().items():  # its input does not grow with the width
        assert lr[factor] == pytest.approx(0.1 * 12 / (2 * narrow.structure.fans(name)[0]))
    for name in (
        "dense.weight", "conv.weight", "attention.in_proj_weight", "attention.out_proj.weight",
    ):  # fmt: skip
        assert lr[parameter(name)] == pytest.approx(0.1 / 4)
    assert lr[head] == pytest.approx(0.05)
    for name in (
        "pixels.weight", "embed.weight", "norm.weight", "dense.bias", "conv.bias",
        "attention.in_proj_bias",
    ):  # fmt: skip
        assert lr[parameter(name)] == 0.1
    assert set(lr) == set(model.parameters())
    given = rates(param_groups(model, 0.1, base_width=16, width=64))
    assert given.pop(head) == pytest.approx(0.1 / 4)
    assert given == {p: v for p, v in lr.items() if p is not head}
    # without a base width nothing but the structured layers differs from lr
    plain = rates(param_groups(model, 0.1))
    assert {p for p, v in plain.items() if v != 0.1} <= {
        f for m in model.modules() if isinstance(m, EinsumLinear) for f in m.factors().values()
    }


def test_a_model_at_its_base_width_keeps_its_rates() -> None:
    model = gpt2()
    replace_linears(model, "monarch")
    assert rates(param_groups(model, 0.1, base_width=36)) == rates(param_groups(model, 0.1))


def test_shared_parameters_are_in_one_group_and_optimisers_step() -> None:
    for optimizer_of in (torch.optim.AdamW, torch.optim.SGD):
        model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.Linear(16, 16))
        model[2].weight = model[0].weight
        model[3].weight.requires_grad_(False)
        replace_linears(model, "monarch")
        groups = param_groups(model, 1e-2, base_width=8)
        listed = [p for group in groups for p in group["params"]]
        assert len(listed) == len(set(listed)) == len(list(model.parameters()))
        optimizer = optimizer_of(groups)
        before = [p.detach().clone() for p in model.parameters()]
        x, y = torch.randn(8, 16), torch.randn(8, 16)
        first = (model(x) - y).square().mean()
        first.backward()
        optimizer.step()
        for parameter, old in zip(model.parameters(), before, strict=True):
            assert torch.equal(parameter, old) != parameter.requires_grad
        assert (model(x) - y).square().mean() < first


@pytest.mark.parametrize("lr", [0, -1e-3, float("nan"), float("inf"), "1e-3", True, None])
def test_a_bad_rate_is_named(lr: Any) -> None:
    with pytest.raises(InvalidInput, match=r"lr: got .*; accepted: a positive number"):
        param_groups(mlp(), lr)


def test_bad_widths_and_multipliers_are_named() -> None:
    model = nn.Sequential(EinsumLinear("monarch", 16, 64), EinsumLinear("monarch", 64, 32))
    with pytest.raises(InvalidInput, match="width: got None, with 1 layers of 16, 1 layers of 32"):
        param_groups(model, 1.0, base_width=8)
    with pytest.raises(InvalidInput, match="width: got None, with no structured layer"):
        param_groups(mlp(), 1.0, base_width=8)
    assert param_groups(model, 1.0, base_width=8, width=16)
    with pytest.raises(InvalidInput, match="width: got 16; accepted: a width together"):
        param_groups(model, 1.0, width=16)
    for widths in ({"base_width": 0}, {"base_width": float("nan")}, {"base_width": 8, "width": -1}):
        with pytest.raises(InvalidInput, match=r"width: got .*a positive number"):
            param_groups(model, 1.0, **widths)
    with pytest.raises(InvalidInput, match=r"extra: got a Parameter of shape \(2,\)"):
        param_groups(model, 1.0, {nn.Parameter(torch.zeros(2)): 1.0})
    with pytest.raises(InvalidInput, match="extra: got nan"):
        param_groups(model, 1.0, {model.get_parameter("0.bias"): float("nan")})


LAYER = nn.Linear(16, 16)


class Slot:
    __slots__ = ("layer", "unset")
    layer: nn.Module


class Held(nn.Module):
    """Holds layers beside the modules that it registers."""

    def __init__(self) -> None:
        super().__init__()
        self.in_list, self.in_closure, self.in_dict, self.bound, self.default, self.plain = (
            nn.Linear(16, 16) for _ in range(6)
        )
        self.in_slot, self.weighed, self.free = (nn.Linear(16, 16) for _ in range(3))
        self.layers = [self.in_list, nn.Linear(16, 16), nn.Sequential(nn.Linear(16, 16))]
        closed, default = self.in_closure, self.default

        def through(x: Tensor, layer: nn.Module = default) -> Tensor:
            y: Tensor = closed(layer(x))
            return y

        self.through = through
        self.by_name = {"a": partial(self.in_dict.forward)}
        self.call = self.bound.__call__
        self.helper = SimpleNamespace(inner=SimpleNamespace(layer=self.plain))
        self.slot = Slot()
        self.slot.layer = self.in_slot
        self.weights = [self.weighed.weight, self.free.weight.clone()]
        self.root = SimpleNamespace(model=SimpleNamespace(config=[1, 2, "three"]))
        self.world = LAYER

    def forward(self, x: Tensor) -> Tensor:
        x = LAYER(self.by_name["a"](self.call(self.through(x))))
        for layer in self.layers:
            x = layer(x)
        y: Tensor = self.free(self.slot.layer(self.helper.inner.layer(x)))
        return y @ self.weights[0].T


def test_a_layer_that_something_else_holds_is_not_said_to_be_replaced() -> None:
    model = Held()
    surgery = replace_linears(model, "monarch")
    assert [layer.names for layer in surgery.replaced] == [("free",)]
    reasons = left_out(surgery)
    for name, where in {
        "in_list": "layers[0] holds it",
        "in_closure": "the closure of through (closed) holds it",
        "default": "a default of through holds it",
        "in_dict": "by_name['a'] holds it",
        "bound": "call holds it",
        "plain": "helper.inner.layer holds it",
        "in_slot": "slot.layer holds it",
        "weighed": "weights[0] holds its weight too",
        "world": "the global LAYER, read by Held.",
    }.items():
        assert where in reasons[name], (name, reasons[name])
    for name in ("layers[1]", "layers[2].0"):
        assert "does not register" in reasons[name]
    assert model(torch.randn(2, 16)).shape == (2, 16)


class Inner(dict[str, Any]):
    layer: nn.Module


class Slotted(nn.Module):
    __slots__ = ("__own",)

    def hold(self, layer: nn.Module) -> None:
        self.__own = layer


WAYS: dict[str, Callable[[nn.Linear], Any]] = {
    "a registered layer in a container that is not": lambda x: [nn.Sequential(x)],
    "a key": lambda x: {x: 1.0},
    "a view of a dict": lambda x: {"a": x}.values(),
    "a read-only dict": lambda x: MappingProxyType({"a": x}),
    "an attribute of a dict": lambda x: _with(Inner(), x),
    "an attribute of a function": lambda x: _with(lambda: None, x),
    "a private slot of a module": lambda x: _in_slot(x),
    "a global": lambda _: lambda: lambda: LAYERS[0],
    "a global in a helper": lambda _: lambda: _helper(),
    "a weak reference": lambda x: weakref.ref(x),
    "a part of its weight": lambda x: [x.weight[4:]],
    "a tie that is not registered": lambda x: [_tied(x)],
    "a default of many": lambda x: [lambda y=1: y, [[lambda y=x: y]]],
    "after many objects": lambda x: [[(i,) for i in range(70_000)], x],
}
LAYERS: list[nn.Module] = []


def _helper() -> nn.Module:
    return LAYERS[0]


def _with(thing: Any, layer: nn.Module) -> Any:
    thing.layer = layer
    return thing


def _in_slot(layer: nn.Module) -> nn.Module:
    (slotted := Slotted()).hold(layer)
    return slotted


def _tied(layer: nn.Linear) -> nn.Embedding:
    embedding = nn.Embedding(16, 16)
    embedding.weight = layer.weight
    return embedding


@pytest.mark.parametrize("way", WAYS)
def test_whatever_way_a_layer_is_held(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    monkeypatch.setattr(sys.modules[__name__], "LAYERS", [model[1]] if "global" in way else [])
    model[0].__dict__["held"] = WAYS[way](part(model, "1", nn.Linear))
    surgery = replace_linears(model, "monarch")
    assert "1" in left_out(surgery), surgery
    assert [layer.names for layer in surgery.replaced] == [("0",)]


def test_the_search_for_holders_ends_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(references, "MOST_OBJECTS", 50)
    model = mlp()
    model[0].__dict__["many"] = [[i] for i in range(60)]
    (told,) = left_out(replace_linears(model, "monarch")).values()
    assert "were searched" in told


def test_all_weights_of_one_buffer_that_is_held() -> None:
    model, buffer = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), torch.randn(2, 16, 16)
    for layer, values in zip(model, buffer, strict=True):
        layer.weight = nn.Parameter(values)
    model.__dict__["buffer"] = [buffer]
    assert set(left_out(replace_linears(model, "monarch"))) == {"0", "1"}


def test_keys_need_no_text() -> None:
    class Silent:
        def __repr__(self) -> str:
            raise RuntimeError

    model = mlp()
    model[0].__dict__["silent"] = {Silent(): 1}
    assert len(replace_linears(model, "monarch").replaced) == 2


def test_a_layer_that_holds_itself_in_a_hook_is_replaced() -> None:
    model = mlp()
    model[0].register_forward_hook(lambda module, args, out: out + 0)
    model.recorded = [1, model]  # type: ignore[assignment]
    assert len(replace_linears(model, "monarch").replaced) == 2


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 16, 32))
        self.router_weight = nn.Parameter(torch.randn(4, 16))
        self.cls_token = nn.Parameter(torch.randn(1, 1, 16))
        self.positions = nn.Parameter(torch.randn(1, 9, 16))


def test_linear_maps_that_are_no_linear_layers_are_told() -> None:
    model = nn.ModuleDict(
        {
            "experts": Experts(), "attention": nn.MultiheadAttention(16, 2), "rnn": nn.GRU(16, 16),
            "embedding": nn.Embedding(9, 16), "conv": nn.Conv1d(16, 16, 3), "mlp": mlp(),
            "norm": nn.LayerNorm((3, 16)),
        }
    )  # fmt: skip
    told = left_out(replace_linears(model, "monarch", select="mlp.*"))
    assert set(told) == {
        "experts.gate_up_proj", "experts.router_weight", "attention.in_proj_weight",
        "attention.out_proj", "rnn.weight_ih_l0", "rnn.weight_hh_l0",
    }  # fmt: skip
    assert told["experts.gate_up_proj"].startswith("it is a parameter (4, 16, 32) of Experts")


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_what_torchscript_compiled_stays() -> None:
    scripted: Any = torch.jit.script(nn.Sequential(nn.Linear(16, 16)))
    model = nn.Sequential(nn.Linear(16, 16), scripted)
    assert left_out(replace_linears(model, "monarch")) == {"1.0": "it is a Linear of TorchScript"}
    assert model(torch.randn(2, 16)).shape == (2, 16)


def test_layers_of_a_surgery_in_inference_mode_can_be_trained() -> None:
    model = mlp()
    with torch.inference_mode():
        replace_linears(model, "monarch", from_dense=True)
    model(torch.randn(2, 16)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    "design", ["monarch", "btt:cores=3,rho=1/8", "convolution:kernel=1/2", "blast", "pixelfly"]
)
def test_reading_the_weight_tells_what_to_do(design: str) -> None:
    model = mlp()
    replace_linears(model, design)
    with pytest.raises(AttributeError, match=r"to_matrix\(\), and select="):
        _ = model[0].weight
    assert not hasattr(model[0], "weight")
    with pytest.raises(AttributeError, match="wait"):
        _ = model[0].wait


@pytest.mark.parametrize("design", ["monarch", "btt:cores=3,rho=1/8", "btt-moe:experts=2,active=1"])
def test_memory_formats_are_for_images(design: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 16), nn.Flatten(), nn.Linear(16, 16), nn.Linear(16, 4))
    replace_linears(model, design)
    x = torch.randn(2, 3, 16, 16)
    expected, strides = model(x), [p.stride() for p in model[2].parameters()]
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    torch.testing.assert_close(model(x), expected)
    assert [p.stride() for p in model[2].parameters()] == strides
    assert model.to(torch.float64)[2].bias.dtype == torch.float64


def test_gains_can_be_sharded() -> None:
    layer = EinsumLinear("monarch", 16, 16, normalize=True, gain=True)
    layer(torch.randn(2, 16)).sum().backward()
    assert layer.gain_A is not None
    assert layer.gain_A.grad is not None
    assert layer.gain_A.grad.shape == layer.gain_A.shape == (1,)


@FULL
def test_a_sharded_layer_computes_the_same() -> None:
    # in a process of its own: what sharding leaves behind does not survive a fork
    code = """
import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard
from nas.layers import EinsumLinear
store = distributed.HashStore()
distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
layer, x = EinsumLinear("monarch", 16, 16, normalize=True, gain=True), torch.randn(2, 16)
expected = layer(x)
fully_shard(layer)
torch.testing.assert_close(layer(x), expected)
layer.double().to_empty(device="cpu")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
