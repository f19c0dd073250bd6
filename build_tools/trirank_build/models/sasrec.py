"""SASRec (Kang and McAuley, "Self-attentive sequential recommendation", ICDM 2018): the published yardstick."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from trirank_backend.features import FeatureSpec

from trirank_build.models.embeddings import STD
from trirank_build.models.ranker import MASKED, Block
from trirank_build.models.sequence import SequenceRanker, there
from trirank_build.recipe import ModelRecipe


class SasRec(SequenceRanker):
    """Causal self-attention over the history; a candidate's score is its similarity to the last state."""

    def __init__(self, spec: FeatureSpec, recipe: ModelRecipe) -> None:
        super().__init__(spec, recipe)
        self.position = nn.Parameter(torch.randn(spec.history_length, recipe.dim) * STD)
        self.blocks = nn.ModuleList(Block(recipe, recipe.dropout) for _ in range(recipe.encoder_blocks))
        self.norm = nn.LayerNorm(recipe.dim)

    def states(self, history: Tensor, masked: Tensor | None = None) -> Tensor:
        items, _ = self.event_vectors(history)
        length = history.shape[1]
        x = self.dropout(items + self.position[-length:])
        padding = (~there(history))[:, None, None, :].to(x.dtype) * MASKED
        later = torch.full((length, length), MASKED, dtype=x.dtype, device=x.device).triu(1)
        for block in self.blocks:
            x = block(x, None, torch.clamp(padding + later, min=MASKED))
        return self.norm(x)

    def forward(self, history: Tensor, query: Tensor, candidates: Tensor, dense: Tensor, context: Tensor) -> Tensor:
        scores = self.logits(self.next_state(history)[:, None], self.item_vectors(candidates)).transpose(1, 2)
        return scores.expand(-1, -1, self.tasks)
