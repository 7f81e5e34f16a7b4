"""Data of the tasks `pixels` and `images`: which images, their pixels, which split.  Torch-free."""

from __future__ import annotations

import hashlib
import io
import math
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import groupby
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nas.errors import InvalidInput
from nas.recipe import Recipe
from nas.tasks.arrays import NPY, ZIP, ArrayReader
from nas.tasks.data import (
    HUB_PREFIX,
    MAX_BYTES,
    Arrays,
    TaskData,
    content_digest,
    is_pickle,
)
from nas.tasks.opening import DataFile, OpenData, opened

if TYPE_CHECKING:
    from PIL import Image

#: Share of the images held out for validation where the data has no split of its own, at most.
VALIDATION_SHARE = 0.2
#: Largest image file of a folder, bytes.
_MAX_FILE = 1 << 28
#: Pixels of all images of a folder that was named over the network, before they are scaled down.
_MAX_PIXELS = 1 << 32
#: Sub-folders that are validation data beside one named train; the first that is there is read.
_VALIDATION_FOLDERS = ("validation", "valid", "val", "test")
#: Formats whose decoders start no other program, and how their files end.
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "PPM", "TIFF")
_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".pgm", ".ppm", ".tif", ".tiff"}
)
_DIGIT_LEVELS = 17
_CIFAR_SHAPE = (3, 32, 32)
#: CIFAR-100 has two labels before the pixels, of which the second, fine one counts.
_CIFAR_100 = frozenset({"train.bin", "test.bin"})
_CIFAR_PIECE = 4096  # records read at a time

_Images = NDArray[np.uint8]


class _Unusable(Exception):
    """Why an image is left out: the kind under which it is counted."""


@dataclass
class _Reading:
    """What errors call the data, and what has been read of it."""

    recipe: Recipe
    name: str
    #: images (n, side, side, channels), their labels, whether they are validation data
    pieces: list[tuple[_Images, Sequence[Any], bool]] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    #: values that a pixel of the source may have
    levels: int = 256
    #: pixels that may still be decoded
    most_pixels: float = math.inf

    @property
    def labelled(self) -> bool:
        return self.recipe.task == "images"

    def error(self, what: str) -> InvalidInput:
        folder, arrays = "a folder of images", "an .npz file with `images`, an .npy file"
        if self.labelled:
            folder += " with a sub-folder for each class"
            arrays = "an .npz file with `images` and `labels`"
        accepted = f"{folder}, CIFAR's .bin files, {arrays}, or {HUB_PREFIX}NAME; {what}"
        return InvalidInput("data", self.name, accepted)

    @property
    def arrays(self) -> ArrayReader:
        return ArrayReader(self.error, self.check_size)

    def check_size(self, size: int) -> None:
        if size > MAX_BYTES:
            raise self.error(f"at most {MAX_BYTES:,} bytes of decoded images")

    def check_count(self, count: int) -> None:
        self.check_size(count * self.recipe.side**2 * self.recipe.channels)

    def check_shape(self, width: int, height: int, what: str) -> None:
        side = self.recipe.side
        if self.labelled and (width, height) != (side, side):
            can = f", or set the recipe's side (overrides side={width})" if width == height else ""
            raise self.error(
                f"{what} has {width}×{height} pixels where the recipe has {side}×{side}; resize "
                f"the images{can}"
            )
        if min(width, height) < side:
            raise self.error(
                f"{what} has {width}×{height} pixels, fewer than the {side}×{side} of the recipe"
            )

    def check_pixels(self, more: int) -> None:
        """Decoding is what takes the time, whatever the images are scaled down to."""
        self.most_pixels -= more
        if self.most_pixels < 0:
            raise self.error(f"images of at most {_MAX_PIXELS:,} pixels all together")

    def add(self, images: _Images, labels: Sequence[Any], held: bool = False) -> None:
        self.pieces.append((images, labels, held))


