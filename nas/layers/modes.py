"""What surrounds a call: function transforms, forward-mode derivatives, autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad


def transforms_active() -> bool:
    """Whether `torch.func` or forward-mode differentiation sees the operations that follow.

    Those understand torch's own operations, not a `torch.autograd.Function` around kernels.  The
    level is asked for, not the stack of transforms, which compiled code takes to be there always.
    """
    level = torch._C._functorch.maybe_current_level()
    return level is not None or forward_ad._current_level >= 0


def plus_bias(y: Tensor, bias: Tensor) -> Tensor:
    """y + bias, in place where no transform keeps track of y; nothing must have saved y."""
    return y + bias if transforms_active() else y.add_(bias)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """In it products run in the dtype of their operands, also where autocast is on around it."""
    kind = device.type
    casting = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if casting else nullcontext()


def autocast_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which autocast, if it is on, runs products of tensors of `dtype`.

    Like torch's own, it leaves float64 alone.
    """
    kind = device.type
    if dtype == torch.float64 or not torch.amp.is_autocast_available(kind):
        return dtype
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else dtype
