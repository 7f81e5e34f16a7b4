"""Layers of families whose designs have a class, and most of which are run in one way."""

from __future__ import annotations

from typing import Any, ClassVar, Generic, TypeVar, cast

import torch

from nas.designs.design import Design
from nas.designs.structure import LinearStructure
from nas.errors import InvalidInput
from nas.layers.base import StructuredLinear

_Design = TypeVar("_Design", bound=Design)
_Structure = TypeVar("_Structure", bound=LinearStructure)


class DesignLinear(StructuredLinear, Generic[_Design, _Structure]):
    """A layer of a design, of its text, or of its structure at the dimensions of the layer.

    A family's class names its own design, structure and plan; `nas.layers.EinsumLinear` describes
    the arguments.
    """

    #: what the family is called in messages
    family: ClassVar[str]
    design_class: ClassVar[type[Design]]
    structure_class: ClassVar[type[Any]]
    #: the only way it is run; families with several know `_checked_plan` and `_chosen_plan`
    only_plan: ClassVar[str]

    def __init__(
        self,
        design: _Design | str | _Structure,
        d_in: int,
        d_out: int,
        bias: bool = True,
        *,
        zero_init: bool = False,
        normalize: bool = False,
        gain: bool = False,
        d_in_base: int | None = None,
        plan: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            self._structure_of(design, d_in, d_out), d_in, d_out, bias,
            zero_init, normalize, gain, d_in_base, plan, device, dtype,
        )  # fmt: skip

    @staticmethod
    def parse(text: str) -> Any:
        """The design that a text names."""
        raise NotImplementedError

    def _structure_of(
        self, design: _Design | str | _Structure, d_in: int, d_out: int
    ) -> _Structure:
        """The structure of the layer, before it has tensors."""
        if isinstance(design, self.structure_class):
            return cast("_Structure", design)
        found = self.parse(design) if isinstance(design, str) else design
        if not isinstance(found, self.design_class):
            names = self.design_class.__name__, self.structure_class.__name__
            raise InvalidInput(self.family, found, "{}, its text, or {}".format(*map(_a, names)))
        sized: _Structure = self.structure_class.of(found, d_in, d_out)
        return sized

    def _checked_plan(self, value: Any) -> Any:
        if value != self.only_plan:
            raise InvalidInput("plan", value, f"None or {self.only_plan}")
        return self.only_plan

    def _chosen_plan(self, tokens: int, device: torch.device, dtype: torch.dtype) -> Any:
        return self.only_plan

    def _design_repr(self) -> str:
        design: str = self.structure.design.described  # type: ignore[attr-defined]
        return design


def _a(noun: str) -> str:
    """A noun with its article."""
    return f"{'an' if noun[0] in 'AEIOU' else 'a'} {noun}"
