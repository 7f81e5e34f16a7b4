"""Tasks from small configurations of Hugging Face."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import transformers

from nas.training.huggingface import (
    CausalLM,
    HuggingFaceTask,
    ImageClassifier,
    MaskedLM,
    Seq2SeqLM,
)

_SMALL: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
_TEXT: dict[str, Any] = _SMALL | {"vocab_size": 96, "max_position_embeddings": 64}
_GROUPED = _TEXT | {"num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}


class _Text:
    context: ClassVar[int] = 32
    settings: ClassVar[Mapping[str, Any]] = {"min_steps": 30, "warmup_steps": 10, "max_width": 96}


class TinyLlama(_Text, CausalLM):
    name = "tiny-llama"
    config = transformers.LlamaConfig(**_GROUPED)


class TinyQwen(_Text, CausalLM):
    name = "tiny-qwen"
    config = transformers.Qwen2Config(**_GROUPED)


class TinyMixtral(_Text, CausalLM):
    name = "tiny-mixtral"
    config = transformers.MixtralConfig(**_GROUPED, num_local_experts=4)


class TinyGPT2(_Text, CausalLM):
    name = "tiny-gpt2"
    config = transformers.GPT2Config(
        vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip


class TinyBert(_Text, MaskedLM):
    name = "tiny-bert"
    config = transformers.BertConfig(**_TEXT | {"vocab_size": 97})


class TinyT5(_Text, Seq2SeqLM):
    name = "tiny-t5"
    config = transformers.T5Config(
        vocab_size=97, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
        decoder_start_token_id=96,
    )  # fmt: skip


class TinyViT(ImageClassifier):
    name = "tiny-vit"
    config = transformers.ViTConfig(
        **_SMALL, image_size=8, patch_size=2, num_channels=1, num_labels=10
    )
    settings: ClassVar[Mapping[str, Any]] = {"batch": 32, "min_steps": 30, "warmup_steps": 10}


TASKS: tuple[type[HuggingFaceTask], ...] = (
    TinyLlama, TinyQwen, TinyMixtral, TinyGPT2, TinyBert, TinyT5, TinyViT,
)  # fmt: skip
