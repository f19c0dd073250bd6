"""What can go wrong in a call.

RankError
├── InvalidRequest       the request can never succeed; mend it
├── DeadlineExceeded     no answer in time; the work may still be going on
├── Overloaded           the servers turned it away; try later or elsewhere
├── Unavailable          no server could be reached
├── IncompatibleServer   it answers, but it is no trirank server of this contract
├── ServerError          the server failed; see its log
└── ClientClosed         the client was closed, or made in another process

Each says which server was called last, how many attempts were made and how long all of it took.
"""

from __future__ import annotations

import grpc

from trirank.contract import NOT_ALLOWED, OVERLOADED, TOO_LATE, WAITED


class RankError(Exception):
    """Base of all that a client raises.

    Attributes:
        address: the server that was called last; empty when the request never left.
        attempts: calls that were sent, hedges among them.
        elapsed_s: seconds spent in all of them and between them.
        status: what gRPC said last; None when the request never left.
    """

    def __init__(
        self,
        message: str,
        *,
        address: str = "",
        elapsed_s: float = 0.0,
        status: grpc.StatusCode | None = None,
        attempts: int = 0,
    ) -> None:
        super().__init__(message)
        self.address = address
        self.elapsed_s = elapsed_s
        self.status = status
        self.attempts = attempts

    def __str__(self) -> str:
        message = super().__str__()
        if not self.address:
            return message
        tries = "" if self.attempts <= 1 else f", {self.attempts} attempts"
        return f"{message} [{self.address}, after {self.elapsed_s * 1e3:.1f} ms{tries}]"


class InvalidRequest(RankError, ValueError):
    """The request breaks the contract: the message says which value and which limit."""


class NotAllowed(InvalidRequest):
    """The server wants a token, and this client has none that it knows."""


class DeadlineExceeded(RankError, TimeoutError):
    """No answer came within the deadline."""


class Overloaded(RankError):
    """The request could not have been answered in time, waited too long in a queue, or found it full."""


class Unavailable(RankError, ConnectionError):
    """No server could be reached, or it is not ready yet."""


class IncompatibleServer(RankError):
    """The server does not serve this contract."""


class ServerError(RankError):
    """The server failed while it worked on a valid request."""


class ClientClosed(RankError, RuntimeError):
    """The client was closed, or made in a process that this one was forked from."""


_BY_STATUS: dict[grpc.StatusCode, type[RankError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.NOT_FOUND: IncompatibleServer,
    grpc.StatusCode.UNIMPLEMENTED: IncompatibleServer,
}
_TURNED_AWAY = ("Request timeout expired", "Exceeds maximum queue size", OVERLOADED, WAITED)
"""What is said, as UNAVAILABLE, of a request that waited too long, found the queue full, or would have been late."""

_ENDING = "has no available versions"
"""What Triton says of a model, as NOT_FOUND, while it ends or loads it; of one that it does not know it says that it is
not found."""


def kind_of(status: grpc.StatusCode, details: str) -> type[RankError]:
    """The error that a failed call is."""
    kind = _BY_STATUS.get(status, ServerError)
    if kind is InvalidRequest and f"{NOT_ALLOWED}: " in details:
        return NotAllowed
    if status is grpc.StatusCode.NOT_FOUND and _ENDING in details:
        return Unavailable
    if kind is Unavailable and TOO_LATE in details:
        return DeadlineExceeded
    if kind is Unavailable and any(words in details for words in _TURNED_AWAY):
        return Overloaded
    return kind


def from_grpc(error: grpc.RpcError, *, address: str, elapsed_s: float, attempts: int = 1) -> RankError:
    """The typed error of a failed call."""
    details = error.details() or error.code().name
    kind = kind_of(error.code(), details)
    return kind(details, address=address, elapsed_s=elapsed_s, status=error.code(), attempts=attempts)
