"""`trirank train`: fit features, pre-train, learn to rank; one process or many, resumed wherever it was stopped."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tomli_w
import torch

from trirank_build.artefacts import atomic_directory, atomic_file
from trirank_build.data.dataset import Dataset
from trirank_build.errors import BadCheckpoint
from trirank_build.features.fitting import Features, fit_features
from trirank_build.models.family import make_ranker
from trirank_build.progress import working
from trirank_build.recipe import Recipe
from trirank_build.training.distributed import Ranks, ranks
from trirank_build.training.loop import Loop, Phase
from trirank_build.training.pretraining import Pretraining
from trirank_build.training.ranking import RANKING, Ranking, held_out, logged
from trirank_build.training.run import BEST, FEATURES, RECIPE, RUN, TrainedRun

_EXAMPLES = "examples"
"""Folder of the unpacked requests while training lasts."""

Report = Callable[[str, int, float], None]
"""Called after every epoch with its phase, number and NDCG@10."""


def train(
    recipe: Recipe, dataset: Dataset, out: Path, *, fresh: bool = False, report: Report | None = None
) -> TrainedRun:
    """Train, or go on where an earlier call with the same recipe and data stopped.

    Raises:
        BadCheckpoint: ``out`` holds a run of another recipe or dataset, and ``fresh`` was not said.
        BadData: the dataset has nothing to learn from.
        TrirankBuildError: the loss is not a number.
    """
    identity = _identity(recipe, dataset)
    with ranks() as group:
        if group.leads:
            _prepare(out, recipe, dataset, identity, fresh)
        group.wait()
        if not (out / RUN).is_file():
            _run(recipe, dataset, out, identity, group, report)
        group.wait()
    return TrainedRun.load(out)


def _identity(recipe: Recipe, dataset: Dataset) -> str:
    # What tuning would try, and how often a place is saved, change nothing of the weights.
    settings = recipe.model_dump_json(exclude={"tuning": True, "training": {"checkpoint_minutes"}})
    return hashlib.sha256(f"{settings}\0{dataset.description.digest}".encode()).hexdigest()


def _prepare(out: Path, recipe: Recipe, dataset: Dataset, identity: str, fresh: bool) -> None:
    """Make ``out`` with its recipe and features, unless a run with this identity is there already."""
    marker = out / "identity"
    if out.exists() and any(out.iterdir()):
        if marker.is_file() and marker.read_text() == identity and not fresh:
            return
        if not fresh:
            raise BadCheckpoint(
                f"{out} holds something else than a run of this recipe on this dataset; "
                "choose another --out, or say --fresh to replace it"
            )
        if not marker.is_file():
            raise BadCheckpoint(f"{out} is no training run; not replacing it. Choose another --out")
    with atomic_directory(out) as scratch:
        (scratch / FEATURES).mkdir()
        with working("fitting features"):
            fit_features(dataset, recipe.features, scratch / FEATURES)
        (scratch / RECIPE).write_text(tomli_w.dumps(recipe.model_dump(exclude_none=True)))
        (scratch / "identity").write_text(identity)


def _run(recipe: Recipe, dataset: Dataset, out: Path, identity: str, group: Ranks, report: Report | None) -> None:
    features = Features.load(out / FEATURES)
    torch.manual_seed(recipe.seed)
    model = make_ranker(features.spec, recipe.model).to(group.device)
    unpacked = out / _EXAMPLES / str(group.rank)

    def pretraining() -> Phase:
        return Pretraining(model, recipe.pretraining, dataset, features, recipe.seed)

    def ranking() -> Phase:
        settings, seed = recipe.training, recipe.seed
        if settings.requests == "held_out":
            with working("retrieving candidates for the held-out choices"):
                return Ranking(model, settings, dataset, *held_out(dataset, features, model, settings, seed))
        with working("unpacking requests"):
            return Ranking(model, settings, dataset, *logged(dataset, features, settings, seed, unpacked))

    phases: dict[str, Callable[[], Phase]] = {}
    if recipe.pretraining.objective != "none":
        phases[recipe.pretraining.objective] = pretraining
    if recipe.training.epochs:
        phases[RANKING] = ranking
    loop = Loop(model, phases, seed=recipe.seed, directory=out, identity=identity, ranks=group)
    loop.run(report)
    if group.leads:
        facts: dict[str, Any] = {
            "recipe": recipe.name,
            "dataset": asdict(dataset.description),
            "curve": loop.curve,
            "seconds": round(loop.elapsed(), 1),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "processes": group.world,
        }
        os.replace(loop.best(list(phases)[-1]), out / BEST)
        with atomic_file(out / RUN) as scratch:
            scratch.write_text(json.dumps(facts, indent=1) + "\n")
        loop.last.unlink()
        shutil.rmtree(out / _EXAMPLES, ignore_errors=True)
