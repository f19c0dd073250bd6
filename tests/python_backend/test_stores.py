"""One suite for every kind of user store, and what each does when it fails."""

from __future__ import annotations

import socket
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress

import numpy as np
import pytest
import redis
from stores import SERVER, free_port, running_redis, start_redis
from trirank import contract
from trirank.contract import EventKind
from trirank_backend.errors import InvalidStore, StoreFailed
from trirank_backend.histories import Events
from trirank_backend.master_keys import MasterKeys, add_master_key
from trirank_backend.stores.events import Event
from trirank_backend.stores.guarded import GuardedUsers
from trirank_backend.stores.sealing import Sealed, new_envelopes
from trirank_backend.stores.store import hide_password, open_store
from trirank_backend.surroundings import KEYS_VARIABLE

KINDS = ["sqlite", pytest.param("redis", marks=pytest.mark.skipif(SERVER is None, reason="no redis-server here"))]


@pytest.fixture(scope="module")
def redis_address(tmp_path_factory):
    with running_redis(tmp_path_factory.mktemp("redis")) as address:
        yield address


SEALED_KINDS = ["sqlite-sealed", pytest.param("redis-sealed", marks=KINDS[1].marks)]


@pytest.fixture(params=[*KINDS, *SEALED_KINDS])
def address(request, tmp_path, monkeypatch):
    if request.param.endswith("-sealed"):
        add_master_key(tmp_path / "keys.toml", "first")
        monkeypatch.setenv(KEYS_VARIABLE, str(tmp_path / "keys.toml"))
    if request.param.startswith("sqlite"):
        return f"sqlite:{tmp_path / 'users.sqlite'}"
    found = request.getfixturevalue("redis_address")
    client = redis.Redis.from_url(found)
    client.flushall()
    client.close()
    return found


@pytest.fixture
def store(address):
    store = open_store(address)
    yield store
    store.close()


def event(number, user=1, item=10, kind=EventKind.CLICK, timestamp=1_770_000_000, **more):
    return Event(f"event-{number}", user, item, int(kind), timestamp, **more)


def history(*times):
    return Events(np.array(times) * 10, np.full(len(times), 2, np.int32), np.array(times, np.int64))


def test_of_nobody_nothing_is_known(store):
    assert store.get([1, 2]) == {}
    assert list(store.users()) == []
    assert store.log() == []
    assert [len(column) for column in store.counts()] == [0, 0, 0]


def test_what_users_did_is_seen_at_once_in_order_of_time(store, address):
    assert (
        store.add([event(1, item=11, timestamp=200), event(2, item=12, timestamp=100), event(3, 2, 13)]) == [True] * 3
    )
    reader = open_store(address)  # another process, as far as a store is concerned
    found = reader.get([1, 2, 3])
    assert set(found) == {1, 2}
    assert found[1].events.item_ids.tolist() == [12, 11]
    assert found[1].events.timestamps.tolist() == [100, 200]
    assert found[1].events.behaviours.tolist() == [2, 2]
    assert [found[1].events.item_ids.dtype, found[1].events.behaviours.dtype] == [np.int64, np.int32]
    store.add([event(4, item=14, timestamp=150)])
    assert reader.get([1])[1].events.item_ids.tolist() == [12, 14, 11]
    reader.close()


def test_an_event_counts_once(store):
    assert store.add([event(1)]) == [True]
    assert store.add([event(1), event(2)]) == [False, True]
    assert store.add([event(1), event(2)]) == [False, False]
    assert len(store.get([1])[1].events.item_ids) == 2
    assert [stored.event.event_id for stored in store.log()] == ["event-1", "event-2"]
    assert [column.tolist() for column in store.counts()] == [[10], [0], [2]]


def test_impressions_are_counted_and_logged_and_no_past(store):
    shown = [event(at, item=10 + at, kind=EventKind.IMPRESSION, position=at + 1, request_id="r7") for at in range(3)]
    store.add([*shown, event(9, item=11)])
    assert store.get([1])[1].events.item_ids.tolist() == [11]
    assert [column.tolist() for column in store.counts()] == [[10, 11, 12], [1, 1, 1], [0, 1, 0]]
    assert [stored.event for stored in store.log()] == [*shown, event(9, item=11)]


