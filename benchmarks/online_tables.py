"""Tables of what lies beside a release: rules, feedback, scenarios, the closed loop. See tables.py."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from typing import Any

from results import Figure, read


def _cell(figure: Figure, digits: int = 2) -> str:
    return f"{figure.value:.{digits}f} ({figure.low:.{digits}f} to {figure.high:.{digits}f})"


def policy_rules() -> str:
    """Every rule of a policy and its keys, as the code says it."""
    from trirank_backend.policies import RULES
    from trirank_backend.policies.rule import Selection

    lines = ["| rule | reason | keys |", "|---|---|---|"]
    for rule in RULES:
        own = [name for name in rule.model_fields if name not in ("rule", "queries", *Selection.model_fields)]
        keys = [f"`{name}`{_default(rule.model_fields[name])}" for name in own]
        if issubclass(rule, Selection):
            keys.append("a selection")
        said = (inspect.getdoc(inspect.getmodule(rule)) or "").partition("``: ")[2].split("\n\n")[0]
        words = " ".join(said.split()).replace("|", "\\|")
        reason = "" if rule.reason is None else f"`{rule.reason.name}`"
        lines.append(f"| `{rule.model_fields['rule'].default}`: {words} | {reason} | {', '.join(keys)} |")
    return "\n".join(lines)


def _default(field: Any) -> str:
    return "" if field.is_required() else f" = {json.dumps(field.default)}"


def rerank() -> str:
    """What policies cost."""
    found = read("rerank")
    words = {
        "plain": "the ranker's order alone", "mmr": "deduplicate (titles too), three caps, `mmr`",
        "dpp": "deduplicate (titles too), three caps, `dpp`", "deduplicate": "`deduplicate` with titles",
        "caps": "three caps", "quota": "`quota`", "explore": "`explore`", "boost": "`boost` of a brand",
    }  # fmt: skip
    lines = ["| rules | µs a request | of these beyond the ranker's order |", "|---|---|---|"]
    for name, rules in words.items():
        beyond = "" if name == "plain" else _cell(found[f"{name}_beyond_plain_us"], 0)
        lines.append(f"| {rules} | {_cell(found[f'{name}_us_b16'], 0)} | {beyond} |")
    lookup = {name: _cell(found[f"{name}_us_500"], 0) for name in ("lookup", "one_by_one", "hash")}
    table = found["hash_us_500"].note.partition("; ")[2]
    return "\n".join([
        *lines,
        "",
        f"{found['plain_us_b16'].note.partition(';')[0].capitalize()}; one thread, median and the middle 95 %.",
        "",
        f"500 ids among ten million take {lookup['lookup']} µs: all binary searches go on together, a halving at a "
        "time, so that they wait for memory at the same time. One after the other they take "
        f"{lookup['one_by_one']} µs; a hash table takes {lookup['hash']} µs and {table}. A second process takes "
        f"{found['second_process_mib'].value:.1f} MiB of its own for it.",
    ])  # fmt: skip


def feedback() -> str:
    """Lost, doubled, sustained, and what it costs rankings."""
    found = read("feedback")
    lines = ["| | SQLite | Redis |", "|---|---|---|"]
    for name, words, digits in (
        ("lost_events", "acknowledged events that were lost", 0),
        ("doubled_events", "events that are there twice in the log", 0),
        ("wrong_pasts", "events too many or too few in what users are remembered by", 0),
        ("wrong_counts", "showings too many or too few in items' counts", 0),
        ("events_per_s", "events a second, as fast as they go", 0),
        ("rank_p99_ms", "p99 of rankings without feedback, ms", 1),
        ("rank_p99_beside_ms", "p99 with 1,000 events a second beside them, ms", 1),
        ("rank_p99_ratio", "how many times that is", 2),
    ):
        cells = []
        for store in ("sqlite", "redis"):
            figure = found[f"{name}_{store}"]
            cells.append(f"{figure.value:.0f}" if figure.unit == "events" else _cell(figure, digits))
        lines.append(f"| {words} | " + " | ".join(cells) + " |")
    notes = [found[f"lost_events_{store}"].note for store in ("sqlite", "redis")]
    log, seen = found["redis_bytes_log"], found["redis_bytes_seen"]
    room = f"An event takes {log.value:.0f} bytes of Redis {log.note}, and {seen.value:.0f} {seen.note}."
    told = "; ".join(notes).replace("sqlite", "SQLite").replace("redis", "Redis")
    ratio = f"Rankings beside feedback: {found['rank_p99_ratio_sqlite'].note} (SQLite)."
    return "\n".join([*lines, "", f"{told}.", "", ratio, "", room])


def scenarios() -> str:
    """Each shipped policy by what it is for."""
    found = read("scenarios")
    lines = ["| policy | for | value | without its rules | retrieval's order |", "|---|---|---|---|---|"]
    for name in ("search", "home"):
        cells = [_cell(found[f"ndcg10_{name}{control}"], 3) for control in ("", "_plain", "_retrieval")]
        lines.append(f"| `{name}` | NDCG@10 | " + " | ".join(cells) + " |")
    for kind, words, digits in (
        ("new_share", "share of items younger than 14 days in the top 10", 3),
        ("new_click_rate", "clicks a showing of these", 3),
        ("new_ndcg10", "NDCG@10 of all", 3),
    ):
        figures = [found[f"{kind}_{order}"] for order in ("new_items", "plain", "retrieval")]
        cells = [f"{each.value:.{digits}f}" if each.low == each.high else _cell(each, digits) for each in figures]
        lines.append(f"| `new_items` | {words} | " + " | ".join(cells) + " |")
    crossed, plain = found["categories_cross_category"], found["categories_plain"]
    lines.append(f"| `cross_category` | categories in the top 10 | {_cell(crossed)} | {_cell(plain)} | |")
    best = found["categories_at_1pct_loss"]
    others = []
    for name in ("quota", "mmr", "dpp", "cap", "chance"):
        many, words = found.get(f"categories_at_1pct_loss_{name}"), f"`{name}`" if name != "chance" else "random swaps"
        others.append(
            f"{words} " + (f"{many.value:.2f} ({found[f'ndcg_kept_{name}'].value:.1%} kept)" if many else "none")
        )
    return "\n".join([
        *lines,
        "",
        f"`new_items` shows {_cell(found['new_items_share_gain'])} times as many new items, and keeps "
        f"{found['new_items_ndcg_kept'].value:.1%} of NDCG; `cross_category` keeps "
        f"{found['cross_category_ndcg_kept'].value:.1%}. For a loss of at most 1 % of NDCG on validation the most "
        f"categories come from {best.note.partition(':')[0]}: {_cell(best)} on test, "
        f"with {found['ndcg_kept_at_1pct_loss'].value:.1%} of NDCG kept there; {', '.join(others)}, no rule "
        f"{plain.value:.2f}.",
    ])  # fmt: skip


def closed_loop() -> str:
    """Purchases by round, and what correcting for positions gives."""
    found = read("closed_loop")
    rounds = sorted(int(name.rpartition("_")[2]) for name in found if name.startswith("purchase_rate_rate_retrained_"))
    lines = ["| purchases a customer in round | " + " | ".join(map(str, rounds)) + " |", "|---|" + "---|" * len(rounds)]
    for shop, words in (("purchase_rate", "young shop"), ("older_shop", "older shop")):
        for arm, told in (
            ("retrained", "retrained"),
            ("never", "never retrained"),
            ("retrieval's", "retrieval's order"),
        ):
            cells = [f"{found[f'{shop}_rate_{arm}_{number}'].value:.3f}" for number in rounds]
            lines.append(f"| {words}, {told} | " + " | ".join(cells) + " |")
    gains = [found[f"{shop}_gain"] for shop in ("purchase_rate", "older_shop")]
    told = [f"{gain.value:+.0%} ({gain.low:+.0%} to {gain.high:+.0%}; {gain.note})" for gain in gains]
    words = []
    for kind in ("", "_by_price"):
        plain, offset, gained, weighted = (
            found[f"position_bias{kind}_ndcg10_{name}"]
            for name in ("plain", "offset", "offset_difference", "weights_difference")
        )
        words.append(
            f"from {plain.value:.4f} to {offset.value:.4f} ({gained.value:+.4f}; {gained.low:+.4f} to "
            f"{gained.high:+.4f}; weights {weighted.value:+.4f}; {weighted.low:+.4f} to {weighted.high:+.4f}; "
            f"{gained.note})"
        )
    return "\n".join([
        *lines,
        "",
        f"After three rounds the loop sells {told[0]} more than the first release, in the older shop {told[1]}.",
        "",
        "Offsets for positions change NDCG@10 among customers who look at everything "
        f"{', and '.join(words)}.",
    ])  # fmt: skip


ONLINE: dict[str, Callable[[], str]] = {
    "policy_rules": policy_rules,
    "rerank": rerank,
    "feedback": feedback,
    "scenarios": scenarios,
    "closed_loop": closed_loop,
}
