"""What a structured layer is, as bytes beside its tensors in a `state_dict`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from nas.designs.stored import AnyStructure
from nas.designs.structure import Parametrization
from nas.errors import InvalidInput

# where it is used, for layers run without pydantic
if TYPE_CHECKING:
    from pydantic import TypeAdapter


@dataclass(frozen=True)
class LayerRecord:
    """Everything that a layer is built from, but its values, dtype and device."""

    structure: AnyStructure
    bias: bool
    normalize: bool
    gain: bool
    zero_init: bool
    d_in_base: int
    parametrization: Parametrization = "published"
    #: of what a record holds
    version: Literal[1] = 1

    @property
    def computes(self) -> tuple[object, ...]:
        """Equal for layers that compute the same from the same tensors."""
        # weights are capped at standard deviations, which differ
        capped = self.parametrization if self.normalize else None
        return type(self.structure).__name__, self.structure.fingerprint, capped

    @property
    def options(self) -> dict[str, Any]:
        """For `nas.layers.build_layer`, beside the structure."""
        return {
            "bias": self.bias, "normalize": self.normalize, "gain": self.gain,
            "zero_init": self.zero_init, "d_in_base": self.d_in_base,
            "parametrization": self.parametrization,
        }  # fmt: skip

    def __str__(self) -> str:
        normalised = f", normalised, {self.parametrization}" if self.normalize else ""
        return f"a {type(self.structure).__name__} {self.structure.fingerprint}{normalised}"

    def to_tensor(self) -> Tensor:
        """JSON in UTF-8 as uint8 (bytes,): formats of tensors alone can hold it."""
        return torch.frombuffer(bytearray(_adapter().dump_json(self)), dtype=torch.uint8)

    @staticmethod
    def of_tensor(stored: object) -> LayerRecord:
        """The record that `to_tensor` gave, also after a cast, or as a mean of equal ones.

        Raises
        ------
        InvalidInput
            It is not a record, or one of a later version.
        """
        accepted = "a layer's record, as its state_dict has it, of version 1"
        if not isinstance(stored, Tensor) or stored.dim() != 1 or stored.is_meta:
            got = f"{type(stored).__name__} {getattr(stored, 'shape', '')}".strip()
            raise InvalidInput("record", got, accepted)
        values = stored.detach().to("cpu", torch.float32).round()
        text = values.clamp(0, 255).to(torch.uint8).numpy().tobytes()
        try:
            return _adapter().validate_json(text)
        except ValueError as error:  # pydantic's, and those of structures that cannot be
            raise InvalidInput("record", text[:200].decode("utf-8", "replace"), accepted) from error


@lru_cache(maxsize=1)
def _adapter() -> TypeAdapter[LayerRecord]:
    from pydantic import TypeAdapter

    return TypeAdapter(LayerRecord)
