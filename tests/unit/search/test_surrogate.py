"""The model of learning curves where its fit goes wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from nas.search.features import NAMES
from nas.search.surrogate import CurveModel, Observed


def observed() -> tuple[Any, Observed]:
    drawn = np.random.default_rng(0)
    run = np.repeat(np.arange(12), 5)
    c = np.tile(np.linspace(-2, 0, 5), 12)
    y = 0.5 - 0.2 * c + 0.05 * drawn.standard_normal(60) + 0.1 * drawn.standard_normal(12)[run]
    return drawn.uniform(0, 1, (12, len(NAMES))), Observed(run, c, y)


def wild(value: float, fails: bool) -> Callable[..., Any]:
    """A step of the optimiser that ends far away, as a line search may."""

    def step(self: torch.optim.LBFGS, closure: Callable[[], torch.Tensor]) -> None:
        closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.fill_(value)
        if fails:
            raise torch.linalg.LinAlgError("not positive-definite")  # type: ignore[attr-defined]

    return step


@pytest.mark.parametrize("value", [900.0, -900.0, float("nan"), float("inf")])
@pytest.mark.parametrize("fails", [True, False])
def test_a_fit_that_ends_far_away_leaves_a_model_that_predicts(
    monkeypatch: pytest.MonkeyPatch, value: float, fails: bool
) -> None:
    monkeypatch.setattr(torch.optim.LBFGS, "step", wild(value, fails))
    x, points = observed()
    earlier = CurveModel(x, points)
    model = CurveModel(x, points, (earlier,))  # on top of one that went wrong too
    mean, sd = model.curves(x, np.linspace(-2, 0, 5), [(np.array([-2.0]), np.array([0.9]))] * 12)
    assert np.isfinite(mean).all()
    assert (np.isfinite(sd) & (sd > 0)).all()
    assert abs(mean.mean() - points.y.mean()) < 0.5
