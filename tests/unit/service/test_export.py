"""Files of everything that was measured: what is read back equals the store."""

from __future__ import annotations

import csv
import gzip
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import nas.service.export
from nas.cli.main import app
from nas.designs.theta import AXES
from nas.errors import EinsumNasError, InvalidInput, NotFound
from nas.service.export import export
from nas.settings import settings
from nas.store import Store
from nas.store.dump import StoredRun, iterate_runs
from tests.support.filling import FINGERPRINT, ODD, PLANS, Filling, fill

pytestmark = pytest.mark.one_database


@pytest.fixture
def filling(migrated_url: str) -> Iterator[Filling]:
    opened = Filling(migrated_url)
    yield opened
    opened.store.close()


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Filling]:
    """Filled once, for tests that only read."""
    opened = Filling(f"sqlite:///{tmp_path_factory.mktemp('ready') / 'ready.db'}")
    fill(opened)
    yield opened
    opened.store.close()


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Filling]:
    """On SQLite, where the database does not matter."""
    opened = Filling(f"sqlite:///{tmp_path / 'local.db'}")
    yield opened
    opened.store.close()


def shared(runs: list[StoredRun]) -> list[int]:
    return [run.trial.number for run in runs if run.repeats]


# --- reading


def test_pages_give_every_trial_once_with_its_curve(filling: Filling) -> None:
    lease = fill(filling)
    other = filling.begin("f2")
    filling.complete(other, 0, {10: 3.5})
    store = filling.store
    for batch in (1, 3, 500):
        runs = list(iterate_runs(store, task="text", fingerprint=FINGERPRINT, batch=batch))
        assert [run.trial for run in runs] == store.trials(lease.search_id)
        for run in runs:
            full = store.curve(run.trial.id)
            assert list(run.points) == [replace(p, window_losses=()) for p in full]
            assert (run.task, run.fingerprint) == ("text", FINGERPRINT)
    assert len(list(iterate_runs(store, batch=2))) == len(runs) + 1
    with pytest.raises(NotFound, match="no search 'nope'"):
        next(iterate_runs(store, search_id="nope"))


def test_a_shared_result_is_told_apart_as_answers_do(filling: Filling) -> None:
    lease = fill(filling)
    again = filling.begin()
    for number in range(2):
        twin = filling.plan(again, number, key="same")
        assert filling.leases.reuse_result(again, twin.id)
    store = filling.store
    assert shared(list(iterate_runs(store, search_id=lease.search_id))) == [2]
    # a search shows what it found done elsewhere; of the task as a whole it is nothing new
    assert shared(list(iterate_runs(store, search_id=again.search_id))) == []
    runs = list(iterate_runs(store, task="text", fingerprint=FINGERPRINT))
    assert shared(runs) == [2, 0, 1]


# --- what is read back


def of_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def stored(value: Any) -> Any:
    if isinstance(value, str | int | float | None):
        return value
    return json.dumps(dict(value) if hasattr(value, "keys") else list(value))


def rows_of_trials(store: Store, search_id: str) -> list[dict[str, Any]]:
    """What a file must hold, put together from the store's own reads."""
    expected = []
    for t in store.trials(search_id):
        seven = t.theta if len(t.theta) == len(AXES) else (None,) * len(AXES)
        thetas = {f"theta_{axis}": v for axis, v in zip(AXES, seven, strict=True)}
        named = {
            name: stored(getattr(t, name))
            for name in (
                "search_id", "number", "kind", "state", "design", "name", "structures", "dense",
                "width", "depth", "steps", "train_flops_per_step", "train_flops", "seed", "key",
                "loss", "forward_flops_per_token", "error", "reused_from", "attempts",
                "environment", "unseen", "created_at", "started_at", "finished_at", "model",
                "confirms", "seconds_per_step", "peak_memory_bytes", "failure", "until_step",
                "trained_steps", "trained_flops",
            )
        }  # fmt: skip
        about = {"task": "text", "fingerprint": FINGERPRINT, "trial_id": t.id}
        proposal = {"params": t.params, "proposal": stored(t.sampler_params)}
        expected.append({**named, **about, **proposal, **thetas})
    return expected


def rows_of_points(store: Store, search_id: str) -> list[dict[str, Any]]:
    names = ("search_id", "number", "kind", "state", "name", "dense", "width", "seed")
    return [
        {
            **{name: getattr(t, name) for name in names},
            "trial_id": t.id,
            "reused_from": t.reused_from,
            "step": p.step,
            "train_flops": p.train_flops,
            "loss": p.loss,
            "loss_stderr": p.loss_stderr,
            "train_seconds": p.train_seconds,
        }
        for t in store.trials(search_id)
        for p in store.curve(t.id)
    ]


