"""Data of the tasks `pixels` and `images`: which images, their pixels, which split.  Torch-free."""

from __future__ import annotations

import hashlib
import io
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nas.errors import InvalidInput
from nas.planning.recipe import ClassesRecipe, ImageRecipe, PixelsRecipe, with_overrides
from nas.tasks.arrays import NPY, ZIP, read_npy, read_npz
from nas.tasks.data import (
    HUB_PREFIX,
    Arrays,
    Reading,
    TaskData,
    content_digest,
    is_pickle,
)
from nas.tasks.folders import folders_of_split, listed
from nas.tasks.opening import DataFile, OpenData, opened
from nas.tasks.scaling import Pixels, fitted

if TYPE_CHECKING:
    from PIL import Image
    from PIL.ImageFile import ImageFile

#: Share of the images held out for validation where the data has no split of its own, at most.
VALIDATION_SHARE = 0.2
#: Largest image file of a folder, bytes.
_MAX_FILE = 1 << 28
#: Pixels of all images of a folder that was named over the network, before they are scaled down.
_MAX_PIXELS = 1 << 32
#: Bits that cameras and scanners give a grey value, of those that a 16-bit file can hold.
_DEPTHS = (8, 10, 12, 14, 16)
_PHOTOMETRIC = 262  # tag of a TIFF
#: How Pillow calls channels of 16 bits of which it keeps the upper byte.
_WIDE = re.compile(r";16[BLN]")
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


class _Unusable(Exception):
    """Why an image is left out: the kind under which it is counted."""


@dataclass(frozen=True)
class _Source:
    """Where an image comes from, what errors call it, its label, whether it is for validation."""

    open: Callable[[], IO[bytes]]
    name: str
    label: Any = None
    held: bool = False


@dataclass
class _Reading(Reading):
    """How images are read, and what has been read of them."""

    recipe: ImageRecipe
    #: images (n, side, side, channels), their labels, whether they are validation data
    pieces: list[tuple[Pixels, Sequence[Any], bool]] = field(default_factory=list)
    #: values that a pixel of the source may have
    levels: int = 256
    #: pixels that may still be decoded
    most_pixels: float = math.inf
    #: largest value of 16 bits in an image of one channel, in those of several (its upper byte)
    largest: int = -1
    largest_colour: int = -1
    #: by how many bits values of 16 bits are shifted; None before `largest` is known
    shift: int | None = None

    @property
    def labelled(self) -> bool:
        return isinstance(self.recipe, ClassesRecipe)

    def check_count(self, count: int) -> None:
        self.check_size(count * self.recipe.values)

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

    def shown_left_out(self) -> str:
        """What was left out, for the end of a message; or nothing."""
        kinds = self.kinds_left_out()
        return kinds and f"; {self.left_out.total():,} files or images left out{kinds}"

    def add(self, images: Pixels, labels: Sequence[Any], held: bool = False) -> None:
        self.pieces.append((images, labels, held))


def load_images(
    recipe: ImageRecipe,
    data: str | os.PathLike[str] | None,
    *,
    shown: str | None = None,
    root: str | os.PathLike[str] | None = None,
) -> TaskData:
    """Read a folder of images, CIFAR's binary files, arrays, ``hf:…``, or by default the digits.

    The default, scikit-learn's 1,797 handwritten digits, suits recipes of 8×8 grey images.  Else:

    - ``folder/class/*.png`` and other formats; for `pixels` in any sub-folders or none.  Beside a
      sub-folder ``train``, one named ``validation``, ``val``, ``dev`` or ``test`` is the validation
      data (`nas.tasks.folders` has all names); with ``train`` alone, its sub-folders are the
      classes.  Left out and counted are links, hidden and system folders, and files that cannot
      be decoded or are larger than Pillow's limit.
    - CIFAR-10's and CIFAR-100's ``*.bin``, of which ``test*`` is the validation data.
    - an ``.npz`` with ``images`` (n, h, w) or (n, h, w, 1 or 3), uint8, and ``labels`` (n,); for
      `pixels` also an ``.npy`` of images.

    Task `images` takes images of exactly side×side pixels.  Task `pixels` cuts the largest square
    out of the middle, averages it down to side×side and, where the recipe's vocabulary V is smaller
    than the number of levels L, maps a value to ``value * V // L``.  One channel is the luminance,
    three repeat a grey one; transparency is dropped, and of an animation the first frame is taken.
    An image is turned as its EXIF orientation says.  Grey values of 16-bit files are of as many
    bits (8, 10, 12, 14 or 16) as the largest of all images needs, and scaled to 8.

    Without a split of its own, a fifth of the data, at most `recipe.validation_samples`, is held
    out: which, depends on the images' pixels alone, and equal images stay on one side.  With one,
    validation images that equal a training image, and those beyond `recipe.validation_samples`,
    are left out and counted.

    Parameters are as of `load_data`.

    Raises
    ------
    InvalidInput
        The data does not exist, is a pickle or otherwise none of these, is too large, has images
        of another size, or too few images or classes.
    """
    folder, arrays = "a folder of images", "an .npz file with `images`, an .npy file"
    if isinstance(recipe, ClassesRecipe):
        folder += " with a sub-folder for each class"
        arrays = "an .npz file with `images` and `labels`"
    accepted = f"{folder}, CIFAR's .bin files, {arrays}, or {HUB_PREFIX}NAME"
    reading = _Reading(shown or str(data), accepted, recipe, of=" of decoded images")
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
            raise reading.pickled()
        if found.suffix == ".bin":
            _read_cifar(reading, [found])
        elif head.startswith(NPY):
            if reading.labelled:
                raise reading.error("an .npy file has no labels")
            _add_arrays(reading, read_npy(reading, stream, found.size, "array `images`"), [])
        elif head.startswith(ZIP) and found.suffix == ".npz":
            _read_npz(reading, stream)
        else:
            raise reading.error("this file is none of these")


