"""Scores → the best K after the policies' rules, vectorised over the whole batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from trirank.contract import Reason, Signal

from trirank_backend.policies import Policy

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


@dataclass(frozen=True)
class Ranked:
    """Best first, K = the longest list asked for.

    Attributes:
        order: [B, K] int, places in the candidate list; -1: nothing left.
        scores: [B, K] float32, 0 where order is -1.
        reasons: [B, K] int32.
        filtered: [B] candidates that a rule dropped (variants of a better one not counted).
    """

    order: NDArray[np.int64]
    scores: NDArray[np.float32]
    reasons: NDArray[np.int32]
    filtered: NDArray[np.int64]


class PolicyTable:
    """The policies as arrays, so that a batch may mix scenarios."""

    def __init__(self, policies: dict[str, Policy], tasks: tuple[str, ...]) -> None:
        self.index = {name: at for at, name in enumerate(policies)}
        listed = list(policies.values())
        self.task_weights = np.array([[p.task_weights.get(t, 0.0) for t in tasks] for p in listed], np.float32)
        self.deduplicate = np.array([p.deduplicate for p in listed])
        self.excluded = np.array(
            [Signal.UNAVAILABLE | (Signal.PURCHASED if p.exclude_purchased else 0) for p in listed], np.int32
        )
        boosted = sorted({name for p in listed for name in p.boosts})
        self.boosted = np.array([Signal[name] for name in boosted], np.int32)  # [S]
        self.boosts = np.array([[p.boosts.get(name, 0.0) for name in boosted] for p in listed], np.float32)


def rerank(
    scores: NDArray[np.float32],
    signals: NDArray[np.int32],
    valid: NDArray[np.bool_],
    products: NDArray[np.int32],
    policy: NDArray[np.int64],
    table: PolicyTable,
    top_k: int,
) -> Ranked:
    """Order each request's candidates and cut to ``top_k``. Equal scores keep the order they came in.

    Args:
        scores: [B, N, T] of the ranker.
        signals: [B, N] Signal bits.
        valid: [B, N]; false: padding, unknown or a repeat.
        products: [B, N]; variants of one product share a number.
        policy: [B] places in ``table``.
    """
    excluded = (signals & table.excluded[policy][:, None]) != 0
    alive = valid & ~excluded
    final = np.einsum("bnt,bt->bn", scores, table.task_weights[policy])
    strength = table.boosts[policy]  # [B, S]
    fires: NDArray[np.bool_] | None = None
    if strength.any():
        fires = ((signals[..., None] & table.boosted) != 0) & (strength != 0)[:, None]  # [B, N, S]
        final = final + (fires * strength[:, None]).sum(-1)
    request = np.arange(len(scores))[:, None]
    order = np.argsort(np.where(alive, -final, np.inf), axis=1, kind="stable")  # [B, N]
    kept = alive[request, order]
    if (unique := table.deduplicate[policy]).any():
        kept &= ~(_repeats(products[request, order], kept) & unique[:, None])
    # Survivors first, each side in its order.
    order = order[request, np.argsort(~kept, axis=1, kind="stable")][:, :top_k]
    left = np.arange(order.shape[1]) < kept.sum(1)[:, None]
    reasons = _REASONS[signals[request, order]]
    if fires is not None:
        reasons |= fires.any(-1)[request, order] * np.int32(Reason.BOOSTED)
    return Ranked(
        order=np.where(left, order, -1),
        scores=np.where(left, final[request, order], 0).astype(np.float32, copy=False),
        reasons=np.where(left, reasons, 0),
        filtered=(valid & excluded).sum(1),
    )


def _repeats(products: NDArray[np.int32], kept: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """[B, N], best first: whether a kept candidate of the same product stands before this one."""
    keys = np.where(kept, products, -1)
    grouped = np.argsort(keys, axis=1, kind="stable")
    request = np.arange(len(keys))[:, None]
    by_group = keys[request, grouped]
    repeats = np.zeros(keys.shape, bool)
    repeats[request, grouped[:, 1:]] = (by_group[:, 1:] == by_group[:, :-1]) & (by_group[:, 1:] >= 0)
    return repeats
