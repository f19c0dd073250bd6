"""`trirank serve`: a server that goes on to whatever release is promoted."""

from __future__ import annotations

import json
import os
import time
from contextlib import ExitStack, suppress
from pathlib import Path

from trirank_build.artefacts import atomic_file
from trirank_build.errors import BadUsage, ServeError, TrirankBuildError
from trirank_build.progress import out, warn
from trirank_build.repository.store import CURRENT, in_use, refuse_damaged
from trirank_build.serving.server import Ports, TritonServer
from trirank_build.serving.stores import Stores

POLL_S, AGAIN_S = 0.5, 15.0
PROBE_S, PROBES = 3.0, 3
"""A recorded request is sent so often; after so many in a row without an answer the server is given up."""


def serve(
    release: Path,
    ports: Ports,
    host: str,
    tritonserver: Path | None,
    fallback: str | None,
    *,
    follow: bool,
    addresses: Path | None,
    log: Path | None = None,
    stores: Stores | None = None,
) -> None:
    """Serve until KeyboardInterrupt.

    Args:
        follow: whether ``release`` is a link, and a release that it is moved to takes the old one's place. One that
            cannot be served changes nothing but a line that says why.
        addresses: file to write the addresses to, as JSON, when ready.
        log: file that Triton's words go to; None: one that is gone when the server stops. Errors are shown in any case.
        stores: what lies beside the release.

    Raises:
        ServeError: the server cannot be started, has ended, or answers no more.
        BadModel: ``release`` is none, or no longer what was assembled.
    """
    if (release / CURRENT).exists():
        raise BadUsage(f"{release} is a folder of releases; serve {release / CURRENT}, or one of them")
    refuse_damaged(release.resolve(), "served")
    with TritonServer(
        release, ports=ports, tritonserver=tritonserver, host=host, fallback=fallback, swappable=follow, log=log,
        stores=stores,
    ) as server:  # fmt: skip
        server.wait_ready()
        found = {"grpc": server.grpc, "http": server.http, "metrics": server.metrics, "pid": os.getpid(),
                 "tritonserver_pid": server.pid}  # fmt: skip
        out.print(f"ready: gRPC {server.grpc}, HTTP {server.http}, metrics {server.metrics}; Ctrl-C stops it")
        if addresses is not None:
            with atomic_file(addresses) as scratch:
                scratch.write_text(json.dumps(found) + "\n")
        try:
            _watch(server, release if follow else None)
        except KeyboardInterrupt:
            out.print("stopping")
        finally:
            if addresses is not None:
                _take_back(addresses)


def _watch(server: TritonServer, link: Path | None) -> None:
    refused, asked_again, told = None, 0.0, ""
    failed, probe_at = 0, time.monotonic() + PROBE_S
    with ExitStack() as held:
        held.enter_context(in_use(server.release))
        while True:
            server.check_alive()
            for line in server.new_errors():
                warn(line)
            if time.monotonic() > probe_at:
                failed = _probed(server, failed)
                probe_at = time.monotonic() + PROBE_S
            wanted = link.resolve() if link is not None else server.release
            if wanted != server.release and (wanted != refused or time.monotonic() > asked_again):
                try:
                    refuse_damaged(wanted, "served")
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


def _probed(server: TritonServer, failed: int) -> int:
    """How many probes in a row have failed, now that there was another one.

    Raises:
        ServeError: too many. Whoever watches over this command starts it anew; Triton goes on saying "ready".
    """
    problem = server.probe()
    if not problem:
        return 0
    if failed + 1 >= PROBES:
        raise ServeError(
            f"{PROBES} recorded requests in a row were not answered: {problem}; a stage's process may have died. The "
            "server is stopped, so that it can be started anew"
        )
    if not failed:
        warn(f"a recorded request was not answered: {problem}; asking again every {PROBE_S:g} s")
    return failed + 1


def _take_back(addresses: Path) -> None:
    """Nobody shall look for this server there; another one's words stay."""
    with suppress(OSError, ValueError, KeyError):
        if json.loads(addresses.read_text())["pid"] == os.getpid():
            addresses.unlink()
