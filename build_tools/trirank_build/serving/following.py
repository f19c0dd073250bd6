"""`trirank serve`: a server that goes on to whatever release is promoted, and on after whatever breaks."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from trirank_build.errors import BadUsage, ServeError, TrirankBuildError
from trirank_build.progress import out, warn
from trirank_build.repository.release import load_manifest
from trirank_build.repository.signing import read_public_key, refuse_untrusted
from trirank_build.repository.store import CURRENT, in_use, refuse_damaged
from trirank_build.serving.health import READY, RECOVERING, State
from trirank_build.serving.server import Ports, TritonServer

POLL_S, AGAIN_S = 0.1, 15.0
PROBE_S, PROBE_DEADLINE_S, PROBES = 1.0, 3.0, 3
"""A recorded request is sent so often; after so many in a row without an answer the server is started anew."""
GIVE_UP_S = 300.0
"""Starts that fail are tried again for so long since it was ready last."""


@dataclass
class Backoff:
    """Pauses between restarts: none before the first one, then doubled each time, forgotten after a quiet while.

    Attributes:
        first_s, longest_s: the first pause, and the largest.
        quiet_s: so long without a restart, and the next one is a first one again.
    """

    first_s: float = 0.5
    longest_s: float = 30.0
    quiet_s: float = 60.0
    _count: int = 0
    _last: float = -math.inf

    def pause_s(self, now: float) -> float:
        """How long to wait before a restart at ``now`` (seconds of a monotonic clock)."""
        if now - self._last > self.quiet_s:
            self._count = 0
        self._last = now
        self._count += 1
        return 0.0 if self._count == 1 else min(self.first_s * 2 ** (self._count - 2), self.longest_s)


def serve(
    release: Path, ports: Ports, *, follow: bool, addresses: Path | None, trusted: Sequence[Path] = (), **how: Any
) -> None:
    """Serve until KeyboardInterrupt. A stage's process that dies is started anew, and so is a server that has died or
    answers nothing.

    Args:
        follow: whether ``release`` is a link, and a release that it is moved to takes the old one's place. One that
            cannot be served changes nothing but a line that says why.
        trusted: public keys, one of which has to have signed a release; none: releases need no signature.
        addresses: file to write the addresses and the state to, as JSON (trirank_build.serving.health).
        how: further arguments of TritonServer.

    Raises:
        ServeError: the server cannot be started, at first or after it has ended.
        BadModel: ``release`` is none, or no longer what was assembled.
    """
    if (release / CURRENT).exists():
        raise BadUsage(f"{release} is a folder of releases; serve {release / CURRENT}, or one of them")
    keys = [read_public_key(file) for file in trusted]
    _check(release.resolve(), keys)
    link = release if follow else None
    state, backoff = State(addresses), Backoff()
    served, failed_starts, ready_at = release, 0, 0.0
    try:
        while True:
            with ExitStack() as running:
                try:
                    server = running.enter_context(TritonServer(served, ports=ports, swappable=True, **how))
                    server.wait_ready()
                except ServeError as error:
                    failed_starts += 1
                    if state.is_new or time.monotonic() - ready_at > GIVE_UP_S:
                        raise
                    warn(f"the server could not be started: {error}")
                else:
                    ports = _ports(server) if state.is_new else ports
                    _say_ready(server, state, failed_starts)
                    failed_starts = 0
                    try:
                        _watch(server, link, state, keys)
                    except ServeError as error:
                        warn(f"{error}; it is started anew")
                    ready_at, served = time.monotonic(), server.release
                    server.stop(at_once=True)
            state.say(RECOVERING)
            if (pause := backoff.pause_s(time.monotonic())) > 0:
                warn(f"starting again in {pause:g} s")
                _wait(pause, state)
    except KeyboardInterrupt:
        out.print("stopping")
    finally:
        state.take_back()


def _check(release: Path, keys: list[Ed25519PublicKey]) -> None:
    """Raises BadModel for a release that is not to be served."""
    load_manifest(release)
    if keys:
        refuse_untrusted(release, keys)
    refuse_damaged(release, "served")


def _ports(server: TritonServer) -> Ports:
    """Those that it has, so that callers find the next one there."""
    return Ports(*(int(address.rpartition(":")[2]) for address in (server.grpc, server.http, server.metrics)))


def _say_ready(server: TritonServer, state: State, failed_starts: int) -> None:
    if state.is_new:
        out.print(f"ready: gRPC {server.grpc}, HTTP {server.http}, metrics {server.metrics}; Ctrl-C stops it")
    else:
        out.print(f"ready again{f' after {failed_starts + 1} tries' * (failed_starts > 0)}")
    found = {"grpc": server.grpc, "http": server.http, "metrics": server.metrics, "tritonserver_pid": server.pid}
    state.say(READY, **found)


def _wait(pause_s: float, state: State) -> None:
    end = time.monotonic() + pause_s
    while time.monotonic() < end:
        state.beat()
        time.sleep(POLL_S)


def _watch(server: TritonServer, link: Path | None, state: State, keys: list[Ed25519PublicKey]) -> None:
    """Until KeyboardInterrupt.

    Raises:
        ServeError: the server has ended, or answers nothing.
    """
    refused, asked_again, told = None, 0.0, ""
    probes, revivals = _Probes(server), Backoff()
    with ExitStack() as held, probes:
        held.enter_context(in_use(server.release))
        while True:
            server.check_alive()
            if dead := server.dead_models():
                _revive(server, dead, revivals, state)
                probes.forget()
            for line in server.new_errors():
                warn(line)
            state.say(RECOVERING if probes.look() else READY)
            wanted = link.resolve() if link is not None else server.release
            if wanted != server.release and (wanted != refused or time.monotonic() > asked_again):
                try:
                    _check(wanted, keys)
                    server.swap(wanted)
                    held.close()
                    held.enter_context(in_use(wanted))
                    refused, told = None, ""
                    out.print(f"serving {wanted.name} now")
                except TrirankBuildError as error:
                    # Its files may still be on their way, so it is looked at again.
                    refused, asked_again = wanted, time.monotonic() + AGAIN_S
                    if str(error) != told:
                        warn(f"{error}; {server.release.name} is served as before")
                    told = str(error)
            time.sleep(POLL_S)


def _revive(server: TritonServer, dead: list[str], revivals: Backoff, state: State) -> None:
    state.say(RECOVERING)
    if (pause := revivals.pause_s(time.monotonic())) > 0:
        _wait(pause, state)
    began = time.monotonic()
    server.revive(dead)
    warn(f"a process of {', '.join(dead)} had died; started anew in {time.monotonic() - began:.1f} s")


class _Probes:
    """Recorded requests, sent one after the other beside the loop that watches, which so sees at once who has died."""

    def __init__(self, server: TritonServer) -> None:
        self._server = server
        self._pool = ThreadPoolExecutor(1)
        self._asked: Future[str] | None = None
        self._next, self._failed = time.monotonic() + PROBE_S, 0

    def __enter__(self) -> _Probes:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def forget(self) -> None:
        """What was asked before does not count: it met a process that has been started anew since."""
        self._asked, self._failed, self._next = None, 0, time.monotonic()

    def look(self) -> int:
        """How many have failed in a row.

        Raises:
            ServeError: too many.
        """
        if self._asked is None:
            if time.monotonic() > self._next:
                self._asked = self._pool.submit(self._server.probe, PROBE_DEADLINE_S)
        elif self._asked.done():
            problem = self._asked.result()
            self._asked, self._next = None, time.monotonic() + PROBE_S
            self._failed = self._failed + 1 if problem else 0
            if self._failed == 1:
                warn(f"a recorded request was not answered: {problem}; asking again every {PROBE_S:g} s")
            if self._failed >= PROBES:
                raise ServeError(f"{PROBES} recorded requests in a row were not answered: {problem}")
        return self._failed
