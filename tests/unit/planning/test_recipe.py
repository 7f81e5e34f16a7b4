from __future__ import annotations

import json
import math
import pickle
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import pytest
from pydantic import ValidationError

from nas.errors import InvalidInput
from nas.planning.recipe import (
    IMAGES_PAPER,
    IMAGES_VIT,
    PIXELS_PAPER,
    RECIPES,
    REGRESSION,
    REGRESSION_PAPER,
    SETTINGS,
    TASKS,
    TEXT,
    TEXT_PAPER,
    Recipe,
    stored_recipe,
    with_overrides,
)
from nas.planning.tasks import recipe_of


def test_the_papers_settings() -> None:
    """arXiv:2410.02117 and arXiv:2406.06248, appendices."""
    t, r, p, v = TEXT_PAPER, REGRESSION_PAPER, PIXELS_PAPER, IMAGES_PAPER
    assert (t.tokens_per_step, t.context, t.warmup_steps, t.max_steps) == (
        65_536,
        128,
        2000,
        100_000,
    )
    assert (t.lr, t.beta1, t.beta2, t.clip, t.weight_decay) == (3e-3, 0.9, 0.95, 1.0, 0.0)
    assert (t.schedule, t.head_dim, t.vocabulary, t.normalize) == ("constant", 64, 96, True)
    assert (r.features, r.depth, r.base_width, r.mlp_ratio, r.batch) == (8, 3, 64, 4, 4096)
    assert (r.lr, r.schedule, r.max_steps, r.pool, r.normalize) == (1e-3, "cosine", 10**6, 0, False)
    assert (p.tokens, p.depth, p.base_width, p.lr, p.schedule, p.batch) == (
        192,
        3,
        64,
        3e-3,
        "cosine",
        64,
    )
    assert (v.tokens, v.features, v.depth, v.base_width, v.batch) == (49, 3072, 12, 384, 3072)
    assert (v.lr, v.weight_decay, v.clip, v.beta1, v.beta2) == (2e-3, 0.05, 1.0, 0.9, 0.95)


#: Settings that are stored only where they are chosen.
LATER = {"ranks", "sharding", "optimizer", "parametrization", "depth_rule", "sgd_lr"}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_every_recipe_is_whole(recipe: Recipe) -> None:
    assert recipe_of(recipe.task, recipe.name) is not None
    assert recipe.tokens >= 1
    assert recipe.outputs >= 1
    assert (recipe.features > 0) != recipe.is_token_model
    assert len(recipe.widths) >= 3
    # fingerprints of tasks and keys of runs depend on what is written
    assert list(recipe.as_dict()) == [s for s in SETTINGS if s not in LATER]
    assert stored_recipe(recipe.as_dict()) == recipe
    assert stored_recipe(json.loads(json.dumps(asdict(recipe)))) == recipe
    assert pickle.loads(pickle.dumps(recipe)) == recipe


def test_ranks_are_stored_where_there_are_several() -> None:
    sharded = with_overrides(TEXT, {"ranks": "4", "sharding": "full"})
    stored = sharded.as_dict()
    assert list(stored) == [s for s in SETTINGS if s not in LATER - {"ranks", "sharding"}]
    assert (stored["ranks"], stored["sharding"]) == (4, "full")
    assert stored_recipe(stored) == sharded
    copied = with_overrides(TEXT, {"ranks": 2}).as_dict()
    assert copied["ranks"] == 2
    assert "sharding" not in copied
    assert copied.items() - {("ranks", 2)} == TEXT.as_dict().items()


def test_the_first_recipe_of_a_task_is_its_default() -> None:
    assert {recipe_of(task).name for task in TASKS} == {
        "gpt-chars-1", "mlp-regression-1", "ar-digits-1", "mlp-digits-1",
    }  # fmt: skip


