"""Items → what rules read of them (trirank_backend.attributes)."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from trirank_backend.attributes import DIMENSIONS, EVERYWHERE, MAX_REGIONS, NAMED, Attributes
from trirank_backend.catalogue import Catalogue
from trirank_backend.features import FeatureSpec
from trirank_backend.text import title_sketches

from trirank_build.errors import BadData

_CHUNK = 50_000
_LENGTH = 127
"""Of a vector."""


def rule_attributes(items: pl.DataFrame, catalogue: Catalogue, spec: FeatureSpec) -> Attributes:
    """What policies need of a dataset's items, in the catalogue's order.

    Raises:
        BadData: there are more regions than a catalogue has bits for.
    """
    names, columns = {}, {}
    for kind in NAMED:
        column = items[kind].fill_null("")
        names[kind] = sorted(column.filter(column != "").unique())
        codes = column.replace_strict(names[kind], range(len(names[kind])), default=-1, return_dtype=pl.Int32)
        columns[kind] = _with_none(codes.to_numpy(), -1)
    names["region"], regions = _regions(items["regions"])
    titled = bool((items["title"] != "").any())
    sketches = title_sketches(items["title"].to_list()) if titled else title_sketches([""] * items.height)
    return Attributes(
        prices=_with_none(items["price"].to_numpy().astype(np.float32), np.nan),
        margins=_with_none(items["margin"].to_numpy().astype(np.float32), np.nan),
        brands=columns["brand"],
        categories=columns["category"],
        sellers=columns["seller"],
        regions=_with_none(regions, EVERYWHERE),
        vectors=_vectors(catalogue, spec),
        sketches=np.concatenate([sketches, np.zeros((1, sketches.shape[1]), np.uint8)]),
        names=names,
    )


def _with_none(column: NDArray[Any], value: float) -> NDArray[Any]:
    """Append the row for "no item"."""
    return np.append(column, np.array([value]).astype(column.dtype))


def _regions(column: pl.Series) -> tuple[list[str], NDArray[np.uint64]]:
    """Names, and a bit mask for each item; one that names none can be had everywhere."""
    names = sorted(column.explode().drop_nulls().unique())
    if len(names) > MAX_REGIONS:
        raise BadData(f"items name {len(names)} regions, such as {names[-1]!r}; the limit is {MAX_REGIONS}")
    bit = {name: 1 << at for at, name in enumerate(names)}
    masks = [sum(bit[name] for name in set(each)) if each else EVERYWHERE for each in column.to_list()]
    return names, np.array(masks, np.uint64)


def _vectors(catalogue: Catalogue, spec: FeatureSpec) -> NDArray[np.int8]:
    """[M+1, 32] random indexing (Kanerva, Kristoferson and Holst, CogSci 2000): each word of what is known of an item
    (brand, category, price, attributes, title) has a random vector, and an item their sum, rare ones counting more. So
    cosines tell how much of it two items share, nothing is trained, and a new item's vector moves no other's."""
    first = sum(spec.tables["item"])  # words stand behind the items in the joint vocabulary
    words = np.concatenate([catalogue.fields[:, 1:], catalogue.titles], axis=1)
    vocabulary = spec.vocabulary_size - first + 1
    often = np.bincount(np.maximum(words - first + 1, 0).ravel(), minlength=vocabulary)
    weight = np.log1p(len(catalogue) / (1 + often)).astype(np.float32)
    weight[0] = 0  # "missing"
    directions = np.random.default_rng(0).standard_normal((vocabulary, DIMENSIONS), np.float32) * weight[:, None]
    vectors = np.zeros((len(words), DIMENSIONS), np.int8)
    for start in range(0, len(words), _CHUNK):
        part = np.maximum(words[start : start + _CHUNK] - first + 1, 0)
        total = directions[part].sum(1)
        length = np.maximum(np.linalg.norm(total, axis=1, keepdims=True), 1e-9)
        vectors[start : start + _CHUNK] = np.round(total / length * _LENGTH).astype(np.int8)
    return vectors
