"""A GPT whose every linear layer but the head is an `EinsumLinear`.

Pre-norm blocks with query-key norms, attention logits scaled by 8/d_head, branches scaled by
sqrt(3/depth), and zero-initialised last layers of branches and head.
Source: arXiv:2410.02117, appendix.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from nas.cost import gpt_linears
from nas.layers import EinsumLinear, param_groups
from nas.recipe import GptRecipe
from nas.theta import Theta

_ZERO_INIT = ("attention_out", "mlp_out")
_WITHOUT_GAIN = ("query", "key")  # their norms have one


class Block(nn.Module):
    """Attention and feed-forward, each on its own residual branch."""

    def __init__(self, recipe: GptRecipe, theta: Theta, width: int) -> None:
        super().__init__()
        self.heads, self.head_dim = width // recipe.head_dim, recipe.head_dim
        self.branch_scale = math.sqrt(3 / recipe.depth)
        self.attention_norm = nn.LayerNorm(width)
        self.query_norm = nn.LayerNorm(self.head_dim)
        self.key_norm = nn.LayerNorm(self.head_dim)
        self.mlp_norm = nn.LayerNorm(width)
        self.linears = nn.ModuleDict(
            {
                role.name: EinsumLinear(
                    theta,
                    role.d_in,
                    role.d_out,
                    bias=False,
                    zero_init=role.name in _ZERO_INIT,
                    normalize=True,
                    gain=role.name not in _WITHOUT_GAIN,
                    d_in_base=role.d_in_base,
                )
                for role in gpt_linears(recipe, width)
            }
        )

    def _attention(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape

        def heads(name: str) -> Tensor:
            split: Tensor = self.linears[name](x).view(batch, tokens, self.heads, self.head_dim)
            return split.transpose(1, 2)  # (batch, heads, tokens, head_dim)

        mixed = functional.scaled_dot_product_attention(
            self.query_norm(heads("query")),
            self.key_norm(heads("key")),
            heads("value"),
            is_causal=True,
            scale=8 / self.head_dim,
        )
        merged: Tensor = self.linears["attention_out"](
            mixed.transpose(1, 2).reshape(batch, tokens, width)
        )
        return merged

    def _mlp(self, x: Tensor) -> Tensor:
        out: Tensor = self.linears["mlp_out"](functional.gelu(self.linears["mlp_in"](x)))
        return out

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.branch_scale * self._attention(self.attention_norm(x))
        return x + self.branch_scale * self._mlp(self.mlp_norm(x))


class GPT(nn.Module):
    """Decoder-only transformer: token ids (batch, tokens) → logits (batch, tokens, vocabulary)."""

    def __init__(self, recipe: GptRecipe, theta: Theta, width: int) -> None:
        super().__init__()
        self.recipe, self.width = recipe, width
        self.token_embedding = nn.Embedding(recipe.vocabulary, width)
        self.position_embedding = nn.Embedding(recipe.context, width)
        self.blocks = nn.ModuleList(Block(recipe, theta, width) for _ in range(recipe.depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, recipe.vocabulary, bias=False)
        for embedding in (self.token_embedding, self.position_embedding):
            nn.init.normal_(embedding.weight, std=EMBEDDING_STD)
        nn.init.zeros_(self.head.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.token_embedding(tokens) + self.position_embedding(positions)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits

    def optimizer(self) -> torch.optim.AdamW:
        """AdamW with structure-aware learning rates; the head counts as a dense layer."""
        r = self.recipe
        groups = param_groups(self, r.lr, extra={self.head.weight: r.base_width / self.width})
        return torch.optim.AdamW(
            groups, betas=(r.beta1, r.beta2), weight_decay=r.weight_decay, fused=True
        )


EMBEDDING_STD = 1.0
