"""FLOPs of any model, counted from shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nas.designs.design import parse_design
from nas.errors import InvalidInput
from nas.layers import EinsumLinear, forward_flops, replace_linears
from nas.layers.mixture import MixtureFFN
from nas.planning import cost
from nas.planning.recipe import RECIPES
from nas.training.tasks import build_model
from tests.support.tiers import thinned

LAYERS, TOKENS, VOCABULARY, HEADS = 2, 16, 64, 4
WIDTHS = (32, 64, 128)
#: Configuration and model of each kind, and what it is called with.
KINDS = {
    "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM", "gemma": "GemmaForCausalLM", "olmo": "OlmoForCausalLM",
    "phi": "PhiForCausalLM", "gpt2": "GPT2LMHeadModel", "gpt_neox": "GPTNeoXForCausalLM",
    "opt": "OPTForCausalLM", "falcon": "FalconForCausalLM", "bloom": "BloomForCausalLM",
    "stablelm": "StableLmForCausalLM", "granite": "GraniteForCausalLM",
    "bert": "BertForMaskedLM", "roberta": "RobertaForMaskedLM",
    "distilbert": "DistilBertForMaskedLM", "electra": "ElectraForMaskedLM",
    "vit": "ViTForImageClassification", "t5": "T5ForConditionalGeneration",
}  # fmt: skip


def configured(kind: str, width: int) -> Any:
    """A small model of Hugging Face's, from its configuration's own fields."""
    transformers = pytest.importorskip("transformers")
    common = {
        "hidden_size": width, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS // 2, "intermediate_size": 2 * width,
        "vocab_size": VOCABULARY, "max_position_embeddings": 2 * TOKENS, "head_dim": width // HEADS,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    special: dict[str, dict[str, Any]] = {
        "gpt2": {"n_embd": width, "n_layer": LAYERS, "n_head": HEADS, "n_positions": TOKENS},
        "opt": {"ffn_dim": 2 * width, "word_embed_proj_dim": width},
        "distilbert": {"dim": width, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": 2 * width},
        "electra": {"embedding_size": width},
        "bloom": {"n_layer": LAYERS, "n_head": HEADS},
        "vit": {"image_size": 16, "patch_size": 4},
        "t5": {"d_model": width, "d_kv": width // HEADS, "d_ff": 2 * width, "num_layers": LAYERS,
               "num_heads": HEADS, "decoder_start_token_id": 0},
    }  # fmt: skip
    if kind == "gpt2":  # which looks for it in the values of its inputs
        del common["pad_token_id"]
    dropped = {"head_dim"} if kind in ("gpt2", "opt", "bloom", "falcon", "t5") else set()
    fields = {k: v for k, v in (common | special.get(kind, {})).items() if k not in dropped}
    config = transformers.AutoConfig.for_model(kind, **fields)
    return getattr(transformers, KINDS[kind])(config).eval()


def inputs_of(kind: str) -> dict[str, Tensor]:
    if kind == "vit":
        return {"pixel_values": torch.zeros(1, 3, 16, 16)}
    tokens = torch.ones(1, TOKENS, dtype=torch.long)
    return {"input_ids": tokens} | ({"decoder_input_ids": tokens[:, :8]} if kind == "t5" else {})


def independent(model: nn.Module, kind: str, width: int, call: dict[str, Tensor]) -> int:
    """The same count by the shapes of a real call: linear maps and patches that ran, and the two
    products of each attention, over all positions."""
    from transformers.pytorch_utils import Conv1D

    total = 0

    def ran(module: nn.Module, _: Any, out: Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Conv2d):
            total += 2 * out.numel() * module.weight[0].numel()
            return
        weight = module.weight
        assert isinstance(weight, Tensor)
        total += 2 * out.numel() * (weight.numel() // out.shape[-1])

    hooks = [m.register_forward_hook(ran) for m in model.modules()
             if isinstance(m, nn.Linear | nn.Conv2d | Conv1D)]  # fmt: skip
    with torch.no_grad():
        model(**call)
    for hook in hooks:
        hook.remove()
    length = 1 + (16 // 4) ** 2 if kind == "vit" else TOKENS
    pairs = [(length, length)] * LAYERS
    if kind == "t5":  # of the encoder, of the decoder, of the decoder with the encoder
        pairs += [(8, 8)] * LAYERS + [(8, TOKENS)] * LAYERS
    return total + sum(4 * queries * keys * width for queries, keys in pairs)


@pytest.mark.parametrize(
    ("kind", "width"), thinned([(k, w) for w in WIDTHS for k in KINDS], len(KINDS) // 4)
)
def test_models_of_hugging_face_count_as_their_parts_do(kind: str, width: int) -> None:
    model, call = configured(kind, width), inputs_of(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert forward_flops(model, **call) == independent(model, kind, width, call)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize(
    "design",
    ["dense", "monarch", "btt:rho=1/4", "btt:cores=3,rho=1/8", "btt-moe:experts=4,active=2",
     "btt-moe:experts=4,active=3,shared=1", "ffn-moe:experts=8,active=4,shared=1,granularity=4",
     "convolution:kernel=1/2", "blast", "block-sparse:blocks=1/2", "lost", "pixelfly:rank=1/4",
     "cola-mlp", "activated(monarch;relu)"],
)  # fmt: skip
@pytest.mark.parametrize("recipe", ["gpt-chars-1", "mlp-regression-1"])
def test_built_in_models_count_as_their_budgets_do(design: str, recipe: str) -> None:
    used, asked = RECIPES[recipe], parse_design(design)
    model = build_model(used, asked, 64)
    shape = (2, used.tokens) if used.is_token_model else (2, used.features)
    samples = torch.zeros(shape, dtype=torch.long if used.is_token_model else torch.float32)
    assert forward_flops(model, samples) == 2 * cost.forward_flops_per_sample(used, asked, 64)
    assert model(samples).shape[-1] == used.outputs  # it computes again


def test_a_block_of_experts_counts_what_a_token_uses() -> None:
    block = MixtureFFN.of("ffn-moe:experts=8,active=4,shared=1,granularity=4", 32, 128)
    macs = block.mlp_in.structure.macs + block.mlp_out.structure.macs
    assert forward_flops(block, torch.zeros(3, 5, 32)) == 2 * 15 * macs


def test_replaced_layers_change_the_count_by_what_surgery_says() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
    before = forward_flops(model, torch.zeros(1, 64))
    surgery = replace_linears(model, "monarch")
    after = forward_flops(model, torch.zeros(1, 64))
    assert before - after == surgery.flops_before - surgery.flops_after > 0


def of(act: Callable[[Tensor], Tensor]) -> nn.Module:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return act(x)

    return Model()


@pytest.mark.parametrize(
    ("act", "named"),
    [
        (torch.fft.fft, "aten._fft"),
        (lambda x: torch.linalg.solve(x @ x.mT, x), "solve"),
        (torch.linalg.qr, "qr"),
        (lambda x: x if x.sum() > 0 else -x, "shapes of its inputs alone"),
        (lambda x: x @ x[:3], "shapes"),
    ],
)
def test_what_cannot_be_counted_is_refused_by_its_name(
    act: Callable[[Tensor], Tensor], named: str
) -> None:
    with pytest.raises(InvalidInput, match="got Model") as refused:
        forward_flops(of(act), torch.zeros(4, 4))
    assert named in str(refused.value)


def test_a_model_is_as_it_was_after_a_refusal() -> None:
    layer = EinsumLinear("monarch", 16, 16)
    model = nn.Sequential(layer, of(lambda x: x if x.sum() > 0 else -x))
    with pytest.raises(InvalidInput):
        forward_flops(model, torch.zeros(2, 16))
    x = torch.randn(2, 16)
    torch.testing.assert_close(model(x).abs(), layer(x).abs())
    assert "forward" not in layer.__dict__
