"""Triton's own processes: those that its Python backend runs models in, and its list of arguments."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import psutil

_STUB = "triton_python_backend_stub"


def stubs(pid: int) -> dict[psutil.Process, str]:
    """Processes of models, below tritonserver or whoever has started it, and the names of their models."""
    found = {}
    with suppress(psutil.Error):
        for child in psutil.Process(pid).children(recursive=True):
            with suppress(psutil.Error, IndexError):
                command = child.cmdline()  # the stub, the model's file, its shared memory, ...
                if command and Path(command[0]).name == _STUB:
                    found[child] = Path(command[1]).parents[1].name
    return found


class Watched:
    """The processes that models were given last, to be asked later which have ended.

    Args:
        pid: of tritonserver.
        wanted: model → how many processes it has. Of those that run these are the newest; others are what a former
            release, or a model that was loaded anew, still has to finish.
    """

    def __init__(self, pid: int, wanted: Mapping[str, int]) -> None:
        running = sorted(stubs(pid).items(), key=lambda found: found[0].create_time(), reverse=True)
        self._of = {
            model: [process for process, name in running if name == model][:count] for model, count in wanted.items()
        }

    def dead(self) -> list[str]:
        """Models a process of which has ended."""
        return [model for model, own in self._of.items() if any(map(_has_ended, own))]


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
