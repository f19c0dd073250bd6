"""Titles → a lexicon: words, rarities, vectors, and which words are near which.

Vectors are those of positive pointwise mutual information, factorised (Levy and Goldberg, "Neural word embedding as
implicit matrix factorization", NIPS 2014): words that stand beside the same words are near each other. They need the
titles alone, and some seconds.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse.linalg import svds
from trirank_backend.words.analysis import NUMBER, Analyser, is_unit, normalised
from trirank_backend.words.encoder import FILES, FOLDER, SentenceEncoder
from trirank_backend.words.lexicon import (
    DIM,
    FULL,
    LETTERS,
    TITLE_WORDS,
    TRIGRAM_HASHES,
    TRIGRAMS,
    UNIT,
    Lexicon,
    load_lexicon,
    load_words,
    save_arrays,
)
from trirank_backend.words.lexicon import NUMBER as NUMBERS
from trirank_backend.words.queries import trigrams, unit
from trirank_backend.words.spelling import MOST, Speller

from trirank_build.progress import progress

VOCABULARY = 100_000
"""Words that are known at most, the most frequent ones; a lexicon of so many takes 20 seconds and 80 MB."""
WINDOW = 5
"""Words apart up to which two are beside each other, each step counting less."""
SMOOTHING = 0.75
"""Power of how often a word is beside others, which keeps rare ones from being near everything (Levy et al. 2015)."""
LEAST_COUNT = 3
"""Titles that have a word before it gets a vector."""
NEAR_MEANING, LEAST_MEANING = 128, 0.3
NEAR_LETTERS, LEAST_LETTERS = 48, 0.25
"""Words that are kept beside each word at most, and how near they are at least."""
_ROWS = 512


def fit_lexicon(titles: Iterable[str], language: str, directory: Path, encoder: Path | None = None) -> Lexicon:
    """Fit on the titles of M items in the catalogue's order, and write to the folder ``directory``.

    Args:
        encoder: folder of a team's own text encoder (trirank_backend.words.encoder), which is copied.

    Raises:
        InvalidRelease: it is none.
    """
    analyser = Analyser(language)
    texts = list(titles)
    counts = Counter(word for title in texts for word in dict.fromkeys(analyser.words(title)[:TITLE_WORDS]))
    vocabulary = [word for word, _ in counts.most_common(VOCABULARY)]
    rows, heads, grams = _read_titles(texts, analyser, vocabulary)
    found = np.array([0, *(counts[word] for word in vocabulary)], np.float64)
    rarity = np.log1p((len(texts) - found + 0.5) / (found + 0.5)).astype(np.float32)
    rarity[0] = 0
    vectors = _word_vectors(rows, found)
    gram_counts = np.bincount(grams[:-1][grams[:-1] > 0], minlength=TRIGRAM_HASHES + 1)
    gram_rarity = np.log1p((len(texts) - gram_counts + 0.5).clip(0) / (gram_counts + 0.5)).astype(np.float32)
    gram_rarity[0] = 0
    kinds = [LETTERS, *(NUMBERS if w.startswith(NUMBER) else UNIT if is_unit(w) else LETTERS for w in vocabulary)]
    lexicon = Lexicon(
        titles=rows, heads=heads, trigrams=grams, vectors=title_vectors(rows, rarity, vectors), rarity=rarity,
        kinds=np.array(kinds, np.int8), trigram_rarity=gram_rarity, word_vectors=vectors,
        **_near(vocabulary, vectors),
        mean_length=np.array([max((rows > 0).sum() / max(len(texts), 1), 1)], np.float32),
        encoded=_encoded(texts, encoder),
    )  # fmt: skip
    if encoder is not None:
        for name in FILES:
            if (encoder / name).is_file():
                (directory / FOLDER / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(encoder / name, directory / FOLDER / name)
    save_arrays(lexicon, directory)
    (directory / "words.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    _speller(texts).save(directory)
    return load_lexicon(directory, len(texts))


def refreshed_lexicon(fitted: Path, titles: Iterable[str], language: str, directory: Path) -> Lexicon:
    """The titles of a newer catalogue in the words, and with the lessons, of an earlier fit, from its folder."""
    shutil.copytree(fitted, directory)
    texts, vocabulary = list(titles), load_words(fitted)
    rows, heads, grams = _read_titles(texts, Analyser(language), vocabulary)
    rarity, vectors = np.load(fitted / "rarity.npy"), np.load(fitted / "word_vectors.npy")
    named: dict[str, NDArray[Any]] = {
        "titles": rows,
        "heads": heads,
        "trigrams": grams,
        "vectors": title_vectors(rows, rarity, vectors),
    }
    if (directory / FOLDER).is_dir():
        named["encoded"] = _encoded(texts, directory / FOLDER)
    for name, column in named.items():
        np.save(directory / f"{name}.npy", column)
    return load_lexicon(directory, len(texts))


def _encoded(titles: list[str], folder: Path | None) -> NDArray[np.int8]:
    """Lexicon.encoded"""
    if folder is None:
        return np.zeros((len(titles) + 1, 0), np.int8)
    encoder = SentenceEncoder(folder, threads=os.cpu_count() or 1)
    found = np.zeros((len(titles) + 1, encoder.width), np.int8)
    with progress() as bar:
        for start in bar.track(range(0, len(titles), _ROWS), description="encoding titles"):
            part = titles[start : start + _ROWS]
            found[start : start + len(part)] = np.rint(127 * encoder.encode(part))
    return found


def _read_titles(
    titles: list[str], analyser: Analyser, vocabulary: list[str]
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """Lexicon.titles, heads and trigrams."""
    numbers = {word: number for number, word in enumerate(vocabulary, 1)}
    rows = np.zeros((len(titles) + 1, TITLE_WORDS), np.int32)
    heads, grams = np.zeros(len(titles) + 1, np.int32), np.zeros((len(titles) + 1, TRIGRAMS), np.int32)
    for row, title in enumerate(titles):
        words = analyser.words(title)[:TITLE_WORDS]
        known = [numbers[word] for word in words if word in numbers]
        rows[row, : len(known)] = known
        grams[row] = trigrams(words, TRIGRAMS)
        heads[row] = sum(word in numbers for word in words[: analyser.head(title)])
    return rows, heads, grams


def title_vectors(
    titles: NDArray[np.int32], rarity: NDArray[np.float32], vectors: NDArray[np.float32]
) -> NDArray[np.int8]:
    """[M+1, DIM] 127 times the sum of titles' word vectors by rarity, of length 1."""
    found = np.zeros((len(titles), DIM), np.int8)
    for start in range(0, len(titles), _ROWS):
        part = titles[start : start + _ROWS]
        summed = np.einsum("rw,rwd->rd", rarity[part], vectors[part])
        found[start : start + _ROWS] = np.rint(127 * unit(summed.astype(np.float32)))
    return found


