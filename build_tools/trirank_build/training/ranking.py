"""The ranking phase: order the candidates of logged or retrieved requests by what came of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trirank_build.baselines.popularity import popularity
from trirank_build.data.dataset import Dataset
from trirank_build.errors import BadData
from trirank_build.evaluation.scoring import (
    log_propensities,
    mean_ndcg,
    propensity_weights,
    retrieval_ndcg,
    valid_ndcg,
)
from trirank_build.features.examples import Batch, Examples
from trirank_build.features.fitting import Features
from trirank_build.features.negatives import NegativeSampler
from trirank_build.models.sequence import SequenceRanker
from trirank_build.recipe import TrainingRecipe
from trirank_build.retrieval.cascade import retrieve, sample
from trirank_build.retrieval.tasks import CatalogueTasks
from trirank_build.training.losses import RANKING_LOSSES, TaskWeights, targets_of
from trirank_build.training.private import Private, Users
from trirank_build.training.start import Start, fit_start

_FROZEN = {"nothing": (), "embeddings": ("embedding",), "encoder": ("embedding", "encoder", "position", "norm_memory",
                                                                   "log_temperature")}  # fmt: skip

RANKING = "ranking"


class RankingStep(nn.Module):
    """The ranker's inputs with labels and valid [B, N] → the loss; see Ranking.corrections for the others."""

    def __init__(self, model: nn.Module, recipe: TrainingRecipe, tasks: dict[str, float]) -> None:
        super().__init__()
        self.model, self.loss = model, RANKING_LOSSES[recipe.objective]
        self.thresholds = tuple(tasks.values())
        given = recipe.task_weights or {}
        weights = None if given == "learned" else torch.tensor([float(dict(given).get(t, 1.0)) for t in tasks])
        self.weights = TaskWeights(weights, len(tasks))

    def forward(
        self,
        labels: Tensor,
        valid: Tensor,
        offsets: Tensor | None = None,
        label_weights: Tensor | None = None,
        **inputs: Tensor,
    ) -> Tensor:
        return self.judge(self.model(**inputs).float(), labels, valid, offsets, label_weights)

    def judge(
        self,
        scores: Tensor,
        labels: Tensor,
        valid: Tensor,
        offsets: Tensor | None = None,
        label_weights: Tensor | None = None,
    ) -> Tensor:
        """The loss of scores [B, N, T]."""
        return self.weights(self.loss(scores, targets_of(labels, self.thresholds), valid, label_weights, offsets))


def position_corrections(batch: Batch, settings: TrainingRecipe) -> dict[str, Tensor]:
    """What the loss is told of where candidates stood on their pages, see TrainingRecipe.position_correction."""
    if not settings.position_bias:
        return {}
    if settings.position_correction == "weights":
        return {"label_weights": torch.from_numpy(propensity_weights(batch.positions, settings.position_bias))}
    offsets = log_propensities(batch.positions, settings.position_bias)
    # Drawn items stood nowhere; that a choice was seen where it stood is no reason to lift it above them.
    chosen = (batch.labels > 0) & (batch.positions > 0)
    usual = (offsets * chosen).sum(1, keepdims=True) / np.maximum(chosen.sum(1, keepdims=True), 1)
    drawn = np.arange(offsets.shape[1]) >= batch.listed
    return {"offsets": torch.from_numpy(np.where(drawn, usual, offsets))}


