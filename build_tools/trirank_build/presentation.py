"""Rankings and evaluations as tables for people."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
from rich.table import Table
from trirank import RankRequest, RankResponse, Reason, Status

from trirank_build.evaluation.summary import Evaluation
from trirank_build.gate.verdict import Report
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
    Reason.NOT_IN_CATALOGUE: "not in the catalogue",
    Reason.BURIED: "buried",
    Reason.SPONSORED: "sponsored",
    Reason.EXPLORED: "explored",
    Reason.DIVERSE_SET: "variety of the set",
    Reason.HELD_BACK: "held back",
    Reason.QUOTA: "quota",
    Reason.BEST_VARIANT: "best variant",
}

_ALONE = {
    "retrieval_rank": "retrieval's scores", "popularity": "popularity", "transition": "transitions",
    "attribute_match": "attributes", "query_coverage": "the query's words", "affinity": "the states' affinity",
}  # fmt: skip
"""Columns whose order training tries by itself."""


def reason_words(reasons: Reason) -> str:
    """A reason mask in words."""
    return ", ".join(words for reason, words in _WORDS.items() if reason in reasons)


def ranking_table(request: RankRequest, response: RankResponse, release: Path | None, title: str = "") -> Table:
    """The best K beside the order that retrieval gave (the order in which candidates were sent)."""
    items = _items(release)
    sent = [str(item) for item in request.item_ids]
    place = {item: at for at, item in reversed(list(enumerate(sent, start=1)))}
    table = Table("#", "title", "brand", "price", "score", "was", "reason", "retrieval's order", title=title)
    for item in response:
        known = items.get(str(item.item_id), {})
        before = items.get(sent[item.position - 1], {}) if item.position <= len(sent) else {}
        table.add_row(
            str(item.position),
            known.get("title") or str(item.item_id),
            known.get("brand", ""),
            _price(known.get("price")),
            f"{item.score:.3f}",
            str(place.get(str(item.item_id), "")),
            reason_words(item.reasons),
            before.get("title") or sent[item.position - 1] if item.position <= len(sent) else "",
        )
    return table


def trace_table(trace: dict[str, Any], release: Path | None) -> Table:
    """Which rule moved which item, the shown ones first."""
    items = _items(release)
    table = Table(
        "#", "item", "score", "what the rules did", title=f"policy {trace['policy']}: {', '.join(trace['rules'])}"
    )
    for item in trace["items"]:
        known = items.get(str(item["item"]), {})
        moves = [f"{move['rule']} {move['from']}→{move['to']}" for move in item["moves"]]
        if "dropped_by" in item:
            moves.append(f"dropped by {item['dropped_by']}")
        score = "" if item["score"] is None else f"{item['score']:.3f}"
        title = known.get("title") or str(item["item"])
        table.add_row(str(item["position"] or ""), title, score, ", ".join(moves))
    return table


def evaluation_tables(found: Evaluation, split: str) -> list[Table]:
    """Orders, the ranker above each of them, slices."""
    metrics = list(dict.fromkeys(metric for row in found.table.values() for metric in row))
    orders = Table("order", *metrics, title=f"{found.requests:,} {found.protocol}, {split} split")
    for name, row in found.table.items():
        orders.add_row(name, *(f"{row[metric].value:.4f}" if metric in row else "" for metric in metrics))
    above = Table("order", "difference", "95 % interval", "p", title="NDCG@10 of the ranker above")
    for name, d in found.differences.items():
        above.add_row(name, f"{d.value:+.4f}", f"{d.low:+.4f} to {d.high:+.4f}", f"{d.p_value:.1e}")
    slices = Table("slice", "requests", *found.table, title="NDCG@10 by slice")
    for name, (count, by_order) in found.slices.items():
        slices.add_row(name, f"{count:,}", *(f"{by_order[order].value:.4f}" for order in found.table))
    return [orders, above, slices]


def gate_table(report: Report) -> Table:
    """Every stage of the gate."""
    verdict = "passed" if report.passed else "failed"
    columns = ("NDCG@10", "of dense", "95 % interval", "tau", "best ten", "difference", "ms at 200", "MB", "")
    table = Table("stage", *columns, title=f"gate: {verdict}")
    for row in report.rows:
        ratio = row.ndcg_ratio
        table.add_row(
            row.stage, f"{row.ndcg10.value:.4f}", f"{ratio.value:.4f}", f"{ratio.low:.4f} to {ratio.high:.4f}",
            f"{row.kendall_tau:.3f}", f"{row.overlap:.3f}", "" if row.difference is None else f"{row.difference:.1e}",
            f"{row.latency_ms:.3f}", f"{row.size_mb:.3f}", "failed" if row.failures else "",
        )  # fmt: skip
    return table


def unknown_line(response: RankResponse) -> str:
    """What is to be said of candidates that the catalogue does not know; empty: all are known."""
    if not response.unknown:
        return ""
    done = "dropped" if Status.UNKNOWN_ITEMS_DROPPED in response.status else "put behind the others"
    return (
        f"{response.unknown} of the candidates are not in the catalogue, and were {done}; a newer one may have them: "
        "`trirank assemble --data NEWER`"
    )


def _items(release: Path | None) -> dict[str, dict[str, Any]]:
    """By the id that callers send."""
    if release is None:
        return {}
    return {row["key"]: row for row in pl.read_parquet(release / ITEMS).iter_rows(named=True)}


def _price(price: float | None) -> str:
    return "" if price is None or price != price else f"{price:.2f}"


class Standing(NamedTuple):
    """How a run's ranker stands on validation, in words, and whether retrieval's order is better."""

    text: str
    harmful: bool


def standing(facts: dict[str, Any]) -> Standing | None:
    """What training ends by saying; None of a run that ordered no requests.

    Args:
        facts: a run's.
    """
    retrieved = facts.get("valid_retrieval_ndcg10")
    if retrieved is None:
        return None
    own, start = facts["valid_ndcg10"], facts.get("start")
    said = [f"Validation NDCG@10: the ranker {own:.4f}, the order in which candidates come {retrieved:.4f}"]
    if start is not None:
        alone = {name: ndcg for name, ndcg in start["orders"].items() if name != "linear"}
        said += [f"{_ALONE.get(name, name)} alone {ndcg:.4f}" for name, ndcg in alone.items()]
        begun = start["orders"][start["name"]]
        kept = "which no epoch bettered, so it is the ranker" if own <= begun else "which training bettered"
        said.append(f"the start ({start['name']}) {begun:.4f}, {kept}")
    return Standing("; ".join(said) + ".", own < retrieved)
