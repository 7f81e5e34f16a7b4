"""Tables of the command line."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nas.errors import counted, span

if TYPE_CHECKING:
    from nas.records.answers import (
        Answer,
        Candidate,
        FrontierAnswer,
        Multiplier,
        Point,
        RealisedMultiplier,
    )
    from nas.store.audit import Entry
    from nas.store.keys import Key
    from nas.store.quotas import Use
    from nas.store.webhooks import Webhook

console = Console()


def described(design: str) -> str:
    """A design as people read it."""
    from nas.designs.design import parse_design  # numpy, which it needs, takes time to import

    return parse_design(design).described


def print_rows(rows: Sequence[Mapping[str, str]], if_none: str, table: Table | None = None) -> None:
    """Print rows, of which the first has every column's heading; a text if there are none."""
    if not rows:
        console.print(if_none)
        return
    table = table or Table(box=None, pad_edge=False)
    for heading in rows[0]:
        # an id that is cut off is of no use
        whole = len(rows[0][heading]) if heading == "webhook" else None
        table.add_column(heading, overflow="fold", min_width=whole)
    for row in rows:
        table.add_row(*(row.get(heading, "") for heading in rows[0]))
    console.print(table)


def show_frontier(front: FrontierAnswer) -> None:
    """Print the Pareto front over all structures, dense ones included."""
    unit = front.x_unit.partition(":")[0]
    measured = f", measured on {front.device}" if front.x_measured and front.device else ""
    table = Table(title=f"Pareto front: loss against {unit}{measured}", title_justify="left")
    columns: dict[str, Callable[[Point], str]] = {
        "train FLOPs": lambda p: f"{p.train_flops:.3e}",
        "loss": lambda p: f"{p.loss:.4f}",
        "structure": lambda p: described(p.design),
        "width": lambda p: str(p.width),
        "steps": lambda p: str(p.steps),
        "trial": lambda p: f"#{p.number}",
    }
    if front.x != "train_flops":
        columns = {unit: lambda p: f"{p[front.x]:.6g}", **columns}
    for name in columns:
        table.add_column(name, justify="left" if name == "structure" else "right")
    for point in front.frontier:
        table.add_row(*(read(point) for read in columns.values()))
    console.print(table)
    line = f"{counted(front.points, 'point')} of {counted(front.trials, 'completed run')}. "
    line += f"loss: {front.y_unit}" + "".join(f"\n{told}" for told in _left_out(front))
    if front.hypervolume is not None:
        hv = front.hypervolume
        line += (
            f"\nhypervolume {hv.overall:.4g} (structured {hv.structured:.4g}, dense "
            f"{hv.dense:.4g}) {hv.unit}, up to {hv.reference[0]:.4g} and loss {hv.reference[1]:.4g}"
        )
    for kind, law in (("structured", front.structured_law), ("dense", front.dense_law)):
        if law is not None:
            offset = f"{law.offset:.4g} + " if law.offset else ""
            line += (
                f"\n{kind}: loss ≈ {offset}{law.a:.4g} · C^(-{law.b:.4g}) on its "
                f"{counted(law.points, 'compute-optimal point')}"
            )
    console.print(line, style="dim")


def _left_out(answer: Answer | FrontierAnswer) -> Iterator[str]:
    """The runs that an answer on a measured axis does not read."""
    if answer.other_devices:
        others = " | ".join(f"{d.name}: {counted(d.runs, 'run')}" for d in answer.other_devices)
        yield f"left out, for times of other devices do not compare (--device): {others}"
    if answer.not_timed:
        runs = counted(answer.not_timed, "completed run")
        yield f"left out: {runs} whose seconds, or whose device, are not recorded"


def show_best(best: Answer) -> None:
    """Print the best structured and the best dense model side by side, with intervals."""
    at = best.budget if best.published is None else min(best.budget, best.published.read_at)
    title = f"Best within {at:.4g} {_unit(best)}: {best.kind}"
    table = Table(title=title, title_justify="left")
    table.caption = f"validation loss in {best.loss_unit}"
    for heading in ("", "structured", "dense"):
        table.add_column(heading)
    runs = (best.best_structured, best.best_dense)
    for label, read in _BEST_ROWS.items():
        table.add_row(label, *("–" if r is None else read(r) for r in runs))
    if len({r.device for r in runs if r is not None}) > 1:
        table.add_row("measured on", *((r and r.device) or "–" for r in runs))
    console.print(table)
    for line in best_lines(best):
        console.print(line, markup=False, highlight=False)
    for line in _small_print(best):
        console.print(line, style="dim", markup=False, highlight=False)


