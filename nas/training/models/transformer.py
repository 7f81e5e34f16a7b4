"""Transformers whose every linear layer but embedding and head is structured.

Pre-norm blocks with query-key norms, attention logits scaled by 8/d_head, branches scaled by
sqrt(3/depth), and zero-initialised last layers of branches and head.
Source: arXiv:2410.02117, appendix.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from nas.planning.recipe import Recipe
from nas.tasks.task import LinearFactory
from nas.training.models.ops import OWN, Ops
from nas.training.models.parts import (
    EMBEDDING_STD,
    NumberEmbedding,
    branch_scale,
    feed_forward,
    structured_linears,
    zero_head,
)


class Block(nn.Module):
    """Attention and feed-forward, each on its own residual branch."""

    def __init__(self, recipe: Recipe, width: int, linear: LinearFactory) -> None:
        super().__init__()
        self.heads, self.head_dim = width // recipe.head_dim, recipe.head_dim
        self.causal = recipe.is_token_model
        self.branch_scale = branch_scale(recipe)
        self.attention_norm = nn.LayerNorm(width)
        self.query_norm = nn.LayerNorm(self.head_dim)
        self.key_norm = nn.LayerNorm(self.head_dim)
        self.mlp_norm = nn.LayerNorm(width)
        self.linears = structured_linears(recipe, width, linear)

    def _attention(self, ops: Ops, x: Tensor) -> Tensor:
        *leading, tokens, width = x.shape
        projections = [self.linears[name] for name in ("query", "key", "value")]
        split = ops.structured(projections, x)
        split = split.view(*split.shape[:-1], self.heads, self.head_dim)
        both, value = torch.split(split, [2, 1], dim=-3)
        query, key = ops.norms((self.query_norm, self.key_norm), both)

        def by_head(part: Tensor) -> Tensor:  # (sequences, heads, tokens, head_dim)
            return part.reshape(-1, tokens, self.heads, self.head_dim).transpose(1, 2)

        mixed = functional.scaled_dot_product_attention(
            by_head(query),
            by_head(key),
            by_head(value.squeeze(-3)),
            is_causal=self.causal,
            scale=8 / self.head_dim,
        )
        merged = mixed.transpose(1, 2).reshape(*leading, tokens, width)
        return ops.structured([self.linears["attention_out"]], merged).squeeze(-2)

    def run(self, ops: Ops, x: Tensor) -> Tensor:
        """(..., tokens, width) → the same."""
        attended = self._attention(ops, ops.norm(self.attention_norm, x))
        x = torch.add(x, attended, alpha=self.branch_scale)
        fed = feed_forward(ops, self.linears, ops.norm(self.mlp_norm, x))
        return torch.add(x, fed, alpha=self.branch_scale)


class _Transformer(nn.Module):
    """Blocks between an embedding and a head."""

    def __init__(self, recipe: Recipe, width: int, linear: LinearFactory) -> None:
        super().__init__()
        self.position_embedding = nn.Embedding(recipe.tokens, width)
        nn.init.normal_(self.position_embedding.weight, std=EMBEDDING_STD)
        self.blocks = nn.ModuleList(Block(recipe, width, linear) for _ in range(recipe.depth))
        self.norm = nn.LayerNorm(width)
        self.head = zero_head(recipe, width)

    def _through_blocks(self, ops: Ops, x: Tensor) -> Tensor:
        x = x + ops.positions(self.position_embedding, x.shape[-2])
        for block in self.blocks:
            x = block.run(ops, x)  # type: ignore[operator]
        return ops.norm(self.norm, x)

    def run(self, ops: Ops, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.run(OWN, x)


class TokenTransformer(_Transformer):
    """Decoder-only: token ids (batch, tokens) → logits (batch, tokens, vocabulary).

    The GPT of text, and the autoregressive image transformer, whose sequence is an image's values
    after a token that begins it.
    """

    def __init__(self, recipe: Recipe, width: int, linear: LinearFactory) -> None:
        super().__init__(recipe, width, linear)
        self.token_embedding = nn.Embedding(recipe.embedded_tokens, width)
        nn.init.normal_(self.token_embedding.weight, std=EMBEDDING_STD)

    def run(self, ops: Ops, x: Tensor) -> Tensor:
        """Token ids (..., tokens) → logits (..., tokens, vocabulary)."""
        return ops.linear(
            self.head, self._through_blocks(ops, ops.embedded(self.token_embedding, x))
        )


class ViT(_Transformer):
    """Patches (batch, patches, features) → logits (batch, classes); the head sees their mean."""

    def __init__(self, recipe: Recipe, width: int, linear: LinearFactory) -> None:
        super().__init__(recipe, width, linear)
        self.patch_embedding = NumberEmbedding(recipe.features, width)

    def run(self, ops: Ops, x: Tensor) -> Tensor:
        """Patches (..., patches, features) → logits (..., classes)."""
        through = self._through_blocks(ops, ops.linear(self.patch_embedding, x))
        return ops.linear(self.head, through.mean(dim=-2))
