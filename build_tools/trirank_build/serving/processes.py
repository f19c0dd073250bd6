"""Triton's own processes: those that its Python backend runs models in, and its list of arguments."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import psutil

_STUB = "triton_python_backend_stub"


class Stubs:
    """Those that run now, to be asked later which models have lost one.

    Args:
        pid: of tritonserver, or of what has started it.
        wanted: model → how many processes it is to have; of others nobody is missed.

    Attributes:
        models: process → the name of the model that it runs.
    """

    def __init__(self, pid: int, wanted: Mapping[str, int] | None = None) -> None:
        self._pid, self._wanted = pid, dict(wanted or {})
        self.models = self._running()

    def dead(self) -> list[str]:
        """Models that have fewer processes than they are to have. Looking at those that are known costs little, so the
        others are looked for only when one of them has ended: it may have been a former release's."""
        if not any(map(_has_ended, self.models)):
            return []
        self.models = self._running()
        there = Counter(self.models.values())
        return [model for model, count in self._wanted.items() if there[model] < count]

    def _running(self) -> dict[psutil.Process, str]:
        found = {}
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self._pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    command = child.cmdline()  # the stub, the model's file, its shared memory, ...
                    if command and Path(command[0]).name == _STUB:
                        found[child] = Path(command[1]).parents[1].name
        return found


def _has_ended(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE or not process.is_running()
    except psutil.NoSuchProcess:
        return True


def wipe_argument(pid: int, secret: str) -> None:
    """Overwrite a word in a process's list of arguments, which every user of the machine can read.

    Raises:
        OSError: this process may not, or the word is not there.
    """
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[45]), int(fields[46])  # arg_start and arg_end, proc(5)
    with Path(f"/proc/{pid}/mem").open("r+b", buffering=0) as memory:
        memory.seek(start)
        arguments = memory.read(end - start)
        if secret.encode() not in arguments:
            raise OSError(0, "the word is not among its arguments")
        memory.seek(start)
        memory.write(arguments.replace(secret.encode(), b"*" * len(secret)))
