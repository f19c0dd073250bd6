"""The client of trirank: candidates in, the best K out, in one gRPC call to Triton.

>>> from trirank import RankClient, RankRequest
>>> with RankClient("127.0.0.1:8001") as client:  # doctest: +SKIP
...     for item in client.rank(RankRequest(item_ids=[3, 14, 15], user_id=92, top_k=2)):
...         print(item.item_id, item.score, item.reasons)
"""

from importlib import metadata

from trirank._aio import AsyncRankClient
from trirank._client import RankClient
from trirank._errors import (
    ClientClosed,
    DeadlineExceeded,
    IncompatibleServer,
    InvalidRequest,
    NotAllowed,
    Overloaded,
    RankError,
    ServerError,
    Unavailable,
)
from trirank._events import Event
from trirank._feedback import FeedbackEvent, FeedbackResult
from trirank._options import EjectionPolicy, HedgePolicy, RetryPolicy, Tls
from trirank._types import History, RankedItem, RankRequest, RankResponse
from trirank.contract import Behaviour, EventKind, Reason, Status, stable_id

__version__ = metadata.version("trirank")

__all__ = [
    "__version__",
    "RankClient",
    "AsyncRankClient",
    "RankRequest",
    "RankResponse",
    "RankedItem",
    "History",
    "Behaviour",
    "FeedbackEvent",
    "FeedbackResult",
    "EventKind",
    "Reason",
    "Status",
    "stable_id",
    "RetryPolicy",
    "HedgePolicy",
    "EjectionPolicy",
    "Tls",
    "Event",
    "RankError",
    "InvalidRequest",
    "NotAllowed",
    "DeadlineExceeded",
    "Overloaded",
    "Unavailable",
    "IncompatibleServer",
    "ServerError",
    "ClientClosed",
]
