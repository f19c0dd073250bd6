"""Where servers are and how one talks to them: names, certificates, tokens."""

from __future__ import annotations

import ipaddress
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from trirank._errors import InvalidRequest, Unavailable
from trirank._options import Tls

DNS = "dns:///"
OPTIONS: list[tuple[str, Any]] = [
    # gRPC's default of 4 MB is below what Triton may send.
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # Two clients of one process would otherwise share one TCP connection.
    ("grpc.use_local_subchannel_pool", 1),
    # A server that comes back is noticed within half a second rather than gRPC's two minutes at worst; the third is how
    # long a connection may take.
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 5_000),
    ("grpc.max_reconnect_backoff_ms", 500),
    # A host that is gone without a word is noticed while calls wait for it; nothing is sent while others come back.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 2_000),
    # One place retries, and it keeps to a budget.
    ("grpc.enable_retries", 0),
]
_LOOK_S = 1.0
"""How often certificate files are looked at."""


class Target:
    """Addresses, resolved, and credentials, read anew when they change.

    Args:
        addresses: ``host:port``, a list of them, or ``dns:///name:port`` for all addresses that a name has, as behind a
            headless Kubernetes service.
        token: a bearer token, or what gives one; asked before each call.

    Raises:
        InvalidRequest: an address is none, a file cannot be read, or a token would go out unencrypted.
    """

    def __init__(
        self,
        addresses: str | Sequence[str],
        tls: Tls | None = None,
        token: str | Callable[[], str] | None = None,
        resolve_every_s: float = 10.0,
    ) -> None:
        self.addresses = [addresses] if isinstance(addresses, str) else list(dict.fromkeys(addresses))
        if not self.addresses:
            raise InvalidRequest("no address was given; write host:port")
        for address in self.addresses:
            _check_address(address)
        self.tls = tls
        self._token = token
        self._changes = any(address.startswith(DNS) for address in self.addresses)
        self.resolve_every_s = resolve_every_s
        self._resolved_at = 0.0
        self._looked_at = 0.0
        self._stamp: tuple[Any, ...] = ()
        self._names: dict[str, str] = {}
        self._lock = threading.Lock()
        self.generation = 0
        """Raised when certificates have changed, and channels have to be made anew."""
        if token is not None and tls is None and not all(_is_local(address) for address in self.addresses):
            raise InvalidRequest("a token would go out unencrypted; give tls=Tls(...) with it")
        if tls is not None:
            self._credentials = self._read()

    def due(self) -> bool:
        """Whether that time has come; says yes to one caller only."""
        if not self._changes:
            return False
        with self._lock:
            if time.monotonic() - self._resolved_at < self.resolve_every_s:
                return False
            self._resolved_at = time.monotonic()
            return True

    def resolve(self) -> list[str]:
        """The servers there are now.

        Raises:
            Unavailable: a name has no address.
        """
        self._resolved_at = time.monotonic()
        found: list[str] = []
        names: dict[str, str] = {}
        for address in self.addresses:
            if address.startswith(DNS):
                resolved = _lookup(address)
                names |= dict.fromkeys(resolved, address.removeprefix(DNS).rpartition(":")[0])
                found += resolved
            else:
                found.append(address)
        self._names = names
        return list(dict.fromkeys(found))

    def credentials_metadata(self) -> list[tuple[str, str]]:
        """The bearer token, if there is one.

        Raises:
            Unavailable: what gives it has raised.
        """
        if self._token is None:
            return []
        try:
            token = self._token() if callable(self._token) else self._token
        except Exception as error:  # somebody else's code, which may raise anything
            raise Unavailable(f"the token could not be had ({type(error).__name__}: {error})") from error
        return [("authorization", f"Bearer {token.strip()}")]

    def refresh(self) -> int:
        """Read certificates again if their files changed; gives the generation."""
        if self.tls is None or time.monotonic() - self._looked_at < _LOOK_S:
            return self.generation
        with self._lock:
            self._looked_at = time.monotonic()
            if self._files_stamp() != self._stamp:
                try:
                    self._credentials = self._read()
                    self.generation += 1
                except InvalidRequest:  # half-written: the old ones serve until the new ones are whole
                    self._stamp = ()
        return self.generation

    def channel(self, address: str, module: Any) -> Any:
        """A new channel of ``grpc`` or ``grpc.aio``."""
        if self.tls is None:
            return module.insecure_channel(address, options=OPTIONS)
        options = list(OPTIONS)
        name = self.tls.server_name or self._name_of(address)
        if name:
            options.append(("grpc.ssl_target_name_override", name))
        return module.secure_channel(address, self._credentials, options=options)

    def _name_of(self, address: str) -> str | None:
        """A resolved address has to show the certificate of the name that it was resolved from."""
        return None if address in self.addresses else self._names.get(address)

    def _files(self) -> list[Path]:
        assert self.tls is not None
        return [Path(file) for file in (self.tls.ca_file, self.tls.cert_file, self.tls.key_file) if file is not None]

    def _files_stamp(self) -> tuple[Any, ...]:
        try:
            return tuple((status.st_mtime_ns, status.st_size) for status in map(os.stat, self._files()))
        except OSError:
            return self._stamp

    def _read(self) -> Any:
        assert self.tls is not None
        stamp = self._files_stamp()
        try:
            ca, cert, key = (
                None if file is None else Path(file).read_bytes()
                for file in (self.tls.ca_file, self.tls.cert_file, self.tls.key_file)
            )
        except OSError as error:
            raise InvalidRequest(f"{error.filename} cannot be read ({error.strerror}); tls names PEM files") from error
        for file, content in zip(self._files(), [c for c in (ca, cert, key) if c is not None], strict=True):
            if b"-----BEGIN" not in content or b"-----END" not in content:
                raise InvalidRequest(f"{file} is no whole PEM file")
        self._stamp = stamp
        return grpc.ssl_channel_credentials(ca, key, cert)


def make_stub(channel: Any) -> Any:
    """Triton's methods over a channel; ModelInfer takes a message as bytes, since it is written so (_codec.encode)."""
    stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
    stub.ModelInfer = channel.unary_unary(
        "/inference.GRPCInferenceService/ModelInfer",
        response_deserializer=service_pb2.ModelInferResponse.FromString,
        _registered_method=True,  # as in the code that gRPC generates: the path is not looked up again for each call
    )
    return stub


def _check_address(address: str) -> None:
    host, colon, port = address.removeprefix(DNS).rpartition(":")
    if not (host and colon and port.isdigit() and 0 < int(port) < 65_536):
        raise InvalidRequest(f"address {address!r} is none; write host:port or dns:///name:port")


def _lookup(address: str) -> list[str]:
    host, _, port = address.removeprefix(DNS).rpartition(":")
    try:
        found = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
    except OSError as error:
        raise Unavailable(f"{host} has no address ({error}); is the name right?", address=address) from error
    hosts = dict.fromkeys(str(entry[4][0]) for entry in found)
    return [f"[{each}]:{port}" if ":" in each else f"{each}:{port}" for each in hosts]


def _is_local(address: str) -> bool:
    host = address.removeprefix(DNS).rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
