"""Dataset → what ``trirank_backend.features`` needs: vocabulary, tokeniser, catalogue.

Statistics and vocabularies of behaviour come from the training split alone; the catalogue's own words (titles,
brands, categories, attributes) are known of every item before anybody meets it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from trirank.contract import Behaviour, Signal
from trirank_backend.catalogue import Catalogue
from trirank_backend.features import TIME_GAPS, FeatureSpec, Packer
from trirank_backend.release import load_packer
from trirank_backend.text import TextEncoder, title_trigrams

from trirank_build.baselines.popularity import popularity
from trirank_build.data.dataset import Dataset
from trirank_build.recipe import FeatureRecipe

PRICE_BUCKETS = 20
POPULAR_SHARE = 0.05
"""The most chosen share of items counts as popular."""


@dataclass(frozen=True)
class Features:
    """Fitted features: specification, catalogue, tokeniser, rarity of tokens."""

    packer: Packer
    text: TextEncoder

    @property
    def spec(self) -> FeatureSpec:
        """The feature specification."""
        return self.packer.spec

    @property
    def catalogue(self) -> Catalogue:
        """The items."""
        return self.packer.catalogue

    @classmethod
    def load(cls, directory: Path) -> Features:
        """Read a ``features`` folder."""
        return cls(*load_packer(directory))

    def changed(self, **changes: Any) -> Features:
        """The same catalogue and tokeniser under a specification with other values."""
        return Features(Packer(replace(self.spec, **changes), self.catalogue, self.packer.token_idf), self.text)


def fit_features(dataset: Dataset, recipe: FeatureRecipe, directory: Path) -> Features:
    """Fit on the training split and write to ``directory``, which must exist."""
    items = dataset.items
    counts = popularity(dataset.training_choices(), items["item_id"].to_numpy())
    has_text = bool((items["title"] != "").any())
    titles = recipe.title_length if has_text else 0
    slots = min(recipe.attribute_slots, int(str(items["attributes"].list.len().max() or 0)))
    tokenizer = _tokenizer(dataset, recipe.vocabulary if has_text else 2)

    prices, price_codes = _prices(items)
    products = np.unique(items["product_id"].to_numpy(), return_inverse=True)[1]
    columns: dict[str, NDArray[np.int64]] = {
        "item": _item_codes(counts),
        "brand": _codes(items["brand"]),
        "category": _codes(items["category"]),
        "price": price_codes,
    }
    attribute_codes = _attribute_codes(items, slots)
    sizes = {name: int(values.max(initial=0)) for name, values in columns.items()}
    sizes["attribute"] = int(attribute_codes.max(initial=0))
    sizes["behaviour"] = len(Behaviour)
    sizes["time_gap"] = TIME_GAPS
    sizes["token"] = tokenizer.get_vocab_size()
    # Code c of a table is row first + c of the joint vocabulary; code 0 is "missing" and stays row 0 for all.
    tables, first = {}, 1
    for name, size in sizes.items():
        offset = first - 1 if name != "time_gap" else first  # gaps count from 0
        tables[name] = (offset, size + 1)
        first += size + 1
    spec = FeatureSpec(
        history_length=recipe.history_length,
        query_length=recipe.query_length,
        item_fields=(
            *columns,
            *(f"attribute_{at}" for at in range(slots)),
            *(f"title_{at}" for at in range(titles if recipe.embed_text else 0)),
        ),
        tables=tables,
        tasks=tuple(dataset.description.tasks),
        timed=dataset.description.timed,
        embed_text=recipe.embed_text,
        without=tuple(sorted(recipe.without)),
    )
    text = TextEncoder(tokenizer, tables["token"][0])
    tokens = text.encode(items["title"].to_list(), titles) if titles else np.zeros((items.height, 0), np.int32)
    fields = np.concatenate(
        [
            *(_joint(values[:, None], tables[name][0]) for name, values in columns.items()),
            _joint(attribute_codes, tables["attribute"][0]),
            *([tokens] if recipe.embed_text else []),
        ],
        axis=1,
    )
    log_counts = np.log1p(counts)
    static = np.stack([prices, _standardised(log_counts)], 1)
    popular = counts >= max(float(np.quantile(counts, 1 - POPULAR_SHARE)), 1.0)
    signals = popular * Signal.POPULAR.value + ~items["available"].to_numpy() * Signal.UNAVAILABLE.value
    catalogue = Catalogue(
        ids=items["item_id"].to_numpy(),
        fields=_with_no_item(fields.astype(np.int32), 0),
        dense=_with_no_item(static.astype(np.float32), 0),
        products=_with_no_item(products.astype(np.int32), -1),
        created_at=_with_no_item(items["created_at"].to_numpy(), 0),
        signals=_with_no_item(signals.astype(np.int32), 0),
        titles=_with_no_item(tokens, 0),
        trigrams=_with_no_item(
            title_trigrams(items["title"].to_list()) if titles else np.zeros((items.height, 0), np.uint8), 0
        ),
    )
    catalogue.save(directory / "catalogue")
    spec.save(directory / "features.json")
    tokenizer.save(str(directory / "tokenizer.json"))
    np.save(directory / "token_idf.npy", _idf(tokens, spec.vocabulary_size))
    return Features.load(directory)


def _item_codes(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """1, 2, … for items that training saw; 0 for the others, which live by their content."""
    return np.where(counts > 0, np.cumsum(counts > 0), 0)


def _codes(values: pl.Series) -> NDArray[np.int64]:
    """1, 2, … for the values in sorted order; 0 for an empty one."""
    known, codes = np.unique(values.to_numpy().astype(str), return_inverse=True)
    return np.asarray(codes + (0 if len(known) and known[0] == "" else 1), np.int64)


def _prices(items: pl.DataFrame) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Standardised log price (0: unknown), and its quantile bucket from 1 (0: unknown)."""
    price = items["price"].to_numpy()
    known = np.isfinite(price) & (price > 0)
    if not known.any():
        return np.zeros(len(price)), np.zeros(len(price), np.int64)
    log = np.log(np.where(known, price, 1))
    edges = np.unique(np.quantile(log[known], np.linspace(0, 1, PRICE_BUCKETS + 1)[1:-1]))
    return (
        np.where(known, (log - log[known].mean()) / max(log[known].std(), 1e-6), 0),
        np.where(known, 1 + np.searchsorted(edges, log, side="right"), 0),
    )


