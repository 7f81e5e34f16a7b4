"""Data of the `text` task: which files, which tokens, which split.  Torch-free."""

from __future__ import annotations

import codecs
import hashlib
import io
import math
import os
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nas.errors import InvalidInput, echo
from nas.planning.recipe import TEXT_BPE, TextRecipe
from nas.tasks.arrays import NPY, read_npy
from nas.tasks.data import (
    HUB_PREFIX,
    MAX_BYTES,
    Arrays,
    Reading,
    TaskData,
    content_digest,
    is_pickle,
)
from nas.tasks.folders import TRAINING, VALIDATION, is_system_folder, listed, own_split
from nas.tasks.opening import DataFile, OpenData, opened
from nas.tasks.table import other_format

if TYPE_CHECKING:
    from tokenizers import Tokenizer

#: The 96 characters: printable ASCII and newline.
ALPHABET = bytes(range(32, 127)) + b"\n"
#: Share of the characters held out for validation, at least.
VALIDATION_SHARE = 0.05
#: Bytes of training text from which byte pairs are counted, about; of longer text every k-th piece.
COUNTED_CHARACTERS = 1 << 23

_ANY_TEXT = f"the recipe {TEXT_BPE.name} takes any UTF-8"
_TOKEN_OF_BYTE = bytes(max(ALPHABET.find(byte), 0) for byte in range(256))
_PACKAGES = frozenset({"site-packages", "dist-packages"})
#: Ends of the files of a corpus that may have the names of a split: ``wiki.train.tokens``.
_CORPUS_SUFFIXES = frozenset({".txt", ".tokens", ".raw"})
#: Bytes read, and encoded, at a time.
_PIECE = 1 << 16
#: Bytes of a word: counting pairs takes time quadratic in it.
_LONGEST_WORD = 64
_LINE_END = re.compile(rb"\S(?=\n)")

#: A text and where the part of it that is meant starts and stops.
_Span = tuple[bytes, int, int]
#: The pieces of a text as they are read, and whether it is validation data.
_Source = tuple[Iterable[bytes], bool]
_Tokens = NDArray[np.uint8] | NDArray[np.uint16]


class _Unusable(Exception):
    """Why a text is left out: the kind under which it is counted, and what is wrong with it."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


@dataclass
class _Reading(Reading):
    """How texts are read: which are usable, and what they are called."""

    recipe: TextRecipe
    #: whether texts are UTF-8 or made of the 96 characters
    utf8: bool
    #: whether tokens are learnt, or only looked for
    learns: bool = True
    #: what the summary calls the texts
    called: str = "files"

    def foreign(self) -> Callable[[bytes], tuple[int, int] | None]:
        """A function of a text's successive pieces: the first byte that it cannot have, and where.

        The last piece is empty.
        """
        return _foreign_to_utf8() if self.utf8 else _foreign_to_alphabet

    def checked(self, pieces: Iterable[bytes]) -> bytes:
        """The text made of the pieces; `_Unusable` at the first byte that none may have."""
        foreign = self.foreign()
        text = io.BytesIO()
        for piece in chain(pieces, [b""]):
            if found := foreign(piece):
                byte, offset = found
                begin = bytes(text.getbuffer()[:8]) + piece[:8]
                raise self.unusable(byte, text.tell() + offset, piece[offset + 1 :][:1], begin)
            text.write(piece)
        if not text.tell():
            raise _Unusable("empty", "is empty")
        return text.getvalue()

    def unusable(self, byte: int, offset: int, following: bytes, begin: bytes) -> _Unusable:
        """Why a text with a byte that none may have cannot be used."""
        kind = "binary" if self.utf8 else "with other characters"
        if other := other_format(begin):
            return _Unusable("in UTF-16" if "UTF-16" in other else kind, f"is {other}")
        detail = f"has the byte {byte:#04x} at offset {offset}"
        if self.utf8:
            return _Unusable(kind, detail)
        if byte == ord("\r"):
            windows = following in (b"\n", b"")
            kind = "with line endings of Windows" if windows else kind
            name = "\\r\\n, as Windows has" if windows else "\\r"
            detail += f": its lines end in {name}; convert them to \\n"
        return _Unusable(kind, f"{detail}; {_ANY_TEXT}")


def default_folder() -> Path:
    """The running Python's own standard library."""
    return Path(sysconfig.get_path("stdlib"))


