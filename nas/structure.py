"""Public names of `nas.designs.einsum` and `nas.designs.structure`."""

from nas.designs.einsum import Sizes, Structure
from nas.designs.structure import LinearStructure

__all__ = ["LinearStructure", "Sizes", "Structure"]
