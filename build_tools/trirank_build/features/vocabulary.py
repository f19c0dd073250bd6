"""Which number a value has: fitted once, kept beside the features, and used again when the catalogue is a newer one.

An item that training has not met has no number of its own and lives by its content; so does a brand that is new.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from trirank_build.data.dataset import REVIEWS, SENTIMENT
from trirank_build.errors import BadCheckpoint

PRICE_BUCKETS = 20
FILE = "vocabulary.npz"
_LEAST_SENTIMENT = 0.05
"""Deviation of shares that are all but alike: a later one that differs a little would be far outside."""


@dataclass(frozen=True)
class Vocabulary:
    """What codes mean, from 1; code 0 is "missing" or "not known".

    Attributes:
        item: [I] int64 ids that training met, ascending.
        brand, category, attribute: [·] strings, ascending.
        price_edges: [E] of quantile buckets of log prices.
        price: [2] mean and deviation of log prices; empty: no price was known.
        popularity: [2] mean and deviation of log1p of how often an item was chosen.
        reviews: [3] mean and deviation of the share of positive reviews, mean log1p of their number, of items that have
            some; empty: none has any.
        attribute_slots: [1] attributes of an item that are kept.
    """

    item: NDArray[np.int64]
    brand: NDArray[np.str_]
    category: NDArray[np.str_]
    attribute: NDArray[np.str_]
    price_edges: NDArray[np.float64]
    price: NDArray[np.float64]
    popularity: NDArray[np.float64]
    reviews: NDArray[np.float64]
    attribute_slots: NDArray[np.int64]

    @classmethod
    def fit(cls, items: pl.DataFrame, counts: NDArray[np.int64], slots: int) -> Vocabulary:
        """Of a catalogue.

        Args:
            counts: [M] how often training chose each item.
            slots: most attributes of an item to keep.
        """
        slots = min(slots, int(str(items["attributes"].list.len().max() or 0)))
        log = _log_prices(items)
        known = log[np.isfinite(log)]
        log_counts = np.log1p(counts)
        return cls(
            item=items["item_id"].to_numpy()[counts > 0],
            brand=_words(items["brand"]),
            category=_words(items["category"]),
            attribute=_words(pl.concat(_slots(items, slots))) if slots else np.zeros(0, np.str_),
            price_edges=np.unique(np.quantile(known, np.linspace(0, 1, PRICE_BUCKETS + 1)[1:-1]))
            if len(known) else np.zeros(0),
            price=np.array([known.mean(), max(known.std(), 1e-6)]) if len(known) else np.zeros(0),
            popularity=np.array([log_counts.mean(), log_counts.std()]),
            reviews=_of_reviews(items),
            attribute_slots=np.array([slots]),
        )  # fmt: skip

    def grown(self, items: pl.DataFrame, counts: NDArray[np.int64]) -> Vocabulary:
        """With what a newer catalogue has besides; what is known of prices and popularity stays, so that numbers mean
        what they meant."""
        met = items["item_id"].to_numpy()[counts > 0]
        attributes = _words(pl.concat(_slots(items, self.slots))) if self.slots else self.attribute
        return replace(
            self,
            item=np.union1d(self.item, met),
            brand=np.union1d(self.brand, _words(items["brand"])),
            category=np.union1d(self.category, _words(items["category"])),
            attribute=np.union1d(self.attribute, attributes),
        )

    @property
    def sizes(self) -> dict[str, int]:
        """Codes of each table, the missing one not counted."""
        return {
            "item": len(self.item), "brand": len(self.brand), "category": len(self.category),
            "price": len(self.price_edges) + 1 if len(self.price) else 0, "attribute": len(self.attribute),
        }  # fmt: skip

    @property
    def slots(self) -> int:
        """Attributes of an item."""
        return int(self.attribute_slots[0])

    def codes(self, items: pl.DataFrame) -> dict[str, NDArray[np.int64]]:
        """[M] of each field: item, brand, category, price."""
        log = _log_prices(items)
        bucket = 1 + np.searchsorted(self.price_edges, log, side="right")
        return {
            "item": _places(self.item, items["item_id"].to_numpy()),
            "brand": _places_of_words(self.brand, items["brand"]),
            "category": _places_of_words(self.category, items["category"]),
            "price": np.where(np.isfinite(log) & (len(self.price) > 0), bucket, 0),
        }

    def attribute_codes(self, items: pl.DataFrame) -> NDArray[np.int64]:
        """[M, slots]"""
        if not self.slots:
            return np.zeros((items.height, 0), np.int64)
        return np.stack([_places_of_words(self.attribute, slot) for slot in _slots(items, self.slots)], 1)

    def numbers(self, items: pl.DataFrame, counts: NDArray[np.int64]) -> NDArray[np.float64]:
        """[M, 4] standardised log price (0: not known), standardised log popularity, standardised share of positive
        reviews (0: it has none), log1p of their number by its mean."""
        log = _log_prices(items)
        mean, deviation = self.price if len(self.price) else (0.0, 1.0)
        price = np.where(np.isfinite(log) & (len(self.price) > 0), (log - mean) / deviation, 0)
        mean, deviation = self.popularity
        popularity = (np.log1p(counts) - mean) / deviation if deviation > 0 else np.zeros(len(counts))
        sentiment, number = _reviews(items)
        known = (number > 0) & (len(self.reviews) > 0)
        mean, deviation, of_number = self.reviews if len(self.reviews) else (0.0, 1.0, 1.0)
        sentiment = np.where(known, (sentiment - mean) / deviation, 0)
        return np.stack([price, popularity, sentiment, np.where(known, np.log1p(number) / of_number, 0)], 1)

    def save(self, directory: Path) -> None:
        """Write ``vocabulary.npz``."""
        np.savez_compressed(directory / FILE, **{field.name: getattr(self, field.name) for field in fields(self)})

    @classmethod
    def load(cls, directory: Path) -> Vocabulary:
        """Read what ``save`` wrote.

        Raises:
            BadCheckpoint: it is missing or damaged.
        """
        try:
            with np.load(directory / FILE, allow_pickle=False) as read:
                return cls(**{field.name: read[field.name] for field in fields(cls)})
        except (OSError, ValueError, KeyError) as error:
            raise BadCheckpoint(
                f"{directory / FILE} cannot be read ({error}), so nothing says which number a brand has; train again"
            ) from error


def _words(values: pl.Series) -> NDArray[np.str_]:
    found = values.drop_nulls().unique()
    return found.filter(found != "").sort().to_numpy().astype(str)


def _slots(items: pl.DataFrame, slots: int) -> list[pl.Series]:
    return [items["attributes"].list.get(at, null_on_oob=True).fill_null("") for at in range(slots)]


def _log_prices(items: pl.DataFrame) -> NDArray[np.float64]:
    """[M] NaN where it is not known."""
    price = items["price"].to_numpy()
    known = np.isfinite(price) & (price > 0)
    return np.where(known, np.log(np.where(known, price, 1)), np.nan)


def _reviews(items: pl.DataFrame) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """[M] share of positive reviews, and their number; 0 where nothing says so."""
    if SENTIMENT not in items.columns:
        return np.zeros(items.height), np.zeros(items.height)
    return items[SENTIMENT].fill_null(0).to_numpy(), items[REVIEWS].fill_null(0).to_numpy().astype(np.float64)


def _of_reviews(items: pl.DataFrame) -> NDArray[np.float64]:
    """Vocabulary.reviews"""
    sentiment, number = _reviews(items)
    known = number > 0
    if not known.any():
        return np.zeros(0)
    mean, deviation = sentiment[known].mean(), float(sentiment[known].std())
    return np.array([mean, max(deviation, _LEAST_SENTIMENT), np.log1p(number[known]).mean()])


def _places_of_words(known: NDArray[np.str_], values: pl.Series) -> NDArray[np.int64]:
    """The same of words. An array of strings has room for the longest in every row, so none is made of M values."""
    words = pl.Series(known.tolist(), dtype=pl.String)
    places = pl.Series(np.arange(1, len(known) + 1, dtype=np.int64))
    return values.replace_strict(words, places, default=0, return_dtype=pl.Int64).to_numpy()


def _places(known: NDArray[Any], values: NDArray[Any]) -> NDArray[np.int64]:
    """1, 2, … for the place of each value among the ascending ``known``; 0 for one that is not among them."""
    if not len(known):
        return np.zeros(len(values), np.int64)
    at = np.minimum(np.searchsorted(known, values), len(known) - 1)
    return np.where(known[at] == values, at + 1, 0).astype(np.int64)
