"""Structures as tensor networks: every axis is there, and joins what it joins."""

from __future__ import annotations

import math
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import example, given, settings

from nas.analysis.diagram import network, svg
from nas.designs.design import inspect_design, parse_design
from nas.designs.theta import Theta
from tests.support.strategies import thetas

TEXTS = ("dense", "low-rank", "kronecker", "monarch", "btt", "btt:cores=3,rho=1/8",
         "tensor-train:cores=4,rho=1/4", "btt-moe", "dense-moe")  # fmt: skip


#: Dense at 48 → 96, though its axes of the output multiply to 98.
PADDED = Theta(1.0, 0.0, 0.0, 0.9142857142857143, 0.02857142857142857, 0.05714285714285714, 0.0)


@settings(max_examples=60, deadline=None)
@example(theta=PADDED)
@given(theta=thetas())
def test_axes_of_two_factors_multiply_to_what_they_cover(theta: Theta) -> None:
    found: dict[str, Any] = inspect_design(theta, 48, 96)
    drawn = network(found)
    assert drawn is not None
    for vector, covered in (("x", "padded_in"), ("y", "padded_out")):
        assert math.prod(a.size for a in drawn.axes if vector in a.ends) == found[covered]
    inner = [a for a in drawn.axes if not {"x", "y"} & set(a.ends)]
    assert math.prod(a.size for a in inner) == (1 if drawn.dense else found["sizes"]["rho"])
    # every factor is joined to something, and parameters are the products of its axes
    of = {f: math.prod(a.size for a in drawn.axes if f in a.ends) for f in drawn.factors}
    assert sum(of.values()) == found["params"]


@pytest.mark.parametrize("text", TEXTS)
def test_a_picture_names_every_factor_and_axis(text: str) -> None:
    found = inspect_design(parse_design(text), 64, 256)
    drawn = network(found)
    assert drawn is not None
    root = ElementTree.fromstring(svg(drawn, "<b> & so on"))
    texts = ["".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"x: 64", "y: 256", *drawn.factors} <= set(texts)
    for axis in drawn.axes:
        assert texts.count(f"{axis.label} {axis.size}") >= 1
    assert len(texts) == 2 + len(drawn.factors) + len(drawn.axes)
    assert root[0].text == "<b> & so on"
    width = float(root.attrib["width"])
    places = [float(n.attrib["x"]) for n in root.iter("{http://www.w3.org/2000/svg}text")]
    assert all(0 < x < width for x in places)


@pytest.mark.parametrize("text", ["cola-mlp", "activated(0.5,0.25,0.25,0.25,0.5,0.25,0.25;relu)"])
def test_an_activation_stands_between_the_factors(text: str) -> None:
    found: dict[str, Any] = inspect_design(parse_design(text), 64, 256)
    drawn = network(found)
    assert drawn is not None
    assert drawn.activation == found["activation"]
    assert math.prod(a.size for a in drawn.axes if "x" in a.ends) == found["padded_in"]
    assert math.prod(a.size for a in drawn.axes if "y" in a.ends) == found["padded_out"]
    assert f"→ {drawn.activation} →" in svg(drawn, text)


@pytest.mark.parametrize("text", ["convolution", "blast", "ffn-moe", "block-sparse", "pixelfly"])
def test_what_is_no_product_of_factors_has_no_network(text: str) -> None:
    assert network(inspect_design(parse_design(text), 64, 64)) is None
