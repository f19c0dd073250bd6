"""`trirank data check`: what `prepare` would read in files, and what it would not, before anything is made of them."""

from __future__ import annotations

from pathlib import Path

from trirank_build.errors import BadData
from trirank_build.preparation.cleaning import Report
from trirank_build.preparation.options import PrepareOptions
from trirank_build.preparation.sources.behaviour_log import (
    COLUMNS,
    SYNONYMS,
    clean_log,
    compare_items,
    kinds_of,
    open_log,
    open_queries,
    read_queries,
)
from trirank_build.preparation.sources.catalogue_table import NAMES_OF_ID, open_items, read_items
from trirank_build.preparation.sources.tables import column_names
from trirank_build.preparation.values import kind_of_ids


def check(paths: list[Path], options: PrepareOptions) -> Report:
    """Read files that belong together: a log, an item file, a query file, each told by its columns.

    Raises:
        BadData: one cannot be used, or is none of these; or two are of one kind.
    """
    files: dict[str, Path] = {}
    for path in paths:
        kind = _kind(path, options)
        if kind in files:
            raise BadData(f"{files[kind]} and {path} are both a {kind}; check one at a time")
        files[kind] = path
    report = options.report()
    given = open_items(files["item file"], options, report) if "item file" in files else None
    if "log" not in files:
        if "query file" in files:
            raise BadData(f"{files['query file']} is a query file, which goes with a log; name that too")
        assert given is not None
        read_items(given, kind_of_ids("item", [given["item_id"]], options.item_ids, report), report)
        return report
    table = open_log(files["log"], options, report)
    kinds = kinds_of(table, given, options, report)
    events = clean_log(table, kinds, options, report)
    if "query file" in files:
        read_queries(open_queries(files["query file"], options, report), kinds, report)
    if given is not None:
        compare_items(events, read_items(given, kinds["item"], report), report)
    return report


def _kind(path: Path, options: PrepareOptions) -> str:
    if path.suffix == ".json":
        return "item file"
    names = column_names(path, options.encoding)
    own = {SYNONYMS.get(name, name) for name in names}
    if own >= set(COLUMNS):
        return "log"
    if own >= {"user_id", "query", "timestamp"}:
        return "query file"
    if ("item_id" in own or own & set(NAMES_OF_ID)) and "user_id" not in own:
        return "item file"
    raise BadData(
        f"{path} has the columns {', '.join(names)}, and is none of: a log ({', '.join(COLUMNS)}), an item file "
        "(item_id and what is known of items), a query file (user_id, query, timestamp)"
    )
