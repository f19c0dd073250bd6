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

import polars as pl
import tomli_w
import torch

from trirank_build.artefacts import atomic_directory, atomic_file, file_digest
from trirank_build.data.dataset import Dataset
from trirank_build.errors import BadCheckpoint, BadData, BadRecipe
from trirank_build.features.fitting import Features, fit_features, refresh_features
from trirank_build.features.vocabulary import Vocabulary
from trirank_build.models.checkpoint import load_checkpoint, load_weights
from trirank_build.models.family import make_ranker
from trirank_build.progress import working
from trirank_build.recipe import Recipe
from trirank_build.training.distributed import Ranks, ranks
from trirank_build.training.growing import grown
from trirank_build.training.loop import Loop, Phase
from trirank_build.training.pretraining import Pretraining
from trirank_build.training.ranking import RANKING, Ranking, held_out, logged
from trirank_build.training.run import BEST, FEATURES, RECIPE, RUN, TrainedRun, check_features

REFIT = "refit"
_BEGUN = "begun.json"
"""What was found before ranking began, for the facts at the end."""
_EXAMPLES = "examples"
"""Folder of the unpacked requests while training lasts."""

Report = Callable[[str, int, float], None]
"""Called after every epoch with its phase, number and NDCG@10."""


def train(
    recipe: Recipe,
    dataset: Dataset,
    out: Path,
    *,
    start_from: Path | None = None,
    update: Path | None = None,
    fresh: bool = False,
    report: Report | None = None,
) -> TrainedRun:
    """Train, or go on where an earlier call with the same recipe and data stopped.

    Args:
        start_from: a finished run whose weights are the first ones; its features must be the same.
        update: a finished run on an earlier state of the data, which goes on with what has been added since; see
            training.growing.

    Raises:
        BadRecipe: held-out requests are asked for, and nothing was pre-trained; or the recipe cannot be an update's.
        BadCheckpoint: ``out`` holds a run of another recipe or dataset, and ``fresh`` was not said.
        BadData: the dataset has nothing to learn from.
        Diverged: the loss is not a number.
    """
    earlier = update or start_from
    if earlier is not None and recipe.training.privacy is not None:
        raise BadRecipe(
            f"training.privacy starts from nothing: what {earlier} learned of users is in no account. Leave "
            f"{'--update' if update is not None else '--start-from'} or [training.privacy] out"
        )
    first = None if earlier is None else TrainedRun.load(earlier)
    if update is not None:
        assert first is not None
        _check_update(recipe, dataset, first)
    if first is None and recipe.training.requests == "held_out" and recipe.pretraining.objective == "none":
        raise BadRecipe(
            'training.requests = "held_out" retrieves with pre-trained states; choose pretraining.objective, or start '
            "from a run that was pre-trained (--start-from)"
        )
    identity = _identity(recipe, dataset, first, update is not None)
    with ranks() as group:
        if group.world > 1 and recipe.training.privacy is not None:
            raise BadRecipe(
                f"training.privacy goes with one process, not {group.world}: the noise is added once to one sum"
            )
        if group.leads:
            _prepare(out, recipe, dataset, identity, fresh, None if update is None else update / FEATURES)
        group.wait()
        if not (out / RUN).is_file():
            _run(recipe, dataset, out, identity, group, first, update is not None, report)
        group.wait()
    return TrainedRun.load(out)


def _check_update(recipe: Recipe, dataset: Dataset, first: TrainedRun) -> None:
    first.check_refresh(dataset)
    if "held_out" in (recipe.training.requests, first.recipe.training.requests):
        raise BadRecipe(
            'an update goes with training.requests = "logged": what a ranker learned of held-out choices would be what '
            "its update is validated by. Train anew"
        )
    for section in ("features", "model"):
        if getattr(recipe, section) != getattr(first.recipe, section):
            raise BadRecipe(f"[{section}] differs from that of {first.directory}; an update goes on with what is there")
    if not dataset.description.timed:
        raise BadRecipe(f"{dataset.description.source} has no times, so nothing of it is newer; train anew")
    judged = dataset.requests.filter(pl.col("split") == "valid").select(pl.col("timestamp").min()).collect().item()
    until = first.facts.get("trained_until")
    if until is not None and judged is not None and judged <= until:
        raise BadData(
            f"{dataset.description.source} is validated from {judged} on, and {first.directory} learned until {until}: "
            "it would be judged by what it knows. Add a newer log, or train anew"
        )
    if "trained_until" not in first.facts:
        raise BadCheckpoint(f"{first.directory} does not say until when it learned; train it anew with this version")


def _identity(recipe: Recipe, dataset: Dataset, first: TrainedRun | None, update: bool) -> str:
    # What tuning would try, and how often a place is saved, change nothing of the weights.
    without = {"checkpoint_minutes"} | ({"privacy"} if recipe.training.privacy is None else set())
    settings = recipe.model_dump_json(exclude={"tuning": True, "training": without})
    weights = "" if first is None else f"{'update of ' * update}{file_digest(first.directory / BEST)}"
    return hashlib.sha256(f"{settings}\0{dataset.description.digest}\0{weights}".encode()).hexdigest()


def _prepare(out: Path, recipe: Recipe, dataset: Dataset, identity: str, fresh: bool, known: Path | None) -> None:
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
            fit_features(dataset, recipe.features, scratch / FEATURES, known, recipe.training.privacy)
        (scratch / RECIPE).write_text(tomli_w.dumps(recipe.model_dump(exclude_none=True)))
        (scratch / "identity").write_text(identity)


