"""Histories: nothing from the future, and the newest last."""

from __future__ import annotations

import numpy as np
import pytest
from trirank_backend.histories import Events, HistoryBatch


def events(*times):
    ids = np.array(times, np.int64) * 10
    return Events(ids, np.full(len(times), 2, np.int32), np.array(times, np.int64))


@pytest.mark.parametrize(("moment", "seen"), [(0, []), (2, [1]), (3, [1, 2]), (99, [2, 3])])
def test_only_what_was_known_at_the_moment(moment, seen):
    assert events(1, 2, 3).before(moment, 2).timestamps.tolist() == seen


def test_the_newest_stand_last():
    batch = HistoryBatch.of([events(1, 2, 3), None, events(4)], 2)
    assert batch.item_ids.tolist() == [[20, 30], [-1, -1], [-1, 40]]
    assert batch.behaviours.tolist() == [[2, 2], [0, 0], [0, 2]]
