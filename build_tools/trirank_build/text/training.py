"""A text classifier's training: hidden units, then labels, then the linear model beside it.

A run's directory:

``recipe.toml``         as it was given
``tokenizer.json``, ``ngrams.npy``   units and n-grams
``last.safetensors``    where training stands; resumed from
``best.safetensors``    the weights
``run.json``            classes, what it was trained on, curve
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from trirank_build.artefacts import atomic_directory, atomic_file
from trirank_build.errors import BadCheckpoint, BadData, BadUsage
from trirank_build.models.checkpoint import load_checkpoint, load_weights, save_checkpoint
from trirank_build.progress import working
from trirank_build.text.classifier import TextClassifier
from trirank_build.text.corpus import Corpus
from trirank_build.text.linear import fit_linear, presence
from trirank_build.text.reading import HIDDEN, PADDING, Reader
from trirank_build.text.recipe import LabelsRecipe, MaskingRecipe, TextRecipe, load_text_recipe
from trirank_build.training.distributed import ranks
from trirank_build.training.loop import Loop, Phase

RECIPE, BEST, RUN = "recipe.toml", "best.safetensors", "run.json"
MASKING, LABELS = "masked_units", "labels"
SHARES = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0)
"""How much the linear model counts; validation chooses."""
ALONE = 100.0
"""The same where the linear model alone is better than with the encoder."""
_BATCH = 256
_NUMBERS = 100_000_000
"""That the linear model's weights of a batch's n-grams may be."""
WEIGHTS = 20_000_000
"""Of the linear model at most: n-grams times classes."""
_RANDOM_SHARE, _KEPT_SHARE = 0.1, 0.1
"""Of the units that are to be found: those replaced by another one, and those left as they are (Devlin et al. 2019)."""


@dataclass(frozen=True)
class TextRun:
    """A finished training, opened."""

    directory: Path
    recipe: TextRecipe
    reader: Reader
    facts: dict[str, Any]

    @property
    def classes(self) -> list[str]:
        """Names, in the order of the logits."""
        return list(self.facts["classes"])

    def check_texts(self, corpus: Corpus) -> None:
        """Hold texts against those of the training.

        Raises:
            BadData: they are others, whose parts mean nothing to this run.
        """
        if corpus.digest != self.facts["digest"]:
            raise BadData(
                f"{self.directory} was trained on {self.facts['source']} (digest {self.facts['digest'][:12]}), these "
                f"are other texts (digest {corpus.digest[:12]}); give the file that it was trained on"
            )

    @classmethod
    def load(cls, directory: Path) -> TextRun:
        """Open a run.

        Raises:
            BadCheckpoint: there is none, or it has not finished.
        """
        try:
            facts = json.loads((directory / RUN).read_text())
        except (OSError, ValueError) as error:
            raise BadCheckpoint(
                f"{directory} holds no finished text classifier ({error}); run `trirank text train TASK FILE --out "
                f"{directory}`"
            ) from error
        recipe = load_text_recipe(str(directory / RECIPE))
        return cls(directory, recipe, Reader.load(directory, recipe.reading), facts)

    def model(self) -> TextClassifier:
        """The classifier with its weights."""
        model = make_classifier(self.reader, len(self.classes), self.recipe)
        load_weights(model, load_checkpoint(self.directory / BEST)[0], self.directory / BEST)
        return model.eval()


def make_classifier(reader: Reader, classes: int, recipe: TextRecipe) -> TextClassifier:
    """A fresh one; its weights come from torch's random state."""
    return TextClassifier(reader.size, reader.units, classes, recipe.model)


def tensors(inputs: dict[str, NDArray[np.int32]]) -> dict[str, Tensor]:
    """A classifier's inputs for torch."""
    return {name: torch.from_numpy(array) for name, array in inputs.items()}


