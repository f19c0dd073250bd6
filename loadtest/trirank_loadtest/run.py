"""`make loadtest`: serve a release, drive it headless for a fixed time, print a table, stop.

The server is started as a separate command, so that this package needs nothing but the client.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

START_TIMEOUT_S = 120


def main() -> int:
    """Exit status 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--release", type=Path, required=True)
    parser.add_argument("--seconds", type=int, default=20)
    parser.add_argument("--users", type=int, default=10)
    parser.add_argument("--rate", type=float, default=100, help="requests a second, of all users together")
    arguments = parser.parse_args()
    requests = arguments.release / "requests.json"
    if not requests.is_file():
        parser.error(f"{arguments.release} is no release; run `make demo` first, or name another with --release")
    with tempfile.TemporaryDirectory(prefix="trirank-load-") as scratch:
        addresses = Path(scratch, "addresses.json")
        serve = [
            sys.executable,
            "-m",
            "trirank_build.cli",
            "serve",
            str(arguments.release),
            "--addresses",
            str(addresses),
        ]
        server = subprocess.Popen(serve)
        try:
            host = _wait(server, addresses)
            return _drive(arguments, host, requests, Path(scratch, "load"))
        finally:
            server.send_signal(signal.SIGINT)
            server.wait()


def _wait(server: subprocess.Popen[bytes], addresses: Path) -> str:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not addresses.is_file():
        if server.poll() is not None or time.monotonic() > deadline:
            sys.exit("the server did not start")
        time.sleep(0.1)
    return str(json.loads(addresses.read_text())["grpc"])


def _drive(arguments: argparse.Namespace, host: str, requests: Path, prefix: Path) -> int:
    environment = {
        **os.environ,
        "TRIRANK_REQUESTS": str(requests),
        "TRIRANK_RATE_PER_USER": str(arguments.rate / arguments.users),
    }
    command = [
        sys.executable, "-m", "locust", "-f", str(Path(__file__).with_name("user.py")), "--headless", "--only-summary",
        "--host", host, "--users", str(arguments.users), "--spawn-rate", str(arguments.users),
        "--run-time", f"{arguments.seconds}s", "--csv", str(prefix), "--loglevel", "ERROR",
    ]  # fmt: skip
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=False)
    with Path(f"{prefix}_stats.csv").open() as file:
        rows = list(csv.DictReader(file))
    table = Table("request", "count", "failures", "requests/s", "p50 ms", "p95 ms", "p99 ms")
    for row in rows:
        table.add_row(
            row["Name"], row["Request Count"], row["Failure Count"], f"{float(row['Requests/s']):.1f}",
            row["50%"], row["95%"], row["99%"],
        )  # fmt: skip
    Console().print(table)
    total = rows[-1]
    return 0 if int(total["Request Count"]) and not int(total["Failure Count"]) else 1


if __name__ == "__main__":
    sys.exit(main())
