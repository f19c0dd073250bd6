"""A served release under a steady load, something that breaks, and what callers saw: for tests and benchmarks.

The command is a real `trirank serve` with real processes; nothing is mocked. Callers send at a fixed rate, whether or
not those before have been answered, through the client without retries, so that what is counted is the server's doing.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from trirank import RankClient, RankError, RankRequest
from trirank_build.repository.release import recorded_requests
from trirank_build.serving.processes import stubs

RATE, DEADLINE_S, CALLERS = 50.0, 1.0, 64
SETTLED_S = 2.0
"""So long without a failure, and it is over."""


@dataclass
class Call:
    """One request, in seconds of a monotonic clock.

    Attributes:
        sent: when it was due, whether or not somebody was free to send it.
        began: when it was sent.
        error: what came of it; empty: it was answered.
    """

    sent: float
    began: float
    ended: float
    error: str


@dataclass
class Seen:
    """What callers saw of a fault.

    Attributes:
        failed: requests that were not answered, sent or under way after the fault.
        recovered_s: from the fault to the sending of the last one that failed, after which all were answered; 0: none
            was sent after it that failed.
        errors: kind of error → how often.
        answered: requests that were answered meanwhile.
        log: what the command said.
    """

    failed: int
    recovered_s: float
    errors: dict[str, int]
    answered: int
    log: str = ""


@dataclass
class Served:
    """A running command.

    Attributes:
        process: of `trirank serve`.
        file: its addresses and state.
        log: file that it writes its words to.
    """

    release: Path
    process: subprocess.Popen[bytes]
    file: Path
    log: Path
    calls: list[Call] = field(default_factory=list)

    def told(self, name: str) -> Any:
        """What stands in its file."""
        return json.loads(self.file.read_text())[name]

    def stubs(self) -> dict[psutil.Process, str]:
        """Processes of models, and their models' names."""
        return stubs(self.process.pid)

    def stub(self, stage: str) -> psutil.Process:
        """A process of a stage, the newest, since one that was replaced takes a moment to end. ``single`` has the model
        ``rank`` alone."""
        own = [process for process, model in self.stubs().items() if re.match(rf"({stage}|rank)(_|$)", model)]
        return max(own, key=lambda process: process.create_time())

    def fill_shm(self) -> Path:
        """Leave nothing of its own /dev/shm; gives the file that does, which can be deleted."""
        place = Path(f"/proc/{self.process.pid}/root/dev/shm")
        filler = place / "filler"
        with filler.open("wb") as stream:
            os.posix_fallocate(stream.fileno(), 0, shutil.disk_usage(place).free)
        return filler

    def server(self) -> psutil.Process:
        """tritonserver."""
        return psutil.Process(self.told("tritonserver_pid"))


@contextmanager
def served(
    release: Path,
    folder: Path,
    *arguments: str,
    shm_mib: int = 0,
    environment: dict[str, str] | None = None,
    prefix: Sequence[str] = (),
) -> Iterator[Served]:
    """`trirank serve` on a release, until the block ends.

    Args:
        environment: added to this process's own.
        prefix: words before the command.
        shm_mib: size of a /dev/shm of its own, as a container has; 0: this machine's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file, log = folder / "state.json", folder / "said"
    command = [sys.executable, "-m", "trirank_build.cli", "serve", str(release), "--addresses", str(file), *arguments]
    if shm_mib:
        mount = f'mount -t tmpfs -o size={shm_mib}m none /dev/shm && exec "$@"'
        command = ["unshare", "--mount", "sh", "-c", mount, "sh", *command]
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [*prefix, *command],
            stdout=stream,
            stderr=stream,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **(environment or {})},
        )
    try:
        wait_until(file.is_file, process, log)
        yield Served(release, process, file, log)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_until(
    condition: Callable[[], Any], process: subprocess.Popen[bytes], log: Path, timeout_s: float = 60
) -> None:
    """Raises AssertionError if the command ends first, or it takes too long."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


