"""What a service promises, and whether a run kept it: ``p99=50ms``, ``error_rate=0.1%``."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trirank_loadtest.errors import BadLoad

if TYPE_CHECKING:
    from trirank_loadtest.measured import Measured

_UNITS = {"us": 1e-3, "µs": 1e-3, "ms": 1.0, "s": 1e3}
_EXAMPLES = "p99=50ms, p50=5ms, mean=10ms, error_rate=0.1%"


@dataclass(frozen=True)
class Slo:
    """One promise.

    Attributes:
        name: ``pQ`` with Q above 0 and below 100, ``mean`` or ``error_rate``.
        limit: milliseconds, or a share of the requests.
    """

    name: str
    limit: float

    @classmethod
    def read(cls, text: str) -> Slo:
        """From ``p99=50ms`` and the like.

        Raises:
            BadLoad: nobody can tell what it promises.
        """
        name, equals, value = (part.strip() for part in text.partition("="))
        if name == "error_rate":
            found = re.fullmatch(r"([0-9.]+)\s*(%?)", value)
            limit = _number(found[1]) / (100 if found[2] else 1) if found else math.nan
            if not 0 <= limit < 1:
                raise BadLoad(f"SLO {text!r}: error_rate is a share below 1, or per cent; for instance error_rate=0.1%")
            return cls(name, limit)
        percentile = _number(name[1:]) if name.startswith("p") else math.nan
        if not equals or (name != "mean" and not 0 < percentile < 100):
            raise BadLoad(f"SLO {text!r} cannot be read; write one of {_EXAMPLES}")
        found = re.fullmatch(r"([0-9.]+)\s*(us|µs|ms|s)", value)
        limit = _number(found[1]) * _UNITS[found[2]] if found else math.nan
        if not limit > 0:
            raise BadLoad(f"SLO {text!r}: {value!r} is no time above 0 with a unit; for instance {name}=50ms")
        return cls(name, limit)

    def value(self, measured: Measured) -> float:
        """What was measured of it, in the limit's unit. Failures count as infinitely slow."""
        if self.name == "error_rate":
            return measured.error_rate
        return measured.mean_ms if self.name == "mean" else measured.percentile(float(self.name[1:]))

    def kept(self, measured: Measured) -> bool:
        """Whether the run kept it."""
        return self.value(measured) <= self.limit

    def words(self, value: float | None = None) -> str:
        """The promise, or a value in its unit."""
        number = self.limit if value is None else value
        shown = f"{number:.3%}" if self.name == "error_rate" else f"{number:.3g} ms"
        return f"{self.name} {'<= ' if value is None else ''}{shown}"


def read_all(texts: list[str]) -> list[Slo]:
    """Several, also with commas between them.

    Raises:
        BadLoad: one cannot be read.
    """
    return [Slo.read(part) for text in texts for part in text.split(",") if part.strip()]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
