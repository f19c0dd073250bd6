"""Between Triton's Python backend and ``stages``: tensors in, tensors out, errors with their codes.

Nothing is opened at import: a stub process loads this before Triton calls ``initialize``, and threads, forks and
open stores do not mix (triton-inference-server/server #7690, #4776).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from trirank import contract

from trirank_backend.errors import InvalidInput
from trirank_backend.stages import Tensors

try:
    import triton_python_backend_utils as pb_utils  # there only inside a stub process
except ImportError:
    pb_utils = None


def release_of(args: dict[str, str]) -> Path:
    """The release that a model belongs to: what its parameter ``release`` says, else the place that it lies in,
    ``RELEASE/models/NAME``."""
    said = json.loads(args["model_config"]).get("parameters", {}).get("release")
    return Path(said["string_value"]) if said else Path(args["model_repository"]).resolve().parents[1]


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


class Stage:
    """One model: reads the tensors its config.pbtxt names, runs a callable over all requests at once."""

    def __init__(self, args: dict[str, str], run: Callable[[list[Tensors]], list[Any]]) -> None:
        config = json.loads(args["model_config"])
        self._name = config["name"]
        self._inputs = [tensor["name"] for tensor in config["input"]]
        self._outputs = [tensor["name"] for tensor in config["output"]]
        self._run = run

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response a request, in order. What comes too late for its caller is refused, not worked on."""
        now = time.time() * 1e6
        late = [_deadline(request) < now for request in requests]
        in_time = [self._read(request) for request, is_late in zip(requests, late, strict=True) if not is_late]
        answers = iter(self._run(in_time) if in_time else ())
        return [self._too_late() if is_late else self._response(next(answers)) for is_late in late]

    def _response(self, answer: Any) -> Any:
        if isinstance(answer, InvalidInput):
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(answer), pb_utils.TritonError.INVALID_ARG))
        return pb_utils.InferenceResponse(
            [pb_utils.Tensor(name, np.ascontiguousarray(answer[name])) for name in self._outputs]
        )

    def _too_late(self) -> Any:
        message = f"{self._name} did not work on it: {contract.TOO_LATE}"
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, pb_utils.TritonError.UNAVAILABLE))

    def _read(self, request: Any) -> Tensors:
        tensors = {}
        for name in self._inputs:
            tensor = pb_utils.get_input_tensor_by_name(request, name)
            if tensor is not None:
                tensors[name] = tensor.as_numpy()
        return tensors


def _deadline(request: Any) -> float:
    """Microseconds since 1970; infinite where the caller named none. Asking whether a request was cancelled would do
    as well, but costs a message to the server and back, 0.1 ms (a parameter: 4 µs)."""
    parameters = request.parameters()
    if contract.DEADLINE_PARAMETER not in parameters:
        return math.inf
    try:
        return float(json.loads(parameters)[contract.DEADLINE_PARAMETER])
    except (TypeError, ValueError):
        return math.inf


def score_batches(ranker: Callable[[Tensors], Any], requests: list[Tensors]) -> list[Tensors]:
    """One run of the ranker over all requests. Triton batches only equal shapes, so they concatenate."""
    if len(requests) == 1:
        return [{"scores": ranker(requests[0])}]
    joined = {name: np.concatenate([request[name] for request in requests]) for name in requests[0]}
    scores = ranker(joined)
    ends = np.cumsum([len(request["context"]) for request in requests])[:-1]
    return [{"scores": part} for part in np.split(scores, ends)]
