"""Python clients of the REST service, synchronous and asynchronous: torch-free and typed.

>>> Client("http://127.0.0.1:8000").url
'http://127.0.0.1:8000'
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx2 as httpx

from nas.errors import Conflict, EinsumNasError, IdempotencyConflict, InvalidInput, NotFound
from nas.results import Answer, FrontierAnswer

_TERMINAL = ("succeeded", "failed", "cancelled")
_PAGE = 200


class ServiceError(EinsumNasError):
    """The service did not answer, or failed for a reason that is not the caller's."""


class NotAllowed(EinsumNasError):
    """The service requires an API key, or one with another scope."""


class RateLimited(EinsumNasError):
    """The key or address has sent too many requests, or the tenant's quota is used up."""


@dataclass(frozen=True)
class _Call:
    """One request, before it is known how it is sent."""

    method: str
    path: str
    options: Mapping[str, Any]


def _get(path: str, **query: Any) -> _Call:
    return _Call("GET", path, {"params": {k: v for k, v in query.items() if v is not None}})


def _post(path: str, body: Mapping[str, Any] | None = None, key: str | None = None) -> _Call:
    headers = {"Idempotency-Key": key} if key else {}
    return _Call("POST", path, {"json": body, "headers": headers} if body is not None else {})


def _submission(
    task: str, train_flops: float, fields: Mapping[str, Any], idempotency_key: str | None
) -> _Call:
    body = {"task": task, "train_flops": train_flops, **fields}
    return _post("/v1/searches", body, idempotency_key or uuid.uuid4().hex)


def _confirmation(search: str, fields: Mapping[str, Any], idempotency_key: str | None) -> _Call:
    key = idempotency_key or uuid.uuid4().hex
    return _post(f"/v1/searches/{search}/confirm", dict(fields), key)


def _clone(search: str, changes: Mapping[str, Any], idempotency_key: str | None) -> _Call:
    key = idempotency_key or uuid.uuid4().hex
    return _post(f"/v1/searches/{search}/clone", dict(changes), key)


def _headers(tenant: str | None, api_key: str | None) -> dict[str, str]:
    named = {} if tenant is None else {"X-Tenant": tenant}
    return named if api_key is None else {**named, "Authorization": f"Bearer {api_key}"}


def _page(path: str, cursor: str | None) -> _Call:
    return _get(path, limit=_PAGE, cursor=cursor)


@dataclass(frozen=True)
class _Stored:
    """A search on the service, as it stood when it was last read."""

    id: str
    #: the search as the service describes it
    data: dict[str, Any]

    @property
    def state(self) -> str:
        """queued | running | paused | succeeded | failed | cancelled"""
        return str(self.data["state"])

    @property
    def finished(self) -> bool:
        return self.state in _TERMINAL

    def _budgets(self, budgets: Mapping[str, float | None]) -> dict[str, Any]:
        """The given budget; by default the search's own."""
        given = {k: v for k, v in budgets.items() if v is not None}
        return given or {"train_flops": self.data["request"]["train_flops"]}


