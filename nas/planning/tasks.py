"""The tasks there are: the built-in ones, and those that plug-ins add.

A plug-in is an installed package with an entry point in the group ``einsum_nas.tasks``, or a file
that the setting `task_modules` names.  Its code imports torch, which the service must not; so a
process of its own describes it once (`nas.training.plugin`), and what it says is kept in
`home` until the code or any installed package changes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.metadata import distributions, entry_points
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pydantic import ValidationError

from nas.errors import InvalidInput, one_line
from nas.planning.recipe import LOSS_UNITS, RECIPES, PluginRecipe, Recipe, with_overrides
from nas.planning.sheets import know_sheets

_log = logging.getLogger(__name__)
#: Entry points that are tasks: their names are those of the tasks, their values ``module:Class``.
GROUP = "einsum_nas.tasks"
#: Seconds that a plug-in may take to be described.
_PATIENCE = 900.0
#: Tasks of this process itself.
_OWN: dict[str, TaskCard] = {}
#: Files of Python whose change makes a plug-in be described anew, at most.
_MOST_FILES = 2000


@dataclass(frozen=True, slots=True)
class TaskCard:
    """What is known of a task without its code."""

    name: str
    loss_unit: str
    #: the first is the default
    recipes: tuple[Recipe, ...]
    #: ``module:Class`` or the path of a file; None of a built-in task
    source: str | None = None
    #: why it cannot be used
    refusal: str | None = None


def task_cards() -> Mapping[str, TaskCard]:
    """Every task by its name; those of plug-ins that cannot be used say why."""
    return {**_OWN, **_installed()} if _OWN else _installed()


@lru_cache(maxsize=1)
def _installed() -> Mapping[str, TaskCard]:
    found = {
        name: TaskCard(name, unit, tuple(r for r in RECIPES.values() if r.task == name))
        for name, unit in LOSS_UNITS.items()
    }
    for source, named in _sources():
        for card in _cards(source, named):
            if card.name in found:
                _log.error("task %s of %s is left out: there is one already", card.name, source)
                continue
            if card.refusal is not None:
                _log.error("task %s of %s cannot be used: %s", card.name, source, card.refusal)
            found[card.name] = card
    return found


def add_card(card: TaskCard) -> None:
    """Add a task of this process's own; `InvalidInput` where another one has its name."""
    known = task_cards().get(card.name)
    if known is not None and known.recipes != card.recipes:
        accepted = "a name that no installed task has, unless it is the same in every width"
        raise InvalidInput("task", card.name, accepted)
    _OWN.setdefault(card.name, card)


def task_names() -> tuple[str, ...]:
    """The names of all tasks, of those too that cannot be used."""
    return tuple(task_cards())


def usable_tasks() -> tuple[str, ...]:
    """The names of the tasks that can be searched here."""
    return tuple(name for name, card in task_cards().items() if card.refusal is None)


def task_card(name: str) -> TaskCard:
    """A task that can be used.

    Raises
    ------
    InvalidInput
        No such task, or one that cannot be used, and why.
    """
    cards = task_cards()
    usable = " | ".join(usable_tasks())
    if name not in cards:
        raise InvalidInput("task", name, usable)
    refusal = cards[name].refusal
    if refusal is not None:
        raise InvalidInput("task", name, f"{usable}; this one cannot be used: {refusal}")
    return cards[name]


def recipe_of(
    task: str, name: str | None = None, overrides: Mapping[str, Any] | None = None
) -> Recipe:
    """The recipe of a task: by name, by default its first, with some settings set anew.

    Raises
    ------
    InvalidInput
        No such task, no such recipe of it, or overrides that it cannot have.
    """
    own = task_card(task).recipes
    found = own[0] if name is None else next((r for r in own if r.name == name), None)
    if found is None:
        raise InvalidInput("recipe", name, " | ".join(r.name for r in own))
    return with_overrides(found, overrides or {})


def _sources() -> Iterator[tuple[str, str]]:
    """Where plug-ins are, and what their task is called where they cannot say it themselves."""
    for point in entry_points(group=GROUP):
        yield point.value, point.name
    from nas.settings import settings  # where it is used, for training without its library

    for given in settings().task_modules:
        path = Path(given).expanduser().resolve()
        if path.suffix != ".py" or not path.is_file():
            accepted = "files of Python whose tasks can be searched"
            raise InvalidInput("EINSUM_NAS_TASK_MODULES", given, accepted)
        yield str(path), path.stem


def _cards(source: str, named: str) -> list[TaskCard]:
    """The tasks of one plug-in, from what it said when its code was last another."""
    from nas.settings import settings

    folder = settings().resolved_home / "tasks"
    kept = folder / f"{_signature(source)}.json"
    try:
        described = json.loads(kept.read_text())
    except (OSError, ValueError):
        described = _described(source, named)
        if all(d["refusal"] is None for d in described):  # another time it may be in order
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            written = kept.with_suffix(f".{id(described)}")
            written.write_text(json.dumps(described))
            written.replace(kept)
    return [card_of(source, values) for values in described]


def _described(source: str, named: str) -> list[dict[str, Any]]:
    """What a process of its own says about a plug-in."""
    refusal: str
    with TemporaryDirectory() as folder:
        out = Path(folder) / "described.json"
        command = [sys.executable, "-m", "nas.training.plugin", "describe", source, str(out)]
        try:
            ended = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE)
        except subprocess.TimeoutExpired:
            refusal = f"it was not counted within {_PATIENCE:g} s"
        else:
            if out.is_file():
                found: list[dict[str, Any]] = json.loads(out.read_text())
                return found
            last = (ended.stderr.strip().splitlines() or ["nothing was said"])[-1]
            refusal = f"its code ended with status {ended.returncode}: {one_line(last)}"
    return [{"name": named, "refusal": refusal}]


def card_of(source: str, values: Mapping[str, Any]) -> TaskCard:
    """The card of a described task; see `nas.training.plugin.described`."""
    name, refusal = values["name"], values["refusal"]
    recipes: list[Recipe] = []
    if refusal is None:
        try:
            for given in values["recipes"]:
                recipe = PluginRecipe(**given["settings"])
                recipes.append(replace(recipe, counted=know_sheets(given["sheets"])))
        except (ValidationError, InvalidInput) as error:
            refusal = one_line(error)
    unit = recipes[0].loss_unit if recipes else "unknown"
    return TaskCard(name, unit, tuple(recipes), source, refusal)


def _signature(source: str) -> str:
    """Digest of a plug-in's code, this interpreter and every installed package."""
    digest = hashlib.sha256(f"{source}\n{sys.version}\n".encode())
    if source.endswith(".py"):
        root = Path(source).parent
        files = sorted(root.glob("*.py"))
    else:
        spec = find_spec(source.partition(":")[0].partition(".")[0])
        origin = Path(spec.origin) if spec is not None and spec.origin else Path(source)
        root = origin.parent
        files = sorted(root.rglob("*.py")) if origin.name == "__init__.py" else [origin]
    for file in files[:_MOST_FILES]:
        state = file.stat()
        digest.update(f"{file.relative_to(root)} {state.st_size} {state.st_mtime_ns}\n".encode())
    names = sorted(f"{d.metadata['Name']} {d.version}" for d in distributions())
    digest.update("\n".join(names).encode())
    return digest.hexdigest()[:32]
