from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from nas.errors import InvalidInput
from nas.layers import (
    ConvolutionLinear,
    EinsumLinear,
    MixtureFFN,
    build_layer,
    layer_of,
    load,
    replace_linears,
    save,
)
from nas.layers.record import LayerRecord
from tests.support.tiers import FULL

HALF = "convolution:kernel=1/2"
DESIGNS = (
    "monarch", "low-rank:rho=1/3", "dense", "btt:cores=3,rho=1/8", "btt-moe:experts=4,active=2",
    "btt-moe:experts=4,active=3,shared=1", "dense-moe", HALF, "blast:blocks=1/4",
    "block-sparse:blocks=2/3",
    "block-sparse:pattern=channels", "pixelfly:rank=1/4", "lost",
    "sum(monarch;btt:cores=3,rho=1/8)", "cola-mlp:rank=1/3", "activated(monarch;relu)",
)  # fmt: skip
TOKENS = torch.arange(12)[None]


def gpt2() -> Any:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=97, n_positions=32, n_embd=36, n_layer=2, n_head=4,
                   bos_token_id=0, eos_token_id=0)
    ).eval()  # fmt: skip


def llama() -> Any:
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=97, hidden_size=40, intermediate_size=96, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=2)
    ).eval()  # fmt: skip


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)).eval()


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize(
    "options",
    [{}, {"normalize": True, "gain": True}, {"bias": False, "zero_init": True, "d_in_base": 7}],
)
def test_a_record_is_all_that_a_layer_is_built_from(design: str, options: dict[str, Any]) -> None:
    layer = layer_of(design, 60, 77, **options).eval()
    record = LayerRecord.of_tensor(layer.record.to_tensor().half())  # as where all is cast
    assert record == layer.record
    other = build_layer(record.structure, **record.options).eval()
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, 60)
    assert torch.equal(other(x), layer(x))


EXPERTS = "btt-moe:experts=4,active={}"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (EinsumLinear("monarch", 64, 64), EinsumLinear("monarch", 64, 64, normalize=True)),
        (layer_of(EXPERTS.format(2), 64, 64), layer_of(EXPERTS.format(1), 64, 64)),
        (
            layer_of("dense-moe:experts=5,active=4", 64, 64),
            layer_of("dense-moe:experts=5,active=4,shared=2", 64, 64),
        ),
        (
            layer_of(EXPERTS.format("2,shared=1"), 64, 64),
            layer_of(EXPERTS.format("3,shared=1"), 64, 64),
        ),
        (EinsumLinear("monarch", 60, 64), EinsumLinear("monarch", 61, 64)),
        (ConvolutionLinear(HALF, 63, 64), ConvolutionLinear(HALF, 64, 64)),
        (layer_of("blast", 63, 64), layer_of("blast", 64, 64)),
        (layer_of("block-sparse", 63, 64), layer_of("block-sparse", 64, 64)),
        (layer_of("cola-mlp", 63, 64), layer_of("cola-mlp:activation=gelu", 63, 64)),
        (layer_of("pixelfly", 63, 64), layer_of("pixelfly", 63, 64, normalize=True)),
    ],
)
def test_tensors_that_fit_but_mean_something_else_are_refused(
    one: nn.Module, other: nn.Module
) -> None:
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(RuntimeError, match="accepted: those of a"):
        other.load_state_dict(one.state_dict(), strict=False)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_states_of_before_there_were_records_still_load() -> None:
    layer = EinsumLinear("monarch", 16, 16, normalize=True, gain=True)
    old = {name: v for name, v in layer.state_dict().items() if name != "_extra_state"}
    old["gain_A"] = torch.tensor(1.5)  # without a dimension, as gains were
    other = EinsumLinear("monarch", 16, 16, normalize=True, gain=True)
    other.load_state_dict(old)
    assert other.gain_A is not None
    assert other.gain_A.tolist() == [1.5]


def test_a_plain_matrix_is_interchangeable_with_a_linear_layer() -> None:
    dense = EinsumLinear("dense", 8, 8)
    nn.Linear(8, 8).load_state_dict(dense.state_dict())
    dense.load_state_dict(nn.Linear(8, 8).state_dict())


