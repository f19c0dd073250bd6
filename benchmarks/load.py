"""Load from outside, by processes that cost next to nothing: nghttp2's h2load, which sends ready messages over HTTP/2.

A load generator in Python takes a tenth of a millisecond of a core a request, as much as some of the servers here, and
its threads hold each other up: its own stalls then look like the server's. h2load takes some microseconds. Each caller
has a connection of its own; callers share at most eight processes, each with a request of its own; all start together,
and the first part of every run is not counted.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from trirank import RankRequest, _codec
from trirank import contract as c

METHOD = "/inference.GRPCInferenceService/ModelInfer"
PROCESSES = 8
WARM_SHARE = 0.2
"""Of a run that is not counted: connections open and caches fill."""


@dataclass(frozen=True)
class Run:
    """What callers saw of one run.

    Attributes:
        latencies_ms: of every counted request, of all callers.
        rate: requests a second while all callers were at work.
        server_cpu_ms: of the server's processes, a request.
    """

    latencies_ms: np.ndarray
    rate: float
    server_cpu_ms: float

    def percentile(self, share: float) -> float:
        """Milliseconds below which ``share`` per cent of the requests stayed."""
        return float(np.percentile(self.latencies_ms, share))


def frame(request: RankRequest, model: str) -> bytes:
    """A request as gRPC frames it: not compressed, length, message."""
    message = _codec.encode(request, model)[0]
    return b"\0" + len(message).to_bytes(4, "big") + message


def closed_loop(
    address: str, requests: list[RankRequest], callers: int, seconds: float, servers: list[int], model: str = c.ENSEMBLE
) -> Run:
    """``callers`` callers each of which sends its next request when the one before is answered.

    Args:
        callers: below PROCESSES, or a multiple of it.
        servers: process ids whose processor time counts, with that of their children.
    """
    if shutil.which("h2load") is None:
        sys.exit("h2load is not there; on Debian and Ubuntu install nghttp2-client")
    with tempfile.TemporaryDirectory() as folder:
        commands = []
        processes = min(callers, PROCESSES)
        for at in range(processes):
            body = Path(folder, f"{at}.body")
            body.write_bytes(frame(requests[at % len(requests)], model))
            commands.append([
                "h2load", f"--clients={callers // processes}", "--max-concurrent-streams=1",
                f"--duration={int(seconds * 1000)}ms", "--warm-up-time=0", f"--data={body}",
                f"--log-file={folder}/{at}.log",
                "-H", "content-type: application/grpc", "-H", "te: trailers", f"http://{address}{METHOD}",
            ])  # fmt: skip
        before = _cpu_s(servers)
        loads = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for command in commands]
        for load in loads:
            _, words = load.communicate()
            if load.returncode:
                raise RuntimeError(f"h2load ended with {load.returncode}: {words.decode()[-500:]}")
        spent = _cpu_s(servers) - before
        files = [Path(folder, f"{at}.log") for at in range(processes)]
        # One that is empty: its callers waited for their first answer to the end.
        logs = [np.loadtxt(file, np.int64, ndmin=2, usecols=(0, 1, 2)) for file in files if file.stat().st_size]
    if not logs:
        raise RuntimeError("nobody was answered")
    if any((log[:, 1] != 200).any() for log in logs):
        raise RuntimeError("the server answered with something else than 200")
    answered = sum(len(log) for log in logs)
    first, last = max(log[0, 0] for log in logs), min(log[-1, 0] for log in logs)
    first += int(WARM_SHARE * (last - first))
    counted = np.concatenate([log[(log[:, 0] >= first) & (log[:, 0] <= last), 2] for log in logs])
    return Run(counted / 1e3, len(counted) / ((last - first) / 1e6), spent * 1e3 / answered)


def _cpu_s(pids: list[int]) -> float:
    """Processor seconds of processes and their children."""
    found = [
        process for pid in pids for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True))
    ]
    return sum(sum(process.cpu_times()[:2]) for process in found)
