"""Master keys: they wrap the data keys that personal data is sealed with at rest (envelopes), and lie apart from it.

Both seal with AES-256-GCM (NIST SP 800-38D) of the library `cryptography`. A data key lies, wrapped, beside what it has
sealed; a master key comes from a file or the environment and never gets there. So a new master key is a matter of
wrapping data keys anew, and of no data.
"""

from __future__ import annotations

import base64
import json
import os
import re
import secrets
import sys
from contextlib import suppress
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from trirank_backend.errors import InvalidStore
from trirank_backend.files import PRIVATE, whole_file
from trirank_backend.surroundings import KEYS_VARIABLE

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

KEY_BYTES = 32
_NONCE = 12


class MasterKeys:
    """Keys that wrap data keys: those of a TOML file, ``name = "base64 of 32 bytes"``, or of such a line. The last one
    wraps; the others unwrap what they have wrapped before.

    Args:
        said: path of the file, or ``name:base64`` itself, as an environment variable may have it.

    Raises:
        InvalidStore: it is neither.
    """

    def __init__(self, said: str) -> None:
        self._said = said
        self._keys = self._read()

    def wrap(self, key: bytes) -> bytes:
        """A data key in its envelope, of the newest master key that the file has now."""
        with suppress(InvalidStore):  # half written: the one that was known then
            self._keys = self._read()
        name = list(self._keys)[-1]
        nonce = os.urandom(_NONCE)
        sealed = AESGCM(self._keys[name]).encrypt(nonce, key, name.encode())
        return json.dumps({"master": name, "key": base64.b64encode(nonce + sealed).decode()}).encode()

    def unwrap(self, envelope: bytes, whose: str = "the user store") -> bytes:
        """A data key out of its envelope. A master key that is not known is looked for in the file once more.

        Args:
            whose: the data key is, for messages.

        Raises:
            InvalidStore: it is not there, or another one than it was.
        """
        try:
            told = json.loads(envelope)
            name, sealed = str(told["master"]), base64.b64decode(told["key"])
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidStore(f"a data key of {whose} is damaged ({error})") from None
        if name not in self._keys:
            self._keys = self._read()
        if name not in self._keys:
            raise InvalidStore(f"{whose} wants the master key {name!r}, and {self._place} has {', '.join(self._keys)}")
        try:
            return AESGCM(self._keys[name]).decrypt(sealed[:_NONCE], sealed[_NONCE:], name.encode())
        except (InvalidTag, ValueError):
            raise InvalidStore(f"{self._place} has another master key {name!r} than {whose} was made with") from None

    @property
    def _place(self) -> str:
        return KEYS_VARIABLE if ":" in self._said else self._said

    def _read(self) -> dict[str, bytes]:
        name, colon, inline = self._said.partition(":")
        try:
            raw = {name: inline} if colon else tomllib.loads(Path(self._said).read_text())
            keys = {str(name): base64.b64decode(str(value), validate=True) for name, value in raw.items()}
        except (OSError, ValueError) as error:
            raise InvalidStore(
                f"{self._place} has no master keys ({error}); `trirank users key FILE` makes one"
            ) from None
        short = [name for name, key in keys.items() if len(key) != KEY_BYTES]
        if short or not keys:
            what = f"master key {short[0]!r} is not of {KEY_BYTES} bytes" if short else "there is none"
            raise InvalidStore(f"{self._place}: {what}; `trirank users key FILE` makes one")
        return keys


def add_master_key(file: Path, name: str) -> None:
    """Add a new key to a file, which is made where there is none; from then on it wraps.

    Raises:
        InvalidStore: the file is none, or has a key of that name.
    """
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name):
        raise InvalidStore(f"{name!r} is no name of a key; take up to 64 letters, digits, ., _ and -")
    before = file.read_text() if file.exists() else ""
    if before:
        MasterKeys(str(file))
        if name in tomllib.loads(before):
            raise InvalidStore(f"{file} has a key {name!r} already; name another")
    line = f'"{name}" = "{base64.b64encode(secrets.token_bytes(KEY_BYTES)).decode()}"\n'
    with whole_file(file, PRIVATE) as stream:
        stream.write((before + "\n" * (bool(before) and not before.endswith("\n")) + line).encode())


def named_keys() -> MasterKeys | None:
    """Those that the environment names, if it names any.

    Raises:
        InvalidStore: what it names are none.
    """
    said = os.environ.get(KEYS_VARIABLE)
    return MasterKeys(said) if said else None
