"""Between Triton's Python backend and the steps: tensors in, tensors out, errors with their codes.

Nothing is opened at import: a stub process loads this before Triton calls ``initialize``, and threads, forks and
open stores do not mix (triton-inference-server/server #7690, #4776).
"""

from __future__ import annotations

import json
import math
import os
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from trirank import contract

from trirank_backend.admission import Admission, Queue, Wait
from trirank_backend.callers import HEADER, callers_of_this_server
from trirank_backend.errors import (
    BackendError,
    InvalidInput,
    NotAllowed,
    Overloaded,
    StageFailed,
    StoreFailed,
    TooLate,
)
from trirank_backend.requests import NamedTensors, Tensors

try:
    import triton_python_backend_utils as pb_utils  # there only inside a stub process
except ImportError:
    pb_utils = None

Run = Callable[[list[Tensors], list[float]], list[Any]]
"""Tensors of requests, and their deadlines (µs since 1970) → an answer each: tensors, or a BackendError."""
_OPTIONAL = frozenset(spec.name for spec in contract.OUTPUTS if spec.optional)
REPORT_EVERY_S = 1.0


def release_of(args: Mapping[str, str]) -> Path:
    """The release that a model belongs to: what its parameter ``release`` says, else the place that it lies in,
    ``RELEASE/models/NAME``."""
    said = json.loads(args["model_config"]).get("parameters", {}).get("release")
    return Path(said["string_value"]) if said else Path(args["model_repository"]).resolve().parents[1]


def graph_of(args: Mapping[str, str]) -> tuple[Path, str, int]:
    """The ranker's ONNX file beside a model, and the engine and threads that its configuration names."""
    said = json.loads(args["model_config"])["parameters"]
    threads = int(said["threads"]["string_value"]) if "threads" in said else 1
    return Path(args["model_repository"], args["model_version"]) / "model.onnx", said["engine"]["string_value"], threads


def stay_on_a_core(args: Mapping[str, str]) -> None:
    """Give each instance of a model a core of its own, where there are as many as this process may use.

    One that wanders between cores finds its data in the other one's caches, which costs a single caller a fifth of the
    time (docs/performance.md). With fewer instances than cores nothing is pinned: others may be on this machine, and
    would all take the first cores.
    """
    if not hasattr(os, "sched_getaffinity"):  # not Linux
        return
    cores = sorted(os.sched_getaffinity(0))
    instances = sum(int(group["count"]) for group in json.loads(args["model_config"])["instance_group"])
    number = args["model_instance_name"].rpartition("_")[2]
    threads = json.loads(args["model_config"])["parameters"].get("threads", {}).get("string_value", "1")
    if 1 < instances == len(cores) and number.isdigit() and threads == "1":
        os.sched_setaffinity(0, {cores[int(number) % len(cores)]})


def report_quality(release: Path) -> list[Any]:
    """Export a release's NDCG@10 beside Triton's own metrics, as ``trirank_release_ndcg10{release, measured}``; gives
    what has to be kept for as long as it shall be seen."""
    manifest = json.loads((release / "manifest.json").read_text())
    metrics = manifest.get("metrics", {})
    found = {"valid": metrics.get("valid_ndcg10")}
    if "gate" in metrics:
        found[f"{metrics['gate']['split']}, {metrics['gate']['stage']}"] = metrics["gate"]["ndcg10"]["value"]
    family = pb_utils.MetricFamily(
        name="trirank_release_ndcg10",
        description="NDCG@10 of the release that is loaded",
        kind=pb_utils.MetricFamily.GAUGE,
    )
    kept = [family]
    for measured, value in found.items():
        if value is not None:
            metric = family.Metric(labels={"release": manifest["release"], "measured": measured})
            metric.set(value)
            kept.append(metric)
    return kept


