"""The command line as its users meet it: real processes, exit codes, output."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nas.cli.main import app
from nas.client import Client, RemoteSearch
from nas.store import Store, upgrade
from tests.support.commands import execute, invoke
from tests.support.services import Service
from tests.support.small import SMALL_SEARCH
from tests.support.tiers import FULL

BAD_COMMANDS: list[tuple[list[str], list[str]]] = [
    (["inspect", "1/2,0,1/4,0,1/2,1/2,0", "--d-in", "8", "--d-out", "8"],
     ["alpha=0.5, beta=0, gamma=0.25 (sum 0.75)", "alpha + beta + gamma = 1"]),
    (["inspect", "2,0,0,0,1,0,0", "--d-in", "8", "--d-out", "8"], ["theta.alpha", "2.0", "0 to 1"]),
    (["inspect", "nope", "--d-in", "8", "--d-out", "8"], ["theta", "nope", "monarch"]),
    (["inspect", "monarch", "--d-in", "0", "--d-out", "8"], ["d_in", "0", "from 1 to 16777216"]),
    (["inspect", "monarch", "--d-in", "8", "--d-out", "8", "--sizing", "x"],
     ["sizing", "x", "least-waste | paper"]),
    (["search", "--train-flops", "1e6"], ["train_flops", "1000000.0", "train FLOPs from"]),
    (["search", "--train-flops", "0"], ["train_flops", "0.0", "train FLOPs from"]),
    (["search", "--train-flops", "-1e11"], ["train_flops", "-100000000000.0", "train FLOPs from"]),
    (["search", "--train-flops", "nan"], ["train_flops", "nan", "a finite number"]),
    (["search", "--train-flops", "1e30"], ["train_flops", "1e+30", "to 1e+20"]),
    (["search", "--train-flops", "x"], ["--train-flops", "got x", "accepted: a number"]),
    (["search", "--train-flops", "2e11", "--trials", "2.5"], ["--trials", "got 2.5", "whole"]),
    (["search", "--train-flops", "2e11", "--task", "nope"], ["task", "nope", "text"]),
    (["search", "--train-flops", "2e11", "--sampler", "cma"], ["sampler", "cma", "tpe | nsga2"]),
    (["search", "--train-flops", "2e11", "--stopping", "rungs"], ["stopping", "rungs", "mo-asha"]),
    (["search", "--train-flops", "2e11", "--total-train-flops", "1e11"],
     ["total_train_flops", "at least", "six runs that confirm"]),
    (["search", "--train-flops", "2e11", "--total-seconds", "60", "--sampler", "tpe"],
     ["sampler", "tpe", "surrogate with stopping frontier"]),
    (["search", "--train-flops", "2e11", "--objective", "x"], ["objective", "budget | pareto"]),
    (["search", "--train-flops", "2e11", "--trials", "0"], ["trials", "0", "from 1 to"]),
    (["search", "--train-flops", "2e11", "--data", "/no/such/file"], ["data", "does not exist"]),
    (["best", "--train-flops", "nan"], ["train_flops", "nan", "above 0"]),
    (["best", "--train-flops", "1e12", "--task", "nope"], ["task", "nope", "text"]),
    (["api", "--port", "70000"], ["port", "70000", "0 to 65535"]),
    (["api", "--host", "0.0.0.0"], ["host", "0.0.0.0", "127.0.0.1"]),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "expected"), BAD_COMMANDS, ids=lambda v: " ".join(v)[:40])
def test_bad_input_is_one_clear_error_with_status_2(
    tmp_path: Path, arguments: list[str], expected: list[str]
) -> None:
    done = invoke(tmp_path, *arguments)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    for text in expected:
        assert text in done.stderr
    assert "Traceback" not in done.stderr
    if (tmp_path / "einsum-nas.db").exists():
        upgrade(url := f"sqlite:///{tmp_path / 'einsum-nas.db'}")
        store = Store(url)
        assert store.searches() == []
        store.close()


def test_a_process_ends_with_that_status_too(tmp_path: Path) -> None:
    done = execute(tmp_path, "search", "--train-flops", "1e6")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: train_flops: got 1000000.0; accepted: train FLOPs from")


def test_filtered_and_empty_data_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "accents.txt").write_text("\u00e9" * 5000, encoding="utf-8")
    for name, message in (("empty.txt", "this file is empty"), ("accents.txt", "byte 0xc3")):
        done = invoke(tmp_path, "search", "--train-flops", "2e11", "--data", str(tmp_path / name))
        assert done.returncode == 2
        assert message in done.stderr


def test_inspect_gives_every_name_of_the_contract(tmp_path: Path) -> None:
    theta = "1/2,0,1/2,0,1/2,1/2,0"
    done = invoke(tmp_path, "inspect", theta, "--d-in", "1024", "--d-out", "1024", "--json")
    got = json.loads(done.stdout)
    assert {
        "theta", "canonical_theta", "sizes", "einsum", "contraction", "macs", "flops", "params",
        "rank", "omega", "psi", "nu", "omega_integer", "psi_integer", "nu_integer", "sizing",
        "waste", "dropped_inputs", "constant_outputs", "fingerprint",
    } <= set(got)  # fmt: skip
    assert list(got["sizes"]) == ["alpha", "beta", "gamma", "delta", "epsilon", "phi", "rho"]
    assert (got["macs"], got["flops"], got["rank"]) == (65536, 131072, 1024)


def test_inspect_shows_what_sizes_waste_and_what_paper_sizing_loses() -> None:
    monarch = ["inspect", "monarch", "--d-in", "7", "--d-out", "7"]
    assert "28.57%" in CliRunner().invoke(app, monarch).stdout
    theta = "1/2,1/4,1/4,1/4,1/2,1/4,0"
    trap = ["inspect", theta, "--d-in", "3072", "--d-out", "3072", "--sizing"]
    assert "377 inputs are dropped" in CliRunner().invoke(app, [*trap, "paper"]).stdout
    assert "are dropped" not in CliRunner().invoke(app, [*trap, "least-waste"]).stdout


def test_reading_an_empty_store_says_so(tmp_path: Path) -> None:
    done = invoke(tmp_path, "best", "--no-published", "--train-flops", "1e12")
    assert done.returncode == 1
    assert "no search on the default data and recipe of task 'text' has begun here" in done.stderr


@pytest.mark.parametrize(
    ("name", "value", "status"),
    [("PORT", "abc", 2), ("DATABASE_URL", "sqlite:////no/such/folder/x.db", 1),
     ("DATABASE_URL", "postgresql://u:p@127.0.0.1:1/x", 1), ("DATABASE_URL", "mysql://x", 2),
     ("DATABASE_URL", "postgresql://h:port/x", 2), ("HOME", "/dev/null/x", 2)],
)  # fmt: skip
def test_bad_settings_are_one_line_too(tmp_path: Path, name: str, value: str, status: int) -> None:
    settings = {"home": str(tmp_path), name.lower(): value}
    done = invoke(Path(settings.pop("home")), "best", "--train-flops", "1e12", **settings)
    assert done.returncode == status, done.stderr
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert ":p@" not in done.stderr


def test_a_search_is_queued_without_wait(tmp_path: Path) -> None:
    done = invoke(tmp_path, "search", "--train-flops", "2e11", "--replicates", "3", "--json")
    assert json.loads(done.stdout)["state"] == "queued"
    (listed,) = json.loads(invoke(tmp_path, "searches", "--json").stdout)
    assert listed["request"]["replicates"] == 3
    assert "schema at revision 0010" in invoke(tmp_path, "db", "upgrade").stdout


def test_a_search_is_labelled_and_found_by_its_labels(tmp_path: Path) -> None:
    made = json.loads(invoke(tmp_path, "search", "--train-flops", "2e11", "--json").stdout)["id"]
    done = invoke(tmp_path, "label", made, "--name", "first [try]", "--tag", "a", "--tag", "b")
    assert done.returncode == 0, done.stderr
    listed = invoke(tmp_path, "searches", "--text", "TRY").stdout
    assert made in listed
    assert "first [try], #a #b" in listed
    for words in (("--text", "second"), ("--task", "images"), ("--archived",)):
        assert "no search matches" in invoke(tmp_path, "searches", *words).stdout
    emptied = invoke(tmp_path, "label", made, "--name", "", "--tag", "", "--archive", "--json")
    found = json.loads(emptied.stdout)
    assert (found["name"], found["tags"], found["archived"]) == (None, [], True)
    assert made in invoke(tmp_path, "searches", "--archived", "--text", made[:4]).stdout
    refused = invoke(tmp_path, "label", made, "--tag", "a,b")
    assert refused.returncode == 2
    assert "tags" in refused.stderr


def test_the_version_is_told() -> None:
    assert CliRunner().invoke(app, ["--version"]).output == f"einsum-nas {version('einsum-nas')}\n"


def test_best_agrees_on_every_way_in(service: Service, finished_search: RemoteSearch) -> None:
    budget = str(SMALL_SEARCH["train_flops"])
    task = f"text@{finished_search.data['task_fingerprint']}"
    ask = ["best", "--task", task, "--train-flops", budget, "--json"]
    local = invoke(service.home, *ask)
    remote = invoke(service.home, *ask, "--server", service.url)
    assert json.loads(local.stdout) == json.loads(remote.stdout)
    best = json.loads(local.stdout)
    assert {
        "theta", "canonical_theta", "width", "train_flops", "expected_loss", "interval",
        "multiplier_over_dense", "indistinguishable", "evidence", "kind",
    } <= set(best)  # fmt: skip
    in_seconds = ["best", "--task", task, "--train-seconds", "1e9", "--device", "cpu", "--json"]
    remote = invoke(service.home, *in_seconds, "--server", service.url)
    with Client(service.url) as client:
        same = client.best(task=task, train_seconds=1e9, device="cpu")
    assert json.loads(remote.stdout) == same.model_dump(mode="json")
    assert str(same.device).startswith("cpu ")
    # other searches of the service may have found better within the budget, never worse
    command = ["frontier", "--search", finished_search.id, "--json", "--server", service.url]
    front = json.loads(invoke(service.home, *command).stdout)["frontier"]
    assert best["expected_loss"] <= front[-1]["loss"]
    assert best["train_flops"] <= float(budget)


def test_looking_at_a_search_agrees_on_both_ways(
    service: Service, finished_search: RemoteSearch, tmp_path: Path
) -> None:
    there = ["--server", service.url]
    short = finished_search.id[:10]
    for words in (["show", short], ["trials", short, "--sort", "loss", "--limit", "3"]):
        local, remote = (
            json.loads(invoke(service.home, *words, "--json", *where).stdout)
            for where in ([], there)
        )
        page = f"{service.url}/searches/{finished_search.id}"
        expected = {**local, "page": page} if isinstance(local, dict) else local
        assert remote == expected
    shown = invoke(service.home, "show", short, *there).stdout
    assert shown.startswith("verdict: ")
    assert "about" not in shown  # it has ended
    pages = []
    for name, where in (("local.html", []), ("remote.html", there)):
        done = invoke(service.home, "report", short, "-o", str(tmp_path / name), *where)
        assert done.returncode == 0, done.stderr
        page = (tmp_path / name).read_text(encoding="utf-8")
        pages.append([line for line in page.splitlines() if not line.startswith("<p class=")])
    own = [line for line in pages[1] if line not in pages[0]]
    assert len(own) == 1, own
    assert f"{service.url}/searches/{finished_search.id}" in own[0]
    other = ["search", "--train-flops", "2e11", "--priority", "-9", *there]
    queued = invoke(service.home, *other).stdout
    told = r"search ([0-9a-f]{32}) is queued\nits page: (.*)/searches/\1\n"
    found = re.fullmatch(told, queued)
    assert found is not None
    assert found[2] == service.url
    compared = ["compare", short, found[1], "--json", *there]
    assert "train_flops" in json.loads(invoke(service.home, *compared).stdout)["differ"]
    invoke(service.home, "cancel", found[1], *there)


def test_a_service_exports_the_file_that_its_database_gives(
    service: Service, finished_search: RemoteSearch, tmp_path: Path
) -> None:
    def export(name: str, *options: str) -> subprocess.CompletedProcess[str]:
        return invoke(
            service.home, "export", "--format", name.split(".")[1], "--out", str(tmp_path / name),
            *options,
        )  # fmt: skip

    away = ("--server", service.url, "--search", finished_search.id[:12])
    for name in ("t.csv", "t.json", "p.csv.gz"):
        rows = ("--rows", "points" if name.startswith("p") else "trials")
        assert export(name, *rows, *away).returncode == 0
        assert export(f"own-{name}", *rows, "--search", finished_search.id).returncode == 0
        got, own = ((tmp_path / n).read_bytes() for n in (name, f"own-{name}"))
        assert got.startswith(b"\x1f\x8b") is name.endswith(".gz")
        unpack = gzip.decompress if name.endswith(".gz") else bytes
        assert unpack(got) == unpack(own)
    for name, options, told in (
        ("t.csv", away, "any with --overwrite"), ("n.csv", away[:2], "the id of a search"),
        ("n.optuna", away, "csv | parquet | json"),
        ("n.csv", (*away[:3], "f" * 32), "f" * 32), ("n.exe", away, "exe"),
    ):  # fmt: skip
        refused = export(name, *options)
        assert refused.returncode != 0
        assert told in refused.stderr
    assert not list(tmp_path.glob("n.*"))


@FULL
def test_search_and_confirm_with_wait_run_their_own_workers(
    tmp_path: Path, text_folder: Path
) -> None:
    done = execute(
        tmp_path, "search", "--train-flops", "1e10", "--trials", "1", "--references", "3",
        "--set", "min_steps=20", "--set", "warmup_steps=5", "--set", "validation_samples=64",
        "--data", str(text_folder), "--wait", "--json", concurrency="1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "12 files, 36,000 characters, 2 files left out" in done.stderr
    answer = json.loads(done.stdout)
    assert answer["search"]["state"] == "succeeded"
    assert answer["search"]["trial_counts"] == {"complete": 4}
    assert answer["best"]["evidence"]["trials"] == 4
    assert answer["best"]["interval"] is None
    assert answer["best"]["best_dense"]["peak_memory"] > 4 * answer["best"]["best_dense"]["params"]
    assert answer["best"]["best_dense"]["step_seconds"] > 0

    # the newest search, by default
    done = execute(
        tmp_path, "confirm", "--top", "1", "--seeds", "2", "--wait", "--json", concurrency="1"
    )
    assert done.returncode == 0, done.stderr
    confirmed = json.loads(done.stdout)
    assert confirmed["search"]["trial_counts"] == {"complete": 4}
    assert confirmed["search"]["request"]["confirm"]["search"] == answer["search"]["id"]
    task = answer["best"]["task"]
    shown = invoke(tmp_path, "best", "--task", task, "--train-flops", "1e10", "--json")
    best = json.loads(shown.stdout)
    assert best["evidence"]["trials"] == 8
    assert best["confirmed"]
    assert best["evidence"]["seeds"] == 2
    assert best["interval"][0] < best["expected_loss"] < best["interval"][1]
    assert best["confirmation"]["candidates"] == 2
    refused = execute(tmp_path, "confirm", "--top", "2")
    assert (refused.returncode, "top: got 2" in refused.stderr) == (2, True)


def test_nothing_to_confirm_says_so(tmp_path: Path) -> None:
    done = invoke(tmp_path, "confirm")
    assert done.returncode == 1
    assert "no search has succeeded yet" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [(["--params", "2e4"], "trainable parameters"), (["--step-seconds", "100"], "seconds per step"),
     (["--train-flops", "1e10", "--snippet"], "base_width=64")],
)  # fmt: skip
def test_best_within_other_budgets_and_as_code(
    service: Service, finished_search: RemoteSearch, arguments: list[str], expected: str
) -> None:
    done = invoke(service.home, "best", "--search", finished_search.id, *arguments)
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout
    if "--snippet" in arguments:
        exec(done.stdout, {})