def test_what_is_disliked_is_remembered_apart(store):
    store.add([event(1, item=5, kind=EventKind.DISLIKE), event(2, item=6, kind=EventKind.PURCHASE)])
    past = store.get([1])[1]
    assert past.disliked.tolist() == [5]
    assert past.events.item_ids.tolist() == [6]
    assert past.events.behaviours.tolist() == [5]


def test_anonymous_events_count_for_items_alone(store):
    store.add([event(1, user=contract.ANONYMOUS_USER)])
    assert store.get([contract.ANONYMOUS_USER]) == {}
    assert store.counts()[2].tolist() == [1]
    assert len(store.log()) == 1


def test_large_ids(store):
    store.add([event(1, user=2**62, item=2**62 + 1)])
    assert store.get([2**62])[2**62].events.item_ids.tolist() == [2**62 + 1]
    assert store.counts()[0].tolist() == [2**62 + 1]


def test_histories_from_elsewhere_are_added_once(store):
    store.add([event(1, item=30, timestamp=3)])
    for _ in range(2):
        store.put([(1, history(1, 2)), (2, history(7))])
    found = store.get([1, 2])
    assert found[1].events.item_ids.tolist() == [10, 20, 30]
    assert found[2].events.item_ids.tolist() == [70]
    assert list(store.users()) == [1, 2]


def test_events_of_one_moment_keep_their_order_and_number(store):
    """As training has them: logs of days, and bursts within a second."""
    past = Events(np.array([9, 4, 7, 4]), np.full(4, 2, np.int32), np.full(4, 100, np.int64))
    for _ in range(2):
        store.put([(1, past)])
        assert store.get([1])[1].events.item_ids.tolist() == [9, 4, 7, 4]


def test_only_the_newest_are_kept(store):
    count = 4 * contract.MAX_HISTORY
    store.add([event(at, item=at, timestamp=1000 + at) for at in range(count)])
    found = store.get([1])[1].events
    assert found.item_ids.tolist() == list(range(count - contract.MAX_HISTORY, count))


def test_the_newest_are_those_of_the_latest_times(store):
    """A caller that was cut off tells late what happened early: it pushes nothing newer out."""
    store.add([event(at, item=at, timestamp=10_000 + at) for at in range(contract.MAX_HISTORY)])
    old = [event(10_000 + at, item=10_000 + at, timestamp=at + 1) for at in range(3 * contract.MAX_HISTORY)]
    for start in range(0, len(old), 1_000):
        store.add(old[start : start + 1_000])
    assert store.get([1])[1].events.item_ids.tolist() == list(range(contract.MAX_HISTORY))


def test_dislikes_and_what_was_done_push_each_other_out_of_nothing(store):
    clicks = [event(at, item=at, timestamp=1000 + at) for at in range(500)]
    store.add(clicks)
    many = 4 * contract.MAX_HISTORY
    store.add([event(1000 + at, item=1000 + at, kind=EventKind.DISLIKE, timestamp=5000 + at) for at in range(many)])
    past = store.get([1])[1]
    assert past.events.item_ids.tolist() == list(range(500))
    assert past.disliked.tolist() == list(range(1000 + many - contract.MAX_HISTORY, 1000 + many))
    store.add([event(10_000 + at, item=at, timestamp=20_000 + at) for at in range(many)])
    past = store.get([1])[1]
    assert len(past.events.item_ids) == len(past.disliked) == contract.MAX_HISTORY


def test_a_user_is_forgotten(store):
    store.add([event(1), event(2, item=11, kind=EventKind.IMPRESSION), event(3, user=2)])
    assert store.erase(1) == 2
    assert set(store.get([1, 2])) == {2}
    assert [stored.event.user_id for stored in store.log()] == [2]
    assert list(store.users()) == [2]
    assert store.erase(1) == 0
    assert store.counts()[1].sum() == 1  # counts tell of nobody


