"""This machine's database as the command line uses it, with the methods of `nas.client.Client`."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from nas.cli.common import whole_id
from nas.errors import EinsumNasError, InvalidInput
from nas.planning.request import SearchRequest
from nas.processes import BAD_INPUT, exit_on_signals, spawn, stop_child
from nas.records.answers import Answer, FrontierAnswer
from nas.service.answers import get_best, get_frontier
from nas.service.catalogue import (
    checked_filters,
    get_preview,
    get_tasks,
    search_detail,
    search_dict,
)
from nas.service.clone import create_clone
from nas.service.confirm import ConfirmRequest, create_confirmation
from nas.service.labels import Labels, set_labels
from nas.store import Search, Store
from nas.store.processes import Processes
from nas.store.weights import read_weights


def _changed_by(change: Callable[[Store, str], Search]) -> Callable[[LocalSearch], LocalSearch]:
    """A method of `LocalSearch` that changes the stored search."""
    return lambda self: self._as(change(self.store, self.id))


@dataclass(frozen=True)
class LocalSearch:
    """A search in the database, as it stood when it was last read; see `RemoteSearch`."""

    id: str
    #: the search as the service describes it; right after its submission its id and state alone
    data: dict[str, Any]
    store: Store

    #: a database has no pages
    page = None

    def wait(
        self, *, poll_seconds: float = 0.5, progress: Callable[[LocalSearch], object] | None = None
    ) -> LocalSearch:
        """Wait until the search has ended, and keep a worker process running for it."""
        child: subprocess.Popen[bytes] | None = None
        hinted = False
        exit_on_signals()
        try:
            while True:
                found = self.store.search(self.id)
                current = _detailed(self.store, found)
                if progress is not None:
                    progress(current)
                if found.finished_at is not None:
                    return current
                if child is not None and child.poll() == BAD_INPUT:
                    raise EinsumNasError("the worker's settings are invalid; see its error above")
                if found.state == "paused" and not hinted:
                    hinted = True
                    print(f"paused; `einsum-nas resume {self.id}` continues", file=sys.stderr)
                if child is None or child.poll() is not None:
                    child = spawn("worker", "--search", self.id, quiet=True)
                time.sleep(poll_seconds)
        finally:
            stop_child(child)

    def trials(self) -> list[dict[str, Any]]:
        """Every trial, in the order of their numbers."""
        return [trial.model_dump(mode="json") for trial in self.store.trials(self.id)]

    def frontier(self, x: str = "train_flops", device: str | None = None) -> FrontierAnswer:
        """Pareto fronts of this search against an axis."""
        return get_frontier(self.store, search_id=self.id, x=x, device=device)

    def best(self, *, device: str | None = None, **budgets: float | None) -> Answer:
        """The best structure of this search within a budget, by default the search's own."""
        own = {"train_flops": self.store.search(self.id).request.train_flops}
        return get_best(self.store, task=None, search_id=self.id, device=device, **(budgets or own))

    def confirm(self, **fields: Any) -> LocalSearch:
        """Run the best of this search again with fresh seeds."""
        wanted = ConfirmRequest.checked(fields)
        return _submitted(self.store, create_confirmation(self.store, self.id, wanted)[0])

    def clone(self, **changes: Any) -> LocalSearch:
        """Submit a copy of this search with some fields changed."""
        return self._as(create_clone(self.store, self.id, changes, _no_other_data)[0])

    # as `RemoteSearch` describes them
    cancel = _changed_by(Store.cancel)
    pause = _changed_by(Store.pause)
    resume = _changed_by(Store.resume)
    retry = _changed_by(Store.retry)

    def delete(self) -> LocalSearch:
        """Delete the ended search, which must have no completed run; as it was."""
        from nas.store.retention import delete_search

        return self._as(delete_search(self.store, self.id))

    def set_priority(self, priority: int) -> LocalSearch:
        """Set the priority of the search."""
        return self._as(self.store.set_priority(self.id, priority))

    def set_labels(self, /, **labels: Any) -> LocalSearch:
        """Change what the search is called."""
        return self._as(set_labels(self.store, self.id, Labels.checked(labels)))

    def _as(self, search: Search) -> LocalSearch:
        return LocalSearch(search.id, search_dict(search), self.store)


