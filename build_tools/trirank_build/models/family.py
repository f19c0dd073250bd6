"""Architectures by name: the ranker of this project, and the baselines of its family."""

from __future__ import annotations

from trirank_backend.features import FeatureSpec

from trirank_build.models.bst import Bst
from trirank_build.models.lstm import Lstm
from trirank_build.models.ranker import SharedContextRanker
from trirank_build.models.sasrec import SasRec
from trirank_build.models.sequence import SequenceRanker
from trirank_build.recipe import ModelRecipe

ARCHITECTURES: dict[str, type[SequenceRanker]] = {
    "shared_context": SharedContextRanker,
    "sasrec": SasRec,
    "lstm": Lstm,
    "bst": Bst,
}


def make_ranker(spec: FeatureSpec, recipe: ModelRecipe) -> SequenceRanker:
    """A fresh ranker; its weights come from torch's random state."""
    return ARCHITECTURES[recipe.architecture](spec, recipe)
