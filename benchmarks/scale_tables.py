"""Tables of docs/scale.md. See tables.py."""

from __future__ import annotations

from collections.abc import Callable

from results import Figure, read
from scale import STEPS


def _span(figure: Figure, digits: int = 2) -> str:
    if figure.low == figure.high:
        return f"{figure.value:,.{digits}f}"
    return f"{figure.value:,.{digits}f} ({figure.low:,.{digits}f} to {figure.high:,.{digits}f})"


def scale() -> str:
    """What each step took, at both sizes."""
    found = read("scale")
    lines = ["| | 100,000 items: s | GB | 10,000,000 items: s | GB | |", "|---|---|---|---|---|---|"]
    words = STEPS | {"serve": "one server, from its start until it has ranked; proportional set size"}
    for name, note in words.items():
        cells = [f"{found[f'{size}_{name}_{what}'].value:,.{1 if what == 'gb' else 0}f}" if
                 f"{size}_{name}_{what}" in found else "" for size in ("small", "large")
                 for what in ("seconds", "gb")]  # fmt: skip
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {note} |")
    return "\n".join([*lines, "", f"{found['peak_gb'].note}."])


def scale_limits() -> str:
    """What was asked of scale, and what was found."""
    found = read("scale")
    rows = {
        "peak_gb": ("largest resident set of any step, GB", "≤ 16"),
        "step_ratio_10m_over_100k": ("time of a training step, 10 million items over 100,000", "≤ 2"),
        "serve_ratio_10m_over_100k": ("p50 of a served request, the same", "≤ 1.2"),
        "retrieve_ms_10m": ("100 candidates among 10 million, ms", ""),
        "recall_at_100": ("of what the exact search finds", "≥ 0.95"),
        "dask_rows_differ": ("rows in which the cluster's dataset differs", "0"),
        "limit_log_over_memory": ("log that was prepared and trained on, over the memory allowed", "≥ 3"),
        "incremental_ndcg_share": ("NDCG@10 of an update, of training anew", "≥ 0.97"),
        "stale_ndcg_share": ("the same of not training at all", ""),
        "incremental_speedup": ("time of training anew over that of an update", ""),
    }  # fmt: skip
    lines = ["| | asked | found | |", "|---|---|---|---|"]
    for name, (words, asked) in rows.items():
        if name in found:
            lines.append(f"| {words} | {asked} | {_span(found[name])} | {found[name].note} |")
    return "\n".join(lines)


def index_libraries() -> str:
    """Searching among vectors, by each library that was tried."""
    found = read("scale")
    lines = ["| | built in, s | a search, ms | recall of 100 | |", "|---|---|---|---|---|"]
    for name in ("faiss_ivf_sq8", "usearch", "voyager", "hnswlib"):
        if f"{name}_ms" in found:
            built, ms, recall = (found[f"{name}_{what}"] for what in ("build_seconds", "ms", "recall"))
            lines.append(f"| {name} | {built.value:,.0f} | {_span(ms)} | {recall.value:.3f} | {ms.note} |")
    return "\n".join(lines)


def scale_paper() -> str:
    """A billion events, from what was measured of a hundred million: the model on paper."""
    found = read("scale")
    events = 100e6
    read_s, clean_s = found["rates_read_s"].value, found["rates_clean_s"].value  # of a million events, two cores
    held = (found["large_prepare_gb"].value - 0.5) * 1e9 / events
    over = found["prepare_dask_seconds"].value / found["prepare_polars_seconds"].value
    lines = ["| events | machines of 16 cores | reading, min | cleaning, min | memory where candidates are found, GB |",
             "|---|---|---|---|---|"]  # fmt: skip
    for count in (1e8, 1e9, 1e10):
        for machines in (1, 4, 16):
            share = 16 * machines / 2
            lines.append(f"| {count:,.0f} | {machines} | {count / 1e6 * read_s / share / 60:,.1f} | "
                         f"{count / 1e6 * clean_s / share / 60:,.1f} | {count * held / 1e9:,.0f} |")  # fmt: skip
    return "\n".join([
        *lines, "",
        f"From {read_s:.2f} s of reading and {clean_s:.2f} s of cleaning a million events on two cores, taken to be "
        f"shared evenly, and {held:.0f} bytes an event where candidates are found, which is one machine. What goes "
        f"over the network is not in it: on the same two cores preparing the small shop took {over:.1f} times as long "
        "with Dask as with polars.",
    ])  # fmt: skip


SCALE: dict[str, Callable[[], str]] = {
    "scale": scale, "scale_limits": scale_limits, "index_libraries": index_libraries, "scale_paper": scale_paper,
}  # fmt: skip
