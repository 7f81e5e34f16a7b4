"""What the names of folders say: which are no data, and which are a split.  Torch-free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from nas.tasks.data import Refusal

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


def folders_of_split(
    files: Iterable[tuple[str, ...]], labelled: bool, error: Refusal
) -> tuple[frozenset[str], frozenset[str]]:
    """Names of the folders of training and of validation images; both empty if none is a split's.

    Parameters
    ----------
    files
        Of each image its name and those of the folders on the way.
    labelled
        Whether the folders of images are their classes.
    error
        The error of a loader, made from what is wrong.

    Raises
    ------
    InvalidInput
        The folders may be classes as well as splits.
    """
    below: dict[str, set[str]] = {}
    for parts in files:
        if len(parts) > 1:
            below.setdefault(parts[0], set()).update(parts[1:-1][:1])
    train, held = own_split(below)
    if not labelled:
        return (train, held) if held else (frozenset(), frozenset())
    if held or any(below[name] for name in train):
        return train, held
    # then the folders are the classes, one of which may well be called train
    how = "name the split's folders train and validation, or one of them as the data"
    if len(below) > 1 and all(name.lower() in VALIDATION for name in below):
        raise error(f"the folders {listed(below)} are splits without one to train; {how}")
    times = Counter(name for names in below.values() for name in names)
    twins = [top for top, names in below.items() if sum(times[n] > 1 for n in names) > 1]
    if len(twins) > 1:
        shared = {name for name in below[twins[0]] if times[name] > 1}
        raise error(
            f"the folders {listed(twins)} hold the same sub-folders, {listed(shared)}, so either "
            f"may be the classes; {how}, or have no folders in those of the classes"
        )
    return frozenset(), frozenset()


def listed(names: Iterable[str], most: int = 5) -> str:
    """The first names in their order, for a message."""
    found = sorted(map(str, names))
    return ", ".join(found[:most]) + (f" and {len(found) - most:,} more" if found[most:] else "")
