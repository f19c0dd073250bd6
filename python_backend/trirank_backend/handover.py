"""What preprocess tells rerank of a request, past the ranker: one tensor where the stages are models of their own."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from trirank import contract
from trirank.contract import Signal

from trirank_backend.errors import InvalidInput

_HEADER = 6
_SIGNALS = sum(signal.value for signal in Signal)


class Handover(NamedTuple):
    """R lines of N candidates.

    Attributes:
        status: [R, 3] int32: Status bits, unknown candidates, repeats.
        top_k: [R] int32.
        policy: [R] int32 place of the scenario among the release's policies.
        rows: [R, N] int32 of the catalogue; -1: not to be ranked.
        signals: [R, N] int32 Signal bits.
        unknown: [R, U] int64 candidates that the catalogue does not know and the policy keeps, as retrieval had them;
            PAD_ITEM_ID behind.
    """

    status: NDArray[np.int32]
    top_k: NDArray[np.int32]
    policy: NDArray[np.int32]
    rows: NDArray[np.int32]
    signals: NDArray[np.int32]
    unknown: NDArray[np.int64]

    def tensor(self) -> NDArray[np.int32]:
        """[R, 6 + 2 N + 2 U], as contract.HANDOVER says."""
        count = np.full((len(self.top_k), 1), self.unknown.shape[1], np.int32)
        columns = [self.status, self.top_k[:, None], self.policy[:, None], count, self.rows, self.signals]
        if self.unknown.shape[1]:
            columns.append(np.ascontiguousarray(self.unknown).view(np.int32))
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
        length, unknown = tensor.shape[1], 0
        if length >= _HEADER:
            unknown = int(tensor[0, 5])
            _within(name, "a count of unknown items of", tensor[:, 5], 0, contract.MAX_CANDIDATES)
            if (tensor[:, 5] != unknown).any():
                raise InvalidInput(f"{name} holds different counts of unknown items in one request; pad them")
        places = (length - _HEADER - 2 * unknown) // 2
        if not 1 <= places <= contract.MAX_CANDIDATES or length != _HEADER + 2 * places + 2 * unknown:
            raise InvalidInput(
                f"{name} has {length} numbers; it has {_HEADER}, two a candidate, of which there are 1 to "
                f"{contract.MAX_CANDIDATES}, and two for each of {unknown} unknown ones"
            )
        end = _HEADER + 2 * places
        found = cls(
            status=tensor[:, :3],
            top_k=tensor[:, 3],
            policy=tensor[:, 4],
            rows=tensor[:, _HEADER : _HEADER + places],
            signals=tensor[:, _HEADER + places : end],
            unknown=np.ascontiguousarray(tensor[:, end:]).view(np.int64),
        )
        _within(name, "a top_k of", found.top_k, 1, contract.MAX_TOP_K)
        _within(name, "policy", found.policy, 0, policies - 1)
        _within(name, "row", found.rows, -1, items - 1)
        _within(name, "signals", found.signals, 0, _SIGNALS)
        return found


def _within(name: str, what: str, values: NDArray[np.int32], least: int, most: int) -> None:
    for value in (values.min(), values.max()):
        if not least <= value <= most:
            raise InvalidInput(f"{name} holds {what} {value}; it goes from {least} to {most}")
