"""Tables of comma-separated cells: which line is which row, and what is no such table."""

from __future__ import annotations

import csv
import io
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from itertools import chain, islice, pairwise
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from nas.errors import echo
from nas.tasks.data import MAX_BYTES, Refusal

#: Characters of a line.
_LONGEST_LINE = 1 << 20
#: Rows that are compared with the first to see whether it holds names.
_COMPARED = 100
#: How files begin that are often taken for tables, what they are, and how they become one.
_OTHERS = {
    b"\x1f\x8b": ("gzip", "unpack it"), b"BZh91AY&": ("bzip2", "unpack it"),
    b"\xfd7zXZ": ("xz", "unpack it"), b"\x28\xb5\x2f\xfd": ("zstd", "unpack it"),
    b"PAR1\x15": ("Parquet", "write it with pandas.read_parquet(…).to_csv(…, index=False)"),
    b"ARROW1\0": ("Arrow", "write it with pandas.read_feather(…).to_csv(…, index=False)"),
    b"\xff\xfe": ("UTF-16", "save it as UTF-8"), b"\xfe\xff": ("UTF-16", "save it as UTF-8"),
    b"\x89HDF": ("HDF5 or netCDF", "write its numbers to a .csv or .npz"),
    b"CDF\x01": ("netCDF", "write its numbers to a .csv or .npz"),
    b"CDF\x02": ("netCDF", "write its numbers to a .csv or .npz"),
    b"\xd0\xcf\x11\xe0": ("an old Excel file", "save it as .csv"),
    b"\x93NUMPY": ("a .npy", "save it as .npz with both arrays"),
}  # fmt: skip
_MISSING = frozenset(
    {"", "na", "n/a", "#n/a", "nan", "nil", "none", "null", "-", "--", "?", ".", "missing"}
)
_WHOLE = re.compile(r"[+-]?\d+")
_DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+")
_COMMAS = "separate cells by commas, and write decimals with a point"
#: Separators that are no commas, and what they are called.
_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}


@dataclass
class _Lines:
    """Rows of a stream, each with the number of the line that it ends in.

    Empty lines are no rows; in a table of numbers neither are comments: lines that begin with
    ``#``.
    """

    stream: BinaryIO
    error: Refusal
    numbers: bool
    comments: int = 0
    #: cells of a row
    width: int = 0

    def rows(self) -> Iterator[tuple[int, list[str]]]:
        # a byte order mark is no part of the first cell
        with io.TextIOWrapper(self.stream, encoding="utf-8-sig", newline="") as text:
            reader = csv.reader(self._lines(text), strict=True)
            try:
                for row in reader:
                    if row and (len(row) > 1 or row[0].strip() or not self.numbers):
                        self.width = self.width or len(row)
                        yield reader.line_num, row
            except csv.Error as error:
                raise self.error(f"line {reader.line_num:,}: {error}") from error
            except UnicodeDecodeError as error:
                byte = error.object[error.start]
                raise self.error(
                    f"it has the byte {byte:#04x}, which is no UTF-8; save it as UTF-8"
                ) from error

    def _lines(self, text: io.TextIOWrapper) -> Iterator[str]:
        """Lines that are neither long without end nor more than fit."""
        size, longest = 0, _LONGEST_LINE if self.numbers else MAX_BYTES
        while line := text.readline(longest):
            size += len(line)
            if len(line) == longest or size > MAX_BYTES:
                raise self.error(f"lines are to have fewer than {longest:,} characters")
            if self.numbers and line.startswith("#"):
                if self.width > 1 and line.count(",") == self.width - 1:
                    raise self.error(
                        f"{echo(line.strip())} begins as a comment does, and has the cells of a row"
                    )
                self.comments += 1
                line = "\n"  # so that lines are counted on
            yield line


@dataclass(frozen=True)
class NumberTable:
    """A table of numbers and where each of them stands."""

    #: (rows, columns) float64; not necessarily finite
    values: NDArray[np.float64]
    #: of the columns; None if the first row is a sample
    names: list[str] | None
    #: of each row in the file
    lines: array[int]
    #: how the file was understood, for people
    how: str

    def place(self, row: int, column: int) -> str:
        """Where a value stands in the file, for an error."""
        name = f" ({echo(self.names[column])})" if self.names else ""
        return f"line {self.lines[row]:,}, column {column + 1:,}{name}"


