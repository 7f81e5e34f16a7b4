from __future__ import annotations

import gzip
import io
import json
import pickle
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import nas.tasks.data
import nas.tasks.hub
from nas.cli.local import checked_data
from nas.errors import InvalidInput
from nas.planning.recipe import IMAGES
from nas.planning.request import SearchRequest
from nas.tasks.corpus import load_text
from nas.tasks.data import hub_parts
from nas.tasks.hub import HubTexts, hub_images, hub_texts
from nas.tasks.images import load_images
from tests.support.corpora import SMALL

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """No network, and a cache that stays empty."""
    import huggingface_hub.constants

    cache = tmp_path / "cache"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    yield cache
    assert not cache.exists() or not list(cache.rglob("*.arrow"))


def png(pixels: np.ndarray[Any, Any]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


PIXELS = np.random.default_rng(0).integers(0, 256, (50, 8, 8), dtype=np.uint8)
FILES = [png(p) for p in PIXELS]
LABELS = [i % 3 for i in range(50)]


def refusal(read: Any, spec: str) -> str:
    with pytest.raises(InvalidInput) as caught:
        read(spec)
    assert caught.value.field == "data"
    assert "accepted: hf:NAME" in str(caught.value)
    return str(caught.value)


def images_parquet(path: Path) -> Path:
    features = datasets.Features(
        {"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])}
    )
    columns = {"img": [{"bytes": f, "path": None} for f in FILES], "label": LABELS}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(str(path))
    return path


def test_images_of_a_parquet_file(tmp_path: Path) -> None:
    spec = f"hf:{images_parquet(tmp_path / 'data.parquet')}"
    assert hub_images(spec) == (FILES, LABELS)
    recipe = replace(IMAGES, min_validation_samples=4)
    data = load_images(recipe, spec)
    assert data.summary == "50 images, 8×8, 3 classes: 40 for training, 10 for validation"
    folder = tmp_path / "folder"
    for i, (file, label) in enumerate(zip(FILES, LABELS, strict=True)):
        (folder / "abc"[label]).mkdir(parents=True, exist_ok=True)
        (folder / "abc"[label] / f"{i}.png").write_bytes(file)
    assert load_images(recipe, folder).content == data.content


def test_a_dataset_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is there already, as the library would have fetched it."""
    local = str(images_parquet(tmp_path / "data.parquet"))
    splits = {"train": local, "test": local}
    builder = datasets.load_dataset_builder(
        "parquet", data_files=splits, cache_dir=str(tmp_path / "other")
    )
    asked: list[tuple[str, str | None]] = []

    def load_dataset_builder(name: str, configuration: str | None) -> Any:
        asked.append((name, configuration))
        return builder

    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    for spec in ("hf:some/rows", "hf:some/rows:test", "hf:some/rows:plain/train"):
        assert hub_images(spec) == (FILES, LABELS)
    assert asked == [("some/rows", None), ("some/rows", None), ("some/rows", "plain")]
    assert "this dataset has the splits train, test" in refusal(hub_images, "hf:some/rows:dev")
    monkeypatch.setattr(nas.tasks.data, "MAX_BYTES", 100)
    assert "at most 100 bytes" in refusal(hub_images, "hf:some/rows")


def test_arrays_without_labels(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps({"pixels": p.tolist()}) + "\n" for p in PIXELS))
    images, labels = hub_images(f"hf:{file}")
    assert np.array_equal(np.array(images), PIXELS)
    assert labels == []
    for bad in ([[256]], [[0.5]], [1, 2], "a.png", {"path": str(file)}, [[1], [2, 3]]):
        file.write_text(json.dumps({"image": bad}))
        assert "column image of row 0 is no image" in refusal(hub_images, f"hf:{file}")
    for label in (None, -1, 0.5):
        file.write_text(json.dumps({"image": [[1]], "label": label}))
        assert "row 0 has no label in column label" in refusal(hub_images, f"hf:{file}")


def test_texts(tmp_path: Path) -> None:
    texts = ["one", "zwei é", "", "drei\nvier"]
    csv, jsonl = tmp_path / "data.csv", tmp_path / "data.jsonl"
    datasets.Dataset.from_dict({"n": [1, 2, 3, 4], "text": texts}).to_csv(str(csv))
    jsonl.write_text("".join(json.dumps({"body": t}) + "\n" for t in texts))
    expected = [t.encode() for t in texts]
    assert hub_texts(f"hf:{csv}") == HubTexts(expected, "text", whole=False)
    assert hub_texts(f"hf:{jsonl}") == HubTexts(expected, "body", whole=False)
    assert hub_texts(f"hf:{csv}:train").texts == expected
    assert "this dataset has the splits train" in refusal(hub_texts, f"hf:{csv}:test")
    jsonl.write_text('{"a": "x", "b": "y"}\n')
    assert "a column text or content; this has a, b" in refusal(hub_texts, f"hf:{jsonl}")
    jsonl.write_text('{"text": 1}\n')
    assert "column text of row 0 is no text" in refusal(hub_texts, f"hf:{jsonl}")


def test_a_folder_with_splits(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "train.txt").write_text("one\ntwo\n")
    (folder / "test.txt").write_text("three\n")
    assert hub_texts(f"hf:{folder}") == HubTexts([b"one\ntwo\n"], "text", whole=True)
    assert hub_texts(f"hf:{folder}:test").texts == [b"three\n"]


def test_a_text_file_is_the_text_that_its_path_gives(tmp_path: Path) -> None:
    """Its lines in their order, equal ones too, whatever the names on the way look like."""
    text = "".join(f"line {i} begins here\n}}\n" for i in range(400))
    for name in ("plain", "a:b", "[1] *", "x::y?"):
        (tmp_path / name).mkdir()
        file = tmp_path / name / "lines.txt"
        file.write_text(text)
        by_path = load_text(SMALL, file)
        for spec in (f"hf:{file}", f"hf:{file}:train"):
            found = load_text(SMALL, spec)
            assert (found.content, found.summary) == (by_path.content, by_path.summary)
        # the same of the other readers
        (tmp_path / name / "lines.txt").unlink()
        rows = datasets.Dataset.from_dict({"text": text.splitlines()})
        for end, write in (("csv", "to_csv"), ("parquet", "to_parquet"), ("jsonl", "to_json")):
            with (tmp_path / name / f"train.{end}").open("wb") as stream:
                getattr(rows, write)(stream)
            found = load_text(SMALL, f"hf:{tmp_path / name / f'train.{end}'}")
            assert found.content == by_path.content
            assert found.summary.startswith("1 texts whose lines are the 800 rows of column text")
            assert load_text(SMALL, f"hf:{tmp_path / name}:train").content == by_path.content
            (tmp_path / name / f"train.{end}").unlink()


def test_a_relative_name_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a:b").mkdir()
    (tmp_path / "a:b" / "l.txt").write_text("a line of text\n" * 9000)
    for name, part in (("a:b/l.txt", ""), ("a:b/l.txt", ":train"), ("a:b", "")):
        request = SearchRequest(task="text", data=f"hf:{name}{part}", train_flops=1e13)
        assert checked_data(request) == f"hf:{tmp_path / name}{part}"
    assert hub_parts("hf:some/rows:plain/test") == ("some/rows", "plain/test")


def test_rows_that_cannot_be_lines_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = ["def f():\n", "", "    return 'é'\n", "    return 1"] * 100
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps({"content": row}) + "\n" for row in rows))
    (tmp_path / "same.txt").write_text("def f():\n\n    return 1\n" * 100)
    found = load_text(SMALL, f"hf:{file}")
    assert found.content == load_text(SMALL, tmp_path / "same.txt").content
    assert found.summary.endswith(", 100 texts left out (100 rows with other characters)")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("id;text\n1;words\n", "line 1 is the one name id;text; it looks as if cells were separ"),
        ("id;text\n1;words, words\n", "line 1 is the one name"),
        ("id\ttext\n1\twords\n", "separated by tabs"),
        ("id,text\n1,words, words\n", "line 2 has 3 cells where line 1 has 2 names"),
        ('id,text\n1,"two\nlines"\n2\n', "line 4 has 1 cells"),
        ('id,text\n1,"never closed\n', "line 2: unexpected end of data"),
        ("text,text\na,b\n", "line 1 has a name twice: text, text"),
        ("id,words\n1,a\n", "a column text or content; this has id, words"),
    ],
)
def test_a_csv_of_texts_that_would_be_misread(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "data.csv").write_text(content)
    assert says in refusal(hub_texts, f"hf:{tmp_path / 'data.csv'}")


def test_the_cells_of_a_csv_are_texts_as_they_are(tmp_path: Path) -> None:
    cells = ["NA", "null", "007", "1e5", "# no comment", 'a "b"', "", "two\n\nlines", " x "]
    lines = "".join(f'{i},"{cell.replace(chr(34), 2 * chr(34))}"\n' for i, cell in enumerate(cells))
    (tmp_path / "data.csv").write_text("\ufeffid,text\n\n" + lines)
    expected = [cell.encode() for cell in cells]
    assert hub_texts(f"hf:{tmp_path / 'data.csv'}").texts == expected
    (tmp_path / "data.csv").write_text("text\n" + "x" * 200_000)  # past the limit of `csv`
    assert len(hub_texts(f"hf:{tmp_path / 'data.csv'}").texts[0]) == 200_000
    (tmp_path / "data.csv").write_bytes(gzip.compress(b"text\nx\n", mtime=0))
    assert "this is gzip: unpack it" in refusal(hub_texts, f"hf:{tmp_path / 'data.csv'}")


class Marker:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    folder, marker = tmp_path / "folder", tmp_path / "marker"
    folder.mkdir()
    (folder / "train.pkl").write_bytes(pickle.dumps(Marker(marker)))
    assert "this file is none of these" in refusal(hub_texts, f"hf:{folder / 'train.pkl'}")
    for card in ("", "---\nbuilder_name: pandas\nconfigs:\n- config_name: default\n"
                 "  data_files: train.pkl\n---\n"):  # fmt: skip
        (folder / "README.md").write_text(card)
        refusal(hub_texts, f"hf:{folder}")
    (folder / "train.pkl").unlink()
    (folder / "README.md").unlink()
    (folder / "script.py").write_text(f"open({str(marker)!r}, 'w')")
    refusal(hub_texts, f"hf:{folder}")
    Image.fromarray(PIXELS[0]).save(folder / "a.png")
    assert "this dataset is read by 'imagefolder'" in refusal(hub_images, f"hf:{folder}")
    assert not marker.exists()


def test_what_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "data.parquet"
    broken.write_bytes(b"PAR1 no more")
    refusal(hub_texts, f"hf:{broken}")
    refusal(hub_texts, f"hf:{tmp_path / 'missing.parquet'}")
    refusal(hub_texts, "hf:nobody/nothing-of-this-name")
    assert "this names no dataset" in refusal(hub_texts, "hf:")
    assert "this names no dataset" in refusal(hub_texts, "hf::train")
    (tmp_path / "a.txt").write_text("one\ntwo\n" * 10)
    monkeypatch.setattr(nas.tasks.data, "MAX_BYTES", 59)
    assert "at most 59 bytes" in refusal(hub_texts, f"hf:{tmp_path / 'a.txt'}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "this needs pip install 'einsum-nas[data]'" in refusal(hub_texts, "hf:some/rows")
