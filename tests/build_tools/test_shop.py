"""The synthetic shop is what its documentation says."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from trirank.contract import ANONYMOUS_USER
from trirank_build.data.dataset import Dataset
from trirank_build.evaluation import metrics
from trirank_build.preparation.sources.shop import ShopSize, make_shop

SIZE = ShopSize(products=60, users=30, requests=300, candidates=15)


@pytest.fixture(scope="module")
def requests(shop):
    return shop.requests.collect()


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    one = Dataset.load(make_shop(SIZE, 3).save(tmp_path / "a")).description
    two = Dataset.load(make_shop(SIZE, 3).save(tmp_path / "b")).description
    other = Dataset.load(make_shop(SIZE, 4).save(tmp_path / "c")).description
    assert one.digest == two.digest != other.digest


def test_nothing_is_offered_before_it_exists(shop, requests):
    offered = requests.select("timestamp", pl.col("item_ids").alias("item_id")).explode("item_id")
    joined = offered.join(shop.items.select("item_id", "created_at"), on="item_id")
    assert (joined["created_at"] <= joined["timestamp"]).all()


def test_the_split_is_by_time_and_leaks_nothing(shop, requests):
    for table in (requests, shop.events):
        spans = table.group_by("split").agg(pl.col("timestamp").min().alias("a"), pl.col("timestamp").max().alias("z"))
        span = {row["split"]: row for row in spans.iter_rows(named=True)}
        assert span["train"]["z"] < span["valid"]["a"]
        assert span["valid"]["z"] < span["test"]["a"]


def test_anonymous_users_leave_no_events(shop, requests):
    assert (requests["user_id"] == ANONYMOUS_USER).any()
    assert not (shop.events["user_id"] == ANONYMOUS_USER).any()


def test_searches_have_queries_and_home_pages_none(requests):
    search = requests["scenario"] == "search"
    assert (requests.filter(search)["query"] != "").all()
    assert (requests.filter(~search)["query"] == "").all()


def test_variants_share_a_product(shop):
    sizes = shop.items.group_by("product_id").agg(pl.len(), pl.col("brand").n_unique().alias("brands"))
    assert (sizes["len"] > 1).any()
    assert (sizes["brands"] == 1).all()


def test_the_optimum_is_the_best_order_there_is(requests):
    labels = np.array(requests["labels"].to_list(), np.float32)
    valid, rng = np.ones(labels.shape, bool), np.random.default_rng(0)

    def ndcg(scores):
        return float(
            np.nanmean(
                metrics.ndcg(
                    metrics.order_gains(scores, labels, valid),
                    metrics.ideal_gains(labels, np.zeros((len(labels), 0), np.float32)),
                )
            )
        )

    utility = np.array(requests["utility"].to_list(), np.float32)
    retrieval = np.array(requests["retrieval_scores"].to_list(), np.float32)
    best = ndcg(utility)
    assert best > ndcg(retrieval) > 0
    assert all(best > ndcg(utility + rng.normal(0, noise, utility.shape)) for noise in (0.5, 1, 2))
