"""A compressed classifier as a folder of files, and how it is used: texts in, probabilities out.

``model.onnx``      fields [B, L, F], grams [B, G] INT32 → logits [B, C] FP32
``tokenizer.json``, ``ngrams.npy``, ``recipe.toml``   how texts become numbers
``text.json``       classes, task, what the gate found
"""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import polars as pl
import torch
from numpy.typing import NDArray
from torch import nn

from trirank_build.artefacts import atomic_directory, atomic_file, file_digest
from trirank_build.compression.quantise import NARROWEST, Settings, calibrate
from trirank_build.engines.latency import latencies
from trirank_build.errors import BadCheckpoint, BadData, BadModel
from trirank_build.export.onnx import write_module
from trirank_build.models.forms.quantise import rebuild
from trirank_build.preparation.cleaning import Report
from trirank_build.preparation.sources.tables import read_table
from trirank_build.text.classifier import TextClassifier
from trirank_build.text.corpus import LONGEST, Corpus, text_column
from trirank_build.text.reading import FILES, Reader
from trirank_build.text.recipe import SmallerRecipe, load_text_recipe
from trirank_build.text.training import RECIPE, TextRun, logits_of, tensors

GRAPH, FACTS = "model.onnx", "text.json"
MODULE_LIMIT = 1e-3
"""Largest difference of a logit between the exact module and its graph."""
TIMED = 64
"""Validation texts that latencies are measured on."""
_BATCH = 64
_CHUNK = 20_000


@dataclass(frozen=True)
class TextModel:
    """A classifier that is ready for use."""

    reader: Reader
    sizes: tuple[int, int]
    facts: dict[str, Any]
    session: onnxruntime.InferenceSession

    @property
    def classes(self) -> list[str]:
        """Names, in the order of the logits."""
        return list(self.facts["classes"])

    @classmethod
    def load(cls, directory: Path) -> TextModel:
        """Open what ``compress_text`` wrote.

        Raises:
            BadCheckpoint: a file is missing or damaged.
        """
        try:
            facts = json.loads((directory / FACTS).read_text())
            if file_digest(directory / GRAPH) != facts["digest"]:
                raise ValueError(f"{GRAPH} is not the one that {FACTS} names")
            session = _session(directory / GRAPH)
        except Exception as error:  # ONNX Runtime's own exceptions share no public base
            raise BadCheckpoint(
                f"{directory} holds no whole text classifier ({str(error).splitlines()[0]}); run `trirank text "
                f"compress RUN FILE --out {directory}`"
            ) from error
        recipe = load_text_recipe(str(directory / RECIPE))
        return cls(Reader.load(directory, recipe.reading), (recipe.model.length, recipe.model.rows), facts, session)

    def probabilities(self, texts: list[str]) -> NDArray[np.float32]:
        """[R, C]; of a text without a letter that can be read, every class alike.

        Raises:
            BadData: a text is empty.
        """
        for at, text in enumerate(texts):
            if not text.strip():
                raise BadData(f"text {at + 1} of {len(texts)} is empty; leave it out: nothing can be said of it")
        units = self.reader.read([text[:LONGEST] for text in texts])
        logits = run_graph(self.session, self.reader, units, len(self.classes), self.sizes)
        logits[(units == 0).all(1)] = 0
        shifted = np.exp(logits - logits.max(1, keepdims=True))
        return np.asarray(shifted / shifted.sum(1, keepdims=True), np.float32)

    def of_column(self, column: pl.Series) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Places [X] of a column's texts that are not empty, and their probabilities [X, C]."""
        texts = [text.strip() for text in column.cast(pl.String).fill_null("")]
        there = np.array([at for at, text in enumerate(texts) if text], np.int64)
        parts = [
            self.probabilities([texts[at] for at in there[start : start + _CHUNK]])
            for start in range(0, len(there), _CHUNK)
        ]
        return there, np.concatenate(parts) if parts else np.zeros((0, len(self.classes)), np.float32)


def label_table(
    model: TextModel, path: Path, out: Path, *, text: str | None = None, encoding: str | None = None
) -> tuple[int, int]:
    """Write the table of ``path`` with a label and its probability as further columns; gives how many rows have one,
    and how many have no text.

    Raises:
        BadData: there is no column of texts.
    """
    table = read_table(path, Report(), encoding)
    there, found = model.of_column(table[text_column(table, path, text)])
    labels: list[str | None] = [None] * table.height
    shares: list[float | None] = [None] * table.height
    for at, row in zip(there.tolist(), found, strict=True):
        labels[at], shares[at] = model.classes[int(row.argmax())], round(float(row.max()), 6)
    named = {"predicted": pl.Series(labels, dtype=pl.String), "probability": pl.Series(shares, dtype=pl.Float64)}
    with atomic_file(out) as scratch:
        table.with_columns(**named).write_csv(scratch)
    return len(there), table.height - len(there)


def run_graph(
    session: onnxruntime.InferenceSession,
    reader: Reader,
    units: NDArray[np.int32],
    classes: int,
    sizes: tuple[int, int],
) -> NDArray[np.float32]:
    """[B, C] of units [B, L]; ``sizes``: places that the encoder sees, and rows of its n-grams."""
    found = np.zeros((len(units), classes), np.float32)
    order = np.argsort((units > 0).sum(1), kind="stable")
    for start in range(0, len(units), _BATCH):
        part = order[start : start + _BATCH]
        found[part] = session.run(["logits"], reader.inputs(units[part], *sizes))[0]
    return found


