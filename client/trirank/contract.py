"""The one source of truth for what crosses a process boundary.

Every tensor name, dtype, shape, candidate bucket, padding value and bit mask is said here and nowhere else.
The client and the backend read them; the exporter, the assembler and the tests hold the ONNX graph and every
``config.pbtxt`` to them.

Shapes leave out the batch axis. ``-1`` is an axis whose length differs between requests.
"""

from __future__ import annotations

import hashlib
from enum import IntEnum, IntFlag
from typing import NamedTuple

CONTRACT_VERSION = 4
"""Raised whenever a client or a release of the older version could not be understood."""

BUCKETS = (64, 128, 256, 512, 1024)
"""Candidate counts that requests are padded to. Triton batches only requests whose shapes agree
(triton-inference-server/server #6937, #8156), and TensorRT needs one optimisation profile per shape."""

MAX_CANDIDATES = BUCKETS[-1]
MAX_TOP_K = MAX_CANDIDATES
MAX_BATCH = 32
MAX_HISTORY = 1024
"""Events of a caller's own history that one request may carry."""
MAX_QUERY_BYTES = 2048

PAD_ITEM_ID = -1
"""Fills ITEM_IDS up to a bucket, and the answer up to TOP_K."""
ANONYMOUS_USER = -1

DEADLINE_PARAMETER = "trirank_deadline_us"
"""Of a request: microseconds since 1970 after which no stage works on it any more. Triton's own timeout is counted anew
in every step of an ensemble (triton-inference-server/server #7512); a moment is not."""
SENT_PARAMETER = "trirank_sent_us"
"""Of a request: microseconds since 1970 at which it was sent. Without it a request has no limit to its wait but its
deadline."""
PATIENCE = 1 / 3
"""The share of the time from when it was sent to its deadline that a request may wait in a queue that stands
(trirank_backend.admission.Queue)."""
TOO_LATE = "its deadline has passed"
"""What a stage says, as UNAVAILABLE, of a request that it did not work on for that reason."""
OVERLOADED = "more has come in than can be answered in time"
"""What a stage says, as UNAVAILABLE, of a request that it could not have answered before its deadline."""
WAITED = "it waited too long for its turn, as all do now"
"""What a stage says, as UNAVAILABLE, of a request that waited for PATIENCE of its time and longer."""
NOT_ALLOWED = "not allowed"
"""What a stage says first, as INVALID_ARGUMENT, to a caller without a token of the server's."""
CONTRACT_PARAMETER = "contract"
"""Of the ensemble's configuration: CONTRACT_VERSION."""

ID_PARAMETERS = {"item": "item_ids", "user": "user_ids"}
"""Of the ensemble's configuration: whether the release's ids are ``numbers`` or ``strings``, of which callers send the
``stable_id``, as the clients do for them."""

ENSEMBLE = "rank"
FEEDBACK = "feedback"
"""The model that takes what users did, where a server has a store for it."""
PREPROCESS, RANKER, RERANK = STAGES = ("preprocess", "ranker", "rerank")


