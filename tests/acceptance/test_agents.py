"""The tools of an agent, used by a client of the Model Context Protocol over standard input."""

from __future__ import annotations

import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
from mcp import Client, MCPError, StdioServerParameters, stdio_client

from nas.client import Client as Remote
from nas.store import Store
from nas.store.keys import Keys
from tests.support.planting import open_store
from tests.support.services import Service, api, running
from tests.support.small import SMALL_SEARCH
from tests.support.tiers import FULL

TOOLS = {
    "list_tasks", "list_searches", "preview_search", "submit_search", "get_search",
    "wait_for_search", "best_structure", "pareto_front", "list_trials", "learning_curve",
    "inspect_structure", "confirm_search", "cancel_search",
}  # fmt: skip
Call = Callable[..., Awaitable[dict[str, Any]]]


class Refused(Exception):
    """A tool has answered with an error."""


def agent(use: Callable[[Client, Call], Awaitable[None]], *options: str, **settings: str) -> None:
    """Have a client use the tools of `einsum-nas mcp` with these options and settings."""
    env = {**os.environ, **{f"EINSUM_NAS_{k.upper()}": v for k, v in settings.items()}}
    command = StdioServerParameters(
        command=sys.executable, args=["-m", "nas.cli", "mcp", *options], env=env
    )

    async def run() -> None:
        async with Client(stdio_client(command)) as client:

            async def call(name: str, **given: Any) -> dict[str, Any]:
                answer = await client.call_tool(name, given)
                if answer.is_error:
                    raise Refused(" ".join(getattr(c, "text", "") for c in answer.content))
                assert answer.structured_content is not None
                return dict(answer.structured_content)

            await use(client, call)

    anyio.run(run)


def test_a_search_from_preview_to_answer(service: Service) -> None:
    request = {**SMALL_SEARCH, "trials": 1, "seed": 21}

    async def use(client: Client, call: Call) -> None:
        listed = (await client.list_tools()).tools
        assert {tool.name for tool in listed} == TOOLS
        for tool in listed:
            assert tool.description
            assert tool.annotations is not None
            changes = tool.name in ("submit_search", "confirm_search", "cancel_search")
            assert tool.annotations.read_only_hint is not changes
        (submit,) = (tool for tool in listed if tool.name == "submit_search")
        assert "train_flops" in str(submit.input_schema)
        assert {t["name"] for t in (await call("list_tasks"))["tasks"]} >= {"text", "regression"}

        planned = await call("preview_search", request=request)
        made = await call("submit_search", request=request)
        assert made["page"] == f"{service.url}/searches/{made['id']}"
        seen: list[float] = []

        async def told(progress: float, total: float | None, message: str | None) -> None:
            seen.append(progress)

        waited = await client.call_tool(
            "wait_for_search", {"search_id": made["id"][:12], "seconds": 300},
            progress_callback=told,
        )  # fmt: skip
        ended = waited.structured_content
        assert ended is not None
        assert ended["search"]["state"] == "succeeded"
        assert sum(ended["search"]["trial_counts"].values()) == planned["total_runs"]
        assert seen == sorted(seen)
        own = remote.get_search(made["id"])
        best = own.best(train_flops=request["train_flops"]).model_dump(mode="json")
        found = await call(
            "best_structure", search_id=made["id"], train_flops=request["train_flops"]
        )
        assert found == best == ended["best"]
        trials = await call("list_trials", search_id=made["id"], limit=2)
        assert (len(trials["trials"]), trials["of"]) == (2, planned["total_runs"])
        curve = (await call("learning_curve", trial_id=trials["trials"][0]["id"]))["curve"]
        assert curve[-1]["loss"] == trials["trials"][0]["loss"]
        assert await call("pareto_front", search_id=made["id"]) == own.frontier().model_dump(
            mode="json"
        )
        known = await call("list_searches", text=made["id"][:12])
        assert [s["id"] for s in known["searches"]] == [made["id"]]
        sizes = await call("inspect_structure", design="monarch", d_in=64, d_out=64)
        assert sizes["macs"] == 2 * 8 * 64

    with Remote(service.url) as remote:
        agent(use, "--server", service.url)


#: Tool, what it is given, and what of the refusal is said.
WRONG: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("preview_search", {"request": {"train_flops": -1}}, ("train_flops", "-1", "accepted")),
    ("preview_search", {"request": {"train_flops": 1e10, "task": "\x00<b>"}}, ("task",)),
    ("preview_search", {"request": {"train_flops": 1e10, "wings": 2}}, ("wings",)),
    ("submit_search", {"request": "rm -rf /"}, ("request",)),
    ("get_search", {"search_id": "../../etc/passwd"}, ("../../etc/passwd",)),
    ("get_search", {"search_id": "f" * 32}, ("f" * 32,)),
    ("learning_curve", {"trial_id": 10**9}, (str(10**9),)),
    ("best_structure", {"train_flops": 1e9, "params": 3}, ("params",)),
    ("best_structure", {"train_flops": 1e9, "task": "'; DROP TABLE x"}, ("DROP TABLE",)),
    ("inspect_structure", {"design": "nothing", "d_in": 4, "d_out": 4}, ("nothing",)),
    ("list_trials", {"search_id": "0" * 32, "limit": 0}, ("limit",)),
    ("no_such_tool", {}, ("no_such_tool",)),
]


def test_what_is_wrong_is_told_and_nothing_is_done(tmp_path: Path) -> None:
    """On a database of its own, with no service."""
    store = open_store(f"sqlite:///{tmp_path / 'einsum-nas.db'}")

    async def use(_: Client, call: Call) -> None:
        for tool, given, told in WRONG:
            with pytest.raises((Refused, MCPError)) as refused:
                await call(tool, **given)
            for text in told:
                assert text in str(refused.value), (tool, given)
            assert (await call("list_searches"))["searches"] == []  # it goes on

    agent(use, home=str(tmp_path))
    assert store.searches() == []
    store.close()


@FULL
def test_a_key_decides_what_an_agent_may_do(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path / 'einsum-nas.db'}")
    with running(api(tmp_path, access_control="true", tenant_searches="1")) as service:
        reads, submits = (
            Keys(store).create("default", name, scopes)[1]
            for name, scopes in (("reads", ["read"]), ("submits", ["read", "submit"]))
        )
        request = {"train_flops": 2e11, "trials": 2}

        async def refused(call: Call, text: str) -> None:
            with pytest.raises(Refused, match=text):
                await call("submit_search", request=request)

        async def look(_: Client, call: Call) -> None:
            assert (await call("preview_search", request=request))["total_runs"] == 7
            await refused(call, "submit")
            assert (await call("list_searches"))["searches"] == []

        async def submit(_: Client, call: Call) -> None:
            made = await call("submit_search", request=request)
            await refused(call, "may have 1 searches that have not ended")
            waited = await call("wait_for_search", search_id=made["id"], seconds=0)
            assert (waited["search"]["state"], waited["best"]) == ("queued", None)
            ended = await call("cancel_search", search_id=made["id"])
            assert ended["search"]["state"] == "cancelled"

        async def nothing(_: Client, call: Call) -> None:
            with pytest.raises(Refused, match="key"):
                await call("list_searches")

        agent(look, "--server", service.url, api_key=reads)
        agent(submit, "--server", service.url, api_key=submits)
        agent(nothing, "--server", service.url)
    store.close()
