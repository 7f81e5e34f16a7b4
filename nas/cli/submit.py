"""Commands that submit a search or its confirmation, and show what came of it."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nas.cli.common import (
    Json,
    Server,
    amount,
    count,
    named_values,
    opened,
    print_json,
    show,
    whole,
)
from nas.cli.terminal import show_best, show_frontier, show_preview
from nas.errors import NotFound

if TYPE_CHECKING:
    from nas.cli.local import Local, LocalSearch
    from nas.cli.remote import Remote
    from nas.client import RemoteSearch

Wait = Annotated[bool, typer.Option("--wait", help="Run it and show the answer.")]


def search(
    train_flops: Annotated[float, amount("FLOPS", "Budget of each run, train FLOPs.")],
    task: Annotated[str, typer.Option(help="Task to train.")] = "text",
    data: Annotated[
        str | None, typer.Option(help="File or folder, or hf:NAME, instead of the default data.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Recipe of the task; by default its first one.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Change a recipe setting; repeatable."),
    ] = None,
    trials: Annotated[
        int | None,
        count(
            "N",
            "Candidates, besides the dense references: by default 16, or as many as a budget "
            "for the whole search pays for.",
        ),
    ] = None,
    sampler: Annotated[
        str, typer.Option(help="surrogate | tpe | nsga2 | random | qmc | gp")
    ] = "surrogate",
    stopping: Annotated[
        str | None,
        typer.Option(
            help="Rule by which runs are paused, go on and are stopped early: none | median | "
            "mo-asha | frontier; by default frontier with a budget for the whole search, else none."
        ),
    ] = None,
    total_train_flops: Annotated[
        float | None,
        amount("FLOPS", "Budget of the whole search, which divides it and confirms its best."),
    ] = None,
    total_seconds: Annotated[
        float | None, amount("S", "The same in seconds that workers hold the search.")
    ] = None,
    warm_start: Annotated[
        str, typer.Option(help="auto: begin with what earlier searches have measured | none")
    ] = "auto",
    objective: Annotated[
        str, typer.Option(help="budget: lowest loss at the budget | pareto: loss and train FLOPs")
    ] = "budget",
    seed: Annotated[int, count("N", "Seed of proposals and runs.")] = 0,
    references: Annotated[int, count("N", "Dense runs, each of another width.")] = 5,
    replicates: Annotated[
        int, count("N", "Runs of each candidate and reference, with different seeds.")
    ] = 1,
    keep_weights: Annotated[
        int, count("N", "Complete runs, the best, whose trained weights are kept, 0 to 16.")
    ] = 1,
    families: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            help="Families to search: einsum, btt-moe, low-rank-moe, dense-moe, ffn-moe, "
            "convolution, blast, block-sparse, lost, pixelfly, cola-mlp, activated; by default "
            "einsum.",
        ),
    ] = None,
    factors: Annotated[
        str | None, typer.Option(metavar="N,M", help="Factors of an einsum, 2 to 4; by default 2.")
    ] = None,
    experts: Annotated[
        str | None, typer.Option(metavar="N,M", help="Experts of a mixture; by default 8.")
    ] = None,
    active: Annotated[
        str | None, typer.Option(metavar="N,M", help="Experts that process a token; by default 2.")
    ] = None,
    shared: Annotated[
        str | None,
        typer.Option(
            metavar="N,M", help="Those of them that process every token, unweighed; by default 0."
        ),
    ] = None,
    granularity: Annotated[
        str | None,
        typer.Option(
            metavar="N,M",
            help="Each expert of ffn-moe has 1/N of the hidden dimension; by default 1.",
        ),
    ] = None,
    activation: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            help="silu | gelu | relu, between the factors of cola-mlp and activated; by default "
            "silu.",
        ),
    ] = None,
    heads: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            help="free | aligned: attention heads coincide with blocks of the projections; "
            "by default free.",
        ),
    ] = None,
    trial_seconds: Annotated[
        float | None, amount("S", "Most seconds of one attempt at a trial.")
    ] = None,
    seconds: Annotated[float | None, amount("S", "Most seconds of the search on workers.")] = None,
    most_train_flops: Annotated[
        float | None,
        amount("FLOPS", "Most train FLOPs of all runs together, each of which trains to its end."),
    ] = None,
    priority: Annotated[int, count("N", "Searches of higher priority run first.")] = 0,
    preview: Annotated[
        bool, typer.Option("--preview", help="Show what it would run, and submit nothing.")
    ] = False,
    wait: Wait = False,
    server: Server = None,
    as_json: Json = False,
) -> None:
    """Submit a search; with --wait, run it to its end and show the answer."""
    from nas.planning.request import SearchRequest

    fields: dict[str, Any] = {
        "task": task, "data": data, "recipe": recipe, "train_flops": train_flops,
        "sampler": sampler, "stopping": stopping, "total_train_flops": total_train_flops,
        "total_seconds": total_seconds, "warm_start": warm_start,
        "objective": objective, "seed": seed, "references": references,
        "replicates": replicates, "keep_weights": keep_weights,
        "space": _space(
            families=families, factors=factors, experts=experts, active=active, shared=shared,
            granularity=granularity, activation=activation, heads=heads,
        ),
        "limits": _given(
            trial_seconds=trial_seconds, seconds=seconds, total_train_flops=most_train_flops
        ),
        "priority": priority, "overrides": named_values("set", overrides, "depth=6") or None,
        **(_given(trials=trials) or {}),
    }  # fmt: skip
    SearchRequest.checked(fields)
    with opened(server) as place:
        if preview:
            show(place.preview(**fields), as_json, show_preview)
            return
        show_outcome(place.search(**fields), place.then, wait, as_json)


def _with_options_of(
    command: Callable[..., None], *left_out: str
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator of a command that takes the options of another one, some left out."""
    signature = inspect.signature(command, eval_str=True)
    kept = [p for name, p in signature.parameters.items() if name not in left_out]

    def declare(own: Callable[..., None]) -> Callable[..., None]:
        own.__dict__["__signature__"] = signature.replace(parameters=kept)
        return own

    return declare


