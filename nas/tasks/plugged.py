"""Data of plug-ins, which a process of its own loads: its code may hang, crash or need torch."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from nas.errors import InvalidInput, one_line
from nas.planning.recipe import PluginRecipe
from nas.planning.tasks import task_card
from nas.tasks.data import LoadingStopped, TaskData, content_digest

#: Seconds between looks whether loading is to end.
_LOOK_SECONDS = 0.2


def load_plugged(
    recipe: PluginRecipe,
    data: str | None,
    *,
    shown: str | None,
    root: str | None,
    stop: Callable[[], bool],
) -> TaskData:
    """The data of a plug-in's task; parameters and errors as of `nas.tasks.load_data`.

    Raises
    ------
    LoadingStopped
        `stop` said so before the data was there.
    """
    name = shown or data or f"the default data of task {recipe.task}"
    check_place(recipe, data, shown=name, root=root)
    source = str(task_card(recipe.task).source)
    with TemporaryDirectory(prefix="einsum-nas-data-") as folder:
        given = [source, json.dumps(recipe.as_dict()), json.dumps(data), folder]
        said = Path(folder) / "stderr"
        with said.open("wb") as stderr:
            child = subprocess.Popen(
                [sys.executable, "-m", "nas.training.plugin", "load", *given], stderr=stderr
            )
            try:
                while child.poll() is None:
                    if stop():
                        raise LoadingStopped(f"loading {name} was stopped")
                    time.sleep(_LOOK_SECONDS)
            finally:
                child.kill()
                child.wait()
        refusal = Path(folder) / "refusal"
        if refusal.is_file():
            raise _refused(recipe, name, refusal.read_text())
        if child.returncode:
            lines = said.read_text(errors="replace").strip().splitlines() or ["nothing was said"]
            why = f"its code ended with status {child.returncode}: {one_line(lines[-1])}"
            raise _refused(recipe, name, why)
        train, validation = (_arrays(Path(folder) / f"{s}.npz") for s in ("train", "validation"))
    content = content_digest(f"{recipe.task} {recipe.version}", train, validation)
    rows = [len(next(iter(split.values()))) for split in (train, validation)]
    summary = f"task {recipe.task}: {rows[0]:,} rows to train on and {rows[1]:,} for validation"
    return TaskData(recipe, train, validation, content, summary)


def check_place(recipe: PluginRecipe, data: str | None, *, shown: str, root: str | None) -> None:
    """Raise `InvalidInput` for data named over the network that leads out of its folder."""
    if data is None or root is None:
        return
    path = Path(data)
    if not path.exists() or not path.resolve().is_relative_to(Path(root).resolve()):
        raise InvalidInput("data", shown, f"a file or folder for task {recipe.task} that is there")


def _refused(recipe: PluginRecipe, name: str, why: str) -> InvalidInput:
    return InvalidInput("data", name, f"data that task {recipe.task} can load; {why}")


def _arrays(file: Path) -> dict[str, Any]:
    with np.load(file, allow_pickle=False) as found:
        return dict(found)
