"""A service with planted searches, and a browser: what the tests of the dashboard look at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from nas.designs.design import parse_design
from nas.store import Store
from tests.support.browser import chromium
from tests.support.planting import PlantedRun, open_store, plant, stand
from tests.support.services import Service, api, running

#: Searches beside the two with results.
MORE = 200
#: Why trial 7 of each of these two failed.
WHY = "<img src=x onerror=hit(1)> the loss is not finite"
FINGERPRINT = "0123456789abcdef"


class House(NamedTuple):
    service: Service
    #: ids of a search with 150 runs and of one with 8
    large: str
    small: str
    browser: Any


def runs(count: int) -> Iterator[PlantedRun]:
    texts = ["dense", "btt:rho=1/4", "monarch", "low-rank:rho=1/2", "kronecker"]
    for i in range(count):
        loss = 2.0 + 0.01 * ((37 * i) % 100)
        curve = [(step, loss + 400 / step) for step in (200, 400, 800, 1600)]
        failed = i == 7
        yield PlantedRun(
            parse_design(texts[i % 5]), 16 + 8 * (i % 4), i % 3, 4 * 10**7 - i, 5000 + i, curve,
            state="failed" if failed else "complete", error=WHY if failed else None,
        )  # fmt: skip


def url_of(home: Path) -> str:
    """The database of a home."""
    return f"sqlite:///{home / 'einsum-nas.db'}"


@contextmanager
def planted_house(
    home: Path, more: Callable[[Store], None] | None = None, others: int = 0
) -> Iterator[House]:
    """A service on planted searches, `others` of them without runs; `more` adds to its store before
    it starts."""
    store = open_store(url_of(home))
    large, small = (
        plant(store, runs(count), fingerprint=FINGERPRINT, budget=6.4e10, seed=count)
        for count in (150, 8)
    )  # fmt: skip
    for i in range(others):
        plant(store, [], fingerprint=FINGERPRINT, budget=1e12, seed=i)
    stand(store)
    if more is not None:
        more(store)
    store.close()
    with running(api(home)) as service, chromium() as browser:
        yield House(service, large, small, browser)
