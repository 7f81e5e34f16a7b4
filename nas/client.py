"""Python clients of the REST service, synchronous and asynchronous: torch-free and typed.

>>> Client("http://127.0.0.1:8000").url
'http://127.0.0.1:8000'
"""

from __future__ import annotations

import asyncio
import math
import os
import re
import ssl
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial, wraps
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import (
    TYPE_CHECKING,
    Any,
    BinaryIO,
    Concatenate,
    Generic,
    ParamSpec,
    Self,
    TypeVar,
    cast,
)
from urllib.parse import quote
from urllib.request import proxy_bypass

import httpx2 as httpx

from nas.errors import (
    Conflict,
    EinsumNasError,
    IdempotencyConflict,
    InvalidInput,
    LeaseLost,
    NotFound,
    echo,
    span,
)
from nas.logs import masked
from nas.records.answers import Answer, FrontierAnswer
from nas.records.notebook import table
from nas.settings import TENANT, is_loopback

if TYPE_CHECKING:
    from torch import nn

_TERMINAL = ("succeeded", "failed", "cancelled")
_PAGE = 200
_HIGHEST_PORT = 65535
#: What may stand after `Bearer` (RFC 6750), and in an Idempotency-Key.
_KEY = r"[A-Za-z0-9._~+/-]+=*"
_IDEMPOTENCY_KEY = r"[!-~]{1,255}"
_PROXIES = ("http_proxy", "https_proxy", "all_proxy")

_Json = Mapping[str, Any] | None
_P = ParamSpec("_P")
_T = TypeVar("_T")
_Http = TypeVar("_Http", httpx.Client, httpx.AsyncClient)


class ServiceError(EinsumNasError):
    """The service did not answer, or failed for a reason that is not the caller's."""


class NotAllowed(EinsumNasError):
    """The service requires an API key, or one with another scope."""


class RateLimited(EinsumNasError):
    """The key or address has sent too many requests, or the tenant's quota is used up."""


#: What the status of an answer means, where its body does not say more.
_ERRORS: Mapping[int, type[EinsumNasError]] = {
    401: NotAllowed, 403: NotAllowed, 404: NotFound, 409: Conflict, 429: RateLimited
}  # fmt: skip


@dataclass(frozen=True)
class _Call(Generic[_T]):
    """One request and how its answer is read; `send` of either client runs it."""

    method: str
    path: str
    options: Mapping[str, Any]
    read: Callable[[Any], _T]


def _plain(answer: dict[str, Any]) -> dict[str, Any]:
    return answer


def _get(path: str, read: Callable[[Any], _T], **query: Any) -> _Call[_T]:
    given = {name: value for name, value in query.items() if value is not None}
    return _Call("GET", path, {"params": given}, read)


def _post(
    path: str, read: Callable[[Any], _T], body: _Json = None, headers: _Json = None
) -> _Call[_T]:
    options = {} if body is None else {"json": body, "headers": headers or {}}
    return _Call("POST", path, options, read)


def _once(key: str | None) -> dict[str, str]:
    """The header by which a repeated submission finds the first one's search."""
    if key and re.fullmatch(_IDEMPOTENCY_KEY, key) is None:
        accepted = "1 to 255 visible ASCII characters, without spaces"
        raise InvalidInput("Idempotency-Key", key, accepted)
    return {"Idempotency-Key": key or uuid.uuid4().hex}


#: How answers are read.
_frontier = FrontierAnswer.model_validate
_items = cast("Callable[[dict[str, Any]], list[dict[str, Any]]]", itemgetter("items"))


@dataclass(frozen=True)
class _Models:
    """Gives an answer the trained model of a trial; answers are equal whoever has asked."""

    client: Client | AsyncClient = field(compare=False)

    def __call__(self, trial_id: int) -> nn.Module:
        if isinstance(self.client, Client):
            return self.client.model(trial_id)
        accepted = "`await client.model(answer.weights)` of the client that has asked"
        raise InvalidInput("answer", "one of an AsyncClient", accepted)


def _best(client: Client | AsyncClient, data: dict[str, Any]) -> Answer:
    answer = Answer.model_validate(data)
    answer._model_of = _Models(client)
    return answer


def _key(key_id: str, act: str) -> str:
    return f"/v1/keys/{quote(key_id, safe='')}/{act}"


def _search(search_id: str) -> str:
    return f"/v1/searches/{quote(search_id, safe='')}"


