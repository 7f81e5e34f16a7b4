"""Structured linear layers for PyTorch."""

from nas.layers.einsum_linear import EinsumLinear
from nas.layers.mup import param_groups

__all__ = ["EinsumLinear", "param_groups"]
