"""What plans of mixtures ask of the host."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nas.layers import MixtureLinear
from nas.layers.kernels import mixture_kernels
from nas.layers.kernels.mixture_kernels import Inputs
from nas.layers.kernels.mixture_plan import MixturePlan


def run(plan: str) -> None:
    """Forward and backward by a plan, where no tensor has values."""
    wanted = (True, True, False, True, True)
    with FakeTensorMode():
        layer = MixtureLinear("btt-moe:experts=4,active=2", 32, 48, dtype=torch.bfloat16)
        x, dy = (torch.randn(40, d, dtype=torch.bfloat16) for d in (32, 48))
        chosen, weights = torch.randint(4, (40, 2)), torch.rand(40, 2, dtype=torch.bfloat16)
        inputs = Inputs(x, weights, chosen, layer.A.detach(), layer.B.detach())
        y = mixture_kernels.forward(inputs, 48, MixturePlan.parse(plan), "both")
        found = mixture_kernels.backward(inputs, dy, MixturePlan.parse(plan), "both", wanted)
        assert [None if g is None else g.shape for g in found] == [
            x.shape, weights.shape, None, layer.A.shape, layer.B.shape,
        ]  # fmt: skip
    assert y.shape == (40, 48)


@pytest.mark.parametrize("plan", ["grouping=grouped", "grouping=matrices", "grouping=all tile=8"])
def test_the_host_need_not_know_the_loads(plan: str) -> None:
    """Else a mixture would wait for a GPU, and no CUDA graph could hold it."""
    run(plan)


def test_a_plan_that_asks_for_the_loads_is_noticed() -> None:
    with pytest.raises(RuntimeError, match=r"data-dependent|_local_scalar_dense"):
        run("grouping=batched")
