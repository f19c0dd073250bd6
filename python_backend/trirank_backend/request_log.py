"""Requests as they came to be ranked, written down: what training and ``trirank skew`` read later.

A line of JSON a request: what was asked, the history that was known at that moment, which release answered, and, where
it is asked for, the tensors that the ranker was given. Lines are written by a thread; what comes faster than the disk
takes it is left out and counted, since nobody waits for a log. Files are for their owner alone, and sealed
(sealed_files) where there are master keys.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import queue
import random
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple
from urllib.parse import parse_qs

import numpy as np
from numpy.typing import NDArray

from trirank_backend.errors import InvalidStore
from trirank_backend.master_keys import MasterKeys
from trirank_backend.sealed_files import SealedFile, keys_for

_WAITING = 1_000
"""Requests that wait to be written, at most."""
_AGAIN_S = 1.0
"""After a failure, before a file is begun again."""
_LARGEST = 256 << 20
"""Bytes after which a file is followed by another."""
TENSORS = ("history", "query", "candidates", "dense", "context")
FIELDS = (
    "request_id", "moment", "user_id", "query", "scenario", "top_k", "sent_history", "item_ids", "retrieval_scores",
    "history", "tensors", "release",
)  # fmt: skip
"""Of a line; ``tensors`` where they are asked for."""

_log = logging.getLogger("trirank")


class Settings(NamedTuple):
    """Where to, which share of the requests, and whether with tensors."""

    folder: Path
    share: float
    tensors: bool

    @classmethod
    def read(cls, text: str) -> Settings:
        """From ``FOLDER`` or ``FOLDER?share=0.01&tensors=1``.

        Raises:
            InvalidStore: it is something else.
        """
        folder, _, said = text.partition("?")
        found = {name: values[-1] for name, values in parse_qs(said, keep_blank_values=True).items()}
        unknown = sorted(found.keys() - {"share", "tensors"})
        try:
            share = float(found.get("share", 1.0))
        except ValueError:
            share = -1.0
        if unknown or not 0 < share <= 1 or found.get("tensors", "0") not in ("0", "1") or not folder:
            raise InvalidStore(
                f"request log {text!r} is none; write FOLDER, or FOLDER?share=S&tensors=1 with S above 0, at most 1"
            )
        return cls(Path(folder), share, found.get("tensors") == "1")


class RequestLog:
    """Writes lines in the background.

    Raises:
        InvalidStore: the folder cannot be written to.
    """

    def __init__(self, settings: Settings, release: str) -> None:
        self.settings, self._release = settings, release
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue(_WAITING)
        self._random = random.Random()
        self._stream: IO[bytes] | None = None
        self._lost = self._number = 0
        self._again = 0.0
        self._masters: MasterKeys | None = None
        self._key: SealedFile | None = None
        try:
            settings.folder.mkdir(parents=True, exist_ok=True)
            self._masters = keys_for(settings.folder)
            self._open()
        except OSError as error:
            raise InvalidStore(f"request log {settings.folder} cannot be written ({error.strerror})") from error
        self._thread = threading.Thread(target=self._work, name="trirank-requests", daemon=True)
        self._thread.start()

    def wants(self) -> bool:
        """Whether the next request is one of the share."""
        return self.settings.share >= 1 or self._random.random() < self.settings.share

    def add(self, line: dict[str, Any]) -> None:
        """Have a line written; arrays become lists, those of ``tensors`` text."""
        try:
            self._queue.put_nowait(line)
        except queue.Full:
            self._lose()

    def close(self) -> None:
        """Write what waits, and end."""
        with suppress(queue.Full):  # a disk that hangs holds nobody up
            self._queue.put(None, timeout=1)
        self._thread.join(5)

    def _open(self) -> None:
        name = f"requests-{time.time_ns()}-{os.getpid()}.jsonl"
        path = self.settings.folder / name
        key = None if self._masters is None else SealedFile.create(path, self._masters)
        stream = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")
        before, self._stream, self._key, self._number = self._stream, stream, key, 0
        if before is not None:
            before.close()

    def _work(self) -> None:
        while (line := self._queue.get()) is not None:
            try:
                if self._stream is None:
                    if time.monotonic() < self._again:
                        self._lose()
                        continue
                    self._again = time.monotonic() + _AGAIN_S
                    self._open()
                assert self._stream is not None
                text = json.dumps(line | {"release": self._release}, default=_plain).encode()
                self._number += 1
                self._stream.write((text if self._key is None else self._key.line(self._number, text)) + b"\n")
                if self._queue.empty():
                    self._stream.flush()
                if self._stream.tell() > _LARGEST:
                    self._open()
            except (OSError, ValueError) as error:  # a full disk harms the log alone
                _log.warning("a request was not logged (%s)", error)
                if isinstance(error, OSError):  # half a line may stand there: what comes next begins a file
                    self._leave()
        self._leave()

    def _leave(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            with suppress(OSError):
                stream.close()

    def _lose(self) -> None:
        self._lost += 1
        if self._lost in (1, 10, 100) or self._lost % 1_000 == 0:
            _log.warning("%d requests were not logged, for there were too many, or no room", self._lost)


def packed_text(array: NDArray[Any]) -> dict[str, Any]:
    """An array as JSON takes it, to the bit."""
    return {
        "dtype": str(array.dtype),
        "shape": list(array.shape),
        "bytes": base64.b64encode(np.ascontiguousarray(array).tobytes()).decode(),
    }


def packed_array(text: dict[str, Any]) -> NDArray[Any]:
    """What ``packed_text`` wrote."""
    return np.frombuffer(base64.b64decode(text["bytes"]), text["dtype"]).reshape(text["shape"])


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} does not go into the log")