def other_format(begin: bytes) -> str | None:
    """What a file is that begins so and is no text, and what to do with it."""
    found = next((what for magic, what in _OTHERS.items() if begin.startswith(magic)), None)
    return f"{found[0]}: {found[1]}" if found else None


def read_numbers(stream: BinaryIO, error: Refusal) -> NumberTable:
    """A table of numbers, whose first row may be the columns' names.

    Raises
    ------
    InvalidInput
        It is no UTF-8; a line is too long; quotes do not match; rows have different numbers of
        cells; a cell is no number; or the first row is numbers that may be names or a sample.
    """
    lines = _Lines(stream, error, numbers=True)
    rows = lines.rows()
    begin = list(islice(rows, _COMPARED + 1))
    if not begin:
        raise error("this has no rows")
    (first_line, first), others = begin[0], [cells for _, cells in begin[1:]]
    names = _names(first, first_line, others, error)
    numbers, of_rows = array("d"), array("q")
    for line, cells in chain(begin[1:] if names else begin, rows):
        if len(cells) != len(first):
            raise error(_uneven(line, cells, first_line, first, bool(names)))
        try:
            numbers.extend(map(float if "_" not in "".join(cells) else _number, cells))
        except ValueError:
            wrong = next(i for i, cell in enumerate(cells) if not _is_number(cell))
            raise error(_no_number(line, wrong, cells, names)) from None
        of_rows.append(line)
    if len(first) < 2:
        hint = _hint(first) or _hint(others[0] if others else [])
        raise error(f"this has 1 columns{hint}")
    if not of_rows:
        raise error(f"this has no rows below the names in line {first_line}")
    how = f"line {first_line:,} read as a sample"
    if names:
        how = f"line {first_line:,} read as names, target {echo(names[-1])}"
    if lines.comments:
        how += f", {lines.comments:,} comment lines left out"
    return NumberTable(np.frombuffer(numbers).reshape(-1, len(first)), names, of_rows, how)


def text_rows(stream: BufferedReader, error: Refusal) -> Iterator[dict[str, str]]:
    """Rows of a table of texts by the names in its first row; a cell may have several lines.

    Raises
    ------
    InvalidInput
        It is no UTF-8; quotes do not match; a row has another number of cells than the first; two
        columns have one name; or cells seem to be separated by something else than commas.
    """
    if other := other_format(stream.peek(8)[:8]):
        raise error(f"this is {other}")
    before = csv.field_size_limit(MAX_BYTES - 1)  # of the whole process
    try:
        rows = _Lines(stream, error, numbers=False).rows()
        first_line, names = next(rows, (1, []))
        hint = separated(names)
        if len(names) == 1 and hint:
            raise error(f"line {first_line:,} is the one name {echo(names[0])}{hint}")
        if len(set(names)) < len(names):
            raise error(f"line {first_line:,} has a name twice: {echo(', '.join(names))}")
        for line, cells in rows:
            if len(cells) != len(names):
                raise error(
                    f"line {line:,} has {len(cells):,} cells where line {first_line:,} has "
                    f"{len(names):,} names{hint}"
                )
            yield dict(zip(names, cells, strict=True))
    finally:
        csv.field_size_limit(before)


def separated(cells: list[str]) -> str:
    """What seems to separate the cells of a row other than commas, for an error; or nothing."""
    row = ",".join(cells)
    found = next((name for separator, name in _SEPARATORS.items() if separator in row), None)
    return f"; it looks as if cells were separated by {found}: {_COMMAS}" if found else ""


def _number(cell: str) -> float:
    if "_" in cell:  # Python's numbers have them
        raise ValueError(cell)
    return float(cell)


def _is_number(cell: str) -> bool:
    try:
        _number(cell)
    except ValueError:
        return False
    return True


