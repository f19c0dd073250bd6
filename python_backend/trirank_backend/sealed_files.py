"""Files that nobody reads without a master key: logs, of which every line is sealed, and tables, sealed in chunks.

Beside a file ``NAME`` lies ``NAME.key``, its own data key in its envelope (master_keys): where that is, the file is
sealed. A new master key is a matter of these small files alone (``rewrap``), which servers may go on writing beside.

Lines are sealed one by one and bound to their number, so that one can be overwritten with blanks, and none be put
elsewhere. Chunks are bound to their number and to whether they are the last one (the STREAM construction: Hoang,
Reyhanitabar, Rogaway and Vizár, CRYPTO 2015), so that a table that was cut off is noticed; of a log it is not, since a
server that is killed leaves one behind. How long lines are can be seen.
"""

from __future__ import annotations

import base64
import os
import secrets
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from trirank_backend.errors import InvalidStore
from trirank_backend.files import PRIVATE, whole_file
from trirank_backend.master_keys import KEY_BYTES, MasterKeys, named_keys
from trirank_backend.surroundings import KEYS_VARIABLE

SUFFIX = ".key"
_KINDS = (".jsonl", ".parquet")
"""Of files that are sealed; other keys may lie beside them."""
CHUNK = 1 << 20
"""Bytes that are sealed together."""
_NONCE, _TAG = 12, 16
_SEALED = CHUNK + _NONCE + _TAG


class SealedFile:
    """One file's data key."""

    def __init__(self, key: bytes) -> None:
        self._key = AESGCM(key)

    @classmethod
    def again(cls, path: Path, masters: MasterKeys) -> SealedFile:
        """For a file that is replaced: its key, so that the old one is readable until the new one is there."""
        with suppress(InvalidStore):
            found = cls.open(path) if path.exists() else None
            if found is not None:
                return found
        return cls.create(path, masters)

    @classmethod
    def create(cls, path: Path, masters: MasterKeys) -> SealedFile:
        """A new data key for a file that is to be written; its envelope is on the disk then."""
        key = secrets.token_bytes(KEY_BYTES)
        with whole_file(key_of(path), PRIVATE) as stream:
            stream.write(masters.wrap(key))
        return cls(key)

    @classmethod
    def open(cls, path: Path) -> SealedFile | None:
        """Of a file that is there; None: it is not sealed.

        Raises:
            InvalidStore: it is, and the environment names no master key, or not the one of its envelope.
        """
        try:
            envelope = key_of(path).read_bytes()
        except FileNotFoundError:
            return None
        masters = named_keys()
        if masters is None:
            raise InvalidStore(
                f"{path} is sealed, and {KEYS_VARIABLE} names no keys; set it to the file of master keys"
            )
        return cls(masters.unwrap(envelope, str(path)))

    def line(self, number: int, plain: bytes) -> bytes:
        """A line, counted from 1, as it stands in the file."""
        nonce = os.urandom(_NONCE)
        return base64.b64encode(nonce + self._key.encrypt(nonce, plain, b"line %d" % number))

    def plain(self, number: int, line: bytes) -> bytes | None:
        """What was written as that line; None: it is not whole, was changed, or stood elsewhere."""
        try:
            raw = base64.b64decode(line, validate=True)
            return self._key.decrypt(raw[:_NONCE], raw[_NONCE:], b"line %d" % number)
        except (InvalidTag, ValueError):
            return None

    def chunks(self, source: IO[bytes]) -> Iterator[bytes]:
        """A table, sealed."""
        number, part = 0, source.read(CHUNK)
        while True:
            following = source.read(CHUNK)
            nonce = os.urandom(_NONCE)
            yield nonce + self._key.encrypt(nonce, part, _about(number, not following))
            if not following:
                return
            number, part = number + 1, following

    def table(self, source: IO[bytes]) -> bytes:
        """What was sealed as ``chunks``.

        Raises:
            ValueError: it was changed, or cut off.
        """
        found, number, part = [], 0, source.read(_SEALED)
        while True:
            following = source.read(_SEALED)
            try:
                found.append(self._key.decrypt(part[:_NONCE], part[_NONCE:], _about(number, not following)))
            except (InvalidTag, ValueError):
                raise ValueError(f"chunk {number} was changed, or the file was cut off") from None
            if not following:
                return b"".join(found)
            number, part = number + 1, following


def key_of(path: Path) -> Path:
    """The file of a sealed file's envelope."""
    return path.with_name(path.name + SUFFIX)


class Line(NamedTuple):
    """A line of a log.

    Attributes:
        number: from 1.
        text: what was written; None: it is sealed, and was changed, is of another file, or is not whole.
        whole: whether something comes behind it; a killed server leaves a last line that is not.
    """

    number: int
    text: bytes | None
    whole: bool


def lines_of(path: Path) -> Iterator[Line]:
    """The lines of a log, sealed or not; lines of blanks, as erased ones are, are left out.

    Raises:
        InvalidStore: it is sealed, and its master key is not there.
    """
    key = SealedFile.open(path)
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        text: bytes | None = line
        if key is not None:
            text = key.plain(number, line)
        yield Line(number, text, number < len(lines))


def keys_for(folder: Path) -> MasterKeys | None:
    """Master keys to seal new files of a folder with; None: they are not sealed.

    Raises:
        InvalidStore: the environment names no keys, and files of the folder are sealed.
    """
    masters = named_keys()
    if masters is None and any(path.with_name(path.name.removesuffix(SUFFIX)).exists() for path in _keys(folder)):
        raise InvalidStore(f"{folder} holds sealed files, and {KEYS_VARIABLE} names no keys; set it, or name another")
    return masters


def rewrap(folder: Path, masters: MasterKeys) -> int:
    """Wrap the data keys of all sealed files below a folder with the newest master key; gives how many.

    Raises:
        InvalidStore: one is of a master key that is not there; those before it are done.
    """
    paths = sorted(_keys(folder))
    for path in paths:  # also of a file that a server is about to make
        envelope = masters.wrap(masters.unwrap(path.read_bytes(), path.name.removesuffix(SUFFIX)))
        with whole_file(path, PRIVATE) as stream:
            stream.write(envelope)
    return len(paths)


def _keys(folder: Path) -> list[Path]:
    """Envelopes below a folder."""
    return [path for kind in _KINDS for path in folder.rglob(f"*{kind}{SUFFIX}")]


def _about(number: int, last: bool) -> bytes:
    return b"chunk %d%s" % (number, b", the last" if last else b"")
