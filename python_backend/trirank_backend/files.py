"""Files that are there whole or not at all, and on the disk then."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

PRIVATE = 0o600
"""Mode of a file that is for its owner alone."""


@contextmanager
def whole_file(path: Path, mode: int = 0o666) -> Iterator[IO[bytes]]:
    """A stream whose content stands in the place of ``path`` once the block has ended without an error.

    Args:
        mode: of the file, less the process's umask.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with os.fdopen(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        scratch.replace(path)
        sync_names(path.parent)
    finally:
        scratch.unlink(missing_ok=True)


def sync_names(folder: Path) -> None:
    """Have a folder's own list of names on the disk, or a file may be what it was before after a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
