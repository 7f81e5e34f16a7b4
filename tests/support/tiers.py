"""What `make test` leaves to `make test-all`."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest

#: Of tests that `make test` leaves out.
FULL = pytest.mark.full


def thinned(values: Iterable[Any], count: int) -> list[Any]:
    """Values of a parameter of which `make test` takes `count`, evenly spread."""
    listed = list(values)
    kept = {round(i * (len(listed) - 1) / max(count - 1, 1)) for i in range(count)}
    return [v if i in kept else _left(v) for i, v in enumerate(listed)]


def only(kept: Collection[Any], values: Iterable[Any]) -> list[Any]:
    """Values of a parameter of which `make test` takes those in `kept`."""
    listed = list(values)
    assert all(k in listed for k in kept), (kept, listed)
    return [v if v in kept else _left(v) for v in listed]


def _left(value: Any) -> Any:
    return (
        pytest.param(*value, marks=FULL)
        if type(value) is tuple
        else pytest.param(value, marks=FULL)
    )
