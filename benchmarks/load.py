"""Load from outside, by processes that cost next to nothing: nghttp2's h2load, which sends ready messages over HTTP/2
or HTTP/1.1, and open_loop.py.

A load generator in Python takes a tenth of a millisecond of a core a request, as much as some of the servers here, and
its threads hold each other up: its own stalls then look like the server's. h2load takes some microseconds. Each caller
has a connection of its own; all start together, and the first part of every run is not counted.

``closed_loop``: callers that send their next request when the one before is answered. ``open_loop``: requests come when
they come, as a Poisson process, whatever the server does, and a latency counts from the moment at which its request was
to be sent (no coordinated omission).
"""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
from trirank import RankRequest, _codec
from trirank import contract as c

METHOD = "/inference.GRPCInferenceService/ModelInfer"
PROCESSES = 8
CONNECTIONS, CHANNELS = 256, 64
"""Of an open loop: connections of HTTP/1.1, each with one request at a time, or of HTTP/2 with as many as there are; so
many that servers whose processes share a port share the work."""
OWN_START_CPU_S = 0.25
"""Of the open loop's process, before it sends."""
WARM_SHARE = 0.2
"""Of a run that is not counted: connections open and caches fill."""
P99_MS = 50.0
KEPT = 0.97
"""Share of what was offered that must be answered within the run, or the queue only grows."""
STEP, HALVINGS = 1.2, 2
_GRPC = ("content-type: application/grpc", "te: trailers")


@dataclass(frozen=True)
class Target:
    """What is sent, and where to.

    Attributes:
        bodies: ready messages, of which each caller sends one again and again.
        http1: whether it is HTTP/1.1, else HTTP/2 without TLS.
    """

    address: str
    bodies: list[bytes]
    path: str = METHOD
    headers: tuple[str, ...] = _GRPC
    http1: bool = False

    def command(self, body: Path, log: Path, *more: str) -> list[str]:
        """h2load with one caller, but for its rate."""
        headers = [word for header in self.headers for word in ("-H", header)]
        return [
            "h2load", *(["--h1"] if self.http1 else []), "--max-concurrent-streams=1", f"--data={body}",
            f"--log-file={log}", *headers, *more,
        ]  # fmt: skip

    @property
    def url(self) -> str:
        """Of a request."""
        return f"http://{self.address}{self.path}"


@dataclass(frozen=True)
class Run:
    """What callers saw of one run.

    Attributes:
        latencies_ms: of every counted request, of all callers.
        rate: requests a second while all callers were at work.
        server_cpu_ms: of the server's processes, a request.
        load_cpu_ms: of the load generator's, a request.
        offered: requests a second that were to be sent; 0 in a closed loop.
        refused_ms: when those were told so that were refused; unanswered: share of those that were told nothing.
    """

    latencies_ms: np.ndarray
    rate: float
    server_cpu_ms: float
    load_cpu_ms: float = 0.0
    offered: float = 0.0
    refused_ms: np.ndarray = field(default_factory=lambda: np.zeros(0))
    unanswered: float = 0.0

    def percentile(self, share: float) -> float:
        """Milliseconds below which ``share`` per cent of the requests stayed."""
        return float(np.percentile(self.latencies_ms, share, method="inverted_cdf"))


@dataclass(frozen=True)
class Running:
    """A server that answers: what to send where, and whose processor time counts."""

    target: Target
    pid: int


def frame(message: bytes) -> bytes:
    """A message as gRPC frames it: not compressed, length, message."""
    return b"\0" + len(message).to_bytes(4, "big") + message


def triton(address: str, requests: list[RankRequest], model: str = c.ENSEMBLE) -> Target:
    """A server of ours."""
    return Target(address, [frame(_codec.encode(request, model)[0]) for request in requests])


def closed_loop(target: Target, callers: int, seconds: float, servers: list[int]) -> Run:
    """``callers`` callers each of which sends its next request when the one before is answered.

    Args:
        callers: below PROCESSES, or a multiple of it; they share at most so many processes, a body each.
        servers: process ids whose processor time counts, with that of their children.
    """
    if shutil.which("h2load") is None:
        sys.exit("h2load is not there; on Debian and Ubuntu install nghttp2-client")
    with tempfile.TemporaryDirectory() as folder:
        commands = []
        processes = min(callers, PROCESSES)
        for at in range(processes):
            body = Path(folder, f"{at}.body")
            body.write_bytes(target.bodies[at % len(target.bodies)])
            commands.append(
                target.command(
                    body, Path(folder, f"{at}.log"), f"--clients={callers // processes}", "--warm-up-time=0",
                    f"--duration={int(seconds * 1000)}ms", target.url,
                )
            )  # fmt: skip
        spent, own = _run(commands, servers, seconds + 60)
        # One that is empty: its callers waited for their first answer to the end.
        logs = _logs(folder, processes)
    logs = [log for log in logs if len(log)]
    if not logs:
        raise RuntimeError("nobody was answered")
    _check(logs)
    answered = sum(len(log) for log in logs)
    first, last = max(log[0, 0] for log in logs), min(log[-1, 0] for log in logs)
    first += int(WARM_SHARE * (last - first))
    counted = np.concatenate([log[(log[:, 0] >= first) & (log[:, 0] <= last), 2] for log in logs])
    rate = len(counted) / ((last - first) / 1e6)
    return Run(counted / 1e3, rate, spent * 1e3 / answered, own * 1e3 / answered)


