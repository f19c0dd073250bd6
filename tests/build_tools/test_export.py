"""The ONNX says what the module says; a team's own module goes the same way; damage is told."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from trirank import contract
from trirank_backend.errors import InvalidRelease
from trirank_backend.scoring import OnnxRanker
from trirank_build.errors import BadCheckpoint, BadModel
from trirank_build.export import parity
from trirank_build.export.onnx import check_onnx, export, load_module, parse_arguments
from trirank_build.export.parity import sample_inputs

EXAMPLES = Path(__file__).parent.parent.parent / "build_tools" / "examples"


@pytest.fixture
def spec(trained):
    return trained.features.spec


def test_parity_over_every_bucket(world):
    report = json.loads(world.onnx.with_suffix(".parity.json").read_text())
    assert set(map(int, report["by_bucket"])) == set(contract.BUCKETS)
    assert max(report["by_bucket"].values()) <= 1e-4
    assert report["padding"] <= 1e-5


def test_the_batch_axis_is_free(world, spec, rng):
    ranker = OnnxRanker(world.onnx)
    for batch in (1, 3, 32):
        assert ranker(sample_inputs(spec, batch, 64, rng)).shape == (batch, 64, 3)


def test_a_user_without_history_or_query_gets_finite_scores(world, spec, rng):
    tensors = sample_inputs(spec, 1, 64, rng)
    tensors["history"][:] = 0
    tensors["query"][:] = 0
    assert np.isfinite(OnnxRanker(world.onnx)(tensors)).all()


class Own(nn.Module):
    """Takes the sizes it needs; ``flaw`` spoils it in one way."""

    def __init__(self, spec, flaw=""):
        super().__init__()
        self.head = nn.Linear(spec.shape.dense, spec.shape.tasks)
        self.flaw = flaw

    def forward(self, history, query, candidates, dense, context):
        scores = self.head(dense)
        if self.flaw == "company":
            scores = scores - scores.mean(1, keepdim=True)
        if self.flaw == "shape":
            return scores[..., 0]
        if self.flaw == "type":
            return scores.double()
        if self.flaw == "raises":
            raise RuntimeError("no such table")
        if self.flaw == "tuple":
            return scores, scores
        return scores


def test_a_module_of_ones_own_exports(spec, tmp_path):
    assert max(export(Own(spec), spec, tmp_path / "own.onnx").by_bucket.values()) <= 1e-4


@pytest.mark.parametrize(
    ("flaw", "words"),
    [
        ("company", "scores depend on padding"),
        ("shape", r"gives torch.float32 \[2, 64\]; the contract says float32 \[2, 64, 3\]"),
        ("type", "float64"),
        ("raises", "no such table"),
        ("tuple", "gives tuple"),
    ],
)
def test_a_flawed_module_is_told_and_nothing_is_written(spec, tmp_path, flaw, words):
    with pytest.raises(BadModel, match=words):
        export(Own(spec, flaw), spec, tmp_path / "own.onnx")
    assert not list(tmp_path.iterdir())


def test_a_graph_that_differs_from_its_module_is_refused(spec, tmp_path, monkeypatch):
    monkeypatch.setattr(parity, "MODULE_LIMIT", -1.0)
    with pytest.raises(BadModel, match="differs from the module"):
        export(Own(spec), spec, tmp_path / "own.onnx")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def example_weights(spec, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from own_ranker import TwoTowers

    torch.manual_seed(0)
    arguments = parse_arguments('{"vocabulary": "$vocabulary_size", "dense": "$dense", "tasks": "$tasks"}', spec)
    path = tmp_path / "own.safetensors"
    save_file(TwoTowers(**arguments).state_dict(), path)
    yield arguments, path
    sys.modules.pop("own_ranker", None)


def test_the_documented_example_exports(spec, tmp_path, example_weights):
    arguments, path = example_weights
    module = load_module("own_ranker:TwoTowers", arguments, path)
    assert max(export(module, spec, tmp_path / "own.onnx").by_bucket.values()) <= 1e-4


def test_an_own_module_that_is_not_there(example_weights):
    arguments, path = example_weights
    for reference in ("nowhere:Thing", "own_ranker:Nothing", "own_ranker", ":"):
        with pytest.raises(BadModel, match="package.module:Class"):
            load_module(reference, arguments, path)
    with pytest.raises(BadModel, match="no torch.nn.Module"):
        load_module("json:dumps", {}, path)
    with pytest.raises(BadModel, match="--arguments"):
        load_module("own_ranker:TwoTowers", {"colour": 1}, path)


def test_own_weights_of_another_size(example_weights):
    arguments, path = example_weights
    with pytest.raises(BadCheckpoint, match="does not fit the model"):
        load_module("own_ranker:TwoTowers", arguments | {"dim": 8}, path)


@pytest.mark.parametrize("text", ["{", "[]", '{"a": "$colour"}'])
def test_arguments_that_are_no_arguments(spec, text):
    with pytest.raises(BadModel, match="JSON object"):
        parse_arguments(text, spec)


@pytest.mark.parametrize("share", [0, 0.3, 0.9])
def test_a_truncated_graph(world, spec, tmp_path, share):
    whole = world.onnx.read_bytes()
    (tmp_path / "t.onnx").write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(BadModel, match="no whole ONNX graph"):
        check_onnx(tmp_path / "t.onnx", spec)
    with pytest.raises(InvalidRelease, match="cannot be loaded"):
        OnnxRanker(tmp_path / "t.onnx")


def test_a_graph_of_other_tensors(world, spec, tmp_path):
    model = onnx.load(str(world.onnx))
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 99
    onnx.save(model, str(tmp_path / "o.onnx"))
    with pytest.raises(BadModel, match="input history is INT32"):
        check_onnx(tmp_path / "o.onnx", spec)
