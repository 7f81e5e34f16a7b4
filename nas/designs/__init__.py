"""Designs: how structured linear layers are built, as integers.  Needs no torch.

A family is one file of integers here, one file in `nas.layers` for its layer, and one line below.
Installed packages add families as entry points of the group ``einsum_nas.families``.
"""

from importlib.metadata import entry_points
from pkgutil import resolve_name

from nas.designs.design import register

for _module in (
    "aligned",
    "einsum",
    "chain_structure",
    "mixture",
    "convolution",
    "blast",
    "block_sparse",
    "sum",
    "cola",
):
    register(resolve_name(f"nas.designs.{_module}:FAMILY"))
for _entry in entry_points(group="einsum_nas.families"):
    register(_entry.load())
