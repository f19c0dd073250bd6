"""Rankings as tables for people."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
from rich.table import Table
from trirank import RankRequest, RankResponse, Reason

from trirank_build.repository.release import ITEMS

_WORDS = {
    Reason.MATCHES_QUERY: "query",
    Reason.SEEN_BEFORE: "seen before",
    Reason.BRAND_YOU_CHOSE: "your brand",
    Reason.CATEGORY_YOU_BROWSE: "your category",
    Reason.NEW: "new",
    Reason.POPULAR: "popular",
    Reason.BOOSTED: "boosted",
    Reason.PINNED: "pinned",
    Reason.DIVERSITY: "variety",
}


def reason_words(reasons: Reason) -> str:
    """A reason mask in words."""
    return ", ".join(words for reason, words in _WORDS.items() if reason in reasons)


def ranking_table(request: RankRequest, response: RankResponse, release: Path | None, title: str = "") -> Table:
    """The best K beside the order that retrieval gave (the order in which candidates were sent)."""
    items = _items(release)
    place = {int(item): at for at, item in reversed(list(enumerate(request.item_ids, start=1)))}
    sent = [int(item) for item in request.item_ids]
    table = Table("#", "title", "brand", "price", "score", "was", "reason", "retrieval's order", title=title)
    for item in response:
        known = items.get(int(item.item_id), {})
        before = items.get(sent[item.position - 1], {}) if item.position <= len(sent) else {}
        table.add_row(
            str(item.position),
            known.get("title") or str(item.item_id),
            known.get("brand", ""),
            _price(known.get("price")),
            f"{item.score:.3f}",
            str(place.get(int(item.item_id), "")),
            reason_words(item.reasons),
            before.get("title") or str(sent[item.position - 1]) if item.position <= len(sent) else "",
        )
    return table


def _items(release: Path | None) -> dict[int, dict[str, Any]]:
    if release is None:
        return {}
    return {row["item_id"]: row for row in pl.read_parquet(release / ITEMS).iter_rows(named=True)}


def _price(price: float | None) -> str:
    return "" if price is None or price != price else f"{price:.2f}"
