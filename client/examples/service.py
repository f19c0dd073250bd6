"""A search service with FastAPI and the asynchronous client: one client for the whole process, made in its event loop.

TRIRANK_SERVERS=127.0.0.1:8001,127.0.0.1:9001 uvicorn service:app --app-dir client/examples
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from trirank import AsyncRankClient, HedgePolicy, InvalidRequest, RankRequest


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Connections live as long as the process."""
    servers = os.environ.get("TRIRANK_SERVERS", "127.0.0.1:8001").split(",")
    # A page with retrieval's order is better than no page.
    async with AsyncRankClient(servers, deadline_s=0.1, hedge=HedgePolicy(), on_failure="retrieval_order") as client:
        app.state.ranker = client
        yield


app = FastAPI(lifespan=lifespan)


@app.get("/search")
async def search(request: Request, query: str, candidates: str, user: int | None = None) -> dict[str, Any]:
    """The candidates (ids, comma-separated), best first."""
    ids = [int(each) for each in candidates.split(",")]
    try:
        answer = await request.app.state.ranker.rank(RankRequest(item_ids=ids, user_id=user, query=query))
    except InvalidRequest as error:
        raise HTTPException(422, str(error)) from None
    return {"items": answer.to_dicts(), "degraded": answer.degraded}


@app.get("/ready")
async def ready(request: Request) -> dict[str, bool]:
    """Whether a server ranks."""
    return {"ready": await request.app.state.ranker.ready()}
