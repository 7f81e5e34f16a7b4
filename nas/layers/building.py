"""The layer of any structure, and its execution plan."""

from __future__ import annotations

from typing import Any

import torch

from nas.designs.chain_structure import ChainStructure
from nas.designs.convolution import ConvolutionStructure
from nas.designs.design import Aligned, Design, design_text, parse_design, structure_of, with_heads
from nas.designs.einsum import LinearStructure, Structure
from nas.designs.mixture import MixtureStructure
from nas.errors import InvalidInput
from nas.layers.base import StructuredLinear
from nas.layers.chain import ChainLinear
from nas.layers.convolution import ConvolutionLinear
from nas.layers.einsum import EinsumLinear
from nas.layers.mixture import MixtureLinear


def build_layer(structure: LinearStructure, **options: Any) -> StructuredLinear:
    """A freshly drawn layer of a structure; options as of `nas.layers.EinsumLinear`."""
    d_in, d_out = structure.d_in, structure.d_out
    if isinstance(structure, Structure):
        return EinsumLinear(structure, d_in, d_out, **options)
    if isinstance(structure, MixtureStructure):
        return MixtureLinear(structure, d_in, d_out, **options)
    if isinstance(structure, ChainStructure):
        return ChainLinear(structure, d_in, d_out, **options)
    assert isinstance(structure, ConvolutionStructure)
    return ConvolutionLinear(structure, d_in, d_out, **options)


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
        As `structure_of`; heads that do not divide the dimension, or of a design that
        is not aligned.

    >>> layer_of("monarch@heads", 64, 64, heads=4).structure.sizes.phi
    4
    """
    found = parse_design(design) if isinstance(design, str) else design
    structure = structure_of(found, d_in, d_out)
    if heads is not None:
        if not isinstance(found, Aligned):
            raise InvalidInput("heads", heads, f"none: {design_text(found)} has no @heads")
        structure = with_heads(structure, heads, side)
    return build_layer(structure, **options)


def plan_text(
    structure: LinearStructure, tokens: int, device: torch.device, dtype: torch.dtype
) -> str:
    """The execution plan that the cost models choose for inputs of `tokens` tokens."""
    meta = build_layer(structure, device="meta")
    return str(meta.plan_for(tokens, device, dtype))
