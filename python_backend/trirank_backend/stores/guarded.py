"""Reading of users beside a deadline: a store that is slow or down costs a request a moment, and then nothing."""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotInTime

import pybreaker

from trirank_backend.errors import StoreFailed
from trirank_backend.stores.events import Past
from trirank_backend.stores.store import READ_TIMEOUT_S, Store

FAILURES, RESET_S = 3, 1.0
"""After so many failures in a row nobody is asked for so long; then one request tries, and all are right again or wait
once more."""

_log = logging.getLogger("trirank")


class GuardedUsers:
    """What preprocess reads users with: a store behind a circuit breaker.

    A remote store is read in a thread of its own, since a name that is looked up, a connection that is made, and an
    answer that comes in drops each have their time, and a request has one for all of it.
    """

    def __init__(
        self, store: Store, failures: int = FAILURES, reset_s: float = RESET_S, timeout_s: float = READ_TIMEOUT_S
    ) -> None:
        self._store, self._timeout_s = store, timeout_s
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="trirank-users") if store.remote else None
        self._late: Future[dict[int, Past]] | None = None
        self._breaker = pybreaker.CircuitBreaker(fail_max=failures, reset_timeout=reset_s)
        self._told = False

    def get(self, users: list[int]) -> dict[int, Past] | None:
        """What is remembered of those that are known; None: nobody can say."""
        try:
            found: dict[int, Past] = self._breaker.call(self._read, users)
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

    def _read(self, users: list[int]) -> dict[int, Past]:
        if self._thread is None:
            return self._store.get(users)
        if self._late is not None and not self._late.done():
            raise StoreFailed("the user store still has not answered an earlier request")
        future = self._thread.submit(self._store.get, users)
        try:
            return future.result(self._timeout_s)
        except NotInTime:
            self._late = future
            raise StoreFailed(f"the user store did not answer within {self._timeout_s * 1e3:g} ms") from None

    def close(self) -> None:
        """Let go of the store."""
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)
        self._store.close()
