"""`trirank compress`: one step after the other, each with its checkpoint and its report, resumed at any of them.

``STEP-KIND/``     a directory like a training run's (trirank_build.training.run): what the ranker is after that step
``compressed``     a link to the last one

A step is known by its settings and by all that went before, so a chain with another fourth step keeps the first three.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
from torch import nn

from trirank_build.artefacts import atomic_file, file_digest
from trirank_build.compression.finetune import Finetuning, run_phase
from trirank_build.compression.recipe import CHAIN, KINDS, CompressionRecipe
from trirank_build.compression.step import Context, FineTuning, Requests, StepSettings, Work
from trirank_build.data.dataset import Dataset
from trirank_build.errors import BadCheckpoint, BadRecipe
from trirank_build.features.fitting import Features
from trirank_build.models.checkpoint import load_checkpoint, save_checkpoint
from trirank_build.progress import working
from trirank_build.training.run import BEST, FEATURES, RECIPE, RUN, TrainedRun

LINK = "compressed"
_EXAMPLES = "examples"


@dataclass(frozen=True)
class Compressed:
    """A finished chain.

    Attributes:
        dense: the run that it started from.
        steps: the directory of each step, a run by itself.
        report: of the dense ranker and each step: kind, parameters, bytes of its checkpoint, validation NDCG@10.
    """

    dense: Path
    steps: list[Path]
    report: list[dict[str, Any]]

    @property
    def last(self) -> TrainedRun:
        """The compressed ranker."""
        return TrainedRun.load(self.steps[-1])


def compress(
    recipe: CompressionRecipe, dense: TrainedRun, dataset: Dataset, out: Path, *, fresh: bool = False
) -> Compressed:
    """Take all steps, or go on where an earlier call stopped.

    Raises:
        BadData: the dataset is another one than the ranker was trained on.
        BadRecipe: a step does not fit the ranker that it would find.
        BadCheckpoint: ``out`` holds something else, or steps with other settings and ``fresh`` was not said.
        Diverged: a loss is not a number.
    """
    dense.check_data(dataset)
    if dense.facts.get("compression"):
        raise BadRecipe(f"{dense.directory} is compressed already; start from the run that `trirank train` made")
    check_chain(recipe, dense)
    identities = _identities(recipe, dense, dataset)
    folders = [out / f"{number}-{step.kind}" for number, step in enumerate(recipe.steps, 1)]
    _prepare(out, folders, identities, fresh)
    with atomic_file(out / CHAIN) as scratch:
        scratch.write_text(tomli_w.dumps(recipe.to_toml()))

    chain = _Chain(recipe, dense, dataset, out)
    work, done = chain.start(folders)
    for number, step in enumerate(recipe.steps):
        if number >= done:
            chain.take(step, folders[number], identities[number], work)
    with atomic_file(out / LINK) as scratch:
        scratch.symlink_to(folders[-1].name)
    shutil.rmtree(out / _EXAMPLES, ignore_errors=True)
    runs = {"dense": dense} | {folder.name: TrainedRun.load(folder) for folder in folders}
    # By the requests that the chain is judged by, which a dense ranker that learned from held-out choices was not.
    dense_ndcg = next(reversed(runs.values())).facts["dense_valid_ndcg10"]
    return Compressed(dense.directory, folders, [_report(name, run, dense_ndcg) for name, run in runs.items()])


def check_chain(recipe: CompressionRecipe, dense: TrainedRun) -> tuple[nn.Module, Features]:
    """Take all steps on the form of the ranker alone; gives the form at the end, with weights that mean nothing, and
    what it sees.

    Raises:
        BadRecipe: a step does not fit the ranker that it would find.
        BadCheckpoint, BadData: a step names a run or a dataset that does not fit.
    """
    if dense.recipe.training.privacy is not None:
        _check_private(recipe, dense)
    model: nn.Module = dense.model()
    features = dense.features
    for number, step in enumerate(recipe.steps, 1):
        try:
            model, features = KINDS[step.kind].check(model, step, features)
        except BadRecipe as error:  # noqa: PERF203  # a handful of steps
            raise BadRecipe(f"{recipe.name}: step {number} ({step.kind}): {error}") from None
    return model.eval(), features


def _check_private(recipe: CompressionRecipe, dense: TrainedRun) -> None:
    for number, step in enumerate(recipe.steps, 1):
        if step.reads:
            raise BadRecipe(
                f"{recipe.name}: step {number} ({step.kind}): {dense.directory} was trained with differential privacy, "
                f"and {step.reads} would learn from users without; take steps that read no requests: fold, factorise "
                'or share with training = { epochs = 0 }, prune with that and importance = "magnitude", quantise with '
                'precision = "float16" or with calibration_data that may be seen'
            )


def _identities(recipe: CompressionRecipe, dense: TrainedRun, dataset: Dataset) -> list[str]:
    """Of each step: its settings, and all that went before."""
    start = f"{file_digest(dense.directory / BEST)}\0{dataset.description.digest}\0{recipe.seed}"
    digest, found = hashlib.sha256(start.encode()), []
    for step in recipe.steps:
        digest.update(step.model_dump_json().encode())
        found.append(digest.hexdigest())
    return found


def _prepare(out: Path, folders: list[Path], identities: list[str], fresh: bool) -> None:
    if out.exists() and any(out.iterdir()) and not (out / CHAIN).is_file():
        raise BadCheckpoint(f"{out} holds something else than a compression; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    same = True
    for folder, identity in zip(folders, identities, strict=True):
        marker = folder / "identity"
        same = same and (not folder.exists() or (marker.is_file() and marker.read_text() == identity))
        if not same and folder.exists():
            if not fresh:
                raise BadCheckpoint(
                    f"{folder} holds a step with other settings; choose another --out, or say --fresh to take it and "
                    "those behind it again"
                )
            shutil.rmtree(folder)


class _Chain:
    """What all steps of one chain share."""

    def __init__(self, recipe: CompressionRecipe, dense: TrainedRun, dataset: Dataset, out: Path) -> None:
        self._recipe, self._dense, self._dataset = recipe, dense, dataset
        self._teacher = dense.model()
        self._requests = Requests(self._teacher, dense.features, dense.recipe, dataset, out / _EXAMPLES)
        self._taken: list[dict[str, Any]] = []
        self._of_dense: float | None = None

    def start(self, folders: list[Path]) -> tuple[Work, int]:
        """The ranker after the steps that are finished, and how many those are."""
        done = 0
        while done < len(folders) and (folders[done] / RUN).is_file():
            done += 1
        if not done:
            return Work(copy.deepcopy(self._teacher), self._dense.features), 0
        found = TrainedRun.load(folders[done - 1])
        self._taken = found.facts["compression"]
        decisions = load_checkpoint(found.directory / BEST)[1]["compression"]
        return Work(found.model(), found.features, [(kind, made) for kind, made in decisions]), done

    def take(self, step: StepSettings, folder: Path, identity: str, work: Work) -> None:
        """One step on ``work``; leaves its checkpoint and its report in ``folder``."""
        folder.mkdir(exist_ok=True)
        (folder / "identity").write_text(identity)
        curves: dict[str, list[dict[str, Any]]] = {}

        def finetune(
            now: Work, settings: FineTuning, name: str, *, teacher: nn.Module | None = None, seed: int | None = None
        ) -> None:
            if settings.epochs:
                phase = Finetuning(
                    now.model, now.features, teacher or self._teacher,
                    self._dense.features if teacher is None else now.features, self._requests, self._dense.recipe,
                    self._dataset, settings,
                )  # fmt: skip
                seed = self._recipe.seed if seed is None else seed
                curves[name] = run_phase(phase, now.model, folder / name, f"{identity} {name}", seed)

        started = time.monotonic()
        context = Context(
            self._teacher, self._dense.recipe, self._dataset, self._requests, folder, self._recipe.seed, finetune
        )
        KINDS[step.kind].run(work, step, context)
        work.model.eval()
        with working(f"validating after {step.kind}"):
            ndcg = self._requests.valid_ndcg(work.model, work.features)
        self._taken = [*self._taken, {
            "settings": step.model_dump(mode="json"), "valid_ndcg10": round(ndcg, 6), "curves": curves,
            "seconds": round(time.monotonic() - started, 1),
        }]  # fmt: skip
        self._write(folder, work)
        for name in curves:
            shutil.rmtree(folder / name)

    def _dense_ndcg(self) -> float:
        if self._of_dense is None:
            self._of_dense = round(self._requests.valid_ndcg(self._teacher, self._dense.features), 6)
        return self._of_dense

    def _write(self, folder: Path, work: Work) -> None:
        dense = self._dense
        save_checkpoint(folder / BEST, work.model.state_dict(), {"compression": work.decisions})
        shutil.copytree(dense.directory / FEATURES, folder / FEATURES, dirs_exist_ok=True)
        work.features.spec.save(folder / FEATURES / "features.json")
        shutil.copyfile(dense.directory / RECIPE, folder / RECIPE)
        facts: dict[str, Any] = {
            **{key: dense.facts[key] for key in ("recipe", "dataset", "curve", "privacy") if key in dense.facts},
            "dense": os.path.relpath(dense.directory.resolve(), folder.resolve()),  # so that both can be moved together
            "parameters": sum(parameter.numel() for parameter in work.model.parameters()),
            "compression": self._taken,
            "valid_ndcg10": self._taken[-1]["valid_ndcg10"],
            "dense_valid_ndcg10": self._dense_ndcg(),
        }
        with atomic_file(folder / RUN) as scratch:
            scratch.write_text(json.dumps(facts, indent=1) + "\n")


def _report(name: str, run: TrainedRun, dense_ndcg: float) -> dict[str, Any]:
    best = run.facts["valid_ndcg10"] if run.facts.get("compression") else dense_ndcg
    size = (run.directory / BEST).stat().st_size
    return {"step": name, "parameters": run.facts["parameters"], "bytes": size, "valid_ndcg10": best}
