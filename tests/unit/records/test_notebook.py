"""What notebooks show of searches and answers: tables in which every text is shown as it is."""

from __future__ import annotations

import html
import re
from typing import Any

import pytest

from nas.client import Client, RemoteSearch
from nas.designs.design import parse_design
from nas.records.notebook import table
from nas.service.answers import get_best, get_frontier
from nas.service.catalogue import search_detail
from nas.store import Store
from tests.support.planting import PlantedRun, open_store, plant, stand

MARKUP = '<img src=x onerror="alert(1)"> & co'


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return open_store(f"sqlite:///{tmp_path_factory.mktemp('store') / 'n.db'}")


@pytest.fixture(scope="module")
def search(store: Store) -> str:
    runs = [
        PlantedRun(parse_design(text), 32, seed, 2 * 10**9, 1000,
                   [(50, loss + 0.5), (100, loss + 0.01 * seed)])
        for text, loss in (("dense", 2.5), ("monarch", 2.25), ("btt:rho=1/4", 2.26))
        for seed in range(3)
    ]  # fmt: skip
    made = plant(store, runs, fingerprint="f1", budget=2e11)
    stand(store)
    return made


def tags(shown: str) -> set[str]:
    return set(re.findall(r"<([a-z]+)", shown))


def text_of(shown: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", shown)).split())


def test_every_text_is_shown_as_it_is() -> None:
    shown = table(MARKUP, [(MARKUP, MARKUP)], headings=(MARKUP, MARKUP), notes=[MARKUP],
                  link=f"http://h/{MARKUP}")  # fmt: skip
    assert tags(shown) == {"a", "b", "table", "thead", "tbody", "tr", "th", "td", "div"}
    assert text_of(shown).count(MARKUP) == 6
    assert shown.count('"') == 2  # those of the link


def test_an_answer_and_a_front(store: Store, search: str) -> None:
    best = get_best(store, search_id=search, train_flops=2e11)
    shown = best._repr_html_()
    assert tags(shown) <= {"b", "table", "thead", "tbody", "tr", "th", "td", "div"}
    told = text_of(shown)
    for part in (
        "structured is lower, within 2e+11 train FLOPs", "monarch", "dense", "2.2600",
        "expected loss 2.2600 nats per character (95%: ", "measured", "dense − structured: +0.2500",
        "not clearly different from the best: 1 other structure",
    ):  # fmt: skip
        assert part in told, part
    front = get_frontier(store, search_id=search)
    told = text_of(front._repr_html_())
    assert "Pareto front: loss against train FLOPs" in told
    assert "18 points of 9 completed runs; losses measured, in nats per character" in told
    assert told.count("monarch") == len(front.frontier)


def test_a_search(store: Store, search: str) -> None:
    detail: dict[str, Any] = search_detail(store, store.search(search))
    with Client("http://127.0.0.1:9") as client:
        shown = RemoteSearch(search, {**detail, "name": MARKUP}, client)._repr_html_()
        plain = RemoteSearch(search, {**detail, "error": MARKUP}, client)._repr_html_()
    assert shown.startswith(f'<a href="http://127.0.0.1:9/searches/{search}">')
    assert tags(shown) == {"a", "b", "table", "tbody", "tr", "th", "td"}
    told = text_of(shown)
    for part in (MARKUP, "succeeded", "9 complete", "lowest loss, structured 2.2500 measured"):
        assert part in told, part
    assert f"Search {search[:8]}" in text_of(plain)
    assert MARKUP in text_of(plain)
