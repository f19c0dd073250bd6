"""Two steps over the whole catalogue, as a service takes them: retrieve some hundred items, let the ranker order them.

Retrieval is the union of what item-to-item similarity finds, the ranker's own states, and, where the features have
them, transitions and attributes. The similarity is given to the ranker as the retrieval score.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from trirank_backend.catalogue import NO_ROW

from trirank_build.data.dataset import Dataset
from trirank_build.features.examples import Examples
from trirank_build.features.fitting import Features
from trirank_build.models.sequence import SequenceRanker
from trirank_build.retrieval.item_knn import fit_item_knn
from trirank_build.retrieval.scores import Scores
from trirank_build.retrieval.tasks import CatalogueTasks, contender_scorer, sample_negatives, state_scorer
from trirank_build.retrieval.transitions import Alike, Followers

EACH = 100
"""Items that each of the sources finds."""
_CHUNK = 256


def retrieve(
    tasks: CatalogueTasks, dataset: Dataset, features: Features, model: SequenceRanker, each: int = EACH
) -> Examples:
    """The tasks as requests of retrieved candidates, ``each`` of every source, those of the highest retrieval score
    first. Where similarity is the only source it finds twice as many."""
    scorers = [contender_scorer(fit_item_knn(dataset, features))]
    if model.has_states:
        scorers.append(state_scorer(model, features))
    if len(features.packer.transitions.rows):
        scorers.append(contender_scorer(Followers(features)))
        if features.packer.kernel_items.attributes.any():
            scorers.append(contender_scorer(Alike(features)))
    each = min(each if len(scorers) > 1 else 2 * each, tasks.items)
    examples = Examples(dataset, features, len(tasks), len(scorers) * each, missed=1)
    for start in range(0, len(tasks), _CHUNK):
        which = np.arange(start, min(start + _CHUNK, len(tasks)))
        scores, banned = [scorer(tasks, which) for scorer in scorers], tasks.banned(which)
        found = [each_one.top(each, banned) for each_one in scores]
        rows = np.concatenate([np.where(np.isneginf(values), NO_ROW, top) for top, values in found], 1)
        _fill(examples, tasks, which, rows, scores[0])
    return examples


def sample(tasks: CatalogueTasks, dataset: Dataset, features: Features, negatives: int, seed: int) -> Examples:
    """The tasks as requests: each choice among so many items that its user never met."""
    examples = Examples(dataset, features, len(tasks), 1 + negatives, missed=1)
    knn, rng = contender_scorer(fit_item_knn(dataset, features)), np.random.default_rng(seed)
    for start in range(0, len(tasks), _CHUNK):
        which = np.arange(start, min(start + _CHUNK, len(tasks)))
        others = sample_negatives(tasks, which, negatives, rng)
        rows = np.concatenate([tasks.targets[which][:, None], others], 1)
        _fill(examples, tasks, which, rows, knn(tasks, which))
    return examples


def _fill(
    examples: Examples,
    tasks: CatalogueTasks,
    which: NDArray[np.int64],
    rows: NDArray[np.int64],
    retrieval: Scores,
) -> None:
    """Candidates ``rows`` [B, N] of the tasks ``which``, each once, by falling retrieval score; NO_ROW: none."""
    rows = np.sort(rows, axis=1)
    twice = np.concatenate([np.zeros((len(which), 1), bool), rows[:, 1:] == rows[:, :-1]], 1)
    values = np.where(twice | (rows == NO_ROW), -np.inf, retrieval.of(np.maximum(rows, 0)))
    order = np.argsort(-values, axis=1, kind="stable")
    rows, values = np.take_along_axis(rows, order, 1), np.take_along_axis(values, order, 1)
    there = ~np.isneginf(values)
    hit = there & (rows == tasks.targets[which][:, None])
    examples.users[which], examples.times[which] = tasks.users[which], tasks.times[which]
    examples.rows[which] = np.where(there, rows, -1)
    examples.scores[which] = np.where(there, values, np.nan)
    examples.labels[which] = hit * tasks.gains[which][:, None]
    examples.missed[which, 0] = ~hit.any(1) * tasks.gains[which]
