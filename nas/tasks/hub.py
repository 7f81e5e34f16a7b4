"""Data that the optional `datasets` library reads: local tables, or datasets of the hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nas.errors import InvalidInput
from nas.tasks.data import HUB_PREFIX, MAX_BYTES

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

Row = dict[str, Any]


def hub_texts(spec: str) -> list[bytes]:
    """Every text of a dataset's column `text` or `content`, or of its only column, as UTF-8.

    Raises
    ------
    InvalidInput
        The library or the dataset is missing, or it has no such column.
    """
    texts: list[bytes] = []
    size = 0
    for row in _rows(spec):
        column = _column(spec, row, _TEXT_COLUMNS)
        text = row[column]
        if not isinstance(text, str | None):
            raise _error(spec, f"column {column} of row {len(texts)} is no text")
        texts.append((text or "").encode("utf-8", "replace"))
        size = _added(spec, size, len(texts[-1]))
    return texts


def hub_images(spec: str) -> tuple[list[bytes | NDArray[np.uint8]], list[int | str]]:
    """Images, encoded or uint8 arrays, and their labels; no labels where none has one.

    Raises
    ------
    InvalidInput
        The library or the dataset is missing, or it has no images.
    """
    images: list[bytes | NDArray[np.uint8]] = []
    labels: list[int | str] = []
    size = 0
    for row in _rows(spec):
        column = _column(spec, row, _IMAGE_COLUMNS)
        image = row[column]
        if isinstance(image, dict):  # a path in it is never opened: it may lead anywhere
            image = image.get("bytes")
        if not isinstance(image, bytes):
            image = _array(image)
        if image is None:
            raise _error(spec, f"column {column} of row {len(images)} is no image")
        label_column = next((c for c in _LABEL_COLUMNS if c in row), None)
        if label_column is not None:
            label = row[label_column]
            if not isinstance(label, int | str) or label in (-1, ""):
                raise _error(spec, f"row {len(images)} has no label in column {label_column}")
            labels.append(label)
        images.append(image)
        size = _added(spec, size, image.nbytes if isinstance(image, np.ndarray) else len(image))
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


def _error(spec: str, what: str) -> InvalidInput:
    return InvalidInput("data", spec, f"{_ACCEPTED}; {what}")


def _added(spec: str, size: int, more: int) -> int:
    if size + more > MAX_BYTES:
        raise _error(spec, f"at most {MAX_BYTES:,} bytes")
    return size + more


def _column(spec: str, row: Row, names: tuple[str, ...]) -> str:
    if found := next((n for n in names if n in row), None):
        return found
    if len(row) == 1:
        return next(iter(row))
    raise _error(spec, f"a column {' or '.join(names)}; this has {', '.join(row)}")


def _rows(spec: str) -> Iterator[Row]:
    """The rows of one split; local data is not copied to the library's cache."""
    try:
        import datasets
    except ImportError as error:
        raise _error(spec, "this needs pip install 'einsum-nas[data]'") from error
    name, _, part = spec.removeprefix(HUB_PREFIX).partition(":")
    configuration, _, split = part.rpartition("/")
    if not name:
        raise _error(spec, "this names no dataset")
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # else local files are counted online, too
    try:
        path = Path(name)
        local = path.exists()
        source = str(path.resolve()) if local else name
        if path.is_file():
            if (kind := _BUILDERS.get(path.suffix.lower())) is None:
                raise _error(spec, "this file is none of these")
            builder = datasets.load_dataset_builder(kind, data_files=source)
        else:
            builder = datasets.load_dataset_builder(source, configuration or None)
        reader = type(builder).__module__.rpartition(".")[2]
        if reader not in _BUILDERS.values():
            raise _error(spec, f"this dataset is read by {reader!r}")
        if not local:
            _added(spec, 0, builder.info.dataset_size or 0)
            builder.download_and_prepare()
        found = builder.as_streaming_dataset() if local else builder.as_dataset()
        split = split or ("train" if "train" in found or len(found) != 1 else next(iter(found)))
        if split not in found:
            raise _error(spec, f"this dataset has the splits {', '.join(map(str, found))}")
        rows = found[split]
        for column, feature in (rows.features or {}).items():
            if isinstance(feature, datasets.Image):
                rows = rows.cast_column(column, datasets.Image(decode=False))
        yield from rows
    except InvalidInput:
        raise
    except Exception as error:  # the library's own, pyarrow's, pandas', the network's
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise _error(spec, reason) from error
