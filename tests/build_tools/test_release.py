"""Releases are whole, named by their content, and refuse what does not belong together."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from trirank import contract
from trirank.contract import Signal
from trirank_backend.errors import InvalidRelease
from trirank_backend.pipeline import Pipeline
from trirank_backend.policies import Policy
from trirank_backend.release import load_features
from trirank_backend.rules import load_rules
from trirank_build.artefacts import file_digest, tree_digests
from trirank_build.data.dataset import Dataset
from trirank_build.engines import latency
from trirank_build.errors import BadData, BadModel
from trirank_build.features.fitting import refresh_features
from trirank_build.preparation.sources.shop import ShopSize, make_shop
from trirank_build.repository.assemble import assemble
from trirank_build.repository.release import graph_place, load_manifest, verify
from trirank_build.repository.store import in_use, promote, releases


@pytest.fixture
def dataset(world):
    return Dataset.load(world.data)


def test_the_manifest_has_the_digest_of_every_file(world):
    manifest = load_manifest(world.release)
    assert manifest["files"] == {n: d for n, d in tree_digests(world.release).items() if n != "manifest.json"}
    assert manifest["contract"] == contract.CONTRACT_VERSION
    assert manifest["release"] == world.release.name
    assert manifest["dataset"]["digest"]
    assert max(manifest["parity"]["by_bucket"].values()) <= 1e-4


def test_the_same_parts_give_the_same_release(world, trained, dataset, policies, tmp_path):
    how = {"engine": "onnxruntime", "policies": policies}
    assert assemble(trained, dataset, world.onnx, world.release.parent, **how) == world.release
    assert assemble(trained, dataset, world.onnx, tmp_path, **how).name == world.release.name
    assert [path.name for path in tmp_path.iterdir()] == [world.release.name]


def test_a_later_gate_shows_though_the_files_are_the_same(world, trained, dataset, tmp_path):
    onnx = tmp_path / "r.onnx"
    shutil.copy(world.onnx, onnx)
    shutil.copy(world.onnx.with_suffix(".parity.json"), tmp_path / "r.parity.json")
    first = assemble(trained, dataset, onnx, tmp_path / "out", engine="onnxruntime")
    assert load_manifest(first)["gate"] is None
    stage = {
        "stage": "ensemble",
        "ndcg10": {"value": 0.5, "low": 0.4, "high": 0.6},
        "ndcg_ratio": {"value": 1.0, "low": 0.9, "high": 1.1},
        "latency_ms": 1.0,
        "size_mb": 1.0,
    }
    gate = {
        "onnx": file_digest(onnx), "passed": True, "failures": [], "engine": "onnxruntime", "stages": [stage],
        "split": "test", "requests": 9, "thresholds": {}, "checks": [],
    }  # fmt: skip
    (tmp_path / "r.gate.json").write_text(json.dumps(gate))
    with in_use(first):
        assert assemble(trained, dataset, onnx, tmp_path / "out", engine="onnxruntime") == first
        assert load_manifest(first)["gate"]["passed"]
        assert verify(first) == []
        assert next(each for each in releases(first.parent)).in_use  # a server's hold outlives the new manifest


def test_two_assemblies_choose_one_engine(world, trained, dataset, tmp_path, monkeypatch):
    """Which engine is the fastest is measured, and a machine's noise may turn two that are close; the first measurement
    stays beside the graph."""
    onnx = tmp_path / "r.onnx"
    shutil.copy(world.onnx, onnx)
    shutil.copy(world.onnx.with_suffix(".parity.json"), tmp_path / "r.parity.json")
    noise = iter(["openvino", "onnxruntime"])
    monkeypatch.setattr(latency, "fastest_engine", lambda *_: (next(noise), {"openvino": 1.0, "onnxruntime": 1.0}))
    names = [assemble(trained, dataset, onnx, tmp_path / "out").name for _ in range(2)]
    assert names[0] == names[1]
    (kept,) = json.loads((tmp_path / "r.engine.json").read_text())["choices"].values()
    assert kept["engine"] == "openvino"


def test_assembling_again_mends_what_is_damaged(world, trained, dataset, tmp_path):
    made = assemble(trained, dataset, world.onnx, tmp_path, engine="onnxruntime")
    (made / "features" / "token_idf.npy").write_bytes(b"rubbish")
    assert verify(made)
    assert assemble(trained, dataset, world.onnx, tmp_path, engine="onnxruntime") == made
    assert verify(made) == []


def test_promotion_moves_one_link(world, trained, dataset, tmp_path):
    release = assemble(trained, dataset, world.onnx, tmp_path)
    link = promote(release)
    assert promote(release) == link
    assert link.resolve() == release.resolve()
    assert not link.readlink().is_absolute()


def test_a_dataset_of_another_shop(world, trained, tmp_path):
    """Though its items have the same numbers."""
    other = Dataset.load(make_shop(ShopSize(60, 30, 300, 15), 9).save(tmp_path / "data"))
    with pytest.raises(
        BadData, match=r"is no newer state of what the ranker was trained on: of its \d+ items \d+ were"
    ):
        assemble(trained, other, world.onnx, tmp_path / "out")
    assert releases(tmp_path / "out") == []


@pytest.fixture
def newer(dataset, tmp_path):
    """The next day: a price has changed, an item is sold out, one is new, and somebody has bought it."""
    first, second = dataset.items["item_id"][:2]
    items = dataset.items.with_columns(
        price=pl.when(pl.col("item_id") == first).then(999.0).otherwise("price"),
        available=pl.when(pl.col("item_id") == second).then(False).otherwise("available"),
    )
    new = items.head(1).with_columns(
        item_id=pl.lit(777_777, pl.Int64), product_id=pl.lit(777_777, pl.Int64), key=pl.lit("777777")
    )
    bought = dataset.events.tail(1).with_columns(item_id=pl.lit(777_777, pl.Int64), timestamp=pl.col("timestamp") + 60)
    changed = Dataset(
        pl.concat([items, new]).sort("item_id"), pl.concat([dataset.events, bought]), dataset.requests,
        replace(dataset.description, source="the next day"),
    )  # fmt: skip
    return Dataset.load(changed.save(tmp_path / "newer"))


def test_a_newer_dataset_refreshes_the_catalogue(world, trained, dataset, newer, tmp_path):
    made = assemble(trained, newer, world.onnx, tmp_path / "out", engine="onnxruntime")
    manifest = load_manifest(made)
    assert manifest["refreshed"]["source"] == "the next day"
    assert manifest["dataset"] == load_manifest(world.release)["dataset"]
    assert verify(made) == []
    first, second = dataset.items["item_id"][:2]
    (spec, old), (_, new) = (load_features(release / "features") for release in (world.release, made))
    row, others = new.rows(np.array([first, second, 777_777])), new.rows(old.ids[1:])
    brand = spec.item_fields.index("brand")
    assert new.fields[row[2], 0] == 0  # no number of its own: it lives by its content
    assert new.fields[row[2], brand] == new.fields[row[0], brand] == old.fields[0, brand]
    assert new.dense[row[0], 0] > old.dense[0, 0]
    assert new.signals[row[1]] & Signal.UNAVAILABLE
    np.testing.assert_array_equal(new.fields[others], old.fields[1:-1])
    np.testing.assert_array_equal(new.titles[others], old.titles[1:-1])
    request = {
        "USER_ID": np.array([[-1]]), "ITEM_IDS": np.array([[first, 777_777, 123_456]]),
        "TOP_K": np.array([[3]], np.int32), "SCENARIO": np.array([[b"new_items"]], object),
    }  # fmt: skip
    (answer,) = Pipeline.load(made, made / graph_place("ensemble"), "onnxruntime")([request])
    assert set(answer["RANKED_IDS"][0]) == {first, 777_777, -1}


def test_refreshed_with_what_it_was_trained_on_nothing_changes(trained, dataset, tmp_path):
    refresh_features(trained.directory / "features", dataset, tmp_path)
    digests = tree_digests(trained.directory / "features")
    assert tree_digests(tmp_path) == digests


def test_a_newer_dataset_has_ids_of_the_same_kind(world, trained, newer, tmp_path):
    other = replace(newer, description=replace(newer.description, ids={"item": "strings", "user": "numbers"}))
    with pytest.raises(BadData, match="has ids of the kinds item: numbers, user: numbers; the next day differs there"):
        assemble(trained, other, world.onnx, tmp_path / "out")


def test_a_folded_ranker_holds_its_catalogue(world, trained, newer, tmp_path):
    folded = replace(trained, features=trained.features.changed(folded=5))
    with pytest.raises(BadData, match=r"is folded: .* compressed without the step `fold`"):
        assemble(folded, newer, world.onnx, tmp_path / "out")


def test_an_engine_that_nobody_knows(world, trained, dataset, tmp_path):
    with pytest.raises(BadModel, match="engine foo is none of onnxruntime"):
        assemble(trained, dataset, world.onnx, tmp_path / "out", engine="foo")


def test_a_graph_without_its_report(world, trained, dataset, tmp_path):
    shutil.copy(world.onnx, tmp_path / "r.onnx")
    with pytest.raises(BadModel, match="no parity report"):
        assemble(trained, dataset, tmp_path / "r.onnx", tmp_path / "out")
    report = json.loads(world.onnx.with_suffix(".parity.json").read_text())
    (tmp_path / "r.parity.json").write_text(json.dumps(report | {"onnx": "0" * 64}))
    with pytest.raises(BadModel, match="it is of another graph"):
        assemble(trained, dataset, tmp_path / "r.onnx", tmp_path / "out")


def test_a_truncated_graph(world, trained, dataset, tmp_path):
    (tmp_path / "r.onnx").write_bytes(world.onnx.read_bytes()[:500])
    with pytest.raises(BadModel, match="no whole ONNX"):
        assemble(trained, dataset, tmp_path / "r.onnx", tmp_path / "out")


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"runtime": "abacus"}, "none of python, onnxruntime, tensorrt"),
        ({"runtime": "tensorrt"}, "needs plans"),
    ],
)
def test_a_runtime_that_cannot_be(world, trained, dataset, tmp_path, choice, words):
    with pytest.raises(BadModel, match=words):
        assemble(trained, dataset, world.onnx, tmp_path / "out", **choice)
    assert not (tmp_path / "out").exists()


def test_no_release(tmp_path):
    with pytest.raises(BadModel, match="is no release"):
        load_manifest(tmp_path)


def test_a_policy_that_does_not_fit(world, trained, dataset, tmp_path):
    policy = Policy.model_validate({"rules": [{"rule": "mix", "tasks": {"sale": 1.0}}]})
    with pytest.raises(InvalidRelease, match="policy home: rule 1 .mix.: tasks sale are none of the ranker's: click"):
        assemble(trained, dataset, world.onnx, tmp_path / "out", policies={"home": policy})
    assert releases(tmp_path / "out") == []


def test_a_release_knows_nothing_of_users(world):
    assert not list(world.release.rglob("*.sqlite"))


def test_what_rules_read_of_items(world, dataset):
    bound_to, policies = load_rules(world.release / "features")
    items, names = bound_to.items, bound_to.attributes.names
    assert {"search", "home", "new_items", "cross_category"} == set(policies)
    for row, item in enumerate(dataset.items.iter_rows(named=True)):
        assert items.ids[row] == item["item_id"]
        assert items.prices[row] == np.float32(item["price"])
        assert names["brand"][items.brands[row]] == item["brand"]
        assert names["category"][items.categories[row]] == item["category"]
        assert names["seller"][items.sellers[row]] == item["seller"]
    assert items.brands[-1] == items.categories[-1] == -1
    vectors = items.vectors[:-1].astype(np.float32) / 127
    alike = vectors @ vectors.T
    assert np.diag(alike) == pytest.approx(1, abs=0.05)
    brands, categories = (np.array(dataset.items[name].to_list()) for name in ("brand", "category"))
    both = (brands[:, None] == brands) & (categories[:, None] == categories) & ~np.eye(len(brands), dtype=bool)
    neither = (brands[:, None] != brands) & (categories[:, None] != categories)
    assert alike[both].mean() > alike[neither].mean() + 0.3
