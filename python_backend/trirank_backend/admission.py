"""Who of a batch is worked for, when more comes in than can be answered in time.

A queue that is served in order makes everybody wait just as long as they can: under lasting overload each request is
begun shortly before its deadline, all are answered too late, and nothing of the work is of use. So a stage works only
for those of a batch whose answers it can give before their deadlines, and refuses the others
(benchmarks/against_peers.py measures the answers in time under three times the load that could be borne).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

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
