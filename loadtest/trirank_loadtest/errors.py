"""LoadTestError
├── BadLoad      what was asked for makes no load: an SLO, a rate, a shape, a mix, a file
└── LoadFailed   the load could not be made: no server, no answer, a process of the load that ended
"""

from __future__ import annotations


class LoadTestError(Exception):
    """Base of all errors of the load test."""


class BadLoad(LoadTestError):
    """Nothing was sent; the message says what, which value, and what would do."""


class LoadFailed(LoadTestError):
    """The message says what was seen."""
