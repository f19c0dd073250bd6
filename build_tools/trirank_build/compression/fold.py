"""The vectors of an item's fields, folded into one row an item.

The ranker sums the vectors of an item's fields, ten or so gathers an item. The sum depends on the item alone, so it is
taken once, here, for every item of the catalogue; served, an item is one gather, and preprocess sends one number
instead of ten. Nothing else changes but the order of a sum. The rest of the joint vocabulary (behaviours, time gaps,
query tokens) keeps a table of its own; rows of fields that only items had are gone.

Take it after the steps that train, or let those train the items' rows: both work.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import nn

from trirank_build.compression.step import Context, StepSettings, Work
from trirank_build.errors import BadRecipe
from trirank_build.features.fitting import Features
from trirank_build.models.forms.fold import Rest, rebuild
from trirank_build.models.forms.form import Decisions, shared_context
from trirank_build.models.ranker import SharedContextRanker

_REST = ("behaviour", "time_gap", "token")
_CHUNK = 65_536


class Settings(StepSettings):
    """Nothing to choose."""

    kind: Literal["fold"] = "fold"


def check(model: nn.Module, settings: Settings, features: Features) -> tuple[nn.Module, Features]:
    """See step.Step."""
    ranker = shared_context(model, "fold")
    if ranker.folded is not None:
        raise BadRecipe("the chain folds twice; once is enough")
    _check_stays_small(ranker, features)
    return rebuild(model, _decide(ranker, features)), _features(features)


def _check_stays_small(ranker: SharedContextRanker, features: Features) -> None:
    """A compact table holds what items share but once; the sum of an item's fields is its own, and has no such form.

    Raises:
        BadRecipe: one vector an item would take more than the compact table does.
    """
    if isinstance(ranker.embedding, nn.Embedding):
        return
    now = sum(tensor.numel() * tensor.element_size() for tensor in ranker.embedding.state_dict().values())
    decisions = _decide(ranker, features)
    then = 4 * ranker.dim * (decisions["items"] + decisions["rest"])
    if then > now:
        raise BadRecipe(
            f"it would make {then / 1e6:,.2f} MB, a vector for each of {len(features.catalogue):,} items, of tables "
            f"that are kept compact in {now / 1e6:,.2f} MB; leave fold out of the chain, or train with "
            'model.embedding = "plain"'
        )


def run(work: Work, settings: Settings, context: Context) -> None:
    """See step.Step."""
    ranker = shared_context(work.model, "fold")
    decisions = _decide(ranker, work.features)
    fields = torch.from_numpy(work.features.packer.items(np.arange(-1, len(work.features.catalogue), dtype=np.int32)))
    with torch.inference_mode():
        items = torch.cat([ranker.item_vectors(part) for part in torch.split(fields, _CHUNK)])
        first = decisions["first"]
        rest = torch.cat([ranker.embedding(torch.arange(at, min(at + _CHUNK, first + decisions["rest"] - 1)))
                          for at in range(first, first + decisions["rest"] - 1, _CHUNK)])  # fmt: skip
    work.model = rebuild(ranker, decisions)
    with torch.no_grad():
        assert isinstance(ranker.folded, nn.Embedding)
        assert isinstance(ranker.embedding, Rest)
        ranker.folded.weight.copy_(items)
        ranker.embedding.table.weight[1:].copy_(rest)
    work.decisions.append((settings.kind, decisions))
    work.features = _features(work.features)
    context.finetune(work, settings.training, "finetuning")


def _features(features: Features) -> Features:
    return features.changed(folded=len(features.catalogue) + 1)


def _decide(ranker: SharedContextRanker, features: Features) -> Decisions:
    spec = features.spec
    first = min(spec.tables[name][0] for name in _REST)
    return {
        "items": len(features.catalogue) + 1, "dim": ranker.dim,
        "first": first, "rest": spec.vocabulary_size - first + 1,
    }  # fmt: skip
