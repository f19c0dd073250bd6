"""An index of all items by the ranker's own vectors, so that a user's state finds its nearest ones without asking all.

Up to EXACT items all are compared, which takes milliseconds. More are sorted into cells around centres (inverted file,
Sivic and Zisserman 2003) and kept as one byte a number; as many cells are searched as it takes to find RECALL of what
the exact search finds, which other states than the choosing ones then tell. docs/scale.md has the libraries that were
tried.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import onnxruntime
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from trirank_backend.candidates import FACTS, INDEX, STATE, search_of
from trirank_backend.features import FeatureSpec

from trirank_build.data.dataset import Dataset
from trirank_build.errors import BadModel
from trirank_build.export.onnx import write_module
from trirank_build.export.parity import MODULE_LIMIT, sample_inputs
from trirank_build.features.fitting import Features
from trirank_build.models.sequence import SequenceRanker
from trirank_build.retrieval.tasks import CatalogueTasks, item_vectors

EXACT = 200_000
"""Items up to which all are compared."""
RECALL, K = 0.95, 100
_JUDGES = 500
"""States that are searched for exactly."""
_TRAINING = 40
"""Items a cell that its centre is learned from."""
_CHUNK = 500_000


class StateGraph(nn.Module):
    """history [B, L, F+2] → [B, D+1], whose product with an item's vector and 1 is the ranker's affinity."""

    def __init__(self, model: SequenceRanker) -> None:
        super().__init__()
        self.model = model

    def forward(self, history: Tensor) -> Tensor:
        state = self.model.next_state(history)
        scaled = self.model.comparable(state, torch.zeros_like(state))[0]
        return torch.cat([scaled, torch.ones_like(scaled[:, :1])], -1)


def build_index(model: SequenceRanker, features: Features, dataset: Dataset, folder: Path) -> dict[str, Any]:
    """Write index, state graph and what is known of them into a folder that is there; gives the last.

    Raises:
        BadModel: the ranker has no states, or the graph differs from it.
    """
    if not model.has_states:
        raise BadModel(
            f"{type(model).__name__} has no states, so no items are nearest to them; assemble without --index"
        )
    model.eval()
    graph = StateGraph(model)
    _write_graph(graph, features.spec, folder / STATE)
    items = item_vectors(model, features).cpu().numpy()
    states = states_of(graph, features, dataset)
    begun = time.perf_counter()
    index, kind, cells = fit(items)
    seconds = time.perf_counter() - begun
    truth = exact_top(items, states, min(K, len(items)))
    probes, recall = choose_probes(index, cells, states, truth)
    faiss.write_index(index, str(folder / INDEX))
    facts = {
        "kind": kind, "items": len(items), "dim": items.shape[1], "cells": cells, "probes": probes,
        f"recall_at_{K}": round(recall, 4), "judged_by": len(states) - len(states) // 2 if cells else len(states),
    }  # fmt: skip
    (folder / FACTS).write_text(json.dumps(facts, indent=1) + "\n")
    return {**facts, "fit_seconds": round(seconds, 1)}


def fit(items: NDArray[np.float32], seed: int = 0) -> tuple[Any, str, int]:
    """An index of vectors [M, D], its kind in faiss's words, and its number of cells; 0: it is exact."""
    count, dim = items.shape
    if count <= EXACT:
        flat = faiss.IndexFlatIP(dim)
        flat.add(items)
        return flat, "Flat", 0
    cells = int(2 ** round(np.log2(2.6 * np.sqrt(count))))
    kind = f"IVF{cells},SQ8"
    index: Any = faiss.index_factory(dim, kind, faiss.METRIC_INNER_PRODUCT)
    some = np.random.default_rng(seed).choice(count, min(count, _TRAINING * cells), replace=False)
    index.cp.niter, index.cp.seed = 6, seed
    index.train(items[np.sort(some)])
    for at in range(0, count, _CHUNK):
        index.add(items[at : at + _CHUNK])
    return index, kind, cells


def exact_top(items: NDArray[np.float32], states: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """[B, k] rows of the largest products, in blocks of items."""
    found: NDArray[np.int64] = faiss.knn(states, items, k, metric=faiss.METRIC_INNER_PRODUCT)[1]
    return found


def choose_probes(index: Any, cells: int, states: NDArray[np.float32], truth: NDArray[np.int64]) -> tuple[int, float]:
    """The fewest cells (to a factor of the square root of 2) whose search finds RECALL of ``truth``, and what it finds.

    Half of the states choose; the others tell the recall.
    """
    if not cells:
        return 0, 1.0
    half = len(states) // 2
    probes = cells
    for step in range(2, 2 * int(np.log2(cells)) + 1):
        tried = int(2 ** (step / 2))
        if recall_of(index, tried, states[:half], truth[:half]) >= RECALL:
            probes = tried
            break
    return probes, recall_of(index, probes, states[half:], truth[half:])


def recall_of(index: Any, probes: int, states: NDArray[np.float32], truth: NDArray[np.int64]) -> float:
    """Share of ``truth`` [B, k] that is found."""
    found = index.search(states, truth.shape[1], params=search_of({"probes": probes}))[1]
    return float(
        np.mean([len(np.intersect1d(one, two)) / truth.shape[1] for one, two in zip(found, truth, strict=True)])
    )


def states_of(graph: StateGraph, features: Features, dataset: Dataset) -> NDArray[np.float32]:
    """[B, D+1] of users of the validation split, as they were then."""
    # Of some users alone: a history of all events is gigabytes where there are many.
    users = dataset.events.filter(pl.col("split") == "valid")["user_id"].unique().sort()
    some = users.sample(min(4 * _JUDGES, len(users)), seed=0)
    few = replace(dataset, events=dataset.events.filter(pl.col("user_id").is_in(some.implode())))
    tasks = CatalogueTasks.of(few, "valid", features, _JUDGES)
    if len(tasks) < 2:
        raise BadModel("fewer than two choices of the validation split have a history, too few to judge an index by; "
                       "bring a longer log")  # fmt: skip
    rows, behaviours = tasks.histories(np.arange(len(tasks)), features.spec.history_length)
    with torch.inference_mode():
        found: NDArray[np.float32] = graph(torch.from_numpy(features.packer.history(rows, behaviours))).numpy()
    return found


def _write_graph(graph: StateGraph, spec: FeatureSpec, path: Path) -> None:
    """Write the state's graph, held against the module."""
    rng = np.random.default_rng(0)
    sample = {"history": torch.from_numpy(sample_inputs(spec, 2, 1, rng)["history"])}
    shapes = {"history": {0: torch.export.Dim("batch", min=1)}}
    write_module(graph, sample, shapes, "state", path, "next_state must work for any batch, without branches on values")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for batch in (1, 7):
        history = sample_inputs(spec, batch, 1, rng)["history"]
        with torch.inference_mode():
            expected = graph(torch.from_numpy(history)).numpy()
        worst = float(np.abs(session.run(["state"], {"history": history})[0] - expected).max())
        if not worst <= MODULE_LIMIT * max(1.0, float(np.abs(expected).max())):
            raise BadModel(
                f"the graph of the state differs from the ranker by {worst:.2g}; the limit is {MODULE_LIMIT}"
            )