class _Connection(Generic[_Http]):
    """A connection of a kind of the library's; see `Client` for the parameters and errors."""

    _library: type[_Http]

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        *,
        timeout_seconds: float = 30,
        tenant: str | None = None,
        api_key: str | None = None,
    ) -> None:
        self.url = url.strip().rstrip("/")
        parsed = _parsed(self.url)
        direct = is_loopback(parsed.host) or proxy_bypass(parsed.host)
        headers, trusted = _headers(tenant, api_key), _trusted(parsed)
        try:
            self._http: _Http = self._library(
                base_url=parsed, timeout=timeout_seconds, headers=headers, verify=trusted,
                trust_env=not direct,  # the proxies of the environment
            )  # fmt: skip
        except (ImportError, ValueError, httpx.InvalidURL) as error:
            raise _proxy_refused(error) from None


def _parsed(url: str) -> httpx.URL:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        parsed = httpx.URL("")
    whole = parsed.scheme in ("http", "https") and parsed.host and not parsed.query
    if whole and not parsed.fragment and (parsed.port or 0) <= _HIGHEST_PORT and " " not in url:
        return parsed
    accepted = "http://HOST:PORT or https://HOST, an IPv6 address in brackets: http://[::1]:8000"
    raise InvalidInput("url", masked(url), accepted)


def _trusted(url: httpx.URL) -> ssl.SSLContext:
    """The certificates that the service may show; none for one that shows none."""
    if url.scheme == "http":
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        return httpx.create_ssl_context()
    except OSError as error:
        name = "SSL_CERT_FILE" if os.environ.get("SSL_CERT_FILE") else "SSL_CERT_DIR"
        accepted = f"a file or folder of certificates in PEM ({error.strerror or error})"
        raise InvalidInput(name, os.environ.get(name, ""), accepted) from None


def _proxy_refused(error: Exception) -> InvalidInput:
    given = {name: value for name, value in os.environ.items() if name.lower() in _PROXIES}
    accepted = (
        "a proxy such as http://HOST:PORT; for one of SOCKS `pip install 'httpx2[socks]'`; "
        f"NO_PROXY names hosts without a proxy ({masked(echo(str(error)))})"
    )
    return InvalidInput(", ".join(given), ", ".join(map(masked, given.values())), accepted)


def _headers(tenant: str | None, api_key: str | None) -> dict[str, str]:
    headers: dict[str, str] = {}
    if tenant is not None:
        if re.fullmatch(TENANT, tenant) is None:
            raise InvalidInput("tenant", tenant, "1 to 64 letters, digits and . _ -")
        headers["X-Tenant"] = tenant
    if api_key is not None:
        key = api_key.strip()
        if re.fullmatch(_KEY, key) is None:
            # not repeated: a key with a quotation mark or two is still a secret
            accepted = "a key as `einsum-nas keys create` prints it: without quotation marks"
            raise InvalidInput("api_key", "a text with characters that no key has", accepted)
        headers["Authorization"] = f"Bearer {key}"
    return headers


