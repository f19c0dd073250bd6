"""Who of a batch is worked for, when more comes in than can be answered in time.

A queue that is served in order makes everybody wait just as long as they can: under lasting overload each request is
begun shortly before its deadline, all are answered too late, and nothing of the work is of use. So a stage works only
for those of a batch whose answers it can give before their deadlines, and refuses the others
(benchmarks/against_peers.py measures the answers in time under three times the load that could be borne). And where the
queue stands, the first stage refuses who has waited long: those behind them wait less, nobody is told at the end of
their time what could have been told before, and few callers give up what is under way (docs/serving.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from trirank.contract import PATIENCE


class Wait(NamedTuple):
    """Of a request: how long it has waited, and how much time it had from when it was sent to its deadline."""

    waited_s: float
    whole_s: float


_WEIGHT = 0.2
"""Of the newest batch in what is known of the cost."""
_OPTIMISM = 0.98
_SPARE = 1.25
"""Batches take as long as the last ones did, but for this factor; an answer has a way to go besides."""


class Admission:
    """Knows from the last batches what a request takes."""

    def __init__(self) -> None:
        self._cost_s = 0.0

    def admitted(self, left_s: Sequence[float]) -> list[bool]:
        """Whether each request of a batch is worked for: the most that can all be answered in time, if those are taken
        that have the most time left, so those first that have no deadline at all. One is in any case, or a cost that
        was once high would stay so.

        Args:
            left_s: seconds until each one's deadline, above 0; infinite where there is none.
        """
        order = sorted(range(len(left_s)), key=lambda at: -left_s[at])
        most = 1
        for count, at in enumerate(order, 1):
            if count * self._cost_s * _SPARE > left_s[at]:
                break
            most = count
        if most < len(order):  # so that it is tried again whether batches of more are cheaper
            self._cost_s *= _OPTIMISM
        chosen = [False] * len(left_s)
        for at in order[:most]:
            chosen[at] = True
        return chosen

    def took(self, seconds: float, requests: int) -> None:
        """A batch's time."""
        cost = seconds / requests
        self._cost_s += (cost - self._cost_s) * (_WEIGHT if self._cost_s else 1.0)
        assert math.isfinite(self._cost_s)


_STANDS_S, _SHORT, _IDLE_S = 0.1, PATIENCE / 4, 0.01
"""A queue in which for so long nobody was found who had waited for less than that share of their time stands, if the
stage had no pause between its batches: where it had one, what looks like a wait is the network, or another clock."""


class Queue:
    """Tells a queue that stands from one that a burst has filled: in a burst's, somebody soon has not waited long
    (controlled delay: Nichols and Jacobson, ACM Queue 10(5), 2012; with a limit on the wait while it stands: Maurer,
    "Fail at Scale", ACM Queue 13(8), 2015)."""

    def __init__(self) -> None:
        self._long_since: float | None = None
        self._idle_since = -math.inf

    def waited_too_long(self, waits: Sequence[Wait | None], now_s: float) -> list[bool]:
        """Whether each request of a batch is refused for that reason. One without a wait is not, and says nothing of
        the queue; nor does one that was sent in the future by this machine's clock.

        Args:
            now_s: on a clock that is not set.
        """
        known = [wait for wait in waits if wait is not None and wait.waited_s >= 0]
        least = min((wait.waited_s for wait in known), default=0.0)
        if now_s - self._idle_since > _IDLE_S or (waits and not known):
            self._long_since = None
        elif known:
            # Those with the least time are who the queue is to be short for.
            if least <= _SHORT * min(wait.whole_s for wait in known):
                self._long_since = None
            elif self._long_since is None:
                self._long_since = now_s
        if self._long_since is None or now_s - self._long_since < _STANDS_S:
            return [False] * len(waits)
        return [
            wait is not None and wait.waited_s > PATIENCE * wait.whole_s and least > _SHORT * wait.whole_s
            for wait in waits
        ]

    def idle(self, now_s: float) -> None:
        """A batch is done."""
        self._idle_since = now_s