def _published_lines(best: Answer) -> Iterator[str]:
    """What a published answer rests on, before anything that it says."""
    table = best.published
    if table is None:
        return
    settings = "".join(f", {name} {value}" for name, value in table.settings.items())
    yield (
        f"PUBLISHED, by no run of this service: {table.name} (einsum-nas {table.version}, "
        f"{table.date}), recipe {table.recipe}{settings}, width "
        f"{', '.join(map(str, table.widths))}, {counted(len(table.seeds), 'seed')}, on "
        f"{table.machine}. Models of another size or data may rank otherwise: `einsum-nas search "
        f"--task {best.task.partition('@')[0]}` measures yours"
    )
    if best.budget > table.read_at:
        yield (
            f"the answer is of {table.read_at:.4g} {_unit(best)}, the table's greatest budget, for "
            f"{best.budget:.4g} is beyond it"
        )


def _unit(best: Answer) -> str:
    return "train FLOPs" if best.budget_axis == "train_flops" else best.budget_unit


_SHOWN_RIVALS = 6


def best_lines(best: Answer, rivals: int | None = _SHOWN_RIVALS) -> Iterator[str]:
    """What an answer says, a line each; at most so many rivals, all for None."""
    yield from _published_lines(best)
    interval = range_text(best.interval, ".4f") if best.interval else "no interval: one seed"
    yield f"best: {described(best.design)}, width {best.width}, {counted(best.steps, 'step')}"
    yield f"verdict: {best.verdict} ({best.verdict_reason})"
    yield f"expected loss {best.expected_loss:.4f} {best.loss_unit} ({interval})"
    unsure = ", unconfirmed" if best.verdict == "unconfirmed" else ""
    gap = best.dense_minus_structured
    if gap is not None:
        yield (
            f"dense − structured: {gap.difference:+.4f} {best.loss_unit}{unsure} "
            f"({range_text(gap.difference_interval, '+.4f')}{_of_samples(best)})"
        )
    if best.structured_multiplier is not None:
        ratio = multiplier_text(best.structured_multiplier, unsure)
        yield f"compute multiplier over dense: {ratio}"
    realised = best.structured_realised_multiplier
    if realised is not None:
        told = multiplier_text(realised, unsure)
        where = f", in seconds on {realised.device}" if realised.value is not None else ""
        yield f"realised multiplier over dense: {told}{where}{_shares(realised)}"
    yield from _rivals(best, rivals)
    if best.extrapolation is not None:
        out = best.extrapolation
        yield (
            f"PREDICTED, at {out.beyond:.3g} times the greatest budget measured "
            f"({out.measured[0]:.3g} to {out.measured[1]:.3g} train FLOPs): {out.law}, fitted to "
            f"{counted(out.widths, 'width')}"
        )
        if out.left_out:
            were = "structure is" if out.left_out == 1 else "structures are"
            yield (
                f"{out.left_out:,} measured {were} left out: no law can be fitted at widths that "
                "would be run at this budget"
            )
    if best.published is None:
        yield _tau_line(best)


def multiplier_text(found: Multiplier, unsure: str = "") -> str:
    """A multiplier with its interval, or why it is unknown; `unsure` stands behind its value."""
    if found.value is None:
        return f"unknown ({found.reason})"
    sign = {"at_least": "≥ ", "less_than": "< "}.get(found.kind, "")
    seeds = counted(found.seeds, "seed")
    if found.interval is not None:
        seeds = f"95%: {_ratio(found.interval[0])} to {_ratio(found.interval[1])}, {seeds}"
    predicted = ", predicted" if found.kind == "predicted" else ""
    return f"{sign}{_ratio(found.value)}{unsure} ({seeds}{predicted})"


def _shares(found: RealisedMultiplier) -> str:
    """How many runs were trained as one, where the compared ones differ in that."""
    if len(found.together) < 2:
        return ""
    numbers = " and ".join(str(n) for n in found.together)
    return f"; of runs trained {numbers} at a time, each with its share of the time"


def _ratio(value: float) -> str:
    return f"{value:.2f}" if value < 1000 else f"{value:.3g}"


def _of_samples(best: Answer) -> str:
    """What intervals of differences are of, where they are not over seeds."""
    alone = best.kind != "predicted" and best.evidence.noise is None
    return ", of the validation samples alone" if alone else ""