@_with_options_of(search, "preview", "wait")
def preview(**options: Any) -> None:
    """Show what a search with these options would run, and submit nothing."""
    search(**options, preview=True)


def _given(**values: float | None) -> dict[str, float] | None:
    """The options that were given; None if none was."""
    return {name: value for name, value in values.items() if value is not None} or None


def _space(**choices: str | None) -> dict[str, list[Any]] | None:
    """Comma-separated choices as fields of a request's `Space`; None if there are none."""
    numbers = ("factors", "experts", "active", "shared", "granularity")
    return {
        name: [whole(part) for part in text.split(",")] if name in numbers else text.split(",")
        for name, text in choices.items()
        if text is not None
    } or None


def confirm(
    search_id: Annotated[
        str | None, typer.Option("--search", help="The search; by default the last that succeeded.")
    ] = None,
    top: Annotated[int, count("K", "Candidates to run again, besides the best dense one.")] = 3,
    seeds: Annotated[int, count("N", "New seeds for each candidate.")] = 3,
    longer: Annotated[float, amount("C", "Train C times as many steps as before.")] = 1.0,
    spread: Annotated[
        bool,
        typer.Option("--spread", help="Take candidates from the whole ranking, not from its top."),
    ] = False,
    wait: Wait = False,
    server: Server = None,
    as_json: Json = False,
) -> None:
    """Run the best candidates of a search again with new seeds, to correct for lucky runs."""
    from nas.service.confirm import ConfirmRequest

    fields: dict[str, Any] = {"top": top, "seeds": seeds, "longer": longer, "spread": spread}
    ConfirmRequest.checked(fields)
    with opened(server) as place:
        source = place.get_search(search_id or _newest_ended(place))
        show_outcome(source.confirm(**fields), place.then, wait, as_json)


def _newest_ended(place: Local | Remote) -> str:
    """The id of the newest search that succeeded and is no confirmation."""
    for found in place.newest(limit=500, state="succeeded"):
        if found["request"].get("confirm") is None:
            return str(found["id"])
    raise NotFound("no search has succeeded yet; run `einsum-nas search --wait`, then confirm it")


def show_outcome(
    submitted: LocalSearch | RemoteSearch, then: str, wait: bool, as_json: bool
) -> None:
    """Show that a search is queued, or wait for its end and show its answer."""
    page = f"\nits page: {submitted.page}" if submitted.page else ""
    if not wait:
        queued = f"search {submitted.id} is queued{then}{page}"
        show(submitted.data, as_json, lambda _: print(queued))
        return
    # at once, so that whoever stops waiting can find it again
    print(f"search {submitted.id}{page}", file=sys.stderr if as_json else sys.stdout, flush=True)
    if as_json:
        ended = submitted.wait()
    else:
        from nas.cli.progress import search_progress

        with search_progress() as advance:
            ended = submitted.wait(poll_seconds=0.5, progress=lambda s: advance(s.data))
    data = ended.data
    if data["state"] != "succeeded":
        error = f": {data['error']}" if data["error"] else ""
        print(f"search {data['state']}{error}", file=sys.stderr)
        raise typer.Exit(1)
    if (reached := data["limit_reached"]) is not None:
        print(f"a limit ended the search before its last trial: {reached}", file=sys.stderr)
    best = ended.best()
    if as_json:
        print_json({"search": data, "best": best})
        return
    show_frontier(ended.frontier())
    show_best(best)
