"""Dataset → what ``trirank_backend.features`` needs: vocabulary, tokeniser, catalogue.

Statistics and vocabularies of behaviour come from the training split alone; the catalogue's own words (titles,
brands, categories, attributes) are known of every item before anybody meets it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from trirank.contract import Behaviour, Signal
from trirank_backend.catalogue import Catalogue
from trirank_backend.features import DENSE, TIME_GAPS, FeatureSpec, Packer, Transitions
from trirank_backend.features import WORDS as WORD_COLUMNS
from trirank_backend.release import load_packer
from trirank_backend.text import TextEncoder, title_trigrams
from trirank_backend.words.lexicon import FOLDER as WORDS
from trirank_backend.words.lexicon import Lessons, load_words
from trirank_backend.words.queries import LONGEST, QueryReader
from trirank_backend.words.spelling import Speller

from trirank_build.baselines.popularity import popularity
from trirank_build.data.dataset import Dataset
from trirank_build.errors import BadData
from trirank_build.features.transitions import count_transitions, training_sequences
from trirank_build.features.vocabulary import Vocabulary
from trirank_build.privacy.budget import private_counts
from trirank_build.privacy.queries import plain, shared
from trirank_build.progress import warn
from trirank_build.recipe import FeatureRecipe, PrivacyRecipe
from trirank_build.words.lessons import PAIRS, Judged, fit_lessons, load_folds
from trirank_build.words.lexicon import fit_lexicon, refreshed_lexicon

TITLES = 1_000_000
"""Titles that the tokeniser learns from: the words of more are the same ones."""
_CHUNK = 65_536
"""Titles and queries that are in memory as Python's strings at a time."""
_FIELDS = ("item", "brand", "category", "price")
_ASKED = 5
"""Users that have asked a query before a release keeps its vector."""
POPULAR_SHARE = 0.05
"""The most chosen share of items counts as popular."""


@dataclass(frozen=True)
class Features:
    """Fitted features: specification, catalogue, tokeniser, rarity of tokens."""

    packer: Packer
    text: TextEncoder
    folds: tuple[Features, ...] = ()
    """The same with lessons on words that were learned without a part of the training requests' queries, by
    lessons.fold_of; empty where words are not understood, or taught nothing."""

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
        packer, text = load_packer(directory)
        found = cls(packer, text)
        if not packer.spec.words:
            return found
        lessons = load_folds(directory / WORDS, len(packer.lexicon.rarity) - 1)
        return replace(found, folds=tuple(found._with(packer.spec, each) for each in lessons))

    def changed(self, **changes: Any) -> Features:
        """The same catalogue and tokeniser under a specification with other values."""
        spec = replace(self.spec, **changes)
        folds = tuple(fold._with(spec, fold.packer.lessons) for fold in self.folds)
        return replace(self._with(spec, self.packer.lessons), folds=folds)

    def _with(self, spec: FeatureSpec, lessons: Lessons) -> Features:
        """The same catalogue and tokeniser under another specification, and with other lessons on words."""
        packer, text = self.packer, self.text
        if text.reader is not None and lessons is not packer.lessons:
            text = text.with_reader(text.reader.of(lessons))
        return Features(
            Packer(spec, self.catalogue, packer.token_idf, packer.transitions, packer.lexicon, lessons), text
        )


def fit_features(
    dataset: Dataset,
    recipe: FeatureRecipe,
    directory: Path,
    known: Path | None = None,
    privacy: PrivacyRecipe | None = None,
) -> Features:
    """Fit on the training split and write to ``directory``, which must exist.

    Args:
        known: the ``features`` folder of an earlier run, whose words and values keep their meaning and are added to.
        privacy: counts of items with noise, and words of titles alone.
    """
    items, ids = dataset.items, dataset.items["item_id"].to_numpy()
    if privacy is None:
        counts = popularity(dataset.training_choices(), ids)
    else:
        counts = private_counts(dataset.training_events(), ids, privacy)
    has_text = bool((items["title"] != "").any())
    titles = recipe.title_length if has_text else 0
    if known is None:
        texts = _texts(dataset, queries=privacy is None)
        tokenizer = _tokenizer(texts, recipe.vocabulary if has_text else 2)
        vocabulary = Vocabulary.fit(items, counts, recipe.attribute_slots)
    else:
        tokenizer = Tokenizer.from_file(str(known / "tokenizer.json"))
        vocabulary = Vocabulary.load(known).grown(items, counts)
    vocabulary.save(directory)

    sizes = vocabulary.sizes
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
            *_FIELDS,
            *(f"attribute_{at}" for at in range(vocabulary.slots)),
            *(f"title_{at}" for at in range(titles if recipe.embed_text else 0)),
        ),
        tables=tables,
        tasks=tuple(dataset.description.tasks),
        timed=dataset.description.timed,
        embed_text=recipe.embed_text,
        without=tuple(sorted({*recipe.without, *(() if recipe.transitions else ("transitions",))})),
        dense=DENSE + WORD_COLUMNS if recipe.words and has_text else DENSE,
        words=recipe.words if has_text else "",
    )
    text = TextEncoder(tokenizer, tables["token"][0])
    catalogue = _catalogue(items, counts, vocabulary, spec, text, titles)
    if known is not None:
        theirs = Features.load(known)
        moved = spec.tables["token"][0] - theirs.spec.tables["token"][0]
        _check_same_shop(theirs.catalogue, catalogue, dataset.description.source, moved)
    catalogue.save(directory / "catalogue")
    spec.save(directory / "features.json")
    tokenizer.save(str(directory / "tokenizer.json"))
    attributes = [at for at, name in enumerate(spec.item_fields) if name.startswith("attribute_")]
    words = np.concatenate([catalogue.titles, catalogue.fields[:, attributes]], 1)[:-1]
    np.save(directory / "token_idf.npy", _idf(words, spec.vocabulary_size))
    _transitions(dataset, catalogue, spec).save(directory)
    if recipe.words and not spec.words:
        warn("features.words: the catalogue has no titles, so there are no words to understand")
    if spec.words:
        encoder = Path(recipe.encoder) if recipe.encoder else None
        _fit_words(dataset, catalogue, spec.words, directory / WORDS, encoder)
    return Features.load(directory)


