"""BackendError
├── InvalidInput       a request breaks the contract; becomes INVALID_ARGUMENT
└── InvalidRelease     the files of a release are missing, damaged or of another contract
"""


class BackendError(Exception):
    """Base of what the backend raises."""


class InvalidInput(BackendError, ValueError):
    """The message says which tensor, which value, and the limit."""


class InvalidRelease(BackendError):
    """The message says which file and what to do."""