EXPECTED: dict[str, Callable[[Store, str], list[dict[str, Any]]]] = {
    "trials": rows_of_trials,
    "points": rows_of_points,
}


@pytest.mark.parametrize("rows", ["trials", "points"])
def test_rows_read_back_equal_the_store(filling: Filling, tmp_path: Path, rows: str) -> None:
    lease = fill(filling)
    store = filling.store
    expected = EXPECTED[rows](store, lease.search_id)
    for scope in ({"search_id": lease.search_id}, {"task": f"text@{FINGERPRINT}"}):
        for file_format in ("csv", "parquet", "json"):
            out = tmp_path / f"out.{file_format}"
            done = export(store, file_format, str(out), rows=rows, overwrite=True, **scope)
            assert (done.rows, done.loss_unit) == (len(expected), "nats per character")
            if file_format == "parquet":
                assert pq.read_table(out).to_pylist() == expected_in_order(out, expected)
            elif file_format == "json":
                assert json.loads(out.read_text())["rows"] == expected
            else:
                got = of_csv(out)
                assert len(got) == len(expected)
                for row, wanted in zip(got, expected, strict=True):
                    assert set(row) == set(wanted)
                    for name, value in wanted.items():
                        assert same_text(row[name], value), (name, row[name], value)
    assert {p.name for p in tmp_path.iterdir() if p.name.startswith(".")} == set()
    if rows == "trials":
        assert [r["state"] for r in expected] == [
            "complete", "complete", "complete", "failed", "stopped", "running", "planned"
        ]  # fmt: skip
        assert expected[1]["train_flops"] == 160 * ODD
        assert expected[1]["train_flops"] != int(float(160 * ODD))
        assert [r["loss"] for r in expected[3:]] == [None] * 4
        assert [r["peak_memory_bytes"] for r in expected] == [3 * 10**9] * 3 + [None] * 4


def expected_in_order(out: Path, expected: list[dict[str, Any]]) -> list[dict[str, Any]]:
    names = pq.read_schema(out).names
    assert set(names) == set(expected[0])
    return [{name: row[name] for name in names} for row in expected]


def same_text(text: str, value: Any) -> bool:
    if value is None:
        return text == ""
    if isinstance(value, bool):
        return text == str(value).lower()
    if isinstance(value, float):
        return float(text) == value
    return text == str(value)


def test_missing_and_empty_differ_in_csv(local: Filling, tmp_path: Path) -> None:
    lease = local.begin()
    local.leases.fail_trial(lease, local.run(lease, 0, {}).id, "")
    local.plan(lease, 1)
    export(local.store, "csv", str(tmp_path / "x.csv"))
    head, failed, planned = (tmp_path / "x.csv").read_text().splitlines()
    # no field of these rows holds a comma before the columns looked at from the right
    after = len(head.split(",")) - head.split(",").index('"error"')
    assert failed.split(",")[-after] == '""'
    assert planned.split(",")[-after] == ""


def test_flops_past_64_bits_are_exact_too(local: Filling, tmp_path: Path) -> None:
    lease = local.begin()
    huge = replace(PLANS[0], steps=10**6 + 1, train_flops_per_step=10**14 + 3)
    local.plan(lease, 0, plan=huge)
    local.plan(lease, 1)
    for file_format in ("csv", "parquet", "json"):
        export(local.store, file_format, str(tmp_path / file_format))
    exact = (10**6 + 1) * (10**14 + 3)
    small = PLANS[1].train_flops
    assert [int(r["train_flops"]) for r in of_csv(tmp_path / "csv")] == [exact, small]
    table = pq.read_table(tmp_path / "parquet")
    assert table["train_flops"].to_pylist() == [Decimal(exact), Decimal(small)]
    rows = json.loads((tmp_path / "json").read_text())["rows"]
    assert [r["train_flops"] for r in rows] == [exact, small]


def test_many_rows_come_in_batches(
    ready: Filling, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nas.service.export, "_BATCH", 2)
    monkeypatch.setattr(nas.service.export, "iterate_runs", partial(iterate_runs, batch=3))
    for file_format in ("csv", "parquet"):
        export(ready.store, file_format, str(tmp_path / file_format))
    assert pq.ParquetFile(tmp_path / "parquet").num_row_groups == 4
    numbers = pq.read_table(tmp_path / "parquet")["number"].to_pylist()
    assert numbers == [int(r["number"]) for r in of_csv(tmp_path / "csv")] == list(range(7))


