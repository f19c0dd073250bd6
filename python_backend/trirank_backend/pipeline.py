"""The three steps one after the other in one process: what the pipeline ``single`` serves."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from trirank import RankRequest, contract
from trirank._codec import packed_request

from trirank_backend.errors import BackendError, InvalidRelease, StageFailed, TooLate
from trirank_backend.preprocess import Prepared, Preprocess
from trirank_backend.requests import Tensors
from trirank_backend.rerank import Rerank
from trirank_backend.scoring import Ranker, load_ranker

GRAPH = "model.onnx"


class Pipeline:
    """Preprocess, ranker and rerank.

    Attributes:
        seconds: stage → seconds that it has worked so far.
    """

    def __init__(self, preprocess: Preprocess, ranker: Ranker, rerank: Rerank) -> None:
        self._preprocess, self._ranker, self._rerank = preprocess, ranker, rerank
        self.seconds = dict.fromkeys(contract.STAGES, 0.0)

    @classmethod
    def load(cls, release: Path, graph: Path, engine: str, threads: int = 1) -> Pipeline:
        """Open a release's files.

        Args:
            graph: the ranker's ONNX file; engine: one of scoring.ENGINES; threads: of one of its calls.
        """
        return cls(Preprocess.load(release), load_ranker(graph, engine, threads), Rerank.load(release))

    def rehearse(self, requests: Path, rounds: int = 3) -> None:
        """Answer a release's recorded requests: all is warm then, and proved to work.

        Args:
            requests: their file, JSON.

        Raises:
            InvalidRelease: one of them is not answered.
        """
        with self._preprocess.unlogged():
            for raw in json.loads(requests.read_text()) * rounds:
                packed = np.frombuffer(packed_request(RankRequest.from_dict(raw))[0], np.uint8)[None]
                (answer,) = self([{contract.PACKED_REQUEST.name: packed}])
                if isinstance(answer, BackendError):
                    raise InvalidRelease(f"a recorded request of {requests.parent.name} failed: {answer}")
        self.seconds.update(dict.fromkeys(contract.STAGES, 0.0))

    def close(self) -> None:
        """Let go of the user store."""
        self._preprocess.close()

    def __call__(self, requests: list[Tensors], deadlines: list[float] | None = None) -> list[Tensors | BackendError]:
        """What rerank answers each request, or why there is nothing.

        Args:
            deadlines: moments in µs since 1970 after which a request is not worked on any more. The ranker takes the
                requests one by one, and each is asked for before.
        """
        started = time.perf_counter()
        prepared = self._preprocess(requests)
        started = self._count(contract.PREPROCESS, started)
        # All through the ranker, then all through rerank: each finds its own code and data in the caches still.
        scored = [
            self._score(one, deadline)
            for one, deadline in zip(prepared, deadlines or [math.inf] * len(requests), strict=True)
        ]
        started = self._count(contract.RANKER, started)
        answers = [self._rerank_one(scores, one) for scores, one in zip(scored, prepared, strict=True)]
        self._count(contract.RERANK, started)
        return answers

    def _score(self, prepared: Prepared | BackendError, deadline: float) -> NDArray[np.float32] | BackendError:
        if not isinstance(prepared, Prepared):
            return prepared
        if deadline < time.time() * 1e6:
            return TooLate(f"{contract.RANKER} did not work on it: {contract.TOO_LATE}")
        try:
            return self._ranker(prepared.ranker)
        except Exception as error:  # engines' exceptions share no base; the others' requests are not at fault
            failure = StageFailed(
                f"{contract.RANKER} failed ({type(error).__name__}: {error}); the server's log says where"
            )
            failure.__cause__ = error
            return failure

    def _rerank_one(
        self, scores: NDArray[np.float32] | BackendError, prepared: Prepared | BackendError
    ) -> Tensors | BackendError:
        if isinstance(scores, BackendError):
            return scores
        assert isinstance(prepared, Prepared)  # what has scores was prepared
        try:
            return self._rerank(scores, prepared.handover)
        except BackendError as error:
            return error
        except Exception as error:  # the others of its batch have been scored already
            failure = StageFailed(
                f"{contract.RERANK} failed ({type(error).__name__}: {error}); the server's log says where"
            )
            failure.__cause__ = error
            return failure

    def _count(self, stage: str, started: float) -> float:
        now = time.perf_counter()
        self.seconds[stage] += now - started
        return now