def load_images(
    recipe: Recipe,
    data: str | os.PathLike[str] | None,
    *,
    shown: str | None = None,
    root: str | os.PathLike[str] | None = None,
) -> TaskData:
    """Read a folder of images, CIFAR's binary files, arrays, ``hf:…``, or by default the digits.

    The default, scikit-learn's 1,797 handwritten digits, suits recipes of 8×8 grey images.  Else:

    - ``folder/class/*.png`` and other formats; for `pixels` in any sub-folders or none.  Beside a
      sub-folder ``train``, one named ``validation``, ``valid``, ``val`` or ``test`` is the
      validation data.  Links inside the folder are not followed; files that cannot be decoded,
      or are larger than Pillow's limit, are left out and counted.
    - CIFAR-10's and CIFAR-100's ``*.bin``, of which ``test*`` is the validation data.
    - an ``.npz`` with ``images`` (n, h, w) or (n, h, w, 1 or 3), uint8, and ``labels`` (n,); for
      `pixels` also an ``.npy`` of images.

    Task `images` takes images of exactly side×side pixels.  Task `pixels` cuts the largest square
    out of the middle, averages it down to side×side and, where the recipe's vocabulary V is smaller
    than the number of levels L, maps a value to ``value * V // L``.  One channel is the luminance,
    three repeat a grey one; transparency is dropped, and of an animation the first frame is taken.

    Without a split of its own, a fifth of the data, at most `recipe.validation_samples`, is held
    out: which, depends on the images' pixels alone, and equal images stay on one side.  With one,
    validation images that equal a training image, and those beyond `recipe.validation_samples`,
    are left out and counted.

    Parameters
    ----------
    shown
        What errors call the data; by default its path.
    root
        See `load_data`.

    Raises
    ------
    InvalidInput
        The data does not exist, is a pickle or otherwise none of these, is too large, has images
        of another size, or too few images or classes.
    """
    reading = _Reading(recipe, shown or str(data))
    if data is None:
        return _digits(reading)
    if root is None and str(data).startswith(HUB_PREFIX):
        _read_hub(reading, str(data))
        return _task_data(reading)
    with opened(data, reading.error, root=root) as found:
        if found.is_folder:
            _read_folder(reading, found)
        else:
            _read_file(reading, found)
    return _task_data(reading)


def _digits(reading: _Reading) -> TaskData:
    recipe = reading.recipe
    recipe.check_default_data()
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = digits.images.astype(np.uint8)[..., None]
    if reading.labelled:
        images = np.rint(images * (255 / (_DIGIT_LEVELS - 1))).astype(np.uint8)
    else:
        reading.levels = _DIGIT_LEVELS
    reading.name = "the default data"
    reading.add(images, digits.target.tolist())
    return _task_data(reading, " of scikit-learn's digits")


def _read_file(reading: _Reading, found: OpenData) -> None:
    with found.open() as stream:
        head = stream.read(8)
        stream.seek(0)
        if not head:
            raise reading.error("this file is empty")
        if found.suffix == ".bin":
            reading.check_size(found.size)
        if is_pickle(found.name, head):
            raise reading.arrays.pickled()
        if found.suffix == ".bin":
            _read_cifar(reading, [found])
        elif head.startswith(NPY):
            if reading.labelled:
                raise reading.error("an .npy file has no labels")
            _add_arrays(reading, reading.arrays.npy(stream, found.size, "array `images`"), [])
        elif head.startswith(ZIP) and found.suffix == ".npz":
            _read_npz(reading, stream)
        else:
            raise reading.error("this file is none of these")


def _read_npz(reading: _Reading, stream: IO[bytes]) -> None:
    names = ("images", "labels") if reading.labelled else ("images",)
    arrays = reading.arrays.npz(stream, names)
    labels = arrays.get("labels", np.zeros(0, np.int64))
    if reading.labelled and (
        labels.dtype.kind not in "iubU" or labels.shape != arrays["images"].shape[:1]
    ):
        raise reading.error(
            f"`labels` are one whole number or name per image, these {labels.dtype} of shape "
            f"{labels.shape} for images of shape {arrays['images'].shape}"
        )
    _add_arrays(reading, arrays["images"], labels.tolist())


def _add_arrays(
    reading: _Reading, images: NDArray[Any], labels: Sequence[Any], held: bool = False
) -> None:
    """Images (n, h, w) or (n, h, w, 1 or 3) of 0 … 255, as the recipe has them."""
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[3:] not in (
        (), (1,), (3,)
    ):  # fmt: skip
        raise reading.error(
            "`images` are uint8 of shape (n, height, width) or (n, height, width, 1 or 3), these "
            f"{images.dtype} of shape {images.shape}"
        )
    recipe = reading.recipe
    reading.check_count(len(images))
    reading.check_shape(images.shape[2], images.shape[1], "every image")
    images = images.reshape(*images.shape[:3], -1)
    if images.shape[1:] != (recipe.side, recipe.side, recipe.channels):
        from PIL import Image

        images = images[..., 0] if images.shape[3] == 1 else images
        images = np.stack([_fitted(Image.fromarray(i), recipe) for i in images])
    reading.add(images, labels, held)


def _fitted(image: Image.Image, recipe: Recipe) -> _Images:
    """(side, side, channels) of an image that is no smaller."""
    from PIL import Image

    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise _Unusable("of other values")
    image = image.convert("L" if recipe.channels == 1 else "RGB")
    (width, height), side = image.size, recipe.side
    square = min(width, height)
    left, top = (width - square) // 2, (height - square) // 2
    image = image.crop((left, top, left + square, top + square))
    pixels = np.array(image, dtype=np.uint8).reshape(square, square, recipe.channels)
    return pixels if square == side else _averaged(pixels, side)


