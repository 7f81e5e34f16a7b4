"""Exact FLOPs and parameters of whole models.

The one definition of FLOPs in this project: 1 MAC = 2 FLOPs; every matrix product counts
(structured layers with their padding, attention over all pairs of positions, the embedding of
numbers, the output head), and element-wise work and table look-ups do not; training = 3 × forward.
"""

from __future__ import annotations

from functools import lru_cache

from nas.designs.design import Design, LinearRole, family_of, structure_in
from nas.designs.structure import LinearStructure
from nas.planning.recipe import PluginRecipe, Recipe
from nas.planning.sheets import ModelSheet, SheetLayer, sheet_at

#: Training FLOPs over forward FLOPs: the backward pass computes two products for each.
TRAIN_OVER_FORWARD = 3
#: FLOPs of a multiply-accumulate.
FLOPS_PER_MAC = 2


@lru_cache(maxsize=4096)
def sheet_of(recipe: Recipe, width: int) -> ModelSheet:
    """What the model of a recipe consists of at a width."""
    if isinstance(recipe, PluginRecipe):
        return sheet_at(recipe.task, recipe.counted, width)
    layers = tuple(
        SheetLayer(
            role, recipe.tokens, recipe.bias,
            gained=role.name not in ("query", "key"),  # whose norms have a gain
            count=recipe.depth,
        )
        for role in _block(recipe, width)
    )  # fmt: skip
    macs, params = _unstructured_macs(recipe, width), _unstructured_params(recipe, width)
    return ModelSheet(layers, macs, params)


def _block(recipe: Recipe, width: int) -> tuple[LinearRole, ...]:
    """The structured layers of one residual block of a built-in model, in the order they run."""
    hidden, base = recipe.mlp_ratio * width, recipe.base_width
    heads = width // recipe.head_dim if recipe.attends else None
    attention = (
        *(LinearRole(name, width, width, base, heads) for name in ("query", "key", "value")),
        LinearRole("attention_out", width, width, base, heads, "in"),
    )
    return (
        *(attention if recipe.attends else ()),
        LinearRole("mlp_in", width, hidden, base),
        LinearRole("mlp_out", hidden, width, recipe.mlp_ratio * base),
    )


def _unstructured_macs(recipe: Recipe, width: int) -> int:
    """MACs of one sample outside structured layers: attention, embedding of numbers, and head."""
    attention = 2 * recipe.tokens**2 * width if recipe.attends else 0  # logits, weighted values
    embedding = recipe.tokens * recipe.features * width
    head = recipe.predictions * width * recipe.outputs
    return recipe.depth * attention + embedding + head


def _unstructured_params(recipe: Recipe, width: int) -> int:
    """Layer norms, embeddings and head."""
    norms = 2 if recipe.attends else 1
    block = norms * 2 * width + (2 * 2 * recipe.head_dim if recipe.attends else 0)
    if recipe.is_token_model:
        embedding = recipe.embedded_tokens * width
    else:
        embedding = (recipe.features + 1) * width
    positions = recipe.tokens * width if recipe.attends else 0
    head = recipe.outputs * width + (0 if recipe.is_token_model else recipe.outputs)
    return recipe.depth * block + embedding + positions + 2 * width + head


def linears(recipe: Recipe, width: int) -> tuple[LinearRole, ...]:
    """The distinct structured layers of a model, in the order it makes them."""
    return tuple(dict.fromkeys(layer.role for layer in sheet_of(recipe, width).layers))


@lru_cache(maxsize=16384)
def structures_by_role(
    recipe: Recipe, design: Design, width: int
) -> dict[LinearRole, LinearStructure]:
    """The integer structure of each distinct layer of a model."""
    roles = linears(recipe, width)
    if family_of(design).in_role is not None:
        return {role: structure_in(design, role) for role in roles}
    # of most families the dimensions alone decide, and four layers of attention have the same
    of = {(r.d_in, r.d_out): r for r in roles}
    found = {dimensions: structure_in(design, role) for dimensions, role in of.items()}
    return {role: found[role.d_in, role.d_out] for role in roles}


def structures_of(recipe: Recipe, design: Design, width: int) -> tuple[LinearStructure, ...]:
    """The integer structure of each distinct layer of a model, in the order of `linears`."""
    return tuple(structures_by_role(recipe, design, width).values())


@lru_cache(maxsize=16384)
def forward_flops_per_sample(recipe: Recipe, design: Design, width: int) -> int:
    """Forward FLOPs of the whole model on one sample: a sequence, an image or a row."""
    sheet, structures = sheet_of(recipe, width), structures_by_role(recipe, design, width)
    macs = sum(one.count * one.positions * structures[one.role].macs for one in sheet.layers)
    return FLOPS_PER_MAC * (macs + sheet.macs)


def train_flops_per_step(recipe: Recipe, design: Design, width: int) -> int:
    """Training FLOPs of the whole model for one step."""
    return TRAIN_OVER_FORWARD * recipe.batch * forward_flops_per_sample(recipe, design, width)


def parameters(recipe: Recipe, design: Design, width: int) -> int:
    """Trainable parameters: layers, gates, gains, biases, and all outside structured layers."""
    sheet, structures = sheet_of(recipe, width), structures_by_role(recipe, design, width)
    total = sheet.params
    for layer in sheet.layers:
        structure = structures[layer.role]
        gains = len(structure.factors) if recipe.normalize and layer.gained else 0
        own = structure.params + gains + (structure.d_out if layer.bias else 0)
        total += layer.count * own
    return total


def least_train_flops_per_step(recipe: Recipe, width: int) -> int:
    """A lower bound of the FLOPs of a step at this width: the model without structured layers."""
    per_sample = FLOPS_PER_MAC * sheet_of(recipe, width).macs
    return TRAIN_OVER_FORWARD * recipe.batch * per_sample
