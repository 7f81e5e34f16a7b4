"""μP: feature updates keep their size as models widen, and need the structure to do so."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nas.planning.recipe import with_overrides
from nas.training.models.parts import branch_scale
from tests.support.coordinates import RECIPE, feature_updates, spread
from tests.support.tiers import only

WIDTHS = (64, 1024)
#: Of which blind rates are not asked.
COMPARED = ("lost", "pixelfly", "block-sparse", "cola-mlp", "activated(monarch;silu)")


@pytest.mark.parametrize(
    "structure",
    only(
        {"monarch"},
        [
            "monarch",
            "2/3,0,1/3,0,1/3,2/3,0",
            "1/2,0,1/2,1/4,1/2,1/4,0",
            "kronecker",
            "blast",
            "blast:blocks=1/4,rho=1/2",
            "block-sparse:blocks=1/2,stride=0",
            "pixelfly:rank=1/4,blocks=3/4",
            "sum(monarch;btt:cores=3,rho=1/8)",
        ],
    ),
)
def test_feature_updates_are_flat_over_widths_only_with_structure_aware_rates(
    structure: str,
) -> None:
    aware = [feature_updates(RECIPE, structure, w) for w in WIDTHS]
    blind = [feature_updates(RECIPE, structure, w, aware=False) for w in WIDTHS]
    assert spread(aware) < 2
    assert spread(blind) > 2.5


@pytest.mark.parametrize("structure", only({"lost"}, COMPARED))
def test_feature_updates_of_other_layers_are_flat_over_widths(structure: str) -> None:
    assert spread(feature_updates(RECIPE, structure, w) for w in WIDTHS) < 2


@pytest.mark.parametrize("optimizer", only({"adamw"}, ["adamw", "muon", "sgd"]))
def test_feature_updates_of_shared_factors_are_flat_at_spectral_rates(optimizer: str) -> None:
    structure = "tensor-train:rho=1/4"
    spectral = with_overrides(
        RECIPE, {"parametrization": "spectral", "optimizer": optimizer, "sgd_lr": 0.3}
    )
    assert spread(feature_updates(spectral, structure, w) for w in WIDTHS) < 1.6
    if optimizer == "adamw":
        assert spread(feature_updates(RECIPE, structure, w) for w in WIDTHS) > 2


def test_what_all_branches_learn_does_not_grow_with_depth_under_completep() -> None:
    """Of all branches together: each layer's update times how many enter, and by how much."""

    def learned(depth: int, rule: str) -> float:
        recipe = with_overrides(RECIPE, {"depth": depth, "depth_rule": rule})
        return depth * branch_scale(recipe) * feature_updates(recipe, "monarch", 64)[-1]

    assert 0.7 < learned(24, "completep") / learned(3, "completep") < 1.3
    assert learned(24, "sqrt") / learned(3, "sqrt") > 1.7


def test_feature_updates_are_flat_over_depths() -> None:
    for structure in ("dense", "monarch"):
        found = [feature_updates(replace(RECIPE, depth=d), structure, 64) for d in (3, 12)]
        assert spread(found) < 2
