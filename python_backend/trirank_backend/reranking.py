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
    boosted = np.zeros(signals.shape, bool)
    if len(table.boosted):
        fires = (signals[..., None] & table.boosted) != 0  # [B, N, S]
        strength = table.boosts[policy][:, None, :]
        final = final + (fires * strength).sum(-1)
        boosted = (fires & (strength != 0)).any(-1)
    order = np.argsort(np.where(alive, -final, np.inf), axis=1, kind="stable")  # [B, N]
    kept = np.take_along_axis(alive, order, 1)
    if (unique := table.deduplicate[policy]).any():
        repeats = _repeats(np.take_along_axis(products, order, 1), kept)
        kept &= ~(repeats & unique[:, None])
    # Survivors first, each side in its order.
    order = np.take_along_axis(order, np.argsort(~kept, axis=1, kind="stable"), 1)[:, :top_k]
    left = np.arange(order.shape[1])[None, :] < kept.sum(1)[:, None]

    bits = np.zeros(signals.shape, np.int32)
    for signal, reason in _REASON_OF:
        bits |= ((signals & signal.value) != 0).astype(np.int32) * reason.value
    bits |= boosted.astype(np.int32) * Reason.BOOSTED.value
    return Ranked(
        order=np.where(left, order, -1),
        scores=np.where(left, np.take_along_axis(final, order, 1), 0).astype(np.float32),
        reasons=np.where(left, np.take_along_axis(bits, order, 1), 0),
        filtered=(valid & excluded).sum(1),
    )


def _repeats(products: NDArray[np.int32], kept: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """[B, N], best first: whether a kept candidate of the same product stands before this one."""
    keys = np.where(kept, products, -1)
    grouped = np.argsort(keys, axis=1, kind="stable")
    by_group = np.take_along_axis(keys, grouped, 1)
    again = np.zeros(keys.shape, bool)
    again[:, 1:] = (by_group[:, 1:] == by_group[:, :-1]) & (by_group[:, 1:] >= 0)
    repeats = np.empty_like(again)
    np.put_along_axis(repeats, grouped, again, 1)
    return repeats
