"""The rules of the last step, against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trirank import contract
from trirank.contract import Reason, Signal, Status
from trirank_backend.catalogue import Catalogue
from trirank_backend.errors import BrokenScores, InvalidInput, InvalidRelease
from trirank_backend.handover import Handover
from trirank_backend.policies import Policy, load_policies, save_policies
from trirank_backend.rerank import Rerank

TASKS = ("click", "purchase")
POLICIES = {
    "plain": Policy({"click": 1.0}, deduplicate=False),
    "unique": Policy({"click": 1.0, "purchase": 2.0}),
    "fresh": Policy({"click": 1.0}, deduplicate=False, exclude_purchased=True, boosts={"NEW_ITEM": 3.0}),
}


def reranker(products):
    """Of items 100, 101, … whose row is their place."""
    count = len(products)
    catalogue = Catalogue(
        ids=np.arange(100, 100 + count), fields=np.zeros((count + 1, 4), np.int32),
        dense=np.zeros((count + 1, 2), np.float32), products=np.array([*products, -1], np.int32),
        created_at=np.zeros(count + 1, np.int64), signals=np.zeros(count + 1, np.int32),
        titles=np.zeros((count + 1, 0), np.int32), trigrams=np.zeros((count + 1, 0), np.uint8),
    )  # fmt: skip
    return Rerank(catalogue, POLICIES, TASKS)


def handover(rows, signals, policy, top_k, unknown=None):
    lines = len(rows)
    return Handover(
        status=np.zeros((lines, 3), np.int32),
        top_k=np.full(lines, top_k, np.int32),
        policy=np.array([list(POLICIES).index(name) for name in policy], np.int32),
        rows=np.array(rows, np.int32),
        signals=np.array(signals, np.int32),
        unknown=np.zeros((lines, 0), np.int64) if unknown is None else np.array(unknown, np.int64),
    )


class Ranked:
    """An answer of one line; ``order`` are places among the candidates."""

    def __init__(self, answer):
        ids = answer["RANKED_IDS"][0]
        self.order = np.where(ids < 0, -1, ids - 100).tolist()
        self.scores, self.reasons = answer["SCORES"][0].tolist(), answer["REASONS"][0].tolist()
        self.filtered, self.status = int(answer["STATUS"][0, 3]), Status(int(answer["STATUS"][0, 0]))


def run(scores, signals=None, valid=None, products=None, policy="plain", top_k=None):
    scores = np.asarray(scores, np.float32)
    if scores.ndim == 1:
        scores = np.stack([scores, np.zeros_like(scores)], 1)
    n = len(scores)
    rows = np.where(np.ones(n, bool) if valid is None else valid, np.arange(n), -1)
    given = handover([rows], [[0] * n if signals is None else signals], [policy], top_k or n)
    return Ranked(reranker(range(n) if products is None else products)(scores[None], given))


def test_best_first():
    assert run([0.1, 0.9, 0.5]).order == [1, 2, 0]


def test_equal_scores_keep_the_order_they_came_in():
    assert run([1.0, 1.0, 1.0]).order == [0, 1, 2]


def test_cut_to_top_k():
    assert run([0.1, 0.9, 0.5], top_k=2).order == [1, 2]


def test_tasks_are_weighed():
    assert run([[1.0, 0.0], [0.0, 1.0]], policy="unique").order == [1, 0]
    assert run([[1.0, 0.0], [0.0, 1.0]], policy="plain").order == [0, 1]


def test_only_the_best_variant_stays():
    ranked = run([0.1, 0.9, 0.5, 0.7], products=[4, 4, 5, 4], policy="unique")
    assert ranked.order == [1, 2, -1, -1]
    assert ranked.filtered == 0


def test_invalid_ones_never_come_back():
    assert run([9.0, 0.9, 8.0], valid=[False, True, False]).order == [1, -1, -1]


def test_unavailable_items_are_dropped_everywhere():
    ranked = run([0.9, 0.5], signals=[Signal.UNAVAILABLE, 0])
    assert ranked.order == [1, -1]
    assert ranked.filtered == 1


def test_purchased_items_are_dropped_where_the_policy_says_so():
    assert run([0.9, 0.5], signals=[Signal.PURCHASED, 0], policy="fresh").order == [1, -1]
    assert run([0.9, 0.5], signals=[Signal.PURCHASED, 0], policy="plain").order == [0, 1]


def test_a_boost_lifts_and_is_told():
    ranked = run([0.9, 0.5], signals=[0, Signal.NEW_ITEM], policy="fresh")
    assert ranked.order == [1, 0]
    assert ranked.scores == pytest.approx([3.5, 0.9])
    assert ranked.reasons == [Reason.NEW | Reason.BOOSTED, 0]


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
    assert run([1.0], signals=[signal]).reasons == [reason]


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_the_kernel_does_what_plain_loops_do(seed):
    rng = np.random.default_rng(seed)
    lines, n = int(rng.integers(1, 5)), int(rng.integers(1, 30))
    top_k = int(rng.integers(1, 40))
    scores = rng.integers(0, 5, (lines, n, 2)).astype(np.float32)
    signals = rng.integers(0, 512, (lines, n)).astype(np.int32)
    rows = np.where(rng.random((lines, n)) < 0.8, rng.permuted(np.tile(np.arange(n), (lines, 1)), axis=1), -1)
    products = rng.integers(-1, 8, n).astype(np.int32)
    policy = rng.choice(list(POLICIES), lines)
    answer = reranker(products)(scores, handover(rows, signals, policy, top_k))
    for b in range(lines):
        chosen = POLICIES[policy[b]]
        weights = [chosen.task_weights.get(task, 0.0) for task in TASKS]
        final = [
            float(scores[b, i] @ weights)
            + sum(boost for name, boost in chosen.boosts.items() if signals[b, i] & Signal[name])
            for i in range(n)
        ]
        expected, taken, dropped = [], set(), 0
        for i in sorted(range(n), key=lambda i: (-final[i], i)):
            gone = signals[b, i] & Signal.UNAVAILABLE or (chosen.exclude_purchased and signals[b, i] & Signal.PURCHASED)
            dropped += bool(gone and rows[b, i] >= 0)
            product = products[rows[b, i]]
            if rows[b, i] < 0 or gone or (chosen.deduplicate and product in taken):
                continue
            if product >= 0:
                taken.add(product)
            expected.append(i)
        expected = expected[:top_k]
        padding = top_k - len(expected)
        assert answer["RANKED_IDS"][b].tolist() == [100 + rows[b, i] for i in expected] + [-1] * padding
        assert answer["SCORES"][b].tolist() == pytest.approx([final[i] for i in expected] + [0] * padding)
        boosted = sum(Signal[name] for name, boost in chosen.boosts.items())
        fired = [bool(signals[b, i] & boosted) for i in expected]
        assert [bool(r & Reason.BOOSTED) for r in answer["REASONS"][b].tolist()] == fired + [False] * padding
        assert answer["STATUS"][b, 3] == dropped
        fewer = Status.FEWER_THAN_TOP_K in Status(int(answer["STATUS"][b, 0]))
        assert fewer == (padding > 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_no_number_is_refused_and_named(bad):
    with pytest.raises(BrokenScores, match=r"item 101 the scores \[.*\], which are no finite numbers"):
        run([0.5, bad, 0.1])
    assert run([0.5, bad, 0.1], valid=[True, False, True]).order == [0, 2, -1]  # of nobody who could be shown


HOSTILE = {
    "a row beyond the catalogue": (lambda t: t.__setitem__((0, 6), 3), "holds row 3; it goes from -1 to 2"),
    "a row below": (lambda t: t.__setitem__((0, 6), -2), "holds row -2"),
    "signals that there are not": (lambda t: t.__setitem__((0, 9), 512), "holds signals 512; it goes from 0 to 511"),
    "negative signals": (lambda t: t.__setitem__((0, 9), -1), "holds signals -1"),
    "top_k 0": (lambda t: t.__setitem__((0, 3), 0), "holds a top_k of 0; it goes from 1 to 1024"),
    "top_k huge": (lambda t: t.__setitem__((0, 3), 2**31 - 1), "holds a top_k of 2147483647"),
    "a count beyond": (lambda t: t.__setitem__((0, 5), 2), r"handover says \[1, 1, 2\]"),
    "a negative count": (lambda t: t.__setitem__((0, 5), -1), "holds a count of unknown items of -1"),
    "a policy that there is not": (lambda t: t.__setitem__((0, 4), 3), "holds policy 3; it goes from 0 to 2"),
}


@pytest.mark.parametrize(("harm", "words"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_handover_from_anybody_is_checked(harm, words):
    tensor = handover([[0, 1, 2]], [[0, 0, 0]], ["plain"], 2).tensor()
    scores = np.zeros((1, 3, 2), np.float32)
    good = reranker(range(3)).tensors({"scores": scores, contract.HANDOVER.name: tensor})
    assert good["RANKED_IDS"].tolist() == [[100, 101]]
    harm(tensor)
    with pytest.raises(InvalidInput, match=words):
        reranker(range(3)).tensors({"scores": scores, contract.HANDOVER.name: tensor})


@pytest.mark.parametrize("length", [0, 4, 5, 6, 7, 9, 6 + 2 * 1025])
def test_a_handover_of_another_length(length):
    with pytest.raises(InvalidInput, match=f"has {length} numbers; it has 6, two a candidate"):
        Handover.read(np.zeros((1, length), np.int32), 3, 1)


@pytest.mark.parametrize(("top_k", "shown"), [(1, [101]), (3, [101, 100, 900]), (5, [101, 100, 900, 2**62, -1])])
def test_unknown_candidates_that_are_kept_come_last(top_k, shown):
    """Over the boundary of two processes, too."""
    told = handover([[0, 1, -1]], [[0, 0, 0]], ["plain"], top_k, [[900, 2**62]])
    scores = np.array([[[0.1, 0.1], [0.9, 0.9], [0, 0]]], np.float32)
    rerank = reranker(range(3))
    for answer in (rerank(scores, told), rerank.tensors({"scores": scores, contract.HANDOVER.name: told.tensor()})):
        assert answer["RANKED_IDS"].tolist() == [shown]
        assert answer["REASONS"][0, 2:4].tolist() == [Reason.NOT_IN_CATALOGUE] * min(2, max(0, top_k - 2))
        assert (np.diff(answer["SCORES"][0, : min(top_k, 4)]) <= 0).all()
        assert (Status.FEWER_THAN_TOP_K in Status(int(answer["STATUS"][0, 0]))) == (top_k == 5)


@pytest.mark.parametrize("shape", [(1, 2, 2), (1, 3, 1), (2, 3, 2), (1, 3)])
def test_scores_of_another_shape(shape):
    tensor = handover([[0, 1, 2]], [[0, 0, 0]], ["plain"], 2).tensor()
    with pytest.raises(InvalidInput, match="handover says"):
        reranker(range(3)).tensors({"scores": np.zeros(shape, np.float32), contract.HANDOVER.name: tensor})


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
