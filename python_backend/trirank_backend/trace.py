"""Which rule of a policy moved which item, told as JSON.

    {"policy": "home",
     "rules": ["available", "mix", "deduplicate", …],
     "items": [{"item": 17, "position": 1, "score": 2.4, "tasks": {"click": 1.9, …}, "reasons": 256,
                "moves": [{"rule": "mix", "from": 5, "to": 2, "score": 2.4}, …]},
               {"item": 9, "position": null, "dropped_by": "deduplicate", …}]}

Positions count from 1. The first ``from`` is the place among the candidates as they were sent; a rule that neither
moves an item nor changes its score is left out. Items that are shown come first, in their order.
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trirank_backend.policies import Page, Rule, query_key
from trirank_backend.policies.page import sort
from trirank_backend.policies.rule import Step

AVAILABLE = "available"
"""What leaves out what is sold out, blocked, or refused by the request's own FILTERS."""


class Trace:
    """Watches one page.

    Args:
        page: after what cannot be had was left out.
        ids: [M] of the catalogue.
    """

    def __init__(self, page: Page, ids: NDArray[np.int64], tasks: tuple[str, ...], policy: str) -> None:
        self._page, self._policy = page, policy
        self._rules = [AVAILABLE]
        self._items: dict[int, dict[str, Any]] = {}
        there = set(page.order[: page.count].tolist())
        for place in np.flatnonzero(page.rows >= 0).tolist():
            scores = {task: _number(page.tasks[place, at]) for at, task in enumerate(tasks)}
            self._items[place] = {
                "item": int(ids[page.rows[place]]),
                "position": None,
                "score": None,
                "tasks": scores,
                "moves": [],
            }
            if place not in there:
                self._items[place]["dropped_by"] = AVAILABLE
        self._positions = {place: place + 1 for place in self._items}
        self._scores: dict[int, float] = dict.fromkeys(self._items, 0.0)

    def run(self, steps: list[tuple[Rule | None, Step]]) -> None:
        """Apply the rules, and look after each."""
        for rule, step in steps:
            step(self._page)
            if rule is not None and (not rule.queries or self._page.query in map(query_key, rule.queries)):
                self._look(str(rule.rule))  # type: ignore[attr-defined]  # every rule's own

    def text(self, top_k: int) -> bytes:
        """The trace as JSON."""
        page = self._page
        page.sort()
        for position, place in enumerate(page.order[: min(page.count, top_k)].tolist(), 1):
            self._items[place]["position"] = position
        for place, item in self._items.items():
            item["reasons"] = int(page.reasons[place])
            if "dropped_by" not in item:
                item["score"] = _number(page.score[place])
        ordered = sorted(self._items.values(), key=lambda item: item["position"] or len(page.rows) + 1)
        return json.dumps({"policy": self._policy, "rules": self._rules, "items": ordered}).encode()

    def _look(self, name: str) -> None:
        page = self._page
        self._rules.append(name)
        order = page.order[: page.count].copy()
        if not page.sorted:  # the page itself is left as it is: what is equal keeps the order in which it came
            sort(order, len(order), page.score)
        there = order.tolist()
        for position, place in enumerate(there, 1):
            score = float(page.score[place])
            if position != self._positions[place] or score != self._scores[place]:
                move = {"rule": name, "from": self._positions[place], "to": position, "score": _number(score)}
                self._items[place]["moves"].append(move)
            self._positions[place], self._scores[place] = position, score
        for place in self._items.keys() - set(there):
            self._items[place].setdefault("dropped_by", name)


def _number(value: Any) -> float | None:
    """None for what is no finite number: JSON has none."""
    return round(float(value), 6) if math.isfinite(value) else None
