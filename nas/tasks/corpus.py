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
    #: files with other characters, unreadable, empty or equal to another, which were not used
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


def load_corpus(
    data: str | os.PathLike[str] | None, least_characters: int, *, shown: str | None = None
) -> Corpus:
    """Read a file, a folder, or by default the standard library's `.py` files.

    Files that are not made solely of the 96 characters are left out and counted, and of equal
    files all but one.  Whole files go to validation, chosen by the digest of their content, until
    they hold 5% of the characters; where no choice of whole files holds between 5% and 10%, the
    last 5% of the text does.

    Parameters
    ----------
    least_characters
        Characters that training and validation need each.
    shown
        What errors call the data; by default its path.

    Raises
    ------
    InvalidInput
        The path does not exist, is not a regular file or folder, or too little text is left.
    """
    path = default_folder() if data is None else Path(data)
    suffix = ".py" if data is None else ""
    name = shown or ("the default corpus" if data is None else str(data))
    accepted = "a text file or a folder of text files made of printable ASCII and newline"
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else "cannot be read"
        raise InvalidInput("data", name, f"{accepted}; this path {reason}") from error
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise InvalidInput("data", name, f"{accepted}; this is neither a regular file nor a folder")
    texts: dict[bytes, bytes] = {}
    left_out = characters = 0
    for file in _files(path, suffix):
        try:
            text = file.read_bytes()
        except OSError:
            text = b""
        digest = hashlib.sha256(text).digest()
        if not text or text.translate(None, ALPHABET) or digest in texts:
            left_out += 1
            continue
        texts[digest] = text
        characters += len(text)
        if characters > MAX_CHARACTERS:
            raise InvalidInput("data", name, f"at most {MAX_CHARACTERS} characters")
    corpus = _split([texts[digest] for digest in sorted(texts)], left_out)
    short = min(len(corpus.train), len(corpus.validation))
    if short < least_characters:
        raise InvalidInput(
            "data",
            name,
            f"{accepted}; of this, {corpus.files} files with {corpus.characters} characters are "
            f"usable and {left_out} files were left out (empty, unreadable, equal to another or "
            f"with other characters); training and validation (5%) need {least_characters} "
            "characters each",
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
    total = sum(map(len, texts))
    wanted = VALIDATION_SHARE * total
    held: list[bytes] = []
    kept: list[bytes] = []
    size = 0
    for text in texts:
        takes = size < wanted and size + len(text) <= 2 * wanted
        (held if takes else kept).append(text)
        size += len(text) if takes else 0
    if size < wanted:
        whole = b"".join(texts)
        cut = total - int(wanted)
        held, kept = [whole[cut:]], [whole[:cut]]
    return Corpus(_tokens(kept), _tokens(held), len(texts), left_out)


def _tokens(texts: list[bytes]) -> NDArray[np.uint8]:
    return _TOKEN_OF_BYTE[np.frombuffer(b"".join(texts), dtype=np.uint8)]
