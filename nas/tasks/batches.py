"""Training batches and the validation set of every task, as tensors."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from nas.planning.recipe import Recipe
from nas.tasks.data import Arrays

Pair = tuple[Tensor, Tensor]
#: generator → inputs and targets of one step
Draw = Callable[[torch.Generator], Pair]

_IMAGES_AT_ONCE = 1024
_VALIDATION_SEED = 20241002  # the same validation samples for every run of a task


def training_batches(recipe: Recipe, train: Arrays) -> Draw:
    """What draws the batches of a run: `recipe.batch` samples, with replacement, on the CPU."""
    draws: dict[str, Callable[[Recipe, Arrays], Draw]] = {
        "text": _text, "pixels": _pixels, "images": _images, "regression": _regression,
    }  # fmt: skip
    return draws[recipe.task](recipe, train)


def validation_set(recipe: Recipe, train: Arrays, validation: Arrays) -> Pair:
    """Inputs and targets of the fixed validation samples, at most `recipe.validation_samples`.

    Windows of a text are distinct and do not overlap, so that each counts once.
    """
    generator = torch.Generator().manual_seed(_VALIDATION_SEED)
    if recipe.task == "text":
        tokens = validation["tokens"]
        places = torch.randperm(len(tokens) // (recipe.context + 1), generator=generator)
        starts = places[: recipe.validation_samples] * (recipe.context + 1)
        return _windows(tokens, starts, recipe.context)
    count = len(next(iter(validation.values())))
    chosen = torch.randperm(count, generator=generator)[: recipe.validation_samples]
    if recipe.task == "regression":
        inputs, targets = validation["inputs"], validation["targets"]
        return torch.from_numpy(inputs)[chosen], torch.from_numpy(targets)[chosen]
    images = torch.from_numpy(validation["images"])[chosen]
    if recipe.task == "pixels":
        return _shifted(images, recipe)
    labels = torch.from_numpy(validation["labels"])[chosen]
    return _as_features(_standardised(images, train["images"]), recipe), labels


def sample_losses(recipe: Recipe, outputs: Tensor, targets: Tensor) -> Tensor:
    """Loss of each sample (batch,) in the unit of the recipe; sequences: mean over tokens."""
    outputs = outputs.float()
    if recipe.task == "regression":
        return (outputs.squeeze(1) - targets) ** 2
    if recipe.is_token_model:
        each = functional.cross_entropy(outputs.transpose(1, 2), targets, reduction="none")
        return each.mean(dim=1)
    return functional.cross_entropy(outputs, targets, reduction="none")


def _text(recipe: Recipe, train: Arrays) -> Draw:
    tokens = train["tokens"]

    def draw(generator: torch.Generator) -> Pair:
        starts = torch.randint(len(tokens) - recipe.context, (recipe.batch,), generator=generator)
        return _windows(tokens, starts, recipe.context)

    return draw


def _windows(tokens: NDArray[np.generic], starts: Tensor, context: int) -> Pair:
    """Windows and the same shifted by one: two int64 tensors (windows, context)."""
    index = starts.numpy()[:, None] + np.arange(context + 1)
    windows = torch.from_numpy(tokens[index].astype(np.int64))
    return windows[:, :-1], windows[:, 1:]


def _pixels(recipe: Recipe, train: Arrays) -> Draw:
    images = torch.from_numpy(train["images"])

    def draw(generator: torch.Generator) -> Pair:
        chosen = torch.randint(len(images), (recipe.batch,), generator=generator)
        return _shifted(images[chosen], recipe)

    return draw


def _shifted(images: Tensor, recipe: Recipe) -> Pair:
    """Each value predicted from those before it, the first from a start token: two (n, tokens)."""
    values = images.flatten(1).long()
    start = torch.full_like(values[:, :1], recipe.vocabulary)
    return torch.cat([start, values[:, :-1]], dim=1), values


def _images(recipe: Recipe, train: Arrays) -> Draw:
    images, labels = torch.from_numpy(train["images"]), torch.from_numpy(train["labels"])
    mean, std = _moments(train["images"])

    def draw(generator: torch.Generator) -> Pair:
        chosen = torch.randint(len(images), (recipe.batch,), generator=generator)
        batch = (images[chosen].float() - mean) / std
        return _as_features(_augmented(batch, recipe, generator), recipe), labels[chosen]

    return draw


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


def _standardised(images: Tensor, train_images: NDArray[np.generic]) -> Tensor:
    mean, std = _moments(train_images)
    return (images.float() - mean) / std


def _augmented(images: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
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
    return padded[which, rows[:, :, None], columns[:, None, :]]


def _as_features(images: Tensor, recipe: Recipe) -> Tensor:
    """(n, side, side, channels) → (n, features), or (n, patches, features) for a ViT."""
    if recipe.model != "vit":
        return images.flatten(1)
    n, side, patch = len(images), recipe.side // recipe.patch, recipe.patch
    tiles = images.reshape(n, side, patch, side, patch, recipe.channels).transpose(2, 3)
    return tiles.reshape(n, side * side, recipe.features)


def _regression(recipe: Recipe, train: Arrays) -> Draw:
    if "inputs" not in train:
        return _fresh(recipe, train)
    inputs, targets = torch.from_numpy(train["inputs"]), torch.from_numpy(train["targets"])

    def draw(generator: torch.Generator) -> Pair:
        chosen = torch.randint(len(inputs), (recipe.batch,), generator=generator)
        return inputs[chosen], targets[chosen]

    return draw


def _fresh(recipe: Recipe, train: Arrays) -> Draw:
    """Samples never seen before, at the cost of the target network for each."""
    weights = [
        torch.from_numpy(train[name]) for name in sorted(k for k in train if k.startswith("w"))
    ]
    mean, std = (float(v) for v in train["moments"])

    def draw(generator: torch.Generator) -> Pair:
        x = torch.randn(recipe.batch, recipe.features, generator=generator)
        hidden = x
        with torch.no_grad():
            for weight in weights[:-1]:
                hidden = math.sqrt(2) * torch.relu(hidden @ weight.T)
            return x, ((hidden @ weights[-1].T).squeeze(1) - mean) / std

    return draw
