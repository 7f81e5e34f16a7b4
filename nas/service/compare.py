"""Searches side by side: which are meant, their fields, and which of them differ."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from nas.errors import InvalidInput

#: How many searches one comparison takes.
FEWEST, MOST = 2, 5


#: What is the beginning of an id, of 32 digits, and long enough to mean one.
_BEGINNING = re.compile("[0-9a-f]{4,31}")


def whole_id(given: str, ids_with: Callable[[str], Iterable[str]]) -> str:
    """The id of the one search whose id begins as given; other texts as they are.

    Parameters
    ----------
    ids_with
        Ids of searches, among them those that begin with a text.

    Raises
    ------
    InvalidInput
        Several ids begin so.
    """
    if not _BEGINNING.fullmatch(given):
        return given
    found = [one for one in ids_with(given) if one.startswith(given)]
    if len(found) > 1:
        accepted = f"an id, or the beginning of one alone; so begin {', '.join(found[:5])}"
        raise InvalidInput("id", given, accepted)
    return found[0] if found else given


def checked_ids(ids: Sequence[str]) -> Sequence[str]:
    """The ids of searches to compare; `InvalidInput` unless they are 2 to 5 different ones."""
    if not FEWEST <= len(ids) <= MOST or len(set(ids)) < len(ids):
        raise InvalidInput("ids", " ".join(ids), f"{FEWEST} to {MOST} different searches")
    return ids


def fields_of(search: Mapping[str, Any]) -> dict[str, Any]:
    """What a search was asked, and the fingerprint of its data: dotted names → plain values.

    Of a confirmation the runs are left out, which the search that it confirms tells.

    >>> request = {"task": "text", "limits": {"seconds": 60.0}, "space": None}
    >>> fields_of({"task_fingerprint": "f1", "request": request})
    {'task_fingerprint': 'f1', 'task': 'text', 'limits.seconds': 60.0, 'space': None}
    """
    found: dict[str, Any] = {"task_fingerprint": search["task_fingerprint"]}
    for name, value in search["request"].items():
        if isinstance(value, Mapping):
            found |= {f"{name}.{inner}": v for inner, v in value.items()}
        else:
            found[name] = value
    found.pop("confirm.runs", None)
    return found


def side_by_side(searches: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Field → its value in each search, None where it has none."""
    columns = [fields_of(search) for search in searches]
    names = dict.fromkeys(name for column in columns for name in column)
    return {name: [column.get(name) for column in columns] for name in names}


def differing(fields: Mapping[str, Sequence[Any]]) -> list[str]:
    """The fields that are not equal in all searches."""
    return [name for name, values in fields.items() if any(v != values[0] for v in values)]


def losses_compare(searches: Sequence[Mapping[str, Any]]) -> bool:
    """Whether losses of the searches are of the same data and recipe."""
    prints = {(search["task"], search["task_fingerprint"]) for search in searches}
    return len(prints) == 1 and None not in next(iter(prints))
