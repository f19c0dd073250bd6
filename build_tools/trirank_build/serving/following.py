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

from trirank_build.errors import BadModel, BadUsage, ServeError, TrirankBuildError
from trirank_build.progress import out, warn
from trirank_build.repository.release import load_manifest
from trirank_build.repository.signing import read_public_key, refuse_untrusted
from trirank_build.repository.store import CURRENT, in_use, refuse_damaged
from trirank_build.serving.health import LONG_S, READY, RECOVERING, STOPPING, State
from trirank_build.serving.ports import Ports
from trirank_build.serving.server import TritonServer

POLL_S, AGAIN_S = 0.1, 15.0
PROBE_S, PROBE_DEADLINE_S, SUSPECT, PROBES = 1.0, 3.0, 2, 3
"""A recorded request is sent so often; after so many in a row without an answer the server says that it is not ready,
and after one more it is started anew."""
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
        ServeError: the server cannot be started, at first or for GIVE_UP_S after it has ended.
        BadModel: ``release`` is none, or no longer what was assembled.
    """
    if (release / CURRENT).exists():
        raise BadUsage(f"{release} is a folder of releases; serve {release / CURRENT}, or one of them")
    keys = [read_public_key(file) for file in trusted]
    link = release if follow else None
    served = release.resolve()  # once: what is checked is what is served, wherever the link points meanwhile
    state, backoff, held = State(addresses), Backoff(), _Held()
    tries, ready_at, checked = 0, 0.0, None
    try:
        while True:
            wanted = served if link is None or tries % 2 else link.resolve()  # in turns, where one cannot be started
            with ExitStack() as running:
                try:
                    state.busy()
                    load_manifest(wanted)  # what is no release is none to hold
                    held.take(wanted)
                    if keys or wanted != checked:  # a large one takes a while, and without keys nobody vouches for it
                        _check(wanted, keys)
                        checked = wanted
                    server = running.enter_context(TritonServer(wanted, ports=ports, swappable=True, **how))
                    server.wait_ready()
                except (TrirankBuildError, OSError) as error:
                    tries += 1
                    if state.is_new or time.monotonic() - ready_at > GIVE_UP_S:
                        raise
                    warn(f"the server could not be started: {error}")
                else:
                    ports = _ports(server) if state.is_new else ports
                    _say_ready(server, state, tries)
                    tries = 0
                    try:
                        _watch(server, link, state, keys, held)
                    except ServeError as error:
                        warn(f"{error}; it is started anew")
                    ready_at, served = time.monotonic(), server.release
                    checked = served
                    server.stop(at_once=True)
            state.say(RECOVERING)
            if (pause := backoff.pause_s(time.monotonic())) > 0:
                warn(f"starting again in {pause:g} s")
                _wait(pause, state)
    except KeyboardInterrupt:
        out.print("stopping")
    finally:
        held.close()
        state.take_back()


class _Held:
    """Marks the release that is served, or is about to be, as in use, so that none removes it."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def take(self, release: Path) -> None:
        """This one from now on, and no other."""
        fresh = ExitStack()
        fresh.enter_context(in_use(release))
        self._stack.close()
        self._stack = fresh

    def close(self) -> None:
        """None any more."""
        self._stack.close()


def _check(release: Path, keys: list[Ed25519PublicKey]) -> None:
    """Raises BadModel for a release that is not to be served."""
    if keys:
        refuse_untrusted(release, keys)
    refuse_damaged(release, "served")


def _ports(server: TritonServer) -> Ports:
    """Those that it has, so that callers find the next one there."""
    return Ports(*(int(address.rpartition(":")[2]) for address in (server.grpc, server.http, server.metrics)))


def _say_ready(server: TritonServer, state: State, failed: int) -> None:
    http = f"HTTP {server.http}" if server.has_http else "no HTTP"
    if state.is_new:
        out.print(f"ready: gRPC {server.grpc}, {http}, metrics {server.metrics}; Ctrl-C stops it")
    else:
        out.print(f"ready again{f' after {failed + 1} tries' * (failed > 0)}")
    found = {"grpc": server.grpc, "metrics": server.metrics, "tritonserver_pid": server.pid}
    found |= {"http": server.http} if server.has_http else {}
    state.say(READY, busy_until=0.0, **found)


def _wait(pause_s: float, state: State) -> None:
    end = time.monotonic() + pause_s
    while time.monotonic() < end:
        state.beat()
        time.sleep(POLL_S)


def _watch(server: TritonServer, link: Path | None, state: State, keys: list[Ed25519PublicKey], held: _Held) -> None:
    """Until KeyboardInterrupt.

    Raises:
        ServeError: the server has ended, or answers nothing.
    """
    refused, asked_again, told = None, 0.0, ""
    probes, revivals = _Probes(server), Backoff()
    try:
        with probes:
            while True:
                server.check_alive()
                if dead := server.dead_models():
                    _revive(server, dead, revivals, state, keys)
                    probes.forget()
                for line in server.new_errors():
                    warn(line)
                state.say(RECOVERING if probes.look() >= SUSPECT else READY, busy_until=0.0)
                wanted = link.resolve() if link is not None else server.release
                if wanted != server.release and (wanted != refused or time.monotonic() > asked_again):
                    before = server.release
                    try:
                        state.busy()
                        load_manifest(wanted)
                        held.take(wanted)
                        _check(wanted, keys)
                        server.swap(wanted)
                        refused, told = None, ""
                        out.print(f"serving {wanted.name} now")
                    except (TrirankBuildError, OSError) as error:
                        # Its files may still be on their way, so it is looked at again.
                        refused, asked_again = wanted, time.monotonic() + AGAIN_S
                        held.take(before)
                        if str(error) != told:
                            warn(f"{error}; {server.release.name} is served as before")
                        told = str(error)
                    probes.forget()
                time.sleep(POLL_S)
    except KeyboardInterrupt:
        state.say(STOPPING, busy_until=time.time() + LONG_S)
        raise


def _revive(
    server: TritonServer, dead: list[str], revivals: Backoff, state: State, keys: list[Ed25519PublicKey]
) -> None:
    state.say(RECOVERING)
    if (pause := revivals.pause_s(time.monotonic())) > 0:
        _wait(pause, state)
    began = time.monotonic()
    state.busy()
    if keys:  # what is loaded is read from the release once more
        _check_again(server.release, keys)
    server.revive(dead)
    warn(f"a process of {', '.join(dead)} had died; started anew in {time.monotonic() - began:.1f} s")


def _check_again(release: Path, keys: list[Ed25519PublicKey]) -> None:
    try:
        _check(release, keys)
    except BadModel as error:
        raise ServeError(f"a process has died, and its model cannot be loaded again: {error}") from error


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
            try:
                problem = self._asked.result()
            except Exception as error:  # whatever it is, the request was not answered
                problem = f"{type(error).__name__}: {error}"
            self._asked, self._next = None, time.monotonic() + PROBE_S
            self._failed = self._failed + 1 if problem else 0
            if self._failed == 1:
                warn(f"a recorded request was not answered: {problem}; asking again every {PROBE_S:g} s")
            if self._failed >= PROBES:
                raise ServeError(f"{PROBES} recorded requests in a row were not answered: {problem}")
        return self._failed
