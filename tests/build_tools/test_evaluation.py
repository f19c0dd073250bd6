"""Evaluation under three protocols: what is compared, in which slices, and what is reported."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from scipy import stats
from torch import nn
from trirank_backend.features import Packer
from trirank_build.baselines.content import Content
from trirank_build.baselines.matrix_factorisation import MatrixFactorisation
from trirank_build.data.dataset import Dataset
from trirank_build.errors import BadData
from trirank_build.evaluation import metrics
from trirank_build.evaluation.bootstrap import mean_interval, ratio_interval
from trirank_build.evaluation.catalogue import rank_catalogue
from trirank_build.evaluation.contenders import Popularity, contenders, lambdamart, order_candidates
from trirank_build.evaluation.evaluate import evaluate, evaluate_catalogue
from trirank_build.evaluation.report import verdict, write_report
from trirank_build.evaluation.scoring import retrieval_ndcg, valid_ndcg
from trirank_build.features.examples import Examples
from trirank_build.features.fitting import Features, fit_features
from trirank_build.preparation.options import PrepareOptions
from trirank_build.preparation.prepare import prepare
from trirank_build.recipe import FeatureRecipe
from trirank_build.retrieval.item_knn import ItemKnn
from trirank_build.retrieval.scores import Whole
from trirank_build.retrieval.tasks import CatalogueTasks, contender_scorer


@pytest.fixture(scope="module")
def dataset(world):
    return Dataset.load(world.data)


@pytest.fixture(scope="module")
def examples(dataset, trained):
    return Examples.read(dataset, "test", trained.features)


@pytest.fixture(scope="module")
def found(dataset, trained, examples):
    return evaluate(trained.model(), examples, dataset, trained.features)


# Requests with their candidates.


def test_every_order_has_every_metric(found):
    orders = {"ranker", "retrieval", "popularity", "item_knn", "matrix_factorisation", "content", "random", "optimum"}
    assert set(found.table) == orders
    names = {"NDCG@10", "MRR", "Hit@10", "recall@10", "precision@10", "F1@10", "AUC", "diversity@10", "novelty@10",
             "coverage@10"}  # fmt: skip
    assert all(set(row) >= names for row in found.table.values())
    assert "accuracy" in found.table["ranker"]


def test_the_optimum_is_above_all_and_not_compared_with(found):
    values = {name: row["NDCG@10"].value for name, row in found.table.items()}
    assert max(values, key=values.get) == "optimum"
    assert "optimum" not in found.differences


def test_differences_are_paired(found):
    for name, difference in found.differences.items():
        values = found.ndcg10["ranker"] - found.ndcg10[name]
        values = values[~np.isnan(values)]
        assert difference.value == pytest.approx(values.mean())
        assert difference.p_value == pytest.approx(stats.ttest_rel(
            found.ndcg10["ranker"], found.ndcg10[name], nan_policy="omit").pvalue)  # fmt: skip
        if difference.p_value < 0.01 or difference.p_value > 0.2:  # near 0.05 the two may disagree
            assert (difference.low > 0 or difference.high < 0) == (difference.p_value < 0.01)


def test_slices_by_user_part_the_requests(found):
    parts = [count for name, (count, _) in found.slices.items() if "users" in name]
    assert sum(parts) == found.requests
    assert "new users" in found.slices


def test_slices_by_item_are_what_they_say(found, examples, dataset, trained):
    counts = dataset.training_choices()
    counts = np.bincount(
        np.searchsorted(trained.features.catalogue.ids, counts), minlength=len(trained.features.catalogue)
    )
    best = examples.rows[np.arange(len(examples)), examples.labels.argmax(1)]
    new = (examples.labels.max(1) > 0) & (counts[best] == 0)
    assert found.slices.get("new items", (0,))[0] == new.sum()
    wanted = (examples.labels.max(1) > 0).sum()
    assert sum(found.slices[n][0] for n in ("new items", "tail items", "head items") if n in found.slices) == wanted


def test_shares_are_calibrated_when_they_are_true():
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.ones(20), 5000).astype(np.float32)
    picked = np.array([rng.multinomial(1, row / row.sum()) for row in shares.astype(np.float64)], np.float32)
    good = metrics.calibration_error(metrics.calibration(shares, picked, np.ones(shares.shape, bool)))
    bad = metrics.calibration_error(metrics.calibration(shares**3, picked, np.ones(shares.shape, bool)))
    assert good < 0.005 < bad


def test_calibration_of_the_ranker_is_reported(found):
    assert found.calibration.shape == (10, 3)
    assert 0 <= found.to_json()["calibration_error"] < 0.1


def test_equal_scores_do_not_fall_back_on_retrieval(examples, dataset, trained):
    """A contender that knows nothing is worth what chance is, not what the candidates' order is."""
    nothing = Popularity(np.zeros(len(trained.features.catalogue), int))
    found = evaluate(trained.model(), examples, dataset, trained.features, others={"nothing": nothing})
    assert share_equal(found, "nothing", "retrieval") < 0.5


