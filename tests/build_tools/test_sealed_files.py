"""Logs and datasets that nobody reads without a key."""

from __future__ import annotations

import base64
import io
import time

import polars as pl
import pytest
from test_cli import trirank
from trirank_backend import sealed_files
from trirank_backend.errors import InvalidStore
from trirank_backend.master_keys import MasterKeys, add_master_key
from trirank_backend.request_log import RequestLog, Settings
from trirank_backend.sealed_files import SealedFile, key_of, lines_of, rewrap
from trirank_backend.stores.events import Event
from trirank_backend.stores.store import open_store
from trirank_backend.surroundings import KEYS_VARIABLE
from trirank_build.data.dataset import Dataset
from trirank_build.errors import BadData
from trirank_build.online.events import events_of, take_out
from trirank_build.online.requests import logged_requests
from trirank_build.online.users import erase_from_files

LINE = {"request_id": "", "moment": 1, "scenario": "home", "item_ids": [1], "retrieval_scores": None}


@pytest.fixture
def keys(tmp_path, monkeypatch):
    file = tmp_path / "keys.toml"
    add_master_key(file, "first")
    monkeypatch.setenv(KEYS_VARIABLE, str(file))
    return file


def bytes_below(folder):
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def log_requests(folder, *lines):
    log = RequestLog(Settings.read(str(folder)), "release")
    for line in lines:
        log.add(LINE | line)
    log.close()


def store_of(tmp_path, count=5):
    store = open_store(f"sqlite:{tmp_path / 'users.sqlite'}")
    store.add([Event(f"secret-{at}", 700 + at % 2, 9_000_001 + at, 2, 1_772_000_000) for at in range(count)])
    return store


def test_logs_of_requests_are_read_with_the_key_alone(keys, tmp_path, monkeypatch):
    folder = tmp_path / "requests"
    log_requests(folder, {"user_id": 7, "query": "my own words"}, {"user_id": 8, "query": "others"})
    assert [each["query"] for each in logged_requests(folder)] == ["my own words", "others"]
    on_disk = bytes_below(folder)
    assert b"words" not in on_disk
    assert not any(b"words" in base64.b64decode(line) for path in folder.glob("*.jsonl") for line in path.open("rb"))
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    monkeypatch.delenv(KEYS_VARIABLE)
    with pytest.raises(InvalidStore, match=r"requests-.*\.jsonl is sealed, and TRIRANK_KEYS names no keys; set it to"):
        list(logged_requests(folder))
    with pytest.raises(InvalidStore, match="holds sealed files, and TRIRANK_KEYS names no keys"):
        log_requests(folder, {"user_id": 7, "query": "in the clear"})
    assert b"in the clear" not in bytes_below(folder)


def test_each_file_of_requests_has_a_key_of_its_own(keys, tmp_path, monkeypatch):
    monkeypatch.setattr("trirank_backend.request_log._LARGEST", 1)  # a file a request
    log_requests(tmp_path / "r", *({"user_id": at, "query": f"q{at}"} for at in range(3)))
    assert [each["query"] for each in logged_requests(tmp_path / "r")] == ["q0", "q1", "q2"]
    envelopes = {path.read_bytes() for path in (tmp_path / "r").glob("*.key")}
    assert len(envelopes) == len(list((tmp_path / "r").glob("*.jsonl"))) > 2


def test_logs_of_events_are_read_with_the_key_alone(keys, tmp_path, monkeypatch):
    store = store_of(tmp_path)
    folder = tmp_path / "events"
    assert take_out(store, folder) == 5
    assert [event.event_id for event in events_of(folder)] == [f"secret-{at}" for at in range(5)]
    assert b"secret" not in bytes_below(folder)
    assert b"9000001" not in bytes_below(folder)
    monkeypatch.delenv(KEYS_VARIABLE)
    with pytest.raises(InvalidStore, match="is sealed"):
        list(events_of(folder))
    with pytest.raises(InvalidStore, match="holds sealed files"):
        take_out(store, folder)
    store.close()


def test_a_part_that_comes_again_replaces_its_file(keys, tmp_path):
    store = store_of(tmp_path)
    folder, acknowledge = tmp_path / "events", store.acknowledge
    store.acknowledge = lambda *_: (_ for _ in ()).throw(InterruptedError)  # a failure between the two
    with pytest.raises(InterruptedError):
        take_out(store, folder)
    (envelope,) = (path.read_bytes() for path in folder.glob("*.key"))
    store.acknowledge = acknowledge
    assert take_out(store, folder) == 5
    assert len(list(events_of(folder))) == 5
    assert [path.read_bytes() for path in folder.glob("*.key")] == [envelope]  # no moment at which it fits no file
    store.close()


