"""Where a Triton server is found: told, on PATH (NVIDIA's container), or in the wheel ``nvidia-pytriton``."""

from __future__ import annotations

import ctypes.util
import importlib.util
import os
import shutil
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

from trirank_build.errors import ServeError

VARIABLE = "TRIRANK_TRITONSERVER"
_WHEEL = "nvidia-pytriton"


@dataclass(frozen=True)
class TritonBinary:
    """A server and what it needs around it.

    Attributes:
        path: the executable.
        arguments: before all others.
        environment: added to the process's own.
        backends: the folder of its backends; None: not known.
    """

    path: Path
    arguments: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    backends: Path | None = None


def find_tritonserver(told: Path | None, scratch: Path) -> TritonBinary:
    """The server to run.

    Args:
        told: ``--tritonserver``; else the variable TRIRANK_TRITONSERVER, PATH and the wheel are tried in this order.
        scratch: a folder for the wheel's backends, kept as long as the server runs.

    Raises:
        ServeError: there is none, or the wheel lacks what it needs of this machine.
    """
    if told is None and os.environ.get(VARIABLE):
        told = Path(os.environ[VARIABLE])
    if told is not None:
        if not (told.is_file() and os.access(told, os.X_OK)):
            raise ServeError(f"{told} is no executable file; --tritonserver and {VARIABLE} name a tritonserver")
        return _installed(told)
    if found := shutil.which("tritonserver"):
        return _installed(Path(found))
    return _from_wheel(scratch)


def _installed(path: Path) -> TritonBinary:
    """A server as NVIDIA's container lays it out: ``bin/tritonserver`` beside ``backends``."""
    backends = path.resolve().parent.parent / "backends"
    return TritonBinary(path, backends=backends if backends.is_dir() else None)


def _from_wheel(scratch: Path) -> TritonBinary:
    spec = importlib.util.find_spec("pytriton")
    if spec is None or not spec.submodule_search_locations:
        raise ServeError(
            f"no tritonserver on PATH and no wheel {_WHEEL}; pip install 'trirank[serve]' (Linux x86-64), or run in "
            "NVIDIA's Triton container"
        )
    package = Path(next(iter(spec.submodule_search_locations)))
    triton, libraries = package / "tritonserver", package.parent / "nvidia_pytriton.libs"
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = triton / "python_backend_stubs" / python / "triton_python_backend_stub"
    if not stub.is_file():
        there = ", ".join(sorted(path.name for path in (triton / "python_backend_stubs").glob("*")))
        raise ServeError(f"the wheel {_WHEEL} has no stub for Python {python}, only for {there}; use one of those")
    shared = f"libpython{python}.so.1.0"
    home = Path(str(sysconfig.get_config_var("LIBDIR")))
    if not (home / shared).exists() and not ctypes.util.find_library(f"python{python}"):
        raise ServeError(
            f"{shared} is not on this machine, and Triton's Python backend links to it; install libpython{python} "
            "(Debian, Ubuntu), or a Python built with --enable-shared"
        )
    backend = scratch / "backends" / "python"
    backend.mkdir(parents=True)
    for file in (*(triton / "backends" / "python").glob("*.*"), stub):
        (backend / file.name).symlink_to(file)
    paths = [str(libraries), str(home), os.environ.get("LD_LIBRARY_PATH", "")]
    return TritonBinary(
        path=triton / "bin" / "tritonserver",
        arguments=(f"--backend-directory={backend.parent}",),
        backends=backend.parent,
        environment={
            "LD_LIBRARY_PATH": os.pathsep.join(path for path in paths if path),
            "VIRTUAL_ENV": sys.prefix,
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
            # The stub starts a bare interpreter; this is how it finds what is installed beside this one.
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        },
    )
