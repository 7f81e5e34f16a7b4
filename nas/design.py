"""Public names of `nas.designs.design`."""

from nas.designs.design import Design, inspect_design, parse_design, structure_of

__all__ = ["Design", "design_text", "inspect_design", "parse_design", "structure_of"]


def design_text(design: Design) -> str:
    """The design in full precision, which `parse_design` reads."""
    return design.text
