"""Step 3: scores become the best K after the scenario's policy."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from trirank import contract
from trirank.contract import Reason, Signal, Status

from trirank_backend.catalogue import read_only
from trirank_backend.compiled import compile_all
from trirank_backend.errors import InvalidInput, InvalidRelease
from trirank_backend.handover import Handover
from trirank_backend.packed import packed_answer
from trirank_backend.policies import Asked, Live, Page, Policy, Release, Rule
from trirank_backend.policies.page import admit, emit
from trirank_backend.policies.rule import Step
from trirank_backend.release import FEATURES, check_contract
from trirank_backend.requests import Tensors
from trirank_backend.rules import load_rules
from trirank_backend.stores.overlay import COUNTS, STATE, Overlay
from trirank_backend.surroundings import CATALOGUE_VARIABLE, COUNTS_VARIABLE
from trirank_backend.trace import Trace

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
_UNAVAILABLE = Signal.UNAVAILABLE.value
_NOTHING_CHANGED = Live(np.zeros(0, np.float32), np.zeros(0, np.int32), np.zeros(0, np.int32))


class Rerank:
    """Orders scored candidates by the policies of a release.

    Args:
        policies: scenario → policy, in the order in which handovers count them.
        state: prices, stock and blocks of now; counts: of feedback. None: nobody tells.

    Raises:
        InvalidRelease: a policy does not fit the release.
    """

    def __init__(
        self,
        release: Release,
        policies: Mapping[str, Policy],
        state: Overlay | None = None,
        counts: Overlay | None = None,
    ) -> None:
        self._items, self._tasks = release.items, release.tasks
        self._state, self._counts = state, counts
        self._names = list(policies)
        self._policies = list(policies.values())
        self._steps: list[list[tuple[Rule | None, Step]]] = []
        for name, policy in policies.items():
            try:
                self._steps.append(policy.bind(release))
            except InvalidRelease as error:  # noqa: PERF203  # a few, once
                raise InvalidRelease(f"policy {name} does not fit the release: {error}") from None

    @classmethod
    def load(cls, release: Path) -> Rerank:
        """Open a release's files, and those that the surroundings name."""
        check_contract(release)
        compile_all()
        state, counts = (
            Overlay(Path(place), kind) if (place := os.environ.get(variable)) else None
            for variable, kind in ((CATALOGUE_VARIABLE, STATE), (COUNTS_VARIABLE, COUNTS))
        )
        return cls(*load_rules(release / FEATURES), state, counts)

    def tensors(self, tensors: Tensors) -> Tensors:
        """The same for a model of its own, which anybody may call.

        Raises:
            InvalidInput: the tensors do not fit each other or the release.
            BrokenScores: see ``__call__``.
        """
        scores = tensors["scores"]
        handover = Handover.read(tensors[contract.HANDOVER.name], len(self._items.ids), len(self._policies))
        if scores.shape != (wanted := (*handover.rows.shape, len(self._tasks))):
            raise InvalidInput(f"scores has shape {list(scores.shape)}, {contract.HANDOVER.name} says {list(wanted)}")
        return self(scores, handover)

    def __call__(self, scores: NDArray[np.float32], handover: Handover) -> Tensors:
        """RANKED_IDS, SCORES, REASONS, STATUS of one request, and TRACE_JSON where it was asked for; or all of it as
        PACKED_RESPONSE, where the request came so.

        Args:
            scores: [R, N, T] of the ranker.

        Raises:
            BrokenScores: one of a candidate that could be shown is not a finite number.
        """
        header = handover.header
        shape = (len(header), int(header["top_k"].max()))
        ids = np.full(shape, contract.PAD_ITEM_ID, np.int64)
        totals, reasons = np.zeros(shape, np.float32), np.zeros(shape, np.int32)
        status = np.empty((len(header), 4), np.int32)
        rows, signals = read_only(handover.rows), read_only(handover.signals)
        scores = read_only(np.ascontiguousarray(scores))
        retrieval = read_only(handover.scores)
        traces: list[bytes] = []
        for line, numbers in enumerate(header.tolist()):
            (
                bits,
                unknown,
                repeats,
                top_k,
                policy,
                _,
                _,
                trace,
                moment,
                query,
                seed,
                region,
                min_stock,
                least,
                most,
                packed,
            ) = numbers
            page = Page(rows[line], signals[line], scores[line], retrieval[line], top_k, moment, seed, query)
            steps = self._steps[policy]
            self._admit(page, policy, Asked(region, min_stock, least, most))
            if trace:
                telling = Trace(page, self._items.ids, self._tasks, self._names[policy])
                telling.run(steps)
                traces.append(telling.text(top_k))
            else:
                for _, step in steps:
                    step(page)
            page.sort()
            found = min(page.count, top_k)
            emit(
                page.order, found, page.rows, page.signals, page.score, page.reasons, _REASONS, self._items.ids,
                ids[line], totals[line], reasons[line],
            )  # fmt: skip
            # Nobody knows whether they cost less than 10, or can be had in a region.
            limited = region or least > -np.inf or most < np.inf
            if handover.unknown.shape[1] and found < top_k and not limited:
                kept = self._to_be_had(handover.unknown[line], self._policies[policy].keep_unavailable)
                found += _append(kept, ids[line], totals[line], reasons[line], found, top_k)
            bits |= (page.filtered > 0 and Status.ITEMS_FILTERED.value) | (
                found < top_k and Status.FEWER_THAN_TOP_K.value
            )
            status[line] = bits, unknown, repeats, page.filtered
        answer: Tensors = {"RANKED_IDS": ids, "SCORES": totals, "REASONS": reasons, "STATUS": status}
        if traces:
            every = iter(traces)
            told = [next(every) if asked else b"" for asked in header["trace"].tolist()]
            answer["TRACE_JSON"] = np.array(told, object)[:, None]
        return packed_answer(answer) if packed and len(header) == 1 else answer

    def _admit(self, page: Page, policy: int, asked: Asked) -> None:
        """Fill the page, with prices and stock of now."""
        live: Live = _NOTHING_CHANGED
        items = self._items
        if self._state is not None and len(self._state):
            live = Live(*self._state.state(self._ids(page)))
        if self._counts is not None and self._policies[policy].asks_seed and len(self._counts):
            page.impressions, page.clicks = self._counts.counts(self._ids(page))
        page.count, page.filtered = admit(
            page.rows, live, items.prices, items.signals, items.regions, _UNAVAILABLE, asked,
            self._policies[policy].keep_unavailable, page.prices, page.stock, page.order,
        )  # fmt: skip

    def _to_be_had(self, unknown: NDArray[np.int64], everything: bool) -> NDArray[np.int64]:
        """Without what is blocked or sold out now, which a newer release may know; or everything."""
        if everything or self._state is None or not len(self._state):
            return unknown
        _, stock, blocked = self._state.state(read_only(unknown))
        return unknown[(blocked == 0) & (stock != 0)]

    def _ids(self, page: Page) -> NDArray[Any]:
        """[N] ids; of what is not to be ranked some other one's."""
        return self._items.ids[np.maximum(page.rows, 0)]


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
