"""Training after a step: the recipe's own objective, and what the dense teacher makes of the same requests.

It is the loop of `trirank train` with one phase, so it is resumed wherever it was stopped.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trirank_build.artefacts import atomic_file
from trirank_build.compression.step import FineTuning, Requests
from trirank_build.data.dataset import Dataset
from trirank_build.features.fitting import Features
from trirank_build.models.checkpoint import load_checkpoint, load_weights
from trirank_build.models.ranker import SharedContextRanker
from trirank_build.recipe import Recipe
from trirank_build.training.distributed import Ranks
from trirank_build.training.loop import Loop
from trirank_build.training.losses import EMPTY
from trirank_build.training.ranking import Ranking, RankingStep

PHASE = "finetuning"
_TEACHER = "teacher_"


def divergences(logits: Tensor, teacher: Tensor, valid: Tensor, temperature: float) -> Tensor:
    """[B, X] KL(teacher ‖ student) between softmaxes over the candidates: of logits [B, X, N] with valid [B, N]."""
    own = (logits / temperature).masked_fill(~valid[:, None], EMPTY).log_softmax(-1)
    wanted = (teacher / temperature).masked_fill(~valid[:, None], EMPTY).log_softmax(-1)
    return (wanted.exp() * (wanted - own)).sum(-1) * temperature**2


class Imitation(nn.Module):
    """Inputs of the student, and with ``teacher_`` before their names of the teacher, with labels and valid → loss."""

    def __init__(self, judge: RankingStep, teacher: nn.Module, settings: FineTuning) -> None:
        super().__init__()
        self.judge, self.settings = judge, settings
        self._teacher = [teacher.eval()]  # in a list, since it is no part of what is trained and saved

    def forward(
        self,
        labels: Tensor,
        valid: Tensor,
        offsets: Tensor | None = None,
        label_weights: Tensor | None = None,
        **inputs: Tensor,
    ) -> Tensor:
        settings, student, teacher = self.settings, self.judge.model, self._teacher[0].to(labels.device)
        seen = {name.removeprefix(_TEACHER): t for name, t in inputs.items() if name.startswith(_TEACHER)}
        own = {name: tensor for name, tensor in inputs.items() if not name.startswith(_TEACHER)}
        scores, expected, there = _scores_and_expectations(student, own)
        with torch.no_grad():
            wanted, wanted_expected, _ = _scores_and_expectations(teacher, seen or own)
        loss = (
            settings.scores
            * divergences(scores.transpose(1, 2), wanted.transpose(1, 2), valid, settings.temperature).mean()
        )
        if settings.labels:
            loss = loss + settings.labels * self.judge.judge(scores, labels, valid, offsets, label_weights)
        if settings.states and expected is not None and wanted_expected is not None:
            divergence = divergences(expected, wanted_expected[:, -expected.shape[1] :], valid, settings.temperature)
            loss = loss + settings.states * (divergence * there).sum() / there.sum().clamp_min(1)
        return loss


def _scores_and_expectations(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor | None, Tensor]:
    """Scores [B, N, T]; the logits of the candidates at the states [B, S, N], None of an ensemble, which has none;
    which of these there are [B, S]. States are those that the affinity is taken from and that pre-training taught: of a
    causal encoder one an event, of another the last place."""
    if not isinstance(model, SharedContextRanker):
        return model(**inputs), None, torch.empty(0)
    history = inputs["history"]
    memory, mask = model.encode(history, inputs["query"], inputs["context"])
    scores = model(**inputs) if model.head is None else model.rank(
        memory, mask, history, inputs["candidates"], inputs["dense"]
    )  # fmt: skip
    places = slice(0, history.shape[1]) if model.causal else slice(-1, None)
    expected = model.logits(memory[:, places], model.item_vectors(inputs["candidates"]))
    return scores, expected, (mask[:, 0, 0, places] == 0).to(memory.dtype)


class Finetuning:
    """The phase."""

    decays, judges_start, private, measure = True, False, None, "NDCG@10"

    def __init__(
        self,
        model: nn.Module,
        features: Features,
        teacher: nn.Module,
        teacher_features: Features,
        requests: Requests,
        recipe: Recipe,
        dataset: Dataset,
        settings: FineTuning,
    ) -> None:
        self.name, self.settings = PHASE, settings
        train, valid = requests.get()
        how = recipe.training.model_copy(update={"freeze": "nothing", "batch_size": settings.batch_size})
        self._ranking = Ranking(model, how, dataset, train, valid)
        self.step = Imitation(self._ranking.step, teacher, settings)
        self._model, self._train, self._features, self._teacher_features = model, train, features, teacher_features
        self._requests = requests

    def plan(self, rng: np.random.Generator) -> list[NDArray[np.int64]]:
        """See Ranking."""
        return self._ranking.plan(rng)

    def batch(self, which: NDArray[np.int64], rng: np.random.Generator) -> dict[str, Tensor]:
        """Packed requests, for the teacher too where it sees other features."""
        drawn, with_scores = self._ranking.draw(which, rng)

        def seen_by(features: Features) -> dict[str, Tensor]:
            examples, packed = self._train.seen_by(features), drawn.packed
            if examples is not self._train:
                packed = examples.batch(
                    which, drawn.rows, drawn.scores, drawn.labels, drawn.listed, drawn.positions
                ).packed
            return {name: torch.from_numpy(array) for name, array in packed.tensors().items()}

        tensors = seen_by(self._features)
        if self._teacher_features is not self._features:
            tensors |= {f"{_TEACHER}{name}": tensor for name, tensor in seen_by(self._teacher_features).items()}
        tensors |= {"labels": torch.from_numpy(drawn.labels), "valid": torch.from_numpy(drawn.valid)}
        return tensors | self._ranking.corrections(drawn, with_scores)

    def validate(self) -> float:
        """As Ranking does."""
        return self._requests.valid_ndcg(self._model, self._features)


def run_phase(phase: Finetuning, model: nn.Module, directory: Path, identity: str, seed: int) -> list[dict[str, Any]]:
    """Train ``model`` in place in ``directory``, or find there what was trained before; gives the curve."""
    weights, facts = directory / f"{PHASE}.safetensors", directory / "curve.json"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not facts.is_file():
        directory.mkdir(parents=True, exist_ok=True)
        loop = Loop(
            model.to(device), {PHASE: lambda: phase}, seed=seed, directory=directory, identity=identity,
            ranks=Ranks(0, 1, device),
        )  # fmt: skip
        loop.run()
        with atomic_file(facts) as scratch:
            scratch.write_text(json.dumps(loop.curve))
        loop.last.unlink()
    load_weights(model.cpu(), load_checkpoint(weights)[0], weights)
    curve: list[dict[str, Any]] = json.loads(facts.read_text())
    return curve
