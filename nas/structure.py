"""The public name of `nas.designs.einsum`."""

from nas.designs.einsum import Sizes, Structure

__all__ = ["Sizes", "Structure"]