def load_text(
    recipe: TextRecipe,
    data: str | os.PathLike[str] | None,
    *,
    shown: str | None = None,
    root: str | os.PathLike[str] | None = None,
    learns: bool = True,
) -> TaskData:
    """Read a file, a folder, ``hf:…``, or by default the standard library's `.py` files.

    A folder's sub-folders ``train`` and ``validation``, ``val``, ``dev`` or ``test``
    (`nas.tasks.folders` has all names), or files such as ``wiki.train.tokens`` and
    ``wiki.valid.tokens``, are its split.

    Texts that are not made solely of the 96 characters (of a user's data with `bpe`: that are not
    UTF-8 or have a NUL byte) are left out and counted, and of equal texts all but one.  Whole texts
    go to validation, chosen by the digest of their content, until they hold 5% of the bytes; where
    no choice of whole texts holds between 5% and 10%, the last 5% of all do.  Links, and hidden and
    system folders, are left out and counted.  The rows of an ``hf:`` dataset are texts, or, where
    none has several lines, in their order the lines of one text.

    With `bpe` the tokens are learnt from the training split alone.  A file ``.npy`` of unsigned
    integers holds tokens already; its last 5% are validation.

    Parameters
    ----------
    learns
        False to look only: where tokens would be learnt, which takes minutes, there are none then.
    others
        As of `load_data`.

    Raises
    ------
    InvalidInput
        The data does not exist, is neither a regular file nor a folder, is a pickle, is too large,
        or too little of it is usable; or it does not have the recipe's vocabulary.
    """
    utf8 = recipe.tokenizer == "bpe" and data is not None
    made_of = "printable ASCII and newline"
    if utf8:
        made_of = "UTF-8 without NUL, or a .npy array of tokens"
    name = shown or ("the default corpus" if data is None else str(data))
    accepted = f"a text file or a folder of text files made of {made_of}"
    reading = _Reading(name, accepted, recipe, utf8, learns)
    path = default_folder() if data is None else data
    if data is not None and root is None and str(data).startswith(HUB_PREFIX):
        from nas.tasks.hub import local_text

        if (file := local_text(str(data))) is None:
            return _read_hub(reading, str(data))
        path = file
    with opened(path, reading.error, root=root) as found:
        if found.is_folder:
            return _read_folder(reading, found, data is None)
        return _read_file(reading, found)


def _read_file(reading: _Reading, found: OpenData) -> TaskData:
    head = _begin(found)
    if is_pickle(found.name, head):
        raise reading.pickled()
    reading.check_size(found.size)
    if head.startswith(NPY):
        return _pretokenised(reading, found)
    return _task_data(reading, [(_pieces_of_file(found, found.size), False)], single=True)


def _read_folder(reading: _Reading, found: OpenData, only_python: bool) -> TaskData:
    end, left_out = ".py" if only_python else "", reading.left_out
    every = found.files(left_out, lambda name: is_system_folder(name) or name in _PACKAGES)
    files = [file for file in every if file.name.endswith(end)]
    if sum(file.size for file in files) > MAX_BYTES:
        reading.check_size(sum(file.size for file in files if _is_text(file, reading)))
    tops = [] if only_python else [_name_of_split(file) for file in files]
    train, held = own_split(tops)
    if not held:
        return _task_data(reading, ((_pieces_of_file(f, f.size), False) for f in files))
    chosen = [(f, top in held) for f, top in zip(files, tops, strict=True) if top in train | held]
    left_out[f"beside {listed(train)} and {listed(held)}"] = len(files) - len(chosen)
    sources = ((_pieces_of_file(f, f.size), is_held) for f, is_held in chosen)
    return _task_data(reading, sources, own=True)


