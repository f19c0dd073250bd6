"""LitServe: its own batching, a worker process for each of PEER_WORKERS, and the queue that it has for many small
requests. It reads bodies as JSON, so a request comes in base64.

    PEER_RELEASE=… PEER_WORKERS=2 PEER_MAX_BATCH=32 python benchmarks/peers/litserve_server.py PORT
"""

from __future__ import annotations

import base64
import os
import sys
from typing import Any

import litserve
from fastapi import Response
from stages import Stages, max_batch, workers


class Ranker(litserve.LitAPI):
    """LitServe's hooks, in the order in which it calls them."""

    def setup(self, device: str) -> None:
        """Once a worker."""
        self.stages = Stages()

    def decode_request(self, request: dict[str, str]) -> bytes:
        """JSON → the packed request."""
        return base64.b64decode(request["packed"])

    def batch(self, inputs: list[bytes]) -> list[bytes]:
        """As they are."""
        return inputs

    def predict(self, batch: Any) -> Any:
        """Of a batch, or of one request where none are made."""
        return self.stages(batch) if isinstance(batch, list) else self.stages([batch])[0]

    def unbatch(self, output: list[bytes]) -> list[bytes]:
        """As they are."""
        return output

    def encode_response(self, output: bytes) -> Response:
        """Bytes, without JSON."""
        return Response(output, media_type="application/octet-stream")


if __name__ == "__main__":
    most = max_batch()
    timeout = float(os.environ.get("PEER_BATCH_TIMEOUT", "0.001"))
    api = Ranker(max_batch_size=most, batch_timeout=timeout if most > 1 else 0.0, api_path="/rank")
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=workers(), fast_queue=True)
    server.run(
        host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False, log_level="warning", access_log=False,
        num_api_servers=int(os.environ.get("PEER_API_SERVERS", "1")),
    )  # fmt: skip
