"""The directory that a training run fills; later steps start from it.

``recipe.toml``         as it was given
``features/``           specification, catalogue, tokeniser (trirank_build.features.fitting)
``last.safetensors``    where training stands: weights, optimiser, place; resumed from
``PHASE.safetensors``   the best weights of a phase, while later ones go on; what pre-training gave is kept
``best.safetensors``    the weights of the last phase's best epoch
``run.json``            what it was trained on, and the curve

A step of `trirank compress` leaves a directory of the same form, whose checkpoint also says what form the ranker has.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trirank_build.data.dataset import Dataset
from trirank_build.errors import BadCheckpoint, BadData
from trirank_build.features.fitting import Features
from trirank_build.models.checkpoint import load_checkpoint, load_weights
from trirank_build.models.family import make_ranker
from trirank_build.models.forms import rebuild
from trirank_build.models.sequence import SequenceRanker
from trirank_build.progress import warn
from trirank_build.recipe import Recipe, load_recipe

RECIPE, FEATURES, BEST, RUN = "recipe.toml", "features", "best.safetensors", "run.json"


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

    def check_data(self, dataset: Dataset) -> None:
        """Hold a dataset against the one the run was trained on.

        Raises:
            BadData: it is another one, whose items and splits mean nothing to this run.
        """
        own, given = self.facts["dataset"]["digest"], dataset.description.digest
        if own != given:
            raise BadData(
                f"{self.directory} was trained on {self.facts['dataset']['source']} (digest {own[:12]}), this dataset "
                f"is {dataset.description.source} (digest {given[:12]}); give the one it was trained on"
            )

    def judged(self, dataset: Dataset) -> Dataset:
        """The dataset as this ranker may be judged by it: what it learned from of the validation split is training.

        Raises:
            BadData: it is another one than it was trained on.
        """
        self.check_data(dataset)
        return dataset.with_lent(self.recipe.seed) if self.recipe.training.requests == "held_out" else dataset

    def check_refresh(self, dataset: Dataset) -> None:
        """Hold a newer dataset of the same shop against the one the run was trained on.

        Raises:
            BadData: it is of another kind, or the ranker holds the catalogue that it was trained on or was trained with
                differential privacy.
        """
        if self.recipe.training.privacy is not None:
            raise BadData(
                f"{self.directory} was trained with differential privacy, and counts of {dataset.description.source} "
                "would come without; give the dataset it was trained on, or train anew on this one"
            )
        own, given = self.facts["dataset"], dataset.description
        ids = own.get("ids", given.ids)
        for what, before, now in (
            ("has " + ("timestamps" if own["timed"] else "no timestamps"), own["timed"], given.timed),
            (f"has ids of the kinds {', '.join(f'{what}: {kind}' for what, kind in ids.items())}", ids, given.ids),
        ):
            if before != now:
                raise BadData(
                    f"{self.directory} was trained on {own['source']}, which {what}; {given.source} differs there. "
                    "Prepare it as that one was prepared, or train anew"
                )
        events = own["counts"]["events"], given.counts["events"]
        if events[1] < events[0] / 2:
            warn(
                f"{given.source} has {events[1]:,} events, {self.directory} was trained on {events[0]:,}: popularity "
                "is counted in the newer log alone, so give one of the same span of time, the newest days included"
            )
        if self.features.spec.folded:
            raise BadData(
                f"{self.directory} is folded: its graph holds a vector of each of the {len(self.features.catalogue):,} "
                f"items of {own['source']} (digest {own['digest'][:12]}), and {given.source} (digest "
                f"{given.digest[:12]}) is another catalogue. Give the one it was trained on, or assemble a ranker that "
                "was compressed without the step `fold`"
            )

    def model(self) -> SequenceRanker:
        """The ranker with its best weights, in evaluation mode."""
        path = self.directory / BEST
        tensors, description = load_checkpoint(path)
        model = make_ranker(self.features.spec, self.recipe.model)
        for kind, decisions in description.get("compression", ()):
            model = rebuild(kind, model, decisions)  # type: ignore[assignment]  # an ensemble only scores
        load_weights(model, tensors, path)
        return model.eval()


def check_features(first: TrainedRun, features: Features) -> None:
    """Hold a run's features against others: its weights mean nothing to another vocabulary.

    Raises:
        BadCheckpoint: they differ.
    """
    old, new = first.features.spec, features.spec
    for name in (
        "vocabulary_size",
        "item_fields",
        "tables",
        "history_length",
        "query_length",
        "tasks",
        "folded",
        "shape",
    ):
        if getattr(old, name) != getattr(new, name):
            raise BadCheckpoint(
                f"{first.directory} was trained with {name} {getattr(old, name)}, this dataset and recipe have "
                f"{getattr(new, name)}; start from a run on the same dataset with the same [features]"
            )
    if not (first.features.catalogue.fields == features.catalogue.fields).all():
        raise BadCheckpoint(f"{first.directory} numbers its items otherwise; start from a run on the same dataset")