@pytest.mark.parametrize("rows", ["trials", "points"])
def test_every_column_says_what_it_is(ready: Filling, tmp_path: Path, rows: str) -> None:
    for file_format in ("parquet", "json"):
        export(ready.store, file_format, str(tmp_path / file_format), rows=rows)
    schema = pq.read_schema(tmp_path / "parquet")
    told = json.loads((tmp_path / "json").read_text())["columns"]
    assert list(told) == schema.names
    for field in schema:
        meta = {
            k.decode(): v.decode() for k, v in field.metadata.items() if k != b"PARQUET:field_id"
        }
        assert meta["meaning"] == told[field.name]["meaning"]
        assert meta.get("unit") == told[field.name]["unit"]
        assert meta["meaning"], field.name
    assert told["loss"]["unit"] == "nats per character"
    assert told["train_flops"]["unit"] == "FLOPs"
    assert told["width"]["unit"] is None
    types = {field.name: field.type for field in schema}
    assert (types["loss"], types["number"], types["dense"]) == (
        pa.float64(), pa.int64(), pa.bool_()
    )  # fmt: skip


def test_random_curves_read_back(local: Filling, tmp_path: Path) -> None:
    drawn = random.Random(3)
    lease = local.begin()
    for number in range(5):
        steps = sorted(drawn.sample(range(1, 10**6), 4))
        local.complete(lease, number, {s: drawn.expovariate(1.0) for s in steps})
    export(local.store, "csv", str(tmp_path / "x"), rows="points")
    got = [(int(r["step"]), float(r["loss"])) for r in of_csv(tmp_path / "x")]
    runs = iterate_runs(local.store)
    assert got == [(p.step, p.loss) for run in runs for p in run.points]


# --- what is refused


@pytest.mark.parametrize(
    ("changes", "field", "accepted"),
    [
        ({"file_format": "xlsx"}, "format", "csv | parquet | json | optuna | mlflow | wandb"),
        ({"rows": "curves"}, "rows", "trials | points"),
        ({"file_format": "optuna", "rows": "points"}, "rows", "trials with format optuna"),
        ({"file_format": "optuna", "overwrite": True}, "overwrite", "--study"),
        ({"study": "x"}, "study", "format optuna"),
        ({"out": ""}, "out", "the path of a file"),
        ({"out": "{folder}/none/x.csv"}, "out", "none does not"),
        ({"out": "{folder}"}, "out", "something else"),
        ({"out": "{folder}/there.csv"}, "out", "--overwrite"),
        ({"out": "/proc/x.csv"}, "out", "can be written"),
        ({"out": "{folder}/" + "x" * 300}, "out", "too long"),
        ({"task": "nope"}, "task", "text"),
    ],
)
def test_bad_wishes_are_refused(
    ready: Filling, tmp_path: Path, changes: dict[str, Any], field: str, accepted: str
) -> None:
    (tmp_path / "there.csv").write_text("mine")
    wish: dict[str, Any] = {"file_format": "csv", "out": "{folder}/new.csv", **changes}
    wish["out"] = wish["out"].format(folder=tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InvalidInput) as caught:
        export(ready.store, **wish)
    assert caught.value.field == field
    assert accepted in caught.value.accepted
    assert (tmp_path / "there.csv").read_text() == "mine"
    assert sorted(tmp_path.iterdir()) == before


def test_nothing_to_export_says_what_to_run(local: Filling, tmp_path: Path) -> None:
    out = str(tmp_path / "x")
    wishes: tuple[tuple[dict[str, Any], str], ...] = (
        ({}, "einsum-nas search --task text --train-flops"),
        ({"task": "text@abc"}, "no trial of task text@abc; `einsum-nas search"),
        ({"search_id": "nope"}, "no search 'nope'"),
    )
    for wish, said in wishes:
        with pytest.raises(NotFound, match=said):
            export(local.store, "csv", out, **wish)
    lease = local.begin()
    with pytest.raises(NotFound, match=r"has no trial yet; `einsum-nas worker`"):
        export(local.store, "csv", out, search_id=lease.search_id)
    local.plan(lease, 0)
    with pytest.raises(NotFound, match="no evaluation of task text@f1"):
        export(local.store, "csv", out, rows="points")
    assert not Path(out).exists()


