"""The best structure for a budget: what wins, what ties with it, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nas.analysis import Answer, best_for_budget, predict_for_budget
from nas.analysis.predict import PredictedAnswer, greatest_runnable, predicted_rival
from nas.designs.design import Design
from nas.designs.taxonomy import parse_theta
from nas.errors import NotFound
from nas.planning.cost import train_flops_per_step
from nas.planning.recipe import TEXT, Recipe
from nas.planning.runs import RunPlan, plans
from nas.records.answers import Multiplier
from nas.store import Run, StoredPoint

STEP = 0.01  # FLOPs of a step
DENSE, DENSE_THETA, MONARCH = "dense", parse_theta("dense"), parse_theta("monarch")
#: What every run shares on a sample, and what is left of it in a single run.
_SHARED = np.random.default_rng(0).normal(0, 0.5, 200)


def run(
    trial: int, points: Sequence[tuple[float, float]], *, structure: str = "monarch",
    width: int = 32, seed: int = 0, kind: str = "candidate", **fields: Any,
) -> Run:  # fmt: skip
    """A completed run from its (train FLOPs, loss) points."""
    theta = parse_theta(structure)
    values: dict[str, Any] = {
        "trial_id": trial, "search_id": "s", "number": trial, "kind": kind,
        "dense": structure == DENSE, "name": structure, "theta": list(theta.values),
        "design": theta.text,
        "model": f"{structure} {width}", "width": width,
        "depth": 2, "steps": round(points[-1][0] / STEP), "seed": seed,
        "train_flops_per_step": STEP, "inference_flops": 10.0 * width, "params": width,
        "step_seconds": None, "peak_memory": None,
        "points": tuple(
            StoredPoint(round(f / STEP), f, y, 0.03, f, ()) for f, y in points
        ),
        **fields,
    }  # fmt: skip
    return Run.model_construct(**values)  # steps of less than a FLOP


def samples(keys: Sequence[tuple[int, int]]) -> list[tuple[float, ...]]:
    """Losses that differ a lot between samples and little between runs on one sample."""
    rows = []
    for trial, step in keys:
        row = _SHARED + np.random.default_rng(trial * 1000 + step).normal(0, 0.02, 200)
        rows.append(tuple(OFFSETS.get(trial, 2.0) + row - row.mean()))
    return rows


OFFSETS: dict[int, float] = {}


@pytest.fixture(autouse=True)
def no_offsets() -> None:
    OFFSETS.clear()


def ask(runs: Sequence[Run], budget: float, **options: Any) -> Answer:
    return best_for_budget(runs, budget, samples, **options)


def power_law(trial: int, scale: float, exponent: float = 0.25, **fields: Any) -> Run:
    """loss = scale · flops^(-exponent) at four doublings up to 16."""
    points = [(f, scale * f**-exponent) for f in (2.0, 4.0, 8.0, 16.0)]
    return run(trial, points, **fields)


# --- what wins


def test_the_lowest_run_within_the_budget_wins() -> None:
    runs = [run(1, [(10.0, 2.5)], structure=DENSE), run(2, [(10.0, 2.2)]),
            run(4, [(10.5, 1.5)], structure="kronecker")]  # fmt: skip
    answer = ask(runs, 10.0)
    assert (answer.best.run.trial_id, answer.best.loss) == (2, 2.2)
    assert answer.best_dense is not None
    assert answer.best_dense.run.trial_id == 1
    with pytest.raises(NotFound):
        ask(runs, 5.0)
    assert ask(runs, 10.5).best.run.trial_id == 4


def test_between_evaluations_a_curve_is_straight_in_log_log() -> None:
    answer = ask([power_law(1, 4.0)], 6.0)
    assert answer.best.loss == pytest.approx(4.0 * 6.0**-0.25)
    assert answer.best.steps == 600
    assert answer.best.train_flops == 6.0


def test_past_its_end_a_run_is_what_it_was() -> None:
    """A shorter run is within a larger budget, and what it would become is not known."""
    long = run(2, [(10.0, 3.0), (40.0, 2.9)], structure="kronecker")
    answer = ask([power_law(1, 4.0), long], 40.0)
    assert (answer.best.run.trial_id, answer.best.loss) == (1, 2.0)
    assert (answer.best.train_flops, answer.best.steps) == (16.0, 1600)


def test_a_run_that_rises_again_is_read_at_its_lowest() -> None:
    rising = run(1, [(2.0, 3.0), (4.0, 2.0), (8.0, 2.5)])
    answer = ask([rising], 8.0)
    assert (answer.best.loss, answer.best.steps, answer.best.train_flops) == (2.0, 400, 4.0)


@given(st.permutations(range(6)))
def test_the_order_of_rows_does_not_matter(order: list[int]) -> None:
    runs = [
        power_law(i, 4.0 + 0.01 * i, structure=(DENSE, "monarch", "kronecker")[i % 3], seed=i // 3)
        for i in range(6)
    ]
    assert ask([runs[i] for i in order], 11.0) == ask(runs, 11.0)


# --- seeds


def replicated(base: int, losses: Iterable[float], **fields: Any) -> list[Run]:
    return [run(base + s, [(10.0, y)], seed=s, **fields) for s, y in enumerate(losses)]


def test_runs_of_a_model_are_averaged_over_seeds() -> None:
    runs = replicated(0, [2.0, 2.2, 2.1]) + replicated(10, [2.6, 2.4, 2.5], structure=DENSE)
    answer = ask(runs, 10.0)
    assert answer.best.seeds == 3
    assert answer.best.loss == pytest.approx((2.0 * 2.2 * 2.1) ** (1 / 3))
    assert answer.interval is not None
    assert answer.noise is not None
    assert answer.noise.degrees == 4
    logs = [np.log([2.0, 2.2, 2.1]), np.log([2.6, 2.4, 2.5])]
    pooled = math.sqrt(sum(float(v.var(ddof=1)) for v in logs) / 2)
    assert answer.noise.sd == pytest.approx(pooled)
    half = 2.7764451 * pooled / math.sqrt(3)
    assert answer.interval == pytest.approx(
        (answer.best.loss * math.exp(-half), answer.best.loss * math.exp(half))
    )


def test_a_single_run_has_no_interval_over_runs() -> None:
    answer = ask([power_law(1, 4.0)], 16.0)
    assert answer.interval is None
    assert answer.noise is None
    assert answer.indistinguishable == ()
    assert answer.multiplier is None


def test_equal_seeds_are_one_run() -> None:
    """The same model with the same seed in two searches is no second opinion."""
    runs = [run(1, [(10.0, 2.0)]), run(2, [(10.0, 2.0), (20.0, 1.9)])]
    answer = ask(runs, 10.0)
    assert answer.best.seeds == 1
    assert answer.interval is None


def test_confirmations_take_the_place_of_the_runs_that_were_chosen() -> None:
    lucky = run(1, [(10.0, 1.8)])
    fresh = [run(10 + s, [(10.0, y)], seed=s + 1, kind="confirmation")
             for s, y in enumerate((2.2, 2.3, 2.25))]  # fmt: skip
    answer = ask([lucky, *fresh], 10.0)
    assert answer.best.confirmed
    assert answer.best.seeds == 3
    assert answer.best.loss > 2.2


def test_what_was_confirmed_comes_before_what_was_not() -> None:
    """One fresh seed each: the runs that were chosen are now higher than one nobody looked at."""
    names = ["monarch", "kronecker", "low-rank:rho=0.5"]
    runs = [run(i, [(10.0, 2.0 + i / 200)], structure=n) for i, n in enumerate(names)]
    runs += [run(10 + i, [(10.0, 2.03 + i / 200)], structure=n, seed=1, kind="confirmation")
             for i, n in enumerate(names)]  # fmt: skip
    OFFSETS.update({10: 2.03, 20: 2.015})
    answer = ask([*runs, run(20, [(10.0, 2.015)], structure="low-rank:rho=0.25")], 10.0)
    assert answer.best.confirmed
    assert answer.best.run.name == "monarch"


def test_none_of_many_rivals_is_left_out() -> None:
    """A hundred structures that are equally good: all of them cannot be told apart."""
    rng = np.random.default_rng(4)
    runs = [
        r
        for i in range(100)
        for r in replicated(
            i * 10, 2.0 * np.exp(rng.normal(0, 0.02, 2)), structure=f"low-rank:rho=0.{i:03d}"
        )
    ]
    answer = ask(runs, 10.0)
    assert answer.compared == 99
    assert len(answer.indistinguishable) >= 95


def test_two_losses_far_apart_give_a_number_all_the_same() -> None:
    """One degree of freedom and many rivals: intervals past any float stay finite."""
    runs = [run(i, [(10.0, 2.0)], structure=f"low-rank:rho=0.{i:03d}") for i in range(60)]
    runs.append(run(90, [(10.0, 60.0)], structure="low-rank:rho=0.003", seed=1))
    answer = ask(runs, 10.0)
    assert all(
        r.difference_interval is not None and all(map(math.isfinite, r.difference_interval))
        for r in answer.indistinguishable
    )


def test_one_lucky_run_does_not_beat_several() -> None:
    several = replicated(0, [2.0, 2.1, 1.9, 2.0])
    a_little_lower = run(20, [(10.0, 1.95)], structure="kronecker")
    answer = ask([*several, a_little_lower], 10.0)
    assert answer.best.run.name == "monarch"
    assert [r.name for r in answer.indistinguishable] == ["kronecker"]
    far_lower = run(20, [(10.0, 1.0)], structure="kronecker")
    answer = ask([*several, far_lower], 10.0)
    assert answer.best.run.name == "kronecker"
    assert answer.indistinguishable == ()


def test_the_set_that_cannot_be_told_apart_holds_the_best_as_often_as_it_says() -> None:
    """Eight structures, two of them equally good, seeds of 2% noise: nearly always both are in."""
    rng = np.random.default_rng(2)
    names = ["monarch", "kronecker", DENSE, *(f"low-rank:rho=0.{i}" for i in range(1, 6))]
    truth = [2.0, 2.0, 2.05, 2.1, 2.2, 2.3, 2.5, 3.0]
    held, sizes = 0, []
    for _ in range(300):
        runs = [
            r
            for i, (name, mean) in enumerate(zip(names, truth, strict=True))
            for r in replicated(i * 10, mean * np.exp(rng.normal(0, 0.02, 4)), structure=name)
        ]
        answer = ask(runs, 10.0)
        chosen = {answer.best.run.name, *(r.name for r in answer.indistinguishable)}
        held += {"monarch", "kronecker"} <= chosen
        sizes.append(len(chosen))
    assert held / 300 >= 0.95
    assert np.median(sizes) <= 4


def test_one_seed_each_is_compared_sample_by_sample() -> None:
    OFFSETS.update({1: 2.0, 2: 2.001, 3: 2.02, 4: 2.1})
    names = {1: "monarch", 2: "kronecker", 3: "low-rank:rho=0.5", 4: DENSE}
    runs = [run(t, [(10.0, OFFSETS[t])], structure=name) for t, name in names.items()]
    answer = ask(runs, 10.0)
    # the loss itself is uncertain by far more than the differences that are resolved
    assert answer.validation_interval is not None
    assert answer.validation_interval[1] - answer.validation_interval[0] > 0.1
    assert [r.trial_id for r in answer.indistinguishable] == [2]
    assert answer.dense_difference is not None
    assert answer.dense_difference.difference_interval is not None
    low, high = answer.dense_difference.difference_interval
    assert 0.09 < low < 0.1 < high < 0.11
    assert answer.interval is None


# --- multiplier


def test_the_multiplier_of_known_power_laws() -> None:
    # structured layers need half the compute: scale ratio 2^(-1/4)
    runs = [power_law(1, 4.0, structure=DENSE), power_law(2, 4.0 * 2**-0.25)]
    answer = ask(runs, 16.0)
    assert answer.multiplier is not None
    assert answer.multiplier.kind == "exact"
    assert answer.multiplier.value == pytest.approx(2.0)
    assert answer.multiplier.interval is None  # one seed


def test_the_interval_of_the_multiplier_is_over_seeds() -> None:
    runs = []
    for seed, scale in enumerate((1.0, 1.02, 0.99)):
        runs.append(power_law(10 + seed, 4.0 * scale, structure=DENSE, seed=seed))
        runs.append(power_law(20 + seed, 4.0 * 2**-0.25, seed=seed))
    multiplier = ask(runs, 16.0).multiplier
    assert multiplier is not None
    assert multiplier.interval is not None
    assert multiplier.seeds == 3
    assert multiplier.interval[0] < 2.0 < multiplier.interval[1]
    # of each seed 2 · scale^4, where dense of that seed reaches what it reaches
    assert multiplier.value == pytest.approx(2 * math.prod((1.0, 1.02, 0.99)) ** (4 / 3))


def test_a_multiplier_is_censored_where_structured_curves_begin_too_low() -> None:
    runs = [power_law(1, 4.0, structure=DENSE), run(2, [(8.0, 1.0)])]
    multiplier = ask(runs, 16.0).multiplier
    assert multiplier is not None
    assert (multiplier.kind, multiplier.interval) == ("at_least", None)
    assert multiplier.value == pytest.approx(2.0)
    # asking for more than was measured does not make dense spend more
    assert ask(runs, 1e6).multiplier == multiplier


def test_a_multiplier_is_bounded_above_where_dense_is_never_reached() -> None:
    answer = ask([power_law(1, 2.0, structure=DENSE), power_law(2, 4.0)], 16.0)
    assert answer.structured_multiplier is not None
    assert answer.structured_multiplier.kind == "less_than"
    assert answer.structured_multiplier.value == pytest.approx(1.0)
    assert answer.multiplier == Multiplier(value=1.0, kind="exact", interval=(1.0, 1.0), seeds=1)


# --- seconds

CPU = "cpu, 1 thread, float32"


def timed(of: Run, per_flop: float, device: str | None = CPU, together: int = 1) -> Run:
    """The run, whose seconds are in proportion to its FLOPs."""
    points = [replace(p, train_seconds=p.train_flops * per_flop) for p in of.points]
    changes = {"points": tuple(points), "device": device, "together": together}
    return of.model_copy(update=changes)


@given(
    saved=st.floats(0.6, 1.9), slower=st.floats(0.1, 5.0), exponent=st.floats(0.1, 1.0),
    seeds=st.integers(1, 3), share=st.floats(0.8, 1.0),
)  # fmt: skip
def test_the_realised_multiplier_is_what_slowness_leaves_of_the_saving(
    saved: float, slower: float, exponent: float, seeds: int, share: float
) -> None:
    """At 1/saved of the FLOPs and `slower` times the seconds of a FLOP, in either budget."""
    runs = []
    for seed in range(seeds):
        of_dense = power_law(10 + seed, 4.0, exponent, structure=DENSE, seed=seed)
        own = power_law(20 + seed, 4.0 * saved**-exponent, exponent, seed=seed)
        runs += [timed(of_dense, 1.0), timed(own, slower)]
    for budget, axis in ((16.0 * share, "train_flops"), (16.0 * share, "train_seconds")):
        found = ask(runs, budget, axis=axis)
        multiplier, realised = found.structured_multiplier, found.structured_realised
        assert multiplier is not None
        assert realised is not None
        if multiplier.kind == "exact":
            assert multiplier.value == pytest.approx(saved)
            assert realised.value == pytest.approx(saved / slower)
            assert (realised.interval is None) == (seeds == 1)
        assert (realised.kind, realised.seeds) == (multiplier.kind, seeds)
        assert (realised.device, realised.together) == (CPU, [1])


@given(
    scale=st.floats(1e-3, 1e3), budget=st.floats(2.0, 40.0),
    losses=st.lists(st.integers(500, 4000), min_size=30, max_size=30, unique=True),
    lengths=st.lists(st.integers(2, 5), min_size=6, max_size=6),
)  # fmt: skip
def test_where_seconds_are_in_proportion_to_flops_both_budgets_have_one_answer(
    scale: float, budget: float, losses: list[int], lengths: list[int]
) -> None:
    runs = []
    for i, length in enumerate(lengths):
        points = [(2.0 ** (k + 1), losses[5 * i + k] / 1000) for k in range(length)]
        structure = (DENSE, "monarch", "kronecker")[i % 3]
        runs.append(timed(run(i, points, structure=structure, seed=i // 3), scale))
    in_flops, in_seconds = ask(runs, budget), ask(runs, budget * scale, axis="train_seconds")
    assert in_seconds.best.run == in_flops.best.run
    assert in_seconds.best.loss == pytest.approx(in_flops.best.loss)
    for one, other in zip(in_seconds.best.readings, in_flops.best.readings, strict=True):
        assert (one.run, one.steps) == (other.run, other.steps)
        assert one.train_flops == pytest.approx(other.train_flops)
        assert one.train_seconds == pytest.approx(one.train_flops * scale)
    assert in_seconds.compared == in_flops.compared
    for name in ("multiplier", "structured_multiplier", "realised", "structured_realised"):
        found, again = getattr(in_flops, name), getattr(in_seconds, name)
        assert (found is None) == (again is None)
        if found is not None:
            assert (found.kind, found.seeds) == (again.kind, again.seeds)
            assert found.value == pytest.approx(again.value)


def test_a_budget_of_seconds_reads_curves_in_seconds() -> None:
    """Half the FLOPs and twice the seconds: lower within the FLOPs, higher within the seconds."""
    own = timed(power_law(2, 4.0 * 2**-0.25), 4.0)
    runs = [timed(power_law(1, 4.0, structure=DENSE), 1.0), own]
    within_flops, within_seconds = ask(runs, 16.0), ask(runs, 16.0, axis="train_seconds")
    assert (within_flops.best.run.name, within_seconds.best.run.name) == ("monarch", "dense")
    best = within_seconds.best_structured
    assert best is not None
    assert best.loss == pytest.approx(4.0 * 2**-0.25 * 4.0**-0.25)  # 4 FLOPs in 16 seconds
    assert best.train_flops == pytest.approx(4.0)
    assert best.train_seconds == pytest.approx(16.0)
    assert best.steps == 400
    found = ask(runs, 16.0)
    assert found.multiplier is not None
    assert found.realised is not None
    assert found.multiplier.value == pytest.approx(2.0)
    assert found.realised.value == pytest.approx(0.5)


def test_a_fast_seed_counts_within_a_budget_that_only_slow_ones_reach() -> None:
    runs = [timed(power_law(i, 4.0, seed=i), speed) for i, speed in enumerate((0.5, 1.0, 2.0))]
    best = ask(runs, 20.0, axis="train_seconds").best
    assert best.seeds == 3
    assert [r.train_flops for r in best.readings] == pytest.approx([16.0, 16.0, 10.0])
    assert best.train_flops == pytest.approx(14.0)
    # a shorter run says nothing of what it would be after more steps
    short = timed(run(7, [(2.0, 3.6), (4.0, 3.4)], seed=7), 1.0)
    assert ask([*runs, short], 20.0, axis="train_seconds").best.seeds == 3
    assert ask([*runs, short], 4.0, axis="train_seconds").best.seeds == 4


def test_the_realised_multiplier_compares_the_runs_of_the_compute_multiplier() -> None:
    """A dense model that is better in seconds, and worse in FLOPs, is not the one compared."""
    dense = timed(power_law(1, 4.0, structure=DENSE), 1.0)
    quick = timed(power_law(3, 4.2, structure=DENSE, width=64), 0.01)
    own = timed(power_law(2, 4.0 * 2**-0.25), 1.0)
    found = ask([dense, quick, own], 16.0)
    assert found.realised is not None
    assert found.realised.value == pytest.approx(2.0)
    in_seconds = ask([dense, quick, own], 16.0, axis="train_seconds")
    assert in_seconds.best.run == own


def test_without_seconds_or_on_two_devices_nothing_is_realised() -> None:
    dense, own = power_law(1, 4.0, structure=DENSE), power_law(2, 4.0 * 2**-0.25)
    for pair, reason in (
        ((dense, own), "no measured seconds"),
        ((timed(dense, 1.0), timed(own, 1.0, None)), "no measured seconds"),
        ((timed(dense, 1.0), timed(own, 0.0)), "no measured seconds"),
        ((timed(dense, 1.0), timed(own, 1.0, "cuda")), f"different devices: {CPU} | cuda"),
    ):
        found = ask(pair, 16.0)
        assert found.multiplier is not None
        assert found.multiplier.value == pytest.approx(2.0)
        assert found.realised is not None
        assert (found.realised.value, found.realised.kind) == (None, "undetermined")
        assert (found.realised.interval, found.realised.seeds) == (None, 0)
        assert reason in str(found.realised.reason)
    # seeds of which it is known count, on the device of most of them
    runs = []
    for seed, device in enumerate((CPU, "cuda", "cuda", None)):
        runs.append(timed(power_law(10 + seed, 4.0, structure=DENSE, seed=seed), 1.0, device))
        own = power_law(20 + seed, 4.0 * 2**-0.25, seed=seed)
        runs.append(timed(own, 1.0 + seed, device, together=2))
    found = ask(runs, 16.0)
    assert found.multiplier is not None
    assert found.realised is not None
    assert (found.multiplier.seeds, found.realised.seeds) == (4, 2)
    assert (found.realised.device, found.realised.together) == ("cuda", [1, 2])
    assert found.realised.value == pytest.approx(2.0 / math.sqrt(2 * 3))
    assert found.best.device is None
    assert found.best.train_seconds is None


def test_bounds_stay_bounds_in_seconds() -> None:
    dense = timed(power_law(1, 4.0, structure=DENSE), 1.0)
    low = ask([dense, timed(run(2, [(8.0, 1.0)]), 3.0)], 16.0).realised
    assert low is not None
    assert (low.kind, low.interval) == ("at_least", None)
    assert low.value == pytest.approx(16 / 24)
    never = ask([timed(power_law(1, 2.0, structure=DENSE), 1.0), timed(power_law(2, 4.0), 3.0)], 16)
    assert never.structured_realised is not None
    assert never.structured_realised.kind == "less_than"
    assert never.structured_realised.value == pytest.approx(1 / 3)
    assert never.realised is not None
    assert (never.realised.value, never.realised.device) == (1.0, CPU)


# --- other budgets


def test_a_budget_of_parameters_takes_runs_at_their_ends() -> None:
    runs = [run(1, [(5.0, 3.0), (10.0, 2.0)], width=64), run(2, [(90.0, 2.4)], width=32),
            run(3, [(50.0, 2.6)], width=16, structure=DENSE)]  # fmt: skip
    answer = ask(runs, 40.0, axis="params")
    assert (answer.best.run.trial_id, answer.best.train_flops) == (2, 90.0)
    assert answer.multiplier is None
    with pytest.raises(NotFound):
        ask(runs, 10.0, axis="params")
    with pytest.raises(NotFound):
        ask(runs, 1e9, axis="step_seconds")


# --- predictions


#: Any length will do, and there is no other width: what a recipe refuses is tested for itself.
ENDLESS = replace(TEXT, max_steps=1 << 30, head_dim=1, min_width=31, max_width=33)


def long_law(trial: int, scale: float, exponent: float, **fields: Any) -> Run:
    points = [(f, scale * f**-exponent) for f in np.geomspace(1e9, 1e12, 12)]
    theta = parse_theta(fields.get("structure", "monarch"))
    per_step = train_flops_per_step(TEXT, theta, fields.get("width", 32))
    return run(trial, points, train_flops_per_step=per_step, **fields)


def predict(
    runs: Sequence[Run], budget: float, greatest: float, recipe: Recipe = ENDLESS
) -> PredictedAnswer | None:
    return predict_for_budget(runs, budget, greatest, recipe)


def test_past_the_data_the_laws_are_extrapolated() -> None:
    """Dense is better within the data and steeper laws win beyond."""
    runs = [
        r
        for s in range(3)
        for r in (
            long_law(10 + s, 40.0 * (1 + s / 200), 0.10, structure=DENSE, seed=s),
            long_law(20 + s, 90.0 * (1 - s / 200), 0.13, seed=s),
        )
    ]
    answer = predict(runs, 1e14, 1e12)
    assert answer is not None
    assert answer.best.run.name == "monarch"
    assert answer.best.loss == pytest.approx(90.0 * 1e14**-0.13, rel=0.01)
    assert answer.best.interval is not None
    assert answer.best.interval[0] < answer.best.loss < answer.best.interval[1]
    assert answer.best.seeds == 3
    # the mean runs of the seeds: scales 1.005 and 0.995 times those above
    needed = (40.2 * 1e14**-0.10 / 89.55) ** (-1 / 0.13)
    assert answer.multiplier is not None
    assert answer.multiplier.value == pytest.approx(1e14 / needed, rel=0.01)
    assert answer.multiplier.value is not None
    assert answer.multiplier.interval is not None
    assert answer.multiplier.interval[0] < answer.multiplier.value < answer.multiplier.interval[1]
    assert answer.indistinguishable == ()


def test_the_longest_runs_are_extrapolated() -> None:
    """An earlier search at a smaller budget, and confirmations there, hide no longer run."""
    short = [long_law(i, 40.0, 0.10, structure=DENSE) for i in (1, 2)]
    half = [(p.train_flops, p.loss) for p in short[0].points][:8]
    runs = [
        run(1, half, structure=DENSE),
        *(run(2 + s, half, structure=DENSE, seed=1 + s, kind="confirmation") for s in range(3)),
        long_law(9, 40.0, 0.10, structure=DENSE),
        long_law(10, 41.0, 0.10),
    ]
    answer = predict(runs, 2e12, 1e12)
    assert answer is not None
    assert answer.best_dense is not None
    assert answer.best_dense.loss == pytest.approx(40.0 * 2e12**-0.10, rel=1e-3)
    assert answer.multiplier is not None


def test_far_predictions_of_wide_intervals_stay_numbers() -> None:
    rng = np.random.default_rng(0)
    for _ in range(4):
        runs = [
            long_law(10 * i + s, 3.0 * math.exp(rng.normal(0, 0.1)), float(rng.uniform(0.01, 0.2)),
                     structure=name, seed=s)
            for i, name in enumerate((DENSE, "monarch")) for s in range(2)
        ]  # fmt: skip
        answer = predict(runs, 9e14, 1e12)
        assert answer is not None
        for r in answer.indistinguishable:
            interval = r.difference_interval
            assert interval is None or all(map(math.isfinite, interval))


def test_an_interval_that_begins_at_zero_is_compared_all_the_same() -> None:
    runs = [long_law(1, 40.0, 0.10, structure=DENSE), long_law(2, 41.0, 0.10)]
    answer = predict(runs, 2e12, 1e12)
    assert answer is not None
    assert answer.best_structured is not None
    for loss in (0.3, 2.0, 7.0):
        best = replace(answer.best, loss=loss, interval=(0.0, 9.0))
        other = replace(answer.best_structured, loss=2 * loss, interval=(0.0, 20.0))
        interval = predicted_rival(best, other).difference_interval
        assert interval is not None
        assert interval[0] < 0 < interval[1]
        assert all(map(math.isfinite, interval))


def test_one_seed_claims_no_interval_of_a_prediction() -> None:
    runs = [long_law(1, 40.0, 0.10, structure=DENSE), long_law(2, 41.0, 0.10)]
    answer = predict(runs, 2e12, 1e12)
    assert answer is not None
    assert answer.best.interval is None
    assert [r.difference_interval for r in answer.indistinguishable] == [None]
    assert answer.structured_multiplier is not None
    assert answer.structured_multiplier.value is None
    assert answer.structured_multiplier.interval is None
    assert "one seed" in str(answer.structured_multiplier.reason)


def chinchilla(plan: RunPlan, steps: int) -> float:
    """A loss that size and data lower, each by a power law of its own; dense needs more data."""
    size, data = plan.train_flops_per_step / TEXT.tokens_per_step, steps * TEXT.tokens_per_step
    loss: float = 0.9 + 20.0 * size**-0.25 + (30.0 if plan.dense else 28.0) * data**-0.3
    return loss


def across_widths(base: int, structure: str, seeds: int, rng: np.random.Generator) -> list[Run]:
    """What the service would run at 2e11 train FLOPs, at every other width, with seed noise."""
    runs: list[Run] = []
    for plan in plans(TEXT, parse_theta(structure), 2e11)[:: 1 if structure == DENSE else 2]:
        steps = sorted({round(plan.steps / 2 ** (i / 2)) for i in range(8)})
        for seed in range(seeds):
            own = math.exp(rng.normal(0, 0.004))
            points = [
                (float(k * plan.train_flops_per_step), own * chinchilla(plan, k)) for k in steps
            ]
            found = run(base + len(runs), points, structure=structure, width=plan.width, seed=seed)
            cost = plan.train_flops_per_step
            runs.append(
                found.model_copy(update={"train_flops_per_step": cost, "steps": plan.steps})
            )
    return runs


@pytest.mark.parametrize("budget", [3e11, 1e12])
def test_a_prediction_is_a_run_that_the_service_would_make(budget: float) -> None:
    """Its loss and the multiplier lie within their intervals nearly always."""
    rng, held = np.random.default_rng(1), []
    best: dict[Design, float] = {
        d: min(chinchilla(p, p.steps) for p in plans(TEXT, d, budget))
        for d in (DENSE_THETA, MONARCH)
    }
    needed = min(
        b for b in np.geomspace(budget / 8, budget, 60)
        if min(chinchilla(p, p.steps) for p in plans(TEXT, MONARCH, b)) <= best[DENSE_THETA]
    )  # fmt: skip
    for _ in range(3):
        runs = across_widths(0, DENSE, 3, rng) + across_widths(50, "monarch", 3, rng)
        answer = predict(runs, budget, 2e11, TEXT)
        assert answer is not None
        for found in (answer.best_dense, answer.best_structured):
            assert found is not None
            assert found.interval is not None
            assert found.plan in plans(TEXT, found.plan.design, budget)
            truth = chinchilla(found.plan, found.plan.steps)
            assert found.loss == pytest.approx(truth, rel=0.04)
            assert truth == pytest.approx(best[found.plan.design], rel=0.04)
            held.append(found.interval[0] <= truth <= found.interval[1])
        multiplier = answer.structured_multiplier
        assert multiplier is not None
        assert multiplier.value is not None
        assert multiplier.interval is not None
        held.append(multiplier.interval[0] <= budget / needed <= multiplier.interval[1])
    assert sum(held) / len(held) >= 0.9


def test_nothing_is_predicted_that_would_take_more_steps_than_the_recipe_has() -> None:
    runs = across_widths(0, "monarch", 1, np.random.default_rng(2))
    most = greatest_runnable(runs, TEXT)
    answer = predict(runs, most, 2e11, TEXT)
    assert answer is not None
    assert (answer.best.plan.width, answer.best.plan.steps) == (max(r.width for r in runs), 4000)
    assert predict(runs, most * 1.01, 2e11, TEXT) is None


def test_dense_is_not_predicted_at_a_width_that_makes_structures_look_good() -> None:
    rng = np.random.default_rng(3)
    wide = [r for r in across_widths(0, DENSE, 3, rng) if r.width >= 80]
    answer = predict([*wide, *across_widths(50, "monarch", 3, rng)], 1e12, 2e11, TEXT)
    assert answer is not None
    assert (answer.best_dense, answer.left_out) == (None, 1)
    assert answer.structured_multiplier is not None
    assert answer.structured_multiplier.value is None
    assert "dense is not extrapolated" in str(answer.structured_multiplier.reason)


def test_the_width_grows_with_compute_as_it_does_in_the_data() -> None:
    """Each of three widths is best over a third of the measured range, the widest at its end."""
    flops, runs = np.geomspace(1e10, 2e11, 6).tolist(), []
    for i, width in enumerate((64, 96, 128)):
        points = [(f, 40 * f**-0.1 * (1.0 if k // 2 == i else 1.1)) for k, f in enumerate(flops)]
        cost = train_flops_per_step(TEXT, MONARCH, width)
        runs.append(run(i, points, width=width, train_flops_per_step=cost))
    answer = predict(runs, 8e11, 2e11, TEXT)
    assert answer is not None
    assert answer.best.widths == 2  # of the third, a run at this budget would be too long
    assert 128 < answer.best.plan.width < 256
    assert answer.best.plan in plans(TEXT, MONARCH, 8e11)
    assert answer.best.loss == pytest.approx(40 * 8e11**-0.1, rel=1e-3)


def test_nothing_is_extrapolated_from_too_little() -> None:
    assert predict([run(1, [(5.0, 2.0), (10.0, 1.9)])], 100.0, 10.0) is None
    rising = run(1, [(2.0, 1.0), (4.0, 1.1), (8.0, 1.2), (10.0, 1.3)])
    assert predict([rising], 100.0, 10.0) is None