class Ranking:
    """The phase, on these requests."""

    measure = "NDCG@10"

    def __init__(
        self, model: nn.Module, recipe: TrainingRecipe, dataset: Dataset, train: Examples, valid: Examples
    ) -> None:
        self.name, self.settings, self.decays = RANKING, recipe, True
        self.judges_start = True
        self._tasks = {task: dataset.description.tasks[task] for task in train.tasks}
        self.step = RankingStep(model, recipe, self._tasks)
        for name, parameter in model.named_parameters():
            if name.split(".")[0] in _FROZEN[recipe.freeze]:
                parameter.requires_grad_(False)
        self._model, self._train, self._valid = model, train, valid
        self._teaching = np.flatnonzero((train.labels > 0).any(1))
        if not len(self._teaching):
            raise BadData("no training request has anything chosen among its candidates, so there is nothing to learn")
        self.private: Private | None = None
        if recipe.privacy is not None:
            users = Users.of(train, self._teaching)
            self.private = Private(recipe.privacy, users, recipe.batch_size, recipe.epochs)
        self._sampler = None
        if recipe.random_negatives:
            # With differential privacy negatives are uniform, whatever the counts.
            counts = popularity(dataset.training_choices(), train.ids)
            self._sampler = NegativeSampler(recipe.negatives, counts, recipe.random_negatives)

    def start(self, pretrained: bool, seed: int) -> Start | None:
        """Begin with the best linear order, see training.start."""
        if not isinstance(self._model, SequenceRanker):
            return None
        rng = np.random.default_rng(seed)

        def train(which: NDArray[np.int64]) -> tuple[Batch, dict[str, Tensor]]:
            batch, with_scores = self.draw(which, rng)
            return batch, self.corrections(batch, with_scores)

        def count(scores: NDArray[np.float32]) -> float:
            return mean_ndcg(scores, self._valid, self.settings.position_bias)

        return fit_start(
            self._model, tuple(self._tasks.values()), train, self._teaching, self._valid, count, pretrained, seed
        )

    def plan(self, rng: np.random.Generator) -> list[NDArray[np.int64]]:
        """Requests with something chosen, in a new order; with differential privacy, users of each step by chance."""
        if self.private is not None:
            return self.private.plan()
        order, size = rng.permutation(self._teaching), self.settings.batch_size
        return [order[at : at + size] for at in range(0, len(order), size)]

    def draw(self, which: NDArray[np.int64], rng: np.random.Generator) -> tuple[Batch, bool]:
        """Requests with a sample of their candidates, and whether they go with retrieval scores."""
        settings = self.settings
        with_scores = bool(rng.random() >= settings.without_scores)
        sampler = None if with_scores else self._sampler
        return self._train.sample(which, rng, settings.candidates, sampler, with_scores), with_scores

    def batch(self, which: NDArray[np.int64], rng: np.random.Generator) -> dict[str, Tensor]:
        """Packed requests."""
        if self.private is not None:
            rng = self.private.chance()
        batch, with_scores = self.draw(which, rng)
        tensors = {name: torch.from_numpy(array) for name, array in batch.packed.tensors().items()}
        if self.settings.item_dropout:
            hidden = torch.from_numpy(rng.random(batch.labels.shape) < self.settings.item_dropout)
            tensors["candidates"][..., 0].masked_fill_(hidden, 0)
        tensors |= {"labels": torch.from_numpy(batch.labels), "valid": torch.from_numpy(batch.valid)}
        return tensors | self.corrections(batch, with_scores)

    def corrections(self, batch: Batch, with_scores: bool) -> dict[str, Tensor]:
        """What the loss is told of how candidates came to be seen: ``offsets`` [B, N] of their logits, and
        ``label_weights`` [B, N] of what was chosen, each where the recipe asks for it."""
        found = position_corrections(batch, self.settings)
        if self.settings.log_q and not with_scores and self._sampler is not None:
            # What the list holds was put there; the others are corrected relative to an even draw.
            choices = int((batch.labels > 0).sum())
            relative = self._sampler.log_q(batch.rows, choices) + np.float32(np.log(self._sampler.items))
            drawn = np.arange(batch.rows.shape[1]) >= batch.listed
            even = torch.from_numpy(np.where(drawn, -relative, np.float32(0)))
            found["offsets"] = found["offsets"] + even if "offsets" in found else even
        return found

    def validate(self) -> float:
        """NDCG@10 over the candidates of validation requests, weighted for positions as training is."""
        return valid_ndcg(self._model, self._valid, self.settings.position_bias)

    def retrieved(self) -> float:
        """The same of the order in which candidates came: what a ranker has to be better than."""
        return retrieval_ndcg(self._valid, self.settings.position_bias)


def logged(
    dataset: Dataset, features: Features, recipe: TrainingRecipe, seed: int, directory: Path, since: int | None = None
) -> tuple[Examples, Examples]:
    """The dataset's own requests: all of the training split, or those since a time, and some of validation."""
    train = Examples.read(dataset, "train", features, directory=directory, since=since)
    return train, Examples.read(dataset, "valid", features, recipe.validation_requests, seed)


def held_out(
    dataset: Dataset, features: Features, model: SequenceRanker, recipe: TrainingRecipe, seed: int
) -> tuple[Examples, Examples]:
    """The validation split's choices, which pre-training has not seen: those lent to training among what was retrieved,
    and once more among drawn items, since other services' retrieval finds other candidates; the others to validate."""
    tasks = CatalogueTasks.of(dataset, "valid", features)
    learnt = np.isin(tasks.users, dataset.lent_users(seed))
    held, others = tasks.take(np.flatnonzero(learnt)), np.flatnonzero(~learnt)
    if not len(held) or not len(others):
        raise BadData("fewer than two users chose anything in the validation split, too few to hold any out; "
                      'say training.requests = "logged", or bring a longer log')  # fmt: skip
    if len(others) > recipe.validation_requests:
        others = np.sort(np.random.default_rng(seed).permutation(others)[: recipe.validation_requests])
    train = retrieve(held, dataset, features, model)
    if recipe.random_negatives:
        train = train.joined(sample(held, dataset, features, recipe.random_negatives, seed))
    return train, retrieve(tasks.take(others), dataset, features, model)