def test_a_user_is_erased_from_sealed_logs(keys, tmp_path):
    """The lines of others keep their numbers, which they are bound to."""
    store = store_of(tmp_path)
    take_out(store, tmp_path / "logs")
    store.close()
    log_requests(tmp_path / "logs", *({"user_id": 700 + at % 2, "query": str(at)} for at in range(4)))
    before = bytes_below(tmp_path / "logs")
    assert erase_from_files(tmp_path / "logs", {700}) == 3 + 2
    assert {event.user_id for event in events_of(tmp_path / "logs")} == {701}
    assert [each["query"] for each in logged_requests(tmp_path / "logs")] == ["1", "3"]
    after = bytes_below(tmp_path / "logs")
    assert len(after) == len(before)
    assert after.count(b" ") > before.count(b" ") + 5 * 40


CHANGES = {
    "another text": lambda lines: [base64.b64encode(b"x" * 60), *lines[1:]],
    "another order": lambda lines: [lines[1], lines[0], *lines[2:]],
    "a line twice": lambda lines: [lines[0], lines[0], *lines[2:]],
    "no line of ours": lambda lines: [b'{"request_id": ""}', *lines[1:]],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_changed_in_a_log_is_not_believed(keys, tmp_path, change):
    folder = tmp_path / "r"
    log_requests(folder, *({"user_id": at, "query": f"q{at}"} for at in range(3)))
    (file,) = folder.glob("*.jsonl")
    file.write_bytes(b"\n".join(change(file.read_bytes().split(b"\n"))))
    with pytest.raises(BadData, match=r"line [12] was changed, or is of another file; leave the file out"):
        list(logged_requests(folder))


def test_a_killed_server_leaves_a_line_that_is_not_whole(keys, tmp_path):
    folder = tmp_path / "r"
    log_requests(folder, *({"user_id": at, "query": f"q{at}"} for at in range(3)))
    (file,) = folder.glob("*.jsonl")
    file.write_bytes(file.read_bytes()[:-20])
    assert [each["query"] for each in logged_requests(folder)] == ["q0", "q1"]


def test_a_disk_that_was_full_costs_the_lines_of_that_time_alone(keys, tmp_path, monkeypatch):
    """Lines after a failure had other numbers than they were sealed with, and half a line stood between others."""
    monkeypatch.setattr("trirank_backend.request_log._AGAIN_S", 0.0)
    log = RequestLog(Settings.read(str(tmp_path / "r")), "release")

    class Full:
        def __init__(self, stream):
            self._stream = stream

        def write(self, line):
            self._stream.write(line[: len(line) // 2])
            self._stream.flush()
            raise OSError(28, "No space left on device")

        def __getattr__(self, name):
            return getattr(self._stream, name)

    def written(query):
        log.add(LINE | {"user_id": 1, "query": query})
        deadline = time.monotonic() + 10
        while not log._queue.empty():
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(0.05)

    written("one")
    log._stream = Full(log._stream)
    written("lost")
    written("two")
    written("three")
    log.close()
    assert [each["query"] for each in logged_requests(tmp_path / "r")] == ["one", "two", "three"]


def test_erasing_says_what_it_could_not_read(keys, tmp_path):
    folder = tmp_path / "r"
    log_requests(folder, {"user_id": 7, "query": "a"}, {"user_id": 8, "query": "b"}, {"user_id": 7, "query": "c"})
    (file,) = folder.glob("*.jsonl")
    lines = file.read_bytes().split(b"\n")
    lines[1] = lines[0]
    file.write_bytes(b"\n".join(lines))
    with pytest.raises(
        BadData, match=r"2 lines are erased, but 1 in 1 files cannot be read .*put the file's \.key back"
    ):
        erase_from_files(folder, {7}, wait_s=0.0)
    key_of(file).unlink()
    with pytest.raises(BadData, match=r"0 lines are erased, but 1 in 1 files cannot be read"):
        erase_from_files(folder, {8}, wait_s=0.0)


def test_other_keys_may_lie_beside_logs(tmp_path, monkeypatch):
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)
    (tmp_path / "pseudonyms.key").write_text("a key of something else")
    (tmp_path / "requests-1.jsonl.key").write_text("of a log that was deleted")
    log_requests(tmp_path, {"user_id": 7, "query": "a"})
    assert len(list(logged_requests(tmp_path))) == 1


@pytest.fixture
def sealed_data(world, keys, tmp_path):
    folder = tmp_path / "sealed"
    Dataset.load(world.data).save(folder)
    return folder


def test_a_dataset_is_read_with_the_key_alone(world, sealed_data, monkeypatch):
    plain, sealed = Dataset.load(world.data), Dataset.load(sealed_data)
    assert plain.description == sealed.description  # so that a run on the one goes with the other
    assert sealed.events.equals(plain.events)
    assert sealed.requests.collect().equals(plain.requests.collect())
    assert sealed.split("valid").equals(plain.split("valid"))
    for name in ("events", "requests"):
        assert b"PAR1" not in (sealed_data / f"{name}.parquet").read_bytes()
        with pytest.raises(pl.exceptions.ComputeError):
            pl.read_parquet(sealed_data / f"{name}.parquet")
    assert not list(sealed_data.glob("*.sealing"))
    assert {path.stat().st_mode & 0o077 for path in sealed_data.glob("events*")} == {0}
    with monkeypatch.context() as patch:
        patch.delenv(KEYS_VARIABLE)
        with pytest.raises(BadData, match=r"events\.parquet is sealed, and TRIRANK_KEYS names no keys"):
            Dataset.load(sealed_data)
    key_of(sealed_data / "events.parquet").unlink()
    with pytest.raises(BadData, match=r"events\.parquet is sealed, and events\.parquet\.key is not beside it; copy it"):
        Dataset.load(sealed_data)


def test_another_master_key_opens_nothing(sealed_data, tmp_path, monkeypatch):
    other = tmp_path / "other.toml"
    add_master_key(other, "first")
    monkeypatch.setenv(KEYS_VARIABLE, str(other))
    with pytest.raises(
        BadData, match=r"other\.toml has another master key 'first' than .*events\.parquet was made with"
    ):
        Dataset.load(sealed_data)
    add_master_key(tmp_path / "third.toml", "third")
    monkeypatch.setenv(KEYS_VARIABLE, str(tmp_path / "third.toml"))
    with pytest.raises(BadData, match=r"events\.parquet wants the master key 'first', and .*third\.toml has third"):
        Dataset.load(sealed_data)


@pytest.mark.parametrize("size", [0, 1, 99, 100, 101, 250, 300])
def test_tables_of_every_length(monkeypatch, size):
    monkeypatch.setattr(sealed_files, "CHUNK", 100)
    monkeypatch.setattr(sealed_files, "_SEALED", 128)
    key, plain = SealedFile(bytes(32)), bytes(range(250)) * 2
    parts = list(key.chunks(io.BytesIO(plain[:size])))
    assert len(parts) == max(1, -(-size // 100))
    assert key.table(io.BytesIO(b"".join(parts))) == plain[:size]
    whole = b"".join(parts)
    damaged = {"cut off": parts[:-1], "reversed": parts[::-1], "twice": [*parts, parts[-1]], "shorter": [whole[:-1]]}
    if len(parts) == 1:
        del damaged["reversed"]
    for what, changed in damaged.items():
        with pytest.raises(ValueError, match=r"chunk \d was changed, or the file was cut off"):
            pytest.fail(f"{what}: {key.table(io.BytesIO(b''.join(changed)))!r}")


def test_master_keys_are_changed_while_a_server_writes(keys, sealed_data, tmp_path, world, monkeypatch):
    """The server's files of afterwards are of the new one: it had kept the one that it started with."""
    folder = tmp_path / "requests"
    log = RequestLog(Settings.read(str(folder)), "release")
    log.add(LINE | {"user_id": 1, "query": "before"})
    add_master_key(keys, "second")
    monkeypatch.setattr("trirank_backend.request_log._LARGEST", 1)  # so that what comes now is in other files
    assert "1 sealed files of" in trirank("privacy", "rotate", folder).stdout
    assert "2 sealed files of" in trirank("privacy", "rotate", sealed_data).stdout
    for query in ("after", "later", "last"):
        log.add(LINE | {"user_id": 1, "query": query})
    log.close()
    lines = keys.read_text().splitlines()
    keys.write_text("\n".join(line for line in lines if "first" not in line) + "\n")
    assert [each["query"] for each in logged_requests(folder)] == ["before", "after", "later", "last"]
    assert Dataset.load(sealed_data).events.equals(Dataset.load(world.data).events)
    with pytest.raises(InvalidStore, match="wants the master key"):
        rewrap(folder, MasterKeys(f"third:{base64.b64encode(bytes(32)).decode()}"))


def test_rotating_what_is_not_sealed(keys, world, monkeypatch):
    found = trirank("privacy", "rotate", world.data, code=1)
    assert "holds no sealed files; name a folder of logs, or a dataset" in found.stderr.replace("\n", " ")
    monkeypatch.delenv(KEYS_VARIABLE)
    found = trirank("privacy", "rotate", world.data, code=2)
    assert "TRIRANK_KEYS names no master keys; set it to their file" in found.stderr.replace("\n", " ")


def test_plain_logs_stay_readable(keys, tmp_path, monkeypatch):
    monkeypatch.delenv(KEYS_VARIABLE)
    log_requests(tmp_path / "r", {"user_id": 1, "query": "old"})
    monkeypatch.setenv(KEYS_VARIABLE, str(keys))
    time.sleep(0.001)
    log_requests(tmp_path / "r", {"user_id": 1, "query": "new"})
    assert [each["query"] for each in logged_requests(tmp_path / "r")] == ["old", "new"]
    sealed = [key_of(path).exists() for path in sorted((tmp_path / "r").glob("*.jsonl"))]
    assert sealed == [False, True]
    assert all(line.whole for path in (tmp_path / "r").glob("*.jsonl") for line in lines_of(path))
