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
    INVALID_ARG, UNAVAILABLE, INTERNAL = "INVALID_ARG", "UNAVAILABLE", "INTERNAL"

    def __init__(self, message, code):
        self.message, self.code = message, code


@pytest.fixture
def stage(monkeypatch):
    """One whose outputs are its inputs, and what it was run on."""
    return made_stage(monkeypatch, "X")


def made_stage(monkeypatch, *inputs):
    logged = []
    monkeypatch.setattr(triton, "pb_utils", SimpleNamespace(
        TritonError=Fault, Tensor=lambda name, array: (name, array.tolist()),
        InferenceResponse=lambda tensors=None, error=None: error or dict(tensors),
        Logger=SimpleNamespace(log_error=logged.append),
    ))  # fmt: skip
    seen = []

    def run(requests, deadlines):
        assert len(requests) == len(deadlines)
        if any(request["X"][0] == 13 for request in requests):
            raise IndexError("row 13")
        seen.extend(request["X"].tolist() for request in requests)
        return [InvalidInput("below 0") if request["X"][0] < 0 else request for request in requests]

    config = {"name": "double", "input": [{"name": name} for name in inputs], "output": [{"name": "X"}]}
    return triton.Stage({"model_config": json.dumps(config)}, run), seen


def request(value, seconds=None):
    moment = {} if seconds is None else {contract.DEADLINE_PARAMETER: int((time.time() + seconds) * 1e6)}
    return asked(np.array([value]), moment)


def sent(value, ago_s, left_s):
    now = time.time()
    moments = {contract.DEADLINE_PARAMETER: (now + left_s) * 1e6, contract.SENT_PARAMETER: (now - ago_s) * 1e6}
    return asked(np.array([value]), moments)


def asked(value, parameters):
    tensor = SimpleNamespace(name=lambda: "X", as_numpy=lambda: value)
    return SimpleNamespace(
        inputs=lambda: [tensor], parameters=lambda: json.dumps(parameters), request_id=lambda: "page-1"
    )


def test_an_exception_costs_nobody_but_its_own_request(stage):
    """A client that called rerank with a row out of range failed half of the others' requests."""
    stage, seen = stage
    one, bad, other = stage.execute([request(1), request(13), request(3)])
    assert (one, other) == ({"X": [1]}, {"X": [3]})
    assert bad.code == "INTERNAL"
    assert "IndexError: row 13" in bad.message
    assert seen == [[1], [3]]


def test_a_tensor_that_cannot_be_read_costs_its_own_request(stage):
    stage, _ = stage
    broken = SimpleNamespace(inputs=lambda: 1 / 0, parameters=lambda: "{}")
    one, bad = stage.execute([request(1), broken])
    assert one == {"X": [1]}
    assert bad.code == "INTERNAL"


@pytest.mark.parametrize("value", ["soon", None, [], contract.DEADLINE_PARAMETER])
def test_parameters_that_only_look_like_a_deadline(stage, value):
    stage, _ = stage
    for name in (contract.DEADLINE_PARAMETER, "note"):
        assert stage.execute([asked(np.array([1]), {name: value}), request(2)]) == [{"X": [1]}, {"X": [2]}]


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


def test_what_would_be_answered_too_late_is_told_at_once(stage):
    """A stage that works on everything in order under overload answers everybody too late."""
    stage, seen = stage
    stage._admission.took(1.0, 1)
    one, other, patient = stage.execute([request(1, 0.5), request(2, 1.5), request(3)])
    assert patient == {"X": [3]}
    assert (one.code, other.code) == ("UNAVAILABLE", "UNAVAILABLE")
    assert contract.OVERLOADED in one.message
    assert contract.TOO_LATE not in one.message  # or a client would take the clocks for different ones
    assert seen == [[3]]


def test_a_clock_that_is_set_while_a_batch_is_run_costs_nobody(stage, monkeypatch):
    """An hour on was taken for a batch that took an hour: those after it were refused."""
    stage, _ = stage
    run, jump = stage._run, [0.0]
    now = time.time
    monkeypatch.setattr(triton.time, "time", lambda: now() + jump[0])

    def set_meanwhile(requests, deadlines):
        jump[0] = 3_600.0
        return run(requests, deadlines)

    stage._run = set_meanwhile
    stage.execute([request(1)])
    stage._run = run
    assert stage._admission._cost_s < 1
    answers = stage.execute([request(at, seconds=5.0) for at in (1, 2, 3)])
    assert answers == [{"X": [1]}, {"X": [2]}, {"X": [3]}]


@pytest.mark.parametrize("first", [True, False])
def test_the_first_stage_refuses_who_waited_long_in_a_queue_that_stands(monkeypatch, first):
    stage, _ = made_stage(monkeypatch, "X", *([contract.PACKED_REQUEST.name] if first else []))
    now = [time.monotonic()]
    clock = SimpleNamespace(time=time.time, monotonic=lambda: now[0])
    monkeypatch.setattr(triton, "time", clock)
    asked_for = [sent(1, 50, 10), sent(2, 30, 30), sent(3, 20, 70), request(4, 60)]
    for _ in range(13):  # the first of them finds a stage that had nothing to do
        assert stage.execute(asked_for) == [{"X": [1]}, {"X": [2]}, {"X": [3]}, {"X": [4]}]
        now[0] += 0.009
    one, other, *patient = stage.execute(asked_for)
    assert patient == [{"X": [3]}, {"X": [4]}]
    if first:
        assert (one.code, other.code) == ("UNAVAILABLE", "UNAVAILABLE")
        assert contract.WAITED in one.message
    else:
        assert (one, other) == ({"X": [1]}, {"X": [2]})


def test_a_moment_of_sending_that_is_none_costs_no_deadline(stage):
    stage, seen = stage
    for value in ("soon", None, [], 1e18):
        late = {contract.DEADLINE_PARAMETER: (time.time() - 1) * 1e6, contract.SENT_PARAMETER: value}
        assert stage.execute([asked(np.array([1]), late)])[0].code == "UNAVAILABLE"
    assert seen == []


def test_no_requests_are_no_answers(stage):
    assert stage[0].execute([]) == []
