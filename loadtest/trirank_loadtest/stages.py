"""What the server itself counted: requests, time in queues and at work, and batches of every model."""

from __future__ import annotations

import warnings
from typing import Any

import grpc
from trirank import contract
from tritonclient.grpc import service_pb2, service_pb2_grpc

from trirank_loadtest.errors import LoadFailed
from trirank_loadtest.measured import Stage

_TIMEOUT_S = 10.0
_CLOSED = "is restricted"
"""What Triton says of an interface that is not for everybody."""
Counts = dict[str, tuple[int, int, int, int, int]]
"""Model → requests that succeeded, inferences, executions, ns in the queue, ns at work."""


def read_statistics(addresses: list[str]) -> Counts:
    """Of all models of all servers that tell them, added up.

    Raises:
        LoadFailed: a server does not answer.
    """
    found: dict[str, list[int]] = {}
    for address in addresses:
        with grpc.insecure_channel(address) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            try:
                reply = stub.ModelStatistics(service_pb2.ModelStatisticsRequest(), timeout=_TIMEOUT_S)
            except grpc.RpcError as error:
                said = error.details() or error.code().name
                if _CLOSED in said:  # the load can be measured all the same
                    warnings.warn(f"{address} tells no time by stage; trirank serve --open statistics", stacklevel=2)
                    continue
                raise LoadFailed(f"{address} does not answer ({said}); start it with `trirank serve`") from None
        for model in reply.model_stats:
            times = model.inference_stats
            numbers = (
                times.success.count, model.inference_count, model.execution_count, times.queue.ns,
                times.compute_input.ns + times.compute_infer.ns + times.compute_output.ns,
            )  # fmt: skip
            so_far = found.setdefault(model.name, [0] * 5)
            found[model.name] = [one + other for one, other in zip(so_far, numbers, strict=True)]
    return {name: (a, b, c, d, e) for name, (a, b, c, d, e) in found.items()}


def between(before: Counts, after: Counts) -> list[Stage]:
    """What each model did meanwhile. Nothing is told of an ensemble where stages have worked, whose times it holds."""
    stages: list[Any] = []
    for name, new in after.items():
        old = before.get(name, (0, 0, 0, 0, 0))
        if new[0] < old[0]:  # it was loaded anew
            old = (0, 0, 0, 0, 0)
        requests, inferences, executions, queue, compute = (a - b for a, b in zip(new, old, strict=True))
        if requests > 0:
            batch = inferences / executions if executions else 1.0
            stages.append(Stage(name, requests, queue / requests / 1e6, compute / requests / 1e6, batch))
    ranked = [stage for stage in stages if stage.model.partition("_")[0] in contract.STAGES]
    others = [stage for stage in stages if stage.model.partition("_")[0] not in contract.STAGES]
    return ranked + [stage for stage in others if not (ranked and stage.model.startswith("rank"))]
