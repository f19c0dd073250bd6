"""Yesterday's ranker for today's items: every value that it knew keeps its row, every new item starts from its content.

The joint vocabulary is sorted, so that new values move the numbers of old ones; rows are carried over by what they
stand for. What an item's own row adds to its content is learned from the items that are known, by ridge regression
(Hoerl and Kennard 1970), and told of the new ones, which then rank at once as their likes do.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from trirank_backend.features import FeatureSpec

from trirank_build.errors import BadCheckpoint, BadRecipe
from trirank_build.features.fitting import Features
from trirank_build.features.vocabulary import Vocabulary
from trirank_build.models.sequence import SequenceRanker

_KNOWN = 200_000
"""Items that the regression is fitted on."""
_CHUNK = 65_536
RIDGE = 0.1
"""Of the mean variance of the content's columns."""


def grown(
    old: SequenceRanker, old_features: Features, old_words: Vocabulary, new: SequenceRanker, features: Features,
    words: Vocabulary,
) -> SequenceRanker:  # fmt: skip
    """``new``, a fresh ranker of the same recipe over a vocabulary that has grown, with the weights of ``old``.

    Raises:
        BadCheckpoint: the rankers differ in more than their vocabulary.
        BadRecipe: the table of items is one whose rows are shared by place.
    """
    source = carried(old_features.spec, old_words, features.spec, words)
    mine, theirs = new.state_dict(), old.state_dict()
    if mine.keys() != theirs.keys():
        raise BadCheckpoint(
            "the run to update has another architecture than the recipe; use the recipe it was trained with"
        )
    tables = _tables(new, features.spec, old_features.spec, source)
    with torch.no_grad():
        for name, tensor in mine.items():
            if name in tables:
                rows = torch.from_numpy(tables[name])
                tensor[rows >= 0] = theirs[name][rows[rows >= 0]]
            elif tensor.shape == theirs[name].shape:
                tensor.copy_(theirs[name])
            else:
                raise BadCheckpoint(
                    f"the run to update has {name} of shape {list(theirs[name].shape)}, the recipe "
                    f"{list(tensor.shape)}; use the recipe it was trained with"
                )
        _start_from_content(new, features, source)
    return new


def carried(
    old: FeatureSpec, old_words: Vocabulary, new: FeatureSpec, words: Vocabulary
) -> NDArray[np.int64]:  # fmt: skip
    """[V] the old row of each row of the new joint vocabulary; -1: it stands for something new.

    Raises:
        BadCheckpoint: the two differ in more than the values of their fields.
    """
    for name in ("item_fields", "history_length", "query_length", "tasks", "timed", "without"):
        if getattr(old, name) != getattr(new, name):
            raise BadCheckpoint(
                f"the run to update has {name} {getattr(old, name)}, this dataset and recipe {getattr(new, name)}; an "
                "update takes the [features] it was trained with"
            )
    source = np.full(new.vocabulary_size, -1, np.int64)
    source[0] = 0
    for name, (first, size) in new.tables.items():
        before, count = old.tables[name]
        known = getattr(words, name, None) if name in ("item", "brand", "category", "attribute") else None
        if known is None:  # behaviours, gaps, prices, words: the same ones
            if count != size:
                raise BadCheckpoint(f"the run to update has {count} values of {name}, not {size}; train anew")
            begin = 0 if name == "time_gap" else 1
            source[first + begin : first + size] = np.arange(before + begin, before + size)
            continue
        theirs = getattr(old_words, name)
        if not len(theirs) or not len(known):
            continue
        at = np.minimum(np.searchsorted(theirs, known), len(theirs) - 1)
        source[first + 1 : first + 1 + len(known)] = np.where(theirs[at] == known, before + 1 + at, -1)
    return source


def _tables(
    model: SequenceRanker, new: FeatureSpec, old: FeatureSpec, source: NDArray[np.int64]
) -> dict[str, NDArray[np.int64]]:
    """Weight of a table → the old row of each of its rows."""
    embedding = model.embedding
    if isinstance(embedding, nn.Embedding):
        return {"embedding.weight": source}
    items = getattr(embedding, "items", None)
    if not isinstance(items, nn.Sequential):
        raise BadRecipe('model.embedding = "quotient_remainder" shares rows by place, and new items move the places; '
                        "train anew, or keep the items plain or low_rank")  # fmt: skip
    size, before = new.tables["item"][1], old.tables["item"][1]
    # Items come first in the joint vocabulary; the others' table begins with "missing".
    others = source[size - 1 :].copy()
    others[0] = 0
    others[1:] = np.where(others[1:] >= 0, others[1:] - (before - 1), -1)
    return {"embedding.items.0.weight": source[:size], "embedding.rest.weight": others}


def _start_from_content(model: SequenceRanker, features: Features, source: NDArray[np.int64]) -> None:
    """Fill in the rows of items that are new."""
    table = model.embedding if isinstance(model.embedding, nn.Embedding) else model.embedding.items[0]  # type: ignore[index]
    assert isinstance(table, nn.Embedding)
    codes = features.catalogue.fields[:-1, features.spec.item_fields.index("item")]
    own = np.flatnonzero(codes)
    new, known = own[source[codes[own]] < 0], own[source[codes[own]] >= 0]
    if not len(new) or not len(known):
        return
    known = known[np.linspace(0, len(known) - 1, min(_KNOWN, len(known))).astype(np.int64)]
    content = _content(model, features, known)
    mean = content.mean(0)
    centred, target = content - mean, table.weight[torch.from_numpy(codes[known].astype(np.int64))]
    level = target.mean(0)
    gram = centred.T @ centred
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram))
    weights = torch.linalg.solve(gram, centred.T @ (target - level))
    for at in range(0, len(new), _CHUNK):
        part = new[at : at + _CHUNK]
        table.weight[torch.from_numpy(codes[part].astype(np.int64))] = (
            (_content(model, features, part) - mean) @ weights + level
        )  # fmt: skip


def _content(model: SequenceRanker, features: Features, rows: NDArray[np.int64]) -> Tensor:
    """[N, D] the vectors of items without what is their own."""
    found = []
    for at in range(0, len(rows), _CHUNK):
        fields = features.packer.items(rows[at : at + _CHUNK].astype(np.int32)).copy()
        fields[:, features.spec.item_fields.index("item")] = 0
        found.append(model.embedding(torch.from_numpy(fields)).sum(-2))
    return torch.cat(found)
