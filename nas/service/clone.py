"""Copies of a search, with or without changes, as new searches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from nas.errors import InvalidInput
from nas.planning.request import SearchRequest
from nas.store import Search, Store

#: Fields of a confirmation that may be changed; all others follow from the runs that it repeats.
_OF_CONFIRMATION = ("limits", "priority")


def create_clone(
    store: Store,
    search_id: str,
    changes: Mapping[str, Any],
    data_place: Callable[[SearchRequest], tuple[str | None, str | None]],
    *,
    idempotency_key: str | None = None,
    request_id: str | None = None,
) -> tuple[Search, bool]:
    """Queue a copy of a search; return (search, whether it is new).

    Equal runs share their results, so a clone with more trials continues where the original ended.

    Parameters
    ----------
    changes
        Fields of a `SearchRequest` and their new values.
    data_place
        Gives the path of a request's data and the folder that it has to lie in; called if the
        clone has other data.

    Raises
    ------
    NotFound
        No such search.
    InvalidInput
        A change is invalid.
    IdempotencyConflict
        The key was used with another request.
    """
    source = store.search(search_id)
    if source.request.confirm is not None:
        for name in changes:
            if name not in _OF_CONFIRMATION:
                accepted = f"{' | '.join(_OF_CONFIRMATION)}: {search_id} is a confirmation"
                raise InvalidInput("changes", name, accepted)
    fields = {**source.request.model_dump(mode="json"), "priority": source.priority}
    request = SearchRequest.checked({**fields, **changes})
    same_data = (request.task, request.data) == (source.request.task, source.request.data)
    own = (source.data_path, source.data_root)
    data_path, data_root = own if same_data else data_place(request)
    return store.create_search(
        request,
        data_path=data_path,
        data_root=data_root,
        idempotency_key=idempotency_key,
        # a confirmation must run on the same data
        fingerprint=source.task_fingerprint if request.confirm is not None else None,
        cloned_from=search_id,
        request_id=request_id,
    )
