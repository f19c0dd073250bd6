"""Releases are whole, named by their content, and refuse what does not belong together."""

from __future__ import annotations

import json
import shutil

import pytest
from trirank import contract
from trirank_build.artefacts import file_digest, tree_digests
from trirank_build.data.dataset import Dataset
from trirank_build.engines import latency
from trirank_build.errors import BadData, BadModel
from trirank_build.preparation.sources.shop import ShopSize, make_shop
from trirank_build.repository.assemble import assemble
from trirank_build.repository.release import load_manifest, verify
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


def test_the_same_parts_give_the_same_release(world, trained, dataset, tmp_path):
    assert assemble(trained, dataset, world.onnx, world.release.parent, engine="onnxruntime") == world.release
    assert assemble(trained, dataset, world.onnx, tmp_path, engine="onnxruntime").name == world.release.name
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


def test_a_dataset_of_another_training(world, trained, tmp_path):
    other = Dataset.load(make_shop(ShopSize(60, 30, 300, 15), 9).save(tmp_path / "data"))
    with pytest.raises(BadData, match="was trained on synthetic shop, seed 1"):
        assemble(trained, other, world.onnx, tmp_path / "out")
    assert not (tmp_path / "out").exists()


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
