"""Which server a call goes to.

Two are drawn and the one with fewer calls under way is taken ("power of two choices", Mitzenmacher 2001), or all take
turns. A server that fails in a row is left alone for a while and comes back slowly; one that leaves the list gets no
new calls and finishes what it has.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from trirank._errors import Unavailable
from trirank._options import Balancing, EjectionPolicy

_LONGEST_DOUBLING = 32
_CLOCKS_S = 60.0
"""For how long a server whose clock differs gets no deadlines as moments; clocks are set right."""
_NEWEST = 0.05
"""Weight of the newest call in the mean."""


@dataclass(eq=False)
class Endpoint:
    """One server.

    Attributes:
        under_way: calls that have been sent and not answered.
        failures: in a row.
        left_alone_until, clock_differs_until: on the pool's clock.
        since: when it came, or came back; for the slow start.
    """

    address: str
    since: float
    under_way: int = 0
    failures: int = 0
    ejections: int = 0
    left_alone_until: float = 0.0
    clock_differs_until: float = 0.0
    leaving: bool = False
    checked: bool = field(default=False)
    """Whether its contract is known to be ours; asked again when it was away."""


class Pool:
    """The servers of a client; safe to share between threads."""

    def __init__(
        self,
        addresses: Iterable[str],
        balancing: Balancing,
        ejection: EjectionPolicy,
        clock: Callable[[], float] = time.monotonic,
        seed: int | None = None,
    ) -> None:
        self._balancing = balancing
        self._ejection = ejection
        self._clock = clock
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._turn = 0
        self.mean_s: float | None = None
        """How long answered calls take on average, of all servers; None: none was answered yet."""
        # The first ones have nobody to be spared for.
        started = clock() - ejection.slow_start_s
        self._endpoints = {address: Endpoint(address, started) for address in addresses}

    def __len__(self) -> int:
        return len(self._endpoints)

    @property
    def endpoints(self) -> list[Endpoint]:
        """All that have not left."""
        return list(self._endpoints.values())

    def update(self, addresses: Iterable[str]) -> list[Endpoint]:
        """Take the list that there is now; gives those that have left. An empty one is not believed."""
        wanted = list(dict.fromkeys(addresses))
        if not wanted:
            return []
        with self._lock:
            gone = [endpoint for address, endpoint in self._endpoints.items() if address not in wanted]
            for endpoint in gone:
                endpoint.leaving = True
                del self._endpoints[endpoint.address]
            now = self._clock()
            for address in wanted:
                if address not in self._endpoints:
                    self._endpoints[address] = Endpoint(address, now)
            return gone

    def pick(self, tried: frozenset[str] = frozenset()) -> Endpoint:
        """A server for the next attempt, one not tried yet if there is any; its call is counted as under way.

        Raises:
            Unavailable: there is no server at all.
        """
        with self._lock:
            every = list(self._endpoints.values())
            if not every:
                raise Unavailable("there is no server to call")
            now = self._clock()
            fit = [endpoint for endpoint in every if endpoint.left_alone_until <= now] or every
            fresh = [endpoint for endpoint in fit if endpoint.address not in tried]
            others = [endpoint for endpoint in every if endpoint.address not in tried]
            endpoint = self._chosen(fresh or others or fit, now)
            endpoint.under_way += 1
            return endpoint

    def pick_hedge(self, tried: frozenset[str]) -> Endpoint | None:
        """A server for a call beside one that is under way: not tried yet, not left alone, and known to be of our
        contract, since a hedge has no time to ask."""
        with self._lock:
            now = self._clock()
            fit = [
                endpoint
                for endpoint in self._endpoints.values()
                if endpoint.checked and endpoint.left_alone_until <= now and endpoint.address not in tried
            ]
            if not fit:
                return None
            endpoint = self._chosen(fit, now)
            endpoint.under_way += 1
            return endpoint

    def others_than(self, endpoint: Endpoint) -> bool:
        """Whether there is another server that is not left alone."""
        now = self._clock()
        return any(e is not endpoint and e.left_alone_until <= now for e in list(self._endpoints.values()))

    def done(self, endpoint: Endpoint, healthy: bool | None, began: float | None = None) -> None:
        """A call has ended: well, badly, or (None) in a way that says nothing about the server.

        Args:
            began: on the pool's clock. What began before the server was left alone does not count against it again.
        """
        with self._lock:
            endpoint.under_way -= 1
            now = self._clock()
            if healthy:
                endpoint.failures = endpoint.ejections = 0
                if began is not None:
                    took = now - began
                    self.mean_s = took if self.mean_s is None else self.mean_s + _NEWEST * (took - self.mean_s)
            elif healthy is False and (now if began is None else began) >= endpoint.left_alone_until:
                endpoint.failures += 1
                if endpoint.failures >= self._ejection.failures:
                    self._eject(endpoint, self._ejection.max_share)

    def unfit(self, endpoint: Endpoint) -> None:
        """A call has shown that a server does not speak our contract: it is left alone at once, one always remains."""
        with self._lock:
            endpoint.under_way -= 1
            endpoint.checked = False
            if endpoint.left_alone_until <= self._clock():
                self._eject(endpoint, 1.0)

    def forget_contracts(self) -> None:
        """Have every server asked again for its contract before its next call."""
        for endpoint in self.endpoints:
            endpoint.checked = False

    def clock_differs(self, endpoint: Endpoint) -> None:
        """A server's clock is too far from ours for deadlines to be sent as moments."""
        endpoint.clock_differs_until = self._clock() + _CLOCKS_S

    def clock_agrees(self, endpoint: Endpoint) -> bool:
        """Whether it is not known to be."""
        return endpoint.clock_differs_until <= self._clock()

    def _chosen(self, among: list[Endpoint], now: float) -> Endpoint:
        if len(among) == 1:
            return among[0]
        warm = [each for each in among if self._random.random() < self._share(each, now)] or among
        if self._balancing == "round_robin":
            self._turn += 1
            return warm[self._turn % len(warm)]
        if len(warm) == 1:
            return warm[0]
        one, other = self._random.sample(warm, 2)
        return one if one.under_way <= other.under_way else other

    def _share(self, endpoint: Endpoint, now: float) -> float:
        """Of the calls that it would get when warm; a tenth at first, so that it does warm up."""
        if self._ejection.slow_start_s <= 0:
            return 1.0
        return max(0.1, min(1.0, (now - endpoint.since) / self._ejection.slow_start_s))

    def _eject(self, endpoint: Endpoint, max_share: float) -> None:
        now = self._clock()
        alone = sum(each.left_alone_until > now for each in self._endpoints.values() if each is not endpoint)
        most = min(len(self._endpoints) - 1, int(max_share * len(self._endpoints)))
        if alone >= most:
            return
        doubled = self._ejection.pause_s * 2 ** min(endpoint.ejections, _LONGEST_DOUBLING)
        endpoint.ejections += 1
        endpoint.failures = 0
        endpoint.left_alone_until = now + min(self._ejection.max_pause_s, doubled)
        endpoint.since = endpoint.left_alone_until
