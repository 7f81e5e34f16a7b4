"""What every benchmark prints: a table for people, and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


def show(rows: Sequence[Mapping[str, Any]], title: str | None = None, align: Any = "left") -> None:
    """A table of `rows`, each of which has a value for every column."""
    table = Table(title=title, title_justify="left")
    for column in rows[0] if rows else ():
        table.add_column(column.replace("_", " "), justify=align)
    for row in rows:
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    Console(width=160).print(table)


def report(
    title: str, rows: list[dict[str, Any]], details: list[dict[str, Any]] | None = None
) -> None:
    """A table of `rows` for people, then `details` (or the same rows) as JSON."""
    show(rows, title, "right")
    print(json.dumps({"title": title, "rows": details or rows}))
