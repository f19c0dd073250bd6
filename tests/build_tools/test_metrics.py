"""Our metrics against ir-measures (which is trec_eval) and scipy, on random cases."""

from __future__ import annotations

import ir_measures
import numpy as np
import pytest
from ir_measures import RR, P, R, Success, nDCG
from scipy.stats import mannwhitneyu
from trirank_build.evaluation import metrics
from trirank_build.evaluation.bootstrap import mean_interval

SEEDS = range(5)


def case(seed, requests=30, n=25):
    rng = np.random.default_rng(seed)
    labels = rng.choice([0, 0, 0, 1, 2, 3], (requests, n)).astype(np.float32)
    valid = np.arange(n)[None, :] < rng.integers(2, n + 1, requests)[:, None]
    labels = np.where(valid, labels, 0).astype(np.float32)
    scores = rng.permuted(np.tile(np.arange(n, dtype=np.float32), (requests, 1)), axis=1)
    missed = rng.choice([0, 0, 1, 3], (requests, 2)).astype(np.float32)
    return scores, labels, valid, missed


def by_library(measure, scores, labels, valid, missed):
    qrels, run = {}, {}
    for r in range(len(scores)):
        qrels[str(r)] = {str(i): int(labels[r, i]) for i in range(labels.shape[1]) if valid[r, i]}
        qrels[str(r)] |= {f"m{i}": int(gain) for i, gain in enumerate(missed[r]) if gain}
        run[str(r)] = {str(i): float(scores[r, i]) for i in range(labels.shape[1]) if valid[r, i]}
    found = {int(m.query_id): m.value for m in ir_measures.iter_calc([measure], qrels, run)}
    return np.array([found[r] for r in range(len(scores))])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("ours", "measure"),
    [
        (lambda g, i: metrics.ndcg(g, i, 10), nDCG @ 10),
        (lambda g, i: metrics.ndcg(g, i, 3), nDCG @ 3),
        (metrics.mrr, RR),
        (lambda g, i: metrics.hit(g, i, 10), Success @ 10),
        (lambda g, i: metrics.recall(g, i, 10), R @ 10),
        (lambda g, i: metrics.precision(g, i, 10), P @ 10),
    ],
    ids=["ndcg@10", "ndcg@3", "mrr", "hit@10", "recall@10", "precision@10"],
)
def test_as_the_library_says(ours, measure, seed):
    scores, labels, valid, missed = case(seed)
    ideal = metrics.ideal_gains(labels, missed)
    found = ours(metrics.order_gains(scores, labels, valid), ideal)
    relevant = (ideal > 0).any(1)
    np.testing.assert_allclose(found[relevant], by_library(measure, scores, labels, valid, missed)[relevant], atol=1e-6)
    assert np.isnan(found[~relevant]).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_auc_is_mann_whitney(seed):
    scores, labels, valid, _ = case(seed)
    scores = np.round(scores / 4)  # ties
    for found, s, label, v in zip(metrics.auc(scores, labels, valid), scores, labels, valid, strict=True):
        good, bad = s[v & (label > 0)], s[v & (label <= 0)]
        if len(good) and len(bad):
            assert found == pytest.approx(mannwhitneyu(good, bad).statistic / len(good) / len(bad))
        else:
            assert np.isnan(found)


def test_f1_is_the_harmonic_mean():
    scores, labels, valid, missed = case(0)
    gains, ideal = metrics.order_gains(scores, labels, valid), metrics.ideal_gains(labels, missed)
    p, r = metrics.precision(gains, ideal), metrics.recall(gains, ideal)
    np.testing.assert_allclose(
        metrics.f1(gains, ideal), np.where(p + r > 0, 2 * p * r / (p + r + 1e-12), p + r), atol=1e-6
    )


def test_accuracy_at_a_threshold():
    scores = np.array([[0.9, 0.2, 0.6, 9]], np.float32)
    labels, valid = np.array([[1, 0, 0, 0]], np.float32), np.array([[True, True, True, False]])
    assert metrics.accuracy(scores, labels, valid, 0.5).tolist() == [pytest.approx(2 / 3)]


def test_ties_do_not_flatter():
    """What is equal keeps the candidates' order, whatever the labels; broken, it comes in any order."""
    labels = np.array([[0, 0, 3]], np.float32)
    gains = metrics.order_gains(np.zeros((1, 3), np.float32), labels, np.ones((1, 3), bool))
    assert gains.tolist() == labels.tolist()
    scores = np.array([[1.0, 5.0, 1.0, 1.0]] * 3_000, np.float32)
    broken = metrics.ties_broken(scores)
    assert (broken.argmax(1) == 1).all()
    last = np.bincount(broken.argmin(1), minlength=4) / len(scores)
    assert last == pytest.approx([1 / 3, 0, 1 / 3, 1 / 3], abs=0.04)
    assert np.array_equal(broken, metrics.ties_broken(scores))


def test_what_retrieval_missed_counts_against_the_ranking():
    labels = np.array([[1, 0]], np.float32)
    gains = metrics.order_gains(np.array([[2, 1]], np.float32), labels, np.ones((1, 2), bool))
    assert metrics.ndcg(gains, metrics.ideal_gains(labels, np.zeros((1, 0), np.float32)))[0] == 1
    assert metrics.ndcg(gains, metrics.ideal_gains(labels, np.array([[3.0]], np.float32)))[0] < 0.5


def test_the_interval_holds_the_mean_and_narrows_with_more():
    rng = np.random.default_rng(0)
    few, many = mean_interval(rng.normal(1, 1, 50)), mean_interval(rng.normal(1, 1, 5000))
    for interval in (few, many):
        assert interval.low < interval.value < interval.high
    assert many.high - many.low < (few.high - few.low) / 5


def test_the_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(1)
    intervals = [mean_interval(rng.normal(0, 1, 100), seed) for seed in range(100)]
    assert 85 <= sum(interval.low <= 0 <= interval.high for interval in intervals) <= 100


def test_requests_without_anything_relevant_take_no_part():
    assert mean_interval(np.array([1.0, np.nan, 1.0])).value == 1
    assert np.isnan(mean_interval(np.array([np.nan])).value)