def _rivals(best: Answer, most: int | None) -> Iterator[str]:
    count = best.evidence.compared
    if not count:
        yield "no other structure was run within this budget to compare with"
        return
    if not best.indistinguishable:
        others = "the one other structure" if count == 1 else f"the {count:,} next best"
        yield f"clearly different from {others}{_of_samples(best)}"
        return
    together = " (simultaneous intervals)" if best.kind != "predicted" and count > 1 else ""
    yield (
        f"not clearly different from the best, of {count:,} compared{together}{_of_samples(best)}:"
    )
    for r in best.indistinguishable[:most]:
        yield (
            f"  {described(r.design)}, width {r.width}: {r.difference:+.4f} "
            f"({range_text(r.difference_interval, '+.4f')})"
        )
    if more := len(best.indistinguishable[most:] if most else ()):
        yield f"  and {more:,} more (--json)"


def _tau_line(best: Answer) -> str:
    found = best.confirmation
    if found is None:
        return "not confirmed with fresh seeds yet; run `einsum-nas confirm`"
    tau = "none" if found.tau is None else f"{found.tau:.2f}"
    return (
        f"confirmed: {counted(found.candidates, 'run')} with "
        f"{counted(found.seeds, 'fresh seed')} each at {found.longer:g}× their compute; Kendall's "
        f"τ of the ranking {tau} ({range_text(found.interval, '.2f')})"
    )


def range_text(interval: tuple[float, float] | None, form: str) -> str:
    """A 95% interval, its ends in the format `form`."""
    if interval is None:
        return "interval unknown"
    return f"95%: {interval[0]:{form}} to {interval[1]:{form}}"


def _small_print(best: Answer) -> Iterator[str]:
    evidence = best.evidence
    whose = counted(evidence.searches, "search", "searches")
    if best.published is not None:
        whose = best.published.name
    yield (
        f"{best.kind} on {best.task}: {counted(evidence.trials, 'completed run')} of {whose}, "
        f"{counted(evidence.seeds, 'seed')} behind the best"
    )
    yield f"intervals: {best.interval_means}"
    if best.comparisons_mean != best.interval_means:
        yield f"comparisons: {best.comparisons_mean}"
    if best.device is not None:
        yield f"measured on {best.device}"
    yield from _left_out(best)
    if best.validation_interval is not None:
        low, high = best.validation_interval
        yield (
            f"95% interval of the loss over the sampling of the validation data: {low:.4f} to "
            f"{high:.4f}"
        )
    if not best.confirmed and best.kind != "predicted":
        yield "the loss comes from the runs that the best was selected by, so it is biased low"


_BEST_ROWS: Mapping[str, Callable[[Candidate], str]] = {
    "structure": lambda r: r.name,
    "θ": lambda r: ", ".join(f"{v:.4g}" for v in r.theta) or "none",
    "validation loss": lambda r: f"{r.loss:.4f}",
    "seeds": lambda r: f"{r.seeds}{' fresh' if r.confirmed else ''}",
    "width": lambda r: str(r.width),
    "steps": lambda r: str(r.steps),
    "train FLOPs": lambda r: f"{r.train_flops:.6e}",
    "training time": lambda r: _measured(r.train_seconds, 1, "s"),
    "inference FLOPs/token": lambda r: f"{r.inference_flops:.4e}",
    "parameters": lambda r: f"{r.params:,}",
    "time per step": lambda r: _measured(r.step_seconds, 1e3, "ms"),
    "peak memory": lambda r: _measured(r.peak_memory, 2**-20, "MiB"),
    "trial": lambda r: f"#{r.number}",
}


def _measured(value: float | None, scale: float, unit: str) -> str:
    return "not measured" if value is None else f"{value * scale:.4g} {unit} measured"


def show_structure(inspected: Mapping[str, Any]) -> None:
    """Print the exact properties of one structure of any family."""
    table = Table(show_header=False)
    for label, text in _structure_rows(inspected):
        table.add_row(label, text)
    console.print(table)


