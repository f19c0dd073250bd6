"""What every peer serves: the same three stages of the same release, on packed requests, bytes in and bytes out.

A request is the content of PACKED_REQUEST and an answer that of PACKED_RESPONSE (trirank.packing), so no server here
pays for a message of many parts. ``Batcher`` is the micro-batching that a server without any of its own is given: a
thread runs the stages on all that has come in while it worked.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from trirank import contract
from trirank_backend.pipeline import Pipeline

RELEASE, CONCURRENCY, MAX_BATCH = "PEER_RELEASE", "PEER_WORKERS", "PEER_MAX_BATCH"
"""Environment variables that tell a server what to serve, and its tuned settings."""
if "PEER_SWITCH" in os.environ:  # seconds after which a thread lets another one have the interpreter
    sys.setswitchinterval(float(os.environ["PEER_SWITCH"]))


def workers() -> int:
    """Processes that work."""
    return int(os.environ.get(CONCURRENCY, "1"))


def max_batch() -> int:
    """Requests in a batch; 1: none are made; 0: nor is there a thread for the work, where that can be chosen."""
    return int(os.environ.get(MAX_BATCH, str(contract.MAX_BATCH)))


def _stay_on_a_core() -> None:
    """With PEER_PIN each process that loads the stages takes the next core: the first whose number is not yet a file in
    PEER_SLOTS, where it makes one."""
    if "PEER_PIN" not in os.environ:
        return
    for core in sorted(os.sched_getaffinity(0)):
        try:
            os.close(os.open(Path(os.environ["PEER_SLOTS"], str(core)), os.O_CREAT | os.O_EXCL))
        except FileExistsError:  # another process's
            continue
        os.sched_setaffinity(0, {core})
        return


class Stages:
    """The pipeline of the release that PEER_RELEASE names."""

    def __init__(self) -> None:
        _stay_on_a_core()
        release = Path(os.environ[RELEASE])
        manifest = json.loads((release / "manifest.json").read_text())
        model = contract.ENSEMBLE if manifest["pipeline"] == "single" else contract.RANKER
        self._pipeline = Pipeline.load(release, release / "models" / model / "1" / "model.onnx", manifest["engine"])
        self._pipeline.rehearse(release / "requests.json")

    def __call__(self, bodies: list[bytes]) -> list[bytes]:
        """Answers of a batch.

        Raises:
            BackendError: a request is refused; none of this benchmark is.
        """
        packed = [{contract.PACKED_REQUEST.name: np.frombuffer(body, np.uint8)[None]} for body in bodies]
        answers = []
        for answer in self._pipeline(packed):
            if isinstance(answer, Exception):
                raise answer
            answers.append(answer[contract.PACKED_RESPONSE.name].tobytes())
        return answers


class Batcher:
    """Micro-batching in an event loop: the stages run in one thread, on all that has come in meanwhile."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._thread = ThreadPoolExecutor(1)
        self._waiting: list[tuple[bytes, asyncio.Future[bytes]]] = []
        self._come = asyncio.Event()
        self._stages: Stages | None = None

    async def start(self) -> None:
        """Load the stages in the thread that will use them: a user store belongs to the thread that opened it."""
        if not self._most:
            self._stages = Stages()
            return
        self._stages = await asyncio.get_running_loop().run_in_executor(self._thread, Stages)
        if self._most > 1:
            self._worker = asyncio.ensure_future(self._work())

    async def __call__(self, body: bytes) -> bytes:
        """The answer to one request."""
        assert self._stages is not None
        if not self._most:
            return self._stages([body])[0]
        loop = asyncio.get_running_loop()
        if self._most == 1:
            return (await loop.run_in_executor(self._thread, self._stages, [body]))[0]
        future: asyncio.Future[bytes] = loop.create_future()
        self._waiting.append((body, future))
        self._come.set()
        return await future

    async def _work(self) -> None:
        assert self._stages is not None
        loop = asyncio.get_running_loop()
        while True:
            await self._come.wait()
            batch, self._waiting = self._waiting[: self._most], self._waiting[self._most :]
            if not self._waiting:
                self._come.clear()
            try:
                answers = await loop.run_in_executor(self._thread, self._stages, [body for body, _ in batch])
            except Exception as error:  # of one: all of its batch hear of it, and the server goes on
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), answer in zip(batch, answers, strict=True):
                if not future.done():  # its caller has gone
                    future.set_result(answer)
