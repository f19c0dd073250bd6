"""The directory that a training run fills; later steps start from it.

``recipe.toml``         as it was given
``features/``           specification, catalogue, tokeniser (trirank_build.features.fitting)
``last.safetensors``    where training stands: weights, optimiser, place; resumed from
``best.safetensors``    the weights of the best epoch
``run.json``            what it was trained on, and the curve
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from trirank_build.errors import BadCheckpoint
from trirank_build.features.fitting import Features
from trirank_build.models.checkpoint import load_checkpoint, load_weights
from trirank_build.models.ranker import SharedContextRanker
from trirank_build.recipe import Recipe, load_recipe

RECIPE, FEATURES, LAST, BEST, RUN = (
    "recipe.toml",
    "features",
    "last.safetensors",
    "best.safetensors",
    "run.json",
)


@dataclass(frozen=True)
class TrainedRun:
    """A finished run, opened."""

    directory: Path
    recipe: Recipe
    features: Features
    facts: dict[str, Any]

    @classmethod
    def load(cls, directory: Path) -> TrainedRun:
        """Open a run.

        Raises:
            BadCheckpoint: there is none, or it has not finished.
        """
        try:
            facts = json.loads((directory / RUN).read_text())
        except (OSError, ValueError) as error:
            raise BadCheckpoint(
                f"{directory} holds no finished training run ({error}); "
                f"run `trirank train RECIPE --data DATASET --out {directory}`"
            ) from error
        return cls(directory, load_recipe(str(directory / RECIPE)), Features.load(directory / FEATURES), facts)

    def model(self) -> nn.Module:
        """The ranker with its best weights, in evaluation mode."""
        model = SharedContextRanker(self.features.spec, self.recipe.model)
        path = self.directory / BEST
        load_weights(model, load_checkpoint(path)[0], path)
        return model.eval()
