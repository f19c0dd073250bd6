"""Texts with labels, split by text: a text and its repetitions are in one part."""

from __future__ import annotations

import hashlib
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from trirank_build.data.dataset import SPLITS
from trirank_build.errors import BadData
from trirank_build.preparation.cleaning import Report
from trirank_build.preparation.sources.tables import read_table

TASKS = {"sentiment": ("positive", "sentiment", "label"), "category": ("category", "label"), "labels": ("label",)}
"""Task → names that the column of labels may have."""
TEXT_COLUMNS = ("text", "review", "title", "query")
SENTIMENT = {
    "1": "positive", "positive": "positive", "pos": "positive", "true": "positive",
    "0": "negative", "negative": "negative", "neg": "negative", "false": "negative",
}  # fmt: skip
LEAST = 10
"""Texts of a label; fewer cannot be trained, validated and tested."""
LONGEST = 20_000
"""Letters of a text that are read; what comes after says nothing more, and takes time."""
_TRAIN, _VALID = 0.8, 0.9


@dataclass(frozen=True)
class Corpus:
    """R texts.

    Attributes:
        labels: [R] int64 places in ``classes``.
        classes: names, ascending.
        split: [R] 0: train, 1: valid, 2: test.
        cleaning: (rule, rows in, rows out).
        digest: SHA-256 over texts, labels and split.
    """

    texts: list[str]
    labels: NDArray[np.int64]
    classes: list[str]
    split: NDArray[np.int8]
    cleaning: list[tuple[str, int, int]]
    notes: list[str]
    digest: str

    def part(self, name: str) -> tuple[list[str], NDArray[np.int64]]:
        """Texts and labels of ``train``, ``valid`` or ``test``."""
        chosen = np.flatnonzero(self.split == SPLITS.index(name))
        return [self.texts[at] for at in chosen], self.labels[chosen]


def read_corpus(
    path: Path, task: str, *, text: str | None = None, label: str | None = None, seed: int = 7,
    encoding: str | None = None,
) -> Corpus:  # fmt: skip
    """Read a table of texts and labels, clean it, split it by text.

    Args:
        task: one of TASKS.
        text, label: names of the columns; None: the first of TEXT_COLUMNS and of the task's that there is.

    Raises:
        BadData: a column is missing, a label has too few texts, or nothing is left.
    """
    report = Report()
    table = read_table(path, report, encoding)
    text = text_column(table, path, text)
    label = _column(table, path, "label", label, TASKS[task])
    table = table.select(
        pl.col(text).cast(pl.String).str.strip_chars().alias("text"),
        pl.col(label).cast(pl.String).str.strip_chars().alias("label"),
    )
    table = report.apply("no text", table, lambda f: f.filter(pl.col("text").fill_null("") != ""))
    table = report.apply("no label", table, lambda f: f.filter(pl.col("label").fill_null("") != ""))
    if task == "sentiment":
        table = table.with_columns(_sentiments(table["label"], path, label))
    long = table.filter(pl.col("text").str.len_chars() > LONGEST).height
    if long:
        report.note(f"{long:,} texts have more than {LONGEST:,} letters; what comes after is not read")
        table = table.with_columns(pl.col("text").str.slice(0, LONGEST))
    table = report.apply("repeated", table, lambda f: f.unique(maintain_order=True))
    table = report.apply("one text, several labels", table, lambda f: f.filter(pl.len().over("text") == 1))
    if table.is_empty():
        raise BadData(f"no row of {path} with a text in {text!r} and a label in {label!r} is left after cleaning")
    counts = dict(table.group_by("label").len().sort("label").iter_rows())
    _check_labels(counts, path, label)
    classes = list(counts)
    texts = table["text"].to_list()
    labels = table["label"].replace_strict(classes, list(range(len(classes))), return_dtype=pl.Int64).to_numpy()
    split = _split(texts, labels, seed)
    digest = hashlib.sha256()
    for each, own, part in zip(texts, labels.tolist(), split.tolist(), strict=True):
        digest.update(f"{part}\0{classes[own]}\0{each}\0".encode())
    return Corpus(texts, labels, classes, split, report.rows, report.notes, digest.hexdigest())


def text_column(table: pl.DataFrame, path: Path, named: str | None) -> str:
    """The column of texts: the one that is named, or the first of TEXT_COLUMNS.

    Raises:
        BadData: there is none.
    """
    return _column(table, path, "text", named, TEXT_COLUMNS)


def _column(table: pl.DataFrame, path: Path, what: str, named: str | None, usual: tuple[str, ...]) -> str:
    if named is not None and named.lower() in table.columns:
        return named.lower()
    found = [name for name in usual if name in table.columns] if named is None else []
    if not found:
        asked = f"--{what} {named} is none" if named is not None else f"none is called {' or '.join(usual)}"
        raise BadData(f"{path} has the columns {', '.join(table.columns)}; {asked}. Name the one with --{what}")
    return found[0]


def _sentiments(labels: pl.Series, path: Path, column: str) -> pl.Series:
    if unknown := sorted(set(labels.str.to_lowercase().unique()) - set(SENTIMENT)):
        raise BadData(
            f"{path}: {column} has {', '.join(map(repr, unknown[:5]))}, which is neither positive nor negative; write "
            "1 or 0, or take the task labels"
        )
    return labels.str.to_lowercase().replace_strict(SENTIMENT)


def _check_labels(counts: dict[str, Any], path: Path, column: str) -> None:
    if len(counts) < 2:
        raise BadData(f"{path}: {column} has nothing but {next(iter(counts))!r}; a classifier needs two labels")
    if rare := {name: count for name, count in counts.items() if count < LEAST}:
        shown = ", ".join(f"{name!r} {count}" for name, count in list(rare.items())[:5])
        raise BadData(
            f"{path}: {len(rare)} of {len(counts)} labels have fewer than {LEAST} different texts ({shown}); bring "
            "more of them, join them to others, or leave them out"
        )


def _split(texts: list[str], labels: NDArray[np.int64], seed: int) -> NDArray[np.int8]:
    """[R] by a hash of the text alone; texts that differ in case, width or blanks alone are in one part. Of a label
    that chance leaves out of a part, the texts are divided in the order of their hashes."""
    kin: dict[str, str] = {}
    alike = [" ".join(unicodedata.normalize("NFKC", text).lower().split()) for text in texts]
    for text, form in zip(texts, alike, strict=True):
        kin[form] = min(kin.get(form, text), text)
    place = np.array([_place_of(kin[form], seed) for form in alike])
    split = np.asarray((place >= _TRAIN).astype(int) + (place >= _VALID), np.int8)
    for label in range(int(labels.max()) + 1):
        own: NDArray[np.int64] = np.flatnonzero(labels == label)
        if len(np.unique(split[own])) < len(SPLITS):
            order = own[np.argsort(place[own], kind="stable")]
            share = np.arange(len(order)) / len(order)
            split[order] = np.asarray((share >= _TRAIN).astype(int) + (share >= _VALID), np.int8)
    return split


def _place_of(text: str, seed: int) -> float:
    """Where a text falls between 0 and 1, by a hash of it alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{text}".encode()).digest()[:8], "little") / 2**64
