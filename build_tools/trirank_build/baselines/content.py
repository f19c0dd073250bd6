"""Content-based ranking: items whose words, brand, category and attributes are those of the query or the history."""

from __future__ import annotations

import numpy as np
import polars as pl
from numpy.typing import NDArray

from trirank_build.baselines.bm25 import Bm25

RECENT = 5
"""Newest events whose content is searched for."""


class Content:
    """BM25 with an item's own content as the document.

    Args:
        items: the dataset's table of items.
    """

    def __init__(self, items: pl.DataFrame) -> None:
        named = [
            pl.when(pl.col(name) == "")
            .then(pl.lit(""))
            .otherwise(pl.lit(name) + pl.col(name).str.replace_all(r"\W", ""))
            for name in ("brand", "category")
        ]
        attributes = (
            pl.col("attributes").list.eval("attribute" + pl.element().str.replace_all(r"\W", "")).list.join(" ")
        )
        self._documents = (
            items.select(pl.concat_str(["title", *named, attributes], separator=" ")).to_series().to_list()
        )
        self._index = Bm25(self._documents)

    def scores(self, histories: NDArray[np.int32], queries: list[str] | None = None) -> NDArray[np.float32]:
        """[B, L] item rows, newest last, -1 padded → [B, M]; a request with a query is answered by the query."""
        found = []
        for at, history in enumerate(histories):
            query = queries[at] if queries else ""
            recent = [row for row in history if row >= 0][-RECENT:]
            found.append(self._index.scores(query or " ".join(self._documents[row] for row in recent)))
        return np.stack(found)