class StageTimes:
    """Exports what each stage of a pipeline in one process costs, beside Triton's own metrics, as the counter
    ``trirank_stage_seconds_total{stage, release, instance}``.

    Labels that no other instance has, and no other release: Triton gives out one counter for equal labels, and takes it
    away with the first of those who share it.

    A count is a message to the server and back, 0.1 ms, so it is told once a second, by the request that comes then.
    """

    def __init__(self, release: str, instance: str, seconds: Mapping[str, float]) -> None:
        self._seconds = seconds
        self._family = pb_utils.MetricFamily(
            name="trirank_stage_seconds_total",
            description="Seconds that a stage has worked",
            kind=pb_utils.MetricFamily.COUNTER,
        )
        self._metrics = {
            stage: self._family.Metric(labels={"stage": stage, "release": release, "instance": instance})
            for stage in contract.STAGES
        }
        self._told = dict.fromkeys(contract.STAGES, 0.0)
        self._next = 0.0

    def report(self) -> None:
        """Tell what has grown, if it is time."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + REPORT_EVERY_S
        try:
            for stage, metric in self._metrics.items():
                if (grown := self._seconds[stage] - self._told[stage]) > 0:
                    metric.increment(grown)
                    self._told[stage] += grown
        except Exception as error:  # whoever asks has nothing to do with it
            pb_utils.Logger.log_warn(f"what the stages cost could not be told: {error}")


class Stage:
    """One model: reads the tensors that its config.pbtxt names, runs a step over all requests at once.

    Whatever goes wrong in one request is that request's answer: a batch is made of different callers' requests.
    """

    def __init__(self, args: Mapping[str, str], run: Run) -> None:
        config = json.loads(args["model_config"])
        self._name = config["name"]
        self._inputs = [tensor["name"] for tensor in config["input"]]
        self._outputs = [tensor["name"] for tensor in config["output"]]
        self._run = run
        self._admission = Admission()
        # Later stages' requests have come through others, which is no fault of a queue's.
        self._queue = Queue() if contract.PACKED_REQUEST.name in self._inputs else None
        self._callers = callers_of_this_server()

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response a request, in order. What comes, or would be answered, too late for its caller is refused, not
        worked on."""
        started, began = time.time(), time.monotonic()  # moments are compared with the one, and the other is not set
        answers: list[Any] = [None] * len(requests)
        told = [_moments(request, started) for request in requests]
        moments, waits = [moment for moment, _ in told], [wait for _, wait in told]
        in_time = [at for at, moment in enumerate(moments) if moment >= started * 1e6]
        if self._callers is not None:
            for at, request in enumerate(requests):
                try:
                    self._callers.check(_header(request))
                except NotAllowed as error:  # noqa: PERF203  # belongs to this request
                    answers[at] = error
            in_time = [at for at in in_time if answers[at] is None]
        if self._queue is not None:
            too_long = self._queue.waited_too_long([waits[at] for at in in_time], time.monotonic())
            for at in [at for at, is_refused in zip(in_time, too_long, strict=True) if is_refused]:
                answers[at] = Overloaded(f"{self._name} did not work on it: {contract.WAITED}")
                in_time.remove(at)
        taken = self._admission.admitted([moments[at] / 1e6 - started for at in in_time])
        places, batch, deadlines = [], [], []
        for at, is_taken in zip(in_time, taken, strict=True):
            if not is_taken:
                answers[at] = Overloaded(f"{self._name} did not work on it: {contract.OVERLOADED}")
                continue
            try:
                batch.append(self._read(requests[at]))
            except Exception as error:  # a tensor that cannot be read is its own request's fault
                answers[at] = self._failed(error)
                continue
            places.append(at)
            deadlines.append(moments[at])
        for at, answer in zip(places, self._answers(batch, deadlines), strict=True):
            answers[at] = answer
        late = TooLate(f"{self._name} did not work on it: {contract.TOO_LATE}")
        responses = [self._response(late if answer is None else answer) for answer in answers]
        worked_on = sum(not isinstance(answer, BackendError) and answer is not None for answer in answers)
        if worked_on:
            self._admission.took(time.monotonic() - began, worked_on)
        if self._queue is not None:
            self._queue.idle(time.monotonic())
        return responses

    def _answers(self, batch: list[Tensors], deadlines: list[float]) -> list[Any]:
        if not batch:
            return []
        try:
            return self._run(batch, deadlines)
        except Exception as error:
            if len(batch) == 1:
                return [error if isinstance(error, BackendError) else self._failed(error)]
        # One of them is at fault, and the others shall not know.
        return [self._answers([one], [deadline])[0] for one, deadline in zip(batch, deadlines, strict=True)]

    def _failed(self, error: Exception) -> StageFailed:
        failure = StageFailed(f"{self._name} failed ({type(error).__name__}: {error}); the server's log says where")
        failure.__cause__ = error
        return failure

    def _response(self, answer: Any) -> Any:
        try:
            if not isinstance(answer, BackendError):
                names = self._outputs
                if contract.PACKED_RESPONSE.name in answer:  # whoever asks with all in one is answered with all in one
                    names = [contract.PACKED_RESPONSE.name]
                return pb_utils.InferenceResponse(
                    [
                        pb_utils.Tensor(name, np.ascontiguousarray(answer[name]))
                        for name in names
                        if name in answer or name not in _OPTIONAL
                    ]
                )
        except Exception as error:  # of an answer that is none: its own request's matter too
            answer = self._failed(error)
        if not isinstance(answer, InvalidInput | NotAllowed | TooLate | Overloaded):  # nobody's fault but ours
            pb_utils.Logger.log_error(f"{self._name}: {''.join(traceback.format_exception(answer))}")
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(answer), _code(answer)))

    def _read(self, request: Any) -> Tensors:
        tensors = NamedTensors((tensor.name(), tensor.as_numpy()) for tensor in request.inputs())
        tensors.request_id = request.request_id()
        return tensors


