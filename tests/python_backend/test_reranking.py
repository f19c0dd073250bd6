"""The rules of the last step, against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trirank.contract import Reason, Signal
from trirank_backend.errors import InvalidRelease
from trirank_backend.policies import Policy, load_policies, save_policies
from trirank_backend.reranking import PolicyTable, rerank

TASKS = ("click", "purchase")
POLICIES = {
    "plain": Policy({"click": 1.0}, deduplicate=False),
    "unique": Policy({"click": 1.0, "purchase": 2.0}),
    "fresh": Policy({"click": 1.0}, deduplicate=False, exclude_purchased=True, boosts={"NEW_ITEM": 3.0}),
}
TABLE = PolicyTable(POLICIES, TASKS)


def run(scores, signals=None, valid=None, products=None, policy="plain", top_k=10):
    scores = np.asarray(scores, np.float32)
    if scores.ndim == 1:
        scores = np.stack([scores, np.zeros_like(scores)], 1)
    n = len(scores)
    return rerank(
        scores[None],
        np.zeros((1, n), np.int32) if signals is None else np.array([signals], np.int32),
        np.ones((1, n), bool) if valid is None else np.array([valid]),
        np.arange(n, dtype=np.int32)[None] if products is None else np.array([products], np.int32),
        np.array([TABLE.index[policy]]),
        TABLE,
        top_k,
    )


def test_best_first():
    assert run([0.1, 0.9, 0.5]).order.tolist() == [[1, 2, 0]]


def test_equal_scores_keep_the_order_they_came_in():
    assert run([1.0, 1.0, 1.0]).order.tolist() == [[0, 1, 2]]


def test_cut_to_top_k():
    assert run([0.1, 0.9, 0.5], top_k=2).order.tolist() == [[1, 2]]


def test_tasks_are_weighed():
    assert run([[1.0, 0.0], [0.0, 1.0]], policy="unique").order.tolist() == [[1, 0]]
    assert run([[1.0, 0.0], [0.0, 1.0]], policy="plain").order.tolist() == [[0, 1]]


def test_only_the_best_variant_stays():
    ranked = run([0.1, 0.9, 0.5, 0.7], products=[4, 4, 5, 4], policy="unique")
    assert ranked.order.tolist() == [[1, 2, -1, -1]]
    assert ranked.filtered.tolist() == [0]


def test_invalid_ones_never_come_back():
    assert run([9.0, 0.9, 8.0], valid=[False, True, False]).order.tolist() == [[1, -1, -1]]


def test_unavailable_items_are_dropped_everywhere():
    ranked = run([0.9, 0.5], signals=[Signal.UNAVAILABLE, 0])
    assert ranked.order.tolist() == [[1, -1]]
    assert ranked.filtered.tolist() == [1]


def test_purchased_items_are_dropped_where_the_policy_says_so():
    assert run([0.9, 0.5], signals=[Signal.PURCHASED, 0], policy="fresh").order.tolist() == [[1, -1]]
    assert run([0.9, 0.5], signals=[Signal.PURCHASED, 0], policy="plain").order.tolist() == [[0, 1]]


def test_a_boost_lifts_and_is_told():
    ranked = run([0.9, 0.5], signals=[0, Signal.NEW_ITEM], policy="fresh")
    assert ranked.order.tolist() == [[1, 0]]
    assert ranked.scores[0].tolist() == pytest.approx([3.5, 0.9])
    assert ranked.reasons[0].tolist() == [Reason.NEW | Reason.BOOSTED, 0]


@pytest.mark.parametrize(
    ("signal", "reason"),
    [
        (Signal.MATCHES_QUERY, Reason.MATCHES_QUERY),
        (Signal.SEEN_ITEM, Reason.SEEN_BEFORE),
        (Signal.SEEN_PRODUCT, Reason.SEEN_BEFORE),
        (Signal.SEEN_BRAND, Reason.BRAND_YOU_CHOSE),
        (Signal.SEEN_CATEGORY, Reason.CATEGORY_YOU_BROWSE),
        (Signal.NEW_ITEM, Reason.NEW),
        (Signal.POPULAR, Reason.POPULAR),
    ],
)
def test_signals_become_reasons(signal, reason):
    assert run([1.0], signals=[signal]).reasons.tolist() == [[reason]]


@given(st.data())
def test_a_mixed_batch_is_what_each_request_alone_would_be(data):
    seed = data.draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    batch, n = int(rng.integers(1, 5)), int(rng.integers(1, 30))
    top_k = int(rng.integers(1, 40))
    scores = rng.integers(0, 5, (batch, n, 2)).astype(np.float32)
    signals = rng.integers(0, 512, (batch, n)).astype(np.int32)
    valid = rng.random((batch, n)) < 0.8
    products = rng.integers(0, 8, (batch, n)).astype(np.int32)
    policy = rng.integers(0, len(POLICIES), batch)
    together = rerank(scores, signals, valid, products, policy, TABLE, top_k)
    for b in range(batch):
        chosen = list(POLICIES.values())[policy[b]]
        weights = [chosen.task_weights.get(task, 0.0) for task in TASKS]
        final = [
            float(scores[b, i] @ weights)
            + sum(boost for name, boost in chosen.boosts.items() if signals[b, i] & Signal[name])
            for i in range(n)
        ]
        expected, taken = [], set()
        for i in sorted(range(n), key=lambda i: (-final[i], i)):
            gone = signals[b, i] & Signal.UNAVAILABLE or (chosen.exclude_purchased and signals[b, i] & Signal.PURCHASED)
            if not valid[b, i] or gone or (chosen.deduplicate and products[b, i] in taken):
                continue
            taken.add(products[b, i])
            expected.append(i)
        found = together.order[b]
        assert found[found >= 0].tolist() == expected[:top_k]
        assert (together.scores[b][found < 0] == 0).all()


def test_policies_are_checked_when_they_are_read(tmp_path):
    save_policies(POLICIES, tmp_path / "p.json")
    assert load_policies(tmp_path / "p.json", TASKS) == POLICIES
    with pytest.raises(InvalidRelease, match="weighs tasks"):
        load_policies(tmp_path / "p.json", ("click",))
    save_policies({"x": Policy({}, boosts={"SHINY": 1.0})}, tmp_path / "p.json")
    with pytest.raises(InvalidRelease, match="SHINY"):
        load_policies(tmp_path / "p.json", TASKS)
    (tmp_path / "p.json").write_text("{}")
    with pytest.raises(InvalidRelease, match="no scenario"):
        load_policies(tmp_path / "p.json", TASKS)
    (tmp_path / "p.json").write_text("{")
    with pytest.raises(InvalidRelease, match="cannot be read"):
        load_policies(tmp_path / "p.json", TASKS)
