"""A dataset that tells less of people: keyed pseudonyms, nothing that few have in common, no time of day.

Whoever has the key can make the same pseudonyms again, so this is pseudonymisation as data protection law has it
(GDPR, article 4 (5)): with the key kept apart, or thrown away, nobody can go from a row to a person by its id.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import polars as pl
from trirank.contract import ANONYMOUS_USER

from trirank_build.data.dataset import REQUEST_ID, Dataset
from trirank_build.errors import BadData, BadUsage
from trirank_build.privacy.queries import plain, shared

KEY_BYTES = 32
NOTE = "anonymised"
"""Of a dataset's notes."""
_DAY_S = 86_400


@dataclass(frozen=True)
class Anonymiser:
    """What is done to a dataset.

    Attributes:
        key: of the pseudonyms; users get others under another key.
        k: an item or a query stays in what users did where so many of them did it.
        keep_times: whether times stay as they are; else the day and the order remain.
    """

    key: bytes
    k: int = 5
    keep_times: bool = False

    def __post_init__(self) -> None:
        """Raises BadUsage if a value is out of range."""
        if len(self.key) < KEY_BYTES:
            raise BadUsage(
                f"the key has {len(self.key)} bytes, and {KEY_BYTES} are needed; `trirank privacy key` makes one"
            )
        if self.k < 1:
            raise BadUsage(f"--k is {self.k}; it is how many users have to share an item or a query, from 1 on")

    def pseudonym(self, user: int) -> int:
        """Of a user id: the first 63 bits of HMAC-SHA256 (RFC 2104) under the key. Anonymous stays anonymous."""
        if user == ANONYMOUS_USER:
            return user
        said = hmac.new(self.key, user.to_bytes(8, "big", signed=True), hashlib.sha256).digest()
        return int.from_bytes(said[:8], "big") >> 1

    @property
    def fingerprint(self) -> str:
        """What tells keys apart, and tells nothing of them."""
        return hmac.new(self.key, b"trirank fingerprint", hashlib.sha256).hexdigest()[:12]

    def apply(self, dataset: Dataset) -> Dataset:
        """The dataset without what tells of a person.

        Events of rare items are left out, and requests in which somebody chose one. Requests with a rare query, or one
        with an address or a number in it, are left out; the others are written alike. Candidates and their scores stay:
        what a user's history, or the query, had retrieval find.

        Raises:
            BadData: the dataset was anonymised before, two users' pseudonyms are the same, or nothing is left.
        """
        refuse_anonymised(dataset, "anonymise the dataset that it was made of")
        if not dataset.events.height:
            raise BadData("the dataset names no users, as judged search does not, so there is nothing to anonymise")
        common = self._common_items(dataset)
        events = dataset.events.filter(pl.col("item_id").is_in(common))
        requests = dataset.requests.collect()
        queries = shared(requests.lazy(), self.k)
        is_asked = plain().is_in(list(queries)) | (pl.col("query").str.strip_chars() == "")
        asked = requests.filter(is_asked)
        choices = asked.select("item_ids", "labels").with_row_index("at").explode("item_ids", "labels")
        chosen = choices.filter((pl.col("labels") > 0) & ~pl.col("item_ids").is_in(common))["at"].unique()
        kept = asked.with_row_index("at").filter(~pl.col("at").is_in(chosen.implode())).drop("at")
        if not kept.height or not events.height:
            raise BadData(
                f"nothing is left of {requests.height:,} requests and {dataset.events.height:,} events at "
                f"k = {self.k}; take a smaller --k, or more data"
            )
        kept = kept.with_columns(plain().alias("query"))
        if REQUEST_ID in kept.columns:
            kept = kept.with_columns(pl.lit("").alias(REQUEST_ID))
        if dataset.description.timed and not self.keep_times:
            events, kept = _without_time_of_day(events, kept)
        # In an order that is nobody's: rows of one moment, or of one place in a day, by pseudonym.
        events, kept = (
            frame.sort("timestamp", "user_id", maintain_order=True) for frame in self._renamed(events, kept)
        )
        done = {
            "key": self.fingerprint, "k": self.k, "times": "kept" if self.keep_times else "days",
            "rare_items": dataset.items.height - len(common), "events_dropped": dataset.events.height - events.height,
            "requests_with_rare_queries": requests.height - asked.height,
            "requests_with_rare_choices": asked.height - kept.height,
        }  # fmt: skip
        notes: dict[str, Any] = dataset.description.notes | {NOTE: done}
        counts = dataset.description.counts | {
            "events": events.height, "users": events["user_id"].n_unique(), "requests": kept.height,
        }  # fmt: skip
        counts = {name: counts[name] for name in dataset.description.counts}
        description = replace(dataset.description, notes=notes, counts=counts)
        return replace(dataset, events=events, requests=kept.lazy(), description=description)

    def _common_items(self, dataset: Dataset) -> set[int]:
        seen = dataset.events.group_by("item_id").agg(users=pl.col("user_id").n_unique())
        return set(seen.filter(pl.col("users") >= self.k)["item_id"].to_list())

    def _renamed(self, events: pl.DataFrame, requests: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
        users = pl.concat([events["user_id"], requests["user_id"]]).unique()
        names = pl.Series([self.pseudonym(user) for user in users.to_list()], dtype=pl.Int64)
        if names.n_unique() != len(users):
            raise BadData("two users have one pseudonym under this key; take another key")
        table = pl.DataFrame({"user_id": users, "new": names})

        def renamed(frame: pl.DataFrame) -> pl.DataFrame:
            columns = frame.columns
            joined = frame.join(table, on="user_id", how="left", maintain_order="left")
            return joined.drop("user_id").rename({"new": "user_id"}).select(columns)

        return renamed(events), renamed(requests)


def _without_time_of_day(events: pl.DataFrame, requests: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Each moment of a user becomes its day and, in seconds, its place among the user's moments of that day: what came
    before what stays the same, and so does what happened at once."""
    moments = pl.concat([frame.select("user_id", "timestamp") for frame in (events, requests)]).unique()
    day = pl.col("timestamp") // _DAY_S
    places = moments.with_columns(
        new=day * _DAY_S + pl.col("timestamp").rank("dense").over("user_id", day).cast(pl.Int64) - 1
    )

    def coarse(frame: pl.DataFrame) -> pl.DataFrame:
        columns = frame.columns
        joined = frame.join(places, on=["user_id", "timestamp"], how="left", maintain_order="left")
        return joined.drop("timestamp").rename({"new": "timestamp"}).select(columns)

    return coarse(events), coarse(requests)


def refuse_anonymised(dataset: Dataset, instead: str) -> None:
    """Raises BadData for a dataset of pseudonyms, where ids of users are needed."""
    if NOTE in dataset.description.notes:
        raise BadData(f"the users of {dataset.description.source} are pseudonyms, which no caller sends; {instead}")


def make_key(file: Path) -> None:
    """Write a new key for its owner alone.

    Raises:
        BadUsage: there is a file already.
    """
    try:
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
            stream.write(secrets.token_hex(KEY_BYTES) + "\n")
    except OSError as error:
        raise BadUsage(f"{file} cannot be written ({error.strerror}); a key that is there is never replaced") from None


def read_key(file: Path) -> bytes:
    """The key of a file.

    Raises:
        BadUsage: there is none.
    """
    try:
        return bytes.fromhex(file.read_text().strip())
    except (OSError, ValueError) as error:
        raise BadUsage(f"{file} is no key ({error}); make one with `trirank privacy key {file}`") from None
