"""Weights used more than once.

- ``blocks``: all encoder blocks have one set of weights, their mean, as in ALBERT (Lan et al. 2020). Smaller, not
  faster.
- ``codes``: rows of embedding tables are put together from codebooks found by k-means: with one group plain k-means,
  with several product quantisation (Jégou et al. 2011). A row then takes a byte a group.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from trirank_build.compression.step import Context, StepSettings, Work
from trirank_build.errors import BadRecipe
from trirank_build.features.fitting import Features
from trirank_build.models.forms.form import Decisions, shared_context
from trirank_build.models.forms.share import Coded, rebuild


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


def _tables(model: nn.Module) -> dict[str, nn.Embedding]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Embedding)}


def _decide(model: nn.Module, settings: Settings) -> Decisions:
    blocks = len(shared_context(model, "share").encoder) if settings.blocks else 0
    tables = sorted(_tables(model)) if settings.codes else []
    return {"blocks": blocks, "tables": tables, "groups": settings.groups, "codes": settings.codes}