def _read_hub(reading: _Reading, spec: str) -> TaskData:
    """The rows of a dataset: texts, or, where none has several lines, the lines of one text."""
    from nas.tasks.hub import hub_texts

    found = hub_texts(spec)
    reading.called = "texts"
    if found.whole or any(b"\n" in row[:-1] for row in found.texts):
        of = "" if found.whole else f" of column {echo(found.column)}"
        return _task_data(reading, (([text], False) for text in found.texts), of=of)
    lines = []
    for row in found.texts:
        try:
            lines.append(reading.checked([row]) if row else b"")
        except _Unusable as error:
            reading.left_out[f"rows {error.kind}"] += 1
    text = b"".join(line if line.endswith(b"\n") else line + b"\n" for line in lines)
    of = f" whose lines are the {len(lines):,} rows of column {echo(found.column)}"
    return _task_data(reading, [([text], False)] if text else [], of=of)


def _name_of_split(file: DataFile) -> str:
    """What may say the split of a file: its folder, or of `wiki.train.tokens` the `train`."""
    if len(file.parts) > 1:
        return file.parts[0]
    stem, _, suffix = file.name.rpartition(".")
    names = [n for n in stem.split(".") if n.lower() in (*TRAINING, *VALIDATION)]
    return names[0] if len(names) == 1 and f".{suffix.lower()}" in _CORPUS_SUFFIXES else ""


def _begin(file: DataFile | OpenData) -> bytes:
    with file.open() as stream:
        return stream.read(_PIECE)


def _is_text(file: DataFile, reading: _Reading) -> bool:
    """Whether a file begins as a usable text."""
    try:
        return not reading.foreign()(_begin(file))
    except OSError:
        return False


def _pieces_of_file(file: DataFile | OpenData, size: int) -> Iterator[bytes]:
    """What a file holds, of a file that grows meanwhile the first `size` bytes."""
    try:
        with file.open() as stream:
            while size > 0 and (piece := stream.read(min(_PIECE, size))):
                size -= len(piece)
                yield piece
    except OSError as error:
        raise _Unusable("unreadable", "cannot be read") from error


def _foreign_to_alphabet(piece: bytes) -> tuple[int, int] | None:
    """Value and offset of the first byte that is none of the 96 characters."""
    rest = piece.translate(None, ALPHABET)
    return (rest[0], piece.index(rest[:1])) if rest else None


def _foreign_to_utf8() -> Callable[[bytes], tuple[int, int] | None]:
    """The same for UTF-8 without NUL; the offset negative for a character of an earlier piece."""
    decoder = codecs.getincrementaldecoder("utf-8")()

    def foreign(piece: bytes) -> tuple[int, int] | None:
        nul = piece.find(0)
        pending = len(decoder.getstate()[0])
        try:
            decoder.decode(piece if nul < 0 else piece[:nul], final=nul >= 0 or not piece)
        except UnicodeDecodeError as error:
            return error.object[error.start], error.start - pending
        return (0, nul) if nul >= 0 else None

    return foreign