def _structure_rows(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key in _STRUCTURE_ROWS:
        value = found.get(key)
        if isinstance(value, Mapping):
            value = "  ".join(f"{k} {v}" for k, v in value.items())
        elif isinstance(value, list):
            value = ", ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in value)
        if value is not None:
            yield key, str(value)
    share = f"{found['macs'] / found['dense_macs']:.4f} of dense"
    yield "MACs per token", f"{found['macs']:,}  ({share})"
    if "macs_a_first" in found:
        orders = f"{found['macs_a_first']:,} A first, {found['macs_b_first']:,} B first"
        yield "  by order", orders
    if "gate_macs" in found:
        yield "  in the gate", f"{found['gate_macs']:,}"
    yield "FLOPs per token", f"{found['flops']:,} forward"
    yield "parameters", f"{found['params']:,}"
    if found.get("rank") is not None:
        yield "rank", f"{found['rank']:,} {found.get('rank_is', 'generic')}"
    if not found.get("linear", True):
        told = f"{found['activation']} of {found['intermediate']:,} numbers between the factors"
        yield "linear", f"no: {told}"
    if "omega" in found:
        for label, end in (("ω  ψ  ν", ""), ("  of the integers", "_integer")):
            yield label, "  ".join(f"{found[k + end]:.4g}" for k in ("omega", "psi", "nu"))
    if "padded_in" in found:
        yield "axes multiply to", f"{found['padded_in']:,} inputs, {found['padded_out']:,} outputs"
    if "waste" in found:
        yield "waste", f"{found['waste']:.2%} more MACs, for padded inputs and dropped outputs"
    if found.get("dropped_inputs") or found.get("constant_outputs"):
        lost = f"{found['dropped_inputs']:,} inputs are dropped, "
        lost += f"{found['constant_outputs']:,} outputs are always zero"
        yield "lost to rounding", lost
    for part in found.get("parts", ()):
        yield "part", f"{part['name']}: {part['macs']:,} MACs, {part['params']:,} parameters"
    for f in found.get("factors", ()):
        init = f"fan in {f['fan_in']}, fan out {f['fan_out']}, init std {f['init_std']:.6g}, "
        yield f"factor {f['name']}", init + f"Adam multiplier {f['adam_lr_multiplier']:.6g}"
    if found.get("degenerate"):
        more = " and expresses no more" if found.get("linear", True) else ""
        yield "note", f"degenerate: it costs more than dense{more}"


_STRUCTURE_ROWS = (
    "name", "family", "theta", "canonical_theta", "experts", "active", "shared", "granularity",
    "sizing", "sizes", "axes", "kernel", "blocks", "blocks_in_a_row", "channel_spacing", "einsum",
    "contraction",
)  # fmt: skip


def show_preview(preview: Mapping[str, Any]) -> None:
    """Print what a search would run."""
    table = Table(title="What this search would run", title_justify="left", show_header=False)
    for label, text in _preview_rows(preview):
        table.add_row(label, text)
    console.print(table)


def _preview_rows(preview: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "recipe", f"{preview['recipe']['name']}, losses in {preview['loss_unit']}"
    widths = ", ".join(_with_steps(r["width"], r["steps"]) for r in preview["references"])
    yield "dense references", f"{counted(len(preview['references']), 'width')}: {widths}"
    known = preview["total_runs"] is not None
    yield "candidates", f"{'' if known else 'at most '}{preview['trials']:,}"
    for name, plans in preview["widths"].items():
        if plans and name != "dense":
            ends = dict.fromkeys((tuple(plans[0]), tuple(plans[-1])))
            yield "such as", f"{name}: width {' to '.join(_with_steps(*end) for end in ends)}"
    yield "stopping rule", preview["stopping_rule"]
    if known:
        yield "runs", f"{preview['total_runs']:,}"
    yield "train FLOPs", f"at most {preview['total_train_flops_at_most']:.4g}"
    parts, seconds = preview["parts"], preview["train_seconds_at_most"]
    if parts is None:
        about = _NOT_TIMED if seconds is None else f"about {span(seconds)} at most, {_ONE_BY_ONE}"
        yield "training time", about
        if preview["request"]["total_seconds"] is not None:
            yield "division", _NOT_TIMED
        return
    yield "references take", f"{parts['references']:.4g}"
    range_ = f"{parts['least_candidates']:,} to {parts['most_candidates']:,}"
    yield "exploring", f"{parts['exploring']:.4g}, for {range_} candidates"
    yield "of which racing", f"{parts['racing']:.4g}, to take the best to their end"
    confirmed = counted(parts["confirmed"], "candidate")
    seeds = counted(parts["fresh_seeds"], "fresh seed")
    yield "confirming", f"{parts['confirming']:.4g}, for {confirmed} and dense, {seeds} each"
    if parts["train_seconds"] is not None:
        yield "training time", f"about {span(parts['train_seconds'])}, {_ONE_BY_ONE}"


_NOT_TIMED = "not known before a run on this task was timed here"
_ONE_BY_ONE = "one run after another (predicted from the newest runs of the task)"


def _with_steps(width: int, steps: int) -> str:
    return f"{width} ({counted(steps, 'step')})"


def show_searches(found: Sequence[Mapping[str, Any]]) -> None:
    """Print searches, newest first, with full ids, which other commands take."""
    rows: list[dict[str, str]] = []
    for s in found:
        total = f"/{s['runs_total']}" if s["runs_total"] else ""
        whose = "" if s["tenant"] == "default" else f" of {s['tenant']}"
        row = {
            "search": s["id"],
            "state": s["state"],
            "task": escape(s["task"] + whose),
            "budget": f"{s['request']['train_flops']:.3g}" + _of_total(s["request"]),
            "runs": f"{s['trial_counts'].get('complete', 0)}{total}",
            "priority": str(s["priority"]),
        }
        rows.append(row)
        tags = " ".join(f"#{tag}" for tag in s.get("tags", ()))
        if called := ", ".join(filter(None, (s.get("name"), tags))):
            rows.append({"search": f"  {escape(called)}"})
        failed = f"{s['failure']}: {s['error']}" if s["failure"] else s["error"] or ""
        if why := s["limit_reached"] or failed:
            rows.append({"search": f"  {escape(why)}"})
    print_rows(rows, "no search matches these filters")


def _of_total(request: Mapping[str, Any]) -> str:
    """The budget of the whole search, behind that of a run."""
    for name, unit in (("total_train_flops", ""), ("total_seconds", " s")):
        if request.get(name) is not None:
            return f" of {request[name]:.3g}{unit}"
    return ""


def show_workers(found: Sequence[Mapping[str, Any]]) -> None:
    """Print a table of workers and services."""
    rows = [
        {
            "process": p["name"],
            "kind": p["kind"],
            "state": p["state"],
            "search": p["search_id"] or "",
            "version": p["version"],
            "about": escape(", ".join(f"{name} {value}" for name, value in p["about"].items())),
        }
        for p in found
    ]
    none = "no worker or service was seen recently; `einsum-nas worker` starts one"
    print_rows(rows, none, Table())


def show_keys(found: Sequence[Key]) -> None:
    """Print a table of keys."""
    rows = [
        {
            "key": key.id,
            "tenant": key.tenant,
            "name": escape(key.name) + ("" if key.subject is None else " (account)"),
            "scopes": ", ".join(key.scopes),
            "ends": key_ends(key),
            "last used": "never" if key.used_at is None else _day(key.used_at),
        }
        for key in found
    ]
    print_rows(rows, "there is no key; `einsum-nas keys create --name NAME` creates one")


def show_webhooks(found: Sequence[Webhook]) -> None:
    """Print a table of webhooks."""
    rows = [
        {
            "webhook": hook.id,
            "tenant": hook.tenant,
            "url": escape(hook.url),
            "events": ", ".join(hook.events),
            "taken": f"{hook.delivered:,}",
            "waiting": f"{hook.waiting:,}",
            "given up": f"{hook.given_up:,}",
            "last error": escape(hook.error or ""),
        }
        for hook in found
    ]
    print_rows(rows, "there is no webhook; `einsum-nas webhooks add URL` adds one")


def key_ends(key: Key) -> str:
    """When the key expires, or why it is no longer valid."""
    refusal = key.refusal(time.time())
    if refusal is not None:
        return refusal
    if key.expires_at is None:
        return "never expires"
    return "expires " + time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(key.expires_at))


def show_tenants(found: Sequence[Use]) -> None:
    """Print a table of tenants' quotas and their use."""
    rows = [
        {
            "tenant": use.tenant,
            "searches": f"{use.searches} of {_or_any(use.quotas.searches)}",
            "running": f"{use.running} of {_or_any(use.quotas.concurrency)}",
            "train FLOPs": f"{use.train_flops:.4g} of {_or_any(use.quotas.train_flops)} "
            f"in {use.quotas.days:g} days",
        }
        for use in found
    ]
    print_rows(rows, "no tenant has a search or a quota")


def _or_any(limit: float | None) -> str:
    return "any number" if limit is None else f"{limit:.6g}"


def show_audit(found: Sequence[Entry]) -> None:
    """Print records of the audit log, newest first, one a line."""
    for line in found:
        who = line.tenant or "unknown caller"
        who += f" (key {line.key_id})" if line.key_id else ""
        whence = f"from {line.address}" if line.address else ""
        answer = "" if line.status is None else str(line.status)
        what = (line.action, line.target, answer, line.reason)
        told = "  ".join(part for part in (_day(line.created_at), who, *what, whence) if part)
        console.print(told, markup=False, highlight=False, soft_wrap=True)
    if not found:
        console.print("the audit log is empty")


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
