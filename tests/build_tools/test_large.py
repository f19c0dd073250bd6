"""Catalogues and logs of a size at which an array of everything, or a number too small for it, is a fault."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import torch
from scipy import sparse
from trirank_backend.text import title_trigrams
from trirank_build.data.dataset import Dataset
from trirank_build.errors import BadData
from trirank_build.features.examples import HistoryIndex
from trirank_build.features.transitions import count_transitions, largest
from trirank_build.retrieval import item_knn, scores, tasks
from trirank_build.retrieval.cascade import retrieve
from trirank_build.retrieval.item_knn import ItemKnn
from trirank_build.retrieval.scores import Factors, Listed, Products, Whole, count_above, own_scores
from trirank_build.retrieval.tasks import CatalogueTasks, sample_negatives

NOW = 1_700_000_000


@pytest.fixture(scope="module")
def dataset(world):
    return Dataset.load(world.data)


class TestHistories:
    def events(self, trained, users, times):
        item = trained.features.catalogue.ids[0]
        return pl.DataFrame(
            {"user_id": users, "item_id": [item] * len(users), "behaviour": [1] * len(users), "timestamp": times},
            schema_overrides={"behaviour": pl.Int8},
        )

    def test_the_users_beyond_eight_million_keep_their_own_events(self, trained):
        """Numbers of users times 2^40 wrapped from the 8,388,608th on: its events were those of the first user."""
        users = np.arange(8_388_610)
        index = HistoryIndex(self.events(trained, users, NOW + users % 1_000), trained.features)
        for user in (0, 8_388_607, 8_388_608, 8_388_609):
            first, end = index.span(np.array([user]), np.array([NOW + 10_000]))
            assert (first[0], end[0]) == (user, user + 1)

    def test_of_what_came_before_and_nothing_later(self, trained, rng):
        users, times = rng.integers(50, size=2_000), NOW + rng.integers(100, size=2_000)
        index = HistoryIndex(self.events(trained, users, times), trained.features)
        for user, moment in zip(rng.integers(-2, 53, 300), NOW + rng.integers(-20, 130, 300), strict=True):
            first, end = index.span(np.array([user]), np.array([moment]))
            assert end[0] - first[0] == ((users == user) & (times < moment)).sum()
        for moment in (-(2**62), 0, 2**62):  # what no event has, and no clock
            first, end = index.span(np.array([7]), np.array([moment]))
            assert end[0] - first[0] == (0 if moment <= 0 else (users == 7).sum())

    def test_times_of_no_unit_are_told(self, trained):
        with pytest.raises(BadData, match="3 users with events over 9,000,000,000,000,000,002 seconds .* unit"):
            HistoryIndex(self.events(trained, [1, 2, 3], [0, 5, 9 * 10**18]), trained.features)


class Sources:
    """Every kind of scores beside the array of all that it stands for."""

    def __init__(self, rng, requests=5, items=2_300):
        found = sparse.random(requests, items, 0.03, format="csr", random_state=1, dtype=np.float32)
        prior = rng.random(items).astype(np.float32) / 1000
        tastes = sparse.random(requests, 40, 0.2, format="csr", random_state=2, dtype=np.float32)
        attributes = sparse.random(items, 40, 0.1, format="csr", random_state=3, dtype=np.float32)
        states, vectors = torch.from_numpy(rng.random((requests, 8), np.float32)), torch.rand(items, 8)
        favourites = np.argsort(-prior, kind="stable")
        self.every = {
            "whole": (Whole(prior + found.toarray()), prior + found.toarray()),
            "listed": (Listed(found, prior, favourites), found.toarray() + prior),
            "bare list": (Listed(found), found.toarray()),
            "factors": (Factors(tastes, attributes), (tastes @ attributes.T).toarray()),
            "products": (Products(states, vectors, torch.from_numpy(prior)), (states @ vectors.T).numpy() + prior),
        }


@pytest.mark.parametrize("name", ["whole", "listed", "bare list", "factors", "products"])
@pytest.mark.parametrize("block", [100, 5_000])
class TestScores:
    def test_parts_are_those_of_the_array(self, name, block, rng, monkeypatch):
        monkeypatch.setattr(scores, "BLOCK", block)
        asked, every = Sources(rng).every[name]
        together = np.concatenate([part for _, part in asked.blocks()], 1)
        np.testing.assert_allclose(together, every, atol=1e-6)
        rows = rng.integers(every.shape[1], size=(len(every), 30))
        np.testing.assert_allclose(asked.of(rows), np.take_along_axis(every, rows, 1), atol=1e-6)

    def test_the_best_ones_without_what_is_banned(self, name, block, rng, monkeypatch):
        monkeypatch.setattr(scores, "BLOCK", block)
        asked, every = Sources(rng).every[name]
        best = np.argsort(-every, axis=1)[:, :7]
        place = np.repeat(np.arange(len(every)), 7)
        order = rng.permutation(len(place))
        banned = place[order], best.ravel()[order].astype(np.int32)
        left = every.copy()
        left[banned] = -np.inf
        rows, values = asked.top(20, banned)
        np.testing.assert_allclose(values, -np.sort(-left, axis=1)[:, :20], atol=1e-6)
        np.testing.assert_allclose(np.take_along_axis(left, rows, 1), values, atol=1e-6)
        own = own_scores(asked, np.argsort(left, axis=1)[:, -5])
        above, equal = count_above(asked, own, banned)
        assert above.tolist() == [4] * len(every)
        assert equal.tolist() == [1] * len(every)


def test_a_list_that_ends_says_so():
    found = sparse.csr_matrix(np.array([[0, 3, 0, 1.0]], np.float32))
    rows, values = Listed(found).top(3)
    assert rows[0, :2].tolist() == [1, 3]
    assert values[0].tolist() == [3, 1, -np.inf]


class TestItemKnn:
    def pairs(self, rng, users=300, items=400):
        count = 6_000
        return rng.integers(users, size=count), rng.integers(items, size=count), users, items

    def test_it_is_the_cosine_of_the_users(self, rng):
        users, rows, n_users, n_items = self.pairs(rng)
        chosen = np.zeros((n_users, n_items))
        chosen[users, rows] = 1
        length = np.maximum(np.sqrt(chosen.sum(0)), 1e-9)
        similarity = (chosen.T @ chosen) / length / length[:, None]
        np.fill_diagonal(similarity, 0)
        similarity[similarity < -np.sort(-similarity, axis=1)[:, 199:200]] = 0
        found = ItemKnn(users, rows, n_users, n_items).scores(np.arange(n_items, dtype=np.int32)[:, None])
        assert (np.abs(found - similarity) > 1e-5).mean() < 0.01  # where the 200th and the next are equal

    @pytest.mark.parametrize("exclude", [True, False])
    def test_as_a_list_it_finds_the_same(self, rng, monkeypatch, exclude):
        knn = ItemKnn(*self.pairs(rng))
        histories = np.sort(rng.integers(-1, 400, size=(20, 10)), axis=1).astype(np.int32)
        ((_, whole),) = knn.retrieve(histories, 50, exclude)
        monkeypatch.setattr(scores, "BLOCK", 100)
        ((rows, listed),) = knn.retrieve(histories, 50, exclude)
        np.testing.assert_allclose(listed, whole, atol=1e-6)
        assert all(len(set(line)) == 50 for line in rows.tolist())

    def test_fewer_neighbours_where_the_table_would_grow(self, rng, monkeypatch):
        monkeypatch.setattr(item_knn, "ENTRIES", 400 * 7)
        assert np.diff(ItemKnn(*self.pairs(rng))._similarity.indptr).max() == 7

    def test_of_a_long_history_the_newest_count(self, monkeypatch):
        monkeypatch.setattr(item_knn, "LONGEST", (6, 3, 1))
        monkeypatch.setattr(item_knn, "MOST_PAIRS", 20)
        users, rows = np.array([0, 1, 0, 0, 0, 1, 0]), np.array([0, 0, 1, 2, 3, 1, 4])
        kept = item_knn._newest(users, rows)
        assert [line.tolist() for line in kept] == [[0, 0, 0, 1, 1], [2, 3, 4, 0, 1]]


class TestNegatives:
    def tasks(self, trained, dataset):
        return CatalogueTasks.of(dataset, "valid", trained.features)

    def test_of_many_items(self, trained, dataset, monkeypatch, rng):
        found = self.tasks(trained, dataset)
        few = [at for at in range(len(found)) if len(set(found.seen(np.array([at]))[1].tolist())) < 60]
        which, count = np.array(few[:40]), 80
        monkeypatch.setattr(tasks, "BLOCK", 10)
        draws = sample_negatives(found, which, count, rng)
        place, rows = found.seen(which)
        for at, line in enumerate(draws.tolist()):
            assert len(set(line)) == count
            assert not set(line) & {*rows[place == at].tolist(), int(found.targets[which[at]])}
        assert len(which) > 10
        assert len(np.unique(draws)) > count

    def test_more_than_there_are(self, trained, dataset, monkeypatch, rng):
        found = self.tasks(trained, dataset)
        monkeypatch.setattr(tasks, "BLOCK", 10)
        with pytest.raises(
            BadData, match=r"items that a user never met are to be drawn of .*; draw half of the others"
        ):
            sample_negatives(found, np.arange(5), found.items, rng)


def test_candidates_are_the_same_in_blocks(trained, dataset, monkeypatch):
    found = CatalogueTasks.of(dataset, "valid", trained.features, 60)
    whole = retrieve(found, dataset, trained.features, trained.model(), 10)
    monkeypatch.setattr(scores, "BLOCK", 64)
    monkeypatch.setattr(tasks, "BLOCK", 64)
    blocks = retrieve(found, dataset, trained.features, trained.model(), 10)
    same = [set(a[a >= 0]) == set(b[b >= 0]) for a, b in zip(whole.rows, blocks.rows, strict=True)]
    assert np.mean(same) > 0.95  # items of equal score may change places
    np.testing.assert_allclose(np.nan_to_num(whole.scores), np.nan_to_num(blocks.scores), atol=1e-5)


def test_transitions_are_the_same_in_ranges(rng, monkeypatch):
    users, rows = np.sort(rng.integers(40, size=900)), rng.integers(60, size=900).astype(np.int32)
    whole = count_transitions(users, rows, 60)
    monkeypatch.setattr("trirank_build.features.transitions._EVENTS", 100)
    ranges = count_transitions(users, rows, 60)
    for name in ("starts", "rows", "weights"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(ranges, name))


def test_trigrams_of_titles_are_those_of_their_words():
    titles = ["Red chair 20x30", "", "Stühle, rot; STÜHLE", "椅子 x"]
    found = title_trigrams(titles)
    assert found.shape == (4, 64)
    assert not found[1].any()
    both = title_trigrams(["Red", "chair 20x30"])
    np.testing.assert_array_equal(found[0], both[0] | both[1])


def test_the_largest_of_each_row_are_kept(rng):
    dense = np.where(rng.random((30, 50)) < 0.4, rng.integers(1, 9, (30, 50)), 0).astype(np.float32)
    dense[3] = 0
    found = largest(sparse.csr_matrix(dense), 7)
    for row, kept in zip(dense, found.toarray(), strict=True):
        best = sorted(np.flatnonzero(row), key=lambda at: (-row[at], at))[:7]  # of equal ones the first
        assert np.flatnonzero(kept).tolist() == sorted(best)
        assert (kept[best] == row[best]).all()