def _attribute_codes(items: pl.DataFrame, slots: int) -> NDArray[np.int64]:
    """[M, slots]"""
    lists = items["attributes"]
    columns = [lists.list.get(at, null_on_oob=True).fill_null("") for at in range(slots)]
    if not columns:
        return np.zeros((items.height, 0), np.int64)
    return _codes(pl.concat(columns)).reshape(slots, items.height).T


def _tokenizer(dataset: Dataset, vocabulary: int) -> Tokenizer:
    """Subwords (BPE) of titles and training queries. Id 0 is padding."""
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["[PAD]", "[UNK]"], min_frequency=2, show_progress=False
    )
    texts = [*dataset.items["title"].to_list(), *dataset.split("train")["query"].to_list()]
    tokenizer.train_from_iterator((text for text in texts if text), trainer)
    return tokenizer


def _joint(codes: NDArray[np.int64], offset: int) -> NDArray[np.int64]:
    return np.where(codes > 0, codes + offset, 0)


def _idf(tokens: NDArray[np.int32], vocabulary_size: int) -> NDArray[np.float32]:
    """[V] log(1 + M / (1 + titles with the token))"""
    row = np.broadcast_to(np.arange(len(tokens))[:, None], tokens.shape)
    pairs = np.unique(np.stack([row[tokens > 0], tokens[tokens > 0]], 1), axis=0)
    frequency = np.bincount(pairs[:, 1] if len(pairs) else np.zeros(0, np.int64), minlength=vocabulary_size)
    return np.log1p(len(tokens) / (1 + frequency)).astype(np.float32)


def _standardised(values: NDArray[np.float64]) -> NDArray[np.float64]:
    deviation = values.std()
    return (values - values.mean()) / deviation if deviation > 0 else np.zeros_like(values)


def _with_no_item(column: NDArray[Any], fill: int) -> NDArray[Any]:
    """Append the row that stands for "no item"."""
    last = np.full((1, *column.shape[1:]), fill, column.dtype)
    return np.concatenate([column, last])
