"""What a client tells its hooks while it works."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trirank._errors import RankError
    from trirank._types import RankRequest, RankResponse

EVENTS = ("request", "attempt", "retry", "hedge", "response", "error", "fallback", "cancelled")
"""``request``: a call begins, metadata may still be added. ``attempt``: one goes out. ``retry``, ``hedge``: another one
will. ``response``, ``error``: the call has ended. ``fallback``: it ended with retrieval's order. ``cancelled``: its
caller ended it."""
_log = logging.getLogger("trirank")


@dataclass
class Event:
    """One call, as far as it has come; the same object for all of its events.

    Attributes:
        name: one of EVENTS.
        request: what was asked.
        address: the server of the last attempt.
        attempts: sent so far.
        elapsed_s: since the call began.
        metadata: sent with every attempt; a hook of ``request`` may add to it.
        response, error: how it ended.
        state: for hooks to keep what they need from one event to the next.
    """

    name: str
    request: RankRequest
    address: str = ""
    attempts: int = 0
    elapsed_s: float = 0.0
    metadata: list[tuple[str, str]] = field(default_factory=list)
    response: RankResponse | None = None
    error: RankError | None = None
    state: dict[str, Any] = field(default_factory=dict)


def tell(hooks: Any, event: Event, name: str) -> None:
    """Call the hooks of one event. A hook that raises is logged; it does not cost the caller an answer."""
    event.name = name
    for hook in hooks.get(name, ()):
        try:
            hook(event)
        except Exception:  # noqa: PERF203  # a hook may raise anything
            _log.exception("a hook of %r raised", name)
