"""Structures as tensor networks: factors, the axes that join them, and the vectors x and y.

Drawn as figure 1 of arXiv:2410.02117 does: a line is an axis, summed over where it joins factors;
an axis that several factors share meets in a dot.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

from nas.analysis.style import DENSE, STRUCTURED

#: Ends of the axes of two factors; γ and φ are shared, ρ is the rank axis.
_OF_TWO = {
    "alpha": ("x", "A"), "beta": ("x", "B"), "gamma": ("x", "A", "B"), "delta": ("A", "y"),
    "epsilon": ("B", "y"), "phi": ("A", "B", "y"), "rho": ("A", "B"),
}  # fmt: skip
_GREEK = dict(zip(_OF_TWO, "αβγδεφρ", strict=True))
_LINE, _TEXT = "#64748b", "#64748b"
#: Pixels: of a factor's column, between axes, the rows of y, factors and x, and a factor's radius.
_COLUMN, _LEG, _TOP, _MIDDLE, _BOTTOM, _RADIUS = 190, 74, 34, 150, 266, 22


@dataclass(frozen=True, slots=True)
class Axis:
    """An axis: what it is called, its size, and what it joins: factors, ``x`` or ``y``."""

    label: str
    size: int
    ends: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Network:
    """A structure of a layer as a tensor network; axes of size 1 are left out."""

    factors: tuple[str, ...]
    axes: tuple[Axis, ...]
    d_in: int
    d_out: int
    dense: bool
    #: what is applied to each number between the two factors, if anything
    activation: str | None = None


def network(found: Mapping[str, Any]) -> Network | None:
    """The network of a structure as `inspect_design` tells of it; of a mixture that of one expert.

    None for families that are no product of factors, and those of other packages.
    """
    rows = [row for row in found.get("factors", ()) if row["name"] != "gate"]
    names = tuple(str(row["name"]) for row in rows)
    axes: tuple[Axis, ...]
    if (sizes := found.get("sizes")) and sizes.keys() == _OF_TWO.keys():
        if len(names) == 1:  # one factor was absorbed: the other is the whole matrix
            axes = (
                Axis("in", found["padded_in"], ("x", *names)),
                Axis("out", found["padded_out"], (*names, "y")),
            )
        else:
            axes = tuple(Axis(_GREEK[name], n, _OF_TWO[name]) for name, n in sizes.items())
    elif names and all("axes" in row for row in rows):
        axes = _of_chain(rows)
    else:
        return None
    kept = tuple(axis for axis in axes if axis.size > 1 and len(axis.ends) > 1)
    return Network(
        names, kept, found["d_in"], found["d_out"], len(names) == 1, found.get("activation")
    )


def _of_chain(rows: Sequence[Mapping[str, Any]]) -> tuple[Axis, ...]:
    sizes: dict[str, int] = {}
    ends: dict[str, list[str]] = {}
    for row in rows:
        for axis, size in zip(row["axes"], row["shape"], strict=True):
            sizes[axis] = size
            outer = [v for start, v in (("in", "x"), ("out", "y")) if axis.startswith(start)]
            ends.setdefault(axis, outer).append(row["name"])
    return tuple(Axis(_short(axis), sizes[axis], tuple(ends[axis])) for axis in sizes)


def _short(axis: str) -> str:
    """`in_12` → in₁₂."""
    digits = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")
    found = re.fullmatch(r"(\w+?)_(\d+)", axis)
    return axis if found is None else found[1].replace("bond", "ρ") + found[2].translate(digits)


def svg(drawn: Network, title: str) -> str:
    """The network as an SVG document."""
    columns = {f: _COLUMN * (i + 0.5) + 30 for i, f in enumerate(drawn.factors)}
    width = _COLUMN * len(drawn.factors) + 60
    root = ElementTree.Element(
        "svg", xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {width} 300", role="img",
        width=str(width), height="300",
    )  # fmt: skip
    root.set("font-family", "system-ui, sans-serif")
    root.set("font-size", "14")
    ElementTree.SubElement(root, "title").text = title
    for vector, row, size in (("x", _BOTTOM, drawn.d_in), ("y", _TOP, drawn.d_out)):
        _line(root, (20, row), (width - 20, row), 4)
        _words(
            root, (width - 14, row - 10 if row == _TOP else row + 22), f"{vector}: {size}", "end"
        )
        legs = [
            (axis, [columns[f] for f in axis.ends if f in columns])
            for axis in drawn.axes
            if vector in axis.ends
        ]
        legs.sort(key=lambda leg: sum(leg[1]) / len(leg[1]))
        places = _apart([sum(xs) / len(xs) for _, xs in legs], width)
        for (axis, xs), at in zip(legs, places, strict=True):
            _outer(root, axis, at, row, xs)
    inner = [a for a in drawn.axes if not {"x", "y"} & set(a.ends)]
    for i, axis in enumerate(inner):
        xs = sorted(columns[f] for f in axis.ends)
        lift = 16 * (i % 2) if len(drawn.factors) > 2 else 0
        _line(root, (xs[0], _MIDDLE), (xs[-1], _MIDDLE), _weight(axis.size))
        _words(root, (sum(xs) / len(xs), _MIDDLE - 10 - lift), f"{axis.label} {axis.size}")
    if drawn.activation:
        _words(root, (width / 2, _MIDDLE + 22), f"→ {drawn.activation} →")
    for name, x in columns.items():
        colour = DENSE if drawn.dense else STRUCTURED
        ElementTree.SubElement(
            root, "circle", cx=f"{x:g}", cy=str(_MIDDLE), r=str(_RADIUS), fill=colour
        )
        _words(root, (x, _MIDDLE + 5), name, fill="#fff")
    return ElementTree.tostring(root, encoding="unicode")


def _apart(wanted: Sequence[float], width: float) -> list[float]:
    """Places as near to the wanted ones, in order, as labels leave room for."""
    found: list[float] = []
    for at in wanted:
        found.append(max(at, found[-1] + _LEG) if found else at)
    over = max(0.0, found[-1] - (width - _LEG)) if found else 0.0
    return [at - over for at in found]


def _outer(
    root: ElementTree.Element, axis: Axis, at: float, row: int, columns: Sequence[float]
) -> None:
    """An axis between a vector and its factors: straight to one, through a dot to several."""
    weight, toward = _weight(axis.size), 1 if row < _MIDDLE else -1
    start, joint = (at, row), (at, row + toward * 52)
    _line(root, start, joint, weight)
    for x in columns:
        _line(root, joint, (x, _MIDDLE), weight)
    if len(columns) > 1:
        ElementTree.SubElement(root, "circle", cx=f"{at:g}", cy=str(joint[1]), r="5", fill=_LINE)
    _words(root, (at + 8, row + toward * 26 + 5), f"{axis.label} {axis.size}", "start")


def _weight(size: int) -> float:
    """Of a line, pixels: wider for larger axes."""
    return 1 + math.log2(size) / 2


def _line(
    root: ElementTree.Element, start: tuple[float, float], end: tuple[float, float], weight: float
) -> None:
    (x1, y1), (x2, y2) = start, end
    places = {"x1": f"{x1:g}", "y1": f"{y1:g}", "x2": f"{x2:g}", "y2": f"{y2:g}"}
    line = ElementTree.SubElement(root, "line", {**places, "stroke": _LINE})
    line.set("stroke-width", f"{weight:.3g}")


def _words(
    root: ElementTree.Element, at: tuple[float, float], text: str, anchor: str = "middle",
    fill: str = _TEXT,
) -> None:  # fmt: skip
    found = ElementTree.SubElement(root, "text", x=f"{at[0]:g}", y=f"{at[1]:g}", fill=fill)
    found.set("text-anchor", anchor)
    found.text = text
