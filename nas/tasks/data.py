"""What every task's data looks like once it is loaded.  Torch-free."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nas.errors import InvalidInput
from nas.planning.recipe import Recipe

#: Data that the `datasets` library reads is named with this before it.
HUB_PREFIX = "hf:"
#: Largest data that is read, bytes: of text, of a table, of encoded or of decoded images.
MAX_BYTES = 1 << 31

_PICKLES = frozenset({".pkl", ".pickle", ".pt", ".pth"})

#: The error of a loader, made from what is wrong.
Refusal = Callable[[str], InvalidInput]
#: The arrays of a split by name.
Arrays = Mapping[str, NDArray[np.generic]]


def hub_parts(spec: str) -> tuple[str, str]:
    """Name of a dataset, and what follows its colon; a path that is there may have colons, too."""
    whole = spec.removeprefix(HUB_PREFIX)
    at = len(whole)
    while at > 0:
        if is_there(whole[:at]):
            return whole[:at], whole[at + 1 :]
        at = whole.rfind(":", 0, at)
    name, _, part = whole.partition(":")
    return name, part


def is_there(path: str) -> bool:
    """Whether a path exists; False for names that no file can have."""
    return os.path.exists(path)  # noqa: PTH110 (Path.exists raises for a long name)


class LoadingStopped(Exception):
    """The data is no longer wanted."""


@dataclass
class Reading:
    """What errors call the data that is read, and say that is accepted."""

    name: str
    accepted: str
    #: what its bytes are of, where they are not those of a file
    of: str = field(default="", kw_only=True)
    #: how much was passed over, by kind
    left_out: Counter[str] = field(default_factory=Counter, kw_only=True)

    def error(self, what: str) -> InvalidInput:
        """The error that says what is wrong."""
        return InvalidInput("data", self.name, f"{self.accepted}; {what}")

    def pickled(self) -> InvalidInput:
        return self.error("this is a pickle, which is never unpickled")

    def check_size(self, size: int) -> None:
        """Raise `InvalidInput` for more bytes than are read."""
        if size > MAX_BYTES:
            raise self.error(f"at most {MAX_BYTES:,} bytes{self.of}")

    def kinds_left_out(self) -> str:
        """What was left out, in brackets; or nothing."""
        kinds = ", ".join(f"{n:,} {kind}" for kind, n in sorted(self.left_out.items()) if n)
        return f" ({kinds})" if kinds else ""


@dataclass(frozen=True)
class TaskData:
    """Data of one task, split into training and validation.

    The arrays of a split, by task; n is its number of samples:

    - text: ``tokens`` (characters,) or (tokens,), uint8 or uint16
    - pixels: ``images`` (n, side, side, channels) uint8, values below the recipe's vocabulary
    - images: ``images`` (n, side, side, channels) uint8 and ``labels`` (n,) int64
    - regression: ``inputs`` (n, features) and ``targets`` (n,) float32, targets of mean 0 and
      variance 1 over the training split
    """

    #: the recipe as this data completes it: its number of classes or features
    recipe: Recipe
    train: Arrays
    validation: Arrays
    #: digest of the content, 64 bits in hex
    content: str
    #: what was read and what was left out, for people
    summary: str

    @property
    def fingerprint(self) -> str:
        """Equal for equal data under equal recipes: runs are comparable; 64 bits in hex."""
        return task_fingerprint(self.recipe, self.content)


def task_fingerprint(recipe: Recipe, content: str) -> str:
    """Digest of a task: recipe and data."""
    text = json.dumps([recipe.as_dict(), content], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def content_digest(label: str, *splits: Arrays) -> str:
    """Digest of arrays with their names, shapes and dtypes; 64 bits in hex."""
    digest = hashlib.sha256(label.encode())
    for split in splits:
        for name, array in sorted(split.items()):
            digest.update(f"/{name}/{array.shape}/{array.dtype.str}/".encode())
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:16]


def is_pickle(name: str, head: bytes) -> bool:
    """Whether a file is a pickle by its name or by how it begins: with protocol 2 or later.

    No other data that is read begins with this byte: it is neither ASCII nor UTF-8, and above
    every label of CIFAR's.
    """
    return Path(name).suffix.lower() in _PICKLES or head.startswith(b"\x80")
