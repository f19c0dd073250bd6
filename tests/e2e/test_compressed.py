"""A compressed ranker in a real Triton: the gate asks it, and a release of it runs on the engine the gate chose."""

from __future__ import annotations

import pytest
from trirank import RankClient
from trirank_build.compression.chain import compress
from trirank_build.compression.recipe import parse_recipe
from trirank_build.data.dataset import Dataset
from trirank_build.gate.report import write_report
from trirank_build.gate.verdict import run_gate
from trirank_build.repository.assemble import assemble
from trirank_build.repository.release import load_manifest, recorded_requests
from trirank_build.repository.reports import export_run
from trirank_build.serving.server import TritonServer

RECIPE = {
    "name": "chain", "training": {"epochs": 0},
    "steps": [{"kind": "prune", "ffn": 0.25, "history_length": 6}, {"kind": "fold"}, {"kind": "quantise"}],
    "gate": {"min_ndcg_ratio": 0.5, "min_ndcg_ratio_low": 0.5, "min_kendall_tau": 0.3, "min_overlap": 0.3,
             "max_difference": 0.01},
}  # fmt: skip


@pytest.fixture(scope="module")
def served(world, trained, tmp_path_factory):
    pytest.importorskip("openvino")
    folder = tmp_path_factory.mktemp("compressed")
    dataset, path = Dataset.load(world.data), folder / "ranker.onnx"
    run = compress(parse_recipe(RECIPE), trained, dataset, folder / "out").last
    export_run(run, path)
    report = run_gate(run, dataset, path, "openvino", requests=60)
    write_report(report, path)
    return report, assemble(run, dataset, path, folder / "releases")


def test_the_live_ensemble_scores_like_the_engine(served):
    report, _ = served
    assert [row.stage for row in report.rows][-3:] == ["ONNX", "engine openvino", "ensemble"]
    assert report.passed, report.failures
    engine, ensemble = report.rows[-2:]
    assert ensemble.difference < 1e-3
    assert ensemble.ndcg10 == pytest.approx(engine.ndcg10, abs=1e-6)
    assert ensemble.latency_ms > engine.latency_ms


def test_the_release_serves_on_that_engine(served):
    _, release = served
    assert load_manifest(release)["engine"] == "openvino"
    with TritonServer(release) as server, RankClient(server.grpc, deadline_s=10) as client:
        server.wait_ready()
        for request in recorded_requests(release):
            answer = client.rank(request)
            assert len(answer) > 0
            assert (answer.scores[:-1] >= answer.scores[1:]).all()
