"""A search again, as it was or with changes, as a search of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from nas.errors import InvalidInput
from nas.request import SearchRequest
from nas.store import Search, Store

#: Fields of a confirmation that may be changed: which runs it repeats is what it is.
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
    """Queue a search like another one; (search, whether it is new).

    Equal runs share their results, so that a clone with more trials goes on where the first ended.

    Parameters
    ----------
    changes
        Fields of a `SearchRequest` and their new values.
    data_place
        Where the data of a request lies and the folder that it may not lead out of, called where
        the clone has other data.

    Raises
    ------
    NotFound
        No such search.
    InvalidInput
        A change that cannot be made.
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
        # runs are repeated on the data they had, or not at all
        fingerprint=source.task_fingerprint if request.confirm is not None else None,
        cloned_from=search_id,
        request_id=request_id,
    )
