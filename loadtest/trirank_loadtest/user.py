"""Locust's user: an open loop. Requests come when a Poisson process says so, each in a greenlet of its own, whatever
became of those before, and a latency counts from the moment at which its request was due.

A closed loop waits for the answer before it sends again, so a server that stalls is asked less while it stalls, and
what it did to those who would have come is never seen (coordinated omission; Tene, "How not to measure latency").
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import gevent
import gevent.pool
import grpc.experimental.gevent
import numpy as np
from locust import User, events, task
from locust.exception import StopUser
from trirank import RankRequest

from trirank_loadtest.errors import BadLoad
from trirank_loadtest.mix import Mix, events_of, load_requests, requests_of
from trirank_loadtest.senders import SENDERS, Sender
from trirank_loadtest.shapes import SHAPES, arrivals, check

# Before the first channel: gRPC's own threads would stall Locust's loop otherwise.
grpc.experimental.gevent.init_gevent()

KINDS = ("rank (home)", "rank (search)", "feedback")
_FOREVER_S = 7 * 86_400.0


@events.init_command_line_parser.add_listener
def _arguments(parser: Any) -> None:
    """What a load is made of; on Locust's web page as well."""
    add = parser.add_argument
    add("--requests", env_var="TRIRANK_REQUESTS", default="", help="Recorded requests: a release's requests.json.")
    add("--rate-per-user", env_var="TRIRANK_RATE_PER_USER", type=float, default=10.0, help="Requests a second.")
    add("--shape", default="constant", choices=list(SHAPES), help="Of the rate over the run.")
    add("--shape-seconds", type=float, default=0.0, help="How long the shape takes; 0: a week.")
    add("--mix", default="recorded", help="recorded, or drawn:zipf=1.1,users=100000,search=0.5.")
    add("--feedback", type=float, default=0.0, help="Feedback calls beside each request, on average.")
    add("--through", default="client", choices=list(SENDERS), help="Our client, or grpcio alone.")
    add("--deadline", type=float, default=1.0, help="Seconds that a request has, from when it was due.")
    add("--seed", type=int, default=0, help="Of all that is drawn.", include_in_web_ui=False)
    add("--samples", default="", help="Folder for what each request saw.", include_in_web_ui=False)


@events.init.add_listener
def _end_with_the_shape(environment: Any, **_: Any) -> None:
    """Locust by itself goes on to the end of its run time, however soon all users are done."""
    options = environment.parsed_options
    if options.shape_seconds and options.headless and not options.worker:
        environment.events.spawning_complete.add_listener(lambda **_: gevent.spawn(_quit_when_done, environment.runner))


def _quit_when_done(runner: Any) -> None:
    seen = 0
    while not seen or runner.user_count:  # a master may be told late how many there are
        seen = max(seen, runner.user_count)
        gevent.sleep(0.1)
    runner.quit()


class Unanswered(Exception):
    """Of a request that was still under way when Locust stopped."""


class RankUser(User):
    """A stream of requests. ``--host`` has the servers' gRPC addresses, with commas between them."""

    made = 0

    def on_start(self) -> None:
        """One connection a user, as services of their own would have."""
        options = self.environment.parsed_options
        self._options = options
        RankUser.made += 1
        # Users of other processes draw other numbers: the seed, the worker and the user make a stream of its own.
        worker = getattr(self.environment.runner, "worker_index", 0)
        self._rng = np.random.default_rng([options.seed, max(0, worker), RankUser.made])
        self._seconds = options.shape_seconds or _FOREVER_S
        try:
            check(options.rate_per_user, self._seconds, options.shape)
            mix = Mix.read(options.mix, options.feedback)
            self._requests = requests_of(mix, load_requests(Path(options.requests)), self._rng)
        except BadLoad as error:
            raise SystemExit(f"error: {error}") from None
        addresses = [each.strip() for each in (self.host or "").removeprefix("grpc://").split(",")]
        self._sender: Sender = SENDERS[options.through](addresses)
        self._rows: list[tuple[float, float, float, int, str]] = []
        self._calls = gevent.pool.Group()

    @task
    def stream(self) -> None:
        """Until the shape is over, or Locust stops."""
        options, begun, wall = self._options, time.perf_counter(), time.time()
        for due in arrivals(options.rate_per_user, self._seconds, options.shape, self._rng):
            request = next(self._requests)
            wait = due - (time.perf_counter() - begun)
            if wait > 0:
                gevent.sleep(wait)
            self._calls.spawn(self._rank, request, begun + due, wall + due)
        self._calls.join(timeout=2 * options.deadline + 1)
        raise StopUser

    def on_stop(self) -> None:
        """Let those finish that are under way, write down what was seen, close the connection."""
        self._calls.join(timeout=self._options.deadline)
        self._calls.kill()
        if self._options.samples:
            kinds = np.array([row[:4] for row in self._rows], np.float64).reshape(-1, 4)
            outcomes = np.array([row[4] for row in self._rows], np.str_)
            np.savez(Path(self._options.samples, f"{os.getpid()}-{id(self)}.npz"), rows=kinds, outcomes=outcomes)
        self._sender.close()

    def _rank(self, request: RankRequest, due: float, wall: float) -> None:
        sent = time.perf_counter()
        # What is left of its time, if this process itself was late.
        left = max(1e-3, self._options.deadline - (sent - due))
        error: Exception | None = None
        ids: Any = ()
        try:
            ids = self._sender.rank(request, left)
        except gevent.GreenletExit:  # the run is over
            error = Unanswered("the run ended before there was an answer")
        except Exception as caught:  # counted by its kind
            error = caught
        self._note(int(bool(request.query)), due, wall, sent, error, len(ids))
        if len(ids) and self._rng.random() < self._options.feedback:
            self._tell(request, ids[0])

    def _tell(self, request: RankRequest, item: Any) -> None:
        """Feedback on a page, due when the page was there."""
        due = sent = time.perf_counter()
        wall, error = time.time(), None
        try:
            self._sender.feedback(events_of(request, item, 1), self._options.deadline)
        except Exception as caught:  # counted by its kind
            error = caught
        self._note(2, due, wall, sent, error, 0)

    def _note(self, kind: int, due: float, wall: float, sent: float, error: Exception | None, length: int) -> None:
        took = time.perf_counter() - due
        if self._options.samples:
            self._rows.append((wall, sent - due, took, kind, "" if error is None else type(error).__name__))
        events.request.fire(
            request_type="grpc", name=KINDS[kind], response_time=took * 1e3, response_length=length, exception=error,
            context={},
        )  # fmt: skip
