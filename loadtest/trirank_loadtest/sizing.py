"""How many machines for a rate and a promise, on paper: from what one machine was measured to hold.

A server of m cores is a queue of m places. Allen and Cunneen's approximation (A. O. Allen, "Probability, Statistics and
Queueing Theory", 1990) gives the mean wait of arrivals and services of any variability:

    W = C(m, a) / (m / s - rate) * (ca2 + cs2) / 2        with a = rate * s

where s is the time of a request on a core, C Erlang's chance of having to wait, and ca2 and cs2 the squared
coefficients of variation of gaps and services (1 for Poisson arrivals). Of those who wait, waits are taken for
exponential, which gives percentiles. It knows nothing of batches, which make requests cheaper as more of them come: s
is that at capacity, and what a single request takes where nobody waits is added as it was measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from trirank_loadtest.errors import BadLoad

_MOST = 100_000


@dataclass(frozen=True)
class Server:
    """One machine, as measured.

    Attributes:
        capacity: requests a second at which all of its cores are busy.
        cores: places that work at the same time: cores, or a GPU's instances.
        base_ms: what a request takes that does not wait.
        variation: squared coefficient of variation of services.
    """

    capacity: float
    cores: int
    base_ms: float
    variation: float = 1.0

    def __post_init__(self) -> None:
        """Raises BadLoad for what is no machine."""
        if not (self.capacity > 0 and self.cores >= 1 and self.base_ms > 0 and self.variation >= 0):
            raise BadLoad(
                f"{self} is no server: capacity and base_ms are above 0, cores 1 or more, variation not below"
            )

    @classmethod
    def holding(
        cls, rate: float, limit_ms: float, cores: int, base_ms: float, share: float = 99.0, variation: float = 1.0
    ) -> Server:
        """The machine of which `trirank loadtest --find-capacity` said that ``rate`` keeps a percentile within a limit:
        its cores are not all busy then, and its capacity lies above.

        Raises:
            BadLoad: it is no machine, or a request alone takes longer than the limit.
        """
        if not 0 < base_ms < limit_ms:
            raise BadLoad(
                f"a request alone takes {base_ms:g} ms; it has to be above 0 and below the limit, {limit_ms:g}"
            )
        low, high = rate, 100 * rate
        for _ in range(100):
            middle = (low + high) / 2
            holds = percentile_ms(cls(middle, cores, base_ms, variation), rate, share) <= limit_ms
            low, high = (low, middle) if holds else (middle, high)
        return cls(high, cores, base_ms, variation)

    @property
    def service_ms(self) -> float:
        """Of a request on a core, at capacity."""
        return 1e3 * self.cores / self.capacity


def erlang_c(places: int, load: float) -> float:
    """The chance of having to wait in M/M/m with ``load`` erlangs; 1 from ``places`` on."""
    if load >= places:
        return 1.0
    blocked = 1.0
    for place in range(1, places + 1):  # Erlang's B, by its recursion
        blocked = load * blocked / (place + load * blocked)
    return blocked / (1 - load / places * (1 - blocked))


def percentile_ms(server: Server, rate: float, share: float, arrivals: float = 1.0) -> float:
    """Milliseconds below which ``share`` per cent of the answers come; infinite from the capacity on.

    Args:
        rate: requests a second; arrivals: squared coefficient of variation of the gaps between them.
    """
    if rate >= server.capacity:
        return math.inf
    waits = erlang_c(server.cores, rate / server.capacity * server.cores)
    mean_ms = 1e3 * waits / (server.capacity - rate) * (arrivals + server.variation) / 2
    above = 1 - share / 100
    wait_ms = mean_ms / waits * math.log(waits / above) if waits > above else 0.0
    return server.base_ms + wait_ms


def machines(server: Server, rate: float, share: float, limit_ms: float, spare: int = 0) -> int:
    """The fewest machines, each with an equal part of the rate, that keep a percentile within a limit.

    Args:
        spare: machines that may be lost without breaking the promise.

    Raises:
        BadLoad: a request alone takes longer than the limit, or there is no rate.
    """
    if not (math.isfinite(rate) and rate > 0):
        raise BadLoad(f"rate is {rate:g}; it is requests a second, above 0")
    if server.base_ms > limit_ms:
        raise BadLoad(f"a request alone takes {server.base_ms:g} ms, more than the promised {limit_ms:g}; "
                      "more machines do not help")  # fmt: skip
    found = max(1, math.ceil(rate / server.capacity))
    while percentile_ms(server, rate / found, share) > limit_ms:
        found += 1
        if found > _MOST:
            raise BadLoad(f"more than {_MOST:,} machines would be needed; promise less")
    return found + spare
