"""What a team would write instead of Triton: a bare ``grpc.aio`` server that speaks KServe v2 and calls the same three
stages, requests that come while it works taken together.

    python benchmarks/plain_grpc.py RELEASE PORT [--workers N] [--mode batch|thread|direct]

``batch``: the event loop calls the stages on all that has come in; ``thread``: another thread does, while the loop
reads and answers; ``direct``: one request at a time. Workers are processes that share the port.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import signal
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from trirank import contract as c
from trirank_backend.errors import BackendError, InvalidInput
from trirank_backend.pipeline import Pipeline
from trirank_backend.requests import Tensors
from trirank_build.repository.release import graph_place, load_manifest
from tritonclient.grpc import service_pb2, service_pb2_grpc

_NUMPY = {"INT64": np.int64, "INT32": np.int32, "FP32": np.float32}


def tensors_of(message: Any) -> Tensors:
    """What Triton would hand to a stage."""
    tensors: Tensors = {}
    for spec, raw in zip(message.inputs, message.raw_input_contents, strict=True):
        if spec.datatype == "BYTES":
            tensors[spec.name] = np.array([[raw[4:]]], object)
        else:
            tensors[spec.name] = np.frombuffer(raw, _NUMPY[spec.datatype]).reshape(spec.shape)
    return tensors


def reply_of(answer: Tensors) -> Any:
    """What Triton would answer."""
    reply = service_pb2.ModelInferResponse(model_name=c.ENSEMBLE)
    for spec in (spec for spec in c.RESPONSE if not spec.optional):
        reply.outputs.add(name=spec.name, datatype=spec.dtype, shape=answer[spec.name].shape)
        reply.raw_output_contents.append(answer[spec.name].tobytes())
    return reply


class Servicer(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Ranks."""

    def __init__(self, pipeline: Pipeline, mode: str, thread: ThreadPoolExecutor) -> None:
        self._pipeline, self._mode, self._thread = pipeline, mode, thread
        self._waiting: list[tuple[Tensors, asyncio.Future[Any]]] = []
        self._come = asyncio.Event()
        self._worker = asyncio.ensure_future(self._work())

    async def ModelInfer(self, request: Any, context: Any) -> Any:
        tensors = tensors_of(request)
        if self._mode == "direct":
            (answer,) = self._pipeline([tensors])
        else:
            future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            self._waiting.append((tensors, future))
            self._come.set()
            answer = await future
        if isinstance(answer, BackendError):
            bad = isinstance(answer, InvalidInput)
            code = grpc.StatusCode.INVALID_ARGUMENT if bad else grpc.StatusCode.INTERNAL
            await context.abort(code, str(answer))
        return reply_of(answer)

    async def _work(self) -> None:
        while True:
            await self._come.wait()
            batch, self._waiting = self._waiting[: c.MAX_BATCH], self._waiting[c.MAX_BATCH :]
            if not self._waiting:
                self._come.clear()
            requests = [tensors for tensors, _ in batch]
            if self._mode == "thread":
                answers = await asyncio.get_running_loop().run_in_executor(self._thread, self._pipeline, requests)
            else:
                answers = self._pipeline(requests)
            for (_, future), answer in zip(batch, answers, strict=True):
                if not future.done():  # its caller has gone
                    future.set_result(answer)
            await asyncio.sleep(0)


async def serve(release: Path, port: int, mode: str) -> None:
    """Until it is told to end."""
    manifest = load_manifest(release)
    graph = release / graph_place(manifest["pipeline"])
    thread = ThreadPoolExecutor(1)
    load = partial(Pipeline.load, release, graph, manifest["engine"])
    # The user store belongs to the thread that opens it.
    pipeline = await asyncio.get_running_loop().run_in_executor(thread, load) if mode == "thread" else load()
    servicer = Servicer(pipeline, mode, thread)
    server = grpc.aio.server(options=[("grpc.so_reuseport", 1)])
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
    assert server.add_insecure_port(f"127.0.0.1:{port}") == port
    await server.start()
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    await stopped.wait()
    await server.stop(1)


def worker(release: Path, port: int, mode: str) -> None:
    """One process."""
    asyncio.run(serve(release, port, mode))


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("release", type=Path)
    parser.add_argument("port", type=int)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--mode", choices=["batch", "thread", "direct"], default="batch")
    given = parser.parse_args()
    if given.workers == 1:
        worker(given.release, given.port, given.mode)
        return
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=worker, args=(given.release, given.port, given.mode)) for _ in range(given.workers)
    ]
    for process in processes:
        process.start()

    def stop(*_: Any) -> None:
        for process in processes:
            process.terminate()

    signal.signal(signal.SIGTERM, stop)
    for process in processes:
        process.join()


if __name__ == "__main__":
    main()