def test_the_log_is_read_in_parts(store):
    store.add([event(at) for at in range(25)])
    found, after = [], ""
    while part := store.log(after, limit=10):
        found += [stored.event.event_id for stored in part]
        after = part[-1].place
    assert found == [f"event-{at}" for at in range(25)]
    store.add([event(99)])
    assert [stored.event.event_id for stored in store.log(after)] == ["event-99"]


def test_each_group_of_consumers_gets_each_event_once(store):
    store.add([event(at) for at in range(25)])
    ids = lambda read: [stored.event.event_id for stored in read]  # noqa: E731
    first = store.unread("train", limit=10)
    assert ids(first) == [f"event-{at}" for at in range(10)]
    assert ids(store.unread("train", limit=10)) == ids(first)  # it may have failed in between
    store.acknowledge("train", first)
    rest = store.unread("train", limit=100)
    assert ids(rest) == [f"event-{at}" for at in range(10, 25)]
    store.acknowledge("train", rest)
    assert store.unread("train") == []
    store.add([event(99)])
    assert ids(store.unread("train")) == ["event-99"]
    assert len(store.unread("watch", limit=100)) == 26
    store.acknowledge("train", [])


def test_many_writers_lose_nothing(address):
    def write(number):
        own = open_store(address)
        for batch in range(10):
            own.add([event(f"{number}-{batch}-{at}", user=7, item=at) for at in range(5)])
        own.close()

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store = open_store(address)
    assert len(store.log()) == 200
    assert len(store.get([7])[7].events.item_ids) == 200
    assert store.counts()[2].sum() == 200
    store.close()


def test_counts_have_an_end(tmp_path):
    store = open_store(f"sqlite:{tmp_path / 'users.sqlite'}")
    store._connection.execute("INSERT INTO counts VALUES (5, 3000000000, 4000000000)")
    assert [column.tolist() for column in store.counts()] == [[5], [2**31 - 1], [2**31 - 1]]
    store.close()


@pytest.mark.parametrize("kind", [*KINDS, pytest.param("redis-with-dumps", marks=KINDS[1].marks)])
def test_a_forgotten_user_is_gone_from_the_disk(tmp_path, kind):
    with ExitStack() as running:
        address = f"sqlite:{tmp_path / 'users.sqlite'}"
        if kind != "sqlite":
            port = free_port()
            process = start_redis(tmp_path, port, *(("--save", "60", "1") if kind == "redis-with-dumps" else ()))
            running.callback(process.wait, 10)
            running.callback(process.terminate)
            address = f"redis://127.0.0.1:{port}/0"
        store = open_store(address)
        running.callback(store.close)
        store.add([event(f"secret-{at}", user=987654321, item=5_000_000_000 + at) for at in range(50)])
        store.add([event("other", user=6)])
        if kind == "redis-with-dumps":
            store._redis.save()

        def disk():
            return b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())

        assert b"secret-7" in disk()
        if kind == "sqlite":
            assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}
        assert store.erase(987654321) == 50
        left = disk()
        assert b"secret" not in left
        assert b"987654321" not in left
        assert (5_000_000_007).to_bytes(8, "little") not in left
        assert b"other" in left
        assert [stored.event.user_id for stored in store.log()] == [6]


@pytest.mark.skipif(SERVER is None, reason="no redis-server here")
def test_who_reads_the_log_notices_no_erasure(redis_address):
    """What was given to a group and not acknowledged comes again, what was acknowledged does not, and the rest does."""
    store = open_store(redis_address)
    store._redis.flushall()
    store.add([event(at, user=at % 3) for at in range(30)])
    read = store.unread("one", limit=10)
    store.acknowledge("one", read[:5])
    store.unread("two", limit=30)
    kept = [stored for stored in store.log() if stored.event.user_id != 1]
    assert store.erase(1) == 10
    assert store.log() == kept
    store.add([event(99, user=2)])
    kept = store.log()
    given = {stored.place for stored in read[5:]}
    assert store.unread("one") == [stored for stored in kept if stored.place in given]
    store.acknowledge("one", store.unread("one"))
    done = {stored.place for stored in read}
    assert store.unread("one") == [stored for stored in kept if stored.place not in done]
    assert store.unread("two") == kept[:-1]
    store.erase(0)
    store.erase(2)
    assert store.log() == []
    store.add([event(100, user=2)])
    assert len(store.log()) == 1
    store.close()


