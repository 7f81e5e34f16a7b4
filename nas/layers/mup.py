"""Structure-aware learning rates (μP) as optimiser parameter groups."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from numbers import Real
from typing import Any

from torch import Tensor, nn

from nas.errors import InvalidInput
from nas.layers.base import StructuredLinear
from nas.layers.surgery import is_conv1d


def param_groups(
    model: nn.Module,
    lr: float,
    extra: dict[Tensor, float] | None = None,
    *,
    base_width: float | None = None,
    width: float | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups for an Adam-type optimiser, one for each distinct learning rate.

    A factor of a structured layer gets lr · d_in_base / (2 f_in), a dense matrix and a gate
    lr · d_in_base / d_in, every other parameter lr.  Every parameter of the model, frozen ones
    too, is in exactly one group.

    Parameters
    ----------
    model
        Any module.
    lr
        Learning rate tuned on the dense base model.
    extra
        Multipliers of parameters outside structured layers, such as an output head; they precede
        all below.
    base_width
        Width of the dense base model at which `lr` was tuned, where this model is wider or
        narrower.  In place of the layers' own d_in_base, a layer with d_in ≥ `width` then has
        d_in_base = d_in · base_width / width; one with d_in < `width` has inputs that do not grow
        with the model, such as features or pixels, and d_in_base = d_in.  The dense matrices of
        `torch.nn.Linear`, `torch.nn.MultiheadAttention` and Hugging Face's `Conv1D` are treated
        alike, lr · d_in_base / d_in.  All else keeps lr: biases, norms, embeddings and what is
        tied to them, convolutions.  Input layers with d_in ≥ `width` cannot be told from hidden
        ones; give their weights the multiplier 1 by `extra`.
    width
        Width of this model.  Default: the min(d_in, d_out) that more than half of its
        structured layers have.

    Raises
    ------
    InvalidInput
        lr, a multiplier or a width that is not a positive number; a multiplier for a parameter
        that the model does not have; `width` without `base_width`; a width that has to be given.

    Source: arXiv:2406.06248, section 3.2; for dense matrices arXiv:2203.03466, table 3.
    """
    _check_positive("lr", lr)
    parameters = list(model.parameters())
    multipliers: dict[Tensor, float] = {}
    if base_width is not None:
        _check_positive("base_width", base_width)
        width = _width(model) if width is None else width
        _check_positive("width", width)
        growth = base_width / width
        for weight, d_in in _dense_matrices(model):
            multipliers[weight] = growth if d_in >= width else 1.0
    elif width is not None:
        raise InvalidInput("width", width, "a width together with base_width")
    known = set(parameters)
    for parameter, multiplier in (extra or {}).items():
        if parameter not in known:
            got = f"a {type(parameter).__name__} of shape {tuple(parameter.shape)}"
            raise InvalidInput("extra", got, "parameters of the model")
        _check_positive("extra", multiplier)
        multipliers[parameter] = multiplier
    for module in model.modules():
        if isinstance(module, StructuredLinear):
            for name, factor in module.factors().items():
                if base_width is None or width is None:
                    multiplier = module.adam_lr_multiplier(name, module.d_in_base)
                else:
                    grows = module.in_features >= width
                    own = module.adam_lr_multiplier(name)
                    multiplier = own * (base_width / width if grows else 1.0)
                multipliers[factor] = multiplier
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault(multipliers.get(parameter, 1.0), []).append(parameter)
    return [{"params": members, "lr": lr * m} for m, members in sorted(groups.items())]


def _check_positive(field: str, value: Any) -> None:
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not (number and math.isfinite(value) and value > 0):
        raise InvalidInput(field, value, "a positive number")


def _width(model: nn.Module) -> int:
    """The narrower side that more than half of the structured layers have."""
    layers = [m for m in model.modules() if isinstance(m, StructuredLinear)]
    sides = Counter(min(m.in_features, m.out_features) for m in layers)
    width, count = max(sides.items(), key=lambda item: item[1], default=(0, 0))
    if 2 * count <= len(layers):
        found = ", ".join(f"{n} layers of {side}" for side, n in sorted(sides.items()))
        raise InvalidInput(
            "width",
            f"None, with {found or 'no structured layer'}",
            "the width of the model where no width is that of most structured layers",
        )
    return width


def _dense_matrices(model: nn.Module) -> Iterator[tuple[Tensor, int]]:
    """Weights outside structured layers that are dense matrices and nothing else, with d_in."""
    found: list[tuple[Tensor | None, int]] = []
    others: set[Tensor] = set()
    for module in model.modules():
        if isinstance(module, StructuredLinear):
            continue
        mine: list[tuple[Tensor | None, int]] = []
        if isinstance(module, nn.Linear):
            mine = [(module._parameters.get("weight"), module.in_features)]
        elif is_conv1d(module):
            conv_weight = module._parameters["weight"]
            assert conv_weight is not None
            mine = [(conv_weight, conv_weight.shape[0])]
        elif isinstance(module, nn.MultiheadAttention):
            sides = {"in": module.embed_dim, "q": module.embed_dim, "k": module.kdim}
            mine = [
                (module._parameters.get(f"{part}_proj_weight"), side)
                for part, side in (sides | {"v": module.vdim}).items()
            ]
        found += mine
        matrices = {weight for weight, _ in mine if weight is not None}
        others.update(p for p in module._parameters.values() if p is not None and p not in matrices)
    for weight, d_in in found:
        if weight is not None and weight not in others:
            yield weight, d_in