def _word_vectors(titles: NDArray[np.int32], counts: NDArray[np.float64]) -> NDArray[np.float32]:
    """[V+1, DIM]"""
    words = len(counts)
    beside = sparse.csr_matrix((words, words))
    for apart in range(1, WINDOW + 1):
        left, right = titles[:, :-apart].ravel(), titles[:, apart:].ravel()
        both = (
            (left > 0) & (right > 0) & (left != right) & (counts[left] >= LEAST_COUNT) & (counts[right] >= LEAST_COUNT)
        )
        ones = np.full(int(both.sum()), 1 / apart)
        beside = beside + sparse.csr_matrix((ones, (left[both], right[both])), shape=(words, words))
    beside = (beside + beside.T).tocoo()
    vectors = np.zeros((words, DIM), np.float32)
    if beside.nnz == 0:
        return vectors
    often = np.asarray(beside.sum(1)).ravel()
    smooth = often**SMOOTHING
    chance = often[beside.row] * smooth[beside.col] / smooth.sum()
    information = np.log(beside.data / chance)
    kept = information > 0
    matrix = sparse.csr_matrix((information[kept], (beside.row[kept], beside.col[kept])), shape=(words, words))
    dim = min(DIM, min(matrix.shape) - 1)
    if dim < 1 or matrix.nnz == 0:
        return vectors
    start = np.random.default_rng(0).normal(size=words)
    left, strengths, _ = svds(matrix, k=dim, v0=start)
    left = left * np.where(start @ left < 0, -1, 1)  # either sign is right; the library's own differs between runs
    vectors[:, :dim] = unit((left * np.sqrt(np.maximum(strengths, 0))).astype(np.float32))
    vectors[0] = 0
    return vectors


