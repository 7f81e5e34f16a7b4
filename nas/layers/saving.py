"""Models with structured layers on disk: weights and structure in one safetensors file.

The `state_dict` of such a model has beside the tensors of each structured layer a record of what it
is (``…._extra_state``, JSON as uint8), so that any writer of tensors takes it along: `save`,
`torch.save`, and ``save_pretrained`` of transformers.  `load` reads it and replaces the linear
layers of the model as recorded.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from nas.errors import InvalidInput
from nas.layers.record import LayerRecord
from nas.layers.structured import RECORD, StructuredLinear
from nas.layers.surgery import rebuild

_Model = TypeVar("_Model", bound=nn.Module)
_ACCEPTED = "a .safetensors file, a folder with model.safetensors or its index, or a state_dict"
_NAMES_LISTED = 6


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write weights and structure of a model, for `load`.

    Parameters
    ----------
    path
        A ``.safetensors`` file, whose metadata tells the structure of each layer too; for a model
        of transformers a folder, which ``save_pretrained`` writes.

    Raises
    ------
    InvalidInput
        A path that is neither.
    OSError
        It cannot be written.
    """
    if Path(path).suffix == ".safetensors":
        layers = {
            name: str(module.record)
            for name, module in model.named_modules()
            if isinstance(module, StructuredLinear)
        }
        metadata = {"format": "pt", "einsum_nas": json.dumps(layers)}
        safetensors.torch.save_model(model, str(path), metadata)
    elif callable(save_pretrained := getattr(model, "save_pretrained", None)):
        save_pretrained(path)
    else:
        raise InvalidInput("path", str(path), "a file that ends in .safetensors")


def load(model: _Model, source: str | os.PathLike[str] | Mapping[str, Tensor]) -> _Model:
    """Make a dense model what was saved: replace its layers as recorded, then load all weights.

    Parameters
    ----------
    model
        The model as it was before its layers were replaced, or after.  On the meta device it takes
        over the tensors as they are.
    source
        What `save` or ``save_pretrained`` wrote, or a `state_dict`.

    Returns
    -------
    The model, in its mode of training or evaluation as before.

    Raises
    ------
    InvalidInput
        No such file; a record of a layer that the model cannot have; tensors that it lacks or that
        are missing, as where weights of structured layers come without their records.

    >>> from nas.layers import replace_linears
    >>> model = nn.Sequential(nn.Linear(64, 64))
    >>> replace_linears(model, "monarch").params_after
    1088
    >>> type(load(nn.Sequential(nn.Linear(64, 64)), model.state_dict())[0]).__name__
    'EinsumLinear'
    """
    state = dict(source) if isinstance(source, Mapping) else _read(Path(source))
    shown = "a state_dict" if isinstance(source, Mapping) else str(source)
    end = f".{RECORD}"
    records = {
        name.removesuffix(end): LayerRecord.of_tensor(stored)
        for name, stored in state.items()
        if name.endswith(end)
    }
    rebuild(model, records)
    meta = any(p.is_meta for p in model.parameters())
    try:
        missing, unexpected = model.load_state_dict(state, strict=False, assign=meta)
    except RuntimeError as error:  # shapes, or a layer that computes something else
        raise InvalidInput("source", shown, f"the weights of this model: {error}") from error
    if meta and callable(tie_weights := getattr(model, "tie_weights", None)):
        tie_weights()
    missing = _not_shared(model, missing)
    if missing or unexpected:
        what = [f"lacks {_some(missing)}"] if missing else []
        what += [f"has {_some(unexpected)}, which the model does not"] if unexpected else []
        raise InvalidInput(
            "source", shown, "weights of this model with the records of its structured layers; "
            f"this {' and '.join(what)}",
        )  # fmt: skip
    return model


def _read(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, or of those of a folder."""
    files = [path]
    if path.is_dir():
        index = path / "model.safetensors.index.json"
        files = [path / "model.safetensors"]
        if index.is_file():
            shards = json.loads(index.read_text("utf-8"))["weight_map"].values()
            files = [path / Path(shard).name for shard in sorted(set(shards))]
    state: dict[str, Tensor] = {}
    for file in files:
        try:
            state |= safetensors.torch.load_file(file)
        except (OSError, SafetensorError) as error:
            why = f"{_ACCEPTED}; {file.name}: {error}"
            raise InvalidInput("source", str(path), why) from error
    return state


def _not_shared(model: nn.Module, missing: list[str]) -> list[str]:
    """The missing ones that are not, under another name, a tensor that was there."""
    state = model.state_dict(keep_vars=True)
    there = {id(t) for name, t in state.items() if name not in missing}
    return [name for name in missing if id(state[name]) not in there]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMES_LISTED} more" if len(names) > _NAMES_LISTED else ""
    return ", ".join(names[:_NAMES_LISTED]) + more
