"""What preprocess tells rerank of a request, past the ranker: one tensor where the stages are models of their own."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from trirank import contract
from trirank.contract import Signal

from trirank_backend.attributes import MAX_REGIONS
from trirank_backend.errors import InvalidInput

HEADER = np.dtype(
    [
        ("status", "<i4"),  # Status bits
        ("unknown", "<i4"),  # candidates that the catalogue does not know
        ("repeats", "<i4"),
        ("top_k", "<i4"),
        ("policy", "<i4"),  # place of the scenario among the release's policies
        ("kept", "<i4"),  # U: unknown candidates that the policy keeps
        ("scored", "<i4"),  # S: whether retrieval's scores come along
        ("trace", "<i4"),  # whether it is to be told which rule did what
        ("moment", "<i8"),  # seconds since 1970
        ("query", "<i8"),  # policies.query_key, where a policy asks for it
        ("seed", "<i4"),  # of all that is drawn by chance
        ("region", "<i4"),  # of FILTERS: 1 + the region's number; 0: any
        ("min_stock", "<i4"),
        ("min_price", "<f4"),
        ("max_price", "<f4"),
        ("packed", "<i4"),  # whether the answer shall be one tensor
    ]
)
"""Of a line."""
_WIDTH = contract.HANDOVER_HEADER
assert HEADER.itemsize == 4 * _WIDTH
_SIGNALS = sum(signal.value for signal in Signal)
_LIMITS = {
    "top_k": (1, contract.MAX_TOP_K),
    "kept": (0, contract.MAX_CANDIDATES),
    "scored": (0, 1),
    "trace": (0, 1),
    "packed": (0, 1),
    "region": (0, MAX_REGIONS),
}


class Handover(NamedTuple):
    """R lines of N candidates.

    Attributes:
        header: [R] of HEADER.
        rows: [R, N] int32 of the catalogue; -1: not to be ranked.
        signals: [R, N] int32 Signal bits.
        scores: [R, N] float32 of retrieval, NaN where there is none; [R, 0]: no policy asks for them.
        unknown: [R, U] int64 candidates that the catalogue does not know and the policy keeps, as retrieval had them;
            PAD_ITEM_ID behind.
    """

    header: NDArray[Any]
    rows: NDArray[np.int32]
    signals: NDArray[np.int32]
    scores: NDArray[np.float32]
    unknown: NDArray[np.int64]

    def tensor(self) -> NDArray[np.int32]:
        """[R, …], as contract.HANDOVER says."""
        columns = [self.header.view(np.int32).reshape(-1, _WIDTH), self.rows, self.signals]
        columns += [
            np.ascontiguousarray(array).view(np.int32) for array in (self.scores, self.unknown) if array.shape[1]
        ]
        return np.concatenate(columns, axis=1)

    @classmethod
    def read(cls, tensor: NDArray[np.int32], items: int, policies: int) -> Handover:
        """From a tensor that anybody may have sent, since every model of a server can be called.

        Args:
            items: rows of the catalogue.

        Raises:
            InvalidInput: a number is out of range.
        """
        name = contract.HANDOVER.name
        if not len(tensor):
            raise InvalidInput(f"{name} has 0 rows; send at least one")
        length, kept, scored = tensor.shape[1], 0, 0
        header = np.zeros(len(tensor), HEADER)
        if length >= _WIDTH:
            header = np.ascontiguousarray(tensor[:, :_WIDTH]).view(HEADER)[:, 0]
            for field, (least, most) in _LIMITS.items():
                _within(name, f"a {field} of", header[field], least, most)
            for field in ("kept", "scored"):
                if (header[field] != header[field][0]).any():
                    raise InvalidInput(f"{name} holds different values of {field} in one request; pad them")
            kept, scored = int(header["kept"][0]), int(header["scored"][0])
        columns = 2 + scored
        places = (length - _WIDTH - 2 * kept) // columns
        if not 1 <= places <= contract.MAX_CANDIDATES or length != _WIDTH + columns * places + 2 * kept:
            raise InvalidInput(
                f"{name} has {length} numbers; it has {_WIDTH}, {columns} a candidate, of which there are 1 to "
                f"{contract.MAX_CANDIDATES}, and two for each of {kept} unknown ones"
            )
        rows, signals, scores, unknown = np.split(tensor[:, _WIDTH:], [places, 2 * places, columns * places], axis=1)
        found = cls(
            header,
            rows,
            signals,
            np.ascontiguousarray(scores).view(np.float32),
            np.ascontiguousarray(unknown).view(np.int64),
        )
        _within(name, "a policy of", header["policy"], 0, policies - 1)
        _within(name, "row", found.rows, -1, items - 1)
        _within(name, "signals", found.signals, 0, _SIGNALS)
        return found


def _within(name: str, what: str, values: NDArray[Any], least: int, most: int) -> None:
    for value in (values.min(), values.max()):
        if not least <= value <= most:
            raise InvalidInput(f"{name} holds {what} {value}; it goes from {least} to {most}")
