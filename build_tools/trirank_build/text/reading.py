"""Texts → numbers: units, and hashes of units that stand together.

A place of a text has one number of each order: its unit, and rows of hash tables for the two, three, … units that
begin there (as fastText's, Bojanowski et al., TACL 2017). Their vectors are summed, so that the Transformer starts
from what a linear model on n-grams knows.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from trirank_build.errors import BadCheckpoint
from trirank_build.text.recipe import ReadingRecipe

PADDING, UNKNOWN, HIDDEN = 0, 1, 2
"""Units that stand for none, for one that training did not meet, and for one that is hidden."""
_SPECIAL = ["[PAD]", "[UNK]", "[MASK]"]
FILE = "tokenizer.json"
_TEXTS = 4_096
_FACTORS = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x27D4EB2F165667C5,
                     0x85EBCA77C2B2AE63], np.uint64)  # fmt: skip


class Reader:
    """Reads texts as its recipe says."""

    def __init__(self, tokenizer: Tokenizer, recipe: ReadingRecipe) -> None:
        self.tokenizer, self.recipe = tokenizer, recipe
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.units = tokenizer.get_vocab_size()
        self.size = self.units + (recipe.orders - 1) * recipe.rows
        """Of the joint vocabulary of all orders."""

    @classmethod
    def fit(cls, texts: Iterable[str], recipe: ReadingRecipe) -> Reader:
        """Learn the units from training texts."""
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
        return cls(tokenizer, recipe)

    @classmethod
    def load(cls, directory: Path, recipe: ReadingRecipe) -> Reader:
        """Read what ``save`` wrote.

        Raises:
            BadCheckpoint: it is missing or damaged.
        """
        try:
            return cls(Tokenizer.from_file(str(directory / FILE)), recipe)
        except Exception as error:  # the library raises bare Exception
            raise BadCheckpoint(f"{directory / FILE} cannot be read ({error}); train again") from error

    def save(self, directory: Path) -> None:
        """Write the tokeniser into ``directory``."""
        self.tokenizer.save(str(directory / FILE))

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

    def inputs(self, units: NDArray[np.int32], length: int) -> dict[str, NDArray[np.int32]]:
        """What a classifier takes of [B, L] units: ``fields`` [B, at most ``length``, orders] of a text's first and
        last places, and ``grams`` [B, G] all numbers of the whole text, each cut to the longest of the batch."""
        lengths = (units > 0).sum(1)
        longest = max(1, int(lengths.max(initial=0)))
        fields = self.fields(units[:, :longest])
        grams = fields.reshape(len(units), -1)
        if longest > length:
            tail = length // 2
            place = np.arange(length)
            beyond = np.maximum(lengths - length, 0)[:, None]
            place = np.where(place < length - tail, place, place + beyond)
            fields = np.take_along_axis(fields, place[..., None], 1)
        return {"fields": np.ascontiguousarray(fields), "grams": np.ascontiguousarray(grams)}

    def fields(self, units: NDArray[np.int32]) -> NDArray[np.int32]:
        """[B, L] units → [B, L, orders] numbers of the joint vocabulary; 0 where there is none, or a unit of it is
        hidden, and for n-grams that the text had before: that they are there says more than how often."""
        orders, rows = self.recipe.orders, self.recipe.rows
        fields = np.zeros((*units.shape, orders), np.int32)
        fields[..., 0] = units
        hashed = units.astype(np.uint64) * _FACTORS[0]
        whole = (units != PADDING) & (units != HIDDEN)
        for order in range(1, orders):
            hashed, whole = hashed.copy(), whole.copy()
            hashed[:, :-order] = (hashed[:, :-order] ^ (units[:, order:].astype(np.uint64) * _FACTORS[order])) * (
                _FACTORS[0]
            )
            whole[:, :-order] &= (units[:, order:] != PADDING) & (units[:, order:] != HIDDEN)
            whole[:, -order:] = False
            place = (hashed >> np.uint64(32)) % np.uint64(rows)
            first = self.units + (order - 1) * rows
            fields[..., order] = _once(np.where(whole, place.astype(np.int64) + first, 0))
        return fields


def _once(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """[B, L] with zeros for what stands further in front, too."""
    order = np.argsort(numbers, axis=1, kind="stable")
    ordered = np.take_along_axis(numbers, order, 1)
    ordered[:, 1:][np.diff(ordered, axis=1) == 0] = 0
    found = np.zeros_like(numbers)
    np.put_along_axis(found, order, ordered, 1)
    return found