@pytest.mark.parametrize("file_format", ["csv", "parquet", "json"])
def test_a_broken_write_leaves_what_was_there(
    ready: Filling, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_format: str
) -> None:
    out = tmp_path / "x"
    out.write_text("mine")
    whole = iterate_runs

    def broken(*args: Any, **kwargs: Any) -> Iterator[StoredRun]:
        for count, run in enumerate(whole(*args, **kwargs)):
            if count == 4:
                raise OSError(28, "No space left on device")
            yield run

    monkeypatch.setattr(nas.service.export, "iterate_runs", broken)
    with pytest.raises(EinsumNasError, match="No space left on device"):
        export(ready.store, file_format, str(out), overwrite=True)
    assert out.read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


# --- compressed, and to standard output


@pytest.mark.parametrize("file_format", ["csv", "json"])
def test_a_name_that_ends_in_gz_is_compressed(
    ready: Filling, tmp_path: Path, file_format: str
) -> None:
    plain, packed = tmp_path / f"x.{file_format}", tmp_path / f"x.{file_format}.GZ"
    for out in (plain, packed):
        export(ready.store, file_format, str(out))
    assert gzip.decompress(packed.read_bytes()) == plain.read_bytes()


@pytest.mark.parametrize(
    ("file_format", "name", "accepted"),
    [
        ("parquet", "x.parquet.gz", "a name without .gz: Parquet is compressed by itself"),
        ("csv", "x.csv.bz2", "a name that ends in .gz"),
        ("json", "x.json.ZST", "a name that ends in .gz"),
    ],
)
def test_a_name_that_promises_another_compression(
    ready: Filling, tmp_path: Path, file_format: str, name: str, accepted: str
) -> None:
    with pytest.raises(InvalidInput, match=accepted):
        export(ready.store, file_format, str(tmp_path / name))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("file_format", ["csv", "json", "parquet"])
def test_standard_output_has_what_a_file_has_and_nothing_else(
    local: Filling, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_format: str
) -> None:
    fill(local)
    # whole numbers past 64 bits: what has left cannot be written again as decimals
    huge = replace(PLANS[0], steps=10**6 + 1, train_flops_per_step=10**14 + 3)
    local.plan(local.begin(), 0, plan=huge)
    monkeypatch.setenv("EINSUM_NAS_DATABASE_URL", str(local.store.engine.url))
    monkeypatch.chdir(tmp_path)
    settings.cache_clear()
    run = CliRunner().invoke
    for out in ("x", "-"):
        done = run(app, ["export", "--format", file_format, "--out", out])
        assert done.exit_code == 0, done.stderr
    assert done.stdout_bytes == (tmp_path / "x").read_bytes()
    assert done.stderr.startswith("wrote 8 rows to standard output: trials of text@f1;")
    assert not (tmp_path / "-").exists()
    refused = run(app, ["export", "--format", file_format, "--out", "-", "--overwrite"])
    assert (refused.exit_code, refused.stdout) == (2, "")
    settings.cache_clear()


# --- the command


def test_the_command_writes_and_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EINSUM_NAS_HOME", str(tmp_path))
    settings.cache_clear()
    filling = Filling(settings().resolved_database_url)
    lease = fill(filling)
    filling.store.close()
    run = CliRunner().invoke
    out = tmp_path / "x.csv"
    storage = f"sqlite:///{tmp_path / 'optuna.db'}"
    files = ["export", "--format", "csv", "--out", str(out)]
    study = ["export", "--format", "optuna", "--out", storage, "--search", lease.search_id]
    for arguments, said in (
        (files, f"wrote 7 rows to {out}: trials of text@f1; loss in nats per character\n"),
        ([*files, "--rows", "points", "--overwrite"], f"wrote 10 rows to {out}: evaluations of"),
        (study, f"wrote study 'einsum-nas {lease.search_id}' to {storage}: 6 trials (2 complete, "),
    ):
        done = run(app, arguments)
        assert (done.exit_code, done.stderr) == (0, "")
        assert done.stdout.startswith(said)
        assert done.stdout.count("\n") == 1
    for arguments, status, said in (
        (files, 2, f"error: out: got {out}; accepted: a file that does not exist, or any with"),
        (study, 2, "error: study: got einsum-nas"),
        (["export", "--format", "x", "--out", "y"], 2, "error: format: got x; accepted: csv |"),
        ([*files, "--search", "nope", "--overwrite"], 1, "error: no search 'nope'"),
        ([*files, "--task", "regression", "--overwrite"], 1, "search --task regression"),
    ):
        done = run(app, arguments)
        assert (done.exit_code, done.stdout) == (status, "")
        assert said in done.stderr
        assert "Traceback" not in done.stderr
    settings.cache_clear()
