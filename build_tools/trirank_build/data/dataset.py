"""The dataset directory: three Parquet tables and a description.

``items.parquet``     one row an item: what is known of it
``events.parquet``    one row an interaction, in time order: who did what with which item, and its split
``requests.parquet``  one row a ranking task: candidates as retrieval gave them, and what came of them
``dataset.json``      schema version, source, cleaning report, tasks, counts, digest

Where there are master keys, events and requests are sealed (trirank_backend.sealed_files), and read into memory whole.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray
from trirank_backend.errors import InvalidStore
from trirank_backend.master_keys import MasterKeys, named_keys
from trirank_backend.sealed_files import SealedFile, key_of

from trirank_build.artefacts import atomic_directory, combined_digest, file_digest
from trirank_build.errors import BadData

SCHEMA_VERSION = 2
ROW_GROUP = 20_000
"""Requests that are read from the file at a time."""
SPLITS = ("train", "valid", "test")
SPLIT = pl.Enum(SPLITS)
"""As a column of events is held: a byte an event."""

ITEMS: dict[str, Any] = {
    "item_id": pl.Int64,
    "key": pl.String,  # the id as the source wrote it
    "title": pl.String,
    "brand": pl.String,
    "category": pl.String,
    "price": pl.Float64,  # NaN: unknown
    "product_id": pl.Int64,  # shared by variants of one product
    "created_at": pl.Int64,  # seconds since 1970; 0: unknown
    "attributes": pl.List(pl.String),
    "available": pl.Boolean,
    "seller": pl.String,
    "margin": pl.Float64,  # share of the price that is earned; NaN: unknown
    "regions": pl.List(pl.String),  # where it can be had; none: everywhere
}
EVENTS: dict[str, Any] = {
    "user_id": pl.Int64,
    "item_id": pl.Int64,
    "behaviour": pl.Int8,  # contract.Behaviour
    "timestamp": pl.Int64,  # seconds since 1970, or the place in the user's sequence
    "split": pl.String,
}
REQUESTS: dict[str, Any] = {
    "user_id": pl.Int64,
    "timestamp": pl.Int64,
    "query": pl.String,
    "scenario": pl.String,
    "item_ids": pl.List(pl.Int64),  # candidates, best first as retrieval saw them
    "retrieval_scores": pl.List(pl.Float32),  # NaN: put there by hand, retrieval had missed it
    "labels": pl.List(pl.Float32),  # gains
    "missed": pl.List(pl.Float32),  # gains of relevant items that retrieval did not find
    "split": pl.String,
}
OPTIMUM = "utility"
"""Extra column of requests, synthetic shop only: List(Float32), what the choices were drawn from."""

POSITIONS = "positions"
"""Extra column of requests that came with feedback: List(Int32), where each item stood on the page, from 1; 0: not
known."""
REQUEST_ID = "request_id"
"""Extra column of requests: String, what feedback names them by, so that what comes later is added to them; empty: not
known."""
SENTIMENT, REVIEWS = "sentiment", "reviews"
"""Extra columns of items that came with reviews: Float64, share of them that are positive; Int64, how many."""
_EXTRA = (OPTIMUM, POSITIONS, REQUEST_ID, SENTIMENT, REVIEWS)

GAINS = {"VIEW": 0.0, "CLICK": 1.0, "FAVOURITE": 2.0, "CART": 2.0, "PURCHASE": 3.0}
"""Behaviour → gain in NDCG and in ``labels``."""
LENT = 0.8
"""Share of the validation split's users."""
TASKS = {"click": 1.0, "cart": 2.0, "purchase": 3.0}
"""Task → the smallest label that counts as a success."""
GRADED_TASKS = {"relevance": 0.0}
"""Human judgements: one task whose target is the label itself."""