def logits_of(model: TextClassifier, reader: Reader, units: NDArray[np.int32]) -> NDArray[np.float32]:
    """[B, C] of units [B, L]."""
    model.eval()
    device = model.position.device
    found = np.zeros((len(units), 0), np.float32)
    # Texts of like lengths go together, without the padding of the longest of all.
    lengths = (units > 0).sum(1)
    order = np.argsort(lengths, kind="stable")
    most = max(1, int(lengths.max(initial=1))) * reader.recipe.orders * model.linear.embedding_dim
    size = max(1, min(_BATCH, _NUMBERS // most))
    for start in range(0, len(units), size):
        part = order[start : start + size]
        inputs = tensors(reader.inputs(units[part], model.length, model.rows))
        with torch.inference_mode():
            logits = model(**{name: tensor.to(device) for name, tensor in inputs.items()}).cpu().numpy()
        if not found.shape[1]:
            found = np.zeros((len(units), logits.shape[1]), np.float32)
        found[part] = logits
    return found


class _Step(nn.Module):
    def __init__(self, model: TextClassifier) -> None:
        super().__init__()
        self.model = model


class MaskingStep(_Step):
    """fields [B, L, F], flat places at [P] and what is there chosen [P] → the loss."""

    def forward(self, fields: Tensor, at: Tensor, chosen: Tensor) -> Tensor:
        return F.cross_entropy(self.model.hidden_units(fields, at), chosen)


class LabelsStep(_Step):
    """fields [B, L, F], grams [B, G], labels [B] → the loss."""

    def __init__(self, model: TextClassifier, smoothing: float) -> None:
        super().__init__(model)
        self.smoothing = smoothing

    def forward(self, fields: Tensor, grams: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.model(fields, grams), labels, label_smoothing=self.smoothing)


class _OfTexts:
    """What both phases share: batches of texts of like lengths."""

    judges_start, private, decays, measure = False, None, True, "accuracy"

    def __init__(self, reader: Reader, units: NDArray[np.int32], batch_size: int) -> None:
        self._reader, self._units, self._size = reader, units, batch_size
        self._lengths = (units > 0).sum(1)

    def plan(self, rng: np.random.Generator) -> list[NDArray[np.int64]]:
        """Texts in a new order, like lengths together."""
        order = np.argsort(self._lengths + rng.random(len(self._lengths)) * (1 + self._lengths * 0.2))
        batches = [order[at : at + self._size] for at in range(0, len(order), self._size)]
        return [batches[at] for at in rng.permutation(len(batches))]


class Masking(_OfTexts):
    """The phase that learns from texts alone."""

    name, measure = MASKING, "found"

    def __init__(
        self, model: TextClassifier, reader: Reader, recipe: MaskingRecipe, train: NDArray[np.int32],
        valid: NDArray[np.int32], seed: int,
    ) -> None:  # fmt: skip
        super().__init__(reader, train, recipe.batch_size)
        self.settings, self.step = recipe, MaskingStep(model)
        self._model, self._valid, self._seed = model, valid, seed

    def batch(self, which: NDArray[np.int64], rng: np.random.Generator) -> dict[str, Tensor]:
        """Texts of which some units are hidden."""
        return self._hidden(self._units[which], rng)

    def _hidden(self, units: NDArray[np.int32], rng: np.random.Generator) -> dict[str, Tensor]:
        units = units[:, : self._model.length]
        units = units[:, : max(1, int((units > 0).sum(1).max(initial=0)))]
        there = units != PADDING
        chance = rng.random(units.shape)
        wanted = there & (chance < self.settings.masked_share)
        if not wanted.any():
            wanted = there & (chance == chance[there].min(initial=1.0))
        how, shown = rng.random(units.shape), units.copy()
        shown[wanted] = HIDDEN
        other = rng.integers(HIDDEN + 1, max(self._reader.units, HIDDEN + 2), units.shape, np.int32)
        shown = np.where(wanted & (how < _RANDOM_SHARE), other, shown)
        shown = np.where(wanted & (how > 1 - _KEPT_SHARE), units, shown).astype(np.int32)
        return {
            "fields": torch.from_numpy(self._reader.fields(self._reader.hashes(shown), self._model.rows)),
            "at": torch.from_numpy(np.flatnonzero(wanted)),
            "chosen": torch.from_numpy(units[wanted].astype(np.int64)),
        }

    def validate(self) -> float:
        """Share of hidden units that are found."""
        self._model.eval()
        found = total = 0
        rng = np.random.default_rng(self._seed)
        for start in range(0, len(self._valid), _BATCH):
            told = self._hidden(self._valid[start : start + _BATCH], rng)
            device = self._model.position.device
            with torch.inference_mode():
                logits = self._model.hidden_units(told["fields"].to(device), told["at"].to(device))
            found += int((logits.argmax(1).cpu() == told["chosen"]).sum())
            total += len(told["chosen"])
        return found / max(total, 1)


class Labelling(_OfTexts):
    """The phase that learns the labels."""

    name = LABELS

    def __init__(
        self, model: TextClassifier, reader: Reader, recipe: LabelsRecipe,
        train: tuple[NDArray[np.int32], NDArray[np.int64]], valid: tuple[NDArray[np.int32], NDArray[np.int64]],
    ) -> None:  # fmt: skip
        super().__init__(reader, train[0], recipe.batch_size)
        self.settings, self.step = recipe, LabelsStep(model, recipe.label_smoothing)
        self._model, self._labels, self._valid = model, train[1], valid

    def batch(self, which: NDArray[np.int64], rng: np.random.Generator) -> dict[str, Tensor]:
        """Texts with their labels."""
        units = self._units[which].copy()
        units[(rng.random(units.shape) < self.settings.hidden_units) & (units != PADDING)] = HIDDEN
        inputs = tensors(self._reader.inputs(units, self._model.length, self._model.rows))
        return inputs | {"labels": torch.from_numpy(self._labels[which])}

    def validate(self) -> float:
        """Share of validation texts in the right class."""
        units, labels = self._valid
        return float((logits_of(self._model, self._reader, units).argmax(1) == labels).mean())


def train_text(
    corpus: Corpus, recipe: TextRecipe, out: Path, *, task: str, source: str, read: dict[str, Any] | None = None,
    fresh: bool = False,
) -> TextRun:  # fmt: skip
    """Train a classifier, or go on with a stopped training.

    Args:
        task, source: see corpus.read_corpus.
        read: its other arguments, by which the same texts are read again.

    Raises:
        BadCheckpoint: ``out`` holds something else, and ``fresh`` was not said.
        Diverged: the loss is no number.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise BadUsage("a text classifier is trained by one process; leave torchrun out")
    identity = hashlib.sha256(
        f"{recipe.model_dump_json(exclude={'compression'})}\0{corpus.digest}".encode()
    ).hexdigest()
    _prepare(corpus, recipe, out, identity, fresh)
    if (out / RUN).is_file():
        return TextRun.load(out)
    reader = Reader.load(out, recipe.reading)
    parts = {name: corpus.part(name) for name in ("train", "valid")}
    with working("reading texts"):
        units = {name: reader.read(texts) for name, (texts, _) in parts.items()}
    torch.manual_seed(recipe.seed)
    model = make_classifier(reader, len(corpus.classes), recipe)
    phases: dict[str, Callable[[], Phase]] = {}
    if recipe.pretraining.epochs:
        phases[MASKING] = lambda: Masking(
            model, reader, recipe.pretraining, units["train"], units["valid"], recipe.seed
        )
    train, valid = ((units[name], parts[name][1]) for name in ("train", "valid"))
    phases[LABELS] = lambda: Labelling(model, reader, recipe.training, train, valid)
    with ranks() as group:
        loop = Loop(model, phases, seed=recipe.seed, directory=out, identity=identity, ranks=group)
        loop.run()
    model.to("cpu")
    with working("fitting the linear model beside it"):
        accuracy = _add_linear(model, reader, train, valid, len(corpus.classes))
    save_checkpoint(out / BEST, model.state_dict(), {"classes": corpus.classes})
    facts = {
        "task": task, "source": source, "read": read or {}, "digest": corpus.digest, "classes": corpus.classes,
        "cleaning": corpus.cleaning, "valid_accuracy": accuracy,
        "texts": {name: int((corpus.split == at).sum()) for at, name in enumerate(("train", "valid", "test"))},
        "curve": loop.curve, "seconds": round(loop.elapsed(), 1),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }  # fmt: skip
    with atomic_file(out / RUN) as scratch:
        scratch.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    for used in (loop.last, *(loop.best(name) for name in phases)):
        used.unlink(missing_ok=True)
    return TextRun.load(out)


def _add_linear(
    model: TextClassifier, reader: Reader, train: tuple[NDArray[np.int32], NDArray[np.int64]],
    valid: tuple[NDArray[np.int32], NDArray[np.int64]], classes: int,
) -> dict[str, float]:  # fmt: skip
    """Put the linear model into the classifier; gives accuracies on validation: of the encoder alone, of the linear
    model alone, of both, and how much the linear one counts."""
    (texts, labels), (judged, truth) = train, valid
    told = [presence(reader, units) for units in (texts, judged)]
    linear = fit_linear(told[0], labels, told[1], truth, classes)
    own, theirs = logits_of(model, reader, judged), linear.logits(told[1])
    found = {share: float(((own + share * theirs).argmax(1) == truth).mean()) for share in SHARES}
    alone = float((theirs.argmax(1) == truth).mean())
    share = max(found, key=lambda each: found[each])
    if alone > found[share]:  # the encoder's say is then too little to change the order
        share = ALONE
        found[share] = float(((own + share * theirs).argmax(1) == truth).mean())
    with torch.no_grad():
        model.linear.weight.copy_(torch.from_numpy(linear.table(share)))
    return {
        "encoder": found[0.0], "linear": alone, "both": found[share], "share": share
    }  # fmt: skip


def _prepare(corpus: Corpus, recipe: TextRecipe, out: Path, identity: str, fresh: bool) -> None:
    """Make ``out`` with recipe and tokeniser, unless a run with this identity is there already."""
    marker = out / "identity"
    if out.exists() and any(out.iterdir()):
        if marker.is_file() and marker.read_text() == identity and not fresh:
            with atomic_file(out / RECIPE) as scratch_file:  # what compression is to do may be another by now
                scratch_file.write_text(tomli_w.dumps(recipe.model_dump(exclude_none=True)))
            return
        if not fresh or not marker.is_file():
            raise BadCheckpoint(
                f"{out} holds something else than a run of this recipe on these texts; choose another --out"
                + (", or say --fresh to replace it" if marker.is_file() else "")
            )
    with atomic_directory(out) as scratch:
        with working("learning the units"):
            most = max(1, WEIGHTS // len(corpus.classes))
            Reader.fit(corpus.part("train")[0], recipe.reading, most).save(scratch)
        (scratch / RECIPE).write_text(tomli_w.dumps(recipe.model_dump(exclude_none=True)))
        (scratch / "identity").write_text(identity)
