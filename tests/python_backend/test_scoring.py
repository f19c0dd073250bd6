"""Whatever runs the graph, the scores are the same."""

from __future__ import annotations

import numpy as np
import pytest
from trirank import contract
from trirank_backend import scoring
from trirank_backend.errors import InvalidRelease
from trirank_backend.scoring import OnnxRanker, available_engines, exact_engines, load_ranker
from trirank_build.export.parity import sample_inputs

pytest.importorskip("openvino")


@pytest.fixture(scope="module")
def rankers(world):
    return OnnxRanker(world.onnx), load_ranker(world.onnx, "openvino")


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("candidates", [*contract.BUCKETS, 1, 37, 200])
def test_openvino_says_what_onnx_runtime_says(rankers, trained, rng, batch, candidates):
    tensors = sample_inputs(trained.features.spec, batch, candidates, rng)
    one, two = (ranker(tensors) for ranker in rankers)
    assert two.shape == (batch, candidates, len(trained.features.spec.tasks))
    assert two.dtype == np.float32
    np.testing.assert_allclose(two, one, atol=1e-4)


def test_answers_do_not_share_memory(rankers, trained, rng):
    first = sample_inputs(trained.features.spec, 1, 64, rng)
    answer = rankers[1](first)
    kept = answer.copy()
    rankers[1](sample_inputs(trained.features.spec, 1, 64, rng))
    np.testing.assert_array_equal(answer, kept)


def test_tensors_need_not_be_contiguous(rankers, trained, rng):
    tensors = sample_inputs(trained.features.spec, 1, 64, rng)
    spread = tensors | {"dense": np.repeat(tensors["dense"], 2, axis=2)[:, :, ::2]}
    np.testing.assert_array_equal(rankers[1](spread), rankers[1](tensors))


def test_an_engine_that_there_is_not(world):
    with pytest.raises(InvalidRelease, match="engine 'abacus' is none of onnxruntime, .*, openvino-bf16"):
        load_ranker(world.onnx, "abacus")


def test_an_engine_that_is_not_installed(world, monkeypatch):
    monkeypatch.setattr(scoring, "openvino", None)
    assert available_engines() == ["onnxruntime"]
    with pytest.raises(InvalidRelease, match=r"not installed; pip install 'trirank\[openvino\]'"):
        load_ranker(world.onnx, "openvino")


def test_a_damaged_graph(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(InvalidRelease, match="cannot be loaded by OpenVINO"):
        load_ranker(tmp_path / "model.onnx", "openvino")


def test_bf16_only_where_the_processor_has_it(monkeypatch):
    monkeypatch.setattr(scoring, "_processor_flags", lambda: {"avx2"})
    assert available_engines() == ["onnxruntime", "openvino"]
    monkeypatch.setattr(scoring, "_processor_flags", lambda: {"avx512_bf16"})
    assert available_engines() == ["onnxruntime", "openvino", "openvino-bf16"]
    assert exact_engines() == ["onnxruntime", "openvino"]


@pytest.mark.parametrize(
    ("engine", "provider"),
    [("onnxruntime-cuda", "CUDAExecutionProvider"), ("onnxruntime-tensorrt-rtx", "NvTensorRTRTXExecutionProvider")],
)
def test_a_provider_that_is_not_there_is_named(world, engine, provider, monkeypatch):
    assert engine not in available_engines()
    with pytest.raises(InvalidRelease, match=f"runs with {provider}, which this ONNX Runtime lacks"):
        load_ranker(world.onnx, engine)
    # A build that has it on a machine without a GPU: ONNX Runtime takes the CPU and says nothing.
    monkeypatch.setattr(scoring.onnxruntime, "get_available_providers", lambda: [provider, "CPUExecutionProvider"])
    assert engine in available_engines()
    with pytest.raises(InvalidRelease, match="which finds no GPU; CPUExecutionProvider was taken"):
        load_ranker(world.onnx, engine)