def _read_npz(reading: _Reading, stream: IO[bytes]) -> None:
    names = ("images", "labels") if reading.labelled else ("images",)
    arrays = read_npz(reading, stream, names)
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
        images = np.stack([fitted(Image.fromarray(i), recipe) for i in images])
    reading.add(images, labels, held)


def _decoded(reading: _Reading, file: ImageFile, name: str) -> Pixels | None:
    """An opened image as the recipe has it; None if it has to wait for `reading.shift`."""
    from PIL import Image, ImageOps

    wide = _WIDE.search(str(file.tile))  # before Pillow reduces several channels of 16 bits to 8
    reading.check_shape(*file.size, name)
    if reading.shift is None:
        reading.check_pixels(math.prod(file.size))
    file.load()
    with suppress(Exception):  # a broken note about the orientation says nothing about it
        ImageOps.exif_transpose(file, in_place=True)
    image: Image.Image = file
    if image.mode.startswith("I;16"):
        if getattr(file, "tag_v2", {}).get(_PHOTOMETRIC) == 0:
            raise _Unusable("of other values")  # 0 is white: Pillow leaves them so
        values = np.asarray(image)
        if reading.shift is None:
            reading.largest = max(reading.largest, int(values.max()))
            return None
        image = Image.fromarray(np.minimum(values >> reading.shift, 255).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise _Unusable("of other values")
    elif wide:
        largest = int(np.asarray(image.convert("RGB")).max())
        reading.largest_colour = max(reading.largest_colour, largest)
    return fitted(image, reading.recipe)


def _read_images(reading: _Reading, sources: Sequence[_Source]) -> None:
    from PIL import Image

    waiting = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd but readable files
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for source in sources:
            try:
                with source.open() as stream, Image.open(stream, formats=_FORMATS) as image:
                    pixels = _decoded(reading, image, source.name)
            except InvalidInput:
                raise
            except _Unusable as error:
                reading.left_out[str(error)] += 1
            except (Image.DecompressionBombError, Image.DecompressionBombWarning):
                reading.left_out["too large"] += 1
            except Exception:  # decoders raise nearly everything
                reading.left_out["unreadable"] += 1
            else:
                if pixels is None:
                    waiting.append(source)
                else:
                    label = [source.label] if reading.labelled else []
                    reading.add(pixels[None], label, source.held)
    if reading.shift is None and max(reading.largest, reading.largest_colour) >= 0:
        reading.shift = _depth(reading) - 8
        _read_images(reading, waiting)


def _depth(reading: _Reading) -> int:
    """Bits of the values in files of 16 bits: as many as the largest of all images needs."""
    largest = max(reading.largest, reading.largest_colour << 8)
    depth = next(bits for bits in _DEPTHS if largest < 1 << bits)
    if depth < 16 and reading.largest_colour >= 0:
        raise reading.error(
            f"the colour images of 16 bits have no value above {largest | 255:,} of 65,535, so "
            "these are no values of 16 bits; scale them, and save the images with 8 bits"
        )
    return depth


def _read_folder(reading: _Reading, folder: OpenData) -> None:
    files = list(folder.files(reading.left_out))
    images = [f for f in files if f.suffix in _SUFFIXES]
    records = [f for f in files if f.suffix == ".bin" and len(f.parts) == 1]
    if records and not images:
        return _read_cifar(reading, records)
    if not images:
        for file in files:
            with file.open() as stream:
                if is_pickle(file.name, stream.read(2)):
                    raise reading.pickled()
        raise reading.error(
            f"none of the {len(files):,} files of this folder is an image{reading.shown_left_out()}"
        )
    reading.check_count(len(images))
    reading.left_out["no image"] = len(files) - len(images)
    train, held = folders_of_split([f.parts for f in images], reading.labelled, reading.error)
    both = " and ".join(map(listed, filter(None, (train, held))))
    sources = []
    for file in images:
        parts = file.parts
        if train and parts[0] not in train | held:
            reading.left_out[f"beside {both}"] += 1
        elif reading.labelled and len(parts) < (3 if train else 2):
            reading.left_out["without a class"] += 1
        elif file.size > _MAX_FILE:
            reading.left_out["too large"] += 1
        else:
            label = parts[1 if train else 0]
            sources.append(_Source(file.open, "/".join(parts), label, parts[0] in held))
    reading.most_pixels = _MAX_PIXELS if folder.from_network else math.inf
    return _read_images(reading, sources)


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

    sources = []
    for row, (image, label) in enumerate(zip(images, labels, strict=True)):
        if isinstance(image, bytes):
            sources.append(_Source(partial(io.BytesIO, image), f"row {row}", label))
        else:
            _add_arrays(reading, image[None], [label])
    _read_images(reading, sources)


def _task_data(reading: _Reading, source: str = "") -> TaskData:
    """What has been read, split, in an order that the images alone decide."""
    recipe = reading.recipe
    left_out = reading.left_out
    if not reading.pieces:
        raise reading.error(f"no image is usable{reading.shown_left_out()}")
    images = np.concatenate([p for p, _, _ in reading.pieces])
    flags = [held for p, _, held in reading.pieces for _ in p]
    names, labels = np.zeros(0), np.zeros(len(images), dtype=np.int64)
    if reading.labelled:
        names, labels = np.unique([n for _, p, _ in reading.pieces for n in p], return_inverse=True)
    elif isinstance(recipe, PixelsRecipe) and recipe.vocabulary < reading.levels:
        levels = np.arange(reading.levels) * recipe.vocabulary // reading.levels
        images = levels.astype(np.uint8)[images]
    reading.pieces.clear()
    digests = [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in images]
    order = sorted(range(len(images)), key=lambda i: (digests[i], labels[i]))
    own = any(flags) and not all(flags)
    if own:
        train = [i for i in order if not flags[i]]
        known = {digests[i] for i in train}
        others = [i for i in order if flags[i] and digests[i] not in known]
        validation = others[: recipe.validation_samples]
        left_out["equal to a training image"] = sum(flags) - len(others)
        left_out["validation images beyond the recipe's"] = len(others) - len(validation)
    else:
        train, validation = _split(order, digests, labels, recipe.validation_samples)
    counts = f"{len(train):,} for training, {len(validation):,} for validation"
    if reading.shift is not None:
        counts += f"; values of 16-bit files read as of {reading.shift + 8} bits"
        counts += f" (the largest is {reading.largest:,})" if reading.largest >= 0 else ""
    counts += reading.shown_left_out()
    least = recipe.min_validation_samples
    if min(len(train), len(validation)) < least:
        needs = f"at least {least} images for training and {least} for validation"
        if own:
            raise reading.error(f"{needs}; of this, {counts}")
        cause = _why_few(digests, labels, reading.labelled)
        raise reading.error(
            f"{needs}, without a split of its own {math.ceil(least / VALIDATION_SHARE)} that "
            f"differ{cause}; this has {counts}"
        )
    shape = f"{recipe.side}×{recipe.side}" + (f"×{recipe.channels}" if recipe.channels > 1 else "")
    if reading.labelled:
        present = set(labels[train].tolist())
        if absent := [str(name) for i, name in enumerate(names) if i not in present]:
            raise reading.error(f"no training image has the class {', '.join(absent[:5])}")
        if len(names) < 2:
            raise reading.error(f"at least 2 classes; every image has the class {names[0]}")
        recipe = with_overrides(recipe, {"classes": len(names)})
        shape += f", {len(names)} classes"

    def arrays(part: list[int]) -> Arrays:
        labelled = {"labels": labels[part].astype(np.int64)} if reading.labelled else {}
        return {"images": images[part], **labelled}

    splits = arrays(train), arrays(validation)
    total = len(train) + len(validation)
    summary = f"{total:,} images{source}, {shape}: {counts}"
    return TaskData(recipe, *splits, content_digest(recipe.task, *splits), summary)


def _why_few(digests: Sequence[bytes], labels: NDArray[np.int64], labelled: bool) -> str:
    """What keeps images from being held out for validation, where it is not their number."""
    different = len(set(digests))
    if different < len(digests):
        plural = "are equal" if different == 1 else f"have {different:,} different contents"
        return (
            f"; the {len(digests):,} images {plural} (at the recipe's size, without transparency)"
        )
    _, counts = np.unique(labels, return_counts=True)
    single = int((counts == 1).sum())
    if labelled and single:
        return (
            f"; {single:,} of the {len(counts):,} classes have one image, which stays in training: "
            "a label is to be shared by several images"
        )
    return ""


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
