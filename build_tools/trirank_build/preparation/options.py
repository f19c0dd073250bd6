"""Choices of `trirank data prepare`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from trirank.contract import Behaviour

from trirank_build.preparation.cleaning import MAX_LOSS, Report


@dataclass(frozen=True)
class PrepareOptions:
    """Attributes:
    items: an item file beside the log.
    encoding: of all files; None: UTF-8, and what is not is told.
    behaviours: further words for what a user did; None: rows to leave out.
    item_ids, user_ids: one of values.ID_KINDS; None: as they look.
    max_loss: largest share of values or rows that may be of no use.
    queries: a query file beside the log.
    min_count: k of the k-core; 1: off.
    max_train, max_eval: ranking tasks to keep of each split.
    engine: what cleans and splits, see preparation.engines.
    """

    items: Path | None = None
    queries: Path | None = None
    min_count: int = 1
    max_train: int = 200_000
    max_eval: int = 20_000
    seed: int = 7
    encoding: str | None = None
    behaviours: Mapping[str, Behaviour | None] = field(default_factory=dict)
    item_ids: str | None = None
    user_ids: str | None = None
    max_loss: float = MAX_LOSS
    engine: str | None = None

    def report(self) -> Report:
        """An empty report that is as strict as was asked for."""
        return Report(max_loss=self.max_loss)