@dataclass(frozen=True)
class RemoteSearch(_Stored):
    """A search on the service; see `Client`."""

    client: Client

    def refresh(self) -> RemoteSearch:
        """The search as it stands now."""
        return self.client.get_search(self.id)

    def wait(
        self,
        *,
        poll_seconds: float = 1.0,
        timeout_seconds: float | None = None,
        progress: Callable[[RemoteSearch], object] | None = None,
    ) -> RemoteSearch:
        """Wait until the search has ended; `progress` is called with each state read.

        Raises
        ------
        TimeoutError
            It has not ended within `timeout_seconds`.
        """
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        while True:
            current = self.refresh()
            if progress is not None:
                progress(current)
            if current.finished:
                return current
            if deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError(f"search {self.id} is still {current.state}")
            time.sleep(poll_seconds)

    def trials(self) -> list[dict[str, Any]]:
        """Every trial, in the order of their numbers."""
        return list(self.client.iterate(f"/v1/searches/{self.id}/trials"))

    def frontier(self, x: str = "train_flops") -> FrontierAnswer:
        """Pareto fronts of this search against an axis."""
        return FrontierAnswer(**self.client.get("/v1/frontier", search=self.id, x=x))

    def best(self, train_flops: float | None = None, **budgets: float | None) -> Answer:
        """The best structure of this search within a budget, by default the search's own."""
        query = self._budgets({"train_flops": train_flops, **budgets})
        return Answer(**self.client.get("/v1/best", search=self.id, **query))

    def confirm(self, *, idempotency_key: str | None = None, **fields: Any) -> RemoteSearch:
        """Run the best of this search again with fresh seeds.

        Parameters
        ----------
        fields
            top, seeds, longer, spread; see `nas.confirm.ConfirmRequest`.
        """
        data = self.client.send(_confirmation(self.id, fields, idempotency_key))
        return RemoteSearch(data["id"], data, self.client)

    def cancel(self) -> RemoteSearch:
        """Cancel the search."""
        return self._after("cancel")

    def pause(self) -> RemoteSearch:
        """Pause the search; `resume` continues its runs from their checkpoints."""
        return self._after("pause")

    def resume(self) -> RemoteSearch:
        """Queue the paused search again."""
        return self._after("resume")

    def retry(self) -> RemoteSearch:
        """Queue the ended search again, to run the trials that are not complete."""
        return self._after("retry")

    def set_priority(self, priority: int) -> RemoteSearch:
        """Set the priority of the search; searches of higher priority run first."""
        return self._after("priority", {"priority": priority})

    def _after(self, action: str, body: Mapping[str, Any] | None = None) -> RemoteSearch:
        data = self.client.send(_post(f"/v1/searches/{self.id}/{action}", body))
        return RemoteSearch(self.id, data, self.client)

    def clone(self, *, idempotency_key: str | None = None, **changes: Any) -> RemoteSearch:
        """Submit a copy of this search with some fields changed."""
        data = self.client.send(_clone(self.id, changes, idempotency_key))
        return RemoteSearch(data["id"], data, self.client)


