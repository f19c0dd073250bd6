"""Writes the figures of ``results/*.json`` into the documents, between marks like ``<!-- figures: orders -->``.

    python benchmarks/tables.py [--check]

No figure in a document is typed by hand; a test fails when a document and the results differ.
"""

from __future__ import annotations

import json
import re
import sys

from online_tables import ONLINE
from results import RESULTS, ROOT, Figure, read
from scale_tables import SCALE
from serving_tables import SERVING
from text_tables import TEXT
from trust_tables import TRUST

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SET_NAMES = {
    "beauty": "Amazon Beauty",
    "sports": "Amazon Sports",
    "games": "Amazon Video Games",
    "home_depot": "Home Depot search",
    "shop": "synthetic shop",
}
ORDERS = {
    "": "trirank",
    "ranker_states_alone": "its states alone",
    "sasrec": "SASRec",
    "lstm": "LSTM",
    "bst": "BST",
    "lambdamart": "LambdaMART",
    "item_knn": "item-to-item",
    "matrix_factorisation": "matrix factorisation",
    "content": "content (BM25)",
    "bm25": "BM25",
    "retrieval": "retrieval's order",
    "popularity": "popularity",
    "random": "random",
    "optimum": "best possible",
}
PUBLISHED = {"beauty": (0.0531, 0.0928), "sports": (0.0323, 0.0569)}
"""Best NDCG@10 and recall@10 in the table of eSASRec (RecSys 2025)."""
PUBLISHED_GAMES_SAMPLED = 0.5360
"""SASRec (ICDM 2018), 100 sampled negatives."""


def published() -> str:
    """Where others published numbers under the same protocol."""
    found = read("quality")

    def cell(name: str, published: float) -> str:
        value = found[name].value
        return f"{value:.4f} | {published:.4f} | {value / published - 1:+.0%}"

    lines = ["| test split | metric | trirank | best published | |", "|---|---|---|---|---|"]
    for name, (ndcg, recall) in PUBLISHED.items():
        lines.append(f"| {SET_NAMES[name]}, whole catalogue | NDCG@10 | {cell(f'{name}_ndcg10', ndcg)} |")
        lines.append(f"| | recall@10 | {cell(f'{name}_recall10', recall)} |")
    games = cell("games_sampled_ndcg10", PUBLISHED_GAMES_SAMPLED)
    lines.append(f"| {SET_NAMES['games']}, 100 sampled items | NDCG@10 | {games} |")
    states, sasrec = found["beauty_states_ndcg10"], found["beauty_sasrec_ndcg10"]
    spread = found["beauty_ndcg10"]
    seeds = spread.note.split("; ")[-1]
    return "\n".join([
        *lines,
        "",
        f"Beauty: {seeds} (NDCG@10 {spread.low:.4f} to {spread.high:.4f}). Published: the table of eSASRec (RecSys "
        "2025), and SASRec (ICDM 2018) for sampled items. The ranker learns its second step from validation choices, "
        "which published models use for early stopping alone; its states, which learn from training events only, have "
        f"{states.value:.4f} on Beauty. Our own SASRec has {sasrec.value:.4f} there, the published one 0.0531.",
    ])  # fmt: skip


def orders() -> str:
    """NDCG@10 of every order on every test split."""
    found = read("quality")
    lines = ["| NDCG@10 | " + " | ".join(SET_NAMES.values()) + " |", "|---" * (len(SET_NAMES) + 1) + "|"]
    for order, words in ORDERS.items():
        cells = []
        for name in SET_NAMES:
            figure = found.get(f"{name}_{order}_ndcg10" if order else f"{name}_ndcg10")
            above = found.get(f"{name}_ndcg10_above_{order}")
            mark = " ns" if above is not None and above.low <= 0 else ""
            cells.append("" if figure is None else f"{figure.value:.4f}{mark}")
        if any(cells):
            lines.append(f"| {words} | " + " | ".join(cells) + " |")
    beaten = [
        f"{words} on {SET_NAMES[name]}"
        for name in SET_NAMES
        for order, words in ORDERS.items()
        if order and (above := found.get(f"{name}_ndcg10_above_{order}")) is not None and above.low <= 0
    ]
    verdict = (
        "The ranker is significantly above every other order on every set (paired 95 % bootstrap interval)."
        if not beaten
        else "The ranker is significantly above every other order (paired 95 % bootstrap interval), except for "
        + " and ".join(beaten)
        + " (marked ns)."
    )
    of_optimum, folds = found["shop_ndcg10_of_optimum"], found["home_depot_gain_over_bm25"]
    trees = found["home_depot_gain_over_lambdamart"]
    return "\n".join([
        *lines,
        "",
        f"{verdict} On the shop it reaches {of_optimum.value:.3f} ({of_optimum.low:.3f} to {of_optimum.high:.3f}) of "
        "the best possible order. On Home Depot, by cross-validation over queries with features chosen inside the "
        f"folds, it is {folds.value:+.4f} ({folds.low:+.4f} to {folds.high:+.4f}) above BM25 and {trees.value:+.4f} "
        f"({trees.low:+.4f} to {trees.high:+.4f}) above LambdaMART, each with the features that validation chose "
        "for it; the features themselves were made on these queries. On others it is "
        f"{_gain(found['home_depot_untouched_gain_over_bm25'])} above BM25 and "
        f"{_gain(found['home_depot_untouched_gain_over_lambdamart'])} above LambdaMART.",
    ])  # fmt: skip


