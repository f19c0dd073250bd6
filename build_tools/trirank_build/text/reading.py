"""Texts → numbers: units, and units that stand together.

A place of a text has one number of each order: its unit, and a row of a hash table for the two, three, … units that
begin there (as fastText's, Bojanowski et al., TACL 2017). Their vectors are summed, so that the Transformer starts
from what a linear model on n-grams knows. The linear model itself has a number for every unit, and for every n-gram
that two training texts have.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from trirank_build.errors import BadCheckpoint
from trirank_build.text.recipe import ReadingRecipe

PADDING, UNKNOWN, HIDDEN = 0, 1, 2
"""Units that stand for none, for one that training did not meet, and for one that is hidden."""
_SPECIAL = ["[PAD]", "[UNK]", "[MASK]"]
FILE, NGRAMS = "tokenizer.json", "ngrams.npy"
FILES = (FILE, NGRAMS)
_TEXTS = 4_096
_FACTORS = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x27D4EB2F165667C5,
                     0x85EBCA77C2B2AE63], np.uint64)  # fmt: skip


class Reader:
    """Reads texts as its recipe says.

    Args:
        known: ascending hashes of the n-grams that the linear model has a number for.
    """

    def __init__(self, tokenizer: Tokenizer, recipe: ReadingRecipe, known: NDArray[np.uint64]) -> None:
        self.tokenizer, self.recipe, self.known = tokenizer, recipe, known
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.units = tokenizer.get_vocab_size()
        self.size = self.units + len(known)
        """Numbers of the linear model: units, then n-grams."""

    @classmethod
    def fit(cls, texts: list[str], recipe: ReadingRecipe, most: int = 5_000_000) -> Reader:
        """Learn units and n-grams, the ``most`` frequent ones at most, from training texts."""
        tokenizer: Tokenizer
        trainer: trainers.Trainer
        if recipe.units == "characters":
            tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
            tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\S"), "removed", invert=True)
            trainer = trainers.WordLevelTrainer(
                vocab_size=recipe.vocabulary, min_frequency=2, special_tokens=_SPECIAL, show_progress=False
            )
        else:
            tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=False)]
            )
            trainer = trainers.BpeTrainer(
                vocab_size=recipe.vocabulary, min_frequency=2, special_tokens=_SPECIAL, show_progress=False,
                max_token_length=12,
            )  # fmt: skip
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
        tokenizer.train_from_iterator(texts, trainer)
        reader = cls(tokenizer, recipe, np.zeros(0, np.uint64))
        found, often = np.zeros(0, np.uint64), np.zeros(0, np.int64)
        for start in range(0, len(texts), _TEXTS):
            grams = reader.hashes(reader.read(texts[start : start + _TEXTS]))[..., 1:].reshape(-1)
            new, count = np.unique(grams[grams > 0], return_counts=True)
            found, place = np.unique(np.concatenate([found, new]), return_inverse=True)
            often = np.bincount(place, np.concatenate([often, count])).astype(np.int64)
        kept = np.flatnonzero(often > 1)
        if len(kept) > most:
            kept = np.sort(kept[np.argsort(-often[kept], kind="stable")[:most]])
        return cls(tokenizer, recipe, found[kept])

    @classmethod
    def load(cls, directory: Path, recipe: ReadingRecipe) -> Reader:
        """Read what ``save`` wrote.

        Raises:
            BadCheckpoint: it is missing or damaged.
        """
        try:
            known = np.load(directory / NGRAMS)
            if known.dtype != np.uint64 or known.ndim != 1:
                raise ValueError(f"{NGRAMS} holds {known.dtype}")
            return cls(Tokenizer.from_file(str(directory / FILE)), recipe, known)
        except Exception as error:  # the library raises bare Exception
            raise BadCheckpoint(f"{directory}: {' and '.join(FILES)} cannot be read ({error}); train again") from error

    def save(self, directory: Path) -> None:
        """Write tokeniser and n-grams into ``directory``."""
        self.tokenizer.save(str(directory / FILE))
        np.save(directory / NGRAMS, self.known)

    def read(self, texts: list[str]) -> NDArray[np.int32]:
        """[B, L] int32 units, 0-padded behind; of a longer text its first and its last half of L."""
        length = self.recipe.length
        units = np.zeros((len(texts), length), np.int32)
        head, tail = length - length // 2, length // 2
        for start in range(0, len(texts), _TEXTS):
            part = texts[start : start + _TEXTS]
            for row, found in enumerate(self.tokenizer.encode_batch_fast(part, add_special_tokens=False), start):
                ids = [each for each in found.ids if each not in (PADDING, HIDDEN)]  # whatever somebody typed
                if len(ids) > length:
                    ids = ids[:head] + ids[len(ids) - tail :]
                units[row, : len(ids)] = ids
        return units

    def inputs(self, units: NDArray[np.int32], length: int, rows: int) -> dict[str, NDArray[np.int32]]:
        """What a classifier takes of [B, L] units: ``fields`` [B, at most ``length``, orders] of a text's first and
        last places, and ``grams`` [B, G] the linear model's numbers of the whole text, each cut to the longest of the
        batch."""
        lengths = (units > 0).sum(1)
        longest = max(1, int(lengths.max(initial=0)))
        hashes = self.hashes(units[:, :longest])
        grams = self.grams(hashes)
        if longest > length:
            tail = length // 2
            place = np.arange(length)
            beyond = np.maximum(lengths - length, 0)[:, None]
            place = np.where(place < length - tail, place, place + beyond)
            hashes = np.take_along_axis(hashes, place[..., None], 1)
        return {"fields": self.fields(hashes, rows), "grams": grams}

    def hashes(self, units: NDArray[np.int32]) -> NDArray[np.uint64]:
        """[B, L] units → [B, L, orders]: the unit itself, and hashes of what begins there; 0 where there is none, or a
        unit of it is hidden, and for n-grams that the text had before: that they are there says more than how often."""
        orders = self.recipe.orders
        found = np.zeros((*units.shape, orders), np.uint64)
        found[..., 0] = units
        hashed = units.astype(np.uint64) * _FACTORS[0]
        whole = (units != PADDING) & (units != UNKNOWN) & (units != HIDDEN)
        own = whole
        for order in range(1, min(orders, units.shape[1])):
            hashed, whole = hashed.copy(), whole.copy()
            hashed[:, :-order] ^= units[:, order:].astype(np.uint64) * _FACTORS[order]
            hashed *= _FACTORS[0]
            hashed ^= hashed >> np.uint64(31)
            whole[:, :-order] &= own[:, order:]
            whole[:, -order:] = False
            found[..., order] = _once(np.where(whole, np.maximum(hashed, 1), 0))
        return found

    def fields(self, hashes: NDArray[np.uint64], rows: int) -> NDArray[np.int32]:
        """[B, L, orders] numbers of the encoder's table, whose n-grams share ``rows`` of it."""
        found = hashes[..., 1:] % np.uint64(rows) + np.uint64(self.units)
        units = hashes[..., :1]
        return np.concatenate([units, np.where(hashes[..., 1:] > 0, found, 0)], -1).astype(np.int32)

    def grams(self, hashes: NDArray[np.uint64]) -> NDArray[np.int32]:
        """[B, G] numbers of the linear model, each once; 0 for what it does not know."""
        units = _once(hashes[..., 0])
        ngrams = hashes[..., 1:].reshape(len(hashes), -1)
        place = np.searchsorted(self.known, ngrams)
        if len(self.known):
            there = self.known[np.minimum(place, len(self.known) - 1)] == ngrams
        else:
            there = np.zeros(ngrams.shape, bool)
        found = np.where(there, place + self.units, 0)
        return np.concatenate([units.astype(np.int32), found.astype(np.int32)], 1)


def _once(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """[B, L] with zeros for what stands further in front, too."""
    order = np.argsort(numbers, axis=1, kind="stable")
    ordered = np.take_along_axis(numbers, order, 1)
    again = ordered[:, 1:] == ordered[:, :-1]
    ordered[:, 1:][again] = 0
    found = np.zeros_like(numbers)
    np.put_along_axis(found, order, ordered, 1)
    return found
