"""What the parts are, and how they are written and shown.  Without torch, and all else."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Kind:
    """A part; its module is `benchmarks.gpu.NAME`, with `run` and `tables`."""

    name: str
    #: share of the minutes
    share: float
    #: packages besides torch and numpy without which the part is skipped
    needs: tuple[str, ...] = ()


KINDS = {
    kind.name: kind
    for kind in (
        Kind("correctness", 0.12),
        Kind("layers", 0.28),
        Kind("mixtures", 0.14),
        Kind("steps", 0.16, ("pydantic", "opt_einsum")),
        Kind("study", 0.30, ("pydantic", "opt_einsum")),
    )
}


def write_json(path: Path, value: Any) -> None:
    """Replace the file as a whole."""
    new = path.with_suffix(".new")
    text = json.dumps(_plain(value), indent=1, allow_nan=False, ensure_ascii=False)
    new.write_text(text + "\n", encoding="utf-8")
    new.replace(path)


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: they are kept as their names."""
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


def table(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of equal columns as lines of text."""
    if not rows:
        return f"{title}\n  no rows\n"
    cells = [list(rows[0])] + [[_shown(v) for v in row.values()] for row in rows]
    wide = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, wide, strict=True))
        )
        for line in cells
    ]
    return "\n".join([title, *(f"  {line.rstrip()}" for line in lines)]) + "\n"


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1e4 else f"{value:.2e}"
    return str(value)