def _fit_words(dataset: Dataset, catalogue: Catalogue, language: str, directory: Path, encoder: Path | None) -> None:
    """What titles and training requests teach of words."""
    lexicon = fit_lexicon(dataset.items["title"], language, directory, encoder)
    words = len(lexicon.rarity) - 1
    reader = QueryReader(load_words(directory), language, Speller.load(directory), lexicon, Lessons.none(words))
    fit_lessons(_judged(dataset, catalogue), reader, directory)


def _judged(dataset: Dataset, catalogue: Catalogue) -> Judged:
    """Training requests with queries, some by chance where there are many."""
    asked = dataset.requests.filter((pl.col("split") == "train") & (pl.col("query") != ""))
    sizes = asked.select(pl.col("item_ids").list.len()).collect().to_series().to_numpy().astype(np.int64)
    order = np.random.default_rng(0).permutation(len(sizes))
    kept = np.zeros(len(sizes), bool)
    kept[order[np.cumsum(sizes[order]) <= PAIRS]] = True
    # A query that few have asked is kept by itself where nobody is behind it: where people judged.
    by_users = dataset.events.height > 0
    told = plain().is_in(list(shared(asked, _ASKED))) if by_users else pl.lit(True)
    columns = asked.select(pl.col("query").str.slice(0, LONGEST), "item_ids", "labels", told.alias("told"))
    requests = columns.filter(pl.Series(kept)).collect() if len(kept) else columns.collect()
    candidates = requests.explode("item_ids", "labels")
    return Judged(
        queries=requests["query"].to_list(),
        request=np.repeat(np.arange(requests.height), sizes[kept]),
        rows=catalogue.rows(candidates["item_ids"].to_numpy()).astype(np.int64),
        labels=candidates["labels"].to_numpy(),
        categories=catalogue.fields[:, _FIELDS.index("category")],
        told=requests["told"].to_numpy() if by_users else None,
    )


def refresh_features(trained: Path, dataset: Dataset, directory: Path) -> Features:
    """The catalogue of a newer dataset in the words that a ranker was trained with, and all else as it was.

    Args:
        trained: the ``features`` folder of a training run.
        directory: to write to; must exist.

    Raises:
        BadCheckpoint: the run is older than vocabularies are kept.
        BadData: its items are others.
    """
    old, vocabulary, items = Features.load(trained), Vocabulary.load(trained), dataset.items
    for path in trained.iterdir():
        if path.is_file():
            shutil.copyfile(path, directory / path.name)
    counts = popularity(dataset.training_choices(), items["item_id"].to_numpy())
    titles = old.catalogue.titles.shape[1]
    catalogue = _catalogue(items, counts, vocabulary, old.spec, old.text, titles)
    _check_same_shop(old.catalogue, catalogue, dataset.description.source)
    catalogue.save(directory / "catalogue")
    _transitions(dataset, catalogue, old.spec).save(directory)
    if old.spec.words:
        refreshed_lexicon(trained / WORDS, items["title"], old.spec.words, directory / WORDS)
    return Features.load(directory)