def _gain(figure: Figure) -> str:
    return f"{figure.value:+.4f} ({figure.low:+.4f} to {figure.high:+.4f})"


def _ablation(prefix: str, whole: str, skip: str = "") -> list[str]:
    found = read("quality")
    base = found[f"{prefix}{whole}"].value
    lines = []
    for name, figure in found.items():
        if name.startswith(prefix) and not (skip and name.startswith(skip)):
            words = name.removeprefix(prefix).replace("_", " ")
            lines.append(f"| {words} | {figure.value:.4f} | {figure.value / base - 1:+.1%} |")
    return lines


def ablations() -> str:
    """What each input and each objective is worth, in short runs."""
    head = ["| | NDCG@10 | |", "|---|---|---|"]
    states, beauty, shop = "ablation_beauty_states_", "ablation_beauty_", "ablation_shop_"
    return "\n".join([
        "Beauty, both steps:", "", *head, *_ablation(beauty, "whole", skip=states), "",
        "Beauty, pre-trained states alone:", "", *head, *_ablation(states, "pretrained"), "",
        "Shop:", "", *head, *_ablation(shop, "whole"),
    ])  # fmt: skip


def embeddings() -> str:
    """What each kind of table takes and costs."""
    found = read("quality")
    lines = ["| table | Beauty, MB | 10 million items, MB | NDCG@10 (Beauty, short run) |", "|---|---|---|---|"]
    for name in ("plain", "low_rank", "quotient_remainder"):
        beauty, many = found[f"embedding_{name}_bytes"].value / 1e6, found[f"embedding_{name}_10m_bytes"].value / 1e6
        lines.append(f"| `{name}` | {beauty:.2f} | {many:,.0f} | {found[f'embedding_{name}_ndcg10'].value:.4f} |")
    return "\n".join(lines)


def times() -> str:
    """How long the recipes train."""
    found = read("quality")
    lines = ["| recipe on | minutes |", "|---|---|"]
    for name, words in SET_NAMES.items():
        minutes = found[f"{name}_train_s"].value / 60
        lines.append(f"| {words} | {'less than 1' if minutes < 1 else f'{minutes:.0f}'} |")
    return "\n".join([*lines, "", f"Measured on {found['beauty_train_s'].note}."])


def _cell(figure: Figure, digits: int = 2) -> str:
    """Median, and the spread of the rounds."""
    return f"{figure.value:.{digits}f} ({figure.low:.{digits}f} to {figure.high:.{digits}f})"


SERVERS = {
    "single": "`--pipeline single`, an instance a core",
    "single_1_instance": "the same, one instance",
    "ensemble": "`--pipeline ensemble`",
    "grpc_aio": "bare grpc.aio, a request at a time",
    "grpc_aio_batching": "bare grpc.aio, micro-batching",
    "grpc_aio_batching_process_a_core": "bare grpc.aio, micro-batching, a process a core",
}


