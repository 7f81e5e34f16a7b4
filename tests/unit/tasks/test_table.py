"""Which row of a table is its names, and what is no table: nothing is lost or made up silently."""

from __future__ import annotations

import bz2
import gzip
import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from nas.errors import InvalidInput
from nas.tasks.table import NumberTable, other_format, read_numbers

VALUES = np.random.default_rng(0).standard_normal((40, 3)).round(4)
ROWS = "".join(f"{a:.4f},{b:.4f},{c:.4f}\n" for a, b, c in VALUES)
SIGNED = "".join(f"{a:+.4f},{b:+.4f},{c:+.4f}\n" for a, b, c in VALUES)
#: Small whole numbers, of which few rows rise.
COUNTS = "".join(f"{i % 7},{i % 5},{(i + 3) % 6}\n" for i in range(40))


def refused(what: str) -> InvalidInput:
    return InvalidInput("data", "mine", what)


def read(content: str | bytes) -> NumberTable:
    return read_numbers(
        io.BytesIO(content.encode() if isinstance(content, str) else content), refused
    )


def refusal(content: str | bytes) -> str:
    with pytest.raises(InvalidInput) as caught:
        read(content)
    return str(caught.value)


@pytest.mark.parametrize(
    ("content", "how"),
    [
        ("a,b,y\n" + ROWS, "line 1 read as names, target y"),
        ("\ufeffa,b,y\n" + ROWS, "line 1 read as names, target y"),
        ('"a", "b" ,"y"\n'.replace(' "b" ', '"b"') + ROWS, "line 1 read as names, target y"),
        (" a , b , y \n" + ROWS.replace(",", " , "), "line 1 read as names, target y"),
        ("id,2019,2020\n" + ROWS, "line 1 read as names, target 2020"),
        ("Na,K,Ca\n" + ROWS, "line 1 read as names, target Ca"),
        ("PK,PAR1,CDF\n" + ROWS, "line 1 read as names, target CDF"),
        ("# made by x, on a day\n\n#\na,b,y\n" + ROWS + "# end\n",
         "line 4 read as names, target y, 3 comment lines left out"),
        ("# a,b,y\n" + ROWS, "line 2 read as a sample, 1 comment lines left out"),
        (ROWS, "line 1 read as a sample"),
        ("\ufeff" + ROWS, "line 1 read as a sample"),
        (ROWS.replace("\n", "\r\n"), "line 1 read as a sample"),
        (ROWS.replace("\n", "\r"), "line 1 read as a sample"),
        (ROWS.replace("\n", "\n\n \n"), "line 1 read as a sample"),
        (SIGNED, "line 1 read as a sample"),
    ],
)  # fmt: skip
def test_the_rows_are_all_samples_but_for_their_names(content: str, how: str) -> None:
    table = read(content)
    assert np.array_equal(table.values, VALUES)
    assert table.how == how
    assert (table.names is None) == ("sample" in how)


@pytest.mark.parametrize(
    "first",
    ["0,1,2", "2019,2020,2021", "1100,1102,1104", "400.5,401.0,401.5", "205,101,307", "1,2,9"],
)
def test_numbers_unlike_those_below_may_be_names(first: str) -> None:
    assert f"line 1 ({first.replace(',', ', ')}) may be names or a sample" in refusal(
        f"{first}\n{ROWS}"
    )
    assert len(read(f"a,b,y\n{first}\n{ROWS}").values) == 41


@pytest.mark.parametrize("first", ["0,1,2", "2019,2020,2021"])
def test_whole_numbers_above_whole_numbers_may_be_names(first: str) -> None:
    assert "may be names or a sample" in refusal(f"{first}\n{COUNTS}")


