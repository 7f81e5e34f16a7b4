"""The layer of any structure, and its execution plan."""

from __future__ import annotations

from typing import Any

import torch

from nas.chain_structure import ChainStructure
from nas.convolution import ConvolutionStructure
from nas.design import Design, structure_of
from nas.layers.chain_linear import ChainLinear
from nas.layers.convolution_linear import ConvolutionLinear
from nas.layers.einsum_linear import EinsumLinear
from nas.layers.mixture_linear import MixtureLinear
from nas.layers.structured import StructuredLinear
from nas.mixture import MixtureStructure
from nas.structure import LinearStructure, Structure


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


def layer_of(design: Design, d_in: int, d_out: int, **options: Any) -> StructuredLinear:
    """A freshly drawn layer d_in → d_out of a design.

    Raises
    ------
    InvalidInput
        As `nas.design.structure_of`.
    """
    return build_layer(structure_of(design, d_in, d_out), **options)


def plan_text(
    structure: LinearStructure, tokens: int, device: torch.device, dtype: torch.dtype
) -> str:
    """The execution plan that the cost models choose for inputs of `tokens` tokens."""
    meta = build_layer(structure, device="meta")
    return str(meta.plan_for(tokens, device, dtype))
