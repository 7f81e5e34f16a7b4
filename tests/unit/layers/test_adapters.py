"""LoRA of PEFT on structured layers."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import EvaConfig, VeloraConfig
from torch import Tensor, nn
from torch.nn import functional

from nas.errors import InvalidInput
from nas.layers import (
    EinsumLinear,
    MixtureFFN,
    MixtureLinear,
    StructuredLinear,
    forward_flops,
    layer_of,
    load,
    load_lora,
    lora_config,
    param_groups,
    replace_linears,
    save,
)
from tests.support.hugging import TinyBert, TinyGPT2, TinyLlama, TinyMixtral

# of PEFT 0.21 with transformers 5.23
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

DESIGNS = (
    "monarch", "low-rank:rho=1/3", "dense", "btt:cores=3,rho=1/8", "btt-moe:experts=4,active=2",
    "low-rank-moe:rho=1,experts=4,active=2", "dense-moe", "convolution:kernel=1/2", "blast",
    "pixelfly:rank=1/4,blocks=1/2", "lost", "cola-mlp",
)  # fmt: skip
#: Options of layers, of which none may change what an adapter adds.
LAYERS: tuple[dict[str, Any], ...] = (
    {}, {"bias": False, "zero_init": True}, {"normalize": True, "gain": True},
)  # fmt: skip
#: Options of `LoraConfig`, and the scale that they mean at r = 4.
SCALES: tuple[tuple[dict[str, Any], float], ...] = (
    ({}, 2.0), ({"lora_alpha": 12, "use_rslora": True}, 6.0),
    ({"lora_alpha": 6, "lora_dropout": 0.5, "lora_bias": True, "fan_in_fan_out": True}, 1.5),
)  # fmt: skip
D_IN, D_OUT, RANK = 36, 50, 4
TOKENS = torch.arange(12)[None]


def chain(design: str = "monarch", **options: Any) -> nn.Sequential:
    """Two structured layers, whose gates choose, and a dense one."""
    options = {"dtype": torch.float64, **options}
    model = nn.Sequential(
        layer_of(design, D_IN, D_OUT, **options), nn.GELU(),
        layer_of(design, D_OUT, D_IN, **options), nn.Linear(D_IN, D_IN, dtype=options["dtype"]),
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, MixtureLinear) and module.gate is not None:
            nn.init.normal_(module.gate)
    return model.eval()


def inputs(rows: int = 7) -> Tensor:
    return torch.randn(rows, D_IN, dtype=torch.float64)


def state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model, copied, under the names that they have without adapters."""
    return {n.replace(".base_layer", ""): t.clone() for n, t in model.state_dict().items()}


