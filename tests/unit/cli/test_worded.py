"""A search as the command that submits an equal one."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from nas.cli.worded import command_of
from nas.planning.request import SearchRequest
from tests.support.commands import invoke

ASKED: list[dict[str, Any]] = [
    {"train_flops": 2e11},
    {"train_flops": 123456789012.5, "task": "regression", "trials": 3, "sampler": "tpe",
     "stopping": "median", "objective": "pareto", "seed": 7, "references": 4, "replicates": 2,
     "priority": -3, "warm_start": "none"},
    {"train_flops": 2e11, "total_train_flops": 1e13},
    {"train_flops": 2e11, "total_seconds": 60.0, "trials": 9},
    {"train_flops": 2e11, "limits": {"trial_seconds": 60.0, "total_train_flops": 1e13}},
    {"train_flops": 2e11, "space": {"families": ["einsum", "btt-moe"], "factors": [2, 3],
                                    "experts": [8, 16], "active": [2], "shared": [0, 1]}},
    {"train_flops": 2e11, "overrides": {"depth": 3, "lr": 0.003, "normalize": True}},
]  # fmt: skip


@pytest.mark.parametrize("fields", ASKED, ids=lambda v: " ".join(v))
def test_the_command_asks_for_the_same(tmp_path: Path, fields: dict[str, Any]) -> None:
    request = SearchRequest.checked(fields).model_dump(mode="json")
    program, command, *words = shlex.split(command_of(request))
    assert (program, command) == ("einsum-nas", "search")
    done = invoke(tmp_path, "preview", *words, "--json")
    assert done.returncode == 0, done.stderr
    asked = SearchRequest.checked(json.loads(done.stdout)["request"])
    same = SearchRequest.checked(request)
    # a setting may be text, as an option is
    assert asked.settings == same.settings
    assert asked.model_copy(update={"overrides": same.overrides}) == same
    assert json.loads(invoke(tmp_path, "searches", "--json").stdout) == []


def test_a_confirmation_and_given_candidates_have_their_own_words() -> None:
    confirmed = {"search": "abc", "seeds": [5, 6, 7], "longer": 2.0, "top": 3, "spread": True}
    asked = command_of({"confirm": confirmed})
    assert asked == "einsum-nas confirm --search abc --top 3 --seeds 3 --longer 2.0 --spread"
    given = [{"design": "monarch", "width": 64}]
    request = SearchRequest.checked({"train_flops": 2e11, "candidates": given})
    program = command_of(request.model_dump(mode="json"))
    assert program.startswith("from nas.client import Client\nClient().search(")
    assert "'design': 'monarch'" in program