def _task_data(
    reading: _Reading,
    sources: Iterable[_Source],
    *,
    single: bool = False,
    own: bool = False,
    of: str = "",
) -> TaskData:
    """The usable ones of the sources, split, unless they are already (`own`), and as tokens.

    `of` says in the summary what the texts were made of.
    """
    recipe, left_out = reading.recipe, reading.left_out
    texts: dict[bytes, bytes] = {}
    held: dict[bytes, bytes] = {}
    size = 0
    for source, is_held in sources:
        try:
            text = reading.checked(source)
        except _Unusable as error:
            if single:
                raise reading.error(f"this file {error}") from error
            left_out[error.kind] += 1
            continue
        digest = hashlib.sha256(text).digest()
        split = held if is_held else texts
        if digest in split:
            left_out["equal to another"] += 1
            continue
        split[digest] = text
        size += len(text)
        reading.check_size(size)
    for digest in texts.keys() & held.keys():
        left_out["equal to one for training"] += 1
        size -= len(held.pop(digest))
    kept, others = ([part[digest] for digest in sorted(part)] for part in (texts, held))
    splits = (_whole(kept), _whole(others)) if own else _split(kept)
    characters = size
    if reading.utf8:
        characters = sum(len(str(text[a:b], "utf-8")) for text, a, b in _pieces(chain(*splits)))
    count = len(texts) + len(held)
    summary = (
        f"{count:,} {reading.called}{of}, {characters:,} characters, {left_out.total():,} "
        f"{reading.called} left out{reading.kinds_left_out()}"
    )
    # a token is at least a byte: before tokens are learnt from a text that is too short
    if min(map(_size, splits)) >= recipe.least_tokens:
        bpe = recipe.tokenizer == "bpe"
        if bpe and not reading.learns:
            return TaskData(recipe, {}, {}, "", summary)
        train, validation = _encoded(recipe, splits) if bpe else map(_characters, splits)
        if bpe:
            count = len(train) + len(validation)
            summary += f", {count / characters:.3f} tokens per character"
        if len(validation) >= recipe.least_tokens <= len(train):
            return _of_tokens(recipe, train, validation, summary)
        lengths = f"{len(train):,} and {len(validation):,} tokens"
    else:
        lengths = "{:,} and {:,} bytes".format(*map(_size, splits))
    how = "" if own else f" (the last 5%, or whole {reading.called})"
    of_others = any("characters" in kind or "line endings" in kind for kind in left_out)
    other = f"; {_ANY_TEXT}" if of_others and not reading.utf8 else ""
    raise reading.error(
        f"of this, {summary}; training and validation{how} have {lengths}, and need "
        f"{recipe.least_tokens:,} tokens each{other}"
    )


def _of_tokens(recipe: TextRecipe, train: _Tokens, validation: _Tokens, summary: str) -> TaskData:
    label = "text/bpe" if recipe.tokenizer == "bpe" else "text/96"
    splits: tuple[Arrays, Arrays] = {"tokens": train}, {"tokens": validation}
    return TaskData(recipe, *splits, content_digest(label, *splits), summary)


def _split(texts: list[bytes]) -> tuple[list[_Span], list[_Span]]:
    """Training and validation; see `load_text`."""
    total = sum(map(len, texts))
    wanted = VALIDATION_SHARE * total
    kept: list[_Span] = []
    held: list[_Span] = []
    size = 0
    for text in texts:
        takes = size < wanted and size + len(text) <= 2 * wanted
        (held if takes else kept).append((text, 0, len(text)))
        size += len(text) if takes else 0
    if size >= wanted:
        return kept, held
    kept, held = [], []
    rest = total - int(wanted)
    for text in texts:
        cut = max(0, min(rest, len(text)))
        rest -= len(text)
        if cut < len(text):
            cut = _whole_character(text, cut, -1)
        kept.append((text, 0, cut))
        held.append((text, cut, len(text)))
    return kept, held


def _whole(texts: Iterable[bytes]) -> list[_Span]:
    return [(text, 0, len(text)) for text in texts]


def _size(spans: Iterable[_Span]) -> int:
    return sum(stop - start for _, start, stop in spans)


def _whole_character(text: bytes, at: int, step: int) -> int:
    """The nearest place in the direction of `step` where no UTF-8 character is cut in two."""
    while 0 < at < len(text) and text[at] & 0xC0 == 0x80:
        at += step
    return at


