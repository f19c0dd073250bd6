"""Step 3: scores become the best K after the scenario's policy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from trirank import contract
from trirank.contract import Reason, Signal, Status

from trirank_backend.catalogue import Catalogue, read_only
from trirank_backend.compiled import compile_all
from trirank_backend.errors import BrokenScores, InvalidInput
from trirank_backend.handover import Handover
from trirank_backend.policies import Policy, load_policies
from trirank_backend.ranking_kernels import NOT_FINITE, Columns, Rules, rank_line
from trirank_backend.release import FEATURES, check_contract, load_features
from trirank_backend.requests import Tensors

_REASON_OF = (
    (Signal.MATCHES_QUERY, Reason.MATCHES_QUERY),
    (Signal.SEEN_ITEM | Signal.SEEN_PRODUCT, Reason.SEEN_BEFORE),
    (Signal.SEEN_BRAND, Reason.BRAND_YOU_CHOSE),
    (Signal.SEEN_CATEGORY, Reason.CATEGORY_YOU_BROWSE),
    (Signal.NEW_ITEM, Reason.NEW),
    (Signal.POPULAR, Reason.POPULAR),
)
_REASONS = np.array(
    [
        sum(reason.value for signal, reason in _REASON_OF if mask & signal.value)
        for mask in range(1 + sum(signal.value for signal in Signal))
    ],
    np.int32,
)
"""Signal mask → Reason mask."""


class Rerank:
    """Orders scored candidates by the policies of a release.

    Args:
        policies: scenario → policy, in the order in which handovers count them.
        tasks: names of the ranker's score columns.
    """

    def __init__(self, catalogue: Catalogue, policies: Mapping[str, Policy], tasks: tuple[str, ...]) -> None:
        self._columns = Columns(read_only(catalogue.ids), read_only(catalogue.products), _REASONS)
        self._items = len(catalogue)
        self._rules = [rules_of(policy, tasks) for policy in policies.values()]
        self._tasks = len(tasks)

    @classmethod
    def load(cls, release: Path) -> Rerank:
        """Open a release's files."""
        check_contract(release)
        compile_all()
        spec, catalogue = load_features(release / FEATURES)
        return cls(catalogue, load_policies(release / FEATURES / "policies.json", spec.tasks), spec.tasks)

    def tensors(self, tensors: Tensors) -> Tensors:
        """The same for a model of its own, which anybody may call.

        Raises:
            InvalidInput: the tensors do not fit each other or the release.
            BrokenScores: see ``__call__``.
        """
        scores = tensors["scores"]
        handover = Handover.read(tensors[contract.HANDOVER.name], self._items, len(self._rules))
        if scores.shape != (wanted := (*handover.rows.shape, self._tasks)):
            raise InvalidInput(f"scores has shape {list(scores.shape)}, {contract.HANDOVER.name} says {list(wanted)}")
        return self(scores, handover)

    def __call__(self, scores: NDArray[np.float32], handover: Handover) -> Tensors:
        """RANKED_IDS, SCORES, REASONS, STATUS of one request.

        Args:
            scores: [R, N, T] of the ranker.

        Raises:
            BrokenScores: one of a candidate that could be shown is not a finite number.
        """
        asked = handover.top_k.tolist()
        shape = (len(asked), max(asked))
        ids = np.full(shape, contract.PAD_ITEM_ID, np.int64)
        totals, reasons = np.zeros(shape, np.float32), np.zeros(shape, np.int32)
        status = np.empty((len(asked), 4), np.int32)
        status[:, :3] = handover.status
        rows, signals = read_only(handover.rows), read_only(handover.signals)
        scores = read_only(np.ascontiguousarray(scores))
        for line, (top_k, policy) in enumerate(zip(asked, handover.policy.tolist(), strict=True)):
            found, filtered = rank_line(
                self._columns, self._rules[policy], scores[line], rows[line], signals[line], top_k,
                ids[line], totals[line], reasons[line],
            )  # fmt: skip
            if found == NOT_FINITE:
                item = self._columns.item_ids[rows[line, filtered]]
                raise BrokenScores(
                    f"the ranker gave item {item} the scores {scores[line, filtered].tolist()}, which are no finite "
                    "numbers; serve the release before, and look at how this one was exported"
                )
            if handover.unknown.shape[1] and found < top_k:
                found += _append(handover.unknown[line], ids[line], totals[line], reasons[line], found, top_k)
            status[line, 3] = filtered
            status[line, 0] |= (filtered > 0 and Status.ITEMS_FILTERED.value) | (
                found < top_k and Status.FEWER_THAN_TOP_K.value
            )
        return {"RANKED_IDS": ids, "SCORES": totals, "REASONS": reasons, "STATUS": status}


def _append(
    unknown: NDArray[np.int64],
    ids: NDArray[np.int64],
    scores: NDArray[np.float32],
    reasons: NDArray[np.int32],
    found: int,
    top_k: int,
) -> int:
    """Put candidates that nobody knows behind those that are ranked, with the last one's score; gives how many."""
    kept = unknown[unknown != contract.PAD_ITEM_ID][: top_k - found]
    behind = slice(found, found + len(kept))
    ids[behind], reasons[behind] = kept, Reason.NOT_IN_CATALOGUE.value
    scores[behind] = scores[found - 1] if found else 0.0
    return len(kept)


def rules_of(policy: Policy, tasks: tuple[str, ...]) -> Rules:
    """A policy as numbers."""
    boosts = {Signal[name].value: boost for name, boost in sorted(policy.boosts.items()) if boost}
    return Rules(
        task_weights=np.array([policy.task_weights.get(task, 0.0) for task in tasks], np.float32),
        boosted=np.array(list(boosts), np.int32),
        boosts=np.array(list(boosts.values()), np.float32),
        excluded=(Signal.UNAVAILABLE | (Signal.PURCHASED if policy.exclude_purchased else 0)).value,
        deduplicate=policy.deduplicate,
    )
