"""Structure-aware learning rates (μP) as optimiser parameter groups."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from nas.layers.einsum_linear import EinsumLinear


def param_groups(
    model: nn.Module, lr: float, extra: dict[Tensor, float] | None = None
) -> list[dict[str, Any]]:
    """Parameter groups for an Adam-type optimiser, one for each distinct learning rate.

    A factor of an `EinsumLinear` gets lr · d_in_base / (2 f_in), its dense matrix
    lr · d_in_base / d_in, every other parameter lr.

    Parameters
    ----------
    model
        Any module.
    lr
        Learning rate tuned on the dense base model.
    extra
        Multipliers of parameters outside `EinsumLinear`, such as an output head.

    Source: arXiv:2406.06248, section 3.2.
    """
    multipliers: dict[Tensor, float] = dict(extra or {})
    for module in model.modules():
        if isinstance(module, EinsumLinear):
            for name, factor in module.factors().items():
                multipliers[factor] = module.structure.adam_lr_multiplier(name, module.d_in_base)
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        groups.setdefault(multipliers.get(parameter, 1.0), []).append(parameter)
    return [{"params": members, "lr": lr * m} for m, members in sorted(groups.items())]
