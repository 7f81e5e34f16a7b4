"""Tables and progress of the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from nas.analysis.best import INTERVAL_MEANS

console = Console()
_FINISHED = ("complete", "failed", "stopped")


_PROGRESS_COLUMNS = (
    TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
    TextColumn("runs"), TimeElapsedColumn(),
)  # fmt: skip


@contextmanager
def study_progress() -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar over the runs of a study: (finished, in all, what happens)."""
    with Progress(*_PROGRESS_COLUMNS, console=console) as progress:
        bar = progress.add_task("", total=None)

        def show(done: int, total: int, what: str) -> None:
            progress.update(bar, completed=done, total=total or None, description=what)
            if not console.is_terminal:
                console.print(f"{done} of {total} runs: {what}", markup=False)

        yield show


@contextmanager
def search_progress() -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A progress bar over the runs of a search; call it with the search as REST gives it."""
    with Progress(*_PROGRESS_COLUMNS, console=console) as progress:
        bar = progress.add_task("waiting for a worker", total=None)
        seen = -1

        def show(search: Mapping[str, Any]) -> None:
            nonlocal seen
            counts = search["trial_counts"]
            done = sum(counts.get(state, 0) for state in _FINISHED)
            total = search["runs_total"]
            progress.update(bar, completed=done, total=total, description=search["state"])
            if not console.is_terminal and total and done != seen:
                console.print(f"{search['state']}: {done} of {total} runs finished")
            seen = done

        yield show


def show_frontier(front: Mapping[str, Any]) -> None:
    """The overall front, with what is dense marked as such."""
    table = Table(title="Pareto front: loss against train FLOPs", title_justify="left")
    for name, right in (
        ("train FLOPs", True), ("loss", True), ("structure", False), ("width", True),
        ("steps", True), ("trial", True),
    ):  # fmt: skip
        table.add_column(name, justify="right" if right else "left")
    for p in front["frontier"]:
        table.add_row(
            f"{p['train_flops']:.3e}", f"{p['loss']:.4f}", _structure(p), str(p["width"]),
            str(p["steps"]), f"#{p['number']}",
        )  # fmt: skip
    console.print(table)
    console.print(
        f"{front['points']} points of {front['trials']} runs. loss: {front['y_unit']}", style="dim"
    )


def _structure(point: Mapping[str, Any]) -> str:
    if point["name"] != "einsum":
        return str(point["name"])
    return "einsum " + " ".join(f"{v:.2f}" for v in point["theta"])


def show_best(best: Mapping[str, Any]) -> None:
    """The best structured run and the best dense run side by side."""
    table = Table(title=f"Best within {best['budget']:.3e} train FLOPs", title_justify="left")
    table.add_column("")
    table.add_column("structured")
    table.add_column("dense")
    runs = (best["best_structured"], best["best_dense"])
    table.caption = f"validation loss in {best['loss_unit']}"
    for label, read in _BEST_ROWS:
        table.add_row(label, *("–" if r is None else read(r) for r in runs))
    console.print(table)
    gap = best["dense_minus_structured"]
    if gap is not None:
        low, high = gap["difference_interval"]
        console.print(
            f"dense − structured: {gap['difference']:+.4f} {best['loss_unit']} "
            f"(95%: {low:+.4f} to {high:+.4f}), paired over validation samples"
        )
    multiplier = best["multiplier_over_dense"]
    if multiplier is not None:
        sign = {"exact": "", "at_least": "≥ ", "less_than": "< "}[multiplier["kind"]]
        line = f"compute multiplier over dense: {sign}{multiplier['value']:.2f}"
        if multiplier["interval"] is not None:
            low, high = multiplier["interval"]
            line += f" (95%: {low:.2f} to {high:.2f})"
        console.print(line)
    evidence = best["evidence"]
    console.print(
        f"{best['kind']} on {evidence['trials']} runs, {evidence['seeds']} seed(s), "
        f"{evidence['searches']} search(es); of the {evidence['compared']} next best, "
        f"{len(best['indistinguishable'])} cannot be told apart from the best.\n"
        f"intervals: {INTERVAL_MEANS}",
        style="dim",
    )


_BEST_ROWS: Sequence[tuple[str, Callable[[Mapping[str, Any]], str]]] = (
    ("structure", lambda r: str(r["name"])),
    ("θ", lambda r: ", ".join(f"{v:.4g}" for v in r["theta"])),
    ("validation loss", lambda r: f"{r['loss']:.4f} ± {1.96 * r['loss_stderr']:.4f}"),
    ("width", lambda r: str(r["width"])),
    ("steps", lambda r: str(r["steps"])),
    ("train FLOPs", lambda r: f"{r['train_flops']:.6e}"),
    ("training time", lambda r: f"{r['train_seconds']:.1f} s measured"),
    ("trial", lambda r: f"#{r['number']}"),
)


def show_structure(inspected: Mapping[str, Any]) -> None:
    """Everything exact about one structure."""
    table = Table(show_header=False)
    for key in ("name", "theta", "canonical_theta", "sizing", "sizes", "einsum", "contraction"):
        value = inspected[key]
        if isinstance(value, Mapping):
            value = "  ".join(f"{k} {v}" for k, v in value.items())
        elif isinstance(value, list):
            value = ", ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in value)
        table.add_row(key, str(value))
    dense = inspected["dense_macs"]
    share = f"{inspected['macs'] / dense:.4f} of dense"
    table.add_row("MACs per token", f"{inspected['macs']:,}  ({share})")
    orders = f"{inspected['macs_a_first']:,} A first, {inspected['macs_b_first']:,} B first"
    table.add_row("  by order", orders)
    table.add_row("FLOPs per token", f"{inspected['flops']:,} forward")
    table.add_row("parameters", f"{inspected['params']:,}")
    table.add_row("rank", f"{inspected['rank']:,} generic")
    table.add_row("ω  ψ  ν", "  ".join(f"{inspected[k]:.4g}" for k in ("omega", "psi", "nu")))
    table.add_row(
        "  of the integers",
        "  ".join(f"{inspected[f'{k}_integer']:.4g}" for k in ("omega", "psi", "nu")),
    )
    padded = f"{inspected['padded_in']:,} inputs, {inspected['padded_out']:,} outputs"
    table.add_row("axes multiply to", padded)
    table.add_row(
        "waste", f"{inspected['waste']:.2%} more MACs, spent on padded inputs and cut outputs"
    )
    if inspected["dropped_inputs"] or inspected["constant_outputs"]:
        table.add_row(
            "lost to rounding",
            f"{inspected['dropped_inputs']:,} inputs are dropped, "
            f"{inspected['constant_outputs']:,} outputs are always zero",
        )
    for f in inspected["factors"]:
        table.add_row(
            f"factor {f['name']}",
            f"fan in {f['fan_in']}, fan out {f['fan_out']}, init std {f['init_std']:.6g}, "
            f"Adam multiplier {f['adam_lr_multiplier']:.6g}",
        )
    if inspected["degenerate"]:
        table.add_row("note", "degenerate: costs more than dense, which can express the same")
    console.print(table)
