"""What rules read of an item beside what the ranker knows of it: memory-mapped columns, one row an item as in the
catalogue, and a last row for "no item"."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trirank_backend.errors import InvalidRelease

FOLDER = "attributes"
DIMENSIONS = 32
"""Of the vectors that items are compared by."""
SKETCH = 32
"""Hashes of a title's sketch."""
MAX_REGIONS = 64
EVERYWHERE = (1 << MAX_REGIONS) - 1
NAMED = ("brand", "category", "seller")
"""Columns of codes that have names."""
_COLUMNS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "prices": (np.float32, ()), "margins": (np.float32, ()), "brands": (np.int32, ()), "categories": (np.int32, ()),
    "sellers": (np.int32, ()), "regions": (np.uint64, ()), "vectors": (np.int8, (DIMENSIONS,)),
    "sketches": (np.uint8, (SKETCH,)),
}  # fmt: skip


@dataclass(frozen=True)
class Attributes:
    """M items.

    Attributes:
        prices: [M+1] float32 in the catalogue's currency; NaN: unknown.
        margins: [M+1] float32, share of the price that is earned; NaN: unknown.
        brands, categories, sellers: [M+1] int32 places among ``names``; -1: unknown.
        regions: [M+1] uint64, a bit for each of ``names["region"]`` in which an item can be had.
        vectors: [M+1, 32] int8 of length 127; the dot product of two is 127² times their cosine.
        sketches: [M+1, 32] uint8 MinHash of the title's letter trigrams (text.title_sketches); zeros: no title.
        names: ``brand``, ``category``, ``seller`` and ``region`` → their names, in the order of their codes.
    """

    prices: NDArray[np.float32]
    margins: NDArray[np.float32]
    brands: NDArray[np.int32]
    categories: NDArray[np.int32]
    sellers: NDArray[np.int32]
    regions: NDArray[np.uint64]
    vectors: NDArray[np.int8]
    sketches: NDArray[np.uint8]
    names: dict[str, list[str]]

    def save(self, directory: Path) -> None:
        """Write one ``.npy`` file a column, and the names."""
        directory.mkdir(parents=True, exist_ok=True)
        for column in _COLUMNS:
            np.save(directory / f"{column}.npy", getattr(self, column))
        (directory / "names.json").write_text(json.dumps(self.names) + "\n")

    @classmethod
    def load(cls, directory: Path, items: int) -> Attributes:
        """Map the columns into memory, read-only.

        Raises:
            InvalidRelease: a column is missing, of another type or not of ``items`` + 1 rows.
        """
        found: dict[str, Any] = {}
        try:
            for name, (dtype, shape) in _COLUMNS.items():
                path = directory / f"{name}.npy"
                array = np.load(path, mmap_mode="r").view(np.ndarray)
                if array.dtype != dtype or array.shape != (items + 1, *shape):
                    raise InvalidRelease(
                        f"{path} is {array.dtype} of shape {list(array.shape)}, not {np.dtype(dtype)} of "
                        f"{[items + 1, *shape]}; assemble again"
                    )
                found[name] = array
            names = json.loads((directory / "names.json").read_text())
        except (OSError, ValueError) as error:
            raise InvalidRelease(f"{directory} cannot be read ({error}); assemble again") from error
        for kind, column in zip(NAMED, ("brands", "categories", "sellers"), strict=True):
            codes = found[column]  # compiled code looks at neither again
            if codes.min() < -1 or codes.max() >= len(names.get(kind, ())):
                raise InvalidRelease(f"{directory / column}.npy holds codes that have no name; assemble again")
        return cls(**found, names=names)

    @classmethod
    def unknown(cls, items: int) -> Attributes:
        """Of items of which nothing is known."""
        codes = np.full(items + 1, -1, np.int32)
        return cls(
            prices=np.full(items + 1, np.nan, np.float32), margins=np.full(items + 1, np.nan, np.float32),
            brands=codes, categories=codes.copy(), sellers=codes.copy(),
            regions=np.full(items + 1, EVERYWHERE, np.uint64),
            vectors=np.zeros((items + 1, DIMENSIONS), np.int8), sketches=np.zeros((items + 1, SKETCH), np.uint8),
            names={name: [] for name in (*NAMED, "region")},
        )  # fmt: skip


assert set(_COLUMNS) | {"names"} == {field.name for field in fields(Attributes)}