def test_many_open_new_stores_at_once(tmp_path):
    """And close them again, which takes the write-ahead log away: one in sixteen was told that the file is locked."""
    together = threading.Barrier(8)

    def open_each(_):
        for number in range(60):
            together.wait(20)
            open_store(f"sqlite:{tmp_path / str(number) / 'users.sqlite'}", timeout_s=0.02).close()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(open_each, range(8)))


def test_a_batch_is_stored_whole_or_not_at_all(tmp_path):
    store = open_store(f"sqlite:{tmp_path / 'users.sqlite'}")
    store.add([event(1)])
    with pytest.raises(StoreFailed, match="did not answer"):
        store.add([event(2), Event("event-3", None, 1, 2, 3)])  # no database takes that
    assert [stored.event.event_id for stored in store.log()] == ["event-1"]
    store.add([event(2)])
    store.close()


NONE = {
    "redis:1": r"store 'redis:\*\*\*' is none; write sqlite:PATH",
    "redis:/:secret@host": r"store 'redis:\*\*\*' is none",
    "redis:user:secret@host": r"store 'redis:\*\*\*' is none",
    "redis://:secret/w@host": "the Redis address is none; .* the password percent-encoded",
    "redis://:secret#w@host": "the Redis address is none",
    "redis://:secret?w@host": "the Redis address is none",
    "postgres://x": "is none",
    "sqlite:": "is none",
    "redis://user:secret@host:port": "the Redis address is none",
    "mongo://user:secret@host": r"store 'mongo://\*\*\*@host' is none",
}


@pytest.mark.parametrize("text", NONE)
def test_what_is_no_address(text):
    with pytest.raises(InvalidStore, match=NONE[text]) as caught:
        open_store(text)
    assert "secret" not in str(caught.value)


def test_passwords_are_not_shown():
    assert hide_password("redis://:secret@host:1/0") == "redis://***@host:1/0"
    assert hide_password("redis://host:1/0?password=secret") == "redis://host:1/0?***"
    assert hide_password("unix:///tmp/redis.sock") == "unix:///tmp/redis.sock"
    for torn in ("redis://:se/cret@host", "redis://:se?cret@host", "redis://u:1/se@h", "redis:u:se@h", "redis:/:se@h"):
        assert hide_password(torn) == "redis:***"
    assert hide_password("sqlite:/tmp/a@b") == "sqlite:/tmp/a@b"


def test_a_file_that_is_no_store(tmp_path):
    (tmp_path / "bad.sqlite").write_text("not a database at all, though it has some length, as files do")
    with pytest.raises(InvalidStore, match="cannot be opened .*; name another file, or put a copy in its place"):
        open_store(f"sqlite:{tmp_path / 'bad.sqlite'}")
    other = sqlite3.connect(tmp_path / "other.sqlite")
    other.execute("CREATE TABLE prices (a)")
    other.commit()
    other.close()
    with pytest.raises(InvalidStore, match="is a SQLite file of something else"):
        open_store(f"sqlite:{tmp_path / 'other.sqlite'}")
    with pytest.raises(InvalidStore, match="cannot be opened"):
        open_store("sqlite:/proc/users.sqlite")


def test_a_store_of_a_later_version(tmp_path):
    open_store(f"sqlite:{tmp_path / 'users.sqlite'}").close()
    other = sqlite3.connect(tmp_path / "users.sqlite")
    other.execute("PRAGMA user_version = 9")
    other.close()
    with pytest.raises(InvalidStore, match="is of version 9, this one reads 1"):
        open_store(f"sqlite:{tmp_path / 'users.sqlite'}")


class Garbage:
    """Answers anything to anybody."""

    def __init__(self, words):
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"redis://127.0.0.1:{self._server.getsockname()[1]}/0"
        self._words = words
        self._open = []
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self):
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            self._open.append(connection)
            if self._words is not None:
                connection.sendall(self._words * 50)

    def close(self):
        self._server.close()
        for connection in self._open:
            connection.close()


