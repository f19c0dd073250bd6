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
from trirank_build.errors import DiskFull, ServeError
from trirank_build.progress import warn

READY, RECOVERING, STOPPING = "ready", "recovering", "stopping"
STALE_S = 30.0
"""Whoever serves says so every second, but for what it has said it would take longer for."""
LONG_S = 600.0
"""What loading and warming a release up may take at most, and a start."""
_BEAT_S = 1.0


class State:
    """The file of a server that runs; None: no file, and nothing is said. An earlier one's is taken away.

    ``grpc``, ``http``, ``metrics``: addresses. ``pid``, ``started``, ``tritonserver_pid``: processes, and when the
    first was started. ``state``: ``ready``; ``recovering`` while something that has died is started anew; ``stopping``.
    ``busy_until``: until when nothing need be heard of it. The file's time says when the server was last looked after.
    """

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._said: dict[str, Any] = {}
        self._beaten = 0.0
        self._is_told = False
        if file is not None:
            with suppress(OSError):
                file.unlink(missing_ok=True)

    @property
    def is_new(self) -> bool:
        """Whether nothing has been said yet."""
        return not self._said

    def say(self, state: str, **found: Any) -> None:
        """Tell the state, and what else has changed."""
        own = {"pid": os.getpid(), "started": _started(os.getpid()), "busy_until": 0.0}
        said = own | self._said | found | {"state": state}
        if said != self._said:
            self._said = said
            self._write()
        self.beat()

    def busy(self) -> None:
        """Say that what comes now may take LONG_S, without a sign in between."""
        if self._said:
            self.say(self._said["state"], busy_until=time.time() + LONG_S)

    def beat(self) -> None:
        """Tell that somebody looks after the server."""
        if self._file is not None and self._said and time.monotonic() > self._beaten + _BEAT_S:
            self._beaten = time.monotonic()
            try:
                os.utime(self._file)
            except FileNotFoundError:  # somebody has taken it away
                self._write()
            except OSError as error:
                self._cannot(error)

    def take_back(self) -> None:
        """Nobody shall look for this server there; another one's words stay."""
        if self._file is not None:
            with suppress(OSError, ValueError, KeyError):
                if json.loads(self._file.read_text())["pid"] == os.getpid():
                    self._file.unlink()

    def _write(self) -> None:
        if self._file is None:
            return
        try:
            with atomic_file(self._file) as scratch:
                scratch.write_text(json.dumps(self._said) + "\n")
        except (OSError, DiskFull) as error:
            self._cannot(error)

    def _cannot(self, error: Exception) -> None:
        """A full disk ends no server."""
        if not self._is_told:
            self._is_told = True
            warn(f"--addresses {self._file} cannot be written ({error}); probes that read it will fail")


def check(file: Path, *, live: bool) -> str:
    """What a server says in its file.

    Args:
        live: whether it need only be looked after, not ready.

    Raises:
        ServeError: there is no server, nobody looks after it, or it is not ready.
    """
    try:
        age = time.time() - file.stat().st_mtime
        told = json.loads(file.read_text())
        state, pid, started, busy = str(told["state"]), int(told["pid"]), told["started"], float(told["busy_until"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ServeError(
            f"{file} is no state of a server ({error}); start it with trirank serve --addresses {file}"
        ) from None
    if _started(pid) != started:
        raise ServeError(f"the server that wrote {file}, process {pid}, is gone; start it again")
    if age > STALE_S and time.time() > busy:
        raise ServeError(
            f"{file} was written {age:.0f} s ago, and a server that runs writes it every second; restart it"
        )
    if not live and state != READY:
        raise ServeError(f"the server is {state}; callers go elsewhere until it is ready")
    return state


def _started(pid: int) -> int:
    """When a process was started, in ticks since the machine was (proc(5)), so that no other one of its number is taken
    for it, whatever becomes of the clock; -1: there is none."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return -1
