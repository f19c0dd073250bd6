"""What a source knows of its items, made into the ``items`` table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl

from trirank_build.errors import BadData
from trirank_build.preparation.cleaning import EARLIEST, Report
from trirank_build.preparation.options import PrepareOptions
from trirank_build.preparation.sources.tables import read_table, read_text, require
from trirank_build.preparation.values import (
    IdKind,
    are_numbers,
    id_text,
    prices,
    seconds,
    shares,
    to_ids,
    words,
    yes_or_no,
)

_DEFAULTS: dict[str, pl.Expr] = {
    "title": pl.lit(""),
    "brand": pl.lit(""),
    "category": pl.lit(""),
    "price": pl.lit(float("nan")),
    "product_id": pl.col("item_id"),
    "created_at": pl.lit(0),
    "attributes": pl.lit([], dtype=pl.List(pl.String)),
    "available": pl.lit(True),
    "seller": pl.lit(""),
    "margin": pl.lit(float("nan")),
    "regions": pl.lit([], dtype=pl.List(pl.String)),
}
NAMES_OF_ID = ("itemid", "item", "sku", "id")


def complete(items: pl.DataFrame) -> pl.DataFrame:
    """Add the columns that are missing and fill the gaps; one row an item, by ascending id."""
    items = items.unique("item_id", keep="first", maintain_order=True)
    for name, default in _DEFAULTS.items():
        items = items.with_columns(pl.col(name).fill_null(default) if name in items.columns else default.alias(name))
    key = pl.col("item_id").cast(pl.String)
    items = items.with_columns(key=pl.col("key").fill_null(key) if "key" in items.columns else key)
    return items.sort("item_id")


def open_items(path: Path, options: PrepareOptions, report: Report) -> pl.DataFrame:
    """An item file as it stands there, its ids as text in the column ``item_id``: a table with any of title, brand,
    category, price, product_id, created_at, available, seller, margin, regions; or JSON that maps item ids to lists
    of attributes.

    Raises:
        BadData: it cannot be read, or ``item_id`` is missing.
    """
    if path.suffix == ".json":
        try:
            raw = json.loads(read_text(path, report, options.encoding))
            ids, attributes = list(raw), [_texts(values) for values in raw.values()]
        except (ValueError, TypeError, AttributeError) as error:
            raise BadData(f"{path} is no JSON object of item id → list of attributes ({error})") from error
        return pl.DataFrame({"item_id": ids, "attributes": attributes})
    table = read_table(path, report, options.encoding)
    if "item_id" not in table.columns:
        other = next((name for name in NAMES_OF_ID if name in table.columns), None)
        table = table if other is None else table.rename({other: "item_id"})
    require(table, path, ("item_id",))
    used = [name for name in ("item_id", *_DEFAULTS) if name in table.columns and name != "attributes"]
    report.unused(path, table.columns, used)
    return table.select(used)


def _texts(values: Any) -> list[str]:
    if not isinstance(values, list):
        raise TypeError(f"{values!r} is no list")
    return [str(value) for value in values]


def _plausible(times: pl.Series, report: Report) -> pl.Series:
    """Null where an item would be older than shops are: 20240115 is a number, but no second of then."""
    old = times.filter((times > 0) & (times < EARLIEST))
    if len(old):
        report.lost(
            f"{times.name} before 1990", len(times), len(old), f"such as {old[0]} seconds since 1970",
            "write seconds since 1970, or dates like 2026-01-31",
        )  # fmt: skip
    return pl.select(pl.when(~((times > 0) & (times < EARLIEST))).then(times)).to_series().alias(times.name)


def read_items(table: pl.DataFrame, kind: IdKind, report: Report) -> pl.DataFrame:
    """The values of an opened item file, one row an item, the first of several.

    Raises:
        BadData: too many values cannot be read.
    """
    columns = [to_ids(table["item_id"], kind), id_text(table["item_id"]).alias("key")]
    for name in table.columns:
        column = table[name]
        if name in ("title", "brand", "category", "seller"):
            columns.append(column.cast(pl.String).str.strip_chars())
        elif name == "price":
            columns.append(prices(column, report))
        elif name == "created_at":
            columns.append(_plausible(seconds(column, report), report))
        elif name == "margin":
            columns.append(shares(column, report))
        elif name == "regions":
            columns.append(words(column))
        elif name == "available":
            columns.append(yes_or_no(column, report))
        elif name == "product_id":
            columns.append(to_ids(column, "numbers" if are_numbers(column) else "strings"))
        elif name == "attributes":
            columns.append(column)
    items = pl.DataFrame(columns)
    known = items.drop_nulls("item_id")
    report.lost("items without an id", items.height, items.height - known.height, "or with one that is none",
                "look at the column item_id of the item file")  # fmt: skip
    first = known.unique("item_id", keep="first", maintain_order=True)
    if first.height < known.height:
        twice = known.filter(pl.col("item_id").is_duplicated())["key"][0]
        report.note(
            f"item file: {known.height - first.height:,} rows repeat an item, such as {twice!r}; the first one counts"
        )
    return first