@dataclass(frozen=True)
class _Stored:
    """A search on the service, as it stood when it was last read."""

    id: str
    #: the search as the service describes it
    data: dict[str, Any]
    client: Client | AsyncClient

    @property
    def page(self) -> str:
        """Address of its page on the dashboard."""
        return f"{self.client.url}/searches/{quote(self.id, safe='')}"

    @property
    def state(self) -> str:
        """queued | running | paused | succeeded | failed | cancelled"""
        return str(self.data["state"])

    @property
    def finished(self) -> bool:
        return self.state in _TERMINAL

    def _repr_html_(self) -> str:
        """Its state, and what it has found so far, as a table for notebooks."""
        counts = ", ".join(f"{n:,} {state}" for state, n in self.data["trial_counts"].items())
        rows = [("state", self.state), ("task", self.data["task"]), ("runs", counts or "none yet")]
        asked, overview = self.data["request"], self.data.get("overview") or {}
        rows.append(("budget of a run", f"{asked['train_flops']:.4g} train FLOPs"))
        for kind in ("structured", "dense"):
            if overview.get(kind) is not None:
                rows.append((f"lowest loss, {kind}", f"{overview[kind]:.4f} measured"))
        if overview.get("seconds_left") is not None and not self.finished:
            rows.append(("time left", f"about {span(overview['seconds_left'])} (estimate)"))
        if self.data["error"]:
            rows.append(("error", self.data["error"]))
        title = self.data.get("name") or f"Search {self.id[:8]}"
        return table(title, rows, link=self.page)

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
        deadline = math.inf if timeout_seconds is None else time.monotonic() + timeout_seconds
        while True:
            current = self.refresh()
            if progress is not None:
                progress(current)
            if current.finished:
                return current
            if time.monotonic() >= deadline:
                raise TimeoutError(f"search {self.id} is still {current.state}")
            time.sleep(poll_seconds)

    def trials(self) -> list[dict[str, Any]]:
        """Every trial, in the order of their numbers."""
        return list(self.client.iterate(f"{_search(self.id)}/trials"))

    def frontier(self, x: str = "train_flops", device: str | None = None) -> FrontierAnswer:
        """Pareto fronts of this search against an axis; `device` as of `Client.best`."""
        return self.client.send(_get("/v1/frontier", _frontier, search=self.id, x=x, device=device))

    def best(
        self,
        /,
        train_flops: float | None = None,
        *,
        device: str | None = None,
        **budgets: float | None,
    ) -> Answer:
        """The best structure of this search within a budget, by default the search's own; the
        parameters are those of `Client.best`."""
        query = self._budgets({"train_flops": train_flops, **budgets})
        read = partial(_best, self.client)
        return self.client.send(_get("/v1/best", read, search=self.id, device=device, **query))

    def confirm(self, /, *, idempotency_key: str | None = None, **fields: Any) -> RemoteSearch:
        """Run the best of this search again with fresh seeds.

        Parameters
        ----------
        fields
            top, seeds, longer, spread; see `nas.service.confirm.ConfirmRequest`.
        """
        return self.client._become(f"{_search(self.id)}/confirm", fields, _once(idempotency_key))

    def cancel(self) -> RemoteSearch:
        """Cancel the search."""
        return self.client._become(f"{_search(self.id)}/cancel")

    def pause(self) -> RemoteSearch:
        """Pause the search; `resume` continues its runs from their checkpoints."""
        return self.client._become(f"{_search(self.id)}/pause")

    def resume(self) -> RemoteSearch:
        """Queue the paused search again."""
        return self.client._become(f"{_search(self.id)}/resume")

    def retry(self) -> RemoteSearch:
        """Queue the ended search again, to run the trials that are not complete."""
        return self.client._become(f"{_search(self.id)}/retry")

    def set_priority(self, priority: int) -> RemoteSearch:
        """Set the priority of the search; searches of higher priority run first."""
        return self.client._become(f"{_search(self.id)}/priority", {"priority": priority})

    def set_labels(self, /, **labels: Any) -> RemoteSearch:
        """Change what the search is called: name, tags, notes, archived; others stay."""
        return self.client._become(f"{_search(self.id)}/labels", labels)

    def delete(self) -> RemoteSearch:
        """Delete the ended search, which must have no completed run; as it was."""
        return self.client._become(f"{_search(self.id)}/delete")

    def clone(self, /, *, idempotency_key: str | None = None, **changes: Any) -> RemoteSearch:
        """Submit a copy of this search with some fields changed."""
        return self.client._become(f"{_search(self.id)}/clone", changes, _once(idempotency_key))


