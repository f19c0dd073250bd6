"""A release whose graph has its weights beside it ranks as one whose graph holds them."""

from __future__ import annotations

import numpy as np
import pytest
from trirank import RankClient, RankRequest
from trirank_build.artefacts import WEIGHTS
from trirank_build.data.dataset import Dataset
from trirank_build.export import weights
from trirank_build.export.onnx import export
from trirank_build.repository.assemble import assemble
from trirank_build.repository.reports import write_parity
from trirank_build.serving.server import TritonServer


@pytest.mark.parametrize("pipeline", ["ensemble", "single"])
def test_a_release_has_them_and_ranks_by_them(server, world, trained, tmp_path, monkeypatch, pipeline):
    monkeypatch.setattr(weights, "LARGEST", 1_000)
    monkeypatch.setattr(weights, "_LEAST", 20_000)
    graph = tmp_path / "ranker.onnx"
    write_parity(graph, export(trained.model(), trained.features.spec, graph), type(trained.model()).__name__)
    release = assemble(
        trained, Dataset.load(world.data), graph, tmp_path / "releases", pipeline=pipeline, allow_failing_gate=True
    )
    assert len(list(release.rglob(f"*{WEIGHTS}"))) == 1
    ids = trained.features.catalogue.ids[:50].tolist()
    request = RankRequest(item_ids=ids, top_k=10, timestamp=1_772_000_000)
    answers = []
    with TritonServer(release) as other:
        other.wait_ready()
        for address in (server.grpc, other.grpc):
            with RankClient(address, deadline_s=20) as client:
                answers.append(client.rank(request))
    assert answers[0].item_ids.tolist() == answers[1].item_ids.tolist()
    np.testing.assert_allclose(answers[0].scores, answers[1].scores, atol=1e-5)