def _averaged(pixels: _Images, side: int) -> _Images:
    """Means over equal areas, rounded half up: (square, square, channels) → (side, side, …)."""
    square = len(pixels)
    shares = _shares(square, side)
    rows = (shares @ pixels.reshape(square, -1)).reshape(side, square, -1)
    means: _Images = ((shares @ rows + square**2 / 2) // square**2).astype(np.uint8)
    return means


@lru_cache(maxsize=64)
def _shares(square: int, side: int) -> NDArray[np.float64]:
    """How much of each pixel of a row lies in each of `side` parts: (side, square).

    The whole row is square · side long, a pixel `side` and a part `square`: all numbers are whole,
    and sums of them exact.
    """
    pixel, part = np.arange(square) * side, np.arange(side)[:, None] * square
    overlap = np.minimum(pixel + side, part + square) - np.maximum(pixel, part)
    shares: NDArray[np.float64] = np.maximum(overlap, 0).astype(np.float64)
    return shares


def _decoded(reading: _Reading, source: IO[bytes], what: str) -> _Images | None:
    """An image as the recipe has it; counted and None if it cannot be decoded."""
    from PIL import Image

    try:
        with Image.open(source, formats=_FORMATS) as image:
            reading.check_shape(*image.size, what)
            reading.check_pixels(math.prod(image.size))
            return _fitted(image, reading.recipe)
    except InvalidInput:
        raise
    except _Unusable as error:
        reading.left_out[str(error)] += 1
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        reading.left_out["too large"] += 1
    except Exception:  # decoders raise nearly everything
        reading.left_out["unreadable"] += 1
    return None


def _read_images(reading: _Reading, sources: Iterator[tuple[Any, str, Any, bool]]) -> None:
    """Sources are what Pillow opens, what errors call it, a label, whether for validation."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd but readable files
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for source, what, label, held in sources:
            image = _decoded(reading, source, what)
            if image is not None:
                reading.add(image[None], [label] if reading.labelled else [], held)


def _read_folder(reading: _Reading, folder: OpenData) -> None:
    files = list(folder.files())
    images = [f for f in files if f.suffix in _SUFFIXES]
    records = [f for f in files if f.suffix == ".bin" and len(f.parts) == 1]
    if records and not images:
        return _read_cifar(reading, records)
    if not images:
        for file in files:
            with file.open() as stream:
                if is_pickle(file.name, stream.read(2)):
                    raise reading.arrays.pickled()
        raise reading.error(f"none of the {len(files):,} files of this folder is an image")
    reading.check_count(len(images))
    reading.left_out["no image"] = len(files) - len(images)
    tops = {f.parts[0] for f in images}
    held = next((v for v in _VALIDATION_FOLDERS if {"train", v} <= tops), None)

    def sources() -> Iterator[tuple[Any, str, Any, bool]]:
        for file in images:
            parts = file.parts
            if held and parts[0] not in ("train", held):
                reading.left_out[f"beside train and {held}"] += 1
            elif reading.labelled and len(parts) < (3 if held else 2):
                reading.left_out["without a class"] += 1
            elif file.size > _MAX_FILE:
                reading.left_out["too large"] += 1
            else:
                label = parts[1 if held else 0] if reading.labelled else None
                try:
                    stream = file.open()
                except OSError:
                    reading.left_out["unreadable"] += 1
                    continue
                with stream:
                    yield stream, "/".join(parts), label, bool(held) and parts[0] == held

    reading.most_pixels = _MAX_PIXELS if folder.from_network else math.inf
    return _read_images(reading, sources())


def _read_cifar(reading: _Reading, files: Sequence[DataFile | OpenData]) -> None:
    reading.check_size(sum(file.size for file in files))
    pixels = math.prod(_CIFAR_SHAPE)
    for file in files:
        name, size = file.name, file.size
        limits = (20, 100) if name.lower() in _CIFAR_100 else (10,)
        record = len(limits) + pixels
        if size % record or not size:
            raise reading.error(
                f"{name} is {'truncated' if size else 'empty'}: its {size:,} bytes are no multiple "
                f"of a record of {record:,} bytes"
            )
        held = len(files) > 1 and name.lower().startswith("test")
        with file.open() as stream:
            for start in range(0, size // record, _CIFAR_PIECE):
                wanted = min(size - start * record, _CIFAR_PIECE * record)
                piece = np.frombuffer(stream.read(wanted), np.uint8).reshape(-1, record)
                labels = piece[:, : len(limits)]
                if (wrong := (labels >= limits).any(axis=1)).any():
                    at = int(wrong.argmax())
                    raise reading.error(
                        f"record {start + at + 1:,} of {name} has the label "
                        f"{labels[at].max()}; labels are below {limits[-1]}"
                    )
                images = piece[:, len(limits) :].reshape(-1, *_CIFAR_SHAPE).transpose(0, 2, 3, 1)
                _add_arrays(reading, images, labels[:, -1].tolist(), held)


def _read_hub(reading: _Reading, spec: str) -> None:
    from nas.tasks.hub import hub_images

    images, found = hub_images(spec)
    if reading.labelled and not found:
        raise reading.error("this dataset has no column of labels")
    reading.check_count(len(images))
    labels: Sequence[Any] = found or [None] * len(images)

    def encoded() -> Iterator[tuple[Any, str, Any, bool]]:
        for row, (image, label) in enumerate(zip(images, labels, strict=True)):
            if isinstance(image, bytes):
                yield io.BytesIO(image), f"row {row}", label, False
            else:
                _add_arrays(reading, image[None], [label])

    _read_images(reading, encoded())


def _task_data(reading: _Reading, source: str = "") -> TaskData:
    """What has been read, split, in an order that the images alone decide."""
    recipe = reading.recipe
    left_out = reading.left_out
    if not reading.pieces:
        raise reading.error(f"no image is usable{_counted(left_out)}")
    images = np.concatenate([p for p, _, _ in reading.pieces])
    flags = [held for p, _, held in reading.pieces for _ in p]
    names, labels = np.zeros(0), np.zeros(len(images), dtype=np.int64)
    if reading.labelled:
        names, labels = np.unique([n for _, p, _ in reading.pieces for n in p], return_inverse=True)
    elif recipe.vocabulary < reading.levels:
        levels = np.arange(reading.levels) * recipe.vocabulary // reading.levels
        images = levels.astype(np.uint8)[images]
    reading.pieces.clear()
    digests = [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in images]
    order = sorted(range(len(images)), key=lambda i: (digests[i], labels[i]))
    if any(flags) and not all(flags):
        train = [i for i in order if not flags[i]]
        known = {digests[i] for i in train}
        others = [i for i in order if flags[i] and digests[i] not in known]
        validation = others[: recipe.validation_samples]
        left_out["equal to a training image"] = sum(flags) - len(others)
        left_out["validation images beyond the recipe's"] = len(others) - len(validation)
    else:
        train, validation = _split(order, digests, labels, recipe.validation_samples)
    counts = f"{len(train):,} for training, {len(validation):,} for validation{_counted(left_out)}"
    least = recipe.min_validation_samples
    if min(len(train), len(validation)) < least:
        raise reading.error(
            f"at least {least} images for training and {least} for validation, without a split of "
            f"its own {math.ceil(least / VALIDATION_SHARE)} that differ; this has {counts}"
        )
    shape = f"{recipe.side}×{recipe.side}" + (f"×{recipe.channels}" if recipe.channels > 1 else "")
    if reading.labelled:
        present = set(labels[train].tolist())
        if absent := [str(name) for i, name in enumerate(names) if i not in present]:
            raise reading.error(f"no training image has the class {', '.join(absent[:5])}")
        if len(names) < 2:
            raise reading.error(f"at least 2 classes; every image has the class {names[0]}")
        recipe = replace(recipe, classes=len(names))
        shape += f", {len(names)} classes"

    def arrays(part: list[int]) -> Arrays:
        labelled = {"labels": labels[part].astype(np.int64)} if reading.labelled else {}
        return {"images": images[part], **labelled}

    splits = arrays(train), arrays(validation)
    total = len(train) + len(validation)
    summary = f"{total:,} images{source}, {shape}: {counts}"
    return TaskData(recipe, *splits, content_digest(recipe.task, *splits), summary)


def _counted(left_out: Counter[str]) -> str:
    kinds = ", ".join(f"{n:,} {kind}" for kind, n in sorted(left_out.items()) if n)
    return f"; {left_out.total():,} files or images left out ({kinds})" if kinds else ""


def _split(
    order: list[int], digests: list[bytes], labels: NDArray[np.int64], most: int
) -> tuple[list[int], list[int]]:
    """Training and validation; equal images on one side, every class in training."""
    wanted = min(most, int(VALIDATION_SHARE * len(order)))
    rest = Counter(labels.tolist())
    train: list[int] = []
    held: list[int] = []
    for _, equal in groupby(order, key=digests.__getitem__):
        group = list(equal)
        takes = Counter(labels[group].tolist())
        if len(held) + len(group) <= wanted and all(rest[k] > n for k, n in takes.items()):
            held += group
            rest -= takes
        else:
            train += group
    return train, held
