"""What the names of folders say: which are no data, and which are a split.  Torch-free."""

from __future__ import annotations

from collections.abc import Iterable

#: Names of the training data, and of the validation data in the order in which they are preferred.
TRAINING = ("train", "training", "trn")
VALIDATION = (
    "validation", "valid", "val", "dev", "development", "eval", "evaluation", "test", "testing",
    "tst",
)  # fmt: skip
#: Folders that systems and programs put beside data, in small letters.
_SYSTEM = frozenset(
    {
        "@eadir", "@recycle", "@tmp", "#recycle", "#snapshot", "__macosx", "__pycache__",
        "lost+found", "$recycle.bin", "system volume information",
    }
)  # fmt: skip


def is_system_folder(name: str) -> bool:
    """Whether a folder is hidden or a system's own, so that what is in it is nobody's data."""
    return name.startswith(".") or name.lower() in _SYSTEM


def own_split(names: Iterable[str]) -> tuple[frozenset[str], frozenset[str]]:
    """Which names say training data, and which the validation data, whatever their case.

    Of several kinds of validation data the first of `VALIDATION` counts.  Without training data
    there is no split: both are empty.
    """
    names = frozenset(names)
    train = frozenset(name for name in names if name.lower() in TRAINING)
    held = (frozenset(n for n in names if n.lower() == wanted) for wanted in VALIDATION)
    return train, next(filter(None, held), frozenset()) if train else frozenset()


def listed(names: Iterable[str], most: int = 5) -> str:
    """The first names in their order, for a message."""
    found = sorted(map(str, names))
    return ", ".join(found[:most]) + (f" and {len(found) - most:,} more" if found[most:] else "")
