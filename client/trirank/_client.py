"""The synchronous client."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from trirank import _codec, contract
from trirank._errors import InvalidRequest, RankError, from_grpc
from trirank._types import RankRequest, RankResponse

_CHANNEL_OPTIONS = [
    # gRPC's default of 4 MB is below what Triton may send.
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # Two clients of one process would otherwise share one TCP connection.
    ("grpc.use_local_subchannel_pool", 1),
]


class RankClient:
    """A connection to one trirank server; safe to share between threads.

    Args:
        address: ``host:port`` of the server's gRPC endpoint.
        deadline_s: seconds a call may take unless it says otherwise.
        model: the ensemble's name.

    Raises:
        InvalidRequest: ``deadline_s`` is not positive.
    """

    def __init__(self, address: str, *, deadline_s: float = 1.0, model: str = contract.ENSEMBLE) -> None:
        self.address = address
        self.deadline_s = _checked_deadline(deadline_s)
        self.model = model
        self._channel = grpc.insecure_channel(address, options=_CHANNEL_OPTIONS)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def rank(self, request: RankRequest, *, deadline_s: float | None = None) -> RankResponse:
        """Rank the candidates of one request.

        Raises:
            InvalidRequest: the request breaks the contract.
            DeadlineExceeded: no answer in ``deadline_s`` seconds.
            Overloaded, Unavailable, IncompatibleServer, ServerError: see RankError.
        """
        message, names = _codec.encode(request, self.model)
        # A request that has waited in a queue for longer than its caller does is refused there, not executed.
        deadline = self.deadline_s if deadline_s is None else _checked_deadline(deadline_s)
        message.parameters["timeout"].int64_param = max(1, int(deadline * 1e6))
        reply = self._call("ModelInfer", message, deadline)
        return _codec.decode(reply, names)

    def ready(self, *, deadline_s: float | None = None) -> bool:
        """Whether the ensemble is loaded. A server whose stages have died may still say so
        (triton-inference-server/server #8604): what proves more is a call of ``rank``."""
        try:
            reply = self._call("ModelReady", service_pb2.ModelReadyRequest(name=self.model), deadline_s)
        except RankError:
            return False
        return bool(reply.ready)

    def server_info(self, *, deadline_s: float | None = None) -> dict[str, str]:
        """Name and version of the server."""
        reply = self._call("ServerMetadata", service_pb2.ServerMetadataRequest(), deadline_s)
        return {"name": reply.name, "version": reply.version}

    def close(self) -> None:
        """Close the connection; calls in flight fail."""
        self._channel.close()

    def _call(self, method: str, message: Any, deadline_s: float | None) -> Any:
        deadline = self.deadline_s if deadline_s is None else _checked_deadline(deadline_s)
        started = time.perf_counter()
        try:
            return getattr(self._stub, method)(message, timeout=deadline)
        except grpc.RpcError as error:
            raise from_grpc(error, address=self.address, elapsed_s=time.perf_counter() - started) from None

    def __enter__(self) -> RankClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _checked_deadline(deadline_s: float) -> float:
    if not deadline_s > 0:
        raise InvalidRequest(f"deadline_s is {deadline_s}; it is seconds, above 0")
    return deadline_s
