"""Text corpora of the `text` task: which files, which characters, which split. Torch-free."""

from __future__ import annotations

import hashlib
import os
import stat
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nas.errors import InvalidInput

#: The 96 characters: printable ASCII and newline.
ALPHABET = bytes(range(32, 127)) + b"\n"
#: Share of the characters held out for validation, at least.
VALIDATION_SHARE = 0.05
_TOKEN_OF_BYTE = np.zeros(256, dtype=np.uint8)
_TOKEN_OF_BYTE[np.frombuffer(ALPHABET, dtype=np.uint8)] = np.arange(len(ALPHABET))
_SKIPPED_FOLDERS = frozenset({"__pycache__", "site-packages", "dist-packages", ".git"})
#: Largest corpus that is read, characters.
MAX_CHARACTERS = 1 << 31


@dataclass(frozen=True)
class Corpus:
    """Characters as tokens 0 … 95, split by file."""

    train: NDArray[np.uint8]
    validation: NDArray[np.uint8]
    files: int
    #: files with other characters, unreadable or empty, which were not used
    files_left_out: int

    @property
    def characters(self) -> int:
        return len(self.train) + len(self.validation)

    @property
    def fingerprint(self) -> str:
        """Equal for equal characters in an equal split; 64 bits in hex."""
        digest = hashlib.sha256(b"text/96/")
        for part in (self.train, self.validation):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part.tobytes())
        return digest.hexdigest()[:16]


def default_folder() -> Path:
    """The running Python's own standard library."""
    return Path(sysconfig.get_path("stdlib"))


def load_corpus(data: str | os.PathLike[str] | None, least_characters: int) -> Corpus:
    """Read a file, a folder, or by default the standard library's `.py` files.

    Files that are not made solely of the 96 characters are left out and counted.  Whole files go
    to validation, chosen by the digest of their content, until they hold 5% of the characters; a
    corpus of one file gives its last 5%.

    Parameters
    ----------
    least_characters
        Characters that training and validation need each.

    Raises
    ------
    InvalidInput
        The path does not exist, is not a regular file or folder, or too little text is left.
    """
    path = default_folder() if data is None else Path(data)
    suffix = ".py" if data is None else ""
    accepted = "a text file or a folder of text files made of printable ASCII and newline"
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else str(error)
        raise InvalidInput("data", data, f"{accepted}; this path: {reason}") from error
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise InvalidInput("data", data, f"{accepted}; this is neither a regular file nor a folder")
    texts: list[bytes] = []
    left_out = characters = 0
    for file in _files(path, suffix):
        try:
            text = file.read_bytes()
        except OSError:
            text = b""
        if not text or text.translate(None, ALPHABET):
            left_out += 1
            continue
        texts.append(text)
        characters += len(text)
        if characters > MAX_CHARACTERS:
            raise InvalidInput("data", data, f"at most {MAX_CHARACTERS} characters")
    corpus = _split(texts, left_out)
    short = min(len(corpus.train), len(corpus.validation))
    if short < least_characters:
        raise InvalidInput(
            "data",
            path if data is None else data,
            f"{accepted}; of this, {corpus.files} files with {corpus.characters} characters are "
            f"usable and {left_out} files were left out (empty, unreadable or with other "
            f"characters); training and validation need {least_characters} characters each",
        )
    return corpus


def _files(path: Path, suffix: str) -> Iterator[Path]:
    """Regular files in a fixed order; links are not followed inside a folder."""
    if path.is_file():
        yield path
        return
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(f for f in folders if f not in _SKIPPED_FOLDERS)
        for name in sorted(names):
            file = Path(folder, name)
            if name.endswith(suffix) and stat.S_ISREG(file.lstat().st_mode):
                yield file


def _split(texts: list[bytes], left_out: int) -> Corpus:
    texts = sorted(texts, key=lambda t: (hashlib.sha256(t).digest(), t))
    total = sum(map(len, texts))
    wanted = VALIDATION_SHARE * total
    if len(texts) == 1:
        cut = total - int(wanted)
        held, kept = [texts[0][cut:]], [texts[0][:cut]]
    else:
        held, kept = [], []
        for text in texts:
            room = sum(map(len, held)) < wanted and len(held) < len(texts) - 1
            (held if room else kept).append(text)
    return Corpus(_tokens(kept), _tokens(held), len(texts), left_out)


def _tokens(texts: list[bytes]) -> NDArray[np.uint8]:
    return _TOKEN_OF_BYTE[np.frombuffer(b"".join(texts), dtype=np.uint8)]
