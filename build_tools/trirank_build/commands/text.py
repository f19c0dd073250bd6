"""`trirank text`: classifiers of short texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from trirank_build.commands.options import Json, Seed, check_target
from trirank_build.progress import out

app = typer.Typer(help="Classifiers of short texts: sentiment, category, any labels.", no_args_is_help=True)

Texts = Annotated[Path, typer.Argument(help="A table with a column of texts and one of labels: CSV, TSV, Parquet.")]
TextRunFolder = Annotated[Path, typer.Argument(help="Folder of a finished `text train`.")]
TextColumn = Annotated[str | None, typer.Option("--text", help="Column of texts; text, review, title or query else.")]


@app.command()
def train(
    task: Annotated[
        Literal["sentiment", "category", "labels"], typer.Argument(help="Which column says what, and what it may say.")
    ],
    texts: Texts,
    target: Annotated[Path, typer.Option("--out", help="Run directory; a stopped run goes on.")],
    recipe: Annotated[str, typer.Option(help="Text recipe file, or the name of a shipped one.")] = "text",
    text: TextColumn = None,
    label: Annotated[
        str | None,
        typer.Option("--label", help="Column of labels; the task's own name, positive or label else."),
    ] = None,
    encoding: Annotated[str | None, typer.Option(help="Of the file: gb18030, cp1252, …; UTF-8 by default.")] = None,
    seed: Seed = 7,
    fresh: Annotated[bool, typer.Option("--fresh", help="Replace what is there.")] = False,
) -> None:
    """Train a classifier; says how well it does on the validation part."""
    check_target(target, "a text classifier")
    from trirank_build.text.recipe import load_text_recipe

    loaded = load_text_recipe(recipe)
    from trirank_build.text.corpus import read_corpus
    from trirank_build.text.training import train_text

    corpus = read_corpus(texts, task, text=text, label=label, seed=seed, encoding=encoding)
    _show_cleaning(corpus)
    read = {"text": text, "label": label, "seed": seed, "encoding": encoding}
    run = train_text(corpus, loaded, target, task=task, source=texts.name, read=read, fresh=fresh)
    found = _evaluated(run, corpus, "valid")
    out.print(found.table(f"{texts.name}: {task}, validation part"))
    share = run.facts["valid_accuracy"]
    out.print(
        f"the encoder alone is right about {share['encoder']:.4f} of the texts, the linear model of n-grams about "
        f"{share['linear']:.4f}",
        highlight=False,
    )
    out.print(f"next: trirank text compress {target} {texts} --out MODEL", highlight=False)


@app.command()
def evaluate(
    run: TextRunFolder,
    texts: Texts,
    split: Annotated[Literal["valid", "test"], typer.Option(help="Part to judge on; choose by validation.")] = "valid",
    report: Annotated[Path | None, typer.Option(help="HTML page to write.")] = None,
    as_json: Json = False,
) -> None:
    """Accuracy, precision, recall, F1, and what is taken for what."""
    loaded, corpus = _opened(run, texts)
    found = _evaluated(loaded, corpus, split)
    title = f"{loaded.facts['source']}: {loaded.facts['task']}"
    if report is not None:
        found.write(report, title, split)
    if as_json:
        print(json.dumps(found.to_json(), ensure_ascii=False))
    else:
        out.print(found.table(f"{title}, {split} part"))
        if report is not None:
            out.print(f"page: {report}", highlight=False)


@app.command()
def compress(
    run: TextRunFolder,
    texts: Texts,
    target: Annotated[Path, typer.Option("--out", help="Folder of the finished classifier.")],
    allow_failing_gate: Annotated[
        bool, typer.Option("--allow-failing-gate", help="Keep it though it lost more than the recipe allows.")
    ] = False,
) -> None:
    """INT8 and a graph, held to the dense classifier on the validation part."""
    check_target(target, "a text classifier", replaces="text.json")
    loaded, corpus = _opened(run, texts)
    from trirank_build.text.model import compress_text

    facts = compress_text(loaded, corpus, target, allow_failing_gate)
    for check in facts["checks"]:
        out.print(f"{check['what']}: {check['value']:.4f} (limit {check['limit']:g})", highlight=False)
    took, size = facts["p50_ms"], facts["mb"]
    out.print(
        f"{target}: {size['int8']:.1f} MB of {size['float32']:.1f}, {took['int8']:.2f} ms a text of "
        f"{took['float32']:.2f}", highlight=False,
    )  # fmt: skip


@app.command()
def label(
    model: Annotated[Path, typer.Argument(help="Folder of a `text compress`.")],
    texts: Texts,
    target: Annotated[Path, typer.Option("--out", help="CSV to write: the table, a label and its probability.")],
    text: TextColumn = None,
    encoding: Annotated[str | None, typer.Option(help="Of the file; UTF-8 by default.")] = None,
) -> None:
    """Label the texts of a table. A row without a text gets no label."""
    from trirank_build.text.model import TextModel, label_table

    labelled, without = label_table(TextModel.load(model), texts, target, text=text, encoding=encoding)
    out.print(f"{target}: {labelled:,} texts labelled, {without:,} rows without a text", highlight=False)


def _opened(run: Path, texts: Path) -> tuple[Any, Any]:
    from trirank_build.text.corpus import read_corpus
    from trirank_build.text.training import TextRun

    loaded = TextRun.load(run)
    corpus = read_corpus(texts, loaded.facts["task"], **loaded.facts["read"])
    loaded.check_texts(corpus)
    return loaded, corpus


def _evaluated(run: Any, corpus: Any, split: str) -> Any:
    from trirank_build.text.evaluation import evaluate_text
    from trirank_build.text.training import logits_of

    own, labels = corpus.part(split)
    return evaluate_text(own, labels, logits_of(run.model(), run.reader, run.reader.read(own)), run.classes)


def _show_cleaning(corpus: Any) -> None:
    from trirank_build.commands.data import show_report

    show_report(corpus.notes, corpus.cleaning)
