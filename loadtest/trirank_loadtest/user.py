"""Locust's user: one rank request after the other, at a fixed rate."""

from __future__ import annotations

import itertools
import json
import os
import time
from pathlib import Path

import grpc.experimental.gevent
from locust import User, constant_throughput, events, task
from trirank import RankClient, RankRequest

# Before the first channel: gRPC's own threads would stall Locust's loop otherwise.
grpc.experimental.gevent.init_gevent()

REQUESTS_VARIABLE = "TRIRANK_REQUESTS"
RATE_VARIABLE = "TRIRANK_RATE_PER_USER"


def load_requests(path: Path) -> list[RankRequest]:
    """Recorded requests (a release's ``requests.json``)."""
    return [RankRequest.from_dict(raw) for raw in json.loads(path.read_text())]


class RankUser(User):
    """Sends recorded requests in turn. ``--host`` is the server's gRPC address."""

    wait_time = constant_throughput(float(os.environ.get(RATE_VARIABLE, "10")))

    def on_start(self) -> None:
        """One connection a user, as separate services would have."""
        path = os.environ.get(REQUESTS_VARIABLE)
        if not path or not Path(path).is_file():
            raise SystemExit(f"{REQUESTS_VARIABLE} names no file; point it at a release's requests.json")
        self.client = RankClient(self.host.removeprefix("grpc://"), deadline_s=2)
        self.requests = itertools.cycle(load_requests(Path(path)))

    def on_stop(self) -> None:
        """Close the connection."""
        self.client.close()

    @task
    def rank(self) -> None:
        """One call, reported to Locust; any failure is counted with its kind."""
        request = next(self.requests)
        started = time.perf_counter()
        error: Exception | None = None
        length = 0
        try:
            length = len(self.client.rank(request))
        except Exception as caught:
            error = caught
        events.request.fire(
            request_type="grpc",
            name="rank (search)" if request.query else "rank (home)",
            response_time=(time.perf_counter() - started) * 1e3,
            response_length=length,
            exception=error,
            context={},
        )
