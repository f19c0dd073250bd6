"""Where a ranker starts from: the best order that is linear in what is known of each candidate.

The softmax over a list is convex in the weights of the dense features and of the affinity, of which there are two
dozen, and training goes on from there. A start is never worse on validation than the order of any of SIMPLE by itself,
retrieval's and popularity's among them, since those are tried as well (issue 19).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trirank_build.evaluation import metrics
from trirank_build.features.examples import Batch, Examples
from trirank_build.models.sequence import SequenceRanker
from trirank_build.training.losses import listwise_softmax, targets_of

REQUESTS = 6_000
"""Training requests that are read at most; two dozen weights need no more."""
PENALTIES = (1e-3, 1e-2, 1e-1)
"""Of the squared weights of standardised columns; validation chooses."""
AFFINITY = "affinity"
SIMPLE = ("retrieval_rank", "popularity", "transition", "attribute_match", "query_coverage", AFFINITY)
"""Columns whose order is tried by itself."""
_BATCH = 256
_LEAST = 1e-6
"""A column that varies less within lists says nothing."""


class Start(NamedTuple):
    """What was chosen.

    Attributes:
        name: ``linear``, or the column that alone was better.
        orders: NDCG@10 on validation of what was tried, by name.
    """

    name: str
    orders: dict[str, float]


class _Lists(NamedTuple):
    """Candidates of requests: columns [R, N, C], labels and valid [R, N], offsets and label_weights [R, N] or None."""

    columns: Tensor
    labels: Tensor
    valid: Tensor
    offsets: Tensor | None
    label_weights: Tensor | None


def fit_start(
    model: SequenceRanker,
    thresholds: tuple[float, ...],
    train: Callable[[NDArray[np.int64]], tuple[Batch, dict[str, Tensor]]],
    teaching: NDArray[np.int64],
    valid: Examples,
    count: Callable[[NDArray[np.float32]], float],
    with_affinity: bool,
    seed: int,
) -> Start | None:
    """Give the model its first linear weights; None where it has no linear parts.

    Args:
        thresholds: of each task, see dataset.Description.tasks.
        train: numbers of training requests → their batch, and what the loss is told of positions.
        teaching: the numbers of all that have something to teach.
        valid: requests that decide.
        count: scores [R, N] of these → NDCG@10, as training counts it.
        with_affinity: whether the affinity was pre-trained; one that was not is noise, and starts at zero.
    """
    parts = model.linear_parts()
    if parts is None:
        return None
    some = np.sort(np.random.default_rng(seed).permutation(teaching)[:REQUESTS])
    lists = _joined([_lists(model, *train(some[at : at + _BATCH])) for at in range(0, len(some), _BATCH)])
    whole = [valid.whole(np.arange(at, min(at + _BATCH, len(valid)))) for at in range(0, len(valid), _BATCH)]
    judged = _joined([_lists(model, batch, {}) for batch in whole]).columns.numpy()

    names = [*model.spec.dense, AFFINITY]
    scale = _spread_within(lists)
    if not with_affinity:
        scale[-1] = 0
    used = scale > _LEAST
    tried: dict[str, tuple[float, NDArray[np.float32]]] = {}

    def judge(name: str, weights: NDArray[np.float32]) -> None:
        """``weights`` [C, T] of columns divided by their spread."""
        own = np.where(used[:, None], weights / np.where(used, scale, 1)[:, None], 0).astype(np.float32)
        ndcg = count(metrics.ties_broken((judged @ own).mean(-1).astype(np.float32)))
        if name not in tried or ndcg > tried[name][0]:
            tried[name] = ndcg, own

    for penalty in PENALTIES:
        judge("linear", _fit(lists, thresholds, scale, used, penalty))
    for name in SIMPLE:
        at = names.index(name)
        if used[at]:
            alone = np.zeros((len(names), len(thresholds)), np.float32)
            alone[at] = 1
            judge(name, alone)
    best = max(tried, key=lambda name: tried[name][0])
    dense, affinity = parts
    with torch.no_grad():
        weights = torch.from_numpy(tried[best][1])
        dense.weight.copy_(weights[:-1].T)
        affinity.copy_(weights[-1])
    return Start(best, {name: round(ndcg, 6) for name, (ndcg, _) in tried.items()})


def _lists(model: SequenceRanker, batch: Batch, told: dict[str, Tensor]) -> _Lists:
    model.eval()
    device = next(model.parameters()).device
    inputs = {name: torch.from_numpy(array).to(device) for name, array in batch.packed.tensors().items()}
    with torch.inference_mode():
        state = model.request_state(inputs["history"], inputs["query"], inputs["context"])
        affinity = model.affinities(state, model.item_vectors(inputs["candidates"]))
        columns = torch.cat([inputs["dense"], affinity[..., None]], -1).cpu()
    return _Lists(
        columns.clone(),
        torch.from_numpy(batch.labels),
        torch.from_numpy(batch.valid),
        told.get("offsets"),
        told.get("label_weights"),
    )


def _joined(parts: list[_Lists]) -> _Lists:
    """Lists of all batches, padded to the longest."""
    width = max(part.labels.shape[1] for part in parts)

    def together(name: str) -> Tensor | None:
        values = [getattr(part, name) for part in parts]
        if values[0] is None:
            return None
        padded = []
        for value in values:
            padding = [0, 0] * (value.ndim - 2) + [0, width - value.shape[1]]
            padded.append(nn.functional.pad(value, padding))
        return torch.cat(padded)

    columns, labels, valid = together("columns"), together("labels"), together("valid")
    assert columns is not None
    assert labels is not None
    assert valid is not None
    return _Lists(columns, labels, valid, together("offsets"), together("label_weights"))


def _spread_within(lists: _Lists) -> NDArray[np.float64]:
    """[C] standard deviation of each column around its mean in the list, since that mean changes no order."""
    there = lists.valid[..., None]
    mean = (lists.columns * there).sum(1, keepdim=True) / there.sum(1, keepdim=True).clamp_min(1)
    squares = (((lists.columns - mean) * there) ** 2).sum((0, 1)) / there.sum().clamp_min(1)
    return np.asarray(squares.sqrt().double().numpy())


def _fit(
    lists: _Lists, thresholds: tuple[float, ...], scale: NDArray[np.float64], used: NDArray[np.bool_], penalty: float
) -> NDArray[np.float32]:
    """[C, T] weights of columns divided by their spread."""
    columns = lists.columns[..., torch.from_numpy(used)] / torch.from_numpy(scale[used]).float()
    targets = targets_of(lists.labels, thresholds)
    weights = torch.zeros(columns.shape[-1], len(thresholds), requires_grad=True)
    optimiser = torch.optim.LBFGS([weights], max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        found = listwise_softmax(columns @ weights, targets, lists.valid, lists.label_weights, lists.offsets).sum()
        found = found + penalty * weights.square().sum()
        found.backward()  # type: ignore[no-untyped-call]
        return found

    optimiser.step(loss)  # type: ignore[no-untyped-call]
    whole = np.zeros((len(scale), len(thresholds)), np.float32)
    whole[used] = weights.detach().numpy()
    return whole