class TensorSpec(NamedTuple):
    """One tensor at a boundary: its name, KServe v2 dtype, and shape without the batch axis."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    meaning: str
    optional: bool = False


# --- the ensemble: what a service sends and gets back --------------------------------------------------------
REQUEST = (
    TensorSpec("USER_ID", "INT64", (1,), "the user; -1: anonymous", optional=True),
    TensorSpec("ITEM_IDS", "INT64", (-1,), "candidates [N], padded with -1 up to a bucket", optional=True),
    TensorSpec("TOP_K", "INT32", (1,), f"how many to return, 1 to {MAX_TOP_K}", optional=True),
    TensorSpec("SCENARIO", "BYTES", (1,), "UTF-8; names the rerank policy: search, home, …", optional=True),
    TensorSpec("QUERY", "BYTES", (1,), "UTF-8; empty or absent: no query", optional=True),
    TensorSpec("RETRIEVAL_SCORES", "FP32", (-1,), "[N], one a candidate, finite", optional=True),
    TensorSpec("TIMESTAMP", "INT64", (1,), "seconds since 1970; absent: the server's clock", optional=True),
    TensorSpec("HISTORY_IDS", "INT64", (-1,), "[H] oldest first, in place of the stored history", optional=True),
    TensorSpec("HISTORY_BEHAVIOURS", "INT32", (-1,), "[H] Behaviour codes of HISTORY_IDS", optional=True),
    TensorSpec("HISTORY_TIMESTAMPS", "INT64", (-1,), "[H] seconds since 1970", optional=True),
    TensorSpec("FILTERS", "BYTES", (1,), "JSON object of FILTERS: what this page shall leave out", optional=True),
    TensorSpec("TRACE", "INT32", (1,), "1: TRACE_JSON is asked for, too", optional=True),
)
"""What a request may say, in tensors of their own or packed into one. Which are there decides what Triton batches."""
REQUIRED = ("USER_ID", "ITEM_IDS", "TOP_K", "SCENARIO")
"""Of REQUEST, what no request goes without. Triton may not know, since they may come packed."""
PACKED_REQUEST = TensorSpec(
    "PACKED_REQUEST", "UINT8", (-1,), "all of REQUEST in one tensor, see trirank.packing; alone", optional=True
)
# An ensemble's tensors share one namespace: an output named like an input would answer with the input.
RESPONSE = (
    TensorSpec("RANKED_IDS", "INT64", (-1,), "[K] best first, padded with -1"),
    TensorSpec("SCORES", "FP32", (-1,), "[K]; 0 where RANKED_IDS is -1"),
    TensorSpec("REASONS", "INT32", (-1,), "[K] bit mask of Reason"),
    TensorSpec("STATUS", "INT32", (4,), "[Status bit mask, unknown, duplicate, filtered candidates]"),
    TensorSpec(
        "TRACE_JSON", "BYTES", (1,), "JSON: which rule moved which item; only where it was asked for", optional=True
    ),
)
PACKED_RESPONSE = TensorSpec(
    "PACKED_RESPONSE", "UINT8", (-1,), "all of RESPONSE in one tensor, as PACKED_REQUEST asks; alone", optional=True
)
INPUTS, OUTPUTS = (*REQUEST, PACKED_REQUEST), (*RESPONSE, PACKED_RESPONSE)
"""What Triton knows of."""
FILTERS = ("region", "min_price", "max_price", "min_stock")
"""Keys of the request's FILTERS: text, and numbers in the catalogue's currency and pieces."""


# --- between the stages --------------------------------------------------------------------------------------
class PackedShape(NamedTuple):
    """Sizes of the packed tensors; a release's feature specification fixes them."""

    history_length: int
    """L, events of history."""
    history_fields: int
    """FH, fields of an event: those of its item, then behaviour and time gap."""
    query_length: int
    """Q, tokens of the query."""
    item_fields: int
    """F, fields of a candidate."""
    dense: int
    """D, numbers of a candidate."""
    context: int
    """C, numbers of the request."""
    tasks: int
    """T, columns of the scores."""


def ranker_inputs(shape: PackedShape) -> tuple[TensorSpec, ...]:
    """What the ranker takes. Ids are of one joint vocabulary in which 0 is "missing"."""
    return (
        TensorSpec("history", "INT32", (shape.history_length, shape.history_fields), "newest last, 0-padded in front"),
        TensorSpec("query", "INT32", (shape.query_length,), "token ids, 0-padded behind"),
        TensorSpec("candidates", "INT32", (-1, shape.item_fields), "[N, F]"),
        TensorSpec("dense", "FP32", (-1, shape.dense), "[N, D]"),
        TensorSpec("context", "FP32", (shape.context,), "of the request"),
    )


def ranker_outputs(shape: PackedShape) -> tuple[TensorSpec, ...]:
    """What the ranker gives."""
    return (TensorSpec("scores", "FP32", (-1, shape.tasks), "[N, T], one column a task"),)


HANDOVER_HEADER = 18
"""Numbers of a line in HANDOVER before those of its candidates."""
HANDOVER = TensorSpec(
    "handover",
    "INT32",
    (-1,),
    "[18 + 2 N + S N + 2 U]: of the request 18 numbers (trirank_backend.handover), then of each candidate the "
    "catalogue row (-1: not to be ranked), then of each the Signal bit mask, then, S being 1, of each the FP32 "
    "retrieval score, then U INT64 ids that the catalogue does not know and the policy keeps",
)
"""What preprocess tells rerank past the ranker; one tensor, since each that crosses a process boundary costs time."""