class Clock:
    """A wall clock that can be set, for processes that are started with its ``environment`` (clock.c).

    Raises:
        OSError, subprocess.CalledProcessError: there is no C compiler.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file, library = folder / "clock", folder / "clock.so"
        source = Path(__file__).with_name("clock.c")
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl", "-lpthread"], check=True)
        self._file.write_bytes(bytes(8))
        self.environment = {"LD_PRELOAD": str(library), "TRIRANK_CLOCK": str(self._file)}

    def set(self, seconds: int) -> None:
        """So many seconds from the true time."""
        with self._file.open("r+b") as stream:
            stream.write(seconds.to_bytes(8, "little", signed=True))

    def now(self) -> float:
        """What its processes take the time to be."""
        command = [sys.executable, "-c", "import time; print(time.time())"]
        environment = {**os.environ, **self.environment}
        return float(subprocess.run(command, capture_output=True, check=True, env=environment).stdout)


class MemoryLimit:
    """A control group, as a container has, whose memory comes to an end when ``reach`` is called: the kernel then kills
    the largest of its processes."""

    def __init__(self) -> None:
        self._group = Path("/sys/fs/cgroup/memory") / f"trirank-{os.getpid()}-{time.monotonic_ns()}"

    def __enter__(self) -> MemoryLimit:
        """Raises OSError where no group can be made."""
        self._group.mkdir()
        return self

    def __exit__(self, *_: object) -> None:
        for _ in range(50):  # its processes are ending
            with suppress(OSError):
                return self._group.rmdir()
            time.sleep(0.1)
        return self._group.rmdir()

    @property
    def prefix(self) -> list[str]:
        """Words before a command that is to run in the group."""
        return ["sh", "-c", f'echo $$ > {self._group}/cgroup.procs && exec "$@"', "sh"]

    def reach(self, running: Served) -> None:
        """Set the limit a little above what is used, and have a neighbour use up the rest, until the kernel has killed
        something: of the server and its stages, which are marked for it, as the largest of a container would be."""
        for process in (running.server(), *running.stubs()):
            Path(f"/proc/{process.pid}/oom_score_adj").write_text("500")
        used = int((self._group / "memory.usage_in_bytes").read_text())
        limit = self._group / "memory.limit_in_bytes"
        limit.write_text(str(used + (32 << 20)))
        before = self.kills()
        hog = "import time\nkept = []\nwhile True:\n    kept.append(b'x' * (4 << 20))\n    time.sleep(0.01)\n"
        process = subprocess.Popen([*self.prefix, sys.executable, "-c", hog])
        try:
            deadline = time.monotonic() + 20
            while self.kills() == before and time.monotonic() < deadline:
                time.sleep(0.005)
        finally:
            process.kill()
            process.wait()

    def kills(self) -> int:
        """How often the kernel has killed for it."""
        told = dict(line.split() for line in (self._group / "memory.oom_control").read_text().splitlines())
        return int(told["oom_kill"])


@contextmanager
def load(running: Served, rate: float = RATE, requests: list[RankRequest] | None = None) -> Iterator[list[Call]]:
    """Callers that go on while the block runs; gives their calls, to which more are added."""
    recorded = requests or recorded_requests(running.release)
    calls: list[Call] = []
    stop = threading.Event()
    with (
        RankClient(running.told("grpc"), deadline_s=DEADLINE_S, retry=None) as client,
        ThreadPoolExecutor(CALLERS) as pool,
    ):

        def call(number: int, sent: float) -> None:
            began, error = time.monotonic(), ""
            try:
                client.rank(recorded[number % len(recorded)])
            except RankError as failed:
                error = type(failed).__name__
            calls.append(Call(sent, began, time.monotonic(), error))

        def go_on() -> None:
            start, number = time.monotonic(), 0
            while not stop.is_set():
                due = start + number / rate
                if (early := due - time.monotonic()) > 0:
                    time.sleep(early)
                pool.submit(call, number, due)
                number += 1

        client.rank(recorded[0], deadline_s=10)
        thread = threading.Thread(target=go_on)
        thread.start()
        try:
            yield calls
        finally:
            stop.set()
            thread.join()


def watch(running: Served, fault: Callable[[], Any], *, rate: float = RATE, longest_s: float = 60.0) -> Seen:
    """Break something, and wait until callers have been answered for SETTLED_S and the server says that it is ready.

    Args:
        longest_s: after which it is not waited for any more.
    """
    words = running.log.stat().st_size
    with load(running, rate) as calls:
        time.sleep(1.0)
        began = time.monotonic()
        fault()
        while time.monotonic() < began + longest_s:
            time.sleep(0.1)
            last = max([began, *(call.ended for call in list(calls) if call.error and call.ended > began)])
            if time.monotonic() > last + SETTLED_S and running.told("state") == "ready":
                break
    met = [call for call in calls if call.ended > began]
    failed = [call for call in met if call.error]
    return Seen(
        len(failed), max([0.0, *(call.sent - began for call in failed)]), dict(Counter(call.error for call in failed)),
        len(met) - len(failed), running.log.read_bytes()[words:].decode(errors="replace"),
    )  # fmt: skip
