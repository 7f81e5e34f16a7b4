"""The LoRA layer over a structured layer, on PEFT's own; imports peft, which layers do not need."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from nas.errors import InvalidInput
from nas.layers.base import StructuredLinear

#: Ways to begin that look at no weight matrix.
_STARTS = (True, False, "gaussian")


def check_config(config: LoraConfig) -> None:
    """Raise `InvalidInput` for what no structured layer can do, having no weight matrix."""
    for field in fields(config):
        value = getattr(config, field.name)
        if field.metadata.get("is_lora_variant") and value:
            accepted = f"{field.default}: structured layers take plain LoRA, none of its variants"
            raise InvalidInput(field.name, value, accepted)
    if config.init_lora_weights not in _STARTS:
        accepted = "True, False or 'gaussian', for a structured layer has no weight matrix"
        raise InvalidInput("init_lora_weights", config.init_lora_weights, accepted)


class LoraStructuredLinear(Linear):  # type: ignore[misc]  # of peft, which is not typed
    """y = W x + bias + Σ scale · B A x over the active adapters; W structured and frozen.

    Shapes (..., d_in) → (..., d_out), A (r, d_in), B (d_out, r).  What PEFT calls ``Linear`` in its
    name is its layer over a linear map; all but what needs the matrix of that map is its own.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, **options: Any) -> None:
        if (parameter := options.get("parameter_name")) is not None:
            accepted = "parameters outside of structured layers; name these in target_modules"
            got = f"{parameter} of {options.get('target_name')}"
            raise InvalidInput("target_parameters", got, accepted)
        super().__init__(base_layer, adapter_name, **options)
        self.fan_in_fan_out = False  # B A is (d_out, d_in), whatever stood here before

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **options: Any
    ) -> None:
        check_config(config)
        super().update_layer(adapter_name, r, lora_alpha, config, **options)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raises InvalidInput if one of these adapters is here: W + scale · B A is in general not
        of W's structure.  PEFT has by then merged the dense layers that come before this one.
        """
        names = check_adapters_to_merge(self, adapter_names)
        if here := [name for name in names if name in self.lora_A]:
            accepted = (
                "adapters of dense layers alone; the sum of a structured and a low-rank matrix has "
                "not the structure, so keep the adapter beside the layer"
            )
            raise InvalidInput("merge", ", ".join(here), accepted)

    def _get_in_out_features(self, module: StructuredLinear) -> tuple[int, int]:
        return module.in_features, module.out_features  # PEFT warns of kinds it does not know

    def _get_base_layer_device_and_dtype(
        self, base_layer: StructuredLinear
    ) -> tuple[torch.device, torch.dtype]:
        factor = base_layer._any_factor()  # PEFT looks at a weight
        return factor.device, factor.dtype