class Local:
    """A database, as one of two ways to run a command; the other is `Remote`."""

    #: what is to be done before a queued search runs
    then = "; `einsum-nas worker` or `serve` runs it"

    def __init__(self, store: Store) -> None:
        self._store = store

    def search(self, **fields: Any) -> LocalSearch:
        """Submit a search, of whose data the path is kept; fields as of `SearchRequest`."""
        request = SearchRequest.checked(fields)
        created, _ = self._store.create_search(request, data_path=checked_data(request))
        return _submitted(self._store, created)

    def preview(self, **fields: Any) -> dict[str, Any]:
        """What a search would run, without running it."""
        request = SearchRequest.checked(fields)
        checked_data(request)
        return get_preview(request, store=self._store)

    def get_search(self, search_id: str) -> LocalSearch:
        """A search by its id, or by the beginning of it."""
        return _detailed(self._store, self._store.search(whole_id(self, search_id)))

    def live(self, search_id: str) -> dict[str, Any]:
        """What the dashboard shows of a search, figures among it."""
        from api.dashboard.pages import live_document

        return live_document(self._store, search_id)

    def newest(self, *, limit: int, **filters: Any) -> list[dict[str, Any]]:
        """The newest searches; filters are state, failure, tenant, task, text and archived."""
        known = checked_filters(**filters)
        return [search_dict(found) for found in self._store.searches(limit=limit, **known)]

    def frontier(self, task: str, x: str, device: str | None = None) -> FrontierAnswer:
        """Pareto fronts of a task over all its searches, against an axis."""
        return get_frontier(self._store, task=task, x=x, device=device)

    def best(
        self, *, task: str, device: str | None = None, published: bool = True,
        **budgets: float | None,
    ) -> Answer:  # fmt: skip
        """The best structure of a task within one budget."""
        return get_best(
            self._store, task=task, search_id=None, device=device, published=published, **budgets
        )

    def weights(self, trial_id: int, into: BinaryIO) -> int:
        """Write the trained weights of a trial into an open file; its bytes."""
        kept, parts = read_weights(self._store, trial_id)
        into.writelines(parts)
        return kept.bytes

    def trial(self, trial_id: int) -> dict[str, Any]:
        """A trial with its curve."""
        found = self._store.trial(trial_id).model_dump(mode="json")
        curve = [asdict(point) for point in self._store.curve(trial_id)]
        for point in curve:  # REST leaves them out, for they are many
            del point["window_losses"]
        return {**found, "curve": curve}

    def tasks(self) -> list[dict[str, Any]]:
        """Every task."""
        return get_tasks(self._store)

    def workers(self) -> list[dict[str, Any]]:
        """Workers and services that were seen recently."""
        return [asdict(process) for process in Processes(self._store).alive()]


def _detailed(store: Store, search: Search) -> LocalSearch:
    return LocalSearch(search.id, search_detail(store, search), store)


def _submitted(store: Store, created: Search) -> LocalSearch:
    return LocalSearch(created.id, {"id": created.id, "state": created.state}, store)


def _no_other_data(request: SearchRequest) -> tuple[None, None]:
    if request.data is not None:
        accepted = "the data of the cloned search; for other data use `einsum-nas search --data`"
        raise InvalidInput("data", request.data, accepted)
    return None, None


def checked_data(request: SearchRequest) -> str | None:
    """Load the request's data to check it, and return its absolute path; None for the default."""
    if request.data is None or request.trainer == "client":
        return None
    from nas.tasks import load_data
    from nas.tasks.data import HUB_PREFIX, hub_parts, is_there

    data = load_data(request.settings, request.data)
    request.check_budget(data.recipe)
    print(f"data: {data.summary}, fingerprint {data.fingerprint}", file=sys.stderr)
    # absolute, because a worker may run in another folder
    if not request.data.startswith(HUB_PREFIX):
        return str(Path(request.data).resolve())
    name, part = hub_parts(request.data)
    place = str(Path(name).resolve()) if is_there(name) else name
    return f"{HUB_PREFIX}{place}" + (f":{part}" if part else "")
