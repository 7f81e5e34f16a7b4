"""Searches as the commands that submit them."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from nas.planning.request import SearchRequest

#: Fields of limits whose options have other names.
_OPTIONS = {"total_train_flops": "most-train-flops"}


def command_of(request: Mapping[str, Any]) -> str:
    """The command that submits an equal search, or confirms what it confirms.

    Where candidates were given, which no option takes, the program in Python that does.

    Parameters
    ----------
    request
        In REST's form.

    >>> command_of({"task": "text", "train_flops": 2e11, "trials": 8, "space": None})
    'einsum-nas search --task text --train-flops 200000000000.0 --trials 8'
    """
    if (confirmed := request.get("confirm")) is not None:
        given = {"search": confirmed["search"], "top": confirmed["top"],
                 "seeds": len(confirmed["seeds"]), "longer": confirmed["longer"]}  # fmt: skip
        words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
        return shlex.join(
            ["einsum-nas", "confirm", *words, *(["--spread"] if confirmed["spread"] else [])]
        )
    if request.get("candidates") is not None:
        fields = {name: value for name, value in request.items() if value is not None}
        return f"from nas.client import Client\nClient().search(**{fields!r})"
    return shlex.join(["einsum-nas", "search", *_words(request)])


def _words(request: Mapping[str, Any]) -> Iterator[str]:
    defaults = {name: field.default for name, field in SearchRequest.model_fields.items()}
    for name, value in request.items():
        if name == "space" and value:
            for choice, values in value.items():
                yield from (f"--{choice}", ",".join(map(str, values)))
        elif name == "limits" and value:
            for limit, most in value.items():
                if most is not None:
                    option = _OPTIONS.get(limit, limit.replace("_", "-"))
                    yield from (f"--{option}", str(most))
        elif name == "overrides" and value:
            for setting, of in value.items():
                yield from ("--set", f"{setting}={of}")
        # defaults that other fields decide are said all the same
        elif value is not None and (name in ("task", "trials") or value != defaults.get(name)):
            yield from (f"--{name.replace('_', '-')}", str(value))