def compress_text(run: TextRun, corpus: Corpus, out: Path, allow_failing: bool = False) -> dict[str, Any]:
    """INT8, a graph, and what that costs on validation; gives the facts.

    Args:
        allow_failing: keep it though it lost more than the recipe allows; ``passed`` then says so.

    Raises:
        BadData: the texts are others than those of the run.
        BadModel: the graph says something else than the module, or it lost too much; nothing is written.
    """
    run.check_texts(corpus)
    settings, reader = run.recipe.compression, run.reader
    dense = run.model()
    sizes = dense.length, dense.rows
    texts, labels = corpus.part("valid")
    units = reader.read(texts)
    with atomic_directory(out) as scratch:
        small = quantised(dense, reader, corpus.part("train")[0], settings)
        exact = scratch / "exact.onnx"
        _write(dense, reader, sizes, exact)
        _write(small, reader, sizes, scratch / GRAPH)
        own = logits_of(dense, reader, units)
        sessions = {name: _session(path) for name, path in (("float32", exact), ("int8", scratch / GRAPH))}
        found = {
            name: run_graph(session, reader, units, len(corpus.classes), sizes) for name, session in sessions.items()
        }
        difference = float(np.abs(own - found["float32"]).max())
        if not difference <= MODULE_LIMIT:
            raise BadModel(f"the graph differs from the module by {difference:.2g}; the limit is {MODULE_LIMIT:g}")
        places = np.linspace(0, len(units) - 1, min(TIMED, len(units))).astype(int)
        asked = [reader.inputs(units[at : at + 1], *sizes) for at in places]
        calls = {
            name: (lambda session=session: [session.run(["logits"], each) for each in asked])
            for name, session in sessions.items()
        }
        timed = {
            name: float(np.median(took)) / len(asked) for name, took in latencies(calls, 20, calls_a_round=1).items()
        }
        right = {name: float((logits.argmax(1) == labels).mean()) for name, logits in found.items()}
        ratio = right["int8"] / max(right["float32"], 1e-12)
        agreement = float((found["int8"].argmax(1) == found["float32"].argmax(1)).mean())
        checks: list[dict[str, Any]] = [
            {"what": "accuracy over the dense classifier's", "value": ratio, "limit": settings.min_accuracy_ratio},
            {"what": "share of texts in the same class", "value": agreement, "limit": settings.min_agreement},
        ]
        facts: dict[str, Any] = {
            "classes": run.classes, "task": run.facts["task"], "source": run.facts["source"], "recipe": run.recipe.name,
            "passed": all(check["value"] >= check["limit"] for check in checks), "checks": checks,
            "valid_accuracy": right, "p50_ms": timed, "module_difference": difference,
            "mb": {"float32": exact.stat().st_size / 1e6, "int8": (scratch / GRAPH).stat().st_size / 1e6},
            "digest": file_digest(scratch / GRAPH),
        }  # fmt: skip
        lost = [c for c in checks if c["value"] < c["limit"]]
        if lost and not allow_failing:
            told = "; ".join(f"{c['what']} is {c['value']:.4f}, the limit is {c['limit']:g}" for c in lost)
            raise BadModel(
                f"{told}. Read more calibration_texts, leave embeddings = false, train longer, or say "
                "--allow-failing-gate"
            )
        exact.unlink()
        for name in (RECIPE, *FILES):
            shutil.copyfile(run.directory / name, scratch / name)
        (scratch / FACTS).write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    return facts


def quantised(model: TextClassifier, reader: Reader, texts: list[str], settings: SmallerRecipe) -> nn.Module:
    """The classifier on INT8 products and tables; the linear model's weights in FP16, of which many are
    near zero."""
    small: nn.Module = copy.deepcopy(model)
    assert isinstance(small, TextClassifier)
    del small.found  # of masked training alone
    linears = [
        name for name, part in small.named_modules()
        if isinstance(part, nn.Linear) and min(part.in_features, part.out_features) >= NARROWEST
    ]  # fmt: skip
    tables = ["embedding"] if settings.embeddings else []
    small = rebuild(small, {"precision": "int8", "linears": linears, "tables": tables})
    if settings.embeddings:
        small = rebuild(small, {"precision": "float16", "linears": [], "tables": ["linear"]})
    every = max(1, len(texts) // settings.calibration_texts)
    units = reader.read(texts[::every][: settings.calibration_texts])
    order = np.argsort((units > 0).sum(1), kind="stable")
    parts = [units[order[at : at + _BATCH]] for at in range(0, len(order), _BATCH)]
    batches = [tensors(reader.inputs(part, model.length, model.rows)) for part in parts]
    calibrate(small, batches, Settings())
    return small.eval()


def _write(model: nn.Module, reader: Reader, sizes: tuple[int, int], path: Path) -> None:
    inputs = tensors(reader.inputs(np.ones((2, 9), np.int32), min(sizes[0], 8), sizes[1]))
    batch = torch.export.Dim("batch", min=1)
    axes = {
        "fields": {0: batch, 1: torch.export.Dim("length", min=1, max=sizes[0])},
        "grams": {0: batch, 1: torch.export.Dim("grams", min=1)},
    }
    write_module(model, inputs, axes, "logits", path, "this is a defect of trirank")


def _session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
