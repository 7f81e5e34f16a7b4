"""The code of every task, built-in or of a plug-in, and the models that it makes."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from functools import lru_cache
from inspect import isabstract
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from nas.designs.design import Design
from nas.errors import InvalidInput
from nas.layers import param_groups
from nas.planning.recipe import LOSS_UNITS, RECIPES, PluginRecipe, Recipe
from nas.planning.tasks import task_card
from nas.tasks import load_data
from nas.tasks.batches import Draw, Pair, sample_losses, training_batches, validation_set
from nas.tasks.data import Arrays
from nas.tasks.task import LinearFactory, Splits, Task
from nas.training.factory import StructuredFactory, counted_model
from nas.training.models import FAMILIES


class BuiltIn(Task):
    """One of `nas.planning.recipe.LOSS_UNITS`."""

    def __init__(self, name: str) -> None:
        self.name, self.loss_unit = name, LOSS_UNITS[name]  # type: ignore[misc]
        self.recipes = {  # type: ignore[misc]
            r.name: r.as_dict() for r in RECIPES.values() if r.task == name
        }

    def load(self, recipe: Recipe, data: str | None) -> Splits:
        found = load_data(recipe, data)
        return found.train, found.validation

    def model(self, recipe: Recipe, width: int, linear: LinearFactory) -> nn.Module:
        return FAMILIES[recipe.model](recipe, width, linear)

    def loss(self, recipe: Recipe, outputs: Tensor, targets: Tensor) -> Tensor:
        return sample_losses(recipe, outputs, targets)

    def example(self, recipe: Recipe, count: int) -> Tensor:
        if recipe.is_token_model:
            return torch.zeros(count, recipe.tokens, dtype=torch.long)
        return torch.zeros(count, *((recipe.tokens,) if recipe.attends else ()), recipe.features)

    def batches(self, recipe: Recipe, train: Arrays, device: torch.device | None) -> Draw:
        return training_batches(recipe, train, device)

    def validation(self, recipe: Recipe, train: Arrays, validation: Arrays) -> Pair:
        return validation_set(recipe, train, validation)


#: Tasks that this process itself has, and no installed package.
own_tasks: dict[str, Task] = {}
_BUILT_IN: Mapping[str, Task] = {name: BuiltIn(name) for name in LOSS_UNITS}


def task_of(recipe: Recipe) -> Task:
    """The code of a recipe's task.

    Raises
    ------
    InvalidInput
        A plug-in that is not installed here, or cannot be used.
    """
    if not isinstance(recipe, PluginRecipe):
        return _BUILT_IN[recipe.task]
    if recipe.task in own_tasks:
        return own_tasks[recipe.task]
    source = task_card(recipe.task).source
    assert source is not None
    return _by_name(source)[recipe.task]


@lru_cache
def _by_name(source: str) -> dict[str, Task]:
    return {task.name: task for task in plugin_tasks(source)}


def plugin_tasks(source: str) -> list[Task]:
    """The tasks of ``module:Class``, or all that a file has.

    Raises
    ------
    InvalidInput
        Anything else is there.
    """
    if source.endswith(".py"):
        module = _module_of(source)
        found = [
            kind for kind in vars(module).values()
            if isinstance(kind, type) and issubclass(kind, Task) and not isabstract(kind)
            and kind.__module__ == module.__name__
        ]  # fmt: skip
    else:
        name, _, attribute = source.partition(":")
        found = [getattr(importlib.import_module(name), attribute, None)]  # type: ignore[list-item]
    accepted = "a class derived from nas.tasks.Task that has load, model and loss"
    if not found:
        raise InvalidInput("task module", source, accepted)
    for kind in found:
        if not (isinstance(kind, type) and issubclass(kind, Task)) or isabstract(kind):
            raise InvalidInput("task module", f"{source}: {kind!r}", accepted)
    return [kind() for kind in found]


def _module_of(file: str) -> ModuleType:
    name = f"einsum_nas_task_{Path(file).stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # as an import does, for what looks its own module up
        sys.path.append(str(Path(file).parent))  # its neighbours, behind what is installed
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def build_model(recipe: Recipe, design: Design, width: int) -> nn.Module:
    """A freshly initialised model of a recipe's task whose layers have the structures of a design.

    Raises
    ------
    InvalidInput
        A plug-in's model has other layers than those by which its budget was counted.
    """
    linear = StructuredFactory(recipe, design, width)
    model = task_of(recipe).model(recipe, width, linear)
    linear.check_complete()
    return model


def learning_rates(model: nn.Module, recipe: Recipe, width: int) -> list[dict[str, Any]]:
    """Parameter groups with structure-aware learning rates.

    Dense layers and convolutions that are not structured, such as a head, have lr · (their inputs
    in the base model) / (their inputs); see `nas.layers.param_groups`.
    """
    base = _inputs_at_base_width(recipe)
    extra: dict[Tensor, float] = {}
    for name, fan_in in _inputs(model).items():
        growth = base.get(name, fan_in) / fan_in
        if growth != 1:
            extra[model.get_parameter(f"{name}.weight")] = growth
    return param_groups(model, recipe.lr, extra=extra)


@lru_cache(maxsize=64)
def _inputs_at_base_width(recipe: Recipe) -> dict[str, int]:
    model, _ = counted_model(task_of(recipe), recipe, recipe.base_width)
    return _inputs(model)


def _inputs(model: nn.Module) -> dict[str, int]:
    """Inputs of every output of dense layers and convolutions, by their names."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            found[name] = module.in_features
        elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            found[name] = module.in_channels // module.groups * torch.Size(
                module.kernel_size
            ).numel()  # fmt: skip
    return found
