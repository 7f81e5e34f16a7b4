"""A search as one HTML page that needs no network and runs no script."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from nas.analysis.drawing import figure_svg
from nas.cli.shown import answer_lines, search_rows
from nas.cli.terminal import described
from nas.cli.worded import command_of
from nas.records.answers import Answer
from nas.study.report import environment_text


def render(
    live: Mapping[str, Any], trials: Sequence[Mapping[str, Any]], page: str | None, no_best: str
) -> str:
    """The page of a search.

    Parameters
    ----------
    live
        What the dashboard shows of it, as its page reads it.
    trials
        Every trial in REST's form.
    page
        Address of its page; None for a database without a service.
    no_best
        Why there is no answer, where `live` has none.
    """
    # which takes a while to import, and only this function needs it
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("nas.cli", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    search = live["search"]
    best = None if live["best"] is None else Answer.model_validate(live["best"])
    ran = {environment_text(t["environment"]) for t in trials if t["environment"]}
    return environment.get_template("report.html").render(
        title=search["name"] or f"Search {search['id'][:8]}",
        answer=answer_lines(best, no_best, rivals=None),
        facts=list(search_rows(search, page)),
        figures=[figure_svg(live[name]) for name in ("scatter", "curves")],
        curves_left_out=live["curves_total"] - len(live["curves"]["data"]),
        points=(live["points_shown"], live["points_total"]),
        trials=trials,
        unsuccessful=[t for t in trials if t["error"] or t["failure"]],
        unit=None if best is None else best.loss_unit,
        environments=sorted(ran),
        commands=_commands(search),
        version=version("einsum-nas"),
        written=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        described=described,
    )


def _commands(search: Mapping[str, Any]) -> list[str]:
    """What submits an equal search, asks for its answer, and exports its trials."""
    ask = f"einsum-nas best --search {search['id']} --train-flops"
    return [
        command_of(search["request"]),
        f"{ask} {search['request']['train_flops']}",
        f"einsum-nas export --search {search['id']} --format csv --rows points --out points.csv",
    ]
