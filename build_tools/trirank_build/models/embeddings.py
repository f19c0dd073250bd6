"""Embedding tables over the joint vocabulary, and what keeps the item ids' part small.

With M items and width D the plain table takes M · D numbers. Ten million items at D = 64 are 2.6 GB, and three times
that again while Adam trains. Two smaller ones:

- quotient_remainder (Shi et al., "Compositional embeddings using complementary partitions", KDD 2020): an item shares
  one row with all items of the same quotient and another with all of the same remainder; their product is its own.
  M / R + R rows instead of M, with R remainders.
- low_rank: M · r numbers and a projection r · D shared by all (a factorised table, as in ALBERT, Lan et al. 2020).

Only item ids are compressed: the other tables (brands, tokens, …) are small.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from trirank_backend.features import FeatureSpec

from trirank_build.recipe import ModelRecipe

STD = 0.02
"""Of fresh rows; small, so that what is learned soon outweighs it."""


def make_embedding(spec: FeatureSpec, recipe: ModelRecipe) -> nn.Module:
    """ids int [...] of the joint vocabulary → [..., D]; id 0, "missing", gives zeros."""
    if recipe.embedding == "plain":
        return _table(spec.vocabulary_size, recipe.dim, sparse=recipe.embedding_updates == "rows")
    return _Compressed(spec, recipe)


def embedding_bytes(module: nn.Module) -> int:
    """Bytes of a table's parameters."""
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


class _Compressed(nn.Module):
    """A small table for the items beside a plain one for the rest."""

    def __init__(self, spec: FeatureSpec, recipe: ModelRecipe) -> None:
        super().__init__()
        first, size = spec.tables["item"]
        self.first, self.size = first, size
        # The items come first in the joint vocabulary, so the other ids only move down.
        assert first == 0, "items lead the joint vocabulary"
        sparse = recipe.embedding_updates == "rows"
        self.rest = _table(spec.vocabulary_size - size + 1, recipe.dim, sparse=sparse)
        self.items: nn.Module
        if recipe.embedding == "low_rank":
            widen = nn.Linear(recipe.embedding_rank, recipe.dim, bias=False)
            nn.init.normal_(widen.weight, std=STD)
            rows = _table(size, recipe.embedding_rank, std=recipe.embedding_rank**-0.5, sparse=sparse)
            self.items = nn.Sequential(rows, widen)
        else:
            self.items = _QuotientRemainder(size, recipe.embedding_rows, recipe.dim)

    def forward(self, ids: Tensor) -> Tensor:
        is_item = ids < self.size
        rest = torch.where(is_item, torch.zeros_like(ids), ids - (self.size - 1))
        return self.rest(rest) + self.items(torch.where(is_item, ids, torch.zeros_like(ids)))


class _QuotientRemainder(nn.Module):
    def __init__(self, size: int, remainders: int, dim: int) -> None:
        super().__init__()
        self.remainders = min(remainders, size)
        self.quotient = nn.Embedding(-(-size // self.remainders), dim)
        self.remainder = nn.Embedding(self.remainders, dim)
        nn.init.normal_(self.quotient.weight, mean=1.0, std=0.5)
        nn.init.normal_(self.remainder.weight, std=STD)

    def forward(self, ids: Tensor) -> Tensor:
        quotient = torch.div(ids, self.remainders, rounding_mode="floor")
        vectors = self.quotient(quotient) * self.remainder(ids - quotient * self.remainders)
        return vectors * (ids > 0).to(vectors.dtype)[..., None]


def _table(rows: int, dim: int, std: float = STD, sparse: bool = False) -> nn.Embedding:
    table = nn.Embedding(rows, dim, padding_idx=0, sparse=sparse)
    nn.init.normal_(table.weight, std=std)
    with torch.no_grad():
        table.weight[0] = 0
    return table