def _near(vocabulary: list[str], vectors: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
    """Lists of Lexicon: words near by meaning, by letters, or both."""
    words = len(vocabulary) + 1
    grams: list[NDArray[np.int32]] = [trigrams([word], TRIGRAMS) for word in vocabulary]
    sizes_of = [int((each > 0).sum()) for each in grams]
    columns_of = np.concatenate([np.zeros(0, np.int32), *(each[each > 0] for each in grams)])
    begins = np.concatenate([[0, 0], np.cumsum(sizes_of)])
    spelt = sparse.csr_matrix((np.ones(len(columns_of), np.float32), columns_of, begins), (words, TRIGRAM_HASHES + 1))
    sizes, back = np.diff(spelt.indptr).astype(np.float32), spelt.T.tocsr()
    starts, named, letters, meaning = [0, 0], [], [], []
    for start in range(1, words, _ROWS):
        part = np.arange(start, min(start + _ROWS, words))
        cosine = vectors[part] @ vectors.T
        shared = (spelt[part] @ back).tocsr()
        for at, word in enumerate(part):
            columns = shared.indices[shared.indptr[at] : shared.indptr[at + 1]]
            common = shared.data[shared.indptr[at] : shared.indptr[at + 1]]
            jaccard = common / np.maximum(sizes[word] + sizes[columns] - common, 1)
            columns, jaccard = _best(columns, jaccard, NEAR_LETTERS, LEAST_LETTERS)
            by_meaning, cosines = _best(np.arange(words), cosine[at], NEAR_MEANING, LEAST_MEANING)
            own = np.union1d(columns, by_meaning)
            own = own[own != word]
            values = np.zeros((2, words), np.float32)
            values[0, columns], values[1, by_meaning] = jaccard, cosines
            named.append(own)
            letters.append(np.rint(FULL * values[0, own].clip(0, 1)))
            meaning.append(np.rint(FULL * values[1, own].clip(0, 1)))
            starts.append(starts[-1] + len(own))
    none: list[NDArray[np.float32]] = [np.zeros(0, np.float32)]
    return {
        "near_starts": np.array(starts, np.int64),
        "near_words": np.concatenate(none + named).astype(np.int32),
        "near_letters": np.concatenate(none + letters).astype(np.uint8),
        "near_meaning": np.concatenate(none + meaning).astype(np.uint8),
    }


def _best(
    numbers: NDArray[np.int64], values: NDArray[np.float32], most: int, least: float
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    kept = np.flatnonzero(values >= least)
    if len(kept) > most:
        kept = kept[np.argpartition(-values[kept], most)[:most]]
    return numbers[kept], values[kept]


def _speller(titles: list[str]) -> Speller:
    """What is written how often; words of scripts that part none are left out."""
    words: Counter[str] = Counter()
    pairs: Counter[str] = Counter()
    for title in titles:
        own = re.findall(r"[^\W\d_]+", normalised(title))
        own = [word for word in own if word[0] < "\u0e00"]
        words.update(dict.fromkeys(own, 1))
        pairs.update(dict.fromkeys((f"{left} {right}" for left, right in pairwise(own)), 1))
    return Speller(dict(words.most_common(MOST)), {pair: n for pair, n in pairs.most_common(MOST) if n > 1})
