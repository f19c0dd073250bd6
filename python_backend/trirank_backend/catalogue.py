"""The item catalogue: memory-mapped columns, one row an item, shared by all stages of all processes.

Every column but ``ids`` has one row more than there are items: the last one stands for "no item", so that row
``-1`` (padding, an unknown item) indexes it and reads zeros without a branch.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from trirank.contract import PAD_ITEM_ID

from trirank_backend.errors import InvalidRelease
from trirank_backend.lookup_kernels import find_rows

NO_ROW = -1
_COLUMNS: dict[str, tuple[Any, tuple[tuple[int, ...], ...] | None]] = {
    "ids": (np.int64, ((),)), "fields": (np.int32, None), "dense": (np.float32, ((4,),)), "products": (np.int32, ((),)),
    "created_at": (np.int64, ((),)), "signals": (np.int32, ((),)), "titles": (np.int32, None),
    "trigrams": (np.uint8, ((0,), (64,))),
}  # fmt: skip
"""Column → type, and the shapes that a row may have."""


@dataclass(frozen=True)
class Catalogue:
    """M items.

    Attributes:
        ids: [M] int64, ascending.
        fields: [M+1, F] int32 ids of the joint vocabulary, 0: missing.
        dense: [M+1, S] float32, static numbers in the order of ``features.STATIC_DENSE``.
        products: [M+1] int32; variants of one product share a number; -1 in the last row.
        created_at: [M+1] int64, seconds since 1970; 0: unknown.
        signals: [M+1] int32, Signal bits that depend on the item alone.
        titles: [M+1, T] int32 token ids of the title, 0-padded behind; T = 0 where there are no titles.
        trigrams: [M+1, 64] uint8, letter trigrams of the title (text.title_trigrams); no column without titles.
    """

    ids: NDArray[np.int64]
    fields: NDArray[np.int32]
    dense: NDArray[np.float32]
    products: NDArray[np.int32]
    created_at: NDArray[np.int64]
    signals: NDArray[np.int32]
    titles: NDArray[np.int32]
    trigrams: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, ids: NDArray[np.int64]) -> NDArray[np.int32]:
        """Row of each id, of any shape; -1 for ids that are not in the catalogue."""
        rows = np.empty(ids.shape, np.int32)
        find_rows(read_only(self.ids), read_only(np.ascontiguousarray(ids, np.int64).reshape(-1)), rows.reshape(-1))
        return rows

    def item_ids(self, rows: NDArray[np.int32]) -> NDArray[np.int64]:
        """Id of each row; -1 for row -1."""
        return np.where(rows == NO_ROW, PAD_ITEM_ID, self.ids[rows])

    def save(self, directory: Path) -> None:
        """Write one ``.npy`` file a column."""
        directory.mkdir(parents=True, exist_ok=True)
        for column in fields(self):
            np.save(directory / f"{column.name}.npy", getattr(self, column.name))

    @classmethod
    def load(cls, directory: Path) -> Catalogue:
        """Map the columns into memory, read-only.

        Raises:
            InvalidRelease: a column is missing or of another length.
        """
        columns: dict[str, Any] = {}
        for column in fields(cls):
            path = directory / f"{column.name}.npy"
            try:
                # A memmap is an ndarray subclass whose indexing is several times slower; the view is not.
                columns[column.name] = np.load(path, mmap_mode="r").view(np.ndarray)
            except (OSError, ValueError) as error:
                raise InvalidRelease(f"catalogue column {path} cannot be read ({error}); assemble again") from error
        items = len(columns["ids"])
        for name, array in columns.items():
            if name != "ids" and len(array) != items + 1:
                raise InvalidRelease(f"catalogue column {name} has {len(array)} rows, not {items + 1}; assemble again")
        for name, (dtype, width) in _COLUMNS.items():  # compiled code looks at neither again
            array = columns[name]
            if array.dtype != dtype or (width is not None and array.shape[1:] not in width):
                raise InvalidRelease(
                    f"catalogue column {name} is {array.dtype} of shape {list(array.shape)}, which this version does "
                    "not write; assemble again"
                )
        return cls(**columns)


def read_only(array: NDArray[Any]) -> NDArray[Any]:
    """A view that cannot be written to. numba compiles a kernel once for arrays that can and once for those that
    cannot; what comes from a mapped file cannot, so everything else is handed over like that too."""
    view = array.view()
    view.flags.writeable = False
    return view
