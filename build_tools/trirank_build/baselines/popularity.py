"""How often an item was chosen."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def popularity(rows: NDArray[np.int64], items: int) -> NDArray[np.float32]:
    """[items]: interactions of each item row."""
    return np.bincount(rows, minlength=items).astype(np.float32)