@pytest.mark.parametrize("make", [gpt2, llama])
def test_a_model_of_transformers_there_and_back(make: Callable[[], Any], tmp_path: Path) -> None:
    model = make()
    layers = "transformer.h.*" if make is gpt2 else "model.layers.*"
    replace_linears(model, {"*mlp*": "btt:rho=1/4", "*": "dense"}, select=layers)
    expected = model(TOKENS).logits
    model.save_pretrained(tmp_path)
    for loader in (AutoModelForCausalLM, type(model)):
        with pytest.raises(ValueError, match="quantization config"):
            loader.from_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert "nas.layers.load" in json.dumps(config.quantization_config)
    fresh = load(AutoModelForCausalLM.from_config(config), tmp_path).eval()
    assert torch.equal(fresh(TOKENS).logits, expected)
    again = load(fresh, tmp_path)  # into a model that is as it should be
    assert torch.equal(again(TOKENS).logits, expected)


def test_a_model_on_the_meta_device_takes_the_tensors() -> None:
    with torch.device("meta"):
        empty, rotary = gpt2(), llama()
    model = gpt2()
    replace_linears(model, "monarch", select="transformer.h.*")
    got = load(empty, model.state_dict())(TOKENS).logits
    torch.testing.assert_close(got, model(TOKENS).logits)
    with pytest.raises(InvalidInput, match=r"on the meta device, with model\.rotary_emb\.inv_freq"):
        load(rotary, llama().state_dict())  # a buffer that is in no file


def test_models_that_transformers_writes_under_other_names(tmp_path: Path) -> None:
    def mixtral() -> Any:
        return MixtralForCausalLM(
            MixtralConfig(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                          num_attention_heads=4, num_key_value_heads=2, num_local_experts=4)
        ).eval()  # fmt: skip

    model = mixtral()
    replace_linears(model, "monarch")
    save(model, tmp_path)
    assert torch.equal(load(mixtral(), tmp_path)(TOKENS).logits, model(TOKENS).logits)


def test_every_whole_model_of_transformers_is_marked(tmp_path: Path) -> None:
    net = gpt2()
    replace_linears(nn.ModuleDict({"net": net}), "monarch")
    assert "einsum_nas" in net.config.quantization_config
    dense = llama()
    replace_linears(dense, "dense")  # nothing but weights of linear layers
    dense.save_pretrained(tmp_path)
    same = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(same(TOKENS).logits, dense(TOKENS).logits)