class Client:
    """Connection to an einsum-nas service.

    Parameters
    ----------
    url
        Address of the service.
    timeout_seconds
        Limit of one request.
    tenant
        Tenant of the requests, for services without access control; otherwise the key decides.
    api_key
        Key to send, if the service requires one.

    Raises
    ------
    NotAllowed
        By every method: the key is missing, unusable, or lacks the scope.
    RateLimited
        By every method: too many requests, or the tenant's quota is used up.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        *,
        timeout_seconds: float = 30,
        tenant: str | None = None,
        api_key: str | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        headers = _headers(tenant, api_key)
        self._http = httpx.Client(base_url=self.url, timeout=timeout_seconds, headers=headers)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._http.close()

    def search(
        self,
        *,
        train_flops: float,
        task: str = "text",
        idempotency_key: str | None = None,
        **fields: Any,
    ) -> RemoteSearch:
        """Submit a search.

        Parameters
        ----------
        train_flops
            Budget of each run in train FLOPs.
        idempotency_key
            Makes a repeated submission return the first one's search; a fresh key by default.
        fields
            data, recipe, overrides, trials, objective, sampler, seed, references, space, limits,
            priority.

        Raises
        ------
        InvalidInput
            A field that cannot be used.
        IdempotencyConflict
            The key was used with another request.
        """
        data = self.send(_submission(task, train_flops, fields, idempotency_key))
        return RemoteSearch(data["id"], data, self)

    def preview(self, *, train_flops: float, task: str = "text", **fields: Any) -> dict[str, Any]:
        """What a search would run, without running it."""
        body = {"task": task, "train_flops": train_flops, **fields}
        return self.send(_post("/v1/searches/preview", body))

    def get_search(self, search_id: str) -> RemoteSearch:
        """A search by its id."""
        return RemoteSearch(search_id, self.get(f"/v1/searches/{search_id}"), self)

    def searches(self) -> Iterator[dict[str, Any]]:
        """Every search, newest first."""
        return self.iterate("/v1/searches")

    def trial(self, trial_id: int) -> dict[str, Any]:
        """A trial with its curve."""
        return self.get(f"/v1/trials/{trial_id}")

    def frontier(self, task: str = "text", x: str = "train_flops") -> FrontierAnswer:
        """Pareto fronts of a task over all its searches, against an axis."""
        return FrontierAnswer(**self.get("/v1/frontier", task=task, x=x))

    def best(
        self, *, task: str = "text", train_flops: float | None = None, **budgets: float | None
    ) -> Answer:
        """The best structure of a task within one budget.

        Parameters
        ----------
        train_flops, budgets
            Exactly one of train_flops, inference_flops (per token), params, step_seconds,
            peak_memory (bytes).

        Raises
        ------
        NotFound
            Nothing is measured within the budget.
        """
        return Answer(**self.get("/v1/best", task=task, train_flops=train_flops, **budgets))

    def structure(
        self, theta: str, d_in: int, d_out: int, sizing: str = "least-waste"
    ) -> dict[str, Any]:
        """Sizes, FLOPs, parameters and rank of θ at d_in → d_out; sizing least-waste or paper."""
        return self.get("/v1/structures", theta=theta, d_in=d_in, d_out=d_out, sizing=sizing)

    def tasks(self) -> list[dict[str, Any]]:
        """Every task of the service."""
        items: list[dict[str, Any]] = self.get("/v1/tasks")["items"]
        return items

    def iterate(self, path: str) -> Iterator[dict[str, Any]]:
        """The items of a paginated list."""
        cursor: str | None = None
        while True:
            page = self.send(_page(path, cursor))
            yield from page["items"]
            cursor = page["next"]
            if cursor is None:
                return

    def get(self, path: str, **query: Any) -> dict[str, Any]:
        """GET a JSON object; values that are None are left out."""
        return self.send(_get(path, **query))

    def send(self, call: _Call) -> dict[str, Any]:
        """One request; problems become the errors of `nas.errors`."""
        try:
            response = self._http.request(call.method, call.path, **call.options)
        except httpx.HTTPError as error:
            raise _unreachable(call, self.url, error) from error
        return _answer_of(response, self.url)


@dataclass(frozen=True)
class AsyncRemoteSearch(_Stored):
    """A search on the service; see `AsyncClient` and, for the methods, `RemoteSearch`."""

    client: AsyncClient

    async def refresh(self) -> AsyncRemoteSearch:
        """The search as it stands now."""
        return await self.client.get_search(self.id)

    async def wait(
        self, *, poll_seconds: float = 1.0, timeout_seconds: float | None = None
    ) -> AsyncRemoteSearch:
        """Wait until the search has ended; `TimeoutError` after `timeout_seconds`."""
        async with asyncio.timeout(timeout_seconds):
            while True:
                current = await self.refresh()
                if current.finished:
                    return current
                await asyncio.sleep(poll_seconds)

    async def trials(self) -> list[dict[str, Any]]:
        """Every trial, in the order of their numbers."""
        return [t async for t in self.client.iterate(f"/v1/searches/{self.id}/trials")]

    async def frontier(self, x: str = "train_flops") -> FrontierAnswer:
        """Pareto fronts of this search against an axis."""
        return FrontierAnswer(**await self.client.get("/v1/frontier", search=self.id, x=x))

    async def best(self, train_flops: float | None = None, **budgets: float | None) -> Answer:
        """The best structure of this search within a budget, by default the search's own."""
        query = self._budgets({"train_flops": train_flops, **budgets})
        return Answer(**await self.client.get("/v1/best", search=self.id, **query))

    async def confirm(
        self, *, idempotency_key: str | None = None, **fields: Any
    ) -> AsyncRemoteSearch:
        """Run the best of this search again with fresh seeds; fields as of `RemoteSearch`."""
        data = await self.client.send(_confirmation(self.id, fields, idempotency_key))
        return AsyncRemoteSearch(data["id"], data, self.client)

    async def cancel(self) -> AsyncRemoteSearch:
        """Cancel the search."""
        return await self._after("cancel")

    async def pause(self) -> AsyncRemoteSearch:
        """Pause the search."""
        return await self._after("pause")

    async def resume(self) -> AsyncRemoteSearch:
        """Queue the paused search again."""
        return await self._after("resume")

    async def retry(self) -> AsyncRemoteSearch:
        """Queue the ended search again, to run the trials that are not complete."""
        return await self._after("retry")

    async def set_priority(self, priority: int) -> AsyncRemoteSearch:
        """Set the priority of the search; searches of higher priority run first."""
        return await self._after("priority", {"priority": priority})

    async def _after(self, action: str, body: Mapping[str, Any] | None = None) -> AsyncRemoteSearch:
        data = await self.client.send(_post(f"/v1/searches/{self.id}/{action}", body))
        return AsyncRemoteSearch(self.id, data, self.client)

    async def clone(
        self, *, idempotency_key: str | None = None, **changes: Any
    ) -> AsyncRemoteSearch:
        """Submit a copy of this search with some fields changed."""
        data = await self.client.send(_clone(self.id, changes, idempotency_key))
        return AsyncRemoteSearch(data["id"], data, self.client)


