"""Why the trials of a search have failed, in a few words."""

from __future__ import annotations

import re
from collections.abc import Iterable

from nas.errors import counted


def grouped(errors: Iterable[str]) -> list[str]:
    """Errors of trials with how many have each, the most frequent first.

    Errors that differ in numbers alone, such as the step or a process id, count as one.
    """
    groups: dict[str, list[str]] = {}
    for error in errors:
        told = _STEP.sub("", error)
        groups.setdefault(_NUMBER.sub("#", told), []).append(told)
    told_first = sorted(groups.values(), key=lambda g: (-len(g), g[0]))
    return [
        f"{counted(len(g), 'trial')}: {g[0]}{' (numbers differ)' if len(set(g)) > 1 else ''}"
        for g in told_first
    ]


_STEP = re.compile(r" at step \d+( of \d+)?")
_NUMBER = re.compile(r"\b(?=[0-9a-f]*\d)[0-9a-f]{6,}\b|\d+(\.\d+)?")
