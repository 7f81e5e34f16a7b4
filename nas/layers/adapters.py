"""LoRA by Hugging Face's PEFT on structured layers (extra ``hf``)."""

from __future__ import annotations

import os
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

from torch import nn

from nas.errors import InvalidInput
from nas.layers.base import StructuredLinear
from nas.layers.mixture import MixtureFFN

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel


def lora_config(model: nn.Module, *, r: int = 8, **options: Any) -> LoraConfig:
    """A `peft.LoraConfig` for a model with structured layers, for `peft.get_peft_model`.

    Each adapted layer computes W x + scale · B A x, with W frozen, A (r, d_in) and B (d_out, r).

    Parameters
    ----------
    model
        Any module, also a `peft.PeftModel` that is to get another adapter.
    r
        Rank of the adapters.
    options
        Fields of `LoraConfig`.  Default of ``target_modules``: every structured layer, but those
        inside a `MixtureFFN`, which computes with their factors and never calls them.  Your own
        may name dense layers too, which PEFT adapts as always.

    Raises
    ------
    InvalidInput
        A model without structured layers, where no ``target_modules`` are given;
        ``"all-linear"``, by which PEFT means dense layers; a layer that the model holds at several
        places, of which PEFT would adapt one, or that a `MixtureFFN` holds; DoRA and other
        variants of LoRA; an ``init_lora_weights`` other than True, False and "gaussian".

    >>> from peft import get_peft_model
    >>> from nas.layers import layer_of
    >>> model = nn.Sequential(layer_of("monarch", 64, 64), nn.GELU(), layer_of("monarch", 64, 64))
    >>> get_peft_model(model, lora_config(model, r=4)).print_trainable_parameters()
    trainable params: 1,024 || all params: 3,200 || trainable%: 32.0000
    """
    from peft import LoraConfig

    if options.get("target_modules") is None:
        inside = _inside_blocks(model)
        names = [name for name, layer in _layers(model) if layer not in inside]
        if not names:
            raise InvalidInput(
                "model", f"a {type(model).__name__} without structured layers of its own",
                "a model after replace_linears, or target_modules",
            )  # fmt: skip
        # not a list, whose names are endings too: "0" would be "2.0" as well
        options["target_modules"] = "|".join(re.escape(name) for name in dict.fromkeys(names))
    return _prepared(model, LoraConfig(r=r, **options))


def load_lora(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    adapter_name: str = "default",
    is_trainable: bool = False,
) -> PeftModel:
    """Put an adapter that ``save_pretrained`` of PEFT wrote on a model with structured layers.

    It takes the place of `peft.PeftModel.from_pretrained`, which does not know these layers.

    Parameters
    ----------
    model
        The model that was adapted, with its weights (`nas.layers.load`); or a `peft.PeftModel` of
        it, which gets another adapter.
    folder
        What was written.
    adapter_name
        Name of the adapter in the model.
    is_trainable
        Whether to train it further.

    Raises
    ------
    InvalidInput
        An adapter that is not LoRA; what `lora_config` refuses.
    ValueError
        From PEFT: no adapter there, or a name that is taken.
    """
    from peft import LoraConfig, PeftConfig, PeftModel

    config = PeftConfig.from_pretrained(str(folder))
    if type(config) is not LoraConfig:
        raise InvalidInput("folder", f"{folder}, a {type(config).__name__}", "an adapter of LoRA")
    _prepared(model, config)
    where = {"adapter_name": adapter_name, "is_trainable": is_trainable}
    if not isinstance(model, PeftModel):
        return PeftModel.from_pretrained(model, str(folder), config=config, **where)
    if adapter_name in model.peft_config:
        accepted = f"a name other than {', '.join(model.peft_config)}"
        raise InvalidInput("adapter_name", adapter_name, accepted)
    config.inference_mode = not is_trainable
    model.add_adapter(adapter_name, config)
    model.load_adapter(str(folder), **where)
    return model


def _prepared(model: nn.Module, config: LoraConfig) -> LoraConfig:
    """The config, checked, under which PEFT knows structured layers; it never saves that."""
    from peft.tuners.tuners_utils import check_target_module_exists

    from nas.layers.lora import LoraStructuredLinear, check_config

    check_config(config)
    targets = config.target_modules
    if isinstance(targets, str) and targets.lower() == "all-linear":
        accepted = "names of layers, or None for every structured layer; PEFT's all are dense ones"
        raise InvalidInput("target_modules", targets, accepted)
    places = Counter(child for parent in model.modules() for child in parent._modules.values())
    inside = _inside_blocks(model)
    for name, layer in _layers(model):
        if not check_target_module_exists(config, name):
            continue
        if layer in inside:
            accepted = "layers outside of a MixtureFFN, which does not call its layers"
            raise InvalidInput("target_modules", name, accepted)
        if places[layer] > 1:
            accepted = "layers held at one place; exclude_modules leaves others as they are"
            got = f"{name}, a layer that the model holds at {places[layer]} places"
            raise InvalidInput("target_modules", got, accepted)
    config._register_custom_module({StructuredLinear: LoraStructuredLinear})
    return config


def _layers(model: nn.Module) -> list[tuple[str, StructuredLinear]]:
    """Structured layers under all names by which PEFT finds them, with adapters or without."""
    from peft import PeftModel

    base = model.get_base_model() if isinstance(model, PeftModel) else model
    named = base.named_modules(remove_duplicate=False)
    return [
        (name.removesuffix(".base_layer"), module)
        for name, module in named
        if isinstance(module, StructuredLinear)
    ]


def _inside_blocks(model: nn.Module) -> set[nn.Module]:
    """Layers of blocks that compute with their factors and never call them."""
    blocks = [module for module in model.modules() if isinstance(module, MixtureFFN)]
    return {layer for block in blocks for layer in (block.mlp_in, block.mlp_out)}