def open_loop(
    target: Target, rate: float, seconds: float, servers: list[int], seed: int = 0, deadline_s: float = 0.0
) -> Run:
    """Requests as a Poisson process of ``rate`` a second, whatever becomes of those before (see open_loop.py).

    What is refused, or not answered within ten seconds after the last was due, has an infinite latency.

    Args:
        deadline_s: goes along with each request of ours, as our client sends it; 0: none.
    """
    with tempfile.TemporaryDirectory() as folder:
        bodies = [Path(folder, f"{at}.body") for at in range(len(target.bodies))]
        for path, body in zip(bodies, target.bodies, strict=True):
            path.write_bytes(body)
        plan = {
            "address": target.address, "path": target.path, "headers": target.headers, "http1": target.http1,
            "bodies": [str(path) for path in bodies], "rate": rate, "seconds": seconds, "seed": seed,
            "connections": CONNECTIONS, "channels": CHANNELS, "patience_s": 10.0, "deadline_s": deadline_s,
        }  # fmt: skip
        Path(folder, "plan.json").write_text(json.dumps(plan))
        command = [
            sys.executable,
            str(Path(__file__).with_name("open_loop.py")),
            f"{folder}/plan.json",
            f"{folder}/result.npy",
        ]
        before = cpu_s(servers)
        words = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=seconds + 60).stdout
        spent, own = cpu_s(servers) - before, json.loads(words)["cpu_s"] - OWN_START_CPU_S
        due, answered, outcome = np.load(f"{folder}/result.npy").T
    latency = np.where(outcome == 1, answered - due, np.inf)
    first = WARM_SHARE * seconds
    inside = due >= first
    rate_answered = float(((answered >= first) & (answered < seconds) & (outcome == 1)).sum()) / (seconds - first)
    return Run(
        latency[inside] * 1e3, rate_answered, spent * 1e3 / len(due), own * 1e3 / len(due),
        float(inside.sum()) / (seconds - first), (answered - due)[inside & (outcome == 0)] * 1e3,
        float((outcome[inside] < 0).mean()),
    )  # fmt: skip


@dataclass(frozen=True)
class Capacity:
    """Of one server in one round.

    Attributes:
        rate: requests a second at which it held; run: what was seen there.
        failing: the lowest rate at which it did not, and its p99 in ms.
    """

    rate: float
    run: Run | None
    failing: tuple[float, float]


def capacity(running: Running, guess: float, seconds: float, seed: int) -> Capacity:
    """Bracket the highest rate that holds by steps of a fifth, then halve the bracket (geometrically) twice, to 5 %.

    A rate that does not hold is tried once more, for every server alike: what else this machine does makes far more
    rates fail that a server can bear than luck makes others hold.
    """
    low, high, kept, failing = 0.0, np.inf, None, (np.inf, np.inf)
    rate, halved = guess, 0
    while halved < HALVINGS and rate > 5:
        runs = [open_loop(running.target, rate, seconds, [running.pid], seed)]
        if not _held(runs[0]):
            runs.append(open_loop(running.target, rate, seconds, [running.pid], seed + 50))
        if _held(runs[-1]):
            low, kept = rate, runs[-1]
        else:
            high, failing = rate, (rate, min(run.percentile(99) for run in runs))
        seed += 1
        if low and np.isfinite(high):
            rate, halved = float(np.sqrt(low * high)), halved + 1
        else:
            rate = rate * STEP if low else rate / STEP
    return Capacity(low, kept, failing)


def _held(run: Run) -> bool:
    return run.percentile(99) <= P99_MS and run.rate >= KEPT * run.offered


def _run(commands: list[list[str]], servers: list[int], timeout_s: float) -> tuple[float, float]:
    """Processor seconds of the servers and of the load."""
    before, own = cpu_s(servers), _children_s()
    loads = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for command in commands]
    try:
        _finish(loads, timeout_s)
    finally:
        _end(loads)
    return cpu_s(servers) - before, _children_s() - own


def _finish(loads: list[subprocess.Popen[bytes]], timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    for load in loads:
        _, words = load.communicate(timeout=max(0.1, end - time.monotonic()))
        if load.returncode:
            raise RuntimeError(f"h2load ended with {load.returncode}: {words.decode()[-500:]}")


def _end(loads: list[subprocess.Popen[bytes]]) -> None:
    """Those that still run, after an error."""
    for load in loads:
        if load.poll() is None:
            load.kill()
            load.wait()


def _logs(folder: str, count: int) -> list[np.ndarray]:
    """Microseconds of start, status, microseconds of duration, of each caller or process."""
    files = [Path(folder, f"{at}.log") for at in range(count)]
    return [
        np.loadtxt(file, np.int64, ndmin=2, usecols=(0, 1, 2)) if file.stat().st_size else np.zeros((0, 3), np.int64)
        for file in files
    ]


def _check(logs: list[np.ndarray]) -> None:
    bad = sum(int((log[:, 1] != 200).sum()) for log in logs)
    if bad:
        raise RuntimeError(f"the server answered {bad} times with something else than 200")


def _children_s() -> float:
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def cpu_s(pids: list[int]) -> float:
    """Processor seconds of processes and their children."""
    found = [
        process for pid in pids for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True))
    ]
    return sum(sum(process.cpu_times()[:2]) for process in found)
