"""One vector an item in place of the sum of its fields' vectors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trirank_build.models.forms.form import Decisions, shared_context


def rebuild(model: nn.Module, decisions: Decisions) -> nn.Module:
    """See step.Step. Decisions: rows of items, the first other id of the joint vocabulary, and how many there are."""
    ranker = shared_context(model, "fold")
    ranker.folded = nn.Embedding(decisions["items"], decisions["dim"], padding_idx=0)
    ranker.embedding = Rest(decisions["first"], decisions["rest"], decisions["dim"])
    ranker.fields = 1
    return ranker


class Rest(nn.Module):
    """Ids of the joint vocabulary from ``first`` on; 0, "missing", gives zeros."""

    def __init__(self, first: int, rows: int, dim: int) -> None:
        super().__init__()
        self.first = first
        self.table = nn.Embedding(rows, dim, padding_idx=0)

    def forward(self, ids: Tensor) -> Tensor:
        rows: Tensor = self.table(torch.clamp(ids - (self.first - 1), min=0))
        return rows