def servers() -> str:
    """Every server at every number of callers."""
    found = read("serving")
    lines = [
        "| | callers | p50 ms | p99 ms | p99 / p50 | requests/s | server's CPU ms a request | `single` answers |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, words in SERVERS.items():
        for callers in (1, 8, 32):
            cells = [
                _cell(found[f"{name}_p50_ms_c{callers}"]), _cell(found[f"{name}_p99_ms_c{callers}"]),
                _cell(found[f"{name}_p99_over_p50_c{callers}"], 1), _cell(found[f"{name}_rps_c{callers}"], 0),
                _cell(found[f"{name}_server_cpu_ms_c{callers}"]),
                "" if name == "single" else _cell(found[f"single_rps_vs_{name}_c{callers}"]) + " ×",
            ]  # fmt: skip
            lines.append(f"| {words} | {callers} | " + " | ".join(cells) + " |")
    extra = {name: _cell(found[f"{name}_extra_ms_c1"]) for name in ("single", "ensemble", "grpc_aio")}
    equal = _cell(found["single_1_instance_rps_vs_grpc_aio_batching_c8"])
    words = [
        f"Above the stages in process, with one caller: `single` {extra['single']} ms,",
        f"`ensemble` {extra['ensemble']} ms, the bare server {extra['grpc_aio']} ms.",
        f"One instance against one process, both batching, 8 callers: {equal} times.",
        f"{found['single_rps_c8'].note.capitalize()}.",
    ]
    return "\n".join([*lines, "", " ".join(words)])


def stage_costs() -> str:
    """The stages alone."""
    found = read("serving")
    lines = ["| µs, in process | 200 candidates | 1,000 |", "|---|---|---|"]
    for stage in ("preprocess", "ranker", "rerank"):
        cells = [_cell(found[f"{stage}_us_{size}"], 0) for size in (200, 1000)]
        lines.append(f"| {stage} | " + " | ".join(cells) + " |")
    row, eight = found["in_process_p50_ms"], found["in_process_batch_8_ms_per_request"]
    few, wide, mixed = (_cell(found[f"preprocess_batch_{name}_us"], 0) for name in ("few", "wide", "mixed"))
    words = [
        f"All in a row, 200 candidates: {_cell(row)} ms; in batches of 8 {_cell(eight)} ms a request.",
        f"Preprocess of 31 requests of 64 candidates takes {few} µs, of one of 1,000 with a query {wide} µs,",
        f"of all together {mixed} µs: {_cell(found['mixed_batch_ratio'])} of the sum.",
    ]
    return "\n".join([*lines, "", " ".join(words)])


def stages() -> str:
    """Where a request's time goes, from the server's statistics."""
    found = read("serving")
    lines = ["| ms a request | queue | input | compute | output | mean batch |", "|---|---|---|---|---|---|"]
    for callers in (1, 8, 32):
        for model in ("ensemble_preprocess", "ensemble_ranker", "ensemble_rerank", "single"):
            names = [
                f"{model}_{part}_c{callers}" for part in ("queue", "compute_input", "compute_infer", "compute_output")
            ]
            cells = [f"{found[name].value:.2f}" for name in names]
            cells.append(f"{found[f'{model}_batch_mean_c{callers}'].value:.1f}")
            lines.append(f"| {model.replace('ensemble_', '')}, {callers} callers | " + " | ".join(cells) + " |")
    return "\n".join(lines).replace("1 callers", "1 caller")


def tried() -> str:
    """One thing changed at a time."""
    found = read("tried")
    rows = {
        "plain": "`single`, an instance a core",
        "pinned": "the same, with OpenVINO pinning its thread", "one_instance": "`single`, one instance",
        "queue_policy": "the same, with a queue policy",
    }  # fmt: skip
    lines = ["| | callers | p50 ms | p99 ms | requests/s | slept 450 ms or longer |", "|---|---|---|---|---|---|"]
    for name, words in rows.items():
        for callers in (1, 8, 32):
            slept = found[f"{name}_slept_share_ratio_c{callers}"]
            cells = [_cell(found[f"{name}_{kind}_ms_c{callers}"]) for kind in ("p50", "p99")]
            cells += [_cell(found[f"{name}_rps_c{callers}"], 0), f"{slept.value:.1%}"]
            lines.append(f"| {words} | {callers} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"{found['plain_rps_c8'].note.capitalize()}."])


def poison() -> str:
    """Hostile calls beside sane ones."""
    found = read("serving")
    lines = ["| pipeline | sane requests that failed or were answered otherwise | |", "|---|---|---|"]
    for name in ("ensemble", "single"):
        figure = found[f"poisoned_failures_{name}"]
        lines.append(f"| `{name}` | {figure.value:.0f} | {figure.note} |")
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


COMPRESSED = {"chain": "**chain `sequences`**", "control": "control, small from scratch"}
COLUMNS = (
    "",
    "engine",
    "p50 ms at 200",
    "at 1,000",
    "faster at 200",
    "at 1,000",
    "MB",
    "smaller",
    "NDCG@10",
    "of reference",
)


def compression() -> str:
    """Every kind of step alone, the chain, the control."""
    found = read("compression")
    names = [name.removesuffix("_p50_ms_200") for name in found if name.endswith("_p50_ms_200")]
    return _compressed(sorted(names, key=lambda name: (name == "control", name == "chain")))


def compressed() -> str:
    """The chain alone, for the first page."""
    return _compressed(["reference", "chain", "control"])


def _compressed(names: list[str]) -> str:
    found = read("compression")
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for name in names:
        ratio = found[f"{name}_ndcg_ratio"]
        cells = [
            COMPRESSED.get(name, name.replace("_", " ")),
            found[f"{name}_p50_ms_200"].note.split(",")[0],
            *(f"{found[f'{name}_p50_ms_{size}'].value:.2f}" for size in (200, 1000)),
            *(f"{found[f'{name}_speedup_p50_{size}'].value:.2f}" for size in (200, 1000)),
            f"{found[f'{name}_mb'].value:.2f}", f"{found[f'{name}_size_ratio'].value:.1f}",
            f"{found[f'{name}_ndcg10'].value:.4f}", f"{ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f})",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    fast, many, ratio = (found[name] for name in ("speedup_p50_200", "speedup_p50_1000", "ndcg_ratio"))
    above = found["chain_ndcg10_above_control"]
    verdict = "better than" if above.low > 0 else "worse than" if above.high < 0 else "as well, within the noise, as"
    return "\n".join([
        *lines,
        "",
        f"The chain is {fast.value:.2f} ({fast.low:.2f} to {fast.high:.2f}) times faster at 200 candidates, "
        f"{many.value:.2f} ({many.low:.2f} to {many.high:.2f}) at 1,000, and {found['size_ratio'].value:.1f} times "
        f"smaller, with {ratio.value:.1%} ({ratio.low:.1%} to {ratio.high:.1%}) of the reference's NDCG@10. It ranks "
        f"{verdict} the control ({above.value:+.4f}, {above.low:+.4f} to {above.high:+.4f} NDCG@10).",
    ])  # fmt: skip


def engines() -> str:
    """How long a plan takes to build, and to be found again."""
    found = read("engines")
    lines = ["| ranker | cold build, s | from the lock, s | plan, MB | |", "|---|---|---|---|---|"]
    for name in ("dense", "fp16", "qdq-int8"):
        cells = []
        for kind in ("cold_build_s", "cached_build_s"):
            figure = found[f"{kind} {name}"]
            cells.append(f"{figure.value:.2f} ({figure.low:.2f} to {figure.high:.2f})")
        plan = found[f"plan_mb {name} sm86"]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {plan.value:.1f} | {plan.note} |")
    refused = found["wrong_plans_refused"]
    words = (
        f"Refused with the field named: {refused.value:.0f} of {refused.high:.0f} ({refused.note.replace(';', ',')})."
    )
    return "\n".join([*lines, "", f"{found['cold_build_s dense'].note}. {words}"])


def hot_swap() -> str:
    """What a swap costs requests that come in meanwhile."""
    found = read("hot_swap")
    lines = ["| | p50 ms | p99 ms | longest ms |", "|---|---|---|---|"]
    for name, words in (("rest", "between swaps"), ("swap", "while a swap is under way")):
        cells = [f"{found[f'{name}_p{q}_ms'].value:.1f}" for q in (50, 99, 100)]
        lines.append(f"| {words} | " + " | ".join(cells) + " |")
    ratio, took, health = (found[n] for n in ("p99_ratio_during_swap", "swap_s", "not_ready_after_bad_promotion"))
    return "\n".join([
        *lines,
        "",
        f"{found['swaps'].value:.0f} swaps: {found['failed_requests'].value:.0f} failed requests, "
        f"{found['mixed_answers'].value:.0f} mixed answers; p99 {ratio.value:.2f} ({ratio.low:.2f} to "
        f"{ratio.high:.2f}) times that between swaps; a swap takes {took.value:.1f} s ({took.low:.1f} to "
        f"{took.high:.1f}), of which callers "
        f"see one moment. {ratio.note}. The server said {health.value:.0f} times that it is not ready, "
        f"{health.note}.",
    ])  # fmt: skip


def ways() -> str:
    """Ways to swap that were tried."""
    found = read("hot_swap")
    lines = ["| way | swaps | failed requests | mixed answers | p99 against between swaps |", "|---|---|---|---|---|"]
    for way, words in (
        ("", "**a new name a release, drained**"),
        ("without_draining_", "the same, old models unloaded at once"),
        ("in_place_", "the same names, one model after the other"),
    ):
        counts = [f"{found[f'{way}{name}'].value:.0f}" for name in ("swaps", "failed_requests", "mixed_answers")]
        ratio = found[f"{way}p99_ratio_during_swap"]
        lines.append(f"| {words} | {' | '.join(counts)} | {ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f}) |")
    return "\n".join(lines)


def client() -> str:
    """What the client costs, and what hedges save."""
    found = read("client")

    def cell(name: str, digits: int = 0) -> str:
        figure = found[name]
        return f"{figure.value:.{digits}f} ({figure.low:.{digits}f} to {figure.high:.{digits}f})"

    lines = ["| µs a call | 50 candidates | 200 | 1,000 |", "|---|---|---|---|"]
    for name, words in (
        ("raw_grpcio_us", "raw grpcio with a ready message, whole call"),
        ("overhead_us", "this client, above it"),
        ("tritonclient_overhead_us", "tritonclient as its examples use it, above it"),
        ("own_cost_us", "this client's own work, nothing sent"),
        ("own_cost_warm_us", "the same again and again, all of it in the processor's caches"),
    ):
        lines.append(f"| {words} | " + " | ".join(cell(f"{name}_{size}") for size in (50, 200, 1000)) + " |")
    lines += ["", "| | p50 ms | p99 ms |", "|---|---|---|"]
    for name, words in (("plain", "without hedges"), ("hedged", "with")):
        lines.append(f"| {words} | {cell(f'{name}_p50_ms', 1)} | {cell(f'{name}_p99_ms', 1)} |")
    gain, extra = cell("hedged_p99_gain", 1), found["hedge_extra_load"].value
    grown, late = found["memory_growth_mb"], [cell(f"overrun_ms_{name}", 1) for name in ("sync", "async")]
    return "\n".join([
        *lines,
        "",
        f"p99 is {gain} times smaller with hedges, for {extra:.1%} more calls ({found['hedge_extra_load'].note}). "
        f"Memory grew by {grown.value:.1f} MB {grown.note}. Where no answer comes, a call ends {late[0]} ms after its "
        f"deadline, an asynchronous one {late[1]} ms ({found['overrun_ms_sync'].note}).",
    ])  # fmt: skip


def shared_memory() -> str:
    """Why the client has none."""
    saved = read("client")["shared_memory_saves_us_1000"]
    verdict = "saves" if saved.low > 0 else "costs" if saved.high < 0 else "neither saves nor costs"
    return (
        f"Shared memory for a server on the same host is not offered, because it {verdict} time: the difference is "
        f"{saved.value:+.0f} ({saved.low:+.0f} to {saved.high:+.0f}) µs a call in favour of it ({saved.note}). A "
        "region would have to be registered with every server, and guarded against reuse after a deadline."
    )


def recipe_keys() -> str:
    """Every key of a recipe, as the code says it."""
    from trirank_build.recipe import PrivacyRecipe, Recipe

    sections = {
        name: field.default for name, field in Recipe.model_fields.items() if hasattr(field.default, "model_dump")
    } | {"training.privacy": PrivacyRecipe()}
    lines = ["| key | default | |", "|---|---|---|", "| `seed` | 7 | of all that is drawn |"]
    for section, default in sections.items():
        for name, field in type(default).model_fields.items():
            value = json.dumps(default.model_dump()[name], default=str)
            words = " ".join((field.description or "").replace("|", "\\|").split())
            lines.append(f"| `{section}.{name}` | `{value}` | {words} |")
    return "\n".join(lines)


def rules() -> str:
    """What the doctor knows."""
    from trirank_build.doctor import examine
    from trirank_build.doctor.finding import RULES

    assert examine.ROOMS
    lines = ["| id | | what is wrong | what to do | upstream |", "|---|---|---|---|---|"]
    for name in sorted(RULES):
        rule = RULES[name]
        cells = (name, rule.severity.name.lower(), rule.what, rule.fix, rule.issue)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


TABLES = {
    "recipe_keys": recipe_keys,
    "engines": engines,
    "hot_swap": hot_swap,
    "client": client,
    "rules": rules,
    "shared_memory": shared_memory,
    "ways": ways,
    "compressed": compressed,
    "compression": compression,
    "published": published,
    "orders": orders,
    "ablations": ablations,
    "embeddings": embeddings,
    "times": times,
    "servers": servers,
    "stage_costs": stage_costs,
    "tried": tried,
    "poison": poison,
    "stages": stages,
    "hops": hops,
    **ONLINE,
    **SCALE,
    **SERVING,
    **TRUST,
    **TEXT,
}


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