def _names(
    first: list[str], line: int, others: list[list[str]], error: Refusal
) -> list[str] | None:
    """The first row's cells if they are the columns' names, None if they are a sample's."""
    cells = [cell.strip() for cell in first]
    words = [i for i, cell in enumerate(cells) if not _is_number(cell)]
    if not words:
        if _may_be_names(cells, others):
            raise error(
                f"line {line:,} ({echo(', '.join(cells))}) may be names or a sample: it is unlike "
                "the rows below; put a line of names that are no numbers above it or in its place"
            )
        return None
    if all(cells[i].lower() in _MISSING for i in words):
        raise error(_no_number(line, words[0], cells))
    if "" in cells:
        hint = (
            "" if cells[0] else "; where that is pandas' index, to_csv(index=False) leaves it out"
        )
        raise error(f"line {line:,} has no name for column {cells.index('') + 1:,}{hint}")
    mixed = len(words) < len(cells)  # as "id, 2019, 2020"; but "1.O, 2.5" is a misprint
    if mixed and any(
        not (cell[0].isalpha() or cell[0] == "_" if i in words else _WHOLE.fullmatch(cell))
        for i, cell in enumerate(cells)
    ):
        raise error(
            f"line {line:,} is neither names nor numbers: {_no_number(line, words[0], cells)}"
        )
    return cells


def _may_be_names(first: list[str], others: list[list[str]]) -> bool:
    """Whether a row of numbers differs in kind from those below it, as ``0,1,2`` or years do."""
    numbers = list(map(float, first))
    below = [bool(_WHOLE.fullmatch(cell.strip())) for cells in others for cell in cells]
    if len(first) < 2 or not below:
        return False
    whole = all(map(_WHOLE.fullmatch, first))
    rises = all(a < b for a, b in pairwise(numbers))
    if whole and rises and not all(below):
        return True
    if whole and len(set(numbers)) == len(numbers) and not any(below):
        return True
    # few numbers are evenly spaced by chance, whole ones rather than others
    counts = len(numbers) > 3 or not whole or numbers[:2] == [0, 1]
    if counts and _even(first) and 10 * sum(map(_even, others)) < len(others):
        return True
    return rises and _years(first) and not any(map(_years, others))


def _even(cells: list[str]) -> bool:
    """Whether a row rises by equal steps, as positions do."""
    if len(cells) < 3 or not all(map(_is_number, cells)):
        return False
    steps = [float(b) - float(a) for a, b in pairwise(cells)]
    return min(steps) > 0 and max(steps) - min(steps) < 1e-6 * max(steps)


def _years(cells: list[str]) -> bool:
    return all(_WHOLE.fullmatch(cell) and 1900 <= float(cell) <= 2100 for cell in cells)


def _no_number(line: int, column: int, cells: list[str], names: list[str] | None = None) -> str:
    """What is wrong with a cell that is no number."""
    cell = cells[column].strip()
    name = f" ({echo(names[column])})" if names else ""
    has = f"has {echo(repr(cell))}, which is no number" if cell else "is empty"
    return f"line {line:,}, column {column + 1:,}{name} {has}{_hint(cells)}"


def _uneven(line: int, cells: list[str], first_line: int, first: list[str], named: bool) -> str:
    what = "names" if named else "cells"
    hint = _hint(cells)
    if named and len(cells) == 2 * len(first) and not hint:
        hint = "; it looks as if numbers were written with a decimal comma, which is to be a point"
    return (
        f"line {line:,} has {len(cells):,} cells where line {first_line:,} has {len(first):,} "
        f"{what}{hint}"
    )


def _hint(cells: list[str]) -> str:
    """What the cells of a row look like that are no numbers between commas."""
    if found := separated(cells):
        return found
    if any(_DECIMAL_COMMA.fullmatch(cell.strip()) for cell in cells):
        return f"; it looks as if numbers were written with a decimal comma: {_COMMAS}"
    if any("\0" in cell for cell in cells):
        return "; it looks like UTF-16: save it as UTF-8"
    if len(cells) == 1 and len(cells[0].split()) > 1:
        return f"; it looks as if cells were separated by blanks: {_COMMAS}"
    return ""
