"""User stores whose contents nobody reads without a key: AES-256-GCM (NIST SP 800-38D) of the library `cryptography`.

What is stored is sealed with a store's own data keys; these lie in the store, in envelopes (master_keys). So a new
master key is a matter of wrapping a few data keys anew, and a new data key seals what is written from then on, while
what is there stays readable: nothing stops for either. A user is found by HMAC-SHA256 of the id under a key of the
store's own, which stays.

Counts of items (how often each was shown and clicked) stay readable, and so do the number and the times of a user's
writes: whoever keeps copies of the files over time, or Redis' append-only file, can see which count rose with which
write. What is sealed is bound to its user and event; that something is missing, or old, is not noticed.

Nonces are random, so a data key is good for 2^32 values (SP 800-38D, 8.3): rotate long before, see docs/privacy.md.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Protocol

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from numpy.typing import NDArray
from trirank import contract

from trirank_backend.errors import InvalidStore, StoreFailed
from trirank_backend.master_keys import KEY_BYTES, MasterKeys
from trirank_backend.stores.events import RECORD, Event
from trirank_backend.surroundings import KEYS_VARIABLE

IS_SEALED = f"sealed, and {KEYS_VARIABLE} names no keys; set it to the file of its master keys"
NOT_SEALED = f"not sealed, and {KEYS_VARIABLE} names keys; copy it into a new one with `trirank users copy`"
"""What is said of a store that is otherwise than whoever opens it."""
NAMING = 0
"""The number of the key that users are named with; data keys are numbered from 1 on."""
_NONCE = 12
_LOOK_S = 60.0
"""So often whoever writes looks for a newer data key."""
_OVERHEAD = 2 + _NONCE + 16
_USER = 8


class Codec(Protocol):
    """How a store writes users and events down.

    Attributes:
        sealed: whether what is written is sealed.
        single_size: bytes of one RECORD of ``single``.
    """

    sealed: bool
    single_size: int

    def name(self, user: int) -> int:
        """What a user is found by."""
        ...

    def event_name(self, event_id: str) -> str:
        """What an event is known by."""
        ...

    def user(self, name: int, stored: bytes) -> int:
        """The user of a name, by their ``past``, or by the first of their ``single`` records."""
        ...

    def past(self, user: int, records: NDArray[np.void]) -> bytes:
        """A user's RECORDs, as one."""
        ...

    def records(self, name: int, stored: bytes) -> NDArray[np.void]:
        """RECORDs of ``past``."""
        ...

    def count(self, size: int) -> int:
        """How many RECORDs a ``past`` of so many bytes has."""
        ...

    def single(self, user: int, records: NDArray[np.void]) -> bytes:
        """RECORDs, each by itself, so that more can be added behind them."""
        ...

    def single_records(self, name: int, stored: bytes) -> NDArray[np.void]:
        """RECORDs of ``single``."""
        ...

    def shown(self, event: Event) -> Event:
        """What of an event stands in the log in the clear."""
        ...

    def event(self, event: Event) -> bytes:
        """What stands beside it, sealed; empty: nothing does."""
        ...

    def of_event(self, shown: Event, stored: bytes) -> Event:
        """The event of ``shown`` and ``event``."""
        ...


class Plain:
    """As it is."""

    sealed = False
    single_size = RECORD.itemsize

    def name(self, user: int) -> int:
        """See Codec."""
        return user

    def event_name(self, event_id: str) -> str:
        """See Codec."""
        return event_id

    def user(self, name: int, stored: bytes) -> int:
        """See Codec."""
        return name

    def past(self, user: int, records: NDArray[np.void]) -> bytes:
        """See Codec."""
        return records.tobytes()

    def records(self, name: int, stored: bytes) -> NDArray[np.void]:
        """See Codec."""
        return np.frombuffer(stored, RECORD)

    def count(self, size: int) -> int:
        """See Codec."""
        return size // RECORD.itemsize

    single, single_records = past, records

    def shown(self, event: Event) -> Event:
        """See Codec."""
        return event

    def event(self, event: Event) -> bytes:
        """See Codec."""
        return b""

    def of_event(self, shown: Event, stored: bytes) -> Event:
        """See Codec."""
        return shown


