"""Which ports a server listens on."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from dataclasses import dataclass

from trirank_build.errors import ServeError


@dataclass(frozen=True)
class Ports:
    """Ports on the loopback interface; None: any that is free."""

    grpc: int | None = None
    http: int | None = None
    metrics: int | None = None


def usual_ports(host: str, wanted: Ports) -> Ports:
    """The ports that were asked for; for the others Triton's own, each where nobody listens, else any free one."""
    given = [port for port in (wanted.grpc, wanted.http, wanted.metrics) if port is not None]

    def one(port: int | None, usual: int) -> int | None:
        if port is not None or usual in given:
            return port
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, usual))
            except OSError:
                return None
            return usual

    return Ports(one(wanted.grpc, 8001), one(wanted.http, 8000), one(wanted.metrics, 8002))


def checked_ports(host: str, ports: Ports) -> list[int]:
    """The ports themselves, or free ones, no two the same: each is held until all have been found.

    Raises:
        ServeError: one is in use, or no port at all.
    """
    numbers = []
    with ExitStack() as held:
        for name in ("grpc", "http", "metrics"):
            number = getattr(ports, name)
            if number is not None and not 0 < number < 65_536:
                raise ServeError(f"--{name}-port {number} is no port; ports go from 1 to 65535")
            probe = held.enter_context(socket.socket())
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, number or 0))
            except OSError as error:
                raise ServeError(
                    f"--{name}-port {number} on {host} cannot be used ({error.strerror}); choose another"
                ) from error
            numbers.append(int(probe.getsockname()[1]))
    return numbers
