from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from nas.planning.recipe import (
    IMAGES,
    IMAGES_VIT,
    PIXELS,
    REGRESSION,
    TEXT,
    Recipe,
    with_overrides,
)
from nas.tasks import load_data
from nas.tasks.batches import sample_losses, training_batches, validation_set

RNG = np.random.default_rng(0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def image_arrays(side: int = 8, channels: int = 1, count: int = 40) -> dict[str, np.ndarray]:
    images = RNG.integers(0, 256, (count, side, side, channels)).astype(np.uint8)
    return {"images": images, "labels": np.arange(count, dtype=np.int64) % 10}


def test_a_pixel_is_predicted_from_those_before_it() -> None:
    recipe = replace(PIXELS, side=2, channels=3, vocabulary=17, batch=5)
    images = RNG.integers(0, 17, (7, 2, 2, 3)).astype(np.uint8)
    x, y = training_batches(recipe, {"images": images})(generator())
    assert x.shape == y.shape == (5, 12)
    assert (x[:, 0] == 17).all()  # the token that begins an image
    assert torch.equal(x[:, 1:], y[:, :-1])
    known = {tuple(i.flatten()) for i in images}
    assert all(tuple(row) in known for row in y.numpy())


def test_patches_hold_their_own_pixels() -> None:
    recipe = replace(IMAGES_VIT, side=8, patch=2, channels=3, augmentation="none", batch=4)
    arrays = image_arrays(8, 3)
    x, labels = training_batches(recipe, arrays)(generator())
    assert x.shape == (4, 16, 12)
    mean = arrays["images"].mean(axis=(0, 1, 2))
    std = arrays["images"].std(axis=(0, 1, 2))
    chosen = torch.randint(40, (4,), generator=generator())
    assert torch.equal(labels, torch.from_numpy(arrays["labels"])[chosen])
    image = (arrays["images"][int(chosen[0])] - mean) / std
    # patch (1, 2) covers rows 2-3 and columns 4-5
    np.testing.assert_allclose(x[0, 1 * 4 + 2].reshape(2, 2, 3).numpy(), image[2:4, 4:6], atol=1e-5)


@pytest.mark.parametrize("augmentation", ["crop", "crop+flip"])
def test_augmented_images_are_shifts_of_their_own(augmentation: str) -> None:
    recipe = with_overrides(IMAGES, {"augmentation": augmentation, "batch": 64})
    arrays = image_arrays(count=3)
    x, _ = training_batches(recipe, arrays)(generator())
    plain = replace(recipe, augmentation="none", batch=64)
    originals, _ = training_batches(plain, arrays)(generator())  # the same images are drawn
    shifts, mirrored = set(), 0
    for moved, own in zip(x.reshape(-1, 8, 8), originals.reshape(-1, 8, 8), strict=True):
        padded = torch.nn.functional.pad(own, (1, 1, 1, 1))
        found = [
            (r, c, flip)
            for r in range(3) for c in range(3) for flip in (False, True)
            for view in [padded[r : r + 8, c : c + 8]]
            if torch.equal(view.flip(1) if flip else view, moved)
        ]  # fmt: skip
        assert len(found) == 1
        shifts.add(found[0][:2])
        mirrored += found[0][2]
    assert len(shifts) == 9
    assert (mirrored > 0) == (augmentation == "crop+flip")


def test_validation_is_neither_augmented_nor_drawn_twice() -> None:
    recipe = replace(IMAGES, validation_samples=30)
    train, held = image_arrays(), image_arrays()
    x, labels = validation_set(recipe, train, held)
    assert x.shape == (30, 64)
    mean, std = train["images"].mean(), train["images"].std()
    known = {
        tuple(image.flatten().tolist()): int(label)
        for image, label in zip(held["images"], held["labels"], strict=True)
    }
    seen = [tuple(row) for row in (x * std + mean).round().int().tolist()]
    assert len(set(seen)) == 30
    assert [known[row] for row in seen] == labels.tolist()


def test_regression_draws_rows_of_its_table() -> None:
    recipe = replace(REGRESSION, input_dim=3, batch=16)
    inputs = RNG.standard_normal((50, 3)).astype(np.float32)
    arrays = {"inputs": inputs, "targets": inputs.sum(axis=1)}
    x, y = training_batches(recipe, arrays)(generator())
    torch.testing.assert_close(x.sum(1), y)
    vx, vy = validation_set(recipe, arrays, arrays)
    assert len(vx) == 50
    torch.testing.assert_close(vx.sum(1), vy)


@pytest.mark.parametrize("recipe", [TEXT, PIXELS, IMAGES, IMAGES_VIT, REGRESSION])
def test_losses_are_one_a_sample(recipe: Recipe) -> None:
    if recipe.is_token_model:
        outputs = torch.zeros(3, recipe.tokens, recipe.outputs)
        targets = torch.zeros(3, recipe.tokens, dtype=torch.long)
        expected = float(np.log(recipe.outputs))
    elif recipe.task == "images":
        outputs, targets = torch.zeros(3, 10), torch.zeros(3, dtype=torch.long)
        expected = float(np.log(10))
    else:
        outputs, targets, expected = torch.zeros(3, 1), torch.full((3,), 2.0), 4.0
    losses = sample_losses(recipe, outputs, targets)
    assert losses.shape == (3,)
    assert losses.tolist() == pytest.approx([expected] * 3)


@pytest.mark.parametrize(
    "recipe",
    [
        replace(TEXT, context=8, batch=4),
        replace(REGRESSION, pool=4096),
        replace(REGRESSION, pool=0, batch=8),
        PIXELS,
        replace(IMAGES, augmentation="crop+flip"),
        IMAGES_VIT,
    ],
    ids=lambda recipe: recipe.name,
)
def test_batches_are_the_same_where_the_data_were_moved_to_a_device(recipe: Recipe) -> None:
    if recipe.task == "text":
        train: dict[str, np.ndarray] = {"tokens": np.arange(1000, dtype=np.uint8) % 96}
    else:
        train = dict(load_data(recipe).train)
    drawn = []
    for device in (None, torch.device("cpu")):
        draw, generator = training_batches(recipe, train, device), torch.Generator()
        generator.manual_seed(3)
        drawn.append([draw(generator) for _ in range(3)])
    for (x, y), (same_x, same_y) in zip(*drawn, strict=True):
        assert x.dtype == same_x.dtype
        assert torch.equal(x, same_x)
        assert torch.equal(y, same_y)
