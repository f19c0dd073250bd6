"""`trirank train`: deterministic with its seed, resumable at every epoch, stopped when validation says so."""

from __future__ import annotations

import hashlib
import json
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
import torch
from torch import Tensor, nn

from trirank_build.artefacts import atomic_directory, atomic_file
from trirank_build.data.dataset import Dataset
from trirank_build.errors import BadCheckpoint, TrirankBuildError
from trirank_build.evaluation.evaluate import valid_ndcg
from trirank_build.features.examples import Batch, Examples
from trirank_build.features.fitting import Features, fit_features
from trirank_build.models.checkpoint import load_checkpoint, load_weights, save_checkpoint
from trirank_build.models.ranker import SharedContextRanker
from trirank_build.progress import console, progress, working
from trirank_build.recipe import Recipe
from trirank_build.training.losses import listwise_softmax
from trirank_build.training.run import BEST, FEATURES, LAST, RECIPE, RUN, TrainedRun


def train(recipe: Recipe, dataset: Dataset, out: Path, *, fresh: bool = False) -> TrainedRun:
    """Train, or go on where an earlier call with the same recipe and data stopped.

    Raises:
        BadCheckpoint: ``out`` holds a run of another recipe or dataset, and ``fresh`` was not said.
        TrirankBuildError: the loss is not a number.
    """
    identity = _identity(recipe, dataset)
    _prepare(out, recipe, dataset, identity, fresh)
    if (out / RUN).is_file():
        return TrainedRun.load(out)
    _Training(recipe, dataset, Features.load(out / FEATURES), out, identity).run()
    return TrainedRun.load(out)


def _identity(recipe: Recipe, dataset: Dataset) -> str:
    return hashlib.sha256(f"{recipe.model_dump_json()}\0{dataset.description.digest}".encode()).hexdigest()


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


class _Training:
    def __init__(self, recipe: Recipe, dataset: Dataset, features: Features, out: Path, identity: str) -> None:
        self.recipe, self.settings, self.out, self.identity = recipe, recipe.training, out, identity
        self.dataset = dataset
        with working("loading requests"):
            self.train = Examples(dataset, "train", features)
            self.valid = Examples(dataset, "valid", features, self.settings.validation_requests, recipe.seed)
        self.thresholds = tuple(dataset.description.tasks[task] for task in features.spec.tasks)
        torch.manual_seed(recipe.seed)
        self.model = SharedContextRanker(features.spec, recipe.model)
        self.optimiser = torch.optim.AdamW(
            self.model.parameters(),
            lr=self.settings.learning_rate,
            weight_decay=self.settings.weight_decay,
            fused=True,
        )
        self.steps_per_epoch = math.ceil(len(self.train) / self.settings.batch_size)
        self.step = 0
        self.curve: list[dict[str, float]] = []
        if (out / LAST).is_file():
            self._resume()

    def run(self) -> None:
        """Epochs until the best one lies ``patience`` back."""
        started = time.perf_counter()
        settings = self.settings
        with progress() as bar:
            task = bar.add_task("training", total=settings.epochs * self.steps_per_epoch, completed=self.step)
            while len(self.curve) < settings.epochs and not self._stalled():
                epoch = len(self.curve)
                loss = self._epoch(epoch, lambda: bar.advance(task))
                ndcg = valid_ndcg(self.model, self.valid)
                self.curve.append({"epoch": epoch + 1, "loss": round(loss, 6), "valid_ndcg10": round(ndcg, 6)})
                best = max(self.curve, key=lambda point: point["valid_ndcg10"])
                if best is self.curve[-1]:
                    save_checkpoint(self.out / BEST, self.model.state_dict(), {"epoch": epoch + 1})
                self._save()
                bar.update(task, description=f"training, epoch {epoch + 1}: NDCG@10 {ndcg:.4f}")
            bar.update(task, total=self.step, completed=self.step)
        facts = {
            "recipe": self.recipe.name,
            "dataset": asdict(self.dataset.description),
            "curve": self.curve,
            "seconds": round(time.perf_counter() - started, 1),
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
        }
        with atomic_file(self.out / RUN) as scratch:
            scratch.write_text(json.dumps(facts, indent=1) + "\n")
        (self.out / LAST).unlink()

    def _stalled(self) -> bool:
        if not self.curve:
            return False
        best = max(range(len(self.curve)), key=lambda at: self.curve[at]["valid_ndcg10"])
        return len(self.curve) - 1 - best >= self.settings.patience

    def _epoch(self, epoch: int, done: Any) -> float:
        """One pass; all chance comes from (seed, epoch), so a resumed run draws what an unbroken one would."""
        torch.manual_seed(self.recipe.seed * 10_007 + epoch)
        rng = np.random.default_rng((self.recipe.seed, epoch))
        order = rng.permutation(len(self.train))
        self.model.train()
        total = torch.zeros(())
        for start in range(0, len(order), self.settings.batch_size):
            which = np.sort(order[start : start + self.settings.batch_size])
            with_scores = bool(rng.random() >= self.settings.without_scores)
            batch = self.train.sample(which, rng, self.settings.candidates, self.settings.random_negatives, with_scores)
            loss = self._loss(batch, rng)
            if not torch.isfinite(loss):
                raise TrirankBuildError(
                    f"the loss is {loss.item()} at epoch {epoch + 1}, batch {start // self.settings.batch_size + 1}, "
                    f"learning rate {self._rate():.2g}; lower training.learning_rate. The last good epoch is kept."
                )
            for group in self.optimiser.param_groups:
                group["lr"] = self._rate()
            self.optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimiser.step()
            self.step += 1
            total += loss.detach()
            done()
        return float(total) / self.steps_per_epoch

    def _loss(self, batch: Batch, rng: np.random.Generator) -> Tensor:
        tensors = {name: torch.from_numpy(array) for name, array in batch.packed.tensors().items()}
        if self.settings.item_dropout:
            hidden = torch.from_numpy(rng.random(batch.labels.shape) < self.settings.item_dropout)
            tensors["candidates"][..., 0].masked_fill_(hidden, 0)
        scores = self.model(**tensors)
        return listwise_softmax(scores, torch.from_numpy(batch.labels), torch.from_numpy(batch.valid), self.thresholds)

    def _rate(self) -> float:
        """Warm-up, then a cosine down to a tenth."""
        settings = self.settings
        total = settings.epochs * self.steps_per_epoch
        warm = min((self.step + 1) / max(settings.warmup_steps, 1), 1.0)
        return settings.learning_rate * warm * (0.55 + 0.45 * math.cos(math.pi * min(self.step / total, 1.0)))

    def _save(self) -> None:
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for index, state in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{index}.{name}": value for name, value in state.items()}
        save_checkpoint(self.out / LAST, tensors, {"step": self.step, "curve": self.curve, "identity": self.identity})

    def _resume(self) -> None:
        path = self.out / LAST
        tensors, place = load_checkpoint(path)
        load_weights(
            self.model,
            {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")},
            path,
        )
        states: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimiser."):
                _, index, key = name.split(".")
                states.setdefault(int(index), {})[key] = tensor
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": states})
        self.step, self.curve = place["step"], place["curve"]
        console.print(f"resuming after epoch {len(self.curve)}")
