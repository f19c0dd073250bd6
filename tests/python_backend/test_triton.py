"""The layer between Triton and the stages: who is worked for, and who came too late."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import numpy as np
import pytest
from trirank import contract
from trirank_backend import triton
from trirank_backend.errors import InvalidInput


class Fault:
    INVALID_ARG, UNAVAILABLE = "INVALID_ARG", "UNAVAILABLE"

    def __init__(self, message, code):
        self.message, self.code = message, code


@pytest.fixture
def stage(monkeypatch):
    """One whose outputs are its inputs, and what it was run on."""
    monkeypatch.setattr(triton, "pb_utils", SimpleNamespace(
        TritonError=Fault, Tensor=lambda name, array: (name, array.tolist()),
        InferenceResponse=lambda tensors=None, error=None: error or dict(tensors),
        get_input_tensor_by_name=lambda request, name: SimpleNamespace(as_numpy=lambda: request.value),
    ))  # fmt: skip
    seen = []

    def run(requests):
        seen.extend(request["X"].tolist() for request in requests)
        return [InvalidInput("below 0") if request["X"][0] < 0 else request for request in requests]

    config = {"name": "double", "input": [{"name": "X"}], "output": [{"name": "X"}]}
    return triton.Stage({"model_config": json.dumps(config)}, run), seen


def request(value, seconds=None):
    moment = {} if seconds is None else {contract.DEADLINE_PARAMETER: int((time.time() + seconds) * 1e6)}
    return SimpleNamespace(value=np.array([value]), parameters=lambda: json.dumps(moment))


def test_what_comes_too_late_is_refused_and_not_worked_on(stage):
    stage, seen = stage
    one, late, other, bad = stage.execute([request(1), request(2, -1), request(3, 60), request(-4, 60)])
    assert (one, other) == ({"X": [1]}, {"X": [3]})
    assert (late.code, bad.code) == ("UNAVAILABLE", "INVALID_ARG")
    assert contract.TOO_LATE in late.message
    assert seen == [[1], [3], [-4]]


def test_nothing_is_run_for_nobody(stage):
    stage, seen = stage
    assert stage.execute([request(1, -1)])[0].code == "UNAVAILABLE"
    assert seen == []


def test_a_deadline_that_is_none_is_passed_over(stage):
    stage, _ = stage
    odd = SimpleNamespace(value=np.array([1]), parameters=lambda: json.dumps({contract.DEADLINE_PARAMETER: "soon"}))
    assert stage.execute([odd]) == [{"X": [1]}]
