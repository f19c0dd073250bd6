"""Which search queries tell of a person: those that few have asked, and those with an address or a number in them."""

from __future__ import annotations

import polars as pl

_TELLING = (
    r"[^\s@]+@[^\s@]+\.[a-z]{2,}",  # a mail address
    r"(?:https?://|www\.)\S+",
    r"\+?\d[\d\s()/.\-]{6,}\d",  # telephone, account, card, order
    r"\d{5,}",  # postal codes and whatever else is so long
    r"\b\d{1,4}[a-z]?\s+(?:\w+\s+){0,3}(?:street|st|road|rd|avenue|ave|lane|ln|drive|way|close|court)\b",
    r"\b\w*(?:straße|strasse|gasse|weg|platz|allee)\s+\d+",
    r"\b(?:rue|avenue|boulevard|via|calle|plaza)\s+\w+(?:\s+\w+)?\s+\d+",
    r"[路街道巷弄]\s*\d+\s*[号號]",
)
"""Of what people write into a search field by mistake, or to find what was sent to them. A list, so it knows what it
knows: what it misses is caught where fewer than k have asked it."""


def telling() -> pl.Expr:
    """Whether a ``query`` has something of an address, a mail, or a number that names somebody."""
    return pl.col("query").str.to_lowercase().str.contains("|".join(_TELLING))


def asked_by(requests: pl.LazyFrame) -> pl.DataFrame:
    """``query``, in lower case and with single blanks, and how many users have asked it (``users``)."""
    return requests.group_by(plain().alias("query")).agg(users=pl.col("user_id").n_unique()).collect()


def plain() -> pl.Expr:
    """A ``query`` as it is counted: case and blanks tell two apart that are one."""
    return pl.col("query").str.to_lowercase().str.strip_chars().str.replace_all(r"\s+", " ")


def shared(requests: pl.LazyFrame, k: int) -> set[str]:
    """Queries (as ``plain`` has them) that at least ``k`` users have asked and that tell nothing."""
    found = asked_by(requests).filter((pl.col("users") >= k) & ~telling())
    return set(found["query"].to_list())
