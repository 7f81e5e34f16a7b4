from __future__ import annotations

import math
from typing import Any

import pytest

from nas.errors import InvalidInput
from nas.planning.request import MAX_TRIALS, SearchRequest

GOOD: dict[str, Any] = {"train_flops": 2e11}
BAD: list[tuple[str, Any]] = [
    ("task", "video"), ("task", 3), ("recipe", "mlp-digits-1"), ("recipe", 1),
    ("sampler", "cma"), ("objective", "speed"), ("stopping", "asha"), ("stopping", 1),
    ("total_train_flops", -1.0), ("total_train_flops", "1e13"), ("total_seconds", math.inf),
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
    plain = SearchRequest.checked({**GOOD, "sampler": "tpe", "replicates": 1})
    assert plain.digest == "c1b05648c55c6eeec578c8e08fe122954877cab17af043c56bea95b7d9695f8e"
    same = SearchRequest.checked({**GOOD, "sampler": "tpe", "stopping": "none"})
    assert same == plain
    for changes in ({"replicates": 2}, {"sampler": "surrogate"}, {"stopping": "median"}):
        other = SearchRequest.checked({**GOOD, "sampler": "tpe", **changes})
        assert other.digest != plain.digest


def test_the_default_is_the_surrogate_and_no_rule_without_a_total() -> None:
    plain = SearchRequest.checked(GOOD)
    assert (plain.sampler, plain.stopping, plain.stopping_rule) == ("surrogate", None, "none")
    assert (plain.total, plain.trials) == (None, 16)


@pytest.mark.parametrize("field", ["total_train_flops", "total_seconds"])
def test_a_total_brings_the_frontier_rule_and_as_many_candidates_as_there_may_be(
    field: str,
) -> None:
    fields = {**GOOD, field: 1e13 if field == "total_train_flops" else 3600.0}
    request = SearchRequest.checked({**fields, "replicates": 3})
    assert (request.stopping_rule, request.trials) == ("frontier", MAX_TRIALS // 3)
    named = SearchRequest.checked({**request.model_dump(mode="json"), "stopping": "frontier"})
    assert named == request
    assert named.digest == request.digest
    assert SearchRequest.checked({**fields, "trials": 9}).trials == 9


_TOTAL = {"total_train_flops": 1e13}


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({"total_train_flops": 14 * 2e11 - 1}, r"total_train_flops: .* at least 2\.8e\+12, for the "
                                               "references and three candidates, and six runs"),
        ({"total_train_flops": 22 * 2e11 - 1, "replicates": 2}, r"at least 4\.4e\+12.* 2 runs of"),
        ({**_TOTAL, "total_seconds": 9.0}, "total_seconds: got 9.0; accepted: null with total_tra"),
        ({**_TOTAL, "limits": {"total_train_flops": 1e13}}, "limits.total_train_flops: .* null"),
        ({"total_seconds": 9.0, "limits": {"seconds": 8.0}}, "limits.seconds: .* at least total_s"),
        ({**_TOTAL, "stopping": "none"}, r"stopping: got none; accepted: median \| mo-asha \| fr"),
        ({**_TOTAL, "sampler": "tpe"}, "sampler: got tpe; accepted: surrogate with stopping front"),
        ({"stopping": "frontier", "sampler": "gp"}, r"with gp give stopping median \| mo-asha"),
        ({**_TOTAL, "overrides": {"schedule": "cosine"}}, "total_train_flops: .* schedule constan"),
        ({"stopping": "median", "overrides": {"schedule": "cosine"}}, "stopping: .* none, or sche"),
        ({"stopping": "rungs"}, r"stopping: got rungs; accepted: none \| median \| mo-asha"),
        ({"total_train_flops": math.nan}, "total_train_flops: got nan"),
        ({"total_seconds": 0.0}, "total_seconds: got 0.0; accepted: a finite number above 0"),
        ({"total_seconds": 1e9}, "total_seconds: got 1000000000.0; accepted: a finite number"),
    ],
)  # fmt: skip
def test_contradictory_budgets_and_rules_are_refused(changes: dict[str, Any], refused: str) -> None:
    with pytest.raises(InvalidInput, match=refused):
        SearchRequest.checked({**GOOD, **changes})


@pytest.mark.parametrize("changes", [
    {**_TOTAL, "stopping": "median", "sampler": "tpe"}, {"stopping": "mo-asha", "sampler": "nsga2"},
    {"stopping": "frontier"}, {"total_seconds": 60.0, "limits": {"seconds": 60.0}},
    {"total_train_flops": 14 * 2e11}, {"total_train_flops": 22 * 2e11, "replicates": 2},
])  # fmt: skip
def test_budgets_and_rules_that_agree_are_accepted(changes: dict[str, Any]) -> None:
    request = SearchRequest.checked({**GOOD, **changes})
    assert request.stopping_rule != "none"
    assert SearchRequest(**request.model_dump(mode="json")) == request


# --- given candidates

CANDIDATES = [{"design": "monarch", "width": 32}, {"design": "low-rank:rho=1/2", "width": 48}]


def test_given_candidates_are_the_trials() -> None:
    request = SearchRequest.checked({**GOOD, "candidates": CANDIDATES})
    assert (request.trials, request.stopping_rule) == (2, "none")
    plans = request.given_plans(request.settings)
    assert [(p.name, p.width) for p in plans] == [("monarch", 32), ("low-rank:rho=1/2", 48)]
    assert all(p.train_flops <= 2e11 < p.train_flops + p.train_flops_per_step for p in plans)
    assert SearchRequest(**request.model_dump(mode="json")) == request
    assert request.digest != SearchRequest.checked({**GOOD, "trials": 2}).digest


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({"candidates": []}, "candidates: "),
        ({"candidates": [{"design": "monarch"}]}, "candidates: got nothing; accepted: null, or"),
        ({"candidates": [*CANDIDATES, {"design": "brick", "width": 32}]},
         r"candidates\[2\]: got 'brick' of width 32; accepted: .*"),
        ({"candidates": [CANDIDATES[0], {"design": "monarch", "width": 33}]},
         r"candidates\[1\]: got 'monarch' of width 33; accepted: multiples of .*\(its width\)"),
        ({"candidates": [{"design": "dense", "width": 2048}]},
         r"candidates\[0\]: got 'dense' of width 2048; accepted: widths at which"),
        ({"candidates": CANDIDATES, "trials": 3}, "trials: got 3; accepted: 2, the number of"),
        ({"candidates": CANDIDATES, "stopping": "median"}, "stopping: .* none with `candidates`"),
        ({"candidates": CANDIDATES, **_TOTAL}, "total_train_flops: .* null with `candidates`"),
    ],
)  # fmt: skip
def test_bad_candidates_are_named(changes: dict[str, Any], refused: str) -> None:
    with pytest.raises(InvalidInput, match=refused):
        SearchRequest.checked({**GOOD, **changes})


def test_a_confirmation_takes_neither_rule_nor_total_nor_candidates() -> None:
    run = {"trial_id": 1, "theta": [], "design": "monarch", "width": 32, "steps": 50}
    confirm = {"search": "s", "runs": [run], "seeds": [4], "top": 1}
    fields = {**GOOD, "trials": 1, "confirm": confirm}
    for changes, refused in (
        ({"stopping": "median"}, "stopping: got median; accepted: none for a confirmation"),
        (_TOTAL, "total_train_flops: .* null for a confirmation"),
        ({"candidates": CANDIDATES[:1]}, "candidates: got 1; accepted: null for a confirmation"),
    ):
        with pytest.raises(InvalidInput, match=refused):
            SearchRequest.checked({**fields, **changes})
