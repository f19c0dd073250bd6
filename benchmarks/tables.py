"""Writes the figures of ``results/*.json`` into the documents, between marks like ``<!-- figures: ranking -->``.

    python benchmarks/tables.py [--check]

No figure in a document is typed by hand; a test fails when a document and the results differ.
"""

from __future__ import annotations

import re
import sys

from results import RESULTS, ROOT, read

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SET_NAMES = {
    "shop": "synthetic shop",
    "beauty": "Amazon Beauty",
    "sports": "Amazon Sports",
    "games": "Amazon Video Games",
    "home_depot": "Home Depot search",
}


def ranking() -> str:
    """NDCG@10 on every test split."""
    found = read("ranking")
    lines = [
        "| NDCG@10 on the test split | ranker | retrieval order | popularity | random | ranker above retrieval, 95 % |",
        "|---|---|---|---|---|---|",
    ]
    for name, words in SET_NAMES.items():
        values = [found[f"{name}_{kind}_ndcg10"].value for kind in ("ranker", "retrieval", "popularity", "random")]
        above = found[f"{name}_ndcg10_above_retrieval"]
        cells = " | ".join(f"{value:.4f}" for value in values)
        lines.append(f"| {words} | {cells} | {above.value:+.4f} ({above.low:+.4f} to {above.high:+.4f}) |")
    optimum, untouched = found["shop_optimum_ndcg10"], found["home_depot_untouched_ndcg10_above_retrieval"]
    return "\n".join(
        [
            *lines,
            "",
            f"The shop's best possible order, known since its choices are drawn, has {optimum.value:.4f}. Two thirds "
            "of Home Depot's test queries took part in choosing the text features; on the others alone the ranker is "
            f"{untouched.value:+.4f} ({untouched.low:+.4f} to {untouched.high:+.4f}) above BM25.",
        ]
    )


def serving() -> str:
    """In process against the server."""
    found = read("serving")
    lines = ["| 200 candidates | p50 ms | p99 ms | requests/s |", "|---|---|---|---|"]

    def cell(name: str, digits: int = 2) -> str:
        figure = found[name]
        return f"{figure.value:.{digits}f} ({figure.low:.{digits}f} to {figure.high:.{digits}f})"

    lines.append(f"| stages in process, called after 4 ms of rest | {cell('in_process_paced_p50_ms')} | | |")
    lines.append(
        f"| stages in process, called without a rest | {cell('in_process_p50_ms')} | {cell('in_process_p99_ms')} | |"
    )
    for concurrency in (1, 8, 32):
        row = [cell(f"ensemble_{kind}_ms_c{concurrency}") for kind in ("p50", "p99")]
        row.append(cell(f"ensemble_rps_c{concurrency}", 0))
        lines.append(f"| ensemble over gRPC, concurrency {concurrency} | " + " | ".join(row) + " |")
    return "\n".join(
        [
            *lines,
            "",
            f"The server adds {cell('ensemble_extra_ms_c1')} ms at concurrency 1; the ranker's mean batch at "
            f"concurrency 32 is {cell('ranker_batch_mean_c32', 1)}.",
        ]
    )


def pinned() -> str:
    """The server on one core against the server on all."""
    found = read("serving")
    lines = ["| the server runs on | added at concurrency 1, ms | requests/s at 32 |", "|---|---|---|"]
    for words, extra, rate in (
        ("all cores", "ensemble_extra_ms_c1", "ensemble_rps_c32"),
        ("one core, the client on all", "pinned_extra_ms_c1", "pinned_rps_c32"),
    ):
        cells = [
            f"{found[n].value:.{d}f} ({found[n].low:.{d}f} to {found[n].high:.{d}f})"
            for n, d in ((extra, 2), (rate, 0))
        ]
        lines.append(f"| {words} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def stages() -> str:
    """Where a request's time goes, from the server's statistics."""
    found = read("serving")
    lines = ["| ms a request | queue | input | compute | output | mean batch |", "|---|---|---|---|---|---|"]
    for concurrency in (1, 32):
        for stage in ("preprocess", "ranker", "rerank"):
            parts = [
                f"{stage}_{part}_c{concurrency}"
                for part in ("queue", "compute_input", "compute_infer", "compute_output")
            ]
            cells = [f"{found[part].value:.2f}" for part in parts] + [
                f"{found[f'{stage}_batch_mean_c{concurrency}'].value:.1f}"
            ]
            lines.append(f"| {stage}, concurrency {concurrency} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def hops() -> str:
    """What stages that do nothing cost."""
    found = read("hops")
    rows = {
        "one stage that does nothing": "one_stage_p50_ms",
        "an ensemble of three": "three_stages_p50_ms",
        "each further hop": "hop_ms",
    }
    lines = ["| p50 at concurrency 1 | ms |", "|---|---|"]
    for words, name in rows.items():
        lines.append(f"| {words} | {found[name].value:.2f} ({found[name].low:.2f} to {found[name].high:.2f}) |")
    return "\n".join(lines)


TABLES = {"ranking": ranking, "serving": serving, "stages": stages, "pinned": pinned, "hops": hops}


def filled(text: str) -> str:
    """A document with its tables made again."""

    def table(match: re.Match[str]) -> str:
        return f"<!-- figures: {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- figures: (\w+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


def main() -> int:
    """Exit status 1 with ``--check`` if a document is out of date."""
    stale = [path for path in DOCUMENTS if filled(path.read_text()) != path.read_text()]
    if "--check" in sys.argv:
        for path in stale:
            print(f"{path.relative_to(ROOT)} differs from {RESULTS.relative_to(ROOT)}; run make docs")
        return 1 if stale else 0
    for path in stale:
        path.write_text(filled(path.read_text()))
        print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
