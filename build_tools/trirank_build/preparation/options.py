"""Choices of `trirank data prepare`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class PrepareOptions:
    """Attributes:
    items: an item file beside the log.
    queries: a query file beside the log.
    min_count: k of the k-core; 1: off.
    max_train, max_eval: ranking tasks to keep of each split.
    """

    items: Path | None = None
    queries: Path | None = None
    min_count: int = 1
    max_train: int = 200_000
    max_eval: int = 20_000
    seed: int = 7
