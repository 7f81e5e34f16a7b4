"""Designs: how structured linear layers are built, as integers.  Needs no torch.

A family is one file of integers here, one file in `nas.layers` for its layer, and one line below.
Installed packages add families as entry points of the group ``einsum_nas.families``.
"""

from importlib.metadata import entry_points

from nas.designs import aligned, chain_structure, convolution, einsum, mixture
from nas.designs.design import register

register(aligned.FAMILY)
register(einsum.FAMILY)
register(chain_structure.FAMILY)
register(mixture.FAMILY)
register(convolution.FAMILY)
for _entry in entry_points(group="einsum_nas.families"):
    register(_entry.load())
