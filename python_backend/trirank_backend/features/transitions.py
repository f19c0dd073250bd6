"""Which item follows which, counted in training: a sparse table that the packer reads, one list of followers an item.

Of item b and a follower a it holds log(1 + C), where C counts how often a came after b in a user's events, near ones
more than far ones (trirank_build.features.transitions counts). Summed over a history with a weight that falls with
age, this is the counting model PCTM ("Do sequential recommendation benchmarks really require higher-order sequence
modelling?", Petrov et al., RecSys 2026) without its popularity term, of which the ranker has a column of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trirank_backend.errors import InvalidRelease

FOLDER = "transitions"


class Transitions(NamedTuple):
    """Followers of M items and of "no item", which has none; E pairs in all.

    Attributes:
        starts: [M+2] int64; the followers of row b are at ``starts[b]`` to ``starts[b + 1]``.
        rows: [E] int32 their catalogue rows.
        weights: [E] float32 their log counts.
    """

    starts: NDArray[np.int64]
    rows: NDArray[np.int32]
    weights: NDArray[np.float32]

    @classmethod
    def none(cls, items: int) -> Transitions:
        """Of a catalogue in which nothing was counted."""
        return cls(np.zeros(items + 2, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32))

    def save(self, directory: Path) -> None:
        """Write one ``.npy`` file a column into ``directory``'s folder ``transitions``."""
        (directory / FOLDER).mkdir(parents=True, exist_ok=True)
        for name, column in self._asdict().items():
            np.save(directory / FOLDER / f"{name}.npy", column)

    @classmethod
    def load(cls, directory: Path, items: int) -> Transitions:
        """Map what ``save`` wrote into memory, read-only.

        Raises:
            InvalidRelease: a column is missing, damaged, or not of a catalogue of ``items`` items.
        """
        columns = {}
        for name, wanted in cls.none(0)._asdict().items():
            path = directory / FOLDER / f"{name}.npy"
            try:
                columns[name] = np.load(path, mmap_mode="r").view(np.ndarray)
            except (OSError, ValueError) as error:
                raise InvalidRelease(f"{path} cannot be read ({error}); assemble again") from error
            if columns[name].dtype != wanted.dtype or columns[name].ndim != 1:
                raise InvalidRelease(f"{path} is no column of {wanted.dtype}; assemble again")
        found = cls(**columns)
        starts, rows = found.starts, found.rows
        whole = len(starts) == items + 2 and starts[0] == 0 and starts[-1] == len(rows) == len(found.weights)
        # Compiled code looks at none of this again.
        if not whole or (np.diff(starts) < 0).any() or (len(rows) and not 0 <= rows.min() <= rows.max() < items):
            raise InvalidRelease(f"{directory / FOLDER} is no table of followers for {items} items; assemble again")
        return found
