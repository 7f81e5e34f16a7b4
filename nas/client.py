"""Python client of the REST service: torch-free, typed, one class.

>>> Client("http://127.0.0.1:8000").url
'http://127.0.0.1:8000'
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx2 as httpx

from nas.errors import Conflict, EinsumNasError, IdempotencyConflict, InvalidInput, NotFound

_TERMINAL = ("succeeded", "failed", "cancelled")
_PAGE = 200


class ServiceError(EinsumNasError):
    """The service answered with an error that is not the caller's, or not at all."""


@dataclass(frozen=True)
class RemoteSearch:
    """A search on the service, as it stood when it was last read."""

    client: Client
    id: str
    #: the search as the service describes it
    data: dict[str, Any]

    @property
    def state(self) -> str:
        """queued | running | succeeded | failed | cancelled"""
        return str(self.data["state"])

    @property
    def finished(self) -> bool:
        return self.state in _TERMINAL

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

    def frontier(self) -> dict[str, Any]:
        """Pareto fronts of this search."""
        return self.client.get("/v1/frontier", search=self.id)

    def best(self, train_flops: float | None = None) -> dict[str, Any]:
        """The best structure of this search within a budget, by default the search's own."""
        budget = self.data["request"]["train_flops"] if train_flops is None else train_flops
        return self.client.get("/v1/best", search=self.id, train_flops=budget)

    def cancel(self) -> RemoteSearch:
        """Ask the search to stop."""
        data = self.client.request("POST", f"/v1/searches/{self.id}/cancel")
        return RemoteSearch(self.client, self.id, data)


class Client:
    """Connection to an einsum-nas service.

    Parameters
    ----------
    url
        Address of the service.
    timeout_seconds
        Limit of one request.
    """

    def __init__(self, url: str = "http://127.0.0.1:8000", *, timeout_seconds: float = 30) -> None:
        self.url = url.rstrip("/")
        self._http = httpx.Client(base_url=self.url, timeout=timeout_seconds)

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
            data, trials, objective, sampler, seed, references.

        Raises
        ------
        InvalidInput
            A field that cannot be used.
        IdempotencyConflict
            The key was used with another request.
        """
        body = {"task": task, "train_flops": train_flops, **fields}
        headers = {"Idempotency-Key": idempotency_key or uuid.uuid4().hex}
        data = self.request("POST", "/v1/searches", json=body, headers=headers)
        return RemoteSearch(self, data["id"], data)

    def preview(self, *, train_flops: float, task: str = "text", **fields: Any) -> dict[str, Any]:
        """What a search would run, without running it."""
        body = {"task": task, "train_flops": train_flops, **fields}
        return self.request("POST", "/v1/searches/preview", json=body)

    def get_search(self, search_id: str) -> RemoteSearch:
        """A search by its id."""
        return RemoteSearch(self, search_id, self.get(f"/v1/searches/{search_id}"))

    def searches(self) -> Iterator[dict[str, Any]]:
        """Every search, newest first."""
        return self.iterate("/v1/searches")

    def trial(self, trial_id: int) -> dict[str, Any]:
        """A trial with its curve."""
        return self.get(f"/v1/trials/{trial_id}")

    def frontier(self, task: str = "text") -> dict[str, Any]:
        """Pareto fronts of a task over all its searches."""
        return self.get("/v1/frontier", task=task)

    def best(self, *, train_flops: float, task: str = "text") -> dict[str, Any]:
        """The best measured structure of a task within a budget of train FLOPs."""
        return self.get("/v1/best", task=task, train_flops=train_flops)

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
        cursor: dict[str, Any] = {}
        while True:
            page = self.get(path, limit=_PAGE, **cursor)
            yield from page["items"]
            if page["next"] is None:
                return
            cursor = {"cursor": page["next"]}

    def get(self, path: str, **query: Any) -> dict[str, Any]:
        """GET a JSON object."""
        return self.request("GET", path, params=query)

    def request(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        """One request; problems become the errors of `nas.errors`."""
        try:
            response = self._http.request(method, path, **options)
        except httpx.HTTPError as error:
            raise ServiceError(f"{method} {self.url}{path}: {error}") from error
        if response.is_success:
            try:
                data: dict[str, Any] = response.json()
            except ValueError as error:
                raise ServiceError(f"{self.url}{path}: the answer is not JSON") from error
            return data
        raise _as_error(response)


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
    return ServiceError(f"{response.status_code}: {detail}")
