"""Reading of users beside a deadline: a store that is slow or down costs a request a moment, and then nothing."""

from __future__ import annotations

import logging

import pybreaker

from trirank_backend.errors import StoreFailed
from trirank_backend.stores.events import Past
from trirank_backend.stores.store import Store

FAILURES, RESET_S = 3, 1.0
"""After so many failures in a row nobody is asked for so long; then one request tries, and all are right again or wait
once more."""

_log = logging.getLogger("trirank")


class GuardedUsers:
    """What preprocess reads users with: a store behind a circuit breaker."""

    def __init__(self, store: Store, failures: int = FAILURES, reset_s: float = RESET_S) -> None:
        self._store = store
        self._breaker = pybreaker.CircuitBreaker(fail_max=failures, reset_timeout=reset_s)
        self._told = False

    def get(self, users: list[int]) -> dict[int, Past] | None:
        """What is remembered of those that are known; None: nobody can say."""
        try:
            found: dict[int, Past] = self._breaker.call(self._store.get, users)
        except pybreaker.CircuitBreakerError:
            return None
        except StoreFailed as error:
            if not self._told:
                _log.warning("%s; users are taken for new ones until it does", error)
                self._told = True
            return None
        if self._told:
            _log.warning("the user store answers again")
            self._told = False
        return found

    def close(self) -> None:
        """Let go of the store."""
        self._store.close()
