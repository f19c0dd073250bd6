"""Users in Redis or Valkey: the store that several servers share.

``PREFIX user:ID``   records (events.RECORD) of a user one after the other as they came: the newest, and some more
``PREFIX seen:ID``   that an event is there; expires after SEEN_S, since a retry comes sooner
``PREFIX events``    stream: the log, which consumer groups read
``PREFIX keys``      hash, of a sealed store: number → data key in its envelope (sealing)
``PREFIX shown``, ``PREFIX clicked``   hashes: item id → how often

In a sealed store ids of users and events are names, records are sealed one by one, and an entry of the log has its
event's name and user's name beside the sealed event.

All of a batch happens in one script: Redis runs it whole, and with ``appendfsync always`` it is on the disk before it
is answered for. A single primary is needed; keys of one script would lie on several nodes of a cluster.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import numpy as np
import redis
from numpy.typing import NDArray
from redis.backoff import NoBackoff
from redis.maint_notifications import MaintNotificationsConfig
from redis.retry import Retry
from trirank import contract
from trirank.contract import EventKind

from trirank_backend.errors import InvalidStore, StoreFailed
from trirank_backend.histories import Events
from trirank_backend.master_keys import MasterKeys
from trirank_backend.stores.events import KEPT_KINDS, MOST, RECORD, Event, Past, Stored, merged, newest, records_of
from trirank_backend.stores.sealing import (
    IS_SEALED,
    NOT_SEALED,
    Codec,
    Plain,
    Sealed,
    new_envelopes,
    rotated,
)

PREFIX = "trirank:"
CONSUMER = "export"
"""Of a group, when it is we who read."""
SEEN_S = 86_400
_FIELDS = 9
_LONG = 3 * contract.MAX_HISTORY
"""Events that a user's past may grow to before it is cut; what is kept (events.newest) is two thirds of it at most, so
that it is not cut for every event."""
_PLAIN_ENTRY = "'i', item, 'k', kind, 't', ARGV[at + 4], 'r', ARGV[at + 5], 'p', ARGV[at + 6]"
_SEALED_ENTRY = "'s', ARGV[at + 4]"
_ADD = f"""
if redis.call('EXISTS', '{PREFIX}keys') ~= SEALED then
  return redis.error_reply('it has been sealed, or is so no more, since this server was started')
end
local added, long = {{}}, {{}}
for at = 1, #ARGV, {_FIELDS} do
  local id, user, item, kind = ARGV[at], ARGV[at + 1], ARGV[at + 2], ARGV[at + 3]
  if redis.call('SET', '{PREFIX}seen:' .. id, 1, 'NX', 'EX', {SEEN_S}) then
    table.insert(added, 1)
    redis.call('XADD', '{PREFIX}events', '*', 'e', id, 'u', user, ENTRY)
    if ARGV[at + 7] == '1' then
      if redis.call('APPEND', '{PREFIX}user:' .. user, ARGV[at + 8]) > LONG then
        table.insert(long, user)
      end
    end
    if kind == '{EventKind.IMPRESSION.value}' then redis.call('HINCRBY', '{PREFIX}shown', item, 1) end
    if kind == '{EventKind.CLICK.value}' then redis.call('HINCRBY', '{PREFIX}clicked', item, 1) end
  else
    table.insert(added, 0)
  end
end
return {{added, long}}
"""
_LOCK, _DIRTY = f"{PREFIX}events.lock", f"{PREFIX}events.dirty"
_MAKE_KEYS = """
if redis.call('EXISTS', KEYS[1]) == 1 then return 1 end
if ARGV[1] == '1' or redis.call('EXISTS', KEYS[2], KEYS[3], KEYS[4]) > 0 then return 0 end
redis.call('HSET', KEYS[1], unpack(ARGV, 2))
return 1
"""
"""Whether the store is a sealed one now. Who comes first makes the keys; of a plain one (the log, counts, or, as
ARGV[1] says, users were there before it had keys) nobody does."""
_REPLACE = """
if redis.call('GET', KEYS[3]) ~= ARGV[2] then
  return redis.error_reply('another one has begun to write the log anew')
end
for _, entry in ipairs(redis.call('XRANGE', KEYS[1], '(' .. ARGV[1], '+')) do
  redis.call('XADD', KEYS[2], entry[1], unpack(entry[2]))
