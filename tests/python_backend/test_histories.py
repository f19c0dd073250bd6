"""Histories: what a store keeps it gives back, and nothing from the future."""

from __future__ import annotations

import numpy as np
import pytest
from trirank_backend.errors import InvalidRelease
from trirank_backend.histories import Events, HistoryBatch, SqliteUserStore


def events(*times):
    ids = np.array(times, np.int64) * 10
    return Events(ids, np.full(len(times), 2, np.int32), np.array(times, np.int64))


@pytest.fixture
def store(tmp_path):
    SqliteUserStore.write(tmp_path / "users.sqlite", [(1, events(1, 2, 3)), (2, events(7)), (2**62, events(5))])
    store = SqliteUserStore(tmp_path / "users.sqlite")
    yield store
    store.close()


def test_many_users_in_one_look_up(store):
    found = store.get([1, 2, 3, 2**62])
    assert set(found) == {1, 2, 2**62}
    assert found[1].item_ids.tolist() == [10, 20, 30]
    assert found[1].item_ids.dtype == np.int64


def test_a_store_is_not_written_to(store):
    import sqlite3

    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        store._connection.execute("DELETE FROM histories")


def test_no_store(tmp_path):
    with pytest.raises(InvalidRelease, match="assemble again"):
        SqliteUserStore(tmp_path / "none.sqlite")
    (tmp_path / "bad.sqlite").write_text("not a database at all")
    with pytest.raises(InvalidRelease, match="assemble again"):
        SqliteUserStore(tmp_path / "bad.sqlite")


@pytest.mark.parametrize(("moment", "seen"), [(0, []), (2, [1]), (3, [1, 2]), (99, [2, 3])])
def test_only_what_was_known_at_the_moment(moment, seen):
    assert events(1, 2, 3).before(moment, 2).timestamps.tolist() == seen


def test_the_newest_stand_last():
    batch = HistoryBatch.of([events(1, 2, 3), None, events(4)], 2)
    assert batch.item_ids.tolist() == [[20, 30], [-1, -1], [-1, 40]]
    assert batch.behaviours.tolist() == [[2, 2], [0, 0], [0, 2]]
