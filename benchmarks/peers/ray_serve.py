"""Ray Serve: replicas with ``serve.batch``, in the mode that its documentation names for high throughput
(RAY_SERVE_THROUGHPUT_OPTIMIZED).

    PEER_RELEASE=… PEER_WORKERS=2 PEER_MAX_BATCH=32 python benchmarks/peers/ray_serve.py PORT
"""

from __future__ import annotations

import os
import signal
import sys
import threading

os.environ.setdefault("RAY_SERVE_THROUGHPUT_OPTIMIZED", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
from ray import serve
from stages import Stages, max_batch, workers
from starlette.requests import Request
from starlette.responses import Response


@serve.deployment(num_replicas=workers(), max_ongoing_requests=1024, ray_actor_options={"num_cpus": 0.5})
class Ranker:
    """A replica."""

    def __init__(self) -> None:
        self.stages = Stages()

    @serve.batch(max_batch_size=max_batch(), batch_wait_timeout_s=0.0)
    async def rank(self, bodies: list[bytes]) -> list[bytes]:
        """All that has come in."""
        return self.stages(bodies)

    async def __call__(self, request: Request) -> Response:
        return Response(await self.rank(await request.body()), media_type="application/octet-stream")


if __name__ == "__main__":
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    ray.init(num_cpus=os.cpu_count(), include_dashboard=False, log_to_driver=False, configure_logging=False)
    serve.start(
        http_options={"host": "127.0.0.1", "port": int(sys.argv[1])},
        logging_config={"log_level": "ERROR", "enable_access_log": False},
    )
    serve.run(Ranker.bind(), route_prefix="/rank")
    stopped.wait()
    serve.shutdown()
    ray.shutdown()
