"""Tasks from configurations of Hugging Face transformers.

A model is scaled by its configuration's own fields: those that grow with the width (hidden and
feed-forward sizes, heads, key-value heads) keep their proportions to it, so a head keeps its size.
The search chooses the linear layers whose both sides grow; embeddings, heads tied to them or not,
classifiers and routers stay dense.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from nas.designs.design import AT_HEADS
from nas.errors import InvalidInput
from nas.layers import replace_linears
from nas.layers.building import layer_of
from nas.layers.surgery import is_conv1d
from nas.planning.recipe import IMAGES, TEXT, TEXT_BPE, Recipe
from nas.tasks import load_data
from nas.tasks.batches import VALIDATION_SEED, Pair
from nas.tasks.data import Arrays
from nas.tasks.task import LinearFactory, Splits, Task

#: Fields of configurations that are proportional to the width of the model.
GROWING = (
    "hidden_size", "n_embd", "d_model", "dim", "embedding_size", "word_embed_proj_dim",
    "intermediate_size", "n_inner", "d_ff", "ffn_dim", "hidden_dim", "encoder_ffn_dim",
    "decoder_ffn_dim", "moe_intermediate_size", "shared_expert_intermediate_size",
    "num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads",
    "decoder_attention_heads", "num_key_value_heads",
)  # fmt: skip
#: Last names of projections that make heads, and that read them.
_MAKES_HEADS = (
    "q_proj", "k_proj", "v_proj", "query", "key", "value", "q", "k", "v", "q_lin", "k_lin", "v_lin",
)  # fmt: skip
_READS_HEADS = ("o_proj", "out_proj", "out_lin", "o", "attention.output.dense")
#: Share of tokens that masked language models predict.
_MASKED = 0.15
_IGNORED = -100


def scaled(config: Any, width: int) -> Any:
    """A configuration of another width, with the same proportions.

    Raises
    ------
    InvalidInput
        A field that the width does not scale to a whole number.
    """
    found, base = copy.deepcopy(config), config.hidden_size
    for name, value in _growing(config).items():
        if value * width % base:
            accepted = f"a width that scales {name}, {value} at width {base}, to a whole number"
            raise InvalidInput("width", width, accepted)
        setattr(found, name, value * width // base)
    return found


def _growing(config: Any) -> dict[str, int]:
    """The fields of a configuration that grow, under their own names."""
    names = {config.attribute_map.get(name, name) for name in GROWING}
    values = {name: getattr(config, name, None) for name in names if name in config.to_dict()}
    return {n: v for n, v in values.items() if isinstance(v, int) and not isinstance(v, bool) and v}


class _Called(nn.Module):
    """A model of transformers that maps the one tensor of a batch to logits."""

    def __init__(self, model: nn.Module, task: HuggingFaceTask) -> None:
        super().__init__()
        self.model = model
        self._call = task.call

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self._call(self.model, x).logits
        return logits


class HuggingFaceTask(Task):
    """A task whose model is of transformers; use a subclass such as `CausalLM`."""

    #: of the model; its width is the base width
    config: ClassVar[Any]
    #: settings of the recipe, as in `Task.recipes`; `max_width` at least once more than the base
    settings: ClassVar[Mapping[str, Any]] = {}
    #: name of the class in transformers that makes the model
    auto: ClassVar[str]
    loss_unit = "nats per token"
    #: settings where `settings` has no others
    _defaults: ClassVar[Mapping[str, Any]] = {
        "lr": 3e-3, "batch": 8, "beta2": 0.95, "min_steps": 60, "max_steps": 4000,
        "warmup_steps": 20, "validation_samples": 256,
    }  # fmt: skip

    @property
    def recipes(self) -> Mapping[str, Mapping[str, Any]]:  # type: ignore[override]
        """One recipe, of the task's name."""
        base = self.config.hidden_size
        step = math.lcm(*(base // math.gcd(base, v) for v in _growing(self.config).values()))
        sizes = {"head_dim": step, "min_width": step, "max_width": 2 * base, "base_width": base}
        depth = {"depth": self.config.num_hidden_layers, "positions": self.positions}
        return {self.name: {**self._defaults, **sizes, **depth, **self.settings}}

    @property
    def positions(self) -> int:
        """Positions of one sample."""
        raise NotImplementedError

    def call(self, model: nn.Module, x: Tensor) -> Any:
        """What the model gives for the inputs of a batch; it has logits."""
        return model(input_ids=x, use_cache=False)

    def model(self, recipe: Recipe, width: int, linear: LinearFactory) -> nn.Module:
        return _Called(self._with_layers(width, linear), self)

    def build(self, design: str, width: int) -> nn.Module:
        """The model of transformers in a structure, such as ``best.design`` at ``best.width``.

        It trains with their `Trainer`; `nas.layers.param_groups` gives learning rates, and
        `nas.layers.load` reads what ``save_pretrained`` writes into the dense model.
        """
        aligned = design.endswith(AT_HEADS)

        def linear(d_in: int, d_out: int, **options: Any) -> nn.Module:
            heads = {"heads", "side"} if not aligned else set()
            given = {name: value for name, value in options.items() if name not in heads}
            return layer_of(design, d_in, d_out, **given)

        return self._with_layers(width, linear)

    def _with_layers(self, width: int, linear: LinearFactory) -> nn.Module:
        model = self._dense(width)
        for name, heads in self._chosen.items():
            parent, _, last = name.rpartition(".")
            layer = model.get_submodule(name)
            d_in, d_out = _sides(layer)
            options: dict[str, Any] = {"bias": layer.bias is not None}
            if heads is not None:
                side = d_out if heads == "out" else d_in
                options |= {"heads": side // self._head_dim(width), "side": heads}
            model.get_submodule(parent)._modules[last] = linear(d_in, d_out, **options)
        return model

    def _dense(self, width: int) -> nn.Module:
        import transformers

        config = scaled(self.config, width)
        if hasattr(config, "num_local_experts") or hasattr(config, "num_experts"):
            # by products whose shapes say how many there are; grouped ones say it by values
            config._experts_implementation = "batched_mm"
        return cast(nn.Module, getattr(transformers, self.auto).from_config(config))

    def _head_dim(self, width: int) -> int:
        config = scaled(self.config, width)
        fixed = getattr(config, "head_dim", None) or getattr(config, "d_kv", None)
        return int(fixed or width // config.num_attention_heads)

    @cached_property
    def _chosen(self) -> dict[str, str | None]:
        """Names of the layers that the search chooses, and on which side heads lie."""
        base = self.config.hidden_size
        step = self.recipes[self.name]["head_dim"]
        with torch.random.fork_rng(devices=[]):
            narrow, wide = self._dense(base), self._dense(base + step)
            at = {name: _sides(m) for name, m in wide.named_modules() if _is_linear(m)}

            def grows(name: str, module: nn.Module) -> bool:
                before, after = _sides(module), at[name]
                return before[0] < after[0] and before[1] < after[1]

            names = [n for n, m in narrow.named_modules() if _is_linear(m) and grows(n, m)]
            # of these, those that nothing else depends on
            done = replace_linears(narrow, "dense", select=names) if names else None
        found = [layer.names[0] for layer in (done.replaced if done else ())]
        return {name: _heads_of(name) for name in found}


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module)


def _sides(layer: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a linear layer."""
    weight = cast(Tensor, layer.weight)
    return (int(weight.shape[0]), int(weight.shape[1])) if is_conv1d(layer) else (
        int(weight.shape[1]), int(weight.shape[0]),
    )  # fmt: skip


def _heads_of(name: str) -> str | None:
    last = name.rpartition(".")[2]
    if last in _MAKES_HEADS:
        return "out"
    return "in" if last in _READS_HEADS or name.endswith("attention.output.dense") else None


class _OfText(HuggingFaceTask):
    """What the tasks of text share: windows of `context` tokens."""

    #: tokens of a sample
    context: ClassVar[int] = 64

    @property
    def positions(self) -> int:
        return self.context

    def load(self, recipe: Recipe, data: str | None) -> Splits:
        """A text file or folder, ``hf:NAME``, or the standard library's source.

        With a vocabulary of 96 the tokens are characters, else byte pairs that are learnt from it.
        """
        vocabulary = self.config.vocab_size - self._special
        context = self.context
        if vocabulary == TEXT.vocabulary:
            of_text = replace(TEXT, context=context)
        else:
            of_text = replace(TEXT_BPE, vocabulary=vocabulary, context=context)
        found = load_data(of_text, data)
        return _tokens(found.train), _tokens(found.validation)

    #: tokens of the model's that no text has
    _special: ClassVar[int] = 0

    def samples(self, recipe: Recipe, split: Mapping[str, Tensor]) -> int:
        return len(split["tokens"]) - self.context

    def example(self, recipe: Recipe, count: int) -> Tensor:
        return torch.zeros(count, self.context, dtype=torch.long)

    def validation(self, recipe: Recipe, train: Arrays, validation: Arrays) -> Pair:
        """Windows that do not overlap, so that each counts once."""
        split = {"tokens": torch.from_numpy(validation["tokens"])}
        windows = self.samples(recipe, split) // (self.context + 1)
        order = torch.randperm(windows, generator=torch.Generator().manual_seed(VALIDATION_SEED))
        chosen = order[: recipe.validation_samples] * (self.context + 1)
        return self.batch(recipe, split, chosen, None)

    def _windows(self, split: Mapping[str, Tensor], starts: Tensor, length: int) -> Tensor:
        tokens = split["tokens"]
        ahead = torch.arange(length, device=tokens.device)
        return tokens[starts[:, None] + ahead].long()

    def loss(self, recipe: Recipe, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean over the tokens of a sample that are predicted."""
        each = functional.cross_entropy(
            outputs.float().flatten(0, 1), targets.flatten(), ignore_index=_IGNORED,
            reduction="none",
        ).view(targets.shape)  # fmt: skip
        return each.sum(1) / (targets != _IGNORED).sum(1).clamp(min=1)


def _tokens(split: Arrays) -> Arrays:
    return {"tokens": split["tokens"].astype(np.int32)}


class CausalLM(_OfText):
    """Next token, by any causal language model: Llama, GPT-2, Qwen, Mistral …"""

    auto = "AutoModelForCausalLM"

    def batch(
        self, recipe: Recipe, split: Mapping[str, Tensor], chosen: Tensor,
        generator: torch.Generator | None,
    ) -> Pair:  # fmt: skip
        windows = self._windows(split, chosen, self.context + 1)
        return windows[:, :-1], windows[:, 1:]


class MaskedLM(_OfText):
    """Hidden tokens, by any masked language model such as BERT; the last id of its vocabulary is
    the mask."""

    auto = "AutoModelForMaskedLM"
    _special = 1

    def call(self, model: nn.Module, x: Tensor) -> Any:
        return model(input_ids=x)

    def batch(
        self, recipe: Recipe, split: Mapping[str, Tensor], chosen: Tensor,
        generator: torch.Generator | None,
    ) -> Pair:  # fmt: skip
        windows = self._windows(split, chosen, self.context)
        draw = generator or torch.Generator().manual_seed(VALIDATION_SEED)
        order = torch.rand(windows.shape, generator=draw).argsort(dim=1).to(windows.device)
        hidden = order < max(1, round(_MASKED * self.context))
        inputs = windows.masked_fill(hidden, self.config.vocab_size - 1)
        return inputs, windows.masked_fill(~hidden, _IGNORED)


class Seq2SeqLM(_OfText):
    """The second half of a window from its first, by an encoder and a decoder such as T5; the last
    id of its vocabulary begins what is decoded."""

    auto = "AutoModelForSeq2SeqLM"
    _special = 1

    @property
    def _half(self) -> int:
        return self.context // 2

    def call(self, model: nn.Module, x: Tensor) -> Any:
        read, decoded = x[:, : self._half], x[:, self._half :]
        return model(input_ids=read, decoder_input_ids=decoded, use_cache=False)

    def batch(
        self, recipe: Recipe, split: Mapping[str, Tensor], chosen: Tensor,
        generator: torch.Generator | None,
    ) -> Pair:  # fmt: skip
        windows = self._windows(split, chosen, self.context)
        targets = windows[:, self._half :]
        begin = torch.full_like(targets[:, :1], self.config.vocab_size - 1)
        return torch.cat([windows[:, : self._half], begin, targets[:, :-1]], dim=1), targets


class ImageClassifier(HuggingFaceTask):
    """Class of an image, by a model such as ViT; by default of the handwritten digits."""

    auto = "AutoModelForImageClassification"
    loss_unit = "nats per image"

    @property
    def positions(self) -> int:
        return int((self.config.image_size // self.config.patch_size) ** 2 + 1)

    def call(self, model: nn.Module, x: Tensor) -> Any:
        return model(pixel_values=x)

    def load(self, recipe: Recipe, data: str | None) -> Splits:
        """As the data of the task `images`, of the size that the configuration says."""
        size, channels = self.config.image_size, self.config.num_channels
        found = load_data(replace(IMAGES, side=size, channels=channels), data)
        classes = int(found.train["labels"].max()) + 1
        if classes > self.config.num_labels:
            accepted = f"at most {self.config.num_labels} classes, num_labels of the configuration"
            raise InvalidInput("data", f"{classes} classes", accepted)
        mean, std = found.train["images"].mean(), found.train["images"].std()
        return tuple(  # type: ignore[return-value]
            {
                "inputs": ((s["images"] - mean) / std).astype(np.float32).transpose(0, 3, 1, 2),
                "targets": s["labels"],
            }
            for s in (found.train, found.validation)
        )

    def example(self, recipe: Recipe, count: int) -> Tensor:
        size = self.config.image_size
        return torch.zeros(count, self.config.num_channels, size, size)

    def loss(self, recipe: Recipe, outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(outputs.float(), targets, reduction="none")
