"""Tasks of plug-ins for tests: a good one, and ones that go wrong in a way of their own.

A search names `wrong` and one of the recipes below, each of which stands for a fault.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from nas.planning.recipe import Recipe
from nas.tasks.task import LinearFactory, Splits, Task

SETTINGS: dict[str, Any] = {
    "depth": 1, "lr": 3e-3, "batch": 16, "min_steps": 20, "max_steps": 4000, "warmup_steps": 5,
    "min_width": 16, "max_width": 96, "validation_samples": 64,
}  # fmt: skip


class Net(nn.Module):
    """Numbers (batch, 6) → (batch, 1), with dropout and a batch norm."""

    def __init__(self, recipe: Recipe, width: int, linear: LinearFactory) -> None:
        super().__init__()
        self.embedding = nn.Linear(6, width)
        self.layers = nn.ModuleList(linear(width, width) for _ in range(recipe.depth))
        self.norm = nn.BatchNorm1d(width)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        for layer in self.layers:
            x = x + torch.relu(layer(self.norm(x)))
        y: Tensor = self.head(self.dropout(x))
        return y


class Plain(Task):
    """The product of two of six numbers."""

    name = "plain"
    loss_unit = "squared error"
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "plain-1": SETTINGS,
        "plain-deep": SETTINGS | {"depth": 3},
    }

    def load(self, recipe: Recipe, data: str | None) -> Splits:
        draw = np.random.default_rng(len(data or ""))
        x = draw.standard_normal((600, 6)).astype(np.float32)
        y = x[:, 0] * x[:, 1]
        return {"inputs": x[:500], "targets": y[:500]}, {"inputs": x[500:], "targets": y[500:]}

    def model(self, recipe: Recipe, width: int, linear: LinearFactory) -> nn.Module:
        return Net(recipe, width, linear)

    def loss(self, recipe: Recipe, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.squeeze(-1) - targets) ** 2


class Wrong(Plain):
    """Goes wrong as the name of its recipe says."""

    name = "wrong"
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = dict.fromkeys(
        ("raises", "crashes", "hangs", "unfinished", "changes", "fails-in-training", "nan",
         "dies-in-training", "hangs-in-training", "shapes"),
        SETTINGS | {"max_width": 48},
    )  # fmt: skip

    def load(self, recipe: Recipe, data: str | None) -> Splits:
        match recipe.name if data else None:
            case "raises":
                raise FileNotFoundError("no such bucket <b>here</b>")
            case "crashes":
                os._exit(3)
            case "hangs":
                time.sleep(3600)
            case "unfinished":
                return {"inputs": np.full((8, 6), np.nan, np.float32)}, {}
            case "changes":
                file = Path(str(data))
                file.write_text(file.read_text() + "x")
                return super().load(recipe, file.read_text())
        return super().load(recipe, data)

    def loss(self, recipe: Recipe, outputs: Tensor, targets: Tensor) -> Tensor:
        match recipe.name:
            case "fails-in-training":
                raise ZeroDivisionError("a reason")
            case "dies-in-training":
                os._exit(3)
            case "hangs-in-training":
                time.sleep(3600)
            case "nan":
                return super().loss(recipe, outputs, targets) * float("nan")
            case "shapes":
                return super().loss(recipe, outputs, targets).mean()
        return super().loss(recipe, outputs, targets)
