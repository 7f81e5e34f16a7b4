"""Training batches and the validation set of every task, as tensors."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from nas.planning.recipe import (
    ClassesRecipe,
    PixelsRecipe,
    Recipe,
    RegressionRecipe,
    TextRecipe,
    VitRecipe,
)
from nas.tasks.data import Arrays

Pair = tuple[Tensor, Tensor]
#: generator → inputs and targets of one step
Draw = Callable[[torch.Generator], Pair]
#: which samples, and what augments them → their inputs and targets
Samples = Callable[[Tensor, torch.Generator | None], Pair]

_IMAGES_AT_ONCE = 1024
VALIDATION_SEED = 20241002  # the same validation samples for every run of a task


def training_batches(recipe: Recipe, train: Arrays, device: torch.device | None = None) -> Draw:
    """What draws the batches of a run: `recipe.batch` samples, with replacement.

    The data are moved to `device`, where the batches then lie; without one they stay where they
    are, which may be a file.  Which samples a batch has, and what augments them, is drawn on the
    CPU, and so the same everywhere.
    """
    if isinstance(recipe, RegressionRecipe) and "inputs" not in train:
        return _fresh(recipe, train, device)
    count, samples = _samples(recipe, train, train, device)

    def draw(generator: torch.Generator) -> Pair:
        chosen = torch.randint(count, (recipe.batch,), generator=generator)
        return samples(chosen, generator)

    return draw


def validation_set(recipe: Recipe, train: Arrays, validation: Arrays) -> Pair:
    """Inputs and targets of the fixed validation samples, at most `recipe.validation_samples`.

    Windows of a text are distinct and do not overlap, so that each counts once.
    """
    generator = torch.Generator().manual_seed(VALIDATION_SEED)
    count, samples = _samples(recipe, validation, train)
    step = recipe.context + 1 if isinstance(recipe, TextRecipe) else 1
    places = torch.randperm(math.ceil(count / step), generator=generator)
    return samples(places[: recipe.validation_samples] * step, None)


def sample_losses(recipe: Recipe, outputs: Tensor, targets: Tensor) -> Tensor:
    """Loss of each sample (batch,) in the unit of the recipe; sequences: mean over tokens.

    In at least single precision.
    """
    outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
    if recipe.task == "regression":
        return (outputs.squeeze(1) - targets) ** 2
    if recipe.is_token_model:
        each = functional.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none")
        return each.view(targets.shape).mean(dim=1)
    return functional.cross_entropy(outputs, targets, reduction="none")


def _samples(
    recipe: Recipe, split: Arrays, train: Arrays, device: torch.device | None = None
) -> tuple[int, Samples]:
    """The number of samples of a split, and what makes inputs and targets of some of them."""

    def held(name: str) -> Tensor:
        return torch.from_numpy(split[name]).to(device)  # without a device as it is

    if isinstance(recipe, TextRecipe):
        context, tokens = recipe.context, split["tokens"]
        if device is None:
            return len(tokens) - context, lambda starts, _: _windows(tokens, starts, context)
        on_device, ahead = held("tokens").long(), torch.arange(context + 1, device=device)

        def windows(starts: Tensor, _: torch.Generator | None) -> Pair:
            found = on_device[starts.to(device)[:, None] + ahead]
            return found[:, :-1], found[:, 1:]

        return len(tokens) - context, windows
    if isinstance(recipe, RegressionRecipe):
        inputs, targets = held("inputs"), held("targets")

        def rows(chosen: Tensor, _: torch.Generator | None) -> Pair:
            chosen = chosen.to(device)
            return inputs[chosen], targets[chosen]

        return len(inputs), rows
    images = held("images")
    if isinstance(recipe, PixelsRecipe):
        return len(images), lambda chosen, _: _shifted(images[chosen.to(device)], recipe)
    assert isinstance(recipe, ClassesRecipe)
    mean, std = (t.to(device) for t in _moments(train["images"]))
    labels = held("labels")

    def classified(chosen: Tensor, generator: torch.Generator | None) -> Pair:
        chosen = chosen.to(device)
        batch = (images[chosen].float() - mean) / std
        if generator is not None:
            batch = _augmented(batch, recipe, generator)
        return _as_features(batch, recipe), labels[chosen]

    return len(images), classified


def _windows(tokens: NDArray[np.generic], starts: Tensor, context: int) -> Pair:
    """Windows and the same shifted by one: two int64 tensors (windows, context)."""
    index = starts.numpy()[:, None] + np.arange(context + 1)
    windows = torch.from_numpy(tokens[index].astype(np.int64))
    return windows[:, :-1], windows[:, 1:]


def _shifted(images: Tensor, recipe: PixelsRecipe) -> Pair:
    """Each value predicted from those before it, the first from a start token: two (n, tokens)."""
    values = images.flatten(1).long()
    start = torch.full_like(values[:, :1], recipe.vocabulary)
    return torch.cat([start, values[:, :-1]], dim=1), values


def _moments(images: NDArray[np.generic]) -> Pair:
    """Mean and standard deviation of each channel (channels,) over the training images.

    Exact, from how often each of the 256 values occurs, a few images at a time.
    """
    values = np.arange(256.0)
    counts = np.zeros((images.shape[3], 256))
    for start in range(0, len(images), _IMAGES_AT_ONCE):
        piece = images[start : start + _IMAGES_AT_ONCE].reshape(-1, images.shape[3])
        counts += [np.bincount(channel, minlength=256) for channel in piece.T]
    shares = counts / counts.sum(axis=1, keepdims=True)
    mean = shares @ values
    std = np.sqrt((shares * (values - mean[:, None]) ** 2).sum(axis=1))
    return torch.tensor(mean).float(), torch.tensor(np.where(std > 0, std, 1.0)).float()


def _augmented(images: Tensor, recipe: ClassesRecipe, generator: torch.Generator) -> Tensor:
    """Random crops of the images padded by an eighth with their mean colour; random mirroring.

    (n, side, side, channels) → the same shape; images are standardised, so the mean colour is 0.
    """
    if recipe.augmentation == "none":
        return images
    count, side = len(images), recipe.side
    margin = max(1, side // 8)
    padded = functional.pad(images, (0, 0, margin, margin, margin, margin))
    shifts = torch.randint(2 * margin + 1, (2, count, 1), generator=generator)
    rows, columns = shifts + torch.arange(side)  # (count, side) each
    if recipe.augmentation == "crop+flip":
        flip = torch.rand(count, 1, generator=generator) < 0.5
        columns = torch.where(flip, columns.flip(1), columns)
    which = torch.arange(count)[:, None, None]
    which, rows, columns = (t.to(images.device) for t in (which, rows, columns))
    return padded[which, rows[:, :, None], columns[:, None, :]]


def _as_features(images: Tensor, recipe: ClassesRecipe) -> Tensor:
    """(n, side, side, channels) → (n, features), or (n, patches, features) for a ViT."""
    if not isinstance(recipe, VitRecipe):
        return images.flatten(1)
    n, side, patch = len(images), recipe.side // recipe.patch, recipe.patch
    tiles = images.reshape(n, side, patch, side, patch, recipe.channels).transpose(2, 3)
    return tiles.reshape(n, side * side, recipe.features)


def _fresh(recipe: RegressionRecipe, train: Arrays, device: torch.device | None) -> Draw:
    """Samples never seen before, at the cost of the target network for each."""
    weights = [
        torch.from_numpy(train[name]).to(device)
        for name in sorted(k for k in train if k.startswith("w"))
    ]
    mean, std = (float(v) for v in train["moments"])

    def draw(generator: torch.Generator) -> Pair:
        x = torch.randn(recipe.batch, recipe.features, generator=generator).to(device)
        hidden = x
        with torch.no_grad():
            for weight in weights[:-1]:
                hidden = math.sqrt(2) * torch.relu(hidden @ weight.T)
            return x, ((hidden @ weights[-1].T).squeeze(1) - mean) / std

    return draw