def shuffled(model: nn.Module) -> None:
    """Give all that trains other values."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)


def hugging(task: Any, select: Any = None) -> Any:
    """A tiny model of transformers, with monarch layers but for its head."""
    model = getattr(transformers, task.auto).from_config(task.config).eval()
    replace_linears(model, "monarch", select or (lambda name, _: "head" not in name))
    return model


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")  # where a layer has no bias
@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("layer_options", LAYERS, ids=str)
@pytest.mark.parametrize(("options", "scale"), SCALES, ids=str)
def test_an_adapted_layer_adds_the_scaled_low_rank_product(
    design: str, layer_options: dict[str, Any], options: dict[str, Any], scale: float
) -> None:
    model = chain(design, **layer_options)
    layer = model[0]
    assert isinstance(layer, StructuredLinear)
    one_matrix = layer.structure.is_linear and not isinstance(layer, MixtureLinear)
    plain = layer.to_linear() if one_matrix else copy.deepcopy(layer)
    config = lora_config(model, r=RANK, target_modules=["0"], init_lora_weights=False, **options)
    adapted: Any = get_peft_model(model, config).base_model.model[0].eval()
    a, b = adapted.lora_A["default"], adapted.lora_B["default"]
    assert (a.weight.shape, b.weight.shape) == ((RANK, D_IN), (D_OUT, RANK))
    assert a.weight.dtype == b.weight.dtype == torch.float64
    x = inputs().view(7, 1, D_IN)
    added = functional.linear(x, scale * (b.weight @ a.weight))
    if b.bias is not None:
        added = added + scale * b.bias
    assert added.abs().max() > 0.01
    torch.testing.assert_close(adapted(x), plain(x) + added)
    torch.testing.assert_close(adapted.get_delta_weight("default"), scale * b.weight @ a.weight)
    if options.get("lora_dropout"):
        assert not torch.equal(adapted.train()(x), adapted(x))


@pytest.mark.parametrize("design", DESIGNS)
def test_adapters_alone_train(design: str) -> None:
    torch.manual_seed(0)
    model = chain(design)
    before = state(model)
    peft_model = get_peft_model(model, lora_config(model, r=RANK, target_modules=["0", "2", "3"]))
    x, y = inputs(), inputs()
    assert torch.equal(peft_model(x), chain_with(before, design)(x))  # B begins at zero
    trained = {n for n, p in peft_model.named_parameters() if p.requires_grad}
    assert len(trained) == 6
    assert all("lora_" in name for name in trained)
    optimizer = torch.optim.Adam(param_groups(peft_model, lr=1e-2))
    losses = []
    for _ in range(10):
        loss = (peft_model.train()(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    after = state(peft_model.get_base_model())
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def chain_with(tensors: dict[str, Tensor], design: str) -> nn.Module:
    model = chain(design)
    model.load_state_dict(tensors)
    return model


@pytest.mark.parametrize("task", [TinyLlama, TinyGPT2, TinyBert, TinyMixtral], ids=lambda t: t.name)
def test_models_of_transformers_train_are_saved_and_loaded(task: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = hugging(task)
    save(model, tmp_path / "base")
    structured = sum(isinstance(m, StructuredLinear) for m in model.modules())
    before = state(model)
    task_type = "CAUSAL_LM" if task.auto == "AutoModelForCausalLM" else None
    peft_model: Any = get_peft_model(model, lora_config(model, task_type=task_type))
    assert sum("lora_A" in n for n, _ in peft_model.named_parameters()) == structured > 3
    optimizer = torch.optim.Adam(param_groups(peft_model, lr=1e-2))
    losses = []
    for _ in range(6):
        loss = peft_model(input_ids=TOKENS, labels=TOKENS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(state(model)[name], tensor) for name, tensor in before.items())
    peft_model.save_pretrained(tmp_path / "adapter")

    fresh = getattr(transformers, task.auto).from_config(task.config)
    same = load_lora(load(fresh, tmp_path / "base"), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(same(input_ids=TOKENS).logits, peft_model(input_ids=TOKENS).logits)
    assert not any(p.requires_grad for p in same.parameters())
    save(peft_model.unload(), tmp_path / "again")  # the base model as it was
    again = load(getattr(transformers, task.auto).from_config(task.config), tmp_path / "again")
    assert all(torch.equal(state(again)[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("design", DESIGNS)
def test_what_is_trained_beside_adapters_is_saved_with_them(design: str, tmp_path: Path) -> None:
    base = chain(design)
    model = copy.deepcopy(base)
    config = lora_config(model, target_modules=["0", "3"], modules_to_save=["2"], bias="lora_only")
    peft_model = get_peft_model(model, config)
    shuffled(peft_model)
    peft_model.save_pretrained(tmp_path)
    same = load_lora(base, tmp_path, is_trainable=True).eval()
    x = inputs()
    assert torch.equal(same(x), peft_model.eval()(x))
    trained = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (same, peft_model)]
    assert trained[0] == trained[1]
    assert {"base_model.model.0.base_layer.bias", "base_model.model.3.base_layer.bias"} < trained[0]


@pytest.mark.parametrize("design", DESIGNS)
def test_adapters_stand_beside_each_other(design: str, tmp_path: Path) -> None:
    base = chain(design)
    plain, x = copy.deepcopy(base), inputs(6)
    one = get_peft_model(base, lora_config(base, init_lora_weights="gaussian"))
    shuffled(one)
    y = one(x)
    one.save_pretrained(tmp_path / "one")
    with one.disable_adapter():
        assert torch.equal(one(x), plain(x))
    one.add_adapter("two", lora_config(one, r=3, target_modules=["2", "3"]))
    assert torch.equal(one(x), y)  # until it is chosen
    one.set_adapter("two")
    shuffled(one)
    z = one(x)
    one.save_pretrained(tmp_path)
    assert not torch.allclose(z, y)

    both = load_lora(copy.deepcopy(plain), tmp_path / "two", adapter_name="second").eval()
    assert torch.equal(both(x), z)
    # onto a layer that has no adapter yet, which PEFT's own load_adapter would refuse
    assert load_lora(both, tmp_path / "one", adapter_name="first") is both
    assert torch.equal(both(x), z)
    both.set_adapter("first")
    assert torch.equal(both(x), y)
    names = ["first", "first", "second", "second", "__base__", "__base__"]
    mixed = both(x, adapter_names=names)
    torch.testing.assert_close(mixed, torch.cat([y[:2], z[2:4], plain(x)[4:]]))


def test_adapters_are_combined_as_those_of_dense_layers() -> None:
    model = nn.Sequential(layer_of("monarch", D_IN, D_OUT, dtype=torch.float64))
    peft_model: Any = get_peft_model(model, lora_config(model, r=3, init_lora_weights=False))
    peft_model.add_adapter("two", lora_config(peft_model, r=3, init_lora_weights=False))
    layer = peft_model.base_model.model[0]
    sum_ = 0.5 * layer.get_delta_weight("default") + 2 * layer.get_delta_weight("two")
    for kind in ("cat", "svd"):
        peft_model.add_weighted_adapter(["default", "two"], [0.5, 2.0], kind, kind, svd_rank=6)
        torch.testing.assert_close(layer.get_delta_weight(kind), sum_)


@pytest.mark.parametrize("design", ["monarch", "btt-moe:experts=4,active=2"])
def test_half_precision_and_autocast(design: str) -> None:
    half = chain(design, dtype=torch.bfloat16)
    peft_model: Any = get_peft_model(half, lora_config(half, target_modules=["0", "2", "3"]))
    shuffled(peft_model)
    adapted = peft_model.base_model.model[0]
    assert adapted.lora_A["default"].weight.dtype == torch.float32  # as PEFT trains them
    assert peft_model(inputs().bfloat16()).dtype == torch.bfloat16
    single = copy.deepcopy(peft_model).float()
    x = inputs().float()
    with torch.autocast("cpu", torch.bfloat16):
        y = single(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), single(x), atol=0.2, rtol=0.1)


def test_flops_are_those_of_the_structure_and_of_both_products() -> None:
    model = nn.Sequential(layer_of("monarch", D_IN, D_OUT), layer_of(DESIGNS[4], D_OUT, D_IN))
    macs = sum(layer.structure.macs for layer in model)  # type: ignore[union-attr,misc]
    peft_model = get_peft_model(model, lora_config(model, r=RANK))
    x = torch.zeros(5, D_IN)
    adapters = 2 * RANK * (D_IN + D_OUT)
    assert forward_flops(peft_model, x) == 2 * 5 * (macs + adapters)
    with peft_model.disable_adapter():
        assert forward_flops(peft_model, x) == 2 * 5 * macs


def test_learning_rates_of_adapters() -> None:
    model = nn.Sequential(layer_of("monarch", 64, 64), nn.GELU(), layer_of("monarch", 64, 64))
    peft_model = get_peft_model(model, lora_config(model, r=RANK))
    rate = {
        p: group["lr"]
        for group in param_groups(peft_model, lr=1.0, base_width=16, width=64)
        for p in group["params"]
    }
    assert rate.keys() == set(peft_model.parameters())
    # A is a matrix that sums over the width, B one over the rank, which does not grow
    found = {n: rate[p] for n, p in peft_model.named_parameters() if "lora_" in n}
    assert {n: 0.25 if "lora_A" in n else 1.0 for n in found} == found


def test_names_are_no_endings() -> None:
    model = nn.Sequential(layer_of("monarch", 16, 16), nn.Sequential(nn.Linear(16, 16)))
    peft_model = get_peft_model(model, lora_config(model))
    adapted = {n for n, _ in peft_model.named_parameters() if "lora_" in n}
    assert {n.partition(".lora_")[0] for n in adapted} == {"base_model.model.0"}


def test_layers_that_share_factors_are_adapted_apart() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model[1].weight = model[0].weight
    replace_linears(model, "monarch")
    assert model[0].A is model[1].A
    peft_model: Any = get_peft_model(model, lora_config(model, init_lora_weights=False))
    first, second = peft_model.base_model.model
    assert first.base_layer.A is second.base_layer.A
    assert not torch.equal(first.lora_A["default"].weight, second.lora_A["default"].weight)


def test_blocks_of_experts_stay_as_they_are() -> None:
    model = nn.Sequential(layer_of("monarch", 16, 16), MixtureFFN.of("ffn-moe", 16, 32)).eval()
    x = torch.randn(3, 16)
    y = model(x)
    peft_model = get_peft_model(model, lora_config(model))
    assert sum("lora_A" in n for n, _ in peft_model.named_parameters()) == 1
    assert torch.equal(peft_model(x), y)


def test_surgery_leaves_adapted_layers_out() -> None:
    model = chain()
    peft_model = get_peft_model(model, lora_config(model, target_modules=["0", "3"]))
    report = replace_linears(peft_model, "monarch")
    assert not report.replaced
    reasons = {name: layer.reason for layer in report.left_out for name in layer.names}
    assert reasons["base_model.model.3.base_layer"] == "it is part of an adapter, Linear"
    assert (
        reasons["base_model.model.0.lora_A.default"]
        == "it is part of an adapter, LoraStructuredLinear"
    )


def test_a_model_with_adapters_is_copied_and_pickled() -> None:
    model = chain()
    peft_model = get_peft_model(model, lora_config(model, init_lora_weights=False))
    x = inputs()
    for other in (copy.deepcopy(peft_model), pickle.loads(pickle.dumps(peft_model))):
        assert torch.equal(other(x), peft_model(x))


def test_merging_is_refused() -> None:
    model = nn.Sequential(layer_of("monarch", 16, 16), nn.Linear(16, 16)).eval()
    peft_model: Any = get_peft_model(model, lora_config(model, init_lora_weights=False))
    peft_model.add_adapter("head", LoraConfig(target_modules=["1"], init_lora_weights=False))
    x = torch.randn(3, 16)
    y = peft_model(x)
    for merging in (peft_model.merge_adapter, peft_model.merge_and_unload):
        with pytest.raises(InvalidInput, match="merge: got default; accepted: adapters of dense"):
            merging()
    assert torch.equal(peft_model(x), y)
    peft_model.set_adapter("head")
    z = peft_model(x)
    peft_model.merge_adapter()  # which no structured layer has
    torch.testing.assert_close(peft_model(x), z)
    assert peft_model.base_model.model[1].merged


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"velora_config": VeloraConfig()}, "velora_config"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"init_lora_weights": "mica"}, "init_lora_weights"),
        ({"init_lora_weights": "orthogonal"}, "init_lora_weights"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "init_lora_weights"),
        ({"init_lora_weights": "eva", "eva_config": EvaConfig()}, "init_lora_weights"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_needs_a_weight_matrix_is_refused(options: dict[str, Any], field: str) -> None:
    model = chain("dense")  # not even where there is one
    with pytest.raises(InvalidInput) as refused:
        lora_config(model, **options)
    assert refused.value.field == field
    assert refused.value.value in str(options[field])
    # however the config came about
    peft_model = get_peft_model(model, lora_config(model, target_modules=["0"]))
    with pytest.raises(InvalidInput, match=field):
        peft_model.add_adapter("other", LoraConfig(target_modules=["0"], **options))


def test_targets_that_mean_something_else_are_refused() -> None:
    with pytest.raises(InvalidInput, match="model: got a Sequential without structured layers"):
        lora_config(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(InvalidInput, match="target_modules: got all-linear"):
        lora_config(chain(), target_modules="all-linear")
    block = nn.Sequential(MixtureFFN.of("ffn-moe", 16, 32))
    with pytest.raises(InvalidInput, match="model: got a Sequential without structured layers"):
        lora_config(block)
    with pytest.raises(InvalidInput, match=r"target_modules: got 0\.mlp_in; .* MixtureFFN"):
        lora_config(block, target_modules=["mlp_in"])
    model = chain()
    with pytest.raises(InvalidInput, match="target_parameters: got A of 0"):
        get_peft_model(model, lora_config(model, target_modules=["3"], target_parameters=["0.A"]))


def test_a_layer_that_is_held_twice_is_refused_or_left_out() -> None:
    layer = layer_of("monarch", 16, 16)
    model = nn.Sequential(layer, layer_of("monarch", 16, 16), layer)
    for targets in (None, ["2"]):
        with pytest.raises(
            InvalidInput, match=r"got [02], a layer that the model holds at 2 places"
        ):
            lora_config(model, target_modules=targets)
    peft_model = get_peft_model(model, lora_config(model, exclude_modules=["0", "2"]))
    assert sum("lora_A" in n for n, _ in peft_model.named_parameters()) == 1
    # a module around it may be held twice
    outer = nn.Sequential(nn.Sequential(EinsumLinear("monarch", 16, 16)))
    outer.append(outer[0])
    adapted: Any = get_peft_model(outer, lora_config(outer)).base_model.model
    assert adapted[0][0] is adapted[1][0]
    assert adapted[0][0].lora_A


def test_adapters_of_other_kinds_are_not_loaded(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    config = IA3Config(target_modules=["0"], feedforward_modules=[])
    get_peft_model(copy.deepcopy(model), config).save_pretrained(tmp_path / "ia3")
    with pytest.raises(InvalidInput, match="ia3, a IA3Config; accepted: an adapter of LoRA"):
        load_lora(model, tmp_path / "ia3")
    lora = get_peft_model(model, LoraConfig(target_modules=["0"]))
    lora.save_pretrained(tmp_path / "lora")
    with pytest.raises(InvalidInput, match="adapter_name: got default; accepted: a name other"):
        load_lora(lora, tmp_path / "lora")


def test_layers_run_without_peft() -> None:
    code = """
import sys
sys.modules["peft"] = None
from nas.layers import *
layer_of("monarch", 16, 16)
try:
    lora_config(layer_of("monarch", 16, 16))
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "peft" in done.stdout


def test_peft_itself_still_refuses_the_layers() -> None:
    """Else `lora_config` would be needless."""
    model = chain()
    with pytest.raises(ValueError, match="is not supported"):
        get_peft_model(model, LoraConfig(target_modules=["0"]))
    assert not isinstance(model, PeftModel)
