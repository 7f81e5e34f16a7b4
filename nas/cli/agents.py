"""A server of the Model Context Protocol: what an agent may do with searches.

Its tools are what the command line does on a database or, over REST, on a service.  There the key
decides: what its scopes and quotas refuse is told to the agent, as is every other refusal, in the
same words as to a person.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import wraps
from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec, TypeVar

import anyio
from anyio import to_thread
from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp_types import ToolAnnotations
from pydantic import BeforeValidator, Field
from pydantic_core import to_jsonable_python

from nas.cli.looking import chosen_trials, described
from nas.errors import EinsumNasError
from nas.planning.request import SearchRequest
from nas.store.records import TERMINAL

if TYPE_CHECKING:
    from nas.cli.local import Local
    from nas.cli.remote import Remote

INSTRUCTIONS = """
Searches for structures of linear layers (low-rank, Kronecker, Monarch, Block Tensor-Train, mixtures
of experts and others) that reach a lower loss than dense layers at the same compute.

FLOPs are train FLOPs: 1 MAC = 2 FLOPs, training = 3 x forward. Begin with list_tasks.
preview_search tells what a search would run and what it costs; submit_search queues it;
wait_for_search waits for its end, in parts. best_structure answers with a verdict: "unconfirmed"
means that other seeds may turn the result, and confirm_search runs the best again with fresh seeds.
Report the verdict and the intervals with a loss, and whether the answer was measured, predicted or
published.
"""
#: Seconds between two looks at a search that is waited for.
_POLL_SECONDS = 1.0
P = ParamSpec("P")
T = TypeVar("T")
Request = Annotated[SearchRequest, BeforeValidator(SearchRequest.checked)]
SearchId = Annotated[str, Field(description="Id of a search, or the beginning of it.")]
OneSearch = Annotated[
    str | None, Field(description="Only runs of this search; otherwise all of the task.")
]
Task = Annotated[str, Field(description="Name of a task, as list_tasks gives it.")]
Budget = Annotated[float | None, Field(gt=0, description="Give exactly one of the budgets.")]
Count = Annotated[int, Field(ge=1, le=500)]
_READS = ToolAnnotations(read_only_hint=True, open_world_hint=False)
_ADDS = ToolAnnotations(read_only_hint=False, destructive_hint=False, open_world_hint=False)
_ENDS = ToolAnnotations(read_only_hint=False, destructive_hint=True, open_world_hint=False)


def _told(act: Callable[P, T]) -> Callable[P, T]:
    """A function whose refusals the agent is told in their own words."""

    @wraps(act)
    def tool(*given: P.args, **named: P.kwargs) -> T:
        try:
            return act(*given, **named)
        except EinsumNasError as error:
            raise ToolError(str(error)) from error

    return tool


def server_of(place: Local | Remote) -> MCPServer:
    """The server whose tools use a database or a service."""
    server = MCPServer(
        "einsum-nas", version=version("einsum-nas"), instructions=INSTRUCTIONS, log_level="ERROR"
    )

    def tool(kind: ToolAnnotations) -> Callable[[Callable[..., dict[str, Any]]], object]:
        return lambda act: server.tool(annotations=kind)(_told(act))

    @tool(_READS)
    def list_tasks() -> dict[str, Any]:
        """What searches can train on: recipes, budgets that a run may have, unit of the loss."""
        return {"tasks": place.tasks()}

    @tool(_READS)
    def list_searches(
        state: Annotated[
            str | None, Field(description=f"queued | running | paused | {' | '.join(TERMINAL)}")
        ] = None,
        task: str | None = None,
        text: Annotated[
            str | None, Field(description="Part of a name or tag, or the beginning of an id.")
        ] = None,
        limit: Count = 20,
    ) -> dict[str, Any]:
        """The newest searches."""
        wanted = {"state": state, "task": task, "text": text}
        chosen = {name: value for name, value in wanted.items() if value is not None}
        return {"searches": place.newest(limit=limit, **chosen)}

    @tool(_READS)
    def preview_search(request: Request) -> dict[str, Any]:
        """What a search would run and what it would cost; nothing is submitted."""
        return place.preview(**_fields(request))

    @tool(_ADDS)
    def submit_search(request: Request) -> dict[str, Any]:
        """Queue a search: it trains its runs, which costs compute. Gives its id."""
        made = place.search(**_fields(request))
        return {"id": made.id, "state": made.data["state"], "page": made.page}

    @tool(_READS)
    def get_search(search_id: SearchId) -> dict[str, Any]:
        """A search: state, counts of runs, cost, estimate of the seconds left, and its best."""
        return described(place.get_search(search_id))

    @server.tool(annotations=_READS)
    async def wait_for_search(
        search_id: SearchId,
        ctx: Context,
        seconds: Annotated[
            float, Field(ge=0, le=600, description="At most; call again if it has not ended.")
        ] = 50.0,
    ) -> dict[str, Any]:
        """Wait until a search has ended, and get it as get_search does."""
        deadline = time.monotonic() + seconds
        look = _told(lambda: described(place.get_search(search_id)))
        while True:
            found = await to_thread.run_sync(look)
            search = found["search"]
            if search["state"] in TERMINAL or time.monotonic() >= deadline:
                return found
            done = sum(search["trial_counts"].get(s, 0) for s in ("complete", "failed", "stopped"))
            await ctx.report_progress(done, search["runs_total"], search["state"])
            await anyio.sleep(min(_POLL_SECONDS, max(deadline - time.monotonic(), 0.0)))

    @tool(_READS)
    def best_structure(
        task: Task = "text",
        search_id: OneSearch = None,
        train_flops: Budget = None,
        train_seconds: Budget = None,
        inference_flops: Budget = None,
        params: Budget = None,
    ) -> dict[str, Any]:
        """The best structure within a budget, dense beside it, what cannot be told apart, verdict.

        Budgets: train FLOPs, measured seconds of training, forward FLOPs per token, or parameters.
        """
        every = {
            "train_flops": train_flops, "train_seconds": train_seconds,
            "inference_flops": inference_flops, "params": params,
        }  # fmt: skip
        budgets: dict[str, Any] = {
            name: value for name, value in every.items() if value is not None
        }
        if search_id is not None:
            return _json(place.get_search(search_id).best(**budgets))
        return _json(place.best(task=task, **budgets))

    @tool(_READS)
    def pareto_front(
        task: Task = "text",
        search_id: OneSearch = None,
        x: Annotated[
            str,
            Field(
                description="train_flops | train_seconds | inference_flops | params | "
                "step_seconds | peak_memory"
            ),
        ] = "train_flops",
    ) -> dict[str, Any]:
        """Pareto fronts of loss against an axis, of structured and of dense layers."""
        if search_id is not None:
            return _json(place.get_search(search_id).frontier(x))
        return _json(place.frontier(task, x))

    @tool(_READS)
    def list_trials(
        search_id: SearchId,
        state: Annotated[
            str | None,
            Field(description="planned | running | paused | complete | stopped | failed"),
        ] = None,
        sort: Annotated[
            str, Field(description="number | loss | train_flops | params | width | steps")
        ] = "loss",
        limit: Count = 20,
    ) -> dict[str, Any]:
        """Runs of a search, lowest first, with the reason of each failure."""
        every = place.get_search(search_id).trials()
        found = chosen_trials(state, sort, None)(every)
        return {"trials": found[:limit], "matching": len(found), "of": len(every)}

    @tool(_READS)
    def learning_curve(
        trial_id: Annotated[int, Field(ge=0, description="The id of a trial, not its number.")],
    ) -> dict[str, Any]:
        """A run with its losses over steps, train FLOPs and seconds."""
        return place.trial(trial_id)

    @tool(_READS)
    def inspect_structure(
        design: Annotated[
            str, Field(description="Such as btt:rho=1/4, monarch, or seven numbers.")
        ],
        d_in: Annotated[int, Field(ge=1)],
        d_out: Annotated[int, Field(ge=1)],
    ) -> dict[str, Any]:
        """Exact sizes, FLOPs, parameters and rank of a structure in one layer."""
        from nas.designs.design import inspect_design, parse_design

        return _json(inspect_design(parse_design(design), d_in, d_out))

    @tool(_ADDS)
    def confirm_search(
        search_id: SearchId,
        top: Annotated[int, Field(ge=1, description="Best candidates to run again.")] = 3,
        seeds: Annotated[int, Field(ge=1, description="Fresh seeds of each.")] = 3,
    ) -> dict[str, Any]:
        """Queue a search that runs the best of an ended one again with fresh seeds."""
        made = place.get_search(search_id).confirm(top=top, seeds=seeds)
        return {"id": made.id, "state": made.data["state"], "page": made.page}

    @tool(_ENDS)
    def cancel_search(search_id: SearchId) -> dict[str, Any]:
        """Cancel a search; its running runs end without a result."""
        return {"search": place.get_search(search_id).cancel().data}

    return server


def _fields(request: SearchRequest) -> dict[str, Any]:
    return request.model_dump(mode="json", exclude_defaults=True)


def _json(found: Any) -> dict[str, Any]:
    plain: dict[str, Any] = to_jsonable_python(found)
    return plain
