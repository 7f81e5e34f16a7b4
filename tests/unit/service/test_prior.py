"""What a search begins with is what others have measured, and stays what it was."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import sqlalchemy as sa

from nas.designs.design import parse_design
from nas.errors import LeaseLost
from nas.planning.recipe import REGRESSION
from nas.planning.request import SearchRequest
from nas.records.evidence import Evidence
from nas.service import prior
from nas.service.prior import fixed_evidence
from nas.store import Lease, Leases, Search, Store
from nas.store.engine import writing
from nas.store.schema import EventRow, SearchRow, TrialRow
from tests.support.planting import PlantedRun, open_store, plant, stand
from tests.support.tables import RECIPE, small_table

pytestmark = pytest.mark.one_database

BUDGET = 2e11


@pytest.fixture
def store(migrated_url: str) -> Iterator[Store]:
    opened = open_store(migrated_url)
    yield opened
    opened.close()


@pytest.fixture(autouse=True)
def table(tmp_path: Path) -> Iterator[None]:
    with small_table(tmp_path / "data"):
        yield


def planted(text: str, seed: int, *losses: float, width: int = 32) -> PlantedRun:
    curve = [(1000 * (i + 1), loss) for i, loss in enumerate(losses)]
    return PlantedRun(parse_design(text), width, seed, 10**6, 3200, curve)


def earlier(store: Store, fingerprint: str, *runs: PlantedRun, task: str = "regression") -> str:
    found = plant(store, runs, fingerprint=fingerprint, budget=BUDGET, task=task)
    stand(store)
    return found


def begun(store: Store, **fields: object) -> tuple[Search, Lease]:
    """A search that a worker has just claimed."""
    asked = {"task": "regression", "train_flops": BUDGET, **fields}
    store.create_search(SearchRequest.checked(asked))
    claimed = Leases(store).claim("w", 60.0)
    assert claimed is not None
    lease, search = claimed
    Leases(store).set_fingerprint(lease, "own")
    return search, lease


def ask(store: Store, search: Search, lease: Lease) -> tuple[Evidence, ...]:
    return fixed_evidence(store, Leases(store), lease, search, REGRESSION, "own")


def told(found: Sequence[Evidence]) -> dict[str, list[tuple[str, int, list[float]]]]:
    """Source → name, width and losses of each curve."""
    return {
        e.source: [
            (p.name, p.width, [loss for _, loss in curve])
            for p, curve in zip(e.plans, e.curves, strict=True)
        ]
        for e in found
    }


def test_the_nearest_source_comes_first_and_seeds_are_one_curve(store: Store) -> None:
    earlier(store, "other", planted("kronecker", 0, 5.0))
    earlier(store, "own", planted("monarch", 0, 3.0, 2.0), planted("monarch", 1, 3.2, 2.2),
            planted("dense", 0, 3.5, 2.5))  # fmt: skip
    earlier(store, "text", planted("monarch", 0, 1.0), task="text")
    found = ask(store, *begun(store))
    assert [e.source for e in found] == [
        "regression@own", "regression@other", "EinBench regression"
    ]  # fmt: skip
    assert told(found)["regression@own"] == [
        ("monarch", 32, [pytest.approx(3.1), pytest.approx(2.1)]), ("dense", 32, [3.5, 2.5])
    ]  # fmt: skip
    assert [e.recipe for e in found] == [REGRESSION, REGRESSION, RECIPE]
    own, table = found[0], found[2]
    assert own.curves[0][0][0] == 1e9
    assert own.plans[0].structures
    assert (own.plans[0].steps, own.plans[0].train_flops_per_step) == (2000, 10**6)
    assert len(table.plans) == 8
    assert all(
        p.steps == 400 and len(c) == 3 for p, c in zip(table.plans, table.curves, strict=True)
    )


def test_a_search_that_is_resumed_begins_with_what_it_began_with(store: Store) -> None:
    earlier(store, "own", planted("monarch", 0, 3.0, 2.0), planted("dense", 0, 3.5, 2.5))
    search, lease = begun(store)
    first = ask(store, search, lease)
    # of the same models and of others, better and worse
    earlier(store, "own", planted("monarch", 1, 1.0, 0.5), planted("kronecker", 0, 1.0, 0.2))
    earlier(store, "newer", planted("kronecker", 0, 1.0, 0.2))
    assert ask(store, search, lease) == first
    another, its = begun(store)
    assert told(ask(store, another, its)) != told(first)
    with writing(store.engine) as session:
        count = sa.select(sa.func.count()).where(
            EventRow.search_id == search.id, EventRow.kind == prior.EVENT
        )
        assert session.scalar(count) == 1


def test_only_the_holder_of_the_lease_fixes_it(store: Store) -> None:
    search, lease = begun(store)
    with writing(store.engine) as session:
        session.execute(sa.update(SearchRow).values(epoch=SearchRow.epoch + 1))
    with pytest.raises(LeaseLost):
        ask(store, search, lease)


def test_what_is_gone_is_left_out_with_a_warning(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    earlier(store, "own", planted("monarch", 0, 3.0, 2.0), planted("dense", 0, 3.5, 2.5))
    search, lease = begun(store)
    assert len(told(ask(store, search, lease))["regression@own"]) == 2
    with writing(store.engine) as session:
        session.execute(sa.delete(TrialRow).where(TrialRow.dense))
    with caplog.at_level(logging.WARNING):
        found = told(ask(store, search, lease))
    assert [name for name, *_ in found["regression@own"]] == ["monarch"]
    assert "is there no more" in caplog.text


def test_other_tenants_and_unfinished_runs_are_none_of_it(store: Store) -> None:
    earlier(store.view("else"), "own", planted("monarch", 0, 3.0, 2.0))
    earlier(store, "own", planted("dense", 0, 3.5, 2.5),
            PlantedRun(parse_design("kronecker"), 32, 0, 10**6, 3200, [(1000, 0.1)],
                       state="stopped", steps=2000))  # fmt: skip
    found = told(ask(store, *begun(store)))
    assert [name for name, *_ in found["regression@own"]] == ["dense"]


def test_none_is_none(store: Store) -> None:
    earlier(store, "own", planted("dense", 0, 3.5, 2.5))
    assert ask(store, *begun(store, warm_start="none")) == ()


def test_many_runs_are_capped_to_the_lowest_and_a_spread(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prior, "MAX_CURVES", 12)
    runs = [planted("monarch", 0, 3.0 + i / 10, width=16 * (i + 1)) for i in range(40)]
    earlier(store, "own", *runs)
    found = told(ask(store, *begun(store)))
    assert list(found) == ["regression@own"]  # nothing is left for the table
    widths = [width for _, width, _ in found["regression@own"]]
    assert len(widths) == 12
    assert {16 * (i + 1) for i in range(6)} <= set(widths)
    assert max(widths) == 16 * 40


def test_the_default_changes_no_digest() -> None:
    plain = {"train_flops": BUDGET, "task": "regression"}
    auto = SearchRequest.checked({**plain, "warm_start": "auto"})
    assert auto.digest == SearchRequest.checked(plain).digest
    assert auto.digest != SearchRequest.checked({**plain, "warm_start": "none"}).digest