@pytest.mark.parametrize(
    "words", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x00\xff garbage", b":17\r\n", b"$-7\r\n", None]
)
def test_what_is_no_redis(words):
    """The last one says nothing at all."""
    server = Garbage(words)
    store = open_store(server.address, timeout_s=0.1)
    for ask in (lambda: store.get([1]), lambda: store.add([event(1)]), store.counts, store.log):
        started = time.monotonic()
        with pytest.raises(StoreFailed, match="did not answer as Redis does"):
            ask()
        assert time.monotonic() - started < 2
    store.close()
    server.close()


def test_nobody_listens():
    with pytest.raises(StoreFailed, match=r"127\.0\.0\.1:1 did not answer"):
        open_store("redis://127.0.0.1:1/0", timeout_s=0.1).get([1])


class Scripted:
    """A store that fails when it is told to, and takes as long as it is told to."""

    def __init__(self, remote=False):
        self.remote, self.fails, self.asked, self.takes_s = remote, False, 0, 0.0

    def get(self, users):
        self.asked += 1
        time.sleep(self.takes_s)
        if self.fails:
            raise StoreFailed("down")
        return {}

    def close(self):
        pass


def test_after_some_failures_nobody_asks_for_a_while():
    store = Scripted()
    users = GuardedUsers(store, failures=3, reset_s=0.2)
    assert users.get([1]) == {}
    store.fails = True
    assert [users.get([1]) for _ in range(10)] == [None] * 10
    assert store.asked == 4  # the first, and three that failed
    time.sleep(0.25)
    assert users.get([1]) is None
    assert store.asked == 5  # one tries
    assert users.get([1]) is None
    assert store.asked == 5
    store.fails = False
    time.sleep(0.25)
    assert users.get([1]) == {}
    assert users.get([1]) == {}
    assert store.asked == 7


def test_a_remote_store_has_one_time_for_all_it_does():
    """A name server that is silent, a handshake, an answer in drops: whatever it is, requests do not wait for it."""
    store = Scripted(remote=True)
    users = GuardedUsers(store, failures=3, reset_s=0.05, timeout_s=0.05)
    assert users.get([1]) == {}
    store.takes_s = 1.0
    started = time.monotonic()
    assert [users.get([1]) for _ in range(20)] == [None] * 20
    assert time.monotonic() - started < 0.5
    assert store.asked == 2  # nobody joins the queue behind one that hangs
    store.takes_s = 0.0
    deadline = time.monotonic() + 5
    while users.get([1]) is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    users.close()


def test_a_redis_that_answers_in_drops_is_not_waited_for():
    """Each drop comes within the time of a read, the whole answer never does."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def drip():
            connection, _ = listening.accept()
            with connection, suppress(OSError):
                while True:
                    connection.sendall(b"+")
                    time.sleep(0.01)

        threading.Thread(target=drip, daemon=True).start()
        users = GuardedUsers(open_store(f"redis://127.0.0.1:{listening.getsockname()[1]}/0", timeout_s=0.02))
        started = time.monotonic()
        assert users.get([1]) is None
        assert time.monotonic() - started < 0.5
        users.close()


@pytest.fixture(params=SEALED_KINDS)
def sealed(request, tmp_path, monkeypatch):
    """Address, folder of the store's files, and file of master keys of a sealed store."""
    keys, folder = tmp_path / "keys.toml", tmp_path / "store"
    folder.mkdir()
    add_master_key(keys, "first")
    monkeypatch.setenv(KEYS_VARIABLE, str(keys))
    if request.param == "sqlite-sealed":
        yield f"sqlite:{folder / 'users.sqlite'}", folder, keys
        return
    port = free_port()
    process = start_redis(folder, port)
    try:
        yield f"redis://127.0.0.1:{port}/0", folder, keys
    finally:
        process.terminate()
        process.wait(10)


SECRET = Event("an-event-id", 7_654_321_987_654_321, 5_000_000_007, 1, 1_772_345_678, "a-request-id", 3)


