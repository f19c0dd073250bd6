"""Blocks that are gone through several times, tables put together from codebooks."""

from __future__ import annotations

import numpy as np
import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor, nn
from torch.nn import functional as F

from trirank_build.models.forms.form import Decisions, replace, shared_context

_FIRST = -128
"""Codes are stored as INT8, the first one as this."""


def rebuild(model: nn.Module, decisions: Decisions) -> nn.Module:
    """See step.Step. Decisions: how many blocks share their weights, and the tables that have codebooks."""
    ranker = shared_context(model, "share")
    if decisions["blocks"]:
        ranker.encoder = Repeated(next(iter(ranker.encoder)), decisions["blocks"])  # type: ignore[assignment]
    for name in decisions["tables"]:
        table = model.get_submodule(name)
        assert isinstance(table, nn.Embedding)
        replace(model, name, Coded(table.num_embeddings, table.embedding_dim, decisions["groups"], decisions["codes"]))
    return model


class Repeated(nn.Module):
    """One block that is gone through several times."""

    def __init__(self, block: nn.Module, times: int) -> None:
        super().__init__()
        self.block, self.times = block, times

    def __len__(self) -> int:
        return self.times

    def __getitem__(self, at: int) -> nn.Module:
        return self.block

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter([self.block] * self.times)


class Coded(nn.Module):
    """A table [V, D] as codes [V, G] into codebooks [G, K, D / G]; the codebooks can be trained, the codes not."""

    codes: Tensor
    first: Tensor

    def __init__(self, rows: int, dim: int, groups: int, codes: int) -> None:
        super().__init__()
        self.books = nn.Parameter(torch.zeros(groups * codes, dim // groups))
        self.register_buffer("codes", torch.full((rows, groups), _FIRST, dtype=torch.int8))
        self.register_buffer("first", torch.arange(groups, dtype=torch.int32) * codes - _FIRST, persistent=False)
        self.per_book = codes

    def forward(self, ids: Tensor) -> Tensor:
        at = F.embedding(ids, self.codes).to(torch.int32) + self.first
        vectors = F.embedding(at, self.books).flatten(-2)
        return vectors * (ids > 0).to(vectors.dtype)[..., None]  # "missing" is zeros, not the nearest code

    def learn(self, table: Tensor, seed: int) -> None:
        """k-means on each part of the width."""
        groups = self.codes.shape[1]
        width = table.shape[1] // groups
        for group in range(groups):
            part = table[:, group * width : (group + 1) * width].double().numpy()
            count = min(self.per_book, len(np.unique(part, axis=0)))
            centres, codes = kmeans2(part, count, minit="++", seed=np.random.default_rng((seed, group)))
            start = group * self.per_book
            self.books.data[start : start + count] = torch.from_numpy(centres).float()
            self.codes[:, group] = torch.from_numpy(codes + _FIRST).to(torch.int8)
