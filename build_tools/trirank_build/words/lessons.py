"""Requests with queries → lessons: which words of titles answer which words of queries.

- told: how much a title's word is asked for by a query's (IBM's first translation model, Brown et al. 1993; for search
  Berger and Lafferty, SIGIR 1999), from titles that were better than their list
- pair, missing, head, extra: a ridge regression of how much better than its list a title was, on the words that it
  lacks or has besides, and on the query's last word with the last words of what the title names
- queries, lifts, masses: what answered each query, for queries like it
- intent: which categories were chosen after which words

A lesson on a training request itself would be trusted too much, so training reads each from lessons that were learned
without its query (``FOLDS``; as item-to-item similarities are, docs/architecture.md).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse.linalg import lsqr
from trirank_backend.words.lexicon import DIM, FULL, LETTERS, Lessons, Lexicon, load_lessons, save_arrays
from trirank_backend.words.queries import QueryReader, unit

FOLDS = 5
PAIRS = 1_000_000
"""Of queries and candidates that are learned from at most, of requests by chance; a million take two gigabytes."""
ROUNDS = 4
"""Of the translation's estimation."""
LEAST_TOLD = 0.02
"""Likelihood of a query's word beside a title's from which it is kept."""
QUERIES = 50_000
"""Of training whose answers are kept, the most frequent ones."""
PENALTY = 30.0
SMOOTHING = 10.0
"""Words of each category's that are taken to be the whole shop's."""
TEMPERATURES = (0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0)
_TEMPERED = 5_000
_STEPS = 60


@dataclass(frozen=True)
class Judged:
    """Candidates of requests with queries, one after the other: P in all, of R requests.

    Attributes:
        queries: [R] as typed.
        request: [P] which request each is of, ascending.
        rows: [P] catalogue rows.
        labels: [P] float32.
        categories: [M+1] int32 the items' ids in the joint vocabulary, 0: unknown.
        told: [R] bool which queries may be kept one by one, as vectors; None: all.
    """

    queries: list[str]
    request: NDArray[np.int64]
    rows: NDArray[np.int64]
    labels: NDArray[np.float32]
    categories: NDArray[np.int32]
    told: NDArray[np.bool_] | None = None

    def of(self, kept: NDArray[np.bool_]) -> Judged:
        """Some requests [R] alone."""
        places = kept[self.request]
        number = np.cumsum(kept) - 1
        queries = [query for query, keep in zip(self.queries, kept, strict=True) if keep]
        told = None if self.told is None else self.told[kept]
        request = number[self.request[places]]
        return Judged(queries, request, self.rows[places], self.labels[places], self.categories, told)


def fold_of(key: str) -> int:
    """Which lessons a query is not in, by a hash of ``QueryReader.key`` alone: queries of the same words are in one."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") % FOLDS


def fit_lessons(judged: Judged, reader: QueryReader, directory: Path) -> None:
    """Learn from all requests, and from all but each fold's, and write to ``directory`` and its folders ``fold-N``."""
    folds = np.array([fold_of(reader.key(query)) for query in judged.queries], np.int64)
    without = [learn(judged.of(folds != fold), reader) for fold in range(FOLDS)]
    temperature = tempered(without[0], judged.of(folds == 0), reader)
    save_arrays(learn(judged, reader)._replace(intent_temperature=temperature), directory)
    for fold, lessons in enumerate(without):
        save_arrays(lessons._replace(intent_temperature=temperature), fold_folder(directory, fold))


def fold_folder(directory: Path, fold: int) -> Path:
    """Where lessons without a fold's queries are."""
    return directory / f"fold-{fold}"


def load_folds(directory: Path, words: int) -> list[Lessons]:
    """What ``fit_lessons`` wrote for training; none where no request had a query."""
    folders = [fold_folder(directory, fold) for fold in range(FOLDS)]
    return [load_lessons(folder, words) for folder in folders] if folders[0].is_dir() else []


def learn(judged: Judged, reader: QueryReader) -> Lessons:
    """Lessons from these requests; none from no request."""
    lexicon = reader.lexicon
    words = len(lexicon.rarity) - 1
    if not judged.queries:
        return Lessons.none(words)
    read = reader.read(judged.queries)
    sizes = np.bincount(judged.request, minlength=len(judged.queries))
    means = np.bincount(judged.request, judged.labels, len(judged.queries)) / np.maximum(sizes, 1)
    lift = (judged.labels - means[judged.request]).astype(np.float32)
    told = _told(judged, read.ids, lift, lexicon)
    ridge = _ridge(judged, read.ids, lift, lexicon)
    answers = _answers(judged, read.vectors[:, 0], lift, lexicon)
    return Lessons(**told, **ridge, **answers, **_intents(judged, read.ids, lift, words))


