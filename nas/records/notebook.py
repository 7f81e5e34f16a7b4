"""What notebooks show of a value: small tables of HTML, without styles and scripts."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from nas.designs.design import parse_design
from nas.errors import counted

if TYPE_CHECKING:
    from nas.records.answers import Answer, Candidate, FrontierAnswer


def table(
    title: str,
    rows: Sequence[Sequence[str]],
    *,
    headings: Sequence[str] = (),
    notes: Sequence[str] = (),
    link: str | None = None,
) -> str:
    """A table with its title above and notes below, as HTML; every text is shown as it is.

    Parameters
    ----------
    rows
        Cells of each row, the first its label.
    link
        Address that the title leads to.

    >>> table("a & b", [("loss", "2.5")])
    '<b>a &amp; b</b><table><tbody><tr><th>loss</th><td>2.5</td></tr></tbody></table>'
    """
    shown = f"<b>{html.escape(title)}</b>"
    if link is not None:
        shown = f'<a href="{html.escape(link)}">{shown}</a>'
    head = f"<thead>{_row('th', 'th', headings)}</thead>" if headings else ""
    body = "".join(_row("th", "td", cells) for cells in rows)
    below = "".join(f"<div>{html.escape(note)}</div>" for note in notes)
    return f"{shown}<table>{head}<tbody>{body}</tbody></table>{below}"


def _row(first: str, others: str, texts: Sequence[str]) -> str:
    tags = [first, *[others] * (len(texts) - 1)]
    cells = (f"<{tag}>{html.escape(text)}</{tag}>" for tag, text in zip(tags, texts, strict=True))
    return f"<tr>{''.join(cells)}</tr>"


def front(found: FrontierAnswer) -> str:
    """A Pareto front."""
    unit = found.x_unit.partition(":")[0]
    rows = [
        (f"{p[found.x]:.4g}", f"{p.loss:.4f}", parse_design(p.design).described, str(p.width),
         f"{p.steps:,}")
        for p in found.frontier
    ]  # fmt: skip
    where = f"; {unit} measured on {found.device}" if found.x_measured and found.device else ""
    of = f"{counted(found.points, 'point')} of {counted(found.trials, 'completed run')}"
    return table(
        f"Pareto front: loss against {unit}", rows,
        headings=(unit, "loss", "structure", "width", "steps"),
        notes=[f"{of}; losses measured, in {found.y_unit}{where}"],
    )  # fmt: skip


def answer(best: Answer) -> str:
    """The verdict, the best structured and dense runs, and what tells them apart."""
    runs = (best.best_structured, best.best_dense)
    rows = [
        (label, *("–" if run is None else read(run) for run in runs))
        for label, read in _ROWS.items()
    ]
    expected = f"{best.expected_loss:.4f} {best.loss_unit} ({_range(best.interval, '.4f')})"
    notes = [best.verdict_reason, f"expected loss {expected}, {best.kind}"]
    if (gap := best.dense_minus_structured) is not None:
        told = _range(gap.difference_interval, "+.4f")
        notes.append(f"dense − structured: {gap.difference:+.4f} ({told})")
    ratio = best.structured_multiplier
    if ratio is not None and ratio.value is not None:
        sign = {"at_least": "≥ ", "less_than": "< "}.get(ratio.kind, "")
        told = f"{sign}{ratio.value:.3g} ({_range(ratio.interval, '.3g')})"
        notes.append(f"compute multiplier over dense: {told}")
    if best.indistinguishable:
        told = counted(len(best.indistinguishable), "other structure")
        notes.append(f"not clearly different from the best: {told}")
    title = f"{best.verdict}, within {best.budget:.4g} {best.budget_unit.partition(':')[0]}"
    return table(title, rows, headings=("", "structured", "dense"), notes=notes)


def _range(interval: tuple[float, float] | None, form: str) -> str:
    if interval is None:
        return "no interval"
    return f"95%: {interval[0]:{form}} to {interval[1]:{form}}"


_ROWS: Mapping[str, Callable[[Candidate], str]] = {
    "structure": lambda run: parse_design(run.design).described,
    "loss": lambda run: f"{run.loss:.4f}",
    "seeds": lambda run: f"{run.seeds}{' fresh' if run.confirmed else ''}",
    "width": lambda run: str(run.width),
    "steps": lambda run: f"{run.steps:,}",
    "train FLOPs": lambda run: f"{run.train_flops:.4g}",
    "parameters": lambda run: f"{run.params:,}",
}
