"""The layer of any structure, and its execution plan."""

from __future__ import annotations

from pkgutil import resolve_name
from typing import Any, Literal, cast

import torch

from nas.designs.design import (
    AT_HEADS,
    Design,
    LinearRole,
    as_design,
    layer_family,
    structure_in,
)
from nas.designs.structure import LinearStructure, Parametrization
from nas.errors import InvalidInput
from nas.layers.base import StructuredLinear
from nas.layers.kernels.plan import Plan, Sized, cost
from nas.rates import current_rates


def build_layer(
    structure: LinearStructure, *, parametrization: Parametrization = "published", **options: Any
) -> StructuredLinear:
    """A freshly drawn layer of a structure; other options as of `nas.layers.EinsumLinear`."""
    made: type[StructuredLinear] = resolve_name(str(layer_family(structure).layer))
    layer = made(structure, structure.d_in, structure.d_out, **options)
    if parametrization != layer.parametrization:
        layer.reparametrize(parametrization)
    return layer


def layer_of(
    design: Design | str,
    d_in: int,
    d_out: int,
    *,
    heads: int | None = None,
    side: str = "out",
    **options: Any,
) -> StructuredLinear:
    """A freshly drawn layer d_in → d_out of a design or its text.

    Parameters
    ----------
    heads
        For a projection of attention in an aligned design: the number of heads that it makes
        (`side` "out": query, key, value) or reads ("in": the output projection).
    options
        As of `nas.layers.EinsumLinear`.

    Raises
    ------
    InvalidInput
        As `structure_of`; heads that do not divide the dimension, or of a design that is not
        aligned.

    >>> layer_of("monarch@heads", 64, 64, heads=4).structure.sizes.phi
    4
    """
    found = as_design(design)
    if heads is not None and not found.text.endswith(AT_HEADS):
        raise InvalidInput("heads", heads, f"none: {found.text} has no {AT_HEADS}")
    role = LinearRole("", d_in, d_out, d_in, heads, cast("Literal['in', 'out']", side))
    return build_layer(structure_in(found, role), **options)


def plan_text(
    structure: LinearStructure, tokens: int, device: torch.device, dtype: torch.dtype
) -> str:
    """The execution plan that the cost models choose for inputs of `tokens` tokens."""
    meta = build_layer(structure, device="meta")
    return str(meta.plan_for(tokens, device, dtype))


#: Numbers of a matrix on a GPU up to which a dense product is faster than several structured ones.
_SMALL_MATRIX = 1 << 19
#: Passes over a matrix and its gradient while they are made and read.
_MATRIX_MOVES = 6


def matrix_pays(structure: LinearStructure, tokens: int, device: torch.device) -> bool:
    """Whether many layers of a structure are matrices, and train faster as these.

    Layers of equal structure are multiplied out together, in a few operations, which saves each
    its own; but their products are then as dear as dense ones.
    """
    if not structure.is_linear:
        return False
    entries = structure.d_in * structure.d_out
    if structure.is_dense or device.type != "cpu":
        return structure.is_dense or entries <= _SMALL_MATRIX
    shape = torch.Size((structure.d_out, structure.d_in))
    dense = Sized.of(structure.d_in, structure.d_out, shape, None)
    rates = current_rates()
    products = cost(Plan("materialised"), dense, tokens)
    making = entries * _MATRIX_MOVES * rates.moved
    apart = build_layer(structure, device="meta").expected_seconds(tokens)
    return bool(products + making <= apart)
