"""A store of users and of what they did: one interface, and an address for each kind of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from trirank_backend.errors import InvalidStore
from trirank_backend.histories import Events
from trirank_backend.stores.events import Event, Past, Stored
from trirank_backend.surroundings import KEYS_VARIABLE

READ_TIMEOUT_S = 0.02
"""How long a request waits for a user's past: for a network and all that belongs to it, or for another process that has
the file locked. Then it is answered as for a user without one."""
WRITE_TIMEOUT_S = 5.0


class Store(Protocol):
    """The same tests run on every kind. Every method raises StoreFailed where the store does not answer in time.

    Attributes:
        remote: whether answers come over a network, and may not come at all.
    """

    @property
    def remote(self) -> bool: ...

    def get(self, users: list[int]) -> dict[int, Past]:
        """What is remembered of those users that are known, in one round trip."""
        ...

    def add(self, events: list[Event]) -> list[bool]:
        """Take events into the log, the users' pasts and the items' counts; those whose id is there already change
        nothing. Durable when it returns; where it raises, it may have taken all, some or none, and the same events can
        be given again. Tells of each whether it was new."""
        ...

    def put(self, histories: list[tuple[int, Events]]) -> None:
        """Add users' histories that came from elsewhere; what is there already is not added twice."""
        ...

    def users(self) -> Iterator[int]:
        """All users of whom something is remembered."""
        ...

    def erase(self, user: int) -> int:
        """Forget a user everywhere in the store, its log included; gives how many events and remembered ones are gone.
        Counts of items stay, which tell of nobody."""
        ...

    def log(self, after: str = "", limit: int = 10_000) -> list[Stored]:
        """Events of the log behind a place, oldest first."""
        ...

    def unread(self, group: str, limit: int = 10_000) -> list[Stored]:
        """Events that a group of consumers has not acknowledged, oldest first: the same again until it does."""
        ...

    def acknowledge(self, group: str, read: list[Stored]) -> None:
        """A group has what it read where it wants it."""
        ...

    def counts(self) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int32]]:
        """Items that were shown or clicked, ascending, and how often each was."""
        ...

    def rotate(self) -> None:
        """Wrap the keys of a sealed store with the newest master key, and seal with a new data key from now on.

        Raises:
            InvalidStore: it is not sealed.
        """
        ...

    def is_durable(self) -> bool:
        """Whether what is answered for is on the disk."""
        ...

    def close(self) -> None:
        """Let go of files and connections."""
        ...


def open_store(address: str, timeout_s: float = WRITE_TIMEOUT_S, keys: str | None = None) -> Store:
    """Open ``sqlite:PATH``, or ``redis://…``, ``rediss://…`` or ``unix://…`` (Redis or Valkey).

    Args:
        timeout_s: of each call.
        keys: of master_keys.MasterKeys, empty for none; None: what the environment says (KEYS_VARIABLE). With
            keys a new store is sealed, and one that is not is refused.

    Raises:
        InvalidStore: the address is none, the file is no store, or it is sealed and the keys are missing or others.
        StoreFailed: a store does not answer at all. Redis is asked for nothing yet.
    """
    kind, colon, rest = address.partition(":")
    said = os.environ.get(KEYS_VARIABLE) if keys is None else keys
    masters = None
    if said:
        from trirank_backend.master_keys import MasterKeys

        masters = MasterKeys(said)
    if kind == "sqlite" and colon and rest:
        from trirank_backend.stores.sqlite import SqliteStore

        return SqliteStore(Path(rest), timeout_s, masters)
    if kind in ("redis", "rediss", "unix") and rest.startswith("//"):
        from trirank_backend.stores.redis import RedisStore

        return RedisStore(address, timeout_s, masters)
    raise InvalidStore(
        f"store {hide_password(address)!r} is none; write sqlite:PATH, redis://HOST:PORT/DATABASE or rediss://…"
    )


def hide_password(address: str) -> str:
    """An address for eyes and logs; nothing but its kind where it is not certain which part is a password."""
    kind, colon, _ = address.partition(":")
    if kind == "sqlite" or not colon:
        return address
    try:
        parts = urlsplit(address)
        _ = parts.port  # what follows a host's colon and is no number may be a password
    except ValueError:
        return f"{kind}:***"
    if "@" in f"{parts.path}{parts.query}{parts.fragment}" or not (parts.netloc or kind == "unix"):
        return f"{kind}:***"
    secret, at, place = parts.netloc.rpartition("@")
    return f"{kind}://{'***@' if at and secret else ''}{place}{parts.path}{'?***' if parts.query else ''}"
