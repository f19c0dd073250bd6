"""What was fixed when features were fitted on the training split."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trirank.contract import PackedShape

from trirank_backend.errors import InvalidRelease
from trirank_backend.features.table import CONTEXT, DENSE, HISTORY_EXTRA, WORDS


@dataclass(frozen=True)
class FeatureSpec:
    """What was fixed when the features were fitted on the training split.

    All categorical values share one vocabulary in which each table has its own range; 0 is "missing".

    Attributes:
        history_length: L.
        query_length: Q.
        item_fields: names of the F fields of an item, e.g. ``item, category, brand, price, title_0, …``.
        tables: table name → (first id, size) in the joint vocabulary.
        tasks: names of the T score columns.
        timed: whether timestamps are times; if not they only order events.
        embed_text: whether the ranker sees the query's tokens (and items have title fields); if not, text only
            counts through how well query and title match.
        folded: rows of the catalogue, the one for "no item" included, where the ranker has one vector a row instead
            of summing those of its fields; the packed field of an item is then its row + 1. 0: not folded.
        words: the language in which words are understood (words.analysis), whose columns ``dense`` then ends with;
            empty: they are not.
    """

    history_length: int
    query_length: int
    item_fields: tuple[str, ...]
    tables: dict[str, tuple[int, int]]
    tasks: tuple[str, ...]
    timed: bool = True
    embed_text: bool = True
    without: tuple[str, ...] = ()
    dense: tuple[str, ...] = field(default=DENSE)
    context: tuple[str, ...] = field(default=CONTEXT)
    folded: int = 0
    words: str = ""

    @property
    def vocabulary_size(self) -> int:
        """Rows of an embedding table over the joint vocabulary."""
        return max(first + size for first, size in self.tables.values())

    @property
    def shape(self) -> PackedShape:
        """Sizes of the packed tensors."""
        item_fields = 1 if self.folded else len(self.item_fields)
        return PackedShape(
            history_length=self.history_length,
            history_fields=item_fields + len(HISTORY_EXTRA),
            query_length=self.query_length,
            item_fields=item_fields,
            dense=len(self.dense),
            context=len(self.context),
            tasks=len(self.tasks),
        )

    def save(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> FeatureSpec:
        """Read what ``save`` wrote.

        Raises:
            InvalidRelease: it is missing, damaged, or of features that this code does not make.
        """
        try:
            raw: dict[str, Any] = json.loads(path.read_text())
            raw["tables"] = {name: (first, size) for name, (first, size) in raw["tables"].items()}
            fixed: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}
            spec = cls(**fixed)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InvalidRelease(f"feature specification {path} cannot be read ({error}); train again") from error
        made = DENSE + WORDS if spec.words else DENSE
        if spec.dense != made or spec.context != CONTEXT:
            raise InvalidRelease(
                f"{path} was fitted for dense {spec.dense} and context {spec.context}, this version makes "
                f"{made} and {CONTEXT}; train again, or install the version that trained it"
            )
        return spec
