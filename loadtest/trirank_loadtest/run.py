"""One load: Locust's processes are started, the server's statistics read before and after, and put together."""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from trirank_loadtest.errors import BadLoad, LoadFailed
from trirank_loadtest.measured import Measured, read_samples, summarised
from trirank_loadtest.mix import Mix, load_requests
from trirank_loadtest.shapes import check
from trirank_loadtest.stages import between, read_statistics

KINDS = ("rank (home)", "rank (search)", "feedback")
"""As user.py has them, which cannot be imported without gevent taking over."""
_USERS_EACH = 2
_START_S = 60.0


@dataclass(frozen=True)
class Load:
    """What is sent, and where to.

    Attributes:
        addresses: of servers' gRPC endpoints.
        requests: recorded ones, see mix.load_requests.
        rate: requests a second of all users together, the highest of the shape.
        through: one of senders.SENDERS.
        deadline_s: of a request, from when it was due.
        workers: Locust's processes; above 1 a master and so many workers.
        users: streams, each with a connection of its own; 0: two a worker.
    """

    addresses: list[str]
    requests: Path
    rate: float
    seconds: float = 20.0
    shape: str = "constant"
    mix: str = "recorded"
    feedback: float = 0.0
    through: str = "client"
    deadline_s: float = 1.0
    workers: int = 1
    users: int = 0
    seed: int = 0
    percentiles: tuple[float, ...] = field(default=())

    def check(self) -> None:
        """Raises BadLoad if it makes none."""
        check(self.rate, self.seconds, self.shape)
        Mix.read(self.mix, self.feedback)
        load_requests(self.requests)
        if not self.deadline_s > 0:
            raise BadLoad(f"deadline is {self.deadline_s:g}; it is seconds, above 0")
        if not 1 <= self.workers <= 64:
            raise BadLoad(f"workers is {self.workers}; Locust runs in 1 to 64 processes here")
        if self.users < 0 or (self.users and self.users < self.workers):
            raise BadLoad(f"users is {self.users}; each of {self.workers} workers needs one")
        for address in self.addresses:
            _, colon, port = address.rpartition(":")
            if not colon or not port.isdigit():
                raise BadLoad(f"server {address!r} is no HOST:PORT of a gRPC endpoint")


def run(load: Load) -> Measured:
    """Make the load, and tell what was seen.

    Raises:
        BadLoad: it makes none.
        LoadFailed: a server does not answer, or the load could not be made.
    """
    load.check()
    before = read_statistics(load.addresses)
    with tempfile.TemporaryDirectory(prefix="trirank-load-") as folder:
        watch = _Watch()
        watch.start()
        try:
            _drive(load, Path(folder), watch)
        finally:
            watch.stop()
        rows, outcomes = read_samples(Path(folder))
    stages = between(before, read_statistics(load.addresses))
    return summarised(rows, outcomes, KINDS, load.rate, load.seconds, load.percentiles, stages, watch.shares())


def locust(load: Load, folder: Path | None, *more: str) -> list[str]:
    """Locust's command; ``folder``: where samples go."""
    users = load.users or _USERS_EACH * load.workers
    return [
        sys.executable, "-m", "locust", "-f", str(Path(__file__).with_name("user.py")), "--host",
        ",".join(load.addresses), "--requests", str(load.requests), "--rate-per-user", repr(load.rate / users),
        "--shape", load.shape, "--shape-seconds", repr(load.seconds), "--mix", load.mix, "--feedback",
        repr(load.feedback), "--through", load.through, "--deadline", repr(load.deadline_s), "--seed", str(load.seed),
        *(["--samples", str(folder)] if folder else []), "--users", str(users), "--spawn-rate", str(users), *more,
    ]  # fmt: skip


def _drive(load: Load, folder: Path, watch: _Watch) -> None:
    """One process, or a master and its workers."""
    length = load.seconds + 2 * load.deadline_s + 2
    headless = [
        "--headless",
        "--only-summary",
        "--loglevel",
        "ERROR",
        "--run-time",
        f"{length:.0f}s",
        "--stop-timeout",
        "10",
    ]
    commands = [locust(load, folder, *headless)]
    if load.workers > 1:
        port = str(_free_port())
        commands = [
            locust(load, folder, *headless, "--master", "--master-bind-host", "127.0.0.1", "--master-bind-port", port,
                   "--expect-workers", str(load.workers), "--expect-workers-max-wait", f"{_START_S:.0f}"),
            *[[*locust(load, folder), "--worker", "--master-host", "127.0.0.1", "--master-port", port, "--loglevel",
               "ERROR"]] * load.workers,
        ]  # fmt: skip
    words = folder / "words"
    with words.open("wb") as stream:
        processes = [subprocess.Popen(command, stdout=stream, stderr=stream) for command in commands]
        watch.follow([process.pid for process in processes])
        end = time.monotonic() + length + _START_S
        try:
            for process in processes:
                process.wait(max(1.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise LoadFailed(f"Locust did not end within {length + _START_S:.0f} s; {_last(words)}") from None
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                    process.wait()
    # Locust's status says whether requests failed, which is told elsewhere; without samples it failed itself.
    if not list(folder.glob("*.npz")):
        raise LoadFailed(f"Locust sent nothing: {_last(words)}")


def _last(words: Path) -> str:
    lines = [line for line in words.read_text(errors="replace").splitlines() if line.strip()]
    said = [line for line in lines if "error: " in line or "Error" in line]
    return (said or lines or ["it said nothing"])[-1][-500:]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class _Watch(threading.Thread):
    """How busy this machine and the load's processes are, read twice a second while both are at work."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._ended = threading.Event()
        self._pids: list[int] = []
        self._machine: list[float] = []
        self._load: list[float] = []

    def follow(self, pids: list[int]) -> None:
        """Processes of the load."""
        self._pids = pids

    def run(self) -> None:
        cores = psutil.cpu_count() or 1
        psutil.cpu_percent()
        last, then = self._spent(), time.monotonic()
        while not self._ended.wait(0.5):
            now, spent = time.monotonic(), self._spent()
            self._machine.append(psutil.cpu_percent() / 100)
            self._load.append(max(0.0, spent - last) / (now - then) / cores)
            last, then = spent, now

    def stop(self) -> None:
        """No more."""
        self._ended.set()
        self.join()

    def shares(self) -> dict[str, float]:
        """Medians: the ends of a run, when processes start and stop, do not count."""
        return {"machine": _middle(self._machine), "load": _middle(self._load)}

    def _spent(self) -> float:
        return sum(map(_spent, self._pids))


def _middle(values: list[float]) -> float:
    return sorted(values)[len(values) // 2] if values else 0.0


def _spent(pid: int) -> float:
    try:
        return float(sum(psutil.Process(pid).cpu_times()[:2]))
    except psutil.Error:  # it has ended
        return 0.0
