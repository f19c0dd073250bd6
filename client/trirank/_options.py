"""How a client behaves; every default is what a search service would want."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trirank._errors import InvalidRequest
from trirank._events import Event

Balancing = Literal["least_loaded", "round_robin"]
OnFailure = Literal["raise", "retrieval_order"]
EventHooks = Mapping[str, Sequence[Callable[[Event], None]]]


@dataclass(frozen=True)
class RetryPolicy:
    """Another attempt after one that failed for a reason that another server, or a moment, may not share.

    Attributes:
        max_attempts: in one call, the first among them.
        budget: retries may be this share of all calls, so that they cannot keep an outage alive.
        backoff_s: upper bound of the first pause, doubled every time; the pause is drawn evenly below it ("full
            jitter", AWS Architecture Blog 2015). A server that names a pause (``grpc-retry-pushback-ms``) is heard.
        max_backoff_s: largest upper bound.
        attempt_timeout_s: of one attempt, while another server is there to be tried and the budget has a retry left, so
            that a server that is silent does not take the whole deadline; None: ten times what answered calls take on
            average, and 50 ms at least.
    """

    max_attempts: int = 3
    budget: float = 0.1
    backoff_s: float = 0.005
    max_backoff_s: float = 0.1
    attempt_timeout_s: float | None = None

    def __post_init__(self) -> None:
        """Raises InvalidRequest if a value is out of range."""
        if self.max_attempts < 1 or not 0 <= self.budget <= 1 or self.backoff_s < 0 or self.max_backoff_s < 0:
            raise InvalidRequest(f"{self}: attempts from 1 on, budget from 0 to 1, pauses from 0 s on")
        if self.attempt_timeout_s is not None and not self.attempt_timeout_s > 0:
            raise InvalidRequest(f"attempt_timeout_s is {self.attempt_timeout_s}; it is seconds, above 0")


@dataclass(frozen=True)
class HedgePolicy:
    """A second call to another server when the first takes unusually long; the first answer wins, the other is
    cancelled (Dean and Barroso, "The Tail at Scale", CACM 2013). Needs two servers.

    Attributes:
        quantile: of late calls' times; a call that takes longer, and longer than twice their median, is hedged.
        budget: hedges may be this share of all calls since the client was made; of what is left over, ten are kept.
        min_delay_s: never hedge sooner.
    """

    quantile: float = 0.95
    budget: float = 0.05
    min_delay_s: float = 0.001

    def __post_init__(self) -> None:
        """Raises InvalidRequest if a value is out of range."""
        if not 0 < self.quantile < 1 or not 0 <= self.budget <= 1 or self.min_delay_s < 0:
            raise InvalidRequest(f"{self}: quantile between 0 and 1, budget from 0 to 1, min_delay_s from 0 s on")


@dataclass(frozen=True)
class EjectionPolicy:
    """A server that fails again and again is left alone for a while, then tried with few calls at first.

    Attributes:
        failures: in a row, after which it is left alone.
        pause_s: for how long; doubled each time in a row, up to ``max_pause_s``.
        max_share: at most this share of the servers is left alone; one always remains.
        slow_start_s: a server that is new or back gets its full share of calls only after so long.
    """

    failures: int = 3
    pause_s: float = 1.0
    max_pause_s: float = 30.0
    max_share: float = 0.5
    slow_start_s: float = 5.0


@dataclass(frozen=True)
class Tls:
    """Encryption, and with ``cert_file`` and ``key_file`` mutual. Files are read again when they change.

    Attributes:
        ca_file: PEM of the authorities that are trusted; None: gRPC's own.
        server_name: the name that the certificate has to have; None: the address's.
    """

    ca_file: Path | str | None = None
    cert_file: Path | str | None = None
    key_file: Path | str | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        """Raises InvalidRequest if one of two files is missing."""
        if (self.cert_file is None) != (self.key_file is None):
            raise InvalidRequest("cert_file and key_file go together")