def _check_same_shop(old: Catalogue, new: Catalogue, source: str, moved: int = 0) -> None:
    """Where ids are small numbers, those of any two shops agree; what they stand for does not.

    Args:
        moved: by how much words' numbers have grown since; brands and categories are not compared then.

    Raises:
        BadData: most items that both have are other items now.
    """
    rows = old.rows(new.ids)
    known = rows >= 0
    # Titles where there are any, else brand and category; prices change.
    then, now = (old.titles, new.titles) if old.titles.shape[1] else (old.fields[:, 1:3], new.fields[:, 1:3])
    if moved and not old.titles.shape[1]:
        return
    then = np.where(then > 0, then + moved, 0)
    then, now = then[rows[known]], now[:-1][known]
    told = (then != 0).any(1) | (now != 0).any(1)  # of an item without title, brand and category nothing is known
    same = (then == now).all(1)[told]
    if not known.any() or (len(same) and same.mean() < 0.5):
        raise BadData(
            f"{source} is no newer state of what the ranker was trained on: of its {len(new):,} items {known.sum():,} "
            f"were there, {same.sum():,} of these as they were. Give a newer dataset of the same shop, or train anew"
        )


def _catalogue(
    items: pl.DataFrame, counts: NDArray[np.int64], vocabulary: Vocabulary, spec: FeatureSpec, text: TextEncoder,
    titles: int,
) -> Catalogue:  # fmt: skip
    """Args:
    counts: [M] how often training chose each item.
    titles: tokens of a title.
    """
    named = items["title"]
    tokens = np.zeros((items.height, 0), np.int32)
    if titles:
        tokens = _of_titles(named, lambda part: text.encode(part, titles))
    fields = np.concatenate(
        [
            *(_joint(codes[:, None], spec.tables[name][0]) for name, codes in vocabulary.codes(items).items()),
            _joint(vocabulary.attribute_codes(items), spec.tables["attribute"][0]),
            *([tokens] if spec.embed_text else []),
        ],
        axis=1,
    )
    popular = counts >= max(float(np.quantile(counts, 1 - POPULAR_SHARE)), 1.0)
    signals = popular * Signal.POPULAR.value + ~items["available"].to_numpy() * Signal.UNAVAILABLE.value
    products = np.unique(items["product_id"].to_numpy(), return_inverse=True)[1]
    return Catalogue(
        ids=items["item_id"].to_numpy(),
        fields=_with_no_item(fields.astype(np.int32), 0),
        dense=_with_no_item(vocabulary.numbers(items, counts).astype(np.float32), 0),
        products=_with_no_item(products.astype(np.int32), -1),
        created_at=_with_no_item(items["created_at"].to_numpy(), 0),
        signals=_with_no_item(signals.astype(np.int32), 0),
        titles=_with_no_item(tokens, 0),
        trigrams=_with_no_item(
            _of_titles(named, title_trigrams) if titles else np.zeros((items.height, 0), np.uint8), 0
        ),
    )


def _of_titles(titles: pl.Series, function: Callable[[list[str]], NDArray[Any]]) -> NDArray[Any]:
    """What ``function`` makes of the titles, some of which are Python's strings at a time."""
    return np.concatenate([function(part.to_list()) for part in _parts(titles)])


def _parts(column: pl.Series) -> Iterator[pl.Series]:
    for start in range(0, len(column), _CHUNK):
        yield column.slice(start, _CHUNK)


def _transitions(dataset: Dataset, catalogue: Catalogue, spec: FeatureSpec) -> Transitions:
    if "transitions" in spec.without:
        return Transitions.none(len(catalogue))
    return count_transitions(*training_sequences(dataset, catalogue), len(catalogue))


def _tokenizer(texts: Iterator[str], vocabulary: int) -> Tokenizer:
    """Subwords (BPE). Id 0 is padding."""
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["[PAD]", "[UNK]"], min_frequency=2, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _texts(dataset: Dataset, queries: bool) -> Iterator[str]:
    """Titles as they are read, of more than TITLES as many that lie evenly among them; and training queries."""
    titles = dataset.items["title"]
    for part in _parts(titles.gather_every(max(1, -(-titles.len() // TITLES)))):
        yield from filter(None, part)
    for chunk in dataset.chunks("train", _CHUNK, ("query",)) if queries else ():
        yield from filter(None, chunk["query"])


def _joint(codes: NDArray[np.int64], offset: int) -> NDArray[np.int64]:
    return np.where(codes > 0, codes + offset, 0)


def _idf(tokens: NDArray[np.int32], vocabulary_size: int) -> NDArray[np.float32]:
    """[V] log(1 + M / (1 + items with the token or attribute))"""
    frequency = np.zeros(vocabulary_size, np.int64)
    for start in range(0, len(tokens), _CHUNK):
        ordered = np.sort(tokens[start : start + _CHUNK], axis=1)
        once = ordered > 0
        once[:, 1:] &= ordered[:, 1:] != ordered[:, :-1]
        frequency += np.bincount(ordered[once], minlength=vocabulary_size)
    return np.log1p(len(tokens) / (1 + frequency)).astype(np.float32)


def _with_no_item(column: NDArray[Any], fill: int) -> NDArray[Any]:
    """Append the row that stands for "no item"."""
    last = np.full((1, *column.shape[1:]), fill, column.dtype)
    return np.concatenate([column, last])
