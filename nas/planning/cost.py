"""Exact FLOPs and parameters of whole models.

The one definition of FLOPs in this project: 1 MAC = 2 FLOPs; every matrix product counts
(structured layers with their padding, attention over all pairs of positions, the embedding of
numbers, the output head), and element-wise work and table look-ups do not; training = 3 × forward.
"""

from __future__ import annotations

from functools import lru_cache

from nas.designs.design import Design, LinearRole, family_of, structure_in
from nas.designs.structure import LinearStructure
from nas.planning.recipe import Recipe

#: Training FLOPs over forward FLOPs: the backward pass computes two products for each.
TRAIN_OVER_FORWARD = 3
#: FLOPs of a multiply-accumulate.
FLOPS_PER_MAC = 2


def linears(recipe: Recipe, width: int) -> tuple[LinearRole, ...]:
    """The structured layers of one residual block, in the order they run."""
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


@lru_cache(maxsize=16384)
def structures_of(recipe: Recipe, design: Design, width: int) -> tuple[LinearStructure, ...]:
    """The integer structure of each layer of a block."""
    roles = linears(recipe, width)
    if family_of(design).in_role is not None:
        return tuple(structure_in(design, role) for role in roles)
    # of most families the dimensions alone decide, and four layers of attention have the same
    of = {(r.d_in, r.d_out): r for r in roles}
    found = {dimensions: structure_in(design, role) for dimensions, role in of.items()}
    return tuple(found[r.d_in, r.d_out] for r in roles)


def _unstructured_macs(recipe: Recipe, width: int) -> int:
    """MACs of one sample outside structured layers: attention, embedding of numbers, and head."""
    attention = 2 * recipe.tokens**2 * width if recipe.attends else 0  # logits, weighted values
    embedding = recipe.tokens * recipe.features * width
    head = recipe.predictions * width * recipe.outputs
    return recipe.depth * attention + embedding + head


def forward_flops_per_sample(recipe: Recipe, design: Design, width: int) -> int:
    """Forward FLOPs of the whole model on one sample: a sequence, an image or a row."""
    block = sum(s.macs for s in structures_of(recipe, design, width))
    macs = recipe.depth * recipe.tokens * block + _unstructured_macs(recipe, width)
    return FLOPS_PER_MAC * macs


def train_flops_per_step(recipe: Recipe, design: Design, width: int) -> int:
    """Training FLOPs of the whole model for one step."""
    return TRAIN_OVER_FORWARD * recipe.batch * forward_flops_per_sample(recipe, design, width)


def parameters(recipe: Recipe, design: Design, width: int) -> int:
    """Trainable parameters: layers, gates, gains, biases, layer norms, embeddings and head."""
    norms = 2 if recipe.attends else 1
    block = norms * 2 * width + (2 * 2 * recipe.head_dim if recipe.attends else 0)
    for role, s in zip(linears(recipe, width), structures_of(recipe, design, width), strict=True):
        gained = recipe.normalize and role.name not in ("query", "key")  # their norms have one
        gains = len(s.factors) if gained else 0
        block += s.params + gains + (s.d_out if recipe.bias else 0)
    if recipe.is_token_model:
        embedding = recipe.embedded_tokens * width
    else:
        embedding = (recipe.features + 1) * width
    positions = recipe.tokens * width if recipe.attends else 0
    head = recipe.outputs * width + (0 if recipe.is_token_model else recipe.outputs)
    return recipe.depth * block + embedding + positions + 2 * width + head


def least_train_flops_per_step(recipe: Recipe, width: int) -> int:
    """A lower bound of the FLOPs of a step at this width: the model without structured layers."""
    per_sample = FLOPS_PER_MAC * _unstructured_macs(recipe, width)
    return TRAIN_OVER_FORWARD * recipe.batch * per_sample
