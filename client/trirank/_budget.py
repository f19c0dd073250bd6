"""What keeps extra calls few, and tells when a call takes unusually long."""

from __future__ import annotations

import threading


class TokenBucket:
    """Extra calls as a share of all calls: every call puts ``share`` of a token in, an extra one takes a whole out.

    Args:
        capacity: the most that can be saved up.
        start: tokens at first. Retries start with some, so that a client whose first calls fail may try again.
    """

    def __init__(self, share: float, capacity: float = 10.0, start: float = 0.0) -> None:
        self._share = share
        self._capacity = capacity
        self._tokens = start if share > 0 else 0.0
        self._reserved = 0
        self._lock = threading.Lock()

    def earn(self) -> None:
        """A call began."""
        with self._lock:
            self._tokens = min(self._capacity, self._tokens + self._share)

    @property
    def ready(self) -> bool:
        """Whether an extra call could be paid now."""
        return self._tokens >= 1

    def reserve(self) -> bool:
        """Put a token aside for an extra call that may become necessary, if one is left that nobody else put aside. It
        is given back with ``release``, or spent with ``redeem``. Others may still take it: then the bucket goes below
        empty, by no more than what was put aside, and fills up again before anything is paid."""
        with self._lock:
            if self._tokens - self._reserved < 1:
                return False
            self._reserved += 1
            return True

    def release(self) -> None:
        """A reserved token was not needed."""
        with self._lock:
            self._reserved -= 1

    def redeem(self) -> None:
        """A reserved token is spent."""
        with self._lock:
            self._reserved -= 1
            self._tokens -= 1

    def take(self) -> bool:
        """Whether an extra call may be made; it then has been paid."""
        with self._lock:
            if self._tokens < 1:
                return False
            self._tokens -= 1
            return True


_UNUSUAL = 2.0
"""Where calls take much the same time, one in twenty is above the 95th percentile and not late at all: hedges for those
would leave no budget for a server that stands still."""


class LateTimes:
    """A quantile of how long the last calls took, and twice their median at least.

    Args:
        quantile: between 0 and 1.
        window: how many calls are looked at.
    """

    _EVERY = 20
    ENOUGH = 20
    """Calls before there is a quantile."""

    def __init__(self, quantile: float, window: int = 500) -> None:
        self._quantile = quantile
        self._times: list[float] = []
        self._window = window
        self._seen = 0
        self._value: float | None = None
        self._lock = threading.Lock()

    def add(self, seconds: float) -> None:
        """One call took so long."""
        with self._lock:
            if len(self._times) < self._window:
                self._times.append(seconds)
            else:
                self._times[self._seen % self._window] = seconds
            self._seen += 1
            if self._seen >= self.ENOUGH and self._seen % self._EVERY == 0:
                ordered = sorted(self._times)
                late = ordered[min(len(ordered) - 1, int(self._quantile * len(ordered)))]
                self._value = max(late, _UNUSUAL * ordered[len(ordered) // 2])

    @property
    def value(self) -> float | None:
        """Seconds; None: too few calls yet."""
        return self._value
