"""The shared-context ranker: the user is encoded once, each candidate attends to that encoding.

Candidates never attend to each other, so an answer does not depend on padding or on what else was sent, and one
more candidate costs a cross-attention row instead of a whole sequence (BST, Chen et al. 2019, repeats the user for
every candidate). Pre-norm blocks (Xiong et al. 2020), GELU feed-forward.

Letters: B requests, N candidates, L history, Q query tokens, S = 1 + L + Q, F fields, D width, T tasks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from trirank_backend.features import FeatureSpec

from trirank_build.recipe import ModelRecipe

_MASKED = -1e4  # finite, so that FP16 survives it


class Attention(nn.Module):
    """Multi-head attention from x [B, X, D] to memory [B, S, D]; ``mask`` [B, 1, 1, S] is added to the logits."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, dim // heads
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        q = self._split(self.query(x))  # [B, H, X, D/H]
        key, value = self.key_value(memory).chunk(2, dim=-1)
        k, v = self._split(key), self._split(value)  # [B, H, S, D/H]
        weights = (q @ k.transpose(-1, -2) * self.head_dim**-0.5 + mask).softmax(-1)  # [B, H, X, S]
        merged = (weights @ v).transpose(1, 2).flatten(2)  # [B, X, D]
        return self.out(merged)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)


class Block(nn.Module):
    """Attention and feed-forward, each with a norm before and a residual around it."""

    def __init__(self, recipe: ModelRecipe) -> None:
        super().__init__()
        dim = recipe.dim
        self.norm_attention, self.norm_ffn = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Attention(dim, recipe.heads)
        self.ffn = nn.Sequential(nn.Linear(dim, recipe.ffn), nn.GELU(), nn.Linear(recipe.ffn, dim))
        self.dropout = nn.Dropout(recipe.dropout)

    def forward(self, x: Tensor, memory: Tensor | None, mask: Tensor) -> Tensor:
        normed = self.norm_attention(x)
        x = x + self.dropout(self.attention(normed, normed if memory is None else memory, mask))
        return x + self.dropout(self.ffn(self.norm_ffn(x)))


class SharedContextRanker(nn.Module):
    """history [B, L, F+2], query [B, Q], candidates [B, N, F], dense [B, N, Dn], context [B, C] → scores [B, N, T].

    Ids are of the joint vocabulary with 0 for "missing"; see trirank.contract.ranker_inputs.
    """

    def __init__(self, spec: FeatureSpec, recipe: ModelRecipe) -> None:
        super().__init__()
        shape, dim = spec.shape, recipe.dim
        self.embedding = nn.Embedding(spec.vocabulary_size, dim, padding_idx=0)
        self.position = nn.Parameter(torch.randn(shape.history_length + shape.query_length, dim) * 0.02)
        self.context = nn.Linear(shape.context, dim)
        self.dense = nn.Linear(shape.dense, dim)
        self.norm_candidate, self.norm_sequence = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.encoder = nn.ModuleList(Block(recipe) for _ in range(recipe.encoder_blocks))
        self.norm_memory = nn.LayerNorm(dim)
        self.cross = nn.ModuleList(Block(recipe) for _ in range(recipe.cross_blocks))
        self.norm_out = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(recipe.dropout)
        self.head = nn.Sequential(nn.Linear(2 * dim, dim), nn.GELU(), nn.Linear(dim, shape.tasks))
        self.dense_head = nn.Linear(shape.dense, shape.tasks)
        nn.init.normal_(self.embedding.weight, std=dim**-0.5)
        with torch.no_grad():
            self.embedding.weight[0] = 0

    def forward(self, history: Tensor, query: Tensor, candidates: Tensor, dense: Tensor, context: Tensor) -> Tensor:
        events = self.embedding(history).sum(2)  # [B, L, D]
        words = self.embedding(query)  # [B, Q, D]
        sequence = self.norm_sequence(torch.cat([events, words], 1)) + self.position
        user = torch.cat([self.context(context)[:, None], self.dropout(sequence)], 1)  # [B, S, D]
        # The context is always there, so no row of the softmax is ever empty. An event has a behaviour.
        there = torch.cat([torch.ones_like(query[:, :1]), history[:, :, -2], query], 1) != 0  # [B, S]
        mask = (~there)[:, None, None, :].to(user.dtype) * _MASKED  # [B, 1, 1, S]
        for block in self.encoder:
            user = block(user, None, mask)
        memory = self.norm_memory(user)

        x = self.norm_candidate(self.embedding(candidates).sum(2)) + self.dense(dense)  # [B, N, D]
        for block in self.cross:
            x = block(x, memory, mask)
        x = self.norm_out(x)
        both = torch.cat([x, x * memory[:, :1]], -1)  # [B, N, 2D]
        return self.head(both) + self.dense_head(dense)
