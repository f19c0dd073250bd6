"""`trirank data`: from raw files to a dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table
from trirank.contract import Behaviour

from trirank_build.commands.options import Seed, check_target, opened
from trirank_build.errors import BadUsage
from trirank_build.progress import out, working

app = typer.Typer(help="Check files and prepare datasets.", no_args_is_help=True)

SKIP = "skip"


Ids = Literal["numbers", "strings"]
Encoding = Annotated[str | None, typer.Option(help="Of the files: gb18030, cp1252, …; UTF-8 by default.")]
Behaviours = Annotated[
    list[str] | None,
    typer.Option("--behaviour", metavar="WORD=MEANING", help="What a word of the log means: view, click, favourite, "
                 "cart, purchase, or skip; once for each."),
]  # fmt: skip
ItemIds = Annotated[Ids | None, typer.Option("--item-ids", help="Take item ids as numbers or as text.")]
UserIds = Annotated[Ids | None, typer.Option("--user-ids", help="Take user ids as numbers or as text.")]
MaxLoss = Annotated[
    float, typer.Option(min=0, max=1, help="Largest share of values or rows of no use before that is an error.")
]


@app.command()
def check(
    files: Annotated[list[Path], typer.Argument(help="A log, an item file, a query file, in any order.")],
    encoding: Encoding = None,
    behaviour: Behaviours = None,
    item_ids: ItemIds = None,
    user_ids: UserIds = None,
    max_loss: MaxLoss = 0.1,
) -> None:
    """Say what of files that belong together would be read, and what would not; writes nothing."""
    from trirank_build.preparation.check import check as examine
    from trirank_build.preparation.options import PrepareOptions

    report = examine(files, PrepareOptions(
        encoding=encoding, behaviours=_meanings(behaviour or []), item_ids=item_ids,
        user_ids=user_ids, max_loss=max_loss,
    ))  # fmt: skip
    show_report(report.notes, report.rows)
    out.print("these files can be prepared")


@app.command()
def prepare(
    source: Annotated[
        str,
        typer.Argument(
            help="`shop`, a CSV, Parquet or text file, a folder or an address (s3://…) of such, "
            "or, with --from-events, an earlier dataset."
        ),
    ],
    target: Annotated[Path, typer.Option("--out", help="Dataset directory to write.")],
    items: Annotated[Path | None, typer.Option(help="Item file: item_id and title, brand, category, price, …")] = None,
    queries: Annotated[Path | None, typer.Option(help="Query file: user_id, query, timestamp.")] = None,
    from_events: Annotated[
        str | None,
        typer.Option(help="Feedback to add: a user store (sqlite:PATH, redis://HOST:PORT) or a folder of `users log`."),
    ] = None,
    requests: Annotated[
        Path | None, typer.Option(help="With --from-events: folder that servers logged requests to.")
    ] = None,
    encoding: Encoding = None,
    behaviour: Behaviours = None,
    item_ids: ItemIds = None,
    user_ids: UserIds = None,
    max_loss: MaxLoss = 0.1,
    min_count: Annotated[int, typer.Option(min=1, help="k of the k-core; 1: off.")] = 1,
    onto: Annotated[
        Path | None,
        typer.Option(help="A dataset to which a newer log is added; what it was made of is not read again."),
    ] = None,
    engine: Annotated[
        str | None, typer.Option(help="What cleans and splits a log: polars, or a cluster, dask://HOST:PORT.")
    ] = None,
    anonymise: Annotated[
        Path | None,
        typer.Option(
            help="Key of `trirank privacy key`: users get pseudonyms, and what few have in common is left out."
        ),
    ] = None,
    k: Annotated[int, typer.Option("--k", min=1, help="With --anonymise: users that share an item or a query.")] = 5,
    keep_times: Annotated[
        bool, typer.Option("--keep-times", help="With --anonymise: leave times as they are, not days alone.")
    ] = False,
    reviews: Annotated[
        Path | None, typer.Option(help="Reviews: item_id and a text or a judgement (positive: 1 or 0) a row.")
    ] = None,
    text_model: Annotated[
        Path | None, typer.Option(help="With --reviews: a classifier of sentiments (`trirank text compress`).")
    ] = None,
    max_train: Annotated[int, typer.Option(min=1, help="Training requests to keep.")] = 200_000,
    max_eval: Annotated[int, typer.Option(min=1, help="Validation and test requests to keep.")] = 20_000,
    seed: Seed = 7,
) -> None:
    """Read, clean, split by time, find candidates; write a dataset."""
    from trirank_build.preparation.options import PrepareOptions
    from trirank_build.preparation.prepare import prepare as make

    check_target(target, "a dataset", replaces="dataset.json")
    anonymiser = None
    if anonymise is not None:
        from trirank_build.privacy.anonymise import NOTE, Anonymiser, read_key

        anonymiser = Anonymiser(read_key(anonymise), k, keep_times)
    if requests is not None and from_events is None:
        raise BadUsage("--requests goes with --from-events: what was shown is told by feedback")
    if text_model is not None and reviews is None:
        raise BadUsage("--text-model goes with --reviews")
    if onto is not None and from_events is not None:
        raise BadUsage("--onto and --from-events both add to a dataset; do one after the other")
    if from_events is not None:
        given = {
            "--items": items, "--queries": queries, "--encoding": encoding, "--behaviour": behaviour,
            "--item-ids": item_ids, "--user-ids": user_ids, "--engine": engine,
        }  # fmt: skip
        if said := [name for name, value in given.items() if value is not None]:
            raise BadUsage(
                f"{said[0]} does not go with --from-events, which reads no raw files: prepare those anew, and add "
                "feedback to that"
            )
        dataset = _from_events(source, from_events, requests)
    else:
        told = PrepareOptions(
            items, queries, min_count, max_train, max_eval, seed, encoding=encoding,
            behaviours=_meanings(behaviour or []), item_ids=item_ids,
            user_ids=user_ids, max_loss=max_loss, engine=engine,
        )  # fmt: skip
        if onto is None:
            dataset = make(source, told)
        else:
            from trirank_build.data.dataset import Dataset
            from trirank_build.preparation.increment import prepare_onto

            dataset = prepare_onto(Dataset.load(onto), source, told)
    if reviews is not None:
        from trirank_build.text.model import TextModel
        from trirank_build.text.reviews import with_reviews

        model = None if text_model is None else TextModel.load(text_model)
        with working("reading reviews"):
            dataset = with_reviews(dataset, reviews, model, encoding=encoding, max_loss=max_loss)
    if anonymiser is not None:
        dataset = anonymiser.apply(dataset)
        for what, count in dataset.description.notes[NOTE].items():
            out.print(f"{what.replace('_', ' ')}: {count}", highlight=False)
    with working("writing the dataset"):
        dataset.save(target)
    show_report(dataset.description.notes.get("read", []), dataset.description.cleaning)
    counts = dataset.requests.group_by("split").len().collect()
    sizes = {name: f"{count:,}" for name, count in dataset.description.counts.items()}
    splits = {split: f"{count:,}" for split, count in counts.iter_rows()}
    out.print(f"{target}: " + ", ".join(f"{n} {name}" for name, n in sizes.items()))
    out.print("requests: " + ", ".join(f"{splits.get(name, 0)} {name}" for name in ("train", "valid", "test")))


def _from_events(source: str, address: str, requests: Path | None) -> Any:
    from trirank_build.data.dataset import Dataset
    from trirank_build.online.datasets import with_feedback
    from trirank_build.online.events import all_events, events_of
    from trirank_build.online.requests import logged_requests

    base = Dataset.load(Path(source))
    lines = [] if requests is None else logged_requests(requests)
    if Path(address).is_dir():
        return with_feedback(base, events_of(Path(address)), lines)
    with opened(address, "--from-events") as store:
        return with_feedback(base, all_events(store), lines)


def show_report(notes: list[str], rows: list[Any]) -> None:
    """How values were read, and what the rules of cleaning dropped."""
    for line in notes:
        out.print(line, highlight=False, markup=False, soft_wrap=True)
    if rows:
        table = Table("rule", "rows in", "rows out", "dropped", title="cleaning")
        for rule, before, after in rows:
            table.add_row(rule, f"{before:,}", f"{after:,}", f"{before - after:,}")
        out.print(table)


def _meanings(said: list[str]) -> dict[str, Behaviour | None]:
    found: dict[str, Behaviour | None] = {}
    names = {behaviour.name.lower(): behaviour for behaviour in Behaviour}
    for each in said:
        word, equals, meaning = each.rpartition("=")
        if not equals or not word or meaning.lower() not in (*names, SKIP):
            raise BadUsage(f"--behaviour {each} is no WORD=MEANING; meanings are {', '.join(names)}, {SKIP}")
        found[word.strip().lower()] = names.get(meaning.lower())
    return found