def each(step: Callable[[Tensors], Tensors]) -> Run:
    """A step of single requests as one of batches."""

    def run(requests: list[Tensors], deadlines: list[float]) -> list[Any]:
        answers: list[Any] = []
        for tensors in requests:
            try:
                answers.append(step(tensors))
            except BackendError as error:  # noqa: PERF203  # belongs to this request
                answers.append(error)
        return answers

    return run


def _code(error: BackendError) -> Any:
    if isinstance(error, InvalidInput | NotAllowed):  # Triton has no code of its own for those
        return pb_utils.TritonError.INVALID_ARG
    late = isinstance(error, TooLate | Overloaded | StoreFailed)
    return pb_utils.TritonError.UNAVAILABLE if late else pb_utils.TritonError.INTERNAL


def _moments(request: Any, now_s: float) -> tuple[float, Wait | None]:
    """The deadline in microseconds since 1970, infinite where the caller named none, and what is known of the wait.
    Asking whether a request was cancelled would do as well, but costs a message to the server and back, 0.1 ms (a
    parameter: 4 µs)."""
    parameters = request.parameters()
    if contract.DEADLINE_PARAMETER not in parameters:
        return math.inf, None
    try:
        named = json.loads(parameters)
        deadline = _number(named, contract.DEADLINE_PARAMETER)
        sent = _number(named, contract.SENT_PARAMETER)
    except (AttributeError, ValueError):
        return math.inf, None
    if not sent < deadline < math.inf:
        return deadline, None
    return deadline, Wait(now_s - sent / 1e6, (deadline - sent) / 1e6)


def _header(request: Any) -> str | None:
    """What the caller sent as ``authorization``, which Triton hands on with the name as it was written."""
    try:
        named = json.loads(request.parameters() or "{}")
        return next((str(value) for name, value in named.items() if name.lower() == HEADER), None)
    except (AttributeError, ValueError):
        return None


def _number(named: dict[str, Any], name: str) -> float:
    try:
        return float(named.get(name, math.inf))
    except (TypeError, ValueError):
        return math.inf
