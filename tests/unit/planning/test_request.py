from __future__ import annotations

import math
from typing import Any

import pytest

from nas.errors import InvalidInput
from nas.planning.request import SearchRequest

GOOD: dict[str, Any] = {"train_flops": 2e11}
BAD: list[tuple[str, Any]] = [
    ("task", "video"), ("task", 3), ("recipe", "mlp-digits-1"), ("recipe", 1),
    ("sampler", "cma"), ("objective", "speed"),
    ("train_flops", 0), ("train_flops", -1.0), ("train_flops", math.nan),
    ("train_flops", math.inf), ("train_flops", 1e30), ("train_flops", 10**400),
    ("train_flops", 1e9), ("train_flops", "2e11"), ("train_flops", None), ("train_flops", True),
    ("trials", 0), ("trials", 10_001), ("trials", 2.5), ("trials", "16"),
    ("references", 2), ("references", 33), ("seed", -1), ("seed", 2**31),
    ("replicates", 0), ("replicates", 17), ("replicates", 2.5), ("replicates", "3"),
    ("data", ""), ("data", "a\x00b"), ("data", "\ud800"), ("data", 5),
    ("overrides", {"speed": 1}), ("overrides", 3), ("unknown", 1),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), BAD)
def test_bad_fields_are_named_repeated_and_explained(field: str, value: Any) -> None:
    with pytest.raises(InvalidInput) as caught:
        SearchRequest.checked({**GOOD, field: value})
    error = caught.value
    assert error.field == field
    assert error.accepted
    assert len(str(error)) < 600
    str(error).encode()  # can be sent and logged


def test_naming_the_default_changes_nothing() -> None:
    plain = SearchRequest.checked(GOOD)
    named = SearchRequest.checked({**GOOD, "recipe": "gpt-chars-1", "overrides": {}})
    assert named == plain
    assert named.digest == plain.digest
    deep = SearchRequest.checked({**GOOD, "overrides": {"depth": 4}})
    assert deep.settings.depth == 4
    assert deep.digest != plain.digest


def test_a_recipe_without_default_data_asks_for_some() -> None:
    for fields in ({"recipe": "mlp-cifar-1"}, {"overrides": {"side": 16}}):
        with pytest.raises(InvalidInput, match="data: got nothing; accepted: images of"):
            SearchRequest.checked({"task": "images", "train_flops": 1e12, **fields})


def test_byte_pairs_begin_with_the_bytes() -> None:
    with pytest.raises(InvalidInput, match="vocabulary: got 96; accepted: at least 256"):
        SearchRequest.checked({**GOOD, "overrides": {"tokenizer": "bpe"}})


def test_a_missing_budget_is_named() -> None:
    with pytest.raises(InvalidInput, match="got nothing; accepted: a finite number above 0"):
        SearchRequest.checked({})


@pytest.mark.parametrize("value", [None, [], "text", 3])
def test_a_body_must_be_an_object(value: Any) -> None:
    with pytest.raises(InvalidInput, match="body"):
        SearchRequest.checked(value)


def test_equal_requests_have_equal_digests() -> None:
    one = SearchRequest.checked({**GOOD, "seed": 3})
    assert one.digest == SearchRequest.checked({"seed": 3, **GOOD, "trials": 16}).digest
    assert one.digest != SearchRequest.checked({**GOOD, "seed": 4}).digest


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({"seed": 2**31 - 2, "replicates": 3}, "replicates: got 3; accepted: at most 2 with seed"),
        ({"trials": 4000, "replicates": 3}, "replicates: got 3; accepted: at most 2 with 4,000"),
        (
            {"replicates": 3, "limits": {"total_train_flops": 2e11 * 6 * 3 - 1}},
            r"limits.total_train_flops: .* one candidate, 3 runs of each",
        ),
    ],
)
def test_replicates_count_in_everything_that_they_multiply(
    changes: dict[str, Any], refused: str
) -> None:
    with pytest.raises(InvalidInput, match=refused):
        SearchRequest.checked({**GOOD, **changes})


def test_a_confirmation_has_no_replicates() -> None:
    run = {"trial_id": 1, "theta": [], "design": "monarch", "width": 32, "steps": 50}
    confirm = {"search": "s", "runs": [run], "seeds": [4, 5], "top": 1}
    fields = {**GOOD, "trials": 2, "confirm": confirm}
    assert SearchRequest.checked(fields).replicates == 1
    with pytest.raises(InvalidInput, match="replicates: got 2; accepted: 1 for a confirmation"):
        SearchRequest.checked({**fields, "replicates": 2})


def test_a_request_of_one_run_a_candidate_keeps_the_digest_of_an_older_version() -> None:
    plain = SearchRequest.checked({**GOOD, "replicates": 1})
    assert plain.digest == "c1b05648c55c6eeec578c8e08fe122954877cab17af043c56bea95b7d9695f8e"
    assert SearchRequest.checked({**GOOD, "replicates": 2}).digest != plain.digest
