"""Who may ask: callers' tokens, of which a server keeps digests alone.

A file is a TOML table of names and SHA-256 digests, ``search-service = "9f86d0…"``. A caller sends its token as
``authorization: Bearer TOKEN``, which Triton hands to every model as a parameter. The file is read again when it
changes, so a token is replaced by adding the new one, telling the callers, and taking the old one away.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import sys
import time
from pathlib import Path

from trirank import contract

from trirank_backend.errors import InvalidTokens, NotAllowed
from trirank_backend.surroundings import OWN_TOKEN_VARIABLE, TOKENS_VARIABLE

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HEADER = "authorization"
_LOOK_S = 1.0
_log = logging.getLogger("trirank")
_BEARER = re.compile(r"bearer +(\S+)", re.IGNORECASE)


def digest(token: str) -> str:
    """What is kept of a token. They are drawn at random, so nothing slower than SHA-256 is needed."""
    return hashlib.sha256(token.encode()).hexdigest()


def read_tokens(file: Path) -> dict[str, str]:
    """Digest → name of the caller.

    Raises:
        InvalidTokens: the file is none.
    """
    try:
        found = tomllib.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise InvalidTokens(f"{file} cannot be read ({error}); trirank token NAME --tokens {file} writes it") from None
    for name, value in found.items():
        if not (isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value)):
            raise InvalidTokens(f"{file}: {name} is no SHA-256 digest of a token; trirank token writes them")
    return {value: name for name, value in found.items()}


class Callers:
    """Those of a file, which is looked at once a second.

    Args:
        file: see the module.
        own: digest of the token of whoever runs the server.
    """

    def __init__(self, file: Path, own: str = "") -> None:
        self._file, self._own = file, own
        self._stamp: tuple[int, int] | None = None
        self._known: dict[str, str] = {}
        self._next = 0.0
        self._is_told = False
        self._look(strict=True)

    def check(self, header: str | None) -> None:
        """Raises NotAllowed unless this is the header of a known caller."""
        if (now := time.monotonic()) > self._next:
            self._next = now + _LOOK_S
            self._look(strict=False)
        found = _BEARER.fullmatch(header.strip()) if header else None
        if found is None:
            raise NotAllowed(
                f"{contract.NOT_ALLOWED}: this server wants a token; send it as authorization: Bearer TOKEN"
            )
        # Digests are looked up, not tokens, so the time that it takes tells nothing of them.
        if (told := digest(found[1])) not in self._known and told != self._own:
            raise NotAllowed(f"{contract.NOT_ALLOWED}: the token is none of this server's; it may have been replaced")

    def _look(self, *, strict: bool) -> None:
        """What was known stays known while the file is damaged or away, and that is told."""
        try:
            status = os.stat(self._file)
            stamp = (status.st_mtime_ns, status.st_size)
            if stamp != self._stamp:
                self._known, self._stamp = read_tokens(self._file), stamp
            self._is_told = False
        except (OSError, InvalidTokens) as error:
            if strict:
                raise InvalidTokens(f"{self._file} cannot be read ({error})") from error
            if not self._is_told:
                self._is_told = True
                _log.warning("%s; the tokens that were there before stay good until it can be read", error)


def callers_of_this_server() -> Callers | None:
    """As whoever started the server said; None: everybody may ask.

    Raises:
        InvalidTokens: the file cannot be read.
    """
    file = os.environ.get(TOKENS_VARIABLE)
    return Callers(Path(file), os.environ.get(OWN_TOKEN_VARIABLE, "")) if file else None