def _told(
    judged: Judged, ids: NDArray[np.int32], lift: NDArray[np.float32], lexicon: Lexicon
) -> dict[str, NDArray[Any]]:
    words = len(lexicon.rarity) - 1
    good = np.flatnonzero((lift >= 0) & (judged.labels > 0))
    asked, titles = ids[judged.request[good]], lexicon.titles[judged.rows[good]]
    # Every word of a query beside every word of a title that answers it.
    left = np.repeat(asked, titles.shape[1], 1).reshape(len(good), asked.shape[1], titles.shape[1])
    right = np.broadcast_to(titles[:, None], left.shape)
    slot = np.arange(len(good) * asked.shape[1]).reshape(len(good), asked.shape[1], 1)
    slot, weight = np.broadcast_to(slot, left.shape), np.broadcast_to(judged.labels[good][:, None, None], left.shape)
    there = (left > 0) & (right > 0)
    left, right, slot, weight = left[there].astype(np.int64), right[there], slot[there], weight[there]
    keys, place = np.unique(left * (words + 1) + right, return_inverse=True)
    of_query, of_title = keys // (words + 1), keys % (words + 1)
    chance = np.ones(len(keys))
    for _ in range(ROUNDS):
        each = chance[place]
        total = np.bincount(slot, each)
        count = np.bincount(place, weight * each / np.maximum(total[slot], 1e-12), len(keys))
        chance = count / (np.bincount(of_title, count, words + 1)[of_title] + 1.0)
    kept = (chance >= LEAST_TOLD) & (of_query != of_title)
    of_query, of_title, chance = of_query[kept], of_title[kept], chance[kept]
    starts = np.searchsorted(of_query, np.arange(words + 2)).astype(np.int64)
    return {
        "told_starts": starts, "told_words": of_title.astype(np.int32),
        "told": np.rint(FULL * chance.clip(0, 1)).astype(np.uint8),
    }  # fmt: skip


def _ridge(
    judged: Judged, ids: NDArray[np.int32], lift: NDArray[np.float32], lexicon: Lexicon
) -> dict[str, NDArray[Any]]:
    words = len(lexicon.rarity) - 1
    asked, titles = ids[judged.request], lexicon.titles[judged.rows]
    spots = np.arange(titles.shape[1])
    head_ends = lexicon.heads[judged.rows][:, None]
    in_query = (titles[:, :, None] == asked[:, None, :]).any(2)
    missing = (asked > 0) & ~(asked[:, :, None] == titles[:, None, :]).any(2)
    is_head = (spots >= head_ends - 2) & (spots < head_ends) & (titles > 0)
    plain = (ids > 0) & (lexicon.kinds[ids] == LETTERS)
    last_place = np.where(plain.any(1), ids.shape[1] - 1 - plain[:, ::-1].argmax(1), -1)
    last = np.where(last_place >= 0, ids[np.arange(len(ids)), last_place], 0)[judged.request]
    pair_keys = last[:, None].astype(np.int64) * (words + 1) + titles
    with_last = is_head & (last > 0)[:, None]
    known_pairs, pair_place = np.unique(pair_keys[with_last], return_inverse=True)

    columns, rows = [], []
    for first, values, there in (
        (0, asked, missing), (words + 1, titles, is_head & ~in_query),
        (2 * (words + 1), titles, (titles > 0) & ~in_query),
    ):  # fmt: skip
        columns.append(values[there].astype(np.int64) + first)
        rows.append(np.nonzero(there)[0])
    columns.append(pair_place + 3 * (words + 1))
    rows.append(np.nonzero(with_last)[0])
    column, row = np.concatenate(columns), np.concatenate(rows)
    width = 3 * (words + 1) + len(known_pairs)
    parts = np.bincount(row, minlength=len(titles))
    values = 1 / np.sqrt(np.maximum(parts, 1))[row]
    often = np.bincount(column, minlength=width)
    values = np.where(often[column] >= 3, values, 0.0)  # what was met once or twice says nothing of others
    matrix = sparse.csr_matrix((values, (row, column)), shape=(len(titles), width))
    weights = lsqr(matrix, lift, damp=np.sqrt(PENALTY), iter_lim=_STEPS)[0].astype(np.float32)
    pairs = weights[3 * (words + 1) :]
    kept = pairs != 0
    of_last, of_head = known_pairs[kept] // (words + 1), known_pairs[kept] % (words + 1)
    return {
        "pair_starts": np.searchsorted(of_last, np.arange(words + 2)).astype(np.int64),
        "pair_words": of_head.astype(np.int32), "pair_weights": pairs[kept],
        "missing": weights[: words + 1], "head": weights[words + 1 : 2 * (words + 1)],
        "extra": weights[2 * (words + 1) : 3 * (words + 1)],
    }  # fmt: skip


