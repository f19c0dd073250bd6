"""Loops over candidates, compiled to machine code by numba: once a machine, kept on disk, never during a request.

Compiled code lies in a folder whose name is a digest of all that it depends on: the sources of every kernel, the
versions of numba and Python, the processor. numba's own check sees only the file that a function stands in, and would
go on with old code where a kernel that another one calls has changed.
"""

from __future__ import annotations

import atexit
import fcntl
import hashlib
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar, cast

from trirank import contract

F = TypeVar("F", bound=Callable[..., Any])

VARIABLE = "TRIRANK_CACHE"
_HERE = Path(__file__).parent
_BESIDE = ("compiled.py", "attributes.py", "features/table.py", "features/batch.py", "words/lexicon.py")
"""What kernels take constants and types from, beside the contract."""
_COMPLETE = "complete"
_OWN = "trirank-kernels-"


@lru_cache(1)
def folder() -> Path:
    """Where this version's compiled code is kept on this machine: below ``$TRIRANK_CACHE``, ``$XDG_CACHE_HOME`` or
    ``~/.cache``. Where none can be written to (a container with a read-only root), a folder of this process alone."""
    home = os.environ.get(VARIABLE) or os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    place = Path(home) / "trirank" / "kernels" / _fingerprint()
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place):
            return place
    except OSError:
        place = Path(tempfile.mkdtemp(prefix=_OWN))
        atexit.register(shutil.rmtree, place, ignore_errors=True)
        return place


def need_compiling() -> bool:
    """Whether this machine lacks the code of this version, and could keep it. Imports no compiler itself."""
    return not folder().name.startswith(_OWN) and not (folder() / _COMPLETE).is_file()


def compile_all() -> None:
    """Have every kernel compiled, or loaded where it has been compiled before, by running it on made-up requests."""
    from trirank_backend.rehearsal import rehearse

    with _alone("lock"):  # two that compile at a time would do the same work twice
        rehearse()
        (folder() / _COMPLETE).touch()


def kernel(function: F) -> F:
    """A function compiled with numba: it runs without Python's lock, and its code is kept on disk."""
    import numba

    compiled: Any = numba.njit(function, nogil=True, error_model="numpy")
    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(folder())  # is read while the cache is made
    try:
        compiled._cache = shared_cache()(function)
    finally:
        numba.config.CACHE_DIR = before
    return cast(F, compiled)


@lru_cache(1)
def shared_cache() -> type:
    """numba's cache, for several processes at a time. Its index is read, added to and written back: of two that do so
    at once one loses its entry, or both name the same file, and the code of one signature is run for another."""
    from numba.core.caching import FunctionCache

    class SharedCache(FunctionCache):  # type: ignore[misc]  # numba has no types
        def load_overload(self, sig: Any, target_context: Any) -> Any:
            with _alone("index.lock"):
                return super().load_overload(sig, target_context)

        def save_overload(self, sig: Any, data: Any) -> None:
            with _alone("index.lock"):
                super().save_overload(sig, data)

    return SharedCache


@contextmanager
def _alone(name: str) -> Iterator[None]:
    """Hold a lock between processes."""
    with (folder() / name).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _fingerprint() -> str:
    digest = hashlib.sha256()
    rules = (_HERE / "policies").glob("*.py")
    for source in sorted(
        [*_HERE.rglob("*kernels.py"), *rules, *(_HERE / name for name in _BESIDE), Path(contract.__file__)]
    ):
        # numba's own index goes by a file's place and time, so these count as well.
        digest.update(f"{source} {source.stat().st_mtime_ns}".encode() + source.read_bytes())
    versions = [f"{package} {metadata.version(package)}" for package in ("numba", "llvmlite")]
    digest.update(" ".join([*versions, platform.python_version(), _processor()]).encode())
    return digest.hexdigest()[:12]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor()
    return " ".join(next((line for line in lines if line.startswith(word)), "") for word in ("model name", "flags"))


if __name__ == "__main__":
    compile_all()
