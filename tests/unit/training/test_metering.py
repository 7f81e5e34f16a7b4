"""What a training step costs: that the figures are those of the step."""

from __future__ import annotations

import time

import pytest
import torch

from nas.records.trial import MeasuredCost
from nas.training.metering import CostMeter


def stepped(width: int, steps: int, *, seconds: float = 0.0, extra: int = 0) -> CostMeter:
    """A meter after some steps of a linear layer that also allocates `extra` bytes for a while."""
    layer = torch.nn.Linear(width, width, bias=False)
    optimizer = torch.optim.Adam(layer.parameters())
    meter = CostMeter("cpu")
    x = torch.randn(4, width)
    for _ in range(steps):
        with meter.step(optimizer):
            loss = layer(x).square().mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            passing = torch.empty(extra, dtype=torch.uint8)
            del passing
            optimizer.step()
            time.sleep(seconds)
    return meter


@pytest.mark.parametrize("width", [64, 256])
def test_memory_is_what_is_held_and_the_most_of_a_step(width: int) -> None:
    weight = 4 * width**2
    peak = stepped(width, 4).result().peak_memory_bytes
    assert peak is not None
    # weight, its two moments and its gradient at least; the update's own tensors on top
    assert 4 * weight <= peak < 8 * weight + 64 * width
    more = stepped(width, 4, extra=50_000_000).result().peak_memory_bytes
    assert more is not None
    assert 50_000_000 + 3 * weight < more < 50_000_000 + 8 * weight + 64 * width


def test_seconds_are_the_median_step_after_the_first() -> None:
    cost = stepped(8, 14, seconds=0.02).result()
    assert cost.seconds_per_step is not None
    assert cost.seconds_per_step >= 0.02


def test_what_is_too_short_to_tell_is_not_told() -> None:
    cost = stepped(8, 2).result()
    assert cost == MeasuredCost(seconds_per_step=None, peak_memory_bytes=None)
    assert stepped(8, 8).result().seconds_per_step is None


def test_measuring_changes_no_result() -> None:
    def trained(measured: bool) -> torch.Tensor:
        torch.manual_seed(0)
        layer = torch.nn.Linear(16, 16)
        optimizer = torch.optim.Adam(layer.parameters())
        meter = CostMeter("cpu")
        for _ in range(6):
            x = torch.randn(4, 16)

            def step(x: torch.Tensor = x) -> None:
                loss = layer(x).square().mean()
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()

            if measured:
                with meter.step(optimizer):
                    step()
            else:
                step()
        return layer.weight.detach()

    assert torch.equal(trained(True), trained(False))