def test_without_a_key_nobody_reads_it(sealed, monkeypatch):
    address, folder, keys = sealed
    store = open_store(address)
    store.add([SECRET])
    store.put([(SECRET.user_id, history(*range(1_772_000_000, 1_772_000_005)))])
    assert [stored.event for stored in store.log()] == [SECRET]
    assert store.get([SECRET.user_id])[SECRET.user_id].events.item_ids.tolist()[-1] == SECRET.item_id
    assert list(store.users()) == [SECRET.user_id]
    store.close()
    disk = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    for number in (SECRET.user_id, SECRET.timestamp):
        assert str(number).encode() not in disk
        assert number.to_bytes(8, "little") not in disk
        assert number.to_bytes(8, "big") not in disk
    for words in (b"an-event-id", b"a-request-id", keys.read_text().split('"')[3].encode()):
        assert words not in disk
    for said in ("", f"other:{'A' * 43}=", str(keys.with_name("others.toml"))):
        if said.endswith(".toml"):
            add_master_key(keys.with_name("others.toml"), "first")
        monkeypatch.setenv(KEYS_VARIABLE, said)
        with pytest.raises((InvalidStore, StoreFailed), match="master key|is sealed"):
            open_store(address).get([SECRET.user_id])


def test_what_is_plain_is_not_taken_for_sealed(address, tmp_path, monkeypatch):
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)
    store = open_store(address)
    store.put([(1, history(5))])  # as an import does, and nothing else
    store.close()
    add_master_key(tmp_path / "more.toml", "first")
    monkeypatch.setenv(KEYS_VARIABLE, str(tmp_path / "more.toml"))
    with pytest.raises((InvalidStore, StoreFailed), match="is not sealed, and TRIRANK_KEYS names keys; copy it"):
        open_store(address).get([1])


def test_two_that_seal_a_new_store_at_once(tmp_path, monkeypatch, redis_address):
    """What one has sealed while the other was looking is not taken for plain."""
    client = redis.Redis.from_url(redis_address)
    client.flushall()
    add_master_key(tmp_path / "keys", "first")
    monkeypatch.setenv(KEYS_VARIABLE, str(tmp_path / "keys"))
    slow, ask = open_store(redis_address), redis.Redis.exists

    def exists(self, *names):
        found = ask(self, *names)
        monkeypatch.undo()
        open_store(redis_address, keys=str(tmp_path / "keys")).add([event(1)])
        return found

    monkeypatch.setattr(redis.Redis, "exists", exists)
    assert slow.add([event(2)]) == [True]
    assert len(slow.get([1])[1].events.item_ids) == 2
    client.close()


def test_a_server_without_keys_writes_nothing_in_the_clear(tmp_path, monkeypatch, redis_address):
    """It met an empty store, which another one has sealed since."""
    client = redis.Redis.from_url(redis_address)
    client.flushall()
    early = open_store(redis_address)
    assert early.get([1]) == {}
    add_master_key(tmp_path / "keys", "first")
    monkeypatch.setenv(KEYS_VARIABLE, str(tmp_path / "keys"))
    open_store(redis_address).add([event(1)])
    with pytest.raises(StoreFailed, match="it has been sealed"):
        early.add([event(2)])
    with pytest.raises(StoreFailed, match="is sealed, and"):
        early.put([(1, history(5))])
    assert client.xlen("trirank:events") == 1
    client.close()


def test_an_erasure_that_was_cut_short_is_done_again(tmp_path, redis_address):
    store = open_store(redis_address)
    store._redis.flushall()
    store.add([event(at, user=at % 2) for at in range(6)])
    write, store._write_log_anew = store._write_log_anew, lambda token: 1 / 0
    with pytest.raises(ZeroDivisionError):
        store.erase(1)
    store._write_log_anew = write
    assert store._redis.exists("trirank:events.dirty")
    assert store.erase(1) == 0
    assert not store._redis.exists("trirank:events.dirty", "trirank:events.lock")
    assert b"event-1" not in store._redis.dump("trirank:events")
    assert len(store.log()) == 3
    store._redis.set("trirank:events.lock", "another")
    with pytest.raises(StoreFailed, match="another user is being erased"):
        store.erase(0)
    store._redis.delete("trirank:events.lock")
    store.close()