class Client(_Connection[httpx.Client]):
    """Connection to an einsum-nas service.

    Parameters
    ----------
    url
        Address of the service.  A proxy of the environment (`HTTP_PROXY` and others) is used, but
        not to reach this machine itself.
    timeout_seconds
        Limit of one request.
    tenant
        Tenant of the requests, for services without access control; otherwise the key decides.
    api_key
        Key to send, if the service requires one.

    Raises
    ------
    InvalidInput
        The address, tenant or key, or a proxy or file of certificates of the environment, cannot
        be used.
    NotAllowed
        By every method: the key is missing, unusable, or lacks the scope.
    RateLimited
        By every method: too many requests, or the tenant's quota is used up.
    """

    _library = httpx.Client

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._http.close()

    def search(
        self,
        /,
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
            data, recipe, overrides, trials, objective, sampler, stopping, total_train_flops,
            total_seconds, warm_start, seed, references, replicates, space, limits, priority,
            candidates, keep_weights.

        Raises
        ------
        InvalidInput
            A field that cannot be used.
        IdempotencyConflict
            The key was used with another request.
        """
        body = {"task": task, "train_flops": train_flops, **fields}
        return self._become("/v1/searches", body, _once(idempotency_key))

    def preview(
        self, /, *, train_flops: float, task: str = "text", **fields: Any
    ) -> dict[str, Any]:
        """What a search would run, without running it."""
        body = {"task": task, "train_flops": train_flops, **fields}
        return self.send(_post("/v1/searches/preview", _plain, body))

    def get_search(self, search_id: str) -> RemoteSearch:
        """A search by its id."""
        return self.send(_get(_search(search_id), partial(self._kept, search_id)))

    def searches(self) -> Iterator[dict[str, Any]]:
        """Every search, newest first."""
        return self.iterate("/v1/searches")

    def trial(self, trial_id: int) -> dict[str, Any]:
        """A trial with its curve."""
        return self.get(f"/v1/trials/{trial_id}")

    def weights(self, trial_id: int, into: BinaryIO) -> int:
        """Write the trained weights of a trial into an open file, safetensors; its bytes.

        Raises
        ------
        NotFound
            No such trial, or its weights are not kept.
        """
        return self.download(f"/v1/trials/{trial_id}/weights", into)

    def model(self, trial_id: int) -> nn.Module:
        """The trained model of a trial at its last step, downloaded; see `nas.load_model`.

        Raises
        ------
        NotFound
            As of `weights`.
        InvalidInput
            As of `nas.load_model`.
        """
        from nas.training.weights import load_model  # torch, which nothing else here needs

        with TemporaryDirectory(prefix="einsum-nas-weights-") as folder:
            file = Path(folder) / "model.safetensors"
            with file.open("wb") as into:
                self.weights(trial_id, into)
            return load_model(file)

    def ask(
        self, search_id: str, *, holder: str = "client", lease_seconds: float = 600.0
    ) -> dict[str, Any]:
        """Ask for the next trial of a search whose trials clients train, and for its token."""
        body = {"holder": holder, "lease_seconds": lease_seconds}
        return self.send(_post(f"{_search(search_id)}/ask", _plain, body))

    def tell(self, trial_id: int, /, *, token: str, **told: Any) -> dict[str, Any]:
        """Tell points of a trial that was asked for, that it goes on, or how it ended.

        Parameters
        ----------
        told
            points, outcome, error; see `nas.service.asking.Tell`.

        Raises
        ------
        LeaseLost
            The lease was lost: another process may train the trial now.
        """
        body = {"token": token, **told}
        return self.send(_post(f"/v1/trials/{trial_id}/points", _plain, body))

    def frontier(
        self, task: str = "text", x: str = "train_flops", device: str | None = None
    ) -> FrontierAnswer:
        """Pareto fronts of a task over all its searches, against an axis; `device` as of `best`."""
        return self.send(_get("/v1/frontier", _frontier, task=task, x=x, device=device))

    def best(
        self,
        /,
        *,
        task: str = "text",
        train_flops: float | None = None,
        train_seconds: float | None = None,
        device: str | None = None,
        published: bool = True,
        **budgets: float | None,
    ) -> Answer:
        """The best structure of a task within one budget.

        Parameters
        ----------
        train_flops, train_seconds, budgets
            Exactly one of train_flops, train_seconds (of training, evaluation left out),
            inference_flops (per token), params, step_seconds, peak_memory (bytes).
        device
            Of a measured budget (seconds or memory), the device whose runs are read, or a part of
            its name; by default the one with the most runs.
        published
            Whether a published table may answer, marked so, where the service has measured nothing
            within the budget.

        Raises
        ------
        NotFound
            Nothing is measured within the budget, and no table answers.
        """
        query = {"train_flops": train_flops, "train_seconds": train_seconds, **budgets}
        refused = None if published else "false"
        read = partial(_best, self)
        call = _get("/v1/best", read, task=task, device=device, published=refused, **query)
        return self.send(call)

    def structure(
        self, theta: str, d_in: int, d_out: int, sizing: str = "least-waste"
    ) -> dict[str, Any]:
        """Sizes, FLOPs, parameters and rank of θ at d_in → d_out; sizing least-waste or paper."""
        return self.get("/v1/structures", theta=theta, d_in=d_in, d_out=d_out, sizing=sizing)

    def tasks(self) -> list[dict[str, Any]]:
        """Every task of the service."""
        return self.send(_get("/v1/tasks", _items))

    def api_keys(self) -> Iterator[dict[str, Any]]:
        """Every key of the tenant, newest first, without their secrets; needs scope keys."""
        return self.iterate("/v1/keys")

    def create_key(
        self, name: str, /, *, idempotency_key: str | None = None, **fields: Any
    ) -> dict[str, Any]:
        """Create a key of the tenant; `key` of what is returned is its secret, shown only now.

        Parameters
        ----------
        name
            Who uses it, or for what.
        idempotency_key
            Makes a repeated request return the first one's key, without its secret; a fresh key by
            default.
        fields
            scopes, lifetime_seconds; see `nas.service.keys.NewKey`.
        """
        body = {"name": name, **fields}
        return self.send(_post("/v1/keys", _plain, body, _once(idempotency_key)))

    def rotate_key(
        self, key_id: str, /, *, grace_seconds: float = 0.0, idempotency_key: str | None = None
    ) -> dict[str, Any]:
        """Replace a key, which stays valid for the grace; returns what `create_key` does."""
        body, once = {"grace_seconds": grace_seconds}, _once(idempotency_key)
        return self.send(_post(_key(key_id, "rotate"), _plain, body, once))

    def revoke_key(self, key_id: str, /) -> dict[str, Any]:
        """Revoke a key and the browser sessions that it opened, at once."""
        return self.send(_post(_key(key_id, "revoke"), _plain))

    def iterate(self, path: str) -> Iterator[dict[str, Any]]:
        """The items of a paginated list."""
        cursor: str | None = None
        while True:
            page = self.get(path, limit=_PAGE, cursor=cursor)
            yield from page["items"]
            cursor = page["next"]
            if cursor is None:
                return

    def get(self, /, path: str, **query: Any) -> dict[str, Any]:
        """GET a JSON object; values that are None are left out."""
        return self.send(_get(path, _plain, **query))

    def download(self, /, path: str, into: BinaryIO, **query: Any) -> int:
        """GET a file into an open one, in parts; its bytes."""
        call = _get(path, _plain, **query)
        try:
            with self._http.stream(call.method, call.path, **call.options) as response:
                if not response.is_success:
                    response.read()
                    raise _as_error(response)
                return sum(into.write(part) for part in response.iter_bytes())
        except httpx.HTTPError as error:
            raise _unreachable(call, self.url, error) from error

    def _kept(self, search_id: str, data: dict[str, Any]) -> RemoteSearch:
        return RemoteSearch(search_id, data, self)

    def _become(self, path: str, body: _Json = None, headers: _Json = None) -> RemoteSearch:
        """The search that a POST answers with."""
        return self.send(_post(path, lambda data: self._kept(data["id"], data), body, headers))

    def send(self, call: _Call[_T]) -> _T:
        """One request; problems become the errors of `nas.errors`."""
        try:
            response = self._http.request(call.method, call.path, **call.options)
        except httpx.HTTPError as error:
            raise _unreachable(call, self.url, error) from error
        return call.read(_answer_of(response))


def _awaited(
    method: Callable[Concatenate[Any, _P], _T],
) -> Callable[Concatenate[Any, _P], Coroutine[Any, Any, _T]]:
    """A method of the synchronous classes as a coroutine of the asynchronous ones.

    The method makes one call, with `send`, and returns what that returns: with an `AsyncClient` a
    coroutine, which is awaited here.
    """

    @wraps(method)
    async def run(self: Any, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        return await cast("Coroutine[Any, Any, _T]", method(self, *args, **kwargs))

    return run


def _awaited_search(
    method: Callable[Concatenate[Any, _P], RemoteSearch],
) -> Callable[Concatenate[Any, _P], Coroutine[Any, Any, AsyncRemoteSearch]]:
    """The same of a method that returns a search: an `AsyncClient` keeps it as its own kind."""
    return _awaited(cast("Callable[Concatenate[Any, _P], AsyncRemoteSearch]", method))


@dataclass(frozen=True)
class AsyncRemoteSearch(_Stored):
    """A search on the service; see `AsyncClient` and, for the methods, `RemoteSearch`."""

    client: AsyncClient

    refresh = _awaited_search(RemoteSearch.refresh)
    frontier = _awaited(RemoteSearch.frontier)
    best = _awaited(RemoteSearch.best)
    confirm = _awaited_search(RemoteSearch.confirm)
    cancel = _awaited_search(RemoteSearch.cancel)
    pause = _awaited_search(RemoteSearch.pause)
    resume = _awaited_search(RemoteSearch.resume)
    retry = _awaited_search(RemoteSearch.retry)
    set_priority = _awaited_search(RemoteSearch.set_priority)
    set_labels = _awaited_search(RemoteSearch.set_labels)
    delete = _awaited_search(RemoteSearch.delete)
    clone = _awaited_search(RemoteSearch.clone)

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
        return [t async for t in self.client.iterate(f"{_search(self.id)}/trials")]


class AsyncClient(_Connection[httpx.AsyncClient]):
    """`Client` for asynchronous code: the same parameters, methods and errors."""

    _library = httpx.AsyncClient

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection."""
        await self._http.aclose()

    search = _awaited_search(Client.search)
    preview = _awaited(Client.preview)
    get_search = _awaited_search(Client.get_search)
    trial = _awaited(Client.trial)
    weights = _awaited(Client.weights)
    ask = _awaited(Client.ask)
    tell = _awaited(Client.tell)
    frontier = _awaited(Client.frontier)
    best = _awaited(Client.best)
    structure = _awaited(Client.structure)
    tasks = _awaited(Client.tasks)
    create_key = _awaited(Client.create_key)
    rotate_key = _awaited(Client.rotate_key)
    revoke_key = _awaited(Client.revoke_key)
    get = _awaited(Client.get)
    _become = _awaited_search(Client._become)

    def _kept(self, search_id: str, data: dict[str, Any]) -> AsyncRemoteSearch:
        return AsyncRemoteSearch(search_id, data, self)

    def searches(self) -> AsyncIterator[dict[str, Any]]:
        """Every search, newest first."""
        return self.iterate("/v1/searches")

    def api_keys(self) -> AsyncIterator[dict[str, Any]]:
        """Every key of the tenant, newest first, without their secrets; needs scope keys."""
        return self.iterate("/v1/keys")

    async def iterate(self, path: str) -> AsyncIterator[dict[str, Any]]:
        """The items of a paginated list."""
        cursor: str | None = None
        while True:
            page = await self.get(path, limit=_PAGE, cursor=cursor)
            for item in page["items"]:
                yield item
            cursor = page["next"]
            if cursor is None:
                return

    async def download(self, /, path: str, into: BinaryIO, **query: Any) -> int:
        """GET a file into an open one, in parts; its bytes."""
        call = _get(path, _plain, **query)
        try:
            async with self._http.stream(call.method, call.path, **call.options) as response:
                if not response.is_success:
                    await response.aread()
                    raise _as_error(response)
                return sum([into.write(part) async for part in response.aiter_bytes()])
        except httpx.HTTPError as error:
            raise _unreachable(call, self.url, error) from error

    async def model(self, trial_id: int) -> nn.Module:
        """The trained model of a trial at its last step, downloaded; see `Client.model`."""
        from nas.training.weights import load_model

        with TemporaryDirectory(prefix="einsum-nas-weights-") as folder:
            file = Path(folder) / "model.safetensors"
            with file.open("wb") as into:
                await self.weights(trial_id, into)
            return load_model(file)

    async def send(self, call: _Call[_T]) -> _T:
        """One request; problems become the errors of `nas.errors`."""
        try:
            response = await self._http.request(call.method, call.path, **call.options)
        except httpx.HTTPError as error:
            raise _unreachable(call, self.url, error) from error
        return call.read(_answer_of(response))


def _unreachable(call: _Call[Any], url: str, error: Exception) -> ServiceError:
    said = str(error) or type(error).__name__
    return ServiceError(masked(f"{call.method} {url}{call.path}: {said}"))


def _answer_of(response: httpx.Response) -> dict[str, Any]:
    if not response.is_success:
        raise _as_error(response)
    try:
        data: dict[str, Any] = response.json()
    except ValueError as error:
        raise ServiceError(masked(f"{response.url}: the answer is not JSON")) from error
    return data


def _as_error(response: httpx.Response) -> EinsumNasError:
    try:
        problem = response.json()
        detail = str(problem["detail"])
    except (ValueError, KeyError, TypeError):
        return ServiceError(f"{response.status_code} {response.reason_phrase}")
    if "field" in problem:
        return InvalidInput(problem["field"], problem["value"], problem["accepted"])
    if problem.get("type", "").endswith("idempotency-conflict"):
        return IdempotencyConflict(detail)
    if problem.get("type", "").endswith("lease-lost"):
        return LeaseLost(detail)
    if kind := _ERRORS.get(response.status_code):
        return kind(detail)
    return ServiceError(f"{response.status_code}: {detail}")