def test_learning_rates_warm_up_and_decay() -> None:
    factors = [TEXT.learning_rate_factor(s, 200) for s in range(1, 201)]
    assert factors[0] == 1 / 50
    assert factors[49:] == [1.0] * 151
    warm = with_overrides(TEXT, {"schedule": "cosine"})
    assert [warm.learning_rate_factor(s, 200) for s in (25, 50, 51)] == [0.5, 1.0, 1.0]
    assert 0 < warm.learning_rate_factor(200, 200) < 1e-3
    cosine = with_overrides(TEXT, {"schedule": "cosine", "warmup_steps": 0})
    decays = [cosine.learning_rate_factor(s, 100) for s in range(1, 101)]
    assert decays[0] == 1.0
    assert decays[50] == pytest.approx(0.5)
    assert 0 < decays[-1] < 1e-3
    assert all(a > b for a, b in pairwise(decays))


def test_overrides_take_numbers_as_text() -> None:
    changed = with_overrides(REGRESSION, {"input_dim": "16", "lr": "2e-3", "normalize": "true"})
    assert (changed.features, changed.lr, changed.normalize) == (16, 2e-3, True)
    assert with_overrides(REGRESSION, {}) == REGRESSION


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        ({"speed": 1}, "overrides"), ({"task": "text"}, "overrides"), ({"name": "x"}, "overrides"),
        ({"lr": "fast"}, "lr"), ({"lr": math.nan}, "lr"), ({"lr": 0}, "lr"), ({"lr": -1}, "lr"),
        ({"depth": 2.5}, "depth"), ({"depth": True}, "depth"), ({"depth": 0}, "depth"),
        ({"depth": 10**6}, "depth"), ({"depth": "1" * 5000}, "depth"), ({"depth": None}, "depth"),
        ({"schedule": "linear"}, "schedule"), ({"normalize": "maybe"}, "normalize"),
        ({"input_dim": 0}, "input_dim"), ({"head_dim": 7}, "min_width"),
        ({"head_dim": 1, "min_width": 1}, "min_width"), ({"max_width": 8}, "min_width"),
        ({"max_width": 24}, "min_width"), ({"context": 64}, "overrides"),
        ({"augmentation": "crop"}, "overrides"), ({"min_steps": 10}, "min_steps"),
        ({"warmup_steps": 300}, "warmup_steps"), ({"validation_samples": 1 << 20}, "validation"),
        ({"pool": 1 << 22, "input_dim": 1024}, "pool"), ({"batch": 1 << 20}, "batch"),
        ({"ranks": 0}, "ranks"), ({"ranks": 65}, "ranks"), ({"ranks": 3}, "ranks"),
        ({"ranks": 2, "sharding": "half"}, "sharding"), ({"sharding": "full"}, "sharding"),
    ],
)  # fmt: skip
def test_bad_overrides_are_named(overrides: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        with_overrides(REGRESSION, overrides)
    assert caught.value.field.startswith(field)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(("patch", "says"), [(0, "a whole number from 1"), (3, "a divisor")])
def test_patches_fill_an_image(patch: int, says: str) -> None:
    with pytest.raises(InvalidInput, match=f"patch: got {patch}; accepted: {says}"):
        with_overrides(IMAGES_VIT, {"patch": patch})


def test_a_stored_recipe_of_no_task_is_refused() -> None:
    with pytest.raises(ValidationError, match="task"):
        stored_recipe({**TEXT.as_dict(), "task": "video"})


def test_text_of_characters_has_96() -> None:
    with pytest.raises(InvalidInput, match="vocabulary: got 97; accepted: 96"):
        with_overrides(TEXT, {"vocabulary": 97})
    assert with_overrides(TEXT, {"vocabulary": 500, "tokenizer": "bpe"}).outputs == 500


def test_a_recipe_belongs_to_its_task() -> None:
    with pytest.raises(InvalidInput, match=r"recipe: got mlp-digits-1; accepted: gpt-chars-1 \|"):
        recipe_of("text", "mlp-digits-1")
    with pytest.raises(InvalidInput, match="task: got video; accepted: text"):
        recipe_of("video")
