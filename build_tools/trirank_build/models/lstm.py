"""An LSTM over the history (Hochreiter and Schmidhuber 1997; for sessions, Hidasi et al., "GRU4Rec", ICLR 2016)."""

from __future__ import annotations

from torch import Tensor, nn
from trirank_backend.features import FeatureSpec

from trirank_build.models.sequence import SequenceRanker
from trirank_build.recipe import ModelRecipe


class Lstm(SequenceRanker):
    """``encoder_blocks`` layers; a candidate's score is its similarity to the last state, and a linear part of the
    dense features."""

    def __init__(self, spec: FeatureSpec, recipe: ModelRecipe) -> None:
        super().__init__(spec, recipe)
        self.lstm = nn.LSTM(recipe.dim, recipe.dim, max(recipe.encoder_blocks, 1), batch_first=True)
        self.out = nn.Linear(recipe.dim, recipe.dim)
        self.dense_head = nn.Linear(spec.shape.dense, self.tasks)

    def states(self, history: Tensor, masked: Tensor | None = None) -> Tensor:
        items, extra = self.event_vectors(history)
        found, _ = self.lstm(self.dropout(items + extra))
        states: Tensor = self.out(self.dropout(found))
        return states

    def forward(self, history: Tensor, query: Tensor, candidates: Tensor, dense: Tensor, context: Tensor) -> Tensor:
        affinity = self.logits(self.next_state(history)[:, None], self.item_vectors(candidates)).transpose(1, 2)
        return affinity + self.dense_head(dense)
