"""Columns in which equal values stand together."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def run_begins(values: NDArray[Any]) -> NDArray[np.bool_]:
    """[E] whether a value is another one than that before it."""
    return np.append(True, values[1:] != values[:-1])[: len(values)]
