"""`trirank data prepare`: any source → a dataset directory."""

from __future__ import annotations

from pathlib import Path

from trirank_build.data.dataset import Dataset
from trirank_build.errors import BadData
from trirank_build.preparation.options import PrepareOptions
from trirank_build.preparation.parts import is_remote
from trirank_build.preparation.sources.behaviour_log import COLUMNS as LOG_COLUMNS
from trirank_build.preparation.sources.behaviour_log import SYNONYMS, prepare_behaviour_log
from trirank_build.preparation.sources.judged_search import COLUMNS as JUDGED_COLUMNS
from trirank_build.preparation.sources.judged_search import prepare_judged_search
from trirank_build.preparation.sources.sequences import looks_like_sequences, prepare_sequences
from trirank_build.preparation.sources.shop import ShopSize, make_shop
from trirank_build.preparation.sources.tables import LARGE, first_line, is_parquet, read_text, split_header

SHOP = "shop"


def prepare(source: str, options: PrepareOptions) -> Dataset:
    """The dataset of a source: the word ``shop``, or a file whose kind is seen from its first line.

    Raises:
        BadData: the file cannot be used; the message says why.
    """
    for extra in (options.items, options.queries):
        if extra is not None and not extra.is_file():
            raise BadData(f"{extra} is no file")
    if source == SHOP:
        if options.items is not None or options.queries is not None:
            raise BadData("--items and --queries go with a log of yours; the shop has items and queries of its own")
        return make_shop(ShopSize(), options.seed)
    path = Path(source)
    if is_remote(source) or not path.is_file() or is_parquet(path):
        return prepare_behaviour_log(source, options)
    if path.stat().st_size > LARGE and set(LOG_COLUMNS) <= columns_of(first_line(path)):
        return prepare_behaviour_log(source, options)  # by pieces
    text = read_text(path, options.report(), options.encoding)
    head = text.lstrip().split("\n", 1)[0].strip()
    names = columns_of(head)
    if options.engine is not None and (looks_like_sequences(head) or {"search_term", "relevance"} & names):
        raise BadData(f"--engine is for logs with a header or in Parquet; {path} is none")
    if looks_like_sequences(head):
        return prepare_sequences(path, options)
    if {"search_term", "relevance"} & names:
        return prepare_judged_search(path, options)
    if len(names) > 1:
        return prepare_behaviour_log(source, options)
    raise BadData(
        f"{path} starts with {head[:60]!r}, which is none of: a header with {', '.join(LOG_COLUMNS)}; "
        f"a header with {', '.join(JUDGED_COLUMNS)}; lines of `user item item …` in numbers"
    )


def columns_of(line: str) -> set[str]:
    """The names of a header's columns, as they are used here."""
    names = {name.strip().lower() for name in split_header(line)[1]}
    return {SYNONYMS.get(name, name) for name in names}
