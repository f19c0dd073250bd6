"""What `trirank serve` says of itself in a file, and what a probe makes of it.

A probe that ranks would do harm: under overload its request is refused like any other, and an orchestrator that takes
this for a failure restarts the replicas when they are needed most.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from trirank_build.artefacts import atomic_file
from trirank_build.errors import ServeError

READY, RECOVERING = "ready", "recovering"
STALE_S = 180.0
"""Whoever serves says so more often: this is longer than a release may take to load."""
_BEAT_S = 1.0


class State:
    """The file of a server that runs; None: no file, and nothing is said.

    ``grpc``, ``http``, ``metrics``: addresses. ``pid``, ``tritonserver_pid``: processes. ``state``: ``ready``, or
    ``recovering`` while something that has died is started anew. The file's time says when the server was last looked
    after.
    """

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._said: dict[str, Any] = {}
        self._beaten = 0.0

    @property
    def is_new(self) -> bool:
        """Whether nothing has been said yet."""
        return not self._said

    def say(self, state: str, **found: Any) -> None:
        """Tell the state, and what else has changed."""
        said = self._said | found | {"state": state, "pid": os.getpid()}
        if said == self._said:
            self.beat()
            return
        self._said = said
        if self._file is not None:
            with atomic_file(self._file) as scratch:
                scratch.write_text(json.dumps(said) + "\n")

    def beat(self) -> None:
        """Tell that somebody looks after the server."""
        if self._file is not None and time.monotonic() > self._beaten + _BEAT_S:
            self._beaten = time.monotonic()
            with suppress(FileNotFoundError):  # somebody has taken it away, who then need not know
                os.utime(self._file)

    def take_back(self) -> None:
        """Nobody shall look for this server there; another one's words stay."""
        if self._file is not None:
            with suppress(OSError, ValueError, KeyError):
                if json.loads(self._file.read_text())["pid"] == os.getpid():
                    self._file.unlink()


def check(file: Path, *, live: bool) -> str:
    """What a server says in its file.

    Args:
        live: whether it need only be looked after, not ready.

    Raises:
        ServeError: there is no server, nobody looks after it, or it is not ready.
    """
    try:
        age = time.time() - file.stat().st_mtime
        state = str(json.loads(file.read_text())["state"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ServeError(
            f"{file} is no state of a server ({error}); start it with trirank serve --addresses {file}"
        ) from None
    if age > STALE_S:
        raise ServeError(
            f"{file} was written {age:.0f} s ago, and a server that runs writes it every second; restart it"
        )
    if not live and state != READY:
        raise ServeError(f"the server is {state}; callers go elsewhere until it is ready")
    return state
