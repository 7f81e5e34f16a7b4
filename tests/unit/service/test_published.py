"""Answers from EinBench, where a service has measured nothing yet."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nas.cli.terminal import show_best
from nas.designs.design import parse_design
from nas.einbench import EinBench
from nas.errors import NotFound
from nas.records.answers import Answer
from nas.service.answers import get_best
from nas.service.published import best_published, runs_of
from nas.store import Store
from tests.support.planting import PlantedRun, open_store, plant, stand
from tests.support.tables import BUDGET, DEVICE, LOSSES, RECIPE, small_table


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[EinBench]:
    """The small table in the place of the one that comes with the package."""
    with small_table(tmp_path / "data") as written:
        yield written


@pytest.fixture
def store(migrated_url: str) -> Iterator[Store]:
    opened = open_store(migrated_url)
    yield opened
    opened.close()


def ask(store: Store, **asked: Any) -> Answer:
    return get_best(store, **{"task": "regression", **asked})


def test_before_any_search_the_table_answers_and_says_what_it_is(
    bench: EinBench, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    best = ask(store, train_flops=BUDGET)
    assert (best.kind, best.task) == ("published", "regression@published-1")
    assert parse_design(best.name).canonical() == parse_design("monarch").canonical()
    # three seeds, 1% apart, at the wider of the two widths
    assert best.expected_loss == pytest.approx(0.4 * 0.5**0.1 * 1.01)
    assert best.interval is not None
    assert best.interval[0] < best.expected_loss < best.interval[1]
    assert best.verdict == "structured is lower"
    assert not best.confirmed
    about = best.published
    assert about is not None
    assert (about.entries, about.widths, about.seeds) == (8, [32, 64], [0, 1, 2])
    assert (about.recipe, about.settings) == (
        RECIPE.name, {"batch": 128, "min_steps": 60}
    )  # fmt: skip
    assert (about.fingerprint, about.machine) == ("published-1", DEVICE)
    assert (about.read_at, best.budget) == (BUDGET, BUDGET)
    assert (best.evidence.trials, best.evidence.searches) == (24, 0)
    assert best.best_structured is not None
    assert best.best_structured.trial_id < 0
    assert best.layer(64, 96).structure.macs > 0
    show_best(best)
    shown = capsys.readouterr().out
    for told in ("PUBLISHED", "EinBench regression", "no run of this service", "width 32, 64"):
        assert told in " ".join(shown.split())
    assert "published" in best.snippet


def test_beyond_the_table_it_answers_at_its_greatest_and_below_it_is_refused(
    bench: EinBench, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    beyond = ask(store, train_flops=1e15)
    assert beyond.published is not None
    assert (beyond.budget, beyond.published.read_at) == (1e15, BUDGET)
    same = ask(store, train_flops=BUDGET)
    assert beyond.expected_loss == same.expected_loss
    show_best(beyond)
    assert "is of 1e+11 train FLOPs" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(NotFound, match=r"has begun here.*the least of EinBench regression"):
        ask(store, train_flops=1e3)
    with pytest.raises(NotFound, match="has begun here"):
        ask(store, train_flops=BUDGET, published=False)
    with pytest.raises(NotFound, match="has begun here"):
        get_best(store, task="pixels", train_flops=BUDGET)


@pytest.mark.parametrize(
    ("axis", "budget", "width"),
    [("params", 1e9, 64), ("train_seconds", 4.0, 64), ("peak_memory", 32_000, 32),
     ("step_seconds", 1.0, 64), ("inference_flops", 1e9, 64)],
)  # fmt: skip
def test_every_axis_has_an_answer(bench: EinBench, axis: str, budget: float, width: int) -> None:
    found = best_published(bench, axis, budget)
    assert found.found.best.run.width == width
    with pytest.raises(NotFound, match="the least of EinBench"):
        best_published(bench, axis, 1e-9)


def test_own_runs_are_never_mixed_with_the_table(bench: EinBench, store: Store) -> None:
    dense = PlantedRun(parse_design("dense"), 32, 0, 10**7, 3200, [(1000, 3.0), (2000, 2.0)])
    plant(store, [dense], fingerprint="planted", budget=2e11, task="regression")
    stand(store)
    own = ask(store, train_flops=2e10)
    assert (own.kind, own.name, own.evidence.trials) == ("measured", "dense", 1)
    # the table's budgets begin below those of the store
    below = ask(store, train_flops=9e9)
    assert (below.kind, below.evidence.trials) == ("published", 24)
    # a version of the data, or a search, is what was asked about: nothing else answers
    assert own.best_dense is not None
    search = {"task": None, "search_id": own.best_dense.search_id}
    for about in ({"task": "regression@planted"}, search):
        with pytest.raises(NotFound, match="the least measured is 1e"):
            ask(store, train_flops=9e9, **about)
    assert ask(store, task="regression@published-1", train_flops=1e10).kind == "published"


def test_runs_of_an_entry_have_its_curves(bench: EinBench) -> None:
    curve = bench.curve("monarch", 64)
    runs = list(runs_of(bench, curve))
    assert [r.seed for r in runs] == [0, 1, 2]
    assert [[p.loss for p in r.points] for r in runs] == curve.loss.tolist()
    assert {r.model for r in runs} != {r.model for r in runs_of(bench, bench.curve("monarch", 32))}
    ids = [r.trial_id for c in bench.entries for r in runs_of(bench, c)]
    assert len(set(ids)) == len(ids) == 3 * 2 * len(LOSSES)
