"""The code of a plug-in in a process of its own: describes its tasks, or loads their data.

`python -m nas.training.plugin describe SOURCE OUT` writes what `nas.planning.tasks` reads;
`... load SOURCE RECIPE DATA OUT` what `nas.tasks.plugged` reads.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nas.errors import InvalidInput, one_line
from nas.layers import forward_flops
from nas.planning.cost import FLOPS_PER_MAC
from nas.planning.recipe import PluginRecipe, Recipe, stored_recipe
from nas.planning.sheets import ModelSheet, SheetLayer, as_values
from nas.planning.tasks import add_card, card_of
from nas.tasks.task import Task
from nas.training.factory import CountedLinear, counted_model
from nas.training.tasks import own_tasks, plugin_tasks

#: Samples of the two batches by which a model is counted; more than one, for batch norms.
_FEW, _MORE = 2, 4
#: Settings of a recipe that the task itself gives.
_GIVEN = ("name", "task", "unit", "version", "heads", "counted")


def described(task: Task) -> dict[str, Any]:
    """What is to be known of a task without its code; `refusal` says why it cannot be used."""
    name = str(getattr(task, "name", type(task).__name__))
    try:
        recipes = [_described_recipe(task, key, given) for key, given in _recipes_of(task).items()]
    except Exception as error:  # of any kind that its code raises
        return {"name": name, "refusal": f"{type(error).__name__}: {one_line(error)}"}
    return {"name": name, "refusal": None, "recipes": recipes}


def _recipes_of(task: Task) -> Mapping[str, Mapping[str, Any]]:
    given = getattr(task, "recipes", None)
    if not isinstance(given, Mapping) or not given:
        raise InvalidInput("recipes", given, "names of recipes with their settings, at least one")
    return given


def _described_recipe(task: Task, name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    if not set(given).isdisjoint(_GIVEN):
        mine = ", ".join(sorted(set(given) & set(_GIVEN)))
        raise InvalidInput("recipes", mine, "settings that the task does not give itself")
    settings = dict(given) | {
        "name": name, "task": task.name, "unit": task.loss_unit, "version": task.version
    }  # fmt: skip
    recipe = PluginRecipe(**settings)
    sheets = counted_sheets(task, recipe)
    heads = any(layer.role.heads for layer in sheets[recipe.widths[0]].layers)
    return {"settings": settings | {"heads": heads}, "sheets": as_values(sheets)}


def counted_sheets(task: Task, recipe: Recipe) -> dict[int, ModelSheet]:
    """What a task's model consists of at every width of a recipe, from the model itself.

    Raises
    ------
    InvalidInput
        A model that cannot be counted or scaled, and why.
    """
    example = task.example(recipe, _MORE)
    if not isinstance(example, Tensor) or len(example) != _MORE:
        raise InvalidInput("inputs", type(example).__name__, f"a tensor of {_MORE} samples")
    _, base = counted_model(task, recipe, recipe.base_width)
    found = {w: counted_sheet(task, recipe, w, base, example) for w in recipe.widths}
    _check_growth(found)
    return found


def counted_sheet(
    task: Task, recipe: Recipe, width: int, base: list[CountedLinear], example: Tensor
) -> ModelSheet:
    """The sheet of one width; `base` are the layers at the base width."""
    model, layers = counted_model(task, recipe, width)
    if len(layers) != len(base) or not layers:
        accepted = (
            f"the same number of layers made by `linear` at every width, at least 1: {len(base)} "
            f"as at width {recipe.base_width}"
        )
        raise InvalidInput("model", f"{len(layers)} at width {width}", accepted)
    macs, positions = _counted(model, layers, example, width)
    found = tuple(
        SheetLayer(replace(layer.role, d_in_base=other.role.d_in), positions[i], layer.has_bias)
        for i, (layer, other) in enumerate(zip(layers, base, strict=True))
    )
    params = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return ModelSheet(found, macs, params)


def _counted(
    model: torch.nn.Module, layers: list[CountedLinear], example: Tensor, width: int
) -> tuple[int, list[int]]:
    """(MACs of a sample outside structured layers, positions of a sample in each of these)."""
    counts = []
    for samples in (_FEW, _MORE):
        for layer in layers:
            layer.positions = 0
        flops = forward_flops(model, example[:samples].to("meta"))
        counts.append([flops // FLOPS_PER_MAC, *(layer.positions for layer in layers)])
    of_each = [more // _MORE for more in counts[1]]
    if [_FEW * n for n in of_each] != counts[0] or [_MORE * n for n in of_each] != counts[1]:
        got = f"{counts[0][0]:,} MACs of {_FEW} samples and {counts[1][0]:,} of {_MORE}"
        accepted = f"a model whose FLOPs grow with the batch in proportion (width {width})"
        raise InvalidInput("model", got, accepted)
    for i, count in enumerate(of_each[1:]):
        if not count:
            role = layers[i].role
            got = (
                f"layer {i + 1}, {role.d_in}→{role.d_out}, which no sample passes at width {width}"
            )
            raise InvalidInput("model", got, "layers that are used")
    return of_each[0], of_each[1:]


def _check_growth(sheets: Mapping[int, ModelSheet]) -> None:
    """Raise `InvalidInput` unless a wider dense model costs more."""
    costs = {
        width: sheet.macs + sum(s.positions * s.role.d_in * s.role.d_out for s in sheet.layers)
        for width, sheet in sheets.items()
    }
    for (narrow, less), (wide, more) in pairwise(costs.items()):
        if more <= less:
            got = f"{less:,} MACs of a sample at width {narrow} and {more:,} at {wide}"
            raise InvalidInput("model", got, "a model that costs more the wider it is")


def use_task(task: Task) -> None:
    """Make a task of this process known to it; one that is installed stays what it is.

    Raises
    ------
    InvalidInput
        It cannot be searched, and why; another task has its name.
    """
    card = card_of("this process", json.loads(json.dumps(described(task))))
    if card.refusal is not None:
        raise InvalidInput("task", card.name, f"a task that can be searched; {card.refusal}")
    add_card(card)
    own_tasks[task.name] = task


def _describe(source: str, out: str) -> None:
    found = [described(task) for task in plugin_tasks(source)]
    Path(out).write_text(json.dumps(found, allow_nan=False))


def _load(source: str, recipe: str, data: str, out: str) -> None:
    """Write the arrays of both splits, or why there are none."""
    used = stored_recipe(json.loads(recipe))
    task = next(t for t in plugin_tasks(source) if t.name == used.task)
    folder = Path(out)
    try:
        splits = task.load(used, json.loads(data))
        for name, arrays in zip(("train", "validation"), splits, strict=True):
            np.savez(folder / f"{name}.npz", **_checked(name, arrays))
    except Exception as error:  # of any kind that its code raises
        said = str(error) if isinstance(error, InvalidInput) else f"{type(error).__name__}: {error}"
        (folder / "refusal").write_text(one_line(said) or type(error).__name__)


def _checked(split: str, arrays: Any) -> dict[str, Any]:
    accepted = "arrays of numbers by their names, with two rows at least"
    if not isinstance(arrays, Mapping) or not arrays:
        raise InvalidInput(split, type(arrays).__name__, accepted)
    found = {}
    for name, given in arrays.items():
        array = np.asarray(given)
        if array.dtype.kind not in "biuf" or array.ndim < 1 or len(array) < 2:
            got = f"{name} of {array.dtype} {array.shape}"
            raise InvalidInput(split, got, accepted)
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise InvalidInput(split, f"{name} with numbers that are not finite", accepted)
        found[str(name)] = np.ascontiguousarray(array)
    return found


def main() -> None:
    command, *arguments = sys.argv[1:]
    torch.set_num_threads(1)
    if command == "describe":
        _describe(*arguments)
    else:
        _load(*arguments)


if __name__ == "__main__":
    main()
