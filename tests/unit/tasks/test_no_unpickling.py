"""Nothing that anyone gave is unpickled, nor otherwise run: by reading the code, and by trying."""

from __future__ import annotations

import ast
import contextlib
import gc
import io
import json
import pickle
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from nas.errors import InvalidInput
from nas.planning.recipe import IMAGES, PIXELS, REGRESSION, TEXT, TEXT_BPE, Recipe
from nas.store.backup import restore
from nas.store.schema import Base
from nas.tasks import load_data
from nas.training.checkpoint import Checkpoint
from tests.support.paths import ROOT
from tests.support.tiers import thinned

#: Modules whose readers run what they read.
_MODULES = {
    "pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "copyreg",
    "ray.cloudpickle", "torch.package", "multiprocessing", "xmlrpc", "jsonpickle", "code", "pty",
}  # fmt: skip
#: Functions that run what they are given, whatever they are told.
_CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.load",
    "yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "torch.jit.load", "torch.hub.load",
    "pandas.read_pickle", "pd.read_pickle", "importlib.import_module", "runpy.run_path",
    "datasets.load_dataset", "datasets.load_from_disk", "optuna.samplers.CmaEsSampler",
}  # fmt: skip
#: Functions that do unless they are told not to: the argument, and what it has to be.
_UNLESS = {
    "torch.load": ("weights_only", True), "np.load": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False), "np.lib.format.read_array": ("allow_pickle", False),
}  # fmt: skip
#: Where one of them gets nothing that a user gave.
_ALLOWED = {
    ("nas/study/runs.py", "multiprocessing"),  # our own values, to our own processes
    ("nas/__init__.py", "importlib.import_module"),  # of modules that are named there
    ("nas/training/tasks.py", "importlib.import_module"),  # of plug-ins that were installed
}
_SHELLS = {"run", "Popen", "call", "check_call", "check_output", "getoutput"}


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def offences(source: str) -> list[str]:
    """What in a module could run what it reads."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            found += [name for name in names if name in _MODULES]
        elif isinstance(node, ast.ImportFrom) and node.module:
            wholes = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            found += [name for name in wholes if name in _MODULES | _CALLS | _UNLESS.keys()]
        elif isinstance(node, ast.Call):
            name = _dotted(node.func)
            given = {word.arg: word.value for word in node.keywords}
            values = {k: v.value for k, v in given.items() if isinstance(v, ast.Constant)}
            argument, needed = _UNLESS.get(name, ("", None))
            if name in _CALLS or (argument and values.get(argument) is not needed):
                found.append(name)
            elif name.rpartition(".")[2] in _SHELLS and "shell" in given:
                found.append(f"{name}(shell)")
            elif "trust_remote_code" in given or values.get("allow_pickle"):
                found.append(name)
    return found


def _modules() -> list[Path]:
    folders = [ROOT / name for name in ("nas", "api", "workers")]
    return [path for folder in folders for path in sorted(folder.rglob("*.py"))]


def test_no_module_runs_what_it_reads() -> None:
    modules = _modules()
    assert len(modules) > 100
    found = {(str(p.relative_to(ROOT)), o) for p in modules for o in offences(p.read_text())}
    assert found == _ALLOWED


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from pickle import loads", "import cloudpickle",
        "from ray import cloudpickle",
        "import joblib", "import torch\ntorch.load(f)", "torch.load(f, weights_only=False)",
        "torch.load(f, weights_only=flag)", "np.load(f)", "np.load(f, allow_pickle=True)",
        "from torch import load", "from numpy import load", "yaml.load(f)", "eval(x)", "exec(x)",
        "__import__(x)", "subprocess.run(x, shell=True)", "Popen(x, shell=flag)", "os.system(x)",
        "pd.read_pickle(f)", "x.open(f, allow_pickle=True)", "importlib.import_module(x)",
        "load_dataset(n, trust_remote_code=True)", "np.lib.format.read_array(f)",
        "from optuna.samplers import CmaEsSampler", "datasets.load_dataset(x)",
    ],
)  # fmt: skip
def test_the_reader_of_the_code_sees(source: str) -> None:
    assert offences(source)


def test_the_reader_of_the_code_lets_pass() -> None:
    for source in (
        "torch.load(f, weights_only=True)", "np.load(f, allow_pickle=False)", "re.compile(x)",
        "subprocess.run([x])", "yaml.safe_load(f)", "np.save(f, x)", "ast.literal_eval(x)",
    ):  # fmt: skip
        assert not offences(source)


def test_no_column_is_pickled() -> None:
    kinds = {type(c.type).__name__ for t in Base.metadata.tables.values() for c in t.columns}
    assert "JSON" in kinds
    assert not {kind for kind in kinds if "Pickle" in kind}


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.marker,)


def _array(evil: Evil) -> np.ndarray[Any, Any]:
    return np.array([evil] * 50, dtype=object)


def _saved(save: Callable[..., object], *what: Any, **named: Any) -> bytes:
    file = io.BytesIO()
    save(file, *what, **named)
    return file.getvalue()


def _zipped(name: str, content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, content)
    return file.getvalue()


def _extension(evil: Evil, write: Callable[[pa.Table, io.BytesIO], object]) -> bytes:
    """A table whose column says that its type is to be unpickled."""
    said = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": pickle.dumps(evil),
    }
    schema = pa.schema([pa.field("text", pa.string(), metadata=said)])
    file = io.BytesIO()
    write(pa.table({"text": ["a line of text\n"] * 3000}, schema=schema), file)
    return file.getvalue()


def _ipc(table: pa.Table, file: io.BytesIO) -> None:
    with pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def payloads(evil: Evil) -> dict[str, bytes]:
    """Pickles in every wrapping that some reader of the world unpickles."""
    record = np.zeros(50, dtype=[("x", "O"), ("y", "f8")])
    record["x"] = [evil] * 50
    return {
        **{f"protocol{n}": pickle.dumps(evil, protocol=n) for n in range(6)},
        "batch": pickle.dumps({b"data": evil, b"labels": [0]}),
        "npy": _saved(np.save, _array(evil), allow_pickle=True),
        "record": _saved(np.save, record, allow_pickle=True),
        "npz": _saved(np.savez, images=_array(evil), labels=_array(evil), inputs=_array(evil),
                      targets=_array(evil), tokens=_array(evil)),
        "torch": _saved(lambda f: torch.save({"state": evil}, f)),
        "legacy": _saved(
            lambda f: torch.save({"state": evil}, f, _use_new_zipfile_serialization=False)
        ),
        "zipped": _zipped("data.pkl", pickle.dumps(evil)),
        "parquet": _extension(evil, pyarrow.parquet.write_table),
        "arrow": _extension(evil, _ipc),
        "json": json.dumps({"text": pickle.dumps(evil, protocol=0).decode(), "py/reduce": [
            {"py/function": "pathlib.Path.touch"}, {"py/tuple": [str(evil.marker)]}]}).encode(),
        "yaml": f"text: !!python/object/apply:pathlib.Path.touch ['{evil.marker}']\n".encode(),
        "code": f"open({str(evil.marker)!r}, 'w').close()\n".encode() * 2000,
    }  # fmt: skip


#: Ends of names by which some reader or other is chosen.
SUFFIXES = (
    "", ".pkl", ".pickle", ".pt", ".pth", ".npy", ".npz", ".bin", ".txt", ".csv", ".png", ".jpg",
    ".tiff", ".parquet", ".arrow", ".json", ".jsonl", ".zip", ".py",
)  # fmt: skip
_PAYLOADS = sorted(payloads(Evil(Path())))
RECIPES = (
    replace(TEXT, context=64), replace(TEXT_BPE, context=64, vocabulary=300),
    REGRESSION, replace(IMAGES, min_validation_samples=4),
    replace(PIXELS, min_validation_samples=4),
)  # fmt: skip


def _read(recipe: Recipe, data: str | Path, root: Path | None = None) -> None:
    # some of it is text, and may be read as such
    with contextlib.suppress(InvalidInput):
        load_data(recipe, data, root=root)


@contextlib.contextmanager
def _open_files_forgiven() -> Iterator[None]:
    """The library of datasets leaves files open where it fails."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield
        gc.collect()


