from __future__ import annotations

import pytest

from benchmarks.from_dense import DESIGNS, WIDTH, step_flops, summary
from nas.designs.taxonomy import parse_theta
from nas.planning.cost import train_flops_per_step
from nas.planning.recipe import TEXT


@pytest.mark.parametrize("design", DESIGNS)
def test_steps_cost_what_budgets_charge_and_the_warm_up_two_dense_products_more(
    design: str,
) -> None:
    plain, guided = step_flops(design)
    assert plain == train_flops_per_step(TEXT, parse_theta(design), WIDTH)
    dense_layers = TEXT.depth * (4 + 2 * TEXT.mlp_ratio) * WIDTH**2
    assert guided - plain == 2 * 2 * dense_layers * TEXT.tokens_per_step
    assert step_flops(None)[0] == train_flops_per_step(TEXT, parse_theta("dense"), WIDTH)


def test_differences_are_paired_by_seed() -> None:
    common = {"design": "monarch", "lr": 1.0, "warm_up": 0, "steps": 1, "train_flops": 1}
    plain = [{"way": "projected", "seed": s, "before": 3.0, "loss": 2.0 + s} for s in range(3)]
    other = [{"way": "self-guided", "seed": s, "before": 3.0, "loss": 1.5 + s} for s in range(3)]
    first, second = summary([common | run for run in (*plain, *other)])
    assert first["over_projected"] is None
    assert second["loss"].value == 2.5
    assert second["loss"].interval[0] < 1.5
    assert second["over_projected"].value == -0.5
    assert second["over_projected"].interval == pytest.approx((-0.5, -0.5))