def test_a_ranker_that_says_the_same_of_all_is_worth_what_chance_is(examples, dataset, trained):
    class Same(nn.Linear):
        def forward(self, candidates, **_):
            return torch.zeros(*candidates.shape[:2], 1)

    found = evaluate(Same(1, 1), examples, dataset, trained.features, others={})
    assert share_equal(found, "ranker", "retrieval") < 0.5
    assert found.table["ranker"]["AUC"].value == 0.5
    assert verdict(found).startswith("The ranker's order is ")
    assert "better than retrieval" not in verdict(found)
    assert valid_ndcg(Same(1, 1), examples) != pytest.approx(retrieval_ndcg(examples))


def share_equal(found, one, other):
    """Of requests on which two orders are worth exactly the same, as they would be if they were the same."""
    mine, others = found.ndcg10[one], found.ndcg10[other]
    return np.mean(mine[~np.isnan(mine)] == others[~np.isnan(others)])


def test_lambdamart_learns_the_shop(dataset, trained, examples, found):
    parts = [Examples.read(dataset, split, trained.features) for split in ("train", "valid")]
    scores = lambdamart(*parts, examples)
    valid = examples.rows >= 0
    ndcg = metrics.ndcg(
        metrics.order_gains(scores, examples.labels, valid), metrics.ideal_gains(examples.labels, examples.missed)
    )
    assert np.nanmean(ndcg) > found.table["retrieval"]["NDCG@10"].value


def test_new_items_are_ranked_by_their_content(dataset, trained):
    """Items whose ids training never saw still rank above chance: what is chosen is told by price, brand and words."""
    seen = set(dataset.training_choices().tolist())
    new = [item not in seen for item in dataset.items["item_id"]]
    assert any(new)
    packer = trained.features.packer
    assert not packer.catalogue.fields[:-1][np.array(new), packer.spec.item_fields.index("item")].any()
    # All candidates without their ids: the whole catalogue as if it were new.
    blind = Packer(replace(packer.spec, without=("item",)), packer.catalogue, packer.token_idf)
    examples = Examples.read(dataset, "test", Features(blind, trained.features.text))
    assert not examples.whole(np.arange(5)).packed.candidates[..., 0].any()
    found = evaluate(trained.model(), examples, dataset, trained.features, others={})
    assert found.differences["random"].low > 0


# The whole catalogue.


def test_the_catalogue_protocol(dataset, trained):
    found = evaluate_catalogue(trained.model(), dataset, trained.features, "test")
    assert {"ranker", "ranker's states alone", "popularity", "item_knn"} <= set(found.table)
    values = {name: row["NDCG@10"].value for name, row in found.table.items()}
    assert all(0 <= value <= 1 for value in values.values())
    assert found.table["popularity"]["coverage@10"].value < found.table["item_knn"]["coverage@10"].value


def test_a_perfect_and_a_blind_contender(dataset, trained):
    tasks = CatalogueTasks.of(dataset, "test", trained.features, limit=200)

    def knows(tasks, which):
        scores = np.zeros((len(which), tasks.items), np.float32)
        scores[np.arange(len(which)), tasks.targets[which]] = 1
        return Whole(scores)

    assert (rank_catalogue(tasks, knows).ranks == 0).all()
    blind = rank_catalogue(tasks, lambda tasks, which: Whole(np.zeros((len(which), tasks.items), np.float32)))
    assert blind.ranks.mean() == pytest.approx((tasks.items - 1) / 2)