@pytest.mark.parametrize(
    "content",
    [
        COUNTS,
        "4,1,5\n" + COUNTS,
        "0.5,1,7\n" + ROWS,
        "0,0,0\n" + ROWS,
        "".join(f"{i},{i + 1},{i + 2}\n" for i in range(40)),
        "0,1\n" + "".join(f"{i % 7},{i % 5}\n" for i in range(40)),
        "".join(f"{1990 + i},{1991 + i}\n" for i in range(40)),
    ],
)
def test_numbers_like_those_below_are_a_sample(content: str) -> None:
    assert len(read(content).values) == content.count("\n")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        # the reader of numpy took `#` for a comment, and c for the target
        ("a,b,c,y\n" + ROWS.replace("\n", ",3#x\n"), "line 2, column 4 (y) has '3#x', which is no"),
        ("a,b,y\n" + ROWS + "#5,1,2\n", "#5,1,2 begins as a comment does, and has the"),
        ("a,b,c,y\n" + ROWS, "line 2 has 3 cells where line 1 has 4 names"),
        ("a,b,y\n" + ROWS.replace("\n", ",\n"), "line 2 has 4 cells where line 1 has 3 names"),
        (ROWS + "1,2\n", "line 41 has 2 cells where line 1 has 3 cells"),
        ("1.5,,3\n" + ROWS, "line 1, column 2 is empty"),
        ("1.5,2,NA\n" + ROWS, "line 1, column 3 has 'NA', which is no number"),
        ("?,?,?\n" + ROWS, "line 1, column 1 has '?'"),
        (",,\n" + ROWS, "line 1, column 1 is empty"),
        (",b,y\n" + ROWS, "line 1 has no name for column 1; where that is pandas' index"),
        ("1.O,2.5,3.5\n" + ROWS, "line 1 is neither names nor numbers: line 1, column 1 has '1.O'"),
        ("a,b,y\n\n# note\n" + ROWS + "\n1,x,3\n", "line 45, column 2 (b) has 'x'"),
        ("a,b,y\n" + ROWS + "1,,3\n", "line 42, column 2 (b) is empty"),
        ("a,b,y\n" + ROWS + ",,\n", "line 42, column 1 (a) is empty"),
        ("a,b,y\n" + ROWS + "1_000,2,3\n", "has '1_000', which is no number"),
        ("a,b,y\n" + ROWS + '1,"2,3\n', "line 42: unexpected end of data"),
        ("a;b;y\n" + ROWS.replace(",", ";"), "as if cells were separated by semicolons: separate"),
        ("a;b;y\n" + ROWS.replace(",", ";").replace(".", ","), "separated by semicolons"),
        ("1;2;3\n", "this has 1 columns; it looks as if cells were separated by semicolons"),
        ("a\tb\ty\n" + ROWS.replace(",", "\t"), "separated by tabs"),
        ("a|b|y\n" + ROWS.replace(",", "|"), "separated by bars"),
        ("a b y\n" + ROWS.replace(",", " "), "separated by blanks"),
        ('a,y\n"1,5","2,5"\n', "numbers were written with a decimal comma"),
        ("a,y\n1,5,2,5\n", "numbers were written with a decimal comma"),
        (("a,b,y\n" + ROWS).encode("utf-16-le"), "it looks like UTF-16: save it as UTF-8"),
        ("größe,y\n1,2\n".encode("latin-1"), "the byte 0xf6, which is no UTF-8; save it as UTF-8"),
        ("# nothing else\n\n", "this has no rows"),
        ("a,b,y\n", "this has no rows below the names in line 1"),
    ],
)  # fmt: skip
def test_what_would_be_misread(content: str | bytes, says: str) -> None:
    assert says in refusal(content)


def test_a_place_is_the_lines_of_the_file() -> None:
    table = read("# one\na,b\n\n1,2\n\n# two\n3,4\n")
    assert table.values.tolist() == [[1, 2], [3, 4]]
    assert (table.place(0, 0), table.place(1, 1)) == (
        "line 4, column 1 (a)",
        "line 7, column 2 (b)",
    )
    assert read("1,2\n3,4\n").place(1, 1) == "line 2, column 2"


def test_files_that_are_often_taken_for_tables() -> None:
    parquet = io.BytesIO()
    pyarrow.parquet.write_table(pa.table({"a": [1.0]}), parquet)
    for content, says in (
        (gzip.compress(b"1,2\n", mtime=0), "gzip: unpack it"),
        (bz2.compress(b"1,2\n"), "bzip2: unpack it"),
        ("1,2\n".encode("utf-16"), "UTF-16: save it as UTF-8"),
        (parquet.getvalue(), "Parquet: write it with pandas.read_parquet"),
    ):
        assert (other_format(content[:8]) or "").startswith(says)
    for text in ("PAR1,y\n", "CDF,y\n", "BZh,y\n", "1,2\n", ""):
        assert other_format(text.encode()[:8]) is None
