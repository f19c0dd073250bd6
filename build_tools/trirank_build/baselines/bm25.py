"""BM25 over titles, by bm25s (Lù, "BM25S", 2024)."""

from __future__ import annotations

import bm25s
import numpy as np
from numpy.typing import NDArray


class Bm25:
    """An index over documents."""

    def __init__(self, titles: list[str]) -> None:
        self._index = bm25s.BM25()
        self._documents = len(titles)
        self._index.index(bm25s.tokenize(titles, stopwords="en", show_progress=False), show_progress=False)

    def scores(self, query: str) -> NDArray[np.float32]:
        """[documents]: the score of every document."""
        tokens = bm25s.tokenize([query], stopwords="en", show_progress=False, return_ids=False)[0]
        if not tokens:  # nothing but stop words
            return np.zeros(self._documents, np.float32)
        scores: NDArray[np.float32] = self._index.get_scores(tokens)
        return scores