class Sealed:
    """Sealed with the newest data key; opened with whichever it was sealed with.

    Args:
        masters: of the envelopes.
        load: number → envelope, as the store has them now; asked again where a number is not known.
    """

    sealed = True
    single_size = _OVERHEAD + _USER + RECORD.itemsize

    def __init__(self, masters: MasterKeys, load: Callable[[], Mapping[int, bytes]]) -> None:
        self._masters, self._load = masters, load
        self._keys: dict[int, AESGCM] = {}
        self._naming = b""
        self._look_again = 0.0
        self._reload()

    def name(self, user: int) -> int:
        """See Codec. A number of 63 bits; anonymous stays anonymous."""
        if user == contract.ANONYMOUS_USER:
            return user
        said = hmac.digest(self._naming, user.to_bytes(8, "big", signed=True), hashlib.sha256)
        return int.from_bytes(said[:8], "big") >> 1

    def event_name(self, event_id: str) -> str:
        """See Codec."""
        return hmac.digest(self._naming, b"event " + event_id.encode(), hashlib.sha256).hex()[:32]

    def past(self, user: int, records: NDArray[np.void]) -> bytes:
        """See Codec. The user's id is within, so that it can be told again."""
        return self._seal(_id(user) + records.tobytes(), _about(self.name(user)))

    def records(self, name: int, stored: bytes) -> NDArray[np.void]:
        """See Codec."""
        return np.frombuffer(self._open(stored, _about(name))[_USER:], RECORD) if stored else np.empty(0, RECORD)

    def count(self, size: int) -> int:
        """See Codec."""
        return (size - _OVERHEAD - _USER) // RECORD.itemsize

    def user(self, name: int, stored: bytes) -> int:
        """See Codec."""
        return int.from_bytes(self._open(stored, _about(name))[:_USER], "little", signed=True)

    def single(self, user: int, records: NDArray[np.void]) -> bytes:
        """See Codec. Each with the user's id, and sealed by itself."""
        name, who = self.name(user), _id(user)
        raw, size = records.tobytes(), RECORD.itemsize
        parts = (raw[at : at + size] for at in range(0, len(raw), size))
        return b"".join(self._seal(who + part, _about(name)) for part in parts)

    def single_records(self, name: int, stored: bytes) -> NDArray[np.void]:
        """See Codec."""
        if len(stored) % self.single_size:
            raise StoreFailed(
                f"a user's past of {len(stored)} bytes is no number of sealed events; is the store damaged?"
            )
        about = _about(name)
        size = self.single_size
        parts = (stored[at : at + size] for at in range(0, len(stored), size))
        return np.frombuffer(b"".join(self._open(part, about)[_USER:] for part in parts), RECORD)

    def shown(self, event: Event) -> Event:
        """See Codec. Names, and nothing of what was done."""
        return Event(self.event_name(event.event_id), self.name(event.user_id), 0, 0, 0)

    def event(self, event: Event) -> bytes:
        """See Codec."""
        return self._seal(json.dumps(event).encode(), self.event_name(event.event_id).encode())

    def of_event(self, shown: Event, stored: bytes) -> Event:
        """See Codec."""
        return Event(*json.loads(self._open(stored, shown.event_id.encode())))

    def _seal(self, plain: bytes, about: bytes) -> bytes:
        if time.monotonic() > self._look_again:  # so that a rotation is taken up by who only writes, too
            with suppress(StoreFailed, InvalidStore):
                self._reload()
        number, nonce = max(self._keys), os.urandom(_NONCE)
        return number.to_bytes(2, "big") + nonce + self._keys[number].encrypt(nonce, plain, about)

    def _open(self, sealed: bytes, about: bytes) -> bytes:
        number = int.from_bytes(sealed[:2], "big")
        if number not in self._keys:
            try:
                self._reload()
            except InvalidStore as error:  # at a start it is the store's address that is wrong; now it has failed
                raise StoreFailed(str(error)) from error
        try:
            return self._keys[number].decrypt(sealed[2 : 2 + _NONCE], sealed[2 + _NONCE :], about)
        except KeyError:
            raise StoreFailed(f"the user store has no data key {number}; is it damaged?") from None
        except (InvalidTag, ValueError):
            raise StoreFailed(
                "what the user store has of somebody is damaged, or was put there by somebody else"
            ) from None

    def _reload(self) -> None:
        self._look_again = time.monotonic() + _LOOK_S
        envelopes = self._load()
        if NAMING not in envelopes or len(envelopes) < 2:
            raise InvalidStore("the user store lacks its keys; is it damaged?")
        naming = self._masters.unwrap(envelopes[NAMING])
        keys = {number: AESGCM(self._masters.unwrap(each)) for number, each in envelopes.items() if number != NAMING}
        self._keys, self._naming = keys, naming


def new_envelopes(masters: MasterKeys) -> dict[int, bytes]:
    """Of a new store: a key to name users with, and a first data key."""
    return {number: masters.wrap(secrets.token_bytes(KEY_BYTES)) for number in (NAMING, NAMING + 1)}


def rotated(masters: MasterKeys, envelopes: Mapping[int, bytes]) -> dict[int, bytes]:
    """All keys wrapped with the newest master key, and a further data key."""
    anew = {number: masters.wrap(masters.unwrap(each)) for number, each in envelopes.items()}
    return {**anew, max(anew) + 1: masters.wrap(secrets.token_bytes(KEY_BYTES))}


def _id(user: int) -> bytes:
    return user.to_bytes(_USER, "little", signed=True)


def _about(name: int) -> bytes:
    """What a sealed past is bound to, so that it cannot be put in another user's place."""
    return b"past" + name.to_bytes(8, "little", signed=True)
