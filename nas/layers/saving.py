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

from torch import Tensor, nn

from nas.errors import InvalidInput
from nas.layers.base import RECORD, StructuredLinear
from nas.layers.guiding import is_guided
from nas.layers.record import LayerRecord
from nas.layers.surgery import rebuild

_Model = TypeVar("_Model", bound=nn.Module)
_ACCEPTED = "a .safetensors file, a folder with model.safetensors or its index, or a state_dict"
_NAMES_LISTED = 6


def save(
    model: nn.Module, path: str | os.PathLike[str], about: Mapping[str, str] | None = None
) -> None:
    """Write weights and structure of a model, for `load`.

    Parameters
    ----------
    path
        A ``.safetensors`` file, whose metadata tells the structure of each layer too; for a model
        of transformers a folder, which ``save_pretrained`` writes.
    about
        More metadata of a file, by names of your own.

    Raises
    ------
    InvalidInput
        A path that is neither; a model in the warm-up of `SelfGuided`.
    OSError
        It cannot be written.
    """
    if guided := [name for name, module in model.named_modules() if is_guided(module)]:
        got = f"one in its warm-up, with dense weights in {_some(guided)}"
        accepted = "one whose guide has ended; torch.save the state_dict of both to resume"
        raise InvalidInput("model", got, accepted)
    if Path(path).suffix == ".safetensors":
        import safetensors.torch  # where it is used, for layers run without

        layers = {
            name: str(module.record)
            for name, module in model.named_modules()
            if isinstance(module, StructuredLinear)
        }
        metadata = {**(about or {}), "format": "pt", "einsum_nas": json.dumps(layers)}
        safetensors.torch.save_model(model, str(path), metadata)
    elif callable(save_pretrained := getattr(model, "save_pretrained", None)):
        # under the model's own names, not those of its class's first release
        save_pretrained(path, save_original_format=False)
    else:
        raise InvalidInput("path", str(path), "a file that ends in .safetensors")


def load(model: _Model, source: str | os.PathLike[str] | Mapping[str, Tensor]) -> _Model:
    """Make a dense model what was saved: replace its layers as recorded, then load all weights.

    Parameters
    ----------
    model
        The model as it was before its layers were replaced, or after.  Where it lies on the meta
        device it takes the tensors themselves, not copies of them.
    source
        What `save` or ``save_pretrained`` wrote, or a `state_dict`.

    Returns
    -------
    The model, in its mode of training or evaluation as before.

    Raises
    ------
    InvalidInput
        No such file; a record of a layer that the model cannot have; tensors that it lacks or that
        are missing, as where weights of structured layers come without their records; tensors that
        are on the meta device afterwards, such as buffers that no file has.  The model may have
        been changed by then.

    >>> from nas.layers import replace_linears
    >>> model = nn.Sequential(nn.Linear(64, 64))
    >>> replace_linears(model, "monarch").params_after
    1088
    >>> type(load(nn.Sequential(nn.Linear(64, 64)), model.state_dict())[0]).__name__
    'EinsumLinear'
    """
    state = dict(source) if isinstance(source, Mapping) else _read(Path(source))
    shown = "a state_dict" if isinstance(source, Mapping) else str(source)
    rebuild(model, _records(model, state))
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
    tensors = (*model.named_parameters(), *model.named_buffers())
    if left := [name for name, tensor in tensors if tensor.is_meta]:
        accepted = "one on a real device, for these come from no file"
        raise InvalidInput("model", f"one on the meta device, with {_some(left)}", accepted)
    return model


def _records(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, LayerRecord]:
    """The records in a state by the names of their layers; extra state of others is not ours."""
    modules = dict(model.named_modules(remove_duplicate=False))
    found = {}
    for key, stored in state.items():
        name, _, last = key.rpartition(".")
        kind = type(modules.get(name, model))
        has_own = kind.get_extra_state is not nn.Module.get_extra_state
        if last == RECORD and (issubclass(kind, StructuredLinear) or not has_own):
            found[name] = LayerRecord.of_tensor(stored)
    return found


def _read(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, or of those of a folder."""
    import safetensors.torch

    files = [path]
    if path.is_dir():
        index = path / "model.safetensors.index.json"
        files = [path / "model.safetensors"]
        if index.is_file():
            try:
                shards = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
            except (ValueError, KeyError) as error:
                raise InvalidInput(
                    "source", str(path), f"{_ACCEPTED}; {index.name}: {error}"
                ) from None
            files = [path / Path(shard).name for shard in sorted(shards)]
    state: dict[str, Tensor] = {}
    for file in files:
        try:
            state |= safetensors.torch.load_file(file)
        except (OSError, safetensors.SafetensorError) as error:
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
