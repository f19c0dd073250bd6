"""Weights used more than once.

- ``blocks``: all encoder blocks have one set of weights, their mean, as in ALBERT (Lan et al. 2020). Smaller, not
  faster.
- ``codes``: rows of embedding tables are put together from codebooks found by k-means: with one group plain k-means,
  with several product quantisation (Jégou et al. 2011). A row then takes a byte a group.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from scipy.cluster.vq import kmeans2
from torch import Tensor, nn
from torch.nn import functional as F

from trirank_build.compression.step import Context, Decisions, StepSettings, Work, replace, shared_context
from trirank_build.errors import BadRecipe
from trirank_build.features.fitting import Features

_FIRST = -128
"""Codes are stored as INT8, the first one as this."""


class Settings(StepSettings):
    """What is shared."""

    kind: Literal["share"] = "share"
    blocks: bool = False
    codes: Annotated[int, Field(ge=0, le=256)] = 0
    """Of each codebook; 0: no codebooks."""
    groups: Annotated[int, Field(ge=1)] = 8
    """Codebooks a table, each for an equal part of the width."""

    @model_validator(mode="after")
    def _something(self) -> Settings:
        if not self.blocks and not self.codes:
            raise ValueError("say blocks = true, or give codes")
        return self


def check(model: nn.Module, settings: Settings, features: Features) -> tuple[nn.Module, Features]:
    """See step.Step."""
    ranker = shared_context(model, "share")
    if settings.blocks:
        if not isinstance(ranker.encoder, nn.ModuleList) or len(ranker.encoder) < 2:
            raise BadRecipe("share.blocks needs at least two encoder blocks that are not shared yet")
        shapes = {tuple(p.shape for p in block.parameters()) for block in ranker.encoder}
        if len(shapes) > 1:
            raise BadRecipe("share.blocks needs blocks of the same shapes; prune all alike, or share before pruning")
    if settings.codes:
        if not (tables := _tables(model)):
            raise BadRecipe("share.codes finds no plain embedding table; share before factorising or quantising")
        for name, table in tables.items():
            if table.embedding_dim % settings.groups:
                raise BadRecipe(f"share.groups = {settings.groups} does not divide the width {table.embedding_dim} of "
                                f"{name}")  # fmt: skip
    return rebuild(model, _decide(model, settings)), features


def run(work: Work, settings: Settings, context: Context) -> None:
    """See step.Step."""
    decisions = _decide(work.model, settings)
    ranker = shared_context(work.model, "share")
    means, tables = {}, _tables(work.model)
    if settings.blocks:
        blocks = [dict(block.named_parameters()) for block in ranker.encoder]
        means = {name: torch.stack([block[name].detach() for block in blocks]).mean(0) for name in blocks[0]}
    work.model = rebuild(work.model, decisions)
    with torch.no_grad():
        if settings.blocks:
            for name, parameter in ranker.encoder.named_parameters():
                parameter.copy_(means[name.removeprefix("block.")])
        for name in decisions["tables"]:
            coded = work.model.get_submodule(name)
            assert isinstance(coded, Coded)
            coded.learn(tables[name].weight.detach(), context.seed)
    work.decisions.append((settings.kind, decisions))
    context.finetune(work, settings.training, "finetuning")


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


def _tables(model: nn.Module) -> dict[str, nn.Embedding]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Embedding)}


def _decide(model: nn.Module, settings: Settings) -> Decisions:
    blocks = len(shared_context(model, "share").encoder) if settings.blocks else 0
    tables = sorted(_tables(model)) if settings.codes else []
    return {"blocks": blocks, "tables": tables, "groups": settings.groups, "codes": settings.codes}
