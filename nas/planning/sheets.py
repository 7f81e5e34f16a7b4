"""What a model consists of at one width, before a tensor exists: enough to count it exactly.

Those of the built-in models follow from formulas (`nas.planning.cost`).  Those of a plug-in's are
counted once from the model itself (`nas.training.plugin`) and known here by their digest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from nas.designs.design import LinearRole
from nas.errors import InvalidInput


@dataclass(frozen=True, slots=True)
class SheetLayer:
    """A structured linear layer of a model, or several that are alike."""

    role: LinearRole
    #: positions of one sample that it maps, over all its calls; each of several
    positions: int
    bias: bool
    #: whether it has a gain for each factor, where a recipe normalises
    gained: bool = True
    count: int = 1


@dataclass(frozen=True, slots=True)
class ModelSheet:
    """A model at one width."""

    #: in the order in which the model makes them
    layers: tuple[SheetLayer, ...]
    #: multiply-accumulates of one sample outside structured layers
    macs: int
    #: trainable parameters outside structured layers
    params: int


Sheets = Mapping[int, ModelSheet]
_KNOWN: dict[str, Sheets] = {}


def as_values(sheets: Sheets) -> dict[str, Any]:
    """As JSON values; `know_sheets` reads them."""
    return {str(width): asdict(sheet) for width, sheet in sheets.items()}


def know_sheets(values: Mapping[str, Any]) -> str:
    """Keep the sheets of all widths for `sheet_at`; return their digest, 64 bits in hex."""
    text = json.dumps(values, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    if digest not in _KNOWN:
        _KNOWN[digest] = {int(width): _sheet(found) for width, found in values.items()}
    return digest


def sheet_at(task: str, digest: str, width: int) -> ModelSheet:
    """What the model of a plug-in consists of.

    Raises
    ------
    InvalidInput
        The task was counted otherwise than it is here, or has no model of this width.
    """
    if digest not in _KNOWN:
        from nas.planning.tasks import task_cards  # which knows the sheets of this module

        task_cards()  # a process that was given a recipe has not looked yet
    sheets = _KNOWN.get(digest)
    if sheets is None:
        accepted = f"the version of task {task} that is installed here; this one is another"
        raise InvalidInput("task", f"{task}, whose model counts as {digest}", accepted)
    if width not in sheets:
        accepted = f"a width of task {task}: from {min(sheets)} to {max(sheets)}"
        raise InvalidInput("width", width, accepted)
    return sheets[width]


def _sheet(values: Mapping[str, Any]) -> ModelSheet:
    layers = tuple(
        SheetLayer(**{**layer, "role": LinearRole(**layer["role"])}) for layer in values["layers"]
    )
    return ModelSheet(layers, values["macs"], values["params"])
