"""How often an item was chosen."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def popularity(chosen: NDArray[np.int64], ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """[M]: how often each of ``ids`` [M], ascending, stands among ``chosen``; every chosen id is one of them."""
    return np.bincount(np.searchsorted(ids, chosen), minlength=len(ids))
