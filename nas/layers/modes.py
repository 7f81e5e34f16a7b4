"""What surrounds a call: function transforms, tracers, nested tensors, autocast."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, fx

from nas.layers.kernels.torch_internals import ragged_dimension
from nas.layers.kernels.torch_internals import transforms_active as transforms_active


def is_recorded(x: Tensor) -> bool:
    """Whether the operations on x are recorded as a program that is to run without this package:
    by `torch.export`, `torch.onnx`, `torch.jit.trace` or `torch.fx`, whose x is a proxy."""
    if torch.compiler.is_compiling():  # torch.compile cannot trace the questions below
        return torch.compiler.is_exporting()
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return tracing or isinstance(x, fx.Proxy)


def reshaped_like(y: Tensor, x: Tensor, width: int) -> Tensor:
    """y (n, width) with the leading dimensions of x, which may be recorded."""
    return y.reshape(x.shape[:-1] + (width,))  # noqa: RUF005 (nothing unpacks a proxy)


def over_nested(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A layer on every vector of a nested tensor, whose ragged dimension is not the last.

    Raises
    ------
    ValueError
        The last dimension is the ragged one.
    """
    if x.layout is not torch.jagged:
        return torch.nested.as_nested_tensor([layer(part) for part in x.unbind()])
    ragged = ragged_dimension(x)
    if ragged == x.dim() - 1:
        raise ValueError("got a nested tensor whose last dimension is ragged")
    offsets, lengths = x.offsets(), x.lengths()  # type: ignore[attr-defined]
    return torch.nested.nested_tensor_from_jagged(layer(x.values()), offsets, lengths, ragged)


def plus_bias(y: Tensor, bias: Tensor) -> Tensor:
    """y + bias, in place where no transform keeps track of y; nothing must have saved y."""
    return y + bias.to(y.dtype) if transforms_active() else y.add_(bias)


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
