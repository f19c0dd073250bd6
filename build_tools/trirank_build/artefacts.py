"""Files that are either whole or not there, and their digests."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trirank_build.errors import DiskFull

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
WEIGHTS = ".weights"
"""Suffix of the file beside a graph that has too many weights to hold them itself (trirank_build.export.weights)."""


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """A temporary directory beside ``target`` that takes its name once the block has ended without an error.

    What stood at ``target`` before is replaced only then.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        scratch.chmod(0o755)
        with fits(target):
            yield scratch
        if target.is_dir():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
            os.replace(target, old / target.name)
            os.replace(scratch, target)
            shutil.rmtree(old)
        else:
            os.replace(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """A temporary path beside ``target``, renamed to it once the block has ended without an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with fits(target):
            yield scratch
        os.replace(scratch, target)
    finally:
        scratch.unlink(missing_ok=True)


@contextmanager
def fits(target: Path) -> Iterator[None]:
    """Raises DiskFull in place of what libraries say when there is no room: not all of them say it in numbers."""
    try:
        yield
    except Exception as error:
        told = str(error)
        if (
            getattr(error, "errno", None) in _FULL
            or any(f"os error {number})" in told or os.strerror(number) in told for number in _FULL)
            or re.search(r"\d+ requested and \d+ written", told)  # numpy's words
        ):
            free = shutil.disk_usage(target.parent).free
            raise DiskFull(
                f"{target} does not fit: {' '.join(told.split())[:160]}. {free / 1e9:,.1f} GB are free there; make "
                "room, or choose another --out. Nothing was left half-written"
            ) from error
        raise


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def tree_digests(directory: Path, only: str = "*") -> dict[str, str]:
    """Relative path → SHA-256 of every file below ``directory`` whose name matches, sorted."""
    return {
        path.relative_to(directory).as_posix(): file_digest(path)
        for path in sorted(directory.rglob(only))
        if path.is_file()
    }


def combined_digest(digests: dict[str, str]) -> str:
    """One SHA-256 over names and digests."""
    lines = "".join(f"{name}\0{digest}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()
