from __future__ import annotations

import io
import os
import pickle
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

import nas.tasks.data
from nas.errors import InvalidInput
from nas.planning.recipe import IMAGES, IMAGES_CIFAR, IMAGES_VIT, PIXELS, PIXELS_CIFAR, ImageRecipe
from nas.tasks.data import MAX_BYTES, TaskData
from nas.tasks.images import load_images

#: 50 images are enough for these: 10 for validation.
CLASSES = replace(IMAGES, min_validation_samples=4, validation_samples=10)
CLASSES_CIFAR = replace(IMAGES_CIFAR, min_validation_samples=4, validation_samples=10)
GREY = replace(PIXELS, min_validation_samples=4, validation_samples=10, vocabulary=256)
COLOUR_8 = replace(PIXELS_CIFAR, min_validation_samples=4, validation_samples=10, side=8)
COLOUR = replace(PIXELS_CIFAR, min_validation_samples=4, validation_samples=10)


def noise(count: int, *shape: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def save(path: Path, pixels: NDArray[np.uint8]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def folder_of(path: Path, images: NDArray[np.uint8], classes: Sequence[str] = ("a", "b")) -> Path:
    for i, image in enumerate(images):
        save(path / classes[i % len(classes)] / f"{i:03}.png", image)
    return path


def cifar(images: NDArray[np.uint8], *labels: Sequence[int]) -> bytes:
    """Images (n, 32, 32, 3) with one or two rows of labels as CIFAR's binary records."""
    columns = np.array(labels, dtype=np.uint8).T
    return np.hstack([columns, images.transpose(0, 3, 1, 2).reshape(len(images), -1)]).tobytes()


def sizes(data: TaskData) -> tuple[int, int]:
    return len(data.train["images"]), len(data.validation["images"])


def rows(*arrays: NDArray[Any]) -> set[bytes]:
    return {image.tobytes() for array in arrays for image in array}


def everything(data: TaskData) -> set[bytes]:
    return rows(data.train["images"], data.validation["images"])


def refusal(recipe: ImageRecipe, data: Any, **options: Any) -> str:
    with pytest.raises(InvalidInput) as caught:
        load_images(recipe, data, **options)
    assert caught.value.field == "data"
    return str(caught.value)


def test_the_digits() -> None:
    data = load_images(PIXELS, None)
    assert data.train["images"].shape == (1541, 8, 8, 1)
    assert data.validation["images"].shape == (256, 8, 8, 1)
    assert data.train["images"].dtype == np.uint8
    assert data.train["images"].max() == 16
    assert set(data.train) == {"images"}
    assert data.recipe == PIXELS
    assert data.summary == (
        "1,797 images of scikit-learn's digits, 8×8: 1,541 for training, 256 for validation"
    )
    assert load_images(PIXELS, None).fingerprint == data.fingerprint
    two = load_images(replace(PIXELS, vocabulary=2), None)
    assert set(np.unique(two.train["images"])) == {0, 1}


@pytest.mark.parametrize("recipe", [IMAGES, replace(IMAGES_VIT, validation_samples=2048)])
def test_the_digits_with_labels(recipe: ImageRecipe) -> None:
    data = load_images(recipe, None)
    assert sizes(data) == (1438, 359)
    assert data.recipe.outputs == 10
    labels = data.train["labels"]
    assert labels.dtype == np.int64
    assert set(labels.tolist()) == set(range(10))
    assert len(data.validation["labels"]) == 359
    assert set(np.unique(data.train["images"])) == {round(v * 255 / 16) for v in range(17)}
    assert data.summary == (
        "1,797 images of scikit-learn's digits, 8×8, 10 classes: 1,438 for training, 359 for "
        "validation"
    )
    assert not rows(data.train["images"]) & rows(data.validation["images"])


@pytest.mark.parametrize("recipe", [PIXELS_CIFAR, IMAGES_CIFAR, replace(PIXELS, side=4)])
def test_other_recipes_need_data(recipe: ImageRecipe) -> None:
    side, channels = recipe.side, recipe.channels
    assert (
        f"images of {side}×{side} pixels and {channels} channels: recipe {recipe.name} has no "
        "default data"
    ) in refusal(recipe, None)


def test_a_folder_of_classes(tmp_path: Path) -> None:
    images = noise(50, 8, 8)
    data = load_images(CLASSES, folder_of(tmp_path, images, ("dog", "cat", "ox")))
    assert sizes(data) == (40, 10)
    assert data.recipe == replace(CLASSES, classes=3)
    assert data.summary == "50 images, 8×8, 3 classes: 40 for training, 10 for validation"
    found = {
        image.tobytes(): label
        for part in (data.train, data.validation)
        for image, label in zip(part["images"], part["labels"], strict=True)
    }
    assert found == {image.tobytes(): (1, 0, 2)[i % 3] for i, image in enumerate(images)}


def test_the_split_and_the_fingerprint_follow_the_content_alone(tmp_path: Path) -> None:
    images = noise(50, 8, 8)
    first = load_images(CLASSES, folder_of(tmp_path / "1", images))
    other = tmp_path / "2"
    for i in range(49, -1, -1):  # other names, another order, the same classes and pixels
        save(other / "ab"[i % 2] / f"{100 - i}.bmp", images[i])
    second = load_images(CLASSES, other)
    assert second.fingerprint == first.fingerprint
    assert np.array_equal(second.validation["images"], first.validation["images"])
    images[7, 3, 3] ^= 1
    assert load_images(CLASSES, folder_of(tmp_path / "1", images)).content != first.content
    (other / "a").rename(other / "c")
    assert load_images(CLASSES, other).content != first.content


def test_equal_images_are_on_one_side(tmp_path: Path) -> None:
    images = np.repeat(noise(20, 8, 8), 3, axis=0)
    for recipe in (CLASSES, GREY):
        data = load_images(recipe, folder_of(tmp_path, images))
        train, validation = (rows(part["images"]) for part in (data.train, data.validation))
        assert not train & validation
        assert len(train | validation) == 20
        assert sizes(data) == (51, 9)
    # and those that are equal only to the model
    dark = noise(60, 8, 8) % 2 + np.repeat(noise(20, 8, 8, seed=1) & 0xF0, 3, axis=0)
    data = load_images(replace(GREY, vocabulary=16), folder_of(tmp_path, dark.astype(np.uint8)))
    assert sizes(data) == (51, 9)
    assert not rows(data.train["images"]) & rows(data.validation["images"])


def test_every_class_is_in_training(tmp_path: Path) -> None:
    images = noise(50, 8, 8)
    classes = [f"{i:02}" for i in range(40)]  # 30 of one image, 10 of two
    data = load_images(CLASSES, folder_of(tmp_path, images, classes))
    assert set(data.train["labels"].tolist()) == set(range(40))
    assert data.recipe.outputs == 40


@pytest.mark.parametrize(
    ("train", "held"),
    [("train", "validation"), ("Train", "Val"), ("training", "testing"), ("TRN", "dev")],
)
def test_a_split_of_its_own(tmp_path: Path, train: str, held: str) -> None:
    images = noise(45, 8, 8)
    folder_of(tmp_path / train, images[:30])
    folder_of(tmp_path / held, images[28:])  # two of them known from training
    folder_of(tmp_path / "extra", noise(3, 8, 8, seed=5))
    data = load_images(CLASSES, tmp_path)
    assert rows(data.train["images"]) == rows(images[:30, ..., None])
    assert rows(data.validation["images"]) < rows(images[30:])
    assert data.recipe.outputs == 2
    assert data.summary == (
        "40 images, 8×8, 2 classes: 30 for training, 10 for validation; 10 files or images left "
        f"out (3 beside {train} and {held}, 2 equal to a training image, 5 validation images "
        "beyond the recipe's)"
    )
    assert sizes(load_images(GREY, tmp_path)) == (30, 10)
    save(tmp_path / held / "new" / "0.png", images[44] ^ 1)
    assert "no training image has the class new" in refusal(CLASSES, tmp_path)


def test_of_two_validation_folders_the_later_is_left_out(tmp_path: Path) -> None:
    images = noise(60, 8, 8)
    for name, part in (("train", images[:40]), ("test", images[40:50]), ("Valid", images[50:])):
        folder_of(tmp_path / name, part)
    for recipe in (CLASSES, GREY):
        data = load_images(recipe, tmp_path)
        assert rows(data.validation["images"]) == rows(images[50:, ..., None])
        assert data.summary.endswith("; 10 files or images left out (10 beside train and Valid)")


def test_training_images_alone_are_no_class(tmp_path: Path) -> None:
    images = noise(50, 8, 8)
    folder_of(tmp_path / "plain", images)
    folder_of(tmp_path / "split" / "Train", images)
    folder_of(tmp_path / "split" / "unlabelled", noise(5, 8, 8, seed=1), ["."])
    data = load_images(CLASSES, tmp_path / "split")
    assert data.content == load_images(CLASSES, tmp_path / "plain").content
    assert data.summary.endswith("; 5 files or images left out (5 beside Train)")
    # but a class may be called so
    vehicles = load_images(CLASSES, folder_of(tmp_path / "vehicles", images, ["train", "bus"]))
    named = load_images(CLASSES, folder_of(tmp_path / "named", images, ["y", "x"]))
    assert vehicles.content == named.content


@pytest.mark.parametrize(
    ("tops", "classes", "says"),
    [
        (["fold1", "fold2"], "ab", "the folders fold1, fold2 hold the same sub-folders, a, b"),
        (["train2017", "val2017"], "ab", "hold the same sub-folders"),
        (["cat", "dog"], ["train", "val"], "the folders cat, dog hold the same sub-folders, train"),
        (["val", "test"], "ab", "the folders test, val are splits without one to train"),
        (["Val", "Test"], ["."], "the folders Test, Val are splits without one to train"),
    ],
)
def test_folders_that_may_be_splits_are_no_classes(
    tmp_path: Path, tops: list[str], classes: Sequence[str], says: str
) -> None:
    for seed, top in enumerate(tops):
        folder_of(tmp_path / top, noise(30, 8, 8, seed=seed), classes)
    assert says in refusal(CLASSES, tmp_path)
    assert sum(sizes(load_images(GREY, tmp_path))) == 60  # no classes: all images


def test_what_systems_put_beside_images_is_no_class(tmp_path: Path) -> None:
    images = noise(50, 8, 8)
    plain = load_images(CLASSES, folder_of(tmp_path / "plain", images))
    names = (
        ".ipynb_checkpoints",
        ".Trash-1000",
        "@eaDir",
        "__MACOSX",
        "$RECYCLE.BIN",
        "lost+found",
    )
    for folder in (tmp_path / "0", tmp_path / "1" / "train"):
        folder_of(folder, images)
        folder_of(folder, noise(6, 8, 8, seed=1), names)
    for top in "01":
        data = load_images(CLASSES, tmp_path / top)
        assert data.content == plain.content
        assert data.summary.endswith("; 6 files or images left out (6 hidden or system folders)")
    # one sub-folder of a name in each class is no split
    folder_of(tmp_path / "deep", images, ["a/images", "b/images"])
    assert load_images(CLASSES, tmp_path / "deep").content == plain.content


@pytest.mark.parametrize("end", ["png", "jpg", "tiff"])
def test_images_are_turned_as_their_orientation_says(tmp_path: Path, end: str) -> None:
    upright = np.zeros((8, 12), np.uint8)
    upright[:4, :8], upright[:, :6] = 120, upright[:, :6] + 60
    image = Image.fromarray(upright)
    turns = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # of how it was taken
    for orientation, turn in turns.items():
        exif = Image.Exif()
        exif[0x112] = orientation
        taken = image if turn is None else image.transpose(Image.Transpose(turn))
        (tmp_path / end).mkdir(exist_ok=True)
        for i in range(5):
            options: dict[str, Any] = {"quality": 95} if end == "jpg" else {}
            taken.save(tmp_path / end / f"{orientation}-{i}.{end}", exif=exif, **options)
    folder_of(tmp_path / end, noise(20, 8, 8), ["."])
    data = load_images(GREY, tmp_path / end)
    found = np.concatenate([data.train["images"], data.validation["images"]])[..., 0].astype(int)
    middle = upright[:, 2:10].astype(int)
    assert (np.abs(found - middle).max(axis=(1, 2)) < 16).sum() == 40


def test_a_broken_note_of_the_orientation_is_no_broken_image(tmp_path: Path) -> None:
    for i, image in enumerate(noise(20, 8, 8)):
        exif = b"Exif\0\0MM\0*\0\0\0\xffgarbage"
        Image.fromarray(image).save(tmp_path / f"{i}.jpg", exif=exif)
    assert sum(sizes(load_images(GREY, tmp_path))) == 20


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
@pytest.mark.parametrize("end", ["png", "tiff"])
def test_values_of_16_bit_files_are_as_many_bits_as_they_need(
    tmp_path: Path, bits: int, end: str
) -> None:
    eight = noise(50, 8, 8)
    eight[0, 0, 0] = 255
    for i, image in enumerate(eight):
        deep = image.astype(np.uint16) << (bits - 8)
        Image.fromarray(deep).save(tmp_path / f"{i}.{end}")
    save(tmp_path / "8.bmp", noise(1, 8, 8, seed=1)[0])  # whose values are as they are
    data = load_images(GREY, tmp_path)
    assert everything(data) == rows(eight, noise(1, 8, 8, seed=1))
    how = f"read as of {bits} bits (the largest is {255 << (bits - 8):,})"
    assert data.summary.endswith(f"validation; values of 16-bit files {how}")


def png_of_16_bits(path: Path, values: NDArray[np.uint16]) -> None:
    """Three channels of 16 bits, which Pillow reads but does not write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    height, width, _ = values.shape
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + data)


def test_colours_of_16_bits_are_not_of_fewer(tmp_path: Path) -> None:
    colours = noise(20, 8, 8, 3)
    for i, image in enumerate(colours):
        png_of_16_bits(tmp_path / f"{i}.png", image.astype(np.uint16) << 8)
    data = load_images(COLOUR_8, tmp_path)
    assert everything(data) == rows(colours)
    assert data.summary.endswith("; values of 16-bit files read as of 16 bits")
    for bits, largest in ((12, "4,095"), (8, "255")):
        for i, image in enumerate(colours):
            png_of_16_bits(tmp_path / f"{i}.png", image.astype(np.uint16) << (bits - 8))
        assert f"have no value above {largest} of 65,535" in refusal(COLOUR_8, tmp_path)


def test_few_images_for_validation_have_a_reason(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    np.savez(path, images=noise(50, 8, 8), labels=np.array([f"{i}.png" for i in range(50)]))
    says = "50 of the 50 classes have one image, which stays in training"
    assert says in refusal(CLASSES, path)
    np.savez(path, images=np.zeros((50, 8, 8), np.uint8), labels=np.arange(50) % 2)
    assert "the 50 images are equal" in refusal(CLASSES, path)
    np.savez(path, images=np.repeat(noise(2, 8, 8), 25, axis=0), labels=np.arange(50) // 25)
    assert "the 50 images have 2 different contents" in refusal(CLASSES, path)
    images = noise(50, 8, 8)
    for name in ("train", "val"):
        folder_of(tmp_path / "folder" / name, images)
    says = "0 for validation; 50 files or images left out (50 equal to a training image)"
    assert says in refusal(CLASSES, tmp_path / "folder")


def test_areas_are_averaged(tmp_path: Path) -> None:
    """20×12 in nested folders: the middle 12×12, down to 4×4 in blocks of 3×3."""
    recipe = replace(GREY, side=4)
    images = noise(50, 12, 20)
    for i, image in enumerate(images):
        save(tmp_path / f"{i % 3}" / "deep" / f"{i}.png", image)
        save(tmp_path / f"{i}.png", image)
    means = images[:, :, 4:16].reshape(50, 4, 3, 4, 3).mean(axis=(2, 4))
    blocks = np.floor(means + 0.5).astype(np.uint8)
    assert everything(load_images(recipe, tmp_path)) == rows(blocks)
    # the same of an array; and with fewer values
    np.save(tmp_path / "images.npy", images)
    data = load_images(replace(recipe, vocabulary=10), tmp_path / "images.npy")
    assert everything(data) == rows((blocks.astype(int) * 10 // 256).astype(np.uint8))
    # 10 pixels down to 4: each an average of 2.5
    row = np.array([0, 0, 0, 100, 0, 0, 0, 0, 0, 200], dtype=np.uint8)
    uneven = np.tile(row, (50, 10, 1))
    uneven[:, :, 5] = np.arange(50)[:, None]
    np.save(tmp_path / "uneven.npy", uneven)
    found = load_images(recipe, tmp_path / "uneven.npy").train["images"][0, :, :, 0]
    assert found[0].tolist() in ([0, 40, round(n / 2.5), 80] for n in range(50))


def test_channels(tmp_path: Path) -> None:
    colour, grey = noise(25, 8, 8, 3), noise(25, 8, 8, seed=1)
    folder_of(tmp_path, colour, ["colour"])
    folder_of(tmp_path, grey, ["grey"])
    three = load_images(COLOUR, tmp_path)
    assert everything(three) == rows(colour, np.repeat(grey[..., None], 3, axis=3))
    assert three.summary.startswith("50 images, 8×8×3: 40 for")
    luminance = np.round(colour @ np.array([0.299, 0.587, 0.114])).astype(int)
    one = load_images(CLASSES, tmp_path)
    found = np.concatenate([p["images"][p["labels"] == 0] for p in (one.train, one.validation)])
    for image in found[..., 0].astype(int):
        assert np.abs(luminance - image).max(axis=(1, 2)).min() <= 1
    # a palette, and transparency
    Image.fromarray(colour[0]).quantize(8).save(tmp_path / "a.png", transparency=bytes(8))
    Image.new("LA", (8, 8), (33, 0)).save(tmp_path / "b.png")
    assert bytes([33] * 64) in everything(load_images(GREY, tmp_path))


@pytest.mark.parametrize(("width", "height", "can"), [(9, 9, True), (8, 9, False), (4, 4, True)])
def test_images_of_another_size(tmp_path: Path, width: int, height: int, can: bool) -> None:
    folder_of(tmp_path, noise(50, 8, 8))
    save(tmp_path / "b" / "odd.png", noise(1, height, width)[0])
    message = refusal(CLASSES, tmp_path)
    assert f"b/odd.png has {width}×{height} pixels where the recipe has 8×8" in message
    assert (f"overrides side={width}" in message) == can
    assert str(tmp_path) not in refusal(CLASSES, tmp_path, shown="mine")
    if width < 8:
        assert "b/odd.png has 4×4 pixels, fewer than the 8×8" in refusal(GREY, tmp_path)
    else:
        assert sum(sizes(load_images(GREY, tmp_path))) == 51


def test_unreadable_images_are_left_out_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder_of(tmp_path, noise(50, 8, 8))
    whole = save(tmp_path / "a" / "whole.png", noise(1, 64, 64)[0]).read_bytes()
    (tmp_path / "a" / "whole.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "a" / "text.jpg").write_text("no image")
    (tmp_path / "a" / "empty.gif").touch()
    Image.fromarray(noise(1, 8, 8)[0]).save(tmp_path / "a" / "other.png", "pcx")
    (tmp_path / "readme.txt").write_text("about")
    Image.fromarray(noise(1, 8, 8)[0].astype(np.float32)).save(tmp_path / "a" / "float.tiff")
    save(tmp_path / "loose.png", noise(1, 8, 8)[0])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
    save(tmp_path / "a" / "warns.png", noise(1, 80, 80)[0])
    save(tmp_path / "a" / "bomb.png", noise(1, 200, 200)[0])
    sparse(tmp_path / "a" / "huge.png", 10 << 30)
    assert load_images(GREY, tmp_path).summary.endswith(
        "; 9 files or images left out (1 no image, 1 of other values, 3 too large, 4 unreadable)"
    )
    (tmp_path / "a" / "whole.png").unlink()
    assert load_images(CLASSES, tmp_path).summary.endswith(
        "; 9 files or images left out (1 no image, 1 of other values, 3 too large, 3 unreadable, "
        "1 without a class)"
    )
    only = tmp_path / "only"
    (only / "a").mkdir(parents=True)
    (only / "a" / "x.png").write_text("no image")
    assert "no image is usable; 1 files or images left out (1 unreadable)" in refusal(GREY, only)


def test_links_are_not_followed(tmp_path: Path) -> None:
    outside = folder_of(tmp_path / "outside", noise(3, 8, 8, seed=9))
    inside = folder_of(tmp_path / "inside", noise(50, 8, 8))
    (inside / "a" / "link.png").symlink_to(outside / "a" / "000.png")
    (inside / "c").symlink_to(outside / "a", target_is_directory=True)
    os.mkfifo(inside / "a" / "pipe.png")
    data = load_images(CLASSES, inside)
    assert (sum(sizes(data)), data.recipe.outputs) == (50, 2)
    says = "; 3 files or images left out (2 linked, 1 no regular file)"
    assert data.summary.endswith(says)
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "a").symlink_to(outside / "a", target_is_directory=True)
    assert "0 files of this folder is an image; 1 files or images left out (1 linked)" in (
        refusal(CLASSES, tmp_path / "links")
    )
    (tmp_path / "named").symlink_to(inside)  # the user's own
    assert load_images(CLASSES, tmp_path / "named").content == data.content


def test_cifar_10(tmp_path: Path) -> None:
    images = noise(60, 32, 32, 3)
    labels = [i % 10 for i in range(60)]
    (tmp_path / "data_batch_1.bin").write_bytes(cifar(images[:30], labels[:30]))
    (tmp_path / "data_batch_2.bin").write_bytes(cifar(images[30:50], labels[30:50]))
    (tmp_path / "batches.meta.txt").write_text("airplane\n")
    one = load_images(CLASSES_CIFAR, tmp_path)
    assert sizes(one) == (40, 10)
    assert one.summary == "50 images, 32×32×3, 10 classes: 40 for training, 10 for validation"
    (tmp_path / "test_batch.bin").write_bytes(cifar(images[50:], labels[50:]))
    data = load_images(CLASSES_CIFAR, tmp_path)
    assert rows(data.train["images"]) == rows(images[:50])
    assert rows(data.validation["images"]) == rows(images[50:])
    for image, label in zip(data.train["images"], data.train["labels"], strict=True):
        assert image.tobytes() in rows(images[label:50:10])
    small = load_images(replace(COLOUR, side=16), tmp_path / "data_batch_1.bin")
    means = images[:30].reshape(30, 16, 2, 16, 2, 3).mean(axis=(2, 4))
    assert everything(small) == rows(np.floor(means + 0.5).astype(np.uint8))
    assert "32×32 pixels where the recipe has 8×8" in refusal(CLASSES, tmp_path)


def test_cifar_100_has_fine_labels(tmp_path: Path) -> None:
    images = noise(50, 32, 32, 3)
    coarse, fine = [0] * 50, [90 + i % 3 for i in range(50)]
    (tmp_path / "train.bin").write_bytes(cifar(images, coarse, fine))
    data = load_images(CLASSES_CIFAR, tmp_path / "train.bin")
    assert data.recipe.outputs == 3
    (tmp_path / "train.bin").write_bytes(cifar(images, [20, *coarse[1:]], fine))
    assert "record 1 of train.bin has the label" in refusal(CLASSES_CIFAR, tmp_path)


def test_broken_cifar(tmp_path: Path) -> None:
    images = noise(50, 32, 32, 3)
    file = tmp_path / "data_batch_1.bin"
    file.write_bytes(cifar(images, [0] * 50)[:-1])
    for data in (file, tmp_path):
        message = refusal(CLASSES_CIFAR, data)
        assert "data_batch_1.bin is truncated: its 153,649 bytes are no multiple" in message
        assert "a record of 3,073 bytes" in message
    file.write_bytes(cifar(images, [0] * 40 + [10] + [0] * 9))
    message = refusal(CLASSES_CIFAR, file)
    assert "record 41 of data_batch_1.bin has the label 10; labels are below 10" in message
    file.write_bytes(cifar(images, [0] * 50))
    assert "at least 2 classes; every image has the class 0" in refusal(CLASSES_CIFAR, file)


def test_arrays(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    images = noise(50, 8, 8)
    labels = np.array(["no", "yes"])[np.arange(50) % 2]
    np.savez_compressed(path, images=images, labels=labels)
    data = load_images(CLASSES, path)
    assert (sizes(data), data.recipe.outputs) == ((40, 10), 2)
    assert everything(data) == rows(images)
    np.savez(path, images=np.asfortranarray(images[..., None]), labels=np.arange(50) % 2 * 7)
    assert load_images(CLASSES, path).content == data.content
    assert everything(load_images(GREY, path)) == rows(images)
    np.save(tmp_path / "images.npy", images)
    assert load_images(GREY, tmp_path / "images.npy").content == load_images(GREY, path).content
    assert "an .npy file has no labels" in refusal(CLASSES, tmp_path / "images.npy")


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"labels": np.zeros(50, int)}, "no array `images`; it has labels"),
        (
            {f"arr_{i}": np.zeros(1) for i in range(7)},
            "has arr_0, arr_1, arr_2, arr_3, arr_4 and 2 m",
        ),
        ({"images": noise(50, 8, 8)}, "no array `labels`"),
        ({"images": noise(50, 8, 8), "labels": np.zeros(49, int)}, "these int64 of shape (49,)"),
        ({"images": noise(50, 8, 8), "labels": np.zeros(50)}, "these float64 of shape (50,)"),
        ({"images": np.zeros((50, 8, 8)), "labels": np.zeros(50, int)}, "these float64"),
        ({"images": noise(50, 8, 8, 5), "labels": np.zeros(50, int)}, "shape (50, 8, 8, 5)"),
        ({"images": noise(50, 3, 8, 8), "labels": np.zeros(50, int)}, "shape (50, 3, 8, 8)"),
        ({"images": noise(0, 8, 8), "labels": np.zeros(0, int)}, "`images` is empty"),
        ({"images": noise(50, 9, 9), "labels": np.zeros(50, int)}, "every image has 9×9 pixels"),
    ],
)
def test_arrays_that_cannot_be_used(tmp_path: Path, arrays: dict[str, Any], says: str) -> None:
    np.savez(tmp_path / "data.npz", **arrays)
    assert says in refusal(CLASSES, tmp_path / "data.npz")


def test_broken_arrays(tmp_path: Path) -> None:
    path = tmp_path / "images.npy"
    np.save(path, noise(50, 8, 8))
    whole = path.read_bytes()
    for broken, says in (
        (whole[:2000], "truncated"),
        (whole[:50], "cannot be read"),
        (whole.replace(b"(50, 8, 8), }", b"(-50, 8, 8),}"), "empty"),
        (whole.replace(b"(50, 8, 8), }       ", b"(9" + b"9" * 12 + b", 8,8)}"), "at most"),
        (whole.replace(b"'descr'", b"((((((("), "cannot be read"),
    ):
        path.write_bytes(broken)
        assert says in refusal(GREY, path)
    zipped = tmp_path / "data.npz"
    np.savez(zipped, images=noise(50, 8, 8), labels=np.arange(50) % 2)
    zipped.write_bytes(zipped.read_bytes()[:-100])
    assert "this .npz file cannot be read" in refusal(CLASSES, zipped)
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as archive:
        header = io.BytesIO()
        np.save(header, np.zeros((0, 8, 8), np.uint8))
        huge = header.getvalue().replace(b"(0, 8, 8), }   ", b"(9999, 8, 8), }")
        archive.writestr("images.npy", huge + bytes(1000))
    assert "`images` is truncated" in refusal(GREY, zipped)


class Marker:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def pickled(path: Path, marker: Path) -> None:
    path.write_bytes(pickle.dumps({b"data": Marker(marker)}))


def object_array(path: Path, marker: Path) -> None:
    np.save(path, np.array([Marker(marker)] * 50), allow_pickle=True)


def object_arrays(path: Path, marker: Path) -> None:
    np.savez(path, images=np.array([Marker(marker)] * 50), labels=np.arange(50))


@pytest.mark.parametrize("recipe", [CLASSES, GREY])
@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("data_batch_1", pickled), ("data.bin", pickled), ("x.pkl", pickled), ("x.pt", pickled),
        ("x.npz", object_arrays),
    ],
)  # fmt: skip
def test_pickles_are_never_unpickled(
    tmp_path: Path, recipe: ImageRecipe, name: str, write: Callable[[Path, Path], None]
) -> None:
    folder, marker = tmp_path / "data", tmp_path / "marker"
    folder.mkdir()
    write(folder / name, marker)
    assert "this is a pickle, which is never unpickled" in refusal(recipe, folder / name)
    if write is pickled and name != "data.bin":
        assert "this is a pickle, which is never unpickled" in refusal(recipe, folder)
    assert not marker.exists()


def test_an_array_of_objects_is_never_unpickled(tmp_path: Path) -> None:
    object_array(tmp_path / "x.npy", tmp_path / "marker")
    assert "this is a pickle" in refusal(GREY, tmp_path / "x.npy")
    assert not (tmp_path / "marker").exists()


def sparse(path: Path, size: int) -> Path:
    path.touch()
    os.truncate(path, size)
    return path


def test_large_data_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = f"at most {MAX_BYTES:,} bytes of decoded images"
    assert limit in refusal(IMAGES_CIFAR, sparse(tmp_path / "data_batch_1.bin", 10 << 30))
    assert limit in refusal(IMAGES_CIFAR, tmp_path)
    np.save(tmp_path / "x.npy", noise(1, 8, 8))
    begin = (tmp_path / "x.npy").read_bytes()[:128]
    many = begin.replace(b"(1, 8, 8), }" + b" " * 8, b"(168000000, 8, 8), }")
    (tmp_path / "x.npy").write_bytes(many)
    assert limit in refusal(GREY, sparse(tmp_path / "x.npy", 10 << 30))
    assert "none of these" in refusal(GREY, sparse(tmp_path / "huge", 10 << 30))
    folder = folder_of(tmp_path / "folder", noise(50, 8, 8))
    monkeypatch.setattr(nas.tasks.data, "MAX_BYTES", 50 * 64 - 1)
    assert "at most 3,199 bytes" in refusal(GREY, folder)


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("missing", "this path does not exist"),
        ("nul", "this path cannot be read"),
        ("fifo", "neither a regular file nor a folder"),
        ("device", "neither a regular file nor a folder"),
        ("empty file", "this file is empty"),
        ("empty folder", "none of the 0 files of this folder is an image"),
        ("empty .bin", "this file is empty"),
        ("binary", "this file is none of these"),
        ("one image", "this file is none of these"),
        ("few", "5 images, 8×8"),
    ],
)
def test_unusable_data_is_refused_with_its_name(case: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "data"
    if case == "empty file":
        path.touch()
    elif case == "empty .bin":
        path = tmp_path / "data.bin"
        path.touch()
    elif case == "empty folder":
        path.mkdir()
    elif case == "binary":
        path.write_bytes(bytes(range(256)))
    elif case == "one image":
        path = save(tmp_path / "one.png", noise(1, 8, 8)[0])
    elif case == "few":
        folder_of(path, noise(5, 8, 8))
        says = "at least 4 images for training and 4 for validation"
        assert "20 that differ; this has 4 for training, 1 for validation" in refusal(GREY, path)
    elif case == "fifo":
        os.mkfifo(path)
    elif case == "device":
        path = Path("/dev/zero")
    elif case == "nul":
        path = tmp_path / "a\x00b"
    message = refusal(CLASSES, path)
    assert says in message
    assert "accepted: a folder of images with a sub-folder for each class, CIFAR's" in message
    message = refusal(CLASSES, path, shown="my data")
    assert says in message
    assert "got my data;" in message
    assert str(tmp_path) not in message


def test_images_of_a_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = noise(50, 8, 8)
    labels: list[int] = [i % 2 for i in range(50)]

    def hub_images(spec: str) -> tuple[list[Any], list[int]]:
        assert spec == "hf:some/rows"
        files = [io.BytesIO() for _ in range(40)]
        for file, image in zip(files, pixels, strict=False):
            Image.fromarray(image).save(file, "png")
        return [*(f.getvalue() for f in files), *pixels[40:]], labels

    module = ModuleType("nas.tasks.hub")
    module.hub_images = hub_images  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nas.tasks.hub", module)
    data = load_images(CLASSES, "hf:some/rows")
    assert everything(data) == rows(pixels)
    assert data.recipe.outputs == 2
    assert sizes(load_images(GREY, "hf:some/rows")) == (40, 10)
    labels.clear()
    assert "this dataset has no column of labels" in refusal(CLASSES, "hf:some/rows")
    assert sizes(load_images(GREY, "hf:some/rows")) == (40, 10)
