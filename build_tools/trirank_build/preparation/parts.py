"""Where a log lies: a file, a folder of files, a pattern, or any of these in an object store (fsspec's addresses)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec

from trirank_build.errors import BadData

_SUFFIXES = (".parquet", ".csv", ".tsv", ".txt", ".gz")


def is_remote(source: str) -> bool:
    """Whether it is an address such as ``s3://bucket/log``, rather than a path."""
    return "://" in source or "::" in source


def parts_of(source: str) -> list[str]:
    """The files of a log, in the order of their names.

    Raises:
        BadData: there are none, or the store cannot be reached.
    """
    if not is_remote(source) and Path(source).is_file():
        return [source]
    with _told(source):
        files, path = fsspec.core.url_to_fs(source)
        matched = files.glob(path) if any(letter in path for letter in "*?[") else [path]
        if matched == [path] and files.isfile(path):
            return [source]
        found = {name for each in matched for name in (files.find(each) if files.isdir(each) else [each])}
        log = sorted(name for name in found if name.endswith(_SUFFIXES) and not _is_aside(name, path))
        if not log:
            if files.isdir(path):
                raise BadData(f"{source} is a folder without a file of a log ({', '.join(_SUFFIXES)})")
            raise BadData(f"{source} is no file; give a CSV, TSV, Parquet or text file, a folder of them, or `shop`")
        return [files.unstrip_protocol(name) if is_remote(source) else name for name in log]


def _is_aside(name: str, below: str) -> bool:
    """Whether an engine put the file there for itself: ``_SUCCESS``, ``_temporary/…``, ``.part.crc``."""
    common = below.split("*")[0].rstrip("/")
    rest = name[len(common) :] if name.startswith(common) else name
    return any(part.startswith(("_", ".")) for part in rest.split("/"))


@contextmanager
def local(address: str) -> Iterator[Path]:
    """A file of a log on this machine: fetched for as long as it is needed, where it lies elsewhere.

    Raises:
        BadData: it cannot be fetched.
    """
    if not is_remote(address):
        yield Path(address)
        return
    with _told(address):
        opened: Any = fsspec.open_local(f"simplecache::{address}", simplecache={"same_names": False})
    path = Path(opened if isinstance(opened, str) else opened[0])
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


@contextmanager
def _told(address: str) -> Iterator[None]:
    try:
        yield
    except BadData:
        raise
    except ImportError as error:
        raise BadData(f"{address} needs a library that is not installed: {error}") from error
    except Exception as error:  # every store has exceptions of its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BadData(f"{address} cannot be read ({reason}); look at the address, and at its credentials") from error