end
if redis.call('XLEN', KEYS[1]) ~= redis.call('XLEN', KEYS[2]) then
  return redis.error_reply('the log was changed while it was written anew; say it again')
end
local function named(list)
  local found = {}
  for at = 1, #list, 2 do found[list[at]] = list[at + 1] end
  return found
end
if redis.call('EXISTS', KEYS[2]) == 0 then
  redis.call('XADD', KEYS[2], '0-1', 'x', 'x')
  redis.call('XDEL', KEYS[2], '0-1')
end
for _, told in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
  local group = named(told)
  redis.call('XGROUP', 'CREATE', KEYS[2], group['name'], group['last-delivered-id'])
  local from = '-'
  while true do
    local waiting = redis.call('XPENDING', KEYS[1], group['name'], from, '+', 1000)
    if #waiting == 0 then break end
    for _, each in ipairs(waiting) do
      redis.call('XCLAIM', KEYS[2], group['name'], each[2], 0, each[1], 'FORCE', 'JUSTID')
      from = '(' .. each[1]
    end
  end
end
redis.call('XSETID', KEYS[2], named(redis.call('XINFO', 'STREAM', KEYS[1]))['last-generated-id'])
redis.call('RENAME', KEYS[2], KEYS[1])
redis.call('DEL', KEYS[4])
"""
"""Adds to a copy of the log what came meanwhile and who has read how far, and puts it in its place."""
_CHUNK = 500
"""Events of one script: Redis serves nobody else while it runs."""
_REWRITE_S, _FAILED_S = 300.0, 10.0
"""How long Redis may take, and how long it may leave a failure before it tries again."""
_REWRITING = ("aof_rewrite_in_progress", "aof_rewrite_scheduled", "rdb_bgsave_in_progress")
T = TypeVar("T")


class RedisStore:
    """See store.Store.

    Attributes:
        remote: yes.

    Args:
        timeout_s: of connecting, and of each answer. Nothing is asked for twice: whoever calls knows what a second try
            is worth.
        masters: with which a new one is sealed, and this one was; None: it is not.
    """

    remote = True

    def __init__(self, address: str, timeout_s: float, masters: MasterKeys | None = None) -> None:
        try:
            self._redis: Any = redis.Redis.from_url(
                address, socket_timeout=timeout_s, socket_connect_timeout=timeout_s, retry=Retry(NoBackoff(), 0),
                # A connection that says nothing of itself is ready after one round trip or none; and nobody but us says
                # how long to wait.
                protocol=2, driver_info=None, maint_notifications_config=MaintNotificationsConfig(enabled=False),
            )  # fmt: skip
            place = self._redis.connection_pool.connection_kwargs
        except (ValueError, redis.RedisError):  # whose words may hold a part of the password
            raise InvalidStore(
                "the Redis address is none; write redis://:PASSWORD@HOST:PORT/DATABASE, the password percent-encoded"
            ) from None
        self._place = str(place.get("path") or f"{place.get('host', 'localhost')}:{place.get('port', 6379)}")
        self._masters = masters
        self._codec: Codec | None = None
        """None: it has not been asked yet what it is."""
        kind, entry = (Plain, _PLAIN_ENTRY) if masters is None else (Sealed, _SEALED_ENTRY)
        script = _ADD.replace("ENTRY", entry).replace("LONG", str(_LONG * kind.single_size))
        self._add = self._redis.register_script(script.replace("SEALED", str(int(kind.sealed))))

    def get(self, users: list[int]) -> dict[int, Past]:
        """See store.Store."""

        def ask() -> dict[int, Past]:
            names = [self._written.name(user) for user in users]
            found = self._redis.mget([f"{PREFIX}user:{name}" for name in names])
            return {
                user: Past.of(self._written.single_records(name, stored))
                for user, name, stored in zip(users, names, found, strict=True)
                if stored
            }

        return self._asked(ask)

    def add(self, events: list[Event]) -> list[bool]:
        """See store.Store. Chunks are taken one after the other; where one fails, what came before it is stored."""
        fresh: list[bool] = []
        for start in range(0, len(events), _CHUNK):
            arguments: list[Any] = []
            part = events[start : start + _CHUNK]
            for event in part:
                kept = event.user_id != contract.ANONYMOUS_USER and event.kind in KEPT_KINDS
                record = np.array([(event.item_id, event.timestamp, event.kind)], RECORD)
                arguments += [
                    *self._asked(partial(self._fields, event)),
                    int(kept),
                    self._written.single(event.user_id, record),
                ]
            fresh += self._asked(partial(self._add_part, arguments, part))
        return fresh

    def put(self, histories: list[tuple[int, Events]]) -> None:
        """See store.Store. Each user's change is whole."""
        for user, events in histories:
            self._rewrite(user, partial(merged, new=records_of(events)))

    def users(self) -> Iterator[int]:
        """See store.Store."""

        def ask() -> list[int]:
            keys = self._redis.scan_iter(f"{PREFIX}user:*", count=1_000)
            names = {int(key.rpartition(b":")[2]) for key in keys}
            codec = self._written
            if not codec.sealed:  # what is asked for costs a round trip a user
                return sorted(names)
            last = codec.single_size - 1
            first = {name: self._redis.getrange(f"{PREFIX}user:{name}", 0, last) for name in names}
            return sorted(codec.user(name, stored) for name, stored in first.items() if stored)

        return iter(self._asked(ask))

    def erase(self, user: int) -> int:
        """See store.Store. The log is read through for it."""
        name = self._asked(lambda: self._written.name(user))
        key = f"{PREFIX}user:{name}"
        remembered = int(self._asked(lambda: self._redis.strlen(key) // self._written.single_size))
        self._asked(lambda: self._redis.delete(key))
        with self._erasing() as token:
            logged = self._asked(partial(self._delete_logged, name))
            self._asked(lambda: self._redis.delete(key))  # what came meanwhile is out of the log, or comes after this
            if logged or self._asked(lambda: self._redis.exists(_DIRTY)):
                self._asked(partial(self._write_log_anew, token))
        self._rewrite_files(user)
        return max(remembered, logged)

    @contextmanager
    def _erasing(self) -> Iterator[str]:
        """One at a time, or what one deletes another's copy of the log would bring back."""
        token = secrets.token_hex(8)
        if not self._asked(lambda: self._redis.set(_LOCK, token, nx=True, px=int(_REWRITE_S * 1_000))):
            raise StoreFailed(f"another user is being erased at {self._place}; say it again when that is done")
        try:
            yield token
        finally:
            if self._asked(lambda: self._redis.get(_LOCK)) == token.encode():
                self._asked(lambda: self._redis.delete(_LOCK))

    def _delete_logged(self, name: int) -> int:
        """Take a user's entries out of the log; gives how many. Until it is written anew, it is marked as dirty."""
        logged, after = 0, ""
        while part := self._redis.xrange(f"{PREFIX}events", min=f"({after}" if after else "-", count=10_000):
            after = part[-1][0].decode()
            own = [(place, fields[b"e"].decode()) for place, fields in part if int(fields[b"u"]) == name]
            if own:
                self._redis.set(_DIRTY, 1)
                logged += int(self._redis.xdel(f"{PREFIX}events", *(place for place, _ in own)))
                self._redis.delete(*(f"{PREFIX}seen:{event}" for _, event in own))
        return logged

    def log(self, after: str = "", limit: int = 10_000) -> list[Stored]:
        """See store.Store."""

        def ask() -> list[Stored]:
            found = self._redis.xrange(f"{PREFIX}events", min=f"({after}" if after else "-", count=limit)
            return [self._stored(place, fields) for place, fields in found]

        return self._asked(ask)

    def unread(self, group: str, limit: int = 10_000) -> list[Stored]:
        """See store.Store. A consumer group of the stream; what it was given and has not acknowledged comes first."""

        def ask() -> list[Stored]:
            key = f"{PREFIX}events"
            try:
                self._redis.xgroup_create(key, group, id="0", mkstream=True)
            except redis.ResponseError as error:
                if "BUSYGROUP" not in str(error):  # it is there
                    raise
            for start in ("0", ">"):
                found = self._redis.xreadgroup(group, CONSUMER, {key: start}, count=limit)
                entries = [entry for _, part in found for entry in part if entry[1]]
                if entries:
                    return [self._stored(place, fields) for place, fields in entries]
            return []

        return self._asked(ask)

    def acknowledge(self, group: str, read: list[Stored]) -> None:
        """See store.Store."""
        if read:
            places = [stored.place for stored in read]
            self._asked(partial(self._redis.xack, f"{PREFIX}events", group, *places))

    def counts(self) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int32]]:
        """See store.Store."""

        def ask() -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int32]]:
            # In parts: while Redis gives a whole hash, nobody else is answered.
            found = [dict(self._redis.hscan_iter(f"{PREFIX}{name}", count=1_000)) for name in ("shown", "clicked")]
            ids = np.array(sorted({int(item) for each in found for item in each}), np.int64)
            shown, clicked = (
                np.array([min(int(each.get(b"%d" % item, 0)), MOST) for item in ids.tolist()], np.int32)
                for each in found
            )
            return ids, shown, clicked

        return self._asked(ask)

    def is_durable(self) -> bool:
        """See store.Store. Where nobody may ask, it is taken to be."""
        try:
            found = self._redis.config_get("append*")
        except redis.RedisError:
            return True
        return found.get("appendonly") == "yes" and found.get("appendfsync") == "always"

    def close(self) -> None:
        """Close all connections."""
        self._redis.close()

    def _add_part(self, arguments: list[Any], events: list[Event]) -> list[bool]:
        added, long = self._add(args=arguments)
        users = {self._written.name(event.user_id): event.user_id for event in events}
        if len(added) != len(arguments) // _FIELDS:
            raise ValueError(f"{len(added)} answers to {len(arguments) // _FIELDS} events")
        for name in set(long):
            self._rewrite(users[int(name)], newest)
        return [each == 1 for each in added]

    @property
    def _written(self) -> Codec:
        """How it is written. Asked of Redis once; a new store that is to be sealed gets its keys then.

        Raises:
            StoreFailed: it is sealed and there are no keys here, or the other way round.
        """
        if self._codec is None:
            there = self._redis.exists(f"{PREFIX}keys")
            if there not in (0, 1):  # what is no Redis answers anything
                raise ValueError(f"{there} keys of one name")
            if self._masters is None:
                if there:
                    raise StoreFailed(f"user store {self._place} is {IS_SEALED}")
                self._codec = Plain()
            else:
                if not there:
                    users = next(self._redis.scan_iter(f"{PREFIX}user:*", count=1_000), None) is not None
                    names = [f"{PREFIX}{name}" for name in ("keys", "events", "shown", "clicked")]
                    made = [each for pair in new_envelopes(self._masters).items() for each in pair]
                    if not self._redis.eval(_MAKE_KEYS, len(names), *names, int(users), *made):
                        raise StoreFailed(f"user store {self._place} is {NOT_SEALED}")
                try:
                    self._codec = Sealed(self._masters, self._envelopes)
                except InvalidStore as error:
                    raise StoreFailed(f"user store {self._place}: {error}") from error
        return self._codec

    def _envelopes(self) -> dict[int, bytes]:
        return {int(number): envelope for number, envelope in self._redis.hgetall(f"{PREFIX}keys").items()}

    def rotate(self) -> None:
        """See store.Store."""
        if self._masters is None:
            raise InvalidStore(f"{self._place} is not sealed, so it has no keys")
        masters, key = self._masters, f"{PREFIX}keys"
        self._asked(lambda: self._written)

        def put(pipe: Any) -> None:  # again if another one rotates meanwhile
            envelopes = {int(number): envelope for number, envelope in pipe.hgetall(key).items()}
            pipe.multi()
            pipe.hset(key, mapping=rotated(masters, envelopes))

        self._asked(partial(self._redis.transaction, put, key))

    def _fields(self, event: Event) -> tuple[Any, ...]:
        """Of an event, as the script takes them: of a sealed one item and kind are for counting alone."""
        shown = self._written.shown(event)
        rest = (self._written.event(event), "", 0) if self._written.sealed else event[4:]
        return shown.event_id, shown.user_id, event.item_id, event.kind, *rest

    def _stored(self, place: bytes, fields: dict[bytes, bytes]) -> Stored:
        """An entry of the stream."""
        shown = Event(
            fields[b"e"].decode(), int(fields[b"u"]), int(fields.get(b"i", 0)), int(fields.get(b"k", 0)),
            int(fields.get(b"t", 0)), fields.get(b"r", b"").decode(), int(fields.get(b"p", 0)),
        )  # fmt: skip
        return Stored(place.decode(), self._written.of_event(shown, fields.get(b"s", b"")))

    def _rewrite(self, user: int, change: Callable[[NDArray[np.void]], NDArray[np.void]]) -> None:
        """Put other records in the place of a user's, again if somebody else added to them meanwhile."""
        name = self._asked(lambda: self._written.name(user))
        key = f"{PREFIX}user:{name}"

        def put(pipe: Any) -> None:
            if bool(self._redis.exists(f"{PREFIX}keys")) != (self._masters is not None):
                raise StoreFailed(f"user store {self._place} is {IS_SEALED if self._masters is None else NOT_SEALED}")
            records = change(self._written.single_records(name, pipe.get(key) or b""))
            pipe.multi()
            if len(records):  # else the user was forgotten meanwhile
                pipe.set(key, self._written.single(user, records))

        self._asked(partial(self._redis.transaction, put, key))

    def _write_log_anew(self, token: str) -> None:
        """Put a copy in the place of the log: Redis marks entries of a stream as deleted, and keeps their bytes for as
        long as the entries beside them are there.

        Raises:
            redis.RedisError: it cannot; what was to be deleted is marked as deleted, and the log as dirty.
        """
        log, copy = f"{PREFIX}events", f"{PREFIX}events.{token}"
        try:
            after = "0-0"
            while part := self._redis.xrange(log, min=f"({after}", count=1_000):
                with self._redis.pipeline(transaction=False) as pipe:
                    for place, fields in part:
                        pipe.xadd(copy, fields, id=place)
                    pipe.expire(copy, int(_REWRITE_S))  # gone by itself where this process is
                    pipe.pexpire(_LOCK, int(_REWRITE_S * 1_000))
                    pipe.execute()
                after = part[-1][0].decode()
            self._redis.persist(copy)
            self._redis.eval(_REPLACE, 4, log, copy, _LOCK, _DIRTY, after, token)
        finally:
            self._redis.delete(copy)

    def _rewrite_files(self, user: int) -> None:
        """Have Redis write its files anew: they hold every command that was ever given, those about a user too.

        Raises:
            StoreFailed: it does not, or not in time.
        """
        try:
            told = self._redis.info("persistence")
            before = int(told.get("rdb_last_save_time", 0))
            dumps = bool(told.get("rdb_saves", 0)) or self._has_dumps()
            if told.get("aof_enabled"):
                self._redis.bgrewriteaof()
            if dumps:
                while self._redis.time()[0] <= before:  # or the next one could not be told from the last one
                    time.sleep(0.05)
                self._redis.bgsave(schedule=True)
            began = time.monotonic()
            while True:
                told = self._redis.info("persistence")
                at_work = any(told.get(name) for name in _REWRITING)
                if not at_work and (not dumps or int(told.get("rdb_last_save_time", 0)) > before):
                    break
                waited = time.monotonic() - began
                failed = dumps and not at_work and told.get("rdb_last_bgsave_status") != "ok"
                if waited > (_FAILED_S if failed else _REWRITE_S):
                    raise redis.TimeoutError(f"after {waited:.0f} s: {told.get('rdb_last_bgsave_status')}")
                time.sleep(0.05)
            if told.get("aof_enabled") and told.get("aof_last_bgrewrite_status") != "ok":
                raise redis.RedisError(f"aof_last_bgrewrite_status is {told.get('aof_last_bgrewrite_status')}")
        except redis.RedisError as error:
            raise StoreFailed(
                f"user {user} is forgotten, but Redis at {self._place} has not written its files anew, which still "
                f"hold the bytes ({error}); say it again, or BGREWRITEAOF and BGSAVE there"
            ) from error

    def _has_dumps(self) -> bool:
        try:
            return bool(self._redis.config_get("save").get("save"))
        except redis.ResponseError:  # one may not ask
            return False

    def _asked(self, ask: Callable[[], T]) -> T:
        try:
            return ask()
        except StoreFailed:  # of what it is, not of its answer
            raise
        except (redis.RedisError, OSError, ValueError, TypeError, IndexError, AttributeError, KeyError) as error:
            # What is no Redis answers anything, and its client then raises anything.
            raise StoreFailed(
                f"user store {self._place} did not answer as Redis does ({type(error).__name__}: {error})"
            ) from error
