"""Tables about text; see tables.py."""

from __future__ import annotations

from collections.abc import Callable

from results import Figure, read


def interval(figure: Figure, digits: int = 4, sign: str = "") -> str:
    """Value and interval, or spread."""
    value, low, high = (f"{number:{sign}.{digits}f}" for number in figure[1:4])
    return f"{value} [{low}, {high}]"


def text_price() -> str:
    """What words cost in packing."""
    found = read("text")
    lines = ["| packing a search with 200 candidates | µs |", "|---|---|"]
    for name, words in (("plain", "without words"), ("words", "with words")):
        lines.append(f"| {words} | {interval(found[f'pack_us_200_{name}'], 0)} |")
    ratio = found["pack_us_200_words_ratio"]
    lines += ["", f"{interval(ratio, 2)} times, median and spread of 15 rounds in turns; "
              "the query is one that is remembered."]  # fmt: skip
    return "\n".join(lines)


def home_depot() -> str:
    """Gains on judged search."""
    found = read("quality")
    lines = [
        "| NDCG@10 | ranker above BM25 | ranker above LambdaMART | LambdaMART above BM25 |",
        "|---|---|---|---|",
    ]
    for label, words in (
        ("_untouched", "queries that no choice was made on"), ("", "five folds"),
        ("_encoder_untouched", "the first ones, with words and the cosine of all-MiniLM-L6-v2"),
    ):  # fmt: skip
        if f"home_depot{label}_gain_over_bm25" not in found:
            continue
        cells = [
            interval(found[f"home_depot{label}_{name}"], 4, "+")
            for name in ("gain_over_bm25", "gain_over_lambdamart", "lambdamart_gain_over_bm25")
        ]
        lines.append(f"| {words} | " + " | ".join(cells) + " |")
    notes = [found[f"home_depot{label}_gain_over_bm25"].note.capitalize() + "." for label in ("_untouched", "")]
    return "\n".join([*lines, "", " ".join(notes)])


def intent() -> str:
    """What a query asks for."""
    found = read("text")
    lines = ["| | |", "|---|---|"]
    for name, words, digits in (
        ("intent_us", "P(category \\| query) of a new query, µs", 1),
        ("query_us", "all that is read of a new query, µs", 0),
        ("query_again_us", "of one that is remembered, µs", 1),
        ("intent_accuracy", "share of what was chosen that is of the likeliest category", 3),
    ):
        lines.append(f"| {words} | {interval(found[name], digits)} |")
    return "\n".join([*lines, "", f"Synthetic shop, {found['query_us'].note.partition('; ')[2]}."])


def shop_words() -> str:
    """The words' ablation on the shop."""
    found = read("text")
    lines = ["| NDCG@10 | median and spread of seeds |", "|---|---|"]
    for name, words in (("whole", "with words"), ("without_words", "without"), ("without_text", "without any text")):
        lines.append(f"| {words} | {interval(found[f'shop_{name}_ndcg10'])} |")
    gain, text = (found[f"shop_words_gain_over_{name}"] for name in ("without_words", "without_text"))
    told = f"Words against none: {interval(gain, 4, '+')}; against no text: {interval(text, 4, '+')}. Short runs."
    return "\n".join([*lines, "", told])


def reviews() -> str:
    """What reviews are worth."""
    found = read("text")
    lines = ["| NDCG@10 | median and spread of seeds |", "|---|---|"]
    for name, words in (
        ("without", "without reviews"), ("with", "with texts that the classifier judges"),
        ("known", "with judgements that are known"),
    ):  # fmt: skip
        lines.append(f"| {words} | {interval(found[f'reviews_{name}_ndcg10'])} |")
    gain = found["reviews_ndcg_gain"]
    return "\n".join([*lines, "", f"Texts against none: {interval(gain, 4, '+')}, {gain.note}."])


def text() -> str:
    """Classifiers."""
    found = read("text")
    lines = [
        "| task | accuracy | linear model | above it | INT8 keeps | ms a text, INT8 (FP32) | MB, INT8 (FP32) |",
        "|---|---|---|---|---|---|---|",
    ]
    for task in ("sentiment", "category"):
        own = {name.removeprefix(f"{task}_"): figure for name, figure in found.items() if name.startswith(f"{task}_")}
        lines.append(
            f"| {task} | {interval(own['accuracy'])} | {interval(own['linear_accuracy'])} | "
            f"{interval(own['gain_over_linear'], 4, '+')} | {interval(own['compressed_ratio'], 4)} | "
            f"{own['compressed_p50_ms'].value:.2f} ({own['dense_p50_ms'].value:.2f}) | "
            f"{own['compressed_mb'].value:.1f} ({own['dense_mb'].value:.1f}) |"
        )
    above = [task for task in ("sentiment", "category") if found[f"{task}_gain_over_linear"].low > 0]
    verdict = f"Significantly above the linear model: {', '.join(above) or 'neither'}."
    return "\n".join([*lines, "", f"{found['sentiment_accuracy'].note.capitalize()}. {verdict}"])


TEXT: dict[str, Callable[[], str]] = {
    "text_price": text_price, "home_depot": home_depot, "intent": intent, "reviews": reviews, "text": text,
    "shop_words": shop_words,
}  # fmt: skip
