"""Locust's user: one rank request after the other, at a fixed rate, each user in a phase of its own."""

from __future__ import annotations

import itertools
import json
import os
import random
import time
from pathlib import Path

import gevent
import grpc.experimental.gevent
from locust import User, events, task
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

    rate = float(os.environ.get(RATE_VARIABLE, "10"))
    due = 0.0

    def wait_time(self) -> float:
        """Until the next request is due; one that is late is sent at once. Locust's own constant_throughput counts
        from when users were made, which for all of them is the same moment, so they would send in bursts."""
        now = time.perf_counter()
        self.due = max(self.due + 1 / self.rate, now)
        return self.due - now

    def on_start(self) -> None:
        """One connection a user, as separate services would have."""
        path = os.environ.get(REQUESTS_VARIABLE)
        if not path or not Path(path).is_file():
            raise SystemExit(f"{REQUESTS_VARIABLE} names no file; point it at a release's requests.json")
        self.client = RankClient(self.host.removeprefix("grpc://"), deadline_s=2, retry=None)
        self.requests = itertools.cycle(load_requests(Path(path)))
        gevent.sleep(random.random() / self.rate)
        self.due = time.perf_counter()

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
