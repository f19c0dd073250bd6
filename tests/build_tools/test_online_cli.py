"""The commands beside a release, as a person types them."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from test_cli import trirank
from trirank.contract import EventKind
from trirank_backend.histories import Events
from trirank_backend.request_log import RequestLog, Settings
from trirank_backend.stores.events import Event
from trirank_backend.stores.overlay import STATE, read_overlay
from trirank_backend.stores.store import open_store
from trirank_build.data.dataset import POSITIONS, Dataset
from trirank_build.online.events import events_of
from trirank_build.online.requests import logged_requests


@pytest.fixture
def users(world, tmp_path):
    address = f"sqlite:{tmp_path / 'users.sqlite'}"
    assert "users' histories are in" in trirank("users", "import", world.data, "--users", address).stdout
    return address


def test_users_come_and_go(world, users, tmp_path):
    user = int(Dataset.load(world.data).events["user_id"][0])
    found = json.loads(trirank("users", "export", "--users", users, "--user", user).stdout)
    assert found["user_id"] == user
    assert found["remembered"]
    assert {event["kind"] for event in found["remembered"]} <= {"click", "cart", "purchase"}
    assert "users are in" in trirank("users", "export", "--users", users, "--out", tmp_path / "all.jsonl").stdout
    assert f"events of user {user} are gone" in trirank("users", "erase", user, "--users", users).stdout
    assert f"nothing was known of user {user}" in trirank("users", "erase", user, "--users", users).stdout
    assert json.loads(trirank("users", "export", "--users", users, "--user", user).stdout)["remembered"] == []


def test_a_user_is_erased_from_logs_too(world, users, tmp_path):
    """Also from a file that a server goes on writing to."""
    logs, requests = tmp_path / "logs", tmp_path / "requests"
    store = open_store(users)
    for name, user in (("mine", 9_877), ("yours", 9_878)):
        store.add([Event(f"{name}-{at}", user, 5 + at, 1, 1_772_000_000 + at) for at in range(3)])
    store.close()
    trirank("users", "log", "--users", users, "--out", logs)
    log = RequestLog(Settings.read(str(requests)), "release")
    line = {"request_id": "", "moment": 1, "query": "red lamp", "scenario": "home", "item_ids": [1],
            "retrieval_scores": None}  # fmt: skip

    def written(count):
        deadline = time.monotonic() + 10
        while requests_in(requests).count(b"\n") < count:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    log.add(line | {"user_id": 9_877, "query": "my own words"})
    log.add(line | {"user_id": 9_878})
    written(2)
    done = trirank("users", "erase", 9_877, "--users", users, "--logs", logs, "--logs", requests)
    assert "3 events of user 9877 are gone" in done.stdout
    assert "4 lines of user 9877 are gone from 2 folders of logs" in done.stdout
    log.add(line | {"user_id": 9_879})
    written(3)
    log.close()
    everything = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"mine-" not in everything
    assert b"my own words" not in everything
    assert b"yours-" in everything
    assert [each["user_id"] for each in logged_requests(requests)] == [9_878, 9_879]
    assert {each.user_id for each in events_of(logs)} == {9_878}
    (tmp_path / "empty").mkdir()
    error = trirank("users", "erase", 9_877, "--users", users, "--logs", tmp_path / "empty", code=1).stderr
    assert "holds no events-*.jsonl and no requests-*.jsonl" in error.replace("\n", " ")


def test_a_store_is_sealed_by_copying_it(world, users, tmp_path, monkeypatch):
    keys, sealed, again = tmp_path / "keys.toml", f"sqlite:{tmp_path / 'sealed'}", f"sqlite:{tmp_path / 'again'}"
    store = open_store(users)
    store.add([Event(f"e{at}", 9_877, 5 + at, 1, 1_772_000_000 + at) for at in range(3)])
    dislike = np.array([int(EventKind.DISLIKE)], np.int32)  # one that is in no log any more
    store.put([(9_877, Events(np.array([4711]), dislike, np.array([1_771_000_000])))])
    everybody = {user: store.get([user])[user].events.item_ids.tolist() for user in store.users()}
    store.close()
    assert "cannot be read" in trirank("users", "key", keys).stdout.replace("\n", " ")
    monkeypatch.setenv("TRIRANK_KEYS", str(keys))
    error = trirank("users", "export", "--users", users, "--user", 9_877, code=1).stderr
    assert "is not sealed, and TRIRANK_KEYS names keys" in error.replace("\n", " ")
    told = trirank("users", "copy", "--users", users, "--source-keys", "", "--into", sealed).stdout
    assert f"3 events and {len(everybody)} users are in" in told.replace("\n", " ")
    error = trirank("users", "copy", "--users", users, "--into", sealed, code=2).stderr
    assert "has users already; name a new store" in error.replace("\n", " ")
    error = trirank("users", "copy", "--users", f"sqlite:{tmp_path / 'none'}", "--into", again, code=2).stderr
    assert "there is no such file" in error.replace("\n", " ")
    trirank("users", "key", keys, "--name", "second")
    trirank("users", "rotate", "--users", sealed)
    store = open_store(sealed)
    assert {user: store.get([user])[user].events.item_ids.tolist() for user in store.users()} == everybody
    assert [stored.event.event_id for stored in store.log()] == ["e0", "e1", "e2"]
    assert store.get([9_877])[9_877].disliked.tolist() == [4711]
    store.close()
    monkeypatch.delenv("TRIRANK_KEYS")
    error = trirank("users", "export", "--users", sealed, "--user", 9_877, code=1).stderr
    assert "is sealed, and TRIRANK_KEYS names no keys" in error.replace("\n", " ")
    error = trirank("users", "rotate", "--users", users, code=1).stderr
    assert "is not sealed, so it has no keys" in error.replace("\n", " ")
    trirank("users", "copy", "--users", sealed, "--source-keys", keys, "--into", again)
    store = open_store(again)
    assert len(store.log()) == 3
    store.close()


def requests_in(folder):
    return b"".join(file.read_bytes() for file in folder.glob("requests-*.jsonl"))


def test_a_password_is_not_repeated(world):
    done = trirank("users", "import", world.data, "--users", "redis://:secret@127.0.0.1:1/0", code=1)
    assert "secret" not in done.stdout + done.stderr


def test_policies_are_listed_and_checked(world, tmp_path):
    listed = trirank("policy", "list", "--release", world.release).stdout
    assert all(name in listed for name in ("search", "home", "new_items", "cross_category"))
    (tmp_path / "home.toml").write_text(
        'description = "sale"\n[[rules]]\nrule = "boost"\nbrands = ["Nobody"]\nby = 1.0\n[[rules]]\nrule = "mmr"\n'
    )
    done = trirank("policy", "check", tmp_path / "home.toml", "--release", world.release)
    assert "by = 1.0" in done.stdout
    assert "rule 1 (boost): no item has the brand Nobody; it works without" in done.stderr.replace("\n", " ")
    told = json.loads(trirank("policy", "check", tmp_path / "home.toml", "--json").stdout)
    assert [rule["rule"] for rule in told["rules"]] == ["boost", "mmr"]
    (tmp_path / "home.toml").write_text('[[rules]]\nrule = "mix"\ntasks = { sale = 1.0 }\n')
    error = trirank("policy", "check", tmp_path / "home.toml", "--release", world.release, code=1).stderr
    assert "does not fit" in error
    assert "tasks sale are none of the ranker's" in error


def test_a_delta_lands_beside_the_releases(world, tmp_path):
    (tmp_path / "delta.csv").write_text("item_id,stock\n1,0\n987654,3\n")
    place = tmp_path / "catalogue.npy"
    command = ("catalogue", "update", tmp_path / "delta.csv", "--release", world.release, "--catalogue", place)
    assert "item 987654 is not in the catalogue" in trirank(*command, code=1).stderr
    assert not place.exists()
    done = trirank(*command, "--skip-unknown")
    assert "1 of 2 rows tell of items that the release does not have" in done.stderr.replace("\n", " ")
    assert read_overlay(place, STATE)["id"].tolist() == [1]


def test_feedback_becomes_a_dataset(world, users, tmp_path):
    store = open_store(users)
    store.add([
        Event("a", 7, 3, EventKind.IMPRESSION.value, 1_780_000_000, "r1", 1),
        Event("b", 7, 3, EventKind.CLICK.value, 1_780_000_009, "r1", 1),
    ])  # fmt: skip
    store.close()
    line = {
        "request_id": "r1", "moment": 1_780_000_000, "user_id": 7, "query": "", "scenario": "home", "top_k": 3,
        "item_ids": [3, 5], "retrieval_scores": None, "release": "x",
    }  # fmt: skip
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "requests-1.jsonl").write_text(json.dumps(line) + "\n")
    trirank(
        "data",
        "prepare",
        world.data,
        "--from-events",
        users,
        "--requests",
        tmp_path / "log",
        "--out",
        tmp_path / "data",
    )
    made = Dataset.load(tmp_path / "data")
    assert "2 events more are in" in trirank("users", "log", "--users", users, "--out", tmp_path / "events").stdout
    assert "0 events more are in" in trirank("users", "log", "--users", users, "--out", tmp_path / "events").stdout
    trirank(
        "data", "prepare", world.data, "--from-events", tmp_path / "events", "--requests", tmp_path / "log",
        "--out", tmp_path / "again",
    )  # fmt: skip
    assert Dataset.load(tmp_path / "again").description.digest == made.description.digest
    task = made.requests.collect().filter(made.requests.collect()["timestamp"] == 1_780_000_000).to_dicts()[0]
    assert task["labels"] == [1.0]
    assert task[POSITIONS] == [1]


def test_skew_without_a_log(world, tmp_path):
    error = trirank("skew", world.release, "--requests", tmp_path, code=1).stderr
    assert "holds no requests-*.jsonl; serve with --log-requests" in error
