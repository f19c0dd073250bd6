"""Triton's own processes: those that its Python backend runs models in, and its list of arguments."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import psutil

_STUB = "triton_python_backend_stub"


class Stubs:
    """Those that run now, to be asked later which have died.

    Args:
        pid: of tritonserver, or of what has started it.

    Attributes:
        models: process → the name of the model that it runs.
    """

    def __init__(self, pid: int) -> None:
        self.models: dict[psutil.Process, str] = {}
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    command = child.cmdline()  # the stub, the model's file, its shared memory, ...
                    if command and Path(command[0]).name == _STUB:
                        self.models[child] = Path(command[1]).parents[1].name

    def dead(self) -> list[str]:
        """Models a process of which has ended since."""
        return list(dict.fromkeys(model for process, model in self.models.items() if _has_ended(process)))


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