def test_opening_it_again_leaves_its_locks(tmp_path):
    """SQLite's locks are the process's, and closing any handle of the file drops them all (fcntl(2)): another process
    then took itself for the last one, and removed what this one had written ahead."""
    address = f"sqlite:{tmp_path / 'users.sqlite'}"
    store = open_store(address)
    store.add([event(1)])
    open_store(address)  # in this process, and still open
    code = f"from trirank_backend.stores.store import open_store; s = open_store({address!r}); s.log(); s.close()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    store.add([event(2)])
    code = f"from trirank_backend.stores.store import open_store; print(len(open_store({address!r}).log()))"
    done = subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True, text=True)
    assert done.stdout.strip() == "2"
    store.close()


def test_keys_are_rotated_while_it_is_used(sealed):
    """A server that runs reads what others write with a new key, and goes on writing with the one that it has."""
    address, _, keys = sealed
    server = open_store(address)
    server.add([event(1, user=1)])
    add_master_key(keys, "second")
    other = open_store(address)
    other.rotate()
    keys.write_text("\n".join(line for line in keys.read_text().splitlines() if "second" in line) + "\n")
    fresh = open_store(address)  # the first master key is not needed any more
    fresh.add([event(2, user=1), event(3, user=2)])
    for store in (server, other, fresh):
        assert len(store.get([1])[1].events.item_ids) == 2
        assert len(store.log()) == 3
    assert server.add([event(4, user=3), event(2, user=1)]) == [True, False]
    assert len(fresh.get([3])) == 1
    for store in (server, other, fresh):
        store.close()


def test_what_is_changed_on_the_disk_is_not_believed(tmp_path, monkeypatch):
    """Nor is one user's past that was put in another's place."""
    add_master_key(tmp_path / "keys", "first")
    monkeypatch.setenv(KEYS_VARIABLE, str(tmp_path / "keys"))
    path = tmp_path / "users.sqlite"
    store = open_store(f"sqlite:{path}")
    store.add([event(1, user=1), event(2, user=2)])
    with sqlite3.connect(path) as connection:
        (first, own), (second, others) = connection.execute("SELECT user_id, records FROM users").fetchall()
        for harm in (others, own[:-1] + bytes([own[-1] ^ 1]), own[:9], b"\xff\xff" + own[2:]):
            connection.execute("UPDATE users SET records = ? WHERE user_id = ?", (harm, first))
            connection.commit()
            with pytest.raises(StoreFailed, match="damaged|put there by somebody else"):
                store.get([1, 2])
        connection.execute("UPDATE users SET records = ? WHERE user_id = ?", (own, first))
    assert second != first
    assert set(store.get([1, 2])) == {1, 2}
    store.close()


def test_nothing_is_sealed_twice_alike():
    masters = MasterKeys("own:" + "A" * 43 + "=")
    envelopes = new_envelopes(masters)
    codec = Sealed(masters, lambda: envelopes)
    records = np.zeros(3, [("item_id", "<i8"), ("timestamp", "<i8"), ("kind", "<i4")])
    assert codec.past(5, records) != codec.past(5, records)
    single = codec.single(5, records)
    assert len({single[at : at + len(single) // 3] for at in range(0, len(single), len(single) // 3)}) == 3
    np.testing.assert_array_equal(codec.single_records(codec.name(5), single), records)
    assert codec.name(5) == codec.name(5) != codec.name(6)
    with pytest.raises(StoreFailed, match="no number of sealed events"):
        codec.single_records(codec.name(5), single[:-1])


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("nowhere.toml", "has no master keys"),
        ("name:rubbish", "has no master keys"),
        ("name:AAAA", "is not of 32 bytes"),
        ("TEXT", "there is none"),
    ],
)
def test_master_keys_that_are_none(tmp_path, monkeypatch, said, words):
    if said == "TEXT":
        (tmp_path / "empty").write_text("")
        said = str(tmp_path / "empty")
    monkeypatch.setenv(KEYS_VARIABLE, said)
    with pytest.raises(InvalidStore, match=words) as caught:
        open_store(f"sqlite:{tmp_path / 'users.sqlite'}")
    assert "AAAA" not in str(caught.value)
    assert "rubbish" not in str(caught.value)
    assert not (tmp_path / "users.sqlite").exists()
