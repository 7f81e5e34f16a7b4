"""One operation of torch with a gradient of its own.

Eager code goes through `torch.autograd.Function`; `torch.compile` sees an operator of its own, so
that there is no graph break and the same kernels run.  Callers give function transforms
(`torch.func`), forward-mode and recorded programs plain operations of torch instead, and so does
`Operation` for derivatives of the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nas.layers.kernels.torch_internals import is_view
from nas.layers.modes import without_autocast


class Operation:
    """An operation of some tensors, the last of which may be None, and some options.

    Parameters
    ----------
    name, tensors, options
        The operator's name and the declarations of its arguments in torch's schema language, such
        as ``"Tensor x, Tensor? b"`` and ``"int d_out, str plan"``.
    forward, fake
        Of (*tensors, *options): the result, and an empty tensor like it.
    backward
        Of (*tensors, dy, *options, wanted): the gradient of each tensor, or None for those that are
        not wanted and those that the result does not depend on.
    differentiable
        Of (*tensors, dy, *options): the gradients by differentiable operations of torch.
    """

    def __init__(
        self,
        name: str,
        tensors: str,
        options: str,
        *,
        forward: Callable[..., Tensor],
        fake: Callable[..., Tensor],
        backward: Callable[..., Sequence[Tensor | None]],
        differentiable: Callable[..., Sequence[Tensor | None]],
    ) -> None:
        self.forward, self.differentiable = forward, differentiable
        self._backward = backward
        self.count = count = tensors.count(",") + 1

        def contiguous(*arguments: Any) -> Tensor:
            return forward(*arguments).contiguous()

        def gradients(*arguments: Any) -> list[Tensor]:
            found = self.backward(*arguments)
            return [
                torch.zeros_like(t) if g is None else g.contiguous()
                for g, t, wanted in zip(found, arguments, arguments[-1], strict=False)
                if wanted
            ]

        def fake_gradients(*arguments: Any) -> list[Tensor]:
            pairs = zip(arguments, arguments[-1], strict=False)
            return [t.new_empty(t.shape) for t, wanted in pairs if wanted]

        def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            ctx.options = inputs[count:]
            ctx.save_for_backward(*inputs[:count])

        def differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
            wanted = list(ctx.needs_input_grad[:count])
            found = backward_operator(*ctx.saved_tensors, dy, *ctx.options, wanted)
            # by position, for compiled function transforms cannot trace a generator
            at = [sum(wanted[:i]) for i in range(count)]
            of_tensors = [found[at[i]] if wanted[i] else None for i in range(count)]
            return *of_tensors, *[None for _ in ctx.options]

        operator = torch.library.custom_op(
            f"einsum_nas::{name}",
            contiguous,
            mutates_args=(),
            schema=f"({tensors}, {options}) -> Tensor",
        )
        backward_operator = torch.library.custom_op(
            f"einsum_nas::{name}_backward",
            gradients,
            mutates_args=(),
            schema=f"({tensors}, Tensor dy, {options}, bool[] wanted) -> Tensor[]",
        )
        operator.register_fake(fake)
        backward_operator.register_fake(fake_gradients)
        operator.register_autograd(differentiate, setup_context=keep)
        #: the operator that `torch.compile` sees
        self.compiled: Callable[..., Tensor] = operator

    def eager(self, *arguments: Any) -> Tensor:
        """The result, for options of any type."""
        y: Tensor = _Eager.apply(self, *arguments)  # type: ignore[no-untyped-call]
        return y

    def backward(self, *arguments: Any) -> Sequence[Tensor | None]:
        """What `backward` computes, in the dtype of its tensors wherever it is called."""
        with without_autocast(arguments[0].device):
            return self._backward(*arguments)


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, operation: Operation, *arguments: Any) -> Tensor:
        tensors, ctx.options = arguments[: operation.count], arguments[operation.count :]
        ctx.operation = operation
        ctx.save_for_backward(*tensors)
        y = operation.forward(*arguments)
        return y.clone() if is_view(y) else y  # autograd lets no one write into a view

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        operation, tensors, options = ctx.operation, ctx.saved_tensors, ctx.options
        if torch.is_grad_enabled():  # someone differentiates the gradient
            found = operation.differentiable(*tensors, dy, *options)
        else:
            wanted = ctx.needs_input_grad[1 : 1 + operation.count]
            found = operation.backward(*tensors, dy, *options, wanted)
        return None, *found, *[None for _ in options]