class Counting(nn.Module):
    """Has extra state of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.count = nn.Linear(16, 16), torch.tensor([1, 2, 3], dtype=torch.uint8)

    def get_extra_state(self) -> Any:
        return self.count

    def set_extra_state(self, state: Any) -> None:
        self.count = state


def test_extra_state_of_others_is_theirs() -> None:
    model = Counting()
    replace_linears(model, "monarch")
    model.count = torch.tensor([4], dtype=torch.uint8)
    fresh = load(Counting(), model.state_dict())
    assert fresh.count.tolist() == [4]
    assert torch.equal(fresh.layer(torch.ones(2, 16)), model.layer(torch.ones(2, 16)))


def test_a_shared_weight_with_one_bias() -> None:
    def tied() -> nn.Sequential:
        model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16, bias=False))
        model[1].weight = model[0].weight
        return model

    model, x = tied(), torch.randn(2, 16)
    replace_linears(model, "monarch")
    fresh = load(tied(), model.state_dict())
    assert fresh[0].A is fresh[1].A
    assert torch.equal(fresh(x), model(x))


def test_means_of_checkpoints_have_their_record() -> None:
    model = mlp()
    replace_linears(model, "monarch")
    state = model.state_dict()
    mean = {name: sum(v / 7 for _ in range(7)) for name, v in state.items()}
    load(mlp(), mean)


def test_shards_and_single_files(tmp_path: Path) -> None:
    model = gpt2()
    replace_linears(model, "monarch", select="transformer.h.*")
    expected = model(TOKENS).logits
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(load(gpt2(), tmp_path)(TOKENS).logits, expected)
    file = tmp_path / "one.safetensors"
    save(model, file)
    assert torch.equal(load(gpt2(), file)(TOKENS).logits, expected)
    with safe_open(file, "pt") as opened:
        told = json.loads(opened.metadata()["einsum_nas"])
    assert told["transformer.h.0.mlp.c_fc"].startswith("a Structure 36x144:")


def test_structured_weights_without_their_structure_are_refused(tmp_path: Path) -> None:
    model = mlp()
    replace_linears(model, "monarch")
    state = model.state_dict()
    bare = {name: v for name, v in state.items() if not name.endswith("_extra_state")}
    for strict in (True, False):
        with pytest.raises(InvalidInput, match=r"lacks 0\.weight, 2\.weight and has 0\.A"):
            load(mlp(), bare)
        if strict:
            with pytest.raises(RuntimeError, match="Unexpected key"):
                mlp().load_state_dict(state)
    with pytest.raises(InvalidInput, match="no linear layer there"):
        load(nn.Sequential(nn.GELU(), nn.GELU(), nn.Linear(64, 16)), state)
    with pytest.raises(InvalidInput, match="32, 64"):
        load(nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 16)), state)
    wrong = mlp()
    replace_linears(wrong, "low-rank:rho=1/2")
    with pytest.raises(InvalidInput, match="accepted: those of a Structure"):
        load(wrong, state)
    garbled = {**state, "0._extra_state": torch.zeros(5, dtype=torch.uint8)}
    with pytest.raises(InvalidInput, match="version 1"):
        load(mlp(), garbled)


def test_a_square_conv1d_is_not_taken_for_its_transpose() -> None:
    model = gpt2()
    replace_linears(model, "dense", select="transformer.h.0.attn.c_proj")
    with pytest.raises(RuntimeError, match="Unexpected key"):
        gpt2().load_state_dict(model.state_dict())
    assert torch.equal(load(gpt2(), model.state_dict())(TOKENS).logits, model(TOKENS).logits)


def test_a_model_that_builds_its_experts_itself(tmp_path: Path) -> None:
    def block() -> nn.Sequential:
        return nn.Sequential(MixtureFFN.of("ffn-moe:experts=4,active=2", 16, 64)).eval()

    model, x = block(), torch.randn(5, 16)
    save(model, tmp_path / "m.safetensors")
    assert torch.equal(load(block(), tmp_path / "m.safetensors")(x), model(x))


class OwnGPT2(GPT2LMHeadModel):  # type: ignore[misc]
    """A class that replaces its layers itself, whose `from_pretrained` goes on to work."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        replace_linears(self, "monarch", select="transformer.h.*")


def test_a_class_that_replaces_its_layers_itself(tmp_path: Path) -> None:
    model = OwnGPT2(gpt2().config).eval()
    model.save_pretrained(tmp_path)
    again = OwnGPT2.from_pretrained(tmp_path).eval()
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize("name", ["none.safetensors", "folder", "text.safetensors", "model.bin"])
def test_what_is_no_file_of_weights_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(InvalidInput, match=r"accepted: a \.safetensors file"):
        load(mlp(), tmp_path / name)
    if name == "model.bin":
        with pytest.raises(InvalidInput, match=r"\.safetensors"):
            save(mlp(), tmp_path / name)


def test_safetensors_own_writer_takes_the_structure_along(tmp_path: Path) -> None:
    model, x = mlp(), torch.randn(3, 16)
    replace_linears(model, "monarch", normalize=True)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "m.safetensors")
    assert torch.equal(load(mlp(), tmp_path / "m.safetensors")(x), model(x))
    torch.save(model.state_dict(), tmp_path / "m.pt")
    state: dict[str, Tensor] = torch.load(tmp_path / "m.pt", weights_only=True)
    assert torch.equal(load(mlp(), state)(x), model(x))


@FULL
def test_a_fresh_process_that_imports_what_the_documents_say(tmp_path: Path) -> None:
    model = gpt2()
    replace_linears(model, "monarch", select="transformer.h.*")
    save(model, tmp_path)
    torch.save(model(TOKENS).logits, tmp_path / "logits.pt")
    code = (
        "import sys, torch\n"
        "from nas.layers import load\n"
        "from transformers import AutoConfig, AutoModelForCausalLM\n"
        "folder = sys.argv[1]\n"
        "config = AutoConfig.from_pretrained(folder)\n"
        "model = load(AutoModelForCausalLM.from_config(config), folder).eval()\n"
        "same = torch.load(folder + '/logits.pt')\n"
        "assert torch.equal(model(torch.arange(12)[None]).logits, same)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=environment)
