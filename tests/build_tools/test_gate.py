"""The gate sees what a step spoilt, and releases go by what it says."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
import torch
from trirank_build.compression.chain import compress
from trirank_build.compression.recipe import Thresholds, parse_recipe
from trirank_build.data.dataset import Dataset
from trirank_build.engines.latency import fastest_engine
from trirank_build.errors import BadCheckpoint, BadData, BadModel
from trirank_build.export.beside import gate_path
from trirank_build.export.onnx import export
from trirank_build.features.examples import Examples
from trirank_build.gate import verdict
from trirank_build.gate.report import write_report
from trirank_build.gate.stages import Stage
from trirank_build.gate.verdict import run_gate
from trirank_build.models.checkpoint import load_checkpoint, save_checkpoint
from trirank_build.repository import assemble as assembling
from trirank_build.repository.assemble import assemble
from trirank_build.repository.release import load_manifest
from trirank_build.repository.reports import export_run
from trirank_build.training.run import TrainedRun

STEPS = [
    {"kind": "prune", "ffn": 0.5, "training": {"epochs": 1}}, {"kind": "fold"}, {"kind": "quantise", "requests": 64},
]  # fmt: skip
LENIENT = {"min_ndcg_ratio": 0.9, "min_ndcg_ratio_low": 0.8, "min_kendall_tau": 0.5, "min_overlap": 0.5}


@pytest.fixture(scope="module")
def dataset(world):
    return Dataset.load(world.data)


@pytest.fixture(scope="module")
def compressed(trained, dataset, tmp_path_factory):
    """A chain with its graph."""
    folder = tmp_path_factory.mktemp("chain")
    recipe = parse_recipe({"name": "chain", "training": {"epochs": 0}, "steps": STEPS, "gate": LENIENT})
    run = compress(recipe, trained, dataset, folder / "out").last
    path = folder / "ranker.onnx"
    export_run(run, path)
    return run, path


def test_no_stage_may_rank_worse_than_retrieval(dataset, trained):
    examples = Examples.read(dataset, "valid", trained.features, 200)
    backwards = np.where(examples.rows >= 0, np.arange(examples.rows.shape[1], dtype=np.float32), -np.inf)
    told = {}
    for name, scores in (("as it came", -backwards), ("backwards", backwards)):
        stage = Stage(name, np.where(examples.rows >= 0, scores, -np.inf).astype(np.float32), name, 1.0, 1.0)
        told[name] = verdict._row(stage, stage, None, examples, Thresholds()).failures
    assert told["as it came"] == []
    assert [words.partition(" is ")[0] for words in told["backwards"]] == ["NDCG@10 over retrieval's order's"]


def test_a_ranker_worse_than_retrieval_is_not_assembled(trained, dataset, world, tmp_path, monkeypatch):
    monkeypatch.setattr(assembling, "valid_ndcg", lambda *_: 0.01)
    with pytest.raises(
        BadModel, match=r"NDCG@10 on \d+ validation requests is 0.0100, that of the order in which cand"
    ):
        assemble(trained, dataset, world.onnx, tmp_path / "releases", engine="onnxruntime")
    assert not (tmp_path / "releases").exists()
    release = assemble(
        trained, dataset, world.onnx, tmp_path / "releases", engine="onnxruntime", allow_failing_gate=True
    )
    assert load_manifest(release)["failing_gate_allowed"]


@pytest.fixture
def spoilt(compressed, tmp_path):
    """The same chain after somebody put random rows into the embedding of its first step."""
    run, path = compressed
    folder = shutil.copytree(run.directory.parent, tmp_path / "out", symlinks=True)
    broken = folder / "1-prune" / "best.safetensors"
    weights, description = load_checkpoint(broken)
    weights["embedding.weight"] = torch.randn(
        weights["embedding.weight"].shape, generator=torch.Generator().manual_seed(0)
    )
    save_checkpoint(broken, weights, description)
    for name in ("ranker.onnx", "ranker.parity.json"):
        shutil.copy(path.with_name(name), tmp_path / name)
    return TrainedRun.load(folder / "3-quantise"), tmp_path / "ranker.onnx"


def gate(run, dataset, path, **more):
    return run_gate(run, dataset, path, "onnxruntime", requests=150, live=False, **more)


def test_an_honest_chain_passes(compressed, dataset):
    run, path = compressed
    report = gate(run, dataset, path)
    assert report.passed, report.failures
    assert [row.stage for row in report.rows] == ["dense", "1-prune", "2-fold", "3-quantise", "ONNX"]
    dense, pruned, folded, quantised, graph = report.rows
    assert dense.ndcg_ratio == (1, 1, 1)
    assert dense.kendall_tau == pytest.approx(1)
    assert folded.ndcg10 == pruned.ndcg10
    assert folded.kendall_tau == pytest.approx(pruned.kendall_tau)
    assert quantised.difference is None
    assert graph.difference < 0.05
    assert graph.size_mb < dense.size_mb
    assert all(row.latency_ms > 0 for row in report.rows)
    assert report.facts["split"] == "valid"


def test_random_rows_fail_and_their_step_is_named(spoilt, dataset):
    run, path = spoilt
    report = gate(run, dataset, path)
    assert not report.passed
    assert {row.stage for row in report.rows if row.failures} == {"1-prune"}
    assert any(failure.startswith("1-prune: NDCG@10 over the dense ranker's is ") for failure in report.failures)


def test_a_graph_of_other_weights_fails(compressed, dataset, trained, tmp_path):
    run, _ = compressed
    model = run.model()
    with torch.no_grad():
        model.head[2].weight += 1.0
    export(model, run.features.spec, tmp_path / "other.onnx")
    report = gate(run, dataset, tmp_path / "other.onnx")
    assert [failure.split(":")[0] for failure in report.failures if "difference" in failure] == ["ONNX"]


def test_limits_of_size_and_latency(compressed, dataset, tmp_path):
    run, path = compressed
    folder = shutil.copytree(run.directory.parent, tmp_path / "out", symlinks=True)
    chain = (folder / "compression.toml").read_text()
    (folder / "compression.toml").write_text(chain.replace("[gate]", "[gate]\nmax_size_mb = 0.001\n"))
    report = gate(TrainedRun.load(folder / "3-quantise"), dataset, path)
    assert [failure.partition(" is ")[0] for failure in report.failures] == ["ONNX: size in MB"]


def test_a_dense_ranker_has_a_gate_too(trained, world, dataset):
    report = gate(trained, dataset, world.onnx)
    assert [row.stage for row in report.rows] == ["dense", "ONNX"]
    assert report.passed


def test_a_step_that_is_gone(compressed, dataset, tmp_path):
    run, path = compressed
    folder = shutil.copytree(run.directory.parent, tmp_path / "out", symlinks=True)
    shutil.rmtree(folder / "2-fold")
    with pytest.raises(BadCheckpoint, match="2-fold is gone"):
        gate(TrainedRun.load(folder / "3-quantise"), dataset, path)


def test_another_dataset(compressed, tmp_path):
    from trirank_build.preparation.sources.shop import ShopSize, make_shop

    other = Dataset.load(make_shop(ShopSize(60, 30, 300, 15), 9).save(tmp_path / "data"))
    with pytest.raises(BadData, match="was trained on"):
        gate(*compressed[:1], other, compressed[1])


def test_releases_go_by_the_gate(spoilt, dataset, tmp_path):
    run, path = spoilt
    with pytest.raises(BadModel, match="no report of the gate; run `trirank gate`"):
        assemble(run, dataset, path, tmp_path / "releases")
    write_report(gate(run, dataset, path), path)
    with pytest.raises(BadModel, match="did not pass the gate: 1-prune: NDCG@10.*--allow-failing-gate"):
        assemble(run, dataset, path, tmp_path / "releases")
    assert not (tmp_path / "releases").exists()
    manifest = load_manifest(assemble(run, dataset, path, tmp_path / "releases", allow_failing_gate=True))
    assert manifest["failing_gate_allowed"] is True
    assert manifest["gate"]["passed"] is False
    assert [step["settings"]["kind"] for step in manifest["compression"]] == ["prune", "fold", "quantise"]


def test_a_passed_gate_is_in_the_manifest(compressed, dataset, tmp_path):
    run, path = compressed
    for name in ("ranker.onnx", "ranker.parity.json"):
        shutil.copy(path.with_name(name), tmp_path / name)
    written = write_report(gate(run, dataset, tmp_path / "ranker.onnx"), tmp_path / "ranker.onnx")
    assert written == gate_path(tmp_path / "ranker.onnx")
    release = assemble(run, dataset, tmp_path / "ranker.onnx", tmp_path / "releases")
    manifest = load_manifest(release)
    assert manifest["gate"] == json.loads(written.read_text())
    assert manifest["engine"] == "onnxruntime"
    assert not manifest["failing_gate_allowed"]
    config = (release / "models" / "ranker" / "config.pbtxt").read_text()
    assert 'string_value: "onnxruntime"' in config


def test_a_report_of_another_graph_does_not_count(compressed, dataset, tmp_path):
    run, path = compressed
    for name in ("ranker.onnx", "ranker.parity.json"):
        shutil.copy(path.with_name(name), tmp_path / name)
    report = gate(run, dataset, path).to_json() | {"onnx": "0" * 64}
    gate_path(tmp_path / "ranker.onnx").write_text(json.dumps(report))
    with pytest.raises(BadModel, match="no report of the gate"):
        assemble(run, dataset, tmp_path / "ranker.onnx", tmp_path / "releases")
    gate_path(tmp_path / "ranker.onnx").write_text("{")
    with pytest.raises(BadModel, match="is no report of the gate"):
        assemble(run, dataset, tmp_path / "ranker.onnx", tmp_path / "releases")


def test_the_report_is_a_page(spoilt, dataset):
    run, path = spoilt
    page = write_report(gate(run, dataset, path), path).with_suffix(".html").read_text()
    assert "Failed" in page
    assert '<tr class="failed"><td>1-prune</td>' in page
    assert not re.search(r'(src|href)="http', page)
    assert re.search(r"NDCG@10 over the dense ranker&#39;s</td><td>0\.\d+</td>\s*<td>≥ 0\.\d+</td>\s*<td>✗</td>", page)
    assert "✓" in page
    assert "synthetic shop, seed 1" in page
    assert page.count("<svg") == 1
    assert any(title in page for title in dataset.items["title"])  # one request, before and after


def test_the_engine_is_chosen_by_measurement(compressed, monkeypatch):
    run, path = compressed
    times = iter([[2.0, 2.0], [1.0, 1.0]])
    monkeypatch.setattr("trirank_build.engines.latency.latencies", lambda calls: {name: next(times) for name in calls})
    chosen, found = fastest_engine(path, run.features.spec, ["onnxruntime", "openvino"])
    assert chosen == "openvino"
    assert found == {"onnxruntime": 2.0, "openvino": 1.0}