class AsyncClient:
    """`Client` for asynchronous code: the same parameters, methods and errors."""

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        *,
        timeout_seconds: float = 30,
        tenant: str | None = None,
        api_key: str | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        headers = _headers(tenant, api_key)
        self._http = httpx.AsyncClient(base_url=self.url, timeout=timeout_seconds, headers=headers)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection."""
        await self._http.aclose()

    async def search(
        self,
        *,
        train_flops: float,
        task: str = "text",
        idempotency_key: str | None = None,
        **fields: Any,
    ) -> AsyncRemoteSearch:
        """Submit a search."""
        data = await self.send(_submission(task, train_flops, fields, idempotency_key))
        return AsyncRemoteSearch(data["id"], data, self)

    async def preview(
        self, *, train_flops: float, task: str = "text", **fields: Any
    ) -> dict[str, Any]:
        """What a search would run, without running it."""
        body = {"task": task, "train_flops": train_flops, **fields}
        return await self.send(_post("/v1/searches/preview", body))

    async def get_search(self, search_id: str) -> AsyncRemoteSearch:
        """A search by its id."""
        return AsyncRemoteSearch(search_id, await self.get(f"/v1/searches/{search_id}"), self)

    def searches(self) -> AsyncIterator[dict[str, Any]]:
        """Every search, newest first."""
        return self.iterate("/v1/searches")

    async def trial(self, trial_id: int) -> dict[str, Any]:
        """A trial with its curve."""
        return await self.get(f"/v1/trials/{trial_id}")

    async def frontier(self, task: str = "text", x: str = "train_flops") -> FrontierAnswer:
        """Pareto fronts of a task over all its searches, against an axis."""
        return FrontierAnswer(**await self.get("/v1/frontier", task=task, x=x))

    async def best(
        self, *, task: str = "text", train_flops: float | None = None, **budgets: float | None
    ) -> Answer:
        """The best structure of a task within one budget."""
        return Answer(**await self.get("/v1/best", task=task, train_flops=train_flops, **budgets))

    async def structure(
        self, theta: str, d_in: int, d_out: int, sizing: str = "least-waste"
    ) -> dict[str, Any]:
        """Sizes, FLOPs, parameters and rank of θ at d_in → d_out; sizing least-waste or paper."""
        query = {"theta": theta, "d_in": d_in, "d_out": d_out, "sizing": sizing}
        return await self.get("/v1/structures", **query)

    async def tasks(self) -> list[dict[str, Any]]:
        """Every task of the service."""
        items: list[dict[str, Any]] = (await self.get("/v1/tasks"))["items"]
        return items

    async def iterate(self, path: str) -> AsyncIterator[dict[str, Any]]:
        """The items of a paginated list."""
        cursor: str | None = None
        while True:
            page = await self.send(_page(path, cursor))
            for item in page["items"]:
                yield item
            cursor = page["next"]
            if cursor is None:
                return

    async def get(self, path: str, **query: Any) -> dict[str, Any]:
        """GET a JSON object; values that are None are left out."""
        return await self.send(_get(path, **query))

    async def send(self, call: _Call) -> dict[str, Any]:
        """One request; problems become the errors of `nas.errors`."""
        try:
            response = await self._http.request(call.method, call.path, **call.options)
        except httpx.HTTPError as error:
            raise _unreachable(call, self.url, error) from error
        return _answer_of(response, self.url)


def _unreachable(call: _Call, url: str, error: Exception) -> ServiceError:
    return ServiceError(f"{call.method} {url}{call.path}: {error or type(error).__name__}")


def _answer_of(response: httpx.Response, url: str) -> dict[str, Any]:
    if not response.is_success:
        raise _as_error(response)
    try:
        data: dict[str, Any] = response.json()
    except ValueError as error:
        raise ServiceError(f"{url}{response.url.path}: the answer is not JSON") from error
    return data


def _as_error(response: httpx.Response) -> EinsumNasError:
    try:
        problem = response.json()
        detail = str(problem["detail"])
    except (ValueError, KeyError, TypeError):
        return ServiceError(f"{response.status_code} {response.reason_phrase}")
    if "field" in problem:
        return InvalidInput(problem["field"], problem["value"], problem["accepted"])
    if response.status_code == 404:
        return NotFound(detail)
    if problem.get("type", "").endswith("idempotency-conflict"):
        return IdempotencyConflict(detail)
    if response.status_code == 409:
        return Conflict(detail)
    if response.status_code in (401, 403):
        return NotAllowed(detail)
    if response.status_code == 429:
        return RateLimited(detail)
    return ServiceError(f"{response.status_code}: {detail}")
