"""BackendError
├── InvalidInput       a request breaks the contract; becomes INVALID_ARGUMENT
├── NotAllowed         its caller has no token of this server's; becomes INVALID_ARGUMENT
├── TooLate            its caller's deadline has passed; becomes UNAVAILABLE
├── Overloaded         it could not be answered in time, or waited too long; becomes UNAVAILABLE
├── BrokenScores       the ranker gave what is no number; becomes INTERNAL
├── StageFailed        something else went wrong in one request; becomes INTERNAL
├── StoreFailed        a store did not answer, or not in time; becomes UNAVAILABLE
├── InvalidTokens      a file of callers' tokens is wrong
├── InvalidPolicy      a policy file is wrong
├── InvalidStore       a store's address or file is wrong
└── InvalidRelease     the files of a release are missing, damaged or of another contract

All but the last four belong to one request: a step gives them in the place of that request's answer.
"""

from __future__ import annotations

from typing import Any

_LONGEST = 80


def shortened(value: Any) -> str:
    """A caller's value for an error's words, which travel in a header."""
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


class BackendError(Exception):
    """Base of what the backend raises."""


class InvalidInput(BackendError, ValueError):
    """The message says which tensor, which value, and the limit."""


class NotAllowed(BackendError):
    """The message says what to send."""


class TooLate(BackendError):
    """Nobody waits for the answer any more."""


class Overloaded(BackendError):
    """More has come in than can be answered in time, and this request is of those that are not."""


class BrokenScores(BackendError):
    """The message says which item's score."""


class StageFailed(BackendError):
    """The message says what failed; Triton's log has the traceback."""


class StoreFailed(BackendError):
    """The message says which store and how it failed; all, some or none of what was asked of it may have been done."""


class InvalidTokens(BackendError):
    """The message says which file and what to do."""


class InvalidPolicy(BackendError):
    """The message says which file, which rule and what is wrong with it."""


class InvalidStore(BackendError):
    """The message says which store and what to do."""


class InvalidRelease(BackendError):
    """The message says which file and what to do."""