@dataclass(frozen=True)
class Description:
    """What ``dataset.json`` says.

    Attributes:
        timed: whether timestamps are times; if not they only order a user's events.
        tasks: task → the smallest label that counts; 0: the label itself is the target.
        cleaning: (rule, rows in, rows out), in the order in which they ran.
        notes: ``read``: how the source's values were read, a line each.
        ids: whether ids of ``item`` and ``user`` are ``numbers`` or ``strings`` (hashed by contract.stable_id).
        digest: SHA-256 over the tables.
    """

    source: str
    timed: bool
    tasks: dict[str, float]
    counts: dict[str, int]
    cleaning: list[tuple[str, int, int]]
    digest: str = ""
    schema_version: int = SCHEMA_VERSION
    notes: dict[str, Any] = field(default_factory=dict)
    ids: dict[str, str] = field(default_factory=lambda: {"item": "numbers", "user": "numbers"})


class SplitSizes(NamedTuple):
    """Of the requests of one split: how many, and the longest lists of candidates and of missed gains."""

    requests: int
    candidates: int
    missed: int
    has_optimum: bool


@dataclass(frozen=True)
class Dataset:
    """A prepared dataset: items and events in memory; requests, which are far larger, read when they are needed."""

    items: pl.DataFrame
    events: pl.DataFrame
    requests: pl.LazyFrame
    description: Description

    def split(self, name: str) -> pl.DataFrame:
        """The requests of ``train``, ``valid`` or ``test``, all at once."""
        return self.requests.filter(pl.col("split") == name).collect()

    def sizes(self, name: str) -> SplitSizes:
        """Sizes of a split, without reading it at once."""
        found = (
            self.requests.filter(pl.col("split") == name)
            .select(
                count=pl.len(),
                candidates=pl.col("item_ids").list.len().max(),
                missed=pl.col("missed").list.len().max(),
            )
            .collect()
        )
        count, most, missed = found.row(0)
        return SplitSizes(count, most or 0, missed or 0, OPTIMUM in self.requests.collect_schema().names())

    def chunks(self, name: str, rows: int, columns: tuple[str, ...] | None = None) -> Iterator[pl.DataFrame]:
        """The requests of a split in their order, from ``rows`` of the table at a time; all columns, or these."""
        total = int(self.requests.select(pl.len()).collect().item())
        table = self.requests if columns is None else self.requests.select(*columns, "split")
        for start in range(0, total, rows):
            yield table.slice(start, rows).collect().filter(pl.col("split") == name)

    def lent_users(self, seed: int) -> NDArray[np.int64]:
        """Users of the validation split whose part of it a ranker with held-out requests learns from: LENT of them, all
        but one at most."""
        users = self.events.filter(pl.col("split") == "valid")["user_id"].unique().sort().to_numpy()
        order = np.random.default_rng(seed).permutation(users)
        return np.sort(order[: max(1, min(int(len(order) * LENT), len(order) - 1))])

    def with_lent(self, seed: int) -> Dataset:
        """The same data with what was lent to training in the training split: what such a ranker may be fitted on, and
        is no longer judged by."""
        learnt = (pl.col("split") == "valid") & pl.col("user_id").is_in(self.lent_users(seed))
        split = pl.when(learnt).then(pl.lit("train")).otherwise(pl.col("split").cast(pl.String)).alias("split")
        events = self.events.with_columns(split.cast(SPLIT))
        return replace(self, events=events, requests=self.requests.with_columns(split))

    def training_choices(self) -> NDArray[np.int64]:
        """Item ids of the training events, one a choice; judged search has none."""
        return self.events.filter(pl.col("split") == "train")["item_id"].to_numpy()

    def training_events(self) -> pl.DataFrame:
        """The training events, each user's in their order, one user after the other."""
        training = self.events.lazy().filter(pl.col("split") == "train").drop("split")
        return training.sort("user_id", "timestamp", maintain_order=True).collect()

    def check_ids(self) -> None:
        """Hold events and candidates to the item table.

        Raises:
            BadData: an id is out of range: it is none of the items'.
        """
        candidates = self.requests.select(pl.col("item_ids").explode().alias("item_id"))
        for name, ids in (("an event", self.events.lazy().select("item_id")), ("a request", candidates)):
            unknown = ids.unique().filter(~pl.col("item_id").is_in(self.items["item_id"].implode())).head(1).collect()
            if unknown.height:
                raise BadData(
                    f"{name} has the item {unknown.item()}, which is none of the {self.items.height:,} items; add it "
                    "to the item table, or leave it out"
                )

    def save(self, directory: Path) -> Path:
        """Write whole or not at all; gives the directory.

        Raises:
            BadData: an event or a request has an item that the item table lacks.
        """
        self.check_ids()
        with atomic_directory(directory) as scratch:
            digests, sealed, masters = {}, {}, named_keys()
            if masters is not None:
                scratch.chmod(0o700)  # tables lie there in the clear until they are whole
            for name, schema in (("items", ITEMS), ("events", EVENTS), ("requests", REQUESTS)):
                frame: pl.LazyFrame = getattr(self, name).lazy()
                extra = [name for name in _EXTRA if name in frame.collect_schema().names()]
                path = scratch / f"{name}.parquet"
                columns = [*(pl.col(c).cast(t) for c, t in schema.items()), *extra]
                frame.select(columns).sink_parquet(path, row_group_size=ROW_GROUP)
                digests[path.name] = file_digest(path)
                if masters is not None and name != "items":  # known by what it holds, whatever the key
                    _seal(path, masters)
                    sealed[path.name] = file_digest(path)
            description = asdict(self.description) | {"digest": combined_digest(digests), "files": digests | sealed}
            description |= {"sealed": sorted(sealed)} if sealed else {}
            (scratch / "dataset.json").write_text(json.dumps(description, indent=1) + "\n")
        return directory

    @classmethod
    def load(cls, directory: Path) -> Dataset:
        """Read and check a dataset directory.

        Raises:
            BadData: it is missing, damaged, or of another schema.
        """
        path = directory / "dataset.json"
        try:
            raw = json.loads(path.read_text())
            files, sealed = raw.pop("files"), raw.pop("sealed", [])
            raw["cleaning"] = [tuple(row) for row in raw["cleaning"]]
            description = Description(**raw)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise BadData(
                f"{path} cannot be read ({error}); run `trirank data prepare SOURCE --out {directory}`"
            ) from error
        if description.schema_version != SCHEMA_VERSION:
            raise BadData(
                f"{directory} has schema version {description.schema_version}, this version reads {SCHEMA_VERSION}; "
                "prepare it again"
            )
        frames: dict[str, Any] = {}
        for name, digest in files.items():
            if not (directory / name).is_file() or file_digest(directory / name) != digest:
                raise BadData(f"{directory / name} is missing or differs from what was written; prepare it again")
            table = name.removesuffix(".parquet")
            frames[table] = _scan(directory / name, name in sealed)
            if table == "events":
                frames[table] = frames[table].with_columns(pl.col("split").cast(SPLIT))
            if table != "requests":
                frames[table] = frames[table].collect()
        return cls(**frames, description=description)


def _seal(path: Path, masters: MasterKeys) -> None:
    """Put a sealed file in the place of a plain one."""
    key, scratch = SealedFile.create(path, masters), path.with_name(path.name + ".sealing")
    with path.open("rb") as source, scratch.open("wb") as target:
        scratch.chmod(0o600)
        target.writelines(key.chunks(source))
    scratch.replace(path)


def _scan(path: Path, sealed: bool) -> pl.LazyFrame:
    """A table; a sealed one is in memory then.

    Raises:
        BadData: it is sealed, and its own key or its master key is not there.
    """
    if not sealed:
        return pl.scan_parquet(path)
    try:
        key = SealedFile.open(path)
        if key is None:
            raise BadData(f"{path} is sealed, and {key_of(path).name} is not beside it; copy it, too")
        with path.open("rb") as source:
            return pl.read_parquet(io.BytesIO(key.table(source))).lazy()
    except (InvalidStore, ValueError) as error:
        raise BadData(str(error) if isinstance(error, InvalidStore) else f"{path}: {error}; prepare it again") from None
