"""Datasets that tell less of people, and where personal data lies."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli import trirank
from trirank.contract import ANONYMOUS_USER
from trirank_build.data.dataset import Dataset
from trirank_build.errors import BadData, BadUsage
from trirank_build.privacy.anonymise import NOTE, Anonymiser, make_key, read_key
from trirank_build.privacy.inventory import PLACES, table, unclassified
from trirank_build.privacy.queries import plain, shared, telling
from trirank_build.repository.release import recorded_requests

KEY, OTHER = bytes(range(32)), bytes(range(1, 33))
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def before(world):
    return Dataset.load(world.data)


@pytest.fixture(scope="module")
def after(before):
    return Anonymiser(KEY, k=3).apply(before)


def test_nobody_is_named(before, after):
    users = set(before.events["user_id"].to_list())
    pseudonyms = set(after.events["user_id"].to_list()) | set(after.requests.collect()["user_id"].to_list())
    assert not users & pseudonyms - {ANONYMOUS_USER}
    assert len(set(after.events["user_id"].to_list())) <= len(users)
    again = Anonymiser(KEY, k=3).apply(before)
    assert again.events.equals(after.events)  # so that what comes later can be added
    other = Anonymiser(OTHER, k=3).apply(before)
    assert not set(other.events["user_id"].to_list()) & set(after.events["user_id"].to_list())
    assert other.description.notes[NOTE]["key"] != after.description.notes[NOTE]["key"]


@settings(deadline=None, max_examples=50)
@given(users=st.sets(st.integers(-(2**63), 2**63 - 1), max_size=30))
def test_pseudonyms_are_ids_of_their_own(users):
    anonymiser = Anonymiser(KEY)
    found = {user: anonymiser.pseudonym(user) for user in users}
    assert len(set(found.values())) == len(users)
    assert all(0 <= name < 2**63 for user, name in found.items() if user != ANONYMOUS_USER)
    assert anonymiser.pseudonym(ANONYMOUS_USER) == ANONYMOUS_USER


def test_what_few_have_in_common_is_left_out(before, after):
    k = 3
    users = after.events.join(before.events.group_by("item_id").agg(n=pl.col("user_id").n_unique()), on="item_id")["n"]
    assert users.min() >= k
    kept = after.requests.collect()
    asked = before.requests.group_by(plain().alias("query")).agg(n=pl.col("user_id").n_unique()).collect()
    often = dict(asked.iter_rows())
    assert all(often[query] >= k for query in kept["query"] if query)
    assert kept["query"].to_list() == kept.select(plain()).to_series().to_list()  # nobody is told by their capitals
    seen = dict(before.events.group_by("item_id").agg(n=pl.col("user_id").n_unique()).iter_rows())
    chosen = [item for items, labels in kept.select("item_ids", "labels").iter_rows()
              for item, label in zip(items, labels, strict=True) if label > 0]  # fmt: skip
    assert chosen
    assert min(seen[item] for item in chosen) >= k
    done = after.description.notes[NOTE]
    assert done["events_dropped"] == before.events.height - after.events.height
    dropped = done["requests_with_rare_queries"] + done["requests_with_rare_choices"]
    assert dropped == before.requests.collect().height - kept.height > 0


def test_days_and_the_order_remain(before, after):
    """Whatever came before a request still does, and nothing else."""
    whole = Anonymiser(KEY, k=1)
    coarse, exact = whole.apply(before), Anonymiser(KEY, k=1, keep_times=True).apply(before)
    for user in exact.events["user_id"].unique().sort().head(20).to_list():
        (old, asked_old), (new, asked_new) = (
            [frame.filter(pl.col("user_id") == user)["timestamp"].to_numpy() for frame in frames]
            for frames in ((exact.events, exact.requests.collect()), (coarse.events, coarse.requests.collect()))
        )
        assert (new // 86_400 == old // 86_400).all()
        assert (new % 86_400).max() < 1_000
        np.testing.assert_array_equal(asked_old[:, None] > old, asked_new[:, None] > new)
    for frame in (coarse.events, coarse.requests.collect()):
        assert frame.select("timestamp", "user_id").rows() == sorted(frame.select("timestamp", "user_id").rows())


@pytest.mark.parametrize(
    "query",
    ["anna@example.com", "lamp for anna.b@mail.example.de", "+49 (30) 1234-5678", "order 4711238", "www.anna.example",
     "12 Baker Street", "221b upper baker st", "Lindenstraße 12", "Am Postweg 3", "rue de Rivoli 12", "南京路 100号",
     "10115 berlin"],
)  # fmt: skip
def test_queries_that_tell_of_somebody(query):
    assert pl.DataFrame({"query": [query]}).select(telling()).item()
    many = pl.LazyFrame({"query": [query] * 50, "user_id": range(50)})
    assert shared(many, 5) == set()


@pytest.mark.parametrize(
    "query", ["red lamp", "iphone 15", "2x4 board 8 ft", "usb-c 100w", "红色台灯", "150 lamp shade"]
)
def test_queries_that_tell_of_nobody(query):
    many = pl.LazyFrame({"query": [query.upper(), *[f" {query}  "] * 9], "user_id": range(10)})
    assert shared(many, 10) == {query}
    assert shared(many, 11) == set()


def test_a_release_names_no_user_and_no_rare_query(before, world):
    often = shared(before.requests, 5)
    titles = {" ".join(title.split()[:3]).lower() for title in before.items["title"]}
    requests = recorded_requests(world.release)
    assert all(request.user_id in (None, number) for number, request in enumerate(requests, 1))
    assert any(request.user_id is None for request in requests)  # who was anonymous still is
    assert {request.query.lower() for request in requests} <= often | titles | {""}
    assert all(request.timestamp % 86_400 == 0 for request in requests)


def test_by_command(world, tmp_path):
    key, out = tmp_path / "key", tmp_path / "out"
    trirank("privacy", "key", key)
    assert key.stat().st_mode & 0o777 == 0o600
    error = trirank("privacy", "key", key, code=2).stderr
    assert "a key that is there is never replaced" in error.replace("\n", " ")
    log = tmp_path / "log.csv"
    rng = np.random.default_rng(0)
    rows = [f"u{rng.integers(40)},i{rng.integers(12)},click,{1_770_000_000 + 977 * at}" for at in range(900)]
    log.write_text("user_id,item_id,behavior,timestamp\n" + "\n".join([*rows, "u3,lonely,click,1770000001"]) + "\n")
    told = trirank("data", "prepare", log, "--out", out, "--anonymise", key, "--k", 4).stdout
    assert "rare items: 1" in told
    dataset = Dataset.load(out)
    assert dataset.description.notes[NOTE]["k"] == 4
    lonely = dataset.items.filter(pl.col("key") == "lonely")["item_id"].item()
    assert lonely not in dataset.events["item_id"]
    error = trirank("users", "import", out, "--users", f"sqlite:{tmp_path / 'users'}", code=1).stderr
    assert "pseudonyms, which no caller sends" in error.replace("\n", " ")
    for wrong in (tmp_path / "none", log):
        assert "is no key" in trirank("data", "prepare", log, "--out", out, "--anonymise", wrong, code=2).stderr
    assert "identifies or links" in trirank("privacy", "list").stdout


def test_what_cannot_be(before, after, tmp_path):
    with pytest.raises(
        BadData, match="are pseudonyms, which no caller sends; anonymise the dataset that it was made of"
    ):
        Anonymiser(KEY).apply(after)
    nobody = dataclasses.replace(before, events=before.events.clear())
    with pytest.raises(BadData, match="names no users"):
        Anonymiser(KEY).apply(nobody)
    with pytest.raises(BadData, match="nothing is left of .* at k = 1000; take a smaller --k"):
        Anonymiser(KEY, k=1000).apply(before)
    with pytest.raises(BadUsage, match="the key has 4 bytes"):
        Anonymiser(b"1234")
    with pytest.raises(BadUsage, match="--k is 0"):
        Anonymiser(KEY, k=0)
    make_key(tmp_path / "key")
    assert len(read_key(tmp_path / "key")) == 32
    json.dumps(after.description.notes)


def test_every_field_is_classified_and_documented():
    assert unclassified() == set()
    assert len({place.name for place in PLACES}) == len(PLACES)
    assert table() in (ROOT / "docs" / "privacy.md").read_text()
