"""The commands that look at searches: show, trials, compare and report, on a database."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from nas.designs.design import parse_design
from nas.service.labels import Labels, set_labels
from nas.settings import settings
from tests.support.commands import Completed, invoke
from tests.support.planting import PlantedRun, open_store, plant, stand

MARKUP = '<img src=x onerror="alert(1)"> [red] & co'
REASON = "loss is nan </td><script>alert(2)</script>\nat step 60"


class Home:
    """A home with three searches: two alike but for their seeds, and one of other data."""

    def __init__(self, path: Path) -> None:
        self.path = path
        store = open_store(f"sqlite:///{path / 'einsum-nas.db'}")
        shape: dict[str, Any] = {"seed": 0, "train_flops_per_step": 2 * 10**9, "params": 1000}
        alike, turned = (-0.1, 0.1), (0.1, -0.1)  # which sample is the harder one
        runs = [
            PlantedRun(
                parse_design(text), width, curve=[(50, loss + 0.5), (100, loss)], samples=samples,
                **shape,
            )
            for text, width, loss, samples in (
                ("dense", 16, 2.5, alike), ("dense", 32, 2.6, alike), ("monarch", 48, 2.25, alike),
                ("btt:cores=3,rho=1/8", 64, 2.26, turned),
            )
        ]  # fmt: skip
        failed = PlantedRun(
            parse_design("monarch"), 64, curve=[(50, 3.0)], state="failed", error=REASON, **shape
        )
        self.first, self.second, self.other = (
            plant(store, [*runs, failed], fingerprint=f, budget=2e11, seed=seed, trials=8)
            for f, seed in (("f1", 0), ("f1", 1), ("f2", 0))
        )
        stand(store)
        labels = {"name": MARKUP, "tags": ["paper"], "notes": "</style>as it is"}
        set_labels(store, self.first, Labels.checked(labels))
        store.close()

    def run(self, *words: str, **options: Any) -> Completed:
        return invoke(self.path, *words, **options)

    def json(self, *words: str) -> Any:
        return json.loads(self.run(*words, "--json").stdout)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    yield Home(tmp_path_factory.mktemp("home"))
    settings.cache_clear()


def one_line(text: str) -> str:
    return " ".join(text.split())


def test_a_search_is_shown_its_verdict_first(home: Home) -> None:
    shown = one_line(home.run("show", home.first).stdout)
    assert shown.startswith("verdict: unconfirmed (")
    for told in (
        home.first, "succeeded: 5 runs finished", "1 failed", "lowest loss structured 2.2500",
        "dense 2.5000", "train_flops 2e+11", "trials 8", MARKUP, "#paper", "best: monarch",
    ):  # fmt: skip
        assert told in shown, told
    found = home.json("show", home.first)
    assert (found["search"]["id"], found["page"]) == (home.first, None)
    assert found["best"]["expected_loss"] == 2.25
    assert found["search"]["overview"]["structured"] == 2.25


def test_one_without_an_answer_says_why(home: Home) -> None:
    queued = home.json("search", "--train-flops", "2e11")["id"]
    shown = one_line(home.run("show", queued).stdout)
    assert shown.startswith("no answer yet: nothing is measured")
    assert home.json("show", queued)["best"] is None


def test_the_beginning_of_an_id_is_enough_where_no_other_begins_so(home: Home) -> None:
    assert home.json("show", home.first[:8])["search"]["id"] == home.first
    asked = ("best", "--search", home.first[:8], "--train-flops", "2e11")
    assert home.json(*asked)["best_structured"]["search_id"] == home.first
    for unknown in ("0" * 32, "ffff0000ffff", "θ"):
        done = home.run("show", unknown)
        assert (done.returncode, done.stdout) == (1, "")
        assert f"no search '{unknown}'" in done.stderr


def test_a_beginning_of_several_ids_is_refused(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(f"sqlite:///{tmp_path / 'einsum-nas.db'}")
    ids = iter(("abcd" + "0" * 28, "abcd" + "1" * 28))

    class Known:
        def __init__(self) -> None:
            self.hex = next(ids)

    monkeypatch.setattr("nas.store.searches.uuid.uuid4", Known)
    for seed in range(2):
        plant(store, [], fingerprint="f1", budget=2e11, seed=seed)
    store.close()
    done = invoke(tmp_path, "show", "abcd")
    assert done.returncode == 2
    assert "id: got abcd; accepted: an id, or the beginning of one alone" in done.stderr
    assert json.loads(invoke(tmp_path, "show", "abcd1", "--json").stdout)


def test_trials_are_filtered_sorted_and_counted(home: Home) -> None:
    numbers = {
        (): [0, 1, 2, 3, 4], ("--sort", "loss"): [2, 3, 0, 1, 4],
        ("--sort", "width", "--limit", "2"): [0, 1], ("--state", "failed"): [4],
        ("--text", "MONARCH"): [2, 4], ("--text", "loss is NaN"): [4], ("--text", "θ"): [],
    }  # fmt: skip
    for words, expected in numbers.items():
        assert [t["number"] for t in home.json("trials", home.first, *words)] == expected, words
    shown = one_line(home.run("trials", home.first, "--limit", "4", "--sort", "loss").stdout)
    assert "shown are the first 4 (--limit)" in shown
    failed = one_line(home.run("trials", home.first, "--text", "nan").stdout)
    assert "1 of 5 trials match" in failed
    assert "loss is nan </td><script>" in failed
    assert "no trial matches" in home.run("trials", home.first, "--state", "paused").stdout


def test_searches_stand_side_by_side(home: Home) -> None:
    found = home.json("compare", home.first, home.second[:12])
    assert found["differ"] == ["seed"]
    assert found["fields"]["seed"] == [0, 1]
    assert found["losses_compare"]
    assert [entry["best"]["expected_loss"] for entry in found["searches"]] == [2.25, 2.25]
    shown = home.run("compare", home.first, home.second, columns="160").stdout
    assert "differ in: seed" in shown
    assert "sampler" not in shown
    assert "2.2500 measured" in shown
    assert "sampler" in home.run("compare", home.first, home.second, "--all").stdout
    other = home.run("compare", home.first, home.other).stdout
    assert "differ in: task_fingerprint" in other
    assert "their losses do not compare" in other


@pytest.mark.parametrize(
    ("words", "accepted"),
    [(("compare", "{0}"), "2 to 5 different searches"),
     (("compare", *["{0}"] * 2), "2 to 5 different searches"),
     (("compare", "{0}", "{0:.8}"), "2 to 5 different searches"),
     (("compare", *"abcdef"), "got a b c d e f; accepted: 2 to 5"),
     (("trials", "{0}", "--sort", "beauty"), "sort: got beauty; accepted: number | loss"),
     (("trials", "{0}", "--state", "lost"), "state: got lost; accepted: planned | running"),
     (("trials", "{0}", "--limit", "0"), "from 1 to 500"),
     (("report", "{0}", "--out", "/no/such/folder/r.html"), "a folder that exists"),
     (("report", "{0}", "--out", ""), "the path of a file")],
    ids=lambda v: " ".join(v)[:40] if isinstance(v, tuple) else "",
)  # fmt: skip
def test_what_cannot_be_shown_is_refused(home: Home, words: tuple[str, ...], accepted: str) -> None:
    done = home.run(*(word.format(home.first) for word in words))
    assert (done.returncode, done.stdout) == (2, "")
    assert accepted in done.stderr


def test_a_report_is_one_page_that_shows_texts_as_they_are(home: Home, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    assert home.run("report", home.first, "-o", str(out)).stdout == f"wrote {out}\n"
    page = out.read_text(encoding="utf-8")
    tags = set(re.findall(r"<([a-z0-9]+)", page, re.IGNORECASE))
    assert not tags & {"script", "img", "link", "iframe", "b"}, tags
    assert page.count("</style>") == 1
    assert not re.findall(r"""(?:src|href|url)\s*[=(]""", re.sub("&lt;.*?&gt;", "", page))
    text = one_line(html.unescape(re.sub(r"<[^>]*>", " ", page)))
    for told in (
        MARKUP, "</style>as it is", "verdict: unconfirmed", "best: monarch",
        "not clearly different from the best, of", "btt:cores=3,rho=1/8, width 64: +0.0100",
        "loss is nan </td><script>alert(2)</script>",
        "device cpu, threads 1", "einsum-nas search --task text --train-flops 200000000000.0",
        f"einsum-nas best --search {home.first}", "by einsum-nas 0",
    ):  # fmt: skip
        assert told in text, told
    figures = [ElementTree.fromstring(f) for f in re.findall(r"<svg.*?</svg>", page)]
    assert len(figures) == 2
    lines = [len(list(f.iter("{http://www.w3.org/2000/svg}polyline"))) for f in figures]
    assert lines == [2, 4]  # the fronts, and the curves of completed runs
    refused = home.run("report", home.first, "-o", str(out))
    assert (refused.returncode, "with --overwrite" in refused.stderr) == (2, True)
    assert home.run("report", home.first, "-o", str(out), "--overwrite").returncode == 0


def test_a_report_of_a_search_without_runs_says_so(home: Home, tmp_path: Path) -> None:
    queued = home.json("search", "--train-flops", "2e11", "--seed", "7")["id"]
    out = tmp_path / "report.html"
    assert home.run("report", queued, "-o", str(out)).returncode == 0
    page = out.read_text(encoding="utf-8")
    assert "nothing of it has been recorded" in page
    assert page.count("<svg") == 2