@pytest.fixture
def evil(tmp_path: Path) -> Iterator[Evil]:
    made = Evil(tmp_path / "unpickled")
    yield made
    assert not made.marker.exists()


@pytest.mark.parametrize("payload", thinned(_PAYLOADS, 4))
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.name)
def test_no_loader_unpickles(payload: str, recipe: Recipe, tmp_path: Path, evil: Evil) -> None:
    content = payloads(evil)[payload]
    for number, suffix in enumerate(SUFFIXES):
        folder = tmp_path / str(number)
        for inside in (folder, folder / "train" / "a", folder / "validation" / "a"):
            inside.mkdir(parents=True)
            (inside / f"data{suffix}").write_bytes(content)
        _read(recipe, folder)
        _read(recipe, folder / f"data{suffix}")
        _read(recipe, folder / f"data{suffix}", folder)
        assert not evil.marker.exists(), suffix


@pytest.mark.parametrize("payload", thinned(_PAYLOADS, 3))
def test_no_reader_of_datasets_unpickles(
    payload: str, tmp_path: Path, evil: Evil, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    content = payloads(evil)[payload]
    with _open_files_forgiven():
        for number, suffix in enumerate(
            (".parquet", ".arrow", ".json", ".csv", ".txt", ".pkl", ".py")
        ):
            folder = tmp_path / str(number)
            folder.mkdir()
            (folder / f"train{suffix}").write_bytes(content)
            for recipe in (RECIPES[0], RECIPES[3]):
                _read(recipe, f"hf:{folder / f'train{suffix}'}")
                _read(recipe, f"hf:{folder}")
                (folder / "README.md").write_text(
                    "---\nbuilder_name: pandas\nconfigs:\n- config_name: default\n"
                    f"  data_files: train{suffix}\n  x: !!python/object/apply:pathlib.Path.touch\n"
                    f"    ['{evil.marker}']\n---\n"
                )
                _read(recipe, f"hf:{folder}")
                (folder / "README.md").unlink()
            assert not evil.marker.exists(), suffix


@pytest.mark.parametrize("payload", _PAYLOADS)
def test_neither_checkpoints_nor_backups_are_unpickled(
    payload: str, tmp_path: Path, evil: Evil
) -> None:
    path = tmp_path / "state"
    path.write_bytes(payloads(evil)[payload])
    assert Checkpoint(path, "key").load() is None
    with pytest.raises(InvalidInput):
        restore(path, f"sqlite:///{tmp_path / 'new.db'}")


def test_the_pickles_do_what_they_are_feared_for(tmp_path: Path) -> None:
    marker = tmp_path / "unpickled"
    content = payloads(Evil(marker))
    readers: dict[str, Callable[[io.BytesIO], object]] = {
        "protocol0": pickle.load, "protocol5": pickle.load, "batch": pickle.load,
        "npy": lambda f: np.load(f, allow_pickle=True),
        "record": lambda f: np.load(f, allow_pickle=True),
        "npz": lambda f: np.load(f, allow_pickle=True)["images"],
        "torch": lambda f: torch.load(f, weights_only=False),
        "legacy": lambda f: torch.load(f, weights_only=False),
    }  # fmt: skip
    for name, read in readers.items():
        read(io.BytesIO(content[name]))
        assert marker.exists(), name
        marker.unlink()
