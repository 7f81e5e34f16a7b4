"""Transformers whose every linear layer but embedding and head is structured.

Pre-norm blocks with query-key norms, attention logits scaled by 8/d_head, branches scaled by
sqrt(3/depth), and zero-initialised last layers of branches and head.
Source: arXiv:2410.02117, appendix.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from nas.designs.design import Design
from nas.planning.recipe import Recipe
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

    def __init__(self, recipe: Recipe, design: Design, width: int) -> None:
        super().__init__()
        self.heads, self.head_dim = width // recipe.head_dim, recipe.head_dim
        self.causal = recipe.is_token_model
        self.branch_scale = branch_scale(recipe)
        self.attention_norm = nn.LayerNorm(width)
        self.query_norm = nn.LayerNorm(self.head_dim)
        self.key_norm = nn.LayerNorm(self.head_dim)
        self.mlp_norm = nn.LayerNorm(width)
        self.linears = structured_linears(recipe, design, width)

    def _attention(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape

        def heads(name: str) -> Tensor:
            split: Tensor = self.linears[name](x).view(batch, tokens, self.heads, self.head_dim)
            return split.transpose(1, 2)  # (batch, heads, tokens, head_dim)

        mixed = functional.scaled_dot_product_attention(
            self.query_norm(heads("query")),
            self.key_norm(heads("key")),
            heads("value"),
            is_causal=self.causal,
            scale=8 / self.head_dim,
        )
        merged: Tensor = self.linears["attention_out"](
            mixed.transpose(1, 2).reshape(batch, tokens, width)
        )
        return merged

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.branch_scale * self._attention(self.attention_norm(x))
        return x + self.branch_scale * feed_forward(self.linears, self.mlp_norm(x))


class _Transformer(nn.Module):
    """Blocks between an embedding and a head."""

    def __init__(self, recipe: Recipe, design: Design, width: int) -> None:
        super().__init__()
        self.position_embedding = nn.Embedding(recipe.tokens, width)
        nn.init.normal_(self.position_embedding.weight, std=EMBEDDING_STD)
        self.blocks = nn.ModuleList(Block(recipe, design, width) for _ in range(recipe.depth))
        self.norm = nn.LayerNorm(width)
        self.head = zero_head(recipe, width)

    def _through_blocks(self, x: Tensor) -> Tensor:
        x = x + self.position_embedding(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            x = block(x)
        normed: Tensor = self.norm(x)
        return normed


class TokenTransformer(_Transformer):
    """Decoder-only: token ids (batch, tokens) → logits (batch, tokens, vocabulary).

    The GPT of text, and the autoregressive image transformer, whose sequence is an image's values
    after a token that begins it.
    """

    def __init__(self, recipe: Recipe, design: Design, width: int) -> None:
        super().__init__(recipe, design, width)
        self.token_embedding = nn.Embedding(recipe.embedded_tokens, width)
        nn.init.normal_(self.token_embedding.weight, std=EMBEDDING_STD)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self._through_blocks(self.token_embedding(tokens)))
        return logits


class ViT(_Transformer):
    """Patches (batch, patches, features) → logits (batch, classes); the head sees their mean."""

    def __init__(self, recipe: Recipe, design: Design, width: int) -> None:
        super().__init__(recipe, design, width)
        self.patch_embedding = NumberEmbedding(recipe.features, width)

    def forward(self, patches: Tensor) -> Tensor:
        logits: Tensor = self.head(self._through_blocks(self.patch_embedding(patches)).mean(dim=1))
        return logits