class Behaviour(IntEnum):
    """What a user did with an item. The values are codes, ordered by how much they say."""

    VIEW = 1
    CLICK = 2
    FAVOURITE = 3
    CART = 4
    PURCHASE = 5


class EventKind(IntEnum):
    """What feedback tells. From VIEW to PURCHASE the codes are those of Behaviour."""

    DISLIKE = -1
    """The user does not want to see this item again."""
    IMPRESSION = 0
    """It was shown to the user."""
    VIEW = 1
    CLICK = 2
    FAVOURITE = 3
    CART = 4
    PURCHASE = 5


class Signal(IntFlag):
    """What preprocess found out about a candidate, for policies to act on."""

    MATCHES_QUERY = 1
    SEEN_ITEM = 2
    SEEN_PRODUCT = 4
    SEEN_BRAND = 8
    SEEN_CATEGORY = 16
    PURCHASED = 32
    NEW_ITEM = 64
    POPULAR = 128
    UNAVAILABLE = 256
    """By the release; what changed since is known to rerank alone."""
    DISLIKED = 512
    MATCHES_INTENT = 1024
    """Its category is one that the query asks for, where words are understood (features.words of the recipe)."""


class Reason(IntFlag):
    """Why an item stands where it does, for the service to show or log. The first six come from signals; each rule of a
    policy that acts on what is shown has a bit of its own, which stands for "this rule moved it"."""

    MATCHES_QUERY = 1
    SEEN_BEFORE = 2
    BRAND_YOU_CHOSE = 4
    CATEGORY_YOU_BROWSE = 8
    NEW = 16
    POPULAR = 32
    BOOSTED = 64
    PINNED = 128
    DIVERSITY = 256
    """Moved up by maximal marginal relevance (rule ``mmr``)."""
    NOT_IN_CATALOGUE = 512
    """Kept by the policy behind all others, in retrieval's order."""
    BURIED = 1024
    SPONSORED = 2048
    EXPLORED = 4096
    """New, and its score was drawn from what is known of it so far (rule ``explore``)."""
    DIVERSE_SET = 8192
    """Moved up by a determinantal point process (rule ``dpp``)."""
    HELD_BACK = 16384
    """Moved down by a cap."""
    QUOTA = 32768
    """Moved up by a quota."""
    BEST_VARIANT = 65536
    """Others like it were left out in its favour."""


class Status(IntFlag):
    """What a caller should know about the answer as a whole."""

    COLD_USER = 1
    """No history was found or sent for a user who is not anonymous."""
    UNKNOWN_ITEMS_DROPPED = 2
    """Where the policy does not keep them."""
    DUPLICATES_DROPPED = 4
    ITEMS_FILTERED = 8
    """By the policy, or because the catalogue says that they cannot be had."""
    FEWER_THAN_TOP_K = 16
    DEGRADED = 32
    """A stage did less than usual: the user store was slow or down, and the user was taken for one without history."""


MAX_EVENTS = 1_000
"""Of one batch of feedback."""
MAX_EVENT_ID_BYTES = 64
MAX_REQUEST_ID_BYTES = 128
FUTURE_S = 300
"""How far an event's clock may be ahead of the server's."""
FEEDBACK_REQUEST = (TensorSpec("EVENTS", "BYTES", (1,), f"JSON array of 1 to {MAX_EVENTS} events"),)
FEEDBACK_RESPONSE = (TensorSpec("STORED", "INT32", (2,), "[events that were new, events that were there already]"),)


def bucket_for(candidates: int) -> int:
    """The smallest bucket that holds ``candidates``.

    Raises:
        ValueError: there are none, or more than the largest bucket.
    """
    if not 1 <= candidates <= MAX_CANDIDATES:
        raise ValueError(
            f"{candidates} candidates; a request has 1 to {MAX_CANDIDATES}. "
            "Send fewer: let retrieval cut its list, or split the request."
        )
    return next(bucket for bucket in BUCKETS if bucket >= candidates)


def stable_id(key: str) -> int:
    """The int64 id of a string SKU or user name: 63 bits of BLAKE2b, so never negative.

    Ids are INT64 on the wire because BYTES tensors are slow (triton-inference-server/server #7153). The build
    uses this very function and refuses a catalogue in which two names collide.
    """
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
