"""What a source knows of its items, made into the ``items`` table."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl

from trirank_build.errors import BadData
from trirank_build.preparation.sources.tables import read_table, read_text, require, to_ids

_DEFAULTS: dict[str, pl.Expr] = {
    "title": pl.lit(""),
    "brand": pl.lit(""),
    "category": pl.lit(""),
    "price": pl.lit(float("nan")),
    "product_id": pl.col("item_id"),
    "created_at": pl.lit(0),
    "attributes": pl.lit([], dtype=pl.List(pl.String)),
    "available": pl.lit(True),
}


def complete(items: pl.DataFrame) -> pl.DataFrame:
    """Add the columns that are missing and fill the gaps; one row an item, by ascending id."""
    items = items.unique("item_id", keep="first", maintain_order=True)
    for name, default in _DEFAULTS.items():
        items = items.with_columns(pl.col(name).fill_null(default) if name in items.columns else default.alias(name))
    if "key" not in items.columns:
        items = items.with_columns(key=pl.col("item_id").cast(pl.String))
    return items.sort("item_id")


def read_items(path: Path) -> pl.DataFrame:
    """An item file: a table with ``item_id`` and any of title, brand, category, price, product_id, created_at,
    available; or JSON that maps item ids to lists of attributes.

    Raises:
        BadData: it cannot be read, or ``item_id`` is missing.
    """
    if path.suffix == ".json":
        try:
            raw = json.loads(read_text(path))
            ids, attributes = list(raw), [[str(value) for value in values] for values in raw.values()]
        except (ValueError, TypeError, AttributeError) as error:
            raise BadData(f"{path} is no JSON object of item id → list of attributes ({error})") from error
        frame = pl.DataFrame({"item_id": ids, "key": ids, "attributes": attributes})
        return frame.with_columns(to_ids(frame["item_id"]))
    table = read_table(path)
    require(table, path, ("item_id",))
    known = [name for name in ("item_id", *_DEFAULTS) if name in table.columns and name != "attributes"]
    table = table.select(known).with_columns(key=pl.col("item_id").cast(pl.String))
    numbers = {"price": pl.Float64, "created_at": pl.Int64}
    table = table.with_columns(
        to_ids(table["item_id"]),
        *(pl.col(name).cast(dtype, strict=False) for name, dtype in numbers.items() if name in table.columns),
        *(to_ids(table[name]) for name in ("product_id",) if name in table.columns),
    )
    if "available" in table.columns:
        text = pl.col("available").cast(pl.String).str.to_lowercase()
        table = table.with_columns(available=~text.is_in(["0", "false", "no"]))
    return table.drop_nulls("item_id")
