"""The commands' two places, a database and a service, are called alike."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from nas.cli.local import Local, LocalSearch
from nas.cli.remote import Remote
from nas.client import RemoteSearch


@pytest.mark.parametrize(("here", "there"), [(Local, Remote), (LocalSearch, RemoteSearch)])
def test_a_database_has_the_methods_of_a_service(here: type, there: type) -> None:
    names = [n for n, m in vars(here).items() if not n.startswith("_") and callable(m)]
    assert len(names) >= 6
    for name in names:
        own: Any = inspect.signature(getattr(here, name)).parameters
        other = inspect.signature(getattr(there, name)).parameters
        free = any(p.kind is p.VAR_KEYWORD for p in own.values())
        assert free or set(own) <= set(other), name
