"""What a kind of compression step is. Each is one module of this package, listed in ``recipe.KINDS``.

A step works on weights once (``run``). Whoever loads its checkpoint later only needs the module to have the right
form (trirank_build.models.forms): the checkpoint holds the decisions of all steps so far, as JSON, and the weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, PositiveInt
from torch import Tensor, nn

from trirank_build.data.dataset import Dataset
from trirank_build.evaluation.scoring import valid_ndcg
from trirank_build.features.examples import Examples
from trirank_build.features.fitting import Features
from trirank_build.models.forms.form import Decisions
from trirank_build.models.sequence import SequenceRanker
from trirank_build.recipe import Recipe, TrainingRecipe
from trirank_build.training.ranking import held_out, logged, position_corrections

Positive = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]
JUDGED = ("labels", "valid", "offsets", "label_weights")
"""What a batch holds for the loss, beside the ranker's inputs."""


class FineTuning(BaseModel):
    """Training after a step: the recipe's ranking objective, and the dense teacher's scores and states."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: Annotated[int, Field(ge=0)] = 1
    """0: none."""
    patience: PositiveInt = 2
    batch_size: PositiveInt = 128
    learning_rate: Positive = 5e-4
    weight_decay: Weight = 0.0
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    labels: Weight = 0.2
    """Weight of the recipe's own ranking loss."""
    scores: Weight = 1.0
    """Weight of the listwise divergence from the teacher's scores (Hinton et al. 2015; Reddi et al. 2021)."""
    states: Weight = 1.0
    """Weight of the same divergence at every event's state: what the state expects of the candidates to come next. It
    compares states through what they say of items, so student and teacher may be of different widths."""
    temperature: Positive = 1.0
    """Of both softmaxes."""


class StepSettings(BaseModel):
    """Base of a step's section in the recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: str
    training: FineTuning = FineTuning()

    @property
    def reads(self) -> str:
        """What of the training data the step learns from; empty: nothing, so that differential privacy is kept."""
        return "fine-tuning" if self.training.epochs else ""


@dataclass
class Work:
    """What goes from step to step.

    Attributes:
        model: the ranker as it is now.
        features: what it sees; a step that changes this says so here.
        decisions: kind and decisions of all steps so far.
    """

    model: nn.Module
    features: Features
    decisions: list[tuple[str, Decisions]] = field(default_factory=list)


class Requests:
    """The requests that fine-tuning, importance and calibration read, and those that say how good a ranker is: the
    dense run's own. Nothing of the test split is among them."""

    def __init__(
        self, dense: SequenceRanker, features: Features, recipe: Recipe, dataset: Dataset, folder: Path
    ) -> None:
        self._made: tuple[Examples, Examples] | None = None
        self._dense, self._features, self._recipe, self._dataset = dense, features, recipe, dataset
        self._folder = folder

    def get(self) -> tuple[Examples, Examples]:
        """Training and validation requests, made when they are first asked for."""
        if self._made is None:
            settings, seed = self._recipe.training, self._recipe.seed
            if settings.requests == "held_out":
                self._made = held_out(self._dataset, self._features, self._dense, settings, seed)
            else:
                self._made = logged(self._dataset, self._features, settings, seed, self._folder)
        return self._made

    def valid_ndcg(self, model: nn.Module, features: Features) -> float:
        """NDCG@10 over the validation requests, as training counts it."""
        return valid_ndcg(model, self.get()[1].seen_by(features), self._recipe.training.position_bias)


class Finetune(Protocol):
    """Trains ``now.model`` in place, or finds it trained already: a resumed step calls it again under the same name.
    A teacher other than the dense ranker sees what the student sees."""

    def __call__(
        self, now: Work, settings: FineTuning, name: str, *, teacher: nn.Module | None = None, seed: int | None = None
    ) -> None: ...


@dataclass
class Context:
    """What a step may use.

    Attributes:
        dense: the ranker that the chain starts from, and the teacher of fine-tuning.
        requests: see Requests; ``Examples.seen_by`` packs them for other features.
        directory: of this step, for what it must find again when it is resumed.
        finetune: see trirank_build.compression.finetune.
    """

    dense: nn.Module
    recipe: Recipe
    dataset: Dataset
    requests: Requests
    directory: Path
    seed: int
    finetune: Finetune

    def batches(self, features: Features, count: int, size: int = 64) -> list[dict[str, Tensor]]:
        """``count`` training requests with labels and valid [B, N], packed for these features."""
        train = self.requests.get()[0].seen_by(features)
        rng = np.random.default_rng(self.seed)
        teaching = np.flatnonzero((train.labels > 0).any(1))
        chosen = rng.choice(teaching, min(count, len(teaching)), replace=False)
        parts = [np.sort(chosen[at : at + size]) for at in range(0, len(chosen), size)]
        return [packed(train, part, self.recipe.training) for part in parts]


def packed(examples: Examples, which: NDArray[np.int64], settings: TrainingRecipe) -> dict[str, Tensor]:
    """Requests as the ranker's tensors, with labels and valid [B, N] and what corrects for positions."""
    batch = examples.whole(which)
    tensors = {name: torch.from_numpy(array) for name, array in batch.packed.tensors().items()}
    tensors |= {"labels": torch.from_numpy(batch.labels), "valid": torch.from_numpy(batch.valid)}
    return tensors | position_corrections(batch, settings)


class Step(Protocol):
    """A kind of step; modules of this package are."""

    @property
    def Settings(self) -> type[StepSettings]:
        """The step's section in the recipe."""

    def check(self, model: nn.Module, settings: Any, features: Features) -> tuple[nn.Module, Features]:
        """Give a module the form that it will have after the step, whatever its weights, and what it will see; so a
        whole chain is checked before anything is trained.

        Raises:
            BadRecipe: the step cannot be taken from a module of this form; the message says why.
            BadCheckpoint: it names a run that does not fit.
        """

    def run(self, work: Work, settings: Any, context: Context) -> None:
        """Take the step on ``work``, fine-tuning included."""
