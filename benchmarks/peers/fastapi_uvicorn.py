"""FastAPI on uvicorn (uvloop, httptools): bytes in and out, without models of data; workers are uvicorn's own.

PEER_RELEASE=… PEER_WORKERS=2 PEER_MAX_BATCH=32 python benchmarks/peers/fastapi_uvicorn.py PORT
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from fastapi import FastAPI, Request, Response
from stages import Batcher, max_batch, workers

batcher: Batcher


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    global batcher
    batcher = Batcher(max_batch())
    await batcher.start()
    yield


app = FastAPI(lifespan=lifespan, openapi_url=None)


@app.post("/rank")
async def rank(request: Request) -> Response:
    return Response(await batcher(await request.body()), media_type="application/octet-stream")


if __name__ == "__main__":
    uvicorn.run(
        "fastapi_uvicorn:app", host="127.0.0.1", port=int(sys.argv[1]), workers=workers(), loop="uvloop",
        http="httptools", access_log=False, log_level="warning",
    )  # fmt: skip
