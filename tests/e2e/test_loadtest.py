"""The load test drives the served ensemble and reports what it saw."""

from __future__ import annotations

import os
import subprocess
import sys


def run(*arguments, **environment):
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=150, env={**os.environ, **environment}, check=False
    )


def test_one_command(world):
    done = run("-m", "trirank_loadtest.run", "--release", str(world.release), "--seconds", "4", "--rate", "30")
    assert done.returncode == 0, done.stdout + done.stderr
    for words in ("p50 ms", "p95 ms", "p99 ms", "failures", "Aggregated"):
        assert words in done.stdout
    total = next(line for line in done.stdout.splitlines() if "Aggregated" in line).split("│")
    assert int(total[2]) > 50
    assert int(total[3]) == 0


def test_locust_file_headless(world, server):
    done = run(
        "-m", "locust", "-f", "loadtest/locustfile.py", "--headless", "--host", server.grpc, "--users", "2",
        "--spawn-rate", "2", "--run-time", "3s", "--only-summary",
        TRIRANK_REQUESTS=str(world.release / "requests.json"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "rank (home)" in done.stderr + done.stdout


def test_failures_fail_the_run(world):
    """Nobody listens: every call is a failure, counted by its kind."""
    done = run(
        "-m", "locust", "-f", "loadtest/locustfile.py", "--headless", "--host", "127.0.0.1:9", "--users", "1",
        "--run-time", "3s", "--only-summary", TRIRANK_REQUESTS=str(world.release / "requests.json"),
    )  # fmt: skip
    assert done.returncode == 1
    assert "Unavailable" in done.stderr + done.stdout


def test_no_release(tmp_path):
    done = run("-m", "trirank_loadtest.run", "--release", str(tmp_path))
    assert done.returncode == 2
    assert "is no release; run `make demo` first" in done.stderr
