"""How a request goes out: through our client, or through grpcio alone.

Both are safe beneath gevent, once ``init_gevent`` was called before the first channel (see user.py).
"""

from __future__ import annotations

import time
from typing import Any, Protocol

import grpc
from numpy.typing import NDArray
from trirank import FeedbackEvent, RankClient, RankRequest, _codec, contract
from trirank._errors import from_grpc
from tritonclient.grpc import service_pb2

METHOD = "/inference.GRPCInferenceService/ModelInfer"


class Sender(Protocol):
    """One connection, as a service of its own would have."""

    def rank(self, request: RankRequest, deadline_s: float) -> NDArray[Any]:
        """The ranked ids. Raises RankError."""

    def feedback(self, events: list[FeedbackEvent], deadline_s: float) -> None:
        """Raises RankError."""

    def close(self) -> None:
        """Let go."""


class ThroughClient:
    """RankClient without retries: each failure shall be seen."""

    def __init__(self, addresses: list[str]) -> None:
        self._client = RankClient(addresses, retry=None)

    def rank(self, request: RankRequest, deadline_s: float) -> NDArray[Any]:
        return self._client.rank(request, deadline_s=deadline_s).item_ids

    def feedback(self, events: list[FeedbackEvent], deadline_s: float) -> None:
        self._client.feedback(events, deadline_s=deadline_s)

    def close(self) -> None:
        self._client.close()


class ThroughGrpc:
    """grpcio with messages as bytes; servers in turns."""

    def __init__(self, addresses: list[str]) -> None:
        self._channels = [grpc.insecure_channel(address) for address in addresses]
        self._calls = [
            channel.unary_unary(METHOD, request_serializer=None, response_deserializer=None)
            for channel in self._channels
        ]
        self._feedback = RankClient(addresses, retry=None)
        self._next = 0

    def rank(self, request: RankRequest, deadline_s: float) -> NDArray[Any]:
        message, names = _codec.encode(request, contract.ENSEMBLE)
        sent = time.time()
        message = _codec.with_deadline(message, int((sent + deadline_s) * 1e6), int(sent * 1e6))
        self._next += 1
        started = time.monotonic()
        try:
            reply = self._calls[self._next % len(self._calls)](message, timeout=deadline_s)
        except grpc.RpcError as error:
            raise from_grpc(error, address="", elapsed_s=time.monotonic() - started) from None
        return _codec.decode(service_pb2.ModelInferResponse.FromString(reply), names).item_ids

    def feedback(self, events: list[FeedbackEvent], deadline_s: float) -> None:
        self._feedback.feedback(events, deadline_s=deadline_s)

    def close(self) -> None:
        for channel in self._channels:
            channel.close()
        self._feedback.close()


SENDERS: dict[str, type[ThroughClient] | type[ThroughGrpc]] = {"client": ThroughClient, "grpc": ThroughGrpc}
"""By the name that ``--through`` takes."""
