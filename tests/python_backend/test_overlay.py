"""Files of records that processes map, and that are replaced while they are read."""

from __future__ import annotations

import time

import numpy as np
import pytest
from trirank_backend.errors import InvalidStore
from trirank_backend.stores.overlay import COUNTS, STATE, Overlay, read_overlay, write_overlay


def test_it_is_seen_when_it_was_replaced(tmp_path):
    file = tmp_path / "counts.npy"
    overlay = Overlay(file, COUNTS)
    assert len(overlay) == 0
    write_overlay(file, np.array([(5, 100, 7), (9, 1, 0)], COUNTS))
    deadline = time.monotonic() + 1
    while not len(overlay):
        assert time.monotonic() < deadline
    impressions, clicks = overlay.counts(np.array([9, 5, 1, 5]))
    assert impressions.tolist() == [1, 100, 0, 100]
    assert clicks.tolist() == [0, 7, 0, 7]


@pytest.mark.parametrize(
    "records",
    [
        np.array([(2, 1, 1), (1, 1, 1)], COUNTS),
        np.array([(1, 1, 1), (1, 1, 1)], COUNTS),
        np.zeros(3),
        np.zeros((2, 2), COUNTS),
        np.zeros(1, STATE),
    ],
)
def test_what_is_none_changes_nothing(tmp_path, records, caplog):
    file = tmp_path / "counts.npy"
    write_overlay(file, np.array([(5, 100, 7)], COUNTS))
    overlay = Overlay(file, COUNTS)
    with file.with_suffix(".new").open("wb") as stream:
        np.save(stream, records)
    file.with_suffix(".new").replace(file)
    overlay._next = 0
    assert len(overlay) == 1
    assert overlay.counts(np.array([5]))[0].tolist() == [100]
    assert "what was known before is gone by" in caplog.text
    with pytest.raises(InvalidStore, match="holds no ascending records of"):
        read_overlay(file, COUNTS)


def test_who_reads_keeps_what_was_replaced_in_the_meantime(tmp_path):
    file = tmp_path / "counts.npy"
    write_overlay(file, np.array([(5, 100, 7)], COUNTS))
    overlay = Overlay(file, COUNTS)
    write_overlay(file, np.array([(6, 1, 1)], COUNTS))
    assert overlay.counts(np.array([5]))[0].tolist() == [100]