def test_what_a_user_had_is_left_out_where_nothing_is_bought_twice(tmp_path):
    rng = np.random.default_rng(0)
    lines = [f"{u} " + " ".join(map(str, 1 + rng.permutation(30)[:8])) for u in range(1, 60)]
    (tmp_path / "s.txt").write_text("\n".join(lines))
    dataset = Dataset.load(prepare(str(tmp_path / "s.txt"), PrepareOptions()).save(tmp_path / "data"))
    (tmp_path / "features").mkdir()
    features = fit_features(dataset, FeatureRecipe(), tmp_path / "features")
    tasks = CatalogueTasks.of(dataset, "test", features)
    found = rank_catalogue(tasks, contender_scorer(Popularity(np.ones(30))))
    place, rows = tasks.seen(np.arange(len(tasks)))
    assert not any(row in found.top[at] for at, row in zip(place, rows, strict=True))
    assert found.ranks.max() <= 30 - 7


def test_no_history_at_all_is_told(dataset, trained):
    empty = Dataset(dataset.items, dataset.events.clear(), dataset.requests, dataset.description)
    with pytest.raises(BadData, match="evaluate its requests instead"):
        evaluate_catalogue(trained.model(), empty, trained.features, "test")


# Baselines.


def pairs():
    """Users 0 to 9 choose among items 0 to 4, users 10 to 19 among 5 to 9."""
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(20), 4)
    rows = np.concatenate([rng.permutation(5)[:4] + (5 if user >= 10 else 0) for user in range(20)])
    return users, rows, 20, 10


@pytest.mark.parametrize("kind", [ItemKnn, MatrixFactorisation])
def test_collaborative_filtering_finds_the_crowd(kind):
    scores = kind(*pairs()).scores(np.array([[-1, 0, 1], [-1, 5, 6]], np.int32))
    assert scores.shape == (2, 10)
    assert scores[0, 2:5].mean() > scores[0, 5:].max()
    assert scores[1, 7:].mean() > scores[1, :5].max()


@pytest.mark.parametrize("kind", [ItemKnn, MatrixFactorisation])
def test_no_history_gives_numbers_all_the_same(kind):
    assert np.isfinite(kind(*pairs()).scores(np.full((2, 3), -1, np.int32))).all()


def test_content_goes_by_words_or_by_the_query():
    items = pl.DataFrame({
        "title": ["red lamp", "blue lamp", "red chair"],
        "brand": ["", "", "Oak"], "category": ["light", "light", "seat"],
        "attributes": [[], [], ["wood"]],
    }, schema_overrides={"attributes": pl.List(pl.String)})  # fmt: skip
    content = Content(items)
    history = np.array([[-1, 0]], np.int32)
    assert content.scores(history)[0].argsort()[::-1].tolist()[:2] == [0, 1]
    assert content.scores(history, ["chair"])[0].argmax() == 2


def test_contenders_score_candidates_in_their_places(dataset, trained, examples):
    found = contenders(dataset, trained.features)["popularity"]
    scores = order_candidates(found, examples)
    counts = found.scores(np.zeros((1, 1), np.int32))[0]
    assert scores[0, 3] == counts[examples.rows[0, 3]]


# Numbers about lists.


def test_coverage_diversity_and_novelty_by_hand():
    fields = np.array([[1, 5], [1, 6], [2, 7], [0, 0]])
    top = np.array([[0, 1], [0, 2], [2, -1]], np.int32)
    assert metrics.coverage(top, 4) == 3 / 4
    np.testing.assert_allclose(metrics.diversity(top, fields), [0.5, 1, np.nan])
    novelty = metrics.novelty(top, np.array([3, 1, 0]))
    np.testing.assert_allclose(novelty, [(1 + np.log2(7 / 2)) / 2 + (np.log2(7 / 4) - 1) / 2,
                                         (np.log2(7 / 4) + np.log2(7)) / 2, np.log2(7)])  # fmt: skip


def test_the_ratio_of_a_ranking_to_itself_is_one():
    values = np.array([0.2, np.nan, 0.9, 0.5])
    assert tuple(ratio_interval(values, values)) == (1, 1, 1)
    half = ratio_interval(values / 2, values)
    assert tuple(half) == pytest.approx((0.5, 0.5, 0.5))
    assert mean_interval(values).value == pytest.approx(np.nanmean(values))


# What people read.


def test_the_report_is_one_file_that_loads_nothing(found, trained, tmp_path):
    write_report(found, "tiny <shop>", trained.facts["curve"], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 3
    assert "tiny &lt;shop&gt;" in page
    assert not re.search(r'(src|href)="(?!#)', page.replace("xlink:href", ""))
    assert all(name in page for name in [*found.table, *found.slices, "calibration error"])
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_json_is_plain(found):
    text = json.loads(json.dumps(found.to_json()))
    assert set(text) == {"protocol", "requests", "table", "ndcg10_above", "slices", "calibration_error"}