def _intents(judged: Judged, ids: NDArray[np.int32], lift: NDArray[np.float32], words: int) -> dict[str, NDArray[Any]]:
    """Naive Bayes of the categories of what was chosen, by the words of the query; the temperature is left at 1."""
    own = judged.categories[judged.rows]
    good = np.flatnonzero((lift >= 0) & (judged.labels > 0) & (own > 0))
    classes, place = np.unique(own[good], return_inverse=True)
    weight = judged.labels[good].astype(np.float64)
    often = np.bincount(place, weight, len(classes))
    asked = ids[judged.request[good]]
    there = asked > 0
    word = asked[there].astype(np.int64)
    of_class, each = np.repeat(place, there.sum(1)), np.repeat(weight, there.sum(1))
    keys, at = np.unique(word * max(len(classes), 1) + of_class, return_inverse=True)
    counts = np.bincount(at, each, len(keys))
    of_word, places = keys // max(len(classes), 1), keys % max(len(classes), 1)
    total = np.bincount(word, each, words + 1)
    share = total / max(total.sum(), 1e-12)
    sizes = np.bincount(places, counts, len(classes))
    return {
        "intent_classes": classes.astype(np.int32),
        "intent_prior": np.log(np.maximum(often, 1e-12) / max(often.sum(), 1e-12)).astype(np.float32),
        "intent_sizes": np.log(sizes + SMOOTHING).astype(np.float32),
        "intent_starts": np.searchsorted(of_word, np.arange(words + 2)).astype(np.int64),
        "intent_places": places.astype(np.int32),
        "intent_weights": np.log1p(counts / (SMOOTHING * share[of_word])).astype(np.float32),
        "intent_temperature": np.ones(1, np.float32),
    }


def tempered(lessons: Lessons, judged: Judged, reader: QueryReader) -> NDArray[np.float32]:
    """[1] the temperature under which requests that the lessons have not seen say most likely what was chosen."""
    read = reader.read(judged.queries)  # for the words alone
    own = judged.categories[judged.rows]
    good = np.flatnonzero((judged.labels > 0) & (own > 0))[:_TEMPERED]
    if not len(good) or not len(lessons.intent_classes):
        return np.ones(1, np.float32)
    found = []
    for temperature in TEMPERATURES:
        warmed = reader.of(lessons._replace(intent_temperature=np.array([temperature], np.float32)))
        total = 0.0
        for request in np.unique(judged.request[good]):
            intents, shares = warmed.intents(read.ids[request][read.ids[request] > 0])
            for category in own[good[judged.request[good] == request]]:
                total += np.log(max(float(shares[intents == category].sum()), 1e-3))
        found.append(total)
    return np.array([TEMPERATURES[int(np.argmax(found))]], np.float32)


def _answers(
    judged: Judged, vectors: NDArray[np.float32], lift: NDArray[np.float32], lexicon: Lexicon
) -> dict[str, NDArray[Any]]:
    """One row a different query, the most frequent ones first."""
    names: dict[str, int] = {}  # numpy would give every query the room of the longest
    number = np.array([names.setdefault(query, len(names)) for query in judged.queries], np.int64)
    often = np.bincount(number, minlength=len(names))
    first = np.zeros(len(names), np.int64)
    first[number[::-1]] = np.arange(len(number))[::-1]
    of_query = number[judged.request]
    titles = lexicon.vectors[judged.rows].astype(np.float32) / 127

    def summed(weights: NDArray[np.float32]) -> NDArray[np.float32]:
        matrix = sparse.csr_matrix((weights, (of_query, np.arange(len(weights)))), shape=(len(names), len(weights)))
        return np.asarray(matrix @ titles, np.float32) / np.maximum(often, 1)[:, None].astype(np.float32)

    own = unit(vectors[first])
    kept = np.argsort(-often, kind="stable")[:QUERIES]
    tells = np.ones(len(names), bool) if judged.told is None else judged.told[first]
    kept = np.sort(kept[own[kept].any(1) & tells[kept]])
    lifts, masses = summed(lift), summed(judged.labels)
    shape = (len(kept), DIM)
    return {
        "queries": own[kept].reshape(shape),
        "lifts": lifts[kept].reshape(shape),
        "masses": masses[kept].reshape(shape),
    }
