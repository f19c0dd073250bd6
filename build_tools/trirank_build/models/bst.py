"""BST (Chen et al., "Behavior sequence transformer for e-commerce recommendation in Alibaba", DLP-KDD 2019)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from trirank_backend.features import FeatureSpec

from trirank_build.models.embeddings import STD
from trirank_build.models.ranker import MASKED, Block
from trirank_build.models.sequence import SequenceRanker, there
from trirank_build.recipe import ModelRecipe


class Bst(SequenceRanker):
    """The candidate joins the history as its last event, and a Transformer reads the whole of it, once for every
    candidate; what it says at the candidate's place goes, with context and dense features, through an MLP."""

    has_states = False

    def __init__(self, spec: FeatureSpec, recipe: ModelRecipe) -> None:
        super().__init__(spec, recipe)
        shape, dim = spec.shape, recipe.dim
        self.position = nn.Parameter(torch.randn(shape.history_length + 1, dim) * STD)
        self.blocks = nn.ModuleList(Block(recipe, recipe.dropout) for _ in range(max(recipe.encoder_blocks, 1)))
        self.mlp = nn.Sequential(
            nn.Linear(3 * dim + shape.dense + shape.context, 2 * dim), nn.LeakyReLU(), nn.Dropout(recipe.dropout),
            nn.Linear(2 * dim, dim), nn.LeakyReLU(), nn.Linear(dim, shape.tasks),
        )  # fmt: skip

    def forward(self, history: Tensor, query: Tensor, candidates: Tensor, dense: Tensor, context: Tensor) -> Tensor:
        batch, count = candidates.shape[:2]
        events, extra = self.event_vectors(history)
        items = self.item_vectors(candidates)  # [B, N, D]
        past = (events + extra)[:, None].expand(-1, count, -1, -1)
        x = torch.cat([past, items[:, :, None]], 2).flatten(0, 1) + self.position  # [B · N, L + 1, D]
        known = torch.cat([there(history), torch.ones_like(history[:, :1, 0], dtype=torch.bool)], 1)
        mask = (~known).to(x.dtype)[:, None, None, None, :] * MASKED  # [B, 1, 1, 1, L + 1]
        mask = mask.expand(-1, count, -1, -1, -1).flatten(0, 1)  # [B · N, 1, 1, L + 1]
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, None, mask)
        x = x.unflatten(0, (batch, count))
        weight = known[:, None, :, None].to(x.dtype)
        mean = (x * weight).sum(2) / weight.sum(2)
        words = self.embedding(query).sum(1)[:, None].expand(-1, count, -1)
        wide = context[:, None].expand(-1, count, -1)
        scores: Tensor = self.mlp(torch.cat([x[:, :, -1], mean, words, dense, wide], -1))
        return scores
