"""The private interfaces of torch that the layers rely on; no other module of layers uses one.

Any release of torch may change them.  What each is for, why no public one serves, and which test
notices a change: `docs/decisions/0006-private-interfaces.md`, which also names the members of
`torch.nn.Module` with an underscore that subclasses override.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def transforms_active() -> bool:
    """Whether `torch.func` or forward-mode differentiation sees the operations that follow.

    The level is asked for, not the stack of transforms, which compiled code takes to be there
    always.
    """
    level = torch._C._functorch.maybe_current_level()
    return level is not None or forward_ad._current_level >= 0


def ragged_dimension(x: Tensor) -> int:
    """The dimension of a nested tensor, in torch's jagged layout, whose sizes differ."""
    ragged: int = x._ragged_idx  # type: ignore[attr-defined]
    return ragged


def is_view(x: Tensor) -> bool:
    """Whether autograd takes x for a view of another tensor."""
    return x._base is not None


def onednn_linear() -> Any:
    """The operator by which `linear_by_onednn` computes; None where this torch has none."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def linear_by_onednn(x: Tensor, weight: Tensor) -> Tensor:
    """x (m, k) · weight (n, k)ᵀ → (m, n), float32 on the CPU."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return y
