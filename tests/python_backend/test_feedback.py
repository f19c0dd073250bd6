"""What the model ``feedback`` knows of items, release by release. Over a real server: e2e/test_online.py."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from trirank_backend.errors import InvalidInput, StoreFailed
from trirank_backend.feedback import Feedback, Known
from trirank_backend.stores.store import open_store


@pytest.fixture
def served(tmp_path):
    """Serves a release with some items."""
    link = tmp_path / "served"

    def serve(name, ids):
        release = tmp_path / name
        (release / "features" / "catalogue").mkdir(parents=True)
        np.save(release / "features" / "catalogue" / "ids.npy", np.array(ids, np.int64))
        (release / "features" / "policies").mkdir()
        (release / "features" / "policies" / "home.toml").write_text("")
        (release / "manifest.json").write_text("{}")
        link.unlink(missing_ok=True)
        link.symlink_to(release)

    serve.link = link
    return serve


@pytest.fixture
def tell(served, tmp_path):
    """Tells that somebody clicked items; gives the answer."""
    store, known = open_store(f"sqlite:{tmp_path / 'users.sqlite'}"), Known(served.link)
    feedback = Feedback(store, known)

    def told(*items, again=True):
        if again:
            known._next = 0.0  # look again
        rows = [
            {"event_id": f"{time.monotonic_ns()}-{at}", "item_id": item, "kind": "click", "timestamp": int(time.time())}
            for at, item in enumerate(items)
        ]
        (answer,) = feedback([{"EVENTS": np.array([[json.dumps(rows).encode()]], object)}])
        return answer

    yield told
    feedback.close()


def test_pages_of_the_release_before_are_still_looked_at(served, tell):
    served("one", [1, 2])
    assert tell(1, 2)["STORED"].tolist() == [[2, 0]]
    served("two", [2, 3])
    assert tell(1, 2, 3)["STORED"].tolist() == [[3, 0]]
    served("three", [2, 3])
    assert isinstance(tell(1), InvalidInput)


def test_every_strange_item_is_named(served, tell):
    served("one", [1, 2])
    assert "item 7 (event 1), 8 (event 2) is not in the catalogue of release one" in str(tell(1, 7, 8))
    told = str(tell(*range(2, 20)))
    assert "12 (event 10) and 7 more are not in" in told
    assert "13 (event 11)" not in told


def test_without_a_release_events_are_not_refused_for_good(served, tell):
    """A link that cannot be read yet is not the caller's fault: told again, the events are taken."""
    assert isinstance(tell(1), StoreFailed)
    assert isinstance(tell(1, again=False), StoreFailed)  # nor before it is looked for again
    served("one", [1])
    assert tell(1)["STORED"].tolist() == [[1, 0]]


@pytest.mark.parametrize("value", ["x" * 40_000, ["x" * 40_000], 10**400])
def test_long_values_are_told_shortened(served, tell, value):
    served("one", [1])
    found = tell(value)
    assert isinstance(found, InvalidInput)
    assert len(str(found)) < 300
