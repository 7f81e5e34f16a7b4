"""Structured linear layers for PyTorch."""

from nas.layers.adapters import load_lora, lora_config
from nas.layers.base import StructuredLinear
from nas.layers.blast import BlastLinear
from nas.layers.block_sparse import BlockSparseLinear
from nas.layers.building import build_layer, layer_of
from nas.layers.chain import ChainLinear
from nas.layers.cola import ActivatedLinear
from nas.layers.convolution import ConvolutionLinear
from nas.layers.counting import forward_flops
from nas.layers.einsum import EinsumLinear
from nas.layers.guiding import SelfGuided
from nas.layers.kernels.machine import use_measured_rates
from nas.layers.kernels.measuring import remember_plans, remembered_plans
from nas.layers.kernels.plan import Plan
from nas.layers.mixture import (
    MixtureFFN,
    MixtureLinear,
    auxiliary_loss,
    router_statistics,
)
from nas.layers.mup import param_groups
from nas.layers.saving import load, save
from nas.layers.sum import SumLinear
from nas.layers.surgery import Surgery, replace_linears

__all__ = [
    "ActivatedLinear",
    "BlastLinear",
    "BlockSparseLinear",
    "ChainLinear",
    "ConvolutionLinear",
    "EinsumLinear",
    "MixtureFFN",
    "MixtureLinear",
    "Plan",
    "SelfGuided",
    "StructuredLinear",
    "SumLinear",
    "Surgery",
    "auxiliary_loss",
    "build_layer",
    "forward_flops",
    "layer_of",
    "load",
    "load_lora",
    "lora_config",
    "param_groups",
    "remember_plans",
    "remembered_plans",
    "replace_linears",
    "router_statistics",
    "save",
    "use_measured_rates",
]
