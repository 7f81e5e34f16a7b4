"""Spaces of designs: what may be proposed, and that all of it fits its budget."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution

from nas.designs.aligned import Aligned
from nas.designs.chain import ChainTheta
from nas.designs.cola import Activated
from nas.designs.design import parse_design
from nas.designs.mixture import Mixture, MixtureStructure
from nas.errors import InvalidInput
from nas.planning.cost import structures_of
from nas.planning.request import FAMILIES, OBJECTIVES, SAMPLERS, SearchRequest
from nas.search import PastTrial, propose
from nas.search.space import design_of, distributions, plan_of

EVERYTHING = {
    "families": list(FAMILIES), "factors": [2, 3, 4], "experts": [4, 8], "active": [2, 3],
    "shared": [0, 1], "granularity": [1, 4], "activation": ["silu", "relu"],
    "heads": ["free", "aligned"],
}  # fmt: skip


def request(**fields: Any) -> SearchRequest:
    return SearchRequest.checked({"train_flops": 1e11, "trials": 60, **fields})


def draw(data: st.DataObject, req: SearchRequest) -> dict[str, Any]:
    return {
        name: data.draw(
            st.sampled_from(d.choices)
            if isinstance(d, CategoricalDistribution)
            else st.floats(d.low, d.high)  # type: ignore[attr-defined]
        )
        for name, d in distributions(req, req.settings).items()
    }


@pytest.mark.parametrize("objective", OBJECTIVES)
@settings(max_examples=25, deadline=None)
@given(st.data())
def test_every_point_of_the_whole_space_fits_its_budget(
    objective: str, data: st.DataObject
) -> None:
    req = request(objective=objective, space=EVERYTHING)
    params = draw(data, req)
    plan = plan_of(req.settings, req, params)
    own = req.train_flops * params.get("budget_share", 1.0)
    assert own - plan.train_flops_per_step < plan.train_flops <= own
    assert plan.steps >= req.settings.min_steps
    assert parse_design(plan.design.text) == plan.design
    for s in structures_of(req.settings, plan.design, plan.width):
        assert isinstance(s, MixtureStructure) or s.macs <= s.d_in * s.d_out


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_a_point_of_the_box_is_of_the_family_it_names(data: st.DataObject) -> None:
    req = request(space=EVERYTHING)
    params = draw(data, req)
    design = design_of(req.designs, params)
    family = params["family"]
    if family == "einsum":
        # a chain whose end factors have no axes of their own is one of fewer factors
        assert design.family.startswith("einsum")
        assert not isinstance(design, ChainTheta) or 2 < design.factors <= params["factors"]
    elif family == "activated":  # of which low-rank has the name
        assert design.family in ("activated", "cola-mlp")
    elif family != "btt-moe":
        assert design.family == family
    if isinstance(inner := getattr(design, "of", design), Mixture):
        counts = inner.experts, inner.active, inner.shared
        assert counts == (params["experts"], params["active"], params["shared"])
        finer = params["granularity"] if family == "ffn-moe" else 1
        assert inner.granularity == finer
    if isinstance(design, Activated):
        assert design.activation == params["activation"]
    if params["heads"] == "free":
        assert not isinstance(design, Aligned)


def test_the_space_of_two_factors_is_what_it_was() -> None:
    req = request()
    assert set(distributions(req, req.settings)) == {
        "alpha", "epsilon", "beta_share", "delta_share", "rho_share", "width_position"
    }  # fmt: skip
    assert request(space={"families": ["einsum"]}) == req
    assert request(space={}).digest == req.digest
    assert request(space={"shared": [0], "granularity": [1], "activation": ["silu"]}) == req


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_proposes_from_every_family(sampler: str) -> None:
    req = request(sampler=sampler, space=EVERYTHING, seed=3)
    past: list[PastTrial] = []
    seen = set()
    for number in range(8 if sampler == "gp" else 24):
        p = propose(req, req.settings, number, past, lambda _: False)
        seen.add(p.params["family"])
        loss = 2.0 + (p.params["family"] != "btt-moe") + float(p.params["alpha"])
        # through JSON, as the store keeps it
        params = json.loads(json.dumps(p.params))
        past.append(PastTrial(params, "complete", (loss,), json.loads(json.dumps(p.sampler_state))))
    assert len(seen) >= 3


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ({"families": ["butterfly"]}, "butterfly"),
        ({"families": []}, "families"),
        ({"families": ["einsum", "einsum"]}, "each choice once"),
        ({"factors": [1]}, "from 2 to 4"),
        ({"factors": [2.5]}, "2.5"),
        ({"experts": [1]}, "from 2 to 1024"),
        ({"families": ["btt-moe"], "experts": [8, 4], "active": [6]}, "active=6 of experts=4"),
        ({"active": [3, 1], "shared": [0, 1]}, "shared=1 of active=1"),
        ({"shared": [-1]}, "from 0 to 1023"),
        ({"granularity": [0]}, "from 1 to 1024"),
        ({"families": ["ffn-moe"], "granularity": [1, 65]}, "hidden dimension of the block, 64"),
        ({"activation": ["tanh"]}, "tanh"),
        ({"heads": ["tails"]}, "tails"),
        ({"depth": 3}, "depth"),
        ("einsum", "einsum"),
        (7, "7"),
    ],
)
def test_a_space_that_cannot_be_is_refused(space: Any, words: str) -> None:
    with pytest.raises(InvalidInput, match="accepted") as caught:
        request(space=space)
    assert words in str(caught.value)
    field = caught.value.field
    assert field.startswith("space") or field in ("active", "shared", "granularity")


def test_heads_need_attention() -> None:
    with pytest.raises(InvalidInput, match="no attention"):
        request(task="regression", space={"heads": ["aligned"]})


def test_a_budget_has_to_pay_for_the_dearest_of_the_space() -> None:
    """64 experts of which 32 are computed: 32 dense layers for each one."""
    space = {"families": ["dense-moe"], "experts": [64], "active": [32]}
    with pytest.raises(InvalidInput, match="dense-moe:experts=64,active=32") as caught:
        request(train_flops=5e10, space=space)
    least = float(str(caught.value).split("train FLOPs from ")[1].split()[0])
    request(train_flops=least * 1.001, space=space)
    request(train_flops=5e10)
