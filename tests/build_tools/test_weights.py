"""Graphs with more weights than protobuf holds: exported, copied, assembled, served."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from trirank_backend.scoring import load_ranker
from trirank_build.engines.builder import build_plans
from trirank_build.errors import BadModel
from trirank_build.export import weights
from trirank_build.export.onnx import check_onnx, export
from trirank_build.export.parity import sample_inputs
from trirank_build.export.weights import copy_graph, graph_bytes, weights_of
from trirank_build.repository.reports import write_parity


@pytest.fixture
def small(monkeypatch):
    """What is a gigabyte elsewhere is a kilobyte here."""
    monkeypatch.setattr(weights, "LARGEST", 1_000)
    monkeypatch.setattr(weights, "_LEAST", 20_000)


@pytest.fixture
def graph(small, trained, tmp_path):
    path = tmp_path / "graphs" / "ranker.onnx"
    write_parity(path, export(trained.model(), trained.features.spec, path), "ranker")
    return path


def test_weights_lie_beside_the_graph_under_their_content(graph, world):
    (beside,) = weights_of(graph)
    assert {file.name for file in graph.parent.iterdir() if file.suffix != ".json"} == {graph.name, beside.name}
    assert graph_bytes(graph) == graph.stat().st_size + beside.stat().st_size
    assert graph_bytes(graph) == pytest.approx(world.onnx.stat().st_size, rel=0.02)
    assert weights_of(world.onnx) == []


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_it_scores_as_the_graph_that_holds_them(graph, world, trained, engine):
    tensors = sample_inputs(trained.features.spec, 3, 64, np.random.default_rng(3))
    whole, apart = (load_ranker(path, engine)(tensors) for path in (world.onnx, graph))
    np.testing.assert_array_equal(whole, apart)


def test_an_export_takes_the_place_of_the_one_before(graph, trained):
    (first,) = weights_of(graph)
    copy_graph(graph, graph.with_name("kept.onnx"))
    changed = trained.model()
    with torch.no_grad():
        changed.embedding.weight.mul_(1.5)
    export(changed, trained.features.spec, graph)
    (second,) = weights_of(graph)
    assert second != first
    assert first.is_file()  # the copy has it
    export(changed, trained.features.spec, graph.with_name("kept.onnx"))
    assert not first.exists()
    assert second.is_file()


def test_an_export_mends_what_was_damaged(graph, trained):
    (beside,) = weights_of(graph)
    beside.unlink()
    graph.with_name("other.onnx").write_bytes(b"no graph")
    export(trained.model(), trained.features.spec, graph)
    assert weights_of(graph) == [beside]
    graph.write_bytes(b"half a graph")
    export(trained.model(), trained.features.spec, graph)
    assert weights_of(graph) == [beside]
    for _ in range(2):  # of any name
        export(trained.model(), trained.features.spec, graph.with_name("ranker"))
    assert weights_of(graph.with_name("ranker")) == [beside]


def test_an_export_that_fails_leaves_nothing(small, trained, tmp_path, monkeypatch):
    monkeypatch.setattr("trirank_build.export.parity.MODULE_LIMIT", -1.0)
    with pytest.raises(BadModel, match="differs from the module"):
        export(trained.model(), trained.features.spec, tmp_path / "graphs" / "ranker.onnx")
    assert list((tmp_path / "graphs").iterdir()) == []


def test_weights_that_are_missing_damaged_or_elsewhere(graph, trained):
    (beside,) = weights_of(graph)
    whole = beside.read_bytes()
    beside.write_bytes(whole[:-100])
    with pytest.raises(BadModel, match=f"{beside.name} has .* bytes of .*; copy it again"):
        check_onnx(graph, trained.features.spec)
    beside.unlink()
    with pytest.raises(BadModel, match=f"has its weights in {beside.name}, which is not beside it; copy both"):
        check_onnx(graph, trained.features.spec)
    model = onnx.load(str(graph), load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../../etc/passwd"
    onnx.save(model, str(graph))
    with pytest.raises(BadModel, match="must lie in a file beside it"):
        check_onnx(graph, trained.features.spec)


def test_plans_are_not_built_from_them(graph, trained, tmp_path):
    with pytest.raises(BadModel, match="GB of weights, in .* plans are not built from; keep a smaller table"):
        build_plans(graph, trained.features.spec, ["86"], tmp_path / "plans")
