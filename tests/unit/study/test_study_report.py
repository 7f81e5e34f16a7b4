from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from nas.designs.taxonomy import parse_theta
from nas.errors import InvalidInput
from nas.study.page import render
from nas.study.report import analyse, summary_lines
from nas.study.task import GROUPS, group_of
from nas.study.wording import REFERENCE
from tests.support.studies import NAMES, Record, record, study

PLANTED = {"dense": 1.0, "monarch": 1.002, "btt:rho=1/4": 1.0, "low-rank:rho=1/2": 1.3,
           "kronecker": 0.8}  # fmt: skip


def by_name(result: Mapping[str, Any], task: int = 0) -> dict[str, dict[str, Any]]:
    return {s["name"]: s for s in result["tasks"][task]["structures"]}


def by_group(result: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {g["group"]: g for g in result["tasks"][0]["groups"]}


def finding(result: Mapping[str, Any], start: str) -> dict[str, Any]:
    (found,) = [f for f in result["findings"] if f["paper"].startswith(start)]
    return dict(found)


@pytest.mark.parametrize(
    ("text", "group"),
    [("dense", REFERENCE), ("monarch", REFERENCE), ("2/3,0,1/3,0,1/3,2/3,0", REFERENCE),
     (".33,0,.67,0,.67,.33,0", REFERENCE), ("low-rank:rho=3/4", "ω = 0, ψ < 1"),
     ("4/5,0,1/5,0,4/5,1/5,1/10", "ω = 0, ψ < 1"), ("kronecker", "ω > 0"),
     ("tensor-train:rho=1/4", "ω > 0"), ("1/2,1/4,1/4,1/4,1/2,1/4,0", "ω > 0")],
)  # fmt: skip
def test_groups_follow_the_taxonomy(text: str, group: str) -> None:
    theta = parse_theta(text)
    assert group_of(theta) == group_of(theta.swapped()) == group
    assert group in GROUPS


def test_verdicts_go_whichever_way_the_numbers_go() -> None:
    result = analyse(study(PLANTED), scale="cpu")
    groups, structures = by_group(result), by_name(result)
    assert groups[REFERENCE]["verdict"] == "reference"
    assert groups["ω = 0, ψ < 1"]["verdict"] == "worse"
    assert groups["ω = 0, ψ < 1"]["text"].startswith(
        "worse than ω = 0, ψ = 1: loss × 1.299 (95% 1."
    )
    assert groups["ω = 0, ψ < 1"]["text"].endswith(", 3 seeds)")
    assert groups["ω > 0"]["verdict"] == "better"
    for share in ("C", "C/2", "C/4"):
        assert groups["ω > 0"]["ratios"][share]["value"] == pytest.approx(0.8, rel=0.01)
    assert structures[NAMES["btt:rho=1/4"]]["over_dense"]["verdict"] == "undecided"
    assert "cannot be told apart" in structures[NAMES["btt:rho=1/4"]]["over_dense"]["text"]
    assert structures["dense"]["over_dense"] is None
    assert finding(result, "ω = 0, ψ < 1")["agreement"] == "agrees"
    assert finding(result, "ω > 0")["agreement"] == "contradicts"
    assert finding(result, "structures of")["agreement"] == "agrees"


def test_pairing_by_seed_takes_away_what_a_seed_does_to_all() -> None:
    """Seeds here move all losses by 10%, thirty times the difference that is found."""
    result = analyse(study({"dense": 1.0, "kronecker": 1.05}, noise=0.1), scale="cpu")
    assert by_group(result)["ω > 0"]["verdict"] == "worse"
    low, high = by_name(result)["dense"]["loss"]["interval"]
    assert high / low > 1.2


def test_one_seed_decides_nothing() -> None:
    result = analyse(study(PLANTED, seeds=1), scale="cpu")
    group = by_group(result)["ω = 0, ψ < 1"]
    assert group["verdict"] == "undecided"
    assert group["ratios"]["C"]["interval"] is None
    assert group["text"].endswith("(1 seed, interval unknown)")
    assert "1 seed:" in result["tasks"][0]["warnings"][0]
    assert {f["agreement"] for f in result["findings"]} <= {"undecided", "not run"}


def test_exponents_and_multipliers_have_their_planted_values() -> None:
    structures = by_name(analyse(study({"dense": 1.0, "monarch": 0.9, "kronecker": 1.3}), scale=""))
    assert structures["dense"]["exponent"]["b"]["value"] == pytest.approx(0.1, abs=1e-6)
    multiplier = structures["monarch"]["over_dense"]["multiplier"]
    assert multiplier["value"] == pytest.approx(0.9**-10, rel=0.03)
    assert multiplier["censored"] == 0
    never = structures[NAMES["kronecker"]]["over_dense"]["multiplier"]
    assert never["value"] is None
    assert never["interval"] is None
    assert never["text"] == "< 1.00 (3 of 3 seeds censored)"


def test_failed_runs_are_listed_and_not_used() -> None:
    records = study(PLANTED)
    diverged = [r for r in records if r["width"] == 64 and r["seed"] == 1]
    for r in diverged:
        r["failure"] = "training loss is nan at step 7"
        r["points"][-1]["loss"] = 1e-9
    silent = next(r for r in records if r["name"] == "monarch" and r["seed"] == 2)
    silent["points"] = []
    result = analyse(records, scale="cpu")
    (task,) = result["tasks"]
    assert result["failed"] == len(task["failures"]) == len(diverged) + 1
    assert {f["reason"] for f in task["failures"]} == {
        "training loss is nan at step 7", "no point was measured",
    }  # fmt: skip
    dense = by_name(result)["dense"]
    assert dense["missing"] == [{"seed": 1, "width": 64}]
    assert dense["best_widths"] == {"0": 64, "1": 96, "2": 64}
    assert dense["width_note"] == (
        "best width is the widest tried (96) in 1 of 3 seeds: the optimum may lie outside"
    )
    assert any("failed" in w for w in task["warnings"])
    page = render(result)
    assert "training loss is nan at step 7" in page
    assert "width 64 seed 1 missing" in page


def test_a_member_without_a_seed_does_not_move_its_groups_mean() -> None:
    """Monarch's seed 2 is missing; else the reference would be another at that seed."""
    records = study({"dense": 1.0, "monarch": 2.0, "kronecker": 1.1}, noise=1e-4)
    kept = [r for r in records if (r["name"], r["seed"]) != ("monarch", 2)]
    result = analyse(kept, scale="cpu")
    assert by_group(result)[REFERENCE]["left_out"] == ["monarch"]
    assert by_group(result)["ω > 0"]["ratios"]["C"]["value"] == pytest.approx(1.1, rel=1e-3)
    assert by_name(result)["monarch"]["seeds"] == [0, 1]
    assert len(by_name(result)["monarch"]["ratios"]["C"]["by_seed"]) == 2
    assert any("monarch" in w for w in result["tasks"][0]["warnings"])


def test_runs_of_another_length_are_told() -> None:
    records = study(PLANTED)
    assert analyse(records, scale="cpu")["tasks"][0]["warnings"] == []
    del records[0]["points"][-1]
    (warning,) = analyse(records, scale="cpu")["tasks"][0]["warnings"]
    assert warning == "ended before 95% of C, and compared as they were then: 1 runs"


def test_nothing_finished_is_a_result_too() -> None:
    records = study(PLANTED)
    for r in records:
        r["failure"], r["points"] = "training loss is nan at step 1", []
    result = analyse(records, scale="cpu")
    assert result["tasks"][0]["train_flops"] is None
    assert "training loss is nan at step 1" in render(result)
    assert summary_lines(result)
    assert render(analyse([], scale="cpu"))


@pytest.mark.parametrize("absent", ["dense", "monarch"])
def test_without_a_reference_nothing_is_compared(absent: str) -> None:
    left = {"dense": 1.0, "monarch": 1.0, "kronecker": 1.1}
    del left[absent]
    result = analyse(study(left), scale="cpu")
    assert by_group(result)["ω > 0"]["verdict"] == "worse"
    assert (by_name(result)[NAMES["kronecker"]]["over_dense"] is None) == (absent == "dense")
    alone = analyse(study({"kronecker": 1.1}), scale="cpu")
    assert by_group(alone)["ω > 0"]["verdict"] == "unknown"
    assert render(alone)


def test_the_order_on_regression_is_that_of_small_models() -> None:
    losses = {"monarch": 0.037, "1/2,1/4,1/4,1/4,1/2,1/4,0": 0.043, "dense": 0.046,
              "kronecker": 0.057, "low-rank:rho=1/2": 0.074}  # fmt: skip
    planted = study(losses, task="regression", noise=1e-3)
    result = analyse(planted, scale="cpu")
    order = finding(result, "order of losses")
    assert order["agreement"] == "agrees"
    assert order["here"].startswith("monarch 0.0")
    assert "of 10 pairs 10 are in this order" in order["here"]
    assert finding(result, "structures of")["agreement"] == "agrees"
    turned = study({t: 1 / y for t, y in losses.items()}, task="regression", noise=1e-3)
    assert finding(analyse(turned, scale="cpu"), "order of losses")["agreement"] == "contradicts"
    for r in planted:
        r["forward_flops_per_token"] = 1e9
    assert finding(analyse(planted, scale="cpu"), "order of losses")["agreement"] == "not run"


def test_slopes_are_compared_by_seed() -> None:
    def runs(dense: float, kronecker: float) -> list[Record]:
        return [
            record(text, 64, seed, 0.1, b=b + 0.001 * seed * (1 + (text == "dense")), task=task)
            for task in ["regression"]
            for seed in range(3)
            for text, b in (("dense", dense), ("kronecker", kronecker))
        ]

    result = analyse(runs(0.23, 0.17), scale="gpu")
    assert finding(result, "loss falls faster")["agreement"] == "agrees"
    structure = by_name(result)["dense"]
    assert structure["exponent"]["paper"] == 0.23
    assert "a single width" in structure["exponent"]["reasons"][0]
    result = analyse(runs(0.17, 0.23), scale="gpu")
    assert finding(result, "loss falls faster")["agreement"] == "contradicts"


def test_json_round_trip_whatever_the_order_of_records() -> None:
    records = study(PLANTED)
    result = analyse(records, scale="cpu")
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    turned = analyse(records[::-1], scale="cpu")
    names = {s["name"]: s for s in turned["tasks"][0]["structures"]}
    assert names == by_name(result)
    assert turned["findings"] == result["findings"]


def test_mixed_and_doubled_records_are_refused() -> None:
    records = study(PLANTED)
    with pytest.raises(InvalidInput, match="each run once"):
        analyse([*records, records[0]], scale="cpu")
    other = {**records[0], "recipe": {"name": "another"}, "seed": 9}
    with pytest.raises(InvalidInput, match="one recipe"):
        analyse([*records, other], scale="cpu")


def test_the_page_has_what_it_should_and_escapes_names() -> None:
    records = study(PLANTED)
    for r in records:
        if r["name"] == "monarch":
            r["name"] = "<script>alert(1)</script>"
    result = analyse(records, scale="cpu")
    page = render(result)
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert page.count("<script>") == page.count("</script>") == 2 + _scripts_in_plotly()
    assert "src=" not in page.partition("</style>")[0]
    for expected in ("text-curves", "text-exponents", "train FLOPs / 6", "2410.02117",
                     "worse than ω = 0, ψ = 1", "nats per character", "n - 1 degrees"):  # fmt: skip
        assert expected in page


def _scripts_in_plotly() -> int:
    from plotly.offline import get_plotlyjs

    return int(get_plotlyjs().count("</script>"))


def test_names_that_several_structures_share_get_their_theta() -> None:
    thetas = ("1/2,1/4,1/4,1/4,1/2,1/4,0", "1/2,1/3,1/6,1/4,1/2,1/4,0")
    records = [record(t, 64, seed, 2.0, name="einsum") for t in thetas for seed in range(3)]
    assert by_name(analyse(records, scale="cpu")).keys() == {
        f"einsum {parse_theta(t).canonical()}" for t in thetas
    }


def test_summary_is_short_and_has_the_verdicts() -> None:
    lines = summary_lines(analyse(study(PLANTED), scale="cpu"))
    assert len(lines) < 15
    assert any("ω = 0, ψ < 1: worse than" in line for line in lines)
    assert any("compute multiplier" in line for line in lines)
