"""Structured linear layers for PyTorch."""

from nas.layers.einsum_linear import EinsumLinear
from nas.layers.measuring import remember_plans, remembered_plans
from nas.layers.mup import param_groups
from nas.layers.plan import Plan
from nas.layers.surgery import Surgery, replace_linears

__all__ = [
    "EinsumLinear",
    "Plan",
    "Surgery",
    "param_groups",
    "remember_plans",
    "remembered_plans",
    "replace_linears",
]
