"""Data that the optional `datasets` library reads: local tables, or datasets of the hub."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nas.errors import InvalidInput, echo
from nas.tasks.data import HUB_PREFIX, MAX_BYTES, Reading, hub_parts, is_there
from nas.tasks.table import separated, text_rows

#: End of a local file → what reads it.  None of these readers unpickles; others of the library do.
_BUILDERS = {
    ".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json", ".ndjson": "json",
    ".txt": "text", ".arrow": "arrow",
}  # fmt: skip
_TEXT_COLUMNS = ("text", "content")
_IMAGE_COLUMNS = ("image", "img", "images", "pixels")
_LABEL_COLUMNS = ("label", "fine_label", "labels", "class")
_ACCEPTED = (
    f"{HUB_PREFIX}NAME, {HUB_PREFIX}NAME:SPLIT or {HUB_PREFIX}NAME:CONFIGURATION/SPLIT, NAME a "
    f"dataset of the hub, a folder or a file ({', '.join(_BUILDERS)})"
)

#: How files that are not here are read: texts as a whole, and no cell as a missing value.
_OPTIONS: dict[str, dict[str, object]] = {
    "text": {"sample_by": "document"},
    "csv": {"keep_default_na": False},
}

Row = dict[str, Any]


class _File(Row):
    """A row that is a whole file of text."""


@dataclass(frozen=True)
class HubTexts:
    """Texts of a dataset in its order, as UTF-8."""

    texts: list[bytes]
    #: name of their column
    column: str
    #: whether each is a whole file, not a row
    whole: bool


def local_text(spec: str) -> Path | None:
    """The file that a name means if that is a text file, which no library has to read."""
    name, split = hub_parts(spec)
    path = Path(name)
    is_text = path.suffix.lower() == ".txt" and split in ("", "train") and is_there(name)
    return path if is_text and path.is_file() else None


def hub_texts(spec: str) -> HubTexts:
    """Every text of a dataset's column `text` or `content`, or of its only column.

    Raises
    ------
    InvalidInput
        The library or the dataset is missing, or it has no such column.
    """
    reading = Reading(spec, _ACCEPTED)
    texts: list[bytes] = []
    size, column, whole = 0, "", False
    for row in _rows(reading):
        whole = isinstance(row, _File)
        column = _column(reading, row, _TEXT_COLUMNS)
        text = row[column]
        if isinstance(text, str | None):
            text = (text or "").encode("utf-8", "replace")
        elif not isinstance(text, bytes):
            raise reading.error(f"column {echo(column)} of row {len(texts)} is no text")
        texts.append(text)
        size += len(text)
        reading.check_size(size)
    return HubTexts(texts, column, whole)


def hub_images(spec: str) -> tuple[list[bytes | NDArray[np.uint8]], list[int | str]]:
    """Images, encoded or uint8 arrays, and their labels; no labels where none has one.

    Raises
    ------
    InvalidInput
        The library or the dataset is missing, or it has no images.
    """
    reading = Reading(spec, _ACCEPTED)
    images: list[bytes | NDArray[np.uint8]] = []
    labels: list[int | str] = []
    size = 0
    for row in _rows(reading):
        column = _column(reading, row, _IMAGE_COLUMNS)
        image = row[column]
        if isinstance(image, dict):  # a path in it is never opened: it may lead anywhere
            image = image.get("bytes")
        if not isinstance(image, bytes):
            image = _array(image)
        if image is None:
            raise reading.error(f"column {column} of row {len(images)} is no image")
        label_column = next((c for c in _LABEL_COLUMNS if c in row), None)
        if label_column is not None:
            label = row[label_column]
            if not isinstance(label, int | str) or label in (-1, ""):
                raise reading.error(f"row {len(images)} has no label in column {label_column}")
            labels.append(label)
        images.append(image)
        size += image.nbytes if isinstance(image, np.ndarray) else len(image)
        reading.check_size(size)
    return images, labels


def _array(value: Any) -> NDArray[np.uint8] | None:
    """Nested lists of whole numbers 0 … 255 as an image."""
    try:
        wide = np.asarray(value)
    except ValueError:
        return None
    if wide.dtype.kind not in "iu" or wide.ndim not in (2, 3) or not wide.size:
        return None
    return wide.astype(np.uint8) if wide.min() >= 0 and wide.max() <= 255 else None


def _column(reading: Reading, row: Row, names: tuple[str, ...]) -> str:
    if found := next((n for n in names if n in row), None):
        return found
    if len(row) == 1 and not separated([*row]):
        return next(iter(row))
    raise reading.error(f"a column {' or '.join(names)}; this has {', '.join(row)}")


def _rows(reading: Reading) -> Iterator[Row]:
    """The rows of one split; local data is not copied to the library's cache."""
    try:
        import datasets
    except ImportError as error:
        raise reading.error("this needs pip install 'einsum-nas[data]'") from error
    name, part = hub_parts(reading.name)
    configuration, _, split = part.rpartition("/")
    if not name:
        raise reading.error("this names no dataset")
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # else local files are counted online, too
    with TemporaryDirectory() as folder:
        try:
            path = Path(name)
            local = is_there(name)
            kind = None
            if path.is_file() and (kind := _BUILDERS.get(path.suffix.lower())) is None:
                raise reading.error("this file is none of these")
            if local:
                name = _plainly_named(path.resolve(), Path(folder))
            yield from _rows_of(reading, name, kind, configuration, split, local)
        except InvalidInput:
            raise
        except Exception as error:  # the library's own, pyarrow's, pandas', the network's
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise reading.error(reason) from error


def _plainly_named(path: Path, folder: Path) -> str:
    """The same data by links in a new folder, for the library takes names for patterns."""
    if path.is_file():
        link = folder / f"data{path.suffix.lower()}"
        link.symlink_to(path)
        return str(link)
    for inside, _, files in os.walk(path):
        here = folder / Path(inside).relative_to(path)
        here.mkdir(exist_ok=True)
        for file in files:
            (here / file).symlink_to(Path(inside, file))
    return str(folder)


def _rows_of(
    reading: Reading, source: str, kind: str | None, configuration: str, split: str, local: bool
) -> Iterator[Row]:
    import datasets

    def builder_for(**options: object) -> Any:
        if kind:
            return datasets.load_dataset_builder(kind, data_files=source, **options)
        return datasets.load_dataset_builder(source, configuration or None, **options)

    builder = builder_for()
    reader = type(builder).__module__.rpartition(".")[2]
    if reader not in _BUILDERS.values():
        raise reading.error(f"this dataset is read by {reader!r}")
    files = builder.config.data_files if local and reader in ("csv", "text") else None
    if files is not None:
        for file in files[_split_of(reading, split, files)]:
            with Path(file).open("rb") as stream:
                if reader == "text":
                    yield _File(text=stream.read(MAX_BYTES + 1))
                else:
                    yield from text_rows(stream, reading.error)
        return
    if reader in _OPTIONS:
        builder = builder_for(**_OPTIONS[reader])
    if not local:
        reading.check_size(builder.info.dataset_size or 0)
        builder.download_and_prepare()
    found = builder.as_streaming_dataset() if local else builder.as_dataset()
    rows = found[_split_of(reading, split, found)]
    for column, feature in (rows.features or {}).items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(column, datasets.Image(decode=False))
    for row in rows:
        yield _File(row) if reader == "text" else row


def _split_of(reading: Reading, split: str, found: Mapping[str, Any]) -> str:
    split = split or ("train" if "train" in found or len(found) != 1 else next(iter(found)))
    if split not in found:
        raise reading.error(f"this dataset has the splits {', '.join(map(str, found))}")
    return split
