"""BentoML: its adaptive batching, and workers of its own. What it batches comes as JSON, so a request comes in base64.

    PEER_RELEASE=… PEER_WORKERS=2 PEER_MAX_BATCH=32 bentoml serve bentoml_server:Ranker --port PORT

PEER_WAY=asgi: instead an application of Starlette's, mounted as BentoML's documentation shows, with bytes and the
batching of stages.py.
"""

from __future__ import annotations

import base64
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import bentoml
from stages import Batcher, Stages, max_batch, workers
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

SETTINGS = {"workers": workers(), "traffic": {"timeout": 30, "max_concurrency": 10_000}, "metrics": {"enabled": False}}

if os.environ.get("PEER_WAY") == "asgi":
    batcher = Batcher(max_batch())

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        await batcher.start()
        yield

    async def answer(request: Request) -> Response:
        return Response(await batcher(await request.body()), media_type="application/octet-stream")

    application = Starlette(routes=[Route("/rank", answer, methods=["POST"])], lifespan=lifespan)

    @bentoml.service(**SETTINGS)
    @bentoml.asgi_app(application, path="/")
    class Ranker:
        """Nothing but what is mounted."""

else:

    @bentoml.service(**SETTINGS)
    class Ranker:
        """The stages behind adaptive batching."""

        def __init__(self) -> None:
            self.stages = Stages()

        @bentoml.api(batchable=max_batch() > 1, max_batch_size=max(2, max_batch()), max_latency_ms=1000)
        def rank(self, packed: list[str]) -> list[str]:
            """Base64 in, base64 out."""
            answers = self.stages([base64.b64decode(one) for one in packed])
            return [base64.b64encode(one).decode() for one in answers]
