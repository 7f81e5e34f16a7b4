"""Structured linear layers for PyTorch."""

from nas.layers.building import build_layer, layer_of
from nas.layers.chain_linear import ChainLinear
from nas.layers.convolution_linear import ConvolutionLinear
from nas.layers.einsum_linear import EinsumLinear
from nas.layers.measuring import remember_plans, remembered_plans
from nas.layers.mixture_linear import (
    MixtureFFN,
    MixtureLinear,
    auxiliary_loss,
    router_statistics,
)
from nas.layers.mup import param_groups
from nas.layers.plan import Plan
from nas.layers.saving import load, save
from nas.layers.structured import StructuredLinear
from nas.layers.surgery import Surgery, replace_linears

__all__ = [
    "ChainLinear",
    "ConvolutionLinear",
    "EinsumLinear",
    "MixtureFFN",
    "MixtureLinear",
    "Plan",
    "StructuredLinear",
    "Surgery",
    "auxiliary_loss",
    "build_layer",
    "layer_of",
    "load",
    "param_groups",
    "remember_plans",
    "remembered_plans",
    "replace_linears",
    "router_statistics",
    "save",
]