def _pieces(spans: Iterable[_Span]) -> Iterator[_Span]:
    """The same in pieces, cut before a newline: where words end anyway."""
    for text, start, stop in spans:
        while start < stop:
            end = min(start + _PIECE, stop)
            if end < stop:
                found = _LINE_END.search(text, end, min(end + _PIECE, stop))
                end = found.end() if found else _whole_character(text, end, 1)
            yield text, start, end
            start = end


def _characters(spans: Iterable[_Span]) -> NDArray[np.uint8]:
    spans = list(spans)
    tokens = np.empty(_size(spans), dtype=np.uint8)
    at = 0
    for text, start, stop in _pieces(spans):
        piece = text[start:stop].translate(_TOKEN_OF_BYTE)
        tokens[at : at + len(piece)] = np.frombuffer(piece, dtype=np.uint8)
        at += len(piece)
    return tokens


def _encoded(
    recipe: TextRecipe, splits: tuple[list[_Span], list[_Span]]
) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
    recipe.check_bytes()
    every = math.ceil(_size(splits[0]) / COUNTED_CHARACTERS)
    pieces = (p for i, p in enumerate(_pieces(splits[0])) if i % every == 0)
    tokenizer = learn_tokens((str(text[a:b], "utf-8") for text, a, b in pieces), recipe.vocabulary)

    def encode(batch: list[_Span]) -> NDArray[np.uint16]:
        texts = [str(text[a:b], "utf-8") for text, a, b in batch]
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return np.concatenate([np.array(e.ids, dtype=np.uint16) for e in encodings])

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        train, validation = (
            np.concatenate(list(pool.map(encode, _batches(_pieces(split))))) for split in splits
        )
    return train, validation


def _batches(pieces: Iterable[_Span]) -> Iterator[list[_Span]]:
    """Pieces put together, so that short texts do not cost a call each."""
    batch: list[_Span] = []
    room = 4 * _PIECE
    for piece in pieces:
        batch.append(piece)
        room -= _size([piece])
        if room <= 0:
            yield batch
            batch, room = [], 4 * _PIECE
    if batch:
        yield batch


def learn_tokens(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """Byte pair encoding over the 256 bytes, learnt from texts; equal texts give equal tokens.

    Raises
    ------
    InvalidInput
        A vocabulary that is larger than the texts yield.
    """
    # threads of ours, which end, encode batches instead: the library's stay and do not survive a
    # fork, of which it warns whoever forks later
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            pre_tokenizers.FixedLength(_LONGEST_WORD),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if (found := tokenizer.get_vocab_size()) != vocabulary:
        raise InvalidInput(
            "vocabulary", vocabulary, f"at most {found}, which the training text yields"
        )
    return tokenizer


def _pretokenised(reading: _Reading, found: OpenData) -> TaskData:
    """A `.npy` file of tokens, its last 5% for validation."""
    recipe = reading.recipe
    accepted = "with tokenizer=bpe a .npy holds a one-dimensional array of unsigned integers"
    with found.open() as stream:
        array = read_npy(
            Reading(reading.name, f"{reading.accepted}; {accepted}"), stream, found.size, "this one"
        )
    if not reading.utf8 or array.dtype.kind != "u" or array.ndim != 1:
        raise reading.error(f"{accepted}, this one {array.dtype} of shape {array.shape}")
    count, held = len(array), int(VALIDATION_SHARE * len(array))
    if held < recipe.least_tokens:
        raise reading.error(
            f"training and validation have {count - held:,} and {held:,} tokens, and need "
            f"{recipe.least_tokens:,} each"
        )
    if (largest := int(array.max())) >= recipe.vocabulary:
        raise InvalidInput(
            "vocabulary",
            recipe.vocabulary,
            f"at least {largest + 1}: the largest token in the data is {largest}",
        )
    kept = array.astype(np.uint16)
    return _of_tokens(
        recipe, kept[: count - held], kept[count - held :], f"{count:,} tokens, tokenised before"
    )
