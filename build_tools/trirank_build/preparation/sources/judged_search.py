"""Search results that people judged: query, product, relevance, one judgement a row (Home Depot's format)."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import polars as pl
from trirank.contract import ANONYMOUS_USER

from trirank_build.baselines.bm25 import Bm25
from trirank_build.data.dataset import EVENTS, GRADED_TASKS, Dataset, Description
from trirank_build.errors import BadData
from trirank_build.preparation.options import PrepareOptions
from trirank_build.preparation.sources.catalogue_table import complete
from trirank_build.preparation.sources.tables import read_table, require
from trirank_build.preparation.values import id_text, kind_of_ids, to_ids
from trirank_build.progress import progress

COLUMNS = ("product_uid", "product_title", "search_term", "relevance")
LOW, HIGH = 1.0, 3.0
"""Ends of the scale; gains are relevance − LOW."""


def prepare_judged_search(path: Path, options: PrepareOptions) -> Dataset:
    """Read, clean, split by query (no query in two parts), score with BM25.

    Raises:
        BadData: columns are missing, or nothing is left after cleaning.
    """
    report = options.report()
    table = read_table(path, report, options.encoding)
    require(table, path, COLUMNS)
    kind = kind_of_ids("item", [table["product_uid"]], options.item_ids, report)
    table = table.select(
        to_ids(table["product_uid"], kind).alias("item_id"),
        id_text(table["product_uid"]).alias("key"),
        pl.col("product_title").str.strip_chars().alias("title"),
        pl.col("search_term").str.strip_chars().str.to_lowercase().alias("query"),
        pl.col("relevance").cast(pl.Float64, strict=False),
    )
    table = report.apply("product, title, query or relevance missing", table, lambda f: f.drop_nulls())
    table = report.apply(
        f"relevance outside {LOW:g} to {HIGH:g}",
        table,
        lambda f: f.filter(pl.col("relevance").is_between(LOW, HIGH)),
    )
    table = report.apply("exact duplicate", table, lambda f: f.unique(maintain_order=True))
    table = report.apply(
        "judged twice (mean taken)",
        table,
        lambda f: f.group_by("query", "item_id", maintain_order=True).agg(
            pl.col("title").first(), pl.col("key").first(), pl.col("relevance").mean()
        ),
    )
    table = report.apply("query with a single product", table, lambda f: f.filter(pl.len().over("query") > 1))
    if table.is_empty():
        raise BadData(f"no judgement of {path} is left after cleaning; ranking needs two products a query")
    items = complete(table.select("item_id", "key", "title"))
    requests = _requests(table, items, options.seed)
    if set(requests["split"].unique()) != {"train", "valid", "test"}:
        raise BadData(f"{path} has only {requests.height} queries; a split by query needs more")
    return Dataset(
        items=items,
        events=pl.DataFrame(schema=EVENTS),
        requests=requests.lazy(),
        description=Description(
            source=path.name,
            timed=False,
            tasks=GRADED_TASKS,
            counts={
                "items": items.height,
                "events": 0,
                "requests": requests.height,
                "judgements": table.height,
            },
            cleaning=report.rows,
            ids={"item": kind, "user": "numbers"},
            notes={"read": report.notes},
        ),
    )


def _requests(table: pl.DataFrame, items: pl.DataFrame, seed: int) -> pl.DataFrame:
    index = Bm25(items["title"].to_list())
    ids = items["item_id"].to_numpy()
    # Product numbers of this data tell of relevance, so equal scores must not fall back on their order.
    chance = np.random.default_rng(seed).permutation(len(ids))
    groups = table.group_by("query", maintain_order=True).agg("item_id", "relevance")
    rows = []
    with progress() as bar:
        for query, products, relevance in bar.track(
            groups.iter_rows(), total=groups.height, description="scoring with BM25"
        ):
            place = np.searchsorted(ids, products)
            scores = index.scores(query)[place]
            order = np.lexsort((chance[place], -scores))
            rows.append(
                {
                    "user_id": ANONYMOUS_USER,
                    "timestamp": 0,
                    "query": query,
                    "scenario": "search",
                    "item_ids": np.asarray(products)[order].tolist(),
                    "retrieval_scores": scores[order].tolist(),
                    "labels": (np.asarray(relevance)[order] - LOW).tolist(),
                    "missed": [],
                    "split": _split_of(query, seed),
                }
            )
    return pl.DataFrame(rows, schema_overrides={"missed": pl.List(pl.Float32)})


def place_of(query: str, seed: int) -> float:
    """Where a query falls between 0 and 1; the parts of the split are ranges of it."""
    return int.from_bytes(hashlib.blake2b(f"{seed}\0{query}".encode(), digest_size=8).digest(), "little") / 2**64


def _split_of(query: str, seed: int) -> str:
    """By a hash of the query alone, so that more data never moves a query to another part. The test is large
    because judged lists are short and alike: rankings differ by thousandths, which few queries cannot resolve."""
    place = place_of(query, seed)
    return "train" if place < 0.6 else "valid" if place < 0.7 else "test"
