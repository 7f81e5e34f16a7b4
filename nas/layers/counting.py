"""Exact forward FLOPs of any PyTorch model, from its shapes alone.

torch's own counter sees every operation of one call on tensors without data.  Structured layers
count as their structures do, which is what search budgets charge.  FLOPs are those of matrix
products and convolutions (1 MAC = 2 FLOPs), as everywhere here; an operation that is neither
counted nor known to have none is refused by its name, so that nothing is left out in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from nas.errors import InvalidInput
from nas.layers.base import StructuredLinear
from nas.layers.mixture import MixtureFFN

#: Names of operations without matrix products, beside views, those of single elements, and
#: those that only make tensors.
_FREE = """
    _unsafe_view _to_copy clone copy copy_ contiguous detach lift_fresh_copy alias resize_
    set_ cat stack repeat repeat_interleave constant_pad_nd roll flip rot90 tril triu
    diag_embed index index_put index_put_ index_add index_select index_copy gather scatter
    scatter_ scatter_add scatter_add_ scatter_reduce select_scatter slice_scatter
    masked_scatter masked_fill masked_select embedding embedding_bag _embedding_bag one_hot
    bincount bucketize searchsorted nonzero unique_dim _unique2 sort topk argsort kthvalue
    max min argmax argmin amax amin aminmax sum mean prod var var_mean std std_mean any all
    count_nonzero cumsum cumprod cummax cummin logcumsumexp logsumexp median norm
    linalg_vector_norm _softmax _log_softmax _safe_softmax softmax log_softmax
    native_layer_norm native_group_norm native_batch_norm _native_batch_norm_legit
    _native_batch_norm_legit_functional _native_batch_norm_legit_no_training _fused_rms_norm
    batch_norm layer_norm rms_norm native_dropout dropout bernoulli bernoulli_ multinomial
    nll_loss_forward nll_loss2d_forward mse_loss binary_cross_entropy avg_pool1d avg_pool2d
    avg_pool3d max_pool2d_with_indices max_pool3d_with_indices _adaptive_avg_pool2d
    _adaptive_avg_pool3d adaptive_max_pool2d upsample_nearest1d upsample_nearest2d
    upsample_bilinear2d upsample_bicubic2d upsample_linear1d _upsample_bilinear2d_aa
    _upsample_bicubic2d_aa reflection_pad1d reflection_pad2d replication_pad1d
    replication_pad2d im2col col2im pixel_shuffle pixel_unshuffle channel_shuffle glu
    _local_scalar_dense item is_same_size sym_size arange linspace logspace full
    scalar_tensor eye tril_indices triu_indices rand randn randint randperm normal normal_
    uniform_ exponential_ fill_ zero_ _assert_async _assert_scalar
"""
_FREE_NAMES = frozenset(_FREE.split())
#: What the names of those begin with that only make tensors.
_MAKES = ("empty", "zeros", "ones", "full", "new_", "rand")


class _Names(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the names of operations that no count is known of."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.unknown: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        packet = func._overloadpacket
        if not (packet in flop_registry or _is_free(func)):
            self.unknown.add(str(packet))
        return func(*args, **(kwargs or {}))


def _is_free(func: Any) -> bool:
    if func.namespace in ("prim", "prims", "profiler"):
        return True
    name = func._overloadpacket.__name__
    return bool(
        func.namespace == "aten"
        and (
            func.is_view
            or torch.Tag.pointwise in func.tags
            or name in _FREE_NAMES
            or name.startswith(_MAKES)
        )
    )


def forward_flops(model: nn.Module, *inputs: Any, **named: Any) -> int:
    """FLOPs of the matrix products of one call of a model: 1 MAC = 2 FLOPs.

    Nothing is computed, no memory is used for values, and the model stays as it is.  Training takes
    three times as many (the gradients of inputs and of weights cost as much as the forward pass).

    Parameters
    ----------
    model
        Any module, structured layers in it or not, such as `replace_linears` has left.
    inputs, named
        What it is called with; of tensors the shapes and types count alone.

    Raises
    ------
    InvalidInput
        The model has an operation of which no count is known, or what it does depends on values.

    >>> from nas.layers import EinsumLinear
    >>> forward_flops(nn.Sequential(nn.Linear(64, 256), nn.GELU()), torch.zeros(2, 64))
    65536
    >>> forward_flops(EinsumLinear("monarch", 64, 64), torch.zeros(2, 64))
    4096
    """
    own = 0

    def add(macs: int) -> None:
        nonlocal own
        own += 2 * macs

    names, counter = _Names(), FlopCounterMode(display=False)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        # attention as products, which the counter knows on every device
        with _counted_by_structure(model, add), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            with fake, counter, names:
                model(*inputs, **named)
    except InvalidInput:
        raise
    except Exception as error:  # of any kind that a model raises
        said = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise InvalidInput(
            "model", type(model).__name__,
            f"a model whose operations depend on the shapes of its inputs alone; it raised {said}",
        ) from error  # fmt: skip
    if names.unknown:
        raise InvalidInput(
            "model", type(model).__name__,
            "a model of operations whose FLOPs are known; unknown are "
            + ", ".join(sorted(names.unknown)),
        )  # fmt: skip
    return int(counter.get_total_flops()) + own


@contextmanager
def _counted_by_structure(model: nn.Module, add: Callable[[int], None]) -> Iterator[None]:
    """Let structured layers tell their MACs instead of computing; blocks of two tell both."""

    def standing_in(module: StructuredLinear | MixtureFFN) -> Callable[[Tensor], Tensor]:
        if isinstance(module, MixtureFFN):
            macs = module.mlp_in.structure.macs + module.mlp_out.structure.macs
            outputs = module.mlp_out.out_features
        else:
            macs, outputs = module.structure.macs, module.out_features

        def forward(x: Tensor) -> Tensor:
            add(macs * (x.numel() // x.shape[-1]))
            return x.new_empty(*x.shape[:-1], outputs)

        return forward

    found = [m for m in model.modules() if isinstance(m, StructuredLinear | MixtureFFN)]
    try:
        for module in found:
            module.__dict__["forward"] = standing_in(module)
        yield
    finally:
        for module in found:
            del module.__dict__["forward"]