def _run(
    recipe: Recipe,
    dataset: Dataset,
    out: Path,
    identity: str,
    group: Ranks,
    first: TrainedRun | None,
    update: bool,
    report: Report | None,
) -> None:
    features = Features.load(out / FEATURES)
    torch.manual_seed(recipe.seed)
    model = make_ranker(features.spec, recipe.model)
    since = None
    if update:
        assert first is not None
        since = first.facts["trained_until"] + 1
        words = Vocabulary.load(first.directory / FEATURES), Vocabulary.load(out / FEATURES)
        with working("carrying over what was learned"):
            grown(first.model(), first.features, words[0], model, features, words[1])
    elif first is not None:
        check_features(first, features)
        load_weights(model, load_checkpoint(first.directory / BEST)[0], first.directory / BEST)
    model.to(group.device)
    unpacked = out / _EXAMPLES / str(group.rank)

    def pretraining() -> Phase:
        return Pretraining(model, recipe.pretraining, dataset, features, recipe.seed, since=since)

    begun: dict[str, Any] = {}

    def ranking() -> Phase:
        settings, seed = recipe.training, recipe.seed
        if settings.requests == "held_out":
            with working("retrieving candidates for the held-out choices"):
                requests = held_out(dataset, features, model, settings, seed)
        else:
            with working("unpacking requests"):
                requests = logged(dataset, features, settings, seed, unpacked, since)
        phase = Ranking(model, settings, dataset, *requests)
        if phase.private is not None:
            begun["privacy"] = phase.private.facts()
        begun["valid_retrieval_ndcg10"] = round(phase.retrieved(), 6)
        if settings.start == "linear" and first is None:
            with working("fitting the order to start from"):
                start = phase.start(recipe.pretraining.objective != "none", seed)
            begun["start"] = None if start is None else start._asdict()
        if group.leads:  # a run that is killed in a later phase does not come here again
            with atomic_file(out / _BEGUN) as scratch:
                scratch.write_text(json.dumps(begun))
        return phase

    def refit() -> Phase:
        known = dataset.with_lent(recipe.seed)
        if group.leads:  # the words stay, what is counted is counted again
            with atomic_directory(out / FEATURES) as scratch:
                refresh_features(out / FEATURES, known, scratch)
        group.wait()
        linear = model.linear_parts()
        assert linear is not None
        kept = {id(parameter) for parameter in (*linear[0].parameters(), linear[1])}
        torch.manual_seed(recipe.seed)
        fresh = make_ranker(features.spec, recipe.model)
        with torch.no_grad():
            for parameter, new in zip(model.parameters(), fresh.parameters(), strict=True):
                if id(parameter) not in kept:
                    parameter.copy_(new)
        epochs = _best(loop.curve, recipe.pretraining.objective)["epoch"]
        settings = recipe.pretraining.model_copy(update={"epochs": epochs, "patience": epochs})
        return Pretraining(model, settings, known, Features.load(out / FEATURES), recipe.seed, REFIT)

    if not model.has_states and recipe.pretraining.objective != "none":
        raise BadRecipe(f'model.architecture = "{recipe.model.architecture}" has no states to pre-train; say '
                        'pretraining.objective = "none"')  # fmt: skip
    phases: dict[str, Callable[[], Phase]] = {}
    if recipe.pretraining.objective != "none":
        phases[recipe.pretraining.objective] = pretraining
    if recipe.training.epochs or (recipe.training.start == "linear" and model.linear_parts() is not None):
        phases[RANKING] = ranking
    if recipe.training.refit:
        phases[REFIT] = refit
    loop = Loop(
        model, phases, seed=recipe.seed, directory=out, identity=identity, ranks=group,
        half=recipe.training.precision == "bfloat16", checkpoint_minutes=recipe.training.checkpoint_minutes,
    )  # fmt: skip
    loop.run(report)
    if group.leads:
        judged = RANKING if RANKING in phases else list(phases)[-1]
        facts: dict[str, Any] = {
            "recipe": recipe.name,
            "dataset": asdict(dataset.description),
            "curve": loop.curve,
            "seconds": round(loop.elapsed(), 1),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "processes": group.world,
            "trained_until": _newest(dataset),
            **({"update_of": first.facts["dataset"]["digest"]} if update and first is not None else {}),
            **(json.loads((out / _BEGUN).read_text()) if (out / _BEGUN).is_file() else {}),
            "valid_ndcg10": _kept(loop.curve, judged, recipe)["valid_ndcg10"],
        }
        os.replace(loop.best(list(phases)[-1]), out / BEST)
        with atomic_file(out / RUN) as scratch:
            scratch.write_text(json.dumps(facts, indent=1) + "\n")
        for last in out.glob("last*.safetensors"):
            last.unlink()
        (out / _BEGUN).unlink(missing_ok=True)
        shutil.rmtree(out / _EXAMPLES, ignore_errors=True)


def _newest(dataset: Dataset) -> int:
    """Second of the newest training event, or of the newest training request where there are none."""
    found = dataset.events.lazy().filter(pl.col("split") == "train").select(pl.col("timestamp").max()).collect().item()
    if found is None:
        requests = dataset.requests.filter(pl.col("split") == "train")
        found = requests.select(pl.col("timestamp").max()).collect().item()
    return int(found or 0)


def _kept(curve: list[dict[str, Any]], phase: str, recipe: Recipe) -> dict[str, Any]:
    """The point of the phase whose weights are kept."""
    return curve[-1] if recipe.training.privacy is not None else _best(curve, phase)


def _best(curve: list[dict[str, Any]], phase: str) -> dict[str, Any]:
    """The phase's best point."""
    return max((point for point in curve if point["phase"] == phase), key=lambda point: point["valid_ndcg10"])
