"""Columns by item id that change while servers read them: one file, replaced whole.

A file is a ``.npy`` of records in the order of their ids, mapped into memory, so that processes share it. Whoever
writes puts the new file in the old one's place, which is one step for all readers; each looks every quarter of a
second. What cannot be read changes nothing: the last good one stays.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trirank_backend.catalogue import read_only
from trirank_backend.errors import InvalidStore
from trirank_backend.files import whole_file
from trirank_backend.lookup_kernels import ascending, look_up_counts, look_up_state

PADDING = "padding"
STATE = np.dtype([("id", "<i8"), ("price", "<f4"), ("stock", "<i4"), ("blocked", "<i4"), (PADDING, "<i4")])
"""Of an item whose price (NaN: as in the release), stock (-1: as in the release) or block has changed."""
COUNTS = np.dtype([("id", "<i8"), ("impressions", "<i4"), ("clicks", "<i4")])
"""How often an item was shown and clicked, by feedback."""
LOOK_S = 0.25

_log = logging.getLogger("trirank")


def read_overlay(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    """The records of a file, mapped read-only.

    Raises:
        InvalidStore: it cannot be read, or is of something else.
        FileNotFoundError: there is none.
    """
    try:
        records = np.load(path, mmap_mode="r")
    except FileNotFoundError:
        raise
    except (OSError, ValueError, EOFError) as error:
        raise InvalidStore(f"{path} cannot be read ({error}); write it again, or remove it") from error
    if (
        not isinstance(records, np.ndarray)
        or records.dtype != dtype
        or records.ndim != 1
        or not ascending(read_only(records.view(np.ndarray)["id"]))
    ):
        raise InvalidStore(f"{path} holds no ascending records of {list(dtype.names or ())}; write it again")
    return records.view(np.ndarray)


def write_overlay(path: Path, records: NDArray[Any]) -> None:
    """Put records in the place of what was there, in one step.

    Args:
        records: of one of the types above, ascending by id.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as stream:
        np.save(stream, records)


class Overlay:
    """A file that is read again when it was replaced."""

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self._path, self._dtype = path, dtype
        self._next = 0.0
        self._seen: tuple[int, ...] = ()
        self._refused: tuple[int, ...] = ()
        self._columns: tuple[NDArray[Any], ...] = ()
        self._refresh()

    def __len__(self) -> int:
        """How many items it tells of."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + LOOK_S
            self._refresh()
        return len(self._columns[0]) if self._columns else 0

    def state(self, ids: NDArray[np.int64]) -> tuple[NDArray[Any], ...]:
        """Prices, stock and blocks of items; see STATE."""
        prices, stock, blocked = (
            np.empty(len(ids), np.float32),
            np.empty(len(ids), np.int32),
            np.empty(len(ids), np.int32),
        )
        of_ids, of_prices, of_stock, of_blocked = self._columns
        look_up_state(of_ids, of_prices, of_stock, of_blocked, ids, prices, stock, blocked)
        return prices, stock, blocked

    def counts(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Impressions and clicks of items."""
        impressions, clicks = np.empty(len(ids), np.int32), np.empty(len(ids), np.int32)
        of_ids, of_impressions, of_clicks = self._columns
        look_up_counts(of_ids, of_impressions, of_clicks, ids, impressions, clicks)
        return impressions, clicks

    def _refresh(self) -> None:
        seen: tuple[int, ...] = ()
        try:
            status = os.stat(self._path)
            seen = (status.st_ino, status.st_mtime_ns, status.st_size)
            if seen == self._seen:
                return
            records = read_overlay(self._path, self._dtype)
        except FileNotFoundError:
            self._seen, self._columns = (), ()
        except (InvalidStore, OSError) as error:
            if seen != self._refused:
                _log.warning("%s; what was known before is gone by", error)
            self._refused = seen
        else:
            self._seen = seen
            names = [name for name in self._dtype.names or () if name != PADDING]
            self._columns = tuple(read_only(records[name]) for name in names)
